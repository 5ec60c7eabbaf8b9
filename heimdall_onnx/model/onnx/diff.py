"""Where two ONNX files depart from each other, for whoever expected the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import unified_diff
from itertools import zip_longest
from pathlib import Path

import numpy as np
import onnx

from heimdall_onnx.common.text import count_of, shown
from heimdall_onnx.model.onnx.file import read_model

_SHOWN = 4


def describe_differences(recorded: Path, found: Path) -> tuple[str, ...]:
    """Where two models of different bytes depart, in words: the first lines and the first weight.

    Args:
        recorded: The model that was expected; external data is looked for beside it.
        found: The other one.

    Raises:
        InvalidModelError: If one of them is no ONNX model.
    """
    (before, old), (after, new) = read_model(recorded), read_model(found)
    differences = (
        *_text(before, after),
        *_initializers(old, new, recorded.parent, found.parent),
    )
    return differences or (
        "nothing that is calculated: the same operators, weights, inputs and outputs are written "
        "differently",
    )


def _text(*models: onnx.ModelProto) -> Iterator[str]:
    """The first lines that differ of header and graph as ONNX prints them, and how many do."""
    for model in models:
        del model.graph.value_info[:]  # calculates nothing
    old, new = (onnx.printer.to_text(model).splitlines() for model in models)
    lines = [*unified_diff(old, new, n=0, lineterm="")][2:]
    if changes := [shown(line, 1000) for line in lines if line[0] in "+-"]:
        yield f"{count_of(len(changes), 'line')} of the graph, first {'; '.join(changes[:_SHOWN])}"


def _initializers(
    recorded: list[onnx.TensorProto], found: list[onnx.TensorProto], before: Path, after: Path
) -> Iterator[str]:
    names = [[tensor.name for tensor in tensors] for tensors in (recorded, found)]
    if names[0] != names[1]:
        was, has = next(pair for pair in zip_longest(*names) if pair[0] != pair[1])
        yield f"weights, {len(names[0])} and {len(names[1])}: was {shown(was)}, is {shown(has)}"
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
