"""Error statistics that grow with neither the number of samples nor their order.

Quantiles come from REQ sketches (Cormode et al., "Relative Error Streaming Quantiles", PODS 2021;
Apache DataSketches), which are most precise at high ranks: exact up to some hundred values, and
beyond that with a rank whose standard error is about 0.3% of (1 - rank).
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from datasketches import req_floats_sketch

from heimdall_onnx.signature import TensorSpec

Floats = npt.NDArray[np.float64]

_SKETCH_K = 64
WORST_SAMPLES = 8


class Quantiles:
    """Streamed quantiles of non-negative numbers."""

    def __init__(self) -> None:
        self._sketch = req_floats_sketch(_SKETCH_K)

    def update(self, values: npt.NDArray[Any]) -> None:
        """Add ``values``; NaN is left out, and what float32 can't hold counts as Inf."""
        with np.errstate(over="ignore"):
            flat = np.asarray(values, dtype=np.float32).ravel()
        self._sketch.update(flat[~np.isnan(flat)])

    def __call__(self, rank: float) -> float:
        """The value at ``rank`` in [0, 1]; NaN while nothing was added."""
        return float("nan") if self._sketch.is_empty() else float(self._sketch.get_quantile(rank))

    def cdf(self, points: Floats) -> Floats:
        """Fraction of values at or below each of ``points`` (ascending)."""
        if self._sketch.is_empty():
            return np.full(points.shape, np.nan)
        ranks = self._sketch.get_cdf(points.astype(np.float32), True)
        return np.asarray(ranks, dtype=np.float64)[: points.size]


@dataclass(frozen=True)
class WorstSample:
    """A sample with a large error.

    Attributes:
        sample: Its index in the data.
        error: Its largest absolute error over the output's elements.
        excess: Its largest error in units of what is allowed there, atol + rtol·|reference|.
        element: Index of that element in the flattened output of the sample.
        reference: The PyTorch model's first values at that sample, eight at most.
        value: The ONNX model's first values at that sample.
    """

    sample: int
    error: float
    excess: float
    element: int
    reference: tuple[float, ...]
    value: tuple[float, ...]


@dataclass(frozen=True)
class ErrorStatistics:
    """How far one output is from its reference; absolute errors in the output's unit.

    Attributes:
        output: Name of the output.
        unit: Its unit.
        count: Number of elements compared.
        mean: Mean absolute error (MAE).
        maximum: Largest absolute error.
        p50: Median absolute error.
        p99: 99th percentile of the absolute error.
        p999: 99.9th percentile of the absolute error.
        ulp_p50: Median error in units in the last place of the reference.
        ulp_p999: 99.9th percentile of the error in units in the last place.
        cosine: Cosine similarity of all elements, in float64.
        violations: Elements outside atol + rtol·|reference|.
        excess: Largest error in units of what is allowed there, atol + rtol·|reference|.
        nonfinite_mismatches: Elements that are NaN or Inf on one side only, or differently.
        lowest: Smallest finite element of the ONNX model's output.
        highest: Largest finite element of the ONNX model's output.
        nonfinite: Elements of the ONNX model's output that are NaN or Inf.
        worst: The samples with the largest errors, largest first.
        error_edges: Ascending absolute errors at which ``error_cdf`` is given.
        error_cdf: Fraction of elements with an error at or below each edge.
    """

    output: str
    unit: str | None
    count: int
    mean: float
    maximum: float
    p50: float
    p99: float
    p999: float
    ulp_p50: float
    ulp_p999: float
    cosine: float
    violations: int
    excess: float
    nonfinite_mismatches: int
    lowest: float
    highest: float
    nonfinite: int
    worst: tuple[WorstSample, ...]
    error_edges: tuple[float, ...]
    error_cdf: tuple[float, ...]

    def summary(self) -> dict[str, Any]:
        """The scalar statistics, JSON-serialisable."""
        skipped = {"worst", "error_edges", "error_cdf"}
        return {k: v for k, v in vars(self).items() if k not in skipped}


class ErrorAccumulator:
    """Collects `ErrorStatistics` of one output, batch by batch, in constant memory."""

    def __init__(self, spec: TensorSpec, *, atol: float, rtol: float) -> None:
        self._spec, self._atol, self._rtol = spec, atol, rtol
        self._errors, self._ulps = Quantiles(), Quantiles()
        self._count = self._finite = self._violations = self._mismatches = 0
        self._nonfinite = 0
        self._excess = 0.0
        self._sum = self._maximum = self._dot = self._ref2 = self._val2 = 0.0
        self._lowest, self._highest = np.inf, -np.inf
        self._worst: list[tuple[float, int, WorstSample]] = []

    def update(self, reference: npt.NDArray[Any], value: npt.NDArray[Any], first: int) -> None:
        """Add a batch: two arrays of the same shape, and the index of its first sample."""
        a, b = reference.astype(np.float64), value.astype(np.float64)
        if a.shape != b.shape:
            # A wrong shape is as wrong as an output can be: nothing in it corresponds.
            self._count += a.size
            self._mismatches += a.size
            self._violations += a.size
            self._excess = np.inf
            return
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        finite = np.isfinite(a) & np.isfinite(b)
        error = np.where(finite, np.abs(a - np.where(finite, b, 0.0)), np.where(same, 0.0, np.inf))
        self._count += a.size
        self._mismatches += int((~finite & ~same).sum())
        self._nonfinite += int((~np.isfinite(b)).sum())
        allowed = self._atol + self._rtol * np.where(finite, np.abs(a), 0.0)
        self._violations += int((error > allowed).sum())
        excess = error / allowed
        self._excess = max(self._excess, float(excess.max(initial=0.0)))
        self._add_finite(a[finite], b[finite], error[finite])
        self._add_worst(a, b, error, excess, first)

    def _add_finite(self, a: Floats, b: Floats, error: Floats) -> None:
        if a.size == 0:
            return
        self._finite += a.size
        self._sum += float(error.sum())
        self._maximum = max(self._maximum, float(error.max()))
        self._dot += float(a @ b)
        self._ref2 += float(a @ a)
        self._val2 += float(b @ b)
        self._lowest = min(self._lowest, float(b.min()))
        self._highest = max(self._highest, float(b.max()))
        self._errors.update(error)
        dtype = np.dtype(self._spec.dtype)
        if np.issubdtype(dtype, np.floating):
            with np.errstate(over="ignore"):  # next to zero an ULP is almost nothing
                ulps = error / np.spacing(np.abs(a).astype(dtype)).astype(np.float64)
            self._ulps.update(ulps)

    def _add_worst(self, a: Floats, b: Floats, error: Floats, excess: Floats, first: int) -> None:
        if error.size == 0:
            return
        peaks = error.reshape(error.shape[0], -1).max(axis=1)
        # Stable, so that of equally bad samples the first are kept however the data is split.
        for row in np.argsort(-peaks, kind="stable")[:WORST_SAMPLES]:
            element = int(excess[row].argmax())
            sample = WorstSample(
                first + int(row),
                float(peaks[row]),
                float(excess[row].ravel()[element]),
                element,
                tuple(map(float, a[row].ravel()[:8])),
                tuple(map(float, b[row].ravel()[:8])),
            )
            entry = (sample.error, -sample.sample, sample)
            if len(self._worst) < WORST_SAMPLES:
                heapq.heappush(self._worst, entry)
            else:
                heapq.heappushpop(self._worst, entry)

    def result(self) -> ErrorStatistics:
        """The statistics of everything added so far."""
        norm = np.sqrt(self._ref2 * self._val2)
        nothing = self._finite == 0
        wrong = self._mismatches > 0
        edges = np.logspace(-12, 3, 151)
        return ErrorStatistics(
            output=self._spec.name,
            unit=self._spec.unit,
            count=self._count,
            mean=float("nan") if nothing else float("inf") if wrong else self._sum / self._finite,
            maximum=float("nan") if nothing else float("inf") if wrong else self._maximum,
            p50=self._errors(0.5),
            p99=self._errors(0.99),
            p999=self._errors(0.999),
            ulp_p50=self._ulps(0.5),
            ulp_p999=self._ulps(0.999),
            cosine=float(self._dot / norm) if norm > 0 else float("nan"),
            violations=self._violations,
            excess=self._excess,
            nonfinite_mismatches=self._mismatches,
            lowest=self._lowest,
            highest=self._highest,
            nonfinite=self._nonfinite,
            worst=tuple(sample for _, _, sample in sorted(self._worst, key=lambda e: e[:2])[::-1]),
            error_edges=tuple(edges),
            error_cdf=tuple(self._errors.cdf(edges)),
        )
