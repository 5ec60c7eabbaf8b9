"""The error along the network jumps where a fault was planted, and only there."""

from types import SimpleNamespace

import numpy as np
import onnx
import psutil
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from heimdall_onnx.common.verdict import Gate
from heimdall_onnx.data.evaluation import EvaluationData
from heimdall_onnx.evidence.parity import departure
from heimdall_onnx.evidence.parity.compare import compare_outputs
from heimdall_onnx.evidence.parity.departure import locate_departure, trace_depth
from heimdall_onnx.model.inference import open_session
from heimdall_onnx.model.onnx.export import export_model
from heimdall_onnx.model.signature import Signature, TensorSpec

BOTH = pytest.mark.parametrize("opset", [14, 20])


class Chain(nn.Module):
    """Blocks in a row; each block's error reaches every later one."""

    signature = Signature(
        (TensorSpec("x", "float32", ("batch", 6)),), (TensorSpec("y", "float32", ("batch", 6)),)
    )

    def __init__(self, depth=5, width=6):
        super().__init__()
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(nn.Linear(6, width), nn.GELU(), nn.Linear(width, 6))
                for _ in range(depth)
            )
        )

    def forward(self, x):
        return self.blocks(x)


@pytest.fixture(scope="module")
def chain():
    torch.manual_seed(0)
    return Chain().eval()


@pytest.fixture(scope="module")
def files(chain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("depth")
    return {o: export_model(chain, folder / f"{o}.onnx", opset=o).path for o in (14, 20)}


@pytest.fixture
def inputs():
    return {"x": np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)}


def depth_profile(model, path, inputs):
    """The course on inputs on which a gate failed."""
    failed = SimpleNamespace(
        gates=lambda: [Gate.at_most("error", 0, 1)],
        worst_inputs=inputs,
        worst_where="",
        tolerance=1e-5,
    )
    return trace_depth(failed, model, path)


def plant(source, target, layer):
    """Change one bias of the ``layer``-th linear layer."""
    model = onnx.load(source)
    linear = [n for n in model.graph.node if n.op_type in ("Gemm", "MatMul")][layer]
    weight = next(t for t in model.graph.initializer if t.name == linear.input[1])
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) + 0.5, weight.name))
    onnx.save(model, target)
    return target


@BOTH
def test_faithful_export_stays_below_the_limit_everywhere(chain, files, inputs, opset):
    found = depth_profile(chain, files[opset], inputs)
    assert {m.scope for m in found.modules} >= {f"blocks.{i}.{j}" for i in range(5) for j in (0, 2)}
    assert all(m.excess < 1 for m in found.modules)


@BOTH
@pytest.mark.parametrize("layer", [0, 3, 9])
def test_error_begins_at_the_planted_module(chain, files, inputs, tmp_path, opset, layer):
    path = plant(files[opset], tmp_path / "m.onnx", layer)
    found = depth_profile(chain, path, inputs)
    names = [m.scope for m in found.modules]
    at = names.index(f"blocks.{layer // 2}.{2 * (layer % 2)}")
    assert all(m.excess < 1 for m in found.modules[:at])
    assert all(m.excess > 1 for m in found.modules[at:])
    assert found.modules[at].module_type == "Linear"
    planted = found.modules[at]
    assert abs(planted.pytorch_value - planted.onnx_value) == pytest.approx(planted.max_abs_error)


def test_modules_come_in_the_order_of_execution(chain, files, inputs):
    found = [m.scope for m in depth_profile(chain, files[20], inputs).modules]
    assert found == sorted(found)


@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_result_does_not_depend_on_how_many_modules_are_looked_at_together(
    chain, files, inputs, monkeypatch, at_once
):
    expected = depth_profile(chain, files[20], inputs)
    monkeypatch.setattr(departure, "MODULES_AT_ONCE", at_once)
    assert depth_profile(chain, files[20], inputs) == expected


def test_value_that_is_not_finite_on_one_side_is_infinitely_wrong(chain, files, inputs, tmp_path):
    model = onnx.load(files[20])
    node = [n for n in model.graph.node if n.op_type in ("Gemm", "MatMul")][4]
    weight = next(t for t in model.graph.initializer if t.name == node.input[1])
    weight.CopyFrom(
        numpy_helper.from_array(np.full_like(numpy_helper.to_array(weight), np.nan), weight.name)
    )
    onnx.save(model, tmp_path / "m.onnx")
    found = {m.scope: m for m in depth_profile(chain, tmp_path / "m.onnx", inputs).modules}
    assert np.isinf(found["blocks.2.0"].max_abs_error)
    assert found["blocks.1.2"].excess < 1


@pytest.mark.thorough
def test_memory_does_not_grow_with_the_depth(tmp_path):
    # 40 blocks of 2 outputs of 8 MB each: 640 MB on either side, if all were kept.
    torch.manual_seed(0)
    model = Chain(depth=40, width=256).eval()
    path = export_model(model, tmp_path / "m.onnx", opset=14).path
    inputs = {"x": np.random.default_rng(0).standard_normal((8192, 6)).astype(np.float32)}
    depth_profile(model, path, {"x": inputs["x"][:2]})
    process = psutil.Process()
    before, most = process.memory_info().rss, 0
    compare = departure.compare_values

    def watch(*arguments):
        nonlocal most
        most = max(most, process.memory_info().rss)
        return compare(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(departure, "compare_values", watch)
        found = depth_profile(model, path, inputs)
    assert len(found.modules) >= 80
    assert most - before < 600e6


def test_depth_is_traced_only_where_parity_fails(chain, files, tmp_path):
    rng = np.random.default_rng(1)
    values = {"x": rng.standard_normal((8, 6)).astype(np.float32)}
    data = EvaluationData(values, None, {}, "eval.npz", "ab", {})
    right = compare_outputs(chain, open_session(files[20]), data, chain.signature)
    assert trace_depth(right, chain, files[20]) is None
    path = plant(files[20], tmp_path / "m.onnx", 5)
    wrong = compare_outputs(chain, open_session(path), data, chain.signature)
    traced, named = trace_depth(wrong, chain, path), locate_departure(wrong, chain, path)
    assert traced.where == wrong.worst_where
    first = next(m for m in traced.modules if m.excess > 1)
    assert first.scope == named.scope == "blocks.2.2"
    assert (first.max_abs_error, first.pytorch_value, first.onnx_value) == (
        named.max_abs_error,
        named.pytorch_value,
        named.onnx_value,
    )
