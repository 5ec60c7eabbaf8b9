"""What a difference in degrees means in metres on the ground.

Distances are geodesics on the WGS84 ellipsoid as PROJ computes them (Karney, "Algorithms for
geodesics", Journal of Geodesy 87, 2013).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from pyproj import Geod

from heimdall_onnx.common.arrays import Floats, Rows, parts
from heimdall_onnx.evidence.parity.statistics import Accumulator, ExactSums, Quantiles, added

MIDDLE = "always the middle"
_ANSWERING = ("PyTorch", "ONNX", MIDDLE)

_CANCELLED = 1e-9  # what rounding leaves of unit vectors that add up to nothing


@lru_cache
def _wgs84() -> Geod:
    return Geod(ellps="WGS84")


def geodesics(
    origin: Sequence[npt.ArrayLike] | Floats, places: npt.NDArray[Any]
) -> tuple[Floats, Floats]:
    """Lengths of the geodesics from ``origin`` to ``places``, and the directions they leave in.

    A latitude beyond a pole, which an unbounded regression can give, counts as the pole.

    Args:
        origin: Latitude and longitude in degrees, one place or N.
        places: Positions (N, 2) in degrees latitude, longitude.

    Returns:
        Metres (N,) and degrees clockwise from north (N,).
    """
    latitude, longitude = np.array(places.T, np.float64)
    begin = (np.full_like(longitude, origin[1]), np.full_like(latitude, origin[0]).clip(-90, 90))
    azimuth, _, metres = _wgs84().inv(*begin, longitude, latitude.clip(-90, 90))
    return np.asarray(metres, np.float64), np.asarray(azimuth, np.float64)


def distance_m(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> Floats:
    """Geodesic distance in metres between positions (N, 2) in degrees latitude, longitude."""
    return geodesics(a.T, b)[0]


def error_m(answers: npt.NDArray[Any], truth: npt.NDArray[Any]) -> Floats:
    """Distance in metres (N,) of ``answers`` (N, 2) in degrees from the true positions.

    An answer with NaN or Inf is no place at all, and infinitely far from every one.
    """
    finite = np.isfinite(answers).all(axis=1)
    metres = np.full(len(answers), np.inf)
    metres[finite] = distance_m(answers[finite], truth[finite])
    return metres


def difference_degrees(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> Floats:
    """``a - b`` of positions (N, 2) in degrees, the longitude the short way round.

    NaN where a position is NaN or Inf.
    """
    with np.errstate(invalid="ignore"):
        difference = a.astype(np.float64) - b.astype(np.float64)
        difference[~np.isfinite(difference)] = np.nan
        difference[:, 1] = (difference[:, 1] + 180) % 360 - 180
    return difference


def offset_km(positions: npt.NDArray[Any], origin: tuple[npt.ArrayLike, npt.ArrayLike]) -> Floats:
    """East and north in kilometres (N, 2) of positions (N, 2) as seen from ``origin``, or from N.

    Azimuthal equidistant: the distance from the origin is true, as is the direction.
    """
    metres, azimuth = geodesics(origin, positions)
    angle = np.radians(azimuth)
    unit = np.stack([np.sin(angle), np.cos(angle)], axis=1)
    return np.asarray(unit * metres[:, None] / 1000)


def metres_per_degree(latitude: npt.ArrayLike) -> tuple[Floats, Floats]:
    """Metres of one degree of latitude and of longitude at ``latitude``, of any shape, in degrees.

    From the ellipsoid's radii of curvature in the meridian and in the prime vertical (Snyder, Map
    Projections: A Working Manual, USGS Professional Paper 1395, 1987, equations 4-18 and 4-20).
    """
    phi = np.radians(np.clip(np.asarray(latitude, dtype=np.float64), -90, 90))
    axis, squared = _wgs84().a, _wgs84().es
    shrink = 1 - squared * np.sin(phi) ** 2
    north = np.radians(axis * (1 - squared) / shrink**1.5)
    # The cosine of 90° in floating point is not quite zero.
    east = np.radians(axis * np.where(np.abs(phi) < np.pi / 2, np.cos(phi), 0.0) / shrink**0.5)
    return north, east


@dataclass(frozen=True)
class TaskError:
    """Distance between answers and true positions.

    Attributes:
        who: ``"PyTorch"``, ``"ONNX"`` or `MIDDLE`.
        median_m: Median distance in metres.
        p95_m: 95th percentile in metres.
    """

    who: str
    median_m: float
    p95_m: float


@dataclass(frozen=True)
class GroundReport:
    """Positions in metres.

    Attributes:
        displacement_p50_m: Median distance between the PyTorch and the ONNX model's positions.
        displacement_p99_m: 99th percentile of it.
        displacement_max_m: Largest of it; NaN if a position is NaN or Inf.
        middle: The constant answer that the task error is held against, degrees; None without
            labels.
        task: Task errors of both models and of that constant; empty without labels.
    """

    displacement_p50_m: float
    displacement_p99_m: float
    displacement_max_m: float
    middle: tuple[float, float] | None
    task: tuple[TaskError, ...]


class GroundAccumulator(Accumulator):
    """Collects a `GroundReport` batch by batch, in constant memory; to be pickled and merged.

    Args:
        middle: The constant answer to hold the task error against, degrees; None without labels.
    """

    merging: ClassVar = {
        **dict.fromkeys(("_displacement", "_task"), added),
        "_maximum": np.maximum,  # NaN stays
    }

    def __init__(self, middle: tuple[float, float] | None) -> None:
        self._middle = middle
        self._displacement = Quantiles()
        self._maximum = 0.0
        self._task = tuple(Quantiles() for _ in _ANSWERING)

    def update(
        self,
        pytorch: npt.NDArray[Any],
        onnx: npt.NDArray[Any],
        truth: npt.NDArray[Any] | None,
    ) -> None:
        """Add a batch of positions (N, 2) in degrees, and the true ones where known."""
        moved = distance_m(pytorch, onnx)
        self._displacement.update(moved)
        self._maximum = float(np.max(moved, initial=self._maximum))  # NaN stays
        if truth is None or self._middle is None:
            return
        answers = (pytorch, onnx, np.broadcast_to(self._middle, truth.shape))
        for quantiles, answer in zip(self._task, answers, strict=True):
            quantiles.update(error_m(answer, truth))

    def result(self) -> GroundReport:
        """The statistics of everything added so far."""
        return GroundReport(
            displacement_p50_m=self._displacement(0.5),
            displacement_p99_m=self._displacement(0.99),
            displacement_max_m=float(self._maximum),
            middle=self._middle,
            task=()
            if self._middle is None
            else tuple(
                TaskError(who, q(0.5), q(0.95))
                for who, q in zip(_ANSWERING, self._task, strict=True)
            ),
        )


def mean_place(positions: npt.NDArray[Any]) -> tuple[float, float] | None:
    """Mean of positions (N, 2) on the sphere, so that 179° and −179° have 180° between them.

    None for no positions, and for those that cancel.
    """
    lat = np.radians(np.clip(positions[:, 0].astype(np.float64), -90, 90))
    lon = np.radians(positions[:, 1].astype(np.float64))
    along = np.cos(lat)
    x, y, z = (float(c.sum()) for c in (along * np.cos(lon), along * np.sin(lon), np.sin(lat)))
    if math.hypot(x, y, z) < _CANCELLED:
        return None
    return math.degrees(math.atan2(z, math.hypot(x, y))), math.degrees(math.atan2(y, x))


def middle_of(positions: Rows | None, meta: Mapping[str, Any]) -> tuple[float, float] | None:
    """The constant answer to beat, in degrees; None without labels.

    The training centre if ``meta`` records it as ``centre``, else the labels' own mean, which no
    constant known beforehand could improve on by much. Longitudes are averaged on the circle, so
    that the middle of an area across the date line lies in that area.
    """
    if positions is None:
        return None
    if (centre := meta.get("centre")) is not None:
        latitude, longitude = centre
        return float(latitude), float(longitude)
    sums, count = ExactSums(3), 0
    for _, part in parts(positions):
        longitude = np.radians(part[:, 1])
        sums.add(part[:, 0], np.cos(longitude), np.sin(longitude))
        count += len(part)
    latitude, east, north = sums.values(count)
    return latitude, math.degrees(math.atan2(north, east))
