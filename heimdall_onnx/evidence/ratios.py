"""What one released model takes beside another one."""

from __future__ import annotations

from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Ratio:
    """One figure of the candidate over the same of the version that holds the alias.

    Attributes:
        what: Which figure.
        ratio: Above 1 the candidate is worse.
        low: Lower end of its 95 % confidence interval.
        high: Upper end of it.
        limit: What it may be at most.
    """

    what: str
    ratio: float
    low: float
    high: float
    limit: float

    @property
    def holds(self) -> bool:
        """Whether the interval reaches down to the limit."""
        return self.low <= self.limit

    def __str__(self) -> str:
        return (
            f"{self.what}: {self.ratio:.3f}× that of the version it would replace "
            f"({self.low:.3f} to {self.high:.3f}), limit {self.limit:.3f}"
        )
