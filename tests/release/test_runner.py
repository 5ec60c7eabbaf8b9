"""The whole way from a checkpoint to a release, on real services."""

import hashlib
import json
import os
import urllib.request
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import boto3
import mlflow
import nbformat
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from browser import DESKTOP, NARROW, chromium, open_in_chromium, violations
from bs4 import BeautifulSoup
from cryptography.hazmat.primitives import serialization
from keys import KeyPair, make_key
from models import SmallNet
from releases import (
    PREFIX,
    Inputs,
    changed_notebook,
    keys,
    lose_the_answer_of_set_alias,
    smoke,
    versions,
)

import heimdall_onnx
from heimdall_onnx.archive.release import Release
from heimdall_onnx.archive.signing import Trust
from heimdall_onnx.archive.verify import verify_release
from heimdall_onnx.common.environment import DISTRIBUTION
from heimdall_onnx.common.files import hash_file
from heimdall_onnx.localization.features import write_features
from heimdall_onnx.localization.network import LocalizationNet
from heimdall_onnx.release.result import ReleaseResult
from heimdall_onnx.release.runner import release_checkpoint
from heimdall_onnx.report.page import figures
from heimdall_onnx.services.connection import connect
from heimdall_onnx.services.settings import Settings
from heimdall_onnx.services.store import Bucket

pytestmark = pytest.mark.services


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Inputs:
    """A checkpoint as Lightning leaves it, and labelled evaluation data."""
    folder = tmp_path_factory.mktemp("inputs")
    weights = SmallNet().state_dict()
    torch.save(
        {
            "state_dict": {f"model.{name}": value for name, value in weights.items()},
            "pytorch-lightning_version": "2.6.0",
        },
        folder / "model.ckpt",
    )
    rng = np.random.default_rng(0)
    np.savez(
        folder / "eval.npz",
        signal=rng.standard_normal((12, 2, 8, 8)).astype(np.float32),
        positions=rng.uniform((46, 4), (51, 11), (12, 2)),
        meta=json.dumps({"receivers": [{"name": "A", "latitude": 47.0, "longitude": 8.0}]}),
    )
    return Inputs(folder / "model.ckpt", folder / "eval.npz", "models:SmallNet")


@pytest.fixture
def settings(make_settings) -> Settings:
    """The embedded store with a registry and a home of the test's own."""
    return make_settings("home")


@dataclass(frozen=True)
class Released:
    result: ReleaseResult
    settings: Settings
    bucket: str
    folder: str
    signer: KeyPair
    before_manifest: tuple[set[str], dict[str, str]]  # keys and aliases when it was written


@pytest.fixture(scope="session")
def another_kernel(tmp_path_factory) -> Path:
    """A Jupyter folder with a kernel of the usual name that can't run."""
    folder = tmp_path_factory.mktemp("jupyter")
    (folder / "kernels" / "python3").mkdir(parents=True)
    spec = {"argv": ["/bin/false"], "display_name": "another", "language": "python"}
    (folder / "kernels" / "python3" / "kernel.json").write_text(json.dumps(spec))
    return folder


@pytest.fixture(scope="module")
def released(make_settings, s3, inputs, another_kernel, tmp_path_factory) -> Released:
    """One complete release, signed, made once."""
    settings, bucket = make_settings("released"), "test-released"
    signer = make_key(tmp_path_factory.mktemp("signer"))
    signing = settings.model_copy(update={"signing_key": signer.private})
    seen = []

    upload = Bucket.upload_bytes

    def watched(bucket, content, key, **options):
        if key.endswith("/manifest.json"):
            # MLflow's search for versions leaves their aliases out.
            client = mlflow.MlflowClient(settings.tracking_uri.get_secret_value())
            seen.append((keys(s3, bucket.name), client.get_registered_model("test-model").aliases))
        return upload(bucket, content, key, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bucket, "upload_bytes", watched)
        patch.setenv("JUPYTER_PATH", str(another_kernel))
        result = release_checkpoint(smoke(inputs, bucket, opset=20, measure_latency=True), signing)
    assert result.success, result.error
    return Released(result, settings, bucket, f"{PREFIX}/{result.version}", signer, *seen)


# What a complete release is


def test_release_passes_every_gate_and_says_smoke(released):
    assert released.result.verdict == "pass (smoke)"
    verdict = nbformat.read(Path(released.result.local_report).with_suffix(".ipynb"), 4).cells[0]
    assert verdict.source.splitlines()[0].startswith("# ✔ PASS — ")
    assert verdict.source.splitlines()[0].endswith(" (smoke)")
    assert "smoke (a test run, not evidence)" in verdict.source
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
        "range of spread",
    } <= names
    assert all(gate["passed"] for gate in released.result.gates)


def test_report_has_the_picture_of_what_can_be_explored_and_no_widget(released):
    notebook = nbformat.read(Path(released.result.local_report).with_suffix(".ipynb"), 4)
    (cell,) = [cell for cell in notebook.cells if cell.id == "explore"]
    assert [set(output.data) for output in cell.outputs] == [{"image/png", "text/plain"}]
    text = Path(released.result.local_report).with_suffix(".ipynb").read_text()
    assert "vnd.jupyter.widget" not in text


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
    apart = {f"{released.folder}/{name}" for name in ("manifest.json", "model.sig")}
    assert there == {*recorded, *apart}
    for key, entry in recorded.items():
        body = plain.get_object(Bucket=released.bucket, Key=key)["Body"].read()
        assert len(body) == entry["size"], key
        assert hashlib.sha256(body).hexdigest() == entry["sha256"], key
    names = {key.rsplit("/", 1)[1] for key in there}
    assert {"model.onnx", "MLmodel", "metadata.json", "report.ipynb", "report.html"} <= names


def sha256_of(signer: KeyPair) -> str:
    """Of its public key, as `openssl pkey -pubin -outform DER` writes it."""
    key = serialization.load_pem_public_key(signer.public.read_bytes())
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(key.public_bytes(serialization.Encoding.DER, form)).hexdigest()


def test_manifest_says_what_was_run_on_what(released, inputs, s3):
    manifest = Bucket(s3, released.bucket).read_json(f"{released.folder}/manifest.json")
    assert manifest["version"] == released.result.version
    assert manifest["verdict"] == "pass (smoke)"
    for what, path in (("checkpoint", inputs.checkpoint), ("evaluation_data", inputs.eval_data)):
        assert manifest[what]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert manifest["parameters"]["profile"] == "smoke"
    assert manifest["environment"]["packages"]["torch"].startswith("2.13.0")
    assert manifest["mlflow"]["model_version"] == released.result.model_version
    assert manifest["threads"] > 0
    steps = [cost["step"] for cost in manifest["costs"]]
    assert steps[0] == "services"
    assert steps[-1] == "report"
    assert {"kernel start and end", "export", "parity", "latency", "figures"} <= set(steps)
    assert all(cost["seconds"] >= 0 for cost in manifest["costs"])
    assert manifest["costs"] == released.result.costs
    assert manifest["git"].keys() == {"commit", "dirty"}
    assert manifest["signature"] == {
        "key": f"{released.folder}/model.sig",
        "signer_sha256": sha256_of(released.signer),
    }


def test_manifest_was_written_last(released, s3):
    there, aliases = released.before_manifest
    assert keys(s3, released.bucket) - there == {
        f"{released.folder}/manifest.json",
        "aliases/test-model/staging/00000001.json",
    }
    assert aliases == {}


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
    signature = s3.get_object(Bucket=released.bucket, Key=f"{released.folder}/model.sig")
    assert found.tags["signature_sha256"] == hashlib.sha256(signature["Body"].read()).hexdigest()


def test_mlflow_says_what_was_released_on_which_data(released, inputs):
    client = mlflow.MlflowClient(released.settings.tracking_uri.get_secret_value())
    version = client.get_model_version("test-model", released.result.model_version)
    begins = f"PASS (SMOKE), speedup {released.result.speedup:.2f}×, "
    assert version.description.startswith(begins)
    for address in (released.result.s3_uri, released.result.report_html_uri):
        assert f"`{address}`" in version.description
    assert f"SHA-256 `{hash_file(inputs.checkpoint)}`" in version.description
    (named,) = client.get_run(released.result.run_id).inputs.dataset_inputs
    digest = hash_file(inputs.eval_data)
    assert (named.dataset.name, named.dataset.digest) == ("eval.npz", digest[:36])
    kept = f"s3://{released.bucket}/objects/sha256/{digest}"
    assert json.loads(named.dataset.source) == {"uri": kept}
    assert json.loads(named.dataset.profile)["labels"] == "yes"
    (point,) = client.get_metric_history(released.result.run_id, "speedup/ratio")
    assert (point.value, str(point.step)) == (
        pytest.approx(released.result.speedup),
        str(version.version),
    )


def test_run_holds_metrics_figures_and_report(released, mlflow_environment, reset_mlflow):
    # Where MLflow 3.0 looks for artifacts, whatever its client was told.
    mlflow.set_tracking_uri(released.settings.tracking_uri.get_secret_value())
    client = mlflow.MlflowClient()
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
        "figures/error-by-magnitude.png",
        "figures/position-map.png",
        "figures/latency.png",
        "report/report.html",
        "report/report.ipynb",
    } <= found


def test_every_way_to_open_the_model_gives_the_same_numbers(
    released, inputs, s3, tmp_path, mlflow_environment, reset_mlflow
):
    x = np.load(inputs.eval_data)["signal"][:3]
    path = tmp_path / "model.onnx"
    s3.download_file(released.bucket, f"{released.folder}/model.onnx", str(path))
    expected = onnxruntime.InferenceSession(path).run(None, {"signal": x})
    mlflow.set_tracking_uri(released.settings.tracking_uri.get_secret_value())
    uri = "models:/test-model@staging"
    loaded = mlflow.onnx.load_model(uri)
    assert loaded == onnx.load(path)
    by_pyfunc = mlflow.pyfunc.load_model(uri).predict({"signal": x})
    for address in (uri, released.result.s3_uri, released.result.s3_uri.rsplit("/", 1)[0]):
        session = heimdall_onnx.load_model(address, settings=released.settings)
        np.testing.assert_array_equal(session.run(None, {"signal": x}), expected)
    np.testing.assert_allclose(by_pyfunc["positions"], expected[0], atol=1e-6)
    np.testing.assert_allclose(by_pyfunc["spread"], expected[1], atol=1e-6)


def test_stored_report_opens_with_the_verdict(released, s3):
    body = s3.get_object(Bucket=released.bucket, Key=f"{released.folder}/report.ipynb")["Body"]
    notebook = nbformat.reads(body.read().decode(), 4)
    assert notebook.cells[0].source.startswith(f"# ✔ PASS — {released.result.version}")
    html = s3.get_object(Bucket=released.bucket, Key=f"{released.folder}/report.html")[
        "Body"
    ].read()
    assert b"PASS" in html
    assert len(html) < 3_000_000


def test_report_opens_offline_without_a_request_or_console_error(released):
    page = Path(released.result.local_report)
    hosts, console, document = open_in_chromium(page.as_uri())
    assert hosts == set()
    assert console == []
    assert "✔ PASS" in document
    assert released.result.version in document.partition("</title>")[0]
    assert document.count("<img") == len(list(figures(page.with_name("report.ipynb"))))


def test_report_alone_answers_a_reviewer(released, inputs):
    page = BeautifulSoup(Path(released.result.local_report).read_text(), "html.parser")
    first = page.header.get_text(" ")
    for answer in (
        hash_file(inputs.checkpoint),  # which checkpoint
        hash_file(inputs.eval_data),  # which data
        f"{DISTRIBUTION} {metadata.version(DISTRIBUTION)}",  # which code
        "answers as the PyTorch model does",  # is it faithful
        "with 95% confidence",  # is it faster, and how sure is that
        "by nobody; its gates alone decide",  # who approved
        f"by the key with SHA-256 {sha256_of(released.signer)}",  # who vouches for it
    ):
        assert answer in first


@pytest.mark.parametrize("size", [NARROW, pytest.param(DESKTOP, marks=pytest.mark.thorough)])
def test_report_is_readable_without_mouse_and_sight(released, size):
    width, height = size
    with chromium() as browser:
        viewport = {"width": width, "height": height}
        page = browser.new_context(viewport=viewport, bypass_csp=True).new_page()
        page.goto(Path(released.result.local_report).as_uri())
        page.eval_on_selector_all("details", "all => all.forEach(d => d.open = true)")
        assert violations(page) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_release_verifies(released, mlflow_environment):
    release = Release.at(connect(released.settings), f"s3://{released.bucket}/{released.folder}")
    findings = verify_release(release)
    assert len(findings) > 8
    assert [f for f in findings if not f.holds] == []


def test_release_is_signed_by_the_key_that_the_settings_name(
    released, tmp_path, mlflow_environment
):
    assert released.result.signer_sha256 == sha256_of(released.signer)
    release = Release.at(connect(released.settings), f"s3://{released.bucket}/{released.folder}")
    for key, wrong in ((released.signer, []), (make_key(tmp_path), ["model.sig"])):
        findings = verify_release(release, trust=Trust(key.public))
        assert [f.what.rsplit("/", 1)[-1] for f in findings if not f.holds] == wrong


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


@pytest.mark.thorough
def test_training_run_keeps_a_failed_release_and_takes_the_next(
    released, small, s3, tmp_path, monkeypatch, mlflow_environment, reset_mlflow
):
    settings, bucket, first = released.settings, released.bucket, released.result
    tracker, client = (
        connect(settings).tracker,
        mlflow.MlflowClient(settings.tracking_uri.get_secret_value()),
    )
    run_id = tracker.start_run(run_name="training")
    tracker.log_params({"profile": "of the training", "seed": 42})
    parameters = smoke(small, bucket, run_id=run_id)
    lose_the_answer_of_set_alias(monkeypatch)
    before = keys(s3, bucket)
    failed = release_checkpoint(parameters, settings, notebook=changed_notebook(tmp_path))
    assert failed.exit_code == 4
    assert "the answer was lost" in failed.error
    assert tracker.version_by_alias("test-model", "staging").version == first.model_version
    assert len(versions(settings)) == 1
    assert failed.report_html_uri.startswith(f"s3://{bucket}/{PREFIX}/failed/v")
    apart = (f"{PREFIX}/failed/", "objects/", "aliases/")
    assert all(key.startswith(apart) for key in keys(s3, bucket) - before)
    assert "PASS" not in Path(failed.local_report).read_text()

    again = release_checkpoint(parameters, settings, notebook=changed_notebook(tmp_path))
    assert again.success, again.error
    assert again.version > first.version
    assert tracker.version_by_alias("test-model", "staging").version == again.model_version
    assert len(versions(settings)) == 2
    assert again.run_id == failed.run_id == run_id
    run = client.get_run(run_id)
    assert (run.info.run_name, run.info.status) == ("training", "RUNNING")
    assert run.data.params["profile"] == "of the training"
    assert run.data.params["release.profile"] == "smoke"
    assert mlflow.active_run().info.run_id == run_id


# On an MLflow server, and on real recordings


def test_release_on_a_server_with_postgresql(
    embedded_settings, mlflow_server, small, s3, bucket, tmp_path, reset_mlflow
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
    result = release_checkpoint(
        smoke(small, bucket.name, name="on-a-server"), settings, notebook=changed_notebook(tmp_path)
    )
    assert result.success, result.error
    with urllib.request.urlopen(
        f"{mlflow_server}/api/2.0/mlflow/registered-models/alias?name=on-a-server&alias=staging"
    ) as response:
        found = json.load(response)["model_version"]
    assert found["version"] == result.model_version
    mlflow.set_tracking_uri(mlflow_server)
    x = np.load(small.eval_data)["signal"][:2]
    by_pyfunc = mlflow.pyfunc.load_model("models:/on-a-server@staging").predict({"signal": x})
    session = heimdall_onnx.load_model("models:/on-a-server@staging", settings=settings)
    expected = session.run(None, {"signal": x})
    np.testing.assert_allclose(by_pyfunc["positions"], expected[0], atol=1e-6)
    mlflow.onnx.load_model("models:/on-a-server@staging")


def test_real_recordings_go_through_features_and_release(settings, s3, bucket, tmp_path):
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
    torch.save(LocalizationNet(backbone_size="atto").state_dict(), tmp_path / "net.pt")
    parameters = smoke(
        Inputs(tmp_path / "net.pt", made.path), bucket.name, model_kwargs={"backbone_size": "atto"}
    )
    result = release_checkpoint(parameters, settings, notebook=changed_notebook(tmp_path))
    assert result.success, result.error
    manifest = bucket.read_json(f"{PREFIX}/{result.version}/manifest.json")
    assert manifest["evaluation_data"]["sha256"] == made.sha256
