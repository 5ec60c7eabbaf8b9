"""Intervals of what a model loses against another one on the same samples.

Each end holds with the confidence that is asked for, so that what truly loses as much as is allowed
passes no more often than that leaves. Samples that belong together, as windows of one event do, are
one group and are taken whole: what they have in common is no evidence twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from heimdall_onnx.common.arrays import Floats

# Fewer groups say nothing of how the tails of their differences look.
LEAST_GROUPS = 30
_RESAMPLES, _FOLDS = 2000, 100
# Of more groups several are drawn together, which takes less time and says as much.
_BLOCKS = 2000
# Of the error that is left, what intervals from few samples are taken for: of skewed differences
# they miss up to half as much again (`make bench OPTIONS=quality`).
_SAFE = 0.5
# Values that the resampling holds at once: 64 MB.
_AT_ONCE = 8 << 20
# Of the ends of an interval, in units of the loss.
_PRECISION = 1e-6
# Nuisance rates that the exact test looks at, and the chance that the true one is none of them.
_RATES, _MISSED = 60, 1e-4
_RARE = 1e-10


@dataclass(frozen=True)
class Interval:
    """What is lost.

    Attributes:
        loss: As observed; below 0 where something is gained.
        low: Lower end of the confidence interval.
        high: Upper end of it.
        times: How many times as many such samples would bring the upper end to what is allowed;
            infinite where no number would.
        method: How the ends were found, in words.
    """

    loss: float
    low: float
    high: float
    times: float
    method: str


_EXACT = "exact, by the samples on which only one of the two is right"


def paired_proportions(
    worse: Floats, better: Floats, weights: Floats, max_loss: float, confidence: float
) -> Interval:
    """The interval of a loss that is 0 or 1 for each sample.

    Exact and unconditional, by the score statistic of Tango ("Equivalence test and confidence
    interval for the difference in proportions for the paired-sample design", Statistics in Medicine
    17, 1998), with the largest tail over the rates that the data leave open (Berger and Boos, "P
    values maximized over a confidence set for the nuisance parameter", JASA 89, 1994). Where groups
    have several samples, or these have weights, counts are divided by the design effect (Rao and
    Scott, "A simple method for the analysis of clustered binary data", Biometrics 48, 1992), of
    which the upper quartile is taken, since few groups with a discordant sample tell little of it.

    Args:
        worse: Of each group (G,) the weight of samples that only the reference has right.
        better: The weight of those that only the other one has right.
        weights: That of all its samples.
        max_loss: What may be lost.
        confidence: With which each end holds.
    """
    from scipy.stats import chi2, norm

    total, groups = float(weights.sum()), len(weights)
    b, c = float(worse.sum()), float(better.sum())
    effect = 1.0
    if (weights != 1).any():
        loss = (b - c) / total
        residual = worse - better - loss * weights
        clustered = groups / max(groups - 1, 1) * float(residual @ residual) / total**2
        independent = ((b + c) / total - loss**2) / total
        effect = float(weights @ weights) / total
        if (telling := int(((worse + better) > 0).sum())) and independent > 0:
            found = clustered / independent * telling / chi2.ppf(0.25, telling)
            effect = min(effect, max(1.0, float(found)))
    # What does not come out even is counted against what is to be shown.
    n = max(1, math.floor(total / effect + 1e-9))
    less = math.floor(b / effect + 1e-9), math.floor(c / effect + 1e-9)
    more = math.ceil(b / effect - 1e-9), math.ceil(c / effect - 1e-9)
    error = 1 - confidence
    high = _upper_end(min(more[0], n), less[1], n, error)
    low = -_upper_end(min(more[1], n), less[0], n, error)
    # The score grows with the root of the number of samples.
    score = float(_score(more[0], less[1], n, max_loss))
    times = (float(norm.ppf(error)) / score) ** 2 if score < 0 else math.inf
    if 0 < max_loss < 1:  # where no sample is discordant
        times = max(times, math.log(error - _MISSED) / math.log1p(-max_loss) / n)
    return Interval((b - c) / total, low, high, times, _EXACT)


def _times(loss: float, high: float, max_loss: float, groups: int) -> float:
    """An interval is as wide as the root of the number of samples makes it."""
    if not loss < max_loss:
        return math.inf
    return max(((high - loss) / (max_loss - loss)) ** 2, LEAST_GROUPS / groups)


def _score(b: npt.ArrayLike, c: npt.ArrayLike, n: int, loss: float) -> Floats:
    b, c = np.asarray(b, np.float64), np.asarray(c, np.float64)
    linear = 2 * n * loss - (b + c) - loss * (b - c)
    root = np.sqrt(np.maximum(linear**2 + 8 * n * c * loss * (1 - loss), 0.0))
    rate = np.maximum((root - linear) / (4 * n), max(0.0, -loss))
    variance = n * (2 * rate + loss - loss**2)
    apart = b - c - n * loss
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.where(variance > 0, apart / np.sqrt(variance), np.sign(apart) * np.inf)
    return np.asarray(np.where(apart == 0, 0.0, found))


def _tail(b: int, c: int, n: int, loss: float) -> float:
    """The largest chance of a score as low as that of (b, c), where so much is truly lost."""
    from scipy.stats import beta, binom

    seen = float(_score(b, c, n, loss))
    low = max(0.0, -loss, float(beta.ppf(_MISSED / 2, c, n - c + 1)) if c else 0.0)
    high = float(beta.ppf(1 - _MISSED / 2, c + 1, n - c)) if c < n else 1.0
    if (high := min(high, (1 - loss) / 2)) < low:
        return _MISSED
    rates = np.linspace(low, high, _RATES)[:, None]
    counts = np.arange(binom.ppf(_RARE, n, low), binom.ppf(1 - _RARE, n, high) + 1)
    # For each c the largest b with no higher score, by halving.
    least, most = np.full(len(counts), -1.0), n - counts
    while (most > least).any():
        middle = np.ceil((least + most) / 2)
        as_low = _score(middle, counts, n, loss) <= seen + 1e-9
        least, most = np.where(as_low, middle, least), np.where(as_low, most, middle - 1)
    others = np.clip((rates + loss) / np.maximum(1 - rates, _RARE), 0.0, 1.0)
    chances = binom.pmf(counts, n, rates) * binom.cdf(least, n - counts, others)
    return float(chances.sum(axis=1).max()) + _MISSED


def _upper_end(b: int, c: int, n: int, error: float) -> float:
    low, high = (b - c) / n, 1.0
    while high - low > _PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if _tail(b, c, n, middle) > error else (low, middle)
    return high


def resampled(
    loss: Callable[[Floats], Floats], groups: int, max_loss: float, confidence: float
) -> Interval:
    """The interval of a loss by the bootstrap over groups.

    Its percentiles lie as far out as Student's t demands for so few groups (Hesterberg, "What
    teachers should know about the bootstrap", The American Statistician 69, 2015, section 5.2).

    Args:
        loss: What is lost (K,) with each of K weightings (K, G) of the groups.
        groups: How many there are.
        max_loss: What may be lost.
        confidence: With which each end holds.
    """
    from scipy.stats import norm, t

    observed = float(loss(np.ones((1, groups)))[0])
    rng, blocks = np.random.default_rng(0), min(groups, _BLOCKS)
    block, even = rng.permutation(groups) % blocks, np.full(blocks, 1 / blocks)
    size = max(1, _AT_ONCE // groups)
    drawn = [
        loss(rng.multinomial(blocks, even, min(size, _RESAMPLES - first))[:, block].astype(float))
        for first in range(0, _RESAMPLES, size)
    ]
    out = math.sqrt(groups / max(groups - 1, 1)) * t.ppf(
        _SAFE * (1 - confidence), max(groups - 1, 1)
    )
    # No value between two of them, since there may be infinite ones.
    low, high = np.quantile(
        np.concatenate(drawn), [norm.cdf(out), norm.cdf(-out)], method="inverted_cdf"
    )
    what = f"{_RESAMPLES:,} resamplings of {groups:,} samples or groups of them"
    times = _times(observed, float(high), max_loss, groups)
    return Interval(observed, float(low), float(high), times, what)


def jackknifed(
    loss: Callable[[npt.NDArray[np.bool_]], float],
    groups: int,
    max_loss: float,
    confidence: float,
) -> Interval:
    """The interval of a loss that takes long to compute, by leaving out a fold of groups at a time.

    With Student's t (Kott, "The delete-a-group jackknife", Journal of Official Statistics 17,
    2001).

    Args:
        loss: What is lost on the groups that a mask (G,) takes.
        groups: How many there are.
        max_loss: What may be lost.
        confidence: With which each end holds.
    """
    from scipy.stats import t

    fold = np.random.default_rng(0).permutation(groups) % min(groups, _FOLDS)
    folds = int(fold.max()) + 1
    observed = loss(np.ones(groups, bool))
    without = np.array([loss(fold != one) for one in range(folds)])
    spread = float(((without - without.mean()) ** 2).sum())
    error = math.sqrt((folds - 1) / folds * spread)
    width = float(t.ppf(1 - _SAFE * (1 - confidence), max(folds - 1, 1))) * error
    times = _times(observed, observed + width, max_loss, groups)
    how = f"jackknife of {folds} folds"
    return Interval(observed, observed - width, observed + width, times, how)
