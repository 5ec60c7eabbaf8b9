"""What a part of the soak has tried, and what came of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Tally:
    """Counts of one part.

    Attributes:
        part: Its name.
        tried: Faults done.
        survived: Those after which the run succeeded all the same.
        violations: Everything that was not as it must be, in words.
        counts: What else is worth counting.
    """

    part: str
    tried: int = 0
    survived: int = 0
    violations: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def tell(self, case: str, outcome: str, found: Sequence[str]) -> None:
        """Keep what was not as it must be, and say so at once: a soak may be interrupted."""
        self.violations += [f"{case}: {what}" for what in found]
        print("\n    VIOLATION: ".join((f"{case}: {outcome}", *found)), flush=True)

    def __str__(self) -> str:
        lines = [
            f"{self.part}: {self.tried} faults tried, {self.survived} survived, "
            f"{len(self.violations)} violations"
        ]
        lines += [f"    {count:5}  {what}" for what, count in self.counts.items()]
        lines += [f"    VIOLATION: {violation}" for violation in self.violations]
        return "\n".join(lines)
