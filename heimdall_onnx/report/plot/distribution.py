"""The distribution of differences, of one model from another and of one release from another."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes

from heimdall_onnx.common.text import after, name, number, share
from heimdall_onnx.evidence.parity.report import ParityReport
from heimdall_onnx.evidence.parity.statistics import ErrorStatistics
from heimdall_onnx.report.plot.chart import (
    Chart,
    Color,
    labelled,
    log_axis,
    new_panels,
    plain,
    say,
    styled,
)
from heimdall_onnx.report.plot.outputs import (
    describe_errors,
    describe_source,
    parity_answer,
    worst_columns,
    worst_output,
)


@styled
def error_distribution(report: ParityReport) -> Chart:
    """How are the differences distributed, and how far from the tolerance do they stay?

    Per output, the cumulative share of elements by absolute error with the percentiles, over the
    whole evaluation data.
    """
    columns = worst_columns(report)
    title, worst = parity_answer(report, columns), worst_output(columns)
    if number(worst.p99) != number(worst.maximum) and not worst.nonfinite_mismatches:
        title += f"; 99% of the differences are at most {number(worst.p99)}{after(worst.unit)}"
    subtitle = (
        f"{describe_source(report, columns)} · dashed: tolerance {number(report.tolerance)}; "
        f"shaded: further {number(report.rtol)}·|PyTorch| allowed where outputs are large"
    )
    figure, panels = new_panels(title, subtitle, len(columns), height=2.9)
    for axes, column in zip(panels, columns, strict=True):
        o = column.statistics
        axes.set_title(plain(name(o.output)))
        if column.shapes:
            say(axes, "not comparable")
            continue
        relative = o.rtol * max(abs(o.lowest), abs(o.highest))
        draw_distribution(axes, o, (o.atol, o.atol + relative))
    return Chart(figure, title, describe_errors(report))


def draw_distribution(
    axes: Axes, o: ErrorStatistics, allowed: tuple[float, float] | None = None
) -> None:
    """The cumulative share of an output's elements by error, and its percentiles.

    An error below the first edge (1e-12) counts as none, for which a logarithmic axis has no place:
    the legend says how many there are, and the curve begins above them.

    Args:
        axes: Where to.
        o: The errors.
        allowed: Least and largest error that is allowed, where there is a limit.
    """
    edges, cdf = np.array(o.error_edges), np.array(o.error_cdf)
    if np.isnan(cdf).any():
        say(axes, "no finite elements")
        return
    if cdf[-1] < 1:  # the highest percentile stands in where an element has no finite error
        most = o.maximum if math.isfinite(o.maximum) else o.p999
        edges, cdf = np.append(edges, max(most, 10 * edges[-1])), np.append(cdf, 1.0)
    rising = np.flatnonzero(np.diff(cdf) > 0) + 1
    if not rising.size:
        say(axes, f"no difference above {number(edges[0])}" if o.maximum else "no difference")
        return
    drawn = slice(max(int(rising[0]) - 5, 0), int(rising[-1]) + 2)
    axes.step(
        edges[drawn],
        100 * cdf[drawn],
        where="post",
        color=Color.INK,
        gid=f"differences {o.output}",
        label=f"{share(float(cdf[0]))} equal" if cdf[0] > 0 else "_",
    )
    # With fewer elements these high percentiles are the maximum by another name.
    marks = [("p50", o.p50, 50.0, "o")]
    marks += [("p99", o.p99, 99.0, "s")] if o.count >= 100 else []
    marks += [("p99.9", o.p999, 99.9, "D")] if o.count >= 1000 else []
    marks += [("largest", o.maximum, 100.0, "v")] if math.isfinite(o.maximum) else []
    for label, value, level, marker in marks:
        if value > 0:
            axes.plot(
                value,
                level,
                marker,
                color=Color.ELEMENTS[3],
                mec=Color.INK,
                mew=0.8,
                label=f"{label}  {number(value)}",
                gid=label,
                clip_on=False,
            )
    axes.set_xscale("log")
    if allowed is not None:
        axes.axvspan(*allowed, color=Color.INK, alpha=0.08, lw=0)
        axes.axvline(allowed[0], ls="--", color=Color.INK, lw=1.2, gid="tolerance")
    log_axis(axes.xaxis)
    axes.set(
        ylim=(0, 106), xlabel=labelled("absolute difference", o.unit), ylabel="at or below (%)"
    )
    axes.legend(handletextpad=0.2, frameon=True, framealpha=1)
