"""What ONNX Runtime's graph optimizations do to parity and to the graph."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.ticker import MaxNLocator

from heimdall_onnx.common.text import count_of, name, number
from heimdall_onnx.evidence.parity.optimization_levels import LevelParity, LevelReport
from heimdall_onnx.report.plot.chart import (
    Chart,
    Color,
    log_axis,
    new_figure,
    paired_bars,
    plain,
    styled,
)
from heimdall_onnx.report.plot.outputs import ELEMENT_MARKERS

_OUTPUTS_SHOWN = 4
_OPERATORS_SHOWN = 14
_ALIKE = 2.0


@styled
def optimization_levels(report: LevelReport) -> Chart:
    """Is a difference in the file, or does ONNX Runtime's graph optimization make it?

    The same inputs at each level: an error that is there at "none" was exported; one that comes
    with a level comes from what that level does to the graph.
    """
    title = _answer(report)
    subtitle = (
        f"{name(report.source, 90)} · largest error in units of what is allowed · the graph as "
        "exported (none), simplified (basic), fused as deployed (all)"
    )
    outputs = sorted(report.levels[-1].outputs, key=lambda o: -o.excess)[:_OUTPUTS_SHOWN]
    names = [o.output for o in report.levels[-1].outputs if o in outputs]
    figure = new_figure(title, subtitle, height=1.7)
    axes = figure.subplots()
    rows = np.arange(len(report.levels))
    found = {n: [_excess(level, n) for level in report.levels] for n in names}
    finite = [v for values in found.values() for v in values if 0 < v < math.inf]
    low, high = min([*finite, 1.0]) / 4, max([*finite, 1.0]) * 4
    for index, (output, values) in enumerate(found.items()):
        axes.plot(
            np.clip(values, low, high),
            rows + 0.16 * (index - (len(names) - 1) / 2),
            ELEMENT_MARKERS[index],
            color=Color.ELEMENTS[index],
            ms=8,
            ls="none",
            label=plain(name(output)),
            gid=output,
        )
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


def _excess(level: LevelParity, output: str) -> float:
    return next(o.excess for o in level.outputs if o.output == output)


def _answer(report: LevelReport) -> str:
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


@styled
def operators(report: LevelReport) -> Chart:
    """Which operators run, before and after ONNX Runtime's optimization?

    Counted while the model ran, from ONNX Runtime's own record.
    """
    before, after = report.levels[0], report.levels[-1]
    totals = [sum(level.operators.values()) for level in (before, after)]
    new = [op for op in after.operators if op not in before.operators]
    title = f"{count_of(totals[0], 'node')} run as exported, {totals[1]:,} as deployed" + (
        f"; ONNX Runtime brings {', '.join(new[:4])}" if new else ""
    )
    subtitle = (
        "Nodes that run by operator, without optimization and at the deployment level · session "
        f"creation {number(before.load_ms)} and {number(after.load_ms)} ms"
    )
    names = sorted(
        {*before.operators, *after.operators},
        key=lambda op: -max(before.operators.get(op, 0), after.operators.get(op, 0)),
    )
    shown = names[:_OPERATORS_SHOWN]
    figure = new_figure(title, subtitle, height=0.7 + 0.27 * len(shown))
    axes = figure.subplots()
    pairs = [
        (label, color, [level.operators.get(op, 0) for op in shown])
        for label, color, level in (
            ("as exported (none)", Color.QUIET, before),
            ("as deployed (all)", Color.ONNX, after),
        )
    ]
    paired_bars(axes, shown, pairs, lambda count: f"{count:,}")
    axes.set_xlabel("nodes")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.08)
    axes.legend(loc="lower right")
    if len(names) > len(shown):
        axes.set_xlabel(f"nodes ({len(names) - len(shown)} rarer operators are not drawn)")
    alt = " ".join(
        f"{op}: {before.operators.get(op, 0)} before, {after.operators.get(op, 0)} after."
        for op in names
    )
    return Chart(figure, title, alt)
