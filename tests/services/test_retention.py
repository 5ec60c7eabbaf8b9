"""Where the store can keep objects from being deleted it does; where it can't, that is said."""

from datetime import UTC, datetime, timedelta

import pytest
from botocore.exceptions import ClientError

from heimdall_onnx.common.errors import StoreError
from heimdall_onnx.services.retention import Protection, prepare_bucket, retain
from heimdall_onnx.services.settings import Settings

pytestmark = pytest.mark.services


def asked(versioning: bool, days: int) -> Settings:
    variables = {"HEIMDALL_VERSIONING": versioning, "HEIMDALL_RETENTION_DAYS": days}
    return Settings(_env_file=None, **variables)


def test_nothing_is_turned_on_unasked(s3, bucket):
    protection = prepare_bucket(bucket, asked(False, 0))
    assert protection == Protection(versioning=False, retained_until=None)
    retain(bucket, ["no such object"], protection)


def test_versioning_keeps_what_is_deleted(s3, bucket):
    protection = prepare_bucket(bucket, asked(True, 0))
    assert protection == Protection(versioning=True, retained_until=None)
    s3.put_object(Bucket=bucket.name, Key="a", Body=b"1")
    bucket.delete(["a"])
    assert bucket.list_keys("") == ()
    (kept,) = s3.list_object_versions(Bucket=bucket.name)["Versions"]
    body = s3.get_object(Bucket=bucket.name, Key="a", VersionId=kept["VersionId"])["Body"].read()
    assert body == b"1"


def test_retention_refuses_to_delete(s3, bucket):
    protection = prepare_bucket(bucket, asked(False, 2))
    assert protection.versioning
    left = datetime.fromisoformat(protection.retained_until) - datetime.now(UTC)
    assert timedelta(days=1, hours=23) < left <= timedelta(days=2)
    version = s3.put_object(Bucket=bucket.name, Key="a", Body=b"1")["VersionId"]
    retain(bucket, ["a"], protection)
    with pytest.raises(ClientError, match="AccessDenied"):
        s3.delete_object(Bucket=bucket.name, Key="a", VersionId=version)
    kept = s3.get_object_retention(Bucket=bucket.name, Key="a")["Retention"]
    assert kept["Mode"] == "GOVERNANCE"


def test_retention_is_never_shortened(s3, bucket):
    longer, shorter = (prepare_bucket(bucket, asked(False, days)) for days in (5, 1))
    s3.put_object(Bucket=bucket.name, Key="shared", Body=b"1")
    for protection in (longer, shorter):
        retain(bucket, ["shared"], protection)
    kept = s3.get_object_retention(Bucket=bucket.name, Key="shared")["Retention"]["RetainUntilDate"]
    assert kept == longer.until


def test_bucket_that_is_protected_already_is_not_changed(s3, bucket):
    prepare_bucket(bucket, asked(True, 1))

    def refuse(**_):
        raise AssertionError("a releaser may not do this")

    for call in ("PutBucketVersioning", "PutObjectLockConfiguration"):
        s3.meta.events.register(f"before-call.s3.{call}", refuse)
    try:
        again = prepare_bucket(bucket, asked(True, 1))
    finally:
        for call in ("PutBucketVersioning", "PutObjectLockConfiguration"):
            s3.meta.events.unregister(f"before-call.s3.{call}", refuse)
    assert again.versioning
    assert again.retained_until


@pytest.fixture
def answering(s3):
    """Has the store answer a call with an error; SeaweedFS has what others have not."""

    def answer(call: str, code: str) -> None:
        def refuse(**_):
            raise ClientError({"Error": {"Code": code, "Message": ""}}, call)

        s3.meta.events.register(f"before-call.s3.{call}", refuse, unique_id=call)

    yield answer
    for call in ("PutBucketVersioning", "PutObjectLockConfiguration"):
        s3.meta.events.unregister(f"before-call.s3.{call}", unique_id=call)


def test_store_without_versioning_is_said_to_have_none(bucket, answering):
    answering("PutBucketVersioning", "NotImplemented")
    protection = prepare_bucket(bucket, asked(True, 3))
    assert protection.retained_until is None
    assert "could not turn on versioning" in protection.note
    assert "NotImplemented" in protection.note


@pytest.mark.parametrize("code", ["404", "NoSuchObjectLockConfiguration"])
@pytest.mark.parametrize("call", ["PutBucketVersioning", "PutObjectLockConfiguration"])
def test_what_is_answered_for_a_key_is_none_for_a_bucket(bucket, answering, call, code):
    answering(call, code)
    with pytest.raises(StoreError, match="turn on"):
        prepare_bucket(bucket, asked(True, 3))
