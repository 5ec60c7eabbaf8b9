"""ONNX files: the weights, which may lie outside, and the rest of a model apart."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from heimdall_onnx.common.errors import InvalidModelError
from heimdall_onnx.common.text import shown

if TYPE_CHECKING:
    import onnx_ir as ir

# Several times those of the largest models. A node takes 300 bytes of memory, and two of the file.
MAX_FIELDS = 5_000_000
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def read_model(path: Path | str) -> tuple[onnx.ModelProto, list[onnx.TensorProto]]:
    """The model in ``path`` without its graph's initializers, and these in the file's order.

    External data are not read.

    Raises:
        InvalidModelError: If the file is no protobuf message of the right kind or ends early.
    """
    content = Path(path).read_bytes()
    try:
        if _has_too_many_fields(content):
            raise InvalidModelError(
                f"{path} is not an ONNX model: it has more than {MAX_FIELDS:,} fields"
            )
        model = onnx.ModelProto.FromString(content)
    except (DecodeError, IndexError) as error:
        raise InvalidModelError(
            f"{path} is truncated or not an ONNX model: {shown(str(error))}"
        ) from error
    weights = list(model.graph.initializer)
    del model.graph.initializer[:]
    # A message keeps the memory of what was taken out of it.
    structure = onnx.ModelProto()
    structure.CopyFrom(model)
    return structure, weights


def _has_too_many_fields(content: bytes) -> bool:
    """Whether a model and all messages in it have more than `MAX_FIELDS`; found unparsed."""
    count, waiting = 0, [(onnx.ModelProto.DESCRIPTOR, 0, len(content))]
    while waiting:
        kind, position, end = waiting.pop()
        while position < end:
            count += 1
            if count > MAX_FIELDS:
                return True
            tag, position = _varint(content, position)
            length = {_FIXED64: 8, _FIXED32: 4}.get(tag & 7, 0)
            if tag & 7 in (_VARINT, _BYTES):
                value, position = _varint(content, position)
                length = value if tag & 7 == _BYTES else 0
                field = kind.fields_by_number.get(tag >> 3) if length else None
                if field and field.message_type:
                    waiting.append((field.message_type, position, min(position + length, end)))
            position += length
    return False


def _varint(content: bytes, position: int) -> tuple[int, int]:
    """The number that begins at a position, and where it ends."""
    value, shift = content[position] & 0x7F, 0
    while content[position] >= 0x80 and shift < 63:
        position += 1
        shift += 7
        value |= (content[position] & 0x7F) << shift
    return value, position + 1


def write_model(model: ir.Model, path: Path, limit: int) -> None:
    """Write ``model`` to ``path``, and its weights to ``<stem>.onnx.data`` beside it if too large.

    Args:
        model: What to write.
        path: The file to write.
        limit: Size in bytes above which one file is not enough.

    Raises:
        OSError: If a file can't be written.
    """
    import onnx_ir as ir

    weights = model.graph.initializers
    # Encoding only what can fit: a larger model would be encoded here for nothing.
    if sum(w.const_value.nbytes for w in weights.values() if w.const_value is not None) <= limit:
        encoded = ir.to_proto(ir.external_data.load_to_model(model))
        # A weight says itself what it is.
        described = [value for value in encoded.graph.value_info if value.name not in weights]
        del encoded.graph.value_info[:]
        encoded.graph.value_info.extend(described)
        if encoded.ByteSize() <= limit:
            path.write_bytes(encoded.SerializeToString(deterministic=True))
            return
    ir.save(model, path, external_data=f"{path.stem}.onnx.data")
