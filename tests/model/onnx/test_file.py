import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from heimdall_onnx.common.errors import InvalidModelError
from heimdall_onnx.model.onnx.file import read_model, write_model

WEIGHTS = {
    "w": np.arange(600, dtype=np.float32).reshape(3, 200),
    "b": np.array(7, dtype=np.int64),
    "empty": np.zeros((0, 2), np.float16),
}


def proto():
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], doc_string="node")],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 200])],
        [numpy_helper.from_array(array, name) for name, array in WEIGHTS.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture(params=["inline", "scattered"])
def model(request, tmp_path):
    """The model with its weights in memory, or in one file each as TorchScript leaves them."""
    if request.param == "inline":
        return ir.from_proto(proto())
    folder = tmp_path / "scattered"
    folder.mkdir()
    onnx.save(
        proto(),
        folder / "m.onnx",
        save_as_external_data=True,
        all_tensors_to_one_file=False,
        size_threshold=0,
    )
    return ir.load(folder / "m.onnx")


def weights(path):
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def test_one_file_holds_everything(model, tmp_path):
    write_model(model, tmp_path / "a.onnx", 10_000)
    assert not (tmp_path / "a.onnx.data").exists()
    assert onnx.load(tmp_path / "a.onnx", load_external_data=False) == proto()


def test_two_files_hold_everything(model, tmp_path):
    write_model(model, tmp_path / "a.onnx", 1_000)
    assert (tmp_path / "a.onnx.data").stat().st_size >= 2400
    assert (tmp_path / "a.onnx").stat().st_size < 1000
    found = weights(tmp_path / "a.onnx")
    assert set(found) == set(WEIGHTS)
    for name, array in WEIGHTS.items():
        np.testing.assert_array_equal(found[name], array)


def test_structure_counts_towards_the_limit(tmp_path):
    size = len(proto().SerializeToString())
    assert size > sum(array.nbytes for array in WEIGHTS.values())
    write_model(ir.from_proto(proto()), tmp_path / "a.onnx", size)
    write_model(ir.from_proto(proto()), tmp_path / "b.onnx", size - 1)
    assert (tmp_path / "a.onnx").stat().st_size == size
    assert (tmp_path / "b.onnx.data").exists()


def test_structure_and_initializers_are_read_apart(tmp_path):
    onnx.save(proto(), tmp_path / "a.onnx")
    structure, weights = read_model(tmp_path / "a.onnx")
    assert not structure.graph.initializer
    structure.graph.initializer.extend(weights)
    assert structure == proto()


@pytest.mark.parametrize("step", range(1, 60, 7))
def test_truncated_file_is_invalid(tmp_path, step):
    content = proto().SerializeToString()
    (tmp_path / "a.onnx").write_bytes(content[: len(content) * step // 60])
    with pytest.raises(InvalidModelError, match="truncated or not an ONNX model"):
        read_model(tmp_path / "a.onnx")


def test_broken_initializer_is_invalid(tmp_path):
    # ModelProto.graph (7) > GraphProto.initializer (5) > a name (8) of 9 bytes, of which 1 is there
    (tmp_path / "a.onnx").write_bytes(bytes([0x3A, 5, 0x2A, 3, 0x42, 9, 0]))
    with pytest.raises(InvalidModelError, match="not an ONNX model"):
        read_model(tmp_path / "a.onnx")
