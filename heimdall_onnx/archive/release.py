"""A release that is there, as one handle: its objects, and what is read of it once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from heimdall_onnx.archive.manifest import REPORT, Entry, Manifest, Variant, read_manifest
from heimdall_onnx.archive.record import Record, require_record
from heimdall_onnx.common.errors import VerificationError
from heimdall_onnx.common.files import hash_file
from heimdall_onnx.common.parameters import MODEL
from heimdall_onnx.services.connection import Connection
from heimdall_onnx.services.store import MAX_READ_BYTES, Bucket


@dataclass(frozen=True, eq=False)
class Release:
    """A release in its bucket; whether it verifies is another question.

    Attributes:
        connection: Store and registry.
        bucket: Its bucket.
        folder: Its folder in the bucket, without a slash at its end.
    """

    connection: Connection
    bucket: Bucket
    folder: str

    @classmethod
    def at(cls, connection: Connection, uri: str) -> Release:
        """The release at ``s3://bucket/prefix/version``, which need not be there."""
        bucket, folder = connection.locate(uri)
        return cls(connection, bucket, folder.rstrip("/"))

    @property
    def uri(self) -> str:
        """Its folder's address."""
        return self.bucket.uri(self.folder)

    @cached_property
    def manifest(self) -> Manifest:
        """Its manifest, read once.

        Raises:
            VerificationError: If there is none, or it is not one of a release with a model.
            StoreError: If the store can't be reached or refuses.
        """
        return read_manifest(self.bucket, self.folder)

    @cached_property
    def stored_report(self) -> bytes:
        """The executed notebook as it is in the store, read once; see `report`.

        Of one that is larger than the manifest says there is one byte more than that.

        Raises:
            VerificationError: If the manifest says that it is larger than what is read of one.
            StoreError: If the store can't be reached or refuses.
        """
        entry = self.manifest.objects.get(REPORT)
        size = MAX_READ_BYTES if entry is None else entry.size
        if size > MAX_READ_BYTES:
            raise VerificationError(f"{self.uri}/{REPORT} is larger than {MAX_READ_BYTES:,} bytes")
        return self.bucket.read_start(f"{self.folder}/{REPORT}", size + 1)

    @property
    def report(self) -> bytes:
        """The executed notebook, which is the one that the manifest names.

        Raises:
            VerificationError: If the manifest names none, or what is there is another one.
            StoreError: If the store can't be reached or refuses.
        """
        entry = self.manifest.objects.get(REPORT)
        if entry is None:
            raise VerificationError(f"{self.uri} has no {REPORT}")
        found = hashlib.sha256(self.stored_report).hexdigest()
        if found != entry.sha256:
            raise VerificationError(
                f"{self.uri}/{REPORT} is not what was released: expected SHA-256 {entry.sha256}, "
                f"found {found}"
            )
        return self.stored_report

    @cached_property
    def record(self) -> Record:
        """What the notebook has recorded.

        Raises:
            VerificationError: If the report is missing, another one, or has no record of a release.
            StoreError: If the store can't be reached or refuses.
        """
        return require_record(self.report, f"{self.uri}/{REPORT}")

    def fetch(self, entry: Entry, path: Path) -> Path:
        """Bring one of its objects to ``path``, checked.

        Raises:
            StoreError: If the store fails, or the object is not what the manifest says.
        """
        self.bucket.download_file(entry.key, path, sha256=entry.sha256)
        return path

    def fetch_model(self, variant: Variant, cache: Path) -> tuple[Path, dict[str, str]]:
        """Bring a model into ``cache``, checked against the manifest, which may itself be wrong.

        Returns:
            Its file, and the SHA-256 of each of its files by name within the release's folder.

        Raises:
            VerificationError: If a file is not what the manifest says.
            StoreError: If the store can't be reached or refuses.
        """
        # Named as in a folder of their own, where external data are looked for.
        files = {n.rpartition("/")[2]: (e.key, e.sha256) for n, e in variant.files.items()}
        path = fetch_files(self.bucket, files, cache)
        return path, {name: entry.sha256 for name, entry in variant.files.items()}


def fetch_files(bucket: Bucket, files: Mapping[str, tuple[str, str]], cache: Path) -> Path:
    """Bring a model's files, key and SHA-256 by name, into ``cache``, checked; gives its path."""
    # Two models may share a graph and differ in their external data.
    own = [files[name][1] for name in sorted(files, key=lambda name: (name != MODEL, name))]
    if len(own) > 1:
        own = [hashlib.sha256("".join(own).encode()).hexdigest()]
    folder = cache / own[0]
    folder.mkdir(parents=True, exist_ok=True)
    for name, (key, wanted) in files.items():
        target = folder / name
        if not (target.is_file() and hash_file(target) == wanted):
            found = bucket.download_file(key, target, sha256=None)
            if found != wanted:
                target.unlink()
                raise VerificationError(
                    f"{bucket.uri(key)} is not what was recorded: expected SHA-256 {wanted}, "
                    f"found {found}"
                )
    return folder / MODEL
