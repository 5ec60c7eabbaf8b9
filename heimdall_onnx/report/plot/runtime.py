"""For how long which operators run, and what ONNX Runtime's optimizations do to the answers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from heimdall_onnx.common.text import count_of, name, number, share
from heimdall_onnx.common.verdict import unless_not_measured
from heimdall_onnx.evidence.parity.optimization_levels import LevelParity, LevelReport
from heimdall_onnx.evidence.variants.operators import OperatorTimes
from heimdall_onnx.report.plot.chart import (
    Chart,
    Color,
    draw_bars,
    log_axis,
    new_figure,
    plain,
    styled,
)
from heimdall_onnx.report.plot.outputs import draw_points

_OUTPUTS_SHOWN = 4
_ALIKE = 2.0


@styled
def optimization_levels(report: LevelReport) -> Chart:
    """Is a difference in the file, or does ONNX Runtime's graph optimization make it?

    The same inputs at each level: an error that is there at "none" was exported; one that comes
    with a level comes from what that level does to the graph.
    """
    title = _levels_answer(report)
    brought = sorted(report.levels[-1].operators - report.levels[0].operators)
    subtitle = (
        f"{name(report.source, 90)} · largest error in units of what is allowed · the graph as "
        "exported (none), simplified (basic), fused as deployed (all)"
        + (f", which brings {', '.join(brought)}" if brought else "")
    )
    outputs = sorted(report.levels[-1].outputs, key=lambda o: -o.excess)[:_OUTPUTS_SHOWN]
    names = [o.output for o in report.levels[-1].outputs if o in outputs]
    figure = new_figure(title, subtitle, height=1.7)
    axes = figure.subplots()
    rows = np.arange(len(report.levels))
    excess = [{o.output: o.excess for o in level.outputs} for level in report.levels]
    found = {n: [level[n] for level in excess] for n in names}
    finite = [v for values in found.values() for v in values if 0 < v < math.inf]
    low, high = min([*finite, 1.0]) / 4, max([*finite, 1.0]) * 4
    for index, (output, values) in enumerate(found.items()):
        heights = rows + 0.16 * (index - (len(names) - 1) / 2)
        shown = np.clip(values, low, high)
        draw_points(axes, shown, heights, index, plain(name(output)), output, ms=8)
    axes.axvline(1.0, color=Color.INK, ls="--", lw=1.2, label="tolerance", gid="tolerance")
    axes.set(xscale="log", xlim=(low, high), ylim=(len(rows) - 0.5, -0.5))
    log_axis(axes.xaxis)
    axes.set_yticks(rows, [level.level for level in report.levels])
    axes.set_xlabel("largest error / what is allowed")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    alt = " ".join(
        f"{level.level}: "
        + ", ".join(f"{o.output} {number(o.excess)}×" for o in level.outputs)
        + (" within tolerance." if level.holds else " beyond tolerance.")
        for level in report.levels
    )
    return Chart(figure, title, alt)


def _levels_answer(report: LevelReport) -> str:
    first, last = report.levels[0], report.levels[-1]
    failing = [level for level in report.levels if not level.holds]
    if not first.holds:
        healed = "" if len(failing) == len(report.levels) else ", though not at every level"
        return (
            f"The fault is in the exported file: without any optimization the error is already "
            f"{_times(first)} the tolerance{healed}"
        )
    if failing:
        return (
            f"The fault comes with ONNX Runtime's level “{failing[0].level}”: {_times(failing[0])} "
            f"the tolerance there, {_times(first)} without optimization"
        )
    if last.excess > _ALIKE * first.excess and first.excess > 0:
        return (
            f"Parity holds at every level; optimization takes the largest error from "
            f"{_times(first)} to {_times(last)} the tolerance"
        )
    worst = max(report.levels, key=lambda level: level.excess)
    return (
        f"Parity holds at every optimization level, with errors up to {_times(worst)} the tolerance"
    )


def _times(level: LevelParity) -> str:
    return f"{number(level.excess)}×" if math.isfinite(level.excess) else "incomparably beyond"


_TIMES_SHOWN = 9
_BETWEEN = "between nodes"
# What ONNX Runtime calls an operator that it has quantized or fused with its neighbours:
# QLinearConv, QGemm, MatMulIntegerToFloat, DynamicQuantizeMatMul, MatMulNBits, NhwcFusedConv.
_BEFORE = re.compile(r"^(Nhwc|Fused|Bias|QLinear|Q(?=[A-Z])|DynamicQuantize(?!Linear))+")
_BEHIND = re.compile(r"(?<=[a-z])(Integer|ToFloat|NBits)+$")


@unless_not_measured
@styled
def operator_times(measured: Sequence[tuple[str, OperatorTimes]] | None) -> Chart | None:
    """Which operators take the time of a call, and what does the other variant do about it?

    Args:
        measured: Name and times of one variant, or of two to be held against each other. More
            than the first two are not drawn; None comes of none.
    """
    if not measured:
        return None
    shown = [(name(label), times) for label, times in measured[:2]]
    title = "; ".join(_times_answer(label, times) for label, times in shown)
    first = shown[0][1]
    slowest = [(label, t.slowest[0]) for label, t in shown if t.slowest]
    subtitle = (
        f"ONNX Runtime's profiler, medians of {count_of(first.calls, 'call')} each · slowest node: "
        + "; ".join(
            f"{label} {name(node.name)} ({node.operator}), {number(node.ms)} ms"
            for label, node in slowest
        )
    )
    rows, values = _time_rows([times for _, times in shown])
    figure = new_figure(
        title, subtitle, height=0.8 + (0.36 if len(shown) > 1 else 0.25) * len(rows)
    )
    axes = figure.subplots()
    sides = [
        (plain(f"{label}, {number(times.total_ms)} ms"), color, ms)
        for (label, times), color, ms in zip(shown, (Color.QUIET, Color.ONNX), values, strict=False)
    ]
    draw_bars(axes, rows, sides, lambda ms: number(ms) if ms else "–")
    if len(shown) > 1:
        axes.legend(loc="lower right")
    axes.margins(x=0.1)
    axes.set_xlabel("milliseconds a call")
    alt = " ".join(
        f"{label}: {number(times.total_ms, 3)} ms a call; "
        + ", ".join(f"{row} {number(ms, 3)} ms" for row, ms in zip(rows, side, strict=True) if ms)
        + "."
        for (label, times), side in zip(shown, values, strict=True)
    )
    return Chart(figure, title, alt)


def _times_answer(label: str, times: OperatorTimes) -> str:
    head = f"{label}: {number(times.total_ms)} ms a call"
    if not times.operators:
        return head
    most = times.operators[0]
    return f"{head}, {share(most.share)} of it in {count_of(most.nodes, f'{most.name} node')}"


def _time_rows(sides: Sequence[OperatorTimes]) -> tuple[list[str], list[list[float]]]:
    """Names of the bars, and their milliseconds on each side.

    Operators that compute the same share a row, float beside quantized; the short ones share the
    last but one.
    """
    groups: dict[str, dict[str, None]] = {}
    for operator in (operator.name for side in sides for operator in side.operators):
        kind = _BEHIND.sub("", _BEFORE.sub("", operator))
        groups.setdefault(kind, {})[operator] = None
    times = {
        kind: [sum(o.ms for o in side.operators if o.name in members) for side in sides]
        for kind, members in groups.items()
    }
    order = sorted(groups, key=lambda kind: -max(times[kind]))
    kept, rest = order[:_TIMES_SHOWN], order[_TIMES_SHOWN:]
    found = [(plain(name(", ".join(groups[kind]), 40)), times[kind]) for kind in kept]
    if rest:
        others = [sum(times[kind][side] for kind in rest) for side in range(len(sides))]
        found.append((count_of(sum(len(groups[kind]) for kind in rest), "other operator"), others))
    found.append((_BETWEEN, [side.between_ms for side in sides]))
    return [row for row, _ in found], [
        list(side) for side in zip(*(ms for _, ms in found), strict=True)
    ]
