"""Text out of untrusted files, made fit for a message that a person reads in a terminal."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence

# Several times what a model of the wrong size differs by; a file can hold millions.
_MOST_PROBLEMS = 1000
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def shown(value: object, limit: int = 200) -> str:
    """``value`` on one line of at most ``limit`` characters, what can't be seen as its code.

    A small file can hold a value that is endless once it is written out, so containers are
    abbreviated as well.
    """
    if isinstance(value, str):
        text = value
    else:
        try:
            text = _SHORT.repr(value)
        except ValueError:  # an integer of more digits than Python is willing to print
            text = f"<{type(value).__name__}>"
    line = " ".join(text[: 4 * limit].split())
    seen = visible(line[: limit + 1])
    return seen if len(seen) <= limit else f"{seen[: limit - 1]}…"


def visible(text: str) -> str:
    """``text`` on one line, what can't be seen as its code."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def visible_lines(text: str) -> str:
    """``text`` line by line, what can't be seen as its code; an error may quote anybody's words."""
    return "\n".join(map(visible, text.splitlines()))


def listed(problems: Sequence[str]) -> str:
    """``problems``, each on a line of its own; beyond a thousand only how many more there are."""
    more = len(problems) - _MOST_PROBLEMS
    lines = [*problems[:_MOST_PROBLEMS], *([f"and {more:,} more"] if more > 0 else [])]
    return "".join(f"\n  - {line}" for line in lines)
