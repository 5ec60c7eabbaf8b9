"""Error against the magnitude of what it is an error of."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes

from heimdall_onnx.common.arrays import Floats
from heimdall_onnx.common.text import after, name, number
from heimdall_onnx.evidence.parity.report import ParityReport
from heimdall_onnx.report.plot.chart import Chart, Color, log_axis, new_figure, plain, say, styled
from heimdall_onnx.report.plot.outputs import (
    ELEMENT_MARKERS,
    OutputColumn,
    describe_source,
    worst_columns,
)

_ELEMENTS_SHOWN = 3000  # of one output
_FEWEST = 16  # elements below which quarters say nothing
_GROWS = 3.0


@styled
def error_by_magnitude(report: ParityReport) -> Chart:
    """Does the error grow with the value, as rounding does, or is it the same everywhere?

    Each point is an element of an output on the evaluation data, with the tolerance, atol +
    rtol·|PyTorch|, and one unit in the last place (ULP). Equal elements lie on the lowest line.
    """
    columns = worst_columns(report)
    answers = [_course(column) for column in columns]
    worst = max(range(len(columns)), key=lambda i: columns[i].excess)
    title = answers[worst] + (f" ({name(columns[worst].spec.name)})" if len(columns) > 1 else "")
    subtitle = f"{describe_source(report, columns)} · equal elements lie on the lowest line"
    figure = new_figure(title, subtitle, height=3.1)
    panels = figure.subplots(1, len(columns), squeeze=False)[0]
    for axes, column in zip(panels, columns, strict=True):
        _draw(axes, column, report)
    panels[0].set_ylabel("absolute difference")
    alt = " ".join(f"{c.spec.name}: {answer}." for c, answer in zip(columns, answers, strict=True))
    return Chart(figure, title, alt)


def _pairs(column: OutputColumn) -> tuple[Floats, Floats]:
    """Magnitude and error, (samples, elements), NaN where one side is not finite."""
    with np.errstate(invalid="ignore"):
        return np.abs(column.reference), np.abs(column.reference - column.value)


def _course(column: OutputColumn) -> str:
    magnitude, error = (array.ravel() for array in _pairs(column))
    known = np.isfinite(magnitude) & np.isfinite(error)
    magnitude, error = magnitude[known], error[known]
    if not error.size or not error.any():
        return "No error at any magnitude" if error.size else "Nothing to compare"
    if error.size < _FEWEST:
        return f"{error.size} elements are too few to tell how the error goes with the magnitude"
    order = np.argsort(magnitude, kind="stable")
    quarter = len(order) // 4
    small, large = (
        float(np.mean(error[rows])) for rows in (order[:quarter], order[len(order) - quarter :])
    )
    figures = (
        f"mean {number(small)}{after(column.spec.unit)} in the quarter of the smallest values, "
        f"{number(large)} in that of the largest"
    )
    if small == large == 0:
        return f"Errors are in the values between: {figures}"
    if large > _GROWS * small:
        return f"The error grows with the magnitude: {figures}"
    if small > _GROWS * large:
        return f"Small values have the larger errors: {figures}"
    return f"The error does not grow with the magnitude: {figures}"


def _draw(axes: Axes, column: OutputColumn, report: ParityReport) -> None:
    axes.set_title(plain(name(column.spec.name)))
    magnitude, error = _pairs(column)
    known = np.isfinite(magnitude) & np.isfinite(error)
    if not known.any():
        say(axes, column.shapes or "no finite element on both sides")
        return
    low, high = _span(magnitude[known])
    dtype = np.dtype(column.spec.dtype)
    floating = np.issubdtype(dtype, np.floating)
    high = min(high, float(np.finfo(dtype).max) / 2) if floating else high
    xs = np.geomspace(low, high, 200)
    allowed = report.tolerance + report.rtol * xs
    lines = [("tolerance", allowed, Color.INK, "--")]
    if floating:  # integers have no rounding
        lines.append(("1 ULP", np.spacing(xs.astype(dtype)).astype(np.float64), Color.QUIET, ":"))
    lowest = [float(y[y > 0].min(initial=1.0)) for y in (error[known], *(y for _, y, *_ in lines))]
    floor = min(lowest) / 3
    series = (
        [(known[:, i], magnitude[:, i], error[:, i]) for i in range(len(column.elements))]
        if column.elements
        else [(known, magnitude, error)]
    )
    for index, (some, x, y) in enumerate(series):
        kept = _chosen(y[some], _ELEMENTS_SHOWN // len(series))
        label = column.elements[index] if column.elements else ""
        _points(axes, x[some][kept], y[some][kept], (low, floor), index, label)
    for label, values, color, style in lines:
        axes.plot(xs, values, color=color, ls=style, lw=1.2, label=label, gid=label)
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    log_axis(axes.xaxis)
    log_axis(axes.yaxis)
    axes.set_ylim(bottom=floor / 1.5, top=3 * max(float(allowed.max()), float(error[known].max())))
    axes.set_xlabel(column.label("|PyTorch|"))
    axes.legend(handlelength=1.4, frameon=True)


def _points(
    axes: Axes,
    magnitude: Floats,
    error: Floats,
    least: tuple[float, float],
    element: int,
    label: str,
) -> None:
    axes.plot(
        np.maximum(magnitude, least[0]),
        np.maximum(error, least[1]),
        ELEMENT_MARKERS[element],
        color=Color.ELEMENTS[element] if label else Color.INK,
        ms=4,
        alpha=0.5,
        mew=0,
        ls="none",
        label=label or None,
        gid=f"elements {element}",
    )


def _span(magnitude: Floats) -> tuple[float, float]:
    some = magnitude[magnitude > 0]
    if not some.size:
        return 0.1, 10.0
    # A value next to zero must not stretch the axis over all that others have in common.
    low = max(float(some.min()), float(np.percentile(some, 1)) / 100)
    return low / 1.5, max(float(some.max()), low) * 1.5


def _chosen(error: Floats, count: int) -> npt.NDArray[np.intp]:
    """The elements drawn: all, or of many the worst half and an even choice of the rest."""
    if error.size <= count:
        return np.arange(error.size)
    worst = np.argsort(-error, kind="stable")[: count // 2]
    even = np.linspace(0, error.size - 1, math.ceil(count / 2)).astype(int)
    return np.union1d(worst, even)
