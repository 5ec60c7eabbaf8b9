"""What a promotion allows, and the gates of two releases beside each other."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from heimdall_onnx.common.errors import VerificationError
from heimdall_onnx.common.parameters import Quality
from heimdall_onnx.common.verdict import Gate
from heimdall_onnx.evidence.quality.contract import Judged


@dataclass(frozen=True)
class Limits:
    """How much worse than the version that it replaces a model may be.

    Latency is beyond its limit when the whole confidence interval is, so that noise refuses nobody.
    A loss in the task has to be shown to be within what may be lost, so that few samples let nobody
    pass.

    Attributes:
        slowdown: Share by which the latency may grow.
        calls: Counted calls of each model, at least.
        allow_smoke: Whether a release of the profile ``smoke``, which is no evidence, is taken.
        allow_not_shown: Whether a loss that is neither shown to be small enough nor to be too large
            is taken.
        metric: By what answers are judged, as in `Quality`; empty for ``released``.
        max_loss: What may be lost; None for what `Quality` allows.
        confidence: How surely that must be shown; None as in `Quality`.
        released: By which metrics the candidate's release was judged.
    """

    slowdown: float = 0.1
    calls: int = 200
    allow_smoke: bool = False
    allow_not_shown: bool = False
    metric: str = ""
    max_loss: float | None = None
    confidence: float | None = None
    released: tuple[str, ...] = ()

    @property
    def in_words(self) -> str:
        """In what it may be worse, and by how much."""
        return (
            f"latency by {self.slowdown:.0%} by the whole of its interval; its task by no more "
            "than may be lost; no lost gate, and no value that is NaN or Inf in one of them"
        )

    @property
    def contract(self) -> Quality:
        """The contract on quality."""
        given = {n: v for n in ("max_loss", "confidence") if (v := getattr(self, n)) is not None}
        return Quality(self.metric, binding=not self.allow_not_shown, **given)

    def as_released(self, quality: Sequence[Judged]) -> Limits:
        """With what is not given here as the candidate's release was judged.

        Raises:
            VerificationError: If what it says of that is no contract.
        """
        loss, confidence = self.max_loss, self.confidence
        for judged in quality[:1]:
            loss = judged.max_loss if loss is None else loss
            confidence = judged.confidence if confidence is None else confidence
            if not (0 <= loss < math.inf and 0.5 <= confidence < 1):
                raise VerificationError(
                    "expected a loss of at least 0 and a confidence from 0.5 to 1 in a contract, "
                    f"found {loss} and {confidence}"
                )
        names = tuple(dict.fromkeys(judged.metric for judged in quality))
        return replace(self, max_loss=loss, confidence=confidence, released=names)


def verdict_reasons(verdict: str, limits: Limits) -> Iterator[str]:
    """Why a release of this verdict is not promoted."""
    if not verdict.startswith("pass"):
        yield f"its verdict is {verdict!r}"
    if "smoke" in verdict and not limits.allow_smoke:
        yield "it is a test run (profile smoke), which is no evidence"


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
            failed = "is not shown" if there.undecided else "fails"
            return word if there.passed else f"{word} and {failed}"
        if (self.a.passed, self.a.undecided) == (self.b.passed, self.b.undecided):
            return ""
        if self.b.undecided and not self.a.undecided:
            return "is not shown now"
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
