"""What a difference in degrees means in metres on the ground (WGS84 geodesics)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from pyproj import Geod

from heimdall_onnx.statistics import Quantiles

MIDDLE = "always the middle"

Floats = npt.NDArray[np.float64]


@lru_cache
def _wgs84() -> Geod:
    return Geod(ellps="WGS84")


def distance_m(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> Floats:
    """Geodesic distance in metres between positions (N, 2) in degrees latitude, longitude.

    A latitude beyond a pole, which an unbounded regression can give, counts as the pole.
    """
    lat_a, lat_b = (np.clip(p[:, 0].astype(np.float64), -90, 90) for p in (a, b))
    lon_a, lon_b = (p[:, 1].astype(np.float64) for p in (a, b))
    return np.asarray(_wgs84().inv(lon_a, lat_a, lon_b, lat_b)[2], dtype=np.float64)


def offset_km(positions: npt.NDArray[Any], origin: tuple[float, float]) -> Floats:
    """East and north in kilometres (N, 2) of positions (N, 2) as seen from ``origin``.

    Azimuthal equidistant: the distance from the origin is true, as is the direction.
    """
    lat = np.clip(positions[:, 0].astype(np.float64), -90, 90)
    lon = positions[:, 1].astype(np.float64)
    azimuth, _, metres = _wgs84().inv(
        np.full_like(lon, origin[1]), np.full_like(lat, origin[0]), lon, lat
    )
    angle = np.radians(azimuth)
    unit = np.stack([np.sin(angle), np.cos(angle)], axis=1)
    return np.asarray(unit * np.asarray(metres)[:, None] / 1000, dtype=np.float64)


def km_per_degree(latitude: float) -> tuple[float, float]:
    """Kilometres of one degree of latitude and of longitude at ``latitude``."""
    south, north = max(latitude - 0.25, -90.0), min(latitude + 0.25, 90.0)
    start = np.array([[south, 0.0], [latitude, 0.0]])
    end = np.array([[north, 0.0], [latitude, 0.5]])
    upward, eastward = distance_m(start, end) / 1000
    return float(upward / (north - south)), float(eastward / 0.5)


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


class GroundAccumulator:
    """Collects a `GroundReport` batch by batch, in constant memory."""

    def __init__(self, middle: tuple[float, float] | None) -> None:
        self._middle = middle
        self._displacement = Quantiles()
        self._maximum = 0.0
        self._task = {who: Quantiles() for who in ("PyTorch", "ONNX", MIDDLE)}

    def update(
        self,
        pytorch: npt.NDArray[Any],
        onnx: npt.NDArray[Any],
        truth: npt.NDArray[Any] | None,
    ) -> None:
        """Add a batch of positions (N, 2) in degrees, and the true ones where known."""
        moved = distance_m(pytorch, onnx)
        self._displacement.update(moved)
        self._maximum = np.max(moved, initial=self._maximum)
        if truth is None or self._middle is None:
            return
        answers = (pytorch, onnx, np.broadcast_to(self._middle, truth.shape))
        for quantiles, answer in zip(self._task.values(), answers, strict=True):
            quantiles.update(distance_m(answer, truth))

    def result(self) -> GroundReport:
        """The statistics of everything added so far."""
        return GroundReport(
            displacement_p50_m=self._displacement(0.5),
            displacement_p99_m=self._displacement(0.99),
            displacement_max_m=float(self._maximum),
            middle=self._middle,
            task=()
            if self._middle is None
            else tuple(TaskError(who, q(0.5), q(0.95)) for who, q in self._task.items()),
        )


def middle_of(positions: Floats | None, meta: dict[str, Any]) -> tuple[float, float] | None:
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
    turn = np.exp(1j * np.radians(positions[:, 1])).mean()
    return float(positions[:, 0].mean()), float(np.degrees(np.angle(turn)))
