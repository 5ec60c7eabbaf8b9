from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import heimdall_onnx.model.onnx.graph
from heimdall_onnx.common.errors import EvidenceError, InvalidModelError
from heimdall_onnx.common.verdict import Gate
from heimdall_onnx.evidence.parity.departure import ROOT, locate_departure
from heimdall_onnx.localization.network import LocalizationNet
from heimdall_onnx.model.onnx.export import export_model
from heimdall_onnx.model.signature import Signature, TensorSpec

OPSETS = (14, 20)
BOTH = pytest.mark.parametrize("opset", OPSETS)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small operations lose more to waiting threads than they gain, most on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def first_departure(model, path, inputs, tolerance=1e-5):
    """Where it departs on inputs on which a gate failed."""
    failed = SimpleNamespace(
        gates=lambda: [Gate.at_most("error", 0, 1)], worst_inputs=inputs, tolerance=tolerance
    )
    return locate_departure(failed, model, path)


def specs(*names, shape=("batch", 6)):
    return tuple(TensorSpec(name, "float32", shape) for name in names)


class Block(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))
        self.scale = nn.Parameter(torch.full((6,), scale))
        self.nothing = nn.Identity()

    def forward(self, x):
        return x + self.nothing(self.scale * self.inner(x))


class Net(nn.Module):
    """Lists, a module called twice, one without nodes, one returning a tuple, two heads."""

    signature = Signature(specs("x"), specs("left", "right"))

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(scale) for scale in (0.4, 0.5, 0.6)])
        self.drop = nn.Dropout(0.5)
        self.act = nn.Tanh()
        self.recurrent = nn.LSTM(6, 6, batch_first=True)
        self.left = nn.Linear(6, 6)
        self.right = nn.Linear(6, 6)

    def forward(self, x):
        for block in self.blocks:
            x = self.act(block(x))
        y, (hidden, _) = self.recurrent(self.drop(x).unsqueeze(1))
        y = y.squeeze(1) * 3 + hidden[0]
        return self.left(y), self.right(y)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def exported(net, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    return {o: export_model(net, folder / f"{o}.onnx", opset=o).path for o in OPSETS}


@pytest.fixture
def inputs():
    return {"x": np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)}


def plant(source, target, node_name, *, position=1, change=lambda a: a + np.float32(0.25)):
    """Change the weight at ``position`` among the inputs of one node, and of that node only."""
    model = onnx.load(source)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    node = next(n for n in model.graph.node if n.name == node_name)
    changed = change(numpy_helper.to_array(weights[node.input[position]]))
    model.graph.initializer.append(numpy_helper.from_array(changed, "planted"))
    node.input[position] = "planted"
    onnx.save(model, target)
    return target


# A node, the weight among its inputs that is changed, and the module that must be named.
FAULTS = [
    (14, "/blocks.0/inner/inner.0/Gemm", 1, "blocks.0.inner.0", "Linear"),
    (20, "node_linear", 1, "blocks.0.inner.0", "Linear"),
    (14, "/blocks.1/inner/inner.2/Gemm", 2, "blocks.1.inner.2", "Linear"),
    (20, "node_linear_3", 2, "blocks.1.inner.2", "Linear"),
    (14, "/blocks.2/Mul", 0, "blocks.2", "Block"),
    (20, "node_mul_32", 0, "blocks.2", "Block"),
    (14, "/recurrent/LSTM", 1, "recurrent", "LSTM"),
    (20, "node_lstm__2", 1, "recurrent", "LSTM"),
    (14, "/left/Gemm", 1, "left", "Linear"),
    (20, "node_linear_6", 1, "left", "Linear"),
    (14, "/right/Gemm", 2, "right", "Linear"),
    (20, "node_linear_7", 2, "right", "Linear"),
    (20, "node_mul_60", 1, ROOT, "Net"),
]


@BOTH
def test_faithful_export_does_not_depart(net, exported, inputs, opset):
    assert first_departure(net, exported[opset], inputs) is None


@pytest.mark.parametrize(("opset", "node", "position", "scope", "module_type"), FAULTS)
def test_planted_fault_is_named_by_its_deepest_module(
    net, exported, inputs, tmp_path, opset, node, position, scope, module_type
):
    path = plant(exported[opset], tmp_path / "a.onnx", node, position=position)
    found = first_departure(net, path, inputs)
    assert (found.scope, found.module_type) == (scope, module_type)
    assert found.max_abs_error > found.limit
    assert any(operator.endswith(f" {node}") for operator in found.operators) or scope == ROOT


@BOTH
def test_earlier_of_two_faults_is_named(net, exported, inputs, tmp_path, opset):
    early = {14: "/blocks.1/inner/inner.0/Gemm", 20: "node_linear_2"}[opset]
    late = {14: "/left/Gemm", 20: "node_linear_6"}[opset]
    path = plant(exported[opset], tmp_path / "a.onnx", late)
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        tensor.name = tensor.name.replace("planted", "first")
    for node in model.graph.node:
        node.input[:] = [name.replace("planted", "first") for name in node.input]
    onnx.save(model, path)
    plant(path, path, early)
    assert first_departure(net, path, inputs).scope == "blocks.1.inner.0"


def set_attribute(source, target, op, name, value):
    model = onnx.load(source)
    node = next(n for n in model.graph.node if n.op_type == op)
    attribute = next((a for a in node.attribute if a.name == name), None)
    node.attribute.remove(attribute) if attribute else None
    node.attribute.append(onnx.helper.make_attribute(name, value))
    onnx.save(model, target)
    return target


def test_changed_attribute_is_found(net, exported, inputs, tmp_path):
    path = set_attribute(exported[20], tmp_path / "a.onnx", "Gelu", "approximate", "tanh")
    found = first_departure(net, path, inputs, tolerance=1e-6)
    assert (found.scope, found.module_type) == ("blocks.0.inner.1", "GELU")
    assert found.operators == ("Gelu node_gelu",)


@pytest.mark.parametrize("name", ["/act_1/Tanh", "node_tanh_1"])
def test_second_call_of_a_module_is_found(net, exported, inputs, tmp_path, name):
    path = exported[14 if "/" in name else 20]
    model = onnx.load(path)
    next(n for n in model.graph.node if n.name == name).op_type = "Sigmoid"
    onnx.save(model, tmp_path / "a.onnx")
    assert first_departure(net, tmp_path / "a.onnx", inputs).scope == "act"


@BOTH
def test_operation_in_place_does_not_blame_the_module_before(tmp_path, inputs, opset):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 6)).eval()
    model.signature = Signature(specs("x"), specs("y"))
    path = export_model(model, tmp_path / "a.onnx", opset=opset).path
    onnx_model = onnx.load(path)
    next(n for n in onnx_model.graph.node if n.op_type == "Relu").op_type = "Sigmoid"
    onnx.save(onnx_model, path)
    assert first_departure(model, path, inputs).scope == "1"


@BOTH
def test_departure_tells_the_values(net, exported, inputs, tmp_path, opset):
    node = {14: "/left/Gemm", 20: "node_linear_6"}[opset]
    path = plant(
        exported[opset],
        tmp_path / "a.onnx",
        node,
        position=2,
        change=lambda a: a + np.eye(6)[0].astype("f4"),
    )
    found = first_departure(net, path, inputs, tolerance=1e-4)
    with torch.no_grad():
        left = net(torch.from_numpy(inputs["x"]))[0].numpy()
    assert found.max_abs_error == pytest.approx(1, abs=1e-5)
    assert found.onnx_value - found.pytorch_value == pytest.approx(1, abs=1e-5)
    assert found.reference_magnitude == pytest.approx(np.abs(left).max(), abs=1e-5)
    assert found.limit == pytest.approx(2e-4 * max(1, np.abs(left).max()))


@BOTH
def test_not_a_number_departs(net, exported, inputs, tmp_path, opset):
    node = {14: "/left/Gemm", 20: "node_linear_6"}[opset]
    path = plant(exported[opset], tmp_path / "a.onnx", node, change=lambda a: a * np.float32("nan"))
    found = first_departure(net, path, inputs)
    assert found.scope == "left"
    assert np.isinf(found.max_abs_error)
    assert np.isnan(found.onnx_value)


def test_not_a_number_on_both_sides_agrees(tmp_path, inputs):
    model = nn.Sequential(nn.Linear(6, 6)).eval()
    model.signature = Signature(specs("x"), specs("y"))
    path = export_model(model, tmp_path / "a.onnx", opset=14).path
    inputs["x"][0] = np.nan
    assert first_departure(model, path, inputs) is None
    plant(path, path, "/0/Gemm")
    found = first_departure(model, path, inputs)
    assert (found.scope, np.isfinite(found.max_abs_error)) == ("0", True)


def test_fault_below_the_tolerance_does_not_depart(net, exported, inputs, tmp_path):
    path = plant(
        exported[20], tmp_path / "a.onnx", "node_linear_6", change=lambda a: a + np.float32(1e-5)
    )
    assert first_departure(net, path, inputs, tolerance=1e-3) is None
    assert first_departure(net, path, inputs, tolerance=1e-6).scope == "left"


@BOTH
def test_graph_without_scopes_departs_as_a_whole(net, exported, inputs, tmp_path, opset):
    model = onnx.load(exported[opset])
    for index, node in enumerate(model.graph.node):
        node.name = f"n{index}"
        del node.metadata_props[:]
    next(t for t in model.graph.initializer if t.name == "left.bias").raw_data = bytes(24)
    onnx.save(model, tmp_path / "a.onnx")
    assert first_departure(net, tmp_path / "a.onnx", inputs).scope == ROOT


class Folded(nn.Module):
    """Convolution and batch norm, which both exporters fold into one node, and a norm after."""

    signature = Signature(
        specs("x", shape=("batch", 3, 4, 4)), specs("y", shape=("batch", 5, 4, 4))
    )

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 1)
        self.norm = nn.BatchNorm2d(5)
        self.act = nn.ReLU(inplace=True)
        self.last = nn.Conv2d(5, 5, 1)

    def forward(self, x):
        return self.last(self.act(self.norm(self.conv(x))))


@BOTH
def test_folded_modules_are_no_departure_of_their_own(tmp_path, opset):
    torch.manual_seed(0)
    model = Folded().eval()
    model.norm.running_mean.uniform_(-1, 1)
    model.norm.running_var.uniform_(1, 4)
    path = export_model(model, tmp_path / "a.onnx", opset=opset).path
    graph = onnx.load(path).graph
    assert [n.op_type for n in graph.node] == ["Conv", "Relu", "Conv"]
    x = {"x": np.random.default_rng(0).standard_normal((2, 3, 4, 4)).astype(np.float32)}
    assert first_departure(model, path, x) is None
    plant(path, tmp_path / "late.onnx", graph.node[2].name)
    assert first_departure(model, tmp_path / "late.onnx", x).scope == "last"
    plant(path, tmp_path / "early.onnx", graph.node[0].name)
    assert first_departure(model, tmp_path / "early.onnx", x).scope in ("conv", "norm")


@BOTH
def test_weights_in_external_data_are_used(net, exported, inputs, tmp_path, opset):
    model = onnx.load(
        plant(exported[opset], tmp_path / "a.onnx", {14: "/left/Gemm", 20: "node_linear_6"}[opset])
    )
    onnx.save(
        model, tmp_path / "b.onnx", save_as_external_data=True, location="b.data", size_threshold=0
    )
    assert first_departure(net, tmp_path / "b.onnx", inputs).scope == "left"


def test_large_weights_are_handed_over_unchanged(net, exported, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(heimdall_onnx.model.onnx.graph, "INLINE_BYTES", 100)
    assert first_departure(net, exported[20], inputs) is None
    path = plant(exported[20], tmp_path / "a.onnx", "node_linear_3")
    assert first_departure(net, path, inputs).scope == "blocks.1.inner.2"


def test_reference_model_departs_only_where_it_was_changed(tmp_path):
    torch.manual_seed(0)
    model = LocalizationNet(backbone_size="atto").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("layer_scale"):
                parameter.fill_(0.3)  # as after training; at 1e-6 a block contributes nothing
    path = export_model(model, tmp_path / "a.onnx", opset=14).path
    x = {"mel_spectrogram": np.random.default_rng(0).standard_normal((2, 3, 128, 32)).astype("f4")}
    assert first_departure(model, path, x) is None
    with torch.no_grad():
        model.backbone[0][5][4].block[3].bias[7] += 1
    assert first_departure(model, path, x).scope == "backbone.0.5.4.block.3"


def test_hooks_are_removed_and_modes_kept(net, exported, inputs):
    first_departure(net, exported[20], inputs)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())  # noqa: SLF001
    assert not net.training


def test_broken_file_is_an_invalid_model(net, inputs, tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"\x08\x08")
    with pytest.raises(InvalidModelError, match="can't load"):
        first_departure(net, tmp_path / "a.onnx", inputs)


def test_inputs_that_do_not_fit_the_graph_are_an_evidence_error(net, exported, inputs, tmp_path):
    model = onnx.load(exported[14])
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 9
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(EvidenceError, match="can't run the graph"):
        first_departure(net, tmp_path / "a.onnx", inputs)
