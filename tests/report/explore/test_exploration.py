"""What can be explored is what was compared, and headless runs get a picture of it alone."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pytest
from families import Triangulator, make_triangulation_data
from models import IntegerNet, NaNNet, SmallNet
from torch import nn

from heimdall_onnx.common.errors import InvalidModelError, ParameterError
from heimdall_onnx.data.evaluation import EvaluationData, load_evaluation_data
from heimdall_onnx.evidence.geodesy import distance_m
from heimdall_onnx.evidence.parity.compare import compare_outputs
from heimdall_onnx.evidence.parity.report import ParityReport
from heimdall_onnx.evidence.parity.statistics import worst_elements
from heimdall_onnx.evidence.parity.tolerance import EVALUATION, Limit
from heimdall_onnx.model.inference import open_session, run_onnx, run_pytorch
from heimdall_onnx.model.onnx.export import export_model
from heimdall_onnx.model.signature import Signature, TensorSpec
from heimdall_onnx.report.explore import entry as explore_entry
from heimdall_onnx.report.explore.entry import INSTALL, Explorable, explore_parity
from heimdall_onnx.report.explore.exploration import Exploration
from heimdall_onnx.report.plot.chart import Chart, Color


@dataclass(frozen=True)
class Compared:
    model: nn.Module
    onnx: Path
    data: EvaluationData
    parity: ParityReport

    def explored(self, **changes: object) -> Exploration:
        values = {**vars(self), **changes}
        return Exploration(values["parity"], values["data"], values["model"], values["onnx"])


def compare(model: nn.Module, folder: Path, data: EvaluationData | None = None) -> Compared:
    signature = model.signature
    data = data or load_evaluation_data(None, signature, model)
    onnx = export_model(model, folder / "model.onnx", signature=signature, opset=14).path
    parity = compare_outputs(model, onnx, data, signature, batch_size=8)
    return Compared(model, onnx, data, parity)


def labelled(count: int) -> EvaluationData:
    rng = np.random.default_rng(0)
    signal = rng.standard_normal((count, 2, 8, 8)).astype(np.float32)
    return EvaluationData(
        {"signal": signal}, rng.uniform(-1, 1, (count, 2)), {}, "captures.npz", "ab", {}
    )


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Compared:
    return compare(SmallNet(), tmp_path_factory.mktemp("explore"), labelled(21))


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> Compared:
    """A set of receivers with a mask and a dynamic axis, answered with positions."""
    made = make_triangulation_data(12, 8)
    positions = made.pop("positions")
    data = EvaluationData(made, positions, {}, "receivers.npz", "ab", {})
    return compare(Triangulator(), tmp_path_factory.mktemp("several"), data)


# What was compared


@pytest.mark.parametrize("which", ["compared", "several"])
def test_each_cell_has_the_errors_that_the_report_has_there(which, request):
    found = request.getfixturevalue(which)
    exploration = found.explored()
    assert exploration.kinds[0] == EVALUATION
    assert len(exploration.kinds) > 5
    for cell in found.parity.cells:
        explored = exploration.cell(cell.kind, cell.batch_size)
        assert set(explored.factor) == {cell.factor}
        for statistics in cell.outputs:
            worst = explored[explored.output == statistics.output]
            assert worst.excess.max() == statistics.excess
            assert len(worst.error) == exploration.count(cell.kind, cell.batch_size)


def test_first_cell_needs_no_model(compared, tmp_path):
    exploration = compared.explored(onnx=tmp_path / "none.onnx")
    cell = exploration.cell(EVALUATION, 8)
    assert cell.number.tolist() == [*range(21)] * 2
    assert exploration.sample(EVALUATION, 8, 3).index == 3
    with pytest.raises(InvalidModelError, match=r"none\.onnx"):
        exploration.cell("zeros", 2)


def test_sample_has_its_inputs_both_answers_and_the_metres_between(compared):
    exploration, row = compared.explored(), 13
    sample = exploration.sample(EVALUATION, 8, row)
    # In the batch that it was compared in: rows 8 to 15.
    batch = compared.data.rows(np.arange(8, 16))
    signature = compared.parity.signature
    pytorch = run_pytorch(compared.model, batch, signature)
    onnx = run_onnx(open_session(compared.onnx, spinning=False), batch, signature)
    np.testing.assert_array_equal(sample.inputs["signal"], compared.data.inputs["signal"][row])
    for name in ("positions", "spread"):
        np.testing.assert_array_equal(sample.pytorch[name], pytorch[name][row - 8])
        np.testing.assert_array_equal(sample.onnx[name], onnx[name][row - 8])
    apart = distance_m(onnx["positions"][5:6], pytorch["positions"][5:6])[0]
    assert sample.metres == apart
    cell = exploration.cell(EVALUATION, 8)
    assert set(cell.metres[cell.number == row]) == {apart}
    off = distance_m(onnx["positions"][5:6], compared.data.positions[row : row + 1])[0]
    assert sample.truth_m[1] == off


def test_adversarial_sample_has_the_inputs_of_its_kind(compared):
    sample = compared.explored().sample("amplitude ×100", 3, 2)
    np.testing.assert_allclose(
        sample.inputs["signal"], 100 * compared.data.inputs["signal"][2], rtol=1e-6
    )
    assert sample.factor == 10
    assert sample.truth_m is None


def test_rows_that_fill_a_batch_are_no_samples_of_their_own(tmp_path):
    exploration = compare(SmallNet(), tmp_path, labelled(5)).explored()
    assert exploration.batch_sizes(EVALUATION)[0] == 5
    for size in exploration.batch_sizes(EVALUATION):
        assert sorted(exploration.cell(EVALUATION, size).number) == sorted([*range(5)] * 2)


def test_worst_of_many_samples_is_there_though_its_answers_were_not_kept(tmp_path):
    data = labelled(2100)
    rows = np.arange(data.count)
    kept = compare(SmallNet(), tmp_path, data).parity.plotted
    lost = int(np.setdiff1d(rows, kept)[5])
    data.inputs["signal"][lost] *= 300
    found = compare(SmallNet(), tmp_path, data)
    assert found.parity.place_of(lost) is None
    cell = found.explored().cell(EVALUATION, 8)
    cell = cell[cell.output == "positions"]
    assert len(kept) < len(cell) < 2100
    (worst,) = [w for w in found.parity.evaluation[0].worst if w.sample == lost]
    assert cell.error[cell.number == lost].tolist() == [worst.error]
    # And any other can be looked up.
    other = int(np.setdiff1d(rows, cell.number)[0])
    sample = found.explored().sample(EVALUATION, 8, other)
    np.testing.assert_array_equal(sample.inputs["signal"], data.inputs["signal"][other])


def test_what_was_not_compared_is_refused_with_what_was(compared):
    exploration = compared.explored()
    with pytest.raises(ParameterError, match="compared were evaluation data at 8, 1, 2, 3; zeros"):
        exploration.cell("noise", 8)
    with pytest.raises(ParameterError, match=r"has the samples 0 to 20, found 21"):
        exploration.sample(EVALUATION, 8, 21)


def test_rows_of_a_dataset_are_read_and_named_with_their_shard(tmp_path):
    class Net(nn.Module):
        signature = Signature(
            (TensorSpec("features", "float32", ("batch", 2, 3)),),
            (TensorSpec("level", "float32", ("batch", 3)),),
        )

        def forward(self, features):
            return features.mean(1)

    inputs, positions, events = datasets.samples(40)
    path = tmp_path / "data.zarr"
    datasets.write_in_small_shards(path, ({"features": inputs["features"]}, positions, events))
    found = compare(Net().eval(), tmp_path, load_evaluation_data(path, Net.signature))
    sample = found.explored().sample(EVALUATION, 8, 33)
    np.testing.assert_array_equal(sample.inputs["features"], inputs["features"][33])
    assert sample.shard == found.data.shard_of(33) != ""
    assert sample.metres is None


def test_worst_element_of_each_sample_is_found_in_units_of_what_is_allowed():
    reference = np.array([[1000.0, 0.0], [np.nan, 1.0], [np.nan, 2.0]], np.float32)
    value = np.array([[1000.001, 0.0001], [np.nan, 1.0], [3.0, 2.0]], np.float32)
    worst = worst_elements(reference, value, Limit(1e-5, 1e-6))
    assert worst.element.tolist() == [1, 0, 0]
    assert worst.error.tolist() == [pytest.approx(1e-4), 0.0, np.inf]
    assert worst.excess[0] == pytest.approx(10, rel=1e-3)
    empty = worst_elements(np.empty((2, 0)), np.empty((2, 0)), Limit(1e-5, 0))
    assert empty.error.tolist() == [0, 0]


# The widget, as far as it needs no browser


@pytest.fixture(scope="module")
def view_class():
    pytest.importorskip("plotly", reason="the extra lab is not installed")
    from heimdall_onnx.report.explore.widget import View

    return View


def shown(widget):
    """All that a widget is made of."""
    return [widget, *(part for child in getattr(widget, "children", ()) for part in shown(child))]


def test_limits_leave_the_samples_within_them_the_worst_first(compared, view_class):
    view = view_class(compared.explored())
    cell = compared.explored().cell(EVALUATION, 8)
    worst = cell[cell.output == view.output.value].reset_index()
    steps = [step for _, step in view.excess.options]
    assert steps[0] == 0
    assert steps[-1] >= worst.excess.max()
    middle = len(steps) // 2
    view.excess.index = (middle, len(steps) - 1)
    inside = np.flatnonzero(worst.excess >= steps[middle])
    assert f"{len(inside)} of 21 samples" in view.said.value
    listed = [key.sample for _, key in view.list.options]
    order = sorted(inside.tolist(), key=lambda sample: (-worst.excess[sample], sample))
    assert listed == order[:20]
    assert sum(len(trace.x) for trace in view.figure.data[:3]) == len(inside)


def test_all_kinds_are_shown_together_with_both_limits(compared, view_class):
    view = view_class(compared.explored())
    view.kind.value = "all"
    count = sum(
        compared.explored().count(cell.kind, cell.batch_size) for cell in compared.parity.cells
    )
    assert f"{count} of {count} samples" in view.said.value
    evaluation, _, adversarial = view.figure.data[:3]
    assert (evaluation.name, evaluation.marker.color) == (EVALUATION, Color.ELEMENTS[0])
    assert len(evaluation.x) + len(adversarial.x) == count
    usual, wider = view.figure.data[3:5]
    assert wider.y[0] == pytest.approx(10 * usual.y[0])


@pytest.mark.parametrize("model", [IntegerNet, NaNNet])
def test_models_without_positions_are_shown(model, view_class, tmp_path):
    found = compare(model().eval(), tmp_path)
    view = view_class(found.explored())
    for kind in (EVALUATION, found.explored().kinds[-1]):
        view.kind.value = kind
        view.number.value = 1
        assert "Sample 1 ·" in view.details.value
        assert "apart" not in view.details.value
        assert "<img" in view.details.value


def test_several_inputs_are_drawn_and_their_lengths_kept_apart(several, view_class):
    view = view_class(several.explored())
    view.kind.value = "receivers = 3"
    view.number.value = 1
    assert "receiver_features: 3 × 6" in view.details.value
    assert len(view.figure.data[:3][1].x) > 0
    assert "log_variance" in view.details.value


def test_what_can_not_be_run_is_said_in_the_widget(compared, view_class, tmp_path):
    view = view_class(compared.explored(onnx=tmp_path / "gone.onnx"))
    view.kind.value = "zeros"
    assert "Not shown: ONNX Runtime can" in view.said.value


def test_figure_that_the_browser_could_not_load_is_replaced_by_a_whole_one(compared, view_class):
    view = view_class(compared.explored())
    before = view.figure
    asks = {"method": "custom", "content": {"kind": "empty"}}
    view.front_end.comm.handle_msg({"content": {"data": asks}, "buffers": []})
    assert view.figure is not before
    assert view.figure in shown(view.box)
    assert before not in shown(view.box)
    assert sum(len(trace.x) for trace in view.figure.data[:3]) == 21
    view.number.value = 4
    assert len(view.figure.data[-1].x) == 1


def test_names_from_outside_are_inert(tmp_path, view_class):
    hostile = "<img src=x onerror=alert(1)>"

    class Net(nn.Module):
        signature = Signature(
            (TensorSpec("x", "float32", ("batch", 3)),),
            (TensorSpec("y", "float32", ("batch", 2), unit=hostile),),
        )

        def forward(self, x):
            return x[:, :2]

        def adversarial_inputs(self, base, rng):
            return {hostile: {"x": base["x"] + 1}}

    found = compare(Net().eval(), tmp_path)
    view = view_class(found.explored())
    view.kind.value = hostile
    texts = [
        view.details.value,
        view.said.value,
        view.figure.layout.yaxis.title.text,
        *view.figure.data[:3][2].text,
    ]
    assert any("&lt;img" in text for text in texts)
    assert not any("<img src=x" in text for text in texts)


# Who gets what


def test_a_script_gets_the_figure_alone(compared):
    chart = explore_parity(compared.parity, compared.data, compared.model, compared.onnx)
    assert isinstance(chart, Chart)
    assert "sample" in chart.title.lower()


def test_who_lacks_the_extra_gets_the_figure_and_what_to_install(compared, monkeypatch):
    monkeypatch.setattr(explore_entry, "person_at_notebook", lambda: True)
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.delitem(sys.modules, "heimdall_onnx.report.explore.widget", raising=False)
    monkeypatch.delitem(sys.modules, "plotly.graph_objects", raising=False)
    shown = explore_parity(compared.parity, compared.data, compared.model, compared.onnx)
    assert isinstance(shown, Explorable)
    assert shown.below.data == INSTALL
    assert "heimdall-onnx[lab]" in INSTALL
    assert isinstance(shown.chart, Chart)
