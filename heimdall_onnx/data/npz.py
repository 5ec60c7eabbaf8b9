"""Arrays of an ``.npz`` file that are read row by row, however many rows there are.

NumPy reads an array of an ``.npz`` whole, and maps none of them. Here small arrays are read as
NumPy does it; of a large one only the header is kept, and its rows are read when asked for.
"""

from __future__ import annotations

import math
import os
import shutil
import struct
import tempfile
import weakref
import zipfile
from collections import Counter
from operator import itemgetter
from pathlib import Path
from tokenize import TokenError
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from heimdall_onnx.common.arrays import IN_MEMORY_BYTES, Rows

# Recordings and features shrink to a half or a third, and deflate makes nothing but repetitions
# a thousand times smaller.
_MOST_COMPRESSION = 200
_MOST_NAME = 200
_CHUNK_BYTES = 1 << 20
_LOCAL_HEADER = struct.Struct(
    "<26xHH"
)  # lengths of name and extra field, see PKWARE's APPNOTE 4.3.7
_MAGIC = np.lib.format.MAGIC_PREFIX
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class RowFile:
    """An array in a file, whose rows come into memory when they are indexed.

    Args:
        file: Closed when this is gone; read at offsets only, from any thread.
        offset: Where the first row begins.
        dtype: Element type.
        shape: Rows first.
    """

    finite = False

    def __init__(
        self, file: BinaryIO, offset: int, dtype: np.dtype[Any], shape: tuple[int, ...]
    ) -> None:
        self._file, self._offset, self._stamp = file, offset, _stamp(file)
        weakref.finalize(self, file.close)
        self.dtype, self.shape, self.ndim = dtype, shape, len(shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | npt.NDArray[np.integer[Any]]) -> npt.NDArray[Any]:
        """The rows of a slice without steps, or those at the given indices.

        Raises:
            OSError: If the file was changed since it was opened, or ends before them.
        """
        if _stamp(self._file) != self._stamp:
            raise OSError("the file was changed while its rows were being read")
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(len(self))
            return self._read(start, max(stop - start, 0))
        parts = [self._read(int(row), 1) for row in rows]
        return np.concatenate(parts) if parts else self._read(0, 0)

    def _read(self, start: int, count: int) -> npt.NDArray[Any]:
        array = np.empty((count, *self.shape[1:]), self.dtype)
        waiting = memoryview(array.reshape(-1).view(np.uint8).data)
        position = self._offset + start * (array.nbytes // count if count else 0)
        while waiting:
            done = os.preadv(self._file.fileno(), [waiting], position)
            if not done:
                raise OSError(f"the file ends before row {start + count} of {len(self)}")
            waiting, position = waiting[done:], position + done
        return array


def _stamp(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_mtime_ns, status.st_size


def read_npz(file: BinaryIO) -> dict[str, Rows]:
    """Every array in an open file by name: in memory up to 256 MiB altogether, then as `RowFile`.

    A large compressed array is first unpacked into a temporary file that nobody else sees.

    Raises:
        ValueError: If it is no ``.npz``, holds Python objects, which would run code, claims sizes
            that it does not have, or unpacks to something out of all proportion.
        OSError: If it can't be read.
        zipfile.BadZipFile: If it is damaged.
    """
    if file.read(len(_MAGIC)) == _MAGIC:
        raise ValueError("it is a single array (.npy)")
    arrays: dict[str, Rows] = {}
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        _check_members(members, os.fstat(file.fileno()).st_size)
        room = IN_MEMORY_BYTES
        for member in members:
            array = _member(file, archive, member, room)
            if array is not None:
                arrays[member.filename.removesuffix(".npy")] = array
            if isinstance(array, np.ndarray):
                room -= array.nbytes
    return arrays


def _check_members(members: list[zipfile.ZipInfo], size: int) -> None:
    """Refuse what is no data before any of it is unpacked."""
    names = [member.filename.removesuffix(".npy") for member in members]
    for name in names:
        if len(name) > _MOST_NAME or not name.isprintable():
            raise ValueError(f"it holds an array with a name that is none: {name[:40]!r}…")
    name, times = max(Counter(names).items(), key=itemgetter(1), default=("", 0))
    if times > 1:
        raise ValueError(f"it holds {name!r} {times} times")
    unpacked = sum(member.file_size for member in members)
    if unpacked > max(IN_MEMORY_BYTES, _MOST_COMPRESSION * size):
        raise ValueError(
            f"its {size:,} bytes would unpack to {unpacked:,}, more than {_MOST_COMPRESSION} times "
            "as much, which no data does; if these are data, write them with numpy.savez"
        )


def _member(
    file: BinaryIO, archive: zipfile.ZipFile, member: zipfile.ZipInfo, room: int
) -> Rows | None:
    with archive.open(member) as content:
        if content.read(len(_MAGIC)) != _MAGIC:
            return None  # something else than an array
        content.seek(0)
        version = np.lib.format.read_magic(content)
        if version not in _HEADERS:
            raise ValueError(f"{member.filename} has the .npy version {version}, not 1.0 or 2.0")
        try:
            shape, fortran, dtype = _HEADERS[version](content)
        except (MemoryError, RecursionError, SyntaxError, TokenError):  # Python's own parser's
            raise ValueError(f"{member.filename} has no readable header") from None
        header = content.tell()
        if not dtype.hasobject and (
            min(shape, default=0) < 0
            or math.prod(shape) * dtype.itemsize != member.file_size - header
        ):
            raise ValueError(
                f"{member.filename} claims the shape {shape} of {dtype}, which its "
                f"{member.file_size} bytes don't hold"
            )
        undivided = dtype.hasobject or not shape or (fortran and len(shape) > 1)
        if undivided or member.file_size <= room:
            # Objects are refused there; the others have no rows to be read by themselves.
            content.seek(0)
            return np.asarray(np.lib.format.read_array(content, allow_pickle=False))
        content.seek(0)
        if member.compress_type == zipfile.ZIP_STORED:
            with Path(os.devnull).open("wb") as nowhere:  # reading to the end checks the CRC
                shutil.copyfileobj(content, nowhere, _CHUNK_BYTES)
            own = os.fdopen(os.dup(file.fileno()), "rb")
            local = os.pread(own.fileno(), _LOCAL_HEADER.size, member.header_offset)
            name, extra = _LOCAL_HEADER.unpack(local)
            begin = member.header_offset + _LOCAL_HEADER.size + name + extra
            return RowFile(own, begin + header, dtype, shape)
        unpacked = tempfile.TemporaryFile(prefix="heimdall-npz-")  # noqa: SIM115 - lives on
        try:
            shutil.copyfileobj(content, unpacked, _CHUNK_BYTES)
            unpacked.flush()
        except OSError as error:
            unpacked.close()
            raise OSError(
                f"unpacking {member.filename} needs {member.file_size:,} bytes in "
                f"{tempfile.gettempdir()} ({error.strerror}); free them, set TMPDIR, or write the "
                "file with numpy.savez, which needs none"
            ) from error
        return RowFile(unpacked, header, dtype, shape)
