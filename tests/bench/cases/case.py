"""A case: a checkpoint for a model, and what should become of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from heimdall_onnx import Axis, Signature, TensorSpec

Should = Literal["release", "ask", "refuse", "either"]
State = Mapping[str, Any]

_FOREIGN: dict[str, type] = {}


@dataclass(frozen=True)
class Case:
    """What is tried, and what should come of it.

    Attributes:
        name: Unique among all.
        should: ``release``, ``refuse``, ``ask`` (refuse, with every reading and the option that
            chooses it) or ``either``, where both can be defended.
        write: Writes the checkpoint into an empty folder and returns its path, or what is given in
            its place.
        model: Import string of the model.
        right: The state dict that the model's own ``load_state_dict`` is given to judge by; where
            it should be asked, one for each reading.
        reference: Makes the module that these are loaded into; the model itself by default.
        opset: Of the export.
        options: Further parameters of the release.
        data: Writes the evaluation data and returns their path; None for synthetic inputs.
        labelled: Whether those have true positions, which must be used.
        says: What a refusal must say, as a regular expression; anything where it is empty.
        probes: Inputs on which a released file is held against the model; drawn by default.
        shown: Which elements of the outputs count, by the inputs; all by default.
    """

    name: str
    should: Should
    write: Callable[[Path], Path | str]
    model: str
    right: Callable[[], list[State]] = list
    reference: Callable[[], nn.Module] | None = None
    opset: int = 20
    options: Mapping[str, Any] = field(default_factory=dict)
    data: Callable[[Path], Path] | None = None
    labelled: bool = False
    says: str = ""
    probes: Callable[[np.random.Generator], Iterator[dict[str, np.ndarray]]] | None = None
    shown: Callable[[Mapping[str, np.ndarray]], np.ndarray] | None = None


def saved(
    make: Callable[[], Any], name: str = "weights.pt", **options: Any
) -> Callable[[Path], Path]:
    """Has ``torch.save`` write what ``make`` makes into one file."""

    def write(folder: Path) -> Path:
        path = folder / name
        tree = make()
        with _importable():
            torch.save(tree, path, **options)
        return path

    return write


def foreign(spelling: str, **attributes: Any) -> Any:
    """An object of a class that there was where a checkpoint was written, and is not here."""
    module, _, name = spelling.rpartition(".")
    made = _FOREIGN.setdefault(
        spelling, type(name, (), {"__module__": module, "__qualname__": name})
    )()
    vars(made).update(attributes)
    return made


@contextmanager
def _importable() -> Iterator[None]:
    # Whoever pickles an object must find its class.
    added = {}
    for made in _FOREIGN.values():
        parts = made.__module__.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            if name not in sys.modules:
                added[name] = sys.modules[name] = ModuleType(name)
        if made.__module__ in added:
            setattr(added[made.__module__], made.__name__, made)
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]


def declared(takes: str, gives: str, **lengths: tuple[int, ...]) -> Signature:
    """A signature from lines of ``name dtype axis,axis,… [low..high] [hides name]``."""
    axes = tuple(Axis(name, found) for name, found in lengths.items())
    return Signature(_specs(takes), _specs(gives), axes)


def _specs(lines: str) -> tuple[TensorSpec, ...]:
    specs = []
    for line in lines.split(";"):
        name, dtype, shape, *further = line.split()
        options: dict[str, Any] = {}
        if further and ".." in further[0]:
            low, _, high = further.pop(0).partition("..")
            options["range"] = (float(low), float(high))
        if further:
            options[{"hides": "masks", "in": "unit"}[further[0]]] = (
                (further[1],) if further[0] == "hides" else " ".join(further[1:])
            )
        axes = tuple(int(axis) if axis.isdigit() else axis for axis in shape.split(","))
        specs.append(TensorSpec(name, dtype, axes, **options))
    return tuple(specs)
