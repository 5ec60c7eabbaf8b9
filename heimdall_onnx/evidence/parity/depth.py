"""Error along the depth of the network: how far each module's output is from PyTorch's.

Where `first_departure` names one module, this shows the course: whether the error jumps at one
place, grows bit by bit, or heals.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
from torch import nn

from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.evidence.parity.departure import ModuleDifference, match_values, values_of
from heimdall_onnx.model.onnx.graph import ScopedGraph

log = get_logger(__name__)


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
    ordered = sorted(
        innermost.values(), key=lambda s: max(map(graph.producer.__getitem__, graph.leaving(s)))
    )
    found = []
    for scope, tensors, values in values_of(model, graph, ordered, dict(inputs)):
        worst = match_values(tensors, values, tolerance).worst
        if worst is not None:
            kind = type(model.get_submodule(scope)).__name__
            found.append(ModuleDifference(**vars(worst), scope=scope, module_type=kind))
    log.info("error_along_depth", compared=len(found), modules=len(ordered))
    return DepthProfile(tuple(found), len(ordered) - len(found), where)
