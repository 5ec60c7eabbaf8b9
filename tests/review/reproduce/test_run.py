"""A real release made again: the same, changed, damaged, and where it can't be."""

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import nbformat
import numpy as np
import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from releases import PREFIX, changed_notebook, make_small_inputs, smoke, versions

from heimdall_onnx.archive.load import load_model
from heimdall_onnx.archive.manifest import read_manifest
from heimdall_onnx.archive.release import Release
from heimdall_onnx.common.errors import ParameterError, VerificationError
from heimdall_onnx.release.runner import release_checkpoint
from heimdall_onnx.review.reproduce.figures import Comparison, Difference
from heimdall_onnx.review.reproduce.run import Reproduction, reproduce_release
from heimdall_onnx.services.connection import Connection, connect
from heimdall_onnx.services.settings import Settings
from heimdall_onnx.services.store import locate, to_json

BUCKET = "test-reproduce"
# What a notebook could do that comes out differently elsewhere.
SHIFTED = """
import os
loaded.model.position_head.bias.data += float(os.environ.get("SHIFT", 0))
print([n for n in os.environ if n.startswith(("AWS_", "MLFLOW_S3_", "MLFLOW_TRACKING_URI"))])
"""


@dataclass(frozen=True)
class Released:
    settings: Settings
    uri: str
    manifest: dict
    report: Path

    @property
    def connection(self) -> Connection:
        return connect(self.settings)

    def content(self, role: str) -> str:
        return next(e["key"] for e in self.manifest["content"] if e["role"] == role)


@pytest.fixture(scope="module")
def released(make_settings, s3, tmp_path_factory) -> Released:
    folder = tmp_path_factory.mktemp("labelled")
    inputs = make_small_inputs(folder)
    positions = np.random.default_rng(1).uniform((46, 4), (51, 11), (12, 2))
    np.savez(inputs.eval_data, positions=positions, **np.load(inputs.eval_data))
    settings = make_settings("reproduce")
    notebook = changed_notebook(folder, after="checkpoint", source=SHIFTED)
    result = release_checkpoint(
        smoke(inputs, BUCKET, measure_latency=True), settings, notebook=notebook
    )
    assert result.success, result.error
    # A repetition must not need what only the releasing machine had.
    inputs.checkpoint.unlink()
    inputs.eval_data.unlink()
    key = f"{PREFIX}/{result.version}/manifest.json"
    manifest = json.loads(s3.get_object(Bucket=BUCKET, Key=key)["Body"].read())
    report = Path(result.local_report).with_suffix(".ipynb")
    return Released(settings, f"s3://{BUCKET}/{PREFIX}/{result.version}", manifest, report)


@pytest.fixture(scope="module")
def repeated(released) -> Reproduction:
    return reproduce_release(Release.at(released.connection, released.uri))


def printed(report: Path) -> list[str]:
    cells = nbformat.read(report, 4).cells
    cell = next(c for c in cells if "SHIFT" in c.source)
    return [output.text.strip() for output in cell.outputs]


def test_release_reproduces_to_the_last_digit(repeated, released):
    assert repeated.failures == ()
    repeated.require()
    assert repeated.exact
    # Somebody may commit meanwhile.
    own = {"git commit", "uncommitted changes"}
    assert [d for d in repeated.environment if d.what not in own] == []
    assert repeated.model.identical
    entry = next(o for o in released.manifest["objects"] if o["key"].endswith("/model.onnx"))
    assert repeated.model.found_sha256 == repeated.model.recorded_sha256 == entry["sha256"]
    assert {c.judgement for c in repeated.accuracy} == {"identical"}
    what = {c.what: c for c in repeated.accuracy}
    assert what["positions, mean (all evaluation data, batch 8)"].found > 0
    assert what["localization error of ONNX, median (m)"].found > 1000
    assert what["gate mean absolute error, passed"].found is True
    assert len(what) == len(repeated.accuracy) > 500


def test_latency_is_shown_with_intervals_and_fails_nothing(repeated):
    speedup = next(c for c in repeated.latency if c.what == "speedup")
    assert speedup.recorded_interval[0] <= speedup.recorded <= speedup.recorded_interval[1]
    assert speedup.found_interval[0] <= speedup.found <= speedup.found_interval[1]
    assert {c.judgement for c in repeated.latency} <= {
        "identical",
        "within",
        "flagged",
        "not judged",
    }


def test_repetition_publishes_nothing_and_gets_no_credentials(repeated, released, s3):
    listed = s3.list_objects_v2(Bucket=BUCKET)["Contents"]
    folders = {e["Key"].split("/")[2] for e in listed if e["Key"].startswith(PREFIX)}
    assert folders == {released.manifest["version"]}
    assert len(versions(released.settings)) == 1
    assert "AWS_SECRET_ACCESS_KEY" in printed(released.report)[0]
    assert printed(repeated.report) == ["[]"]


def test_repetition_leaves_its_report_and_nothing_large(repeated):
    left = {path.name for path in repeated.report.parent.iterdir()}
    assert left == {"notebook.ipynb", "report.ipynb", "events.jsonl"}


def test_result_is_json_and_text(repeated):
    found = json.loads(json.dumps(repeated.to_dict(), allow_nan=False))
    assert found["reproduced"] is True
    assert found["model"]["identical"] is True
    assert len(found["accuracy"]) == len(repeated.accuracy)
    text = repeated.to_text()
    assert text.startswith("REPRODUCES")
    assert f"{len(repeated.accuracy)} identical" in text
    assert "localization error of PyTorch, p95 (m)" in text


def test_variant_that_comes_out_differently_is_a_failure(repeated):
    rule = "must be as recorded"
    variants = (
        Comparison("variant fp32, status", "passed", "passed", "identical", rule),
        Comparison("variant int8\x1b, sha256", "a", "b", "differs", rule),
        Comparison("recommended variant", "int8", "fp32", "flagged", rule),
    )
    found = replace(repeated, variants=variants)
    assert not found.reproduced
    assert found.failures == (
        r"variant int8\x1b, sha256: recorded a, found b (must be as recorded)",
    )
    text = found.to_text()
    assert "variants, which must be the same here: 1 identical, 1 differs, 1 flagged" in text
    for line in ("identical   variant fp32, status", "flagged     recommended variant"):
        assert line in text
    assert "variants, which" not in repeated.to_text()
    assert found.to_dict()["variants"][1]["judgement"] == "differs"


def test_another_environment_excuses_another_model(repeated):
    changed = replace(repeated.model, identical=False, differences=("opset: was 14, is 13",))
    torch = Difference("package torch\x1b[2J", "2.12.0", "2.13.0", numerical=True)
    elsewhere = replace(repeated, exact=False, model=changed, environment=(torch,))
    assert elsewhere.reproduced
    text = elsewhere.to_text()
    assert "model.onnx is another one, which other versions or processors" in text
    assert "opset: was 14, is 13" in text
    assert "2.12.0 -> 2.13.0  figures may differ for it" in text
    assert "\x1b" not in text
    with pytest.raises(VerificationError, match=r"differences: 1\n  - model.onnx: opset"):
        replace(elsewhere, exact=True).require()


def test_changed_model_is_reported_with_where_it_departs(released, monkeypatch):
    monkeypatch.setenv("SHIFT", "0.5")
    result = reproduce_release(Release.at(released.connection, released.uri))
    assert not result.reproduced
    assert result.exact
    assert not result.model.identical
    assert len(result.model.differences) == 1
    assert "weights: 1 of " in result.model.differences[0]
    assert "first 'position_head.bias', by 0.5 at most" in result.model.differences[0]
    differing = {c.what for c in result.accuracy if c.judgement == "differs"}
    assert "positions, highest (all evaluation data, batch 8)" in differing
    assert "localization error of ONNX, median (m)" in differing
    assert "spread, highest (all evaluation data, batch 8)" not in differing
    assert (result.report.parent / "model.onnx").is_file()
    with pytest.raises(VerificationError, match=r"does not reproduce; .*\n.*position_head\.bias"):
        result.require()
    assert result.to_text().startswith("DOES NOT REPRODUCE")


def test_replaced_checkpoint_is_refused_before_anything_runs(released, s3):
    key = released.content("checkpoint")
    kept = s3.get_object(Bucket=BUCKET, Key=key)["Body"].read()
    before = set(released.settings.home.glob("runs/*"))
    s3.put_object(Bucket=BUCKET, Key=key, Body=kept[:-1] + bytes([kept[-1] ^ 1]))
    try:
        with pytest.raises(VerificationError, match=f"does not verify(.|\n)*{key}"):
            reproduce_release(Release.at(released.connection, released.uri))
    finally:
        s3.put_object(Bucket=BUCKET, Key=key, Body=kept)
    assert set(released.settings.home.glob("runs/*")) == before


def test_release_without_kept_content_says_so(released, s3):
    # Registered and whole, but of inputs that are gone.
    key = released.uri.removeprefix(f"s3://{BUCKET}/") + "/manifest.json"
    tracker, registered = released.connection.tracker, released.manifest["mlflow"]
    name, version = registered["model_name"], registered["model_version"]
    kept = s3.get_object(Bucket=BUCKET, Key=key)["Body"].read()
    without = to_json({**released.manifest, "content": []})
    try:
        for content in (without, kept):
            s3.put_object(Bucket=BUCKET, Key=key, Body=content)
            digest = hashlib.sha256(content).hexdigest()
            tracker.set_version_tags(name, version, {"manifest_sha256": digest})
            if content == without:
                with pytest.raises(VerificationError, match="has not kept its checkpoint"):
                    reproduce_release(Release.at(released.connection, released.uri))
    finally:
        s3.put_object(Bucket=BUCKET, Key=key, Body=kept)


def test_model_that_is_not_there_is_named(released, monkeypatch):
    monkeypatch.setitem(os.environ, "PYTHONPATH", "")
    with pytest.raises(ParameterError, match=r"does not run here.*no module 'models'"):
        reproduce_release(Release.at(released.connection, released.uri))


@pytest.mark.slow
@pytest.mark.thorough
def test_variants_are_made_again_from_the_calibration_data_that_were_kept(
    make_settings, s3, tmp_path, reset_mlflow
):
    bucket = "test-reproduce-variants"
    inputs = make_small_inputs(tmp_path)
    calibration = tmp_path / "somewhere" / "calibration.npz"
    calibration.parent.mkdir()
    signal = np.random.default_rng(2).standard_normal((6, 2, 8, 8)).astype(np.float32)
    np.savez(calibration, signal=signal)
    settings = make_settings("reproduce-variants")
    parameters = smoke(
        inputs,
        bucket,
        variants="int8-minmax,fp32-openvino",
        calibration_data=str(calibration),
        max_displacement_sigma=1e9,
    )
    notebook = changed_notebook(tmp_path)
    result = release_checkpoint(parameters, settings, notebook=notebook)
    assert result.success, result.error
    calibration.unlink()
    uri = f"s3://{bucket}/{PREFIX}/{result.version}"
    released = read_manifest(*locate(s3, uri))
    assert "variants/int8-minmax/model.onnx" in released.objects
    assert load_model(uri, settings=settings, variant="int8-minmax").get_inputs()
    bom = s3.get_object(Bucket=bucket, Key=released.objects["bom.cdx.json"].key)["Body"].read()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(bom.decode()) is None
    assert b'"bom-ref": "variant-int8-minmax"' in bom
    repeated = reproduce_release(Release.at(connect(settings), uri))
    assert repeated.failures == ()
    compared = {c.what: c for c in repeated.variants}
    own = released.objects["variants/int8-minmax/model.onnx"].sha256
    assert compared["variant int8-minmax, sha256"].found == own
    assert compared["calibration inputs, SHA-256"].judgement == "identical"
    assert compared["variant int8-minmax, positions, mean"].found > 0
    assert compared["variant fp32-openvino, status"].found == "passed"
    assert "variants, which must be the same here" in repeated.to_text()
    left = {path.name for path in repeated.report.parent.iterdir()}
    assert left == {"notebook.ipynb", "report.ipynb", "events.jsonl"}
