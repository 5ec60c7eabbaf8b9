"""Is the ONNX file what it should be: well formed, without NaN, and as the signature says."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import Message  # type: ignore[import-untyped]

from heimdall_onnx.common.errors import InvalidModelError
from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.common.text import listed, shown
from heimdall_onnx.model.onnx.file import read_model
from heimdall_onnx.model.signature import Signature, TensorSpec, differences

log = get_logger(__name__)


@dataclass(frozen=True)
class ModelInfo:
    """What a valid ONNX file says about itself.

    Attributes:
        inputs: In the graph's order, as far as the file tells; it knows neither units nor ranges,
            and a dynamic axis without a name is called ``"?"``.
        outputs: In the graph's order.
        opset_version: Of the default domain.
        ir_version: Of the file format.
        producer_name: The exporter.
        producer_version: Its version; empty if the file has none.
        operators: Number of nodes per operator, the most frequent first.
        parameters: Elements in all initializers.
        size_bytes: Size of the file, external data included.
        signature_problems: Where inputs and outputs differ from the signature; empty if nowhere.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    opset_version: int
    ir_version: int
    producer_name: str
    producer_version: str
    operators: dict[str, int]
    parameters: int
    size_bytes: int
    signature_problems: tuple[str, ...]

    @property
    def signature(self) -> Signature:
        """Inputs and outputs as the file declares them."""
        return Signature(self.inputs, self.outputs)

    def to_dict(self) -> dict[str, Any]:
        """Inputs, outputs, opset, producer and IR version, JSON-serialisable."""
        inputs, outputs = (
            [{"name": t.name, "shape": list(t.shape), "dtype": t.dtype} for t in tensors]
            for tensors in (self.inputs, self.outputs)
        )
        return {
            "inputs": inputs,
            "outputs": outputs,
            "opset_version": self.opset_version,
            "producer_name": self.producer_name,
            "ir_version": self.ir_version,
        }


def validate_model(path: Path | str, *, signature: Signature | None = None) -> ModelInfo:
    """Check an ONNX file and describe it.

    ``onnx.checker`` reads it by path, with shape inference; after that the weights are read a
    tensor at a time, those in external data too.

    Args:
        path: The file.
        signature: What its inputs and outputs should be. Differences are returned, not raised.

    Raises:
        InvalidModelError: If the file is missing, broken, refers to data outside its folder, or
            holds weights that are NaN; with every problem found. Infinite ones are what masks
            are made of.
    """
    source = Path(path)
    if not source.is_file():
        found = "a folder" if source.is_dir() else "no such file"
        raise InvalidModelError(f"expected an ONNX model at {source}, found {found}")
    structure, weights = read_model(source)
    if not structure.ir_version or not structure.graph.node:
        raise InvalidModelError(f"{source} is not an ONNX model: it has no IR version or no nodes")
    problems, parameters, external_bytes = _weigh(source, structure, weights)
    del weights  # the checker reads them for itself
    # The checker would follow the data that was just refused.
    problems += [] if problems else _checked(source)
    problems += _without_dtype(structure.graph)
    if problems:
        raise InvalidModelError(f"{source} is not a valid ONNX model:{listed(problems)}")
    info = _describe(structure, parameters, source.stat().st_size + external_bytes, signature)
    log.info(
        "validated",
        path=str(source),
        opset=info.opset_version,
        parameters=parameters,
        signature_problems=len(info.signature_problems),
    )
    return info


def _checked(path: Path) -> list[str]:
    try:
        onnx.checker.check_model(path, full_check=True)
    except Exception as error:  # the checker's and shape inference's errors share no base
        return [f"onnx.checker: {shown(str(error), 1000)}"]
    return []


def _weigh(
    path: Path, structure: onnx.ModelProto, weights: list[onnx.TensorProto]
) -> tuple[list[str], int, int]:
    """Problems of the weights, number of their elements, and bytes in external data."""
    problems, parameters, external = [], 0, {}
    for tensor in weights:
        parameters += math.prod(tensor.dims)
        problem = _external_problem(tensor, path.parent)
        if problem:
            problems.append(problem)
            continue
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            location = path.parent / _external_entries(tensor)["location"]
            external[location] = location.stat().st_size
        problems += _no_numbers(tensor, path.parent)
    inner = (_external_problem(tensor, path.parent) for tensor in _tensors(structure))
    problems += filter(None, inner)
    return problems, parameters, sum(external.values())


def _tensors(message: Message) -> Iterator[onnx.TensorProto]:
    """Every tensor in a model or a part of it, wherever it is."""
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in [value] if isinstance(value, Message) else value:
                if isinstance(inner, onnx.TensorProto):
                    yield inner
                else:
                    yield from _tensors(inner)


def _external_entries(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def _external_problem(tensor: onnx.TensorProto, folder: Path) -> str | None:
    """Why the data that a tensor has in another file can't be used; None if nothing is wrong."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return None
    entries, name = _external_entries(tensor), shown(tensor.name)
    where = entries.get("location", "")
    location = folder / where
    try:
        if not location.resolve().is_relative_to(folder.resolve()):
            return f"{name} has its data outside the model's folder: {shown(repr(where))}"
        if not location.is_file():
            return f"{name} has its data in {shown(repr(location.name))}, which is not there"
        size = location.stat().st_size
        offset = int(entries.get("offset") or 0)
        length = int(entries.get("length") or max(size - offset, 0))
    except (OSError, RuntimeError, ValueError) as error:  # no path at all, or no number
        return f"{name} has its data in {shown(repr(where))}: {shown(str(error))}"
    if min(offset, length) < 0 or offset + length > size:
        return (
            f"{name} can't be read: its data are said to be {length} bytes from byte {offset} of "
            f"{shown(repr(location.name))}, which has {size}"
        )
    return None


def _no_numbers(tensor: onnx.TensorProto, folder: Path) -> list[str]:
    name = shown(tensor.name)
    if min(tensor.dims, default=0) < 0:
        return [f"{name} has the shape {shown(tuple(tensor.dims))}"]
    try:
        array = onnx.numpy_helper.to_array(tensor, str(folder))
        if array.dtype.kind not in "fcV":
            return []
        bad = int(np.count_nonzero(np.isnan(array)))
    except Exception as error:  # whatever broken tensor data makes onnx and NumPy raise
        return [f"{name} can't be read: {shown(str(error), 300)}"]
    return [f"{name} has NaN in {bad} of {array.size} elements"] if bad else []


def _without_dtype(graph: onnx.GraphProto) -> list[str]:
    """Inputs and outputs that are no tensors of a type NumPy has."""
    known = onnx.helper.get_all_tensor_dtypes()
    return [
        f"{kind} {shown(value.name)} is no tensor of a known type: "
        f"{value.type.WhichOneof('value') or 'no type'} {value.type.tensor_type.elem_type}"
        for kind, values in (("input", graph.input), ("output", graph.output))
        for value in values
        if value.type.tensor_type.elem_type not in known
    ]


def _describe(
    structure: onnx.ModelProto, parameters: int, size_bytes: int, signature: Signature | None
) -> ModelInfo:
    graph = structure.graph
    inputs = tuple(map(_spec, graph.input))
    outputs = tuple(map(_spec, graph.output))
    problems = () if signature is None else _differences(signature, inputs, outputs)
    return ModelInfo(
        inputs=inputs,
        outputs=outputs,
        opset_version=next((o.version for o in structure.opset_import if o.domain == ""), 0),
        ir_version=structure.ir_version,
        producer_name=structure.producer_name,
        producer_version=structure.producer_version,
        operators=dict(Counter(_operators(graph)).most_common()),
        parameters=parameters,
        size_bytes=size_bytes,
        signature_problems=tuple(problems),
    )


def _operators(graph: onnx.GraphProto) -> Iterator[str]:
    for node in graph.node:
        yield f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _operators(inner)


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    shape = tuple(
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?"
        for dim in tensor.shape.dim
    )
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    return TensorSpec(value.name, dtype, shape)


def _differences(
    signature: Signature, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
) -> Iterator[str]:
    """In what a file's inputs and outputs, in whichever order, are not those of a signature."""

    def told(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(s.name, np.dtype(s.dtype).name, s.shape) for s in specs)

    declared = Signature(told(signature.inputs), told(signature.outputs))
    for kind, name, want, have in differences(declared, Signature(inputs, outputs)):
        if name != "order":
            yield f"{kind} {name}: expected {want}, found {have}"
