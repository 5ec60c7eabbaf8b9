"""Where the time of a call goes, by operator, in one variant or in two."""

from __future__ import annotations

import re
from collections.abc import Sequence

from heimdall_onnx.common.gates import unless_not_measured
from heimdall_onnx.common.text import count_of, name, number, share
from heimdall_onnx.evidence.variants.operators import OperatorTimes
from heimdall_onnx.report.plot.chart import Chart, Color, new_figure, paired_bars, plain, styled

_SHOWN = 9
_BETWEEN = "between nodes"
# What ONNX Runtime calls an operator that it has quantized or fused with its neighbours:
# QLinearConv, QGemm, MatMulIntegerToFloat, DynamicQuantizeMatMul, MatMulNBits, NhwcFusedConv.
_BEFORE = re.compile(r"^(Nhwc|Fused|Bias|QLinear|Q(?=[A-Z])|DynamicQuantize(?!Linear))+")
_BEHIND = re.compile(r"(?<=[a-z])(Integer|ToFloat|NBits)+$")


@unless_not_measured
@styled
def operator_times(measured: Sequence[tuple[str, OperatorTimes]] | None) -> Chart | None:
    """Which operators take the time of a call, and what does the other variant do about it?

    Args:
        measured: Name and times of one variant, or of two to be held against each other. More
            than the first two are not drawn; None comes of none.
    """
    if not measured:
        return None
    shown = [(name(label), times) for label, times in measured[:2]]
    title = "; ".join(_answer(label, times) for label, times in shown)
    first = shown[0][1]
    slowest = [(label, t.slowest[0]) for label, t in shown if t.slowest]
    subtitle = (
        f"ONNX Runtime's profiler, medians of {count_of(first.calls, 'call')} each · slowest node: "
        + "; ".join(
            f"{label} {name(node.name)} ({node.operator}), {number(node.ms)} ms"
            for label, node in slowest
        )
    )
    rows, values = _rows([times for _, times in shown])
    figure = new_figure(
        title, subtitle, height=0.8 + (0.36 if len(shown) > 1 else 0.25) * len(rows)
    )
    axes = figure.subplots()
    if len(shown) > 1:
        pairs = [
            (plain(f"{label}, {number(times.total_ms)} ms"), color, ms)
            for (label, times), color, ms in zip(
                shown, (Color.QUIET, Color.ONNX), values, strict=True
            )
        ]
        paired_bars(axes, rows, pairs, _ms)
        axes.legend(loc="lower right")
    else:
        places = range(len(rows))
        bars = axes.barh(places, values[0], height=0.7, color=f"{Color.ONNX}66", gid="bars")
        axes.bar_label(bars, [_ms(ms) for ms in values[0]], padding=3, fontsize=9)
        axes.set_yticks(places, rows)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
    axes.margins(x=0.1)
    axes.set_xlabel("milliseconds a call")
    alt = " ".join(
        f"{label}: {number(times.total_ms, 3)} ms a call; "
        + ", ".join(f"{row} {number(ms, 3)} ms" for row, ms in zip(rows, side, strict=True) if ms)
        + "."
        for (label, times), side in zip(shown, values, strict=True)
    )
    return Chart(figure, title, alt)


def _answer(label: str, times: OperatorTimes) -> str:
    head = f"{label}: {number(times.total_ms)} ms a call"
    if not times.operators:
        return head
    most = times.operators[0]
    return f"{head}, {share(most.share)} of it in {count_of(most.nodes, f'{most.name} node')}"


def _rows(sides: Sequence[OperatorTimes]) -> tuple[list[str], list[list[float]]]:
    """Names of the bars, and their milliseconds on each side.

    Operators that compute the same share a row, float beside quantized; the short ones share the
    last but one.
    """
    groups: dict[str, dict[str, None]] = {}
    for operator in (operator.name for side in sides for operator in side.operators):
        groups.setdefault(_kind(operator), {})[operator] = None
    times = {
        kind: [sum(o.ms for o in side.operators if o.name in members) for side in sides]
        for kind, members in groups.items()
    }
    order = sorted(groups, key=lambda kind: -max(times[kind]))
    kept, rest = order[:_SHOWN], order[_SHOWN:]
    found = [(plain(name(", ".join(groups[kind]), 40)), times[kind]) for kind in kept]
    if rest:
        others = [sum(times[kind][side] for kind in rest) for side in range(len(sides))]
        found.append((count_of(sum(len(groups[kind]) for kind in rest), "other operator"), others))
    found.append((_BETWEEN, [side.between_ms for side in sides]))
    return [row for row, _ in found], [
        list(side) for side in zip(*(ms for _, ms in found), strict=True)
    ]


def _kind(operator: str) -> str:
    return _BEHIND.sub("", _BEFORE.sub("", operator))


def _ms(milliseconds: float) -> str:
    return number(milliseconds) if milliseconds else "–"
