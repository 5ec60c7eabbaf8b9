"""A fault of the export is there at every level, one of the optimizer only where it works."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from models import SIGNAL, SmallNet, declare

from heimdall_onnx.data.evaluation import EvaluationData
from heimdall_onnx.evidence.parity import optimization_levels as levels
from heimdall_onnx.evidence.parity.compare import compare_outputs
from heimdall_onnx.evidence.parity.optimization_levels import compare_levels
from heimdall_onnx.model.examples import generic_inputs
from heimdall_onnx.model.inference import open_session
from heimdall_onnx.model.onnx.export import export_model

SIGNATURE = SmallNet.signature


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return export_model(SmallNet(), tmp_path_factory.mktemp("levels") / "m.onnx").path


@pytest.fixture
def data() -> EvaluationData:
    return EvaluationData(generic_inputs(declare([SIGNAL], []), 20), None, {}, "e.npz", "ab", {})


def compared(path, data, **options):
    model = SmallNet()
    report = compare_outputs(model, open_session(path), data, SIGNATURE)
    return compare_levels(model, path, data, report, **options)


def test_faithful_export_holds_at_every_level(path, data):
    found = compared(path, data)
    assert [level.level for level in found.levels] == ["none", "basic", "all"]
    assert all(level.holds and level.excess < 1 for level in found.levels)
    assert [o.output for o in found.levels[0].outputs] == ["positions", "spread"]


def test_operators_are_those_of_the_file_and_then_the_fused_ones(path, data):
    found = {level.level: level.operators for level in compared(path, data).levels}
    in_file = {node.op_type for node in onnx.load(path).graph.node} - {"Constant"}
    assert found["none"] == in_file
    assert found["all"] - in_file  # what ONNX Runtime has fused


def test_fault_of_the_export_is_there_without_optimization(path, data, tmp_path):
    model = onnx.load(path)
    bias = next(t for t in model.graph.initializer if t.name == "position_head.bias")
    changed = onnx.numpy_helper.to_array(bias) + np.float32(0.5)
    bias.CopyFrom(onnx.numpy_helper.from_array(changed, bias.name))
    onnx.save(model, tmp_path / "m.onnx")
    found = compared(tmp_path / "m.onnx", data)
    assert not any(level.holds for level in found.levels)
    assert {o.output: o.violations > 0 for o in found.levels[0].outputs} == {
        "positions": True,
        "spread": False,
    }


def test_fault_of_a_level_is_told_apart(path, data, monkeypatch):
    # No optimizer at hand is at fault, so one level is given another file.
    wrong = path.with_name("wrong.onnx")
    model = onnx.load(path)
    bias = next(t for t in model.graph.initializer if t.name == "position_head.bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(np.full(2, 9, np.float32), bias.name))
    onnx.save(model, wrong)
    monkeypatch.setattr(
        levels,
        "open_session",
        lambda file, level, **options: open_session(
            wrong if level == "all" else file, level=level, **options
        ),
    )
    found = compared(path, data)
    assert [level.holds for level in found.levels] == [True, True, False]


@pytest.mark.parametrize("samples", [1, 7, 500])
def test_any_number_of_samples_will_do(path, data, samples):
    found = compared(path, data, samples=samples)
    assert found.source.startswith(f"{min(samples, 20)} samples of e.npz, and the worst batch: ")
    assert all(level.holds for level in found.levels)


def test_profiles_leave_no_files_behind(path, data, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    compared(path, data)
    assert list(tmp_path.iterdir()) == []
