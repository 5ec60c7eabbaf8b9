"""What must hold of an exported file before anyone else sees it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from torch import nn

from heimdall_onnx.common.arrays import Arrays
from heimdall_onnx.common.errors import EvidenceError, ExportError, InvalidModelError
from heimdall_onnx.common.text import listed
from heimdall_onnx.model.examples import Examples, moved
from heimdall_onnx.model.inference import open_session, run_onnx, run_pytorch
from heimdall_onnx.model.onnx.file import read_model
from heimdall_onnx.model.signature import Signature, TensorSpec

# Enough to tell a wrong result from rounding, TF32 on a GPU included; parity is judged elsewhere.
_PROOF_TOLERANCE = 1e-2
_LEAST_SCALE = 1e-6


def named_axes(spec: TensorSpec) -> dict[int, str]:
    """The dynamic axes of ``spec``: position to name."""
    return {axis: name for axis, name in enumerate(spec.shape) if isinstance(name, str)}


def check_file(path: Path, signature: Signature, opset: int, changed: Sequence[str] = ()) -> None:
    """Check opset, names and dynamic axes as the file declares them, and that none is ``changed``.

    These are parameters and buffers that calls change: the file would hold values of the tool's.
    """
    structure, weights = read_model(path)
    problems = []
    found = {entry.domain: entry.version for entry in structure.opset_import}.get("")
    if found != opset:
        problems.append(f"the file has opset {found}, asked for was {opset}")
    for kind, specs, values in (
        ("inputs", signature.inputs, structure.graph.input),
        ("outputs", signature.outputs, structure.graph.output),
    ):
        expected, names = [s.name for s in specs], [v.name for v in values]
        if sorted(expected) != sorted(names):
            because = (
                "a name is taken by something else in the model; rename it in the signature"
                if len(expected) == len(names)
                else "nothing in the graph depends on what is missing: the model does not use it, "
                "or reads it as a Python number (.item(), int(…)), which is baked in"
            )
            problems.append(
                f"the {kind} are called {names}, the signature says {expected}: {because}"
            )
        by_name = {value.name: value for value in values}
        problems += [p for s in specs if s.name in by_name for p in _frozen(s, by_name[s.name])]
    held = [tensor.name for tensor in weights if tensor.name in changed]
    problems += [f"it holds {name}, which a call changes, in eval mode too" for name in held]
    if problems:
        raise ExportError(f"the exporter wrote another model:{listed(problems)}")


def _frozen(spec: TensorSpec, value: onnx.ValueInfoProto) -> list[str]:
    dims = value.type.tensor_type.shape.dim
    return [
        f"axis {axis} ({name}) of {spec.name} is frozen at {dims[axis].dim_value}: the model's "
        "code depends on that length (a fixed shape, or a branch on it)"
        for axis, name in named_axes(spec).items()
        if axis < len(dims) and dims[axis].HasField("dim_value")
    ]


def export_lengths(signature: Signature) -> dict[str, int]:
    """A length of each dynamic axis to export with: its last, or another one that no axis has.

    Two axes of one length could not be told apart in what is traced.
    """
    taken = {2}  # the batch
    chosen = {}
    for axis in signature.dynamic_axes:
        free = [length for length in reversed(axis.lengths) if length > 1 and length not in taken]
        chosen[axis.name] = free[0] if free else axis.lengths[-1]
        taken.add(chosen[axis.name])
    return chosen


def _trials(examples: Examples) -> Iterator[tuple[str, str, Arrays]]:
    """Where, along which axis, and inputs: other batches, then each axis at its other lengths."""
    signature = examples.signature
    exported = export_lengths(signature)
    others = [("batch", 1), ("batch", 3)] + [
        (axis.name, length)
        for axis in signature.dynamic_axes
        for length in axis.lengths
        if length != exported[axis.name]
    ]
    for seed, (axis, length) in enumerate(others, 1):
        where, count, lengths = f"{axis} = {length}", 2, exported | {axis: length}
        if axis == "batch":
            where, count, lengths = f"batch {length}", length, exported
        inputs = examples.valid(count, seed, lengths)
        yield where, axis, _shifted(examples, inputs, 1.0 if seed % 2 else -1.0)


def _shifted(examples: Examples, inputs: Arrays, shift: float) -> Arrays:
    """Floating-point inputs moved to one side, as far as they may be: a branch asks for signs."""
    if examples.own:
        return inputs
    free = {s.name for s in examples.signature.inputs if s.range is None}
    return {
        name: array + array.dtype.type(shift)
        if name in free and np.issubdtype(array.dtype, np.floating)
        else array
        for name, array in inputs.items()
    }


def prove_axes(model: nn.Module, path: Path, signature: Signature, suspicions: list[str]) -> None:
    """Run the file at other batch sizes and lengths, on other data, beside the model.

    An axis may be declared dynamic and be frozen inside the graph all the same, and a branch
    on the data or on a shape is traced only one way.

    Args:
        model: In eval mode.
        path: The exported file.
        signature: Names, dtypes and axes.
        suspicions: What may be the reason, in sentences, for the message.

    Raises:
        DataError: If the model's own examples do not fit the signature.
        ExportError: Naming the axis, the length that it was exported with and the one at which
            it fails.
    """
    examples = Examples(signature, model)
    try:
        session = open_session(path, level="none", spinning=False)
    except InvalidModelError as error:
        raise ExportError(f"ONNX Runtime can't load what was exported: {error}") from error
    because = "".join(f" {text}" for text in suspicions[:1])
    exported = {"batch": signature.fixed_batch or 2} | export_lengths(signature)
    for where, axis, inputs in _trials(examples):
        frozen = f", and was exported with {axis} = {exported[axis]}"
        try:
            reference = run_pytorch(model, inputs, signature)
        except Exception as error:  # the model's own code
            advice = f". Declare lengths at which it does: Axis({axis!r}, lengths=(…))"
            raise ExportError(
                f"{type(model).__name__} can't run at {where}, so its axes are not dynamic: "
                f"{short_reason(error)}{advice if axis != 'batch' else ''}{because}"
            ) from error
        try:
            values = run_onnx(session, inputs, signature)
        except EvidenceError as error:
            raise ExportError(
                f"the exported model does not run at {where}, though its axes are declared "
                f"dynamic{frozen}: {short_reason(error)}{because}"
            ) from error
        otherwise = cache(partial(_otherwise, model, inputs, signature))
        for name, expected in reference.items():
            if problem := _unlike(name, expected, values[name], otherwise, where, frozen):
                raise ExportError(f"{problem}.{because}")


def _otherwise(model: nn.Module, inputs: Arrays, signature: Signature) -> tuple[Arrays, Arrays]:
    """What PyTorch answers once more, and to inputs that are rounded otherwise."""
    rng = np.random.default_rng(0)
    near = {name: moved(array, 1.0, rng) for name, array in inputs.items()}
    return run_pytorch(model, inputs, signature), run_pytorch(model, near, signature)


def _unlike(
    name: str,
    expected: npt.NDArray[Any],
    value: npt.NDArray[Any],
    otherwise: Callable[[], tuple[Arrays, Arrays]],
    where: str,
    frozen: str,
) -> str:
    """How an output differs from PyTorch's; empty if it does not."""
    if expected.shape != value.shape:
        return (
            f"{name} has shape {value.shape} at {where}, PyTorch gives {expected.shape}: "
            f"an axis is frozen inside the graph{frozen}"
        )
    finite = expected[np.isfinite(expected)]
    # As large as the output itself, unless that is no more than rounding leaves of zero.
    scale = max(_LEAST_SCALE, float(np.abs(finite).max(initial=0)))

    def differing(array: npt.NDArray[Any]) -> int:
        close = np.isclose(array, expected, rtol=0, atol=_PROOF_TOLERANCE * scale, equal_nan=True)
        return int(np.count_nonzero(~close))

    # Many whole numbers may be choices between values that tie, which parity looks into.
    few = value.size // 2 if expected.dtype.kind in "iub" else 0
    if (count := differing(value)) <= few:
        return ""
    again, near = (differing(answers[name]) for answers in otherwise())
    if not again and near >= count:
        return ""
    return (
        f"{name} differs grossly from PyTorch at {where} on other data than was exported "
        f"with{frozen}: the model's result depends on its batch, on a branch or on an operator "
        "that the graph does not have so"
    )


def short_reason(error: BaseException) -> str:
    """The innermost error in one line, without the exporter's advice and terminal colours."""
    error = innermost(error)
    return first_line(str(error)) or type(error).__name__


def innermost(error: BaseException) -> BaseException:
    """What was raised first."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def first_line(text: str) -> str:
    """The first line of ``text`` without terminal colours, and the next if it announces that."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()]
    said = [line for line in lines if line][:2]
    return " ".join(said if said and said[0].endswith(":") else said[:1])[:400]
