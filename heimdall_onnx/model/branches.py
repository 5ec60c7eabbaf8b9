"""Branches on an input's values, of which a trace has only the one that its example took."""

from __future__ import annotations

import ast
import linecache
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import torch

from heimdall_onnx.common.logs import get_logger

log = get_logger(__name__)

_TORCH = str(Path(torch.__file__).parent)
_BRANCHES = (ast.If, ast.IfExp, ast.While, ast.Assert)


class _Watched(torch.Tensor):
    """An input, or what was computed from one: PyTorch gives results the class of their operands.

    Lengths are no part of it, since outside of a trace they are plain numbers.
    """

    found: ClassVar[list[str]] = []

    def __bool__(self) -> bool:
        if branch := _branch_at(sys._getframe(1)):
            self.found.append(branch)
        return super().__bool__()


def find_branch(model: Callable[..., Any], inputs: Mapping[str, torch.Tensor], *names: str) -> str:
    """The first branch of a model's own code that hangs on the values of its inputs.

    Assertions, and conditions that only raise an error, choose nothing and do not count.

    Args:
        model: In eval mode.
        inputs: By name; they are left as they are.
        names: Those that are passed by position; the others are passed by name.

    Returns:
        Where it is and how it reads; empty if there is none, or the model does not run on inputs
        that are watched.
    """
    _Watched.found.clear()
    watched = {name: tensor.clone().as_subclass(_Watched) for name, tensor in inputs.items()}
    positional = [watched.pop(name) for name in names]
    try:
        model(*positional, **watched)
    except Exception as error:  # whatever a model does that tells kinds of tensors apart
        log.info("branches were not looked for", reason=str(error))
    return next(iter(_Watched.found), "")


def _branch_at(frame: FrameType) -> str:
    """How the branch that asks reads; empty for what is PyTorch's own, or can't go two ways."""
    code, line = frame.f_code, frame.f_lineno
    if code.co_filename.startswith(_TORCH):
        return ""
    lines = linecache.getlines(code.co_filename)
    here = [
        node
        for node in ast.walk(ast.parse("".join(lines)))
        if isinstance(node, _BRANCHES) and node.test.lineno <= line <= (node.test.end_lineno or 0)
    ]
    innermost = max(here, key=lambda node: node.test.lineno, default=None)
    refuses = (
        isinstance(innermost, ast.If)
        and not innermost.orelse
        and all(isinstance(statement, ast.Raise) for statement in innermost.body)
    )
    if refuses or isinstance(innermost, ast.Assert):
        return ""
    text = linecache.getline(code.co_filename, line).strip()
    return f"line {line}, in {code.co_name}: `{text}`"
