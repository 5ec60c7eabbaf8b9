"""How good the answers are, where the truth is known."""

from __future__ import annotations

import math

from matplotlib.axes import Axes

from heimdall_onnx.common.text import count_of, distance, metre_scale, name, number
from heimdall_onnx.evidence.parity.ground import MIDDLE, GroundReport, TaskError
from heimdall_onnx.evidence.parity.report import ParityReport
from heimdall_onnx.report.plot.chart import Chart, Color, new_figure, note, styled
from heimdall_onnx.report.plot.positions import coordinates

_CONTENDERS = {
    "PyTorch": (Color.PYTORCH, "o"),
    "ONNX": (Color.ONNX, "X"),
    MIDDLE: (Color.QUIET, "s"),
}


@styled
def task_error(report: ParityReport) -> Chart | None:
    """How far are the answers from the truth, and does the model beat a constant answer?

    Median and 95th percentile of the distance to the true positions, for both models and for
    always answering the middle. None without labels.
    """
    ground = report.ground
    if ground is None or not ground.task:
        return None
    title = _task_answer(report)
    assert ground.middle is not None
    subtitle = (
        f"{name(report.source, 60)}, {count_of(report.samples, 'labelled sample')} · "
        f"the middle: {coordinates(ground.middle)}"
    )
    figure = new_figure(title, subtitle, height=1.9)
    axes = figure.subplots()
    shown = [t for t in ground.task if t.who != MIDDLE or _varied(ground)]
    finite = [v for t in shown for v in (t.median_m, t.p95_m) if math.isfinite(v)]
    factor, unit = metre_scale(max(finite, default=0.0))
    for row, task in enumerate(shown):
        _draw_task(axes, row, task, factor)
    axes.set_yticks(range(len(shown)), [task.who for task in shown])
    axes.set(
        xlim=(0, 1.4 * max(finite, default=0.0) / factor or 1.0),
        ylim=(len(shown) - 0.5, -0.5),
        xlabel=f"distance to the true position ({unit})",
    )
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    alt = " ".join(
        f"{t.who}: median {distance(t.median_m)}, 95th percentile {distance(t.p95_m)}."
        for t in shown
    )
    return Chart(figure, title, alt)


def _draw_task(axes: Axes, row: int, task: TaskError, factor: float) -> None:
    color, marker = _CONTENDERS[task.who]
    median, p95 = task.median_m / factor, task.p95_m / factor
    axes.plot([median, p95], [row, row], color=color, lw=1.6, zorder=2)
    for value, filled, label in ((median, True, "median"), (p95, False, "95%")):
        inside, gid = color if filled else "white", f"{task.who} {label}"
        axes.plot(value, row, marker, color=color, ms=9, mew=1.6, mfc=inside, gid=gid, zorder=3)
    known = math.isfinite(median)
    text = f"median {number(median)}, 95% {number(p95)}" if known else "no finite position"
    note(axes, text, (p95 if known else 0.0, row), (10, 0), va="center_baseline")


def _varied(ground: GroundReport) -> bool:
    """Whether always answering the middle could be wrong; with one transmitter it is not."""
    return any(t.who == MIDDLE and t.p95_m >= 1.0 for t in ground.task)


def _task_answer(report: ParityReport) -> str:
    ground = report.ground
    assert ground is not None
    task = {t.who: t.median_m for t in ground.task}
    onnx, middle = task["ONNX"], task[MIDDLE]
    if not math.isfinite(onnx):
        return "The ONNX model gives no finite position: its error is unknown"
    moved = f"ONNX and PyTorch agree to {distance(ground.displacement_max_m)}"
    if not math.isfinite(ground.displacement_max_m):
        moved = "some positions are not finite"
    if not _varied(ground):
        return f"Median error {distance(onnx)} to the one true position there is; {moved}"
    ratio = onnx / middle
    verb = f"{number(ratio)}× that of" if ratio < 1 else "no better than"
    return (
        f"Median error {distance(onnx)}, {verb} always answering the middle "
        f"({distance(middle)}); {moved}"
    )
