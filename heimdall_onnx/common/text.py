"""How text is written for readers: names, numbers and units, and what untrusted files say."""

from __future__ import annotations

import difflib
import math
import re
import reprlib
from collections.abc import Iterable, Sequence

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


def meant(name: str, known: Iterable[str]) -> str:
    """Which known names may be meant by one that is not; all of them where none is near."""
    names = [*known]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(names)}"


def name(text: str, limit: int = 28) -> str:
    """A name from outside on one line of at most ``limit`` characters."""
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"


def number(value: float, digits: int = 2) -> str:
    """``value`` to ``digits`` significant digits: ``3.1e-6``, ``0.42``, ``1,234``."""
    if not math.isfinite(value):
        return str(value)
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{mantissa}e{int(exponent)}"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    places = digits - 1 - math.floor(math.log10(abs(value))) if value else 0
    text = f"{value:.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def apart(one: float, other: float, least: int = 7) -> tuple[str, str]:
    """Two values to ``least`` significant digits, or to as many more as tell them apart."""
    digits = next((n for n in range(least, 18) if f"{one:.{n}g}" != f"{other:.{n}g}"), least)
    return f"{one:.{digits}g}", f"{other:.{digits}g}"


def share(fraction: float) -> str:
    """A fraction in per cent; what is not quite all or nothing is not rounded to it."""
    percent = 100 * fraction
    if 0 < percent < 0.1:
        return "< 0.1%"
    if 99.9 < percent < 100:
        return "> 99.9%"
    return f"{percent:.3g}%"


# From this many metres on a length is given in this unit of so many metres.
_LENGTHS = ((1e3, 1e3, "km"), (0.1, 1.0, "m"), (1e-4, 1e-3, "mm"), (0.0, 1e-6, "µm"))


def metre_scale(metres: float) -> tuple[float, str]:
    """Metres in the unit that suits ``metres``, and that unit's name."""
    if not metres > 0 or not math.isfinite(metres):
        return 1.0, "m"
    return next((factor, unit) for least, factor, unit in _LENGTHS if metres >= least)


def distance(metres: float) -> str:
    """A length in the unit that suits it: ``0.42 mm``, ``85 km``."""
    factor, unit = metre_scale(metres)
    return f"{number(metres / factor)} {unit}"


def count_of(count: int, noun: str) -> str:
    """``1 sample``, ``1,024 samples``."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def unit_of(unit: str | None) -> str:
    """What to write for ``unit`` on an axis; empty without one."""
    return "degrees" if unit == DEGREES else name(unit or "")


def names_in(text: str) -> tuple[str, ...]:
    """The names in a text that has commas between them."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def after(unit: str | None) -> str:
    """``unit`` as it follows a number."""
    return f" {unit_of(unit)}" if unit_of(unit) else ""


DEGREES = "degrees latitude, longitude"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose cells are Markdown already."""
    lines = (head, ["---"] * len(head), *rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


_MARKDOWN = str.maketrans({c: f"&#{ord(c)};" for c in "&\\`*{}[]<>|#~$@"})
# Within a word an underscore is only that.
_EMPHASIS = re.compile(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
_ADDRESS = re.compile(r":(?=//)|(?<=www)\.", re.IGNORECASE)


def escape_markdown(text: str) -> str:
    """``text`` as one line of inert Markdown: no table breaks, no HTML, no links, no formulas.

    Renderers make links of bare addresses too, so these lose their colon. What can't be seen, or
    turns the direction of what follows, is shown as its code.
    """
    line = " ".join(text.split()).translate(_MARKDOWN)
    line = "".join(c if c.isprintable() else f"&#92;u{ord(c):04x}" for c in line)
    for pattern in (_EMPHASIS, _ADDRESS):
        line = pattern.sub(lambda found: f"&#{ord(found[0])};", line)
    return line
