"""How large errors are: by the magnitude of their values, and sample by sample."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
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
    worst = max(range(len(columns)), key=lambda i: columns[i].excess)
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


@dataclass(frozen=True)
class _Samples:
    """Largest error of each sample in one output, in units of what is allowed.

    Attributes:
        column: The output.
        samples: Index of each sample, ascending.
        excess: Its largest error; infinite where not comparable.
        kept: How many of them were kept whatever their error; the others are the worst.
        median: Of those that were kept.
    """

    column: OutputColumn
    samples: npt.NDArray[np.int64]
    excess: Floats
    kept: int
    median: float


@styled
def errors_by_sample(report: ParityReport) -> Chart:
    """Is a large error that of single samples, or of a stretch of the data?

    Each point is a sample's largest error in one output, in units of what is allowed, atol +
    rtol·|PyTorch|; samples of one event lie side by side in most data. The worst samples are named.
    Equal answers lie on the lowest line.
    """
    courses = [_samples(column, report) for column in worst_columns(report)]
    title = _samples_answer(courses)
    subtitle = describe_source(report, [course.column for course in courses])
    shown = max(course.kept for course in courses)
    if shown < report.samples:
        subtitle += f" · drawn: {shown:,} evenly spaced ones and the worst"
    subtitle += " · equal answers lie on the lowest line"
    figure = new_figure(title, subtitle, height=2.7)
    _draw_samples(figure.subplots(), courses, report)
    return Chart(figure, title, _samples_alt(courses))


def _samples(column: OutputColumn, report: ParityReport) -> _Samples:
    found = worst_elements(
        column.reference, column.value, atol=report.tolerance, rtol=report.rtol
    ).excess
    by_sample = dict(zip(report.plotted.tolist(), found.tolist(), strict=True))
    by_sample |= {w.sample: w.excess for w in column.statistics.worst if w.sample not in by_sample}
    samples = sorted(by_sample)
    return _Samples(
        column,
        np.array(samples, np.int64),
        np.array([by_sample[sample] for sample in samples], np.float64),
        len(found),
        float(np.median(found)) if len(found) else math.nan,
    )


def _worst(courses: list[_Samples]) -> list[tuple[float, int, int]]:
    """Error, index and output of the samples that are named, the worst first."""
    worst: dict[int, tuple[float, int, int]] = {}
    for output, course in enumerate(courses):
        for sample, excess in zip(course.samples.tolist(), course.excess.tolist(), strict=True):
            if excess > 0 and excess > worst.get(sample, (0.0, 0, 0))[0]:
                worst[sample] = excess, sample, output
    return sorted(worst.values(), key=lambda found: (-found[0], found[1]))[:_NAMED]


def _samples_answer(courses: list[_Samples]) -> str:
    differing = next((c.column for c in courses if c.column.shapes), None)
    if differing is not None:
        return f"{name(differing.spec.name)} can't be compared: {differing.shapes}"
    worst = _worst(courses)
    if not worst:
        return "The models give equal answers to every sample"
    excess, sample, output = worst[0]
    where = f" ({name(courses[output].column.spec.name)})" if len(courses) > 1 else ""
    if math.isinf(excess):
        return f"Sample {sample} can't be compared: NaN or Inf in one model only{where}"
    median = courses[output].median
    how = f"{number(excess)}× what is allowed"
    if not median > 0:
        return f"Sample {sample} differs most, by {how}; most samples are equal{where}"
    times = f"{number(excess / median)} times the median sample"
    if excess > _STANDS_OUT * median:
        return f"Sample {sample} stands out: {how}, {times}{where}"
    return f"No sample stands out: the largest error, of sample {sample}, is {how}, {times}{where}"


def _draw_samples(axes: Axes, courses: list[_Samples], report: ParityReport) -> None:
    some = np.concatenate([course.excess for course in courses])
    positive = some[(some > 0) & np.isfinite(some)]
    if not some.size:
        say(axes, "nothing to compare")
        return
    floor = float(positive.min(initial=1.0)) / 2
    top = _HEADROOM * max(1.0, float(positive.max(initial=0.0)))
    for index, course in enumerate(courses):
        called, few = course.column.spec.name, len(course.samples) < 400
        style = {"ms": 5, "alpha": 0.75} if few else {"ms": 3.5, "alpha": 0.5}
        heights = course.excess.clip(floor, top / _HEADROOM**0.5)
        label, gid = plain(name(called)), f"samples {called}"
        draw_points(axes, course.samples, heights, index, label, gid, mew=0, **style)
    axes.axhline(1.0, color=Color.INK, ls="--", lw=1.2, label="allowed", gid="allowed")
    axes.set(yscale="log", ylim=(floor / 1.5, top))
    log_axis(axes.yaxis)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.02)
    for excess, sample, _ in _worst(courses):
        at = sample, min(excess, top / _HEADROOM**0.5)
        note(axes, str(sample), at, (0, 5), ha="center", weight="bold", gid=f"named {sample}")
    axes.set(xlabel="sample, its row in the evaluation data", ylabel="error, × what is allowed")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), handletextpad=0.4, handlelength=1.4)


def _samples_alt(courses: list[_Samples]) -> str:
    named = "; ".join(
        f"sample {sample}, {number(excess)} in {courses[output].column.spec.name}"
        for excess, sample, output in _worst(courses)
    )
    medians = "; ".join(f"{c.column.spec.name}, {number(c.median)}" for c in courses)
    return (
        "Largest error of a sample in units of what is allowed. "
        f"Worst: {named or 'none'}. Median sample: {medians}."
    )
