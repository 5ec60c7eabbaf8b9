"""The contract on quality: by which metric, how much may be lost, and how surely that is shown.

Three outcomes are told apart. What is lost is *shown* to be within the limit where the upper end of
its interval is, shown to be *worse* where the lower end is beyond it, and *not shown* otherwise:
then nothing is known to be wrong, and more samples would tell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from heimdall_onnx.common.arrays import Arrays, Floats, Rows
from heimdall_onnx.common.errors import DataError
from heimdall_onnx.common.parameters import Quality
from heimdall_onnx.common.text import after, count_of, number
from heimdall_onnx.common.verdict import Gate
from heimdall_onnx.evidence.quality.intervals import (
    LEAST_GROUPS,
    Interval,
    jackknifed,
    paired_proportions,
    resampled,
)
from heimdall_onnx.evidence.quality.metric import Metric

# Of more of them a bootstrap or a jackknife takes evenly spaced ones.
MOST_SAMPLES = 50_000
# Values that a median holds at once: 64 MB.
_AT_ONCE = 8 << 20


@dataclass(frozen=True)
class Judged:
    """What one model loses against another one by a metric.

    Attributes:
        metric: What it is called.
        relative: Whether a loss is a share of the reference's value, else a difference.
        samples: How many were judged.
        groups: How many groups they make; as many where each stands for itself.
        reference: The reference's value.
        value: The judged model's.
        loss: What is lost; below 0 where something is gained.
        low: Lower end of its confidence interval.
        high: Upper end of it.
        max_loss: What may be lost.
        confidence: With which each end holds, several attempts on the same samples reckoned in.
        outcome: ``"shown"``, ``"not shown"`` or ``"worse"``.
        needed: About how many samples as good as these would show it; None where no number would.
        method: How the interval was found, in words.
        unit: Of the values; empty for a share or what has the outputs' own.
        binding: Whether what is not shown does not pass.
    """

    metric: str
    relative: bool
    samples: int
    groups: int
    reference: float
    value: float
    loss: float
    low: float
    high: float
    max_loss: float
    confidence: float
    outcome: Literal["shown", "not shown", "worse"]
    needed: int | None
    method: str
    unit: str = ""
    binding: bool = False

    @property
    def in_words(self) -> str:
        """The loss with its interval, and what came of it."""
        return (
            f"{self.metric} {self._told(self.reference)} to {self._told(self.value)}: loss "
            f"{self.said(self.loss)} ({self.said(self.low)} to {self.said(self.high)}, each with "
            f"{100 * self.confidence:.3g}%) over {count_of(self.samples, 'sample')}{self.grouped}"
        )

    @property
    def headline(self) -> str:
        """What must be known at once."""
        found = {
            "shown": f"at most {self.said(self.high)} is lost",
            "not shown": self.missing,
            "worse": f"at least {self.said(self.low)} is lost"
            if math.isfinite(self.low)
            else self.method,
        }
        return (
            f"{self.metric} is {self._told(self.value)}, PyTorch's {self._told(self.reference)}: "
            f"{found[self.outcome]}"
        )

    @property
    def missing(self) -> str:
        """What would show it; empty where it is shown, or shown to be worse."""
        if self.outcome != "not shown":
            return ""
        if self.needed is None:
            return "not shown, and no number of samples as these would show it"
        return f"not shown: about {self.needed:,} samples as these would show it"

    @property
    def grouped(self) -> str:
        """How many groups they make, in words; empty where each stands for itself."""
        return f" in {self.groups:,} groups" if self.groups != self.samples else ""

    def said(self, loss: float) -> str:
        """A loss in its unit."""
        return f"{number(100 * loss, 3)}%" if self.relative else number(loss, 3)

    def _told(self, value: float) -> str:
        return number(value, 4) + after(self.unit)

    @property
    def gate(self) -> Gate:
        """The gate that demands the loss to be shown, or where nobody is bound, not to be worse."""
        undecided = self.outcome == "not shown"
        return Gate(
            f"loss of {self.metric}",
            f"≤ {self.said(self.max_loss)} at the upper end",
            self.said(self.high),
            self.outcome == "shown" or (undecided and not self.binding),
            "; ".join(filter(None, (self.missing, self.in_words))),
            undecided,
        )


@dataclass(frozen=True)
class Scores:
    """What two models' answers to the same samples are worth, sample by sample.

    Attributes:
        reference: The metric's rows (N, …) of the model that the other one is held against.
        found: Those of the model that is judged.
        labels: What is true of each sample (N, …).
        weights: Of each sample (N,); None where all weigh the same.
        groups: The group of each sample (N,), of any values; None where each stands for itself.
    """

    reference: npt.NDArray[Any]
    found: npt.NDArray[Any]
    labels: npt.NDArray[Any]
    weights: npt.NDArray[Any] | None = None
    groups: npt.NDArray[Any] | None = None

    @classmethod
    def of(cls, metric: Metric, reference: Arrays, found: Arrays, truth: Arrays) -> Scores:
        """What two models' outputs are worth, beside what is true of the samples."""
        labels = truth[metric.labels]
        return cls(metric.rows(reference, labels), metric.rows(found, labels), labels)

    @classmethod
    def joined(cls, parts: Sequence[Scores]) -> Scores:
        """Those of one batch after the other."""
        names = ("reference", "found", "labels")
        return cls(*(np.concatenate([getattr(one, name) for one in parts]) for name in names))

    def beside(
        self, rows: npt.NDArray[np.int64], weights: Rows | None, groups: Rows | None
    ) -> Scores:
        """With weights and groups of all samples, of which these are the ``rows``."""
        beside = (each if each is None else each[rows] for each in (weights, groups))
        return Scores(self.reference, self.found, self.labels, *beside)

    def taken(self, which: npt.NDArray[Any]) -> Scores:
        """Those of some samples."""
        given: dict[str, Any] = {part.name: getattr(self, part.name) for part in fields(self)}
        return replace(self, **{n: each[which] for n, each in given.items() if each is not None})


def judge_quality(
    metric: Metric, scores: Scores, contract: Quality, error_share: float = 1.0
) -> Judged:
    """Judge a model by what it loses against another one on the same samples.

    Samples without a finite value in both are left out; a single one that only the model that is
    judged has none for is an infinite loss.

    Args:
        metric: By what.
        scores: Of both.
        contract: What may be lost, and how surely that must be shown.
        error_share: Which part of the error that the confidence leaves this judgement may use, of
            several on the same samples.

    Raises:
        DataError: If samples have weights that a ranked metric can't take.
    """
    if metric.ranked is not None and scores.weights is not None:
        raise DataError(
            f"the metric {metric.name} does not weigh samples: leave the array `weights` out "
            "(--ignore weights), or choose another metric"
        )
    sound, ours = (_finite(rows) for rows in (scores.reference, scores.found))
    lost = int((sound & ~ours).sum())
    which = np.flatnonzero(sound & ours)
    if metric.score is None:
        which = which[:: -(-len(which) // MOST_SAMPLES) or 1]
    paired = _Paired(metric, scores.taken(which))
    confidence = 1 - (1 - contract.confidence) * error_share
    if lost:
        what = f"{count_of(lost, 'sample')} without a finite value"
        interval = Interval(math.inf, math.inf, math.inf, math.inf, what)
    elif not len(which):
        # A faithful export keeps what is no number.
        what = "no sample has a finite value in both"
        interval = Interval(math.nan, -math.inf, math.inf, math.inf, what)
    else:
        interval = paired.interval(contract.max_loss, confidence)
    outcome: Literal["shown", "not shown", "worse"] = "not shown"
    if interval.low > contract.max_loss:
        outcome = "worse"
    elif interval.high <= contract.max_loss and paired.enough:
        outcome = "shown"
    reference, value = paired.values() if len(which) else (math.nan, math.nan)
    return Judged(
        metric=metric.name,
        relative=metric.relative,
        samples=len(which),
        groups=paired.groups,
        reference=reference,
        value=value,
        loss=interval.loss,
        low=interval.low,
        high=interval.high,
        max_loss=contract.max_loss,
        confidence=confidence,
        outcome=outcome,
        needed=math.ceil(interval.times * len(which)) if math.isfinite(interval.times) else None,
        method=interval.method,
        unit=metric.unit,
        binding=contract.binding,
    )


def _finite(rows: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    return np.asarray(np.isfinite(rows).reshape(len(rows), -1).all(axis=1))


class _Paired:
    """Both models' rows, by groups of samples."""

    def __init__(self, metric: Metric, scores: Scores) -> None:
        self.metric, self.rows = metric, (scores.reference, scores.found)
        self.labels, count = scores.labels, len(scores.reference)
        self.weight = np.ones(count)
        if scores.weights is not None:
            self.weight = scores.weights.astype(np.float64)
        self.group, self.groups = np.arange(count), count
        if scores.groups is not None:
            names, group = np.unique(scores.groups, return_inverse=True)
            self.group, self.groups = group.ravel(), len(names)

    @property
    def shares(self) -> bool:
        """Whether each sample is right or wrong, so that an exact interval can be had."""
        return self.metric.binary and all(((r == 0) | (r == 1)).all() for r in self.rows)

    @property
    def enough(self) -> bool:
        """Whether there are samples enough for the interval to be believed."""
        return self.shares or self.groups >= LEAST_GROUPS

    def values(self) -> tuple[float, float]:
        """The metric of both."""
        every = np.ones((1, self.groups))
        ranked, taken = self.metric.ranked, slice(None)
        a, b = (
            float(self._scored(side, every)[0]) if ranked is None else self._ranked(side, taken)
            for side in (0, 1)
        )
        return a, b

    def interval(self, max_loss: float, confidence: float) -> Interval:
        """That of what is lost."""
        loss, settled = self.metric.loss, (self.groups, max_loss, confidence)
        if self.shares:
            a, b = (rows[:, 0] for rows in self.rows)
            worse, better = (self._summed((x > y).astype(float)) for x, y in ((b, a), (a, b)))
            return paired_proportions(worse, better, self._summed(np.ones(len(a))), *settled[1:])
        if self.metric.ranked is not None:
            return jackknifed(
                lambda kept: float(
                    loss(*(self._ranked(side, kept[self.group]) for side in (0, 1)))
                ),
                *settled,
            )
        return resampled(
            lambda drawn: np.asarray(loss(*(self._scored(side, drawn) for side in (0, 1)))),
            *settled,
        )

    def _summed(self, values: Floats) -> Floats:
        """Sums (G,) over the groups of values (N,) as they weigh."""
        return np.bincount(self.group, self.weight * values, self.groups).astype(np.float64)

    @cached_property
    def _sums(self) -> tuple[Floats, ...]:
        """For either model the sums (G, S) of its rows."""
        return tuple(np.stack([*map(self._summed, rows.T)], axis=1) for rows in self.rows)

    @cached_property
    def _ordered(self) -> tuple[npt.NDArray[np.int64], ...]:
        return tuple(np.argsort(rows[:, 0], kind="stable") for rows in self.rows)

    def _scored(self, side: int, drawn: Floats) -> Floats:
        """The metric (K,) of a model with K weightings (K, G) of the groups."""
        if self.metric.score is not None:
            weights = drawn @ self._summed(np.ones(len(self.weight)))
            return self.metric.score(drawn @ self._sums[side], weights)
        # The median, as the first value that half of the weight is at or below.
        order, found = self._ordered[side], np.empty(len(drawn))
        step = max(1, _AT_ONCE // len(order))
        for first in range(0, len(drawn), step):
            part = drawn[first : first + step][:, self.group[order]] * self.weight[order]
            below = np.cumsum(part, axis=1)
            middle = (below >= below[:, -1:] / 2).argmax(axis=1)
            found[first : first + step] = self.rows[side][order, 0][middle]
        return found

    def _ranked(self, side: int, kept: Any) -> float:
        assert self.metric.ranked is not None
        return self.metric.ranked(self.rows[side][kept], self.labels[kept])
