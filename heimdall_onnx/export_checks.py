"""What must hold of an exported file before anyone else sees it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from torch import nn

from heimdall_onnx.errors import EvidenceError, ExportError, InvalidModelError
from heimdall_onnx.inference import open_session, run_onnx, run_pytorch
from heimdall_onnx.onnx_file import read_structure
from heimdall_onnx.signature import Arrays, Signature, TensorSpec

# Enough to tell a wrong result from rounding, TF32 on a GPU included; parity is judged elsewhere.
_PROOF_TOLERANCE = 1e-2


def example_inputs(signature: Signature, *, batch: int, length: int, seed: int) -> Arrays:
    """Standard-normal floats, and zeros for other dtypes, which may be indices."""
    rng = np.random.default_rng(seed)

    def values(spec: TensorSpec) -> npt.NDArray[Any]:
        shape = [batch] + [n if isinstance(n, int) else length for n in spec.shape[1:]]
        if isinstance(spec.shape[0], int):
            shape[0] = spec.shape[0]
        dtype = np.dtype(spec.dtype)
        if np.issubdtype(dtype, np.floating):
            return rng.standard_normal(shape).astype(dtype)
        return np.zeros(shape, dtype)

    return {spec.name: values(spec) for spec in signature.inputs}


def named_axes(spec: TensorSpec) -> dict[int, str]:
    """The dynamic axes of ``spec``: position to name."""
    return {axis: name for axis, name in enumerate(spec.shape) if isinstance(name, str)}


def check_file(path: Path, signature: Signature, opset: int) -> None:
    """Check opset, names and dynamic axes as the file declares them."""
    structure = read_structure(path)
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
            problems.append(
                f"the {kind} are called {names}, the signature says {expected}: "
                "a name is taken by something else in the model; rename it in the signature"
            )
        by_name = {value.name: value for value in values}
        problems += [p for s in specs if s.name in by_name for p in _frozen(s, by_name[s.name])]
    if problems:
        raise ExportError("the exporter wrote another model:\n  - " + "\n  - ".join(problems))


def _frozen(spec: TensorSpec, value: onnx.ValueInfoProto) -> list[str]:
    dims = value.type.tensor_type.shape.dim
    return [
        f"axis {axis} ({name}) of {spec.name} is frozen at {dims[axis].dim_value}: the model's "
        "code depends on that length (a fixed shape, or a branch on it)"
        for axis, name in named_axes(spec).items()
        if axis < len(dims) and dims[axis].HasField("dim_value")
    ]


def prove_axes(model: nn.Module, path: Path, signature: Signature, suspicions: list[str]) -> None:
    """Run the file at other batch sizes, on other data, beside the model.

    An axis may be declared dynamic and be frozen inside the graph all the same, and a branch
    on the data is traced only one way.
    """
    try:
        session = open_session(path, level="none", spinning=False)
    except InvalidModelError as error:
        raise ExportError(f"ONNX Runtime can't load what was exported: {error}") from error
    because = f" The tracer had warned: {suspicions[0]}" if suspicions else ""
    for batch, length, shift in ((1, 8, 1.0), (3, 16, -1.0)):
        inputs = {
            name: array + array.dtype.type(shift)
            if np.issubdtype(array.dtype, np.floating)
            else array
            for name, array in example_inputs(
                signature, batch=batch, length=length, seed=batch
            ).items()
        }
        try:
            reference = run_pytorch(model, inputs, signature)
        except Exception as error:  # the model's own code
            raise ExportError(
                f"{type(model).__name__} can't run at batch {batch}, so its axes are not "
                f"dynamic: {short_reason(error)}"
            ) from error
        try:
            values = run_onnx(session, inputs, signature)
        except EvidenceError as error:
            raise ExportError(
                f"the exported model does not run at batch {batch}, though its axes are declared "
                f"dynamic: {short_reason(error)}{because}"
            ) from error
        for name, expected in reference.items():
            _require_same(name, expected, values[name], batch, because)


def _require_same(
    name: str,
    expected: npt.NDArray[Any],
    value: npt.NDArray[Any],
    batch: int,
    because: str,
) -> None:
    if expected.shape != value.shape:
        raise ExportError(
            f"{name} has shape {value.shape} at batch {batch}, PyTorch gives {expected.shape}: "
            f"an axis is frozen inside the graph.{because}"
        )
    finite = expected[np.isfinite(expected)]
    scale = max(1.0, float(np.abs(finite).max(initial=0)))
    if not np.allclose(value, expected, rtol=0, atol=_PROOF_TOLERANCE * scale, equal_nan=True):
        raise ExportError(
            f"{name} differs grossly from PyTorch at batch {batch} on other data than was "
            f"exported with: the model's result depends on its batch, on chance or on a branch "
            f"that the graph does not have.{because}"
        )


def short_reason(error: BaseException) -> str:
    """The innermost error in one line, without the exporter's advice and terminal colours."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(str(error)) or type(error).__name__


def first_line(text: str) -> str:
    """The first line of ``text`` without terminal colours, and the next if it announces that."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()]
    said = [line for line in lines if line][:2]
    return " ".join(said if said and said[0].endswith(":") else said[:1])[:400]
