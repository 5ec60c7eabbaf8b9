"""What a trace does not have of a model's code: branches on values, and values read as numbers."""

from __future__ import annotations

import ast
import linecache
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import torch

from heimdall_onnx.common.logs import get_logger

log = get_logger(__name__)

_TORCH = str(Path(torch.__file__).parent)
# Code that is no model's own: that of these packages, and this folder's, which calls models.
_NOT_OWN = (
    *(f"{Path(_TORCH).parent / name}/" for name in ("torch", "onnxscript", "onnx_ir")),
    f"{Path(__file__).parent}/",
)
# PyTorch's own code that only hands on to `_Watched` what Python or NumPy asks.
_HANDS_ON = {f"{_TORCH}/_tensor.py", f"{_TORCH}/overrides.py"}
_BRANCHES = (ast.If, ast.IfExp, ast.While, ast.Assert)
# What makes something else than a tensor of values; lengths, types and devices are no part of it.
_READS = {"__bool__", "__int__", "__float__", "__index__", "__contains__", "__array__"} | {
    *("item", "tolist", "numpy", "equal", "allclose", "is_nonzero")
}


class _Watched(torch.Tensor):
    """An input, or what was computed from one: PyTorch gives results the class of their operands.

    Lengths are no part of it, since outside of a trace they are plain numbers.
    """

    found: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in _READS and (reading := _reading_at(sys._getframe(1))):
            cls.found.append(reading)
        return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]


def find_branch(
    call: Callable[[Mapping[str, torch.Tensor]], Any], inputs: Mapping[str, torch.Tensor]
) -> str:
    """The first place in a model's own code that hangs on the values of its inputs.

    A branch on them, or one that is read as a number of Python's. Assertions, conditions that only
    raise an error, and what is only printed choose nothing and do not count.

    Args:
        call: Calls the model, in eval mode; what it keeps of a call, it keeps of this one, too.
        inputs: By name; they are left as they are.

    Returns:
        What it does, where, and how it reads; empty if there is none, or the model does not run on
        inputs that are watched.
    """
    _Watched.found.clear()
    watched = {name: tensor.clone().as_subclass(_Watched) for name, tensor in inputs.items()}
    try:
        call(watched)
    except Exception as error:  # whatever a model does that tells kinds of tensors apart
        log.info("branches were not looked for", reason=str(error))
    return next(iter(_Watched.found), "")


def _reading_at(frame: FrameType | None) -> str:
    """What is done with the value; empty for what is PyTorch's own, or can't go two ways."""
    while frame is not None and frame.f_code.co_filename in _HANDS_ON:
        frame = frame.f_back
    if frame is None or frame.f_code.co_filename.startswith(_TORCH):
        return ""
    code, line = frame.f_code, frame.f_lineno
    lines = linecache.getlines(code.co_filename)
    nodes = [*ast.walk(ast.parse("".join(lines)))]
    here = [
        node
        for node in nodes
        if isinstance(node, _BRANCHES) and node.test.lineno <= line <= (node.test.end_lineno or 0)
    ]
    innermost = max(here, key=lambda node: node.test.lineno, default=None)
    refuses = (
        isinstance(innermost, ast.If)
        and not innermost.orelse
        and all(isinstance(statement, ast.Raise) for statement in innermost.body)
    )
    only_said = innermost is None and any(
        isinstance(node, ast.Expr | ast.Raise) and node.lineno <= line <= (node.end_lineno or 0)
        for node in nodes
    )
    caught = any(
        isinstance(node, ast.Try) and node.lineno <= line <= (node.body[-1].end_lineno or 0)
        for node in nodes
    )
    if (refuses or only_said or isinstance(innermost, ast.Assert)) and not caught:
        return ""
    done = "branches on the values of its inputs" if innermost else "reads its inputs as numbers"
    return f"{done}: {own_line([(frame, line)])}"


def own_line(frames: Iterable[tuple[FrameType, int]]) -> str:
    """The first line of code that is not PyTorch's or an exporter's, in words; empty if none is."""
    for frame, line in frames:
        code = frame.f_code
        text = linecache.getline(code.co_filename, line).strip()
        if text and not code.co_filename.startswith(_NOT_OWN):
            return f"line {line}, in {code.co_name}: `{text}`"
    return ""
