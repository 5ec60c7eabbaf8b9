"""How long a call takes at which batch size, and what the start costs."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from heimdall_onnx.common.arrays import Floats
from heimdall_onnx.common.text import count_of, number
from heimdall_onnx.common.verdict import unless_not_measured
from heimdall_onnx.evidence.latency.benchmark import BatchLatency, LatencyReport, PairLatency
from heimdall_onnx.evidence.latency.contenders import ContenderLatency
from heimdall_onnx.evidence.latency.statistics import Speedup
from heimdall_onnx.evidence.ratios import CONFIDENCE
from heimdall_onnx.report.plot.chart import (
    Chart,
    Color,
    draw_bars,
    log_axis,
    new_figure,
    note,
    styled,
)

# Fewer pairs than this give no distribution-free 95% interval of a median, only a range.
_PAIRS_FOR_INTERVAL = 6
_LOG_FROM = 3.0
_COLORS = (Color.PYTORCH, Color.ONNX)
_PAIR_COLORS = (Color.A, Color.B)
_MARKERS = ("o", "X")
_LINES = ("-", "--")
_HATCHES = ("", "////")


def _both(report: PairLatency) -> tuple[ContenderLatency, ContenderLatency]:
    """The sides in the order in which they are drawn."""
    if isinstance(report, LatencyReport):
        return report.pytorch, report.onnx
    return report.second, report.first


def _colors(report: PairLatency) -> tuple[str, str]:
    return _COLORS if isinstance(report, LatencyReport) else _PAIR_COLORS


@unless_not_measured
@styled
def latency(report: LatencyReport) -> Chart:
    """How much faster is the ONNX model, and how sure is that?

    Above, histograms of the call latencies on common bins; below, the percentiles that enough
    calls stand behind, with their intervals. The axis is logarithmic where the contenders, or
    the calls of one, differ by more than a factor of 3.
    """
    load = f"{report.machine.load_before:.1f} → {report.machine.load_after:.1f}"
    beside = f"{count_of(report.threads, 'thread')} each · load average {load}"
    return _draw_latency(report, _speed_answer("ONNX", report.speedup, report.batch_size), beside)


@unless_not_measured
@styled
def pair_latency(report: PairLatency) -> Chart:
    """Which of two models that took turns is faster, and how sure is that?

    As `latency`; the one in the denominator of the ratio comes first.
    """
    second, first = _both(report)
    title = _speed_answer(first.name, _inverse(report.speedup), report.batch_size, second.name)
    machine = report.machine
    beside = f"in turns · load average {machine.load_before:.1f} → {machine.load_after:.1f}"
    return _draw_latency(report, title, beside)


def _draw_latency(report: PairLatency, title: str, beside: str) -> Chart:
    counts = (f"{c.name} {count_of(c.samples_ms.size, 'call')}" for c in _both(report))
    subtitle = f"{', '.join(counts)} · batch {report.batch_size} · {beside}"
    rows = sorted({p.percentile for c in _both(report) for p in c.percentiles})
    figure = new_figure(title, subtitle, height=2.9 + 0.36 * max(len(rows), 1))
    above, below = figure.subplots(
        2, 1, sharex=True, height_ratios=[2.3, 0.36 * max(len(rows), 1) + 0.3]
    )
    _draw_histograms(above, report)
    _draw_percentiles(below, report, rows)
    below.set_xlabel(f"milliseconds per call (whiskers: {CONFIDENCE:.0%} intervals)")
    return Chart(figure, title, _latency_alt(report))


def _speed_answer(who: str, found: Speedup, batch_size: int, other: str = "") -> str:
    """How many times as fast ``who`` is, as ``other`` if that is not said by the figure."""
    batch = f"at batch {batch_size}"
    if not math.isfinite(found.ratio):
        return f"The speedup {batch} can't be told"
    if found.low <= 1 <= found.high:
        beside = f" as {other}" if other else ""
        return (
            f"No clear difference in speed {batch}: {who} {_ratio(found.ratio)}× as fast"
            f"{beside} ({_interval(found)})"
        )
    slower = found.ratio < 1
    shown = _inverse(found) if slower else found
    beside = f" than {other}" if other else ""
    return (
        f"{who} is {_ratio(shown.ratio)}× {'slower' if slower else 'faster'}{beside} {batch} "
        f"({_interval(shown)})"
    )


def _inverse(found: Speedup) -> Speedup:
    return Speedup(1 / found.ratio, 1 / found.high, 1 / found.low, found.pairs)


def _interval(found: Speedup) -> str:
    ends = f"{_ratio(found.low)} to {_ratio(found.high)}"
    if _ratio(found.low) == _ratio(found.high):
        ends = f"{found.low:.2f} to {found.high:.2f}"
    if found.pairs < _PAIRS_FOR_INTERVAL:
        return f"{ends} over {count_of(found.pairs, 'pair')} of blocks, too few for an interval"
    return f"{CONFIDENCE:.0%} interval {ends}"


def _ratio(ratio: float) -> str:
    # Near 1 the second place decides between faster and slower.
    return f"{ratio:.2f}" if ratio < 2 else f"{ratio:.1f}" if ratio < 100 else number(ratio)


def _use_log_axis(report: PairLatency) -> bool:
    medians = [c.median_ms for c in _both(report)]
    samples = np.concatenate([c.samples_ms for c in _both(report)])
    return bool(
        max(medians) > _LOG_FROM * min(medians)
        or samples.max() > 2 * _LOG_FROM * np.median(samples)
    )


def _draw_histograms(axes: Axes, report: PairLatency) -> None:
    samples = np.concatenate([c.samples_ms for c in _both(report)])
    low, high = float(samples.min()), float(samples.max())
    low, high = (low * 0.97, high * 1.03) if high > low else (0.9 * low, 1.1 * high)
    log = _use_log_axis(report)
    bins = np.geomspace(low, high, 61) if log else np.linspace(low, high, 61)
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value, 3)))
    for index, contender in enumerate(_both(report)):
        counts, _ = np.histogram(contender.samples_ms, bins)
        axes.stairs(
            # An empty bin is left out: the outline must not run along the axis.
            np.where(counts > 0, counts, np.nan),
            bins,
            fill=True,
            facecolor=f"{_colors(report)[index]}44",
            edgecolor=_colors(report)[index],
            linestyle=_LINES[index],
            hatch=_HATCHES[index],
            linewidth=1.4,
            label=contender.name,
            gid=contender.name,
        )
    axes.set(ylabel="calls", ylim=(0, None))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.legend()


def _draw_percentiles(axes: Axes, report: PairLatency, rows: list[float]) -> None:
    for index, contender in enumerate(_both(report)):
        for row, percentile in enumerate(rows):
            found = contender.percentile(percentile)
            if found is None:
                continue
            axes.errorbar(
                found.value_ms,
                row + (-0.17, 0.17)[index],
                xerr=[
                    [max(found.value_ms - found.low_ms, 0.0)],
                    [max(found.high_ms - found.value_ms, 0.0)],
                ],
                color=_colors(report)[index],
                marker=_MARKERS[index],
                gid=f"{contender.name} p{percentile:g}",
            )
    axes.set_yticks(range(len(rows)), [f"p{p:g}" for p in rows])
    axes.set_ylim(max(len(rows), 1) - 0.45, -0.55)
    if not rows:
        said, middle = "too few calls for percentiles", (0.5, 0.5)
        note(axes, said, middle, (0, 0), xycoords="axes fraction", ha="center", va="center")


def _latency_alt(report: PairLatency) -> str:
    parts = []
    for contender in _both(report):
        percentiles = ", ".join(
            f"p{p.percentile:g} {number(p.value_ms, 3)} ms ({number(p.low_ms, 3)} to "
            f"{number(p.high_ms, 3)})"
            for p in contender.percentiles
        )
        parts.append(
            f"{contender.name}: {contender.samples_ms.size} calls, mean "
            f"{number(contender.mean_ms, 3)} ms" + (f", {percentiles}." if percentiles else ".")
        )
    return " ".join(parts)


_CALLS_FOR_RANGE = 40


@unless_not_measured
@styled
def throughput(report: LatencyReport) -> Chart:
    """Which batch size gives how many samples a second, and what do start and first call cost?

    Medians, with the range that holds 95% of the calls; at the batch size that the speedup is
    given for there are many calls, at the others only a few, and the range is all of them.
    """
    rates = [tuple(1000 * b.batch_size / m for m in _medians(b)) for b in report.batches]
    best = [max(range(len(rates)), key=lambda i: rates[i][side]) for side in (0, 1)]
    title = "; ".join(
        f"{who} does best at batch {report.batches[i].batch_size}, "
        f"{number(rates[i][side], 3)} samples/s"
        for side, (who, i) in enumerate(zip(("PyTorch", "ONNX"), best, strict=True))
    )
    calls = ", ".join(f"{b.samples_ms[0].size} at batch {b.batch_size}" for b in report.batches)
    subtitle = (
        f"{count_of(report.threads, 'thread')} each · calls of each: {calls} · whiskers hold "
        f"95% of the calls, or all below {_CALLS_FOR_RANGE}"
    )
    figure = new_figure(title, subtitle, height=4.7)
    above, below = figure.subfigures(2, 1, height_ratios=[2.5, 1.6], squeeze=False)[:, 0]
    left, right = above.subplots(1, 2)
    _draw_batches(left, report, lambda ms, size: ms, "ms a call")
    _draw_batches(right, report, lambda ms, size: 1000 * size / ms, "samples a second")
    right.set_ylim(bottom=0)
    left.set_yscale("log")
    left.margins(y=0.25)
    log_axis(left.yaxis)
    left.legend(loc="upper left")
    _draw_start(below.subplots(), report)
    alt = " ".join(
        f"Batch {b.batch_size}: PyTorch {number(_medians(b)[0], 3)} ms, ONNX "
        f"{number(_medians(b)[1], 3)} ms, speedup {number(_medians(b)[0] / _medians(b)[1], 3)}."
        for b in report.batches
    )
    for contender in (report.pytorch, report.onnx):
        alt += (
            f" {contender.name}: loading {number(contender.load_ms)} ms, first call "
            f"{number(contender.first_call_ms)} ms."
        )
    return Chart(figure, title, alt)


def _medians(batch: BatchLatency) -> tuple[float, float]:
    first, second = batch.samples_ms
    return float(np.median(first)), float(np.median(second))


def _draw_batches(
    axes: Axes, report: LatencyReport, value: Callable[[Floats, int], Floats], label: str
) -> None:
    sizes = [b.batch_size for b in report.batches]
    for side, contender in enumerate(_both(report)):
        calls = [value(b.samples_ms[side], b.batch_size) for b in report.batches]
        middle = np.array([np.median(c) for c in calls])
        low, high = (np.array([_end(c, p) for c in calls]) for p in (2.5, 97.5))
        axes.errorbar(
            sizes,
            middle,
            yerr=[middle - low, high - middle],
            color=_COLORS[side],
            marker=_MARKERS[side],
            ls=_LINES[side],
            label=contender.name,
            gid=f"{contender.name} {label}",
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("samples in a call (batch size)")
    axes.set_title(label)


def _end(calls: Floats, percentile: float) -> float:
    """An end of the range that holds 95% of the calls, or of all where that leaves none out."""
    if calls.size < _CALLS_FOR_RANGE:
        return float(calls.min() if percentile < 50 else calls.max())
    return float(np.percentile(calls, percentile))


def _draw_start(axes: Axes, report: LatencyReport) -> None:
    parts = ("loading", "first call", "typical call")
    pairs = [
        (one.name, color, [one.load_ms, one.first_call_ms, one.median_ms])
        for one, color in zip(_both(report), _COLORS, strict=True)
    ]
    draw_bars(axes, parts, pairs, lambda ms: f"{number(ms, 3)} ms")
    axes.set_xscale("log")
    axes.margins(x=0.15)
    log_axis(axes.xaxis)
    axes.set_xlabel(f"milliseconds, batch {report.batch_size} (loading: session creation for ONNX)")
