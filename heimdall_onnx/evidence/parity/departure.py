"""Where along the network PyTorch and the ONNX graph part: the first module, or the whole course.

The PyTorch side is read by forward hooks, the ONNX side from the values that leave the nodes of a
module. Exporters fuse, fold and drop nodes, so not every module has its output in the graph, and
a value that differs may be an artefact of fusion that heals further on. A departure counts only
if it reaches a departing output of the model other than through values that agree. The course of
the error tells besides whether it jumps at one place, grows bit by bit, or heals.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from heimdall_onnx.common.arrays import Arrays
from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.evidence.parity.statistics import element_errors
from heimdall_onnx.evidence.parity.tolerance import Limit
from heimdall_onnx.model.inference import run_pytorch
from heimdall_onnx.model.onnx.graph import ScopedGraph
from heimdall_onnx.model.signature import signature_of

if TYPE_CHECKING:
    from heimdall_onnx.evidence.parity.report import ParityReport

log = get_logger(__name__)

ROOT = "(model)"
# Rounding within a faithful export of ConvNeXt, tiny and large, at opsets 14 and 20, reaches
# 0.23·tolerance·max(1, max|reference|) in the worst of its modules. Hence a limit of 2 of these,
# and below a quarter of the limit whatever differed before has healed.
_FACTOR = 2.0
_HEALED = 0.25
_SHOWN_OPERATORS = 12
MODULES_AT_ONCE = 8
_NOWHERE = float("inf")
_Array = npt.NDArray[Any]
_excess = attrgetter("excess")


@dataclass(frozen=True)
class LargestDifference:
    """The largest difference between two arrays of one shape.

    Attributes:
        max_abs_error: Largest absolute error; infinite where NaN or Inf are in other places.
        reference_magnitude: Largest absolute value on PyTorch's side.
        limit: The error up to which they agree.
        pytorch_value: PyTorch's element where the error is largest.
        onnx_value: The ONNX graph's element there.
    """

    max_abs_error: float
    reference_magnitude: float
    limit: float
    pytorch_value: float
    onnx_value: float

    @property
    def excess(self) -> float:
        """The error in units of its limit."""
        return self.max_abs_error / self.limit

    @property
    def departs(self) -> bool:
        """Whether it is beyond its limit."""
        return self.excess > 1

    @property
    def healed(self) -> bool:
        """Whether whatever differed before is gone here."""
        return self.excess <= _HEALED


@dataclass(frozen=True)
class ModuleDifference(LargestDifference):
    """The largest error in what one module returns.

    Attributes:
        scope: The module, as ``model.named_modules()`` calls it.
        module_type: The module's class.
    """

    scope: str
    module_type: str


@dataclass(frozen=True)
class Departure(ModuleDifference):
    """Where the ONNX graph leaves the PyTorch model.

    The scope is ``"(model)"`` for the model itself: something it does between its modules.

    Attributes:
        operators: The ONNX nodes of the module, as ``"Op name"``; at most 12.
    """

    operators: tuple[str, ...]


@dataclass(frozen=True)
class DepthProfile:
    """The error of every module that can be compared.

    Attributes:
        modules: In the order in which the graph computes their outputs.
        skipped: Modules of the graph whose output it does not have as a value of its own.
        where: The inputs, in words.
    """

    modules: tuple[ModuleDifference, ...]
    skipped: int
    where: str


def locate_departure(report: ParityReport, model: nn.Module, onnx_path: Path) -> Departure | None:
    """The deepest module, first in execution order, from which the graph departs, if a gate failed.

    Looked at are the worst inputs. A value departs if its largest absolute error exceeds
    2·tolerance·max(1, max|reference|) or NaN and Inf are in other places. What an exporter folded
    into a neighbour is named by the module whose scope the fused node carries.

    Args:
        report: What the comparison found.
        model: In eval mode.
        onnx_path: Its export.

    Returns:
        None where every parity gate holds, or where no module departs with the graph
        optimizations off: the fault then lies in a fusion of ONNX Runtime's, between the rows of
        a batch, or below what can be told from rounding inside the network.

    Raises:
        InvalidModelError: If ONNX Runtime can't load the file.
        EvidenceError: If ONNX Runtime can't run it on the inputs.
    """
    if all(gate.passed for gate in report.gates()):
        return None
    graph = _graph_of(model, onnx_path)
    found = _Search(model, graph, report.worst_inputs, report.tolerance).run()
    log.info("first_departure", path=str(onnx_path), scope=found.scope if found else None)
    return found


def trace_depth(report: ParityReport, model: nn.Module, onnx_path: Path) -> DepthProfile | None:
    """Compare what every module returns with what leaves its nodes, without graph optimization.

    Both models run on the worst inputs, once for every few modules, whose outputs alone are kept:
    memory grows with the largest outputs, not with the depth.

    Args:
        report: What the comparison found.
        model: In eval mode.
        onnx_path: Its export.

    Returns:
        None where every parity gate holds.

    Raises:
        InvalidModelError: If ONNX Runtime can't load the file.
        EvidenceError: If a model can't run on the inputs.
    """
    if all(gate.passed for gate in report.gates()):
        return None
    graph = _graph_of(model, onnx_path)
    # A container whose output is its last module's would only repeat that: the innermost stands.
    innermost: dict[tuple[str, ...], str] = {}
    for scope in graph.scopes:
        innermost[tuple(graph.leaving(scope))] = scope
    innermost.pop((), None)
    ordered = sorted(
        innermost.values(), key=lambda s: max(map(graph.producer.__getitem__, graph.leaving(s)))
    )
    found = []
    for scope, tensors, values in _values_of(model, graph, ordered, report.worst_inputs):
        worst = _match_values(tensors, values, report.tolerance).worst
        if worst is not None:
            kind = type(model.get_submodule(scope)).__name__
            found.append(ModuleDifference(**vars(worst), scope=scope, module_type=kind))
    log.info("error_along_depth", compared=len(found), modules=len(ordered))
    return DepthProfile(tuple(found), len(ordered) - len(found), report.worst_where)


def _graph_of(model: nn.Module, onnx_path: Path) -> ScopedGraph:
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    return ScopedGraph(onnx_path, names)


@dataclass(frozen=True)
class _Match:
    """A module's tensors beside the graph's values of the same shapes.

    Attributes:
        healed: Values in which whatever differed before is gone.
        departing: Values that depart.
        worst: The largest error; None where nothing can be compared.
    """

    healed: frozenset[str]
    departing: frozenset[str]
    worst: LargestDifference | None


class _Search:
    """Descends from the model into its modules, one level at a time."""

    def __init__(
        self, model: nn.Module, graph: ScopedGraph, inputs: Arrays, tolerance: float
    ) -> None:
        self._model, self._graph, self._inputs = model, graph, inputs
        self._tolerance = tolerance
        self._healed: set[str] = set()
        self._wrong_outputs: set[str] = set()

    def run(self) -> Departure | None:
        signature = signature_of(self._model)
        reference = run_pytorch(self._model, self._inputs, signature)
        values = self._graph.compute(reference, self._inputs)
        found = {n: compare_values(a, values[n], self._tolerance) for n, a in reference.items()}
        self._healed |= {name for name, error in found.items() if error.healed}
        self._wrong_outputs |= {name for name, error in found.items() if error.departs}
        if not self._wrong_outputs:
            return None
        return self._descend("") or self._departure("", max(found.values(), key=_excess))

    def _descend(self, scope: str) -> Departure | None:
        """The first departure inside ``scope``, or None if no module there departs."""
        matches = self._match_children(scope)
        # In the graph's order, not the modules': one called twice may depart the second time.
        starts = sorted((self._start(child, match), child) for child, match in matches.items())
        for start, child in starts:
            worst = matches[child].worst
            if start == _NOWHERE:
                break
            if worst is None:
                found = self._descend(child)
                if found is not None:
                    return found
                continue
            before = self._input_difference(child, start)
            if before is not None:
                return self._departure(scope, before)
            return self._descend(child) or self._departure(child, worst)
        return None

    def _start(self, scope: str, match: _Match) -> float:
        """Where in the graph a module departs, or where it begins if nothing of it is known."""
        if match.worst is None:
            return min(self._graph.members.get(scope, ()), default=_NOWHERE)
        if not match.worst.departs:
            return _NOWHERE
        reaching = filter(self._matters, match.departing)
        return min((self._graph.producer[name] for name in reaching), default=_NOWHERE)

    def _matters(self, name: str) -> bool:
        return self._graph.reaches(name, self._wrong_outputs, self._healed)

    def _match_children(self, scope: str) -> dict[str, _Match]:
        """Every child of ``scope``, compared."""
        matches = {}
        children = _children(scope, self._model.get_submodule(scope))
        for child, tensors, values in _values_of(self._model, self._graph, children, self._inputs):
            matches[child] = _match_values(tensors, values, self._tolerance)
            self._healed |= matches[child].healed
        return matches

    def _input_difference(self, scope: str, start: float) -> LargestDifference | None:
        """How what enters the module differs already: then the fault lies before it."""
        tensors = _record_tensors(self._model, self._inputs, [scope], before=True).get(scope, [])
        values = self._graph.compute(self._graph.entering(scope, int(start)), self._inputs)
        match = _match_values(tensors, values, self._tolerance)
        departs = match.worst is not None and match.worst.departs
        return match.worst if departs and any(map(self._matters, match.departing)) else None

    def _departure(self, scope: str, difference: LargestDifference) -> Departure:
        return Departure(
            **vars(difference),
            scope=scope or ROOT,
            module_type=type(self._model.get_submodule(scope)).__name__,
            operators=self._graph.operators(scope, _SHOWN_OPERATORS),
        )


def _values_of(
    model: nn.Module, graph: ScopedGraph, scopes: Iterable[str], inputs: Arrays
) -> Iterator[tuple[str, list[_Array], Arrays]]:
    """Each module with the tensors it returns and the graph's values that leave its nodes.

    A few modules at a time, so that memory does not grow with the depth of the network.
    """
    listed = list(scopes)
    for start in range(0, len(listed), MODULES_AT_ONCE):
        some = listed[start : start + MODULES_AT_ONCE]
        tensors = _record_tensors(model, inputs, some)
        leaving = {scope: graph.leaving(scope) for scope in some}
        values = graph.compute((name for names in leaving.values() for name in names), inputs)
        for scope in some:
            own = {name: values[name] for name in leaving[scope] if name in values}
            yield scope, tensors.get(scope, []), own


def _record_tensors(
    model: nn.Module, inputs: Arrays, scopes: Iterable[str], *, before: bool = False
) -> dict[str, list[_Array]]:
    """What modules return, or take with ``before``, in one run of ``model`` on ``inputs``.

    Returns:
        By the module's name, in execution order, the tensors of every call of it; a module that
        was not called is absent.
    """
    recorded: dict[str, list[_Array]] = {}

    def keep(scope: str, values: Any) -> None:
        # Copied at once: an operation in place may overwrite them.
        recorded.setdefault(scope, []).extend(
            _to_numpy(leaf) for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)
        )

    def hook(scope: str) -> Any:
        module = model.get_submodule(scope)
        if before:
            return module.register_forward_pre_hook(
                lambda _, args, kwargs: keep(scope, (args, kwargs)), with_kwargs=True
            )
        return module.register_forward_hook(lambda _, args, output: keep(scope, output))

    handles = [hook(scope) for scope in scopes]
    try:
        run_pytorch(model, inputs, signature_of(model))
    finally:
        for handle in handles:
            handle.remove()
    return recorded


def _children(scope: str, module: nn.Module) -> Iterator[str]:
    """Names of the modules that ``module`` calls; lists and dictionaries of modules are opened."""
    for name, child in module.named_children():
        full = f"{scope}.{name}" if scope else name
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _children(full, child)
        else:
            yield full


def _to_numpy(tensor: torch.Tensor) -> _Array:
    value = tensor.detach().cpu()
    if value.dtype == torch.bfloat16:  # NumPy has no such type
        value = value.float()
    return np.array(value.numpy(), copy=True)


def _match_values(tensors: list[_Array], values: Mapping[str, _Array], tolerance: float) -> _Match:
    """Pair tensors and values of one shape, whichever are closest.

    A module may return tensors that the graph has dropped, and the graph may have values that no
    tensor stands for: of each shape only as many pairs count as there can be, the closest.
    """
    closest = {
        name: min(
            (compare_values(t, value, tolerance) for t in tensors if t.shape == value.shape),
            key=lambda difference: difference.max_abs_error,
            default=None,
        )
        for name, value in values.items()
    }
    compared = {name: found for name, found in closest.items() if found is not None}
    counted = []
    for shape in {values[name].shape for name in compared}:
        alike = [found for name, found in compared.items() if values[name].shape == shape]
        count = sum(tensor.shape == shape for tensor in tensors)
        counted += sorted(alike, key=_excess)[:count]
    return _Match(
        healed=frozenset(name for name, found in compared.items() if found.healed),
        departing=frozenset(name for name, found in compared.items() if found.departs),
        worst=max(counted, key=_excess, default=None),
    )


def compare_values(reference: _Array, value: _Array, tolerance: float) -> LargestDifference:
    """The largest difference between two arrays; infinite where they can't be compared."""
    if reference.shape != value.shape:
        magnitude = float(np.abs(reference).max(initial=0))
        return LargestDifference(np.inf, magnitude, tolerance, float("nan"), float("nan"))
    a, b = reference.astype(np.float64).ravel(), value.astype(np.float64).ravel()
    error, _, _ = element_errors(a, b, Limit(tolerance, 0.0))
    magnitude = float(np.abs(a[np.isfinite(a)]).max(initial=0))
    limit = _FACTOR * tolerance * max(1.0, magnitude)
    if a.size == 0:
        return LargestDifference(0.0, magnitude, limit, float("nan"), float("nan"))
    worst = int(error.argmax())
    return LargestDifference(
        float(error[worst]), magnitude, limit, float(a[worst]), float(b[worst])
    )
