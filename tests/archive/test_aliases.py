"""An alias's log: one writer a number, none lost, and nothing changed unseen."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import records
from pydantic import ValidationError

from heimdall_onnx.archive.aliases import AliasLog, alias_logs
from heimdall_onnx.common.errors import PromotionError, RegistryError, StoreError, VerificationError
from heimdall_onnx.services.store import Bucket

pytestmark = pytest.mark.services


def move(s3, bucket, version="1", alias="staging", **changes):
    entry = {
        "action": "release",
        "version": version,
        "release": f"s3://{bucket}/models/v{version}",
        "previous": None,
        "by": "a run",
    }
    return AliasLog(Bucket(s3, bucket), "net", alias).append(**{**entry, **changes})


def test_log_begins_empty(s3, bucket):
    assert AliasLog(bucket, "net", "staging").moves == ()
    assert AliasLog(bucket, "net", "staging").last is None
    assert tuple(alias_logs(bucket, "net")) == ()


def test_each_move_follows_the_one_before(s3, bucket):
    first, second = move(s3, bucket.name, "1", previous="0"), move(s3, bucket.name, "2")
    assert (first.number, first.previous, first.follows) == (1, "0", None)
    assert (second.number, second.previous) == (2, "1")
    assert AliasLog(bucket, "net", "staging").moves == (first, second)
    assert AliasLog(bucket, "net", "staging").last == second
    move(s3, bucket.name, alias="production")
    assert tuple(alias_logs(bucket, "net")) == ("production", "staging")


def test_of_many_at_once_each_gets_a_number_of_its_own(s3, bucket):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: move(s3, bucket.name, str(n)), range(16)))
    moves = AliasLog(bucket, "net", "staging").moves
    assert [one.number for one in moves] == list(range(1, 17))
    assert {one.version for one in moves} == {str(n) for n in range(16)}
    assert [one.previous for one in moves[1:]] == [one.version for one in moves[:-1]]


def test_who_decided_on_what_has_changed_since_is_told(s3, bucket):
    move(s3, bucket.name, "1")
    move(s3, bucket.name, "2")
    with pytest.raises(PromotionError, match="was moved meanwhile"):
        move(s3, bucket.name, "3", after=1)
    assert move(s3, bucket.name, "3", after=2).number == 3


@pytest.mark.parametrize("tampering", ["changed", "deleted", "added", "broken"])
def test_log_that_was_tampered_with_is_not_believed(s3, bucket, tampering):
    for version in "123":
        move(s3, bucket.name, version)
    keys = bucket.list_keys("aliases/net/")
    second = json.loads(s3.get_object(Bucket=bucket.name, Key=keys[1])["Body"].read())
    if tampering == "changed":
        body = json.dumps({**second, "by": "another"}).encode()
        s3.put_object(Bucket=bucket.name, Key=keys[1], Body=body)
    elif tampering == "deleted":
        s3.delete_object(Bucket=bucket.name, Key=keys[1])
    elif tampering == "added":
        body = json.dumps({**second, "number": 4}).encode()
        s3.put_object(Bucket=bucket.name, Key=keys[1].replace("02.json", "04.json"), Body=body)
    else:
        s3.put_object(Bucket=bucket.name, Key=keys[1], Body=b"{}")
    with pytest.raises(VerificationError, match=r"0000000\d\.json"):
        _ = AliasLog(bucket, "net", "staging").moves


@pytest.mark.parametrize(
    "time",
    [
        "yesterday",
        "2026-11-20",
        "2026-11-20T14:30:00",
        "2026-11-20T14:30:00+02:00",
        "2026-11-20T14:30:00.5+00:00",
        "2026-13-20T14:30:00+00:00",
        "20261120T143000+0000",
    ],
)
def test_time_that_would_sort_or_print_as_another_one_is_none(time):
    with pytest.raises(ValidationError, match="1 validation error"):
        records.move(time=time)


@pytest.fixture
def versions(sqlite_tracker, s3, bucket):
    s3.put_object(Bucket=bucket.name, Key="models/v1/MLmodel", Body=b"")
    return [sqlite_tracker.register_model("net", f"{bucket.uri()}models/v1") for _ in range(3)]


def test_mlflow_follows_the_last_entry(s3, bucket, sqlite_tracker, versions):
    assert AliasLog(bucket, "net", "staging").follow(sqlite_tracker) is None
    for version in versions:
        move(s3, bucket.name, version)
    assert AliasLog(bucket, "net", "staging").follow(sqlite_tracker) == "3"
    assert sqlite_tracker.alias_target("net", "staging") == "3"
    move(s3, bucket.name, "1", action="rollback")
    assert AliasLog(bucket, "net", "staging").follow(sqlite_tracker) == "1"
    stages = [sqlite_tracker.get_version("net", version).stage for version in versions]
    assert stages == ["Staging", "None", "Archived"]


def test_failed_move_that_is_taken_back_leaves_the_stage_as_it_was(
    s3, bucket, sqlite_tracker, versions, monkeypatch
):
    move(s3, bucket.name, "1")
    AliasLog(bucket, "net", "staging").follow(sqlite_tracker)
    move(s3, bucket.name, "2")
    with monkeypatch.context() as patch:
        patch.setattr(sqlite_tracker, "set_alias", refuse)
        with pytest.raises(RegistryError):
            AliasLog(bucket, "net", "staging").follow(sqlite_tracker)
    move(s3, bucket.name, "1", action="withdraw")
    assert AliasLog(bucket, "net", "staging").follow(sqlite_tracker) == "1"
    assert sqlite_tracker.get_version("net", "1").stage == "Staging"


def refuse(*_):
    raise RegistryError("no")


def test_release_takes_back_its_own_move_alone(s3, bucket, sqlite_tracker, versions):
    log, ours = AliasLog(bucket, "net", "staging"), f"{bucket.uri()}models/v2"
    move(s3, bucket.name, "1")
    log.point(sqlite_tracker, "2", ours, "a run")
    # Of another registry, whose numbers begin anew.
    log.withdraw(sqlite_tracker, "2", "s3://elsewhere/models/v2")
    assert sqlite_tracker.alias_target("net", "staging") == "2"
    assert AliasLog(bucket, "net", "staging").last.number == 2
    log.withdraw(sqlite_tracker, "2", ours)
    last = AliasLog(bucket, "net", "staging").last
    assert (last.action, last.version, last.number) == ("withdraw", "1", 3)
    assert sqlite_tracker.alias_target("net", "staging") == "1"


def test_move_that_was_followed_meanwhile_is_not_taken_back(
    s3, bucket, sqlite_tracker, versions, monkeypatch
):
    log, ours = AliasLog(bucket, "net", "staging"), f"{bucket.uri()}models/v2"
    move(s3, bucket.name, "1")
    log.point(sqlite_tracker, "2", ours, "a run")
    append = AliasLog.append

    def append_after_another(self, **entry):
        monkeypatch.setattr(AliasLog, "append", append)
        move(s3, bucket.name, "3", action="promote", by="a reviewer")
        return append(self, **entry)

    monkeypatch.setattr(AliasLog, "append", append_after_another)
    with pytest.raises(PromotionError, match="was moved meanwhile, by a reviewer"):
        log.withdraw(sqlite_tracker, "2", ours)
    assert AliasLog(bucket, "net", "staging").last.version == "3"


def test_alias_whose_log_ends_with_none_is_taken_away(s3, bucket, sqlite_tracker, versions):
    move(s3, bucket.name, "1")
    AliasLog(bucket, "net", "staging").follow(sqlite_tracker)
    move(s3, bucket.name, None, action="withdraw", release=None)
    assert AliasLog(bucket, "net", "staging").follow(sqlite_tracker) is None
    assert sqlite_tracker.alias_target("net", "staging") is None


def test_objects_of_others_in_a_log_are_no_entries(s3, bucket):
    move(s3, bucket.name, "1")
    s3.put_object(Bucket=bucket.name, Key="aliases/net/staging/notes.txt", Body=b"x")
    assert move(s3, bucket.name, "2").number == 2
    s3.put_object(
        Bucket=bucket.name,
        Key="aliases/net/staging/99999999.json",
        Body=AliasLog(bucket, "net", "staging").last.model_dump_json().encode(),
    )
    with pytest.raises(VerificationError, match="entry 2 of another place"):
        move(s3, bucket.name, "3")


def test_alias_without_a_stage_moves_alone(s3, bucket, sqlite_tracker, versions):
    move(s3, bucket.name, "2", alias="candidate")
    AliasLog(bucket, "net", "candidate").follow(sqlite_tracker)
    assert sqlite_tracker.alias_target("net", "candidate") == "2"
    assert sqlite_tracker.get_version("net", "2").stage == "None"


def test_racing_writers_end_where_the_log_ends(s3, bucket, sqlite_tracker, versions):
    def write_and_follow(version):
        move(s3, bucket.name, version)
        AliasLog(bucket, "net", "staging").follow(sqlite_tracker)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(write_and_follow, versions * 3))
    last = AliasLog(bucket, "net", "staging").last
    assert last.number == 9
    assert sqlite_tracker.alias_target("net", "staging") == last.version


def test_move_that_was_written_though_the_store_failed_is_taken_back(
    s3, bucket, sqlite_tracker, versions, monkeypatch
):
    log = AliasLog(bucket, "net", "staging")
    log.point(sqlite_tracker, versions[0], "s3://b/v1", "a run")
    upload = Bucket.upload_bytes

    def lost(self, *args, **options):
        upload(self, *args, **options)
        raise StoreError("the answer was lost")

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "upload_bytes", lost)
        with pytest.raises(StoreError, match="the answer was lost"):
            log.point(sqlite_tracker, versions[1], "s3://b/v2", "a run")
    log.withdraw(sqlite_tracker, versions[1], "s3://b/v2")
    assert sqlite_tracker.alias_target("net", "staging") == versions[0]
    assert AliasLog(bucket, "net", "staging").last.action == "withdraw"


def test_move_of_another_before_the_taking_back_stands(s3, bucket, sqlite_tracker, versions):
    log = AliasLog(bucket, "net", "staging")
    log.point(sqlite_tracker, versions[0], "s3://b/v1", "a run")
    AliasLog(bucket, "net", "staging").point(sqlite_tracker, versions[1], "s3://b/v2", "another")
    log.withdraw(sqlite_tracker, versions[0], "s3://b/v1")
    assert sqlite_tracker.alias_target("net", "staging") == versions[1]
    assert log.last.version == versions[1]
