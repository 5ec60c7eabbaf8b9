import sys
from collections import Counter

import numpy as np
import onnx
import onnxruntime.quantization
import pytest
from models import BlockNet, SmallNet

from heimdall_onnx.common.errors import EvidenceError, UnavailableError
from heimdall_onnx.common.machine import multiplies_in_8_bits
from heimdall_onnx.common.parameters import VARIANTS
from heimdall_onnx.evidence.variants import recipes as optimize
from heimdall_onnx.evidence.variants.recipes import (
    RECIPES,
    VariantJob,
    chosen_recipes,
    make_variant,
)
from heimdall_onnx.model.examples import generic_inputs
from heimdall_onnx.model.onnx.export import export_model
from heimdall_onnx.model.onnx.validate import validate_model
from heimdall_onnx.model.runtimes import open_runner

MADE_HERE = sorted(name for name, recipe in RECIPES.items() if recipe.make is not None)


@pytest.fixture(scope="module")
def fp32(tmp_path_factory):
    path = tmp_path_factory.mktemp("fp32") / "model.onnx"
    export_model(BlockNet().eval(), path, signature=BlockNet.signature, opset=20)
    return path


def job(source, folder, keep=()):
    inputs = generic_inputs(BlockNet.signature, 10)
    return VariantJob(source, folder / "variant.onnx", inputs, keep, folder)


def operators(path):
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.parametrize("name", MADE_HERE)
def test_every_variant_is_made_and_runs(fp32, tmp_path, name):
    make_variant(name, job(fp32, tmp_path))
    path = tmp_path / "variant.onnx"
    info = validate_model(path, signature=BlockNet.signature)
    assert not info.signature_problems
    settings = RECIPES[name].settings
    if settings.provider.startswith("CUDA"):
        settings = settings.model_copy(update={"provider": "CPUExecutionProvider"})
    inputs = generic_inputs(BlockNet.signature, 4, seed=3)
    runner = open_runner(path, BlockNet.signature, settings)
    reference = open_runner(fp32, BlockNet.signature, RECIPES["fp32"].settings)
    found, expected = runner.run(inputs), reference.run(inputs)
    assert found["positions"].dtype == np.float32
    # The block that is hard to round costs much; what is wrong altogether would miss the globe.
    assert np.abs(found["positions"] - expected["positions"]).max() < 5


@pytest.mark.parametrize(
    ("name", "operator"),
    [
        ("int8-dynamic", "MatMulInteger"),
        ("int8-minmax", "QuantizeLinear"),
        ("int8-entropy", "QuantizeLinear"),
        ("int8-percentile", "QuantizeLinear"),
        ("int8-nncf", "QuantizeLinear"),
        ("int8-weights", "MatMulNBits"),
        ("int4-weights", "MatMulNBits"),
    ],
)
def test_what_is_kept_in_float_is_not_quantized(fp32, tmp_path, name, operator):
    nodes = [n.name for n in onnx.load(fp32).graph.node if n.op_type in {"MatMul", "Gemm"}]
    make_variant(name, job(fp32, tmp_path, tuple(nodes[:4])))
    spared = operators(tmp_path / "variant.onnx")[operator]
    assert spared > 0
    make_variant(name, job(fp32, tmp_path, tuple(nodes)))
    left = operators(tmp_path / "variant.onnx")[operator]
    # NNCF rounds sums as well.
    assert left < spared if name == "int8-nncf" else left == 0


def test_ranges_are_calibrated_once(fp32, tmp_path, monkeypatch):
    calls, make = [], onnxruntime.quantization.create_calibrator
    monkeypatch.setattr(
        onnxruntime.quantization,
        "create_calibrator",
        lambda *args, **options: (
            calls.append(options["calibrate_method"].name) or make(*args, **options)
        ),
    )
    for method in ("minmax", "entropy", "minmax"):
        make_variant(f"int8-{method}", job(fp32, tmp_path))
    assert calls == ["MinMax", "Entropy"]


def test_calibration_inputs_decide_on_the_ranges(fp32, tmp_path):
    scales = []
    for factor in (1.0, 0.01):
        folder = tmp_path / str(factor)
        folder.mkdir()
        made = job(fp32, folder)
        inputs = {name: array * np.float32(factor) for name, array in made.calibration.items()}
        make_variant("int8-minmax", VariantJob(made.source, made.target, inputs, (), folder))
        graph = onnx.load(made.target).graph
        values = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
        first = next(n for n in graph.node if n.op_type == "QuantizeLinear")
        scales.append(values[first.input[1]].item())
    assert scales[1] == pytest.approx(scales[0] / 100, rel=1e-3)


def test_weights_leave_a_bit_unused_where_products_may_overflow(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    export_model(SmallNet(), path, signature=SmallNet.signature, opset=14)
    widths = {}
    for sets in (("avx2", "fma"), ("avx2", "avx512_vnni")):
        known = multiplies_in_8_bits(sets)
        monkeypatch.setattr(optimize, "multiplies_in_8_bits", lambda known=known: known)
        make_variant("int8-dynamic", job(path, tmp_path))
        found = onnx.load(tmp_path / "variant.onnx").graph.initializer
        weights = [onnx.numpy_helper.to_array(t) for t in found if t.name.endswith("_quantized")]
        widths[sets[1]] = max(int(np.abs(w.astype(int)).max()) for w in weights)
    assert widths["fma"] <= 64 < widths["avx512_vnni"]


def test_missing_tool_is_named_with_its_extra(fp32, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(UnavailableError, match=r"made by nncf.*heimdall-onnx\[openvino\]"):
        make_variant("int8-nncf", job(fp32, tmp_path))


def test_a_model_that_a_tool_can_not_take_is_an_error_in_words(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"nothing")
    with pytest.raises(EvidenceError, match="int8-dynamic can't be made of this model: "):
        make_variant("int8-dynamic", job(tmp_path / "model.onnx", tmp_path))


def test_tools_print_nothing(fp32, tmp_path, capfd):
    make_variant("int8-entropy", job(fp32, tmp_path))
    assert capfd.readouterr() == ("", "")


def test_recipes_are_those_that_parameters_know():
    assert tuple(RECIPES) == VARIANTS
    assert [r.name for r in chosen_recipes("all")] == list(VARIANTS)
    assert chosen_recipes("none") == ()
    chosen = chosen_recipes("int8-minmax, bf16-openvino")
    assert [r.name for r in chosen] == ["fp32", "bf16-openvino", "int8-minmax"]
