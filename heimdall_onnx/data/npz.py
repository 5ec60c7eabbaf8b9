"""Arrays of an ``.npz`` file, however many rows there are.

NumPy reads an array of an ``.npz`` whole, and maps none of them. Here small arrays are read as
NumPy does it; a large one is unpacked into a temporary file that nobody else sees, and mapped.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import zipfile
from collections import Counter
from operator import itemgetter
from tokenize import TokenError
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt

from heimdall_onnx.common.arrays import IN_MEMORY_BYTES, Arrays

# Recordings and features shrink to a half or a third, and deflate makes nothing but repetitions
# a thousand times smaller.
_MOST_COMPRESSION = 200
_MOST_NAME = 200
_CHUNK_BYTES = 1 << 20
_MAGIC = np.lib.format.MAGIC_PREFIX
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def read_npz(file: BinaryIO) -> Arrays:
    """Every array in an open file by name: in memory up to 256 MiB altogether, then mapped.

    Raises:
        ValueError: If it is no ``.npz``, holds Python objects, which would run code, claims sizes
            that it does not have, or unpacks to something out of all proportion.
        OSError: If it can't be read.
        zipfile.BadZipFile: If it is damaged.
    """
    if file.read(len(_MAGIC)) == _MAGIC:
        raise ValueError("it is a single array (.npy)")
    arrays: Arrays = {}
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        _check_members(members, os.fstat(file.fileno()).st_size)
        room = IN_MEMORY_BYTES
        for member in members:
            array = _member(archive, member, room)
            if array is not None:
                arrays[member.filename.removesuffix(".npy")] = array
                room -= 0 if isinstance(array, np.memmap) else array.nbytes
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
    require_plausible(size, sum(member.file_size for member in members))


def require_plausible(size: int, unpacked: int) -> None:
    """Raise a ValueError if so many bytes would become more than any data do."""
    if unpacked > max(IN_MEMORY_BYTES, _MOST_COMPRESSION * size):
        raise ValueError(
            f"its {size:,} bytes would unpack to {unpacked:,}, more than {_MOST_COMPRESSION} times "
            "as much, which no data does; if these are data, write them with numpy.savez"
        )


def _member(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, room: int
) -> npt.NDArray[Any] | None:
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
        content.seek(0)
        # Objects are refused there; what has no axes can't be mapped.
        if dtype.hasobject or not shape or member.file_size <= room:
            return np.asarray(np.lib.format.read_array(content, allow_pickle=False))
        try:
            with tempfile.TemporaryFile(prefix="heimdall-npz-") as unpacked:
                shutil.copyfileobj(content, unpacked, _CHUNK_BYTES)
                unpacked.flush()
                # Copied on writing: PyTorch warns of arrays that can't be written to.
                order: Literal["F", "C"] = "F" if fortran else "C"
                return np.memmap(unpacked, dtype, "c", header, shape, order)
        except OSError as error:
            raise OSError(
                f"unpacking {member.filename} needs {member.file_size:,} bytes in "
                f"{tempfile.gettempdir()} ({error.strerror}); free them, or set TMPDIR"
            ) from error
