"""Sharded arrays of a Zarr v3 group: one layout, written by Zarr and read at its offsets.

Zarr's own indexing takes about 3 ms for a row of a shard, several times what a batch of them takes
here. The layout is that of the core specification 3.0 with its codecs `sharding_indexed`, `bytes`
and `zstd`, https://zarr-specs.readthedocs.io/en/latest/v3/core/. Files that say anything else are
refused, so that nothing a file names is ever looked up or run.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from heimdall_onnx.errors import DataError, UnavailableError
from heimdall_onnx.untrusted import listed, shown

_SHARD_BYTES = 64 << 20  # before compression; also what is kept in memory of each array
_CHUNK_BYTES = 64 << 10
_MOST_CHUNK_ROWS = _MOST_CHUNKS = 4096  # in a chunk, in a shard
_MOST_HEADER_BYTES = 64 << 20
_READ_ROWS_BYTES = 8 << 20
_ABSENT = 2**64 - 1  # a chunk that holds nothing but the fill value

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
# fmt: off
Dtype = Literal[
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "float32", "float64", "complex64", "complex128",
]
# fmt: on
DTYPES = frozenset(get_args(Dtype))


class Strict(BaseModel):
    """Read from untrusted bytes: no type is converted into another."""

    model_config = ConfigDict(strict=True, frozen=True)


class ArraySpec(Strict):
    """What a dataset says of one of its arrays.

    Attributes:
        dtype: NumPy's name of the element type.
        shape: Samples first.
        sha256: SHA-256 of the values in C order, little-endian.
    """

    dtype: Dtype
    shape: tuple[Annotated[int, Field(ge=0)], ...]
    sha256: Sha256

    @property
    def row_bytes(self) -> int:
        """Bytes of one sample."""
        return math.prod(self.shape[1:]) * np.dtype(self.dtype).itemsize


class _Grid(Strict):
    chunk_shape: tuple[Annotated[int, Field(ge=1)], ...]


class _RegularGrid(Strict):
    name: Literal["regular"]
    configuration: _Grid


class _KeySeparator(Strict):
    separator: Literal["/"]


class _KeyEncoding(Strict):
    name: Literal["default"]
    configuration: _KeySeparator


class _Endian(Strict):
    endian: Literal["little"] = "little"


class _Bytes(Strict):
    name: Literal["bytes"]
    configuration: _Endian = _Endian()


class _Zstd(Strict):
    name: Literal["zstd"]


class _Crc(Strict):
    name: Literal["crc32c"]


class _Shards(_Grid):
    codecs: tuple[_Bytes, _Zstd]
    index_codecs: tuple[_Bytes, _Crc]
    index_location: Literal["end"]


class _Sharding(Strict):
    name: Literal["sharding_indexed"]
    configuration: _Shards


class _ArrayFile(Strict):
    """The one layout that is written, and so the only one that is read."""

    zarr_format: Literal[3]
    node_type: Literal["array"]
    shape: tuple[int, ...]
    data_type: Dtype
    chunk_grid: _RegularGrid
    chunk_key_encoding: _KeyEncoding
    codecs: tuple[_Sharding]
    storage_transformers: tuple[()] = ()


_File = TypeVar("_File", bound=Strict)


class ArrayWriter:
    """Appends rows to one array of a group, a whole shard at a time.

    Args:
        root: The open ``zarr.Group``.
        name: The array's name in it.
        like: Rows like those to come; their number does not matter.
    """

    def __init__(self, root: Any, name: str, like: npt.NDArray[Any]) -> None:
        from zarr.codecs import ZstdCodec

        self._row, self._dtype = like.shape[1:], like.dtype.newbyteorder("=")
        row_bytes = math.prod(self._row) * self._dtype.itemsize
        chunk, self._shard = _layout(row_bytes)
        self._array = root.create_array(
            name,
            shape=(0, *self._row),
            chunks=(chunk, *self._row),
            shards=(self._shard, *self._row),
            dtype=self._dtype,
            compressors=ZstdCodec(level=1, checksum=True),
            # A shard that is not there is then one that was lost.
            config={"write_empty_chunks": True},
        )
        self._waiting: list[npt.NDArray[Any]] = []
        self._rows = self._written = 0
        self._hash = hashlib.sha256()

    def append(self, rows: npt.NDArray[Any]) -> None:
        """Add rows; a copy is kept until their shard is written."""
        values = np.array(rows, self._dtype.newbyteorder("<"), order="C")
        self._hash.update(values.reshape(-1).view(np.uint8).data)
        while len(values):
            room = self._shard - (self._rows - self._written)
            self._waiting.append(values[:room])
            self._rows += len(values[:room])
            values = values[room:]
            if self._rows - self._written == self._shard:
                self._flush()

    def finish(self) -> dict[str, Any]:
        """Write what is left; returns what the header says of the array."""
        self._flush()
        shape = [self._rows, *self._row]
        return {"dtype": self._dtype.name, "shape": shape, "sha256": self._hash.hexdigest()}

    def describe(self) -> str:
        """Dtype and shape of a row."""
        return describe_rows(np.empty((0, *self._row), self._dtype))

    def _flush(self) -> None:
        if self._waiting:
            self._array.resize((self._rows, *self._row))
            self._array[self._written :] = np.concatenate(self._waiting)
            self._waiting, self._written = [], self._rows


class ArrayReader:
    """Reads rows of one sharded array at their offsets.

    Args:
        root: The dataset's folder.
        name: The array's name in it.
        spec: What the header says of the array.

    Raises:
        DataError: If its ``zarr.json`` says something else, or a shard is missing.
    """

    def __init__(self, root: Path, name: str, spec: ArraySpec) -> None:
        self._folder, self._name, self._root, self._spec = root / name, name, root, spec
        self._dtype, self._row = np.dtype(spec.dtype), spec.shape[1:]
        found = read_json(self._folder / "zarr.json", _ArrayFile, f"array {name}", root)
        inner = found.codecs[0].configuration.chunk_shape
        shard = found.chunk_grid.configuration.chunk_shape
        refuse(root, _array_problems(name, spec, found, inner, shard))
        self._chunk_rows, self._shard_rows = inner[0], shard[0]
        self._chunks = self._shard_rows // self._chunk_rows
        rest = ["0"] * len(self._row)
        self.shards = [
            self._folder.joinpath("c", str(number), *rest)
            for number in range(math.ceil(spec.shape[0] / self._shard_rows))
        ]
        lost = [p for p in self.shards if not p.is_file()]
        refuse(root, [f"{p.relative_to(root)} is missing" for p in lost])
        self._index = lru_cache(maxsize=1024)(self._read_index)

    def whole(self) -> npt.NDArray[Any]:
        """Every row."""
        return self.rows(np.arange(self._spec.shape[0]))

    def rows(self, wanted: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Rows in the order asked for; each chunk is read once.

        Raises:
            DataError: If an index is out of range, or a file is damaged or holds NaN or Inf.
        """
        count = self._spec.shape[0]
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < count):
            raise DataError(
                f"dataset {self._root} has the samples 0 to {count - 1}, asked for "
                f"{wanted.min()} to {wanted.max()}"
            )
        found = np.empty((len(wanted), *self._row), self._dtype)
        order = np.argsort(wanted, kind="stable")
        chunks = wanted[order] // self._chunk_rows
        starts = np.flatnonzero(np.diff(chunks, prepend=-1)).tolist()
        shards = chunks // self._chunks
        opened, file = -1, None
        try:
            for first, end in pairwise([*starts, len(order)]):
                if shards[first] != opened:
                    if file is not None:
                        file.close()
                    opened = int(shards[first])
                    file = self.shards[opened].open("rb", buffering=0)
                chunk = self._read_chunk(file, opened, int(chunks[first] % self._chunks))
                places = order[first:end]
                found[places] = chunk[wanted[places] % self._chunk_rows]
        except (OSError, RuntimeError, ValueError) as error:  # numcodecs raises the latter two
            raise DataError(
                f"dataset {self._root} is damaged: {self.shards[opened].relative_to(self._root)} "
                f"can't be read: {shown(str(error))}"
            ) from error
        finally:
            if file is not None:
                file.close()
        if found.dtype.kind in "fc" and not np.isfinite(found).all():
            finite = np.isfinite(found).reshape(len(found), -1).all(axis=1)
            raise DataError(
                f"dataset {self._root}: {self._name} has NaN or Inf, first in sample "
                f"{wanted[~finite].min()}"
            )
        return found

    def sha256(self) -> str:
        """SHA-256 of the values in C order, little-endian."""
        digest, count = hashlib.sha256(), self._spec.shape[0]
        step = max(1, _READ_ROWS_BYTES // max(1, self._spec.row_bytes))
        step = math.ceil(step / self._chunk_rows) * self._chunk_rows
        for start in range(0, count, step):
            part = self.rows(np.arange(start, min(start + step, count)))
            values = part.astype(self._dtype.newbyteorder("<"), copy=False)
            digest.update(values.reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    def _read_index(self, shard: int) -> npt.NDArray[np.uint64]:
        """Offset and length of each chunk of a shard (chunks, 2)."""
        from numcodecs.checksum32 import CRC32C  # type: ignore[import-untyped]

        length = 16 * self._chunks + 4
        with self.shards[shard].open("rb") as file:
            if file.seek(0, os.SEEK_END) < length:
                raise ValueError(f"it is shorter than its index of {length} bytes")
            file.seek(-length, os.SEEK_END)
            content = file.read(length)
        # The codec raises where the checksum at the end does not fit.
        return np.frombuffer(CRC32C(location="end").decode(content), "<u8").reshape(-1, 2)

    def _read_chunk(self, file: Any, shard: int, number: int) -> npt.NDArray[Any]:
        from numcodecs import zstd  # type: ignore[import-untyped]

        shape = (self._chunk_rows, *self._row)
        values = np.zeros(shape, self._dtype.newbyteorder("<"))
        offset, length = map(int, self._index(shard)[number])
        if offset == length == _ABSENT:
            return values
        size = os.fstat(file.fileno()).st_size
        if offset + length > size:
            raise ValueError(f"chunk {number} ends at byte {offset + length} of {size}")
        # Given where to write, the decoder refuses what is longer, whatever the frame claims.
        flat = values.reshape(-1).view(np.uint8)
        zstd.decompress(os.pread(file.fileno(), length, offset), flat)
        if values.dtype == np.bool_:
            np.not_equal(flat, 0, out=values.reshape(-1))
        return values


def import_zarr() -> Any:
    """The package Zarr.

    Raises:
        UnavailableError: If it is not installed; with the extra that brings it.
    """
    try:
        import zarr
    except ImportError as error:
        raise UnavailableError(
            "datasets need the package zarr: pip install 'heimdall-onnx[train]'"
        ) from error
    return zarr


def describe_rows(array: npt.NDArray[Any]) -> str:
    """Dtype and shape of the rows."""
    return f"{array.dtype.name} {array.shape[1:]} for each sample"


def refuse(path: Path, problems: Iterable[str]) -> None:
    """Raise if there are any problems with the dataset at ``path``.

    Raises:
        DataError: With all of them.
    """
    if found := list(problems):
        raise DataError(f"dataset {path} can't be used:" + listed(found))


def read_json(path: Path, kind: type[_File], what: str, root: Path) -> _File:
    """A ``zarr.json``, held against what it should be.

    Args:
        path: The file.
        kind: What it should be.
        what: What it describes, for the message.
        root: The dataset's folder.

    Raises:
        DataError: If it can't be read, or is something else; every difference is named.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_HEADER_BYTES + 1)
    except OSError as error:
        raise DataError(
            f"{what} can't be opened: {path} can't be read ({error.strerror}); expected a folder "
            "that `heimdall-onnx data` has written"
        ) from error
    if len(content) > _MOST_HEADER_BYTES:
        raise DataError(f"{what}: {path} is larger than {_MOST_HEADER_BYTES >> 20} MiB")
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        problems = [
            f"{shown('.'.join(map(str, e['loc'])) or 'content')}: {shown(e['msg'])}"
            for e in error.errors(include_url=False, include_context=False, include_input=False)
        ]
        raise DataError(
            f"dataset {root} can't be used: {path.relative_to(root)} is not what is written for a "
            "dataset:" + listed(problems)
        ) from None


def _layout(row_bytes: int) -> tuple[int, int]:
    """Rows of a chunk and of a shard."""
    size = max(row_bytes, 1)
    chunk = max(1, min(_MOST_CHUNK_ROWS, _CHUNK_BYTES // size))
    return chunk, chunk * max(1, min(_MOST_CHUNKS, _SHARD_BYTES // (chunk * size)))


def _array_problems(
    name: str,
    spec: ArraySpec,
    found: _ArrayFile,
    inner: tuple[int, ...],
    shard: tuple[int, ...],
) -> Iterator[str]:
    if (found.data_type, found.shape) != (spec.dtype, spec.shape):
        yield (
            f"{name} should be {spec.dtype} {spec.shape}, its zarr.json says {found.data_type} "
            f"{found.shape}"
        )
    elif (
        inner[1:] != spec.shape[1:]
        or shard[1:] != spec.shape[1:]
        or shard[0] % inner[0]
        or shard[0] // inner[0] > _MOST_CHUNKS
        or inner[0] * spec.row_bytes > max(_CHUNK_BYTES, spec.row_bytes)
    ):
        yield f"{name} has chunks {inner} in shards {shard}, which is not the layout of a dataset"
