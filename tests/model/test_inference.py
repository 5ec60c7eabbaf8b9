import os
import subprocess
import sys
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
import pytest
import torch
from models import (
    POSITIONS,
    SIGNAL,
    SPREAD,
    DictNet,
    IntegerNet,
    NaNNet,
    SmallNet,
    declare,
)
from torch import nn

from heimdall_onnx.common.errors import EvidenceError, InvalidModelError
from heimdall_onnx.model.examples import generic_inputs
from heimdall_onnx.model.inference import (
    flatten_outputs,
    named_outputs,
    open_session,
    run_onnx,
    run_pytorch,
)
from heimdall_onnx.model.onnx.export import export_model
from heimdall_onnx.model.runtimes import Contender, SessionSettings
from heimdall_onnx.model.signature import TensorSpec

SIGNATURE = SmallNet.signature


@pytest.fixture(scope="module")
def small_onnx(tmp_path_factory):
    return export_model(SmallNet(), tmp_path_factory.mktemp("onnx") / "m.onnx", opset=17).path


@pytest.fixture
def inputs():
    return generic_inputs(SIGNATURE, 3)


class Raw(nn.Module):
    """Returns what it is told to."""

    def __init__(self, result):
        super().__init__()
        self.result = result

    def forward(self, signal):
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def test_pytorch_outputs_come_by_name_as_arrays(inputs):
    net = SmallNet()
    outputs = run_pytorch(net, inputs, SIGNATURE)
    with torch.no_grad():
        positions, spread = net(torch.from_numpy(inputs["signal"]))
    assert list(outputs) == ["positions", "spread"]
    np.testing.assert_array_equal(outputs["positions"], positions.numpy())
    np.testing.assert_array_equal(outputs["spread"], spread.numpy())


def test_outputs_in_a_dict_are_found_by_name_not_by_order(inputs):
    expected = run_pytorch(SmallNet(), inputs, SIGNATURE)
    found = run_pytorch(DictNet(), inputs, SIGNATURE)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_what_a_model_writes_into_its_input_reaches_nobody_else():
    class Scaling(nn.Module):
        def forward(self, x):
            return x.mul_(2)

    x = np.ones((2, 3), np.float32)
    assert run_pytorch(Scaling(), {"x": x}, NaNNet.signature)["y"].tolist() == [[2.0] * 3] * 2
    assert (x == 1).all()


def test_single_tensor_is_the_only_output():
    x = np.ones((2, 3), np.float32)
    np.testing.assert_array_equal(run_pytorch(NaNNet(), {"x": x}, NaNNet.signature)["y"], 0 * x)


def test_inputs_are_passed_in_the_signatures_order_and_integers_stay_integers():
    inputs = {"station": np.array([2]), "values": np.full((1, 4), 1.4, np.float32)}
    level = run_pytorch(IntegerNet(), inputs, IntegerNet.signature)["level"]
    assert (level.dtype, level.tolist()) == (np.int64, [[4, 4, 4, 4]])


def test_arrays_may_be_views_with_strides(inputs):
    view = np.broadcast_to(inputs["signal"][:1], (3, 2, 8, 8))[:, ::-1]
    found = run_pytorch(SmallNet(), {"signal": view}, SIGNATURE)
    expected = run_pytorch(SmallNet(), {"signal": view.copy()}, SIGNATURE)
    np.testing.assert_array_equal(found["positions"], expected["positions"])


def test_double_model_is_fed_and_answers_in_double(inputs):
    outputs = run_pytorch(SmallNet().double(), inputs, SIGNATURE)
    assert {a.dtype for a in outputs.values()} == {np.dtype(np.float64)}


def test_double_model_with_buffers_alone_is_fed_double():
    inputs = {"values": np.full((1, 4), 0.1, np.float32), "station": np.array([1])}

    class Scaled(IntegerNet):
        def forward(self, values, station):
            assert values.dtype == self.gain.dtype
            return super().forward(values, station)

    for model in (Scaled(), Scaled().double()):
        run_pytorch(model, inputs, IntegerNet.signature)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_model_without_any_weights_takes_arrays_as_they_are(dtype):
    outputs = run_pytorch(NaNNet(), {"x": np.ones((1, 3), dtype)}, NaNNet.signature)
    assert outputs["y"].dtype == dtype


def test_output_that_numpy_has_no_type_for_is_named():
    class Narrow(nn.Module):
        def forward(self, x):
            return x.bfloat16()

    spec = TensorSpec("x", "float32", ("batch", 3))
    with pytest.raises(EvidenceError, match=r"Narrow returns what NumPy.*BFloat16. Return .float"):
        run_pytorch(
            Narrow(), {"x": np.ones((2, 3), np.float32)}, declare([spec], [replace(spec, name="y")])
        )


def test_no_gradients_are_recorded(inputs):
    seen = []

    class Spy(SmallNet):
        def forward(self, signal):
            seen.append(torch.is_grad_enabled())
            return super().forward(signal)

    run_pytorch(Spy(), inputs, SIGNATURE)
    assert seen == [False]


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (torch.zeros(3, 2), r"Raw returned 1 outputs; its signature names \['positions', 'spr"),
        ([torch.zeros(3, 2)] * 3, "Raw returned 3 outputs"),
        ({"positions": torch.zeros(3, 2)}, r"Raw returned \['positions'\] outputs"),
        (KeyError("station"), r"Raw can't run on \{'signal': \(3, 2, 8, 8\)\}: 'station'"),
    ],
)
def test_model_that_does_not_keep_its_signature_is_named(inputs, result, words):
    with pytest.raises(EvidenceError, match=words):
        run_pytorch(Raw(result), inputs, SIGNATURE)


def test_outputs_beyond_the_signatures_are_left_out(inputs):
    result = {"positions": torch.zeros(1), "spread": torch.ones(1), "debug": torch.ones(1)}
    assert list(run_pytorch(Raw(result), inputs, SIGNATURE)) == ["positions", "spread"]


class Pair(NamedTuple):
    positions: torch.Tensor
    spread: torch.Tensor | None = None


@dataclass
class Answer:
    positions: Any
    spread: Any = None


@dataclass(repr=False)
class Named(OrderedDict):
    """A dictionary with what is in it as attributes, as Hugging Face's outputs are."""

    logits: Any
    loss: Any = None

    def __post_init__(self):
        self.update({name: value for name, value in vars(self).items() if value is not None})


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (torch.zeros(1), ["output"]),
        ((torch.zeros(1), None, [torch.zeros(1)]), ["output_0", "output_2.0"]),
        (Pair(torch.zeros(1)), ["positions"]),
        (
            Answer({"xy": torch.zeros(1), "steps": 3}, (torch.zeros(1), torch.zeros(1))),
            ["positions.xy", "spread.0", "spread.1"],
        ),
        (Named(logits=torch.zeros(1), loss=None), ["logits"]),
        ([{"boxes": torch.zeros(1)}], ["output_0.boxes"]),
    ],
)
def test_outputs_in_one_another_are_found_under_dotted_names(value, names):
    assert [*flatten_outputs(value)] == names


@pytest.mark.parametrize(
    ("result", "names"),
    [
        (Answer(torch.zeros(1), torch.ones(1)), ("positions", "spread")),
        (Answer(torch.zeros(1), torch.ones(1)), ("first", "second")),
        (Answer({"xy": torch.zeros(1)}, (torch.ones(1), 2)), ("positions.xy", "spread.0")),
        (Answer({"xy": torch.zeros(1)}, (torch.ones(1), 2)), ("xy", "spread")),
        ([torch.zeros(1), torch.zeros(1), torch.ones(1)], ("output_0", "output_2")),
    ],
)
def test_outputs_are_named_as_they_lie_or_by_their_own_keys(result, names):
    signature = declare([SIGNAL], [replace(SPREAD, name=name) for name in names])
    found = named_outputs(Raw(None), result, signature)
    assert [(name, tensor.item()) for name, tensor in found.items()] == [
        (names[0], 0.0),
        (names[1], 1.0),
    ]


def test_a_fixed_batch_is_called_as_often_as_the_samples_need(tmp_path):
    calls = []

    class Fixed(nn.Module):
        signature = declare(
            [TensorSpec("x", "float32", (4, 3))],
            [
                TensorSpec("y", "float32", (4, 3)),
                TensorSpec("total", "float32", ()),
                TensorSpec("grid", "float32", (2,)),
                TensorSpec("boxes", "float32", (5, 3)),
            ],
        )

        def forward(self, x):
            calls.append(len(x))
            return x * 2, x.sum(), torch.arange(2.0) + 0 * x[0, 0], x[0].expand(5, 3)

    x = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
    path = export_model(Fixed(), tmp_path / "m.onnx", opset=17).path
    calls.clear()
    found = [
        run_pytorch(Fixed(), {"x": x}, Fixed.signature),
        run_onnx(open_session(path, spinning=False), {"x": x}, Fixed.signature),
    ]
    assert calls == [4, 4]
    for outputs in found:
        np.testing.assert_array_equal(outputs["y"], x * 2)
        totals = [x[:4].sum(), x[[4, 5, 0, 1]].sum()]
        np.testing.assert_allclose(outputs["total"], totals, rtol=1e-5)
        np.testing.assert_array_equal(outputs["grid"], [0, 1, 0, 1])
        np.testing.assert_array_equal(outputs["boxes"], np.repeat(x[[0, 4]], 5, axis=0))
    alone = run_onnx(open_session(path, spinning=False), {"x": x[:4]}, Fixed.signature)
    assert alone["total"].shape == ()


@pytest.mark.parametrize("level", ["none", "basic", "all"])
def test_onnx_outputs_come_by_name_and_equal_pytorchs(small_onnx, inputs, level):
    session = open_session(small_onnx, threads=1, level=level, spinning=False)
    reordered = declare([SIGNAL], [SPREAD, POSITIONS])
    found = run_onnx(session, inputs, reordered)
    assert list(found) == ["spread", "positions"]
    expected = run_pytorch(SmallNet(), inputs, SIGNATURE)
    for name, array in found.items():
        np.testing.assert_allclose(array, expected[name], atol=1e-6)


def test_session_has_the_options_that_were_asked_for(small_onnx):
    level = ort.GraphOptimizationLevel
    session = open_session(small_onnx, threads=3, level="none", spinning=False)
    options = session.get_session_options()
    assert options.intra_op_num_threads == 3
    assert options.graph_optimization_level == level.ORT_DISABLE_ALL
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    options = open_session(small_onnx).get_session_options()
    assert options.intra_op_num_threads == 0
    with pytest.raises(RuntimeError, match="allow_spinning"):  # no such entry
        options.get_session_config_entry("session.intra_op.allow_spinning")
    assert options.graph_optimization_level == level.ORT_ENABLE_ALL
    assert session.get_providers() == ["CPUExecutionProvider"]


@pytest.mark.parametrize("content", [None, b"", b"no model"])
def test_file_that_is_no_model_is_refused(tmp_path, content):
    path = tmp_path / "m.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidModelError, match=rf"can't load {path}"):
        open_session(path)


def test_onnx_runtime_refusing_inputs_is_evidence(small_onnx):
    session = open_session(small_onnx, threads=1)
    wrong = {"signal": np.zeros((1, 5, 8, 8), np.float32)}
    with pytest.raises(EvidenceError, match=r"\{'signal': \(1, 5, 8, 8\)\}") as caught:
        run_onnx(session, wrong, SIGNATURE)
    assert caught.value.__cause__ is not None


def test_loaded_contenders_give_the_same_answers(small_onnx, inputs, tmp_path):
    before = torch.get_num_threads()
    torch.save(SmallNet(), tmp_path / "m.pkl")
    settings = SessionSettings(runtime="pytorch", threads=1)
    try:
        pytorch = Contender(tmp_path / "m.pkl", inputs, SIGNATURE, settings)()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    call = Contender(small_onnx, inputs, SIGNATURE, SessionSettings(threads=1))
    assert call.run.args[0].get_session_options().intra_op_num_threads == 1
    onnx = call()
    for name, array in pytorch.items():
        np.testing.assert_allclose(onnx[name], array, atol=1e-6)


def test_contender_repeats_its_rows_to_fill_a_batch(small_onnx):
    inputs = {"signal": np.random.default_rng(0).standard_normal((3, 2, 8, 8)).astype(np.float32)}
    call = Contender(small_onnx, inputs, SIGNATURE, SessionSettings(threads=1))
    whole, filled = call(), call(8)
    for name, array in filled.items():
        np.testing.assert_allclose(array, whole[name][np.arange(8) % 3], atol=1e-6)
    assert call(2)["positions"].shape == (2, 2)


def test_neither_framework_is_loaded_until_it_is_used(small_onnx):
    code = (
        "import sys, heimdall_onnx.model.inference as i\n"
        "loaded = lambda: [m for m in ('torch', 'onnxruntime', 'onnx') if m in sys.modules]\n"
        "print(loaded()); i.open_session(sys.argv[1], threads=1); print(loaded())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(small_onnx)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
    )
    assert done.stdout.splitlines() == ["[]", "['onnxruntime']"]
