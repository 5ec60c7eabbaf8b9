"""The figures of floors and of operators say what was measured, and draw it where it belongs."""

from __future__ import annotations

import io
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from heimdall_onnx.evidence.variants.operators import NodeTime, OperatorTime, OperatorTimes
from heimdall_onnx.evidence.variants.roofline import Machine, Roofline, RooflineRow, Work, floor_of
from heimdall_onnx.report import tables
from heimdall_onnx.report.plot.chart import Chart
from heimdall_onnx.report.plot.operators import operator_times
from heimdall_onnx.report.plot.roofline import roofline

MACHINE = Machine(2, 20.0, {"f32": 100.0, "int8": 400.0}, 32_000_000, ("avx2", "fma"))
WORK = Work(1e9, 25_000_000)
FP32 = ("fp32", "f32", 100_000_000, 1, 25.0)
INT8 = ("int8-minmax", "int8", 25_000_000, 1, 10.0)
CUDA = ("fp16-cuda", "f16", 50_000_000, 1, 3.0)


def report(
    *runs: tuple[str, str, int, int, float], machine: Machine = MACHINE, work: Work = WORK
) -> Roofline:
    rows = (
        RooflineRow(*run, floor_of(work, size, precision, machine, batch))
        for run in runs
        for _, precision, size, batch, _ in [run]
    )
    return Roofline(machine, work, tuple(rows))


def crowd() -> Roofline:
    """As many runs as a release can have, most of them on top of each other."""
    kinds = ("minmax", "entropy", "percentile", "nncf", "dynamic", "weights")
    runs = [FP32, ("fp32-openvino", *FP32[1:4], 21.0), CUDA]
    runs += [(f"int8-{kind}", *INT8[1:4], 10.0 + i / 10) for i, kind in enumerate(kinds)]
    return report(*runs, *((n, p, s, 32, 20 * ms) for n, p, s, _, ms in runs))


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


def points(chart: Chart, gid: str) -> np.ndarray:
    (line,) = artists(chart.figure, gid)
    return line.get_xydata()


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
        roofline(report(FP32)),
        roofline(report(FP32, INT8, CUDA)),
        roofline(crowd()),
        roofline(report(CUDA)),
        operator_times([("fp32", FLOAT)]),
        operator_times([("fp32", FLOAT), ("int8-dynamic", QUANTIZED)]),
    ],
    ids=["one", "three", "crowd", "no floor", "operators", "operators of two"],
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


# --- roofline ------------------------------------------------------------------------------------


def test_roofline_of_one_run_says_how_far_it_is_from_what_binds_it() -> None:
    chart = roofline(report(FP32))
    assert chart.title == "fp32 takes 2.5× the time that compute allows, 25 ms of at least 10 ms"
    bound_by_memory = replace(MACHINE, bandwidth_gb_s=2.0)
    chart = roofline(report(("fp32", "f32", 100_000_000, 1, 51.0), machine=bound_by_memory))
    assert "1.5× the time that memory allows, 51 ms of at least 34 ms" in chart.title
    assert "floor 34 ms (memory)" in chart.alt


def test_roofline_names_the_nearest_and_the_farthest_run() -> None:
    middle = ("int8-entropy", *INT8[1:4], 9.0)
    title = roofline(report(CUDA, INT8, FP32, middle)).title
    assert title == (
        "fp32 is nearest to its floor (2.5× of 10 ms), int8-minmax farthest (4× of 2.5 ms)"
    )


def test_roofline_says_what_it_has_no_peak_for() -> None:
    chart = roofline(report(CUDA))
    assert chart.title == "No run has a floor: no peak was measured for f16"
    chart = roofline(report(FP32, CUDA))
    assert "no peak was measured for f16" in artists(chart.figure, "subtitle")[0].get_text()
    assert artists(chart.figure, "name fp16-cuda")[0].get_text() == "fp16-cuda: no floor"
    assert not artists(chart.figure, "gap fp16-cuda")


def test_roofs_and_runs_are_drawn_where_they_belong() -> None:
    chart = roofline(report(FP32, INT8))
    (slope,) = artists(chart.figure, "memory")
    x, y = slope.get_xydata().T
    np.testing.assert_allclose(y, 20 * x)
    assert y[-1] == 400
    for precision, peak in MACHINE.peaks.items():
        flat = points(chart, f"peak {precision}")
        np.testing.assert_allclose(flat[:, 1], peak)
        assert flat[0, 0] == peak / 20
    # 10⁹ operations in 25 and in 10 ms, over 100 and 25 MB of weights.
    np.testing.assert_allclose(points(chart, "run fp32"), [[10, 40]])
    np.testing.assert_allclose(points(chart, "run int8-minmax"), [[40, 100]])
    np.testing.assert_allclose(points(chart, "gap fp32"), [[10, 40], [10, 100]])
    np.testing.assert_allclose(points(chart, "gap int8-minmax"), [[40, 100], [40, 400]])
    (axes,) = chart.figure.axes
    assert axes.get_xscale() == axes.get_yscale() == "log"
    low, high = axes.get_ylim()
    assert low < 40 < 400 < high


def test_names_of_many_runs_cover_neither_each_other_nor_the_axes() -> None:
    found = crowd()
    chart = roofline(found)
    canvas = FigureCanvasAgg(chart.figure)
    chart.figure.draw_without_rendering()
    names = chart.figure.findobj(lambda a: (a.get_gid() or "").startswith("name "))
    assert len(names) == len(found.rows) == 18
    # The box of the words alone, without the line that leads to the run.
    boxes = [Text.get_window_extent(text, canvas.get_renderer()) for text in names]
    for below, above in pairwise(sorted(boxes, key=lambda box: box.y0)):
        assert below.y1 <= above.y0 + 1
    (axes,) = chart.figure.axes
    assert min(box.x0 for box in boxes) > axes.get_window_extent().x1


def test_batch_sizes_are_told_apart_only_where_they_differ() -> None:
    assert "batch" not in roofline(report(FP32, INT8)).title
    assert roofline(report(FP32, ("fp32", "f32", 100_000_000, 8, 104.0))).title.startswith(
        "fp32, batch 8 is nearest to its floor (1.3× of 80 ms)"
    )


def test_a_run_below_its_floor_is_explained() -> None:
    subtitle = artists(roofline(report(("fp32", *FP32[1:4], 8.0))).figure, "subtitle")[0]
    assert "a run did less than was counted" in " ".join(subtitle.get_text().split())
    assert "busy" not in artists(roofline(report(FP32)).figure, "subtitle")[0].get_text()


def test_without_runs_or_arithmetic_there_is_no_roofline() -> None:
    assert roofline(report()) is None
    assert roofline(report(FP32, work=Work(0.0, 10))) is None


def test_names_from_outside_can_not_break_the_figures() -> None:
    odd = "$\\bad{ line\nbreak " + "x" * 90
    for chart in (
        roofline(report((odd, *FP32[1:]), ("b", "$p{", 10, 1, 1.0))),
        operator_times([(odd, FLOAT), ("$", times(3.0, 0.1, ("$\\frac{", 1, 2.0)))]),
        operator_times([(odd, times(3.0, 0.1, ("$\\frac{$", 1, 2.0)))]),
    ):
        assert chart.to_png()


# --- operator_times ------------------------------------------------------------------------------


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


def test_the_table_has_machine_and_runs_with_and_without_a_floor():
    first, rows = tables.roofline_table(report(FP32, CUDA)).data.split("\n\n")
    assert "| matrix product, int8 | 400 · 10⁹ operations/s |" in first
    assert rows.splitlines()[2] == "| fp32 | f32 | 1 | 100.0 | 25 | 10 | compute | 2.50 |"
    assert "| unknown | no peak was measured for f16 | unknown |" in rows
    assert {line.count("|") for line in rows.splitlines()} == {9}
    assert tables.roofline_table(None) is None
