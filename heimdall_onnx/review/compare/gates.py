"""The gates of two releases beside each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from heimdall_onnx.common.gates import Gate


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
