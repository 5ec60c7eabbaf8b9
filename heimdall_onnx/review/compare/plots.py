"""Two releases side by side: A with circles and full lines, B with crosses and dashed ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes

from heimdall_onnx.common.arrays import Floats
from heimdall_onnx.common.text import (
    count_of,
    distance,
    metre_scale,
    name,
)
from heimdall_onnx.evidence.geodesy import offset_km
from heimdall_onnx.evidence.parity.ground import mean_place
from heimdall_onnx.evidence.quality.metric import LOCALIZATION
from heimdall_onnx.report.plot.chart import (
    Chart,
    Color,
    legend_below,
    log_axis,
    new_figure,
    say,
    styled,
)
from heimdall_onnx.report.plot.positions import (
    coordinates,
    draw_displacement,
    draw_lines,
    draw_places,
)
from heimdall_onnx.review.compare.answers import A, Answers, B
from heimdall_onnx.review.compare.words import (
    moved_words,
    quality_words,
    sentence_of,
    value_text,
)

_MAPPED = 60  # with the lines between them, more can't be read
_FEW = 2  # values, of which each sample is right or wrong
_COLORS, _MARKERS, _LINES = (Color.A, Color.B), ("o", "X"), ("-", "--")


@styled
def position_changes(answers: Answers) -> Chart | None:
    """Where do both releases answer, and how far apart?

    Left, some positions of both in kilometres about their middle, with lines from A's to B's and
    the true positions where they are known; right, how far and in which direction all of them
    move. None for models without positions.
    """
    moved = answers.displacement
    if moved is None or answers.positions is None:
        return None
    title = sentence_of([moved_words(answers)])
    rows = np.flatnonzero(np.isfinite(moved.metres))
    subtitle = f"{name(answers.source, 60)}, {count_of(answers.samples, 'sample')}"
    alt = (
        f"Positions of B beside A over {answers.samples} samples: median displacement "
        f"{distance(moved.p50_m)}, p99 {distance(moved.p99_m)}, largest {distance(moved.max_m)}; "
        f"{moved.lost} without a finite position in one of them."
    )
    if not rows.size:
        figure = new_figure(title, subtitle, height=0.6)
        say(figure.subplots(), "There is nothing to draw.")
        return Chart(figure, title, alt)
    shown = rows[np.linspace(0, rows.size - 1, min(rows.size, _MAPPED)).astype(np.intp)]
    truth = None if answers.truth is None else answers.truth[shown]
    both = [side[shown] for side in answers.positions]
    points = np.concatenate([*both, *([] if truth is None else [truth])])
    origin = mean_place(points) or (0.0, 0.0)
    subtitle += f" · map: {shown.size} of them, azimuthal equidistant about {coordinates(origin)}"
    figure = new_figure(title, subtitle, height=4.6)
    left, right = figure.subplots(1, 2, width_ratios=[1.3, 1])
    _draw_map(left, both, truth, origin)
    a, b = (side[rows] for side in answers.positions)
    draw_displacement(right, a, b, (moved.p50_m, moved.p99_m))
    return Chart(figure, title, alt)


def _draw_map(
    axes: Axes, both: Sequence[Floats], truth: Floats | None, origin: tuple[float, float]
) -> None:
    a, b = (offset_km(side, origin) for side in both)
    draw_lines(axes, a, b, "moved")
    true = None if truth is None else offset_km(truth, origin)
    draw_places(axes, ((a, A, Color.A), (b, B, Color.B)), true)
    legend_below(axes, 0.17, ncols=3)


@styled
def values_by_sample(answers: Answers) -> Chart | None:
    """Which release's answers are worth more, sample by sample?

    Which share of the samples has at most so much of the first metric whose values differ from
    sample to sample, for both. None where there is no such metric.
    """
    every = answers.by_sample.items()
    metric, sides = next(((n, s) for n, s in every if len(np.unique(s)) > _FEW), ("", ()))
    if not metric:
        return None
    shown = tuple(judged for judged in answers.quality if judged.metric == metric)
    title = sentence_of(quality_words(replace(answers, quality=shown)))
    subtitle = (
        f"{name(answers.source, 60)}, {count_of(answers.samples, 'labelled sample')} · marked: "
        "medians of the samples"
    )
    figure = new_figure(title, subtitle, height=3.4)
    axes = figure.subplots()
    finite = [side[np.isfinite(side)] for side in sides]
    factor, unit = 1.0, name(metric)
    if metric == LOCALIZATION:
        largest = max((float(side.max()) for side in finite if side.size), default=0.0)
        factor, scale = metre_scale(largest)
        unit = f"distance to the true position ({scale})"
    told = []
    for index, (who, found) in enumerate(zip((A, B), finite, strict=True)):
        shares = 100 * np.arange(1, found.size + 1) / answers.samples
        axes.step(
            np.sort(found) / factor,
            shares,
            where="post",
            color=_COLORS[index],
            ls=_LINES[index],
            gid=f"values {who}",
        )
        every_one = np.where(np.isfinite(sides[index]), sides[index], np.inf)
        median, p95 = (float(np.quantile(every_one, q, method="inverted_cdf")) for q in (0.5, 0.95))
        words = f"median {value_text(metric, median)}, 95% within {value_text(metric, p95)}"
        told.append(f"{who}: {words}.")
        axes.plot(
            median / factor if math.isfinite(median) else math.nan,
            50.0,
            _MARKERS[index],
            color=_COLORS[index],
            ls=_LINES[index],
            ms=(13, 8)[index],
            mfc="none" if index == 0 else _COLORS[index],
            mew=1.6,
            label=f"{who}  {words}",
            gid=f"median {who}",
            zorder=4,
        )
    values = np.concatenate(finite)
    positive = values[values > 0]
    if positive.size and values.min() >= 0 and positive.max() > 20 * positive.min():
        axes.set_xscale("log")
        log_axis(axes.xaxis)
    axes.set(ylim=(0, 104), xlabel=unit, ylabel="samples within it (%)")
    axes.legend(frameon=True, framealpha=1, handlelength=3)
    return Chart(figure, title, " ".join(told))
