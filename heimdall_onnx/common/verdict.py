"""Gates and the verdict: every gate is evaluated, then the run fails once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from heimdall_onnx.common.errors import GateError
from heimdall_onnx.common.text import escape_markdown, listed, markdown_table


@dataclass(frozen=True)
class Gate:
    """A named condition with its limit and the value that was measured.

    Attributes:
        name: What is gated, e.g. ``"mean absolute error"``.
        limit: The condition in words, e.g. ``"≤ 1e-05"``.
        measured: The measured value.
        passed: Whether the condition holds.
        detail: Where the measured value was found, or what is wrong.
        undecided: Whether too few samples were there to show it either way.
    """

    name: str
    limit: str
    measured: float | int | str
    passed: bool
    detail: str = ""
    undecided: bool = False

    def __post_init__(self) -> None:
        # As a record has them, where a number that JSON has no form for is text.
        if self.measured in ("NaN", "Infinity", "-Infinity"):
            object.__setattr__(self, "measured", float(self.measured))

    @classmethod
    def at_most(cls, name: str, limit: float, measured: float, detail: str = "") -> Gate:
        """A gate that holds for ``measured <= limit``; NaN never passes."""
        return cls(name, f"≤ {limit:g}", measured, bool(measured <= limit), detail)

    @classmethod
    def none_of(cls, name: str, problems: Iterable[str]) -> Gate:
        """A gate that holds when there are no ``problems``, which become its detail."""
        found = tuple(problems)
        return cls(name, "0 problems", len(found), not found, "; ".join(found))

    @property
    def shown(self) -> str:
        """The measured value, to as many digits as tell it from a limit that it is beyond."""
        if not isinstance(self.measured, float):
            return str(self.measured)
        texts = [f"{self.measured:.{digits}g}" for digits in range(3, 18)]
        limit = self.limit.removeprefix("≤ ")
        if self.passed or limit == self.limit or not math.isfinite(self.measured):
            return texts[0]
        return next((text for text in texts if float(text) > float(limit)), texts[-1])

    @property
    def result(self) -> str:
        """What came of it, in capitals where it does not hold."""
        word = "not shown" if self.undecided else "pass" if self.passed else "fail"
        return word if self.passed else word.upper()

    def summary(self) -> str:
        """The gate on one line, with its limit and measured value."""
        found = f"{self.name}: expected {self.limit}, measured {self.shown}"
        return found + (f" ({self.detail})" if self.detail else "")

    def as_shown(self) -> dict[str, Any]:
        """The gate as a reader sees it: its measured value as text."""
        return {**self.to_dict(), "measured": self.shown, "result": self.result}

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable copy; a measured NaN or Inf becomes text, as JSON has neither."""
        measured = self.measured
        if isinstance(measured, float) and not math.isfinite(measured):
            measured = str(measured)
        return {**vars(self), "measured": measured}


@dataclass(frozen=True)
class Verdict:
    """All gates of a run together.

    Attributes:
        gates: Every gate, evaluated.
        profile: How much was measured (``smoke``, ``quick`` or ``audit``).
    """

    gates: tuple[Gate, ...]
    profile: str

    @property
    def passed(self) -> bool:
        """Whether there are gates and every one holds."""
        return bool(self.gates) and all(gate.passed for gate in self.gates)

    @property
    def failed_gates(self) -> tuple[Gate, ...]:
        """The gates that do not hold."""
        return tuple(gate for gate in self.gates if not gate.passed)

    @property
    def word(self) -> str:
        """``"pass"``, ``"fail"``, or ``"not shown"`` where only samples are missing."""
        undecided = all(gate.undecided for gate in self.failed_gates)
        return "pass" if self.passed else "not shown" if self.gates and undecided else "fail"

    @property
    def _count(self) -> str:
        what = "are not shown to hold" if self.word == "not shown" else "failed"
        return f"{len(self.failed_gates)} of {len(self.gates)} gates {what}"

    def summary(self) -> str:
        """How many gates do not hold, and which."""
        return f"{self._count}: {', '.join(gate.name for gate in self.failed_gates)}"

    def reasons(self) -> str:
        """Every gate that does not hold, with its limit and measured value, one a line."""
        return f"{self._count}:{listed([gate.summary() for gate in self.failed_gates])}"

    def require(self) -> None:
        """Return if every gate holds.

        Raises:
            GateError: With the `reasons`.
        """
        if not self.passed:
            raise GateError(self.reasons())

    def failed_first(self) -> tuple[Gate, ...]:
        """The gates, those that do not hold before the others."""
        return tuple(sorted(self.gates, key=lambda gate: gate.passed))

    def to_markdown(self) -> str:
        """The gates as a Markdown table, failed ones first."""
        rows = []
        for gate in self.failed_first():
            told = (gate.name, gate.limit, gate.shown, gate.detail)
            name, *further = map(escape_markdown, told)
            result = gate.result if gate.passed else f"**{gate.result}**"
            rows.append((name, result, *further))
        return markdown_table(("gate", "result", "limit", "measured", "where"), rows)

    def _repr_markdown_(self) -> str:
        return self.to_markdown()


_Arguments = ParamSpec("_Arguments")
_Found = TypeVar("_Found")
_Shown = TypeVar("_Shown")


@dataclass(frozen=True)
class NotMeasured:
    """Stands where something would stand that was to be timed.

    Attributes:
        reason: Why it was not, in words.
    """

    reason: str

    def __str__(self) -> str:
        return f"not measured: {self.reason}"

    def _repr_markdown_(self) -> str:
        return f"**Not measured:** {escape_markdown(self.reason)}"


def unless_not_measured(
    show: Callable[Concatenate[_Found, _Arguments], _Shown],
) -> Callable[Concatenate[_Found | NotMeasured, _Arguments], _Shown | NotMeasured]:
    """Make ``show`` give back what was not measured, which says so where it is shown."""

    @wraps(show)
    def wrapper(
        found: _Found | NotMeasured, /, *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> _Shown | NotMeasured:
        return found if isinstance(found, NotMeasured) else show(found, *args, **kwargs)

    return wrapper
