"""Where along the network a lossy variant loses accuracy, and which nodes to keep in float.

The noise of a value is the relative error of the variant's against the fp32 graph's: RMS of the
difference over RMS of the reference (its inverse is the signal-to-noise ratio of quantization that
ONNX Runtime's ``qdq_loss_debug`` reports). A group of nodes is sensitive by the noise that leaves
it beyond what entered, as powers, since independent errors add so.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from heimdall_onnx.common.arrays import Arrays
from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.evidence.variants.accuracy import relative_error
from heimdall_onnx.model.onnx.graph import ScopedGraph

log = get_logger(__name__)

# Where the multiplications are; everything else costs more to convert than it gains.
QUANTIZABLE = ("Conv", "MatMul", "Gemm")
# Each run computes the graph from its beginning, and holds this many groups' values.
_AT_ONCE = 12


@dataclass(frozen=True)
class GroupNoise:
    """What one group of nodes does to the error.

    Attributes:
        scope: The module that the nodes belong to, as ``model.named_modules()`` calls it; the
            node's own name where it shares its module with other groups.
        nodes: Names of its nodes that can be quantized.
        noise: Relative error of what leaves it.
        entering: Relative error of what enters it.
    """

    scope: str
    nodes: tuple[str, ...]
    noise: float
    entering: float

    @property
    def added(self) -> float:
        """Noise that comes in here: the root of the difference of both powers, 0 if it shrinks."""
        if not np.isfinite(self.noise):
            return float("inf") if np.isfinite(self.entering) else 0.0
        return float(np.sqrt(max(self.noise**2 - self.entering**2, 0.0)))


@dataclass(frozen=True)
class NoiseProfile:
    """The noise of a variant along the depth of the network.

    Attributes:
        variant: Its name.
        groups: In the order in which the graph computes them.
        samples: Inputs that it was measured on.
    """

    variant: str
    groups: tuple[GroupNoise, ...] = field(repr=False)
    samples: int

    def most_sensitive(self, count: int) -> tuple[GroupNoise, ...]:
        """The ``count`` groups that add most noise, the worst first."""
        return tuple(sorted(self.groups, key=lambda group: -group.added)[:count])


def noise_profile(
    variant: str, reference: Path, path: Path, modules: Iterable[str], inputs: Arrays
) -> NoiseProfile:
    """Compare a variant with the fp32 graph, value by value, in groups of nodes.

    A group is a single node, or the nodes of the innermost module that holds several. The outermost
    module with the same nodes stands for it: of a residual block the block, whose output is the
    sum, rather than its branch. A node that no module has to itself, a product of queries and keys
    for example, stands for itself.

    Args:
        variant: The variant's name.
        reference: The fp32 ONNX file.
        path: The variant's file.
        modules: Every name in ``model.named_modules(remove_duplicate=False)``.
        inputs: What noise is measured on.

    Raises:
        InvalidModelError: If a file can't be loaded.
        EvidenceError: If one can't run on the inputs.
    """
    known = tuple(modules)
    graph, other = ScopedGraph(reference, known), ScopedGraph(path, known)
    groups = [_place(graph, nodes, scope) for nodes, scope in _groups(graph).items()]
    groups.sort(key=lambda group: graph.producer[graph.around(group.nodes[0])[1][0]])
    noise: dict[str, float] = {}
    for start in range(0, len(groups), _AT_ONCE):
        some = groups[start : start + _AT_ONCE]
        names = {name for group in some for name in (*group.entering, *group.leaving)}
        wanted = [name for name in sorted(names) if name not in noise and name in other.producer]
        expected, found = graph.compute(wanted, inputs), other.compute(wanted, inputs)
        for name in expected.keys() & found.keys():
            noise[name] = relative_error(expected[name], found[name])
    profiled = []
    for group in groups:
        entering, leaving = (
            [noise[name] for name in side if name in noise]
            for side in (group.entering, group.leaving)
        )
        if leaving:
            most = max(leaving), max(entering, default=0.0)
            profiled.append(GroupNoise(group.scope, group.nodes, *most))
    log.info("noise_along_depth", variant=variant, groups=len(profiled))
    return NoiseProfile(variant, tuple(profiled), len(next(iter(inputs.values()))))


class _Group(NamedTuple):
    """Nodes with the values around them."""

    scope: str
    nodes: tuple[str, ...]
    entering: list[str]
    leaving: list[str]


def _place(graph: ScopedGraph, nodes: tuple[str, ...], scope: str | None) -> _Group:
    if scope is None:
        return _Group(nodes[0], nodes, *graph.around(nodes[0]))
    start = graph.members[scope][0] + 1
    return _Group(scope, nodes, graph.entering(scope, start), graph.leaving(scope))


def _groups(graph: ScopedGraph) -> dict[tuple[str, ...], str | None]:
    """The nodes that can be quantized, in groups, each with the module that stands for it."""
    # From the outermost to the innermost, as a module's name only grows.
    scopes = sorted(graph.scopes, key=lambda scope: scope.count("."))
    nodes = {scope: graph.nodes(scope, QUANTIZABLE) for scope in scopes}
    innermost: dict[str, str] = {}
    for scope in scopes:
        if len(nodes[scope]) > 1:
            innermost |= dict.fromkeys(nodes[scope], scope)
    found: dict[str, tuple[str, ...]] = {}
    for scope in scopes:
        for node in nodes[scope]:
            # Beside groups of its own a module's other nodes have nothing in common.
            together = nodes.get(innermost.get(node, ""), ())
            own = len({innermost[other] for other in together}) == 1
            found[node] = found.get(node) or (together if own else (node,))
    alone = ((node,) for node in graph.unscoped(QUANTIZABLE))
    return {
        group: next((scope for scope in scopes if nodes[scope] == group), None)
        for group in (*found.values(), *alone)
    }
