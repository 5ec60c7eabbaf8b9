"""Where two ONNX files depart from each other, for whoever expected the same bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from heimdall_onnx.common.text import shown
from heimdall_onnx.model.onnx.file import read_model

_SCALARS = ("ir_version", "producer_name", "producer_version", "domain", "model_version")


def describe_differences(recorded: Path, found: Path) -> tuple[str, ...]:
    """Where two models of different bytes depart, in words; of each kind the first place.

    Args:
        recorded: The model that was expected; external data is looked for beside it.
        found: The other one.

    Raises:
        InvalidModelError: If one of them is no ONNX model.
    """
    (before, old), (after, new) = read_model(recorded), read_model(found)
    differences = (
        *_header(before, after),
        *_nodes(before.graph, after.graph),
        *_initializers(old, new, recorded.parent, found.parent),
    )
    return differences or (
        "nothing that is calculated: the same operators, weights, inputs and outputs are written "
        "differently",
    )


def _header(before: onnx.ModelProto, after: onnx.ModelProto) -> Iterator[str]:
    for name in _SCALARS:
        yield from _unequal(name.replace("_", " "), getattr(before, name), getattr(after, name))
    yield from _unequal("opset", _opsets(before), _opsets(after))
    for what, old, new in (
        ("metadata", before.metadata_props, after.metadata_props),
        ("functions", before.functions, after.functions),
        ("inputs", before.graph.input, after.graph.input),
        ("outputs", before.graph.output, after.graph.output),
    ):
        if list(old) != list(new):
            yield f"{what}: {_first_unequal(map(_one_line, old), map(_one_line, new))}"


def _opsets(model: onnx.ModelProto) -> str:
    found = sorted((entry.domain, entry.version) for entry in model.opset_import)
    return ", ".join(f"{domain} {version}".strip() for domain, version in found)


def _nodes(before: onnx.GraphProto, after: onnx.GraphProto) -> Iterator[str]:
    for index, (old, new) in enumerate(zip_longest(before.node, after.node)):
        if old != new:
            yield f"nodes, {len(before.node)} and {len(after.node)}: " + _node(index, old, new)
            return


def _node(index: int, old: onnx.NodeProto | None, new: onnx.NodeProto | None) -> str:
    if old is None or new is None or (old.op_type, old.name) != (new.op_type, new.name):
        return f"node {index} was {_named(old)}, is {_named(new)}"
    for what, was, has in (
        ("inputs", old.input, new.input),
        ("outputs", old.output, new.output),
        ("attributes", map(_one_line, old.attribute), map(_one_line, new.attribute)),
        ("metadata", map(_one_line, old.metadata_props), map(_one_line, new.metadata_props)),
    ):
        if unequal := _first_unequal(was, has):
            return f"node {index}, {_named(old)}, has other {what}: {unequal}"
    return f"node {index}, {_named(old)}, is written differently"


def _named(node: onnx.NodeProto | None) -> str:
    return "none" if node is None else f"{shown(node.op_type)} '{shown(node.name)}'"


def _initializers(
    recorded: list[onnx.TensorProto], found: list[onnx.TensorProto], before: Path, after: Path
) -> Iterator[str]:
    names = [[tensor.name for tensor in tensors] for tensors in (recorded, found)]
    if names[0] != names[1]:
        yield f"weights, {len(names[0])} and {len(names[1])}: {_first_unequal(*names)}"
        return
    different, first = 0, ""
    for old, new in zip(recorded, found, strict=True):
        if unequal := _tensor(old, new, before, after):
            different, first = different + 1, first or f"first '{shown(old.name)}', {unequal}"
    if different:
        yield f"weights: {different} of {len(names[0])} differ, {first}"


def _tensor(old: onnx.TensorProto, new: onnx.TensorProto, before: Path, after: Path) -> str:
    """How a tensor differs from the one of the same name; empty where it does not."""
    outside = onnx.TensorProto.EXTERNAL
    if old == new and outside not in (old.data_location, new.data_location):
        return ""
    was = onnx.numpy_helper.to_array(old, str(before))
    has = onnx.numpy_helper.to_array(new, str(after))
    if (was.dtype, was.shape) != (has.dtype, has.shape):
        return f"which was {was.dtype} {was.shape}, is {has.dtype} {has.shape}"
    if was.tobytes() == has.tobytes():
        return ""
    if was.dtype.kind not in "fiub":
        return "in its values"
    return f"by {np.abs(was.astype(np.float64) - has.astype(np.float64)).max():.3g} at most"


def _unequal(what: str, old: object, new: object) -> Iterator[str]:
    if old != new:
        yield f"{what}: was {shown(old)}, is {shown(new)}"


def _first_unequal(old: Iterable[str], new: Iterable[str]) -> str:
    """The first place where two sequences differ; empty where they do not."""
    for was, has in zip_longest(old, new):
        if was != has:
            return f"was {shown(was or 'none')}, is {shown(has or 'none')}"
    return ""


def _one_line(message: Any) -> str:
    return " ".join(str(message).split())
