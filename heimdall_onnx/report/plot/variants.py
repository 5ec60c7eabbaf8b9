"""Which variant is fast enough and faithful enough, and where each loses accuracy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from heimdall_onnx.common.parameters import FP32
from heimdall_onnx.common.text import distance, number
from heimdall_onnx.common.verdict import unless_not_measured
from heimdall_onnx.evidence.variants.search import JudgedVariant, VariantsReport
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

_LEAST = 1e-7
_TICKS = 26
_CLOSE = 2.0  # latencies of less than this ratio, whose names would run into each other
_STYLES = ("-", "--", "-.", ":")
_COLORS = (Color.PYTORCH, Color.ONNX, *Color.ELEMENTS, Color.INK)


@unless_not_measured
@styled
def variants(report: VariantsReport | None) -> Chart | None:
    """Which variant is the fastest of those that are faithful enough?

    Latency from the paired ratio with fp32, with its interval, against what the variant costs in
    accuracy; down and to the left is better. None where no variants were asked for.
    """
    if report is None:
        return None
    shown = [v for v in report.judged if v.latency is not None]
    ratio = report.against_pytorch.speedup
    title = (
        f"{report.recommended} is recommended: {number(ratio.ratio, 3)}× PyTorch "
        f"({number(ratio.low, 3)} to {number(ratio.high, 3)})"
    )
    cost, unit = _cost_of(report)
    subtitle = (
        f"{len(shown)} variants measured, {sum(v.passed for v in shown)} passed · hollow: a gate "
        "failed · whiskers: 95% interval of the ratio with fp32 · dotted: the best trade-offs"
    )
    figure = new_figure(title, subtitle, height=4.4)
    axes = figure.subplots()
    points = [_point(report, variant) for variant in shown]
    _scatter(axes, shown, points, report.recommended)
    axes.set(
        xlabel=f"ms a call at batch {report.against_pytorch.batch_size}",
        ylabel=f"{cost}{unit}",
        xscale="log",
        yscale="log",
    )
    axes.margins(x=0.16, y=0.14)
    log_axis(axes.xaxis)
    log_axis(axes.yaxis)
    alt = "; ".join(
        f"{v.name} {'passed' if v.passed else 'failed'}: {number(p[0], 3)} ms, {cost} "
        f"{distance(p[1]) if unit else number(p[1])}, {v.size_bytes / 1e6:,.0f} MB"
        for v, p in zip(shown, points, strict=True)
    )
    return Chart(figure, title, alt + ".")


def _cost_of(report: VariantsReport) -> tuple[str, str]:
    known = (v.accuracy for v in report.judged if v.accuracy is not None)
    if any(accuracy.displacement_p99_m is not None for accuracy in known):
        return "p99 of the displacement", ", m"
    return "largest relative error of an output", ""


def _point(report: VariantsReport, variant: JudgedVariant) -> tuple[float, float, float, float]:
    """Latency in ms, cost, and the ends of the latency's interval."""
    base = report.variant(FP32).latency
    assert base is not None
    assert variant.latency is not None
    fp32_ms, ratio = base.second.median_ms, variant.latency.speedup
    if variant.name == FP32:
        return fp32_ms, _LEAST, fp32_ms, fp32_ms
    accuracy = variant.accuracy
    cost = 0.0
    if accuracy is not None:
        moved = accuracy.displacement_p99_m
        cost = max(accuracy.noise) if moved is None else moved
    return fp32_ms / ratio.ratio, max(cost, _LEAST), fp32_ms / ratio.high, fp32_ms / ratio.low


def _scatter(
    axes: Axes,
    shown: Sequence[JudgedVariant],
    points: Sequence[tuple[float, float, float, float]],
    recommended: str,
) -> None:
    # What changes nothing is drawn a little below what changes least.
    costs = [cost for _, cost, _, _ in points if cost > _LEAST]
    floor = min(costs, default=1.0) / 10
    named: list[tuple[float, float]] = []
    for variant, (ms, cost, low, high) in zip(shown, points, strict=True):
        best = variant.name == recommended
        height = max(cost, floor)
        axes.errorbar(
            ms, height, xerr=[[max(ms - low, 0)], [max(high - ms, 0)]], color=Color.QUIET, lw=1
        )
        marker, size, color = ("*", 15, Color.ONNX) if best else ("o", 8, Color.PYTORCH)
        inside, gid = color if variant.passed else "white", f"variant {variant.name}"
        axes.plot(ms, height, marker, ms=size, color=color, mfc=inside, gid=gid)
        # One above the other, where points lie too close for their names.
        below = sum(max(ms, x) < _CLOSE * min(ms, x) and y == height for x, y in named)
        named.append((ms, height))
        text = variant.name + (" (changes nothing)" if cost <= _LEAST else "")
        weight = "bold" if best else "normal"
        note(axes, text, (ms, height), (0, 9 + 12 * below), ha="center", weight=weight)
    best_trades = front(
        [
            (ms, max(cost, floor))
            for v, (ms, cost, _, _) in zip(shown, points, strict=True)
            if v.passed
        ]
    )
    axes.plot(*zip(*best_trades, strict=True), linestyle=":", color=Color.QUIET, lw=1.2, zorder=0)


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that none other beats in both respects, by latency."""
    found: list[tuple[float, float]] = []
    for ms, cost in sorted(points):
        if not found or cost < found[-1][1]:
            found.append((ms, cost))
    return found


@unless_not_measured
@styled
def noise_along_depth(report: VariantsReport | None) -> Chart | None:
    """Where does each lossy variant lose accuracy, and what was kept in float for that?

    Relative error of the value that leaves each group of nodes, before anything is kept in float.
    None where no lossy variant was made.
    """
    if report is None:
        return None
    shown = [v for v in report.judged if v.noise is not None and v.noise.groups]
    if not shown:
        return None
    worst = max(
        ((v, g) for v in shown if v.noise is not None for g in v.noise.groups),
        key=lambda pair: pair[1].added if np.isfinite(pair[1].added) else 0.0,
    )
    title = (
        f"{worst[0].name} loses most in {worst[1].scope}: relative error "
        f"{number(worst[1].entering)} before it, {number(worst[1].noise)} after"
    )
    scopes = list(dict.fromkeys(g.scope for v in shown if v.noise for g in v.noise.groups))
    subtitle = "Relative error (RMS) of what leaves each module, with all of it quantized"
    if any(v.kept_in_float for v in shown):
        subtitle += " · rings: kept in float in the end"
    figure = new_figure(title, subtitle, height=4.9)
    axes = figure.subplots()
    drawn = False
    for index, variant in enumerate(shown):
        drawn = _draw_noise(axes, variant, scopes, index) or drawn
    if drawn:
        axes.set_yscale("log")
        log_axis(axes.yaxis)
        step = -(-len(scopes) // _TICKS)
        axes.set_xticks(
            range(0, len(scopes), step), map(plain, scopes[::step]), rotation=60, ha="right"
        )
        axes.set_ylabel("relative error")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    else:
        say(axes, "no variant has an error inside the network")
    alt = "; ".join(
        f"{v.name}: most in {', '.join(g.scope for g in v.noise.most_sensitive(3))}; kept in "
        f"float: {', '.join(v.kept_in_float) or 'nothing'}"
        for v in shown
        if v.noise is not None
    )
    return Chart(figure, title, alt + ".")


def _draw_noise(axes: Axes, variant: JudgedVariant, scopes: list[str], index: int) -> bool:
    assert variant.noise is not None
    places = [scopes.index(group.scope) for group in variant.noise.groups]
    values = np.array([group.noise for group in variant.noise.groups])
    visible = np.isfinite(values) & (values > _LEAST)
    if not visible.any():
        return False
    color = _COLORS[index % len(_COLORS)]
    axes.plot(
        places,
        np.where(visible, values, np.nan),
        color=color,
        linestyle=_STYLES[index % len(_STYLES)],
        marker=".",
        label=variant.name,
        gid=f"noise {variant.name}",
    )
    kept = [
        (place, value)
        for place, value, group in zip(places, values, variant.noise.groups, strict=True)
        if group.scope in variant.kept_in_float and np.isfinite(value) and value > _LEAST
    ]
    if kept:
        axes.plot(*zip(*kept, strict=True), "o", ms=9, mfc="none", color=color)
    return True
