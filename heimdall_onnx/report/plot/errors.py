"""How large errors are: by the magnitude of their values, and sample by sample."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from heimdall_onnx.common.arrays import Floats
from heimdall_onnx.common.text import after, name, number
from heimdall_onnx.evidence.parity.report import ParityReport
from heimdall_onnx.evidence.parity.statistics import worst_elements
from heimdall_onnx.report.plot.chart import (
    Chart,
    Color,
    labelled,
    log_axis,
    new_figure,
    note,
    plain,
    say,
    styled,
)
from heimdall_onnx.report.plot.outputs import (
    OutputColumn,
    describe_source,
    draw_points,
    worst_and_some,
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
    worst = max(range(len(columns)), key=lambda i: columns[i].statistics.excess)
    title = answers[worst] + (f" ({name(columns[worst].spec.name)})" if len(columns) > 1 else "")
    subtitle = f"{describe_source(report, columns)} · equal elements lie on the lowest line"
    figure = new_figure(title, subtitle, height=3.1)
    panels = figure.subplots(1, len(columns), squeeze=False)[0]
    for axes, column in zip(panels, columns, strict=True):
        _draw_magnitude(axes, column, report)
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


def _draw_magnitude(axes: Axes, column: OutputColumn, report: ParityReport) -> None:
    axes.set_title(plain(name(column.spec.name)))
    magnitude, error = _pairs(column)
    known = np.isfinite(magnitude) & np.isfinite(error)
    if not known.any():
        say(axes, column.shapes or "no finite element on both sides")
        return
    low, high = span_of(magnitude[known])
    low, high = low / 1.5, high * 1.5
    dtype = np.dtype(column.spec.dtype)
    floating = np.issubdtype(dtype, np.floating)
    high = min(high, float(np.finfo(dtype).max) / 2) if floating else high
    xs = np.geomspace(low, high, 200)
    allowed = column.statistics.atol + column.statistics.rtol * xs
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
        kept = worst_and_some(y[some], _ELEMENTS_SHOWN // len(series))
        label = column.elements[index] if column.elements else ""
        # What is zero lies on the lowest lines.
        at = np.maximum(x[some][kept], low), np.maximum(y[some][kept], floor)
        color = Color.ELEMENTS[index] if label else Color.INK
        gid = f"elements {index}"
        draw_points(axes, *at, index, label, gid, color=color, ms=4, alpha=0.5, mew=0)
    for label, values, color, style in lines:
        axes.plot(xs, values, color=color, ls=style, lw=1.2, label=label, gid=label)
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    axes.set_ylim(bottom=floor / 1.5, top=3 * max(float(allowed.max()), float(error[known].max())))
    log_axis(axes.xaxis)
    log_axis(axes.yaxis)
    axes.set_xlabel(labelled("|PyTorch|", column.spec.unit))
    axes.legend(handlelength=1.4, frameon=True)


def span_of(magnitude: Floats) -> tuple[float, float]:
    """The ends of a logarithmic axis for such values."""
    some = magnitude[(magnitude > 0) & np.isfinite(magnitude)]
    if not some.size:
        return 0.1, 10.0
    # A value next to zero must not stretch the axis over all that others have in common.
    low = max(float(some.min()), float(np.percentile(some, 1)) / 100)
    return low, max(float(some.max()), low)


_NAMED = 3
_STANDS_OUT = 10.0  # times the median sample
_HEADROOM = 3.0


@styled
def errors_by_sample(report: ParityReport) -> Chart:
    """Is a large error that of single samples, or of a stretch of the data?

    Each point is a sample's largest error in one output, in units of what is allowed, atol +
    rtol·|PyTorch|; samples of one event lie side by side in most data. The worst samples are named.
    Equal answers lie on the lowest line.
    """
    columns = worst_columns(report)
    errors = {column.spec.name: _errors_of(column, report) for column in columns}
    # Of the samples that were kept whatever their error; outputs of other shapes have none.
    known = {n: found for n, found in errors.items() if not found.empty}
    medians = {n: float(found.reindex(report.plotted).median()) for n, found in known.items()}
    worst = _worst(errors)
    differing = next((column for column in columns if column.shapes), None)
    title = (
        _samples_answer(worst, medians)
        if differing is None
        else f"{name(differing.spec.name)} can't be compared: {differing.shapes}"
    )
    subtitle = describe_source(report, columns)
    if len(report.plotted) < report.samples:
        subtitle += f" · drawn: {len(report.plotted):,} evenly spaced ones and the worst"
    subtitle += " · equal answers lie on the lowest line"
    figure = new_figure(title, subtitle, height=2.7)
    _draw_samples(figure.subplots(), errors, worst)
    named = "; ".join(f"sample {w.sample}, {number(w.excess)} in {w.output}" for w in worst)
    middle = "; ".join(f"{output}, {number(median)}" for output, median in medians.items())
    alt = (
        "Largest error of a sample in units of what is allowed. "
        f"Worst: {named or 'none'}. Median sample: {middle or 'none'}."
    )
    return Chart(figure, title, alt)


def _errors_of(column: OutputColumn, report: ParityReport) -> pd.Series:
    """Largest error of each sample in an output, by its index; infinite where not comparable."""
    kept = worst_elements(column.reference, column.value, column.statistics.limit).excess
    worst = pd.Series({w.sample: w.excess for w in column.statistics.worst}, dtype=np.float64)
    return pd.Series(kept, report.plotted[: len(kept)]).combine_first(worst)


def _worst(errors: dict[str, pd.Series]) -> list[Any]:
    """``output``, ``sample`` and ``excess`` of the samples that are named, the worst first."""
    every = pd.concat(errors, names=["output", "sample"]).rename("excess").reset_index()
    every = every[every.excess > 0].sort_values(["excess", "sample"], ascending=[False, True])
    return list(every.drop_duplicates("sample").head(_NAMED).itertuples())


def _samples_answer(worst: list[Any], medians: dict[str, float]) -> str:
    if not worst:
        return "The models give equal answers to every sample"
    first, where = worst[0], f" ({name(worst[0].output)})" if len(medians) > 1 else ""
    sample, median = f"sample {first.sample}", medians[first.output]
    if math.isinf(first.excess):
        return f"{sample.capitalize()} can't be compared: NaN or Inf in one model only{where}"
    how = f"{number(first.excess)}× what is allowed"
    if not median > 0:
        return f"{sample.capitalize()} differs most, by {how}; most samples are equal{where}"
    times = f"{number(first.excess / median)} times the median sample"
    if first.excess > _STANDS_OUT * median:
        return f"{sample.capitalize()} stands out: {how}, {times}{where}"
    return f"No sample stands out: the largest error, of {sample}, is {how}, {times}{where}"


def _draw_samples(axes: Axes, errors: dict[str, pd.Series], worst: list[Any]) -> None:
    some = np.concatenate([*errors.values()])
    positive = some[(some > 0) & np.isfinite(some)]
    if not some.size:
        say(axes, "nothing to compare")
        return
    floor = float(positive.min(initial=1.0)) / 2
    top = _HEADROOM * max(1.0, float(positive.max(initial=0.0)))
    for index, (output, found) in enumerate(errors.items()):
        few = len(found) < 400
        style = {"ms": 5, "alpha": 0.75} if few else {"ms": 3.5, "alpha": 0.5}
        heights = found.clip(floor, top / _HEADROOM**0.5)
        label, gid = plain(name(output)), f"samples {output}"
        draw_points(axes, found.index, heights, index, label, gid, mew=0, **style)
    axes.axhline(1.0, color=Color.INK, ls="--", lw=1.2, label="allowed", gid="allowed")
    axes.set(yscale="log", ylim=(floor / 1.5, top))
    log_axis(axes.yaxis)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.02)
    for one in worst:
        at = one.sample, min(one.excess, top / _HEADROOM**0.5)
        text, gid = str(one.sample), f"named {one.sample}"
        note(axes, text, at, (0, 5), ha="center", weight="bold", gid=gid)
    axes.set(xlabel="sample, its row in the evaluation data", ylabel="error, × what is allowed")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), handletextpad=0.4, handlelength=1.4)
