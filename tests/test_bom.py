"""The bill of materials of a real release, held against the published schema and the record."""

import copy
import hashlib
import json
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from releases import PREFIX, Inputs, changed_notebook, make_small_inputs, smoke

from heimdall_onnx.bom import describe_release
from heimdall_onnx.release import release_checkpoint
from heimdall_onnx.report import read_record
from heimdall_onnx.store import read_json

HOSTILE = '<script>alert(1)</script>\x00\x1b[2J\u202e"\\\ud800 s3://elsewhere $(id)'


@dataclass(frozen=True)
class Released:
    inputs: Inputs
    manifest: dict
    record: dict
    bom: dict


@pytest.fixture(scope="module")
def released(make_settings, s3, tmp_path_factory) -> Released:
    folder = tmp_path_factory.mktemp("labelled")
    inputs = make_small_inputs(folder)
    positions = np.random.default_rng(1).uniform((46, 4), (51, 11), (12, 2))
    np.savez(inputs.eval_data, positions=positions, **np.load(inputs.eval_data))
    result = release_checkpoint(
        smoke(inputs, "test-bom"), make_settings("bom"), notebook=changed_notebook(folder)
    )
    assert result.success, result.error
    manifest = read_json(s3, "test-bom", f"{PREFIX}/{result.version}/manifest.json")
    record = read_record(Path(result.local_report).with_suffix(".ipynb"))
    return Released(inputs, manifest, record, json.loads(valid(manifest, record)))


def valid(manifest: dict, record: dict) -> bytes:
    described = describe_release(manifest, record)
    error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(described.decode())
    assert error is None, error
    return described


def component(bom: dict, reference: str) -> dict:
    return next(c for c in bom["components"] if c["bom-ref"] == reference)


def sha256(path: Path) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": hashlib.sha256(path.read_bytes()).hexdigest()}]


def figures(bom: dict) -> dict[tuple[str, str], tuple[float, ...]]:
    """Type and first words of the slice, to value and interval."""
    card = bom["metadata"]["component"]["modelCard"]
    found = {}
    for metric in card["quantitativeAnalysis"]["performanceMetrics"]:
        interval = metric.get("confidenceInterval", {})
        ends = (interval[end] for end in ("lowerBound", "upperBound") if end in interval)
        where = metric["slice"].partition(",")[0]
        found[metric["type"], where] = tuple(map(float, (metric["value"], *ends)))
    return found


def test_figures_are_those_of_the_record(released):
    latency, parity = released.record["latency"], released.record["parity"]
    speedup = latency["speedup"]
    expected = {
        ("speedup", "PyTorch over ONNX Runtime"): (
            speedup["ratio"],
            speedup["low"],
            speedup["high"],
        )
    }
    for who, contender in zip(("PyTorch", "ONNX Runtime"), latency["contenders"], strict=True):
        assert contender["percentiles"][0]["value_ms"] == pytest.approx(contender["median_ms"])
        for p in contender["percentiles"]:
            ends = (p["value_ms"], p["low_ms"], p["high_ms"])
            expected[f"latency p{p['percentile']:g} (ms)", who] = ends
    for output in parity["cells"][0]["outputs"]:
        for kind, name in (("mean", "mean"), ("maximum", "maximum"), ("p99", "p99")):
            what = f"{kind} absolute error (degrees latitude, longitude)"
            expected[what, output["output"]] = (output[name],)
    for task in parity["ground"]["task"]:
        expected["localization error, median (m)", task["who"]] = (task["median_m"],)
        expected["localization error, p95 (m)", task["who"]] = (task["p95_m"],)
    assert figures(released.bom) == expected
    assert len(expected) == 1 + 2 + 2 * 3 + 3 * 2
    metrics = released.record["metrics"]
    assert expected["speedup", "PyTorch over ONNX Runtime"][0] == metrics["speedup"]
    assert expected["localization error, p95 (m)", "ONNX"][0] == metrics["error_onnx_p95_m"]


def test_model_is_what_was_released(released, s3):
    model, manifest = released.bom["metadata"]["component"], released.manifest
    entry = next(o for o in manifest["objects"] if o["key"].endswith("/model.onnx"))
    assert model["type"] == "machine-learning-model"
    assert model["version"] == manifest["version"]
    assert model["hashes"] == [{"alg": "SHA-256", "content": entry["sha256"]}]
    assert model["purl"].startswith(f"pkg:generic/test-model@{manifest['version']}?checksum=sha256")
    addresses = {r["type"]: r["url"] for r in model["externalReferences"]}
    assert addresses["distribution"] == f"s3://test-bom/{entry['key']}"
    parameters = model["modelCard"]["modelParameters"]
    assert parameters["inputs"] == [{"format": "signal: float32 (batch, 2, 8, 8)"}]
    assert parameters["outputs"][1]["format"].endswith("in [0.01, 1]")
    assert parameters["modelArchitecture"] == "models:SmallNet"
    assert "architectureFamily" not in parameters
    limits = " ".join(model["modelCard"]["considerations"]["technicalLimitations"])
    assert "profile smoke" in limits
    assert "random numbers" not in limits


def test_checkpoint_and_data_are_named_by_hash(released):
    checkpoint, data = (component(released.bom, r) for r in ("checkpoint", "evaluation-data"))
    assert checkpoint["hashes"] == sha256(released.inputs.checkpoint)
    assert data["hashes"] == sha256(released.inputs.eval_data)
    assert data["type"] == "data"
    for found, role in ((checkpoint, "checkpoint"), (data, "evaluation_data")):
        key = next(e["key"] for e in released.manifest["content"] if e["role"] == role)
        assert [r["url"] for r in found["externalReferences"]] == [f"s3://test-bom/{key}"]
    depends = {d["ref"]: d.get("dependsOn", []) for d in released.bom["dependencies"]}
    assert {"checkpoint", "evaluation-data"} < set(depends["model"])


def test_environment_is_complete(released):
    purls = {c["purl"] for c in released.bom["components"] if "purl" in c}
    expected = {
        f"pkg:pypi/{d.name.lower().replace('_', '-').replace('.', '-')}@"
        f"{d.version.replace('+', '%2B')}"
        for d in metadata.distributions()
    }
    assert purls == expected
    properties = {p["name"]: p["value"] for p in released.bom["metadata"]["properties"]}
    assert properties["heimdall-onnx:parameter:opset"] == "14"
    assert properties["heimdall-onnx:git:commit"] == released.manifest["git"]["commit"]
    assert component(released.bom, "processor")["name"] == released.manifest["environment"]["cpu"]
    assert str(released.inputs.checkpoint.parent) not in json.dumps(released.bom)


def test_release_folder_holds_it(released, s3):
    entry = next(o for o in released.manifest["objects"] if o["key"].endswith("/bom.cdx.json"))
    # It was made before the manifest named it.
    before = [o for o in released.manifest["objects"] if o != entry]
    stored = s3.get_object(Bucket="test-bom", Key=entry["key"])["Body"].read()
    assert stored == describe_release({**released.manifest, "objects": before}, released.record)


def test_same_release_gives_the_same_bytes_and_another_model_another_number(released):
    again = describe_release(copy.deepcopy(released.manifest), copy.deepcopy(released.record))
    assert json.loads(again) == released.bom
    assert again == describe_release(released.manifest, released.record)
    other = copy.deepcopy(released.manifest)
    next(o for o in other["objects"] if o["key"].endswith("/model.onnx"))["sha256"] = "0" * 64
    changed = json.loads(valid(other, released.record))
    assert changed["serialNumber"] != released.bom["serialNumber"]


def test_hostile_text_stays_data(released):
    manifest, record = copy.deepcopy(released.manifest), copy.deepcopy(released.record)
    manifest["checkpoint"]["file"] = manifest["environment"]["cpu"] = HOSTILE
    manifest["evaluation_data"] |= {"source": HOSTILE, "provenance": HOSTILE}
    manifest["parameters"]["model_kwargs"] = {HOSTILE: HOSTILE}
    record["model"]["class"] = HOSTILE
    record["model"]["signature"]["outputs"][0]["name"] = HOSTILE
    record["parity"]["cells"][0]["outputs"][0]["output"] = HOSTILE
    written = valid(manifest, record)
    assert all(32 <= byte < 127 or byte == 10 for byte in written)
    bom = json.loads(written)
    assert component(bom, "checkpoint")["name"] == HOSTILE
    assert component(bom, "evaluation-data")["data"][0]["description"] == HOSTILE
    assert bom["metadata"]["component"]["modelCard"]["modelParameters"]["modelArchitecture"] == (
        HOSTILE
    )
    urls = [
        r["url"]
        for c in (bom["metadata"]["component"], *bom["components"])
        for r in c.get("externalReferences", [])
    ]
    assert not any("elsewhere" in url for url in urls)


def test_synthetic_inputs_and_infinite_errors_are_said_to_be_so(released):
    manifest, record = copy.deepcopy(released.manifest), copy.deepcopy(released.record)
    data = {"source": "synthetic inputs", "provenance": "seeded random numbers", "sha256": None}
    manifest["evaluation_data"] |= data
    manifest["content"] = [e for e in manifest["content"] if e["role"] == "checkpoint"]
    record["parity"]["ground"] = None
    record["parity"]["cells"][0]["outputs"][0]["maximum"] = "inf"
    bom = json.loads(valid(manifest, record))
    assert "hashes" not in component(bom, "evaluation-data")
    limits = " ".join(
        bom["metadata"]["component"]["modelCard"]["considerations"]["technicalLimitations"]
    )
    assert "random numbers, which say little" in limits
    assert "from the truth was not measured" in limits
    what = "maximum absolute error (degrees latitude, longitude)"
    assert figures(bom)[what, "positions"] == (float("inf"),)
