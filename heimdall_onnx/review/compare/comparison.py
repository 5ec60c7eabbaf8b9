"""Two releases on the same evaluation inputs: how far they differ, and what changed around them.

A is the one that is there, B the one that would take its place. They are held against each other on
the terms of a promotion: by what B loses in its task, on the same samples (`evidence.quality`), and
by B's latency over A's, by blocks of calls in turns (`evidence.ratios`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from pydantic_core import from_json, to_json

from heimdall_onnx.archive.manifest import Manifest
from heimdall_onnx.archive.record import Record
from heimdall_onnx.common.text import name
from heimdall_onnx.common.verdict import NotMeasured
from heimdall_onnx.evidence.latency.benchmark import PairLatency
from heimdall_onnx.evidence.latency.figures import PairFigures
from heimdall_onnx.evidence.parity.statistics import ErrorStatistics
from heimdall_onnx.evidence.ratios import Ratio
from heimdall_onnx.review.compare.answers import Answers, latency_ratio
from heimdall_onnx.review.compare.gates import GatePair, Limits, verdict_reasons
from heimdall_onnx.review.compare.words import (
    gate_words,
    losses_of,
    moved_words,
    quality_words,
    ratio_words,
    sentence_of,
    speed_words,
)
from heimdall_onnx.review.reproduce.figures import Difference

# Without what is not recorded.
_OUTPUTS = TypeAdapter(tuple[ErrorStatistics, ...])
_LATENCY = TypeAdapter(PairFigures)


@dataclass(frozen=True)
class VerifiedRelease:
    """A release that verifies, with its model on this machine.

    Attributes:
        who: ``"A"`` or ``"B"``.
        manifest: Its manifest.
        record: What its notebook has recorded.
        model: Its ONNX file.
        checks: Findings that were verified, all of which hold.
    """

    who: str
    manifest: Manifest = field(repr=False)
    record: Record = field(repr=False)
    model: Path
    checks: int

    def to_dict(self) -> dict[str, Any]:
        """What identifies it, JSON-serialisable."""
        manifest = self.manifest
        return {
            "who": self.who,
            "uri": manifest.uri,
            "version": manifest.version,
            "model_name": manifest.model_name,
            "model_version": manifest.model_version,
            "verdict": manifest.said.verdict,
            "created": manifest.said.created.isoformat(),
            "manifest_sha256": manifest.sha256,
            "model_sha256": manifest.model.sha256,
            "model_bytes": manifest.model.size,
            "checks": self.checks,
        }


@dataclass(frozen=True)
class ReleaseComparison:
    """Everything that two releases were compared in.

    Attributes:
        a: The one that is there.
        b: The one that would take its place.
        answers: What both say of the same inputs.
        latency: How long both take, B over A.
        gates: Their gates side by side.
        parameters: In what their parameters differ.
        environment: In what the environments differ that they were made in.
        limits: How much worse B may be.
    """

    a: VerifiedRelease
    b: VerifiedRelease
    answers: Answers
    latency: PairLatency | NotMeasured
    gates: tuple[GatePair, ...]
    parameters: tuple[Difference, ...]
    environment: tuple[Difference, ...]
    limits: Limits

    @property
    def latency_ratio(self) -> Ratio | None:
        """B's latency over A's; None where it was not measured."""
        return latency_ratio(self.latency, self.limits)

    @property
    def changed_gates(self) -> tuple[GatePair, ...]:
        """The gates whose outcome changes."""
        return tuple(gate for gate in self.gates if gate.change)

    @property
    def worse(self) -> tuple[str, ...]:
        """In what B is worse than A beyond the limits, in words; empty if in nothing."""
        return (
            *losses_of(self.answers.quality, "worse"),
            *(
                f"latency {ratio_words(ratio)} that of A, limit {ratio.limit:.3g}"
                for ratio in (self.latency_ratio,)
                if ratio and not ratio.holds
            ),
            *(
                f"B: {reason}"
                for reason in verdict_reasons(self.b.manifest.said.verdict, self.limits)
            ),
            *(f"gate {name(g.name, 60)} {g.change}" for g in self.gates if g.worse),
            *self.answers.lost,
        )

    @property
    def not_shown(self) -> tuple[str, ...]:
        """What B is not shown to be good enough in, with how many samples would, in words."""
        return losses_of(self.answers.quality, "not shown")

    @property
    def not_judged(self) -> tuple[str, ...]:
        """What a promotion asks for and is not known here, in words."""
        latency = self.latency
        return (
            *([f"latency ({latency.reason})"] if isinstance(latency, NotMeasured) else []),
            *(f"quality ({why})" for why in self.answers.not_judged),
        )

    @property
    def sentence(self) -> str:
        """The comparison in one sentence, without a full stop."""
        return sentence_of(
            (
                speed_words(self.latency_ratio),
                self._unsteady,
                *quality_words(self.answers),
                moved_words(self.answers),
                gate_words(self.changed_gates),
            )
        )

    @property
    def facts(self) -> dict[str, str]:
        """What a reviewer must see at once, by what it is called."""
        answers, latency = self.answers, self.latency_ratio
        sides = {
            one.who: f"{one.manifest.uri}, {one.manifest.model_name} version "
            f"{one.manifest.model_version}, {one.manifest.said.verdict}"
            for one in (self.a, self.b)
        }
        measured = (ratio_words(latency), self._unsteady) if latency else (str(self.latency),)
        return {
            **sides,
            "evaluation data": f"{answers.samples:,} samples, {answers.source}",
            "latency of B over A": "; ".join(filter(None, measured)),
            "B is worse in": "; ".join(self.worse) or "nothing that was judged",
            **({"not shown": "; ".join(few)} if (few := self.not_shown) else {}),
            **({"not judged": "; ".join(missing)} if (missing := self.not_judged) else {}),
            "PASS allows": f"that B is worse: {self.limits.in_words}",
        }

    @property
    def _unsteady(self) -> str:
        return "" if isinstance(self.latency, NotMeasured) else self.latency.unsteady

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON without arrays; NaN and Inf as text, as JSON has neither."""
        answers, latency = self.answers, self.latency
        moved, ratio = answers.displacement, self.latency_ratio
        missing = latency.reason if isinstance(latency, NotMeasured) else None
        text = to_json(
            {
                "sentence": self.sentence,
                "worse": list(self.worse),
                "not_shown": list(self.not_shown),
                "not_judged": list(self.not_judged),
                "a": self.a.to_dict(),
                "b": self.b.to_dict(),
                "evaluation_data": answers.source,
                "samples": answers.samples,
                "outputs": _OUTPUTS.dump_python(answers.outputs),
                "given_by_one_alone": list(answers.alone),
                "displacement_m": moved
                and {"p50": moved.p50_m, "p99": moved.p99_m, "max": moved.max_m},
                "quality": answers.quality,
                "latency": None
                if isinstance(latency, NotMeasured)
                else {
                    "ratio": ratio and {**vars(ratio), "holds": ratio.holds},
                    "unsteady": self._unsteady,
                    **_LATENCY.dump_python(latency),
                },
                "latency_not_measured": missing,
                "gates": [
                    {
                        "name": gate.name,
                        "a": gate.a and gate.a.to_dict(),
                        "b": gate.b and gate.b.to_dict(),
                        "change": gate.change,
                    }
                    for gate in self.gates
                ],
                "parameters": self.parameters,
                "environment": self.environment,
                "limits": self.limits,
            },
            inf_nan_mode="strings",
        )
        found: dict[str, Any] = from_json(text)
        return found
