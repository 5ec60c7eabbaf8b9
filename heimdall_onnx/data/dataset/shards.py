"""Sharded arrays of a Zarr v3 group: one layout, written by Zarr and read at its offsets.

Zarr's own indexing takes about 3 ms for a row of a shard, several times what a batch of them takes
here. The layout is that of the core specification 3.0 with its codecs `sharding_indexed`, `bytes`
and `zstd`, https://zarr-specs.readthedocs.io/en/latest/v3/core/. Files that say anything else are
refused, so that nothing a file names is ever looked up or run.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import math
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from heimdall_onnx.common.arrays import parts
from heimdall_onnx.common.errors import DataError, HeimdallError, UnavailableError
from heimdall_onnx.common.text import listed, shown
from heimdall_onnx.data.dataset.files import Files, Span

SHARD_BYTES = 64 << 20  # before compression; also what is kept in memory of each array
CHUNK_BYTES = 64 << 10
_MOST_CHUNK_ROWS = _MOST_CHUNKS = 4096  # in a chunk, in a shard
_MOST_HEADER_BYTES = 64 << 20
_MOST_INDICES = 1024  # of shards, kept in memory; 64 KiB each at most
_ABSENT = 2**64 - 1  # a chunk that holds nothing but the fill value

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
# fmt: off
Dtype = Literal[
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "float32", "float64", "complex64", "complex128",
]
# fmt: on
DTYPES = frozenset(get_args(Dtype))
# Where a ``zarr.json`` need not say it, it means what is written here.
_OPTIONAL = frozenset({"configuration", "endian", "storage_transformers"})


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


_JSON_OBJECT = TypeAdapter(dict[str, Any])
_File = TypeVar("_File")


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

    def _flush(self) -> None:
        if self._waiting:
            self._array.resize((self._rows, *self._row))
            self._array[self._written :] = np.concatenate(self._waiting)
            self._waiting, self._written = [], self._rows


class ArrayReader:
    """Reads rows of one sharded array at their offsets; indexed, it gives rows as an array does.

    Args:
        files: The dataset's.
        name: The array's name in it.
        spec: What the header says of the array.

    Attributes:
        dtype: Element type.
        shape: Rows first.
        ndim: Number of axes.
        shard_rows: Rows of a shard.
        shards: Names of the files that hold the values.

    Raises:
        DataError: If its ``zarr.json`` says something else, or a shard is missing.
    """

    def __init__(self, files: Files, name: str, spec: ArraySpec) -> None:
        self._files, self._name, self._root, self._spec = files, name, files.address, spec
        self.dtype, self.shape, self.ndim = np.dtype(spec.dtype), spec.shape, len(spec.shape)
        self._row = spec.shape[1:]
        found = read_zarr(files, f"{name}/zarr.json", _JSON_OBJECT, f"array {name}")
        self._chunk_rows, self.shard_rows = _rows_of(found)
        refuse(self._root, _array_problems(name, spec, found, self._chunk_rows, self.shard_rows))
        self._chunks = self.shard_rows // self._chunk_rows
        rest = "/0" * len(self._row)
        self.shards = [
            f"{name}/c/{number}{rest}"
            for number in range(math.ceil(spec.shape[0] / self.shard_rows))
        ]
        refuse(self._root, [f"{lost} is missing" for lost in files.missing(self.shards)])
        self._zstd = import_extra("numcodecs.zstd")
        # Of a function that does not hold this reader, which would be kept by its own indices.
        self._index = lru_cache(_MOST_INDICES)(partial(_read_index, files, self._chunks))

    def __reduce__(self) -> tuple[Any, ...]:
        # Without the indices that were read.
        return ArrayReader, (self._files, self._name, self._spec)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | npt.NDArray[np.integer[Any]]) -> npt.NDArray[Any]:
        """The rows of a slice without steps, or those at the given indices, as `rows`."""
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(len(self))
            return self.rows(np.arange(start, max(start, stop)))
        return self.rows(np.asarray(rows, np.int64))

    def rows(self, wanted: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Rows in the order asked for; each chunk is read once.

        Raises:
            DataError: If an index is out of range, or a file is damaged or holds NaN or Inf.
            StoreError: If the store fails.
        """
        count = len(self)
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < count):
            raise DataError(
                f"dataset {self._root} has the samples 0 to {count - 1}, asked for "
                f"{wanted.min()} to {wanted.max()}"
            )
        found = np.empty((len(wanted), *self._row), self.dtype)
        order = np.argsort(wanted, kind="stable")
        chunks = wanted[order] // self._chunk_rows
        starts = np.flatnonzero(np.diff(chunks, prepend=-1)).tolist()
        # One after the other: where the rows of a chunk lie in `order`, by shard.
        by_shard: dict[int, list[tuple[int, int, int]]] = {}
        for first, end in pairwise([*starts, len(order)]):
            shard, number = divmod(int(chunks[first]), self._chunks)
            by_shard.setdefault(shard, []).append((number, first, end))
        for shard, wanted_of in by_shard.items():
            for at, chunk in self._read_chunks(shard, [number for number, _, _ in wanted_of]):
                _, first, end = wanted_of[at]
                places = order[first:end]
                found[places] = chunk[wanted[places] % self._chunk_rows]
        if found.dtype.kind in "fc" and not np.isfinite(found).all():
            finite = np.isfinite(found).reshape(len(found), -1).all(axis=1)
            raise DataError(
                f"dataset {self._root}: {self._name} has NaN or Inf, first in sample "
                f"{wanted[~finite].min()}"
            )
        return found

    def sha256(self) -> str:
        """SHA-256 of the values in C order, little-endian."""
        digest = hashlib.sha256()
        for _, part in parts(self):
            values = part.astype(self.dtype.newbyteorder("<"), copy=False)
            digest.update(values.reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    def _read_chunks(
        self, shard: int, numbers: list[int]
    ) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """The chunks of a shard at ``numbers``, each with its place among them."""
        try:
            spans = [self._span(shard, number) for number in numbers]
            filled = [span for span in spans if span is not None]
            with contextlib.closing(self._files.read(self.shards[shard], filled)) as contents:
                for place, span in enumerate(spans):
                    yield place, self._decoded(None if span is None else next(contents))
        except HeimdallError:
            raise
        except (OSError, RuntimeError, ValueError) as error:  # numcodecs raises the latter two
            raise DataError(
                f"dataset {self._root} is damaged: {self.shards[shard]} can't be read: "
                f"{shown(str(error))}"
            ) from error

    def _span(self, shard: int, number: int) -> Span | None:
        """Where a chunk is, offset and length; None for one that holds nothing but zeros."""
        offset, length = map(int, self._index(self.shards[shard])[number])
        if offset == length == _ABSENT:
            return None
        if offset + length > (size := self._files.seen[self.shards[shard]][0]):
            raise ValueError(f"chunk {number} ends at byte {offset + length} of {size}")
        return offset, length

    def _decoded(self, content: bytes | None) -> npt.NDArray[Any]:
        values = np.zeros((self._chunk_rows, *self._row), self.dtype.newbyteorder("<"))
        if content is None:
            return values
        # Given where to write, the decoder refuses what is longer, whatever the frame claims.
        flat = values.reshape(-1).view(np.uint8)
        self._zstd.decompress(content, flat)
        if values.dtype == np.bool_:
            np.not_equal(flat, 0, out=values.reshape(-1))
        return values


def _read_index(files: Files, chunks: int, name: str) -> npt.NDArray[np.uint64]:
    """Offset and length of each chunk of a shard (chunks, 2)."""
    size, length = files.seen[name][0], 16 * chunks + 4
    if size < length:
        raise ValueError(f"it is shorter than its index of {length} bytes")
    (content,) = files.read(name, [(size - length, length)])
    # The codec raises where the checksum at the end does not fit.
    codec = import_extra("numcodecs.checksum32").CRC32C(location="end")
    return np.frombuffer(codec.decode(content), "<u8").reshape(-1, 2)


def import_extra(name: str) -> Any:
    """A module that datasets need, of a package that not everybody has.

    Raises:
        UnavailableError: If it is not installed; with the extra that brings it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnavailableError(
            f"datasets need the package {name.partition('.')[0]}: pip install "
            "'heimdall-onnx[train]'"
        ) from error


def describe_rows(array: npt.NDArray[Any]) -> str:
    """Dtype and shape of the rows."""
    return f"{array.dtype.name} {array.shape[1:]} for each sample"


def refuse(address: Path | str, problems: Iterable[str]) -> None:
    """Raise if there are any problems with the dataset at ``address``.

    Raises:
        DataError: With all of them.
    """
    if found := list(problems):
        raise DataError(f"dataset {address} can't be used:" + listed(found))


def read_zarr(files: Files, name: str, kind: TypeAdapter[_File], what: str) -> _File:
    """A ``zarr.json``, held against what it should be.

    Args:
        files: The dataset's.
        name: Of the file.
        kind: What it should be.
        what: What it describes, for the message.

    Raises:
        DataError: If it can't be read, or is something else; every difference is named.
        StoreError: If the store fails.
    """
    place = f"{files.address}/{name}"
    try:
        content = files.content(name, _MOST_HEADER_BYTES + 1)
    except OSError as error:
        raise DataError(
            f"{what} can't be opened: {place} can't be read ({error.strerror}); expected a folder "
            "that `heimdall-onnx data` has written"
        ) from error
    if len(content) > _MOST_HEADER_BYTES:
        raise DataError(f"{what}: {place} is larger than {_MOST_HEADER_BYTES >> 20} MiB")
    try:
        return kind.validate_json(content)
    except ValidationError as error:
        problems = [
            f"{shown('.'.join(map(str, e['loc'])) or 'content')}: {shown(e['msg'])}"
            for e in error.errors(include_url=False, include_context=False, include_input=False)
        ]
        raise DataError(
            f"dataset {files.address} can't be used: {name} is not what is written for a "
            "dataset:" + listed(problems)
        ) from None


def _layout(row_bytes: int) -> tuple[int, int]:
    """Rows of a chunk and of a shard."""
    size = max(row_bytes, 1)
    chunk = max(1, min(_MOST_CHUNK_ROWS, CHUNK_BYTES // size))
    return chunk, chunk * max(1, min(_MOST_CHUNKS, SHARD_BYTES // (chunk * size)))


def _rows_of(found: dict[str, Any]) -> tuple[int, int]:
    """Rows of a chunk and of a shard, as a ``zarr.json`` has them; zeros where it has none."""
    try:
        chunk = found["codecs"][0]["configuration"]["chunk_shape"][0]
        shard = found["chunk_grid"]["configuration"]["chunk_shape"][0]
    except (LookupError, TypeError):
        return 0, 0
    return (chunk, shard) if type(chunk) is type(shard) is int else (0, 0)


def _array_problems(
    name: str, spec: ArraySpec, found: dict[str, Any], chunk: int, shard: int
) -> Iterator[str]:
    if (found.get("data_type"), found.get("shape")) != (spec.dtype, [*spec.shape]):
        yield (
            f"{name} should be {spec.dtype} {spec.shape}, its zarr.json says "
            f"{shown(found.get('data_type'))} {shown(found.get('shape'))}"
        )
    elif (
        chunk < 1
        or shard % chunk
        or not chunk <= shard <= chunk * _MOST_CHUNKS
        or chunk * spec.row_bytes > max(CHUNK_BYTES, spec.row_bytes)
    ):
        yield f"{name} has chunks of {chunk} rows in shards of {shard}, no layout of a dataset"
    else:
        yield from _differences(_zarr_json(spec, chunk, shard), found, name)


def _zarr_json(spec: ArraySpec, chunk: int, shard: int) -> dict[str, Any]:
    """The one layout that is written, and so the only one that is read."""
    order = {"configuration": {"endian": "little"}}
    values = {"name": "bytes", **(order if np.dtype(spec.dtype).itemsize > 1 else {})}
    sharding = {
        "chunk_shape": [chunk, *spec.shape[1:]],
        "codecs": [values, {"name": "zstd"}],
        "index_codecs": [{"name": "bytes", **order}, {"name": "crc32c"}],
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [shard, *spec.shape[1:]]},
        },
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "storage_transformers": [],
    }


def _differences(expected: Any, found: Any, where: str) -> Iterator[str]:
    """Where ``found`` says something else; what only it says is of no consequence."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for name, value in expected.items():
            if name in found or name not in _OPTIONAL:
                yield from _differences(value, found.get(name), f"{where}.{name}")
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for number, (value, other) in enumerate(zip(expected, found, strict=True)):
            yield from _differences(value, other, f"{where}.{number}")
    elif expected != found:
        yield f"{where} should be {expected!r}, found {shown(found)}"
