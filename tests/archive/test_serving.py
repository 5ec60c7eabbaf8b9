"""A served model follows its alias, loses no request on the way, and takes nothing unproven."""

import json
import os
import signal as signals
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import boto3
import mlflow
import numpy as np
import onnx
import pytest
import quick_release
import servers
import torch
from captures import simulate_captures
from proxy import Fault, proxied, wait_for
from pydantic import SecretStr
from quick_release import Factory
from structlog.testing import capture_logs

from heimdall_onnx.archive import serving
from heimdall_onnx.archive.aliases import AliasLog
from heimdall_onnx.archive.load import load_model
from heimdall_onnx.archive.serving import ServedModel, checked_inputs, require_compatible
from heimdall_onnx.common.errors import (
    DataError,
    InvalidModelError,
    ParameterError,
    ServiceError,
    VerificationError,
)
from heimdall_onnx.localization.features import write_features
from heimdall_onnx.localization.network import LOCALIZATION_SIGNATURE, LocalizationNet
from heimdall_onnx.model.inference import run_onnx, run_pytorch
from heimdall_onnx.model.onnx.export import export_model
from heimdall_onnx.model.signature import Signature, TensorSpec
from heimdall_onnx.review.promotion import roll_back
from heimdall_onnx.services.connection import connect

pytestmark = pytest.mark.services

BUCKET = "test-serving"
SIGNAL = {"signal": np.array([[50, 9], [47, 8]], np.float32)}


@pytest.fixture(scope="module")
def settings(make_settings):
    return make_settings("serving")


@pytest.fixture
def connection(settings, reset_mlflow):
    return connect(settings)


@pytest.fixture
def factory(connection, tmp_path, request):
    """Releases of a model of the test's own, offered as ``production``."""
    make = Factory(connection, BUCKET, tmp_path, name=request.node.originalname)
    return lambda **options: make(**{"alias": "production", **options})


@pytest.fixture
def uri(request):
    return f"models:/{request.node.originalname}@production"


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """Where temporary files are made."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def missed(answer) -> float:
    """By how many degrees, which says which release it was."""
    return round(float(answer.positions[0, 0]) - 50, 2)


@pytest.fixture
def sessions(monkeypatch):
    """What served models open, in order, held by nobody else."""
    opened = []

    def load(*args, **options):
        session = load_model(*args, **options)
        opened.append(weakref.ref(session))
        return session

    monkeypatch.setattr(serving, "load_model", load)
    return opened


@contextmanager
def request_under_way(model):
    """A request that the model is in the middle of until its answer is called for."""
    begun, called_for = threading.Event(), threading.Event()

    def run(*args):
        if threading.current_thread().name.startswith("request"):
            begun.set()
            assert called_for.wait(60)
        return run_onnx(*args)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(1, "request") as beside:
        patch.setattr(serving, "run_onnx", run)
        asked = beside.submit(model.predict, SIGNAL)
        assert begun.wait(60)

        def answer():
            called_for.set()
            return asked.result(60)

        try:
            yield answer
        finally:
            called_for.set()


def watchers(uri):
    return [one for one in threading.enumerate() if one.name == f"watch {uri}"]


# One version


def test_answer_names_the_version_that_gave_it(settings, factory, uri):
    released = factory()
    with ServedModel(uri, settings=settings) as model:
        answer = model.predict(SIGNAL)
        assert answer.model_version == released.model_version == "1"
        assert answer.release_version == released.version
        assert answer.positions is answer.outputs["positions"]
        np.testing.assert_allclose(answer.positions, [[50.01, 9], [47.01, 8]], rtol=1e-6)
        assert answer.deviations is None
        status = model.status
        assert (status.model_version, status.release) == ("1", released.uri)
        assert status.current
        assert model.signature == quick_release.SIGNATURE
        assert "version 1" in repr(model)


def test_recommended_variant_is_opened_as_it_was_measured(settings, factory, uri, sessions):
    factory(recommended="int8-minmax")
    with ServedModel(uri, settings=settings) as model:
        assert (missed(model.predict(SIGNAL)), model.status.variant) == (0.25, "int8-minmax")
        options = sessions[0]().get_session_options()
        assert (options.intra_op_num_threads, options.enable_cpu_mem_arena) == (1, False)
    with ServedModel(uri, settings=settings, variant="int8-nncf") as model:
        assert missed(model.predict(SIGNAL)) == 0.5  # on OpenVINO


@pytest.mark.parametrize(
    ("inputs", "problem"),
    [
        ({}, "no array 'signal'; found none"),
        ({"signal": [[50.0, 9.0]]}, "signal has dtype float64, expected float32"),
        ({"signal": SIGNAL["signal"][:, :1]}, r"signal has shape \(2, 1\), expected"),
        ({"signal": SIGNAL["signal"] * np.nan}, "NaN or Inf in 2 samples"),
        ({"signal": SIGNAL["signal"][:0]}, "signal has no samples"),
        ({"signal": [[50.0], [9.0, 8.0]]}, "something else than arrays"),
        ({**SIGNAL, "nois": 1}, r"no inputs \['nois'\]; expected signal alone"),
        ({"sgnal": 1}, r"(?s)no array 'signal'.*no inputs \['sgnal'\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_with_every_reason(served, inputs, problem):
    with pytest.raises(DataError, match=problem):
        served.predict(inputs)
    assert served.predict(SIGNAL).model_version == "1"


@pytest.fixture(scope="module")
def served(settings, tmp_path_factory):
    Factory(connect(settings), BUCKET, tmp_path_factory.mktemp("served"), name="served")()
    with ServedModel("models:/served@staging", settings=settings) as model:
        yield model


@pytest.mark.parametrize("seconds", [0, -1, 0.05, 1e6, float("nan"), "30", True, None])
def test_refresh_seconds_must_be_a_number_of_seconds(seconds, settings):
    with pytest.raises(ParameterError, match=r"refresh_seconds = .*(should|expected)"):
        ServedModel("models:/served@staging", refresh_seconds=seconds, settings=settings)


def test_every_argument_that_can_not_be_used_is_named(settings):
    for address in ("models:/served/1", "s3://bucket/v1", "models:/a/b@c", "models:/served"):
        with pytest.raises(ParameterError) as caught:
            ServedModel(address, refresh_seconds=0, warm_up=(1, 0), settings=settings)
        assert str(caught.value).count("\n  - ") == 3
        assert f"uri = '{address}'" in str(caught.value)


def test_what_can_not_be_served_from_the_start_leaves_nothing(settings, factory, uri, s3, scratch):
    with pytest.raises(ServiceError, match="not found"):
        ServedModel(uri, settings=settings)
    released = factory()
    tamper(s3, released)
    with pytest.raises(VerificationError, match=r"report\.html: expected"):
        ServedModel(uri, settings=settings)
    assert list(scratch.iterdir()) == watchers(uri) == []


def test_closing_leaves_no_thread_and_no_file(settings, factory, uri, scratch, sessions):
    factory()
    before = set(threading.enumerate())
    with ExitStack() as held:
        with ServedModel(uri, settings=settings, refresh_seconds=0.1) as model:
            model.predict(SIGNAL)
            assert len(watchers(uri)) == 1
            assert len(list(scratch.rglob("model.onnx"))) == 1
            answer = held.enter_context(request_under_way(model))
        assert watchers(uri) == list(scratch.iterdir()) == []
        # Whoever was in the middle of a request gets an answer.
        assert missed(answer()) == 0.01
    assert set(threading.enumerate()) <= before
    assert sessions[0]() is None  # nor the model's memory, while the variable lives on
    for call in (lambda: model.predict(SIGNAL), model.refresh):
        with pytest.raises(ServiceError, match="closed"):
            call()
    model.close()


def test_ids_beyond_their_range_are_refused_before_the_model_looks_them_up():
    station = TensorSpec("station", "int64", ("batch",), range=(0, 4))
    signature = Signature((station,), (TensorSpec("level", "float32", ("batch",)),))
    assert list(checked_inputs({"station": np.array([0, 4])}, signature)) == ["station"]
    with pytest.raises(DataError, match=r"`station` must be in \[0, 4\].*-1 to 7 are in 2 samples"):
        checked_inputs({"station": np.array([3, -1, 7])}, signature)


# The next version


@pytest.mark.slow
def test_no_request_is_lost_while_the_alias_moves(settings, connection, factory, uri):
    factory(error_degrees=0.01)
    second = factory(error_degrees=0.25, alias=None)
    answers, problems, ended = [[] for _ in range(8)], [], threading.Event()

    def ask(seen):
        rng = np.random.default_rng()
        while not ended.is_set():
            signal = rng.uniform(45, 50, (3, 2)).astype(np.float32)
            try:
                answer = model.predict({"signal": signal})
            except Exception as error:
                problems.append(error)
                return
            seen.append((answer.model_version, signal, answer.positions))

    with ServedModel(uri, settings=settings, refresh_seconds=0.1) as model:
        threads = [threading.Thread(target=ask, args=(seen,)) for seen in answers]
        for thread in threads:
            thread.start()
        point(connection, second)
        assert wait_for(lambda: all(seen and seen[-1][0] == "2" for seen in answers), 60)
        ended.set()
        for thread in threads:
            thread.join()
        assert model.status.model_version == "2"
    assert problems == []
    sessions = {
        version: load_model(f"{uri.split('@')[0]}/{version}", settings=settings)
        for version in ("1", "2")
    }
    for seen in answers:
        versions = [version for version, *_ in seen]
        assert set(versions) == {"1", "2"}
        assert versions == sorted(versions)  # it changes once, and never back
        for version, signal, positions in (*seen[:50], *seen[-50:]):
            (expected,) = sessions[version].run(["positions"], {"signal": signal})
            np.testing.assert_array_equal(positions, expected)


def point(connection, release):
    log = AliasLog(connection.bucket(BUCKET), release.model_name, "production")
    log.point(connection.tracker, release.model_version, release.uri, "a run")


def test_rollback_is_followed(settings, connection, factory, uri):
    factory(error_degrees=0.01)
    factory(error_degrees=0.25)
    with ServedModel(uri, settings=settings, refresh_seconds=0.1) as model:
        assert missed(model.predict(SIGNAL)) == 0.25
        roll_back(
            connection,
            BUCKET,
            uri[8:].split("@")[0],
            alias="production",
            reviewer="a reviewer",
            note="it is worse",
        )
        assert wait_for(lambda: model.predict(SIGNAL).model_version == "1", 30)
        assert missed(model.predict(SIGNAL)) == 0.01


def test_version_that_does_not_verify_is_refused_until_it_does(
    settings, connection, factory, uri, s3, scratch
):
    factory(error_degrees=0.01)
    second = factory(error_degrees=0.25, alias=None)
    restore = tamper(s3, second)
    with ServedModel(uri, settings=settings, refresh_seconds=0.1) as model:
        with capture_logs() as logs:
            point(connection, second)
            assert wait_for(lambda: (r := model.status.refused) and r.tries > 1, 30)
        status = model.status
        assert (status.model_version, status.refused.model_version) == ("1", "2")
        assert not status.current
        assert "report.html: expected" in status.refused.reason
        assert len([one for one in logs if one["log_level"] == "warning"]) == 1
        assert missed(model.predict(SIGNAL)) == 0.01
        assert len(list(scratch.rglob("model.onnx"))) == 1
        restore()
        assert model.refresh().model_version == "2"
        assert model.status.current
        assert missed(model.predict(SIGNAL)) == 0.25


def test_alias_that_leaves_a_refused_version_leaves_its_refusal(
    settings, connection, factory, uri, s3
):
    first = factory()
    tamper(s3, factory(alias=None))
    second_uri = factory(alias=None)
    with ServedModel(uri, settings=settings) as model:
        tracker = connection.tracker
        name = uri[8:].split("@")[0]
        tracker.set_alias(name, "2", "production")
        assert model.refresh().refused.model_version == "2"
        tracker.set_alias(name, first.model_version, "production")
        assert model.refresh().current
        tracker.set_alias(name, second_uri.model_version, "production")
        assert model.refresh().model_version == "3"
        tracker.delete_alias(name, "production")
        status = model.refresh()
        assert (status.model_version, status.current) == ("3", False)
        assert "not found" in status.unreachable_reason
        assert model.predict(SIGNAL).model_version == "3"


def test_version_with_another_signature_is_refused(settings, factory, uri, monkeypatch):
    factory(error_degrees=0.01)
    with ServedModel(uri, settings=settings) as model:
        renamed = (replace(quick_release.SIGNATURE.inputs[0], name="iq"),)
        with monkeypatch.context() as patch:
            patch.setattr(
                quick_release, "SIGNATURE", replace(quick_release.SIGNATURE, inputs=renamed)
            )
            plain = quick_release.make_model
            patch.setattr(
                quick_release, "make_model", lambda *size: rename_input(plain(*size), "iq")
            )
            factory(error_degrees=0.25)
        status = model.refresh()
        assert status.refused.model_version == "2"
        assert "input 'iq': it was none; it is dtype float32" in status.refused.reason
        assert "input 'signal': it was dtype float32" in status.refused.reason
        assert missed(model.predict(SIGNAL)) == 0.01
    with ServedModel(uri, settings=settings) as restarted:
        assert missed(restarted.predict({"iq": SIGNAL["signal"]})) == 0.25


def test_session_and_files_go_with_the_last_request(settings, factory, uri, scratch, sessions):
    factory()
    with ServedModel(uri, settings=settings) as model:
        with request_under_way(model) as answer:
            for number in range(2, 5):
                factory(error_degrees=number / 100)
                assert model.refresh().model_version == str(number)
                assert len(list(scratch.rglob("model.onnx"))) == 2
            assert sessions[0]() is not None
            assert missed(answer()) == 0.01
        assert sessions[0]() is None
        assert len(list(scratch.rglob("model.onnx"))) == 1
        assert missed(model.predict(SIGNAL)) == 0.04


@pytest.mark.slow
@pytest.mark.thorough
def test_outage_of_the_registry_is_survived(settings, empty_database, tmp_path, uri, scratch):
    database = tmp_path / "server.db"
    database.write_bytes(empty_database.read_bytes())
    with (
        servers.mlflow_server(f"sqlite:///{database}", tmp_path) as server,
        proxied(server) as proxy,
    ):
        name = uri[8:].split("@")[0]
        direct = settings.model_copy(update={"mlflow_tracking_uri": SecretStr(server)})
        make = Factory(connect(direct), BUCKET, tmp_path, name=name)
        make(alias="production")
        behind = settings.model_copy(update={"mlflow_tracking_uri": SecretStr(proxy.address)})
        with ServedModel(uri, settings=behind, refresh_seconds=0.2) as model:
            with capture_logs() as logs, proxy.fault(Fault("gone", times=None)):
                assert wait_for(lambda: model.status.unreachable_since is not None, 30)
                since = model.status.unreachable_since
                make(alias="production", error_degrees=0.25)
                assert missed(model.predict(SIGNAL)) == 0.01
                assert "can't be reached" in model.status.unreachable_reason
            assert wait_for(lambda: model.status.model_version == "2", 60)
            assert since <= model.status.looked
            assert model.status.current
            assert missed(model.predict(SIGNAL)) == 0.25
            seen = [one for one in logs if one["event"].startswith("the alias can't be seen")]
            assert len(seen) == 1
            # It is in the middle of a call that nobody answers.
            with proxy.fault(Fault("status", status=503, times=None)):
                count = len(proxy.requests)
                assert wait_for(lambda: len(proxy.requests) > count, 30)
        assert wait_for(lambda: not watchers(uri), 30)
        assert list(scratch.iterdir()) == []


SPEC = TensorSpec("ids", "int64", ("batch", "receivers"), range=(0, 5))
OUT = LOCALIZATION_SIGNATURE.outputs


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"dtype": "int32"}, "input 'ids': it was dtype int64, .*; it is dtype int32"),
        ({"shape": ("batch", 3)}, r"shape \('batch', 'receivers'\).*; it is .* \('batch', 3\)"),
        ({"range": (0, 4)}, r"range \(0, 5\); it is .* range \(0, 4\)"),
        ({"masks": ("x",)}, "masks"),
        ({"unit": "Hz"}, "it is .* unit Hz"),
    ],
)
def test_what_callers_could_not_feed_is_another_signature(change, problem):
    old = Signature((SPEC,), OUT)
    with pytest.raises(InvalidModelError, match=problem):
        require_compatible(old, replace(old, inputs=(replace(SPEC, **change),)))


def test_what_callers_could_not_read_is_another_signature():
    old = Signature((SPEC,), OUT)
    radians = (replace(OUT[0], unit="radians"), replace(OUT[1], sigma_of=None, dtype="float64"))
    with pytest.raises(InvalidModelError) as caught:
        require_compatible(old, replace(old, outputs=radians))
    assert str(caught.value).count("\n  - ") == 2
    with pytest.raises(InvalidModelError, match=r"output 'uncertainties': .*; it is none"):
        require_compatible(old, replace(old, outputs=OUT[:1]))


def test_what_callers_need_not_know_is_the_same_signature():
    old = Signature((replace(SPEC, shape=("batch", 3)),), OUT)
    more = (*OUT, TensorSpec("epistemic", "float32", ("batch", 2)))
    wider = replace(SPEC, shape=("n", "receivers"), range=(0, 9))
    require_compatible(old, Signature((wider,), more))
    require_compatible(old, Signature((replace(wider, range=None),), OUT))


# The reference model, and MLflow's own server


@pytest.fixture(scope="module")
def localization(settings, tmp_path_factory):
    """The reference model, smallest size, released; the model itself."""
    folder = tmp_path_factory.mktemp("localization")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = LocalizationNet(backbone_size="atto").eval()
    path = export_model(net, folder / "atto.onnx", opset=14).path
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quick_release, "SIGNATURE", LOCALIZATION_SIGNATURE)
        patch.setattr(quick_release, "make_model", lambda *_: onnx.load(path))
        Factory(connect(settings), BUCKET, folder, name="localization")(alias="production")
    return net


def test_recordings_are_located_through_the_features_of_training(settings, localization, tmp_path):
    folder = os.environ.get("HEIMDALL_RECORDINGS")
    recordings = sorted(Path(folder).rglob("*_77500_*_iq.wav")) if folder else []
    if not recordings:
        pytest.skip("HEIMDALL_RECORDINGS is not set or holds no *_77500_*_iq.wav")
    made = write_features(recordings, tmp_path / "windows.npz")
    with np.load(made.path) as file:
        features = {"mel_spectrogram": file["mel_spectrogram"]}
    require_answers_of(localization, settings, features)


def test_simulated_captures_are_located(settings, localization):
    features, _ = simulate_captures(np.random.default_rng(0), 5)
    require_answers_of(localization, settings, {"mel_spectrogram": features})


def require_answers_of(net, settings, features):
    with ServedModel("models:/localization@production", settings=settings) as model:
        answer = model.predict(features)
    expected = run_pytorch(net, features, LOCALIZATION_SIGNATURE)
    count = len(features["mel_spectrogram"])
    assert answer.positions.shape == answer.deviations.shape == (count, 2)
    np.testing.assert_allclose(answer.positions, expected["positions"], atol=1e-5)
    np.testing.assert_allclose(answer.deviations, expected["uncertainties"], atol=1e-5)


def require_numbers_of_mlflow(theirs, settings, features):
    with ServedModel("models:/localization@production", settings=settings) as model:
        ours = model.predict({"mel_spectrogram": features}).outputs
    assert theirs.keys() == ours.keys()
    for name, array in ours.items():
        np.testing.assert_allclose(theirs[name], array, rtol=1e-6)


def test_mlflow_gives_the_same_numbers(settings, localization, reset_mlflow):
    settings.apply()
    boto3.setup_default_session()
    mlflow.set_tracking_uri(settings.tracking_uri.get_secret_value())
    features, _ = simulate_captures(np.random.default_rng(1), 4)
    loaded = mlflow.pyfunc.load_model("models:/localization@production")
    theirs = loaded.predict({"mel_spectrogram": features})
    require_numbers_of_mlflow(theirs, settings, features)


@pytest.mark.slow
@pytest.mark.thorough
def test_mlflow_serves_the_same_numbers(settings, localization, tmp_path):
    features, _ = simulate_captures(np.random.default_rng(1), 4)
    with served_by_mlflow("models:/localization@production", settings, tmp_path) as address:
        body = json.dumps({"inputs": {"mel_spectrogram": features.tolist()}})
        request = urllib.request.Request(
            f"{address}/invocations", body.encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            theirs = json.load(response)["predictions"]
    require_numbers_of_mlflow(theirs, settings, features)


@contextmanager
def served_by_mlflow(uri, settings, folder):
    """Address of ``mlflow models serve``."""
    port = servers.free_port()
    key_id, secret, _ = settings.credentials
    environment = {
        **os.environ,
        # It starts uvicorn by its name.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "MLFLOW_TRACKING_URI": settings.tracking_uri.get_secret_value(),
        "MLFLOW_S3_ENDPOINT_URL": settings.s3_endpoint_url,
        "AWS_ACCESS_KEY_ID": key_id.get_secret_value(),
        "AWS_SECRET_ACCESS_KEY": secret.get_secret_value(),
    }
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", uri]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1"]
    with (folder / "serve.log").open("wb") as output:
        server = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 120
        while not servers.answers(f"{address}/ping"):
            if server.poll() is not None or time.monotonic() > deadline:
                pytest.fail("mlflow models serve:\n" + (folder / "serve.log").read_text())
            time.sleep(0.2)
        yield address
    finally:
        # What it has started goes with it.
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signals.SIGTERM)
        server.wait(timeout=30)


def tamper(s3, released):
    """Change a byte of a release; what undoes that."""
    key = f"{released.folder}/report.html"
    kept = s3.get_object(Bucket=BUCKET, Key=key)
    body = kept["Body"].read()
    s3.put_object(Bucket=BUCKET, Key=key, Body=body[:-1] + b"?")
    return lambda: s3.put_object(Bucket=BUCKET, Key=key, Body=body, Metadata=kept["Metadata"])


def rename_input(model, name):
    (old,) = (value.name for value in model.graph.input)
    model.graph.input[0].name = name
    for node in model.graph.node:
        node.input[:] = [name if one == old else one for one in node.input]
    return model
