"""An exported graph seen by the PyTorch modules its nodes come from.

Exporters record a node's module: the one based on ``torch.export`` in the node's metadata, the
TorchScript one in the node's name (``/backbone/backbone.0/Conv``).
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

from heimdall_onnx.common.arrays import Arrays
from heimdall_onnx.common.errors import EvidenceError, InvalidModelError
from heimdall_onnx.model.onnx.file import read_model

NAME_SCOPES = "pkg.torch.onnx.name_scopes"
INLINE_BYTES = 1024


class ScopedGraph:
    """The values that enter and leave each module, and what they are for given inputs.

    Args:
        path: The ONNX file; its values are computed without graph optimization.
        modules: Every name in ``model.named_modules(remove_duplicate=False)``.

    Attributes:
        producer: Of each value that a node produces, where in the execution order it does.
        members: Of each module that has nodes here, where in the execution order they are.

    Raises:
        InvalidModelError: If the file or a weight in it can't be read.
    """

    def __init__(self, path: Path, modules: Iterable[str]) -> None:
        model, weights = read_model(path)
        self._path, self._structure = path, model
        self._nodes = [
            (node.op_type, node.name, tuple(_consumed(node)), tuple(filter(None, node.output)))
            for node in model.graph.node
        ]
        resolver = _ScopeResolver(modules)
        self.members: dict[str, list[int]] = defaultdict(list)
        for index, node in enumerate(model.graph.node):
            for scope in dict.fromkeys(resolver(node)):
                self.members[scope].append(index)
        self._consumers: dict[str, list[int]] = defaultdict(list)
        for index, (_, _, consumed, _) in enumerate(self._nodes):
            for name in consumed:
                self._consumers[name].append(index)
        self.producer = {name: index for index, node in enumerate(self._nodes) for name in node[3]}
        self._outputs = {value.name for value in model.graph.output}
        self._weights = _Weights(weights, path, {*self._consumers, *self._outputs})

    def leaving(self, scope: str) -> list[str]:
        """Values that the module's nodes produce and something outside it uses."""
        members = set(self.members[scope])
        return [
            name
            for index in self.members[scope]
            for name in self._nodes[index][3]
            if name in self._outputs or any(c not in members for c in self._consumers[name])
        ]

    def entering(self, scope: str, before: int) -> list[str]:
        """Values that the module's nodes use and nodes outside it, up to ``before``, produce."""
        members = set(self.members[scope])
        used = (name for index in self.members[scope] for name in self._nodes[index][2])
        return [
            name
            for name in dict.fromkeys(used)
            if self.producer.get(name, before) < before and self.producer[name] not in members
        ]

    def operators(self, scope: str, count: int) -> tuple[str, ...]:
        """The first ``count`` nodes of the module, as ``"Op name"``, constants left out."""
        nodes = [self._nodes[index] for index in self.members[scope]]
        return tuple(f"{op} {name}".strip() for op, name, _, _ in nodes if op != "Constant")[:count]

    def nodes(self, scope: str, operators: Collection[str]) -> tuple[str, ...]:
        """Names of the module's nodes of these operators, in execution order."""
        nodes = (self._nodes[index] for index in self.members[scope])
        return tuple(name for op, name, _, _ in nodes if op in operators)

    def around(self, node: str) -> tuple[list[str], list[str]]:
        """Values that a node of this name uses and others produce, and those that it produces."""
        _, _, used, made = next(found for found in self._nodes if found[1] == node)
        return [name for name in dict.fromkeys(used) if name in self.producer], list(made)

    def unscoped(self, operators: Collection[str]) -> tuple[str, ...]:
        """Names of the model's own nodes of these operators, which are in none of its modules."""
        inside = {index for scope in self.scopes for index in self.members[scope]}
        return tuple(
            name
            for index, (op, name, _, _) in enumerate(self._nodes)
            if op in operators and index not in inside
        )

    def reaches(self, name: str, targets: set[str], blocked: set[str]) -> bool:
        """Whether one of ``targets`` depends on ``name`` other than through ``blocked`` values."""
        waiting, seen = [name], set(blocked)
        while waiting:
            name = waiting.pop()
            if name in seen:
                continue
            if name in targets:
                return True
            seen.add(name)
            waiting += [out for node in self._consumers[name] for out in self._nodes[node][3]]
        return False

    @property
    def scopes(self) -> list[str]:
        """Every module that has nodes here, but for the model itself."""
        return [scope for scope, members in self.members.items() if scope and members]

    def compute(self, names: Iterable[str], inputs: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        """The named values for ``inputs``; those that are no tensors are left out.

        Each call opens a session of its own for just these values: ONNX Runtime keeps every
        output that a session declares until the run ends, asked for or not.

        Raises:
            InvalidModelError: If ONNX Runtime can't load the file.
            EvidenceError: If ONNX Runtime can't run the graph on them.
        """
        wanted = list(dict.fromkeys(names))
        if not wanted:
            return {}
        session = self._open(wanted)
        try:
            values = session.run(wanted, dict(inputs))
        except Exception as error:  # ONNX Runtime's errors share no narrower base
            raise EvidenceError(f"ONNX Runtime can't run the graph: {error}") from error
        return {n: v for n, v in zip(wanted, values, strict=True) if isinstance(v, np.ndarray)}

    def _open(self, names: list[str]) -> ort.InferenceSession:
        """The graph as far as ``names`` need it, with these as its outputs."""
        model = onnx.ModelProto()
        model.CopyFrom(self._structure)
        end = max(1, *(1 + self.producer.get(name, 0) for name in names))
        del model.graph.node[end:]
        del model.graph.output[:]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        used = {name for _, _, consumed, _ in self._nodes[:end] for name in consumed}
        options = ort.SessionOptions()
        options.log_severity_level = 3
        # PyTorch computes between the runs, and would do so beside threads that spin.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # A session that runs once gains nothing from copies of its weights in another layout.
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            self._weights.hand_over(model, options, {*used, *names})
            return ort.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's errors share no narrower base
            raise InvalidModelError(f"ONNX Runtime can't load {self._path}: {error}") from error


class _ScopeResolver:
    """Finds the modules, outermost first, that a node belongs to."""

    def __init__(self, modules: Iterable[str]) -> None:
        self._modules = sorted(filter(None, modules), key=len)
        self._names = set(self._modules)
        self._endings: dict[tuple[str, str], str | None] = {}

    def __call__(self, node: onnx.NodeProto) -> list[str]:
        for entry in node.metadata_props:
            if entry.key == NAME_SCOPES:
                return [s for s in ast.literal_eval(entry.value)[:-1] if s in self._names]
        return self._from_name(node.name)

    def _from_name(self, name: str) -> list[str]:
        """TorchScript gives each module by the end of its name, a second call as ``name_1``."""
        scopes: list[str] = []
        for part in name.split("/")[1:-1]:
            inside = f"{scopes[-1]}." if scopes else ""
            found = self._ending(inside, part) or self._ending(inside, re.sub(r"_\d+$", "", part))
            if found is None:
                break
            scopes.append(found)
        return scopes

    def _ending(self, inside: str, part: str) -> str | None:
        """The outermost module inside ``inside`` whose name ends in ``part``."""
        if (inside, part) not in self._endings:
            fitting = (m for m in self._modules if f".{m}".endswith(f".{part}"))
            self._endings[inside, part] = next((m for m in fitting if m.startswith(inside)), None)
        return self._endings[inside, part]


def _consumed(node: onnx.NodeProto) -> Iterator[str]:
    """Names the node uses, those that its subgraphs capture included."""
    yield from filter(None, node.input)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from _consumed(inner)


class _Weights:
    """The weights of a file, in memory once for all sessions that are opened on it.

    Large ones are handed over as arrays: in the serialized model, ONNX Runtime would hold them
    several times over while it loads.
    """

    def __init__(self, weights: list[onnx.TensorProto], path: Path, used: set[str]) -> None:
        self._inline: list[onnx.TensorProto] = []
        self._handed: dict[str, tuple[onnx.TensorProto, ort.OrtValue]] = {}
        for tensor in weights:
            if tensor.name not in used:
                continue
            array = _array(tensor, path)
            if array.nbytes < INLINE_BYTES:  # shapes and axes, which must be known when it loads
                self._inline.append(onnx.numpy_helper.from_array(array, tensor.name))
                continue
            stub = onnx.TensorProto(
                name=tensor.name,
                dims=tensor.dims,
                data_type=tensor.data_type,
                data_location=onnx.TensorProto.EXTERNAL,
            )
            stub.external_data.add(key="location", value="handed-over")
            self._handed[tensor.name] = (stub, ort.OrtValue.ortvalue_from_numpy(array))

    def hand_over(
        self, model: onnx.ModelProto, options: ort.SessionOptions, used: set[str]
    ) -> None:
        """Give ``model`` the weights in ``used``, through ``options`` where they are large."""
        model.graph.initializer.extend(t for t in self._inline if t.name in used)
        handed = {name: pair for name, pair in self._handed.items() if name in used}
        model.graph.initializer.extend(stub for stub, _ in handed.values())
        options.add_external_initializers(list(handed), [value for _, value in handed.values()])


def _array(tensor: onnx.TensorProto, path: Path) -> npt.NDArray[Any]:
    try:
        return np.asarray(onnx.numpy_helper.to_array(tensor, str(path.parent)))
    except Exception as error:  # whatever broken tensor data makes onnx and NumPy raise
        raise InvalidModelError(f"{path}: {tensor.name} can't be read: {error}") from error
