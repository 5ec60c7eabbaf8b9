"""The figures of a comparison say what is drawn, and tell A from B by more than colour."""

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.axis import Tick
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.text import Text

from heimdall_onnx.common.parameters import Quality
from heimdall_onnx.common.text import DEGREES
from heimdall_onnx.common.verdict import NotMeasured
from heimdall_onnx.evidence.latency.benchmark import PairLatency
from heimdall_onnx.evidence.latency.contenders import ContenderLatency
from heimdall_onnx.evidence.latency.machine_state import MachineState
from heimdall_onnx.evidence.latency.statistics import paired_speedup
from heimdall_onnx.evidence.parity.statistics import ErrorAccumulator
from heimdall_onnx.evidence.parity.tolerance import Limit
from heimdall_onnx.evidence.quality.contract import Scores, judge_quality
from heimdall_onnx.evidence.quality.metric import metrics_for
from heimdall_onnx.model.signature import Signature, TensorSpec
from heimdall_onnx.report import plot, tables
from heimdall_onnx.report.plot.chart import Color
from heimdall_onnx.review.compare.answers import Answers, Displacement
from heimdall_onnx.review.compare.plots import position_changes, values_by_sample
from heimdall_onnx.review.compare.words import output_words

COUNT = 300


def answers_of(moved_degrees: float, names=("positions",), unit: str | None = DEGREES) -> Answers:
    rng = np.random.default_rng(0)
    truth = np.stack([rng.uniform(47, 50, COUNT), rng.uniform(6, 9, COUNT)], axis=1)
    a = truth + rng.normal(0, 0.05, (COUNT, 2))
    b = a + moved_degrees * rng.uniform(0.1, 1, (COUNT, 2))
    found = []
    for name in names:
        accumulator = ErrorAccumulator(
            TensorSpec(name, "float64", ("batch", 2), unit=unit), Limit(0, 0)
        )
        accumulator.update(a, b, 0)
        found.append(accumulator.result())
    spec = TensorSpec("positions", "float64", ("batch", 2), unit=DEGREES)
    (metric,) = metrics_for("", Signature((), (spec,)), known := {"positions": truth})
    scores = Scores.of(metric, {"positions": a}, {"positions": b}, known)
    judged = judge_quality(metric, scores, Quality())
    errors = scores.reference[:, 0], scores.found[:, 0]
    moved = Displacement.between(a, b)
    return Answers(
        "eval.npz", COUNT, tuple(found), (a, b), truth, moved, (judged,), {metric.name: errors}
    )


@pytest.fixture(scope="module")
def answers() -> Answers:
    return answers_of(0.01)


@pytest.fixture(scope="module")
def latency() -> PairLatency:
    rng = np.random.default_rng(0)
    sides = []
    for who, mean in (("A", 2.0), ("B", 3.0)):
        calls = rng.normal(mean, 0.05, 60)
        beside = {"load_ms": 1, "first_call_ms": 1, "peak_memory_bytes": 1}
        sides.append(ContenderLatency.of_calls(who, calls, np.arange(60) // 10, **beside))
    blocks = [[side.samples_ms[n : n + 10] for n in range(0, 60, 10)] for side in sides]
    machine = MachineState(1.0, 0.5, 0.6, None, 0.5, 0.1, 0.4, 0.0, None, 1)
    return PairLatency(
        contenders=(sides[1], sides[0]),
        speedup=paired_speedup(blocks[1], blocks[0]),
        batch_size=1,
        machine=machine,
    )


def drawn(chart: plot.Chart, gid: str):
    (found,) = chart.figure.findobj(lambda artist: artist.get_gid() == gid)
    return found


def lightness(color: str) -> float:
    return float(np.dot([0.2126, 0.7152, 0.0722], np.power(to_rgb(color), 2.2)))


def test_no_text_is_below_nine_points_or_cut_off(answers, latency):
    charts = [
        position_changes(answers),
        values_by_sample(answers),
        plot.quality(answers),
        plot.pair_latency(latency),
    ]
    for chart in charts:
        canvas = FigureCanvasAgg(chart.figure)
        chart.figure.draw_without_rendering()
        width, height = chart.figure.bbox.size
        ticks = {t for tick in chart.figure.findobj(Tick) for t in (tick.label1, tick.label2)}
        for text in chart.figure.findobj(Text):
            shown = text.get_text().strip() and text.get_visible()
            if not shown or text in ticks:  # some are beyond the axis, undrawn
                continue
            assert text.get_fontsize() >= 9
            box = text.get_window_extent(canvas.get_renderer())
            assert -1 <= box.x0 <= box.x1 <= width + 1, chart.title
            assert -1 <= box.y0 <= box.y1 <= height + 1, chart.title
        assert len(chart.to_png()) < 150_000
        assert any(character.isdigit() for character in chart.alt)


def test_the_table_of_a_pair_begins_with_the_denominator(latency):
    first, _, *rows = tables.pair_table(latency).data.splitlines()
    assert first == "| batch 1 | A | B |"
    (ratio,) = (row for row in rows if "latency beside A" in row)
    assert f"| {latency.speedup.ratio:.3f} (" in ratio
    assert {row.count("|") for row in rows} == {4}


def test_a_and_b_differ_in_marker_line_and_lightness(answers):
    chart = values_by_sample(answers)
    a, b = (drawn(chart, f"median {who}") for who in "AB")
    assert (a.get_marker(), b.get_marker()) == ("o", "X")
    assert drawn(chart, "values A").get_linestyle() != drawn(chart, "values B").get_linestyle()
    assert [to_hex(line.get_color()).upper() for line in (a, b)] == [Color.A, Color.B]
    assert lightness(Color.A) / lightness(Color.B) > 3
    assert not {Color.A, Color.B} & {Color.PYTORCH, Color.ONNX}


def test_positions_are_drawn_where_they_are_and_where_they_move(answers):
    chart = position_changes(answers)
    assert chart.title.startswith("Positions move by 1.")
    assert chart.title.endswith(" km at p99")
    assert len(drawn(chart, "A").get_offsets()) == 60
    (moved,) = chart.figure.axes[1].collections
    kilometres = np.hypot(*moved.get_offsets().T)
    assert len(kilometres) == COUNT
    assert kilometres.max() == pytest.approx(answers.displacement.max_m / 1000)


def test_what_does_not_move_is_said(answers):
    same = answers_of(0.0)
    assert position_changes(same).title == "No position moves"
    assert output_words(same) == "no output changes"


def test_lost_positions_are_counted_in_the_title(answers):
    b = answers.positions[1].copy()
    b[:7] = np.nan
    lost = replace(answers, displacement=Displacement.between(answers.positions[0], b))
    assert position_changes(lost).title == "7 of 300 positions are NaN or Inf in one of them"
    everything = Displacement.between(*(np.full((5, 2), np.nan),) * 2)
    chart = position_changes(replace(answers, displacement=everything))
    assert chart.title == "No position is finite in both"


def test_model_without_positions_has_no_map_and_no_errors(answers):
    without = replace(answers, positions=None, displacement=None, quality=(), by_sample={})
    assert position_changes(without) is None
    assert values_by_sample(without) is None
    assert plot.quality(without) is None


def test_differences_are_told_in_the_unit_of_the_output():
    words = output_words(answers_of(0.01, ("level",), "dB"))
    assert words.startswith("the values of level change by 0.0")
    assert words.endswith(" dB at p99")


def test_of_several_outputs_it_is_said_by_what_they_are_ranked():
    words = output_words(answers_of(0.01, ("positions", "uncertainties")))
    assert words.startswith("the values of positions change most relative to their span, by 0.0")


def test_values_of_samples_are_titled_with_the_loss_and_drawn_in_their_unit(answers):
    worse = values_by_sample(answers_of(0.2))
    assert worse.title.startswith("B's median localization error is ")
    assert worse.figure.axes[0].get_xlabel() == "distance to the true position (km)"
    (judged,) = answers_of(0.2).quality
    assert drawn(worse, "median B").get_xdata()[0] == pytest.approx(judged.value / 1000, rel=0.02)
    same = values_by_sample(answers).title
    assert same.startswith("No clear difference in median localization error")
    assert "not shown, and no number of samples as these would show it" in same


def test_other_metrics_are_drawn_by_their_names(answers):
    (a, b) = answers.by_sample["localization"]
    (judged,) = answers.quality
    other = replace(answers, quality=(replace(judged, metric="mae"),), by_sample={"mae": (a, b)})
    chart = values_by_sample(other)
    assert chart.figure.axes[0].get_xlabel() == "mae"
    assert chart.alt.startswith(f"A: median {np.median(a):,.0f}"[:10])
    # Where each sample is right or wrong there is nothing to be seen sample by sample.
    right = {"top1": (np.ones(COUNT), np.arange(COUNT) % 2.0)}
    assert values_by_sample(replace(answers, by_sample=right)) is None


def test_latency_of_a_pair_names_both_and_keeps_what_was_not_measured(latency):
    chart = plot.pair_latency(latency)
    assert chart.title.startswith("B is 1.5")
    assert "slower than A at batch 1" in chart.title
    assert chart.alt.startswith("A: 60 calls")
    histogram = drawn(chart, "A")
    assert to_hex(histogram.get_edgecolor()).upper() == Color.A
    skipped = NotMeasured("not asked for")
    assert plot.pair_latency(skipped) is skipped
