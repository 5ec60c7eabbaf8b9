"""Running a model, PyTorch or ONNX, on named arrays.

Each framework is imported where it is used: a process that measures one of them must not carry
the other's memory and threads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from heimdall_onnx.common.arrays import Arrays
from heimdall_onnx.common.errors import EvidenceError, InvalidModelError
from heimdall_onnx.common.text import shown
from heimdall_onnx.model.signature import Signature

if TYPE_CHECKING:
    import torch
    from onnxruntime import InferenceSession
    from torch import nn

_CAUSAL = "_detect_is_causal_mask"  # of PyTorch's transformers
OptimizationLevel = Literal["none", "basic", "extended", "all"]


def run_pytorch(
    model: nn.Module,
    inputs: Mapping[str, npt.NDArray[Any]],
    signature: Signature,
    *,
    copied: bool = True,
) -> Arrays:
    """Run ``model`` on ``inputs``, passed as `input_order` says, without gradients.

    The arrays go to the model's own device, floating-point ones in the model's own precision; a
    model without any weights takes them as they are. Where it is not timed, attention runs without
    its fast path, which answers 0 for what a padding mask hides and is in no exported graph.

    Args:
        model: In eval mode.
        inputs: One array per input of the signature.
        signature: What goes in and comes out.
        copied: Whether the model gets copies. It may write into its inputs, which is not to reach
            whoever runs on them next; only where the call is timed they are shared.

    Raises:
        EvidenceError: If the model fails, or returns other outputs than the signature names.
    """
    if signature.fixed_batch not in (None, len(next(iter(inputs.values())))):
        run = functools.partial(run_pytorch, model, signature=signature, copied=copied)
        return in_calls(run, dict(inputs), signature)
    taken = {spec.name: inputs[spec.name] for spec in signature.inputs}
    outputs = named_outputs(model, call_pytorch(model, taken, copied), signature)
    try:
        return {spec.name: outputs[spec.name].cpu().numpy() for spec in signature.outputs}
    except TypeError as error:
        raise EvidenceError(
            f"{type(model).__name__} returns what NumPy has no type for: {error}. Return .float()"
        ) from error


def call_pytorch(
    model: nn.Module, inputs: Mapping[str, npt.NDArray[Any]], copied: bool = True
) -> Any:
    """What ``model`` returns as it is for these inputs and no others, see `run_pytorch`.

    Raises:
        EvidenceError: If the model fails.
    """
    import torch

    state = [*model.parameters(), *model.buffers()]
    device = state[0].device if state else torch.device("cpu")
    precision = next((t.dtype for t in state if t.is_floating_point()), None)

    def tensor(array: npt.NDArray[Any]) -> torch.Tensor:
        value = torch.from_numpy(np.ascontiguousarray(array)).to(device, copy=copied)
        return value.to(precision) if value.is_floating_point() else value

    order = input_order(model, inputs)
    tensors = {name: tensor(array) for name, array in inputs.items()}
    try:
        with plain_attention() if copied else contextlib.nullcontext(), torch.inference_mode():
            return order.call(model, tensors)
    except Exception as error:  # the model's own code
        shapes = {name: array.shape for name, array in inputs.items()}
        raise EvidenceError(f"{type(model).__name__} can't run on {shapes}: {error}") from error


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Run attention as the products it is made of, not as the one operator it is at inference.

    Nor does PyTorch compare a mask with a causal one, a branch on values that can't be traced: the
    hint that it takes from that changes no answer, since the mask itself is given.
    """
    from torch.backends import mha
    from torch.nn.modules import transformer

    fused, compare = mha.get_fastpath_enabled(), vars(transformer)[_CAUSAL]
    mha.set_fastpath_enabled(False)
    setattr(transformer, _CAUSAL, lambda mask, is_causal=None, size=None: is_causal is True)
    try:
        yield
    finally:
        mha.set_fastpath_enabled(fused)
        setattr(transformer, _CAUSAL, compare)


def in_calls(run: Callable[[Arrays], Arrays], inputs: Arrays, signature: Signature) -> Arrays:
    """What ``run`` answers; a model with a fixed batch is called as often as the samples need.

    Its last call is filled with the first samples; what they get is left out. Outputs without a
    batch axis, of that size that is, are joined call by call.
    """
    size, count = signature.fixed_batch, len(next(iter(inputs.values())))
    if size is None or size == count:
        return run(inputs)
    rows = [(start + np.arange(size)) % count for start in range(0, count, size)]
    answers = [run({name: array[r] for name, array in inputs.items()}) for r in rows]
    joined = {n: np.concatenate([np.atleast_1d(one[n]) for one in answers]) for n in answers[0]}
    return {n: a[:count] if len(a) == size * len(rows) else a for n, a in joined.items()}


class InputOrder(NamedTuple):
    """How a model's ``forward`` takes the inputs of its signature."""

    positional: tuple[str, ...]
    keywords: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All of them, as ``forward`` has them."""
        return self.positional + self.keywords

    def call(self, function: Callable[..., Any], inputs: Mapping[str, torch.Tensor]) -> Any:
        """What ``function`` returns for ``inputs``, handed over so."""
        keywords = {name: inputs[name] for name in self.keywords}
        return function(*(inputs[name] for name in self.positional), **keywords)


def input_order(model: nn.Module, names: Iterable[str]) -> InputOrder:
    """Which inputs ``model.forward`` takes by position, in which order, and which by name.

    Where every input is called as a parameter of ``forward`` it goes to that one, whatever the
    order of ``names``; otherwise that counts. What only has a name, and what comes after a
    parameter that gets nothing, goes by name.
    """
    if "forward" in vars(model):  # put there, on this one model
        return _input_order(model.forward, tuple(names), False)
    return _class_input_order(type(model).forward, tuple(names))


def _input_order(forward: Callable[..., Any], names: tuple[str, ...], of_class: bool) -> InputOrder:
    try:
        parameters = list(inspect.signature(forward).parameters.values())[of_class:]
    except (TypeError, ValueError):  # a function of C's
        return InputOrder(names)
    places = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    only_named = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    kinds = {p.kind for p in parameters}
    rest = [name for name in names if name not in only_named]
    if set(rest) <= set(places):
        leading = tuple(itertools.takewhile(set(rest).__contains__, places))
        return InputOrder(leading, tuple(name for name in names if name not in leading))
    keywords = [name for name in names if name in only_named]
    if inspect.Parameter.VAR_KEYWORD in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        keywords += rest[len(places) :]
        rest = rest[: len(places)]
    return InputOrder(tuple(rest), tuple(keywords))


@functools.lru_cache(maxsize=64)
def _class_input_order(forward: Callable[..., Any], names: tuple[str, ...]) -> InputOrder:
    # Kept, as it is asked for at every call that is timed.
    return _input_order(forward, names, True)


def named_outputs(model: nn.Module, result: Any, signature: Signature) -> dict[str, torch.Tensor]:
    """The tensors in what ``model`` returned, by the signature's names, in the model's order.

    One tensor, a sequence in the signature's order, or anything that `flatten_outputs` finds
    tensors in, where an output is called by its own key, by all keys on the way to it with dots
    between, or as `flatten_outputs` calls it.

    Raises:
        EvidenceError: If it does not have the outputs that the signature names.
    """
    names = [spec.name for spec in signature.outputs]
    # The usual case first and by itself: it is in every call that is timed.
    if type(result) is tuple and len(result) == len(names) and all(map(_is_tensor, result)):
        return dict(zip(names, result, strict=True))
    leaves = list(_leaves(result))
    keys = [[key for key in path if isinstance(key, str)] for path, _ in leaves]
    if not any(keys) and len(leaves) == len(names):
        return dict(zip(names, (leaf for _, leaf in leaves), strict=True))
    found: dict[str, torch.Tensor] = {}
    twice = []
    for (path, leaf), own in zip(leaves, keys, strict=True):
        called = [
            n
            for n in (_dotted(path), ".".join(own), *own[-1:], f"output.{_dotted(path)}")
            if n in names
        ]
        for name in called[:1]:
            twice += [name] if name in found else []
            found[name] = leaf
    if twice or found.keys() != set(names):
        in_order = hasattr(result, "_fields") or dataclasses.is_dataclass(result)
        if in_order and len(leaves) == len(names) and not found:
            return dict(zip(names, (leaf for _, leaf in leaves), strict=True))
        returned = sorted(_dotted(path) for path, _ in leaves) if any(keys) else len(leaves)
        raise EvidenceError(
            f"{type(model).__name__} returned {returned} outputs; its signature names {names}"
        )
    return found


def flatten_outputs(value: Any) -> dict[str, torch.Tensor]:
    """The tensors in what a model returned, with names, in the model's order.

    They may lie in dictionaries, sequences, named tuples and dataclasses, as those of Hugging
    Face, and in one another. Each is called by its key with those around it before it and dots
    between, by its place in a sequence, ``"hidden_states.0"``; what has no key around it is
    ``"output"`` or ``"output_0"``. None, and what else is no tensor, is left out.
    """
    return {_dotted(path): leaf for path, leaf in _leaves(value)}


def _dotted(path: tuple[str | int, ...]) -> str:
    keys = [*map(str, path)] or ["output"]
    if path and isinstance(path[0], int):
        keys[0] = f"output_{keys[0]}"
    return ".".join(keys)


def _leaves(
    value: Any, path: tuple[str | int, ...] = ()
) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """The tensors in ``value`` with the keys, and places in sequences, on the way to them."""
    items: Iterable[tuple[Any, Any]] = ()
    if _is_tensor(value):
        yield path, value
    elif isinstance(value, Mapping):
        items = ((str(key), inner) for key, inner in value.items())
    elif hasattr(value, "_fields"):
        items = zip(value._fields, value, strict=True)
    elif dataclasses.is_dataclass(value):
        items = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    for key, inner in items:
        yield from _leaves(inner, (*path, key))


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "detach")


def open_session(
    path: Path | str,
    *,
    threads: int | None = None,
    level: OptimizationLevel = "all",
    spinning: bool = True,
    arena: bool = True,
    prepacking: bool = True,
    provider: str = "CPUExecutionProvider",
    provider_options: Mapping[str, str] | None = None,
    behind: Sequence[str] = (),
    profile: Path | None = None,
    optimized: Path | None = None,
) -> InferenceSession:
    """Open an ONNX file on an execution provider, the CPU's by default.

    Args:
        path: The file.
        threads: Intra-op threads; None leaves the choice to ONNX Runtime.
        level: How far ONNX Runtime rewrites the graph: ``"none"``, ``"basic"`` (constant folding,
            redundant nodes), ``"extended"`` (fusions too), or ``"all"`` (layouts that suit the
            processor too), which is what it is deployed with.
        spinning: Whether idle threads wait actively. It changes no result; in a process that
            runs PyTorch as well, threads that spin take the processor from it.
        arena: Whether memory is kept for the next call.
        prepacking: Whether weights are copied into the layout of the kernels at the start.
        provider: The execution provider. ONNX Runtime takes the CPU's where it can't start.
        provider_options: Options of the provider.
        behind: Providers for what that one can't run, before the CPU's.
        profile: Beginning of the name of a file for what runs, which ``end_profiling`` writes.
        optimized: A file for the graph as it was rewritten.

    Raises:
        InvalidModelError: If ONNX Runtime can't load it.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    if not spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not prepacking:
        options.add_session_config_entry("session.disable_prepacking", "1")
    options.enable_cpu_mem_arena = arena
    known = ort.GraphOptimizationLevel.__members__
    options.graph_optimization_level = known[
        "ORT_DISABLE_ALL" if level == "none" else f"ORT_ENABLE_{level.upper()}"
    ]
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    try:
        providers = [(provider, dict(provider_options or {})), *behind]
        return ort.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # ONNX Runtime's errors share no narrower base
        raise InvalidModelError(
            f"ONNX Runtime can't load {path}: {shown(str(error), 1000)}"
        ) from error


def run_onnx(
    session: InferenceSession, inputs: Mapping[str, npt.NDArray[Any]], signature: Signature
) -> Arrays:
    """Run ``session`` on ``inputs`` and return the signature's outputs by name.

    Raises:
        EvidenceError: If the runtime refuses the inputs, a frozen batch axis for example.
    """
    names = [spec.name for spec in signature.outputs]

    def run(feed: Arrays) -> Arrays:
        return dict(zip(names, session.run(names, feed), strict=True))

    try:
        return in_calls(run, {spec.name: inputs[spec.name] for spec in signature.inputs}, signature)
    except EvidenceError:
        raise
    except Exception as error:  # ONNX Runtime's errors share no narrower base
        shapes = {spec.name: inputs[spec.name].shape for spec in signature.inputs}
        raise EvidenceError(f"ONNX Runtime can't run the model on {shapes}: {error}") from error
