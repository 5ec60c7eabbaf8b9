"""Error statistics that grow with neither the number of samples nor their order.

Every accumulator can be pickled and merged with others, so that many processes each read a part of
the data. However the samples are parted and in whatever order the parts are merged, counts,
extremes, sums and worst samples are those of one process that reads everything, bit by bit; only
quantiles are estimates.

Quantiles come from REQ sketches (Cormode et al., "Relative Error Streaming Quantiles", PODS 2021;
Apache DataSketches), which are most precise at high ranks, merged or not: exact up to some hundred
values, and beyond that with a rank whose standard error is about 0.2% of (1 - rank). They are
preferred to the better known KLL sketches (Karnin, Lang and Liberty, "Optimal Quantile
Approximation in Streams", FOCS 2016), whose error is the same at every rank, and so as large as
1 - rank itself where errors are judged, at 0.99 and 0.999. The price is a size that grows with the
logarithm of the number of values: some 30 kB after 10⁶, 60 kB after 10¹².

Sums are kept exactly, as whole numbers of the smallest unit there is: the superaccumulator of
Neal ("Fast Exact Summation Using Small and Large Superaccumulators", arXiv:1505.05571, 2015).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any, ClassVar, NamedTuple, Self, TypeVar

import numpy as np
import numpy.typing as npt
from datasketches import req_floats_sketch
from pydantic import Field

from heimdall_onnx.common.arrays import Floats
from heimdall_onnx.common.errors import InputError
from heimdall_onnx.evidence.parity.tolerance import ADVERSARIAL_FACTOR, RTOL, Limit
from heimdall_onnx.model.signature import TensorSpec

_T = TypeVar("_T")
_NotRecorded = Annotated[_T, Field(exclude=True)]

_SKETCH_K = 64
WORST_SAMPLES = 8
_ELEMENTS_AT_ONCE = 1 << 20

# frexp gives a float64 as m·2ᵉ with 0.5 <= |m| < 1 and e from -1073 on: m·2⁵³ is whole.
_LEAST_EXPONENT = -1073
_HIGH_BITS, _LOW_BITS = 27, 26
_UNIT_BITS = _HIGH_BITS + _LOW_BITS - _LEAST_EXPONENT
_SUMMED_AT_ONCE = 1 << 14  # far from the 2²⁶ of which float64 could no longer hold a sum of halves


class Accumulator:
    """Collects statistics batch by batch; to be pickled, and merged with others made like it.

    Attributes:
        merging: By the name of each attribute that grows, what makes one of two of them.
    """

    merging: ClassVar[Mapping[str, Callable[[Any, Any], Any]]] = {}

    def merge(self, other: Self) -> None:
        """Add everything that was added to ``other``, which stays as it is.

        The result is that of one accumulator to which all of it was added, in any order.

        Raises:
            InputError: If ``other`` is of another kind, or is this one.
        """
        kind = type(self).__name__
        if other is self:
            raise InputError(f"{kind} can't be merged with itself: its samples would count twice")
        if type(other) is not type(self):
            raise InputError(f"{kind} can't be merged with {type(other).__name__}: expected {kind}")
        for name, merged in self.merging.items():
            setattr(self, name, merged(getattr(self, name), getattr(other, name)))


def added(mine: Any, further: Any) -> Any:
    """The sum of two numbers or arrays; of accumulators, or tuples of them, the first ones."""
    if isinstance(mine, tuple):
        return tuple(map(added, mine, further))
    if not hasattr(mine, "merge"):
        return mine + further
    mine.merge(further)
    return mine


class ExactSums:
    """Streamed sums of float64 numbers without rounding, and therefore independent of all order.

    Args:
        count: How many sums are kept side by side.
    """

    def __init__(self, count: int) -> None:
        self._totals = [0] * count  # in units of 2^-_UNIT_BITS
        self._beyond = np.zeros(count)  # what is no number, summed as float64 does it

    def add(self, *terms: Floats) -> None:
        """Add to each sum its array (N,)."""
        for start in range(0, terms[0].size, _SUMMED_AT_ONCE):
            self._add(np.stack([array[start : start + _SUMMED_AT_ONCE] for array in terms]))

    def _add(self, block: Floats) -> None:
        finite = np.isfinite(block)
        if not finite.all():
            self._add_beyond(np.where(finite, 0.0, block).T)
            block = np.where(finite, block, 0.0)
        mantissas, exponents = np.frexp(block)
        # Mantissas of one exponent are added in two halves, so that float64 holds their sums.
        mantissas *= 2.0**_HIGH_BITS
        high = np.floor(mantissas)
        low = (mantissas - high) * 2.0**_LOW_BITS
        least = int(exponents.min())
        width = int(exponents.max()) - least + 1
        cells = (exponents + (np.arange(len(block)) * width - least)[:, None]).ravel()
        highs, lows = np.bincount(cells, high.ravel()), np.bincount(cells, low.ravel())
        for cell in np.flatnonzero((highs != 0) | (lows != 0)).tolist():
            row, above = divmod(cell, width)
            whole = (int(highs[cell]) << _LOW_BITS) + int(lows[cell])
            self._totals[row] += whole << (least + above - _LEAST_EXPONENT)

    def _add_beyond(self, values: Floats) -> None:
        with np.errstate(invalid="ignore"):  # of infinities of both signs
            self._beyond = self._beyond + values.sum(axis=0)

    def merge(self, other: ExactSums) -> None:
        """Add the sums of ``other``, of which there must be as many."""
        self._totals = [a + b for a, b in zip(self._totals, other._totals, strict=True)]
        self._add_beyond(other._beyond[None])

    def values(self, divisor: int = 1) -> tuple[float, ...]:
        """The sums divided by ``divisor`` > 0, each rounded once; NaN and Inf as float64 has it."""
        return tuple(
            _rounded(total, divisor << _UNIT_BITS) if beyond == 0 else float(beyond)
            for total, beyond in zip(self._totals, self._beyond, strict=True)
        )


def _rounded(numerator: int, denominator: int) -> float:
    try:
        return numerator / denominator
    except OverflowError:
        return math.inf if numerator > 0 else -math.inf


class Quantiles:
    """Streamed quantiles of non-negative numbers."""

    def __init__(self) -> None:
        self.sketch = req_floats_sketch(_SKETCH_K)

    def __getstate__(self) -> bytes:
        return bytes(self.sketch.serialize())

    def __setstate__(self, state: bytes) -> None:
        self.sketch = req_floats_sketch.deserialize(state)

    def merge(self, other: Quantiles) -> None:
        """Add every value that was added to ``other``, which stays as it is."""
        self.sketch.merge(other.sketch)

    def update(self, values: npt.NDArray[Any]) -> None:
        """Add ``values``; NaN is left out, and what float32 can't hold counts as Inf."""
        with np.errstate(over="ignore"):
            flat = np.asarray(values, dtype=np.float32).ravel()
        self.sketch.update(flat[~np.isnan(flat)])

    def __call__(self, rank: float) -> float:
        """The value at ``rank`` in [0, 1]; NaN while nothing was added."""
        return float("nan") if self.sketch.is_empty() else float(self.sketch.get_quantile(rank))


@dataclass(frozen=True)
class WorstSample:
    """A sample that differs much, and the element in which it does so most.

    Elements and samples are ordered by their error in units of what is allowed there, as the gates
    judge them, and not by the absolute error, which is largest where the values are.

    Attributes:
        sample: Its index in the data.
        error: Absolute error of the element.
        excess: The same in units of what is allowed there, atol + rtol·|reference|.
        element: Its index in the flattened output of the sample.
        reference: The PyTorch model's first values at that sample, eight at most.
        value: The ONNX model's first values at that sample.
        shard: The file of a dataset that it is in; empty where there is none.
    """

    sample: int
    error: float
    excess: float
    element: int
    reference: tuple[float, ...]
    value: tuple[float, ...]
    shard: str = ""


def badness(sample: WorstSample) -> tuple[float, float, int]:
    """Sorts the worst sample first, and of equally bad ones the first of the data.

    The error decides between equal shares of what is allowed, infinite ones among them.
    """
    return -sample.excess, -sample.error, sample.sample


def _worst_of(*parts: Iterable[WorstSample]) -> list[WorstSample]:
    return heapq.nsmallest(WORST_SAMPLES, chain(*parts), key=badness)


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
        worst: The samples that differ most in units of what is allowed, the worst first.
        left_open: Elements beyond what is allowed, but by no more than PyTorch differs there from
            itself where it rounds otherwise (`evidence.parity.rounding`). They count as equal in
            everything else here.
        nan: Elements of the ONNX model's output that are NaN.
        atol: Absolute part of what is allowed.
        rtol: Relative part.
        shares: Of the absolute part, at each place along the output's axes.

    A record holds the single figures alone; read from one, ``worst`` is empty.
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
    worst: _NotRecorded[tuple[WorstSample, ...]] = ()
    left_open: int = 0
    nan: int = 0
    atol: float = 1e-5
    rtol: float = RTOL
    shares: _NotRecorded[Any] = 1.0

    @property
    def limit(self) -> Limit:
        """What an element may be off by."""
        return Limit(self.atol, self.rtol, self.shares)


def element_errors(reference: Floats, value: Floats, limit: Limit) -> tuple[Floats, Floats, Floats]:
    """Absolute errors, element by element: as they are, in units of what is allowed, and that.

    Where only one side is NaN or Inf, or they differ in it, the
    error is infinite; where both are the same it is zero.
    """
    same = (reference == value) | (np.isnan(reference) & np.isnan(value))
    finite = np.isfinite(reference) & np.isfinite(value)
    a, b = np.where(finite, reference, 0.0), np.where(finite, value, 0.0)
    error = np.where(finite, np.abs(a - b), np.where(same, 0.0, np.inf))
    allowed = limit.allowed(a)
    with np.errstate(divide="ignore"):  # nothing may be allowed at all
        excess = np.divide(error, allowed, out=np.zeros_like(error), where=error > 0)
    return error, excess, allowed


class WorstElements(NamedTuple):
    """Of each sample (N,) that element of an output which differs most from its reference.

    Attributes:
        element: Its index in the flattened output of the sample.
        reference: The PyTorch model's value; NaN where the output has no elements.
        value: The ONNX model's.
        error: Absolute error, infinite where only one side is NaN or Inf.
        excess: The same in units of what is allowed there.
    """

    element: npt.NDArray[np.int64]
    reference: Floats
    value: Floats
    error: Floats
    excess: Floats


def worst_elements(
    reference: npt.NDArray[Any], value: npt.NDArray[Any], limit: Limit
) -> WorstElements:
    """Find the elements that differ most in units of what is allowed.

    Args:
        reference: The PyTorch model's output, sample axis first.
        value: The ONNX model's, of the same shape.
        limit: What is allowed.
    """
    width = math.prod(reference.shape[1:])
    if width == 0:
        nothing = np.zeros(len(reference))
        missing = np.full(len(reference), np.nan)
        return WorstElements(nothing.astype(np.int64), missing, missing, nothing, nothing)
    # A part at a time: float64 takes twice the memory, and there may be much of it.
    step = max(1, _ELEMENTS_AT_ONCE // width)
    parts = []
    for start in range(0, max(len(reference), 1), step):
        a, b = (array[start : start + step].astype(np.float64) for array in (reference, value))
        error, excess, _ = element_errors(a, b, limit)
        parts.append(_worst_of_rows(*(s.reshape(-1, width) for s in (a, b, error, excess))))
    return WorstElements(*map(np.concatenate, zip(*parts, strict=True)))


def _worst_of_rows(a: Floats, b: Floats, error: Floats, excess: Floats) -> WorstElements:
    """Those of samples whose elements lie side by side, (N, elements)."""
    # The error decides between equal shares, infinite ones among them.
    furthest = excess == excess.max(axis=1, keepdims=True)
    element = np.where(furthest, error, -1.0).argmax(axis=1)
    rows = np.arange(len(a))
    return WorstElements(element, *(array[rows, element] for array in (a, b, error, excess)))


class ErrorAccumulator(Accumulator):
    """Collects `ErrorStatistics` of one output, batch by batch, in constant memory."""

    merging: ClassVar = {
        **dict.fromkeys(("_errors", "_ulps", "_sums", "_count", "_finite"), added),
        **dict.fromkeys(("_violations", "_mismatches", "_nonfinite", "_open", "_nan"), added),
        **dict.fromkeys(("_excess", "_maximum", "_highest"), max),
        "_lowest": min,
        "_worst": _worst_of,
    }

    def __init__(self, spec: TensorSpec, limit: Limit) -> None:
        self._spec, self._limit = spec, limit
        self._errors, self._ulps = Quantiles(), Quantiles()
        self._count = self._finite = self._violations = self._mismatches = 0
        self._nonfinite = self._open = self._nan = 0
        self._noise = 0.0  # of every element of the batches before, so that it is asked less often
        self._excess = self._maximum = 0.0
        self._sums = ExactSums(4)  # error, reference·value, reference², value²
        self._lowest, self._highest = np.inf, -np.inf
        self._worst: list[WorstSample] = []

    def update(
        self,
        reference: npt.NDArray[Any],
        value: npt.NDArray[Any],
        first: int,
        spread: Callable[[], Mapping[str, Floats]] | None = None,
    ) -> float:
        """Add a batch.

        Args:
            reference: The PyTorch model's output, sample axis first.
            value: The ONNX model's, of the same shape.
            first: Index of the first sample in the whole data.
            spread: Gives by output how far an element may be off besides, since PyTorch differs as
                much from itself. It is asked only where something is beyond what is allowed, and
                no more once something is beyond that too.

        Returns:
            The largest error in it, in units of what is allowed.
        """
        a, b = reference.astype(np.float64), value.astype(np.float64)
        if a.shape != b.shape:
            # A wrong shape is as wrong as an output can be: nothing in it corresponds.
            self._count += a.size
            self._mismatches += a.size
            self._violations += a.size
            self._excess = np.inf
            return self._excess
        finite = np.isfinite(a) & np.isfinite(b)
        error, excess, allowed = element_errors(a, b, self._limit)
        beyond = error > allowed
        if spread is not None and beyond.any() and not self._violations:
            if (error > allowed + self._noise).any():
                further = spread()[self._spec.name]
                # No more than this, since all of a small batch may be choices made otherwise.
                self._noise = min(float(further.min()), ADVERSARIAL_FACTOR * self._limit.atol)
            else:
                further = np.full(error.shape, self._noise)
            left_open = beyond & (error <= allowed + further)
            error, excess = (np.where(left_open, 0.0, array) for array in (error, excess))
            beyond, finite = beyond & ~left_open, finite & ~left_open
            self._open += int(left_open.sum())
            b = np.where(left_open, a, b)
        self._count += a.size
        self._mismatches += int((np.isinf(error) & ~finite).sum())
        self._nonfinite += int((~np.isfinite(b)).sum())
        self._nan += int(np.isnan(b).sum())
        self._violations += int(beyond.sum())
        largest = float(excess.max(initial=0.0))
        self._excess = max(self._excess, largest)
        self._add_finite(a[finite], b[finite], error[finite])
        self._add_worst(a, b, error, excess, first)
        return largest

    def _add_finite(self, a: Floats, b: Floats, error: Floats) -> None:
        if a.size == 0:
            return
        self._finite += a.size
        with np.errstate(over="ignore"):
            self._sums.add(error, a * b, a * a, b * b)
        self._maximum = max(self._maximum, float(error.max()))
        # Which of the two zeros comes first must not matter: -0.0 + 0.0 is 0.0.
        self._lowest = min(self._lowest, float(b.min()) + 0.0)
        self._highest = max(self._highest, float(b.max()) + 0.0)
        self._errors.update(error)
        dtype = np.dtype(self._spec.dtype)
        if np.issubdtype(dtype, np.floating):
            with np.errstate(over="ignore"):  # next to zero an ULP is almost nothing
                ulps = error / np.spacing(np.abs(a).astype(dtype)).astype(np.float64)
            self._ulps.update(ulps)

    def _add_worst(self, a: Floats, b: Floats, error: Floats, excess: Floats, first: int) -> None:
        if error.size == 0:
            return
        sides = [array.reshape(len(array), -1) for array in (a, b, error, excess)]
        found = _worst_of_rows(*sides)
        # Stable, so that of equally bad samples the first are kept however the data is split.
        order = np.lexsort((-found.error, -found.excess))[:WORST_SAMPLES]
        rows = (
            WorstSample(
                first + row,
                float(found.error[row]),
                float(found.excess[row]),
                int(found.element[row]),
                tuple(map(float, sides[0][row, :8])),
                tuple(map(float, sides[1][row, :8])),
            )
            for row in order.tolist()
        )
        self._worst = _worst_of(self._worst, rows)

    def result(self) -> ErrorStatistics:
        """The statistics of everything added so far."""
        _, dot, ref2, val2 = self._sums.values()
        norm = math.sqrt(ref2 * val2)
        nothing = self._finite == 0
        wrong = self._mismatches > 0
        return ErrorStatistics(
            output=self._spec.name,
            unit=self._spec.unit,
            count=self._count,
            mean=math.nan if nothing else math.inf if wrong else self._sums.values(self._finite)[0],
            maximum=math.nan if nothing else math.inf if wrong else self._maximum,
            p50=self._errors(0.5),
            p99=self._errors(0.99),
            p999=self._errors(0.999),
            ulp_p50=self._ulps(0.5),
            ulp_p999=self._ulps(0.999),
            cosine=dot / norm if norm > 0 else float("nan"),
            violations=self._violations,
            excess=self._excess,
            nonfinite_mismatches=self._mismatches,
            lowest=self._lowest,
            highest=self._highest,
            nonfinite=self._nonfinite,
            worst=tuple(self._worst),
            left_open=self._open,
            nan=self._nan,
            **vars(self._limit),
        )
