"""How names, numbers, units, shares, lengths and counts are written for readers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from heimdall_onnx.signature import DEGREES


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


def after(unit: str | None) -> str:
    """``unit`` as it follows a number."""
    return f" {unit_of(unit)}" if unit_of(unit) else ""


def unsteady(contenders: Sequence[Mapping[str, Any]]) -> str:
    """What must be said beside recorded latencies of a machine that was not steady, else empty."""
    # Blocks next to each other share what lasts, and not what comes and goes.
    if all(one["stationarity"] is None or one["stationarity"]["holds"] for one in contenders):
        return ""
    return "the machine was not steady meanwhile, so measure again before you rely on it"
