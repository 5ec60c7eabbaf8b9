"""Two released models on the same evaluation data: how far off each is, and how long each takes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from heimdall_onnx.common.arrays import Floats

CONFIDENCE = 0.95
_RESAMPLES = 2000
# Values that the resampling holds at once: 64 MB.
_RESAMPLED_AT_ONCE = 8 << 20


@dataclass(frozen=True)
class Ratio:
    """One figure of the candidate over the same of the version that holds the alias.

    Attributes:
        what: Which figure.
        ratio: Above 1 the candidate is worse.
        low: Lower end of its 95 % confidence interval.
        high: Upper end of it.
        limit: What it may be at most.
    """

    what: str
    ratio: float
    low: float
    high: float
    limit: float

    @property
    def holds(self) -> bool:
        """Whether the interval reaches down to the limit."""
        return self.low <= self.limit

    def __str__(self) -> str:
        return (
            f"{self.what}: {self.ratio:.3f}× that of the version it would replace "
            f"({self.low:.3f} to {self.high:.3f}), limit {self.limit:.3f}"
        )


def error_ratio(candidate: Floats, holder: Floats, limit: float) -> Ratio:
    """Ratio of the median localization errors of the same samples, by a paired bootstrap.

    Args:
        candidate: Errors (N,) in metres.
        holder: Those of the other model.
        limit: What the ratio may be.
    """
    from scipy import stats

    def ratio(a: Floats, b: Floats, axis: int = -1) -> Floats:
        # Two perfect answers are equally good.
        tiny = np.finfo(np.float64).tiny
        return np.asarray((np.median(a, axis=axis) + tiny) / (np.median(b, axis=axis) + tiny))

    interval = stats.bootstrap(
        (candidate, holder),
        ratio,
        paired=True,
        vectorized=True,
        n_resamples=_RESAMPLES,
        batch=max(1, _RESAMPLED_AT_ONCE // candidate.size),
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Ratio(
        "median localization error",
        float(ratio(candidate, holder)),
        float(interval.low),
        float(interval.high),
        limit,
    )
