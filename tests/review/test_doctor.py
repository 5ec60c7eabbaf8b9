"""What killed runs leave behind is found, and only what is safe is mended."""

import os
import time
from datetime import timedelta

import pytest
from quick_release import PREFIX, Factory

from heimdall_onnx.archive.aliases import AliasLog
from heimdall_onnx.archive.content import keep_content
from heimdall_onnx.archive.release import Release
from heimdall_onnx.archive.verify import verify_release
from heimdall_onnx.common.files import hash_file
from heimdall_onnx.review.doctor import diagnose, mend_all
from heimdall_onnx.services.connection import connect

pytestmark = pytest.mark.services

# The store tells the time in whole seconds, and what these tests make is younger than that.
NOW = timedelta(seconds=-5)


@pytest.fixture
def connection(make_settings, reset_mlflow):
    return connect(make_settings("doctor"))


@pytest.fixture
def release(connection, bucket, tmp_path) -> Factory:
    return Factory(connection, bucket.name, tmp_path)


@pytest.fixture
def complete(release):
    """A release that nothing is wrong with, and that nothing may happen to."""
    return release()


def found(connection, bucket, older_than=NOW):
    return diagnose(connection, bucket, PREFIX, older_than=older_than)


def kinds(connection, bucket) -> list[str]:
    return sorted(leftover.kind for leftover in found(connection, bucket))


def mended(connection, complete) -> bool:
    assert mend_all(found(connection, complete.bucket)) == ()
    whole = all(finding.holds for finding in verify_release(Release.at(connection, complete.uri)))
    return whole and found(connection, complete.bucket) == ()


def put(connection, bucket, key, body=b"x"):
    connection.client.put_object(Bucket=bucket, Key=key, Body=body)


def test_nothing_is_left_of_a_complete_release_or_in_no_bucket(connection, complete):
    assert found(connection, complete.bucket) == ()
    assert found(connection, "no-such-bucket") == ()


def test_unfinished_folder_and_its_version_are_taken_away(connection, complete, bucket):
    folder = f"{PREFIX}/v20200101_000000"
    for name in ("metadata.json", "model.onnx", "MLmodel"):
        put(connection, bucket.name, f"{folder}/{name}")
    connection.tracker.register_model("net", f"{bucket.uri()}{folder}")
    assert kinds(connection, bucket.name) == ["unfinished folder", "version without a release"]
    assert mended(connection, complete)
    assert not connection.bucket(bucket.name).list_keys(folder)


def test_version_that_was_tagged_before_its_manifest_could_be_written_is_no_release(
    connection, complete, bucket
):
    folder = f"{PREFIX}/v20200101_000000"
    for name in ("metadata.json", "MLmodel"):
        put(connection, bucket.name, f"{folder}/{name}")
    version = connection.tracker.register_model(
        "net", f"{bucket.uri()}{folder}", tags={"sha256": "1", "manifest_sha256": "2"}
    )
    assert kinds(connection, bucket.name) == ["unfinished folder", "version without a release"]
    assert mended(connection, complete)
    assert version not in {v.version for v in connection.tracker.versions("net")}


def test_what_may_be_under_way_is_left_alone(connection, complete, bucket):
    put(connection, bucket.name, f"{PREFIX}/v20200101_000000/metadata.json")
    put(connection, bucket.name, "objects/sha256/" + "0" * 64)
    connection.client.create_multipart_upload(Bucket=bucket.name, Key="x")
    connection.tracker.create_run("release 20200101_000000-0a1b2c3d")
    assert found(connection, bucket.name, timedelta(hours=1)) == ()


def test_folder_that_becomes_a_release_meanwhile_is_not_deleted(connection, release, bucket):
    folder = f"{PREFIX}/v20200101_000000"
    put(connection, bucket.name, f"{folder}/metadata.json")
    leftovers = found(connection, bucket.name)
    put(connection, bucket.name, f"{folder}/manifest.json")
    (failed,) = mend_all(leftovers)
    assert "has become a release" in failed
    assert len(connection.bucket(bucket.name).list_keys(folder)) == 2


def test_models_registered_step_by_step_are_none_of_its_business(connection, complete, bucket):
    single = f"{PREFIX}/v20200101_000000"
    for key in (f"{single}.onnx", f"{single}/metadata.json", f"{single}/MLmodel"):
        put(connection, bucket.name, key)
    assert found(connection, bucket.name) == ()
    version = connection.tracker.register_model(
        "net", f"{bucket.uri()}{single}", tags={"sha256": "1"}
    )
    connection.client.delete_object(Bucket=bucket.name, Key=f"{single}.onnx")
    assert found(connection, bucket.name) == ()
    connection.tracker.set_alias("net", version, "candidate")
    (leftover,) = found(connection, bucket.name)
    assert (leftover.kind, leftover.remedy) == ("alias without a manifest", "")
    assert "registered without a release" in leftover.why


def test_content_that_no_manifest_names_is_deleted_and_other_content_kept(
    connection, complete, bucket
):
    put(connection, bucket.name, "objects/sha256/" + "0" * 64)
    assert kinds(connection, bucket.name) == ["unreferenced content"]
    assert mended(connection, complete)


def test_content_stays_while_a_manifest_can_not_be_read(connection, complete, bucket):
    put(connection, bucket.name, "objects/sha256/" + "0" * 64)
    put(connection, bucket.name, "elsewhere/v1/manifest.json", b"{}")
    (leftover,) = found(connection, bucket.name)
    assert (leftover.kind, leftover.remedy) == ("unreadable manifest", "")


def test_aborted_uploads_are_deleted(connection, complete, bucket):
    connection.client.create_multipart_upload(
        Bucket=bucket.name, Key=f"{PREFIX}/v20200101_000000/model.onnx"
    )
    assert kinds(connection, bucket.name) == ["aborted upload"]
    assert mended(connection, complete)


def test_what_others_keep_there_is_none_of_its_business(connection, complete, bucket):
    for key in ("validation/a.npz", "v2/v20200101_000000/metadata.json", "v20200101_000000/a.npz"):
        put(connection, bucket.name, f"{PREFIX}/{key}")
    put(connection, bucket.name, "elsewhere/MLmodel")
    connection.tracker.register_model("Bob's model", f"{bucket.uri()}elsewhere")
    connection.client.create_multipart_upload(Bucket=bucket.name, Key="elsewhere/upload")
    connection.tracker.create_run("release candidate")
    runs = connection.settings.home / "runs"
    (runs / "by hand").mkdir(parents=True)
    (runs / "by hand" / "model.onnx").write_bytes(b"x")
    assert found(connection, bucket.name) == ()


def test_an_alias_of_another_folder_is_none_of_its_business(connection, complete, bucket):
    assert diagnose(connection, bucket.name, "models/another", older_than=NOW) == ()


def test_model_of_a_killed_runner_is_deleted_and_that_of_a_running_one_kept(
    connection, complete, bucket
):
    runs = connection.settings.home / "runs"
    for name, pid in (("killed", 2**22 + 1), ("running", os.getpid())):
        (runs / name).mkdir(parents=True)
        (runs / name / "model.onnx").write_bytes(b"x")
        (runs / name / "runner.pid").write_text(str(pid))
    assert kinds(connection, bucket.name) == ["model of a run that was killed"]
    assert mended(connection, complete)
    assert [path.parent.name for path in runs.glob("*/model.onnx")] == ["running"]


def test_checkpoint_of_a_killed_ensemble_is_deleted_and_that_of_a_running_one_kept(
    connection, complete, bucket
):
    home = connection.settings.home
    for name, pid in (("ensemble-killed", 2**22 + 1), ("ensemble-running", os.getpid())):
        (home / name).mkdir()
        (home / name / "runner.pid").write_text(str(pid))
        (home / name / ".half.ckpt.part").write_bytes(b"x")
    (home / "ensemble-of-my-own").mkdir()
    (leftover,) = found(connection, bucket.name)
    assert (leftover.kind, leftover.what) == (
        "checkpoint of a run that was killed",
        str(home / "ensemble-killed"),
    )
    assert mended(connection, complete)
    assert {path.name for path in home.glob("ensemble-*")} == {
        "ensemble-running",
        "ensemble-of-my-own",
    }


def test_content_that_a_release_under_way_uses_again_is_kept(
    connection, complete, bucket, tmp_path
):
    path = tmp_path / "weights"
    path.write_bytes(b"other weights")
    kept = keep_content(connection.bucket(bucket.name), path, hash_file(path), "checkpoint")
    leftovers = found(connection, bucket.name)
    assert [leftover.kind for leftover in leftovers] == ["unreferenced content"]
    time.sleep(1.1)  # the store dates in whole seconds
    keep_content(connection.bucket(bucket.name), path, hash_file(path), "checkpoint")
    (failed,) = mend_all(leftovers)
    assert "is used again" in failed
    assert connection.bucket(bucket.name).list_keys(kept.key)


def test_alias_that_nobody_logged_is_left_to_a_person(connection, complete, release, bucket):
    second = release(alias=None)
    connection.tracker.set_alias("net", second.model_version, "staging")
    (leftover,) = found(connection, bucket.name)
    assert (leftover.kind, leftover.remedy) == ("alias beside its log", "")
    leftover.mend()
    assert mend_all((leftover,)) == ()
    assert found(connection, bucket.name) == (leftover,)


def test_alias_that_points_at_no_release_is_for_a_person_to_decide(connection, complete, bucket):
    connection.client.delete_object(Bucket=bucket.name, Key=complete.key)
    assert "unfinished folder" not in kinds(connection, bucket.name)
    assert "alias without a manifest" in kinds(connection, bucket.name)
    failed = mend_all(found(connection, bucket.name))
    assert "an alias points at net version 1" in failed[0]
    assert connection.tracker.alias_target("net", "staging") == "1"


def log_of(connection, bucket) -> AliasLog:
    return AliasLog(connection.bucket(bucket.name), "net", "staging")


def test_alias_that_stayed_behind_its_log_follows(connection, complete, release, bucket):
    second = release(alias=None)
    log_of(connection, bucket).append(
        action="release",
        version="2",
        release=second.uri,
        previous=None,
        by="a run that died",
    )
    (leftover,) = found(connection, bucket.name)
    assert leftover.why == "its log says version 2, MLflow 1"
    assert mended(connection, complete)
    assert connection.tracker.alias_target("net", "staging") == "2"


def test_log_that_ends_at_a_version_that_is_gone_is_set_right(connection, complete, bucket):
    log_of(connection, bucket).append(
        action="release", version="7", release=None, previous=None, by="a run that died"
    )
    (leftover,) = found(connection, bucket.name)
    assert "version 7 is gone" in leftover.why
    assert mended(connection, complete)
    assert connection.tracker.alias_target("net", "staging") == "1"


def test_release_whose_version_is_gone_is_named(connection, complete, bucket):
    connection.tracker.delete_version("net", "1")
    connection.bucket(bucket.name).upload_bytes(b"x", "unrelated")
    assert "release without a version" in kinds(connection, bucket.name)


def test_runs_that_never_ended_are_ended_and_others_left(connection, complete, bucket):
    training, died = (
        connection.tracker.create_run(n) for n in ("training", "release 20200101_000000-0a1b2c3d")
    )
    assert kinds(connection, bucket.name) == ["run that never ended"]
    assert mended(connection, complete)
    assert connection.tracker.get_run_info(died)["status"] == "KILLED"
    assert connection.tracker.get_run_info(training)["status"] == "RUNNING"
