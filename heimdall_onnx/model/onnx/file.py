"""ONNX files: the weights, which may lie outside, and the rest of a model apart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from heimdall_onnx.common.errors import InvalidModelError
from heimdall_onnx.common.text import shown

if TYPE_CHECKING:
    import onnx_ir as ir


def read_structure(path: Path | str) -> onnx.ModelProto:
    """The model in ``path`` without its graph's initializers.

    Raises:
        InvalidModelError: If the file is no protobuf message of the right kind or ends early.
    """
    model = _read(path)
    del model.graph.initializer[:]
    # A message keeps the memory of what was taken out of it.
    structure = onnx.ModelProto()
    structure.CopyFrom(model)
    return structure


def read_initializers(path: Path | str) -> Iterator[onnx.TensorProto]:
    """The initializers of the graph in ``path`` in the file's order; external data are not read.

    Raises:
        InvalidModelError: If the file is no protobuf message of the right kind or ends early.
    """
    yield from _read(path).graph.initializer


def _read(path: Path | str) -> onnx.ModelProto:
    try:
        return onnx.ModelProto.FromString(Path(path).read_bytes())
    except DecodeError as error:
        raise InvalidModelError(
            f"{path} is truncated or not an ONNX model: {shown(str(error))}"
        ) from error


def write_model(model: ir.Model, path: Path, *, external_data: str, limit: int) -> None:
    """Write ``model`` to ``path``, and its weights to ``external_data`` beside it if too large.

    Args:
        model: What to write.
        path: The file to write.
        external_data: File name for the weights.
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
    ir.save(model, path, external_data=external_data)
