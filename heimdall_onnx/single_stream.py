"""Latency and throughput as MLPerf Inference reports them.

MLPerf's single-stream scenario sends one query after the other and reports the 90th percentile of
the latency; its offline scenario reports samples per second. Few queries would report too good a
percentile too often, so MLPerf reports an upper bound of it, the early-stopping estimate.

Source: MLCommons, MLPerf Inference Rules (mlcommons/inference_policies, inference_rules.adoc),
section "Scenarios" and appendix "Early Stopping Criterion"; as LoadGen computes it
(mlcommons/inference, loadgen/early_stopping.cc and loadgen/results.cc). What MLPerf asks for
beside that, such as a run of 600 seconds, is not asked for here: these are no MLPerf results.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

# Of MLPerf's single-stream scenario; its tolerance is 0.
SINGLE_STREAM_PERCENTILE = 90.0
SINGLE_STREAM_CONFIDENCE = 0.99


@dataclass(frozen=True)
class EarlyStopping:
    """An upper bound of a percentile of the latency.

    Attributes:
        percentile: In (0, 100).
        value_ms: The bound, one of the latencies measured; milliseconds.
        confidence: With which the percentile is not above it, in (0, 1).
        queries: Latencies it was taken from.
        overlatency: MLPerf's t, the most queries that may be slower than a bound for the bound
            still to hold with this confidence.
        min_queries: Queries needed for an estimate of this percentile.
    """

    percentile: float
    value_ms: float
    confidence: float
    queries: int
    overlatency: int
    min_queries: int

    @property
    def discarded(self) -> int:
        """Highest latencies that were left out, MLPerf's t - 1."""
        return self.overlatency - 1


@dataclass(frozen=True)
class Throughput:
    """Samples per second of calls of one batch size, one call after the other.

    Attributes:
        batch_size: Samples in a call.
        calls: Calls measured.
        samples_per_second: At the median time of a call.
        low: Lower end of its confidence interval.
        high: Upper end.
        confidence: Of the interval, in (0, 1).
        overall: All samples over the time of all calls, slow ones included, which is what MLPerf's
            offline scenario reports; samples per second.
    """

    batch_size: int
    calls: int
    samples_per_second: float
    low: float
    high: float
    confidence: float
    overall: float


@cache
def min_queries(
    percentile: float = SINGLE_STREAM_PERCENTILE, confidence: float = SINGLE_STREAM_CONFIDENCE
) -> int:
    """Queries needed before MLPerf's estimate of a percentile exists.

    The fewest of which, with more than this confidence, at least two lie beyond the percentile.
    For 99% confidence these are 64 queries for the 90th percentile and 662 for the 99th.

    Args:
        percentile: In (0, 100).
        confidence: In (0, 1).
    """
    from scipy import stats

    # Queries before the second one beyond the percentile follow a negative binomial distribution.
    return 2 + int(stats.nbinom.ppf(confidence, 2, 1 - percentile / 100))


def early_stopping_estimate(
    samples_ms: Floats,
    percentile: float = SINGLE_STREAM_PERCENTILE,
    confidence: float = SINGLE_STREAM_CONFIDENCE,
) -> EarlyStopping | None:
    """MLPerf's early-stopping estimate of a percentile; None from too few queries.

    With n queries, t is the largest number for which at most t of n queries are slower than a
    percentile p with a probability below 1 - c: I(p; n - t, t + 1) < 1 - c, where I is the
    regularized incomplete beta function. The t - 1 highest latencies are discarded, and the
    highest of the others is the estimate, provided that t is at least 1. More queries bring it
    nearer to the percentile, from above.

    The condition is one query stricter than the bound needs, so that the true percentile is above
    the estimate more rarely than in 1 - c of all runs. It takes the queries as independent;
    neighbouring calls of a real machine are not quite.

    Args:
        samples_ms: Latency of each query, milliseconds, shape (n,), in any order.
        percentile: The percentile wanted, in (0, 100).
        confidence: MLPerf's c, in (0, 1).
    """
    from scipy import stats

    queries = samples_ms.size
    # ppf gives the fewest overlatency queries whose probability reaches 1 - c.
    overlatency = int(stats.binom.ppf(1 - confidence, queries, 1 - percentile / 100)) - 1
    if overlatency < 1:
        return None
    return EarlyStopping(
        percentile=percentile,
        value_ms=float(np.partition(samples_ms, queries - overlatency)[queries - overlatency]),
        confidence=confidence,
        queries=queries,
        overlatency=overlatency,
        min_queries=min_queries(percentile, confidence),
    )


def offline_throughput(
    batch_ms: Floats, batch_size: int, *, confidence: float = 0.95
) -> Throughput:
    """Samples per second, from the times of calls of one batch size.

    The interval is that of the median time of a call, from order statistics (Conover, Practical
    Nonparametric Statistics, 3rd ed., section 3.2). With fewer calls than it needs, six at 95%
    confidence, it is their whole range, with the confidence that this has.

    Args:
        batch_ms: Time of each call, milliseconds, shape (calls,), at least one.
        batch_size: Samples in a call.
        confidence: Of the interval, in (0, 1).
    """
    from scipy import stats

    # The range of n calls covers the median unless all lie on one side of it.
    confidence = min(confidence, 1 - 2 * 0.5**batch_ms.size)
    interval = stats.quantile_test(batch_ms, p=0.5).confidence_interval(max(confidence, 0.5))
    fastest, slowest = (
        float(end) if np.isfinite(end) else float(bound)
        for end, bound in ((interval.low, batch_ms.min()), (interval.high, batch_ms.max()))
    )
    samples = batch_size * 1e3
    return Throughput(
        batch_size=batch_size,
        calls=batch_ms.size,
        samples_per_second=samples / float(np.median(batch_ms)),
        low=samples / slowest,
        high=samples / fastest,
        confidence=confidence,
        overall=samples / float(batch_ms.mean()),
    )
