"""What loading a checkpoint would take, found out without loading it.

PyTorch's ``weights_only`` keeps a pickle from running code, but not from asking for a terabyte or
for years: a few hundred bytes can claim a tensor of any size, or nest tuples so that hashing one
takes two to the power of its depth steps, which no signal interrupts. The operations are therefore
followed first (their effect on the stack is that of Python's ``pickletools``), with a size in the
place of every object.
"""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path
from typing import IO, Any, NamedTuple

_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # torch.serialization.MAGIC_NUMBER
_LEGACY_PICKLES = 5  # magic number, protocol, system, the object, the storages' keys
# A hash of so many steps takes a fraction of a second; PyTorch's own tuples have some ten.
_MOST_STEPS = 1_000_000
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_GETS = {"GET", "BINGET", "LONG_BINGET"}
_CALLS = {"REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ", "INST"}


class _Size(NamedTuple):
    """Stands for an object.

    Attributes:
        steps: How many it takes to hash it.
        largest: The largest integer in it.
        name: Of a class or function, its module's before it.
    """

    steps: int = 1
    largest: int = 0
    name: str = ""


_MARK = _Size(0, 0, "the mark")


class _Bounded:
    """A file that gives what it has, without setting aside what it is asked for."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._left = file, size

    def read(self, count: int) -> bytes:
        content = self._file.read(max(min(count, self._left), 0))
        self._left -= len(content)
        return content

    def readline(self) -> bytes:
        content = self._file.readline(self._left)
        self._left -= len(content)
        return content


def is_zip(path: Path) -> bool:
    """Whether PyTorch takes ``path`` for a checkpoint of today's layout, a ZIP file."""
    with path.open("rb") as file:
        return file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC


def check_pickles(path: Path) -> None:
    """Check that loading the PyTorch checkpoint ``path`` takes no more than the file suggests.

    Raises:
        ValueError: If it would, or if the file is damaged.
        OSError: If it can't be read.
    """
    size = path.stat().st_size
    if not is_zip(path):
        with path.open("rb") as file:
            for number in range(_LEGACY_PICKLES):
                found = _follow(_Bounded(file, size), size)
                if number == 0 and found.largest != _LEGACY_MAGIC:
                    return  # not PyTorch's, which will say so
        return
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                # PyTorch stores them as they are, and maps them so.
                if member.compress_type != zipfile.ZIP_STORED or member.file_size > size:
                    raise ValueError(f"its member {member.filename[:80]!r} is compressed")
                if member.filename.endswith("data.pkl"):
                    with archive.open(member) as content:
                        _follow(_Bounded(content, member.file_size), size)
    except (zipfile.BadZipFile, RuntimeError) as error:
        # Encrypted, or of a later ZIP standard: zipfile has no error of its own for these.
        raise ValueError(str(error)) from error


def _follow(file: _Bounded, limit: int) -> _Size:
    """Size of the object that the pickle in ``file`` holds, which then stands behind it.

    Raises:
        ValueError: If it is broken, or claims more elements than ``limit``.
    """
    stack: list[_Size] = []
    memo: dict[int, _Size] = {}
    try:
        for operation, argument, _ in pickletools.genops(file):  # type: ignore[arg-type]
            name = operation.name
            if name in _PUTS:
                memo[len(memo) if argument is None else int(argument)] = stack[-1]
            elif name in _GETS:
                stack.append(memo[int(argument or 0)])
            elif name == "STOP":
                return stack[-1]
            else:
                taken = _take(stack, operation)
                made = _made(name, argument, taken, limit)
                stack += [
                    _MARK if kind is pickletools.markobject else made
                    for kind in operation.stack_after
                ]
    except (LookupError, OverflowError, EOFError) as error:
        raise ValueError(f"its pickle is broken ({type(error).__name__})") from error
    raise ValueError("its pickle has no end")


def _take(stack: list[_Size], operation: pickletools.OpcodeInfo) -> list[_Size]:
    """Take from ``stack`` what an operation takes."""
    before = operation.stack_before
    taken: list[_Size] = []
    if pickletools.markobject in before:
        while (item := stack.pop()) is not _MARK:
            taken.insert(0, item)
        before = before[: before.index(pickletools.markobject)]
    return [stack.pop() for _ in before][::-1] + taken


def _made(name: str, argument: Any, taken: list[_Size], limit: int) -> _Size:
    """Size of what an operation makes of ``taken``."""
    largest = max((item.largest for item in taken), default=0)
    if isinstance(argument, int):
        return _Size(1, abs(argument))
    if name == "GLOBAL":
        return _Size(1, 0, str(argument))
    if name in ("BINPERSID", "PERSID") or (name in _CALLS and _allocates(taken)):
        if largest > limit:
            raise ValueError(f"it claims {largest:,} elements, with {limit:,} bytes in the file")
        largest = 0
    # Only these can be hashed, and so be keys; what they are made of was there before them.
    steps = 1
    if name.startswith("TUPLE") or name in _CALLS or name == "FROZENSET":
        steps += sum(item.steps for item in taken)
    if steps > _MOST_STEPS:
        raise ValueError(
            f"it nests tuples so that hashing one takes more than {_MOST_STEPS:,} steps"
        )
    return _Size(steps, largest, taken[0].name if name == "DUP" else "")


def _allocates(call: list[_Size]) -> bool:
    """Whether a call can set memory aside by numbers among its arguments."""
    name = call[0].name if call else ""
    return not name or name.startswith(("torch", "__builtin__ bytearray", "builtins bytearray"))
