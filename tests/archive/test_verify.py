"""A release that was changed anywhere is found out, and is not opened."""

import contextlib
import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from keys import make_key
from models import SmallNet
from pydantic import SecretStr
from quick_release import Factory
from structlog.testing import capture_logs

from heimdall_onnx.archive.load import load_model
from heimdall_onnx.archive.manifest import read_manifest
from heimdall_onnx.archive.release import Release
from heimdall_onnx.archive.signing import Trust, open_signer
from heimdall_onnx.archive.verify import verify_release
from heimdall_onnx.common.errors import ParameterError, RegistryError, StoreError, VerificationError
from heimdall_onnx.model.onnx.export import export_model
from heimdall_onnx.services.connection import connect
from heimdall_onnx.services.store import Bucket, locate

pytestmark = pytest.mark.services

BUCKET = "test-verify"


@pytest.fixture(scope="module")
def settings(make_settings):
    return make_settings("verify")


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return make_key(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def released(settings, keys, tmp_path_factory):
    signer = open_signer(settings.model_copy(update={"signing_key": keys.private}))
    made = tmp_path_factory.mktemp("made")
    return Factory(connect(settings), BUCKET, made, name="test-model")(signer=signer)


@pytest.fixture
def folder(released) -> str:
    return released.uri


@pytest.fixture
def connection(settings, reset_mlflow):
    return connect(settings)


@pytest.fixture
def tampered(s3, folder):
    """Change objects of the release; everything is put back afterwards."""
    prefix = folder.removeprefix(f"s3://{BUCKET}/")
    before = {}

    def change(name: str, body: bytes | None) -> None:
        key = f"{prefix}/{name}"
        if key not in before:
            with contextlib.suppress(s3.exceptions.NoSuchKey):
                stored = s3.get_object(Bucket=BUCKET, Key=key)
                before[key] = (stored["Body"].read(), stored["Metadata"])
        if body is None:
            s3.delete_object(Bucket=BUCKET, Key=key)
        else:
            s3.put_object(Bucket=BUCKET, Key=key, Body=body)
            added.add(key)

    added = set[str]()
    yield change
    for key in added - before.keys():
        s3.delete_object(Bucket=BUCKET, Key=key)
    for key, (body, metadata) in before.items():
        s3.put_object(Bucket=BUCKET, Key=key, Body=body, Metadata=metadata)


def differing(connection, folder: str) -> set[str]:
    return {
        f.what.rsplit("/", 1)[-1]
        for f in verify_release(Release.at(connection, folder))
        if not f.holds
    }


def test_untouched_release_holds(connection, folder):
    assert differing(connection, folder) == set()


def test_signature_holds_with_the_signers_key_alone(connection, folder, keys, tmp_path):
    for key, holds in ((keys, True), (make_key(tmp_path), False)):
        findings = verify_release(Release.at(connection, folder), trust=Trust(key.public))
        wrong = [finding for finding in findings if not finding.holds]
        assert [finding.what.rsplit("/", 1)[-1] for finding in wrong] == (
            [] if holds else ["model.sig"]
        )
    assert any(
        "no public key was given" in f.what for f in verify_release(Release.at(connection, folder))
    )


def test_every_object_is_checked_and_any_byte_of_it(connection, folder, s3, tampered, keys):
    prefix = folder.removeprefix(f"s3://{BUCKET}/") + "/"
    names = [key.removeprefix(prefix) for key in Bucket(s3, BUCKET).list_keys(prefix)]
    assert {"model.onnx", "MLmodel", "report.ipynb", "report.html"} < set(names)
    assert {"bom.cdx.json", "model.sig"} < set(names)
    trust, rng = Trust(keys.public), np.random.default_rng(0)
    for name in names:
        body = bytearray(s3.get_object(Bucket=BUCKET, Key=prefix + name)["Body"].read())
        body[rng.integers(len(body))] ^= 1
        before = s3.get_object(Bucket=BUCKET, Key=prefix + name)["Body"].read()
        tampered(name, bytes(body))
        with contextlib.suppress(VerificationError if name == "manifest.json" else ()):
            findings = verify_release(Release.at(connection, folder), trust=trust)
            # Of the manifest it is the registry that knows, if it can be read at all.
            named = {f.what for f in findings if not f.holds}
            wanted = "manifest_sha256" if name == "manifest.json" else f"/{name}"
            assert any(wanted in what for what in named), name
        tampered(name, before)
    assert differing(connection, folder) == set()


def test_content_that_was_changed_or_is_gone_is_named(connection, folder, s3):
    for entry in read_manifest(*locate(connection.client, folder)).said.content:
        before = s3.get_object(Bucket=BUCKET, Key=entry.key)["Body"].read()
        s3.put_object(Bucket=BUCKET, Key=entry.key, Body=b"x" + before[1:])
        assert differing(connection, folder) == {entry.sha256}
        s3.delete_object(Bucket=BUCKET, Key=entry.key)
        assert differing(connection, folder) == {entry.sha256}
        s3.put_object(Bucket=BUCKET, Key=entry.key, Body=before)


def test_notebook_that_recorded_another_model_is_found_out(connection, folder, tampered, s3):
    # Rewritten consistently, by somebody who can write into the bucket.
    manifest = read_manifest(*locate(connection.client, folder))
    report = s3.get_object(Bucket=BUCKET, Key=manifest.objects["report.ipynb"].key)["Body"].read()
    forged = report.replace(manifest.model.sha256.encode(), b"0" * 64)
    data = manifest.data
    for entry in data["objects"]:
        if entry["key"].endswith("/report.ipynb"):
            entry |= {"size": len(forged), "sha256": hashlib.sha256(forged).hexdigest()}
    tampered("report.ipynb", forged)
    tampered("manifest.json", json.dumps(data).encode())
    assert {"report.ipynb, its record of model.onnx"} < differing(connection, folder)


def test_release_stripped_of_its_signature_is_found_out(connection, folder, tampered, keys):
    manifest = read_manifest(*locate(connection.client, folder)).data
    tampered("model.sig", None)
    assert differing(connection, folder) == {"model.sig"}
    tampered("manifest.json", json.dumps({**manifest, "signature": None}).encode())
    findings = verify_release(
        Release.at(connection, folder), trust=Trust(keys.public), registry=False
    )
    (wrong,) = [finding for finding in findings if not finding.holds]
    assert "unsigned" in wrong.found


def test_reviews_are_held_against_their_names_and_the_registry(
    connection, folder, tampered, released
):
    tags = connection.tracker.set_version_tags
    body = b'{"action": "promote"}'
    digest = hashlib.sha256(body).hexdigest()
    name = f"reviews/20260101_000000_promote-{digest}.json"
    tampered(name, body)
    assert differing(connection, folder) == set()
    assert any("not completed" in f.what for f in verify_release(Release.at(connection, folder)))
    tags("test-model", released.model_version, {"review.1": digest})
    assert not any(
        "not completed" in f.what for f in verify_release(Release.at(connection, folder))
    )
    tampered(name, b"changed")
    assert any(digest in what for what in differing(connection, folder))
    tampered(name, None)
    assert differing(connection, folder) == {f"…-{digest}"}
    connection.tracker.delete_version_tag("test-model", released.model_version, "review.1")


def test_what_does_not_verify_is_opened_only_on_request_and_with_a_warning(
    settings, folder, tampered
):
    tampered("report.html", b"x")
    with pytest.raises(VerificationError, match=r"report\.html: expected"):
        load_model("models:/test-model@staging", settings=settings)
    with capture_logs() as logs:
        assert load_model(folder, settings=settings, verify=False).get_inputs()
    (warning,) = [entry for entry in logs if entry["log_level"] == "warning"]
    assert "report.html: expected" in warning["reason"]


def test_configured_key_is_asked_for_when_a_model_is_opened(settings, folder, keys, tmp_path):
    trusting = settings.model_copy(update={"public_key": keys.public})
    assert load_model(folder, settings=trusting).get_inputs()
    other = settings.model_copy(update={"public_key": make_key(tmp_path).public})
    with pytest.raises(VerificationError, match=r"model\.sig: expected"):
        load_model(folder, settings=other)


def test_missing_object_is_named(connection, folder, tampered):
    tampered("report.html", None)
    assert differing(connection, folder) == {"report.html"}


def test_added_object_is_named(connection, folder, tampered):
    tampered("added.txt", b"x")
    assert differing(connection, folder) == {"added.txt"}


def test_rewritten_manifest_does_not_match_the_registry(connection, folder, tampered):
    manifest = read_manifest(*locate(connection.client, folder)).data
    tampered("manifest.json", json.dumps(manifest).encode())
    assert any("manifest_sha256" in what for what in differing(connection, folder))


@pytest.mark.parametrize(
    ("what", "found"),
    [
        ("source", "source"),
        ("verdict", "tag verdict"),
        ("sha256", "tag sha256"),
        ("manifest_uri", "tag manifest_uri"),
        ("report_uri", "tag report_uri"),
        ("signature_sha256", "model.sig, in the registry"),
    ],
)
def test_registry_that_says_otherwise_is_found_out(connection, folder, monkeypatch, what, found):
    tracker = connection.tracker
    get_version = tracker.get_version

    def forged(name, version):
        registered = get_version(name, version)
        if what == "source":
            return replace(registered, source="s3://elsewhere/models")
        return replace(registered, tags={**registered.tags, what: "0" * 64})

    monkeypatch.setattr(tracker, "get_version", forged)
    (wrong,) = differing(connection, folder)
    assert wrong.endswith(found)


def test_version_that_is_not_registered_is_a_finding(connection, folder, tampered):
    manifest = read_manifest(*locate(connection.client, folder)).data
    manifest["mlflow"]["model_version"] = "999"
    tampered("manifest.json", json.dumps(manifest).encode())
    assert differing(connection, folder) == {"test-model version 999"}


def test_folder_without_manifest_is_no_release(connection, folder, tampered):
    tampered("manifest.json", None)
    with pytest.raises(VerificationError, match="is not a release"):
        verify_release(Release.at(connection, folder))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda m: m["objects"][0].pop("sha256"), r"objects\.0\.sha256: Field required"),
        (lambda m: m["objects"][0].update(size="1"), r"objects\.0\.size: .* integer"),
        (lambda m: m["mlflow"].update(model_version="one"), r"mlflow\.model_version: "),
        (lambda m: m.update(objects=[]), r"names no .*model\.onnx"),
    ],
    ids=["no hash", "size as text", "version in words", "no model"],
)
def test_manifest_of_another_shape_is_refused(connection, folder, tampered, change, problem):
    manifest = read_manifest(*locate(connection.client, folder)).data
    change(manifest)
    tampered("manifest.json", json.dumps(manifest).encode())
    with pytest.raises(VerificationError, match=problem):
        verify_release(Release.at(connection, folder))


def test_address_in_the_store_needs_no_registry_but_is_said_to_have_none(
    settings, folder, tmp_path
):
    without = settings.model_copy(update={"home": tmp_path})
    before = dict(os.environ)
    with capture_logs() as logs:
        assert load_model(folder, settings=without).get_inputs()
    assert "not held against a registry" in [entry["event"] for entry in logs]
    assert load_model("models:/test-model@staging", settings=settings).get_inputs()
    changed = {name for name, value in os.environ.items() if before.get(name) != value}
    told = ("TRACKING_URI", "ENDPOINT_URL", "ACCESS_KEY", "TOKEN")
    assert not [name for name in changed if any(word in name for word in told)]


def test_registry_that_is_configured_and_does_not_answer_is_not_left_out(settings, folder):
    unreachable = settings.model_copy(
        update={"mlflow_tracking_uri": SecretStr("http://127.0.0.1:9")}
    )
    with pytest.raises(RegistryError, match="can't be reached"):
        load_model(folder, settings=unreachable)


def test_changed_model_is_not_opened(settings, folder, released, tampered):
    tampered("model.onnx", b"x")
    for kept in Path(settings.home, "models").glob("*/model.onnx"):
        kept.unlink()
    with pytest.raises(VerificationError, match="is not what was recorded"):
        load_model(f"{folder}/model.onnx", settings=settings)
    assert not list(Path(settings.home, "models").glob("*/model.onnx"))


def test_rewritten_manifest_is_not_believed_through_the_registry(
    settings, connection, folder, tampered
):
    tampered(
        "manifest.json", json.dumps(read_manifest(*locate(connection.client, folder)).data).encode()
    )
    with pytest.raises(VerificationError, match="tag manifest_sha256: expected"):
        load_model("models:/test-model@staging", settings=settings)


def test_damaged_local_copy_is_fetched_again(settings, folder, released):
    session = load_model(folder, settings=settings)
    (kept,) = Path(settings.home, "models").glob("*/model.onnx")
    kept.write_bytes(b"damaged")
    again = load_model(folder, settings=settings)
    x = {"signal": np.ones((2, 2), np.float32)}
    np.testing.assert_array_equal(session.run(None, x)[0], again.run(None, x)[0])


def test_bare_object_is_opened_by_its_recorded_hash(settings, s3, bucket, tmp_path, released):
    exported = export_model(SmallNet(), tmp_path / "m.onnx", opset=14)
    bucket.upload_file(exported.path, "bare.onnx")
    assert load_model(f"{bucket.uri()}bare.onnx", settings=settings).get_inputs()
    s3.put_object(Bucket=bucket.name, Key="unknown.onnx", Body=exported.path.read_bytes())
    with pytest.raises(VerificationError, match="records no SHA-256"):
        load_model(f"{bucket.uri()}unknown.onnx", settings=settings)


@pytest.mark.parametrize("uri", ["model.onnx", "http://x/y", "models:/name", "models:/a/b"])
def test_address_of_another_kind_is_refused(settings, released, uri):
    with pytest.raises(ParameterError, match="is no address of a model"):
        load_model(uri, settings=settings)


def test_object_that_is_not_there_is_said_to_be_missing(settings, bucket, released):
    with pytest.raises(StoreError, match=r"none\.onnx"):
        load_model(f"{bucket.uri()}none.onnx", settings=settings)


# Releases with variants


@pytest.fixture
def varied(connection, bucket, tmp_path):
    return Factory(connection, bucket.name, tmp_path)(recommended="int8-minmax")


def test_any_byte_of_any_variant_is_checked(connection, varied, s3):
    names = [name for name in varied.objects if name.startswith("variants/")]
    assert names == ["variants/int8-minmax/model.onnx", "variants/int8-nncf/model.onnx"]
    rng = np.random.default_rng(0)
    for name in names:
        key = varied.objects[name].key
        before = s3.get_object(Bucket=varied.bucket, Key=key)["Body"].read()
        body = bytearray(before)
        body[rng.integers(len(body))] ^= 1
        s3.put_object(Bucket=varied.bucket, Key=key, Body=bytes(body))
        wrong = [f for f in verify_release(Release.at(connection, varied.uri)) if not f.holds]
        assert [f.what for f in wrong] == [key]
        assert varied.objects[name].sha256 in wrong[0].expected
        unread = verify_release(Release.at(connection, varied.uri), unread={name})
        assert all(finding.holds for finding in unread)
        s3.delete_object(Bucket=varied.bucket, Key=key)
        gone = [
            f
            for f in verify_release(Release.at(connection, varied.uri), unread={name})
            if not f.holds
        ]
        assert [(f.what, f.found) for f in gone] == [(key, "nothing")]
        s3.put_object(Bucket=varied.bucket, Key=key, Body=before)
    assert differing(connection, varied.uri) == set()


def test_notebook_and_registry_must_know_the_variants(connection, varied, s3):
    # Rewritten consistently, by somebody who can write into the bucket.
    key, text = varied.objects["report.ipynb"].key, varied.text
    report = s3.get_object(Bucket=varied.bucket, Key=key)["Body"].read()
    sha256 = varied.objects["variants/int8-nncf/model.onnx"].sha256
    forged = report.replace(sha256.encode(), b"0" * 64)
    s3.put_object(Bucket=varied.bucket, Key=key, Body=forged)
    s3.put_object(
        Bucket=varied.bucket,
        Key=varied.key,
        Body=text.replace(
            varied.objects["report.ipynb"].sha256.encode(),
            hashlib.sha256(forged).hexdigest().encode(),
        ).replace(b'"recommended": "int8-minmax"', b'"recommended": "int8-nncf"'),
    )
    assert {
        "report.ipynb, its record of variant int8-nncf",
        f"net version {varied.model_version}, tag recommended",
    } < differing(connection, varied.uri)
    findings = verify_release(Release.at(connection, varied.uri))
    assert "report.ipynb, its record of variant int8-minmax" in {
        f.what.rsplit("/", 1)[-1] for f in findings if f.holds
    }


def test_registry_says_which_variant_is_recommended(connection, varied):
    tags = connection.tracker.get_version("net", varied.model_version).tags
    assert tags["recommended"] == "int8-minmax"
    connection.tracker.set_version_tags("net", varied.model_version, {"recommended": "fp32"})
    assert differing(connection, varied.uri) == {
        f"net version {varied.model_version}, tag recommended"
    }
