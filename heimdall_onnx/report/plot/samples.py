"""The error of each sample, in the order of the evaluation data."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from heimdall_onnx.common.arrays import Floats
from heimdall_onnx.common.text import name, number
from heimdall_onnx.evidence.parity.report import ParityReport
from heimdall_onnx.evidence.parity.statistics import worst_elements
from heimdall_onnx.report.plot.chart import (
    Chart,
    Color,
    log_axis,
    new_figure,
    note,
    plain,
    say,
    styled,
)
from heimdall_onnx.report.plot.outputs import (
    ELEMENT_MARKERS,
    OutputColumn,
    describe_source,
    worst_columns,
)

_NAMED = 3
_STANDS_OUT = 10.0  # times the median sample
_HEADROOM = 3.0


@dataclass(frozen=True)
class _Course:
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
    courses = [_course(column, report) for column in worst_columns(report)]
    title = _answer(courses)
    subtitle = describe_source(report, [course.column for course in courses])
    shown = max(course.kept for course in courses)
    if shown < report.samples:
        subtitle += f" · drawn: {shown:,} evenly spaced ones and the worst"
    subtitle += " · equal answers lie on the lowest line"
    figure = new_figure(title, subtitle, height=2.7)
    _draw(figure.subplots(), courses, report)
    return Chart(figure, title, _alt(courses))


def _course(column: OutputColumn, report: ParityReport) -> _Course:
    found = worst_elements(
        column.reference, column.value, atol=report.tolerance, rtol=report.rtol
    ).excess
    kept = np.arange(len(found)) if report.plotted is None else report.plotted[: len(found)]
    by_sample = dict(zip(kept.tolist(), found.tolist(), strict=True))
    by_sample |= {w.sample: w.excess for w in column.statistics.worst if w.sample not in by_sample}
    samples = sorted(by_sample)
    return _Course(
        column,
        np.array(samples, np.int64),
        np.array([by_sample[sample] for sample in samples], np.float64),
        len(kept),
        float(np.median(found)) if len(found) else math.nan,
    )


def _worst(courses: list[_Course]) -> list[tuple[float, int, int]]:
    """Error, index and output of the samples that are named, the worst first."""
    worst: dict[int, tuple[float, int, int]] = {}
    for output, course in enumerate(courses):
        for sample, excess in zip(course.samples.tolist(), course.excess.tolist(), strict=True):
            if excess > 0 and excess > worst.get(sample, (0.0, 0, 0))[0]:
                worst[sample] = excess, sample, output
    return sorted(worst.values(), key=lambda found: (-found[0], found[1]))[:_NAMED]


def _answer(courses: list[_Course]) -> str:
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


def _draw(axes: Axes, courses: list[_Course], report: ParityReport) -> None:
    some = np.concatenate([course.excess for course in courses])
    positive = some[(some > 0) & np.isfinite(some)]
    if not some.size:
        say(axes, "nothing to compare")
        return
    floor = float(positive.min(initial=1.0)) / 2
    top = _HEADROOM * max(1.0, float(positive.max(initial=0.0)))
    for index, course in enumerate(courses):
        axes.plot(
            course.samples,
            course.excess.clip(floor, top / _HEADROOM**0.5),
            ELEMENT_MARKERS[index],
            color=Color.ELEMENTS[index],
            ms=5 if len(course.samples) < 400 else 3.5,
            alpha=0.75 if len(course.samples) < 400 else 0.5,
            mew=0,
            ls="none",
            label=plain(name(course.column.spec.name)),
            gid=f"samples {course.column.spec.name}",
        )
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


def _alt(courses: list[_Course]) -> str:
    named = "; ".join(
        f"sample {sample}, {number(excess)} in {courses[output].column.spec.name}"
        for excess, sample, output in _worst(courses)
    )
    medians = "; ".join(f"{c.column.spec.name}, {number(c.median)}" for c in courses)
    return (
        "Largest error of a sample in units of what is allowed. "
        f"Worst: {named or 'none'}. Median sample: {medians}."
    )
