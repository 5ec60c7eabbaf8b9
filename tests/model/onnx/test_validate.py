import json
import re
import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from heimdall_onnx.common.errors import InvalidModelError
from heimdall_onnx.model.onnx.export import export_model
from heimdall_onnx.model.onnx.file import read_model
from heimdall_onnx.model.onnx.validate import validate_model
from heimdall_onnx.model.signature import Signature, TensorSpec

SIGNATURE = Signature(
    (TensorSpec("x", "float32", ("batch", 3)),), (TensorSpec("y", "float32", ("batch", 2)),)
)


def tiny_model(weight=None, *, batch="batch", dtype=TensorProto.FLOAT):
    """``y = x @ w + b`` with 3 inputs and 2 outputs."""
    weight = np.ones((3, 2), np.float32) if weight is None else weight
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["m"]),
            helper.make_node("Add", ["m", "b"], ["y"]),
        ],
        "line",
        [helper.make_tensor_value_info("x", dtype, [batch, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 2])],
        [
            numpy_helper.from_array(weight, "w"),
            numpy_helper.from_array(np.zeros(2, np.float32), "b"),
        ],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8, producer_name="by hand"
    )


@pytest.fixture
def path(tmp_path):
    onnx.save(tiny_model(), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.fixture
def external(tmp_path):
    folder = tmp_path / "external"
    folder.mkdir()
    onnx.save(
        tiny_model(),
        folder / "model.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=0,
    )
    return folder / "model.onnx"


def test_description_is_that_of_the_file(path):
    info = validate_model(path, signature=SIGNATURE)
    assert (info.opset_version, info.ir_version) == (14, 8)
    assert (info.producer_name, info.producer_version) == ("by hand", "")
    assert info.operators == {"MatMul": 1, "Add": 1}
    assert info.parameters == 8
    assert info.size_bytes == path.stat().st_size
    assert info.signature_problems == ()


def test_dictionary_has_the_documented_form_and_is_json(path):
    documented = {
        "inputs": [{"name": "x", "shape": ["batch", 3], "dtype": "float32"}],
        "outputs": [{"name": "y", "shape": ["batch", 2], "dtype": "float32"}],
        "opset_version": 14,
        "producer_name": "by hand",
        "ir_version": 8,
    }
    assert json.loads(json.dumps(validate_model(path).to_dict())) == documented


@pytest.mark.parametrize("opset", [14, 20])
def test_exported_model_is_valid(tmp_path, opset):
    model = nn.Sequential(nn.Linear(3, 2)).eval()
    model.signature = SIGNATURE
    result = export_model(model, tmp_path / "model.onnx", opset=opset)
    info = validate_model(result.path, signature=SIGNATURE)
    assert info.signature_problems == ()
    assert info.opset_version == opset
    assert info.parameters == 8
    assert info.producer_name == "pytorch"
    assert info.producer_version.startswith(torch.__version__.split("+")[0])


def test_weights_in_external_data_are_counted_and_sized(external):
    info = validate_model(external)
    data = external.parent / "model.onnx.data"
    assert info.parameters == 8
    assert info.size_bytes == external.stat().st_size + data.stat().st_size


@pytest.mark.parametrize(
    ("changes", "problems"),
    [
        ({"inputs": ("z", "float32", ("batch", 3))}, ["input 'z': .*none", "input 'x': .*none, f"]),
        ({"outputs": ("z", "float32", ("batch", 2))}, ["output 'z': ", "output 'y': .*none, f"]),
        ({"inputs": ("x", "float16", ("batch", 3))}, ["dtype float16, .*found dtype float32"]),
        ({"inputs": ("x", "float32", ("batch", 4))}, [r"'batch', 4\), found .*'batch', 3\)"]),
        ({"outputs": ("y", "float32", ("batch", 2, 1))}, [r"2, 1\), found .*'batch', 2\)"]),
        ({"outputs": ("y", "float32", ("time", 2))}, [r"'time', 2\), found .*'batch', 2\)"]),
        ({"inputs": ("x", "float32", (2, 3))}, [r"\(2, 3\), found .*\('batch', 3\)"]),
    ],
)
def test_differences_from_the_signature_are_returned(path, changes, problems):
    signature = replace(SIGNATURE, **{k: (TensorSpec(*spec),) for k, spec in changes.items()})
    found = validate_model(path, signature=signature).signature_problems
    assert len(found) == len(problems)
    assert all(re.search(*pair) for pair in zip(problems, found, strict=True))


@pytest.mark.parametrize("batch", [2, None])
def test_axis_that_is_not_dynamic_by_name_differs(tmp_path, batch):
    onnx.save(tiny_model(batch=batch), tmp_path / "a.onnx")
    found = validate_model(tmp_path / "a.onnx", signature=SIGNATURE).signature_problems
    shown = repr(batch) if batch else "'?'"
    assert [f"found dtype float32, shape ({shown}, " in text for text in found] == [True, True]


def test_every_weight_that_is_no_number_is_named(tmp_path):
    weight = np.ones((3, 2), np.float32)
    weight[1:, 0] = np.nan
    model = tiny_model(weight)
    bias = model.graph.initializer[1]
    bias.CopyFrom(numpy_helper.from_array(np.full(2, np.nan, np.float32), "b"))
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(InvalidModelError) as caught:
        validate_model(tmp_path / "a.onnx")
    assert str(caught.value).split("\n  - ")[1:] == [
        "w has NaN in 2 of 6 elements",
        "b has NaN in 2 of 2 elements",
    ]


def test_infinite_constants_of_a_mask_are_no_fault(tmp_path):
    onnx.save(tiny_model(np.full((3, 2), -np.inf, np.float32)), tmp_path / "a.onnx")
    assert validate_model(tmp_path / "a.onnx").parameters == 8


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE])
def test_weights_that_are_no_numbers_are_found_in_other_precisions(tmp_path, dtype):
    model = tiny_model()
    model.graph.initializer.append(helper.make_tensor("unused", dtype, [2], [1.0, float("nan")]))
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(InvalidModelError, match="unused has NaN in 1 of 2"):
        validate_model(tmp_path / "a.onnx")


def test_weights_that_are_no_numbers_are_found_in_external_data(external):
    data = external.parent / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[:4] = np.float32(np.nan).tobytes()
    data.write_bytes(content)
    with pytest.raises(InvalidModelError, match="w has NaN in 1 of 6 elements"):
        validate_model(external)


def point_at(location):
    def change(path):
        model = onnx.load(path, load_external_data=False)
        for entry in model.graph.initializer[0].external_data:
            if entry.key == "location":
                entry.value = location.format(folder=path.parent)
        path.write_bytes(model.SerializeToString())

    return change


@pytest.mark.parametrize("location", ["../outside.data", "{folder}/../outside.data", "/etc/passwd"])
def test_external_data_outside_the_folder_is_refused(external, location):
    shutil.copy(external.parent / "model.onnx.data", external.parent.parent / "outside.data")
    point_at(location)(external)
    with pytest.raises(InvalidModelError, match="w has its data outside the model's folder"):
        validate_model(external)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"location": "\0"}, r"w has its data in '\\x00': embedded null byte"),
        ({"location": "x" * 300}, "w has its data in 'xxx.*: .*name too long"),
        ({"location": ""}, "which is not there"),
        ({"offset": "9" * 30}, r"can't be read: its data are said to be 24 bytes from byte 999"),
        ({"length": str(2**62)}, f"{2**62} bytes from byte 0 of 'model.onnx.data', which has 32"),
        ({"offset": "9"}, "24 bytes from byte 9 of 'model.onnx.data', which has 32"),
        ({"offset": "-4"}, "bytes from byte -4"),
        ({"length": "much"}, "w has its data in .*invalid literal"),
    ],
)
def test_external_data_that_can_not_be_there_are_refused_unread(external, entries, message):
    model = onnx.load(external, load_external_data=False)
    tensor = model.graph.initializer[0]
    found = {entry.key: entry.value for entry in tensor.external_data} | entries
    del tensor.external_data[:]
    for key, value in found.items():
        tensor.external_data.add(key=key, value=value)
    external.write_bytes(model.SerializeToString())
    with pytest.raises(InvalidModelError, match=message):
        validate_model(external)


def outside(name):
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../outside.data")
    return tensor


def in_a_constant(model):
    model.graph.node.insert(0, helper.make_node("Constant", [], ["c"], value=outside("there")))


def in_a_branch(model):
    branch = helper.make_graph([], "branch", [], [], [outside("there")])
    model.graph.node.append(helper.make_node("If", ["x"], ["c"], then_branch=branch))


def in_a_function(model):
    node = helper.make_node("Constant", [], ["c"], value=outside("there"))
    model.functions.add(domain="local", name="F").node.append(node)


def in_a_sparse_weight(model):
    model.graph.sparse_initializer.add(dims=[2]).values.CopyFrom(outside("there"))


def in_the_training(model):
    model.training_info.add().algorithm.initializer.append(outside("there"))


@pytest.mark.parametrize(
    "change", [in_a_constant, in_a_branch, in_a_function, in_a_sparse_weight, in_the_training]
)
def test_data_outside_the_folder_are_refused_wherever_a_tensor_is(path, change):
    (path.parent.parent / "outside.data").write_bytes(bytes(8))
    model = onnx.load(path)
    change(model)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(InvalidModelError, match="there has its data outside the model's folder"):
        validate_model(path)


def test_negative_length_of_a_weight_is_refused(path):
    model = onnx.load(path)
    model.graph.initializer[1].dims[0] = -1
    path.write_bytes(model.SerializeToString())
    with pytest.raises(InvalidModelError, match=r"b has the shape \(-1,\)"):
        validate_model(path)


def test_names_in_a_message_are_visible(path):
    model = onnx.load(path)
    model.graph.initializer[0].name = "\x1b[2J"
    model.graph.initializer[0].raw_data = b"x"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(InvalidModelError, match=r"\\x1b\[2J can't be read"):
        validate_model(path)


def test_linked_external_data_is_refused(external):
    data = external.parent / "model.onnx.data"
    data.replace(external.parent.parent / "outside.data")
    data.symlink_to(external.parent.parent / "outside.data")
    with pytest.raises(InvalidModelError, match="outside the model's folder"):
        validate_model(external)


def test_absent_or_short_external_data_is_refused(external):
    data = external.parent / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:10])
    with pytest.raises(InvalidModelError, match="can't be read"):
        validate_model(external)
    data.unlink()
    with pytest.raises(InvalidModelError, match=r"'model\.onnx\.data', which is not there"):
        validate_model(external)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def unsorted_nodes(path):
    model = onnx.load(path)
    first, second = model.graph.node
    del model.graph.node[:]
    model.graph.node.extend([second, first])
    onnx.save(model, path)


def unknown_operator(path):
    model = onnx.load(path)
    model.graph.node[0].op_type = "MatMuul"
    onnx.save(model, path)


def wrong_shape(path):
    onnx.save(tiny_model(np.ones((4, 2), np.float32)), path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "found no such file"),
        (lambda path: (path.unlink(), path.mkdir()), "found a folder"),
        (lambda path: path.write_bytes(b""), "is not an ONNX model: it has no IR version"),
        (lambda path: path.write_text("not a model at all"), "not an ONNX model"),
        (lambda path: path.write_bytes(bytes(range(256)) * 20), "not an ONNX model"),
        (lambda path: path.write_bytes(b"\x08" + b"\xff" * 20), "not an ONNX model"),
        (lambda path: path.write_bytes(b"\x08\x08\x3a\x02\x0a\xff"), "not an ONNX model"),
        (truncate, "is truncated or not an ONNX model"),
        (unsorted_nodes, "onnx.checker: .*sorted"),
        (unknown_operator, "onnx.checker: .*MatMuul"),
        (wrong_shape, "onnx.checker: .*[Ii]ncompatible dimensions"),
    ],
)
def test_broken_file_is_an_invalid_model(path, change, message):
    change(path)
    with pytest.raises(InvalidModelError, match=message) as caught:
        validate_model(path)
    assert str(path) in str(caught.value)


def test_input_that_is_no_tensor_is_refused(path):
    model = onnx.load(path)
    sequence = helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, [2])
    model.graph.input.append(sequence)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(InvalidModelError, match="input s is no tensor of a known type: sequence"):
        validate_model(path)


@pytest.mark.parametrize("inside", [False, True])
def test_model_of_more_parts_than_any_has_is_refused(path, monkeypatch, inside):
    monkeypatch.setattr("heimdall_onnx.model.onnx.file.MAX_FIELDS", 100)
    validate_model(path)
    model = onnx.load(path)
    if inside:
        model.graph.node[0].attribute.extend(onnx.AttributeProto() for _ in range(100))
    path.write_bytes(model.SerializeToString() + (b"" if inside else b"\x08\x08" * 100))
    with pytest.raises(InvalidModelError, match="it has more than 100 fields"):
        validate_model(path)


@pytest.mark.parametrize("content", [b"\x3a", b"\x3a\x02\x0a", b"\xff" * 50, b"\x0a\x05x"])
def test_file_that_ends_within_a_field_is_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(InvalidModelError, match="is truncated or not an ONNX model"):
        validate_model(path)


def test_operators_inside_branches_are_counted(tmp_path):
    branch = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["n"])],
        "branch",
        [],
        [helper.make_tensor_value_info("n", TensorProto.FLOAT, None)],
    )
    graph = helper.make_graph(
        [helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)],
        "choice",
        [
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch"]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch"])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "a.onnx")
    assert validate_model(tmp_path / "a.onnx").operators == {"Neg": 2, "If": 1}


def test_structure_and_initializers_together_are_the_file(path):
    structure, weights = read_model(path)
    assert not structure.graph.initializer
    assert [t.name for t in weights] == ["w", "b"]
    structure.graph.initializer.extend(weights)
    assert structure == onnx.load(path)
