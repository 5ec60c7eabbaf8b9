"""Where the time and the memory of the release itself went."""

from __future__ import annotations

from collections.abc import Sequence

from heimdall_onnx.common.text import number, share
from heimdall_onnx.common.verdict import NotMeasured
from heimdall_onnx.evidence.costs import StepCost
from heimdall_onnx.evidence.latency.benchmark import LatencyReport
from heimdall_onnx.report.plot.chart import Chart, Color, draw_bars, new_figure, note, styled

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
    steps = [c.step for c in costs]
    draw_bars(left, steps, [("seconds", Color.ELEMENTS[0], [c.seconds for c in costs])], number)
    right.barh(
        range(len(steps)),
        [*peaks.values()],
        height=0.76,
        color=f"{Color.QUIET}66",
        label="notebook",
    )
    if beside and _LATENCY in peaks:
        start, row = peaks[_LATENCY], list(peaks).index(_LATENCY)
        colors, hatches = (Color.PYTORCH, Color.ONNX), ("", "////")
        for side, amount, color, hatch in zip(sides, beside, colors, hatches, strict=True):
            right.barh(
                row,
                amount,
                left=start,
                height=0.76,
                facecolor=f"{color}66",
                edgecolor=color,
                hatch=hatch,
                label=side.name,
                gid=side.name,
            )
            start += amount
    for row, amount in enumerate(together.values()):
        note(right, number(amount), (amount, row), (4, 0), va="center_baseline")
    left.set_xlabel("seconds")
    right.set_xlabel("largest memory (GB)")
    for axes in (left, right):
        axes.margins(x=0.16)
        axes.grid(visible=False, axis="y")
    right.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=3, handlelength=1.2)
    alt = " ".join(
        f"{c.step}: {number(c.seconds, 3)} s, {number(together[c.step], 3)} GB." for c in costs
    )
    return Chart(figure, title, alt)
