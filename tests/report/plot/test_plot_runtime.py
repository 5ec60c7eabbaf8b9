"""The figure of operators says what was measured, and draws it where it belongs."""

from __future__ import annotations

import io

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from heimdall_onnx.evidence.variants.operators import NodeTime, OperatorTime, OperatorTimes
from heimdall_onnx.report.plot.chart import Chart
from heimdall_onnx.report.plot.runtime import operator_times


def times(total: float, between: float, *operators: tuple[str, int, float]) -> OperatorTimes:
    return OperatorTimes(
        total_ms=total,
        operators=tuple(OperatorTime(name, nodes, ms, ms / total) for name, nodes, ms in operators),
        slowest=(NodeTime("node_7", operators[0][0], operators[0][2] / 2),),
        between_ms=between,
        calls=20,
    )


FLOAT = times(20.0, 1.0, ("MatMul", 36, 14.0), ("FusedConv", 4, 4.0), ("BiasGelu", 18, 1.0))
QUANTIZED = times(
    12.0,
    1.5,
    ("MatMulIntegerToFloat", 30, 5.0),
    ("MatMul", 6, 1.0),
    ("QLinearConv", 4, 2.0),
    ("DynamicQuantizeLinear", 30, 1.5),
    ("Gelu", 18, 1.0),
)


def artists(figure: Figure, gid: str) -> list:
    return figure.findobj(lambda artist: artist.get_gid() == gid)


def bars(chart: Chart) -> dict[str, dict[str, float]]:
    """Length of every bar, by what it is labelled with and by row."""
    (axes,) = chart.figure.axes
    rows = [label.get_text() for label in axes.get_yticklabels()]
    found = (c for c in axes.containers if isinstance(c, BarContainer))
    return {
        c.get_label(): dict(zip(rows, (bar.get_width() for bar in c), strict=True)) for c in found
    }


@pytest.mark.parametrize(
    "chart",
    [
        operator_times([("fp32", FLOAT)]),
        operator_times([("fp32", FLOAT), ("int8-dynamic", QUANTIZED)]),
    ],
    ids=["one", "two"],
)
def test_charts_are_legible_and_titled_with_their_answer(chart) -> None:
    png = chart.to_png()
    image = Image.open(io.BytesIO(png))
    image.load()
    assert image.size[0] == 880
    assert len(png) < 160_000
    shown = artists(chart.figure, "title")[0].get_text()
    assert shown.replace("\n", " ").replace("\N{NO-BREAK SPACE}", " ") == chart.title
    canvas = FigureCanvasAgg(chart.figure)
    chart.figure.draw_without_rendering()
    width, height = chart.figure.bbox.size
    (axes,) = chart.figure.axes
    tick_labels = [*axes.get_xticklabels(), *axes.get_yticklabels()]
    for text in chart.figure.findobj(Text):
        if not text.get_text().strip() or not text.get_visible() or text in tick_labels:
            continue
        assert text.get_fontsize() >= 9
        box = text.get_window_extent(canvas.get_renderer())
        assert -1 <= box.x0 <= box.x1 <= width + 1, text
        assert -1 <= box.y0 <= box.y1 <= height + 1, text


def test_names_from_outside_can_not_break_the_figures() -> None:
    odd = "$\\bad{ line\nbreak " + "x" * 90
    for chart in (
        operator_times([(odd, FLOAT), ("$", times(3.0, 0.1, ("$\\frac{", 1, 2.0)))]),
        operator_times([(odd, times(3.0, 0.1, ("$\\frac{$", 1, 2.0)))]),
    ):
        assert chart.to_png()


def test_operators_are_titled_with_what_takes_the_time() -> None:
    chart = operator_times([("fp32", FLOAT), ("int8-dynamic", QUANTIZED)])
    assert chart.title == (
        "fp32: 20 ms a call, 70% of it in 36 MatMul nodes; "
        "int8-dynamic: 12 ms a call, 41.7% of it in 30 MatMulIntegerToFloat nodes"
    )
    assert "slowest node: fp32 node_7 (MatMul), 7 ms" in " ".join(
        artists(chart.figure, "subtitle")[0].get_text().replace("\N{NO-BREAK SPACE}", " ").split()
    )


def test_quantized_and_fused_operators_stand_beside_what_they_compute() -> None:
    found = bars(operator_times([("fp32", FLOAT), ("int8-dynamic", QUANTIZED)]))
    assert found == {
        "fp32, 20 ms": {
            "MatMul, MatMulIntegerToFloat": 14.0,
            "FusedConv, QLinearConv": 4.0,
            "DynamicQuantizeLinear": 0.0,
            "BiasGelu, Gelu": 1.0,
            "between nodes": 1.0,
        },
        "int8-dynamic, 12 ms": {
            "MatMul, MatMulIntegerToFloat": 6.0,
            "FusedConv, QLinearConv": 2.0,
            "DynamicQuantizeLinear": 1.5,
            "BiasGelu, Gelu": 1.0,
            "between nodes": 1.5,
        },
    }


def test_one_variant_alone_is_drawn_by_operator() -> None:
    chart = operator_times([("fp32", FLOAT)])
    (found,) = bars(chart).values()
    assert found == {"MatMul": 14.0, "FusedConv": 4.0, "BiasGelu": 1.0, "between nodes": 1.0}
    assert "MatMul 14 ms" in chart.alt
    assert operator_times([]) is None


def test_short_operators_share_a_bar() -> None:
    many = times(30.0, 0.0, *((f"Op{chr(65 + i)}", 1, 12.0 - i) for i in range(12)))
    (found,) = bars(operator_times([("fp32", many)])).values()
    assert len(found) == 11
    assert found["3 other operators"] == 3.0 + 2.0 + 1.0
