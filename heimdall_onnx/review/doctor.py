"""What killed runs and lost services leave behind: found, said, and mended where that is safe."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import cached_property, partial
from pathlib import Path

import psutil
from botocore.exceptions import ClientError

from heimdall_onnx.archive.aliases import AliasLog, Move, alias_logs
from heimdall_onnx.archive.manifest import CONTENT, DATASETS, REVIEWS, Manifest, read_manifest
from heimdall_onnx.archive.metadata import METADATA
from heimdall_onnx.common.errors import HeimdallError, NotRegisteredError, VerificationError
from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.common.parameters import VARIANTS_FOLDER
from heimdall_onnx.data.dataset.schema import HEADER
from heimdall_onnx.report.workspace import ENSEMBLE, RUNNER
from heimdall_onnx.services.client import error_code
from heimdall_onnx.services.connection import Connection
from heimdall_onnx.services.registry import MLflowTracker, RegisteredVersion
from heimdall_onnx.services.store import MANIFEST, Bucket, Listed

log = get_logger(__name__)


@dataclass(frozen=True)
class Leftover:
    """Something that should not be there, or not be so.

    Attributes:
        kind: What sort of thing.
        what: Which one.
        why: What is wrong with it.
        remedy: What would be done about it; empty where a person has to decide.
        mend: Does what ``remedy`` says, unless it is not left over any more; else nothing.
    """

    kind: str
    what: str
    why: str
    remedy: str = ""
    mend: Callable[[], object] = field(default=lambda: None, repr=False, compare=False)


class _Place:
    """What is in a bucket, looked at once, and the registry beside it."""

    def __init__(self, bucket: Bucket, tracker: MLflowTracker, prefix: str) -> None:
        self.bucket, self.tracker, self.prefix = bucket, tracker, prefix.strip("/")
        self.exists = bucket.is_there()
        self.objects = bucket.list_objects() if self.exists else {}
        self.now = _now(bucket) if self.exists else datetime.now(UTC)
        self.manifests: dict[str, Manifest] = {}
        self.broken: dict[str, str] = {}
        for key in sorted(key for key in self.objects if key.endswith(f"/{MANIFEST}")):
            folder = key.removesuffix(f"/{MANIFEST}")
            try:
                self.manifests[folder] = read_manifest(bucket, folder)
            except VerificationError as error:
                self.broken[folder] = str(error)

    @cached_property
    def versions(self) -> dict[tuple[str, str], RegisteredVersion]:
        """The registered versions whose source is in this bucket, by name and number."""
        every = (v for name in self.tracker.model_names() for v in self.tracker.versions(name))
        return {(v.name, v.version): v for v in every if v.source.startswith(self.bucket.uri())}

    def folders(self) -> dict[str, list[Listed]]:
        """Objects by release folder; what others keep below the prefix is none."""
        found: dict[str, list[Listed]] = defaultdict(list)
        for stored in self.objects.values():
            if folder := self.folder_of(stored.key):
                found[folder].append(stored)
        return found

    def shared(self) -> dict[str, list[Listed]]:
        """Objects of what releases share: content by its key, a dataset by its folder."""
        found: dict[str, list[Listed]] = defaultdict(list)
        for stored in self.objects.values():
            if stored.key.startswith((f"{CONTENT}/", f"{DATASETS}/")):
                found["/".join(stored.key.split("/")[:3])].append(stored)
        return found

    def named(self) -> set[str]:
        """The addresses of content and datasets that manifests name."""
        kept = self.manifests.values()
        return {
            *(self.bucket.uri(entry.key) for manifest in kept for entry in manifest.said.content),
            *(manifest.dataset.address for manifest in kept if manifest.dataset is not None),
        }

    def folder_of(self, key: str) -> str | None:
        """The release folder that a key or an address without its bucket is in, by its name."""
        match = re.match(rf"({re.escape(self.prefix)}/v\d{{8}}_\d{{6}})(/|$)", key)
        return match[1] if match else None

    def of(self, version: RegisteredVersion) -> str | None:
        """The release folder that a version was registered from; None if it is none of ours."""
        return self.folder_of(self.place_of(version))

    def place_of(self, version: RegisteredVersion) -> str:
        """The folder of the bucket that a version was registered from, whatever is there."""
        return version.source.removeprefix(self.bucket.uri()).rstrip("/")


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
    tracker = connection.tracker
    there = _Place(connection.bucket(bucket), tracker, prefix)
    before = there.now - older_than
    return (
        *_broken_manifests(there),
        *_aliases(there),
        *_unfinished_folders(there, before),
        *_versions(there, before),
        *_unreferenced(there, before),
        *_uploads(there, before),
        *_open_runs(tracker, before),
        *_local_copies(connection.settings.home, datetime.now(UTC) - older_than),
    )


def _broken_manifests(there: _Place) -> Iterator[Leftover]:
    for folder, problem in there.broken.items():
        yield Leftover("unreadable manifest", there.bucket.uri(folder), problem)


def _wanted(there: _Place) -> set[str | None]:
    """Folders that somebody counts on: a manifest that is missing there is a loss, not a leftover.

    An alias points at them, or they have been reviewed.
    """
    held = {
        (name, number)
        for name in {name for name, _ in there.versions}
        for number in there.tracker.aliases(name).values()
    }
    reviewed = {there.folder_of(key) for key in there.objects if f"/{REVIEWS}/" in key}
    return reviewed | {there.of(v) for key, v in there.versions.items() if key in held}


def _unfinished_folders(there: _Place, before: datetime) -> Iterator[Leftover]:
    sources, wanted = {there.of(v): v for v in there.versions.values()}, _wanted(there)
    for folder, objects in sorted(there.folders().items()):
        uri = there.bucket.uri(folder)
        keys = [o.key for o in objects]
        claimed = f"{folder}/{METADATA}" in keys
        complete = any(key.endswith(f"/{MANIFEST}") for key in keys) or folder in wanted
        # What is registered or uploaded step by step has no manifest, and is meant to have none.
        alone = (
            _is_single(sources[folder]) if folder in sources else f"{folder}.onnx" in there.objects
        )
        if not claimed or complete or alone or max(o.modified for o in objects) > before:
            continue
        yield Leftover(
            "unfinished folder",
            uri,
            f"{len(objects)} objects and no {MANIFEST}",
            "delete it",
            partial(_delete_unless_complete, there, folder),
        )


def _versions(there: _Place, before: datetime) -> Iterator[Leftover]:
    for folder, manifest in there.manifests.items():
        if (manifest.model_name, manifest.model_version) not in there.versions:
            yield Leftover(
                "release without a version",
                there.bucket.uri(folder),
                f"{manifest.model_name} version {manifest.model_version} is not registered",
            )
    for version in there.versions.values():
        place = there.of(version)
        created = datetime.fromtimestamp(version.created_ms / 1000, UTC)
        if place is None or place in there.manifests or place in there.broken:
            continue
        if _is_single(version) or created > before:
            continue
        yield Leftover(
            "version without a release",
            f"{version.name} version {version.version}",
            f"there is no {version.source.rstrip('/')}/{MANIFEST}",
            "delete the version",
            partial(_delete_version, there, version),
        )


def _aliases(there: _Place) -> Iterator[Leftover]:
    for name in sorted({name for name, _ in there.versions}):
        aliases = there.tracker.aliases(name)
        for alias, number in sorted(aliases.items()):
            version = there.versions.get((name, number))
            if version is None or there.place_of(version) in there.manifests:
                continue
            yield Leftover(
                "alias without a manifest",
                f"{name}@{alias}",
                f"it points at version {number}, which "
                + ("was registered without a release" if _is_single(version) else "is no release"),
            )
        for alias, alias_log in alias_logs(there.bucket, name).items():
            yield from _log(there, alias_log, aliases.get(alias))


def _log(there: _Place, alias_log: AliasLog, points_at: str | None) -> Iterator[Leftover]:
    name, alias = alias_log.model_name, alias_log.alias
    try:
        moves = alias_log.moves
    except VerificationError as error:
        yield Leftover("unreadable log", f"{name}@{alias}", str(error))
        return
    last = moves[-1] if moves else None
    if last is None or last.version == points_at:
        return
    beside = partial(Leftover, "alias beside its log", f"{name}@{alias}")
    why = f"its log says version {last.version or 'none'}, MLflow {points_at or 'none'}"
    if points_at is not None and points_at not in {move.version for move in moves}:
        # Somebody has moved it without a log, or with one in another bucket.
        yield beside(why)
    elif last.version is not None and (name, last.version) not in there.versions:
        # The release was taken back, and its runner died before it could say so.
        yield beside(
            f"{why}, and version {last.version} is gone",
            f"note that it was taken back, and point the alias at {points_at or 'none'}",
            partial(_note_withdrawal, there.tracker, alias_log, last, points_at),
        )
    else:
        yield beside(
            why,
            f"point the alias at {f'version {last.version}' if last.version else 'none'}",
            partial(alias_log.follow, there.tracker),
        )


def _unreferenced(there: _Place, before: datetime) -> Iterator[Leftover]:
    # A manifest that can't be read may name any of it.
    shared, named = ({}, set()) if there.broken else (there.shared(), there.named())
    for key, objects in sorted(shared.items()):
        uri, latest = there.bucket.uri(key), max(stored.modified for stored in objects)
        if uri not in named and latest <= before:
            content = key.startswith(f"{CONTENT}/")
            yield Leftover(
                f"unreferenced {'content' if content else 'dataset'}",
                uri,
                ("" if content else f"{len(objects)} objects, and ")
                + "no manifest of the bucket names it",
                "delete it",
                partial(_delete_shared, there, key, latest),
            )


def _uploads(there: _Place, before: datetime) -> Iterator[Leftover]:
    """Parts of uploads that were never completed; they take space, and no listing shows them."""
    if not there.exists:
        return
    with there.bucket.errors(f"list the uploads into {there.bucket.name}"):
        pages = there.bucket.client.get_paginator("list_multipart_uploads").paginate(
            Bucket=there.bucket.name
        )
        uploads = [upload for page in pages for upload in page.get("Uploads", [])]
    for upload in uploads:
        ours = there.folder_of(upload["Key"]) or upload["Key"].startswith(
            (f"{CONTENT}/", f"{DATASETS}/")
        )
        if ours and upload["Initiated"] <= before:
            yield Leftover(
                "aborted upload",
                there.bucket.uri(upload["Key"]),
                f"begun {upload['Initiated']:%Y-%m-%d %H:%M:%S} and never completed",
                "delete its parts",
                partial(_abort, there.bucket, upload["Key"], upload["UploadId"]),
            )


def _open_runs(tracker: MLflowTracker, before: datetime) -> Iterator[Leftover]:
    for run_id, (name, started) in tracker.open_runs("release").items():
        ours = re.fullmatch(r"release( \d{8}_\d{6}-[0-9a-f]{8})?", name)
        if ours and datetime.fromtimestamp(started / 1000, UTC) <= before:
            yield Leftover(
                "run that never ended",
                f"MLflow run {run_id}",
                "its release is not under way any more",
                "end it as KILLED",
                partial(tracker.close_run, run_id, "KILLED"),
            )


def _local_copies(home: Path, before: datetime) -> Iterator[Leftover]:
    """A release deletes its own copies of a model when it ends, unless it is killed."""
    runs = home / "runs"
    models = [*runs.glob("*/model.onnx*"), *runs.glob(f"*/{VARIANTS_FOLDER}/*/model.onnx*")]
    copies = [(path, runs / path.relative_to(runs).parts[0]) for path in sorted(models)]
    copies += [(folder, folder) for folder in sorted(home.glob(f"{ENSEMBLE}*"))]
    for path, run in copies:
        with contextlib.suppress(OSError, ValueError):
            # Without a runner it is somebody's own; with one that runs it is under way.
            if psutil.pid_exists(int((run / RUNNER).read_text())):
                continue
            if datetime.fromtimestamp(path.stat().st_mtime, UTC) > before:
                continue
            files = [path] if path.is_file() else list(path.iterdir())
            yield Leftover(
                f"{'model' if path.is_file() else 'checkpoint'} of a run that was killed",
                str(path),
                f"{sum(file.stat().st_size for file in files) / 1e6:.1f} MB on this machine",
                "delete it",
                partial(path.unlink, missing_ok=True)
                if path.is_file()
                else partial(shutil.rmtree, path, ignore_errors=True),
            )


def _is_single(version: RegisteredVersion) -> bool:
    """Whether it was registered step by step, with a hash and without a release."""
    return "sha256" in version.tags and "manifest_sha256" not in version.tags


def _note_withdrawal(
    tracker: MLflowTracker, alias_log: AliasLog, last: Move, points_at: str | None
) -> None:
    # A release that has come since it was looked at is not gone.
    with contextlib.suppress(NotRegisteredError):
        tracker.get_version(last.model_name, str(last.version))
        raise VerificationError(f"version {last.version} of {last.model_name} is there after all")
    alias_log.append(
        action="withdraw",
        version=points_at,
        release=None,
        previous=None,
        by="doctor",
        note=f"version {last.version} is gone",
        after=last.number,
    )


def _delete_shared(there: _Place, key: str, latest: datetime) -> None:
    # A release that uses it again dates it anew, and may have been completed meanwhile.
    again = _Place(there.bucket, there.tracker, there.prefix)
    objects, uri = again.shared().get(key, []), there.bucket.uri(key)
    renewed = any(stored.modified > latest for stored in objects)
    if again.broken or renewed or uri in again.named():
        raise VerificationError(f"{uri} is used again")
    # The header of a dataset first: without it the rest is none.
    keys = sorted((o.key for o in objects), key=lambda one: (one != f"{key}/{HEADER}", one))
    there.bucket.delete(keys[:1])
    there.bucket.delete(keys[1:])


def _delete_unless_complete(there: _Place, folder: str) -> None:
    # It may have been completed since it was looked at.
    keys = there.bucket.list_keys(f"{folder}/")
    if any(key.endswith(f"/{MANIFEST}") for key in keys):
        raise VerificationError(f"{there.bucket.uri(folder)} has become a release")
    there.bucket.delete(keys)


def _delete_version(there: _Place, version: RegisteredVersion) -> None:
    folder, tracker = there.of(version), there.tracker
    if there.bucket.exists(f"{folder}/{MANIFEST}"):
        raise VerificationError(f"{version.source} has become a release")
    if version.version in tracker.aliases(version.name).values():
        raise VerificationError(
            f"an alias points at {version.name} version {version.version}; promote or roll back "
            "to another one first"
        )
    with contextlib.suppress(NotRegisteredError):
        tracker.delete_version(version.name, version.version)


def _abort(bucket: Bucket, key: str, upload_id: str) -> None:
    with bucket.errors(f"abort the upload of {bucket.uri(key)}"):
        try:
            bucket.client.abort_multipart_upload(Bucket=bucket.name, Key=key, UploadId=upload_id)
        except ClientError as error:
            if error_code(error) != "NoSuchUpload":
                raise


def _now(bucket: Bucket) -> datetime:
    """The store's time: that is what its objects are dated by, and this machine's may be wrong."""
    with bucket.errors(f"ask for the time of {bucket.name}"):
        headers = bucket.client.head_bucket(Bucket=bucket.name)["ResponseMetadata"]["HTTPHeaders"]
    return parsedate_to_datetime(headers["date"]) if "date" in headers else datetime.now(UTC)


def mend_all(leftovers: tuple[Leftover, ...]) -> tuple[str, ...]:
    """Do every remedy there is.

    Returns:
        What could not be done, in words.
    """
    failed = []
    for leftover in leftovers:
        try:
            if leftover.remedy:
                leftover.mend()
                log.info("mended", kind=leftover.kind, what=leftover.what)
        except (HeimdallError, OSError) as error:
            failed.append(f"{leftover.what}: {error}")
    return tuple(failed)
