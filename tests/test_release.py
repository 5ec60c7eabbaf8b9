"""The whole way from a checkpoint to a release, on real services, and every way it may fail."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import boto3
import mlflow
import nbformat
import numpy as np
import onnxruntime
import psutil
import pytest
import torch
from releases import Inputs, smoke

import heimdall_onnx
from heimdall_onnx.features import write_features
from heimdall_onnx.localization_net import LocalizationNet
from heimdall_onnx.publish import connect
from heimdall_onnx.release import ReleaseResult, notebook_path, release_checkpoint
from heimdall_onnx.settings import Settings
from heimdall_onnx.store import list_keys, read_json
from heimdall_onnx.verify import verify_release

pytestmark = pytest.mark.services

PREFIX = "models/localization"


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Inputs:
    """An untrained checkpoint in Lightning's layout and labelled evaluation data."""
    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    weights = LocalizationNet(backbone_size="tiny").state_dict()
    torch.save(
        {
            "state_dict": {f"model.{name}": value for name, value in weights.items()},
            "hyper_parameters": {"backbone_size": "tiny"},
            "pytorch-lightning_version": "2.6.0",
        },
        folder / "model.ckpt",
    )
    rng = np.random.default_rng(0)
    np.savez(
        folder / "eval.npz",
        mel_spectrogram=rng.standard_normal((12, 3, 128, 32)).astype(np.float32),
        positions=rng.uniform((46, 4), (51, 11), (12, 2)),
        meta=json.dumps({"receivers": [{"name": "A", "latitude": 47.0, "longitude": 8.0}]}),
    )
    return Inputs(folder / "model.ckpt", folder / "eval.npz")


@pytest.fixture
def settings(embedded_settings: Settings, tmp_path: Path) -> Settings:
    """The embedded store with a registry and a home of the test's own."""
    return embedded_settings.model_copy(update={"home": tmp_path / "home"})


@dataclass(frozen=True)
class Released:
    result: ReleaseResult
    settings: Settings
    bucket: str
    folder: str


@pytest.fixture(scope="module")
def released(embedded_settings, s3, inputs, tmp_path_factory) -> Released:
    """One complete release, made once."""
    settings = embedded_settings.model_copy(update={"home": tmp_path_factory.mktemp("released")})
    result = release_checkpoint(smoke(inputs, "test-released"), settings)
    assert result.success, result.error
    return Released(result, settings, "test-released", f"{PREFIX}/{result.version}")


def keys(s3, bucket: str) -> set[str]:
    return set(list_keys(s3, bucket, ""))


def versions(settings: Settings, name: str = "test-model") -> list:
    client = mlflow.MlflowClient(settings.tracking_uri.get_secret_value())
    return list(client.search_model_versions(f"name = '{name}'"))


def nothing_is_offered(s3, settings: Settings, bucket: str) -> None:
    """No folder outside failed/, no registered version, no alias."""
    left = {key for key in keys(s3, bucket) if not key.startswith(f"{PREFIX}/failed/")}
    assert left == set()
    assert versions(settings) == []


# What a complete release is


def test_release_passes_every_gate_and_says_smoke(released):
    assert released.result.verdict == "pass (smoke)"
    assert released.result.exit_code == 0
    names = {gate["name"] for gate in released.result.gates}
    assert {
        "opset",
        "signature",
        "mean absolute error",
        "elements on evaluation data",
        "elements on adversarial inputs",
        "NaN and Inf in the same places",
        "noise floor of positions",
        "batch independence",
        "range of uncertainties",
    } <= names
    assert all(gate["passed"] for gate in released.result.gates)


def test_folder_holds_what_the_manifest_says_and_nothing_else(released):
    # Plain boto3, as somebody without this package would read it.
    s = released.settings
    plain = boto3.client(
        "s3",
        endpoint_url=s.s3_endpoint_url,
        aws_access_key_id=s.s3_access_key_id.get_secret_value(),
        aws_secret_access_key=s.s3_secret_access_key.get_secret_value(),
        region_name="us-east-1",
    )
    listed = plain.list_objects_v2(Bucket=released.bucket, Prefix=released.folder)["Contents"]
    manifest = json.loads(
        plain.get_object(Bucket=released.bucket, Key=f"{released.folder}/manifest.json")[
            "Body"
        ].read()
    )
    recorded = {entry["key"]: entry for entry in manifest["objects"]}
    there = {entry["Key"] for entry in listed}
    assert there == {*recorded, f"{released.folder}/manifest.json"}
    for key, entry in recorded.items():
        body = plain.get_object(Bucket=released.bucket, Key=key)["Body"].read()
        assert len(body) == entry["size"], key
        assert hashlib.sha256(body).hexdigest() == entry["sha256"], key
    names = {key.rsplit("/", 1)[1] for key in there}
    assert {"model.onnx", "MLmodel", "metadata.json", "report.ipynb", "report.html"} <= names


def test_manifest_says_what_was_run_on_what(released, inputs, s3):
    manifest = read_json(s3, released.bucket, f"{released.folder}/manifest.json")
    assert manifest["version"] == released.result.version
    assert manifest["verdict"] == "pass (smoke)"
    for what, path in (("checkpoint", inputs.checkpoint), ("evaluation_data", inputs.eval_data)):
        assert manifest[what]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert manifest["parameters"]["profile"] == "smoke"
    assert manifest["environment"]["packages"]["torch"].startswith("2.13.0")
    assert manifest["mlflow"]["model_version"] == released.result.model_version
    assert manifest["threads"] > 0
    assert manifest["git"].keys() == {"commit", "dirty"}


def test_manifest_was_written_last(released, s3):
    listed = s3.list_objects_v2(Bucket=released.bucket, Prefix=released.folder)["Contents"]
    assert max(listed, key=lambda e: e["LastModified"])["Key"].endswith("manifest.json")


def test_registered_version_leads_to_the_evidence(released, s3):
    client = mlflow.MlflowClient(released.settings.tracking_uri.get_secret_value())
    found = client.get_model_version_by_alias("test-model", "staging")
    manifest = s3.get_object(Bucket=released.bucket, Key=f"{released.folder}/manifest.json")
    assert str(found.version) == released.result.model_version
    assert found.source == f"s3://{released.bucket}/{released.folder}"
    assert found.tags["framework"] == "pytorch"
    assert found.tags["format"] == "onnx"
    assert found.tags["output_count"] == "2"
    assert found.tags["verdict"] == "pass (smoke)"
    assert found.tags["report_uri"] == released.result.report_uri
    assert found.tags["manifest_uri"] == released.result.manifest_uri
    assert found.tags["manifest_sha256"] == hashlib.sha256(manifest["Body"].read()).hexdigest()


def test_run_holds_metrics_figures_and_report(released, mlflow_environment):
    client = mlflow.MlflowClient(released.settings.tracking_uri.get_secret_value())
    run = client.get_run(released.result.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["speedup"] == pytest.approx(released.result.speedup)
    assert run.data.metrics["positions_mae"] <= 1e-5
    assert run.data.params["release.profile"] == "smoke"
    found = {
        a.path for f in ("figures", "report") for a in client.list_artifacts(run.info.run_id, f)
    }
    assert {
        "figures/parity-scatter.png",
        "figures/error-distribution.png",
        "figures/position-map.png",
        "figures/latency.png",
        "report/report.html",
        "report/report.ipynb",
    } <= found


def test_every_way_to_open_the_model_gives_the_same_numbers(
    released, inputs, s3, tmp_path, mlflow_environment, reset_mlflow
):
    x = np.load(inputs.eval_data)["mel_spectrogram"][:3]
    path = tmp_path / "model.onnx"
    s3.download_file(released.bucket, f"{released.folder}/model.onnx", str(path))
    expected = onnxruntime.InferenceSession(path).run(None, {"mel_spectrogram": x})
    mlflow.set_tracking_uri(released.settings.tracking_uri.get_secret_value())
    uri = "models:/test-model@staging"
    loaded = mlflow.onnx.load_model(uri)
    assert loaded.SerializeToString() == path.read_bytes() or loaded.graph.node
    by_pyfunc = mlflow.pyfunc.load_model(uri).predict({"mel_spectrogram": x})
    for address in (uri, released.result.s3_uri, released.result.s3_uri.rsplit("/", 1)[0]):
        session = heimdall_onnx.load_model(address, settings=released.settings)
        np.testing.assert_array_equal(session.run(None, {"mel_spectrogram": x}), expected)
    np.testing.assert_allclose(by_pyfunc["positions"], expected[0], atol=1e-6)
    np.testing.assert_allclose(by_pyfunc["uncertainties"], expected[1], atol=1e-6)


def test_stored_report_opens_with_the_verdict(released, s3):
    body = s3.get_object(Bucket=released.bucket, Key=f"{released.folder}/report.ipynb")["Body"]
    notebook = nbformat.reads(body.read().decode(), 4)
    assert notebook.cells[0].source.startswith(f"# ✔ PASS — {released.result.version}")
    html = s3.get_object(Bucket=released.bucket, Key=f"{released.folder}/report.html")[
        "Body"
    ].read()
    assert b"PASS" in html
    assert len(html) < 3_000_000


def test_release_verifies(released, mlflow_environment):
    findings = verify_release(
        connect(released.settings), f"s3://{released.bucket}/{released.folder}"
    )
    assert len(findings) > 8
    assert [f for f in findings if not f.holds] == []


def test_nothing_stored_holds_a_credential(released, s3):
    secrets = [
        released.settings.s3_secret_access_key.get_secret_value().encode(),
        released.settings.s3_access_key_id.get_secret_value().encode(),
    ]
    stored = [
        s3.get_object(Bucket=bucket, Key=key)["Body"].read()
        for bucket in (released.bucket, "heimdall-mlflow")
        for key in keys(s3, bucket)
    ]
    local = [p.read_bytes() for p in released.settings.home.rglob("*") if p.is_file()]
    assert len(stored) > 10
    assert len(local) > 2
    assert not any(secret in content for secret in secrets for content in (*stored, *local))


def test_local_run_folder_keeps_the_report_but_no_second_model(released):
    local = Path(released.result.local_report)
    assert local.is_file()
    assert not list(local.parent.glob("*.onnx*"))


def test_second_release_is_another_version_and_takes_the_alias(released, small):
    before = released.result
    after = release_checkpoint(smoke(small, released.bucket), released.settings)
    assert after.success, after.error
    assert after.version > before.version
    client = mlflow.MlflowClient(released.settings.tracking_uri.get_secret_value())
    found = client.get_model_version_by_alias("test-model", "staging")
    assert str(found.version) == after.model_version != before.model_version


# What fails, and what it leaves behind


def test_failing_gate_keeps_the_report_and_offers_nothing(settings, small, s3, bucket):
    result = release_checkpoint(smoke(small, bucket, tolerance=1e-12), settings)
    assert result.exit_code == 3
    assert "mean absolute error: expected ≤ 1e-12" in result.error
    assert len(result.gates) > 8
    assert result.report_uri.startswith(f"s3://{bucket}/{PREFIX}/failed/v")
    nothing_is_offered(s3, settings, bucket)
    failed = {key.rsplit("/", 1)[1] for key in keys(s3, bucket)}
    assert failed == {"report.ipynb", "report.html"}
    run = mlflow.MlflowClient(settings.tracking_uri.get_secret_value()).get_run(result.run_id)
    assert run.info.status == "FAILED"


@pytest.mark.parametrize(
    ("break_it", "expected"),
    [
        (lambda path: path.unlink(), "no such file|does not exist|not found|is missing|no file"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:5000]),
            "truncated|damaged|can't be read",
        ),
        (lambda path: torch.save({"other.weight": torch.zeros(2)}, path), "missing"),
    ],
    ids=["missing", "truncated", "wrong architecture"],
)
def test_bad_checkpoint_is_bad_input(settings, small, s3, bucket, tmp_path, break_it, expected):
    copy = tmp_path / "copy.ckpt"
    copy.write_bytes(small.checkpoint.read_bytes())
    break_it(copy)
    result = release_checkpoint(smoke(small, bucket, checkpoint=str(copy)), settings)
    assert result.exit_code == 2, result.error
    assert any(word in result.error.lower() for word in expected.split("|")), result.error
    assert "Traceback" not in result.error
    nothing_is_offered(s3, settings, bucket)
    assert keys(s3, bucket) == set()


def test_no_checkpoint_is_bad_input_and_never_the_demo(settings, small, s3, bucket):
    result = release_checkpoint(smoke(small, bucket, checkpoint=""), settings)
    assert result.exit_code == 2
    assert keys(s3, bucket) == set()


def test_bad_evaluation_data_is_bad_input(settings, small, s3, bucket, tmp_path):
    path = tmp_path / "bad.npz"
    np.savez(path, signal=np.full((2, 2, 8, 7), np.nan, np.float64))
    result = release_checkpoint(smoke(small, bucket, eval_data=str(path)), settings)
    assert result.exit_code == 2
    assert "float64" in result.error
    assert "(2, 2, 8, 7)" in result.error
    assert keys(s3, bucket) == set()


def changed_notebook(folder: Path, after: str, source: str) -> Path:
    """The release notebook with one more cell after the cell called ``after``."""
    notebook = nbformat.read(notebook_path(), 4)
    place = next(i for i, cell in enumerate(notebook.cells) if cell.id == after)
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(source))
    path = folder / "changed.ipynb"
    nbformat.write(notebook, path)
    return path


@pytest.mark.parametrize(
    ("after", "source"),
    [
        ("verdict-check", "import os, time; time.sleep(1); os._exit(0)"),
        ("register", "import sys; sys.exit(0)"),
        ("register", "1 / 0"),
    ],
    ids=["killed in the last cell", "exit", "error"],
)
def test_notebook_that_stops_after_registering_is_taken_back(
    settings, small, s3, bucket, tmp_path, after, source
):
    notebook = changed_notebook(tmp_path, after, source)
    result = release_checkpoint(smoke(small, bucket), settings, notebook=notebook)
    assert result.exit_code == 3, result.error
    assert "Traceback" not in result.error
    nothing_is_offered(s3, settings, bucket)
    assert any(key.endswith("report.html") for key in keys(s3, bucket))


def test_cell_out_of_time_fails_the_run(settings, small, s3, bucket, tmp_path):
    notebook = changed_notebook(tmp_path, "parameters", "import time; time.sleep(600)")
    result = release_checkpoint(smoke(small, bucket), settings, notebook=notebook, cell_timeout=5)
    assert result.exit_code == 3
    nothing_is_offered(s3, settings, bucket)


def test_service_that_fails_after_registering_leaves_nothing(settings, small, s3, bucket, tmp_path):
    # The version vanishes from the registry before the runner can tag it.
    notebook = changed_notebook(
        tmp_path,
        "register",
        "import mlflow; mlflow.MlflowClient().delete_model_version("
        "registered.model_name, registered.model_version)",
    )
    result = release_checkpoint(smoke(small, bucket), settings, notebook=notebook)
    assert result.exit_code == 4, result.error
    nothing_is_offered(s3, settings, bucket)
    assert not any(key.endswith("manifest.json") for key in keys(s3, bucket))
    assert "PASS" not in Path(result.local_report).read_text()
    again = release_checkpoint(smoke(small, bucket, run_id=result.run_id), settings)
    assert again.success, again.error


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"s3_endpoint_url": "http://127.0.0.1:9"}, "127.0.0.1:9"),
        ({"s3_secret_access_key": "wrong-secret-of-mine"}, "key|credential|signature"),
        ({"mlflow_tracking_uri": "http://127.0.0.1:9"}, "127.0.0.1:9|mlflow"),
    ],
    ids=["store down", "wrong key", "mlflow down"],
)
def test_service_out_of_reach_is_a_service_failure(settings, small, s3, bucket, change, words):
    from pydantic import SecretStr

    secret = {"s3_secret_access_key", "mlflow_tracking_uri"}
    update = {k: SecretStr(v) if k in secret else v for k, v in change.items()}
    started = time.monotonic()
    result = release_checkpoint(smoke(small, bucket), settings.model_copy(update=update))
    assert result.exit_code == 4, result.error
    assert any(word in result.error.lower() for word in words.split("|")), result.error
    assert "wrong-secret-of-mine" not in result.error
    assert time.monotonic() - started < 60
    assert keys(s3, bucket) == set()


def test_training_run_that_is_given_is_logged_into(settings, small, bucket, mlflow_environment):
    tracker = connect(settings).tracker
    run_id = tracker.start_run(run_name="training")
    tracker.log_params({"profile": "of the training", "seed": 42})
    tracker.end_run("RUNNING")
    result = release_checkpoint(smoke(small, bucket, run_id=run_id), settings)
    assert result.success, result.error
    assert result.run_id == run_id
    run = mlflow.MlflowClient(settings.tracking_uri.get_secret_value()).get_run(run_id)
    assert run.data.params["profile"] == "of the training"
    assert run.data.params["release.profile"] == "smoke"
    assert run.info.status == "RUNNING"


def running_release(settings: Settings, small: Inputs, bucket: str) -> subprocess.Popen:
    settings.apply()
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "heimdall_onnx", "release", str(small.checkpoint)),
            *("--eval-data", str(small.eval_data), "--bucket", bucket, "--name", "test-model"),
            *("--model", small.model, "--profile", "audit", "--json"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_ends_its_children_and_offers_nothing(settings, small, s3, bucket, number):
    process = running_release(settings, small, bucket)
    parent = psutil.Process(process.pid)
    deadline = time.monotonic() + 90
    # Wait for the measuring to begin: kernel and worker processes are there then.
    while not any("heimdall_onnx.worker" in " ".join(c.cmdline()) for c in family(parent)):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    children = family(parent)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []
    nothing_is_offered(s3, settings, bucket)


def family(process: psutil.Process) -> list[psutil.Process]:
    found = []
    for child in process.children(recursive=True):
        try:
            child.cmdline()
        except psutil.NoSuchProcess:
            continue
        found.append(child)
    return found


# On an MLflow server, and on real recordings


def test_release_on_a_server_with_postgresql(
    embedded_settings, mlflow_server, inputs, s3, bucket, tmp_path, reset_mlflow
):
    settings = Settings(
        _env_file=None, HEIMDALL_HOME=tmp_path, MLFLOW_TRACKING_URI=mlflow_server
    ).model_copy(
        update={
            name: getattr(embedded_settings, name)
            for name in ("s3_endpoint_url", "s3_access_key_id", "s3_secret_access_key")
        }
    )
    settings.apply()
    result = release_checkpoint(smoke(inputs, bucket, name="on-a-server"), settings)
    assert result.success, result.error
    with urllib.request.urlopen(
        f"{mlflow_server}/api/2.0/mlflow/registered-models/alias?name=on-a-server&alias=staging"
    ) as response:
        found = json.load(response)["model_version"]
    assert found["version"] == result.model_version
    mlflow.set_tracking_uri(mlflow_server)
    x = np.load(inputs.eval_data)["mel_spectrogram"][:2]
    by_pyfunc = mlflow.pyfunc.load_model("models:/on-a-server@staging").predict(
        {"mel_spectrogram": x}
    )
    session = heimdall_onnx.load_model("models:/on-a-server@staging", settings=settings)
    expected = session.run(None, {"mel_spectrogram": x})
    np.testing.assert_allclose(by_pyfunc["positions"], expected[0], atol=1e-6)
    mlflow.onnx.load_model("models:/on-a-server@staging")


def test_real_recordings_go_through_features_and_release(settings, inputs, s3, bucket, tmp_path):
    folder = os.environ.get("HEIMDALL_RECORDINGS")
    recordings = sorted(Path(folder).rglob("*_iq.wav")) if folder else []
    if not recordings:
        pytest.skip("HEIMDALL_RECORDINGS names no folder with KiwiSDR IQ recordings")
    made = write_features(
        recordings,
        tmp_path / "dcf77.npz",
        position=(50.0152, 9.0112),
        receivers={
            "HB9RYZ": (47.1721, 8.42683),
            "F1JEK": (45.779290, 0.614638),
            "DF0KL": (53.665337, 7.282766),
            "HB9ODP": (46.499351, 8.798828),
            "JO51xl": (51.466044, 11.977189),
            "pa0rdt": (51.500500, 3.600690),
        },
    )
    result = release_checkpoint(smoke(inputs, bucket, eval_data=str(made.path)), settings)
    assert result.success, result.error
    manifest = read_json(s3, bucket, f"{PREFIX}/{result.version}/manifest.json")
    assert manifest["evaluation_data"]["sha256"] == made.sha256
