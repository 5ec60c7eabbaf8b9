"""Which of many released models are worth their cost."""

from __future__ import annotations

import pandas as pd
from matplotlib.ticker import FuncFormatter, MaxNLocator

from heimdall_onnx.common.text import count_of, metre_scale, name, number
from heimdall_onnx.report.plot.chart import Chart, Color, log_axis, new_figure, note, styled
from heimdall_onnx.report.plot.variants import front

_NAMED = 20
# From so many times the least value on an axis is logarithmic.
_FEW = 5.0
_DIGITS = 4


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
    shown = frame[frame[column].notna() & frame[cost].notna()]
    if shown.empty:
        return None
    errors = shown[column]
    if column.endswith("_m"):
        factor, unit = metre_scale(errors.max())
        errors, words = errors / factor, f"{words.removesuffix(', m')}, {unit}"
    points = [*zip(shown[cost], errors, shown.label, strict=True)]
    best = front([(x, y) for x, y, _ in points])
    labels = {(x, y): label for x, y, label in reversed(points)}
    lowest, cheapest = (name(labels[best[at]], 60) for at in (-1, 0))
    title = f"{len(best):,} of {count_of(len(points), 'model')} are beaten by no other in both"
    if len(best) == 1:
        title = f"One model beats the others in both: {lowest}"
    figure = new_figure(
        title,
        f"lowest error: {lowest} · least cost: {cheapest} · numbers: items on the dotted line of "
        "the best trade-offs",
        height=4.4,
    )
    axes = figure.subplots()
    axes.plot(shown[cost], errors, "o", color=Color.PYTORCH, alpha=0.6, markersize=5, gid="items")
    axes.plot(*zip(*best, strict=True), "o:", color=Color.ONNX, markersize=8, lw=1.2, gid="front")
    axes.set(xlabel=cost_words, ylabel=words)
    axes.margins(x=0.16, y=0.14)
    if _wide(shown[cost]):
        axes.set_xscale("log")
    if _wide(errors):
        axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            log_axis(axis)
            continue
        # Two ticks beside each other must not read alike.
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(FuncFormatter(lambda value, _: number(value, _DIGITS)))
    for x, y in best[:_NAMED]:
        note(axes, labels[x, y].split(":")[0].removesuffix(" (smoke)"), (x, y), (6, 6), size=10)
    alt = "; ".join(
        f"{labels[x, y]}: {words} {number(y, 4)} at {cost_words} {number(x, 4)}" for x, y in best
    )
    return Chart(figure, title, alt)


def _wide(values: pd.Series[float]) -> bool:
    """Whether values need a logarithmic axis; a zero has no place there."""
    return bool(0 < _FEW * values.min() < values.max())
