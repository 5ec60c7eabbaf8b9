"""Percentiles, paired ratios and throughput of measured latencies, with their intervals.

Percentiles of a run take its calls as draws from one distribution. Heat, another tenant or a model
that is still warming up move it meanwhile, so whether the machine ran at one speed is checked too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from heimdall_onnx.common.arrays import Floats
from heimdall_onnx.evidence.ratios import CONFIDENCE


@dataclass(frozen=True)
class Throughput:
    """Samples per second of calls of one batch size, one call after the other.

    Attributes:
        batch_size: Samples in a call.
        samples_per_second: At the median time of a call.
        low: Lower end of its confidence interval.
        high: Upper end.
    """

    batch_size: int
    samples_per_second: float
    low: float
    high: float


@cache
def min_queries(percentile: float) -> int:
    """Calls needed before a percentile in (0, 100) is told.

    The fewest of which, with more than 99% confidence, at least two lie beyond the percentile: 64
    for the 90th percentile and 662 for the 99th, as many as MLPerf's early-stopping estimate needs
    (mlcommons/inference_policies, inference_rules.adoc, "Early Stopping Criterion").
    """
    from scipy import stats

    # Calls before the second one beyond the percentile follow a negative binomial distribution.
    return 2 + int(stats.nbinom.ppf(0.99, 2, 1 - percentile / 100))


def offline_throughput(batch_ms: Floats, batch_size: int) -> Throughput:
    """Samples per second, from the times of calls of one batch size.

    The interval is that of the median time of a call, from order statistics (Conover, Practical
    Nonparametric Statistics, 3rd ed., section 3.2). With fewer calls than it needs, six at 95%
    confidence, it is their whole range, with the confidence that this has.

    Args:
        batch_ms: Time of each call, milliseconds, shape (calls,), at least one.
        batch_size: Samples in a call.
    """
    # The range of n calls covers the median unless all lie on one side of it.
    confidence = min(CONFIDENCE, 1 - 2 * 0.5**batch_ms.size)
    fastest, slowest = _interval(batch_ms, 0.5, max(confidence, 0.5))
    samples = batch_size * 1e3
    return Throughput(
        batch_size=batch_size,
        samples_per_second=samples / float(np.median(batch_ms)),
        low=samples / slowest,
        high=samples / fastest,
    )


def _interval(values: Floats, rank: float, confidence: float) -> tuple[float, float]:
    """Interval of a quantile from order statistics, which end where the values do."""
    from scipy import stats

    found = stats.quantile_test(values, p=rank).confidence_interval(confidence)
    low = found.low if np.isfinite(found.low) else values.min()
    return float(low), float(found.high if np.isfinite(found.high) else values.max())


WINDOWS = 5
TOLERANCE = 0.10
_COMPARED = 3
# A median of fewer calls says more about its noise than about the machine.
_MIN_WINDOW_CALLS = 10


@dataclass(frozen=True)
class Stationarity:
    """How the latency moved while it was measured.

    Attributes:
        medians_ms: Median latency of each window, in order of time, milliseconds.
        spread: Highest minus lowest median of the last three windows, relative to their median.
        early: How far the median of an earlier window lies at most from the median of those three,
            relative to it; 0 where there is no earlier one.
        tolerance: The largest spread at which the measurement counts as stationary.
    """

    medians_ms: tuple[float, ...]
    spread: float
    early: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the last three windows agree within the tolerance."""
        return self.spread <= self.tolerance

    @property
    def sentence(self) -> str:
        """What was found, in words for a report."""
        if not self.holds:
            *first, last = (f"{median:.3g}" for median in self.medians_ms[-_COMPARED:])
            return (
                "the machine was not stationary: the medians of the last three windows, "
                f"{', '.join(first)} and {last} ms, are {self.spread:.1%} apart "
                f"(limit {self.tolerance:.0%})"
            )
        agree = f"the last three windows agree within {self.spread:.1%}"
        if self.early > self.tolerance:
            agree += f", but earlier ones are up to {self.early:.1%} off"
        return agree


def check_stationarity(samples_ms: Floats, blocks: npt.NDArray[np.int64]) -> Stationarity | None:
    """Compare the median latency of windows of time; None from too few calls for three windows.

    As NVIDIA's Perf Analyzer decides that a measurement is stable: the last three agree within
    10% (docs/cli.md of triton-inference-server/perf_analyzer, ``--stability-percentage``). Here
    they are windows of one run, and medians, so that a single slow call decides nothing.

    Args:
        samples_ms: Latency of every call in order of time, milliseconds, shape (calls,).
        blocks: Index of the block that each call belongs to, shape (calls,), ascending; no window
            ends within a block.
    """
    _, starts = np.unique(blocks, return_index=True)
    count = min(WINDOWS, samples_ms.size // _MIN_WINDOW_CALLS, starts.size)
    if count < _COMPARED:
        return None
    firsts = [int(part[0]) for part in np.array_split(starts, count)]
    medians = np.array([np.median(window) for window in np.split(samples_ms, firsts[1:])])
    last = medians[-_COMPARED:]
    middle = np.median(last)
    return Stationarity(
        medians_ms=tuple(map(float, medians)),
        spread=float(np.ptp(last) / middle),
        early=float(np.abs(medians[:-_COMPARED] / middle - 1).max(initial=0)),
        tolerance=TOLERANCE,
    )


PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)


@dataclass(frozen=True)
class Percentile:
    """A percentile of the latency with its confidence interval.

    Attributes:
        percentile: In (0, 100).
        value_ms: Milliseconds.
        low_ms: Lower end of the interval.
        high_ms: Upper end of the interval.
    """

    percentile: float
    value_ms: float
    low_ms: float
    high_ms: float


@dataclass(frozen=True)
class Speedup:
    """Paired ratio of block medians, PyTorch over ONNX Runtime.

    Attributes:
        ratio: Median over the pairs; above 1 the ONNX model is faster.
        low: Lower end of its confidence interval.
        high: Upper end.
        pairs: Number of pairs.
    """

    ratio: float
    low: float
    high: float
    pairs: int


def percentiles_with_intervals(samples_ms: Floats) -> tuple[Percentile, ...]:
    """Every percentile of `PERCENTILES` that ``samples_ms`` are enough for.

    With the fewest samples allowed, at least two lie at or beyond the percentile with 99%
    confidence, so that it is not merely the largest value seen.
    """
    return tuple(
        Percentile(
            percentile,
            float(np.percentile(samples_ms, percentile)),
            # With the fewest samples allowed a two-sided end can fall beyond the largest one.
            *_interval(samples_ms, percentile / 100, CONFIDENCE),
        )
        for percentile in PERCENTILES
        if samples_ms.size >= min_queries(percentile)
    )


def paired_speedup(slow: Sequence[Floats], fast: Sequence[Floats]) -> Speedup:
    """Ratio of the medians of blocks that ran next to each other, with its interval.

    With fewer than six pairs, too few for the confidence, the interval is their whole range.

    Args:
        slow: Blocks of the contender in the numerator, milliseconds, in order.
        fast: Blocks of the other; the i-th ran in the same half of a round as the i-th of
            ``slow``.
    """
    ratios = np.array(
        [np.median(a) / np.median(b) for a, b in zip(slow, fast, strict=True)], dtype=np.float64
    )
    return Speedup(float(np.median(ratios)), *_interval(ratios, 0.5, CONFIDENCE), ratios.size)
