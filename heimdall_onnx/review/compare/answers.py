"""What two models answer to the same inputs, and how far that lies apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from heimdall_onnx.common.arrays import Floats, whole
from heimdall_onnx.common.errors import EvidenceError, InvalidModelError, ParameterError
from heimdall_onnx.common.text import count_of, listed, shown
from heimdall_onnx.common.verdict import NotMeasured
from heimdall_onnx.data.evaluation import EvaluationData
from heimdall_onnx.evidence.geodesy import distance_m
from heimdall_onnx.evidence.latency.benchmark import PairLatency, measure_pair
from heimdall_onnx.evidence.latency.contenders import Contestant
from heimdall_onnx.evidence.parity.statistics import ErrorAccumulator, ErrorStatistics
from heimdall_onnx.evidence.parity.tolerance import Limit
from heimdall_onnx.evidence.quality.contract import Judged, Scores, judge_quality
from heimdall_onnx.evidence.quality.metric import NAMES, Metric, metrics_for
from heimdall_onnx.evidence.ratios import Ratio
from heimdall_onnx.model.inference import open_session, run_onnx
from heimdall_onnx.model.runtimes import SessionSettings
from heimdall_onnx.model.signature import Signature, TensorSpec
from heimdall_onnx.review.compare.gates import Limits

A, B = "A", "B"
MOST_SAMPLES = 10_000
_BATCH = 64


@dataclass(frozen=True)
class Displacement:
    """How far B's positions lie from A's.

    Attributes:
        metres: For each sample (N,); infinite where one of the two is NaN or Inf, NaN where both.
        p50_m: Median.
        p99_m: 99th percentile; of fewer than 100 samples the largest.
        max_m: Largest.
        lost: Samples for which one of the two gives no finite position.
    """

    metres: Floats = field(repr=False)
    p50_m: float
    p99_m: float
    max_m: float
    lost: int

    @classmethod
    def between(cls, a: Floats, b: Floats) -> Displacement:
        """That from positions ``a`` to ``b``, both (N, 2) in degrees."""
        metres = np.full(len(a), np.inf)
        finite_a, finite_b = (np.isfinite(side).all(axis=1) for side in (a, b))
        both = finite_a & finite_b
        metres[both] = distance_m(a[both], b[both])
        metres[~finite_a & ~finite_b] = np.nan
        known = metres[~np.isnan(metres)]
        # No value between two of them, since there may be infinite ones.
        p50, p99, most = (
            float(np.quantile(known, q, method="inverted_cdf")) if known.size else math.nan
            for q in (0.5, 0.99, 1.0)
        )
        return cls(metres, p50, p99, most, int((finite_a != finite_b).sum()))


@dataclass(frozen=True)
class Answers:
    """What both models say of the same inputs.

    Attributes:
        source: What both were run on, in words.
        samples: How many samples.
        outputs: Of each output that both give, B's values beside A's as the reference.
        positions: Those of A and of B (N, 2) in degrees; None for models without positions.
        truth: True positions (N, 2) in degrees, where they are known and there are positions.
        displacement: How far the positions move; None for models without.
        quality: What B loses beside A by each metric; empty where nothing is known to be true.
        by_sample: What the answers of A and of B are worth by the metrics that are values of single
            samples, both (N,).
        not_judged: By which metrics a release was judged and these are not, and why, in words.
        alone: Outputs that only one of the two gives, in words.
    """

    source: str
    samples: int
    outputs: tuple[ErrorStatistics, ...]
    positions: tuple[Floats, Floats] | None = field(repr=False)
    truth: Floats | None = field(repr=False)
    displacement: Displacement | None
    quality: tuple[Judged, ...] = ()
    by_sample: dict[str, tuple[Floats, Floats]] = field(default_factory=dict, repr=False)
    not_judged: tuple[str, ...] = ()
    alone: tuple[str, ...] = ()

    @property
    def lost(self) -> tuple[str, ...]:
        """What is NaN or Inf in one of the two alone, in words; empty if nothing is."""
        nonfinite = sum(output.nonfinite_mismatches for output in self.outputs)
        if nonfinite:
            return (f"{nonfinite:,} values are NaN or Inf in one of them",)
        lost = self.displacement.lost if self.displacement else 0
        return (f"{count_of(lost, 'position')} NaN or Inf in one of them",) if lost else ()


def shared_signature(a: Signature, b: Signature) -> tuple[Signature, tuple[str, ...]]:
    """What both models take and both give, and what only one of them gives, in words.

    Raises:
        InvalidModelError: If they don't take the same inputs, or have no output in common; names
            every difference.
    """
    before, after = ({spec.name: spec for spec in side.inputs} for side in (a, b))
    problems = [
        f"input {_beside(before.get(one), after.get(one))}"
        for one in dict.fromkeys((*before, *after))
        if not _fits(before.get(one), after.get(one))
    ]
    was, has = ({spec.name: spec for spec in side.outputs} for side in (a, b))
    common = [one for one in was if one in has]
    problems += [
        f"output {_beside(was[one], has[one])}"
        for one in common
        if not _fits(was[one], has[one]) or was[one].unit != has[one].unit
    ]
    if not common:
        problems.append(f"outputs: A gives {', '.join(was)}; B gives {', '.join(has)}")
    if problems:
        raise InvalidModelError(
            "A and B can't be compared on the same inputs, since their signatures differ:"
            + listed(problems)
        )
    alone = tuple(
        f"{spec.name} is given by {who} alone"
        for who, mine, theirs in ((A, was, has), (B, has, was))
        for spec in mine.values()
        if spec.name not in theirs
    )
    return Signature(b.inputs, tuple(has[one] for one in common), b.axes), alone


def _fits(a: TensorSpec | None, b: TensorSpec | None) -> bool:
    if a is None or b is None or a.dtype != b.dtype or len(a.shape) != len(b.shape):
        return False
    pairs = zip(a.shape, b.shape, strict=True)
    return all(m == n or isinstance(m, str) or isinstance(n, str) for m, n in pairs)


def _beside(a: TensorSpec | None, b: TensorSpec | None) -> str:
    words = [
        "none" if spec is None else spec.describe() + (f" in {spec.unit}" if spec.unit else "")
        for spec in (a, b)
    ]
    return f"of A: {words[0]}; of B: {words[1]}"


def compare_answers(
    a: Path,
    b: Path,
    data: EvaluationData,
    signature: Signature,
    *,
    alone: Sequence[str] = (),
    limits: Limits | None = None,
) -> Answers:
    """Run both models on the same samples, batch by batch.

    Args:
        a: The ONNX file of A.
        b: That of B.
        data: The samples; of more than `MOST_SAMPLES` take a spread.
        signature: What both take and both give, see `shared_signature`.
        alone: What only one of the two gives, in words.
        limits: How much worse B may be, and by what; those of a promotion by default.

    Raises:
        EvidenceError: If one of them can't be run on the samples, or a metric fails.
        InvalidModelError: If one of them can't be opened.
        DataError: If what is true of the samples does not fit the answers.
        ParameterError: If they can't be judged by the metric that the limits name.
    """
    limits = limits or Limits()
    metrics, not_judged = _metrics(limits, signature, data)
    accumulators = [ErrorAccumulator(spec, Limit(0.0, 0.0)) for spec in signature.outputs]
    output = signature.position_output
    wanted = output.name if output is not None and output.shape[1:] == (2,) else None
    positions: tuple[list[Any], list[Any]] = ([], [])
    parts: list[list[Scores]] = [[] for _ in metrics]
    sessions = [open_session(side) for side in (a, b)]
    for rows, inputs, truth in data.batches(_BATCH):
        ours, theirs = (run_onnx(session, inputs, signature) for session in sessions)
        for spec, accumulator in zip(signature.outputs, accumulators, strict=True):
            accumulator.update(ours[spec.name], theirs[spec.name], rows.start)
        if wanted is not None:
            for who, kept, side in zip((A, B), positions, (ours, theirs), strict=True):
                kept.append(_checked_positions(side[wanted], who))
        for metric, part in zip(metrics, parts, strict=True):
            part.append(Scores.of(metric, ours, theirs, truth))
    both, known = None, None
    if wanted is not None:
        both = (np.concatenate(positions[0]), np.concatenate(positions[1]))
        known = None if data.positions is None else whole(data.positions).astype(np.float64)
    scores = [
        Scores.joined(part).beside(np.arange(data.count), data.weights, data.groups)
        for part in parts
    ]
    return Answers(
        source=data.source,
        samples=data.count,
        outputs=tuple(accumulator.result() for accumulator in accumulators),
        positions=both,
        truth=known,
        displacement=None if both is None else Displacement.between(*both),
        quality=tuple(map(judge_quality, metrics, scores, [limits.contract] * len(metrics))),
        by_sample={
            metric.name: (_each(metric, one.reference), _each(metric, one.found))
            for metric, one in zip(metrics, scores, strict=True)
            if metric.ranked is None
        },
        not_judged=not_judged,
        alone=tuple(alone),
    )


def _metrics(
    limits: Limits, signature: Signature, data: EvaluationData
) -> tuple[list[Metric], tuple[str, ...]]:
    """By what the answers are judged, and by what they can't be, in words."""
    if limits.metric:
        return list(metrics_for(limits.metric, signature, data.truth)), ()
    if not data.truth:
        return [], ("what is true of the samples is not known",)
    found: list[Metric] = []
    problems = []
    for name in limits.released or ("",):
        if name and name not in NAMES:
            # Whose code that is nobody knows who has only read its name in a release.
            problems.append(f"{shown(name)} is code of somebody's own, name it with --metric")
            continue
        try:
            found += metrics_for(name, signature, data.truth)
        except ParameterError as error:
            problems.append(str(error))
    return found, tuple(problems)


def _each(metric: Metric, rows: npt.NDArray[Any]) -> Floats:
    """The metric (N,) of each sample by itself."""
    alone = rows[:, 0] if metric.score is None else metric.score(rows, np.ones(len(rows)))
    return np.asarray(alone, np.float64)


def _checked_positions(found: npt.NDArray[Any], who: str) -> Floats:
    if found.ndim != 2 or found.shape[1] != 2:
        raise EvidenceError(
            f"{who} gives positions of shape {found.shape}, which its signature says are (batch, 2)"
        )
    return found.astype(np.float64)


def measure_both(
    a: Path,
    b: Path,
    data: EvaluationData,
    signature: Signature,
    *,
    calls: int = 200,
    seed: int = 0,
) -> PairLatency:
    """Time both models on the first sample in turns, as `measure_pair` does; B over A.

    Args:
        a: The ONNX file of A.
        b: That of B.
        data: Its first sample is the input of each call.
        signature: What both take and both give.
        calls: Counted calls of each, at least.
        seed: Of the order in which they take turns.

    Raises:
        BenchmarkError: If one of them can't be timed.
    """
    second, first = (Contestant(who, path, SessionSettings()) for who, path in ((A, a), (B, b)))
    return measure_pair(first, second, data.rows(range(1)), signature, calls=calls, seed=seed)


def latency_ratio(latency: PairLatency | NotMeasured, limits: Limits) -> Ratio | None:
    """B's latency over A's as it was measured; None where it was not."""
    if isinstance(latency, NotMeasured):
        return None
    found = latency.speedup
    return Ratio("latency", found.ratio, found.low, found.high, 1 + limits.slowdown)
