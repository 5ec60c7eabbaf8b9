"""Bucket versioning and Object Lock, where the store has them: what is released stays.

Source: Amazon S3 API, PutBucketVersioning, PutObjectLockConfiguration and PutObjectRetention.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from botocore.exceptions import ClientError

from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.services.client import error_code
from heimdall_onnx.services.settings import Settings
from heimdall_onnx.services.store import Bucket

log = get_logger(__name__)

# What stores answer that have no such thing, or not for this bucket.
_LACKING = {
    "NotImplemented",
    "MethodNotAllowed",
    "InvalidRequest",
    "InvalidBucketState",
    "ObjectLockConfigurationNotFoundError",
    "AccessDenied",
    "501",
    "405",
}
# Of a key that is kept by nothing, or not there.
_NOT_RETAINED = {"NoSuchObjectLockConfiguration", "404"}


@dataclass(frozen=True)
class Protection:
    """How a store keeps the objects of a release.

    Attributes:
        versioning: Whether the bucket keeps what is deleted or replaced.
        retained_until: Until when the store refuses to delete them (UTC, ISO 8601); None if it
            does not refuse.
        note: What was asked for and could not be had; empty if nothing.
    """

    versioning: bool
    retained_until: str | None
    note: str = ""

    @property
    def until(self) -> datetime | None:
        """`retained_until` as a time."""
        return datetime.fromisoformat(self.retained_until) if self.retained_until else None


def prepare_bucket(bucket: Bucket, settings: Settings) -> Protection:
    """Turn on what was asked for, as far as the store has it.

    Args:
        bucket: Bucket, which must exist.
        settings: With versioning, retention, which brings it along, or neither.

    Raises:
        StoreError: If the store can't be reached, or refuses for another reason than having none.
    """
    lacking, days = "", settings.retention_days
    # Looked at first: who may release need not be allowed to change the bucket.
    if (settings.versioning or days) and not is_versioned(bucket):
        on = {"Status": "Enabled"}
        lacking = _turn_on(
            bucket, "versioning", "put_bucket_versioning", VersioningConfiguration=on
        )
    if days and not lacking and not is_locked(bucket):
        on = {"ObjectLockEnabled": "Enabled"}
        operation = "put_object_lock_configuration"
        lacking = _turn_on(bucket, "Object Lock", operation, ObjectLockConfiguration=on)
    until = None
    if days and not lacking:
        until = datetime.now(UTC) + timedelta(days=days)
    return Protection(
        versioning=is_versioned(bucket),
        retained_until=until.isoformat(timespec="seconds") if until else None,
        note=lacking,
    )


def retain(bucket: Bucket, keys: Iterable[str], protection: Protection) -> None:
    """Have the store keep objects as long as ``protection`` says.

    Governance mode: who has the permission ``s3:BypassGovernanceRetention`` can end it early.

    Raises:
        StoreError: If the store can't be reached or refuses.
    """
    until = protection.until
    if until is None:
        return
    for key in keys:
        # Content is shared: another release may keep it for longer, which can't be shortened.
        looking = f"look at the retention of {bucket.uri(key)}"
        none = _LACKING | _NOT_RETAINED
        found, _ = _ask(bucket, looking, "get_object_retention", none, Key=key)
        kept: datetime | None = found.get("Retention", {}).get("RetainUntilDate")
        if kept is not None and kept >= until:
            continue
        with bucket.errors(f"retain {bucket.uri(key)}"):
            bucket.client.put_object_retention(
                Bucket=bucket.name,
                Key=key,
                Retention={"Mode": "GOVERNANCE", "RetainUntilDate": until},
            )


def is_locked(bucket: Bucket) -> bool:
    """Whether objects of a bucket can be kept from deletion (Object Lock)."""
    looking = f"look at the Object Lock of {bucket.name}"
    found, _ = _ask(bucket, looking, "get_object_lock_configuration")
    return bool(found.get("ObjectLockConfiguration", {}).get("ObjectLockEnabled") == "Enabled")


def is_versioned(bucket: Bucket) -> bool:
    """Whether a bucket keeps what is deleted or replaced."""
    looking = f"look at the versioning of {bucket.name}"
    found, _ = _ask(bucket, looking, "get_bucket_versioning")
    return bool(found.get("Status") == "Enabled")


def _turn_on(bucket: Bucket, what: str, operation: str, **configuration: Any) -> str:
    """What the store says it has not; nothing if it did as it was told."""
    doing = f"turn on {what} of {bucket.name}"
    _, code = _ask(bucket, doing, operation, **configuration)
    if not code:
        return ""
    reason = f"the store could not {doing}: {code}"
    log.warning("not protected", reason=reason)
    return reason


def _ask(
    bucket: Bucket,
    doing: str,
    operation: str,
    lacking: Collection[str] = _LACKING,
    **query: Any,
) -> tuple[Mapping[str, Any], str]:
    """What the store answers, or the code with which it says that it has no such thing."""
    with bucket.errors(doing):
        try:
            return getattr(bucket.client, operation)(Bucket=bucket.name, **query), ""
        except ClientError as error:
            if (code := error_code(error)) not in lacking:
                raise
            return {}, code
