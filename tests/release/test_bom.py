"""The bill of materials of a real release, held against the published schema and the record."""

import copy
import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import records
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from releases import PREFIX, Inputs, changed_notebook, make_small_inputs, smoke

from heimdall_onnx.archive.manifest import parse_manifest
from heimdall_onnx.archive.record import parse_record
from heimdall_onnx.release.bom import describe_release
from heimdall_onnx.release.runner import release_checkpoint
from heimdall_onnx.services.store import Bucket

HOSTILE = '<script>alert(1)</script>\x00\x1b[2J\u202e"\\ s3://elsewhere $(id)'


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
        smoke(inputs, "test-bom", measure_latency=True),
        make_settings("bom"),
        notebook=changed_notebook(folder),
    )
    assert result.success, result.error
    manifest = Bucket(s3, "test-bom").read_json(f"{PREFIX}/{result.version}/manifest.json")
    record = records.read(Path(result.local_report).with_suffix(".ipynb")).to_json()
    bom = json.loads(valid(manifest, record))
    return Released(inputs, manifest, record, bom)


def described(manifest: dict, record: dict) -> bytes:
    uri = f"s3://test-bom/{PREFIX}/{manifest['version']}"
    read = parse_manifest(json.dumps(manifest).encode(), uri)
    return describe_release(read, parse_record(record, "a test"))


def valid(manifest: dict, record: dict) -> bytes:
    written = described(manifest, record)
    error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(written.decode())
    assert error is None, error
    return written


def with_variants(released: Released, reason: str = "median: 9%") -> tuple[dict, dict]:
    """Manifest and record as a release with variants has them; the reason is anybody's text."""
    manifest, record = copy.deepcopy(released.manifest), copy.deepcopy(released.record)
    folder = f"{PREFIX}/{manifest['version']}"
    fp32 = next(o["sha256"] for o in manifest["objects"] if "model.onnx" in o["key"])
    manifest["objects"].append(
        {"key": f"{folder}/variants/int8-minmax/model.onnx", "size": 7, "sha256": "c" * 64}
    )
    gate = {"name": "median localization error, ratio to fp32", "limit": "≤ 1.01", "detail": ""}
    judged = [
        records.variant(
            name,
            status,
            reason=reason if status != "passed" else "",
            file=file,
            sha256=fp32 if file == "model.onnx" else "c" * 64,
            ran_on="CPU" if "openvino" in name else "CPUExecutionProvider",
            kept_in_float=["head"],
            gates=[] if name == "fp32" else [{**gate, "measured": 1.5, "passed": "1" in name}],
            latency=records.pair("fp32", name, 2.5) if status == "passed" else None,
        )
        for name, status, file in (
            ("fp32", "passed", "model.onnx"),
            ("bf16-openvino", "passed", "model.onnx"),
            ("int8-minmax", "passed", "variants/int8-minmax/model.onnx"),
            ("int4-weights", "failed", "variants/int4-weights/model.onnx"),
        )
    ]
    calibration = {"source": "demo-eval.npz", "sha256": "d" * 64, "rows": [3, 9], "left_out": 0}
    manifest["variants"] = record["variants"] = records.variants(
        "int8-minmax", *judged, calibration=calibration
    )
    return manifest, record


def component(bom: dict, reference: str) -> dict:
    return next(c for c in bom["components"] if c["bom-ref"] == reference)


def sha256(path: Path) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": hashlib.sha256(path.read_bytes()).hexdigest()}]


def figures(bom: dict) -> dict[tuple[str, str], float]:
    """Type and slice, to value."""
    card = bom["metadata"]["component"]["modelCard"]
    metrics = card["quantitativeAnalysis"]["performanceMetrics"]
    return {(metric["type"], metric["slice"]): float(metric["value"]) for metric in metrics}


def intervals(bom: dict) -> dict[str, tuple[float, float]]:
    card = bom["metadata"]["component"]["modelCard"]
    metrics = card["quantitativeAnalysis"]["performanceMetrics"]
    ends = ("lowerBound", "upperBound")
    return {
        metric["type"]: tuple(float(metric["confidenceInterval"][end]) for end in ends)
        for metric in metrics
        if "confidenceInterval" in metric
    }


def test_figures_are_those_of_the_record(released):
    metrics = released.record["metrics"]
    assert {"speedup", "positions_mae", "error_onnx_p95_m", "nll_onnx"} < metrics.keys()
    assert figures(released.bom) == {(name, "fp32"): value for name, value in metrics.items()}
    speedup, found = released.record["latency"]["speedup"], intervals(released.bom)
    expected = {"speedup": (speedup["low"], speedup["high"])}
    for one in released.record["parity"]["uncertainty"]:
        for c in one["calibration"]["coverage"]:
            name = f"coverage_{100 * c['nominal']:.0f}_{one['who'].lower()}"
            expected[name] = (c["low"], c["high"])
    assert found == expected
    assert expected.keys() <= metrics.keys()


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


def test_every_component_says_what_it_needs_if_only_nothing(released):
    bom = json.loads(valid(*with_variants(released)))
    model = bom["metadata"]["component"]
    components = [model, *model["components"], *bom["components"]]
    named = [needed["ref"] for needed in bom["dependencies"]]
    assert sorted(named) == sorted(c["bom-ref"] for c in components)
    assert "variant-int8-minmax" in named


@pytest.mark.parametrize(
    ("address", "written"),
    [
        ("s3://data/a%20b/c#part", "s3://data/a%20b/c#part"),
        ("s3://data/a b/[c]", "s3://data/a%20b/%5Bc%5D"),
        ("s3://data/100% new", "s3://data/100%25%20new"),
    ],
)
def test_address_is_quoted_once(released, address, written):
    manifest = copy.deepcopy(released.manifest)
    dataset = {"role": "evaluation_data", "name": "d", "address": address, "digest": "a" * 64}
    manifest["datasets"] = [{**dataset, "samples": 1}]
    bom = json.loads(valid(manifest, released.record))
    found = component(bom, "evaluation-data")["externalReferences"]
    assert written in [reference["url"] for reference in found]


def test_environment_is_complete(released):
    purls = {c["purl"] for c in released.bom["components"] if "purl" in c}
    # What other tests have imported brings packages of its own onto this process's path.
    found = "import importlib.metadata as m\n"
    found += "print(*(f'{d.name} {d.version}' for d in m.distributions()), sep='|')"
    run = subprocess.run([sys.executable, "-c", found], capture_output=True, text=True, check=True)
    expected = {
        f"pkg:pypi/{name.lower().replace('_', '-').replace('.', '-')}@{version.replace('+', '%2B')}"
        for name, version in map(str.split, run.stdout.split("|"))
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
    assert stored == described({**released.manifest, "objects": before}, released.record)


def test_same_release_gives_the_same_bytes_and_another_model_another_number(released):
    again = described(released.manifest, released.record)
    assert json.loads(again) == released.bom
    assert again == described(released.manifest, released.record)
    other = copy.deepcopy(released.manifest)
    next(o for o in other["objects"] if o["key"].endswith("/model.onnx"))["sha256"] = "0" * 64
    changed = json.loads(valid(other, released.record))
    assert changed["serialNumber"] != released.bom["serialNumber"]


def test_variants_are_components_with_their_figures(released):
    bom = json.loads(valid(*with_variants(released)))
    model = bom["metadata"]["component"]
    (own,) = (c for c in model["components"] if c["bom-ref"].startswith("variant-"))
    assert own["name"] == "test-model int8-minmax"
    assert own["description"] == "Variant of the model: what int8-minmax is"
    assert own["hashes"] == [{"alg": "SHA-256", "content": "c" * 64}]
    assert own["externalReferences"][0]["url"].endswith("/variants/int8-minmax/model.onnx")
    of_own = {p["name"].split(":", 1)[1]: p["value"] for p in own["properties"]}
    assert of_own["precision"] == "int8"
    assert json.loads(of_own["kept_in_float"]) == ["head"]
    assert json.loads(of_own["session:latency"])["runtime"] == "onnxruntime"
    properties = {p["name"].split(":", 1)[1]: p["value"] for p in model["properties"]}
    assert properties["variants:recommended"] == "int8-minmax"
    gate, found = "median localization error, ratio to fp32", figures(bom)
    assert found[gate, "variant int4-weights, limit ≤ 1.01 broken"] == 1.5
    assert found["speedup", "fp32"] == released.record["metrics"]["speedup"]
    limits = " ".join(model["modelCard"]["considerations"]["technicalLimitations"])
    assert "variants other than fp32 hold for that processor" in limits


def test_paths_of_one_machine_are_left_out(released):
    manifest = copy.deepcopy(released.manifest)
    manifest["parameters"]["calibration_data"] = "/home/somebody/calibration.npz"
    assert b"somebody" not in valid(manifest, released.record)


def test_hostile_text_stays_data(released):
    manifest, record = with_variants(released, HOSTILE)
    record["checkpoint"]["file"] = record["environment"]["cpu"] = HOSTILE
    record["evaluation_data"] |= {"source": HOSTILE, "provenance": HOSTILE}
    manifest["parameters"]["model_kwargs"] = {HOSTILE: HOSTILE}
    record["model"]["spec"] = HOSTILE
    record["model"]["signature"]["outputs"][0]["name"] = HOSTILE
    record["metrics"] = {HOSTILE: 1.0}
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


def test_synthetic_inputs_are_said_to_be_so(released):
    manifest, record = copy.deepcopy(released.manifest), copy.deepcopy(released.record)
    data = {"source": "synthetic inputs", "provenance": "seeded random numbers", "sha256": None}
    record["evaluation_data"] |= data
    manifest["content"] = [e for e in manifest["content"] if e["role"] == "checkpoint"]
    record["parity"]["ground"] = None
    record["parity"]["quality"] = []
    bom = json.loads(valid(manifest, record))
    assert "hashes" not in component(bom, "evaluation-data")
    limits = " ".join(
        bom["metadata"]["component"]["modelCard"]["considerations"]["technicalLimitations"]
    )
    assert "random numbers, which say little" in limits
    assert "are in their task was not measured" in limits
