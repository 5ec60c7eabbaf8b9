"""What a trace does not have of a model's code: branches on values, and values read as numbers."""

from __future__ import annotations

import ast
import contextlib
import linecache
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from heimdall_onnx.common.logs import get_logger

log = get_logger(__name__)

_TORCH = str(Path(torch.__file__).parent)
# Code that is no model's own: that of these packages, and this folder's, which calls models.
_NOT_OWN = (
    *(f"{Path(_TORCH).parent / name}/" for name in ("torch", "onnxscript", "onnx_ir")),
    f"{Path(__file__).parent}/",
)
# PyTorch's own code that only hands on to `_Readings` what Python or NumPy asks.
_HANDS_ON = {f"{_TORCH}/_tensor.py", f"{_TORCH}/overrides.py"}
_BRANCHES = (ast.If, ast.IfExp, ast.While, ast.Assert)
# What makes something else than a tensor of values; lengths, types and devices are no part of it.
_READS = {"__bool__", "__int__", "__float__", "__index__", "__contains__", "__array__"} | {
    *("item", "tolist", "numpy", "equal", "allclose", "is_nonzero")
}
# A trace takes these lengths as constants, the others as they come.
_COUNTS = {"__len__", "__iter__", "unbind"}
_SHAPE = torch.Tensor.shape
_COMPARISONS = ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__bool__")
_SAYS = re.compile(
    r"print|warnings\.warn|torch\._(assert|check)\w*|(.+\.)?_*log(ger|ging)?(\.\w+)?", re.IGNORECASE
)


class _Values(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Knows what was computed from the inputs, or written with it, by where it is stored.

    Lengths are no part of it, since outside of a trace they are plain numbers; but those of what
    was chosen by a mask are.
    """

    def __init__(self, inputs: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # Weak references, as otherwise another storage could come to lie at the same address.
        self._kept: dict[int, tuple[StorageWeakRef, int | None]] = {}
        for tensor in inputs:
            self._keep(tensor, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = _tensors((args, kwargs))
        ours = self.among(operands)
        lengths = [length for length in map(self._length, ours) if length is not None]
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not ours or name.endswith("_like") or name.startswith("new_"):
            return result
        masked = name != "index" or any(one.dtype is torch.bool for one in operands)
        chosen = torch.Tag.dynamic_output_shape in func.tags and masked
        for one in _tensors(result):
            first = one.shape[0] if one.ndim else None
            self._keep(one, first if chosen or first in lengths else None)
        return result

    def among(self, tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """Those that hang on the inputs."""
        return [one for one in tensors if _storage(one).cdata in self._kept]

    def chosen(self, tensors: Iterable[torch.Tensor]) -> bool:
        """Whether the length of one of them hangs on values."""
        return any(self._length(one) == len(one) for one in self.among(tensors) if one.ndim)

    def _length(self, tensor: torch.Tensor) -> int | None:
        return self._kept[_storage(tensor).cdata][1]

    def _keep(self, tensor: torch.Tensor, length: int | None) -> None:
        storage = _storage(tensor)
        _, before = self._kept.get(storage.cdata, (storage, None))
        self._kept[storage.cdata] = storage, before if length is None else length


def _told(name: str) -> Any:
    def method(self: _Length, *others: Any) -> Any:
        self.report()
        return getattr(int, name)(self, *others)

    return method


class _Length(int):
    """How many were chosen by their values; it says so where it is compared."""

    report: Callable[[], None]

    __eq__, __ne__, __lt__, __le__, __gt__, __ge__, __bool__ = map(_told, _COMPARISONS)
    __hash__ = int.__hash__


class _Readings(TorchFunctionMode):
    """Finds where code makes something else of values than tensors."""

    def __init__(self, values: _Values) -> None:
        super().__init__()
        self._values, self.found = values, list[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _READS and self._values.among(_tensors((args, kwargs))):
            self._report()
        result = func(*args, **(kwargs or {}))
        of_shape = name in {"numel", "size"} or getattr(func, "__self__", None) is _SHAPE
        if (of_shape or name in _COUNTS) and self._values.chosen(_tensors(args[:1])):
            if name in _COUNTS:
                self._report()
            elif isinstance(result, tuple):
                return torch.Size([self._counted(result[0]), *result[1:]])
            elif name == "numel" or args[1:] == (0,):
                return self._counted(result)
        return result

    def _counted(self, number: int) -> _Length:
        length = _Length(number)
        length.report = self._report
        return length

    def _report(self) -> None:
        if reading := _reading_at(sys._getframe(2)):
            self.found.append(reading)


def find_branch(
    call: Callable[[Mapping[str, torch.Tensor]], Any], inputs: Mapping[str, torch.Tensor]
) -> str | None:
    """The first place in a model's own code that hangs on the values of its inputs.

    A branch on them or on how many of them there are of a kind, or one where they are read as
    numbers of Python's. Assertions, conditions that only raise an error, and what is only printed
    choose nothing and do not count.

    Args:
        call: Calls the model, in eval mode; what it keeps of a call, it keeps of this one, too.
        inputs: By name; they are left as they are.

    Returns:
        What it does, where, and how it reads; empty if there is none, and None if the model does
        not run while it is watched.
    """
    watched = {name: tensor.clone() for name, tensor in inputs.items()}
    values = _Values(watched.values())
    readings = _Readings(values)
    try:
        with values, readings:
            call(watched)
    except Exception as error:  # whatever can't be watched
        log.info("branches were not looked for", reason=str(error))
        return next(iter(readings.found), None)
    return next(iter(readings.found), "")


def _tensors(tree: Any) -> list[torch.Tensor]:
    """Those that are stored: neither sparse nor stand-ins for a batch of them."""
    found = []
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            with contextlib.suppress(NotImplementedError, RuntimeError):
                _storage(leaf)
                found.append(leaf)
    return found


def _storage(tensor: torch.Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


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
        _only_says(node) and node.lineno <= line <= (node.end_lineno or 0)
        for node in nodes
        if isinstance(node, ast.stmt)
    )
    caught = any(
        isinstance(node, ast.Try) and node.lineno <= line <= (node.body[-1].end_lineno or 0)
        for node in nodes
    )
    if (refuses or only_said or isinstance(innermost, ast.Assert)) and not caught:
        return ""
    done = "branches on the values of its inputs" if innermost else "reads its inputs as numbers"
    return f"{done}: {own_line([(frame, line)])}"


def _only_says(node: ast.stmt) -> bool:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return _SAYS.fullmatch(ast.unparse(node.value.func)) is not None
    return isinstance(node, ast.Raise)


def own_line(frames: Iterable[tuple[FrameType, int]]) -> str:
    """The first line of code that is not PyTorch's or an exporter's, in words; empty if none is."""
    for frame, line in frames:
        code = frame.f_code
        text = linecache.getline(code.co_filename, line).strip()
        if text and is_own(code.co_filename):
            return f"line {line}, in {code.co_name}: `{text}`"
    return ""


def is_own(file: str) -> bool:
    """Whether a file of code is neither PyTorch's, nor an exporter's, nor this wing's."""
    return not file.startswith(_NOT_OWN)
