"""How far positions move, in metres on the ground, and how far they are from the true ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from heimdall_onnx.common.arrays import Rows, parts
from heimdall_onnx.evidence.geodesy import distance_m, error_m
from heimdall_onnx.evidence.parity.statistics import Accumulator, ExactSums, Quantiles, added

MIDDLE = "always the middle"
_ANSWERING = ("PyTorch", "ONNX", MIDDLE)

_CANCELLED = 1e-9  # what rounding leaves of unit vectors that add up to nothing


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
