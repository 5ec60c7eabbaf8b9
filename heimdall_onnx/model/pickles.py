"""What a checkpoint of PyTorch holds, read without PyTorch and without running anything.

Python's own unpickler follows the pickle, but nothing that a pickle names is imported or called:
each name becomes an inert class, and only what tensors and plain values are made of is known here.
So a namespace, a configuration or a whole module beside the weights is no obstacle. A tensor is a
place in the file until it is asked for, and costs no memory before that.

Hashing is all that a pickle can still spend time with: a few hundred bytes can nest tuples so that
the hash of one takes two to the power of its depth steps, which no signal interrupts. The
operations are therefore followed first, with the number of those steps in the place of each object.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import pickletools
import re
import struct
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # torch.serialization.MAGIC_NUMBER
# A hash of so many steps takes a fraction of a second; PyTorch's own tuples have some ten.
_MOST_STEPS = 1_000_000
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_GETS = {"GET", "BINGET", "LONG_BINGET"}
_MARK = -1
# No training leaves these in a checkpoint; they are there to be run.
_HOSTILE = {"os", "posix", "nt", "sys", "subprocess", "shutil", "socket", "runpy", "importlib"}
_HOSTILE_BUILTINS = {"eval", "exec", "compile", "open", "__import__", "execfile", "breakpoint"}
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_STORAGES = {"Bool": "bool", "BFloat16": "bfloat16", "Untyped": "uint8", "Byte": "uint8"}
_STORAGES |= {"Char": "int8", "Short": "int16", "Int": "int32", "Long": "int64"}
_STORAGES |= {"Half": "float16", "Float": "float32", "Double": "float64"}
_STORAGES |= {"ComplexFloat": "complex64", "ComplexDouble": "complex128"}


class Storage:
    """Bytes of a file that tensors are made of: ``size`` of them from ``start`` on."""

    __slots__ = ("buffer", "dtype", "size", "start")

    def __init__(self, buffer: Any, dtype: str, start: int, size: int) -> None:
        self.buffer, self.dtype, self.start, self.size = buffer, dtype, start, size


class StoredTensor(NamedTuple):
    """A tensor that is still in its file.

    Attributes:
        storage: Where its elements are.
        dtype: As PyTorch calls it, ``"float32"``.
        shape: Its sizes.
        stride: Elements from one to the next, by axis.
        offset: Elements before its first one.
    """

    storage: Storage
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0

    @property
    def elements(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    def tensor(self) -> Any:
        """As a ``torch.Tensor`` that shares memory with the mapped file, which stays as it is.

        Raises:
            ValueError: If it claims more than the file holds.
        """
        import torch

        storage, dtype = self.storage, getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{self.dtype} is no type of numbers that PyTorch knows")
        start, end, limit = storage.start, storage.start + storage.size, len(storage.buffer)
        if self.elements > limit:
            raise ValueError(
                f"it claims {self.elements:,} elements, with {limit:,} bytes in the file"
            )
        if not 0 <= start <= end <= limit:
            raise ValueError(f"its values end at byte {end:,}, the file at {limit:,}")
        data = memoryview(storage.buffer)[start:end]
        if start % dtype.itemsize:
            data = memoryview(bytearray(data))
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        try:
            return flat.as_strided(self.shape, self.stride, self.offset)
        except (RuntimeError, TypeError) as error:
            raise ValueError(str(error)) from error


class Placeholder(dict[Any, Any]):
    """Stands for an object of a class that is not loaded, and holds what the pickle says of it.

    Attributes:
        name: Of its class or function, its module's before it.
        args: What it would have been made with.
        state: What would have been set on it.
    """

    name = ""
    args: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *args: Any, **_: Any) -> Placeholder:
        """Keep what it would have been made with."""
        made = super().__new__(cls)
        made.args = args
        return made

    def __init__(self, *args: Any, **_: Any) -> None:
        super().__init__()

    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__
    __ne__ = object.__ne__

    def __call__(self, *args: Any) -> Placeholder:
        """Stand for the result of a call, as well."""
        return type(self)(*args)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, value: Any) -> None:
        """For lists and sets of classes that are not loaded; kept is what has a name."""

    extend = add = append

    @property
    def attributes(self) -> Mapping[Any, Any]:
        """Its state where that is a dictionary; else nothing."""
        return self.state if isinstance(self.state, dict) else {}


def name_of(value: object) -> str:
    """The name of what is not loaded: of a placeholder or its class; empty for anything else."""
    kind = value if isinstance(value, type) else type(value)
    return kind.name if issubclass(kind, Placeholder) else ""


def read_pickle(data: bytes, storage: Callable[..., Any] | None = None) -> Any:
    """What a pickle holds: plain values, `StoredTensor` and `Placeholder`.

    Args:
        data: The pickle.
        storage: Finds what a persistent id stands for; by default there may be none.

    Raises:
        ValueError: If it is broken, hostile, or takes years to read.
    """
    _follow(io.BytesIO(data))
    try:
        return _Unpickler(data, storage).load()
    except ValueError:
        raise
    except Exception as error:  # a broken pickle raises almost anything
        raise ValueError(f"its pickle is broken ({type(error).__name__}: {error})") from error


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, storage: Callable[..., Any] | None) -> None:
        # Python 2 wrote names as bytes.
        super().__init__(io.BytesIO(data), encoding="latin1")
        self._storage, self._classes = storage, dict[str, type[Placeholder]]()
        self._known: dict[str, Any] = {
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_tensor_v3": self._tensor,
            "torch._utils._rebuild_parameter": self._first,
            "torch._utils._rebuild_parameter_with_state": self._first,
            "torch._utils._rebuild_device_tensor_from_cpu_tensor": self._first,
            "torch._tensor._rebuild_from_type_v2": self._subclass,
            "collections.OrderedDict": OrderedDict,
            "collections.Counter": Counter,
            "collections.defaultdict": lambda *_: {},
            "builtins.set": set,
            "builtins.frozenset": frozenset,
            "builtins.complex": complex,
            "builtins.bytearray": self._bytes,
            "_codecs.encode": self._bytes,
            "builtins.getattr": self._attribute,
        }

    def find_class(self, module: str, name: str) -> Any:
        module = _PYTHON_2.get(module, module)
        root, full = module.partition(".")[0], f"{module}.{name}"
        if root in _HOSTILE or (root == "builtins" and name in _HOSTILE_BUILTINS):
            raise ValueError(
                f"it holds {full}, which no training leaves in a checkpoint: loaded elsewhere, it "
                "would run. Nothing of it was run here; do not open it with anything else"
            )
        return self._known.get(full) or self._class(full)

    def persistent_load(self, pid: Any) -> Any:
        if self._storage is None:
            raise ValueError("its pickle refers to another file")
        return self._storage(*pid)

    def _class(self, name: str) -> type[Placeholder]:
        made = self._classes.get(name)
        return made or self._classes.setdefault(
            name, type("_Named", (Placeholder,), {"name": name})
        )

    def _tensor(
        self, storage: Storage, offset: int, size: Any, stride: Any, *others: Any
    ) -> StoredTensor:
        names = [name_of(other) for other in others]
        dtype = next((n for n in names if n.startswith("torch.")), storage.dtype)
        numbers = (sizes_of(size), sizes_of(stride), int(offset))
        return StoredTensor(storage, dtype.removeprefix("torch."), *numbers)

    def _first(self, data: Any, *_: Any) -> Any:
        return data

    def _subclass(self, rebuild: Any, kind: Any, args: Any, state: Any) -> Any:
        """A tensor of another class; one spread over processes where this one has all of it."""
        state = state[-1] if isinstance(state, tuple) else state
        local = state.get("_local_tensor") if isinstance(state, dict) else None
        if isinstance(local, StoredTensor):
            return local if local.shape == sizes_of(args[2]) else self._class(kind.name)(*args)
        return rebuild(*args)

    def _bytes(self, value: Any = b"", *_: Any) -> bytes:
        return value.encode("latin1") if isinstance(value, str) else bytes(bytearray(value or b""))

    def _attribute(self, owner: Any, name: Any) -> type[Placeholder]:
        return self._class(f"{name_of(owner)}.{name}")


def sizes_of(value: Any) -> tuple[int, ...]:
    """A tuple of sizes, or what stands for a ``torch.Size``, as a tuple."""
    found = value.args[0] if isinstance(value, Placeholder) else value
    sizes = tuple(map(int, found))
    if any(size < 0 for size in sizes):
        raise ValueError("a tensor in it has negative sizes")
    return sizes


class _Mapped(mmap.mmap):
    def seekable(self) -> bool:  # Python's own says so from 3.13 on
        return True


def mapped(path: Path) -> mmap.mmap:
    """A file's bytes, in memory only as they are read; what is written there is not kept."""
    with path.open("rb") as file:
        return _Mapped(file.fileno(), 0, access=mmap.ACCESS_COPY)


def read_torch(buffer: Any) -> Any:
    """What the bytes of a file that ``torch.save`` has written hold, as `read_pickle` gives it.

    Raises:
        ValueError: If they are broken, compressed or hostile.
    """
    if buffer[: len(_ZIP_MAGIC)] != _ZIP_MAGIC:
        return _read_legacy(buffer)
    try:
        with zipfile.ZipFile(_as_file(buffer)) as archive:
            members = {info.filename: info for info in archive.infolist()}
            for member in members.values():
                # PyTorch stores them as they are, and maps them so.
                if member.compress_type != zipfile.ZIP_STORED or member.file_size > len(buffer):
                    raise ValueError(f"its member {member.filename[:80]!r} is compressed")
            pickles = [n for n in members if n.count("/") == 1 and n.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise ValueError(f"expected one data.pkl in its archive, found {len(pickles)}")
            root, data = pickles[0].removesuffix("data.pkl"), archive.read(pickles[0])
            if f"{root}byteorder" in members and archive.read(f"{root}byteorder") == b"big":
                raise ValueError("it was written on a machine of the other byte order")
    except (zipfile.BadZipFile, RuntimeError, EOFError) as error:
        # Cut off, encrypted, or of a later ZIP standard: zipfile has no error of its own for these.
        raise ValueError(str(error)) from error

    def storage(_: Any, kind: Any, key: Any, *others: Any) -> Storage:
        if not isinstance(key, str):
            raise ValueError("a tensor in it is in no file")
        info = members[f"{root}data/{key}"]
        lengths = struct.unpack_from("<HH", buffer, info.header_offset + 26)
        start = info.header_offset + 30 + sum(lengths)
        return Storage(buffer, _storage_type(kind), start, info.file_size)

    return read_pickle(data, storage)


def _storage_type(kind: Any) -> str:
    name = name_of(kind).rpartition(".")[2].removesuffix("Storage")
    if name not in _STORAGES:
        raise ValueError(f"it holds numbers of a type that is not read here: {name_of(kind)}")
    return _STORAGES[name]


def _read_legacy(buffer: Any) -> Any:
    """As before PyTorch 1.6: magic number, protocol, system, the object, and the storages.

    A pickle that is not PyTorch's is read as it is.
    """
    file = _as_file(buffer)
    file.seek(0)
    first = read_pickle(_next_pickle(file))
    if first != _LEGACY_MAGIC:
        return first
    _, system = (read_pickle(_next_pickle(file)) for _ in range(2))
    if not system.get("little_endian", True):
        raise ValueError("it was written on a machine of the other byte order")
    storages: dict[Any, Storage] = {}

    def storage(
        _: Any, kind: Any, key: Any, location: Any, count: Any, view: Any = None
    ) -> Storage:
        if view is not None:
            raise ValueError("it is of a layout from before PyTorch 1.0")
        return storages.setdefault(key, Storage(buffer, _storage_type(kind), -1, 0))

    found = read_pickle(_next_pickle(file), storage)
    for key in read_pickle(_next_pickle(file)):
        (count,) = struct.unpack("<q", file.read(8))
        stored = storages[key]
        bits = int(re.sub(r"\D", "", stored.dtype) or 8)
        stored.start, stored.size = file.tell(), count * bits // 8
        file.seek(min(stored.start + max(stored.size, 0), len(buffer)))
    return found


def _as_file(buffer: Any) -> Any:
    return buffer if isinstance(buffer, mmap.mmap) else io.BytesIO(buffer)


def _next_pickle(file: Any) -> bytes:
    start = file.tell()
    _follow(file)
    end = file.tell()
    file.seek(start)
    return bytes(file.read(end - start))


def _follow(file: Any) -> None:
    """Go over the pickle in ``file``, which then stands behind it.

    Raises:
        ValueError: If it is broken, or hashing an object in it takes too many steps.
    """
    stack: list[int] = []
    memo: dict[int, int] = {}
    try:
        for operation, argument, position in pickletools.genops(file):
            name = operation.name
            if name in _PUTS:
                place = len(memo) if argument is None else int(argument)
                # Python sets memory aside for all places before it.
                if place > (position or 0):
                    raise ValueError(f"its pickle notes {place:,} objects at byte {position:,}")
                memo[place] = stack[-1]
            elif name in _GETS:
                stack.append(memo[int(argument or 0)])
            elif name == "STOP":
                return
            else:
                taken = _take(stack, operation)
                # Only these can be hashed, and so be keys; their parts were there before them.
                made = 1 + (sum(taken) if name.startswith("TUPLE") or name == "FROZENSET" else 0)
                if made > _MOST_STEPS:
                    raise ValueError(
                        f"it nests tuples so that hashing one takes more than {_MOST_STEPS:,} steps"
                    )
                stack += [
                    _MARK if kind is pickletools.markobject else taken[0] if name == "DUP" else made
                    for kind in operation.stack_after
                ]
    except (LookupError, OverflowError, EOFError) as error:
        raise ValueError(f"its pickle is broken ({type(error).__name__})") from error
    raise ValueError("its pickle has no end")


def _take(stack: list[int], operation: pickletools.OpcodeInfo) -> list[int]:
    """Take from ``stack`` what an operation takes."""
    before = operation.stack_before
    taken: list[int] = []
    if pickletools.markobject in before:
        while (item := stack.pop()) != _MARK:
            taken.append(item)
        before = before[: before.index(pickletools.markobject)]
    return [stack.pop() for _ in before] + taken


def restored(value: Any, known: dict[int, Any] | None = None) -> Any:
    """What was read, as objects of Python and PyTorch; tensors are copies.

    Args:
        value: Of the tree.
        known: What was restored already, by the identity of what it was: a small file can hold an
            object a million times.

    Raises:
        LookupError: Naming what is not loaded.
    """
    known = {} if known is None else known
    found: Any
    if id(value) not in known:
        if isinstance(value, dict) and not name_of(value):
            known[id(value)] = found = OrderedDict() if type(value) is OrderedDict else {}
            found.update({key: restored(one, known) for key, one in value.items()})
            if type(value) is OrderedDict:  # the versions of modules
                vars(found).update(restored(vars(value), known))
        elif type(value) is list:
            known[id(value)] = found = []
            found.extend(restored(one, known) for one in value)
        elif type(value) in (tuple, set, frozenset):
            known[id(value)] = type(value)(restored(one, known) for one in value)
        else:
            known[id(value)] = _leaf(value)
    return known[id(value)]


def _leaf(value: Any) -> Any:
    import torch

    name, is_class = name_of(value), isinstance(value, type)
    if isinstance(value, StoredTensor):
        return value.tensor().clone()
    if not name:
        return value
    if is_class and isinstance(getattr(torch, name.removeprefix("torch."), None), torch.dtype):
        return getattr(torch, name.removeprefix("torch."))
    if not is_class and name in ("torch.Size", "torch.device"):
        return getattr(torch, name.removeprefix("torch."))(*value.args)
    if not is_class and name.endswith("core.multiarray.scalar"):
        return _number(*value.args)
    raise LookupError(name)


def _number(dtype: Any, data: Any) -> Any:
    """A number that NumPy has written."""
    import numpy as np

    code = str(dtype.args[0])
    if not re.fullmatch(r"[fiubc]\d+", code) or not isinstance(data, bytes):
        raise LookupError(f"numpy {code}")
    return np.frombuffer(data, np.dtype(code))[0].item()
