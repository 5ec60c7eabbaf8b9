"""What a promotion allows, and the gates of two releases beside each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from heimdall_onnx.common.verdict import Gate


@dataclass(frozen=True)
class Limits:
    """How much worse than the version that it replaces a model may be.

    A limit is broken when the whole confidence interval lies beyond it, so that noise refuses
    nobody.

    Attributes:
        error_growth: Share by which the median localization error may grow.
        slowdown: Share by which the latency may grow.
        calls: Counted calls of each model, at least.
        allow_smoke: Whether a release of the profile ``smoke``, which is no evidence, is taken.
    """

    error_growth: float = 0.05
    slowdown: float = 0.1
    calls: int = 200
    allow_smoke: bool = False

    @property
    def in_words(self) -> str:
        """In what it may be worse, and by how much."""
        return (
            f"latency by {self.slowdown:.0%}, median localization error by {self.error_growth:.0%},"
            " each by the whole of its interval; no lost gate, and no value that is NaN or Inf in "
            "one of them"
        )


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
