"""Two releases side by side: A with circles and full lines, B with crosses and dashed ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from heimdall_onnx.common.arrays import Floats
from heimdall_onnx.common.text import (
    after,
    count_of,
    distance,
    metre_scale,
    name,
    number,
)
from heimdall_onnx.evidence.parity.ground import mean_place, offset_km
from heimdall_onnx.evidence.parity.statistics import ErrorStatistics
from heimdall_onnx.report.plot.chart import (
    Chart,
    Color,
    fitting_log_axis,
    labelled,
    legend_below,
    new_figure,
    new_panels,
    note,
    plain,
    say,
    styled,
)
from heimdall_onnx.report.plot.distribution import draw_distribution
from heimdall_onnx.report.plot.positions import (
    coordinates,
    draw_displacement,
    draw_lines,
    draw_places,
)
from heimdall_onnx.review.compare.answers import A, Answers, B
from heimdall_onnx.review.compare.comparison import RecordedParity
from heimdall_onnx.review.compare.words import (
    error_words,
    most_changed,
    moved_words,
    output_words,
    sentence_of,
)

_MAPPED = 60  # with the lines between them, more can't be read
_OUTPUTS_SHOWN = 4
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
def output_changes(answers: Answers) -> Chart:
    """How are the differences of each output distributed?

    The cumulative share of elements by absolute difference, in the output's own unit, with the
    percentiles; of many outputs those that change most beside how far their values lie apart.
    """
    title = sentence_of([output_words(answers)])
    changed = {output.output for output in most_changed(answers)[:_OUTPUTS_SHOWN]}
    shown = [output for output in answers.outputs if output.output in changed]
    subtitle = f"{name(answers.source, 60)}, {count_of(answers.samples, 'sample')}"
    if len(shown) < len(answers.outputs):
        subtitle += f" · the {len(shown)} outputs of {len(answers.outputs)} that change most"
    figure, panels = new_panels(title, subtitle, len(shown), height=2.9)
    for axes, output in zip(panels, shown, strict=True):
        axes.set_title(plain(name(output.output)))
        draw_distribution(axes, output)
    alt = " ".join(
        f"{o.output}: {o.violations:,} of {o.count:,} elements differ, median {number(o.p50, 3)}, "
        f"p99 {number(o.p99, 3)}, largest {number(o.maximum, 3)}{after(o.unit)}."
        for o in answers.outputs
    )
    return Chart(figure, title, alt)


@styled
def localization_errors(answers: Answers) -> Chart | None:
    """Which release is closer to the true positions?

    Which share of the answers is within so many metres of the truth, for both. None where the true
    positions are not known.
    """
    errors = answers.errors
    if errors is None:
        return None
    medians = errors.medians_m
    title = sentence_of(error_words(errors))
    subtitle = (
        f"{name(answers.source, 60)}, {count_of(answers.samples, 'labelled sample')} · 95% interval"
        " of the ratio by a paired bootstrap · marked: medians"
    )
    figure = new_figure(title, subtitle, height=3.4)
    axes = figure.subplots()
    sides = (errors.a_m, errors.b_m)
    finite = [side[np.isfinite(side)] for side in sides]
    largest = max((float(side.max()) for side in finite if side.size), default=0.0)
    factor, unit = metre_scale(largest)
    for index, (who, found) in enumerate(zip((A, B), finite, strict=True)):
        shares = 100 * np.arange(1, found.size + 1) / answers.samples
        axes.step(
            np.sort(found) / factor,
            shares,
            where="post",
            color=_COLORS[index],
            ls=_LINES[index],
            gid=f"errors {who}",
        )
        median = medians[index]
        axes.plot(
            median / factor if math.isfinite(median) else math.nan,
            50.0,
            _MARKERS[index],
            color=_COLORS[index],
            ls=_LINES[index],
            ms=(13, 8)[index],
            mfc="none" if index == 0 else _COLORS[index],
            mew=1.6,
            label=f"{who}  median {distance(median)}",
            gid=f"median {who}",
            zorder=4,
        )
    positive = np.concatenate(finite)
    positive = positive[positive > 0]
    if positive.size and positive.max() > 20 * positive.min():
        axes.set_xscale("log")
        fitting_log_axis(axes.xaxis)
    axes.set(
        ylim=(0, 104),
        xlabel=f"distance to the true position ({unit})",
        ylabel="answers within it (%)",
    )
    axes.legend(frameon=True, framealpha=1, handlelength=3)
    alt = " ".join(
        f"{who}: median {distance(median)}, 95th percentile {distance(p95)}."
        for who, median, p95 in zip((A, B), medians, errors.p95s_m, strict=True)
    )
    return Chart(figure, title, alt)


_PERCENTILES = (("p50", "p50"), ("p99", "p99"), ("p99.9", "p999"), ("largest", "maximum"))


@styled
def recorded_parity(parity: Sequence[RecordedParity]) -> Chart | None:
    """Is each release as close to its own PyTorch model as the other?

    Percentiles of the error that each report records, on the evaluation data of its own release.
    None where neither records any.
    """
    shown = [one for one in parity if one.a or one.b][:_OUTPUTS_SHOWN]
    if not shown:
        return None
    title = _parity_answer(shown)
    subtitle = "Each ONNX model against its own PyTorch model, as its report records it"
    if len(shown) < len(parity):
        subtitle += f" · the first {len(shown)} outputs of {len(parity)}"
    figure, panels = new_panels(title, subtitle, len(shown), height=2.4)
    for axes, one in zip(panels, shown, strict=True):
        _draw_parity(axes, one)
    panels[0].legend(handlelength=3, frameon=True, framealpha=1)
    alt = " ".join(
        f"{one.output}, {who}: mean {number(side.mean, 3)}, "
        + ", ".join(f"{label} {number(getattr(side, what), 3)}" for label, what in _PERCENTILES)
        + f"{after(one.unit)}."
        for one in shown
        for who, side in ((A, one.a), (B, one.b))
        if side is not None
    )
    return Chart(figure, title, alt)


def _parity_answer(shown: Sequence[RecordedParity]) -> str:
    first = shown[0]
    if first.a is None or first.b is None:
        return f"Only {A if first.b is None else B} records its parity"
    where = f" in {name(first.output)}" if len(shown) > 1 else ""
    told = [f"{number(side.p99)} ({who})" for who, side in ((A, first.a), (B, first.b))]
    return f"99% of the export's errors{where} are at most {' and '.join(told)}{after(first.unit)}"


def _draw_parity(axes: Axes, one: RecordedParity) -> None:
    axes.set_title(plain(name(one.output)), pad=8)
    sides = (one.a, one.b)
    values = [getattr(side, what) for side in sides if side is not None for _, what in _PERCENTILES]
    known = [value for value in values if math.isfinite(value) and value > 0]
    if not known:
        say(axes, "no errors" if any(value == 0 for value in values) else "no finite errors")
        return
    # Zero has no place on a logarithmic axis, so it stands left of everything that is on it.
    zero = min(known) / 5
    for index, side in enumerate(sides):
        if side is not None:
            _draw_percentiles(axes, side, index, zero)
    axes.set_xscale("log")
    axes.set_xlim(zero / 2, 3 * max(known))
    fitting_log_axis(axes.xaxis)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yticks(range(len(_PERCENTILES)), [label for label, _ in _PERCENTILES])
    axes.set_ylim(len(_PERCENTILES) - 0.5, -0.5)
    axes.set_xlabel(labelled("error", one.unit))


def _draw_percentiles(axes: Axes, side: ErrorStatistics, index: int, zero: float) -> None:
    found = [getattr(side, what) for _, what in _PERCENTILES]
    axes.plot(
        [max(value, zero) if math.isfinite(value) else math.nan for value in found],
        np.arange(len(found)) + (-0.12, 0.12)[index],
        marker=_MARKERS[index],
        color=_COLORS[index],
        ls=_LINES[index],
        lw=1,
        ms=7,
        mfc="white" if index == 0 else _COLORS[index],
        label=(A, B)[index],
        gid=f"parity {(A, B)[index]}",
    )
    for place in np.flatnonzero(np.array(found) == 0):
        at = zero, float(place) + (-0.12, 0.12)[index]
        note(axes, "0", at, (-7, 0), ha="right", va="center")
