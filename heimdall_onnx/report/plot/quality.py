"""Whether a loss in the task is shown to be within what may be lost."""

from __future__ import annotations

import math
from typing import Protocol

from matplotlib.axes import Axes

from heimdall_onnx.evidence.quality.contract import Judged
from heimdall_onnx.report.plot.chart import Chart, Color, new_figure, note, styled

# Beyond so many limits an interval is cut off.
_FARTHEST = 4.0
_COLORS = {"shown": Color.ONNX, "not shown": Color.QUIET, "worse": Color.PYTORCH}


class _Found(Protocol):
    @property
    def quality(self) -> tuple[Judged, ...]: ...


@styled
def quality(report: _Found) -> Chart | None:
    """Is it shown that a model is no worse in its task than may be?

    The interval of what it loses by each metric, in units of what may be lost. None without labels.
    """
    if not report.quality:
        return None
    worst = max(report.quality, key=lambda judged: judged.high / (judged.max_loss or 1.0))
    said = {
        "shown": f"at most {worst.said(worst.high)} of {worst.metric} is lost: shown",
        "not shown": f"that no more than {worst.said(worst.max_loss)} of {worst.metric} is lost is "
        "not shown",
        "worse": f"more than {worst.said(worst.max_loss)} of {worst.metric} is lost",
    }
    title = said[worst.outcome]
    title = title[0].upper() + title[1:]
    subtitle = (
        f"{worst.samples:,} samples{worst.grouped} · line: what may be lost · bars: each end with "
        f"{100 * worst.confidence:.4g}% confidence"
    )
    figure = new_figure(title, subtitle, height=1.6 + 0.6 * len(report.quality))
    axes = figure.subplots()
    for place, judged in enumerate(report.quality):
        _draw(axes, place, judged)
    axes.axvline(1.0, color=Color.INK, lw=1.2)
    axes.axvline(0.0, color=Color.QUIET, lw=0.8, linestyle=":")
    axes.set_yticks(range(len(report.quality)), [judged.metric for judged in report.quality])
    axes.set(xlabel="loss, in units of what may be lost", ylim=(len(report.quality) - 0.4, -0.6))
    axes.margins(x=0.12)
    alt = "; ".join(f"{judged.in_words}, {judged.outcome}" for judged in report.quality)
    return Chart(figure, title + ".", alt + ".")


def _draw(axes: Axes, place: int, judged: Judged) -> None:
    limit = judged.max_loss or max(abs(judged.low), abs(judged.high), math.ulp(0.0))
    low, loss, high = (
        min(max(value / limit, -_FARTHEST), _FARTHEST)
        for value in (judged.low, judged.loss, judged.high)
    )
    color = _COLORS[judged.outcome]
    axes.plot([low, high], [place, place], color=color, lw=6, solid_capstyle="butt", alpha=0.5)
    axes.plot(loss, place, "o", color=color, gid=f"loss {judged.metric}")
    side = "right" if loss > 0 else "left"
    note(axes, judged.missing or judged.outcome, (loss, place), (0, 10), ha=side)
