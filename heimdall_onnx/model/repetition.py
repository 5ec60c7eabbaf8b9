"""Whether a model answers the same inputs alike each time, and what keeps it from doing so."""

from __future__ import annotations

import itertools
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from heimdall_onnx.common.errors import ExportError
from heimdall_onnx.model.branches import own_line
from heimdall_onnx.model.copies import copy_model

# Rounding that hangs on the order of threads stays below, and a gate above.
_RTOL = 1e-5
_HERE = str(Path(__file__).parent)
_BARE = nn.Module()
_GROWING = (list, dict, set)

State = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Answer:
    """What a model answers, however often it is asked.

    Attributes:
        result: As it returned it.
        state: Its parameters and buffers by their names, as they were before it was called.
        changed: Those that calls change without changing any answer.
    """

    result: Any
    state: State
    changed: list[str]


def restore(model: nn.Module, state: State) -> list[str]:
    """Give changed parameters and buffers the values that they had; the names of those.

    A cache that has another length by now is left as it is.
    """
    found = _tensors(model)
    changed = [
        name
        for name, old in state.items()
        if name in found
        and found[name].shape == old.shape
        and not torch.equal(found[name].nan_to_num(), old.nan_to_num())
    ]
    with torch.no_grad():
        for name in changed:
            found[name].copy_(state[name])
    return changed


def repeatable_answer(
    model: nn.Module,
    call: Callable[[Any, nn.Module], Any],
    inputs: tuple[Any, Any],
    named: Callable[[Any], State],
) -> Answer:
    """What a model answers, if that hangs on its inputs alone; its state is left as it was.

    Args:
        model: In eval mode; gradients are off.
        call: Runs it, or a copy of it, on inputs.
        inputs: Those that are asked for, and others, which must leave nothing behind.
        named: Gives what a call returned by the names of the outputs.

    Raises:
        ExportError: Naming what draws random numbers, or what a call changes.
    """
    state = {name: tensor.clone() for name, tensor in _tensors(model).items()}
    kept = _attributes(model)
    # What is set at the first call stays, so that only one that was never called can tell.
    others = [call(inputs[0], copy_model(model))]
    call(inputs[1], model)
    others.append(call(inputs[0], model))
    changed = restore(model, state)
    first = call(inputs[0], model)
    restore(model, state)
    differences = (_difference(named(first), named(other)) for other in others)
    name, difference = max(differences, key=lambda found: found[1])
    if not name:
        return Answer(first, state, changed)
    with _Watch(model) as watch:
        call(inputs[0], model)
    now = _attributes(model)
    changed += [name for name, one in now.items() if kept.get(name, one) != one]
    longer = [n for n, t in _tensors(model).items() if n not in state or state[n].shape != t.shape]
    changed = changed or longer or [name for name in now if name not in kept]
    differs = f"{name} differs by {difference:.3g} on the same inputs, since"
    who, training = type(model).__name__, "in training only (`if self.training:`)"
    restore(model, state)
    raise ExportError(
        f"PyTorch itself answers otherwise each time: {differs} {watch.drawn} draws random "
        f"numbers. Draw them {training}, or make them an input."
        if watch.drawn
        else f"{who} changes {', '.join(changed) or 'something'} when it is called, in eval mode "
        f"too: {differs} it depends on the calls before, and the file would hold other values "
        f"than the checkpoint. Do so {training}, or make it an input and an output."
    )


def depends_on_batch(answer: State, beside_others: State) -> str:
    """The first output that is another one of the first sample beside others; empty if none is."""
    return _difference(
        *({n: t[:1] for n, t in a.items() if t.ndim} for a in (answer, beside_others))
    )[0]


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: t.detach() for n, t in (*model.named_parameters(), *model.named_buffers())}


def _attributes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """What every other attribute of every module is, and how long."""
    return {
        f"{where}.{name}".lstrip("."): (id(value), len(value) if isinstance(value, _GROWING) else 0)
        for where, module in model.named_modules()
        for name, value in vars(module).items()
        if not hasattr(_BARE, name)
    }


def _difference(first: State, second: State) -> tuple[str, float]:
    """The first output that differs by more than rounding, and by how much at most."""
    for name, one in first.items():
        other = second[name]
        if one.shape != other.shape:
            return name, float("inf")
        expected, found = (t.double().nan_to_num(posinf=1e300, neginf=-1e300) for t in (one, other))
        error = (expected - found).abs().max().item() if expected.numel() else 0.0
        if error > _RTOL * expected.abs().max().item():
            return name, error
    return "", 0.0


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Finds the first operator that draws random numbers, and whose it is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = {id(module): name for name, module in model.named_modules()}
        self.drawn = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.drawn and torch.Tag.nondeterministic_seeded in func.tags:
            self.drawn = str(func.overloadpacket) + self._place()
        return func(*args, **(kwargs or {}))

    def _place(self) -> str:
        """The innermost module that is at work, and the line of code that is not PyTorch's."""
        frames = [
            *itertools.takewhile(
                lambda one: not one[0].f_code.co_filename.startswith(_HERE),
                traceback.walk_stack(sys._getframe(2)),
            )
        ]
        owners = (self._names.get(id(frame.f_locals.get("self"))) for frame, _ in frames)
        module, line = next(filter(None, owners), ""), own_line(frames)
        return (module and f" in {module}") + (line and f" ({line})")
