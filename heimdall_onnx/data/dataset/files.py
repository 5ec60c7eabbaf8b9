"""The files of a dataset, in a folder or in the bucket, read at offsets.

A file in the bucket is read by ranges of neighbouring bytes. Every file must be the one that was
there when the dataset was opened, by its entity tag in the bucket and by length and time of change
in a folder, in each process that the dataset is sent to: none is read half old, half new.
"""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heimdall_onnx.common.errors import DataError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

    from heimdall_onnx.services.store import Bucket

_S3 = "s3://"
Span = tuple[int, int]  # offset and length
# What lies this near together comes with one request, as long as it is no more than the most.
GAP_BYTES = 64 << 10
MOST_RANGE_BYTES = 8 << 20


class Files(ABC):
    """Where the files of a dataset are; pickled, it is opened by each process anew.

    Attributes:
        address: Path of the folder, or ``s3://bucket/folder``.
    """

    address: str

    @cached_property
    def seen(self) -> dict[str, tuple[int, Any]]:
        """Length and stamp of the files when first asked for; who is sent this has it too.

        The stamp tells a file from another one of its name.
        """
        return self._list()

    def missing(self, names: Sequence[str]) -> list[str]:
        """Those of the files that are not there; the others are in `seen` from now on."""
        return [name for name in names if name not in self.seen]

    @abstractmethod
    def content(self, name: str, limit: int) -> bytes:
        """A small file, or its first ``limit`` bytes.

        Raises:
            OSError: If there is none, or it can't be read.
            StoreError: If the store fails.
        """

    @abstractmethod
    def read(self, name: str, spans: Sequence[Span]) -> Generator[bytes]:
        """The bytes of some spans of a file, one after the other.

        Raises:
            DataError: If it is not the file that was there at first.
            OSError: If there is none, or it can't be read.
            StoreError: If the store fails.
        """

    @abstractmethod
    def _list(self) -> dict[str, tuple[int, Any]]: ...


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


class _FolderFiles(Files):
    """A dataset's files in a folder."""

    def __init__(self, address: str) -> None:
        self.address = address

    def content(self, name: str, limit: int) -> bytes:
        with Path(self.address, name).open("rb") as file:
            return file.read(limit)

    def read(self, name: str, spans: Sequence[Span]) -> Generator[bytes]:
        with Path(self.address, name).open("rb", buffering=0) as file:
            if self.seen[name] != _stamped(os.fstat(file.fileno())):
                raise DataError(
                    f"{self.address}/{name} is not the file that was there when the dataset was "
                    "opened: let nothing write there, and where several machines read it, let them "
                    "see one folder or read it from the bucket"
                )
            for offset, length in spans:
                yield os.pread(file.fileno(), length, offset)

    def missing(self, names: Sequence[str]) -> list[str]:
        for name in super().missing(names):
            with contextlib.suppress(OSError):
                if (path := Path(self.address, name)).is_file():
                    self.seen[name] = _stamped(path.stat())
        return super().missing(names)

    def _list(self) -> dict[str, tuple[int, Any]]:
        # Each is looked up when it is asked for: links may lead anywhere, and in circles.
        return {}


def _stamped(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


class _BucketFiles(Files):
    """A dataset's files in the bucket.

    Args:
        name: The bucket's name.
        folder: What their keys begin with, without a slash at its end.
        client: Client of the store; None for one of the environment's.
    """

    def __init__(self, name: str, folder: str, client: S3Client | None) -> None:
        self._name, self._folder, self._client = name, folder, client
        self.address = f"{_S3}{name}/{folder}"

    def __getstate__(self) -> dict[str, Any]:
        # A client does not go to another process.
        return {n: v for n, v in vars(self).items() if n != "bucket"} | {"_client": None}

    @cached_property
    def bucket(self) -> Bucket:
        """The bucket."""
        # Imported here, as boto3 takes half a second that readers of folders do without.
        from heimdall_onnx.services.connection import open_for_reading
        from heimdall_onnx.services.store import Bucket

        return Bucket(self._client or open_for_reading().client, self._name)

    def content(self, name: str, limit: int) -> bytes:
        if name not in self.seen:
            raise FileNotFoundError(2, "there is no such object", name)
        return next(self.read(name, [(0, min(limit, self.seen[name][0]))]))

    def read(self, name: str, spans: Sequence[Span]) -> Generator[bytes]:
        key, (_, tag) = f"{self._folder}/{name}", self.seen[name]
        ranges, start, held = list(joined_spans(spans)), 0, b""
        for offset, length in spans:
            if not start <= offset <= offset + length <= start + len(held):
                start, size = next(r for r in ranges if r[0] <= offset <= r[0] + r[1] - length)
                # HTTP knows no empty range.
                held = self.bucket.read_range(key, start, size, tag) if size else b""
            yield held[offset - start : offset - start + length]

    def _list(self) -> dict[str, tuple[int, Any]]:
        prefix = f"{self._folder}/"
        found = self.bucket.list_objects(prefix) if self.bucket.is_there() else {}
        return {key.removeprefix(prefix): (o.size, o.tag) for key, o in found.items()}


def joined_spans(spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Ascending spans, with neighbours made one."""
    start = end = -1
    for offset, length in sorted(spans):
        near = start >= 0 and offset - end <= GAP_BYTES
        if near and offset + length - start <= MOST_RANGE_BYTES:
            end = max(end, offset + length)
            continue
        if start >= 0:
            yield start, end - start
        start, end = offset, offset + length
    if start >= 0:
        yield start, end - start
