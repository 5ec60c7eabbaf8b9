"""How far the outputs of both models may lie apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from heimdall_onnx.common.arrays import Floats

EVALUATION = "evaluation data"
RTOL = 1.3e-6  # torch.testing's default for float32

ADVERSARIAL_FACTOR = 10.0
NOISE_FLOOR_FACTOR = 2.0
# An activation's approximation may end so many units in the last place beyond its limit.
RANGE_ULPS = 4
_LEAST_ULPS = 2
# Below this mean magnitude an output is small for the documented tolerance, an error of degrees.
_SMALL = 0.1


@dataclass(frozen=True)
class Limit:
    """What an element may be off by: atol + rtol·|reference|."""

    atol: float
    rtol: float

    def allowed(self, reference: Floats) -> Floats:
        """What each element may be off by."""
        return np.asarray(self.atol + self.rtol * np.abs(reference))

    def times(self, factor: float) -> Limit:
        """So many times as much."""
        return Limit(factor * self.atol, factor * self.rtol)


def tolerance_factor(kind: str, valid: bool) -> float:
    """What the tolerance of the elements is multiplied by on a kind of input."""
    return 1.0 if valid or kind == EVALUATION else ADVERSARIAL_FACTOR


def span_of(span: tuple[float, float], dtype: str | np.dtype[Any]) -> tuple[float, float]:
    """A range as its dtype holds it, and four of its last units: activations are approximated."""
    kind = np.dtype(dtype)
    if kind.kind != "f":
        return span
    low, high = map(float, np.asarray(span, kind))
    finite = [abs(end) for end in (low, high) if np.isfinite(end)]
    slack = RANGE_ULPS * float(np.finfo(kind).eps) * max(finite, default=0.0)
    return low - slack, high + slack


def limit_of(ordinary: npt.NDArray[Any], tolerance: float) -> Limit:
    """What an element of an output may be off by, and the output on average.

    Of a floating-point output whose mean magnitude is below 0.1 so much less of the tolerance; of
    one with less precision than float32 two units in its last place where that is more.

    Args:
        ordinary: The output on ordinary inputs.
        tolerance: The documented one.
    """
    if ordinary.dtype.kind != "f":
        return Limit(tolerance, RTOL)
    less_than_float32 = ordinary.dtype.itemsize < 4
    ulps = _LEAST_ULPS * float(np.finfo(ordinary.dtype).eps) if less_than_float32 else 0.0
    sizes = np.abs(ordinary[np.isfinite(ordinary)].astype(np.float64))
    size = min(1.0, float(sizes.mean()) / _SMALL) if sizes.size else 1.0
    return Limit(max(tolerance, ulps) * size, max(RTOL, ulps))
