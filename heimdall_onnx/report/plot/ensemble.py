"""What an ensemble's doubt is made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from heimdall_onnx.common.arrays import Floats
from heimdall_onnx.common.text import count_of, distance, metre_scale, name, share
from heimdall_onnx.evidence.parity.ground import metres_per_degree
from heimdall_onnx.evidence.parity.report import ParityReport
from heimdall_onnx.model.ensemble import ALEATORIC, EPISTEMIC
from heimdall_onnx.report.plot.chart import Chart, Color, new_figure, say, styled


@styled
def members_disagreement(report: ParityReport) -> Chart | None:
    """Do the members disagree, or do they agree on how little can be known?

    The part of the deviation that more training would not take away (aleatoric) against the part
    that the members have not learnt alike (epistemic), one point a sample, both in metres: the
    roots of the summed squares of both axes. Above the dashed line the members' disagreement is
    the larger part; beside it the share that it has of the variance. None for a model that does
    not answer both parts in the shape and unit of its positions (batch, 2), as an ensemble does.
    """
    position = report.signature.position_output
    if position is None or position.shape[1:] != (2,):
        return None
    # Other models may call something else so.
    like_it = {
        output.name
        for output in report.signature.outputs
        if (output.shape, output.unit) == (position.shape, position.unit)
    }
    if not {ALEATORIC, EPISTEMIC} <= like_it:
        return None
    metres = np.stack(metres_per_degree(report.onnx[position.name][:, 0]), axis=1)
    noise, doubt = (_length(report.onnx[n] * metres) for n in (ALEATORIC, EPISTEMIC))
    known = np.isfinite(noise) & np.isfinite(doubt) & (noise > 0)
    noise, doubt = noise[known], doubt[known]
    subtitle = (
        f"{name(report.source, 60)}, {count_of(noise.size, 'sample')} of the ONNX model · "
        "dashed: equal parts"
    )
    if not noise.size:
        title = "No sample has finite deviations: what they are made of is unknown"
        figure = new_figure(title, subtitle, height=1.2)
        say(figure.subplots(), "nothing to draw")
        return Chart(figure, title, "")
    part = doubt**2 / (noise**2 + doubt**2)
    median, high = np.quantile(part, [0.5, 0.95])
    title = (
        f"The members' disagreement is {share(median)} of the variance in the median sample, "
        f"{share(high)} at the 95th percentile"
    )
    figure = new_figure(title, subtitle, height=3.4)
    both, shares = figure.subplots(1, 2)
    _draw(both, noise, doubt)
    _draw_shares(shares, part)
    alt = (
        f"Aleatoric deviation: median {distance(float(np.median(noise)))}. Epistemic deviation: "
        f"median {distance(float(np.median(doubt)))}, largest {distance(float(doubt.max()))}. "
        f"Samples in which members disagree by more than they claim to know: "
        f"{np.count_nonzero(doubt > noise):,} of {noise.size:,}."
    )
    return Chart(figure, title, alt)


def _draw(axes: Axes, noise: Floats, doubt: Floats) -> None:
    factor, unit = metre_scale(float(np.median(noise)))
    edge = float(max(noise.max(), doubt.max())) / factor * 1.08
    axes.scatter(
        noise / factor,
        doubt / factor,
        s=16,
        color=Color.ONNX,
        alpha=0.6,
        linewidths=0,
        gid="samples",
        zorder=3,
    )
    axes.plot([0, edge], [0, edge], ls="--", lw=1.2, color=Color.QUIET)
    axes.set(
        xlim=(0, edge),
        ylim=(0, edge),
        aspect="equal",
        xlabel=f"aleatoric: what the members claim ({unit})",
        ylabel=f"epistemic ({unit})",
    )


def _draw_shares(axes: Axes, part: Floats) -> None:
    percent = 100 * np.sort(part)
    axes.ecdf(percent, color=Color.ONNX, gid="shares")
    axes.axvline(50, ls="--", lw=1.2, color=Color.QUIET)
    axes.set(
        xlim=(0, 100),
        ylim=(0, 1.02),
        xlabel="epistemic share of the variance (%)",
        ylabel="share of samples (%)",
    )
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))


def _length(values: npt.NDArray[Any]) -> Floats:
    squared = values.astype(np.float64) ** 2
    return np.asarray(np.sqrt(squared.sum(axis=1)), dtype=np.float64)
