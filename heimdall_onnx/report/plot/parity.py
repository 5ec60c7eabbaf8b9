"""Parity element by element, and by kind of input and batch size."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import AsinhLocator, FuncFormatter, MaxNLocator, NullLocator

from heimdall_onnx.common.arrays import Floats
from heimdall_onnx.common.text import name, number
from heimdall_onnx.evidence.parity.report import ParityCell, ParityReport
from heimdall_onnx.evidence.parity.statistics import ErrorStatistics, element_errors
from heimdall_onnx.evidence.parity.tolerance import ADVERSARIAL_FACTOR, Limit
from heimdall_onnx.report.plot.chart import (
    Chart,
    Color,
    labelled,
    new_figure,
    no_grid,
    plain,
    say,
    styled,
)
from heimdall_onnx.report.plot.outputs import (
    ELEMENT_MARKERS,
    OutputColumn,
    describe_errors,
    describe_source,
    parity_answer,
    worst_and_some,
    worst_columns,
)

_ELEMENTS_SHOWN = 2000  # of one output
_TICKS = FuncFormatter(lambda value, _: ("−" if value < 0 else "") + number(abs(value)))


@styled
def parity_scatter(report: ParityReport) -> Chart:
    """Does every element of the ONNX model's outputs agree with PyTorch's, and if not, where?

    Above, both models' values with the identity line; below, their difference with the
    tolerance, atol + rtol·|PyTorch|. At most four outputs, the worst, and some thousand elements
    of each, always the worst among them; the title counts them all.
    """
    columns = worst_columns(report)
    title = parity_answer(report, columns)
    subtitle = (
        f"{describe_source(report, columns)} · tolerance {number(report.tolerance)} + "
        f"{number(report.rtol)}·|PyTorch|"
    )
    if max(column.reference.size for column in columns) > _ELEMENTS_SHOWN:
        subtitle += (
            f" · at most {_ELEMENTS_SHOWN:,} elements of an output drawn, half of them the worst"
        )
    single = len(columns) == 1
    figure = new_figure(title, subtitle, height=3.6 if single else 5.2 if len(columns) < 3 else 4.6)
    if single:
        panels = figure.subplots(1, 2, squeeze=False).T
    else:
        panels = figure.subplots(2, len(columns), squeeze=False, height_ratios=[1.5, 1])
    for index, (column, (above, below)) in enumerate(zip(columns, panels.T, strict=True)):
        _draw_parity(column, above, below, report)
        if index == 0 or single:
            above.set_ylabel(labelled("ONNX", column.spec.unit))
            below.set_ylabel(labelled("ONNX − PyTorch", column.spec.unit))
        if index == 0 or column.elements != columns[0].elements:
            _show_legend(above, "upper left")
        if "missing" in (line.get_gid() for line in below.lines):
            _show_legend(below, "lower left")
    return Chart(figure, title, describe_errors(report))


def _draw_parity(column: OutputColumn, above: Axes, below: Axes, report: ParityReport) -> None:
    above.set_title(plain(name(column.spec.name)))
    if column.shapes:
        say(above, column.shapes.replace("), ", "),\n"))
        say(below, "no differences to show")
        return
    x, y = column.reference.ravel(), column.value.ravel()
    error, _, _ = element_errors(x, y, Limit(1.0, 0.0))
    chosen = worst_and_some(error, _ELEMENTS_SHOWN)
    elements = np.tile(np.arange(column.reference.shape[1]), column.reference.shape[0])[chosen]
    x, y = x[chosen], y[chosen]
    finite = np.isfinite(x) & np.isfinite(y)
    low, high = _limits(np.concatenate([x, y]), column.statistics.atol)
    above.plot([low, high], [low, high], color=Color.QUIET, lw=1, zorder=1, gid="identity")
    above.set(xlim=(low, high), ylim=(low, high))
    below.set(xlim=(low, high), xlabel=labelled("PyTorch", column.spec.unit))
    allowed = column.statistics.atol + column.statistics.rtol * np.abs(x)
    residual = np.subtract(y, x, where=finite, out=np.zeros_like(x))
    _scatter(column, above, elements[finite], x[finite], y[finite], named=True)
    _scatter(column, below, elements[finite], x[finite], residual[finite], named=False)
    beyond = finite & (np.abs(residual) > allowed)
    for axes, height in ((above, y), (below, residual)):
        if beyond.any():
            at, label = (x[beyond], height[beyond]), "beyond tolerance"
            axes.plot(*at, "x", color=Color.INK, mew=1.2, label=label, gid="beyond")
    _draw_tolerance(below, residual[finite], low, high, column.statistics)
    _draw_missing(below, x, y)
    for axis in (above.xaxis, above.yaxis, below.xaxis):
        axis.set_major_locator(MaxNLocator(4))


def _show_legend(axes: Axes, place: Literal["upper left", "lower left"]) -> None:
    if not axes.get_legend_handles_labels()[0]:
        return
    legend = axes.legend(loc=place, handletextpad=0.1, borderaxespad=0.2, frameon=True)
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1)


def _limits(values: Floats, tolerance: float) -> tuple[float, float]:
    """Limits of both axes of the upper panel, from every finite value of either model."""
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return -1.0, 1.0
    low, high = finite.min(), finite.max()
    pad = 0.06 * (high - low) or max(0.05 * abs(high), 10 * tolerance)
    return float(low - pad), float(high + pad)


def _scatter(
    column: OutputColumn,
    axes: Axes,
    elements: npt.NDArray[np.intp],
    x: Floats,
    y: Floats,
    *,
    named: bool,
) -> None:
    few = x.size < 400
    for index, element in enumerate(column.elements or [""]):
        mine = elements == index if column.elements else np.full(x.shape, True)
        axes.scatter(
            x[mine],
            y[mine],
            s=26 if few else 12,
            marker=ELEMENT_MARKERS[index],
            color=Color.ELEMENTS[index],
            alpha=0.75 if few else 0.4,
            linewidths=0,
            label=element if named else None,
            gid=element or "elements",
        )


def _draw_tolerance(
    axes: Axes, residual: Floats, low: float, high: float, found: ErrorStatistics
) -> None:
    """Both limits as lines, on a scale that shows the differences as well as the limits."""
    xs = np.linspace(low, high, 101)
    limit = found.atol + found.rtol * np.abs(xs)
    for sign in (1, -1):
        axes.plot(xs, sign * limit, "--", color=Color.INK, lw=1.2, gid="tolerance")
    axes.axhline(0, color=Color.QUIET, lw=1, zorder=1)
    sizes = np.abs(residual)
    largest = float(max(sizes.max(initial=0.0), limit.max()))
    if sizes.any():
        # Linear up to the bulk of the differences, logarithmic beyond.
        width = max(float(np.median(sizes[sizes > 0])), 1e-12 * largest)
        axes.set_yscale("asinh", linear_width=width)
        axes.yaxis.set_major_locator(AsinhLocator(width, numticks=5))
    axes.set_ylim(-1.5 * largest, 1.5 * largest)
    axes.yaxis.set_major_formatter(_TICKS)
    axes.yaxis.set_minor_locator(NullLocator())


def _draw_missing(axes: Axes, x: Floats, y: Floats) -> None:
    """A row of crosses at the top where only one of the models gives a number."""
    one_sided = np.isfinite(x) != np.isfinite(y)
    if not one_sided.any():
        return
    known = np.where(np.isfinite(x), x, y)[one_sided]
    axes.plot(
        known,
        np.full(known.shape, 0.93),
        "X",
        color=Color.INK,
        ms=6,
        gid="missing",
        transform=axes.get_xaxis_transform(),
        label="NaN or Inf in one model",
    )


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
