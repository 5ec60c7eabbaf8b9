import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime as ort
import pytest
import torch
from models import SmallNet
from pydantic import ValidationError

from heimdall_onnx.common.errors import (
    EvidenceError,
    InputError,
    InvalidModelError,
    UnavailableError,
)
from heimdall_onnx.common.machine import instruction_sets, usable_processors
from heimdall_onnx.model import runtimes
from heimdall_onnx.model.examples import generic_inputs
from heimdall_onnx.model.inference import run_pytorch
from heimdall_onnx.model.onnx.export import export_model
from heimdall_onnx.model.runtimes import (
    Contender,
    OpenVINOSession,
    SessionSettings,
    bound_call,
    open_runner,
    require_runtime,
)

SIGNATURE = SmallNet.signature
OPENVINO = SessionSettings(runtime="openvino", provider="CPU", threads=1)


@pytest.fixture(scope="module")
def onnx_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    export_model(SmallNet(), path, signature=SIGNATURE, opset=14)
    return path


@pytest.fixture
def inputs():
    return generic_inputs(SIGNATURE, 3)


@pytest.mark.parametrize(
    "settings",
    [
        SessionSettings(threads=1),
        SessionSettings(threads=1, level="extended", spinning=False, arena=False, prepacking=False),
        OPENVINO,
    ],
    ids=["onnxruntime", "other options", "openvino"],
)
def test_every_runtime_gives_pytorchs_answers(onnx_path, inputs, settings):
    runner = open_runner(onnx_path, SIGNATURE, settings)
    found, expected = runner.run(inputs), run_pytorch(SmallNet(), inputs, SIGNATURE)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5)
    assert runner.ran_on == settings.provider


def test_answers_are_not_overwritten_by_the_next_call(onnx_path, inputs):
    runner = open_runner(onnx_path, SIGNATURE, OPENVINO)
    first = runner.run(inputs)
    kept = first["positions"].copy()
    runner.run(generic_inputs(SIGNATURE, 3, seed=1))
    assert (first["positions"] == kept).all()


def test_pytorch_runs_a_pickled_model(tmp_path, inputs):
    torch.save(SmallNet(), tmp_path / "model.pkl")
    settings = SessionSettings(runtime="pytorch", threads=1)
    call = Contender(tmp_path / "model.pkl", inputs, SIGNATURE, settings)
    assert call.ran_on == "cpu"
    assert call()["positions"].shape == (3, 2)
    assert call(5)["positions"].shape == (5, 2)


@pytest.mark.parametrize(
    ("provider", "words"),
    [
        ("CUDAExecutionProvider", "onnxruntime-gpu"),
        ("TensorrtExecutionProvider", "tensorrt"),
        ("NoSuchProvider", "another build of onnxruntime"),
    ],
)
def test_missing_provider_is_named_with_what_brings_it(onnx_path, provider, words):
    if provider in ort.get_available_providers():
        pytest.skip(f"{provider} is installed")
    settings = SessionSettings(provider=provider)
    for attempt in (
        lambda: require_runtime(settings),
        lambda: open_runner(onnx_path, SIGNATURE, settings),
    ):
        with pytest.raises(UnavailableError, match=words) as caught:
            attempt()
        assert "CPUExecutionProvider" in str(caught.value)
    assert issubclass(UnavailableError, InputError)


def test_provider_that_can_not_start_is_not_replaced(onnx_path, monkeypatch):
    # As ONNX Runtime built for CUDA does where there is no device.
    available = ["CUDAExecutionProvider", *ort.get_available_providers()]
    monkeypatch.setattr(ort, "get_available_providers", lambda: available)
    monkeypatch.setattr(ort, "preload_dlls", lambda: None)
    with pytest.raises((UnavailableError, InvalidModelError), match="CUDAExecutionProvider"):
        open_runner(onnx_path, SIGNATURE, SessionSettings(provider="CUDAExecutionProvider"))


def test_precision_is_read_back(onnx_path):
    settings = OPENVINO.model_copy(update={"precision": "bf16"})
    if {"avx512_bf16", "amx_bf16"} & set(instruction_sets()):
        assert open_runner(onnx_path, SIGNATURE, settings).session.precision == "bf16"
    else:
        with pytest.raises(UnavailableError, match="asked OpenVINO for bf16, and it runs f32"):
            open_runner(onnx_path, SIGNATURE, settings)


def test_openvino_that_is_not_installed_is_named_with_its_extra(onnx_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UnavailableError, match=r"heimdall-onnx\[openvino\]"):
        require_runtime(OPENVINO)


def test_openvino_session_is_called_like_one_of_onnx_runtime(onnx_path, inputs):
    session, other = OpenVINOSession(onnx_path, OPENVINO), ort.InferenceSession(str(onnx_path))
    assert [p.name for p in session.get_inputs()] == [p.name for p in other.get_inputs()]
    assert [p.name for p in session.get_outputs()] == [p.name for p in other.get_outputs()]
    assert session.get_inputs()[0].shape == (None, 2, 8, 8)
    for mine, theirs in zip(session.run(None, inputs), other.run(None, inputs), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
    (spread,) = session.run(["spread"], inputs)
    assert spread.shape == (3, 2)


_SIGNAL_AFTERWARDS = """
import signal, sys, threading
from heimdall_onnx.model.runtimes import OpenVINOSession, SessionSettings

sessions = [OpenVINOSession(sys.argv[1], SessionSettings(runtime="openvino", provider="CPU"))]
thread = threading.Thread(target=sessions.clear)
thread.start()
thread.join()
signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
signal.raise_signal(signal.SIGTERM)
"""


def test_a_signal_is_survived_after_another_thread_has_dropped_the_openvino_model(onnx_path):
    command = [sys.executable, "-c", _SIGNAL_AFTERWARDS, onnx_path]
    assert subprocess.run(command, timeout=60).returncode == 5


def test_openvino_says_what_it_can_not_run(onnx_path, tmp_path):
    with pytest.raises(EvidenceError, match=r"can't run the model on .*\(3, 5\)"):
        OpenVINOSession(onnx_path, OPENVINO).run(None, {"signal": np.zeros((3, 5), np.float32)})
    (tmp_path / "model.onnx").write_bytes(b"nothing")
    with pytest.raises(InvalidModelError, match="OpenVINO can't load"):
        OpenVINOSession(tmp_path / "model.onnx", OPENVINO)


def test_settings_survive_json_and_refuse_what_they_do_not_know():
    settings = SessionSettings(threads=3, level="extended", provider_options={"a": "1"})
    text = json.dumps(settings.to_dict())
    assert SessionSettings.model_validate_json(text) == settings
    for wrong in ({"threads": "3"}, {"threads": -1}, {"level": "most"}, {"other": 1}):
        with pytest.raises(ValidationError):
            SessionSettings.model_validate({**settings.to_dict(), **wrong})


def test_no_number_of_threads_means_all_processors():
    assert SessionSettings().thread_count == usable_processors()
    assert SessionSettings(threads=7).thread_count == 7


def test_a_bound_call_runs_the_model_where_its_inputs_are(onnx_path, inputs):
    # On the processor's own memory, which ONNX Runtime binds as it does a GPU's.
    runner = open_runner(onnx_path, SIGNATURE, SessionSettings(threads=1))
    call = bound_call(runner.session, inputs, SIGNATURE, "cpu")
    recorded = []
    session = runner.session

    class Watched:
        def io_binding(self):
            self.binding = session.io_binding()
            return self.binding

        def run_with_iobinding(self, binding):
            session.run_with_iobinding(binding)
            recorded.append(binding.copy_outputs_to_cpu())

    bound_call(Watched(), inputs, SIGNATURE, "cpu")()
    expected = runner.run(inputs)
    for spec, found in zip(SIGNATURE.outputs, recorded[0], strict=True):
        np.testing.assert_array_equal(found, expected[spec.name])
    assert call() is None


def test_only_gpus_have_a_way_to_go():
    assert SessionSettings(provider="CUDAExecutionProvider").on_gpu
    assert not SessionSettings().on_gpu
    assert not OPENVINO.on_gpu


def test_threads_that_share_an_openvino_session_get_their_own_answers(onnx_path):
    session = OpenVINOSession(onnx_path, OPENVINO)
    feeds = [generic_inputs(SIGNATURE, 3, seed=seed) for seed in range(4)]
    expected = [session.run(["positions"], feed)[0] for feed in feeds]

    def wrong(index):
        found = (session.run(["positions"], feeds[index])[0] for _ in range(200))
        return sum(not np.array_equal(answer, expected[index]) for answer in found)

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(wrong, range(4))) == [0, 0, 0, 0]


def test_tensorrt_keeps_its_engines_beside_the_model_with_cuda_behind_it(onnx_path, monkeypatch):
    asked = {}

    class Opened:
        def get_providers(self):
            return ["TensorrtExecutionProvider"]

    # TensorRT itself is not to be had without its GPU: what it is asked for is.
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["TensorrtExecutionProvider"])
    monkeypatch.setattr(ort, "preload_dlls", lambda: None)
    monkeypatch.setattr(
        runtimes, "open_session", lambda _, **given: asked.update(given) or Opened()
    )
    settings = SessionSettings(
        provider="TensorrtExecutionProvider", provider_options={"trt_engine_cache_enable": "1"}
    )
    runtimes.open_onnxruntime(onnx_path, settings)
    beside = str(onnx_path.parent / "engines")
    assert asked["provider_options"] == {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": beside,
        "trt_timing_cache_path": beside,
    }
    assert asked["behind"] == ("CUDAExecutionProvider",)
