"""Tables say what the dataclasses hold, as inert Markdown."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import SmallNet

from heimdall_onnx.archive.record import Skipped
from heimdall_onnx.common.environment import capture_environment
from heimdall_onnx.data.evaluation import EvaluationData
from heimdall_onnx.evidence.costs import StepCost
from heimdall_onnx.evidence.parity.compare import compare_outputs
from heimdall_onnx.evidence.parity.departure import Departure
from heimdall_onnx.evidence.variants.roofline import Machine, Roofline, RooflineRow, Work, floor_of
from heimdall_onnx.model.examples import generic_inputs
from heimdall_onnx.model.inference import open_session
from heimdall_onnx.model.onnx.export import export_model
from heimdall_onnx.model.onnx.validate import validate_model
from heimdall_onnx.report import tables


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export_model(SmallNet(), tmp_path_factory.mktemp("tables") / "model.onnx", opset=14)


def parity(exported, detuned: float = 0.0):
    model = SmallNet()
    with torch.no_grad():
        model.body[0].weight += detuned
    inputs = generic_inputs(model.signature, 4)
    data = EvaluationData(inputs, None, {}, "synthetic inputs", None, {})
    session = open_session(exported.path, spinning=False)
    return compare_outputs(model, session, data, model.signature)


def test_cells_cannot_break_out_of_the_table():
    made = tables.table(("a", "b"), [("x | y\n| z", "<script>")]).data
    assert len(made.splitlines()) == 3
    assert made.splitlines()[2].count("|") == 3
    assert "<script>" not in made


def test_parity_table_has_a_row_for_each_statistic_and_a_column_for_each_output(exported):
    made = tables.parity_table(parity(exported)).data
    assert "positions" in made
    assert "spread" in made
    for label in ("mean (MAE)", "p99.9", "ULP", "beyond tolerance"):
        assert label in made


def test_departure_table_says_that_there_is_nothing_to_look_for(exported):
    made = tables.departure_table(parity(exported), None).data
    assert "Every parity gate holds" in made


def test_departure_table_points_elsewhere_when_no_module_departs(exported):
    made = tables.departure_table(parity(exported, 0.01), None).data
    assert "No module departs" in made


def test_departure_table_names_the_module(exported):
    departure = Departure(
        scope="body.0",
        module_type="Conv2d",
        max_abs_error=0.5,
        reference_magnitude=2.0,
        limit=1e-4,
        operators=("Conv",),
        pytorch_value=1.0,
        onnx_value=1 + 2**-23,
    )
    made = tables.departure_table(parity(exported, 0.01), departure).data
    assert "| PyTorch there | 1 |\n| ONNX there | 1.0000001 |" in made
    assert "body.0" in made
    assert "Conv2d" in made


def test_latency_of_a_small_model_is_told_to_three_digits():
    found = SimpleNamespace(value_ms=0.01234, low_ms=0.01191, high_ms=1234.6)
    text = tables.percentile_text(SimpleNamespace(percentile=lambda wanted: found), 50.0)
    assert text == "0.0123 (0.0119 to 1,235)"


def test_export_and_validation_tables_identify_the_file(exported):
    assert exported.sha256 in tables.export_table(exported).data
    assert "as declared" in tables.validation_table(validate_model(exported.path)).data


def test_evaluation_table_says_synthetic_when_it_is():
    data = EvaluationData({"x": np.zeros((3, 1))}, None, {}, "synthetic inputs", None, {})
    assert "synthetic inputs" in tables.evaluation_table(data).data


def test_skipped_steps_say_why():
    skipped = Skipped("because")
    assert tables.upload_table(skipped) is skipped
    assert tables.registry_table(skipped) is skipped
    assert "because" in skipped._repr_markdown_()


def test_environment_table_lists_every_package():
    environment = capture_environment()
    made = tables.environment_table(environment).data
    assert all(version in made for version in environment.packages.values())


def test_roofline_table_has_machine_and_runs_with_and_without_a_floor():
    machine = Machine(2, 20.0, {"f32": 100.0, "int8": 400.0}, 32_000_000, ("avx2", "fma"))
    work = Work(1e9, 25_000_000)
    runs = ("fp32", "f32", 100_000_000, 1, 25.0), ("fp16-cuda", "f16", 50_000_000, 1, 3.0)
    rows = (RooflineRow(*run, floor_of(work, run[2], run[1], machine, run[3])) for run in runs)
    found = tables.roofline_table(Roofline(machine, work, tuple(rows)))
    first, rows = found.data.split("\n\n")
    assert "| matrix product, int8 | 400 · 10⁹ operations/s |" in first
    assert rows.splitlines()[2] == "| fp32 | f32 | 1 | 100.0 | 25 | 10 | compute | 2.50 |"
    assert "| unknown | no peak was measured for f16 | unknown |" in rows
    assert {line.count("|") for line in rows.splitlines()} == {9}
    assert tables.roofline_table(None) is None


def test_cost_table_has_the_longest_step_first_and_all_of_them_in_its_head():
    costs = StepCost("export", 14.0, 900_000_000), StepCost("latency", 20.5)
    head, _, *rows = tables.cost_table(costs).data.splitlines()
    assert head == "| step, of 34 s until here | seconds | peak memory, MB |"
    assert rows == ["| latency | 20.5 | unknown |", "| export | 14.0 | 900.0 |"]
