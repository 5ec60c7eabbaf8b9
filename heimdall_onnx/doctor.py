"""What killed runs and lost services leave behind: found, said, and mended where that is safe."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from botocore.exceptions import ClientError

from heimdall_onnx.aliases import append_move, follow_log, logged_aliases, read_last
from heimdall_onnx.errors import HeimdallError, NotRegisteredError, VerificationError
from heimdall_onnx.logs import get_logger
from heimdall_onnx.manifest import CONTENT, Manifest, read_manifest
from heimdall_onnx.store import MANIFEST, bucket_exists, delete_objects, exists, format_uri
from heimdall_onnx.store_client import error_code, store_errors

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

    from heimdall_onnx.publish import Connection
    from heimdall_onnx.registry import MLflowTracker, RegisteredVersion

log = get_logger(__name__)


@dataclass(frozen=True)
class Leftover:
    """Something that should not be there, or not be so.

    Attributes:
        kind: What sort of thing.
        what: Which one.
        why: What is wrong with it.
        remedy: What would be done about it; empty where a person has to decide.
    """

    kind: str
    what: str
    why: str
    remedy: str = ""
    _mend: Callable[[], object] | None = field(default=None, repr=False, compare=False)

    def mend(self) -> None:
        """Do what ``remedy`` says.

        Raises:
            ServiceError: If a service can't be reached or refuses.
        """
        if self._mend is not None:
            self._mend()
            log.info("mended", kind=self.kind, what=self.what)


@dataclass(frozen=True)
class _Object:
    key: str
    modified: datetime


class _Bucket:
    """What is in a bucket, looked at once."""

    def __init__(self, connection: Connection, bucket: str, prefix: str) -> None:
        self.connection, self.name, self.prefix = connection, bucket, prefix.strip("/")
        self.client = connection.client
        exists = bucket_exists(self.client, bucket)
        self.objects = tuple(_list(self.client, bucket)) if exists else ()
        self.now = _now(self.client, bucket) if exists else datetime.now(UTC)
        self.keys = {o.key for o in self.objects}
        self.manifests: dict[str, Manifest] = {}
        self.broken: dict[str, str] = {}
        for key in sorted(key for key in self.keys if key.endswith(f"/{MANIFEST}")):
            folder = key.removesuffix(f"/{MANIFEST}")
            try:
                self.manifests[folder] = read_manifest(self.client, format_uri(bucket, folder))
            except VerificationError as error:
                self.broken[folder] = str(error)

    def folders(self) -> dict[str, list[_Object]]:
        """Objects by release folder below the prefix; reports of failed runs are none."""
        found: dict[str, list[_Object]] = defaultdict(list)
        for stored in self.objects:
            name, _, rest = stored.key.removeprefix(f"{self.prefix}/").partition("/")
            if stored.key.startswith(f"{self.prefix}/v") and rest:
                found[f"{self.prefix}/{name}"].append(stored)
        return found


def diagnose(
    connection: Connection, bucket: str, prefix: str, *, older_than: timedelta
) -> tuple[Leftover, ...]:
    """Look for what should not be there.

    What is younger than ``older_than`` by the store's clock may belong to a release that is under
    way, and is left out.

    Args:
        connection: Store and registry.
        bucket: Bucket of the releases.
        prefix: Folder of the releases in it.
        older_than: Least age.

    Raises:
        ServiceError: If a service can't be reached or refuses.
    """
    there = _Bucket(connection, bucket, prefix)
    before = there.now - older_than
    tracker = connection.tracker
    versions = [v for name in tracker.model_names() for v in tracker.versions(name)]
    ours = [v for v in versions if v.source.startswith(format_uri(bucket, ""))]
    return (
        *_broken_manifests(there),
        *_aliases(there, tracker, ours),
        *_unfinished_folders(there, ours, before),
        *_versions(there, tracker, ours, before),
        *_unreferenced_content(there, before),
        *_uploads(there, before),
        *_open_runs(tracker, before),
        *_local_models(connection.settings.home, datetime.now(UTC) - older_than),
    )


def _broken_manifests(there: _Bucket) -> Iterator[Leftover]:
    for folder, problem in there.broken.items():
        yield Leftover("unreadable manifest", format_uri(there.name, folder), problem)


def _unfinished_folders(
    there: _Bucket, versions: list[RegisteredVersion], before: datetime
) -> Iterator[Leftover]:
    sources = {v.source.rstrip("/"): v for v in versions}
    for folder, objects in sorted(there.folders().items()):
        uri = format_uri(there.name, folder)
        complete = folder in there.manifests or folder in there.broken
        # What is registered or uploaded step by step has no manifest, and is meant to have none.
        alone = _is_single(sources[uri]) if uri in sources else f"{folder}.onnx" in there.keys
        if complete or alone or max(o.modified for o in objects) > before:
            continue
        yield Leftover(
            "unfinished folder",
            uri,
            f"{len(objects)} objects and no {MANIFEST}",
            "delete it",
            partial(_delete_unless_complete, there, folder, [o.key for o in objects]),
        )


def _versions(
    there: _Bucket, tracker: MLflowTracker, versions: list[RegisteredVersion], before: datetime
) -> Iterator[Leftover]:
    registered = {(v.name, v.version) for v in versions}
    for folder, manifest in there.manifests.items():
        if (manifest.model_name, manifest.model_version) not in registered:
            yield Leftover(
                "release without a version",
                format_uri(there.name, folder),
                f"{manifest.model_name} version {manifest.model_version} is not registered",
            )
    for version in versions:
        folder = version.source.removeprefix(format_uri(there.name, "")).rstrip("/")
        created = datetime.fromtimestamp(version.created_ms / 1000, UTC)
        if folder in there.manifests or folder in there.broken or _is_single(version):
            continue
        if created > before:
            continue
        yield Leftover(
            "version without a release",
            f"{version.name} version {version.version}",
            f"there is no {version.source.rstrip('/')}/{MANIFEST}",
            "delete the version",
            partial(_delete_version, there, tracker, version),
        )


def _aliases(
    there: _Bucket, tracker: MLflowTracker, versions: list[RegisteredVersion]
) -> Iterator[Leftover]:
    by_number = {(v.name, v.version): v for v in versions}
    for name in sorted({v.name for v in versions}):
        aliases = tracker.aliases(name)
        for alias, number in sorted(aliases.items()):
            version = by_number.get((name, number))
            folder = version and version.source.removeprefix(format_uri(there.name, ""))
            if version is None or str(folder).rstrip("/") in there.manifests:
                continue
            yield Leftover(
                "alias without a manifest",
                f"{name}@{alias}",
                f"it points at version {number}, which "
                + ("was registered without a release" if _is_single(version) else "is no release"),
            )
        for alias in logged_aliases(there.client, there.name, name):
            yield from _log(there, tracker, by_number, name, alias, aliases.get(alias))


def _log(
    there: _Bucket,
    tracker: MLflowTracker,
    versions: dict[tuple[str, str], RegisteredVersion],
    name: str,
    alias: str,
    points_at: str | None,
) -> Iterator[Leftover]:
    try:
        last = read_last(there.client, there.name, name, alias)
    except VerificationError as error:
        yield Leftover("unreadable log", f"{name}@{alias}", str(error))
        return
    if last is None or last.version == points_at:
        return
    why = f"its log says version {last.version or 'none'}, MLflow {points_at or 'none'}"
    if last.version is not None and (name, last.version) not in versions:
        # The release was taken back, and its runner died before it could say so.
        yield Leftover(
            "alias beside its log",
            f"{name}@{alias}",
            f"{why}, and version {last.version} is gone",
            f"note that it was taken back, and point the alias at {points_at or 'none'}",
            lambda: append_move(
                there.client,
                there.name,
                model_name=name,
                alias=alias,
                action="withdraw",
                version=points_at,
                release=None,
                previous=None,
                by="doctor",
                note=f"version {last.version} is gone",
                after=last.number,
            ),
        )
    else:
        yield Leftover(
            "alias beside its log",
            f"{name}@{alias}",
            why,
            f"point the alias at version {last.version}",
            lambda: follow_log(there.client, there.name, tracker, name, alias),
        )


def _unreferenced_content(there: _Bucket, before: datetime) -> Iterator[Leftover]:
    # A manifest that can't be read may name any of it.
    if there.broken:
        return
    named = {entry.key for manifest in there.manifests.values() for entry in manifest.content}
    for stored in there.objects:
        unnamed = stored.key.startswith(f"{CONTENT}/") and stored.key not in named
        if unnamed and stored.modified <= before:
            yield Leftover(
                "unreferenced content",
                format_uri(there.name, stored.key),
                "no manifest of the bucket names it",
                "delete it",
                partial(delete_objects, there.client, there.name, [stored.key]),
            )


def _uploads(there: _Bucket, before: datetime) -> Iterator[Leftover]:
    """Parts of uploads that were never completed; they take space, and no listing shows them."""
    if not there.objects:
        return
    with store_errors(there.client, f"list the uploads into {there.name}"):
        pages = there.client.get_paginator("list_multipart_uploads").paginate(Bucket=there.name)
        uploads = [upload for page in pages for upload in page.get("Uploads", [])]
    for upload in uploads:
        if upload["Initiated"] <= before:
            yield Leftover(
                "aborted upload",
                format_uri(there.name, upload["Key"]),
                f"begun {upload['Initiated']:%Y-%m-%d %H:%M:%S} and never completed",
                "delete its parts",
                partial(_abort, there.client, there.name, upload["Key"], upload["UploadId"]),
            )


def _open_runs(tracker: MLflowTracker, before: datetime) -> Iterator[Leftover]:
    for run_id, started in tracker.open_runs("release ").items():
        if datetime.fromtimestamp(started / 1000, UTC) <= before:
            yield Leftover(
                "run that never ended",
                f"MLflow run {run_id}",
                "its release is not under way any more",
                "end it as KILLED",
                partial(tracker.close_run, run_id, "KILLED"),
            )


def _local_models(home: Path, before: datetime) -> Iterator[Leftover]:
    """A run deletes its own copy of the model when it ends, unless it is killed."""
    for path in sorted((home / "runs").glob("*/model.onnx*")):
        status = path.stat()
        if datetime.fromtimestamp(status.st_mtime, UTC) <= before:
            yield Leftover(
                "model of a run that was killed",
                str(path),
                f"{status.st_size / 1e6:.1f} MB on this machine",
                "delete it",
                partial(path.unlink, missing_ok=True),
            )


def _is_single(version: RegisteredVersion) -> bool:
    """Whether it was registered step by step, with a hash and without a release."""
    return "sha256" in version.tags and "manifest_sha256" not in version.tags


def _delete_unless_complete(there: _Bucket, folder: str, keys: list[str]) -> None:
    # It may have been completed since it was looked at.
    if exists(there.client, there.name, f"{folder}/{MANIFEST}"):
        raise VerificationError(f"{format_uri(there.name, folder)} has become a release")
    delete_objects(there.client, there.name, keys)


def _delete_version(there: _Bucket, tracker: MLflowTracker, version: RegisteredVersion) -> None:
    folder = version.source.removeprefix(format_uri(there.name, "")).rstrip("/")
    if exists(there.client, there.name, f"{folder}/{MANIFEST}"):
        raise VerificationError(f"{version.source} has become a release")
    if version.version in tracker.aliases(version.name).values():
        raise VerificationError(
            f"an alias points at {version.name} version {version.version}; promote or roll back "
            "to another one first"
        )
    with contextlib.suppress(NotRegisteredError):
        tracker.delete_version(version.name, version.version)


def _abort(client: S3Client, bucket: str, key: str, upload_id: str) -> None:
    with store_errors(client, f"abort the upload of {format_uri(bucket, key)}"):
        try:
            client.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload_id)
        except ClientError as error:
            if error_code(error) != "NoSuchUpload":
                raise


def _list(client: S3Client, bucket: str) -> Iterator[_Object]:
    with store_errors(client, f"list {bucket}"):
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
            for entry in page.get("Contents", []):
                yield _Object(entry["Key"], entry["LastModified"])


def _now(client: S3Client, bucket: str) -> datetime:
    """The store's time: that is what its objects are dated by, and this machine's may be wrong."""
    with store_errors(client, f"ask for the time of {bucket}"):
        headers = client.head_bucket(Bucket=bucket)["ResponseMetadata"]["HTTPHeaders"]
    return parsedate_to_datetime(headers["date"]) if "date" in headers else datetime.now(UTC)


def mend_all(leftovers: tuple[Leftover, ...]) -> tuple[str, ...]:
    """Do every remedy there is.

    Returns:
        What could not be done, in words.
    """
    failed = []
    for leftover in leftovers:
        try:
            leftover.mend()
        except HeimdallError as error:
            failed.append(f"{leftover.what}: {error}")
    return tuple(failed)
