"""Two releases on the same evaluation inputs: how far they differ, and what changed around them.

A is the one that is there, B the one that would take its place; every ratio is B over A. Each is
one of the two things that a promotion holds a candidate against, on the same terms
(`evidence.ratios`): a median localization error by a paired bootstrap over samples, and
a latency by blocks of calls in turns.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter
from pydantic_core import to_json

from heimdall_onnx.common.text import name
from heimdall_onnx.common.verdict import NotMeasured
from heimdall_onnx.evidence.latency.benchmark import PairLatency
from heimdall_onnx.evidence.latency.figures import PairFigures
from heimdall_onnx.evidence.parity.statistics import ErrorStatistics
from heimdall_onnx.evidence.ratios import Ratio
from heimdall_onnx.review.compare.answers import Answers, latency_ratio
from heimdall_onnx.review.compare.gates import GatePair, Limits, verdict_reasons
from heimdall_onnx.review.compare.words import (
    error_words,
    gate_words,
    moved_words,
    ratio_words,
    speed_words,
)
from heimdall_onnx.review.reproduce.figures import Difference


@dataclass(frozen=True)
class RecordedParity:
    """One output's parity in both releases, each on the evaluation data of its own release.

    Attributes:
        output: Name of the output.
        unit: Its unit.
        a: Of A; None where that is not compared there.
        b: Of B.
    """

    output: str
    unit: str | None
    a: ErrorStatistics | None
    b: ErrorStatistics | None


# Without what is not recorded.
_OUTPUTS = TypeAdapter(tuple[ErrorStatistics, ...])
_PARITY = TypeAdapter(tuple[RecordedParity, ...])
_LATENCY = TypeAdapter(PairFigures)


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
        gates: Their gates side by side.
        parity: Each one's own parity with PyTorch.
        parameters: In what their parameters differ.
        environment: In what the environments differ that they were made in.
        limits: How much worse B may be.
    """

    a: ComparedRelease
    b: ComparedRelease
    answers: Answers
    latency: PairLatency | NotMeasured
    gates: tuple[GatePair, ...]
    parity: tuple[RecordedParity, ...]
    parameters: tuple[Difference, ...]
    environment: tuple[Difference, ...]
    limits: Limits

    @property
    def latency_ratio(self) -> Ratio | None:
        """B's latency over A's; None where it was not measured."""
        return latency_ratio(self.latency, self.limits)

    @property
    def ratios(self) -> tuple[Ratio, ...]:
        """Every ratio that there is, B over A."""
        errors = self.answers.errors
        return tuple(r for r in (self.latency_ratio, errors and errors.ratio) if r)

    @property
    def changed_gates(self) -> tuple[GatePair, ...]:
        """The gates whose outcome changes."""
        return tuple(gate for gate in self.gates if gate.change)

    @property
    def worse(self) -> tuple[str, ...]:
        """In what B is worse than A beyond the limits, in words; empty if in nothing."""
        return (
            *(
                f"{ratio.what} {ratio_words(ratio)} that of A, limit {ratio.limit:.3g}"
                for ratio in self.ratios
                if not ratio.holds
            ),
            *(f"B: {reason}" for reason in verdict_reasons(self.b.verdict, self.limits)),
            *(f"gate {name(g.name, 60)} {g.change}" for g in self.gates if g.worse),
            *self.answers.lost,
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
        return tuple(found)

    @property
    def sentence(self) -> str:
        """The comparison in one sentence, without a full stop."""
        errors = self.answers.errors
        parts = [
            *speed_words(self.latency_ratio),
            *([moved] if (moved := self._unsteady()) else ()),
            *(error_words(errors) if errors else ["localization error was not compared"]),
            *([moved_words(self.answers)]),
            gate_words(self.changed_gates),
        ]
        text = ", ".join(parts)
        return text[0].upper() + text[1:]

    def _unsteady(self) -> str:
        measured = self.latency
        return "" if isinstance(measured, NotMeasured) else measured.unsteady

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON without arrays; NaN and Inf as text, as JSON has neither."""
        answers, latency = self.answers, self.latency
        moved, errors, ratio = answers.displacement, answers.errors, self.latency_ratio
        text = to_json(
            {
                "sentence": self.sentence,
                "worse": list(self.worse),
                "not_judged": list(self.not_judged),
                "a": asdict(self.a),
                "b": asdict(self.b),
                "evaluation_data": answers.source,
                "samples": answers.samples,
                "outputs": _OUTPUTS.dump_python(answers.outputs),
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
                else {
                    "ratio": ratio and _ratio_dict(ratio),
                    "unsteady": self._unsteady(),
                    **_LATENCY.dump_python(latency),
                },
                "latency_not_measured": latency.reason
                if isinstance(latency, NotMeasured)
                else None,
                "gates": [
                    {
                        "name": gate.name,
                        "a": gate.a and gate.a.to_dict(),
                        "b": gate.b and gate.b.to_dict(),
                        "change": gate.change,
                    }
                    for gate in self.gates
                ],
                "parity": _PARITY.dump_python(self.parity),
                "parameters": [asdict(one) for one in self.parameters],
                "environment": [asdict(one) for one in self.environment],
                "limits": asdict(self.limits),
            },
            inf_nan_mode="strings",
        )
        found: dict[str, Any] = json.loads(text)
        return found


def _ratio_dict(ratio: Ratio) -> dict[str, float | bool]:
    return {
        "ratio": ratio.ratio,
        "low": ratio.low,
        "high": ratio.high,
        "limit": ratio.limit,
        "holds": ratio.holds,
    }
