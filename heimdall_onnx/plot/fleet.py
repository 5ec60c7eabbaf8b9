"""Which of many released models are worth their cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from heimdall_onnx.plot.chart import (
    ONNX_COLOR,
    PYTORCH_COLOR,
    QUIET_INK,
    Chart,
    count_of,
    fitting_log_axis,
    name,
    new_figure,
    number,
    styled,
)
from heimdall_onnx.plot.variants import front

if TYPE_CHECKING:
    import pandas as pd

_NAMED = 8


@styled
def pareto(
    frame: pd.DataFrame, column: str, words: str, cost: str, cost_words: str
) -> Chart | None:
    """Which models does no other one beat in both error and cost?

    Down and to the left is better. None where no item has both figures.

    Args:
        frame: Released items, a row each, with their ``label``.
        column: The column of the error.
        words: What it is, with its unit.
        cost: The column of what an answer costs.
        cost_words: What that is, with its unit.
    """
    if not column or column not in frame or cost not in frame:
        return None
    shown = frame[(frame[column] > 0) & (frame[cost] > 0)]
    if shown.empty:
        return None
    points = [*zip(shown[cost], shown[column], shown.label, strict=True)]
    best = front([(x, y) for x, y, _ in points])
    labels = {(x, y): label for x, y, label in reversed(points)}
    lowest = min(points, key=lambda point: point[1])
    title = f"{count_of(len(best), 'model')} of {len(points)} that no other beats"
    figure = new_figure(
        title,
        f"lowest error: {name(lowest[2], 60)} · dotted: the best trade-offs",
        height=4.4,
    )
    axes = figure.subplots()
    axes.plot(
        shown[cost], shown[column], "o", color=PYTORCH_COLOR, alpha=0.6, markersize=5, gid="items"
    )
    axes.plot(*zip(*best, strict=True), "o:", color=ONNX_COLOR, markersize=8, lw=1.2, gid="front")
    for x, y in best[:_NAMED]:
        axes.annotate(
            name(labels[x, y]),
            (x, y),
            xytext=(6, 6),
            textcoords="offset points",
            fontsize=9,
            color=QUIET_INK,
        )
    axes.set(xlabel=cost_words, ylabel=words, xscale="log", yscale="log")
    axes.margins(x=0.16, y=0.14)
    fitting_log_axis(axes.xaxis)
    fitting_log_axis(axes.yaxis)
    alt = "; ".join(
        f"{labels[x, y]}: {words} {number(y, 4)} at {cost_words} {number(x, 4)}" for x, y in best
    )
    return Chart(figure, title, alt)
