"""ONNX files of any size, a tensor at a time.

Parsing a whole ``ModelProto`` takes the weights twice into memory, once as bytes and once as
messages. Here the structure and the initializers are read and written apart. The layout on disk
is the ordinary one (protobuf's encoding guide: a message is a sequence of tagged fields whose
order is free), so every ONNX tool reads these files.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from heimdall_onnx.common.errors import InvalidModelError
from heimdall_onnx.common.text import shown

if TYPE_CHECKING:
    import onnx_ir as ir

_GRAPH = 7  # ModelProto.graph
_INITIALIZER = 5  # GraphProto.initializer
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# A hundred times the nodes and weights of the largest models; each costs microseconds.
MAX_FIELDS = 5_000_000


class _Field(NamedTuple):
    number: int
    start: int
    payload: int
    end: int


def read_structure(path: Path | str) -> onnx.ModelProto:
    """The model in ``path`` without its graph's initializers.

    Raises:
        InvalidModelError: If the file is no protobuf message of the right kind or ends early.
    """
    outside, graph = bytearray(), bytearray()
    with Path(path).open("rb") as file:
        for field in _model_fields(file, path):
            if field.number != _GRAPH:
                outside += _read(file, field.start, field.end)
                continue
            for inner in _fields(file, field.payload, field.end, path):
                if inner.number != _INITIALIZER:
                    graph += _read(file, inner.start, inner.end)
    try:
        return onnx.ModelProto.FromString(bytes(outside + _prefix(_GRAPH, len(graph)) + graph))
    except DecodeError as error:
        raise InvalidModelError(f"{path} is not an ONNX model: {shown(str(error))}") from error


def read_initializers(path: Path | str) -> Iterator[onnx.TensorProto]:
    """The initializers of the graph in ``path``, one at a time, in the file's order.

    Raises:
        InvalidModelError: If the file is no protobuf message of the right kind or ends early.
    """
    with Path(path).open("rb") as file:
        for field in _model_fields(file, path):
            if field.number != _GRAPH:
                continue
            for inner in _fields(file, field.payload, field.end, path):
                if inner.number == _INITIALIZER:
                    try:
                        yield onnx.TensorProto.FromString(_read(file, inner.payload, inner.end))
                    except DecodeError as error:
                        raise InvalidModelError(
                            f"{path} is not an ONNX model: {shown(str(error))}"
                        ) from error


def write_model(model: ir.Model, path: Path, *, external_data: str, limit: int) -> None:
    """Write ``model`` to ``path``, and its weights to ``external_data`` beside it if too large.

    Args:
        model: Used up: it has no initializers afterwards.
        path: The file to write.
        external_data: File name for the weights.
        limit: Size in bytes above which one file is not enough.

    Raises:
        OSError: If a file can't be written.
    """
    import onnx_ir as ir

    initializers = dict(model.graph.initializers)
    # Encoding only what can fit: a larger model would be encoded here for nothing.
    if sum(_tensor(value).nbytes for value in initializers.values()) <= limit:
        sizes = [len(_encode(value)) for value in initializers.values()]
        payload = sum(len(_prefix(_INITIALIZER, size)) + size for size in sizes)
        model.graph.initializers.clear()
        structure = ir.serde.serialize_model(model)
        graph = structure.graph.SerializeToString()
        structure.ClearField("graph")
        outside = structure.SerializeToString()
        head = outside + _prefix(_GRAPH, len(graph) + payload) + graph
        if len(head) + payload <= limit:
            with path.open("wb") as file:
                file.write(head)
                for value, size in zip(initializers.values(), sizes, strict=True):
                    file.write(_prefix(_INITIALIZER, size))
                    file.write(_encode(value))
            return
        model.graph.initializers.update(initializers)
    ir.save(model, path, external_data=external_data)
    model.graph.initializers.clear()


def _tensor(initializer: ir.Value) -> ir.TensorProtocol:
    assert initializer.const_value is not None
    return initializer.const_value


def _encode(initializer: ir.Value) -> bytes:
    import onnx_ir as ir

    tensor = _tensor(initializer)
    if isinstance(tensor, ir.ExternalTensor):
        tensor = ir.Tensor(tensor.numpy(), dtype=tensor.dtype)
    encoded = ir.serde.serialize_tensor(tensor)
    encoded.name = initializer.name  # the tensor's own may be that of the parameter it was made of
    return bytes(encoded.SerializeToString())


def _model_fields(file: BinaryIO, path: Path | str) -> Iterator[_Field]:
    return _fields(file, 0, file.seek(0, os.SEEK_END), path)


def _fields(file: BinaryIO, start: int, end: int, path: Path | str) -> Iterator[_Field]:
    """The fields of the message that lies in [start, end) of the file."""
    position = start
    for number in itertools.count():
        if position >= end:
            return
        if number == MAX_FIELDS:
            raise InvalidModelError(
                f"{path} is not an ONNX model: a message in it has more than {MAX_FIELDS:,} fields"
            )
        file.seek(position)
        tag = _read_varint(file, path)
        kind = tag & 7
        length = {_VARINT: 0, _FIXED64: 8, _FIXED32: 4}.get(kind)
        if kind == _VARINT:
            _read_varint(file, path)
        elif kind == _BYTES:
            length = _read_varint(file, path)
        if length is None or tag >> 3 == 0:
            raise InvalidModelError(f"{path} is not an ONNX model: bad field at byte {position}")
        payload = file.tell()
        if payload + length > end:
            raise InvalidModelError(
                f"{path} is truncated or not an ONNX model: the field at byte {position} needs "
                f"{length} bytes, {end - payload} are there"
            )
        yield _Field(tag >> 3, position, payload, payload + length)
        position = payload + length


def _read(file: BinaryIO, start: int, end: int) -> bytes:
    file.seek(start)
    return file.read(end - start)


def _read_varint(file: BinaryIO, path: Path | str) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            break
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise InvalidModelError(f"{path} is truncated or not an ONNX model: no number ends there")


def _prefix(number: int, length: int) -> bytes:
    """Tag and length of a field that holds ``length`` bytes."""
    return _varint(number << 3 | _BYTES) + _varint(length)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])
