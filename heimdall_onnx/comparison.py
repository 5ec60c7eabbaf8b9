"""Two releases on the same evaluation inputs: how far they differ, and what changed around them.

A is the one that is there, B the one that would take its place; every ratio is B over A. Each is
one of the two things that a promotion holds a candidate against, on the same terms
(`heimdall_onnx.head_to_head`): a median localization error by a paired bootstrap over samples, and
a latency by blocks of calls in turns.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from heimdall_onnx.benchmark import Contestant, PairLatency, measure_pair
from heimdall_onnx.errors import EvidenceError, InvalidModelError
from heimdall_onnx.gates import Gate, NotMeasured
from heimdall_onnx.ground import distance_m, error_m
from heimdall_onnx.head_to_head import (
    Limits,
    Ratio,
    error_ratio,
    positions_of,
    run_batches,
    verdict_reasons,
)
from heimdall_onnx.npz import whole
from heimdall_onnx.repeated import Difference
from heimdall_onnx.report import as_json
from heimdall_onnx.runtimes import SessionSettings
from heimdall_onnx.signature import Signature, TensorSpec
from heimdall_onnx.statistics import ErrorAccumulator, ErrorStatistics
from heimdall_onnx.untrusted import listed
from heimdall_onnx.words import after, count_of, distance, name, number, unsteady

if TYPE_CHECKING:
    from pathlib import Path

    from heimdall_onnx.evaluation import EvaluationData

Floats = npt.NDArray[np.float64]

A, B = "A", "B"
# With fewer samples the 99th percentile is the largest by another name.
_SAMPLES_FOR_P99 = 100


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
class LocalizationErrors:
    """How far the positions of both lie from the true ones.

    Attributes:
        a_m: Errors of A (N,) in metres; infinite for a position that is NaN or Inf.
        b_m: Those of B.
        ratio: Of the medians of the samples that are finite in both, B over A; None where these
            are fewer than two.
    """

    a_m: Floats = field(repr=False)
    b_m: Floats = field(repr=False)
    ratio: Ratio | None

    @property
    def left_out(self) -> int:
        """Samples that the ratio leaves out: their error is not finite in A or in B."""
        return int((~(np.isfinite(self.a_m) & np.isfinite(self.b_m))).sum())

    @property
    def medians_m(self) -> tuple[float, float]:
        """Median error of A and of B."""
        return float(np.median(self.a_m)), float(np.median(self.b_m))

    @property
    def p95s_m(self) -> tuple[float, float]:
        """95th percentile of the error of A and of B."""
        a, b = (np.quantile(e, 0.95, method="inverted_cdf") for e in (self.a_m, self.b_m))
        return float(a), float(b)


@dataclass(frozen=True)
class Answers:
    """What both models say of the same inputs.

    Attributes:
        source: What both were run on, in words.
        samples: How many samples.
        outputs: Of each output that both give, B's values beside A's as the reference.
        spans: How far apart A's and B's finite values of each output lie at most, in its unit.
        positions: Those of A and of B (N, 2) in degrees; None for models without positions.
        truth: True positions (N, 2) in degrees, where they are known and there are positions.
        displacement: How far the positions move; None for models without.
        errors: How far they are from the true ones; None where these are not known.
        alone: Outputs that only one of the two gives, in words.
    """

    source: str
    samples: int
    outputs: tuple[ErrorStatistics, ...]
    spans: tuple[float, ...]
    positions: tuple[Floats, Floats] | None = field(repr=False)
    truth: Floats | None = field(repr=False)
    displacement: Displacement | None
    errors: LocalizationErrors | None
    alone: tuple[str, ...] = ()


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
        data: The samples; of more than `heimdall_onnx.head_to_head.MOST_SAMPLES` take a spread.
        signature: What both take and both give, see `shared_signature`.
        alone: What only one of the two gives, in words.
        limits: How much worse B may be; those of a promotion by default.

    Raises:
        EvidenceError: If one of them can't be run on the samples.
        InvalidModelError: If one of them can't be opened.
    """
    accumulators = [ErrorAccumulator(spec, atol=0.0, rtol=0.0) for spec in signature.outputs]
    lowest, highest = ([bound] * len(accumulators) for bound in (math.inf, -math.inf))
    wanted = positions_of(signature)
    positions: tuple[list[Any], list[Any]] = ([], [])
    first = 0
    pairs = zip(run_batches(a, data, signature), run_batches(b, data, signature), strict=True)
    for ours, theirs in pairs:
        for index, accumulator in enumerate(accumulators):
            output = signature.outputs[index].name
            accumulator.update(ours[output], theirs[output], first)
            for values in (ours[output], theirs[output]):
                finite = values[np.isfinite(values)].astype(np.float64)
                lowest[index] = min(lowest[index], float(finite.min(initial=math.inf)))
                highest[index] = max(highest[index], float(finite.max(initial=-math.inf)))
        if wanted is not None:
            for who, kept, side in zip((A, B), positions, (ours, theirs), strict=True):
                kept.append(_checked_positions(side[wanted], who))
        first += len(ours[signature.outputs[0].name])
    both, truth = None, None
    if wanted is not None:
        both = (np.concatenate(positions[0]), np.concatenate(positions[1]))
        truth = None if data.positions is None else whole(data.positions).astype(np.float64)
    return Answers(
        source=data.source,
        samples=data.count,
        outputs=tuple(accumulator.result() for accumulator in accumulators),
        spans=tuple(max(0.0, high - low) for low, high in zip(lowest, highest, strict=True)),
        positions=both,
        truth=truth,
        displacement=None if both is None else Displacement.between(*both),
        errors=None if both is None or truth is None else _errors(both, truth, limits or Limits()),
        alone=tuple(alone),
    )


def _checked_positions(found: npt.NDArray[Any], who: str) -> Floats:
    if found.ndim != 2 or found.shape[1] != 2:
        raise EvidenceError(
            f"{who} gives positions of shape {found.shape}, which its signature says are (batch, 2)"
        )
    return found.astype(np.float64)


def _errors(both: tuple[Floats, Floats], truth: Floats, limits: Limits) -> LocalizationErrors:
    a, b = (error_m(side, truth) for side in both)
    # What is infinitely far off has no ratio, and resampling may bring it into any median.
    known = np.isfinite(a) & np.isfinite(b)
    ratio = error_ratio(b[known], a[known], 1 + limits.error_growth) if known.sum() > 1 else None
    return LocalizationErrors(a, b, ratio)


def measure_both(
    a: Path,
    b: Path,
    data: EvaluationData,
    signature: Signature,
    *,
    measure: bool = True,
    calls: int = 200,
    seed: int = 0,
) -> PairLatency | NotMeasured:
    """Time both models on the first sample in turns, as `measure_pair` does; B over A.

    Args:
        a: The ONNX file of A.
        b: That of B.
        data: Its first sample is the input of each call.
        signature: What both take and both give.
        measure: False leaves it out.
        calls: Counted calls of each, at least.
        seed: Of the order in which they take turns.

    Raises:
        BenchmarkError: If one of them can't be timed.
    """
    if not measure:
        return NotMeasured("the parameter measure_latency is False")
    second, first = (Contestant(who, path, SessionSettings()) for who, path in ((A, a), (B, b)))
    return measure_pair(first, second, data.rows(range(1)), signature, calls=calls, seed=seed)


@dataclass(frozen=True)
class GatePair:
    """One gate in both releases.

    Attributes:
        name: Which gate.
        a: As A has it; None where it has no such gate.
        b: As B has it.
    """

    name: str
    a: Gate | None
    b: Gate | None

    @property
    def change(self) -> str:
        """What becomes of its outcome from A to B, in words; empty if it stays."""
        if self.a is None or self.b is None:
            there = self.b or self.a
            assert there is not None
            word = "is new" if self.a is None else "is gone"
            return word if there.passed else f"{word} and fails"
        if self.a.passed == self.b.passed:
            return ""
        return "passes now" if self.b.passed else "fails now"

    @property
    def worse(self) -> bool:
        """Whether it fails in B and does not in A."""
        return self.b is not None and not self.b.passed and (self.a is None or self.a.passed)


def pair_gates(a: Sequence[Gate], b: Sequence[Gate]) -> tuple[GatePair, ...]:
    """The gates of both releases side by side, in A's order; those of one name by their order."""
    sides = [dict(_numbered(side)) for side in (a, b)]
    return tuple(
        GatePair(key[0], sides[0].get(key), sides[1].get(key))
        for key in dict.fromkeys((*sides[0], *sides[1]))
    )


def _numbered(gates: Sequence[Gate]) -> Iterator[tuple[tuple[str, int], Gate]]:
    seen: Counter[str] = Counter()
    for gate in gates:
        yield (gate.name, seen[gate.name]), gate
        seen[gate.name] += 1


@dataclass(frozen=True)
class RecordedErrors:
    """How far a release's ONNX model is from its own PyTorch model, as its report records.

    Attributes:
        mean: Mean absolute error, as the others in the output's unit.
        p50: Median.
        p99: 99th percentile.
        p999: 99.9th percentile.
        maximum: Largest.
    """

    mean: float
    p50: float
    p99: float
    p999: float
    maximum: float


@dataclass(frozen=True)
class RecordedParity:
    """One output's parity in both releases, each on the evaluation data of its own release.

    Attributes:
        output: Name of the output.
        unit: Its unit.
        a: Of A; None where its report records none.
        b: Of B.
    """

    output: str
    unit: str | None
    a: RecordedErrors | None
    b: RecordedErrors | None


@dataclass(frozen=True)
class ComparedRelease:
    """One of the two, as it is identified.

    Attributes:
        who: ``"A"`` or ``"B"``.
        uri: Its folder, ``s3://bucket/prefix/version``.
        version: ``vYYYYMMDD_HHMMSS``.
        model_name: Registered model.
        model_version: Its version in the registry.
        verdict: As it was judged when it was released.
        created: When, as its manifest says.
        manifest_sha256: SHA-256 of its manifest.
        model_sha256: SHA-256 of its model.
        model_bytes: Length of its model.
        checks: Findings that were verified, all of which hold.
    """

    who: str
    uri: str
    version: str
    model_name: str
    model_version: str
    verdict: str
    created: str
    manifest_sha256: str
    model_sha256: str
    model_bytes: int
    checks: int


@dataclass(frozen=True)
class ReleaseComparison:
    """Everything that two releases were compared in.

    Attributes:
        a: The one that is there.
        b: The one that would take its place.
        answers: What both say of the same inputs.
        latency: How long both take, B over A.
        gates: Their gates side by side; None where a release records none.
        parity: Each one's own parity with PyTorch.
        parameters: In what their parameters differ; None where a release records none.
        environment: In what the environments differ that they were made in; None where a release
            records none.
        limits: How much worse B may be.
        packages_recorded: Whether both record which packages were installed.
    """

    a: ComparedRelease
    b: ComparedRelease
    answers: Answers
    latency: PairLatency | NotMeasured
    gates: tuple[GatePair, ...] | None
    parity: tuple[RecordedParity, ...]
    parameters: tuple[Difference, ...] | None
    environment: tuple[Difference, ...] | None
    limits: Limits
    packages_recorded: bool = True

    @property
    def latency_ratio(self) -> Ratio | None:
        """B's latency over A's; None where it was not measured."""
        if isinstance(self.latency, NotMeasured):
            return None
        found = self.latency.speedup
        return Ratio("latency", found.ratio, found.low, found.high, 1 + self.limits.slowdown)

    @property
    def ratios(self) -> tuple[Ratio, ...]:
        """Every ratio that there is, B over A."""
        errors = self.answers.errors
        return tuple(r for r in (self.latency_ratio, errors and errors.ratio) if r)

    @property
    def changed_gates(self) -> tuple[GatePair, ...]:
        """The gates whose outcome changes."""
        return tuple(gate for gate in self.gates or () if gate.change)

    @property
    def worse(self) -> tuple[str, ...]:
        """In what B is worse than A beyond the limits, in words; empty if in nothing."""
        lost = self.answers.displacement
        nonfinite = sum(o.nonfinite_mismatches for o in self.answers.outputs)
        return (
            *(
                f"{ratio.what} {ratio_words(ratio)} that of A, limit {ratio.limit:.3g}"
                for ratio in self.ratios
                if not ratio.holds
            ),
            *(f"B: {reason}" for reason in verdict_reasons(self.b.verdict, self.limits)),
            *(f"gate {name(g.name, 60)} {g.change}" for g in self.gates or () if g.worse),
            *([f"{nonfinite:,} values are NaN or Inf in one of them"] if nonfinite else []),
            *(
                [f"{count_of(lost.lost, 'position')} NaN or Inf in one of them"]
                if lost and lost.lost and not nonfinite
                else []
            ),
        )

    @property
    def not_judged(self) -> tuple[str, ...]:
        """What a promotion asks for and is not known here, in words."""
        answers = self.answers
        found = []
        if isinstance(self.latency, NotMeasured):
            found.append(f"latency ({self.latency.reason})")
        if answers.errors is None:
            why = "true positions are not known" if answers.positions else "there are no positions"
            found.append(f"localization error ({why})")
        elif answers.errors.ratio is None:
            found.append("localization error (fewer than two samples are finite in both)")
        if self.gates is None:
            found.append("gates (one of the releases records none)")
        return tuple(found)

    @property
    def judged(self) -> bool:
        """Whether latency, localization error or gates could be compared."""
        return bool(self.ratios) or self.gates is not None

    @property
    def sentence(self) -> str:
        """The comparison in one sentence, without a full stop."""
        errors = self.answers.errors
        parts = [
            *speed_words(self.latency_ratio),
            *([moved] if (moved := self._unsteady()) else ()),
            *(error_words(errors) if errors else ["localization error was not compared"]),
            *([moved_words(self.answers)]),
            gate_words(self.gates, self.changed_gates),
        ]
        text = ", ".join(parts)
        return text[0].upper() + text[1:]

    def _unsteady(self) -> str:
        measured = self.latency
        return (
            "" if isinstance(measured, NotMeasured) else unsteady(measured.to_dict()["contenders"])
        )

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON without arrays; NaN and Inf as text, as JSON has neither."""
        answers, latency = self.answers, self.latency
        moved, errors, ratio = answers.displacement, answers.errors, self.latency_ratio
        found: dict[str, Any] = as_json(
            {
                "sentence": self.sentence,
                "worse": list(self.worse),
                "not_judged": list(self.not_judged),
                "judged": self.judged,
                "a": asdict(self.a),
                "b": asdict(self.b),
                "evaluation_data": answers.source,
                "samples": answers.samples,
                "outputs": [output.summary() for output in answers.outputs],
                "given_by_one_alone": list(answers.alone),
                "displacement_m": moved
                and {"p50": moved.p50_m, "p99": moved.p99_m, "max": moved.max_m},
                "localization_error": errors
                and {
                    "median_m": dict(zip(("a", "b"), errors.medians_m, strict=True)),
                    "p95_m": dict(zip(("a", "b"), errors.p95s_m, strict=True)),
                    "left_out": errors.left_out,
                    "ratio": errors.ratio and _ratio_dict(errors.ratio),
                },
                "latency": None
                if isinstance(latency, NotMeasured)
                else {"ratio": ratio and _ratio_dict(ratio), **latency.to_dict()},
                "latency_not_measured": latency.reason
                if isinstance(latency, NotMeasured)
                else None,
                "gates": None
                if self.gates is None
                else [
                    {
                        "name": gate.name,
                        "a": gate.a and gate.a.to_dict(),
                        "b": gate.b and gate.b.to_dict(),
                        "change": gate.change,
                    }
                    for gate in self.gates
                ],
                "parity": [asdict(one) for one in self.parity],
                **{
                    what: None if found is None else [asdict(one) for one in found]
                    for what, found in (
                        ("parameters", self.parameters),
                        ("environment", self.environment),
                    )
                },
                "packages_recorded": self.packages_recorded,
                "limits": asdict(self.limits),
            }
        )
        return found


def _ratio_dict(ratio: Ratio) -> dict[str, float | bool]:
    return {
        "ratio": ratio.ratio,
        "low": ratio.low,
        "high": ratio.high,
        "limit": ratio.limit,
        "holds": ratio.holds,
    }


def ratio_words(ratio: Ratio) -> str:
    """A ratio with its interval: ``0.880× (0.860 to 0.902)``."""
    value, low, high = (_near_one(end, 3) for end in (ratio.ratio, ratio.low, ratio.high))
    return f"{value}× ({low} to {high})"


def _near_one(value: float, places: int) -> str:
    # Beside 1 these places tell a difference from none.
    return f"{value:.{places}f}" if 0.01 < value < 10 else number(value, 3)


def _clear(ratio: Ratio) -> bool:
    return not ratio.low <= 1 <= ratio.high


def speed_words(ratio: Ratio | None) -> Iterator[str]:
    """How the two compare in latency, in words."""
    if ratio is None:
        yield "latency was not compared"
    elif not _clear(ratio):
        yield (
            "no clear difference in speed (B takes "
            f"{_near_one(ratio.low, 2)} to {_near_one(ratio.high, 2)} times as long)"
        )
    elif ratio.ratio > 1:
        yield f"B is {_growth(ratio.ratio, ratio.low, ratio.high, 'slower')}"
    else:
        # Twice as fast is 100% faster, as twice as slow is 100% slower.
        yield f"B is {_growth(1 / ratio.ratio, 1 / ratio.high, 1 / ratio.low, 'faster')}"


def _growth(ratio: float, low: float, high: float, word: str) -> str:
    """``12% slower (10 to 14)``, or ``3.1× slower (3 to 3.2)`` from twice on."""
    if ratio >= 2:
        return f"{number(ratio)}× {word} ({number(low)} to {number(high)})"
    growth, least, most = (number(100 * (value - 1)) for value in (ratio, low, high))
    return f"{growth}% {word} ({least} to {most})"


def error_words(errors: LocalizationErrors) -> Iterator[str]:
    """How the two compare in localization error, in words."""
    ratio = errors.ratio
    a, b = errors.medians_m
    if ratio is None:
        yield f"median localization error {distance(a)} (A) and {distance(b)} (B), not compared"
    elif not _clear(ratio):
        yield f"no clear difference in localization error (median {distance(b)})"
    elif ratio.ratio > 1:
        grown = _growth(ratio.ratio, ratio.low, ratio.high, "larger")
        grown = f"{ratio_words(ratio)} that of A" if ratio.ratio >= 2 else grown
        yield f"B's median error is {grown}"
    else:
        less, least, most = (
            number(100 * (1 - end)) for end in (ratio.ratio, ratio.high, ratio.low)
        )
        yield f"B's median error is {less}% smaller ({least} to {most})"
    if ratio is not None and errors.left_out:
        yield f"{count_of(errors.left_out, 'sample')} left out of that (NaN or Inf in one or both)"


def moved_words(answers: Answers) -> str:
    """How far the answers lie apart, in words."""
    moved = answers.displacement
    if moved is None:
        return _output_words(answers)
    if moved.lost:
        return f"{moved.lost:,} of {answers.samples:,} positions are NaN or Inf in one of them"
    if math.isnan(moved.max_m):
        return "no position is finite in both"
    if moved.max_m == 0:
        return "no position moves"
    if moved.metres.size < _SAMPLES_FOR_P99:
        return f"positions move by {distance(moved.max_m)} at most"
    return f"positions move by {distance(moved.p99_m)} at p99"


def largest_change(answers: Answers) -> ErrorStatistics:
    """The output that changes most: units differ, so beside how far its values lie apart."""
    relative = [
        math.inf if o.nonfinite_mismatches else o.p99 / span if span and o.p99 == o.p99 else 0.0
        for o, span in zip(answers.outputs, answers.spans, strict=True)
    ]
    return answers.outputs[int(np.argmax(relative))]


def _output_words(answers: Answers) -> str:
    most = largest_change(answers)
    called, unit = f"the output {name(most.output)}", after(most.unit)
    if most.nonfinite_mismatches:
        return (
            f"{most.nonfinite_mismatches:,} of {most.count:,} values of {called} are NaN or Inf in "
            "one of them"
        )
    if not any(output.maximum for output in answers.outputs):
        return "no output changes"
    several = "most, " if len(answers.outputs) > 1 else ""
    if most.count < _SAMPLES_FOR_P99:
        return f"{called} changes {several}by {number(most.maximum)}{unit} at most"
    return f"{called} changes {several}by {number(most.p99)}{unit} at p99"


def gate_words(gates: Sequence[GatePair] | None, changed: Sequence[GatePair]) -> str:
    """How many gates change, and which."""
    if gates is None:
        return "gates are not recorded in both"
    if not changed:
        return "no gate changes"
    told = "; ".join(f"{name(gate.name, 40)} {gate.change}" for gate in changed[:3])
    more = f"; and {len(changed) - 3} more" if len(changed) > 3 else ""
    return f"{count_of(len(changed), 'gate')} {'changes' if len(changed) == 1 else 'change'} " + (
        f"({told}{more})"
    )
