"""Where the time and the memory of the release itself went."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from heimdall_onnx.common.text import number, share
from heimdall_onnx.common.verdict import NotMeasured
from heimdall_onnx.evidence.costs import StepCost
from heimdall_onnx.evidence.latency.benchmark import LatencyReport
from heimdall_onnx.report.plot.chart import Chart, Color, new_figure, note, styled

_LATENCY = "latency"


@styled
def release_cost(costs: Sequence[StepCost], latency: LatencyReport | NotMeasured) -> Chart | None:
    """Which step took how long, and how much memory was needed?

    Memory is the largest resident size of the notebook's process during the step; beside the
    latency measurement stand the processes of both contenders, which is what inference takes.
    None where nothing was measured, as outside a notebook.
    """
    if not any(cost.seconds for cost in costs):
        return None
    total = sum(cost.seconds for cost in costs)
    longest = max(costs, key=lambda cost: cost.seconds)
    peaks = {c.step: (c.peak_memory_bytes or 0) / 1e9 for c in costs}
    sides = () if isinstance(latency, NotMeasured) else (latency.pytorch, latency.onnx)
    beside = [c.peak_memory_bytes / 1e9 for c in sides]
    together = {s: p + (sum(beside) if s == _LATENCY else 0.0) for s, p in peaks.items()}
    most = max(together, key=lambda step: together[step])
    title = (
        f"{number(total)} s until here, {share(longest.seconds / total)} of it {longest.step}; "
        f"most memory in {most}: {number(together[most])} GB"
    )
    subtitle = "By step, in this order · memory of this process" + (
        f", and beside latency of both contenders' own: PyTorch {number(beside[0])} GB, "
        f"ONNX Runtime {number(beside[1])} GB"
        if beside
        else "; latency was not measured"
    )
    figure = new_figure(title, subtitle, height=0.8 + 0.27 * len(costs))
    left, right = figure.subplots(1, 2, sharey=True)
    rows = np.arange(len(costs))
    seconds = left.barh(
        rows, [c.seconds for c in costs], height=0.7, color=f"{Color.ELEMENTS[0]}88", gid="seconds"
    )
    left.bar_label(seconds, [number(c.seconds) for c in costs], padding=3, fontsize=9)
    right.barh(rows, list(peaks.values()), height=0.7, color=f"{Color.QUIET}66", label="notebook")
    if beside and _LATENCY in peaks:
        start, row = peaks[_LATENCY], list(peaks).index(_LATENCY)
        for amount, color, hatch, who in zip(
            beside,
            (Color.PYTORCH, Color.ONNX),
            ("", "////"),
            ("PyTorch", "ONNX Runtime"),
            strict=True,
        ):
            right.barh(
                row,
                amount,
                left=start,
                height=0.7,
                facecolor=f"{color}66",
                edgecolor=color,
                hatch=hatch,
                label=who,
                gid=who,
            )
            start += amount
    for row, amount in enumerate(together.values()):
        note(right, number(amount), (amount, row), (4, 0), va="center_baseline")
    left.set_yticks(rows, [c.step for c in costs])
    left.set(ylim=(len(costs) - 0.5, -0.5), xlabel="seconds")
    right.set_xlabel("largest memory (GB)")
    for axes in (left, right):
        axes.margins(x=0.16)
        axes.grid(visible=False, axis="y")
    right.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=3, handlelength=1.2)
    alt = " ".join(
        f"{c.step}: {number(c.seconds, 3)} s, {number(together[c.step], 3)} GB." for c in costs
    )
    return Chart(figure, title, alt)
