"""The files of a dataset, in a folder or in the bucket, read at offsets.

A file in the bucket is read by ranges of neighbouring bytes. Every file must be the one that was
there when the dataset was opened, by its entity tag in the bucket and by length and time of change
in a folder, in each process that the dataset is sent to: none is read half old, half new.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from heimdall_onnx.common.errors import DataError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

    from heimdall_onnx.services.store import Bucket

_S3 = "s3://"
Span = tuple[int, int]  # offset and length
# What lies this near together comes with one request, as long as it is no more than the most.
_GAP_BYTES = 64 << 10
_MOST_RANGE_BYTES = 8 << 20


class Files(Protocol):
    """Where the files of a dataset are; can be pickled, and is then opened by each process anew."""

    @property
    def address(self) -> str:
        """Path of the folder, or ``s3://bucket/folder``."""
        ...

    def content(self, name: str, limit: int) -> bytes:
        """A small file, or its first ``limit`` bytes.

        Raises:
            OSError: If there is none, or it can't be read.
            StoreError: If the store fails.
        """
        ...

    def sizes(self) -> dict[str, int]:
        """Length in bytes of every file by its name."""
        ...

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of ``names`` that are not there; the others are the ones to be read from now on."""
        ...

    def size(self, name: str) -> int:
        """Length in bytes of a file that `missing` has seen."""
        ...

    def read(self, name: str, spans: Sequence[Span]) -> Generator[bytes]:
        """The bytes of some spans of a file, one after the other.

        Raises:
            DataError: If it is not the file that `missing` has seen.
            OSError: If there is none, or it can't be read.
            StoreError: If the store fails.
        """
        ...


def files_at(address: Path | str, client: S3Client | None = None) -> Files:
    """The files in a folder, or below an address ``s3://bucket/folder``.

    Args:
        address: Folder or address.
        client: Client of the store; by default, and in every process that this is sent to, one of
            the environment's.

    Raises:
        DataError: If it is the address of no folder.
    """
    text = str(address)
    if not text.startswith(_S3):
        return _FolderFiles(text)
    bucket, _, folder = text.removeprefix(_S3).partition("/")
    # Some stores take a doubled slash for one, others do not.
    if not bucket or not folder.strip("/") or "//" in folder:
        raise DataError(f"expected the address of a dataset, s3://bucket/folder, found {text!r}")
    return _BucketFiles(bucket, folder.strip("/"), client)


@dataclass(frozen=True)
class _FolderFiles:
    """A dataset's files in a folder."""

    address: str
    # Length and time of change of each file that was seen.
    stamps: dict[str, tuple[int, int]] = field(default_factory=dict, repr=False, compare=False)

    def content(self, name: str, limit: int) -> bytes:
        with self._path(name).open("rb") as file:
            return file.read(limit)

    def sizes(self) -> dict[str, int]:
        root = Path(self.address)
        return {
            str(path.relative_to(root)): path.stat().st_size
            for path in sorted(root.rglob("*"))
            if path.is_file()
        }

    def missing(self, names: Iterable[str]) -> list[str]:
        lost = []
        for name in names:
            try:
                status = self._path(name).stat()
            except OSError:
                lost.append(name)
            else:
                self.stamps.setdefault(name, (status.st_size, status.st_mtime_ns))
        return lost

    def size(self, name: str) -> int:
        return self.stamps[name][0]

    def read(self, name: str, spans: Sequence[Span]) -> Generator[bytes]:
        with self._path(name).open("rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if self.stamps[name] != (status.st_size, status.st_mtime_ns):
                raise DataError(
                    f"{self.address}/{name} is not the file that was there when the dataset was "
                    "opened: let nothing write there, and where several machines read it, let them "
                    "see one folder or read it from the bucket"
                )
            for offset, length in spans:
                yield os.pread(file.fileno(), length, offset)

    def _path(self, name: str) -> Path:
        return Path(self.address, name)


@dataclass(frozen=True)
class _BucketFiles:
    """A dataset's files in the bucket.

    Attributes:
        name: The bucket's name.
        folder: What their keys begin with, without a slash at its end.
        given: Client of the store; None for one of the environment's.
        listed: Length and entity tag of each file, as they were when it was opened.
    """

    name: str
    folder: str
    given: S3Client | None = field(default=None, repr=False, compare=False)
    listed: dict[str, tuple[int, str]] = field(default_factory=dict, repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        # A client does not go to another process.
        return _BucketFiles, (self.name, self.folder, None, self.listed)

    @property
    def address(self) -> str:
        return f"{_S3}{self.name}/{self.folder}"

    @cached_property
    def bucket(self) -> Bucket:
        """The bucket."""
        # Imported here, as boto3 takes half a second that readers of folders do without.
        from heimdall_onnx.services.client import make_client
        from heimdall_onnx.services.embedded import ensure_store
        from heimdall_onnx.services.settings import Settings
        from heimdall_onnx.services.store import Bucket

        return Bucket(self.given or make_client(ensure_store(Settings.load())), self.name)

    def content(self, name: str, limit: int) -> bytes:
        if name not in self._known():
            raise FileNotFoundError(2, "there is no such object", name)
        return next(self.read(name, [(0, min(limit, self.size(name)))]))

    def sizes(self) -> dict[str, int]:
        return {name: size for name, (size, _) in self._known().items()}

    def missing(self, names: Iterable[str]) -> list[str]:
        known = self._known()
        return [name for name in names if name not in known]

    def size(self, name: str) -> int:
        return self._known()[name][0]

    def read(self, name: str, spans: Sequence[Span]) -> Generator[bytes]:
        _, tag = self._known()[name]
        ranges, start, held = list(_joined(spans)), 0, b""
        for offset, length in spans:
            if not start <= offset <= offset + length <= start + len(held):
                start, size = next(r for r in ranges if r[0] <= offset <= r[0] + r[1] - length)
                # HTTP knows no empty range.
                held = self.bucket.read_range(self.key(name), start, size, tag) if size else b""
            yield held[offset - start : offset - start + length]

    def key(self, name: str) -> str:
        """The key of a file."""
        return f"{self.folder}/{name}"

    def _known(self) -> dict[str, tuple[int, str]]:
        if not self.listed:
            prefix = f"{self.folder}/"
            found = self.bucket.list_objects(prefix) if self.bucket.is_there() else {}
            self.listed.update({k.removeprefix(prefix): (o.size, o.tag) for k, o in found.items()})
        return self.listed


def _joined(spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Ascending spans, with neighbours made one."""
    start = end = -1
    for offset, length in sorted(spans):
        near = start >= 0 and offset - end <= _GAP_BYTES
        if near and offset + length - start <= _MOST_RANGE_BYTES:
            end = max(end, offset + length)
            continue
        if start >= 0:
            yield start, end - start
        start, end = offset, offset + length
    if start >= 0:
        yield start, end - start
