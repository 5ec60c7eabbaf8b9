"""Error along the depth of the network: how far each module's output is from PyTorch's.

Where `first_departure` names one module, this shows the course: whether the error jumps at one
place, grows bit by bit, or heals.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.evidence.parity.departure import LargestError, compare_values, values_of
from heimdall_onnx.model.onnx.graph import ScopedGraph

log = get_logger(__name__)


@dataclass(frozen=True)
class ModuleError:
    """The largest error in what one module returns.

    Attributes:
        scope: The module, as ``model.named_modules()`` calls it.
        module_type: The module's class.
        max_abs_error: Largest absolute error; infinite where NaN or Inf are in other places.
        limit: The error from which on it departs, see `first_departure`.
        pytorch_value: PyTorch's element where the error is largest.
        onnx_value: The ONNX graph's element there.
    """

    scope: str
    module_type: str
    max_abs_error: float
    limit: float
    pytorch_value: float
    onnx_value: float

    @property
    def excess(self) -> float:
        """The error in units of its limit."""
        return self.max_abs_error / self.limit


@dataclass(frozen=True)
class DepthProfile:
    """The error of every module that can be compared.

    Attributes:
        modules: In the order in which the graph computes their outputs.
        skipped: Modules of the graph whose output it does not have as a value of its own.
        where: The inputs, in words.
    """

    modules: tuple[ModuleError, ...]
    skipped: int
    where: str


def depth_profile(
    model: nn.Module,
    onnx_path: Path | str,
    inputs: Mapping[str, npt.NDArray[Any]],
    *,
    tolerance: float = 1e-5,
    where: str = "",
) -> DepthProfile:
    """Compare what every module returns with what leaves its nodes, without graph optimization.

    Both models run once for every few modules, whose outputs alone are kept: memory grows with
    the largest outputs, not with the depth.

    Args:
        model: In eval mode.
        onnx_path: Its export.
        inputs: One array per input of the model's signature.
        tolerance: The tolerance that the comparison used.
        where: The inputs, in words.

    Raises:
        InvalidModelError: If ONNX Runtime can't load the file.
        EvidenceError: If a model can't run on the inputs.
    """
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    graph = ScopedGraph(Path(onnx_path), names)
    # A container whose output is its last module's would only repeat that: the innermost stands.
    innermost: dict[tuple[str, ...], str] = {}
    for scope in graph.scopes:
        innermost[tuple(graph.leaving(scope))] = scope
    innermost.pop((), None)
    ordered = sorted(innermost.values(), key=lambda s: max(map(graph.position, graph.leaving(s))))
    found = []
    for scope, tensors, values in values_of(model, graph, ordered, dict(inputs)):
        worst = _largest(tensors, values, tolerance)
        if worst is not None:
            kind = type(model.get_submodule(scope)).__name__
            found.append(
                ModuleError(
                    scope, kind, worst.error, worst.limit, worst.pytorch_value, worst.onnx_value
                )
            )
    log.info("error_along_depth", compared=len(found), modules=len(ordered))
    return DepthProfile(tuple(found), len(ordered) - len(found), where)


def _largest(
    tensors: list[npt.NDArray[Any]], values: Mapping[str, npt.NDArray[Any]], tolerance: float
) -> LargestError | None:
    """The largest difference between tensors and values that belong together.

    A module may return more tensors than the graph has values, or the other way round; of each
    shape only as many pairs count as there can be, the closest.
    """
    worst: LargestError | None = None
    for shape in {value.shape for value in values.values()}:
        alike = [tensor for tensor in tensors if tensor.shape == shape]
        pairs = [
            min((compare_values(t, v, tolerance) for t in alike), key=lambda d: d.error)
            for v in values.values()
            if v.shape == shape and alike
        ]
        for pair in sorted(pairs, key=lambda d: d.error)[: len(alike)]:
            if worst is None or not np.less_equal(pair.error, worst.error):
                worst = pair
    return worst
