"""The outputs of both models against each other, element by element."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from heimdall_onnx.common.arrays import Floats
from heimdall_onnx.common.text import name, number
from heimdall_onnx.evidence.parity.report import ParityReport
from heimdall_onnx.report.plot.chart import Chart, Color, new_figure, plain, say, styled
from heimdall_onnx.report.plot.outputs import (
    ELEMENT_MARKERS,
    OutputColumn,
    describe_errors,
    describe_source,
    parity_answer,
    worst_columns,
)

_ELEMENTS_SHOWN = 2000  # of one output
_TICKS = FuncFormatter(lambda value, _: number(value).replace("-", "−", 1))


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
            above.set_ylabel(column.label("ONNX"))
            below.set_ylabel(column.label("ONNX − PyTorch"))
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
    chosen = _chosen(x, y)
    elements = np.tile(np.arange(column.reference.shape[1]), column.reference.shape[0])[chosen]
    x, y = x[chosen], y[chosen]
    finite = np.isfinite(x) & np.isfinite(y)
    low, high = _limits(np.concatenate([x, y]), report.tolerance)
    above.plot([low, high], [low, high], color=Color.QUIET, lw=1, zorder=1, gid="identity")
    above.set(xlim=(low, high), ylim=(low, high))
    below.set(xlim=(low, high), xlabel=column.label("PyTorch"))
    allowed = report.tolerance + report.rtol * np.abs(x)
    residual = np.subtract(y, x, where=finite, out=np.zeros_like(x))
    _scatter(column, above, elements[finite], x[finite], y[finite], named=True)
    _scatter(column, below, elements[finite], x[finite], residual[finite], named=False)
    beyond = finite & (np.abs(residual) > allowed)
    for axes, height in ((above, y), (below, residual)):
        if beyond.any():
            axes.plot(
                x[beyond],
                height[beyond],
                "x",
                color=Color.INK,
                ms=6,
                mew=1.2,
                gid="beyond",
                label="beyond tolerance",
            )
    _draw_tolerance(below, residual[finite], low, high, report)
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


def _chosen(x: Floats, y: Floats) -> npt.NDArray[np.intp]:
    """Indices to draw: evenly spaced, and the largest differences whatever their place."""
    if x.size <= _ELEMENTS_SHOWN:
        return np.arange(x.size)
    with np.errstate(invalid="ignore"):
        error = np.nan_to_num(np.abs(y - x), nan=np.inf)
    even = np.linspace(0, x.size - 1, _ELEMENTS_SHOWN // 2).astype(np.intp)
    return np.union1d(even, np.argsort(error)[-_ELEMENTS_SHOWN // 2 :])


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
    axes: Axes, residual: Floats, low: float, high: float, report: ParityReport
) -> None:
    """Both limits as lines, on a scale that shows the differences as well as the limits."""
    xs = np.linspace(low, high, 101)
    limit = report.tolerance + report.rtol * np.abs(xs)
    for sign in (1, -1):
        axes.plot(xs, sign * limit, "--", color=Color.INK, lw=1.2, gid="tolerance")
    axes.axhline(0, color=Color.QUIET, lw=1, zorder=1)
    largest, top = float(np.abs(residual).max(initial=0.0)), 1.3 * float(limit.max())
    if largest == 0 or 0.2 * limit.max() < largest < 10 * report.tolerance:
        top = max(top, 1.15 * largest)
        axes.yaxis.set_major_locator(MaxNLocator(5))
    else:
        top = _use_symmetric_log(axes, residual, top)
    axes.set_ylim(-top, top)
    axes.yaxis.set_major_formatter(_TICKS)
    axes.yaxis.set_minor_locator(NullLocator())


def _use_symmetric_log(axes: Axes, residual: Floats, top: float) -> float:
    """Scale the y axis logarithmically outside the bulk of ``residual``; return its top."""
    sizes = np.abs(residual)
    top = max(top, 3 * float(sizes.max()))
    last = math.floor(math.log10(top))
    bulk = math.floor(math.log10(np.median(sizes[sizes > 0])))
    start = max(min(bulk, last - 1), last - 12)
    step = 1 + (last - start) // 4
    powers = [10.0**p for p in range(last, start - 1, -step)]
    axes.set_yscale("symlog", linthresh=powers[-1], linscale=step)
    axes.yaxis.set_major_locator(FixedLocator([-p for p in powers] + [0.0] + powers))
    return top


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
