"""The bucket: integrity-checked transfers, conditional writes and release folders on any S3 store.

A `Bucket` is made of a boto3 client (see `make_client`), so that the caller decides which store is
meant. Whatever botocore raises becomes a `StoreError` that says what to do.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import random
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from boto3.s3.transfer import TransferConfig
from botocore.exceptions import (
    ClientError,
    FlexibleChecksumError,
    IncompleteReadError,
    ReadTimeoutError,
    ResponseStreamingError,
)

from heimdall_onnx.common.errors import (
    DataError,
    MissingObjectError,
    ObjectExistsError,
    ParameterError,
    StoreError,
)
from heimdall_onnx.common.files import hash_file
from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.services.client import error_code, redact_url, store_errors

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import (
        CopySourceTypeDef,
        GetObjectOutputTypeDef,
        HeadObjectOutputTypeDef,
        ObjectTypeDef,
    )

log = get_logger(__name__)

MANIFEST = "manifest.json"
# Beside the releases: pages about all of them.
GALLERY = "gallery"

_CHUNK_BYTES = 1 << 20
# What is read as a whole are manifests, records and notebooks.
MAX_READ_BYTES = 256 << 20
_TRANSFER = TransferConfig(
    multipart_threshold=64 << 20, multipart_chunksize=16 << 20, max_concurrency=4
)
CLAIM_TRIES = 120
# Where every role that writes on a condition may write.
_PROOFS = "aliases/.store/"
_RACERS = 16
_PROVEN: set[tuple[str, str]] = set()
_READS = 3
# Metadata: by it a write whose answer was lost is known again.
_WRITE_ID = "write-id"
_BROKEN_OFF = (
    ResponseStreamingError,
    IncompleteReadError,
    ReadTimeoutError,
    FlexibleChecksumError,
)

T = TypeVar("T")


@dataclass(frozen=True)
class StoredObject:
    """An object in the store.

    Attributes:
        uri: Its address, ``s3://bucket/key``.
        bucket: Bucket name.
        key: Key within the bucket.
        size_bytes: Its length.
        sha256: SHA-256 of its content in hexadecimal; empty where the object does not record one.
    """

    uri: str
    bucket: str
    key: str
    size_bytes: int
    sha256: str


class Listed(NamedTuple):
    """An object as a listing has it.

    Attributes:
        key: Key within the bucket.
        size: Its length in bytes.
        tag: Its entity tag; empty where a store gives none.
        modified: When it was written, by the store's clock.
    """

    key: str
    size: int
    tag: str
    modified: datetime


def parse_uri(uri: str) -> tuple[str, str]:
    """Split ``s3://bucket/key`` into bucket and key (the key may be empty).

    Raises:
        ParameterError: If it is not an ``s3://`` address.
    """
    match = re.fullmatch(r"s3://([^/]+)(?:/(.*))?", uri, re.DOTALL)
    if match is None:
        raise ParameterError(f"not the address of an object: {uri!r}; expected s3://bucket/key")
    return match[1], match[2] or ""


def format_uri(bucket: str, key: str) -> str:
    """The address of an object; `parse_uri` reads it back."""
    return f"s3://{bucket}/{key}"


def locate(client: S3Client, uri: str) -> tuple[Bucket, str]:
    """The bucket and the key of an address ``s3://bucket/key``.

    Raises:
        ParameterError: If it is not an ``s3://`` address.
    """
    name, key = parse_uri(uri)
    return Bucket(client, name), key


@dataclass(frozen=True)
class Bucket:
    """A bucket of a store.

    Attributes:
        client: Client of the store, see `make_client`.
        name: Its name.
    """

    client: S3Client = field(repr=False)
    name: str

    def uri(self, key: str = "") -> str:
        """The address of an object; `parse_uri` reads it back."""
        return format_uri(self.name, key)

    def errors(self, doing: str) -> contextlib.AbstractContextManager[None]:
        """Turn what botocore raises into a `StoreError`, see `store_errors`."""
        return store_errors(self.client, doing)

    def is_there(self) -> bool:
        """Whether there is such a bucket."""
        try:
            with self.errors(f"look for bucket {self.name}"):
                self.client.head_bucket(Bucket=self.name)
        except MissingObjectError:
            return False
        return True

    def ensure(self) -> None:
        """Make the bucket unless it is there; several callers may do so at once."""
        if self.is_there():
            return
        with self.errors(f"make bucket {self.name}"):
            region = self.client.meta.region_name
            # us-east-1 is the one region that S3 refuses to see named; other stores know no names.
            where: dict[str, Any] = {"CreateBucketConfiguration": {"LocationConstraint": region}}
            for named in ({},) if region == "us-east-1" else (where, {}):
                try:
                    self.client.create_bucket(Bucket=self.name, **named)
                except ClientError as error:
                    if named and "LocationConstraint" in error_code(error):
                        continue
                    if error_code(error) not in {"BucketAlreadyOwnedByYou", "BucketAlreadyExists"}:
                        raise
                    self.client.head_bucket(Bucket=self.name)
                return

    def upload_file(
        self,
        path: Path,
        key: str,
        *,
        sha256: str | None = None,
        metadata: Mapping[str, str] | None = None,
        delete_damaged: bool = True,
    ) -> StoredObject:
        """Upload a file, read it back and compare; large files go in parts, and are logged.

        Args:
            path: The file.
            key: Key of the object; an existing object is replaced.
            sha256: SHA-256 that the file must have, which what is read back is held against; it is
                computed where it isn't given.
            metadata: Object metadata; ``sha256`` is always added.
            delete_damaged: Delete the object if something else is read back.

        Raises:
            DataError: If the file can't be read or hasn't the given SHA-256.
            ParameterError: If the metadata is not portable between stores.
            StoreError: If the store fails, or returns something else than was sent.
        """
        expected = sha256 or hash_file(path)
        write_id = secrets.token_hex(16)
        extra = _extra_args(expected, {**(metadata or {}), _WRITE_ID: write_id}, media_type(key))
        if path.stat().st_size < _TRANSFER.multipart_threshold:
            # Of what goes in parts the signature of each part holds one.
            extra |= _checksum(expected)
        try:
            with self.errors(f"upload {path} to {self.uri(key)}"):
                self.client.upload_file(
                    str(path),
                    self.name,
                    key,
                    ExtraArgs=extra,
                    Callback=_logged(path),
                    Config=_TRANSFER,
                )
            return self._verify(key, expected, write_id if delete_damaged else None)
        except StoreError as error:
            # Hashed again only now, so that a large file is read no more often than needed.
            if (found := hash_file(path)) != expected:
                raise DataError(
                    f"{path} has changed: expected SHA-256 {expected}, found {found}"
                ) from error
            raise

    def upload_bytes(
        self,
        data: bytes,
        key: str,
        *,
        if_absent: bool = False,
        lock_until: datetime | None = None,
    ) -> StoredObject:
        """Upload a small object, read it back and compare.

        Args:
            data: Content.
            key: Key of the object.
            if_absent: Refuse to replace an existing object, atomically.
            lock_until: Until when the store shall refuse to delete it (Object Lock, governance
                mode).

        Raises:
            ObjectExistsError: If ``if_absent`` and there is such an object.
            StoreError: If the store fails, does not keep the condition, or returns something else
                than was sent (it is deleted then, unless somebody else has written it).
        """
        sha256, write_id = hashlib.sha256(data).hexdigest(), secrets.token_hex(16)
        extra = _extra_args(sha256, {_WRITE_ID: write_id}, media_type(key))
        if lock_until is not None:
            extra |= {"ObjectLockMode": "GOVERNANCE", "ObjectLockRetainUntilDate": lock_until}
        if if_absent:
            self.prove_conditional_writes()
            extra["IfNoneMatch"] = "*"
        try:
            with self.errors(f"upload {self.uri(key)}"):
                self.client.put_object(
                    Bucket=self.name, Key=key, Body=data, **extra, **_checksum(sha256)
                )
        except ObjectExistsError:
            # A call whose answer was lost is repeated, and finds the object it has made itself.
            if not self._was_written(key, write_id):
                raise
        return self._verify(key, sha256, write_id)

    def prove_conditional_writes(self) -> None:
        """Prove that of several writers of one name the store takes one, and remember it there.

        Versions and the logs of aliases rest on it, and a store that ignores ``If-None-Match``
        takes every write without a word. A store at another address, or that calls itself otherwise
        in its answers (``Server``), is asked anew.

        Raises:
            StoreError: If the store fails, or takes more than one.
        """
        address = self.client.meta.endpoint_url
        if (address, self.name) in _PROVEN:
            return
        with self.errors(f"look what bucket {self.name} can do"):
            there = self.client.list_objects_v2(Bucket=self.name, Prefix=_PROOFS)
        server = there["ResponseMetadata"]["HTTPHeaders"].get("server", "")
        proof = _PROOFS + hashlib.sha256(f"{address} {server}".encode()).hexdigest()[:16]
        if proof not in (known["Key"] for known in there.get("Contents", ())):
            key = f"{proof}-{secrets.token_hex(8)}"
            with ThreadPoolExecutor(_RACERS) as pool:
                taken = sum(pool.map(lambda _: self._write_first(key), range(_RACERS)))
            found = (
                f"of {_RACERS} writes at once to {self.uri(key)}, each on condition that there is "
                f"no such object (If-None-Match: *), it took {taken}; expected one"
            )
            # moto's two steps are so close that few races show them.
            if lax := "Werkzeug" in server:
                found = f"{server} serves development: it looks for an object, then writes it"
            # None, if the answer to the one was lost and its repetition refused.
            if lax or taken > 1 or self._write_first(key):
                raise StoreError(
                    f"the store at {redact_url(address)} can't keep two releases apart: {found}. "
                    "Nothing was published. Use a store that honours conditional writes: Amazon "
                    "S3, Ceph, SeaweedFS or another"
                )
            self._write_first(proof)
            log.info("conditional writes proven", bucket=self.name, writers=_RACERS)
        _PROVEN.add((address, self.name))

    def _write_first(self, key: str) -> bool:
        """Write an empty object unless there is one; whether the store took it."""
        try:
            with self.errors(f"write {self.uri(key)} unless it is there"):
                self.client.put_object(Bucket=self.name, Key=key, IfNoneMatch="*")
        except ObjectExistsError:
            return False
        return True

    def claim_version(
        self,
        prefix: str,
        *,
        name: str,
        content: Callable[[str], bytes],
        now: datetime | None = None,
    ) -> str:
        """Claim a release folder ``{prefix}/v{YYYYMMDD_HHMMSS}/`` (UTC) that nobody else has.

        The folder belongs to whoever writes the object ``name`` into it first; a taken second is
        passed over for the next one.

        Args:
            prefix: Folder of the releases.
            name: The object that stakes the claim, e.g. ``"metadata.json"``.
            content: Gives that object's content for a version.
            now: Time of the release; the present by default.

        Returns:
            The version, e.g. ``"v20261120_143000"``.

        Raises:
            StoreError: If the store fails, or two minutes' worth of versions are taken.
        """
        start = now or datetime.now(UTC)
        for second in range(CLAIM_TRIES):
            version = f"v{(start + timedelta(seconds=second)).astimezone(UTC):%Y%m%d_%H%M%S}"
            try:
                self.upload_bytes(
                    content(version),
                    f"{prefix.strip('/')}/{version}/{name}",
                    if_absent=True,
                )
            except ObjectExistsError:
                continue
            log.info("version claimed", version=version, bucket=self.name)
            return version
        raise StoreError(
            f"no free version below {self.uri(prefix)}: the {CLAIM_TRIES} seconds from "
            f"{start:%Y-%m-%d %H:%M:%S} UTC are all taken"
        )

    def download_file(self, key: str, path: Path, *, sha256: str | None = None) -> str:
        """Download an object and check it; the file appears whole or not at all.

        Args:
            key: Key of the object.
            path: Where to; an existing file is replaced.
            sha256: SHA-256 to expect; the one recorded in the object's metadata by default.

        Returns:
            The SHA-256 of the file.

        Raises:
            StoreError: If the store fails or the content is not what was expected.
        """
        uri = self.uri(key)
        partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
        try:
            with partial.open("xb") as file:

                def save(answer: GetObjectOutputTypeDef) -> tuple[str, str]:
                    file.seek(0)
                    file.truncate()
                    found, _ = _hash_body(answer, file.write)
                    return found, answer["Metadata"].get("sha256", "")

                found, recorded = self._get(f"download {uri}", key, save)
            expected = sha256 or recorded or found
            if found != expected:
                raise StoreError(
                    f"{uri} is damaged: expected SHA-256 {expected}, found {found}; nothing was "
                    "kept"
                )
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return found

    def read_bytes(self, key: str, *, limit: int = MAX_READ_BYTES) -> bytes:
        """The content of a small object.

        Raises:
            MissingObjectError: If there is no such object.
            StoreError: If the store fails, or the object is larger than ``limit`` bytes.
        """
        content = self.read_start(key, limit + 1)
        if len(content) > limit:
            raise StoreError(
                f"{self.uri(key)} is not what it should be: expected at most {limit} bytes"
            )
        return content

    def read_start(self, key: str, most: int) -> bytes:
        """The first ``most`` bytes of an object, or all of one that is shorter.

        Raises:
            MissingObjectError: If there is no such object.
            StoreError: If the store fails.
        """

        def read(answer: GetObjectOutputTypeDef) -> bytes:
            body = answer["Body"]
            # The second read finds the end, where botocore compares the checksum.
            return body.read(most) + body.read(1)

        return self._get(f"read {self.uri(key)}", key, read)[:most]

    def read_range(self, key: str, offset: int, length: int, tag: str) -> bytes:
        """Some bytes of an object.

        Args:
            key: Key of the object.
            offset: Where the first of them is.
            length: How many, at least one; there must be so many.
            tag: The object's entity tag, as `list_objects` gave it; empty for any.

        Raises:
            DataError: If the object is another one by now, or does not have so many bytes there.
            StoreError: If the store fails.
        """
        uri = self.uri(key)
        wanted = f"bytes={offset}-{offset + length - 1}"
        conditions = {"Range": wanted} | ({"IfMatch": tag} if tag else {})
        try:
            found = self._get(
                f"read {wanted} of {uri}",
                key,
                # The second read finds the end, or that it has come too early.
                lambda answer: answer["Body"].read(length) + answer["Body"].read(1),
                **conditions,
            )
        except (MissingObjectError, ObjectExistsError) as error:
            raise DataError(
                f"{uri} was replaced or deleted while it was being read; let nothing write there, "
                "and run again"
            ) from error
        if len(found) != length:
            raise DataError(f"{uri}: expected {length} bytes from {offset} on, found {len(found)}")
        return found

    def read_json(self, key: str) -> Any:
        """The content of a JSON object.

        Raises:
            StoreError: If the store fails or the content is not JSON.
        """
        try:
            return json.loads(self.read_bytes(key))
        except ValueError as error:
            raise StoreError(f"{self.uri(key)} is not JSON: {error}") from error

    def head(self, key: str) -> StoredObject:
        """Size and recorded SHA-256 of an object, without its content."""
        there = self._head(key)
        return StoredObject(
            self.uri(key),
            self.name,
            key,
            there["ContentLength"],
            there["Metadata"].get("sha256", ""),
        )

    def exists(self, key: str) -> bool:
        """Whether there is such an object; a missing bucket counts as a missing object."""
        try:
            self._head(key)
        except MissingObjectError:
            return False
        return True

    def _head(self, key: str) -> HeadObjectOutputTypeDef:
        with self.errors(f"look at {self.uri(key)}"):
            return self.client.head_object(Bucket=self.name, Key=key)

    def list_keys(self, prefix: str) -> tuple[str, ...]:
        """The keys that begin with ``prefix``, sorted."""
        return tuple(sorted(self.list_objects(prefix)))

    def list_objects(self, prefix: str = "") -> dict[str, Listed]:
        """The objects whose keys begin with ``prefix``, by their keys."""
        return {
            o["Key"]: Listed(o["Key"], o["Size"], o.get("ETag", ""), o["LastModified"])
            for o in self._list(prefix)
        }

    def _list(self, prefix: str, **query: Any) -> Iterator[ObjectTypeDef]:
        with self.errors(f"list {self.uri(prefix)}"):
            pages = self.client.get_paginator("list_objects_v2").paginate(
                Bucket=self.name, Prefix=prefix, **query
            )
            for page in pages:
                yield from page.get("Contents", [])

    def list_versions(
        self, prefix: str, *, after: str = "", limit: int | None = None
    ) -> tuple[str, ...]:
        """The releases in ``prefix``, oldest first: the folders that hold a ``manifest.json``.

        With ``after`` or ``limit`` the store is asked for no more than that page, however many
        releases there are before and behind it.

        Args:
            prefix: Folder of the releases.
            after: Begin behind this version, e.g. ``"v20261120_143000"``, which need not exist; its
                beginning will do: ``"v20261120"`` begins with that day.
            limit: How many at most; None for all.

        Raises:
            StoreError: If the store fails.
        """
        folder = f"{prefix.strip('/')}/"
        # All versions begin with v, which leaves out the reports in failed/. No key within a
        # version's folder is behind its name with a 0, which comes next to the slash.
        start = f"{folder}{after}0" if after else f"{folder}v"
        listed = (o["Key"].removeprefix(folder) for o in self._list(folder, StartAfter=start))
        parts = (name.partition("/") for name in listed)
        return tuple(islice((version for version, _, name in parts if name == MANIFEST), limit))

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects; one that is gone is no error.

        Raises:
            StoreError: If the store fails or keeps an object.
        """
        # One by one: stores want another checksum each of a request for many.
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(self._delete, keys))

    def _delete(self, key: str) -> None:
        with self.errors(f"delete {self.uri(key)}"):
            self.client.delete_object(Bucket=self.name, Key=key)

    def copy(self, key: str, to_key: str) -> StoredObject:
        """Copy an object within the bucket, then read it back and compare.

        Raises:
            StoreError: If the store fails, or the copy differs from the recorded SHA-256 (the copy
                is deleted then).
        """
        with self.errors(f"copy {self.uri(key)} to {self.uri(to_key)}"):
            metadata = self._copy(key, to_key)
        expected = metadata.get("sha256") or self.hash_object(key)[0]
        return self._verify(to_key, expected, metadata.get(_WRITE_ID))

    def touch(self, key: str) -> None:
        """Date an object anew, by copying it onto itself within the store.

        Raises:
            StoreError: If the store fails.
        """
        with self.errors(f"date {self.uri(key)} anew"):
            self._copy(key, key)

    def _copy(self, key: str, to_key: str) -> dict[str, str]:
        """Copy an object with its metadata, and return the copy's; in parts where it is large."""
        there = self.client.head_object(Bucket=self.name, Key=key)
        # A copy in parts would lose the metadata, so it is always given anew.
        metadata = {**there["Metadata"], _WRITE_ID: secrets.token_hex(16)}
        extra: dict[str, Any] = {
            "Metadata": metadata,
            "MetadataDirective": "REPLACE",
            "ContentType": there.get("ContentType", "binary/octet-stream"),
        }
        source: CopySourceTypeDef = {"Bucket": self.name, "Key": key}
        if there["ContentLength"] < _TRANSFER.multipart_threshold:
            # `copy` would look at the object once more.
            self.client.copy_object(Bucket=self.name, Key=to_key, CopySource=source, **extra)
        else:
            self.client.copy(source, self.name, to_key, ExtraArgs=extra)
        return metadata

    def hash_object(self, key: str) -> tuple[str, int]:
        """SHA-256 in hexadecimal and length in bytes of an object's content, as read back."""
        return self._get(f"read back {self.uri(key)}", key, _hash_body)

    def _get(
        self, doing: str, key: str, read: Callable[[GetObjectOutputTypeDef], T], **conditions: str
    ) -> T:
        """Get an object and read it, again from its beginning where that breaks off on its way.

        botocore repeats a call until its answer begins, and no further.

        Args:
            doing: What is tried.
            key: Key of the object.
            read: Reads the body of the answer to its end; may be called several times.
            **conditions: Further arguments of ``get_object``, e.g. ``Range``.

        Returns:
            What ``read`` does.
        """
        wanted: dict[str, Any] = {"Bucket": self.name, "Key": key, **conditions}
        with self.errors(doing):
            for attempt in range(1, _READS):
                answer = self.client.get_object(**wanted)
                try:
                    return read(answer)
                except _BROKEN_OFF as error:
                    reason = type(error).__name__
                    log.warning(
                        "answer broke off", key=key, attempt=attempt, of=_READS, reason=reason
                    )
                time.sleep(random.uniform(0, 2**attempt))
            return read(self.client.get_object(**wanted))

    def _was_written(self, key: str, write_id: str) -> bool:
        try:
            return self._head(key)["Metadata"].get(_WRITE_ID) == write_id
        except MissingObjectError:
            # Somebody else's write may be under way, or be taken back already.
            return False

    def _verify(self, key: str, expected: str, write_id: str | None) -> StoredObject:
        """What was written, if it reads back so; else it is deleted, if it is from that write."""
        uri = self.uri(key)
        found, size = self.hash_object(key)
        if found != expected:
            # What is sent in parts has no checksum on its way back: a look may be damaged, not it.
            found, size = self.hash_object(key)
        if found != expected:
            if ours := write_id is not None and self._was_written(key, write_id):
                self._delete(key)
            raise StoreError(
                f"{uri} reads back differently: expected SHA-256 {expected}, found {found} "
                f"({size} bytes); {'it was deleted, ' if ours else ''}run again"
            )
        log.debug("object stored", uri=uri, size_bytes=size, sha256=found)
        return StoredObject(uri, self.name, key, size, found)


def _hash_body(
    answer: GetObjectOutputTypeDef, write: Callable[[bytes], object] = lambda chunk: None
) -> tuple[str, int]:
    """SHA-256 and length of what a store answers, of which each part is written somewhere."""
    digest, size = hashlib.sha256(), 0
    for chunk in answer["Body"].iter_chunks(_CHUNK_BYTES):
        digest.update(chunk)
        size += len(chunk)
        write(chunk)
    return digest.hexdigest(), size


def _logged(path: Path) -> Callable[[int], None]:
    """Log every tenth of a file that is sent in parts."""
    total, lock = max(1, path.stat().st_size), threading.Lock()
    sent = 0

    def count(size: int) -> None:
        nonlocal sent
        with lock:
            before, sent = sent, sent + size
            tenths = 10 * sent // total
            if total >= _TRANSFER.multipart_threshold and tenths > 10 * before // total:
                log.info("uploading", file=path.name, percent=10 * tenths, size_bytes=total)

    return count


def _extra_args(
    sha256: str, metadata: Mapping[str, str] | None, content_type: str
) -> dict[str, Any]:
    entries = {**(metadata or {}), "sha256": sha256}
    problems = [
        f"{name}={value!r}"
        for name, value in entries.items()
        if not re.fullmatch("[a-z0-9-]+", name) or not re.fullmatch("[!-~]([ -~]*[!-~])?", value)
    ]
    if problems:
        raise ParameterError(
            "object metadata must have keys of a-z, 0-9 and '-' and values of printable ASCII, "
            f"since stores rewrite others; found {', '.join(problems)}"
        )
    return {"Metadata": entries, "ContentType": content_type}


def _checksum(sha256: str) -> dict[str, Any]:
    """What lets a store check the content of a request: a header, where stores know no trailers."""
    return {"ChecksumSHA256": base64.b64encode(bytes.fromhex(sha256)).decode()}


_MEDIA_TYPES = {
    ".json": "application/json",
    ".html": "text/html; charset=utf-8",
    ".ipynb": "application/x-ipynb+json",
    ".sig": "application/vnd.dev.sigstore.bundle.v0.3+json",
}


def to_json(data: Mapping[str, Any]) -> bytes:
    """``data`` as readable JSON; NaN and Inf are refused, as JSON has neither."""
    return (json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def media_type(name: str) -> str:
    """Media type by suffix."""
    return _MEDIA_TYPES.get(Path(name).suffix, "application/octet-stream")
