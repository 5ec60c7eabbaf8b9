"""ONNX Runtime's own record of a call is read right."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from models import SmallNet
from onnx import TensorProto, helper

from heimdall_onnx.common.errors import EvidenceError, InvalidModelError
from heimdall_onnx.evidence.variants.operators import OperatorTimes, measure_operator_times
from heimdall_onnx.model.examples import generic_inputs
from heimdall_onnx.model.onnx.export import export_model
from heimdall_onnx.model.runtimes import SessionSettings
from heimdall_onnx.model.signature import Signature, TensorSpec

TURNS = 50
ONE_THREAD = SessionSettings(threads=1)
UNFUSED = SessionSettings(threads=1, level="none")


@pytest.fixture(scope="module")
def model() -> SmallNet:
    return SmallNet(width=64)


@pytest.fixture(scope="module")
def path(model: SmallNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("operators") / "model.onnx"
    export_model(model, path, signature=model.signature)
    return path


@pytest.fixture(scope="module")
def times(model: SmallNet, path: Path) -> OperatorTimes:
    inputs = generic_inputs(model.signature, 16)
    return measure_operator_times(path, inputs, model.signature, UNFUSED, calls=7)


def test_every_node_of_the_file_is_counted_once(times, path) -> None:
    in_file = Counter(node.op_type for node in onnx.load(path).graph.node)
    ran = {operator.name: operator.nodes for operator in times.operators}
    assert ran == in_file


def test_operators_come_by_their_time_and_fill_the_call(times) -> None:
    durations = [operator.ms for operator in times.operators]
    assert durations == sorted(durations, reverse=True)
    assert times.operators[0].name == "Conv"
    assert times.operators[0].share == pytest.approx(durations[0] / times.total_ms)
    assert 0.3 * times.total_ms < sum(durations) < 1.1 * times.total_ms
    assert 0 < times.between_ms < times.total_ms


def test_slowest_nodes_are_named_as_in_the_file(times, path) -> None:
    durations = [node.ms for node in times.slowest]
    assert durations == sorted(durations, reverse=True)
    in_file = {node.name: node.op_type for node in onnx.load(path).graph.node}
    assert all(in_file[node.name] == node.operator for node in times.slowest)
    assert times.slowest[0].operator == "Conv"
    assert len(times.slowest) == min(10, len(in_file))


def test_warm_up_is_left_out_and_no_record_left_behind(times, path, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    signature = SmallNet.signature
    found = measure_operator_times(
        path, generic_inputs(signature, 1), signature, ONE_THREAD, calls=2
    )
    assert (times.calls, found.calls) == (7, 2)
    assert list(tmp_path.iterdir()) == []


def test_what_runs_is_what_the_optimization_level_makes_of_the_file(model, path, times) -> None:
    inputs = generic_inputs(model.signature, 2)
    fused = measure_operator_times(path, inputs, model.signature, ONE_THREAD, calls=2)
    assert sum(o.nodes for o in fused.operators) < sum(o.nodes for o in times.operators)


def test_nodes_of_a_subgraph_count_for_the_node_that_runs_it(tmp_path) -> None:
    path, signature = loop(tmp_path / "loop.onnx")
    inputs = {"x": np.ones((2, 4), np.float32)}
    found = measure_operator_times(path, inputs, signature, UNFUSED, calls=3)
    assert [(o.name, o.nodes) for o in found.operators] == [("Loop", 1)]
    assert found.operators[0].ms <= found.total_ms


def loop(path: Path) -> tuple[Path, Signature]:
    """Adds its input to itself fifty times in a loop."""
    true = helper.make_tensor("go", TensorProto.BOOL, [], [True])
    count = helper.make_tensor("count", TensorProto.INT64, [], [TURNS])
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["condition"], ["condition_out"], name="same"),
            helper.make_node("Add", ["x", "sum_in"], ["sum_out"], name="add"),
        ],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("condition", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum_in", TensorProto.FLOAT, ["batch", 4]),
        ],
        [
            helper.make_tensor_value_info("condition_out", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum_out", TensorProto.FLOAT, ["batch", 4]),
        ],
    )
    node = helper.make_node("Loop", ["count", "go", "x"], ["y"], name="loop", body=body)
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 4]) for n in "xy")
    graph = helper.make_graph([node], "g", [x], [y], [count, true])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path
    )
    shape = ("batch", 4)
    return path, Signature(
        (TensorSpec("x", "float32", shape),), (TensorSpec("y", "float32", shape),)
    )


def test_broken_files_and_unfit_inputs_are_refused(model, path, tmp_path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(path.read_bytes()[:100])
    inputs = generic_inputs(model.signature, 1)
    with pytest.raises(InvalidModelError, match=r"broken\.onnx"):
        measure_operator_times(broken, inputs, model.signature, UNFUSED)
    with pytest.raises(EvidenceError, match="can't run the model on"):
        measure_operator_times(
            path, {"signal": np.zeros((1, 9, 8, 8), np.float32)}, model.signature, UNFUSED
        )
