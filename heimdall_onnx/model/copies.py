"""A model copied, or written for another process, whatever its modules are made of."""

from __future__ import annotations

import copy
import copyreg
import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import cloudpickle
import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from heimdall_onnx.common.errors import EvidenceError
from heimdall_onnx.common.logs import get_logger

log = get_logger(__name__)

_MAKERS: WeakKeyDictionary[nn.Module, Callable[[], nn.Module]] = WeakKeyDictionary()


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    def reducer_override(self, obj: Any) -> Any:
        # Their classes are made at run time, which cloudpickle takes along, and only refuse to be
        # pickled by others, who can't.
        if isinstance(obj, nn.Module) and is_parametrized(obj):
            return copyreg.__newobj__, (type(obj),), vars(obj)  # type: ignore[attr-defined]
        return super().reducer_override(obj)


class _Made:
    """Is made anew, by what makes a model, where it is unpickled."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        self._make = make

    def __reduce__(self) -> tuple[Callable[[], nn.Module], tuple[()]]:
        return self._make, ()


def remember_maker(model: nn.Module, make: Callable[[], nn.Module]) -> None:
    """Have ``model`` made anew by ``make``, which can be pickled, where it can't be itself."""
    _MAKERS[model] = make


def pickle_model(model: nn.Module) -> bytes:
    """A model for another process of this program, which ``torch.load`` reads.

    Functions and classes that can't be imported are taken along. A model of a checkpoint with a
    part that can't be pickled, a lock or a compiled module, is loaded again from its file.

    Raises:
        EvidenceError: If it can't be pickled, and nobody knows how it was made.
    """
    found, target = io.BytesIO(), SimpleNamespace(__name__="cloudpickle", Pickler=_Pickler)
    try:
        torch.save(model, found, pickle_module=target)
    except Exception as error:  # whatever an attribute of the model raises that can't be pickled
        if model not in _MAKERS:
            raise EvidenceError(
                f"{type(model).__name__} can't be handed to another process: {error}. Every "
                "attribute of it must be picklable, or it must be loaded from a checkpoint"
            ) from error
        log.info("the model is loaded again in each process", reason=str(error))
        found = io.BytesIO()
        torch.save(_Made(_MAKERS[model]), found, pickle_module=target)
    return found.getvalue()


def copy_model(model: nn.Module) -> nn.Module:
    """A model with weights of its own, in the modes that this one's modules are in.

    Raises:
        EvidenceError: As `pickle_model`.
    """
    try:
        return copy.deepcopy(model)
    except Exception as error:  # whatever keeps a part of it from being copied
        log.info("the model is copied as for another process", reason=str(error))
    # Written a line above: not an untrusted checkpoint.
    made: nn.Module = torch.load(io.BytesIO(pickle_model(model)), weights_only=False)
    return made.train(model.training)
