"""Parity by kind of input and batch size."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from heimdall_onnx.common.text import name, number
from heimdall_onnx.evidence.parity.report import ADVERSARIAL_FACTOR, ParityCell, ParityReport
from heimdall_onnx.report.plot.chart import Chart, Color, new_figure, no_grid, plain, styled

# Light to dark green within the tolerance, purple beyond it; the number stands in the cell too.
_CLASSES = (
    (0.01, "#E8F5F1"),
    (0.1, "#C3E6DA"),
    (0.5, "#8FD0BA"),
    (1.0, "#4FB393"),
    (10.0, "#E3B5CE"),
    (math.inf, "#C4679E"),
)


@styled
def parity_grid(report: ParityReport) -> Chart:
    """On which kinds of input and batch sizes does parity hold, and with what margin?

    Each cell gives the error of the worst samples in units of what is allowed there: atol +
    rtol·|PyTorch|, on adversarial inputs ten times that. Where elements lie beyond it, the cell is
    framed and counts them.
    """
    kinds = list(dict.fromkeys(cell.kind for cell in report.cells))
    sizes = sorted({cell.batch_size for cell in report.cells})
    title = _grid_answer(report)
    subtitle = (
        f"Largest errors in units of the tolerance, {number(report.tolerance)} + "
        f"{number(report.rtol)}·|PyTorch| (×{ADVERSARIAL_FACTOR:g} on adversarial inputs)"
        f" · framed: elements beyond it, of all · {name(report.source, 60)}"
    )
    figure = new_figure(title, subtitle, height=0.75 + 0.46 * len(kinds))
    axes = figure.subplots()
    no_grid(axes)
    for cell in report.cells:
        _draw_cell(axes, cell, sizes.index(cell.batch_size), kinds.index(cell.kind), report)
    axes.set(xlim=(0, len(sizes)), ylim=(len(kinds), 0), xlabel="samples in a call (batch size)")
    axes.set_xticks(np.arange(len(sizes)) + 0.5, [str(size) for size in sizes])
    axes.set_yticks(np.arange(len(kinds)) + 0.5, [plain(name(kind)) for kind in kinds])
    return Chart(figure, title, _grid_alt(report))


def _cell_excess(cell: ParityCell) -> float:
    return max(output.excess for output in cell.outputs)


def _holds(cell: ParityCell) -> bool:
    return not any(o.violations or o.nonfinite_mismatches for o in cell.outputs)


def _times(excess: float) -> str:
    if math.isinf(excess):
        return "not comparable"
    return "equal" if excess == 0 else f"{number(excess)}×"


def _draw_cell(axes: Axes, cell: ParityCell, x: int, y: int, report: ParityReport) -> None:
    excess, holds = _cell_excess(cell), _holds(cell)
    color = (
        next(c for limit, c in _CLASSES if excess <= limit) if holds or excess > 1 else "#E3B5CE"
    )
    box = Rectangle((x + 0.02, y + 0.04), 0.96, 0.92, facecolor=color, edgecolor="none")
    text = _times(excess)
    if not holds:
        box.set(edgecolor=Color.INK, linewidth=1.6)
        bad = sum(max(o.violations, o.nonfinite_mismatches) for o in cell.outputs)
        text += f"\n{bad:,} of {sum(o.count for o in cell.outputs):,}"
    box.set_gid(f"{cell.kind}/{cell.batch_size}")
    axes.add_patch(box)
    axes.text(
        x + 0.5,
        y + 0.5,
        text,
        ha="center",
        va="center_baseline",
        size=9.5,
        color=Color.INK,
        weight="normal" if holds else "bold",
        gid=f"text {cell.kind}/{cell.batch_size}",
    )


def _grid_answer(report: ParityReport) -> str:
    worst = max(report.cells, key=lambda cell: (not _holds(cell), _cell_excess(cell)))
    excess, failing = _cell_excess(worst), sum(not _holds(c) for c in report.cells)
    where = f"{worst.kind} at batch {worst.batch_size}"
    if failing:
        how = (
            "not comparable (NaN, Inf or shape)"
            if math.isinf(excess)
            else f"{_times(excess)} the tolerance"
        )
        return (
            f"Parity fails on {failing} of {len(report.cells)} combinations of input and batch "
            f"size; worst: {where}, {how}"
        )
    if excess == 0:
        return f"No difference on any of {len(report.cells)} combinations of input and batch size"
    return (
        f"Parity holds on all {len(report.cells)} combinations of input and batch size; the "
        f"largest errors reach {_times(excess)} the tolerance ({where})"
    )


def _grid_alt(report: ParityReport) -> str:
    cells = "; ".join(
        f"{cell.kind}, batch {cell.batch_size}: {_times(_cell_excess(cell))}"
        + ("" if _holds(cell) else ", fails")
        for cell in report.cells
    )
    return f"Largest error in units of the tolerance. {cells}."
