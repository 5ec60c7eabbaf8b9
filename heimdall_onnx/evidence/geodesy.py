"""What a difference in degrees means on the ground, and how likely a true position is.

Distances are geodesics on the WGS84 ellipsoid as PROJ computes them (Karney, "Algorithms for
geodesics", Journal of Geodesy 87, 2013).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from pyproj import Geod

from heimdall_onnx.common.arrays import Floats


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


def negative_log_likelihood(residual: Floats, deviations: Floats) -> Floats:
    """Negative log-likelihood (N,) in nats of independent normal errors.

    Args:
        residual: Prediction minus truth (N, 2).
        deviations: Predicted standard deviations (N, 2) in the same unit.

    Returns:
        Infinite where a residual is no number or a deviation not a finite, positive one.
    """
    nats = np.full(len(residual), np.inf)
    usable = usable_rows(residual, deviations)
    squares, sigma = squared_scores(residual[usable], deviations[usable]), deviations[usable]
    nats[usable] = (0.5 * squares + np.log(sigma) + 0.5 * math.log(2 * math.pi)).sum(axis=1)
    return nats


def squared_scores(residual: Floats, deviations: Floats) -> Floats:
    """Squares of residuals in units of the deviations, both (N, 2)."""
    with np.errstate(over="ignore"):  # of a deviation next to zero
        return np.asarray((residual / deviations) ** 2)


def usable_rows(residual: Floats, deviations: Floats) -> npt.NDArray[np.bool_]:
    """Rows (N,) with a residual that is a number and deviations that are finite and positive."""
    sound = np.isfinite(residual) & np.isfinite(deviations) & (deviations > 0)
    return np.asarray(sound.all(axis=1))
