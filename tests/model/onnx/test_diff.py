"""Where two exported models depart: header, operators, weights, and files that only look apart."""

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from models import SmallNet

from heimdall_onnx.model.onnx.diff import describe_differences
from heimdall_onnx.model.onnx.export import export_model


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    return export_model(SmallNet(), tmp_path_factory.mktemp("a") / "model.onnx", opset=14).path


def changed(exported: Path, folder: Path, change, **options) -> tuple[str, ...]:
    model = onnx.load(exported)
    change(model)
    onnx.save(model, folder / "model.onnx", **options)
    return describe_differences(exported, folder / "model.onnx")


def test_another_opset_is_named(exported, tmp_path):
    other = export_model(SmallNet(), tmp_path / "model.onnx", opset=13).path
    found = describe_differences(exported, other)[0]
    assert re.search(r'lines of the graph, first - .*"" : 14\].*; \+ .*"" : 13\]', found)


def test_another_producer_is_named(exported, tmp_path):
    def change(model: onnx.ModelProto) -> None:
        model.producer_version = "0.1"

    (found,) = changed(exported, tmp_path, change)
    version = torch.__version__.partition("+")[0]
    assert found.startswith("2 lines of the graph")
    assert f'- producer_version: "{version}"; + producer_version: "0.1"' in found


def test_weights_are_named_with_their_largest_difference(exported, tmp_path):
    model = SmallNet()
    with torch.no_grad():
        model.position_head.weight[1, 3] -= 0.25
        model.spread_head.bias += 1.0
    other = export_model(model, tmp_path / "model.onnx", opset=14).path
    (found,) = describe_differences(exported, other)
    assert found.startswith("weights: 2 of ")
    assert "first 'position_head.weight', by 0.25 at most" in found


def test_weights_in_external_data_count_by_their_values(exported, tmp_path):
    options = {"save_as_external_data": True, "size_threshold": 0, "location": "model.onnx.data"}
    (same,) = changed(exported, tmp_path, lambda model: None, **options)
    assert same.startswith("nothing that is calculated")

    def change(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == "position_head.bias")
        values = onnx.numpy_helper.to_array(tensor) + np.float32(2)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))

    (tmp_path / "b").mkdir()
    (found,) = changed(exported, tmp_path / "b", change, **options)
    assert "first 'position_head.bias', by 2 at most" in found


def rename_node(model: onnx.ModelProto) -> None:
    model.graph.node[2].name = "/body/elsewhere"


def change_attribute(model: onnx.ModelProto) -> None:
    attribute = next(a for a in model.graph.node[0].attribute if a.name == "pads")
    attribute.ints[0] = 7


def drop_node(model: onnx.ModelProto) -> None:
    del model.graph.node[-1]


def add_metadata(model: onnx.ModelProto) -> None:
    model.metadata_props.add(key="made", value="elsewhere")


def rename_axis(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "samples"


def rename_weight(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].name = "other"


def reshape_weight(model: onnx.ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == "position_head.bias")
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.zeros((1, 2), np.float32), tensor.name))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (rename_node, r"^2 lines of the graph, first - .*/body/.*; \+ .*/body/elsewhere"),
        (change_attribute, r"^2 lines .* - .*Conv .*pads: ints = \[1, .*; \+ .*pads: ints = \[7,"),
        (drop_node, r"^1 line of the graph, first - .* Clip"),
        (add_metadata, r'\+ metadata_props: \["made": "elsewhere"\]'),
        (rename_axis, r"^2 lines of the graph, first -.*batch.*; \+.*samples"),
        (rename_weight, "weights, .*: was .*, is other"),
        (reshape_weight, r"first 'position_head.bias', which was float32 \(2,\), is .*\(1, 2\)"),
    ],
)
def test_first_place_is_named(exported, tmp_path, change, says):
    found = changed(exported, tmp_path, change)
    assert len(found) == 1, found
    assert re.search(says, found[0]), found[0]


def test_files_that_are_only_written_differently_are_said_to_be_so(exported, tmp_path):
    def change(model: onnx.ModelProto) -> None:
        model.graph.value_info.add(name="unused")

    (found,) = changed(exported, tmp_path, change)
    assert found.startswith("nothing that is calculated")


def test_names_reach_the_terminal_as_text(exported, tmp_path):
    def change(model: onnx.ModelProto) -> None:
        model.graph.node[0].name = "\x1b[2J\n" + 10_000 * "x"

    (found,) = changed(exported, tmp_path, change)
    assert found.isprintable()
    assert "x1b[2J" in found
    assert len(found) < 3000
