"""A manifest is read as anybody's bytes: only one that fits its folder is taken."""

import json

import pytest

from heimdall_onnx.errors import VerificationError
from heimdall_onnx.manifest import parse_manifest

FOLDER = "models/localization/v1"
URI = f"s3://bucket/{FOLDER}"
HASH = "a" * 64


def manifest(**changes) -> bytes:
    data = {
        "verdict": "pass",
        "objects": [{"key": f"{FOLDER}/model.onnx", "size": 1, "sha256": HASH}],
        "content": [
            {
                "role": "checkpoint",
                "key": f"objects/sha256/{HASH}",
                "size": 1,
                "sha256": HASH,
                "name": "model.ckpt",
            }
        ],
        "signature": {"key": f"{FOLDER}/model.sig", "signer_sha256": HASH},
        "mlflow": {"model_name": "net", "model_version": "3"},
    }
    return json.dumps({**data, **changes}).encode()


def test_what_is_relied_on():
    read = parse_manifest(manifest(), URI + "/")
    assert (read.uri, read.version, read.key) == (URI, "v1", f"{FOLDER}/manifest.json")
    assert (read.model_name, read.model_version, read.model.sha256) == ("net", "3", HASH)
    assert read.content_of("checkpoint").name == "model.ckpt"
    assert read.content_of("evaluation_data") is None
    assert read.signature.signer_sha256 == HASH


def test_manifest_of_an_older_release_is_read_as_unsigned_and_without_content():
    data = json.loads(manifest())
    del data["content"], data["signature"]
    read = parse_manifest(json.dumps(data).encode(), URI)
    assert (read.content, read.signature) == ((), None)


def entry(key: str) -> dict:
    return {"key": key, "size": 1, "sha256": HASH}


MODEL = entry(f"{FOLDER}/model.onnx")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"objects": []}, "names no .*model.onnx"),
        ({"objects": [MODEL, MODEL]}, "named twice"),
        ({"objects": [MODEL, entry("models/localization/v2/x")]}, "expected keys of objects in"),
        ({"objects": [MODEL, entry(f"{FOLDER}/../v2/x")]}, "expected keys"),
        ({"objects": [MODEL, entry(f"{FOLDER}//x")]}, "expected keys"),
        ({"objects": [MODEL, entry(f"{FOLDER}/a/../../x")]}, "expected keys"),
        ({"objects": [MODEL, entry(f"{FOLDER}/x\n")]}, "expected keys"),
        ({"objects": [MODEL, entry(f"{FOLDER}/manifest.json")]}, "expected keys"),
        ({"objects": [{**MODEL, "size": -1}]}, "greater than or equal to 0"),
        ({"objects": [{**MODEL, "sha256": "A" * 64}]}, "pattern"),
        ({"signature": {"key": "elsewhere", "signer_sha256": HASH}}, "expected the signature at"),
        ({"content": [{**entry("x"), "role": "checkpoint", "name": "x"}]}, "expected content at"),
        ({"content": [{**entry("x"), "role": "other", "name": "x"}]}, "role"),
        ({"mlflow": {"model_name": "net", "model_version": "3; --"}}, "pattern"),
    ],
)
def test_what_points_elsewhere_or_is_not_what_it_should_be_is_refused(changes, problem):
    with pytest.raises(VerificationError, match=problem):
        parse_manifest(manifest(**changes), URI)


@pytest.mark.parametrize("wrong", [0, "1"])
def test_manifest_of_many_objects_is_refused_at_once(wrong):
    crowd = [{**entry(f"{FOLDER}/{n}"), "size": wrong} for n in range(40_000)]
    with pytest.raises(VerificationError, match="no manifest of a release") as raised:
        parse_manifest(manifest(objects=crowd), URI)
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize("text", [b"", b"\xff", b"[]", b"[" * 100_000, b'{"a": NaN}'])
def test_what_is_no_json_object_is_refused(text):
    with pytest.raises(VerificationError, match="no manifest of a release"):
        parse_manifest(text, URI)
