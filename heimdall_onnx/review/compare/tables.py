"""The tables of a comparison of two releases, as Markdown."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from IPython.display import Markdown

from heimdall_onnx.common.templates import inert_macros
from heimdall_onnx.common.text import count_of, shown, unit_of
from heimdall_onnx.evidence.parity.statistics import ErrorStatistics
from heimdall_onnx.report.tables import table, value_text
from heimdall_onnx.review.compare.answers import Answers
from heimdall_onnx.review.compare.comparison import ReleaseComparison
from heimdall_onnx.review.compare.pair import Pair, newer_of
from heimdall_onnx.review.compare.words import loss_words
from heimdall_onnx.review.reproduce.figures import Difference, Figure

_LONGEST = 120


@functools.cache
def _macros() -> Any:
    return inert_macros(Path(__file__).with_suffix(".md.j2"), {"loss": loss_words})


def releases_table(pair: Pair) -> Markdown:
    """Which two releases these are, and that they verify."""
    return Markdown(_macros().releases(*pair.sides, newer_of(*pair.sides)).strip())


def changes_table(answers: Answers) -> Markdown:
    """How far B's outputs lie from A's, in their own units and on the ground, and in their task."""
    labels = (
        ("elements", "count"),
        ("of these different", "violations"),
        ("mean absolute difference", "mean"),
        ("median", "p50"),
        ("p99", "p99"),
        ("maximum", "maximum"),
        ("NaN or Inf on one side", "nonfinite_mismatches"),
    )
    found = table(
        (f"B beside A, {count_of(answers.samples, 'sample')}", *map(_called, answers.outputs)),
        [(label, *(value_text(o, what) for o in answers.outputs)) for label, what in labels],
    )
    return Markdown(f"{found.data}\n\n{_macros().besides(answers)}".strip())


def _called(one: ErrorStatistics) -> str:
    return f"{one.output} ({unit_of(one.unit) or 'no unit'})"


def gates_table(comparison: ReleaseComparison) -> Markdown:
    """The gates of both side by side, those that change first."""
    rows = sorted(comparison.gates, key=lambda gate: (not gate.worse, not gate.change))
    return Markdown(_macros().gates(rows).strip())


def parameters_table(comparison: ReleaseComparison) -> Markdown:
    """What the two releases were made of and with, as far as it differs."""
    return _differences(comparison.parameters, "parameter", "Parameters, checkpoint and data")


def environment_table(comparison: ReleaseComparison) -> Markdown:
    """Where the two releases were made, as far as that differs."""
    return _differences(comparison.environment, "environment", "The environments")


def _differences(found: Sequence[Difference], head: str, what: str) -> Markdown:
    if not found:
        return Markdown(f"{what} are the same.")
    return table(
        (head, "A", "B"),
        [(shown(one.what), *_values(one)) for one in found],
    )


def _values(one: Difference) -> tuple[str, str]:
    a, b = _value(one.recorded), _value(one.found)
    if a != b:
        return a, b
    # They differ further on than is shown.
    whole = str(one.recorded), str(one.found)
    differing = (place for place, (m, n) in enumerate(zip(*whole, strict=False)) if m != n)
    start = max(0, next(differing, min(map(len, whole))) - _LONGEST // 4)
    a, b = (("…" if start else "") + shown(text[start:], _LONGEST) for text in whole)
    return a, b


def _value(value: Figure) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else shown(value, _LONGEST) or "empty"


def conclusion(comparison: ReleaseComparison) -> Markdown:
    """The comparison in one sentence, and in what B is worse beyond the limits."""
    return Markdown(_macros().conclusion(comparison).strip())
