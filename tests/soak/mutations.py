"""Hypothesis strategies that turn valid files into hostile ones.

Blind changes of bytes find what the outermost reader does; behind a checksum or a header only files
that are put together again find anything, so each format has its own way too.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from hypothesis import strategies as st
from onnx import AttributeProto, TensorProto, helper
from seeds import META, chunk, members, riff

Draw = Callable[..., Any]


class Blob(bytes):
    """Bytes that don't fill the screen when Hypothesis shows what it is doing."""

    def __repr__(self) -> str:
        return f"<{len(self)} bytes>"


Bytes = st.SearchStrategy[bytes]

SIZES = [1 << n for n in (7, 8, 15, 16, 20, 24, 28, 31, 32, 33, 40, 48, 62, 63)]
NUMBERS = sorted({0, 1, 2, 3, 100, 255, *SIZES, *(n - 1 for n in SIZES), (1 << 64) - 1})
numbers = st.sampled_from(NUMBERS) | st.integers(0, 70)
signed = numbers | numbers.map(lambda n: -n)
# What a payload that runs leaves behind, in the folder of the process that reads.
PROOF = "executed"


# --- bytes ------------------------------------------------------------------------------------


def _slice(draw: Draw, content: bytes | bytearray) -> slice:
    start = draw(st.integers(0, len(content)))
    return slice(start, start + draw(st.integers(0, min(len(content) - start, 512))))


def _flip(draw: Draw, content: bytearray, _: Sequence[bytes]) -> None:
    if content:
        content[draw(st.integers(0, len(content) - 1))] ^= 1 << draw(st.integers(0, 7))


def _put(draw: Draw, content: bytearray, _: Sequence[bytes]) -> None:
    width, order = draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from(["little", "big"]))
    place = draw(st.integers(0, len(content)))
    value = draw(numbers) & ((1 << 8 * width) - 1)
    content[place : place + width] = value.to_bytes(width, order)


def _cut(draw: Draw, content: bytearray, _: Sequence[bytes]) -> None:
    del content[draw(st.integers(0, len(content))) :]


def _remove(draw: Draw, content: bytearray, _: Sequence[bytes]) -> None:
    del content[_slice(draw, content)]


def _double(draw: Draw, content: bytearray, _: Sequence[bytes]) -> None:
    part = _slice(draw, content)
    content[part.stop : part.stop] = content[part] * draw(st.integers(1, 3))


def _splice(draw: Draw, content: bytearray, others: Sequence[bytes]) -> None:
    other = draw(st.sampled_from(others))
    content[_slice(draw, content)] = other[_slice(draw, other)]


def _insert(draw: Draw, content: bytearray, _: Sequence[bytes]) -> None:
    place = draw(st.integers(0, len(content)))
    content[place:place] = draw(st.binary(min_size=1, max_size=16))


CHANGES = [_flip, _put, _cut, _remove, _double, _splice, _insert]


@st.composite
def mutated(draw: Draw, sources: Sequence[bytes]) -> bytes:
    """One of ``sources`` with a few bytes changed."""
    content = bytearray(draw(st.sampled_from(sources)))
    for change in draw(st.lists(st.sampled_from(CHANGES), min_size=1, max_size=4)):
        change(draw, content, sources)
    return Blob(content)


# --- JSON -------------------------------------------------------------------------------------

HOSTILE_JSON = [
    *("NaN", "-Infinity", "1e999", "-0", "1" + "0" * 400, "9" * 5000, '"\\ud800"', "", "null"),
    *('{"a": 1, "a": 2}', "[" * 100_000, '{"a":' * 3000 + "1" + "}" * 3000, "[1,]", "'a'", "true"),
    *('"\x00"', '"\\u001b[2J"', "\ufeff{}", "{}{}", "-1", '"' + "x" * 100_000 + '"', "0.1", "[]"),
]
words = st.text(max_size=12) | st.sampled_from(["", "..", "../x", "\x1b[31m", "<script>", "%s{}"])
values = st.recursive(
    st.none() | st.booleans() | signed | st.floats() | words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
    max_leaves=6,
)


@st.composite
def json_texts(draw: Draw, documents: Sequence[object]) -> str:
    """One of ``documents`` with a value replaced, removed or given twice, or something hostile."""
    document = json.loads(json.dumps(draw(st.sampled_from(documents))))
    marker, place = "\x00here", document
    for _ in range(draw(st.integers(0, 4))):
        keys = range(len(place)) if isinstance(place, list) else list(place)
        if not keys:
            break
        key = draw(st.sampled_from(keys))
        inner = place[key]
        if not isinstance(inner, dict | list) or not inner or draw(st.booleans()):
            how = draw(st.sampled_from(["replace", "replace", "remove", "rename"]))
            if how == "replace":
                place[key] = marker
            else:
                del place[key]
            if how == "rename" and isinstance(place, dict):
                place[draw(words)] = inner
            break
        place = inner
    text = json.dumps(document)
    written = values.map(json.dumps)
    hostile = st.one_of(written, written, written, st.sampled_from(HOSTILE_JSON))
    if json.dumps(marker) in text:
        text = text.replace(json.dumps(marker), draw(hostile))
    elif draw(st.integers(0, 9)) == 0:
        text = draw(hostile)
    return text


# --- ZIP --------------------------------------------------------------------------------------

# Offset and width of fields, PKWARE's APPNOTE 4.3.7, 4.3.12 and 4.3.16.
ZIP_FIELDS = {
    b"PK\x01\x02": [(6, 2), (8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (42, 4)],
    b"PK\x03\x04": [(4, 2), (6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2)],
    b"PK\x05\x06": [(8, 2), (10, 2), (12, 4), (16, 4), (20, 2)],
}
# Zeros that become a thousand times smaller; the largest is more than a reader may unpack.
BOMBS = {size: io.BytesIO() for size in (1 << 20, 300 << 20)}


def _bomb(size: int) -> bytes:
    """The ZIP file of one member of zeros."""
    if not BOMBS[size].getvalue():
        with (
            zipfile.ZipFile(BOMBS[size], "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive,
            archive.open("x.npy", "w") as member,
        ):
            for _ in range(size >> 20):
                member.write(bytes(1 << 20))
    return BOMBS[size].getvalue()


def zipped(files: Sequence[tuple[str, bytes]], compressed: bool = False) -> bytes:
    """A ZIP file of names and contents; a name may come twice."""
    output = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(output, "w", method) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of names that come twice
        for name, content in files:
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return output.getvalue()


@st.composite
def archives(draw: Draw, sources: Sequence[bytes], inner: Callable[[str, bytes], Bytes]) -> bytes:
    """One of the ZIP files ``sources`` with members, names or header fields changed.

    Args:
        draw: Hypothesis's.
        sources: Valid ZIP files.
        inner: Strategy of other contents for a member, by its name and content.
    """
    files = members(draw(st.sampled_from(sources)))
    for _ in range(draw(st.integers(0, 3))):
        if not files:
            break
        at = draw(st.integers(0, len(files) - 1))
        name, content = files[at]
        match draw(st.sampled_from(["content"] * 4 + ["name", "remove", "double", "bytes"])):
            case "content":
                files[at] = name, draw(inner(name, content))
            case "bytes":
                files[at] = name, draw(mutated([content]))
            case "name":
                tricks = [f"../{name}", f"/{name}", f"{name}/", f"\x1b[2J{name}", "x" * 60_000]
                files[at] = draw(st.sampled_from([*tricks, ".npy", "é\\" + name])), content
            case "remove":
                del files[at]
            case "double":
                files.append((name, draw(inner(name, content))))
    output = bytearray(zipped(files, draw(st.booleans())))
    for _ in range(draw(st.integers(0, 2))):
        signature = draw(st.sampled_from(list(ZIP_FIELDS)))
        if (count := output.count(signature)) == 0:
            continue
        place = -1
        for _ in range(draw(st.integers(1, count))):
            place = output.find(signature, place + 1)
        offset, width = draw(st.sampled_from(ZIP_FIELDS[signature]))
        value = draw(numbers) & ((1 << 8 * width) - 1)
        output[place + offset : place + offset + width] = value.to_bytes(width, "little")
    return bytes(output)


# --- checkpoints ------------------------------------------------------------------------------


@dataclass
class Call:
    """Pickled as a call of ``function``."""

    function: Any
    arguments: tuple[Any, ...]
    state: Any = None


@dataclass
class Storage:
    """Pickled as the reference to a tensor's storage that PyTorch writes."""

    kind: Any
    key: str
    place: str
    count: int


class _Pickler(pickle.Pickler):
    legacy = False

    def persistent_id(self, thing: Any) -> Any:
        if not isinstance(thing, Storage):
            return None
        view = (None,) if self.legacy else ()
        return ("storage", thing.kind, thing.key, thing.place, thing.count, *view)

    def reducer_override(self, thing: Any) -> Any:
        if not isinstance(thing, Call):
            return NotImplemented
        state = () if thing.state is None else (thing.state,)
        return (thing.function, thing.arguments, *state)


def pickled(thing: object, protocol: int = 2, *, legacy: bool = False) -> bytes:
    """``thing`` with its `Call` and `Storage` written as what they stand for."""
    output = io.BytesIO()
    pickler = _Pickler(output, protocol)
    pickler.legacy = legacy
    pickler.dump(thing)
    return output.getvalue()


def payloads() -> list[object]:
    """Calls that leave `PROOF` behind if they are carried out."""
    source = f"__import__('os').mkdir({PROOF!r})"
    return [
        Call(os.mkdir, (PROOF,)),
        Call(os.system, (f"mkdir {PROOF}",)),
        Call(eval, (source,)),
        Call(exec, (source,)),
        Call(getattr, (Call(__import__, ("os",)), "mkdir")),
        Call(OrderedDict, (), {"__class__": Call(os.mkdir, (PROOF,))}),
        Call(torch._utils._rebuild_parameter, (Call(os.mkdir, (PROOF,)), True, OrderedDict())),
        Call(torch._tensor._rebuild_from_type_v2, (os.mkdir, PROOF, (), {})),
        Call(torch.hub.load, (".", "x", "local")),
        Call(torch.load, ("../checkpoint.ckpt",)),
    ]


def payload_files() -> dict[str, bytes]:
    """The first payload in every format of a checkpoint."""
    payload = {"state_dict": {"x": payloads()[0]}}
    parts = {"archive/data.pkl": pickled(payload), "archive/version": b"3\n"}
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            entry = tarfile.TarInfo(name)
            entry.size = len(pickled(payload))
            archive.addfile(entry, io.BytesIO(pickled(payload)))
    bare = pickled(payload)
    header = json.dumps({"__metadata__": {"format": "pt"}}).encode()
    return {
        "zip.pt": zipped(list(parts.items())),
        "zip-compressed.ckpt": zipped(list(parts.items()), compressed=True),
        "legacy.pt": legacy(payload, []),
        "bare.ckpt": bare,
        "bare-protocol-0.ckpt": pickled(payload, 0),
        "bare-protocol-5.ckpt": pickled(payload, 5),
        "tar.pt": tar.getvalue(),
        "pickle.safetensors": bare,
        "zip.safetensors": zipped(list(parts.items())),
        "tail.safetensors": len(header).to_bytes(8, "little") + header + bare,
    }


def legacy(thing: object, storages: Sequence[tuple[str, int, bytes]]) -> bytes:
    """A file as PyTorch wrote it before version 1.6."""
    head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True, "protocol_version": 1001}]
    parts = [pickled(value) for value in head] + [pickled(thing, legacy=True)]
    parts.append(pickled([key for key, _, _ in storages]))
    return b"".join(parts) + b"".join(n.to_bytes(8, "little") + raw for _, n, raw in storages)


KINDS = [torch.FloatStorage, torch.HalfStorage, torch.LongStorage, torch.ByteStorage]
KINDS += [torch.BoolStorage, torch.ComplexFloatStorage, torch.BFloat16Storage, torch.QInt8Storage]
storages = st.builds(
    Storage,
    st.sampled_from(KINDS),
    st.sampled_from(["0", "1", "9", "../0", ""]),
    st.sampled_from(["cpu", "cpu", "meta", "cuda:0", "nowhere"]),
    st.integers(0, 300) | signed,
)
shapes = st.lists(st.integers(0, 8) | signed, max_size=4).map(tuple)
_hooks = st.just(OrderedDict())
dtypes = st.sampled_from([torch.float32, torch.int64, torch.bool, torch.complex64, torch.qint8])
dense = st.builds(
    lambda *a: Call(torch._utils._rebuild_tensor_v2, a),
    *(storages, st.integers(0, 70) | signed, shapes, shapes, st.booleans(), _hooks),
)
other_tensors = st.one_of(
    dense,
    st.builds(lambda *a: Call(torch._utils._rebuild_parameter, a), dense, st.booleans(), _hooks),
    st.builds(
        lambda *a: Call(torch._utils._rebuild_meta_tensor_no_storage, a),
        *(dtypes, shapes, shapes, st.booleans()),
    ),
    st.builds(
        lambda indices, given, size: Call(
            torch._utils._rebuild_sparse_tensor, (torch.sparse_coo, (indices, given, size, False))
        ),
        *(dense, dense, shapes),
    ),
    st.builds(
        lambda storage, offset, size, stride, scale: Call(
            torch._utils._rebuild_qtensor,
            (
                *(storage, offset, size, stride),
                *((torch.per_tensor_affine, scale, 0), False, OrderedDict()),
            ),
        ),
        *(storages, signed, shapes, shapes, st.floats()),
    ),
    st.builds(lambda shape: Call(torch.Size, (shape,)), shapes),
)


def _doubled(depth: int) -> tuple[Any, ...]:
    """A tuple that is small in a file, and has two to the power of ``depth`` leaves."""
    nested: tuple[Any, ...] = ()
    for _ in range(depth):
        nested = (nested, nested)
    return nested


def _nested(depth: int) -> list[Any]:
    nested: list[Any] = []
    for _ in range(depth):
        nested = [nested]
    return nested


plain = st.one_of(
    values,
    st.integers(10, 300).map(_doubled),
    st.integers(10, 300).map(_nested),
    st.sampled_from(payloads()),
)


@st.composite
def states(draw: Draw) -> object:
    """A state dict with tensors as no one would write them."""
    good = {
        name: Call(
            torch._utils._rebuild_tensor_v2,
            (
                Storage(torch.FloatStorage, str(i), "cpu", value.numel()),
                *(0, tuple(value.shape), value.stride(), False, OrderedDict()),
            ),
        )
        for i, (name, value) in enumerate(_good().items())
    }
    keys = st.sampled_from(list(good)) | words | plain.filter(_hashable)
    strange = draw(st.dictionaries(keys, other_tensors | plain, max_size=3))
    state: dict[Any, Any] = {**good, **strange}
    hyper = draw(st.dictionaries(st.sampled_from(["width", "x"]) | words, plain, max_size=2))
    match draw(st.integers(0, 3)):
        case 0:
            return state
        case 1:
            return {"state_dict": state, "hyper_parameters": hyper}
        case 2:
            return {"model_state_dict": state, "hyper_parameters": draw(plain), "more": draw(plain)}
    return draw(plain)


def _hashable(value: object) -> bool:
    # A doubled tuple can't be hashed here either: the file gets it by other means, see `pickles`.
    return isinstance(value, str | int | float | None)


def _good() -> dict[str, torch.Tensor]:
    from models import SmallNet

    return SmallNet(2).state_dict()


def _storage_bytes() -> list[bytes]:
    return [value.numpy().tobytes() for value in _good().values()]


def _hashed(depth: int) -> bytes:
    """A dictionary whose one key takes two to the power of ``depth`` steps to be hashed."""
    doubling = b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(depth))
    return b"\x80\x02}(" + b")" + doubling + b"K\x01u."


pickles = st.one_of(
    states().map(pickled),
    st.tuples(plain, st.integers(0, 5)).map(lambda pair: pickled(*pair)),
    st.integers(10, 200).map(_hashed),
    st.binary(max_size=64).map(lambda junk: b"\x80\x02" + junk + b"."),
)


@st.composite
def _pickled_members(draw: Draw) -> bytes:
    """A checkpoint of today, with storages for the tensors it may refer to."""
    files = [("archive/data.pkl", draw(pickles)), ("archive/version", b"3\n")]
    files += [(f"archive/data/{i}", raw) for i, raw in enumerate(_storage_bytes())]
    files.append(("archive/byteorder", draw(st.sampled_from([b"little", b"big", b"x"]))))
    return zipped(files, draw(st.booleans()))


@st.composite
def _legacy_files(draw: Draw) -> bytes:
    raw = _storage_bytes()
    count = draw(st.integers(0, len(raw)))
    stored = [(str(i), draw(st.just(len(raw[i]) // 4) | numbers), raw[i]) for i in range(count)]
    content = legacy(draw(states()), [(k, n & ((1 << 64) - 1), r) for k, n, r in stored])
    return content if draw(st.booleans()) else draw(mutated([content]))


@st.composite
def _safetensors(draw: Draw) -> bytes:
    """Safetensors whose header lies."""
    names = st.sampled_from(list(_good())) | words
    entries = st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from(["F32", "F32", "I64", "BF16", "F8_E4M3", "BOOL", "X", "F4"]),
            "shape": st.lists(st.integers(0, 9) | signed, max_size=4),
            "data_offsets": st.lists(st.integers(0, 300) | signed, min_size=1, max_size=3),
        },
    )
    full = st.builds(
        lambda shape, start, kind: {
            "dtype": kind,
            "shape": shape,
            "data_offsets": [start, start + 4 * shape[0]],
        },
        *(st.lists(st.integers(0, 9), min_size=1, max_size=2), st.integers(0, 64)),
        st.sampled_from(["F32", "U32", "F16", "I64"]),
    )
    header = draw(st.dictionaries(names, entries | full, max_size=4))
    if draw(st.booleans()):
        header["__metadata__"] = draw(values)
    text = draw(json_texts([header])) if draw(st.booleans()) else json.dumps(header)
    raw = text.encode("utf-8", "surrogatepass")
    length = len(raw) if draw(st.integers(0, 4)) else draw(numbers)
    data = bytes(draw(st.integers(0, 400)))
    return (length & ((1 << 64) - 1)).to_bytes(8, "little") + raw + data


def checkpoints(sources: Sequence[bytes]) -> Bytes:
    """Checkpoints in every format."""
    zips = [source for source in sources if source[:2] == b"PK"]
    hostile = [Blob(file) for file in payload_files().values()]

    def inner(name: str, content: bytes) -> Bytes:
        return pickles if name.endswith(".pkl") else mutated([content])

    return st.one_of(
        mutated(sources),
        archives(zips, inner),
        _pickled_members(),
        _legacy_files(),
        _safetensors(),
        st.sampled_from(hostile),
        mutated(hostile),
    )


# --- evaluation data --------------------------------------------------------------------------

DESCRIPTIONS = ["<f4", "|O", ">f8", "<U8", "|S0", "<M8[ns]", "|V4", "<c16", "|b1", "<U2000000000"]
HEADERS = [
    *("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", "{}", "(" * 300, "[" * 5000, ""),
    "{'descr': '<f4', 'fortran_order': False, 'shape': (1,), 'x': __import__('os').getcwd()}",
    "{'descr': [('a', '|O'), ('b', '<f4')], 'fortran_order': False, 'shape': (1,)}",
    "{'descr': [('a', '<f4', (1000000, 1000000))], 'fortran_order': False, 'shape': (1,)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (5L, 2L)}",
    "{'descr': '<f4', 'fortran_order': 1, 'shape': (True,)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': " + "9" * 5000 + "}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (0x" + "f" * 5000 + ",)}",
    "-" * 9000 + "1",
]


@st.composite
def npy(draw: Draw, content: bytes) -> bytes:
    """An array file with another header before the same data."""
    header = draw(
        st.sampled_from(HEADERS)
        | st.builds(
            "{{'descr': {!r}, 'fortran_order': {}, 'shape': {}, }}".format,
            *(st.sampled_from(DESCRIPTIONS), st.booleans()),
            st.lists(st.integers(0, 9) | signed, max_size=40).map(tuple),
        )
        | st.lists(st.sampled_from([2, 5, 8, 64, 1 << 31]), max_size=4).map(
            lambda shape: f"{{'descr': '<f4', 'fortran_order': False, 'shape': {tuple(shape)}}}"
        )
    ).encode("latin1")
    major = draw(st.sampled_from([1, 1, 2, 3, 9]))
    length = len(header) if draw(st.integers(0, 4)) else draw(numbers)
    width = 2 if major == 1 else 4
    prefix = (length & ((1 << 8 * width) - 1)).to_bytes(width, "little")
    offset = 10 + int.from_bytes(content[8:10], "little")
    return b"\x93NUMPY" + bytes([major, 0]) + prefix + header + content[offset:]


@st.composite
def _texts(draw: Draw, document: object) -> bytes:
    """An array of one text: ``document`` as JSON, changed."""
    text = draw(json_texts([document]))
    header = f"{{'descr': '<U{len(text)}', 'fortran_order': False, 'shape': ()}}\n".encode()
    raw = text.encode("utf-32-le", "surrogatepass")
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + raw


def evaluation_data(sources: Sequence[bytes]) -> Bytes:
    """Files of arrays."""

    def inner(name: str, content: bytes) -> Bytes:
        if name == "meta.npy":
            return st.one_of(_texts(META), _texts(META), npy(content))
        return npy(content)

    bombs = st.sampled_from(list(BOMBS)).map(_bomb)
    return st.one_of(
        *[archives(sources, inner)] * 4,
        mutated(sources),
        # Seldom, since even what is refused has to be written to disk.
        st.integers(0, 40).flatmap(lambda n: bombs if n == 40 else mutated(sources)),
    )


# --- recordings -------------------------------------------------------------------------------


def _chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    found, offset = [], 12
    while offset + 8 <= len(content):
        size = int.from_bytes(content[offset + 4 : offset + 8], "little")
        found.append((content[offset : offset + 4], content[offset + 8 : offset + 8 + size]))
        offset += 8 + size + size % 2
    return found


@st.composite
def _waves(draw: Draw, sources: Sequence[bytes]) -> bytes:
    """A WAV file whose chunks are put together otherwise."""
    parts = _chunks(draw(st.sampled_from(sources)))
    for _ in range(draw(st.integers(0, 4))):
        if not parts:
            break
        # Hypothesis prefers small numbers, where the format is.
        at = draw(st.integers(0, len(parts) - 1))
        name, payload = parts[at]
        match draw(st.sampled_from(["fmt", "fmt", "bytes", "remove", "double", "name", "swap"])):
            case "fmt":
                parts[at] = b"fmt ", draw(_formats(payload))
            case "bytes":
                parts[at] = name, draw(mutated([payload or b"x"]))
            case "remove":
                del parts[at]
            case "double":
                parts[at:at] = [(name, payload)] * draw(st.integers(1, 20))
            case "name":
                names = [b"data", b"fmt ", b"kiwi", b"fact", b"LIST", b"ds64", b"JUNK", b"\0\0\0\0"]
                parts[at] = draw(st.sampled_from(names)), payload
            case "swap":
                other = draw(st.integers(0, len(parts) - 1))
                parts[at], parts[other] = parts[other], parts[at]
    content = bytearray(riff(*(chunk(name, payload) for name, payload in parts)))
    content[:4] = draw(st.sampled_from([b"RIFF"] * 5 + [b"RIFX", b"RF64"]))
    if draw(st.integers(0, 3)) == 0:
        content[4:8] = (draw(numbers) & 0xFFFFFFFF).to_bytes(4, "little")
    return bytes(content)


@st.composite
def _formats(draw: Draw, payload: bytes) -> bytes:
    """A ``fmt `` chunk: code, channels, rate, bytes a second, bytes a frame, bits a sample."""
    fields = [1, 2, 12_000, 48_000, 4, 16]
    if len(payload) >= 16:
        fields = list(struct.unpack("<HHIIHH", payload[:16]))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, 5))
        usual = st.sampled_from([0, 1, 2, 3, 4, 6, 8, 16, 24, 32, 64, 0xFFFE, 11_999, 44_100])
        limit = 0xFFFFFFFF if at in (2, 3) else 0xFFFF
        fields[at] = draw(usual | numbers) & limit
    return struct.pack("<HHIIHH", *fields) + payload[16:]


def recordings(sources: Sequence[bytes]) -> Bytes:
    """Recordings."""
    return st.one_of(mutated(sources), _waves(sources), _waves(sources))


# --- ONNX -------------------------------------------------------------------------------------

LOCATIONS = [
    "",
    ".",
    "..",
    "../x",
    "/etc/passwd",
    "/dev/zero",
    "model.onnx",
    "a/../../x",
    "\0",
    "x" * 300,
]
ATTRIBUTES = ["axis", "axes", "perm", "kernel_shape", "pads", "strides", "group", "shape", "to"]
ATTRIBUTES += ["value", "body", "then_branch", "allowzero", "dilations", "equation", "num_outputs"]
SCHEMAS = [s for s in onnx.defs.get_all_schemas() if s.domain == "" and s.since_version <= 14]
OPERATORS = sorted({schema.name for schema in onnx.defs.get_all_schemas()})
_text_numbers = signed.map(str) | st.sampled_from(["", "x", "1e9", " 1", "9" * 40])


def _tensors(model: onnx.ModelProto) -> list[TensorProto]:
    constants = [a.t for n in model.graph.node for a in n.attribute if a.HasField("t")]
    return [*model.graph.initializer, *constants]


def _spoil_tensor(draw: Draw, model: onnx.ModelProto) -> None:
    tensors = _tensors(model)
    if not tensors:
        return
    tensor = draw(st.sampled_from(tensors))
    match draw(st.integers(0, 4)):
        case 0:
            del tensor.dims[:]
            tensor.dims.extend(n for n in draw(shapes) if abs(n) < 1 << 63)
        case 1:
            tensor.data_type = draw(st.integers(-1, 40))
        case 2:
            tensor.raw_data = draw(mutated([tensor.raw_data or b"x"]))
        case 3:
            tensor.data_location = TensorProto.EXTERNAL
            tensor.ClearField("raw_data")
            for key in draw(
                st.lists(st.sampled_from(["location", "offset", "length", "checksum"]))
            ):
                value = draw(st.sampled_from(LOCATIONS) if key == "location" else _text_numbers)
                tensor.external_data.add(key=key, value=value)
        case 4:
            tensor.name = draw(st.sampled_from(["", "x", "y", "\x1b[2J", "n" * 5000]))


def _spoil_node(draw: Draw, model: onnx.ModelProto) -> None:
    if not model.graph.node:
        return
    node = draw(st.sampled_from(list(model.graph.node)))
    names = [n for other in model.graph.node for n in (*other.input, *other.output)]
    match draw(st.integers(0, 7)):
        case 0 | 6 | 7:
            node.CopyFrom(draw(_nodes(names, list(node.output))))
        case 1:
            node.op_type = draw(st.sampled_from(OPERATORS))
        case 2:
            node.attribute.append(draw(_attributes()))
        case 3:
            side = node.input if draw(st.booleans()) else node.output
            side.append(draw(st.sampled_from([*names, "", "nowhere"])))
        case 4:
            side = node.input if draw(st.booleans()) else node.output
            if side:
                side.pop(draw(st.integers(0, len(side) - 1)))
        case 5:
            if node.attribute:
                attribute = draw(st.sampled_from(list(node.attribute)))
                attribute.type = draw(st.integers(0, 14))
                attribute.ints.extend(n for n in draw(shapes) if abs(n) < 1 << 63)


@st.composite
def _nodes(draw: Draw, names: Sequence[str], outputs: Sequence[str]) -> onnx.NodeProto:
    """An operator as its schema has it, on whatever is there, with senseless attributes."""
    schema = draw(st.sampled_from(SCHEMAS))
    most = min(schema.max_input, schema.min_input + 2)
    count = draw(st.integers(schema.min_input, most))
    node = helper.make_node(
        schema.name, [draw(st.sampled_from(names)) for _ in range(count)], outputs
    )
    spare = schema.min_output - len(outputs)
    node.output.extend(f"spare{i}" for i in range(spare))
    small = st.integers(-3, 9) | st.sampled_from([1 << 20, 1 << 31, (1 << 63) - 1, -(1 << 63)])
    of_type = {
        "INT": small,
        "INTS": st.lists(small, min_size=1, max_size=4),
        "FLOAT": st.floats(width=32),
        "FLOATS": st.lists(st.floats(width=32), min_size=1, max_size=4),
        "STRING": st.sampled_from([b"", b"linear", b"SAME_UPPER", b"ij,jk->ik", b"...", b"\xff"]),
        "TENSOR": st.builds(
            lambda dims: helper.make_tensor("t", TensorProto.FLOAT, dims, bytes(4), raw=True),
            st.lists(st.sampled_from([0, 1, 2, -1, 1 << 40]), max_size=2),
        ),
    }
    for name, attribute in schema.attributes.items():
        kind = attribute.type.name
        if kind in of_type and (attribute.required or draw(st.booleans())):
            node.attribute.append(helper.make_attribute(name, draw(of_type[kind])))
    return node


@st.composite
def _attributes(draw: Draw) -> AttributeProto:
    name = draw(st.sampled_from(ATTRIBUTES))
    small = st.integers(-(1 << 63), (1 << 63) - 1) | st.integers(-9, 99)
    value = draw(st.lists(small, min_size=1, max_size=5) | small | st.floats(width=32) | words)
    return helper.make_attribute(
        name, value.encode("utf-8", "ignore") if isinstance(value, str) else value
    )


def _spoil_value(draw: Draw, model: onnx.ModelProto) -> None:
    infos = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    if not infos:
        return
    info = draw(st.sampled_from(infos)).type.tensor_type
    if draw(st.booleans()):
        info.elem_type = draw(st.integers(-1, 40))
    else:
        info.shape.dim.add(dim_value=draw(st.integers(-(1 << 63), (1 << 63) - 1)))


def _spoil_model(draw: Draw, model: onnx.ModelProto) -> None:
    match draw(st.integers(0, 5)):
        case 0:
            model.ir_version = draw(st.integers(-1, 99))
        case 1:
            model.opset_import[0].version = draw(st.integers(-1, 99))
        case 2:
            function = model.functions.add(domain="local", name="Self", input=["a"], output=["b"])
            function.opset_import.append(helper.make_opsetid("local", 1))
            function.node.append(helper.make_node("Self", ["a"], ["b"], domain="local"))
            model.opset_import.append(helper.make_opsetid("local", 1))
            model.graph.node.append(helper.make_node("Self", ["x"], ["self"], domain="local"))
        case 3:
            sparse = model.graph.sparse_initializer.add(dims=[draw(st.integers(-1, 1 << 40))])
            sparse.values.CopyFrom(helper.make_tensor("s", TensorProto.FLOAT, [1], [1.0]))
            sparse.indices.CopyFrom(
                helper.make_tensor("i", TensorProto.INT64, [1], [draw(st.integers(-9, 1 << 40))])
            )
            if draw(st.booleans()):
                sparse.values.ClearField("float_data")
                sparse.values.data_location = TensorProto.EXTERNAL
                sparse.values.external_data.add(
                    key="location", value=draw(st.sampled_from(LOCATIONS))
                )
        case 4:
            model.graph.node.extend(list(model.graph.node))
        case 5:
            info = helper.make_tensor_value_info("big", TensorProto.FLOAT, None)
            size = draw(st.sampled_from([1 << 20, 1 << 31, 1 << 40]))
            shape = helper.make_tensor("size", TensorProto.INT64, [2], [size, 8])
            model.graph.initializer.append(shape)
            operator = draw(st.sampled_from(["ConstantOfShape", "RandomNormalLike", "NonZero"]))
            model.graph.node.append(helper.make_node(operator, ["size"], ["big"]))
            model.graph.output.append(info)


@st.composite
def _spoiled(draw: Draw, sources: Sequence[bytes]) -> bytes:
    model = onnx.ModelProto.FromString(draw(st.sampled_from(sources)))
    ways = [_spoil_tensor, _spoil_node, _spoil_node, _spoil_value, _spoil_model]
    for way in draw(st.lists(st.sampled_from(ways), min_size=1, max_size=4)):
        way(draw, model)
    return model.SerializeToString()


def _length(payload: bytes) -> bytes:
    size, encoded = len(payload), bytearray()
    while size > 0x7F:
        encoded.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([*encoded, size]) + payload


def deep_model(source: bytes, depth: int) -> bytes:
    """A model with a branch in a branch, ``depth`` times; more than protobuf's own writer takes."""
    graph = b""
    for _ in range(depth):
        # GraphProto.node, NodeProto.op_type and .attribute, AttributeProto.name, .g and .type
        attribute = b"\x0a" + _length(b"then_branch") + b"\x32" + _length(graph) + b"\xa0\x01\x05"
        graph = b"\x0a" + _length(b"\x22" + _length(b"If") + b"\x2a" + _length(attribute))
    return source + b"\x3a" + _length(graph)


def models(sources: Sequence[bytes]) -> Bytes:
    """ONNX models."""
    deep = st.builds(deep_model, st.sampled_from(sources), st.integers(1, 2000))
    return st.one_of(*[_spoiled(sources)] * 4, mutated(sources), mutated(sources), deep)


# --- parameters -------------------------------------------------------------------------------

NAMES = ["checkpoint", "model", "model_kwargs", "eval_data", "name", "bucket", "prefix", "alias"]
NAMES += ["tolerance", "opset", "batch_size", "threads", "profile", "seed", "run_id", "publish"]
HOSTILE_LITERALS = [
    *("0x" + "f" * 5000, "9" * 5000, "1e999", "-1e999", "(" * 150 + ")" * 150, "[" * 90 + "]" * 90),
    *("'\\ud800'", "'\\x1b[2J'", "b'x'", "{1: 2}", "{'a': {1, 2}}", "None", "...", "1j", "'\\n'"),
    *("x" * 1000, "'" + "x" * 100_000 + "'", "-" * 5000 + "1", "(" * 9000, "f(" * 99 + ")" * 99),
    *("{'a': 0x" + "f" * 5000 + "}", '\'{"a": ' + "9" * 5000 + "}'", "'[' * 9", '"""' + "[" * 9999),
    *('"""' + "[" * 99_999 + '"""', "'{\"a\": NaN}'", '\'{"a": "\\\\ud800"}\'', "True", "1e-5"),
]


@st.composite
def _cells(draw: Draw) -> bytes:
    names = st.sampled_from(NAMES) | st.sampled_from(["tolerence", "é", "_", "checkpoint2"])
    literals = st.sampled_from(HOSTILE_LITERALS) | values.map(repr)
    lines = [
        f"{name} = {literal}"
        for name, literal in draw(st.lists(st.tuples(names, literals), min_size=1, max_size=4))
    ]
    return "\n".join(["# Parameters", *lines, ""]).encode("utf-8", "surrogatepass")


def parameters(sources: Sequence[bytes]) -> Bytes:
    """Cells of parameters."""
    return st.one_of(mutated(sources).filter(_is_text), _cells(), _cells())


def _is_text(content: bytes) -> bool:
    # A cell comes out of a notebook's JSON, so that it is always text.
    try:
        content.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return False
    return True


# --- manifests --------------------------------------------------------------------------------


@st.composite
def _crowded(draw: Draw, source: bytes) -> bytes:
    """A manifest of many objects, which may be the same, and may be none."""
    document = json.loads(source)
    first = document["objects"][0]
    count = draw(st.sampled_from([2, 1000, 40_000]))
    change = draw(st.sampled_from(["", "{}", "-{}", "/../{}", "\u202e{}"]))
    document["objects"] += [
        {**first, "key": first["key"] + change.format(number)} for number in range(count)
    ]
    if draw(st.booleans()):
        document["objects"] = [{"key": 1}] * count
    return json.dumps(document).encode()


def manifests(sources: Sequence[bytes]) -> Bytes:
    """Manifests."""
    documents = [json.loads(source) for source in sources]
    texts = json_texts(documents).map(lambda text: text.encode("utf-8", "surrogatepass"))
    crowded = st.sampled_from(sources).flatmap(_crowded)
    seldom = st.integers(0, 40).flatmap(lambda n: crowded if n == 40 else mutated(sources))
    return st.one_of(texts, texts, texts, mutated(sources), seldom)
