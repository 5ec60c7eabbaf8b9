"""A manifest is read as anybody's bytes: only one that fits its folder is taken."""

import json

import pytest
import records

from heimdall_onnx.archive.manifest import parse_manifest
from heimdall_onnx.common.errors import ParameterError, VerificationError
from heimdall_onnx.model.runtimes import SessionSettings

FOLDER = "models/localization/v1"
URI = f"s3://bucket/{FOLDER}"
HASH = "a" * 64


def manifest(**changes) -> bytes:
    data = records.manifest_json(
        objects=[{"key": f"{FOLDER}/model.onnx", "size": 1, "sha256": HASH}],
        content=[
            {
                "role": "checkpoint",
                "key": f"objects/sha256/{HASH}",
                "size": 1,
                "sha256": HASH,
                "name": "model.ckpt",
            }
        ],
        signature={"key": f"{FOLDER}/model.sig", "signer_sha256": HASH},
    )
    return json.dumps({**data, **changes}).encode()


def test_what_is_relied_on():
    read = parse_manifest(manifest(), URI + "/")
    assert (read.uri, read.version, read.key) == (URI, "v1", f"{FOLDER}/manifest.json")
    assert (read.model_name, read.model_version, read.model.sha256) == ("net", "3", HASH)
    assert read.content_of("checkpoint").name == "model.ckpt"
    assert read.content_of("evaluation_data") is None
    assert read.said.signature.signer_sha256 == HASH


def test_what_records_say_is_read_as_they_say_it():
    said, record = parse_manifest(manifest(), URI).said, records.record()
    for name in ("gates", "checkpoint", "model", "evaluation_data", "environment"):
        assert getattr(said, name) == getattr(record, name)


@pytest.mark.parametrize("schema", [1, 2, 3])
def test_manifest_of_0_1_is_refused_in_one_sentence(schema):
    # Whatever else it says, or lacks.
    for text in (manifest(schema_version=schema), f'{{"schema_version": {schema}}}'.encode()):
        with pytest.raises(VerificationError) as raised:
            parse_manifest(text, URI)
        assert str(raised.value) == (
            f"{URI}/manifest.json was made by heimdall-onnx 0.1: reproduce it with that version"
        )


def test_manifest_of_a_later_version_is_refused():
    with pytest.raises(VerificationError, match="was made by a later heimdall-onnx: expected"):
        parse_manifest(manifest(schema_version=5), URI)


@pytest.mark.parametrize("missing", ["created", "gates", "content", "model", "mlflow"])
def test_manifest_without_a_part_of_it_is_refused(missing):
    data = json.loads(manifest())
    del data[missing]
    with pytest.raises(VerificationError, match=f"no manifest of a release: {missing}: Field req"):
        parse_manifest(json.dumps(data).encode(), URI)


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
        ({"mlflow": {"run_id": "", "model_name": "net", "model_version": "3; --"}}, "pattern"),
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


OWN = f"{FOLDER}/variants/int8-minmax/model.onnx"
OTHER_HASH = "b" * 64


def variant(name: str, file: str = "model.onnx", **changes) -> dict:
    return {
        "name": name,
        "status": "passed",
        "file": file,
        "sha256": HASH,
        "size_bytes": 1,
        "sessions": {p: SessionSettings().to_dict() for p in ("latency", "throughput")},
        "further": {"keys": ["are", "tolerated"]},
        **changes,
    }


def with_variants(where: str = "", **changes) -> bytes:
    """A manifest with variants of every status, and with changes to one part of it."""
    own = variant("int8-minmax", "variants/int8-minmax/model.onnx", sha256=OTHER_HASH)
    failed = {"name": "int4-weights", "status": "failed", "reason": "a gate\x1b[2J"}
    unavailable = {"name": "fp16-cuda", "status": "unavailable", "file": None, "sessions": None}
    fp32 = variant("fp32")
    variants = {
        "recommended": "int8-minmax",
        "judged": [fp32, variant("fp32-openvino"), own, failed, unavailable],
        "calibration": {"samples": 1},
    }
    data = {
        "objects": [MODEL, {**entry(OWN), "sha256": OTHER_HASH}],
        "variants": variants,
    }
    parts = {
        "manifest": data,
        "variants": variants,
        "fp32": fp32,
        "own": own,
        "settings": own["sessions"]["throughput"],
    }
    if where:
        parts[where] |= changes
    return manifest(**data)


def test_variants_that_passed_are_found_by_name():
    read = parse_manifest(with_variants(), URI)
    assert read.recommended == "int8-minmax"
    assert [one.status for one in read.said.variants.judged][2:] == [
        "passed",
        "failed",
        "unavailable",
    ]
    assert list(read.said.variants.passed) == ["fp32", "fp32-openvino", "int8-minmax"]
    assert read.variant("recommended") == read.variant("int8-minmax")
    own = read.variant("int8-minmax")
    assert list(own.files) == ["variants/int8-minmax/model.onnx"]
    assert next(iter(own.files.values())).key == OWN
    assert own.sessions.latency == SessionSettings()
    assert list(read.variant("fp32-openvino").files) == ["model.onnx"]
    assert read.files_of_variants == {"model.onnx", "variants/int8-minmax/model.onnx"}
    assert list(read.model_files) == ["model.onnx"]


def test_variant_that_is_the_model_has_its_weights_too():
    objects = [MODEL, entry(f"{FOLDER}/model.onnx.data"), {**entry(OWN), "sha256": OTHER_HASH}]
    read = parse_manifest(with_variants("manifest", objects=objects), URI)
    assert list(read.variant("fp32-openvino").files) == ["model.onnx", "model.onnx.data"]
    assert list(read.variant("int8-minmax").files) == ["variants/int8-minmax/model.onnx"]


def test_manifest_without_variants_has_its_model_alone():
    read = parse_manifest(manifest(variants=None), URI)
    assert read.said.variants is None
    assert read.recommended == "fp32"
    for name in ("fp32", "recommended"):
        assert (read.variant(name).name, read.variant(name).sessions) == ("fp32", None)
        assert list(read.variant(name).files) == ["model.onnx"]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        (
            "int4-weights",
            r"failed, a gate\\x1b\[2J\); it has fp32, fp32-openvino, int8",
        ),
        ("fp16-cuda", r"\(unavailable\)"),
        ("model.onnx", "has no variant 'model.onnx' that can be opened; it has"),
        ("", "has no variant ''"),
    ],
)
def test_variant_that_is_not_there_is_refused(name, problem):
    with pytest.raises(ParameterError, match=problem):
        parse_manifest(with_variants(), URI).variant(name)


@pytest.mark.parametrize(
    ("where", "changes", "problem"),
    [
        ("variants", {"recommended": "int4-weights"}, "that passed to be recommended"),
        ("variants", {"recommended": "recommended"}, "that passed to be recommended"),
        ("variants", {"recommended": None}, "recommended: Input should be a valid string"),
        ("variants", {"judged": [variant("fp32"), variant("fp32")]}, "fp32 is named twice"),
        ("variants", {"judged": [variant("recommended")]}, "is no name of a variant"),
        ("variants", {"judged": [variant(f"x{n}") for n in range(10_000)]}, "at most 100 items"),
        ("manifest", {"objects": [MODEL]}, "is not among the objects"),
        ("own", {"name": "../x"}, "pattern"),
        ("own", {"name": "x\n"}, "pattern"),
        ("own", {"file": "variants/int8-nncf/model.onnx"}, "expected variant int8-minmax in model"),
        ("own", {"file": f"../v1/{OWN}"}, "or variants/int8-minmax/model.onnx, found ../v1/"),
        ("own", {"sha256": "c" * 64}, f"the SHA-256 of .*, {OTHER_HASH}, found c"),
        (
            "fp32",
            {"file": "variants/fp32/model.onnx"},
            "expected variant fp32 in model.onnx, found",
        ),
        ("fp32", {"sha256": "c" * 64}, f"the SHA-256 of model.onnx, {HASH}, found c"),
        ("fp32", {"size_bytes": "1"}, "size_bytes: Input should be a valid integer"),
        ("fp32", {"sessions": None}, "sessions: Input should be an object"),
        ("fp32", {"status": "\x1b[2J" + "x" * 999}, r"Input tag '\\x1b\[2Jxxx"),
        ("fp32", {"status": ["passed"]}, "status"),
        ("settings", {"threads": 100_000}, "threads: "),
        ("settings", {f"x{n}": 1 for n in range(10_000)}, "at most 50 options, found 10009"),
        ("settings", {"provider_options": {f"x{n}": 1 for n in range(99)}}, "at most 50 options"),
        ("settings", {"evil\x1b[2J": 1}, r"evil\\x1b\[2J: Extra inputs"),
        # What would run something, or write or load any file.
        ("settings", {"runtime": "pytorch"}, "is not run with pytorch"),
        ("settings", {"runtime": "torch.compile"}, "is not run with torch.compile"),
        ("settings", {"provider": "QNNExecutionProvider"}, "expected onnxruntime on"),
        ("settings", {"runtime": "openvino", "provider": "AUTO"}, "expected openvino on"),
        ("settings", {"provider_options": {"trt_engine_cache_path": "x"}}, "option 'trt_engine_c"),
        ("settings", {"provider_options": {"gpu_external_alloc": "1"}}, "option 'gpu_external_al"),
        ("settings", {"provider_options": {"device_id": "../\x1b"}}, r"'device_id' = '../\\x1b'"),
    ],
)
def test_variants_that_contradict_the_manifest_or_do_harm_are_refused(where, changes, problem):
    with pytest.raises(VerificationError, match=problem) as raised:
        parse_manifest(with_variants(where, **changes), URI)
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 2000


def test_options_that_are_harmless_are_kept():
    options = {"trt_fp16_enable": "1", "trt_profile_min_shapes": "signal:1x3x128x32"}
    read = parse_manifest(
        with_variants("settings", provider="TensorrtExecutionProvider", provider_options=options),
        URI,
    )
    assert read.variant("int8-minmax").sessions.throughput.provider_options == options
