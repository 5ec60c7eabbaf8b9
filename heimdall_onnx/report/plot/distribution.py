"""The distribution of the differences, beside the tolerance."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from heimdall_onnx.common.arrays import Floats
from heimdall_onnx.common.text import after, name, number, share
from heimdall_onnx.evidence.parity.report import ParityReport
from heimdall_onnx.evidence.parity.statistics import ErrorStatistics
from heimdall_onnx.report.plot.chart import Chart, Color, mark, new_figure, plain, say, styled
from heimdall_onnx.report.plot.outputs import (
    OutputColumn,
    describe_errors,
    describe_source,
    parity_answer,
    worst_columns,
    worst_output,
)


@styled
def error_distribution(report: ParityReport) -> Chart:
    """How are the differences distributed, and how far from the tolerance do they stay?

    Per output, the share of elements by absolute error and the cumulative share with the
    percentiles, both over the whole evaluation data. An error below the first edge (1e-12)
    counts as zero and stands apart, since a logarithmic axis has no place for it.
    """
    columns = worst_columns(report)
    title = _distribution_answer(report, columns)
    subtitle = (
        f"{describe_source(report, columns)} · dashed: tolerance {number(report.tolerance)}; "
        f"shaded: further {number(report.rtol)}·|PyTorch| allowed where outputs are large"
    )
    across, rows = min(len(columns), 2), math.ceil(len(columns) / 2)
    figure = new_figure(title, subtitle, height=4.8 if rows == 1 else 4.2 * rows)
    panels = figure.subplots(2 * rows, across, squeeze=False)
    for index, column in enumerate(columns):
        row, place = divmod(index, across)
        above, below = panels[2 * row : 2 * row + 2, place]
        above.set_title(plain(name(column.spec.name)))
        _draw_distribution(column, above, below, report)
        if place == 0:
            above.set_ylabel("share of elements (%)")
            below.set_ylabel("at or below (%)")
    for axes in panels.ravel():
        axes.set_visible(axes.has_data() or bool(axes.texts))
    return Chart(figure, title, describe_errors(report))


def _distribution_answer(report: ParityReport, columns: list[OutputColumn]) -> str:
    worst = worst_output(columns)
    count = sum(o.count for o in report.evaluation)
    bad = sum(o.violations for o in report.evaluation)
    mismatches = any(o.nonfinite_mismatches for o in report.evaluation)
    if mismatches or math.isnan(worst.maximum):
        return parity_answer(report, columns)
    if all(o.maximum == 0 for o in report.evaluation):
        return f"Every one of the {count:,} differences is exactly 0"
    where = f" in {name(worst.output)}" if len(report.evaluation) > 1 else ""
    bulk = f"99% of differences{where} are at most {number(worst.p99)}{after(worst.unit)}"
    if not bad and number(worst.p99) == number(worst.maximum):
        most = f"{number(worst.maximum)}{after(worst.unit)}"
        return f"No difference{where} exceeds {most}: all {count:,} within tolerance"
    if bad:
        return f"{bad:,} of {count:,} differences exceed the tolerance; {bulk}"
    return f"{bulk}, the largest is {number(worst.maximum)}: all {count:,} within tolerance"


def _draw_distribution(
    column: OutputColumn, above: Axes, below: Axes, report: ParityReport
) -> None:
    o = column.statistics
    edges, cdf = np.array(o.error_edges), np.array(o.error_cdf)
    if np.isnan(cdf).any():
        for axes in (above, below):
            say(axes, "not comparable" if column.shapes else "no finite elements")
        return
    if cdf[-1] < 1:
        edges, cdf = np.append(edges, max(_largest(o), 10 * edges[-1])), np.append(cdf, 1.0)
    magnitude = max(abs(o.lowest), abs(o.highest))
    relative = report.tolerance + report.rtol * magnitude
    zero, low, high = _error_axis(edges, cdf, o, relative)
    shares = 100 * np.diff(cdf)
    # Nearly all are empty, and each would be drawn.
    filled = shares > 0
    above.bar(
        edges[:-1][filled],
        shares[filled],
        np.diff(edges)[filled],
        align="edge",
        color=Color.ELEMENTS[2],
        edgecolor="white",
        linewidth=0.3,
        gid="histogram",
    )
    shown = np.append(edges[edges >= low], high)
    levels = 100 * np.append(cdf[edges >= low], cdf[-1])
    below.step(shown, levels, where="post", color=Color.INK, gid="ecdf")
    for axes in (above, below):
        axes.set(xscale="log", xlim=(zero / 2.2, high))
        axes.axvspan(report.tolerance, relative, color=Color.INK, alpha=0.08, lw=0)
        axes.axvline(report.tolerance, ls="--", color=Color.INK, lw=1.2, gid="tolerance")
    if cdf[0] > 0:
        bar = above.bar(
            zero,
            100 * cdf[0],
            zero * 1.1,
            color="white",
            edgecolor=Color.ELEMENTS[2],
            hatch="////",
            linewidth=1,
            gid="zeros",
        )
        above.bar_label(bar, [share(cdf[0])], padding=2, size=9)
        below.plot([zero, zero], [0, 100 * cdf[0]], color=Color.INK)
        below.plot([zero, low], [100 * cdf[0]] * 2, ":", color=Color.INK, lw=1.2)
    above.set_ylim(0, 118 * float(np.diff(cdf, prepend=0.0).max()))
    below.set_ylim(0, 108)
    _label_decades(above, below, zero if cdf[0] > 0 else None, low, high)
    _mark_percentiles(below, o, zero, cdf)
    below.set_xlabel(column.label("absolute difference"))


def _largest(o: ErrorStatistics) -> float:
    """The largest finite error; the highest percentile stands in where an element has none."""
    return o.maximum if math.isfinite(o.maximum) else o.p999


def _error_axis(
    edges: Floats, cdf: Floats, o: ErrorStatistics, relative: float
) -> tuple[float, float, float]:
    """Where zero is drawn, and the first and last power of ten of the axis."""
    high = 10.0 ** math.ceil(math.log10(max(_largest(o), relative, edges[0])) + 0.05)
    some = edges[cdf > cdf[0] + 1e-9]
    low = 10.0 ** math.floor(math.log10(min(some[0] if some.size else relative, high / 1e3)) - 0.05)
    return (low / 4 if cdf[0] > 0 else low), low, high


def _label_decades(above: Axes, below: Axes, zero: float | None, low: float, high: float) -> None:
    first, last = round(math.log10(low)), round(math.log10(high))
    step = 1 + (last - first) // 5
    ticks = [10.0**p for p in range(last - 1, first - 1, -step)]
    labels = [number(t) for t in ticks]
    if zero is not None:
        ticks, labels = [*ticks, zero], [*labels, "0"]
    above.set_xticks(ticks, [""] * len(ticks))
    below.set_xticks(ticks, labels)
    for axes in (above, below):
        axes.xaxis.set_minor_locator(NullLocator())


def _mark_percentiles(axes: Axes, o: ErrorStatistics, zero: float, cdf: Floats) -> None:
    # With fewer elements these high percentiles are the maximum by another name.
    marks = [("p50", o.p50, 50.0, "o")]
    marks += [("p99", o.p99, 99.0, "s")] if o.count >= 100 else []
    marks += [("p99.9", o.p999, 99.9, "D")] if o.count >= 1000 else []
    if math.isfinite(o.maximum):
        marks.append(("max", o.maximum, 100 * float(cdf[-1]), "v"))
    for label, value, level, marker in marks:
        text = f"{label}  {number(value)}"
        mark(axes, max(value, zero), level, marker, Color.ELEMENTS[1], text, label)
    axes.legend(handletextpad=0.2, borderaxespad=0.3, frameon=True, framealpha=1)
