"""Trained weights, read without running code, and the model built around them."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import re
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from types import ModuleType
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, FailFast, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from heimdall_onnx.common.errors import CheckpointError, DataError, HeimdallError, ParameterError
from heimdall_onnx.common.files import hash_file
from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.common.text import listed, shown
from heimdall_onnx.model.pickles import check_pickles, is_zip
from heimdall_onnx.model.signature import Signature, signature_of
from heimdall_onnx.model.signature_file import SignatureFile, find_signature_file

log = get_logger(__name__)

# Where a checkpoint that was made of others says of which; nobody vouches for it.
MEMBERS = "member_checkpoints"
_MOST_MEMBERS = 1000

DEFAULT_MODEL = "heimdall_onnx:LocalizationNet"
_LIGHTNING_PREFIX = "model."
_NOT_PLAIN = "it is not a plain checkpoint"
_RESAVE = (
    "Only tensors and plain Python values are read, because unpickling anything else can run "
    "code. Where the file comes from, save it again as torch.save({'state_dict': "
    "model.state_dict(), 'hyper_parameters': {...plain values only}}, path) or as "
    "safetensors.torch.save_file(model.state_dict(), path)."
)


class Member(BaseModel):
    """A checkpoint that another one was made of, as that one records it.

    Attributes:
        file: Name of its file.
        sha256: SHA-256 of its content.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    file: Annotated[str, Field(max_length=255)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


_Members = TypeAdapter(
    Annotated[list[Member], FailFast(), Field(min_length=2, max_length=_MOST_MEMBERS)]
)


@dataclass(frozen=True)
class LoadedModel:
    """A model with the weights of a checkpoint.

    Attributes:
        model: In eval mode, on the CPU.
        signature: What it is declared to take and give, by the file beside the checkpoint where
            there is one, else by its class.
        path: The checkpoint.
        sha256: SHA-256 of the checkpoint.
        layout: ``"lightning"``, ``"model_state_dict"``, ``"state_dict"`` or ``"safetensors"``.
        hyper_parameters: As the checkpoint records them; empty if it doesn't.
        model_spec: Import string of the model's class.
        model_kwargs: The arguments it was built with.
        signature_file: The file beside the checkpoint that declares the signature; None where the
            class does.
        members: The checkpoints that an ensemble's was made of, as it records them; empty for any
            other.
    """

    model: nn.Module
    signature: Signature
    path: Path
    sha256: str
    layout: str
    hyper_parameters: dict[str, Any]
    model_spec: str
    model_kwargs: dict[str, Any]
    signature_file: SignatureFile | None = None
    members: tuple[Member, ...] = ()

    @property
    def signature_source(self) -> str:
        """Where the signature comes from, in words."""
        if self.signature_file is not None:
            return f"the file {self.signature_file.path.name}"
        if hasattr(self.model, "signature"):
            return "the model's class"
        return "nobody: the model is taken to have that of the reference model"


@dataclass(frozen=True)
class Weights:
    """What a checkpoint holds.

    Attributes:
        tensors: By the name they have in the file.
        layout: See `LoadedModel`.
        hyper_parameters: Empty if the file records none.
    """

    tensors: dict[str, Tensor]
    layout: str
    hyper_parameters: dict[str, Any]


def load_checkpoint(
    path: Path | str,
    *,
    model: str = DEFAULT_MODEL,
    model_kwargs: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Build ``model`` and load the weights in ``path`` into it, strictly.

    Accepted are Lightning's ``.ckpt``, a dictionary with ``model_state_dict``, a bare state dict
    and safetensors, told apart by content. Hyper-parameters that the checkpoint records become
    the constructor's arguments where it has parameters of those names; ``model_kwargs`` win over
    them. An argument ``pretrained`` is always off: the checkpoint replaces those weights anyway.
    Arguments that the class lists in ``arguments_of_caller``, names of further classes for example,
    are never taken from the file. The checkpoints that it was made of are read where the class has
    ``made_of_checkpoints``, as an ensemble's does.
    A file ``<stem>.signature.yaml`` beside the checkpoint declares the signature, and wins over
    what the class declares; see `model.signature_file`.

    Args:
        path: The checkpoint.
        model: The class, as ``"package.module:Class"``.
        model_kwargs: Arguments of its constructor.

    Raises:
        CheckpointError: If the file is missing, broken, holds code, or does not fit the model;
            every missing, unexpected, wrong-shaped and non-finite weight is named.
        ParameterError: If the model can't be imported or built.
        DataError: If the signature can't be read or contradicts itself.
    """
    source = Path(path)
    model_class = import_model_class(model)
    weights = read_weights(source)
    sha256, declared = hash_file(source), find_signature_file(source)
    given = dict(model_kwargs or {})
    kwargs = _constructor_arguments(model, model_class, weights.hyper_parameters, given)
    # A file's own numbers must not decide how much memory a model takes.
    recorded = sorted(kwargs.keys() - given.keys() - {"pretrained"})
    outline = _outline(model_class, kwargs) if recorded else None
    if outline is not None:
        _fitting(weights.tensors, outline, source, model, kwargs)
    built = _build(model, model_class, kwargs, recorded, source)
    tensors = _fitting(weights.tensors, built, source, model, kwargs)
    built.load_state_dict(tensors, strict=True)
    if declared is not None:
        _declare(built, declared)
    log.info("loaded", path=str(source), sha256=sha256, layout=weights.layout, model=model)
    return LoadedModel(
        model=built.cpu().eval(),
        signature=signature_of(built),
        path=source,
        sha256=sha256,
        layout=weights.layout,
        hyper_parameters=weights.hyper_parameters,
        model_spec=model,
        model_kwargs=kwargs,
        signature_file=declared,
        members=_members(weights.hyper_parameters, model_class, source),
    )


def _members(
    hyper_parameters: Mapping[str, Any], model_class: type[nn.Module], path: Path
) -> tuple[Member, ...]:
    # In any other checkpoint the name is the trainer's own.
    if not getattr(model_class, "made_of_checkpoints", False) or MEMBERS not in hyper_parameters:
        return ()
    try:
        return tuple(_Members.validate_python(hyper_parameters[MEMBERS]))
    except ValidationError as error:
        problems = [
            f"{shown('.'.join(map(str, e['loc']))) or MEMBERS}: {shown(e['msg'])}"
            for e in error.errors(include_url=False, include_input=False)
        ]
        raise CheckpointError(
            f"{path} does not say which checkpoints it was made of: expected under {MEMBERS} a "
            f"list with file and sha256 of each:{listed(problems)}"
        ) from None


def _declare(model: nn.Module, file: SignatureFile) -> None:
    """Let the model itself declare what the file says, for whoever is handed only the model."""
    try:
        model.signature = file.signature  # type: ignore[assignment]
    except AttributeError as error:
        raise DataError(
            f"{file.path} declares a signature, but {type(model).__name__}.signature can't be "
            f"replaced ({error}): remove one of the two"
        ) from error


def read_weights(path: Path | str) -> Weights:
    """Read the tensors in ``path`` without running code that it may hold.

    Raises:
        CheckpointError: If the file is missing, broken or holds something else.
    """
    source = Path(path)
    if not source.is_file():
        found = "a folder" if source.is_dir() else "no such file"
        raise CheckpointError(f"expected a checkpoint at {source}, found {found}")
    try:
        if source.stat().st_size == 0:
            raise CheckpointError(f"{source} is empty, expected a checkpoint")
        if _is_safetensors(source):
            return Weights(load_file(source), "safetensors", {})
        return _unwrap(_load_torch(source), source)
    except SafetensorError as error:
        raise CheckpointError(
            f"{source} is a broken safetensors file: {shown(str(error))}"
        ) from error
    except OSError as error:
        raise CheckpointError(f"can't read {source}: {error.strerror or error}") from error


def import_model_class(spec: str) -> type[nn.Module]:
    """The class that ``"package.module:Class"`` names.

    Raises:
        ParameterError: If there is none or it is no ``torch.nn.Module``; near names are suggested.
    """
    module_name, colon, class_name = str(spec).partition(":")
    if not (module_name and colon and class_name):
        raise ParameterError(f"model must look like 'package.module:Class', found {spec!r}")
    module = _import(module_name, spec)
    found = getattr(module, class_name, None)
    if found is None:
        classes = {n for n, v in vars(module).items() if isinstance(v, type)}
        classes |= set(getattr(module, "__all__", ()))
        raise ParameterError(
            f"model {spec!r}: {module_name} has no {class_name!r}." + _near(class_name, classes)
        )
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ParameterError(f"model {spec!r} must be a subclass of torch.nn.Module, is {found!r}")
    return found


def _import(name: str, spec: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise ParameterError(
                f"model {spec!r}: {name} needs {error.name}, which is not installed"
            ) from error
        parent, _, last = error.name.rpartition(".")
        siblings = getattr(sys.modules.get(parent), "__path__", None) if parent else None
        names = [m.name for m in pkgutil.iter_modules(siblings)]
        raise ParameterError(
            f"model {spec!r}: there is no module {error.name!r}." + _near(last, names)
        ) from error
    except Exception as error:  # whatever the module's code raises
        raise ParameterError(
            f"model {spec!r}: {name} can't be imported: {type(error).__name__}: {error}"
        ) from error


def _near(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, [n for n in names if not n.startswith("_")], n=3)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def _constructor_arguments(
    spec: str,
    model_class: type[nn.Module],
    hyper_parameters: Mapping[str, Any],
    given: dict[str, Any],
) -> dict[str, Any]:
    parameters = dict(inspect.signature(model_class).parameters)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    names = [
        n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    problems = [
        f"no parameter {name!r}.{_near(name, names)}"
        for name in given
        if name not in names and not takes_any
    ]
    barred = getattr(model_class, "arguments_of_caller", ())
    recorded = {n: hyper_parameters[n] for n in names if n in hyper_parameters and n not in barred}
    kwargs = recorded | given
    if "pretrained" in names and kwargs.get("pretrained", parameters["pretrained"].default):
        kwargs["pretrained"] = False
    problems += [
        f"parameter {name!r} is required"
        for name in names
        if name not in kwargs and parameters[name].default is inspect.Parameter.empty
    ]
    if problems:
        raise ParameterError(
            f"{spec} can't be built from {sorted(kwargs) or 'no arguments'}; its parameters are "
            f"{', '.join(names) or 'none'}:{listed(problems)}"
        )
    return kwargs


def _outline(model_class: type[nn.Module], kwargs: Mapping[str, Any]) -> nn.Module | None:
    """The model with shapes in the place of weights; None if it can't be built so."""
    try:
        with torch.device("meta"):
            return model_class(**kwargs)
    except Exception:  # whatever the model's constructor raises; built in earnest it says why
        log.debug("outline_not_built", exc_info=True)
        return None


def _build(
    spec: str,
    model_class: type[nn.Module],
    kwargs: Mapping[str, Any],
    recorded: Sequence[str],
    path: Path,
) -> nn.Module:
    try:
        return model_class(**kwargs)
    except Exception as error:  # whatever the model's constructor raises
        if isinstance(error, HeimdallError) and not recorded:
            raise
        origin = f", of which {path} records {', '.join(recorded)}" if recorded else ""
        reason = "" if isinstance(error, HeimdallError) else f"{type(error).__name__}: "
        raise ParameterError(
            f"{spec} can't be built with {_shown_arguments(kwargs)}{origin}: {reason}"
            f"{shown(str(error), 1000)}"
        ) from error


def _shown_arguments(kwargs: Mapping[str, Any]) -> str:
    return "{" + ", ".join(f"{name!r}: {shown(value)}" for name, value in kwargs.items()) + "}"


def _is_safetensors(path: Path) -> bool:
    """A header's length (8 bytes, little-endian), then the header as a JSON object."""
    with path.open("rb") as file:
        length, opening = int.from_bytes(file.read(8), "little"), file.read(1)
    return opening == b"{" and length < path.stat().st_size


def _load_torch(path: Path) -> Any:
    try:
        check_pickles(path)
    except ValueError as error:
        raise CheckpointError(
            f"{path} is truncated or not a checkpoint: {shown(str(error))}"
        ) from error
    # Only the zip layout of today can be mapped; weights then enter memory once, not twice.
    mmap = is_zip(path) and path.suffix != ".safetensors"
    try:
        with warnings.catch_warnings(), path.open("rb") as file:
            # Says that an unusual pickle protocol may fail; if so, the error below says it.
            warnings.simplefilter("ignore", UserWarning)
            # A file object leaves the name's suffix without influence, but can't be mapped.
            return torch.load(
                path if mmap else file, map_location="cpu", weights_only=True, mmap=mmap
            )
    except UnpicklingError as error:
        refused = _refused_names(path, str(error))
        what = f"it holds {shown(', '.join(refused), 2000)}" if refused else _NOT_PLAIN
        raise CheckpointError(f"{path} was not loaded: {what}. {_RESAVE}") from error
    except Exception as error:  # a broken pickle raises almost anything, OSError included
        detail = shown(str(error) or type(error).__name__)
        raise CheckpointError(
            f"{path} is truncated or not a checkpoint (PyTorch says: {detail})"
        ) from error


def _refused_names(path: Path, message: str) -> list[str]:
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # an old or broken layout, which it can't list: the refusal names the first
        log.debug("refused_names_unlisted", path=str(path), exc_info=True)
    return sorted(set(re.findall(r"GLOBAL (\S+)", message)))


def _unwrap(loaded: Any, path: Path) -> Weights:
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, expected a state dict")
    hyper_parameters = loaded.get("hyper_parameters")
    if not isinstance(hyper_parameters, Mapping):
        hyper_parameters = {}
    for key, layout in (("state_dict", "lightning"), ("model_state_dict", "model_state_dict")):
        if isinstance(loaded.get(key), Mapping):
            return Weights(_tensors(loaded[key], path), layout, dict(hyper_parameters))
    return Weights(_tensors(loaded, path), "state_dict", {})


def _tensors(state: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    others = [shown(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if others or not state:
        raise CheckpointError(
            f"{path} holds no state dict: expected a key 'state_dict' or 'model_state_dict', or "
            f"tensors only; found {shown(', '.join(others), 2000) or 'an empty dictionary'}"
        )
    problems = [f"{shown(n)}: its name is no text" for n in state if not isinstance(n, str)]
    problems += [
        f"{shown(name)} is {value.layout}, {value.dtype} on {value.device}"
        for name, value in state.items()
        if value.layout is not torch.strided or value.is_quantized or value.device.type != "cpu"
    ]
    if problems:
        raise CheckpointError(f"{path} holds other things than plain tensors:{listed(problems)}")
    return dict(state)


def _strip_prefix(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Without the ``model.`` that a LightningModule puts before the names of what it wraps."""
    if any(name.startswith(_LIGHTNING_PREFIX) for name in model.state_dict()):
        return tensors
    return {
        name if (bare := name.removeprefix(_LIGHTNING_PREFIX)) in tensors else bare: value
        for name, value in tensors.items()
    }


def _fitting(
    weights: dict[str, Tensor], model: nn.Module, path: Path, spec: str, kwargs: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The weights under the model's own names, if each of them fits."""
    tensors, own = _strip_prefix(weights, model), model.state_dict()
    problems = [f"missing: {name}" for name in own if name not in tensors]
    for name, value in tensors.items():
        if name not in own:
            problems.append(f"unexpected: {shown(name)}")
        elif value.shape != own[name].shape:
            problems.append(
                f"wrong shape: {name} is {tuple(value.shape)}, the model's is "
                f"{tuple(own[name].shape)}"
            )
        elif value.is_complex() and not own[name].is_complex():
            problems.append(f"complex: {name}, the model's is {own[name].dtype}")
        else:
            problems += _non_finite(name, value, own[name].dtype)
    if problems:
        raise CheckpointError(
            f"{path} does not fit {spec} built with {_shown_arguments(kwargs)}; was it trained "
            f"with other model_kwargs? {len(problems)} problems:{listed(problems)}"
        )
    return tensors


def _non_finite(name: str, value: Tensor, dtype: torch.dtype) -> list[str]:
    """Problems of a weight once it has the model's precision."""
    try:
        finite = torch.isfinite(value.to(dtype))
    except (RuntimeError, TypeError) as error:  # a type that PyTorch stores but can't convert
        return [f"can't be converted: {name}, {value.dtype} to {dtype}: {shown(str(error))}"]
    count = value.numel() - int(finite.sum())
    return [f"NaN or Inf: {name}, {count} of {value.numel()} elements"] if count else []
