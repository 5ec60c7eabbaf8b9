"""One item of a fleet: its key, what is kept, what fails and how."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from models import SmallNet
from pydantic import SecretStr
from releases import Inputs, changed_notebook, keys, smoke, versions

from heimdall_onnx.common.errors import SettingsError
from heimdall_onnx.model.signature_file import signature_path, write_signature_file
from heimdall_onnx.release.fleet import item as fleet_item
from heimdall_onnx.release.fleet.item import RECORDS, ItemRunner, item_key
from heimdall_onnx.release.fleet.plan import FleetItem


@pytest.fixture
def files(tmp_path):
    """A checkpoint and evaluation data that a test may change."""
    torch.save(SmallNet().state_dict(), tmp_path / "net.pt")
    signal = np.random.default_rng(0).standard_normal((12, 2, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "eval.npz", signal=signal)
    return tmp_path


def parameters(folder: Path, bucket: str = "test-bucket", **changes):
    inputs = Inputs(folder / "net.pt", folder / "eval.npz", "models:SmallNet")
    return smoke(inputs, bucket, **changes)


class TestKey:
    def test_it_is_that_of_the_bytes_wherever_they_are(self, files, tmp_path):
        before = item_key(parameters(files))
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        for name in ("net.pt", "eval.npz"):
            (elsewhere / name).write_bytes((files / name).read_bytes())
        changes = {"output_dir": "out", "run_id": "a1", "publish": True}
        assert item_key(parameters(elsewhere, **changes)) == before

    @pytest.mark.parametrize("change", [{"opset": 20}, {"tolerance": 1e-4}, {"name": "other"}])
    def test_another_parameter_makes_another_item(self, files, change):
        assert item_key(parameters(files, **change)) != item_key(parameters(files))

    @pytest.mark.parametrize("name", ["net.pt", "eval.npz"])
    def test_another_byte_makes_another_item(self, files, name):
        before = item_key(parameters(files))
        (files / name).write_bytes((files / name).read_bytes() + b"\0")
        assert item_key(parameters(files)) != before

    def test_a_declared_signature_is_part_of_it(self, files):
        before = item_key(parameters(files))
        write_signature_file(SmallNet.signature, signature_path(files / "net.pt"))
        assert item_key(parameters(files)) != before

    def test_other_code_of_the_model_makes_another_item(self, files, tmp_path, monkeypatch):
        monkeypatch.syspath_prepend(tmp_path)
        module = tmp_path / "own_model_of_a_fleet.py"
        module.write_text("a = 1\n")
        before = item_key(parameters(files, model="own_model_of_a_fleet:Net"))
        module.write_text("a = 2\n")
        assert item_key(parameters(files, model="own_model_of_a_fleet:Net")) != before

    def test_other_versions_make_another_item(self, files, monkeypatch):
        before = item_key(parameters(files))
        there = fleet_item.capture_environment()
        other = replace(there, packages={**there.packages, "torch": "0.0"})
        monkeypatch.setattr(fleet_item, "capture_environment", lambda: other)
        assert item_key(parameters(files)) != before


def test_a_worker_without_addresses_is_refused(make_settings):
    settings = make_settings("home")
    with pytest.raises(SettingsError, match="MLFLOW_S3_ENDPOINT_URL and MLFLOW_TRACKING_URI"):
        ItemRunner(settings, "unused")


@pytest.fixture
def settings(make_settings, shared_kernels):
    """As every worker of a fleet has them."""
    made = make_settings("home")
    uri = SecretStr(f"sqlite:///{made.home}/mlflow.db")
    return made.model_copy(update={"mlflow_tracking_uri": uri})


@pytest.fixture
def runner(settings, tmp_path, monkeypatch):
    notebook = changed_notebook(tmp_path)
    monkeypatch.setattr(
        fleet_item,
        "release_checkpoint",
        lambda *a, **k: release_checkpoint(*a, notebook=notebook, **k),
    )
    from heimdall_onnx.release.runner import release_checkpoint

    with ItemRunner(settings, tmp_path) as made:
        yield made


def item_of(folder: Path, bucket: str, **changes) -> FleetItem:
    found = parameters(folder, bucket, measure_latency=False, **changes)
    return FleetItem(1, str(folder / "net.pt"), found.model_copy(update={"checkpoint": ""}), None)


@pytest.mark.services
def test_an_item_is_released_once_however_it_ended(runner, files, s3, bucket, settings):
    item = item_of(files, bucket.name)
    first = runner.run(item, "july")
    assert (first.status, first.exit_code, first.error) == ("released", 0, "")
    assert first.result["verdict"] == "pass (smoke)"
    assert first.metrics["onnx_file_size_bytes"] > 0
    assert first.host
    record = bucket.read_json(f"{RECORDS}/{first.key}.json")
    assert record["release"] == first.result["manifest_uri"].rpartition("/")[0]

    again = runner.run(item, "july")
    assert (again.status, again.key, again.exit_code) == ("kept", first.key, 0)
    assert again.result == first.result
    assert again.metrics == first.metrics
    # Where it was measured, not who has found it.
    measured = ("host", "processors", "load")
    assert [getattr(again, n) for n in measured] == [getattr(first, n) for n in measured]

    # Of a worker that was killed between its release and its record.
    begun = {**record, "release": "", "result": {}, "host": ""}
    place = f"{RECORDS}/{first.key}.json"
    bucket.upload_bytes(json.dumps(begun).encode(), place)
    found = runner.run(item, "july")
    assert (found.status, found.host) == ("kept", "")
    assert found.result["manifest_uri"] == first.result["manifest_uri"]
    assert bucket.read_json(place)["release"] == record["release"]
    assert len(versions(settings)) == 1

    # A release that is gone is none.
    s3.delete_object(Bucket=bucket.name, Key=first.result["manifest_uri"].split("/", 3)[3])
    anew = runner.run(item, "july")
    assert anew.status == "released"
    assert anew.result["manifest_uri"] != first.result["manifest_uri"]
    assert runner.run(item, "july", force=True).result["version"] > anew.result["version"]


@pytest.mark.services
def test_checkpoint_and_signature_come_from_a_bucket(runner, files, s3, bucket):
    write_signature_file(SmallNet.signature, signature_path(files / "net.pt"))
    for name in ("net.pt", "eval.npz", signature_path("net.pt").name):
        bucket.upload_file(files / name, f"in/{name}")
    item = item_of(files, bucket.name, eval_data=f"{bucket.uri()}in/eval.npz")
    outcome = runner.run(replace(item, checkpoint=f"{bucket.uri()}in/net.pt"), "july")
    assert outcome.status == "released", outcome.error
    bucket_key = outcome.result["manifest_uri"].split("/", 3)[3]
    manifest = bucket.read_json(bucket_key)
    assert manifest["model"]["signature_source"] == "the file net.signature.yaml"


@pytest.mark.services
def test_what_is_wrong_with_an_item_is_said_and_no_record_is_a_release(runner, files, s3, bucket):
    (files / "net.pt").write_bytes(b"no checkpoint")
    outcome = runner.run(item_of(files, bucket.name), "july")
    assert (outcome.status, outcome.exit_code, outcome.service_failed) == ("failed", 2, False)
    assert "net.pt" in outcome.error
    assert bucket.read_json(f"{RECORDS}/{outcome.key}.json")["release"] == ""
    assert not any(key.endswith("manifest.json") for key in keys(s3, bucket.name))


@pytest.mark.services
def test_an_outage_is_worth_another_attempt(settings, files, bucket, tmp_path):
    away = settings.model_copy(update={"s3_endpoint_url": "http://127.0.0.1:9"})
    with ItemRunner(away, tmp_path) as runner:
        outcome = runner.run(item_of(files, bucket.name), "july")
    assert (outcome.status, outcome.exit_code, outcome.service_failed) == ("failed", 4, True)
