"""Latency and throughput over batch sizes, and what the start costs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from heimdall_onnx.common.arrays import Floats
from heimdall_onnx.common.gates import unless_not_measured
from heimdall_onnx.common.text import count_of, number
from heimdall_onnx.evidence.latency.benchmark import BatchLatency, LatencyReport
from heimdall_onnx.report.plot.chart import Chart, Color, log_axis, new_figure, paired_bars, styled

_CALLS_FOR_RANGE = 40
_SIDES = (("PyTorch", Color.PYTORCH, "o", "-"), ("ONNX Runtime", Color.ONNX, "X", "--"))


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
    calls = ", ".join(f"{b.pytorch_ms.size} at batch {b.batch_size}" for b in report.batches)
    subtitle = (
        f"{count_of(report.threads, 'thread')} each · calls of each: {calls} · whiskers hold "
        f"95% of the calls, or all below {_CALLS_FOR_RANGE}"
    )
    figure = new_figure(title, subtitle, height=4.7)
    above, below = figure.subfigures(2, 1, height_ratios=[2.5, 1.6], squeeze=False)[:, 0]
    left, right = above.subplots(1, 2)
    _draw(left, report, lambda ms, size: ms, "ms a call")
    _draw(right, report, lambda ms, size: 1000 * size / ms, "samples a second")
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
    return float(np.median(batch.pytorch_ms)), float(np.median(batch.onnx_ms))


def _draw(
    axes: Axes, report: LatencyReport, value: Callable[[Floats, int], Floats], label: str
) -> None:
    sizes = [b.batch_size for b in report.batches]
    for side, (who, color, marker, line) in enumerate(_SIDES):
        calls = [value((b.pytorch_ms, b.onnx_ms)[side], b.batch_size) for b in report.batches]
        middle = np.array([np.median(c) for c in calls])
        low, high = (np.array([_end(c, p) for c in calls]) for p in (2.5, 97.5))
        axes.errorbar(
            sizes,
            middle,
            yerr=[middle - low, high - middle],
            color=color,
            marker=marker,
            ls=line,
            capsize=3,
            ms=6,
            label=who,
            gid=f"{who} {label}",
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
        (who, color, [contender.load_ms, contender.first_call_ms, contender.median_ms])
        for (who, color, *_), contender in zip(_SIDES, (report.pytorch, report.onnx), strict=True)
    ]
    paired_bars(axes, parts, pairs, lambda ms: f"{number(ms, 3)} ms")
    axes.set_xscale("log")
    axes.margins(x=0.15)
    log_axis(axes.xaxis)
    axes.set_xlabel(f"milliseconds, batch {report.batch_size} (loading: session creation for ONNX)")
