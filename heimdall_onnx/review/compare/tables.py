"""The tables of a comparison of two releases, as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from IPython.display import Markdown

from heimdall_onnx.common.text import count_of, distance, escape_markdown, number, shown, unit_of
from heimdall_onnx.common.verdict import Gate
from heimdall_onnx.evidence.parity.statistics import ErrorStatistics
from heimdall_onnx.report.tables import table, value_text
from heimdall_onnx.review.compare.answers import A, Answers, B
from heimdall_onnx.review.compare.comparison import (
    RecordedParity,
    ReleaseComparison,
    VerifiedRelease,
)
from heimdall_onnx.review.compare.gates import GatePair
from heimdall_onnx.review.compare.pair import Pair, newer_of
from heimdall_onnx.review.reproduce.figures import Difference, Figure

_DIGITS = 3
_LONGEST = 120


def releases_table(pair: Pair) -> Markdown:
    """Which two releases these are, and that they verify."""
    newer = newer_of(*pair.sides)
    return table(
        (
            "release",
            *(f"{one.who}{', the newer' if one is newer else ''}" for one in pair.sides),
        ),
        [(label, a, b) for (label, a), (_, b) in zip(*map(_identity, pair.sides), strict=True)],
    )


def _identity(one: VerifiedRelease) -> Iterator[tuple[str, str]]:
    manifest = one.manifest
    yield "address", manifest.uri
    yield "registered as", f"{manifest.model_name} version {manifest.model_version}"
    yield "verdict when it was released", manifest.said.verdict
    yield "released", manifest.said.created.isoformat()
    yield "model, SHA-256", manifest.model.sha256
    yield "size of the model", f"{manifest.model.size / 1e6:,.2f} MB"
    yield "recommended variant", f"{manifest.recommended}; here fp32 is compared"
    yield "signed", "yes" if manifest.said.signature else "no"
    yield "verified", f"all {count_of(one.checks, 'check')} hold"


def changes_table(answers: Answers) -> Markdown:
    """How far B's outputs lie from A's, in their own units and on the ground."""
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
        (
            f"B beside A, {count_of(answers.samples, 'sample')}",
            *map(_called, answers.outputs),
        ),
        [(label, *(value_text(o, what) for o in answers.outputs)) for label, what in labels],
    )
    lines = [found.data]
    if (moved := answers.displacement) is not None:
        lines.append(
            f"Positions move on the ground by {distance(moved.p50_m)} (median), "
            f"{distance(moved.p99_m)} (p99) and {distance(moved.max_m)} (largest)."
        )
    lines += [f"{escape_markdown(text)}, and not compared." for text in answers.alone]
    return Markdown("\n\n".join(lines))


def _called(one: ErrorStatistics | RecordedParity) -> str:
    return f"{one.output} ({unit_of(one.unit) or 'no unit'})"


def parity_table(parity: Sequence[RecordedParity]) -> Markdown:
    """How far each ONNX model is from its own PyTorch model, as the two reports record it."""
    figures = {"mean": "mean", "p50": "median", "p99": "p99", "p999": "p99.9", "maximum": "maximum"}
    return table(
        ("error of", "release", *figures.values()),
        [
            (_called(one), who, *(value_text(side, what) for what in figures))
            for one in parity
            for who, side in ((A, one.a), (B, one.b))
            if side is not None
        ],
    )


def gates_table(comparison: ReleaseComparison) -> Markdown:
    """The gates of both side by side, those that change first."""
    rows = sorted(comparison.gates, key=lambda gate: (not gate.worse, not gate.change))
    return table(
        ("gate", "changes", "A", "B", "limit"),
        [
            (
                gate.name,
                Markdown(f"**{gate.change}**" if gate.change else "no"),
                _measured(gate.a),
                _measured(gate.b),
                _limits(gate),
            )
            for gate in rows
        ],
    )


def _measured(gate: Gate | None) -> str:
    if gate is None:
        return "no such gate"
    value = gate.measured
    text = number(value, _DIGITS) if isinstance(value, float) else shown(value)
    return f"{text}, {'pass' if gate.passed else 'FAIL'}"


def _limits(gate: GatePair) -> str:
    limits = [side.limit for side in (gate.a, gate.b) if side is not None]
    return limits[0] if len(set(limits)) == 1 else f"A: {limits[0]}; B: {limits[1]}"


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
    lines = [f"**{escape_markdown(comparison.sentence)}.**"]
    if comparison.worse:
        lines += ["In what B is worse than a promotion allows:"]
        lines.append("\n".join(f"- {escape_markdown(reason)}" for reason in comparison.worse))
    else:
        lines.append(
            "B is in nothing that was judged worse than a promotion allows: "
            f"{comparison.limits.in_words}."
        )
    if missing := comparison.not_judged:
        lines.append(f"Not judged: {escape_markdown('; '.join(missing))}.")
    return Markdown("\n\n".join(lines))
