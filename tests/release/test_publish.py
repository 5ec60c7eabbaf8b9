"""Uploading, registering, and taking back exactly what a run has claimed."""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from threading import Event
from types import ModuleType, SimpleNamespace

import mlflow
import pytest
from botocore.exceptions import ClientError
from models import SmallNet
from releases import smoke

from heimdall_onnx.archive import mlmodel
from heimdall_onnx.archive.load import load_model
from heimdall_onnx.archive.manifest import CONTENT
from heimdall_onnx.archive.record import Skipped
from heimdall_onnx.common.errors import (
    DataError,
    NotRegisteredError,
    RegistryError,
    StoreError,
    VerificationError,
)
from heimdall_onnx.common.files import hash_file
from heimdall_onnx.common.parameters import ReleaseParameters
from heimdall_onnx.common.verdict import Gate, Verdict
from heimdall_onnx.data.evaluation import load_evaluation_data
from heimdall_onnx.evidence.variants.search import JudgedVariant
from heimdall_onnx.model.checkpoint import load_checkpoint
from heimdall_onnx.model.onnx.export import export_model
from heimdall_onnx.release import publish
from heimdall_onnx.release.publish import Journal, register_release, upload_release, withdraw
from heimdall_onnx.services import registry, store
from heimdall_onnx.services.client import make_client
from heimdall_onnx.services.connection import Connection, connect
from heimdall_onnx.services.store import Bucket, to_json

pytestmark = pytest.mark.services

PASSED = Verdict((Gate("a", "= 1", 1, True),), "quick")
FAILED = Verdict((Gate("a", "= 1", 2, False),), "quick")


@pytest.fixture
def settings(make_settings):
    return make_settings("publish")


@pytest.fixture
def connection(settings, reset_mlflow) -> Connection:
    return connect(settings)


@pytest.fixture
def parameters(bucket, tmp_path, small) -> ReleaseParameters:
    folder = tmp_path / "run"
    folder.mkdir()
    return smoke(small, bucket.name, name="net", publish=True, output_dir=str(folder))


@pytest.fixture(scope="module")
def exported_once(tmp_path_factory):
    return export_model(SmallNet(), tmp_path_factory.mktemp("exported") / "model.onnx", opset=14)


@pytest.fixture
def exported(exported_once, parameters):
    shutil.copyfile(exported_once.path, parameters.onnx_path)
    return replace(exported_once, path=parameters.onnx_path)


@pytest.fixture
def variants(exported):
    """Variants of every kind; only their files matter here, not how they were judged."""
    folder, judged = exported.path.parent, []
    for name, status, own in (
        ("fp32", "passed", False),
        ("fp32-openvino", "passed", False),
        ("int8-minmax", "passed", True),
        ("int4-weights", "failed", True),
        ("fp16-cuda", "unavailable", True),
    ):
        file = f"variants/{name}/model.onnx" if own else "model.onnx"
        variant = JudgedVariant(name, name, "", status, file=file)
        if status != "unavailable":
            path = folder / file
            if own:
                path.parent.mkdir(parents=True)
                path.write_bytes(f"the file of {name}".encode())
            variant = replace(variant, path=path, sha256=hash_file(path))
        judged.append(variant)
    return SimpleNamespace(judged=tuple(judged))


def upload(settings, parameters, exported, verdict=PASSED, variants=None):
    loaded = load_checkpoint(
        Path(parameters.checkpoint), model=parameters.model, model_kwargs=parameters.model_kwargs
    )
    data = load_evaluation_data(parameters.eval_data_path, loaded.signature)
    metrics = {"speedup": 2.0}
    return upload_release(
        settings, parameters, verdict, loaded, data, exported, metrics, variants=variants
    )


def folder_keys(s3, bucket) -> set[str]:
    """What is there beside what releases have in common."""
    shared = (f"{CONTENT}/", "aliases/.store/")
    return {key for key in Bucket(s3, bucket).list_keys("") if not key.startswith(shared)}


def test_what_imports_mlflow_waits_until_it_is_reached(
    settings, parameters, exported, reset_mlflow, monkeypatch
):
    # Two threads that import it at once find it half made.
    run_id = connect(settings).tracker.create_run("release")
    needed, reached, uploaded = Event(), Event(), set()
    initialize = registry.initialize_mlflow

    def slowly(*arguments):
        # It takes until somebody waits for it, or does what is not to be done before.
        assert needed.wait(60)
        tracker = initialize(*arguments)
        reached.set()
        return tracker

    def watched(*arguments):
        connection = connect(*arguments)

        def wait():
            uploaded.update(folder_keys(connection.client, parameters.bucket))
            needed.set()
            return connection.open_tracker()

        return replace(connection, open_tracker=wait)

    class Guarded(ModuleType):
        def __getattr__(self, name):
            in_time = reached.is_set()
            needed.set()
            assert in_time
            return getattr(mlmodel, name)

    monkeypatch.setattr(registry, "initialize_mlflow", slowly)
    monkeypatch.setattr(publish, "connect", watched)
    monkeypatch.setitem(sys.modules, mlmodel.__name__, Guarded(mlmodel.__name__))
    own = parameters.model_copy(update={"run_id": run_id})
    assert upload(settings, own, exported).run_id == run_id
    # What needs none of it is done meanwhile.
    assert any(key.endswith("/model.onnx") for key in uploaded)


def test_nothing_is_uploaded_without_being_asked(settings, parameters, exported, s3, bucket):
    quiet = parameters.model_copy(update={"publish": False})
    assert isinstance(upload(settings, quiet, exported), Skipped)
    assert folder_keys(s3, bucket.name) == set()


def test_nothing_is_uploaded_after_a_failed_gate(settings, parameters, exported, s3, bucket):
    skipped = upload(settings, parameters, exported, FAILED)
    assert skipped == Skipped("1 gates failed")
    assert register_release(settings, parameters, skipped, {}) is skipped
    assert folder_keys(s3, bucket.name) == set()


def test_uploaded_folder_has_no_manifest_yet(
    settings, connection, parameters, exported, s3, bucket
):
    uploaded = upload(settings, parameters, exported)
    names = {key.rsplit("/", 1)[1] for key in folder_keys(s3, bucket.name)}
    assert {"model.onnx", "MLmodel", "metadata.json"} <= names
    assert "manifest.json" not in names
    assert uploaded.sha256 == exported.sha256
    assert {o.key for o in uploaded.objects} == folder_keys(s3, bucket.name)


def test_model_whose_hash_is_known_is_not_hashed_again(settings, parameters, exported, monkeypatch):
    hashed = []

    def watched(path):
        hashed.append(path.name)
        return hash_file(path)

    monkeypatch.setattr(store, "hash_file", watched)
    uploaded = upload(settings, parameters, exported)
    assert uploaded.sha256 == exported.sha256
    assert "model.onnx" not in hashed
    assert "MLmodel" in hashed


def test_variants_that_passed_are_uploaded_with_the_model(
    settings, connection, parameters, exported, variants, s3, bucket, monkeypatch
):
    hashed = []
    monkeypatch.setattr(store, "hash_file", lambda path: hashed.append(path) or hash_file(path))
    uploaded = upload(settings, parameters, exported, variants=variants)
    folder = uploaded.folder_uri.removeprefix(f"{bucket.uri()}")
    of_variants = {o.key: o for o in uploaded.objects if "/variants/" in o.key}
    (key,) = of_variants
    assert key == f"{folder}/variants/int8-minmax/model.onnx"
    passed = next(one for one in variants.judged if one.name == "int8-minmax")
    assert of_variants[key].sha256 == passed.sha256
    assert s3.get_object(Bucket=bucket.name, Key=key)["Body"].read() == b"the file of int8-minmax"
    assert passed.path not in hashed
    assert {o.key for o in uploaded.objects} == folder_keys(s3, bucket.name)
    assert withdraw(connection, exported.path.parent) == ()
    assert folder_keys(s3, bucket.name) == set()


def test_variant_that_changed_since_it_was_judged_is_not_published(
    settings, parameters, exported, variants, s3, bucket
):
    path = next(one.path for one in variants.judged if one.name == "int8-minmax")
    path.write_bytes(b"another")
    with pytest.raises(DataError, match=r"int8-minmax/model\.onnx has changed"):
        upload(settings, parameters, exported, variants=variants)
    assert folder_keys(s3, bucket.name) == set()


def test_calibration_data_of_their_own_are_kept(
    settings, parameters, exported, variants, small, s3, bucket, tmp_path
):
    path = tmp_path / "calibration.npz"
    path.write_bytes(small.eval_data.read_bytes() + b"\0")
    calibrated = parameters.model_copy(update={"calibration_data": str(path)})
    variants.calibration = SimpleNamespace(file_sha256=hash_file(path))
    read = path.read_bytes()
    path.write_bytes(read[:-1] + b"\1")
    with pytest.raises(DataError, match="has changed"):
        upload(settings, calibrated, exported, variants=variants)
    path.write_bytes(read)
    uploaded = upload(settings, calibrated, exported, variants=variants)
    kept = {entry.role: entry.sha256 for entry in uploaded.content}
    assert set(kept) == {"checkpoint", "evaluation_data", "calibration_data"}
    assert kept["calibration_data"] == hash_file(path)
    assert f"{CONTENT}/{hash_file(path)}" in bucket.list_keys("")
    # Without variants nothing was calibrated.
    plain = upload(settings, calibrated, exported)
    assert {entry.role for entry in plain.content} == {"checkpoint", "evaluation_data"}


def test_run_that_does_not_exist_leaves_nothing_uploaded(
    settings, parameters, exported, s3, bucket
):
    unknown = parameters.model_copy(update={"run_id": "0" * 32})
    with pytest.raises(RegistryError, match="0" * 32):
        upload(settings, unknown, exported)
    assert folder_keys(s3, bucket.name) == set()


def test_failed_upload_is_taken_back_and_can_be_repeated(
    settings, connection, parameters, exported, s3, bucket
):
    model = exported.path.read_bytes()
    exported.path.write_bytes(b"changed")
    with pytest.raises(DataError, match="has changed"):
        upload(settings, parameters, exported)
    assert folder_keys(s3, bucket.name) == set()
    exported.path.write_bytes(model)
    uploaded = upload(settings, parameters, exported)
    register_release(settings, parameters, uploaded, {})
    runs = mlflow.MlflowClient(settings.tracking_uri.get_secret_value()).search_runs(
        [connection.tracker.experiment_id], order_by=["attributes.start_time DESC"], max_results=2
    )
    assert [(r.info.run_name, r.info.status) for r in runs] == [
        ("release", "FINISHED"),
        ("release", "FAILED"),
    ]
    assert runs[0].info.run_id == uploaded.run_id
    assert mlflow.active_run() is None


def test_run_whose_registration_fails_has_failed(
    settings, connection, parameters, exported, s3, bucket
):
    uploaded = upload(settings, parameters, exported)
    (mlmodel,) = [key for key in bucket.list_keys("") if key.endswith("/MLmodel")]
    s3.delete_object(Bucket=bucket.name, Key=mlmodel)
    with pytest.raises(RegistryError, match="holds no MLmodel"):
        register_release(settings, parameters, uploaded, {})
    assert connection.tracker.get_run_info(uploaded.run_id)["status"] == "FAILED"


def test_deleted_run_is_refused_before_anything_is_claimed(
    settings, connection, parameters, exported, s3, bucket
):
    run_id = connection.tracker.create_run("training")
    mlflow.MlflowClient(settings.tracking_uri.get_secret_value()).delete_run(run_id)
    with pytest.raises(RegistryError, match=f"run {run_id} is deleted; restore it"):
        upload(settings, parameters.model_copy(update={"run_id": run_id}), exported)
    assert folder_keys(s3, bucket.name) == set()


def test_claim_stays_until_all_else_is_deleted(
    settings, connection, parameters, exported, s3, bucket
):
    upload(settings, parameters, exported)
    stubborn = make_client(settings)

    def keep_the_model(params, **_):
        if params["Key"].endswith("/model.onnx"):
            answer = {"Error": {"Code": "ObjectLocked", "Message": "it is locked"}}
            raise ClientError(answer, "DeleteObject")

    stubborn.meta.events.register("provide-client-params.s3.DeleteObject", keep_the_model)
    for _ in range(2):
        (left,) = withdraw(replace(connection, client=stubborn), exported.path.parent)
        assert re.search(r"model\.onnx at .*: it is locked", left)
        names = {key.rsplit("/", 1)[1] for key in folder_keys(s3, bucket.name)}
        assert {"model.onnx", "metadata.json"} <= names
    assert withdraw(connection, exported.path.parent) == ()
    assert folder_keys(s3, bucket.name) == set()


def test_everything_claimed_is_taken_back(settings, connection, parameters, exported, s3, bucket):
    uploaded = upload(settings, parameters, exported)
    registered = register_release(settings, parameters, uploaded, {"speedup": 2.0})
    assert connection.tracker.get_version("net", registered.model_version).source
    assert withdraw(connection, exported.path.parent) == ()
    assert folder_keys(s3, bucket.name) == set()
    with pytest.raises(Exception, match="net"):
        connection.tracker.get_version("net", registered.model_version)


def test_version_that_nobody_noted_is_found_by_its_source(
    settings, connection, parameters, exported
):
    uploaded = upload(settings, parameters, exported)
    # As when the kernel dies right after registering.
    Journal(exported.path.parent).write(registering=True)
    version = connection.tracker.register_model("net", uploaded.folder_uri, run_id=uploaded.run_id)
    other = connection.tracker.register_model("net", uploaded.folder_uri)
    assert withdraw(connection, exported.path.parent) == ()
    assert connection.tracker.get_version("net", other)
    with pytest.raises(NotRegisteredError):
        connection.tracker.get_version("net", version)


def test_registered_version_is_not_opened_before_it_is_complete(settings, parameters, exported):
    registered = register_release(settings, parameters, upload(settings, parameters, exported), {})
    with pytest.raises(VerificationError, match="not completely"):
        load_model(f"models:/net/{registered.model_version}", settings=settings)


def test_withdrawing_twice_or_nothing_is_no_error(connection, parameters, exported):
    assert withdraw(connection, exported.path.parent) == ()
    assert withdraw(connection, exported.path.parent) == ()


def test_a_folder_claimed_by_another_run_is_never_deleted(connection, s3, bucket, tmp_path):
    key = "models/localization/v1/metadata.json"
    s3.put_object(Bucket=bucket.name, Key=key, Body=json.dumps({"claim": "theirs"}).encode())
    Journal(tmp_path).write(
        bucket=bucket.name,
        prefix="models/localization",
        version="v1",
        run_id="the same",
        model_name="net",
        claim="ours",
    )
    assert withdraw(connection, tmp_path) == ()
    assert bucket.list_keys("") == (key,)


def test_what_cannot_be_taken_back_is_said(connection, parameters, settings, exported):
    upload(settings, parameters, exported)

    class Unreachable:
        def __getattr__(self, name):
            raise StoreError("the store is gone")

    left = withdraw(replace(connection, client=Unreachable()), exported.path.parent)
    # What may have a manifest stays whole, so that nothing further is tried.
    (only,) = left
    assert "/manifest.json: " in only
    assert "the store is gone" in only


def test_json_refuses_what_json_does_not_have():
    with pytest.raises(ValueError, match="JSON"):
        to_json({"x": float("nan")})
