"""A variant of a release is opened as it was measured, from its own file alone, if that holds."""

import sys

import numpy as np
import pytest
from keys import make_key
from quick_release import Factory
from structlog.testing import capture_logs

from heimdall_onnx.archive import load as loading
from heimdall_onnx.archive.load import load_model
from heimdall_onnx.archive.manifest import Entry, Sessions, Variant
from heimdall_onnx.archive.release import Release
from heimdall_onnx.archive.signing import open_signer
from heimdall_onnx.archive.verify import verify_release
from heimdall_onnx.common.errors import ParameterError, UnavailableError, VerificationError
from heimdall_onnx.model.runtimes import OpenVINOSession, SessionSettings
from heimdall_onnx.services.client import make_client
from heimdall_onnx.services.connection import connect
from heimdall_onnx.services.store import to_json

pytestmark = pytest.mark.services

BUCKET = "test-loading"
SIGNAL = {"signal": np.full((1, 2), 47, np.float32)}


@pytest.fixture(scope="module")
def settings(make_settings):
    return make_settings("loading")


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return make_key(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("releases")


@pytest.fixture(scope="module")
def released(settings, folder, keys):
    signer = open_signer(settings.model_copy(update={"signing_key": keys.private}))
    factory = Factory(connect(settings), BUCKET, folder)
    return factory(recommended="int8-minmax", signer=signer)


@pytest.fixture
def put(released, s3):
    """Replace an object of the release by its name; everything is put back afterwards."""
    before = {}

    def change(name: str, body: bytes | None) -> None:
        key = f"{released.folder}/{name}"
        kept = s3.get_object(Bucket=BUCKET, Key=key)
        before.setdefault(key, (kept["Body"].read(), kept["Metadata"]))
        if body is None:
            s3.delete_object(Bucket=BUCKET, Key=key)
        else:
            s3.put_object(Bucket=BUCKET, Key=key, Body=body)

    yield change
    for key, (body, metadata) in before.items():
        s3.put_object(Bucket=BUCKET, Key=key, Body=body, Metadata=metadata)


@pytest.fixture
def fetched(monkeypatch) -> list[str]:
    """Keys of everything that is read from the store."""
    read = []

    def watched(settings):
        client = make_client(settings)

        def note(params, **_):
            read.append(params["Key"])

        client.meta.events.register("provide-client-params.s3.GetObject", note)
        return client

    monkeypatch.setattr("heimdall_onnx.services.connection.make_client", watched)
    return read


def moved(session) -> float:
    """By how many degrees a model misses, which says which one it is."""
    (positions,) = session.run(["positions"], SIGNAL)
    return round(float(positions[0, 0]) - 47, 2)


def flipped(s3, released, name: str) -> bytes:
    key = f"{released.folder}/{name}"
    body = bytearray(s3.get_object(Bucket=BUCKET, Key=key)["Body"].read())
    body[len(body) // 2] ^= 1
    return bytes(body)


def test_variant_is_the_one_that_was_asked_for(settings, released):
    for variant, degrees in (("fp32", 0.01), ("int8-minmax", 0.25), ("fp32-openvino", 0.01)):
        assert moved(load_model(released.uri, settings=settings, variant=variant)) == degrees
    by_alias = load_model("models:/net@staging", settings=settings, variant="recommended")
    assert moved(by_alias) == 0.25
    # What nobody asks for is the model itself.
    assert moved(load_model(f"{released.uri}/model.onnx", settings=settings)) == 0.01


def test_onnx_runtime_opens_with_the_options_that_were_measured(settings, released):
    def opened(**given):
        session = load_model(released.uri, settings=settings, variant="int8-minmax", **given)
        return session.get_session_options()

    options = opened()
    assert (options.intra_op_num_threads, options.enable_cpu_mem_arena) == (1, False)
    assert opened(threads=3).intra_op_num_threads == 3


def test_threads_that_this_machine_has_not_are_not_taken(tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(loading, "open_onnxruntime", lambda _, settings: taken.append(settings))
    entry = Entry(key="model.onnx", size=1, sha256="0" * 64)
    for measured, processors, expected in ((64, 2, 0), (2, 2, 2), (0, 2, 0)):
        monkeypatch.setattr(loading, "usable_processors", lambda count=processors: count)
        latency = SessionSettings(threads=measured)
        sessions = Sessions(latency=latency, throughput=SessionSettings())
        variant = Variant("fp32", {"model.onnx": entry}, sessions)
        loading.open_variant(tmp_path / "model.onnx", variant, None)
        loading.open_variant(tmp_path / "model.onnx", variant, 5)
        assert [one.threads for one in taken[-2:]] == [expected, 5]


def test_openvino_is_called_like_onnx_runtime(settings, released):
    session = load_model(released.uri, settings=settings, variant="int8-nncf")
    assert isinstance(session, OpenVINOSession)
    assert moved(session) == 0.5
    assert [port.name for port in session.get_inputs()] == ["signal"]
    assert [port.name for port in session.get_outputs()] == ["positions"]
    (positions,) = session.run(None, SIGNAL)
    np.testing.assert_allclose(positions, [[47.5, 47]])


def test_openvino_that_is_not_installed_is_named_with_what_brings_it(
    settings, released, monkeypatch
):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UnavailableError, match=r"heimdall-onnx\[openvino\]"):
        load_model(released.uri, settings=settings, variant="fp32-openvino")
    assert moved(load_model(released.uri, settings=settings, variant="recommended")) == 0.25


@pytest.mark.parametrize(
    ("variant", "file"),
    [
        ("fp32-openvino", "model.onnx"),
        ("recommended", "variants/int8-minmax/model.onnx"),
    ],
)
def test_only_the_file_that_is_opened_is_fetched(
    settings, released, fetched, tmp_path, variant, file
):
    registry = settings.tracking_uri
    fresh = settings.model_copy(update={"home": tmp_path, "mlflow_tracking_uri": registry})
    load_model(released.uri, settings=fresh, variant=variant)
    models = [key for key in fetched if key.endswith(".onnx")]
    assert models == [f"{released.folder}/{file}"]
    assert f"{released.folder}/report.ipynb" in fetched
    assert len(list((tmp_path / "models").glob("*/model.onnx"))) == 1


def test_changed_variant_is_named_and_not_opened(settings, released, put, s3):
    name = "variants/int8-nncf/model.onnx"
    put(name, flipped(s3, released, name))
    wrong = [
        f.what for f in verify_release(Release.at(connect(settings), released.uri)) if not f.holds
    ]
    assert wrong == [f"{released.folder}/{name}"]
    for kept in (settings.home / "models").glob("*/model.onnx"):
        kept.unlink()
    with pytest.raises(VerificationError, match=r"int8-nncf/model\.onnx is not what was recorded"):
        load_model(released.uri, settings=settings, variant="int8-nncf")
    with pytest.raises(ParameterError, match="does not verify, and of what does not verify fp32"):
        load_model(released.uri, settings=settings, variant="int8-nncf", verify=False)
    # Nobody needs it who opens another one.
    assert moved(load_model(released.uri, settings=settings, variant="recommended")) == 0.25
    assert moved(load_model(released.uri, settings=settings)) == 0.01


def test_of_a_release_that_does_not_verify_there_is_only_fp32(settings, released, put):
    put("report.html", b"x")
    with pytest.raises(VerificationError, match=r"report\.html: expected"):
        load_model(released.uri, settings=settings, variant="recommended")
    for variant in ("int8-minmax", "recommended"):
        with pytest.raises(ParameterError, match="fp32 alone"):
            load_model(released.uri, settings=settings, variant=variant, verify=False)
    with capture_logs():
        assert moved(load_model(released.uri, settings=settings, verify=False)) == 0.01


def test_variant_that_is_gone_is_missed_whichever_is_opened(settings, released, put):
    put("variants/int8-nncf/model.onnx", None)
    with pytest.raises(VerificationError, match=r"int8-nncf/model\.onnx: expected an object"):
        load_model(released.uri, settings=settings, variant="int8-minmax")


def test_signature_is_about_the_files_that_are_not_read_too(settings, released, put, keys):
    trusting = settings.model_copy(update={"public_key": keys.public})
    assert moved(load_model(released.uri, settings=trusting, variant="recommended")) == 0.25
    # Rewritten by somebody who can write into bucket and registry, and has no key.
    forged = to_json(released.data).replace(
        released.objects["variants/int8-nncf/model.onnx"].sha256.encode(), b"0" * 64
    )
    put("manifest.json", forged)
    without_registry = trusting.model_copy(update={"home": settings.home / "elsewhere"})
    with pytest.raises(VerificationError, match=r"model\.sig: expected"):
        load_model(released.uri, settings=without_registry, variant="recommended")


@pytest.mark.parametrize(
    ("variant", "problem"),
    [
        ("int4-weights", r"\(failed, a reason for int4-weights\)"),
        ("fp16-cuda", r"\(unavailable, a reason for fp16-cuda\)"),
        ("int3\x1b", r"has no variant 'int3\\x1b' that can be opened; it has fp32, fp32-openvino"),
    ],
)
def test_variant_that_can_not_be_opened_is_refused_with_those_that_can(
    settings, released, variant, problem
):
    for verify in (True, False):
        with pytest.raises(ParameterError, match=problem):
            load_model(released.uri, settings=settings, variant=variant, verify=verify)


def test_release_without_variants_recommends_its_model(settings, folder, reset_mlflow):
    plain = Factory(connect(settings), BUCKET, folder)(alias=None, error_degrees=0.05)
    assert moved(load_model(plain.uri, settings=settings, variant="recommended")) == 0.05
    with pytest.raises(ParameterError, match="it has fp32, recommended"):
        load_model(plain.uri, settings=settings, variant="int8-minmax")


def test_bare_object_is_its_only_variant(settings, released, s3, bucket):
    body = s3.get_object(Bucket=BUCKET, Key=released.model.key)["Body"].read()
    bucket.upload_bytes(body, "bare.onnx")
    uri = f"{bucket.uri()}bare.onnx"
    for verify in (True, False):
        with pytest.raises(ParameterError, match="without a release around it"):
            load_model(uri, settings=settings, variant="int8-minmax", verify=verify)
    for variant in ("fp32", "recommended"):
        assert moved(load_model(uri, settings=settings, variant=variant)) == 0.01


def test_8_bits_made_for_another_processor_are_told(settings, released, monkeypatch):
    with capture_logs() as logs:
        for here, there in ((False, True), (True, True), (False, False)):
            monkeypatch.setattr(
                loading,
                "multiplies_in_8_bits",
                lambda *sets, here=here, there=there: there if sets else here,
            )
            load_model(released.uri, settings=settings, variant="int8-minmax")
            load_model(released.uri, settings=settings)
    told = [one for one in logs if one["event"].startswith("this processor has no 8-bit products")]
    assert [(one["uri"], one["variant"]) for one in told] == [(released.uri, "int8-minmax")]
