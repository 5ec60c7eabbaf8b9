"""What a checkpoint of PyTorch holds, read without PyTorch and without running anything.

Python's own unpickler follows the pickle, but nothing that a pickle names is imported or called:
each name becomes an inert class, and only what tensors and plain values are made of is known here.
So a namespace, a configuration or a whole module beside the weights is no obstacle. A tensor is a
place in the file until it is asked for, and costs no memory before that.

Hashing is all that a pickle can still spend time with: a few hundred bytes can nest tuples so that
the hash of one takes two to the power of its depth steps, which no signal interrupts. These steps
are counted as tuples are made, and the time they take, which only the unpickler that is written in
Python lets one do.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import re
import struct
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

_PythonUnpickler: Any = pickle._Unpickler  # noqa: SLF001 - the one whose operations can be set
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # torch.serialization.MAGIC_NUMBER
# A hash of so many steps takes milliseconds; PyTorch's own tuples have some ten.
_MOST_STEPS = 100_000
# Some twenty times what is needed; in seconds, and for each byte that was read.
_MOST_TIME, _TIME_OF_A_BYTE = 1.0, 1e-5
# No training leaves these in a checkpoint; they are there to be run.
_HOSTILE = re.compile(
    r"(os|posix|nt|sys|subprocess|shutil|socket|runpy|importlib)\..*"
    r"|builtins\.(eval|exec|compile|open|__import__|execfile|breakpoint)"
)
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_STORAGES = {"Bool": "bool", "BFloat16": "bfloat16", "Untyped": "uint8", "Byte": "uint8"}
_STORAGES |= {"Char": "int8", "Short": "int16", "Int": "int32", "Long": "int64"}
_STORAGES |= {"Half": "float16", "Float": "float32", "Double": "float64"}
_STORAGES |= {"ComplexFloat": "complex64", "ComplexDouble": "complex128"}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor that is still in its file; its ``copy.deepcopy`` is one of PyTorch.

    Attributes:
        dtype: As the file calls it: ``"float32"``, ``"F32"`` in safetensors.
        shape: Its sizes.
        tensor: Makes a ``torch.Tensor`` of it, which may share memory with the mapped file, which
            stays as it is. Raises whatever is wrong with it, a claim of more than the file holds
            for example.
    """

    dtype: str
    shape: tuple[int, ...]
    tensor: Callable[[], Any]

    @property
    def elements(self) -> int:
        """How many elements it has, or claims up to the most that there can be."""
        return min(math.prod(self.shape), 2**63)

    def __deepcopy__(self, _: Any) -> Any:
        return self.tensor().clone()


class Placeholder(dict[Any, Any]):
    """Stands for a class, function or object that is not loaded, and holds what is said of it.

    Its ``copy.deepcopy`` is what it stands for if that is a type, device or size of PyTorch, and
    raises a LookupError with its name otherwise.

    Attributes:
        name: Of the class or function, its module's before it.
        args: What the object would have been made with; None for the class or function itself.
        attributes: What would have been set on it, by name.
    """

    def __init__(self, name: str, args: tuple[Any, ...] | None = None) -> None:
        super().__init__()
        self.name, self.args, self.attributes = name, args, dict[Any, Any]()

    def __call__(self, *args: Any) -> Placeholder:
        """Stand for the object that is made."""
        return Placeholder(self.name, args)

    def __deepcopy__(self, _: Any) -> Any:
        import torch

        found = getattr(torch, self.name.removeprefix("torch."), None)
        if self.args is None and isinstance(found, torch.dtype):
            return found
        if self.args is None or self.name not in ("torch.Size", "torch.device"):
            raise LookupError(self.name)
        return found(*self.args)  # type: ignore[misc]

    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__
    __ne__ = object.__ne__

    def append(self, value: Any) -> None:
        """For lists and sets of classes that are not loaded; kept is what has a name."""

    extend = add = append


def name_of(value: object) -> str:
    """The name of what is not loaded; empty for anything else."""
    return value.name if isinstance(value, Placeholder) else ""


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *others: Any) -> Any:
    """A tensor of a storage, which is a type, and what gives its bytes once all has been read."""
    if any(isinstance(one, dict) and (one.get("conj") or one.get("neg")) for one in others):
        return Placeholder("torch.Tensor that is a conjugate or negative view")
    dtype, view = storage
    names = [name_of(one) for one in others]
    dtype = next((n for n in names if n.startswith("torch.")), dtype).removeprefix("torch.")
    shape, steps = sizes_of(size), sizes_of(stride)
    return StoredTensor(dtype, shape, partial(_read, view, dtype, shape, steps, int(offset)))


def _read(view: Callable[[], memoryview], name: str, shape: Any, stride: Any, offset: int) -> Any:
    import torch

    dtype, data, elements = getattr(torch, name, None), view(), math.prod(shape)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name} is no type of numbers that PyTorch knows")
    if elements > (limit := len(data.obj)):  # type: ignore[arg-type]
        raise ValueError(f"it claims {elements:,} elements, with {limit:,} bytes in the file")
    flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    flat = flat.clone() if flat.data_ptr() % dtype.itemsize else flat
    return flat.view(dtype).as_strided(shape, stride, offset)


def _subclass(rebuild: Callable[..., Any], kind: Any, args: Any, state: Any) -> Any:
    """A tensor of another class; one spread over processes where this one has all of it."""
    state = state[-1] if isinstance(state, tuple) else state
    local = state.get("_local_tensor") if isinstance(state, dict) else None
    if isinstance(local, StoredTensor):
        return local if local.shape == sizes_of(args[2]) else Placeholder(kind.name, args)
    return rebuild(*args)


def _first(data: Any, *_: Any) -> Any:
    return data


def _bytes(value: Any = b"", *_: Any) -> bytes:
    # Of a number Python would make as many.
    return value.encode("latin1") if isinstance(value, str) else b"".join([value])


def _number(dtype: Any, data: bytes) -> Any:
    """A number that NumPy has written."""
    import numpy as np

    plain = re.fullmatch(r"[fiubc]\d+", str(dtype.args[0])) and isinstance(data, bytes)
    return np.frombuffer(data, dtype.args[0])[0].item() if plain else Placeholder("numpy.generic")


_KNOWN: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _first,
    "torch._tensor._rebuild_from_type_v2": _subclass,
    "numpy.core.multiarray.scalar": _number,
    "numpy._core.multiarray.scalar": _number,
    "collections.OrderedDict": OrderedDict,
    "collections.Counter": dict,
    "collections.defaultdict": lambda *_: {},
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "builtins.complex": complex,
    "builtins.bytearray": _bytes,
    "builtins.bytes": _bytes,
    "_codecs.encode": _bytes,
    "builtins.getattr": lambda owner, name: Placeholder(f"{name_of(owner)}.{name}"),
}


class _Unpickler(_PythonUnpickler):  # type: ignore[misc]
    def __init__(self, file: BinaryIO, storage: Callable[..., Any] | None) -> None:
        # Python 2 wrote names as bytes.
        super().__init__(file, encoding="latin1")
        self.storage, self.steps = storage, dict[int, int]()
        self.file, self.began = file, time.thread_time()

    def find_class(self, module: str, name: str) -> Any:
        full = f"{_PYTHON_2.get(module, module)}.{name}"
        if _HOSTILE.fullmatch(full):
            raise ValueError(
                f"it holds {full}, which no training leaves in a checkpoint: loaded elsewhere, it "
                "would run. Nothing of it was run here; do not open it with anything else"
            )
        return _KNOWN.get(full) or Placeholder(full)

    def persistent_load(self, pid: Any) -> Any:
        if self.storage is None:
            raise ValueError("its pickle refers to another file")
        return self.storage(*pid)

    def load_build(self) -> None:
        """Set a state where it is only kept; of all else nothing is changed."""
        state, made = self.stack.pop(), self.stack[-1]
        if isinstance(made, Placeholder):
            made.attributes = state if isinstance(state, dict) else {"state": state}
        elif type(made) is OrderedDict and isinstance(state, dict):
            vars(made)["_metadata"] = state.get("_metadata", {})

    def load_newobj_ex(self) -> None:
        """Make an object without its keyword arguments."""
        self.stack.pop()
        self.load_reduce()

    def load_watched(self, load: Callable[[Any], None]) -> None:
        """Go on, count the steps that the hash of a tuple takes, and look at the time."""
        load(self)
        made, read = self.stack[-1], self.file.tell()
        if type(made) is tuple:
            steps = self.steps[id(made)] = 1 + sum(self.steps.get(id(one), 1) for one in made)
            if steps > (most := _MOST_STEPS + read):
                raise ValueError(
                    f"it nests tuples so that hashing one takes more than {most:,} steps"
                )
        if time.thread_time() - self.began > _MOST_TIME + _TIME_OF_A_BYTE * read:
            raise ValueError("it takes longer to read than its size explains")

    dispatch = {  # noqa: RUF012 - so it is in the class that this one is made of
        **_PythonUnpickler.dispatch,
        pickle.BUILD[0]: load_build,
        # Python would first set aside what the file claims.
        pickle.BYTEARRAY8[0]: _PythonUnpickler.load_binbytes8,
        pickle.NEWOBJ[0]: _PythonUnpickler.load_reduce,
        pickle.NEWOBJ_EX[0]: load_newobj_ex,
    }
    for _code in (
        *(pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.REDUCE, pickle.NEWOBJ),
        *(pickle.SETITEM, pickle.SETITEMS, pickle.ADDITEMS, pickle.FROZENSET, pickle.DICT),
    ):
        dispatch[_code[0]] = partial(load_watched, load=dispatch[_code[0]])


def read_pickle(file: BinaryIO, storage: Callable[..., Any] | None = None) -> Any:
    """What the pickle in ``file`` holds, which then stands behind it.

    Args:
        file: Opened where the pickle begins.
        storage: Finds what a persistent id stands for; by default there may be none.

    Returns:
        Plain values, `StoredTensor` and `Placeholder`.

    Raises:
        ValueError: If it is broken, hostile, or takes years to read.
    """
    try:
        return _Unpickler(file, storage).load()
    except ValueError:
        raise
    except Exception as error:  # a broken pickle raises almost anything
        raise ValueError(f"its pickle is broken ({type(error).__name__}: {error})") from error


def sizes_of(value: Any) -> tuple[int, ...]:
    """A tuple of sizes, or what stands for a ``torch.Size``, as a tuple."""
    return tuple(map(int, value.args[0] if name_of(value) else value))


def read_torch(file: BinaryIO) -> Any:
    """What a file that ``torch.save`` has written holds, as `read_pickle` gives it.

    Raises:
        ValueError: If it is broken, compressed or hostile.
    """
    readable: Any = file  # where a read sets nothing aside beyond what is there
    if isinstance(file, io.BytesIO):
        buffer = memoryview(bytearray(file.getvalue()))
    else:  # in memory only as it is read; what is written there is not kept
        readable = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        buffer = memoryview(readable)
    if bytes(buffer[:4]) != b"PK\x03\x04":
        return _read_legacy(readable, buffer)
    try:
        with zipfile.ZipFile(file) as archive:
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

    def storage(_: Any, kind: Any, key: str, *others: Any) -> tuple[str, Callable[[], memoryview]]:
        info = members[f"{root}data/{key}"]
        lengths = struct.unpack_from("<HH", buffer, info.header_offset + 26)
        start = info.header_offset + 30 + sum(lengths)
        return _dtype_of(kind), lambda: buffer[start : start + info.file_size]

    return read_pickle(io.BytesIO(data), storage)


def _dtype_of(kind: Any) -> str:
    name = name_of(kind).rpartition(".")[2].removesuffix("Storage")
    if name not in _STORAGES:
        raise ValueError(f"it holds numbers of a type that is not read here: {name_of(kind)}")
    return _STORAGES[name]


def _read_legacy(file: BinaryIO, buffer: memoryview) -> Any:
    """As before PyTorch 1.6: magic number, protocol, system, the object, and the storages.

    A pickle that is not PyTorch's is read as it is.
    """
    first = read_pickle(file)
    if first != _LEGACY_MAGIC:
        return first
    read_pickle(file)
    if read_pickle(file).get("little_endian") is False:
        raise ValueError("it was written on a machine of the other byte order")
    kinds, views = dict[Any, str](), dict[Any, memoryview]()

    def storage(what: str, kind: Any, key: Any, _: Any, *others: Any) -> Any:
        if what == "module":  # a class and its source
            return kind
        if others[1:] not in ((), (None,)):
            raise ValueError("it is of a layout from before PyTorch 1.0")
        return kinds.setdefault(key, _dtype_of(kind)), lambda: views[key]

    found = read_pickle(file, storage)
    for key in read_pickle(file):
        count = int.from_bytes(file.read(8), "little", signed=True)
        size = count * int(re.sub(r"\D", "", kinds[key]) or 8) // 8
        views[key] = buffer[file.tell() :][: max(size, 0)]
        file.seek(len(views[key]), io.SEEK_CUR)
    return found
