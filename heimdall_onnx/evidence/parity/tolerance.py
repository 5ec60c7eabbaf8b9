"""How far the outputs of both models may lie apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
# Below this share of it a place along the fixed axes, no longer than that, has its own quantity.
_FAR_SMALLER, _MOST_PLACES = 0.01, 64


@dataclass(frozen=True)
class Limit:
    """What an element may be off by: atol + rtol·|reference|, and of atol only its share."""

    atol: float
    rtol: float
    shares: Any = 1.0  # or lists of them, which broadcast

    def allowed(self, reference: Floats) -> Floats:
        """What each element may be off by."""
        return self.atol * np.asarray(self.shares) + self.rtol * np.abs(reference)

    def times(self, factor: float) -> Limit:
        """So many times as much."""
        return replace(self, atol=factor * self.atol, rtol=factor * self.rtol)


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


def limit_of(
    ordinary: Sequence[npt.NDArray[Any]], shape: Sequence[int | str], tolerance: float
) -> Limit:
    """What an element of an output may be off by, and the output on average.

    Of a floating-point output whose mean magnitude is below 0.1 so much less of the tolerance; of
    one with less precision than float32 two units in its last place where that is more. Where its
    largest at a place of its fixed axes is below 0.1 and a hundredth of its mean magnitude, such as
    in a column of delays beside degrees, so much less there too.

    Args:
        ordinary: The output on ordinary inputs, batch by batch.
        shape: Its axes, the sample axis first; strings are dynamic.
        tolerance: The documented one.
    """
    dtype = ordinary[0].dtype
    if dtype.kind != "f":
        return Limit(tolerance, RTOL)
    ulps = _LEAST_ULPS * float(np.finfo(dtype).eps) if dtype.itemsize < 4 else 0.0
    sizes = [np.where(np.isfinite(a), np.abs(a.astype(np.float64)), np.nan) for a in ordinary]
    flat = np.concatenate([a[np.isfinite(a)] for a in sizes])
    mean = float(flat.mean()) if flat.size else _SMALL
    size = min(_SMALL, mean)
    along = [i for i, n in enumerate(shape) if i and not (isinstance(n, int) and n <= _MOST_PLACES)]
    tops = [np.nan_to_num(a).max(axis=(0, *along), keepdims=True, initial=0) for a in sizes]
    largest = np.max(tops, axis=0)
    small = (largest > 0) & (largest < min(_FAR_SMALLER * mean, size))  # all zeros have no size
    shares = np.divide(largest, size, out=np.ones_like(largest), where=small)
    found = shares.tolist() if small.any() else 1.0
    return Limit(max(tolerance, ulps) * (size / _SMALL), max(RTOL, ulps), found)
