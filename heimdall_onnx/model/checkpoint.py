"""Trained weights, read without running code, and the model built around them."""

from __future__ import annotations

import copy
import hashlib
import re
import shutil
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, FailFast, Field, TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from heimdall_onnx.common.errors import CheckpointError, DataError
from heimdall_onnx.common.files import hash_file
from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.common.text import count_of, listed, shown
from heimdall_onnx.model.construction import plan_model
from heimdall_onnx.model.copies import remember_maker
from heimdall_onnx.model.formats import Located, locate
from heimdall_onnx.model.pickles import StoredTensor, name_of, restored
from heimdall_onnx.model.readings import (
    AVERAGED,
    Content,
    Reading,
    must_be_converted,
    read_content,
    require_weights,
)
from heimdall_onnx.model.signature import Signature, signature_of
from heimdall_onnx.model.signature_file import (
    SignatureFile,
    find_signature_file,
    signature_path,
)

log = get_logger(__name__)

# Where a checkpoint that was made of others says of which; nobody vouches for it.
MEMBERS = "member_checkpoints"
_MOST_MEMBERS = 1000

DEFAULT_MODEL = "heimdall_onnx:LocalizationNet"
# Under these lies what a training needs beside its network.
_BESIDE = re.compile(
    r"((train|val(id)?|test|best)_)?(criterion|loss(es)?|metrics?|acc(uracy)?|ema|optim(izer)?|lr|"
    r"epochs?|(global_)?steps?)(_\w+)?",
    re.IGNORECASE,
)
# What a model makes itself, and what evaluates nothing in eval mode.
_NEEDLESS = ("position_ids", "num_batches_tracked")


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
        layout: ``"safetensors"`` or ``"distributed"``; else where the weights are,
            ``"model_state_dict"`` for example, which is ``"lightning"`` for ``state_dict``, and
            ``"state_dict"`` where nothing is around them.
        weights: Which of the weights in the file were taken, as ``weights`` of `load_checkpoint`.
        notes: What was migrated, converted, skipped or left aside, in words.
        hyper_parameters: As the checkpoint records them; empty if it doesn't.
        model_spec: Import string of the model's class or what else makes it.
        submodule: Which of its modules ``model`` is; empty for all of it.
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
    weights: str
    notes: tuple[str, ...]
    hyper_parameters: dict[str, Any]
    model_spec: str
    model_kwargs: dict[str, Any]
    submodule: str = ""
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
class _Fit:
    """What came of loading a reading: what is wrong with it, and what is worth saying."""

    problems: list[str]
    notes: list[str]


def load_checkpoint(
    path: Path | str,
    *,
    model: str = DEFAULT_MODEL,
    model_kwargs: Mapping[str, Any] | None = None,
    weights: str = "",
    submodule: str = "",
) -> LoadedModel:
    """Build ``model`` and load the weights in ``path`` into it.

    Which weights are meant is found by the model's own names: whatever tensors with names are in
    the file, under any key and prefix, are held against them, and loaded by the module's own
    ``load_state_dict`` with its hooks and versions, so that what PyTorch migrates is migrated.
    Nothing in the file is executed; what is no plain data beside the weights is skipped.

    Hyper-parameters that the checkpoint records become arguments, see `plan_model`. The checkpoints
    that it was made of are read where the class has ``made_of_checkpoints``, as an ensemble's does.
    A file ``<stem>.signature.yaml`` beside the checkpoint declares the signature, and wins over
    what the class declares; see `model.signature_file`.

    Args:
        path: The checkpoint: a file of PyTorch or safetensors, an index of shards, or a folder.
        model: What makes the model: ``"package.module:Class"``, a function or a bound method.
        model_kwargs: Its keyword arguments.
        weights: Which weights are taken where several fit: their keys in the file and their prefix,
            with dots between them; ``.`` for the file itself.
        submodule: The network is this module of the model, ``"net"`` for example.

    Raises:
        CheckpointError: If the file is missing, broken, something else, does not fit the model, or
            fits it in several ways; every weight or way is named.
        ParameterError: If the model can't be imported or built.
        DataError: If the signature can't be read or contradicts itself.
    """
    content = read_content(path)
    source = content.source.path
    planned = plan_model(model, content, model_kwargs or {}, submodule)
    declared = find_signature_file(source)
    about = f"{model} built with {planned.arguments}"
    built = None if planned.recorded else planned.build()
    # A file's own numbers must not decide how much memory a model takes.
    reading = _choose(content, lambda: planned.outline() or planned.build(), about, weights, built)
    built = built or planned.build()
    fit = load_reading(built, reading)
    if fit.problems:
        raise _unfit(content, about, reading, fit)
    if declared is not None:
        _declare(built, declared)
    sha256 = hash_checkpoint(content.source)
    skipped = [f"not loaded: {where}, {kind}" for where, kind in content.skipped.items()]
    options = {"model": model, "model_kwargs": model_kwargs, "weights": weights}
    remember_maker(built, partial(_load_again, path, **options, submodule=submodule))
    log.info("loaded", path=str(source), sha256=sha256, weights=reading.label, model=model)
    return LoadedModel(
        model=built.cpu().eval(),
        signature=signature_of(built),
        path=source,
        sha256=sha256,
        layout=_layout(content, reading),
        weights=reading.label,
        notes=tuple(dict.fromkeys((*fit.notes, *skipped, *planned.notes))),
        hyper_parameters=planned.hyper_parameters,
        model_spec=model,
        model_kwargs=planned.kwargs,
        submodule=submodule,
        signature_file=declared,
        members=_members(planned.hyper_parameters, planned.make, source),
    )


def _load_again(path: Path | str, **options: Any) -> nn.Module:
    return load_checkpoint(path, **options).model


def load_weights(network: nn.Module, path: Path | str) -> None:
    """Load the weights in ``path`` into a module that is there, as `load_checkpoint` does.

    Raises:
        CheckpointError: As `load_checkpoint`.
    """
    content, about = read_content(path), type(network).__name__
    reading = _choose(content, lambda: copy.deepcopy(network), about, "", network)
    fit = load_reading(network, reading)
    if fit.problems:
        raise _unfit(content, about, reading, fit)


def read_plain(path: Path | str) -> Any:
    """All that a checkpoint holds, if it is nothing but tensors and plain values.

    Raises:
        CheckpointError: If it can't be read, or naming what else it holds.
    """
    content = read_content(path)
    try:
        return restored(content.tree)
    except Exception as error:
        found = ", ".join(content.skipped.values()) or str(error)
        raise CheckpointError(
            f"{path} was not loaded: it holds {shown(found, 2000)}, and only tensors and plain "
            "values are read"
        ) from error


def hash_checkpoint(source: Located) -> str:
    """SHA-256 of a checkpoint's file; of several, of their names and hashes."""
    if len(source.files) == 1:
        return hash_file(source.files[0])
    lines = "".join(f"{hash_file(file)}  {file.name}\n" for file in source.files)
    return hashlib.sha256(lines.encode()).hexdigest()


def single_file(path: Path | str, folder: Path) -> Path:
    """A checkpoint of several files as one in ``folder``, which can be kept; any other's file.

    Raises:
        CheckpointError: If it can't be read.
    """
    source = locate(path)
    if len(source.files) == 1:
        return source.files[0]
    from safetensors.torch import save_file

    (reading,) = read_content(path).readings
    target = folder / f"{source.path.name.partition('.')[0]}.safetensors"
    tensors = {name: stored.tensor().contiguous() for name, stored in reading.tensors.items()}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, target)
    if (signature := signature_path(source.path)).exists():
        shutil.copy(signature, signature_path(target))
    return target


def _layout(content: Content, reading: Reading) -> str:
    if content.source.kind != "pytorch":
        return content.source.kind
    last = reading.keys[-1] if reading.keys else ""
    return {"": "state_dict", "state_dict": "lightning"}.get(last, last)


def _members(
    hyper_parameters: Mapping[str, Any], model_class: object, path: Path
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


def _choose(
    content: Content,
    fresh: Callable[[], nn.Module],
    about: str,
    weights: str,
    built: nn.Module | None,
) -> Reading:
    """The weights that are meant, tried on ``fresh`` modules where several may be.

    A single one is left to be tried by loading it into what is ``built`` already.
    """
    require_weights(content)
    own = [*(built or fresh()).state_dict()]
    readings = [found for reading in content.readings for found in reading.fitted(own)]
    path, chosen = content.source.path, weights.strip("/").replace("/", ".")
    named = [r for r in readings if chosen in ("", r.label, ".".join(r.keys))]
    if not named:
        labels = shown(", ".join(dict.fromkeys(reading.label for reading in readings)))
        raise CheckpointError(f"{path} holds no weights {chosen!r}; it holds {labels}")
    if len(named) == 1 and built is not None:
        tried = [(named[0], _Fit([], []))]
    else:
        tried = [(reading, load_reading(fresh(), reading)) for reading in named]
    fits: list[Reading] = []
    # Averages are a question even after one step, when they still are what they are averages of.
    apart = any(AVERAGED.search(reading.label) for reading in content.readings)
    for reading, fit in sorted(tried, key=lambda one: one[0].pickled != ""):
        same = any(_equal(reading, other) for other in fits if not (apart or reading.pickled))
        if not fit.problems and not same:
            fits.append(reading)
    if not fits:
        reading, fit = min(tried, key=lambda one: len(one[1].problems))
        raise _unfit(content, about, reading, fit)
    others = {r.label: len(r.inside) for r in named if AVERAGED.search(r.label) and r not in fits}
    averaged = [
        name
        for name, count in (content.averaged | others).items()
        if not chosen and 2 * count >= len(own) and all(name != r.label for r in fits)
    ]
    if len(fits) == 1 and not averaged:
        if not fits[0].pickled:
            return fits[0]
        raise must_be_converted(content, fits[0])
    ways = [
        f"--weights {shown(r.label)}: {count_of(len(r.inside), 'value')}"
        + (f", in a pickled {shown(r.pickled)}, not taken" if r.pickled else "")
        for r in fits
    ]
    ways += [f"{name}: averages of weights under names that do not fit" for name in averaged]
    raise CheckpointError(
        f"{path} holds several sets of weights that may be meant for {about}; choose one with "
        f"--weights (weights=... in Python):{listed(ways)}"
    )


def _equal(one: Reading, other: Reading) -> bool:
    mine, theirs = (replace(r, values=r.inside).tensors for r in (one, other))
    return mine.keys() == theirs.keys() and all(
        torch.equal(stored.tensor(), theirs[name].tensor()) for name, stored in mine.items()
    )


def _unfit(content: Content, about: str, reading: Reading, fit: _Fit) -> CheckpointError:
    where = "" if reading.label == "." else f" (its weights {reading.label})"
    return CheckpointError(
        f"{content.source.path}{where} does not fit {about}; was it trained with other "
        f"model_kwargs? {len(fit.problems)} problems:{listed(fit.problems)}"
    )


def load_reading(network: nn.Module, reading: Reading) -> _Fit:
    """Load weights by the module's own ``load_state_dict``, and say what it made of them.

    On the device "meta" only names and shapes are judged.
    """
    own = network.state_dict(keep_vars=True)
    state, other, problems, notes = OrderedDict[str, Any](), {}, [], []
    for name, value in reading.inside.items():
        try:
            if isinstance(value, StoredTensor):
                state[name] = value.tensor()
            elif name.endswith("_extra_state"):
                state[name] = restored(value)
            else:
                other[name] = name_of(value) or type(value).__name__
        except Exception as error:  # the file says what it likes
            problems.append(f"can't be read: {shown(name)}: {shown(str(error))}")
            other[name] = ""
    for name, value in [*state.items()]:
        mine: Any = own.get(name)
        if is_lazy(mine):
            notes.append(f"as large as in the file: {name}")
        elif isinstance(value, Tensor) and isinstance(mine, Tensor):
            if problem := _unlike(name, value, mine):
                problems.append(problem)
                other[name] = ""
                del state[name]
            elif value.shape != mine.shape:
                notes.append(f"taken as a scalar: {name}, saved with an axis")
    given = set(state)
    versions = reading.inside_versions
    if versions:
        state._metadata = versions  # type: ignore[attr-defined]
    made = {n: b.clone() for n, b in network.named_buffers() if n in own and _not_finite(b)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nothing is copied to the device "meta"
            found = network.load_state_dict(state, strict=False)
        missing, unexpected = found.missing_keys, found.unexpected_keys
    except Exception as error:  # whatever the model's hooks raise; PyTorch has a line for each
        first, *lines = str(error).splitlines() or [""]
        texts = lines or [f"{type(error).__name__}: {first}"]
        return _Fit([*problems, *(shown(text, 500) for text in texts)], notes)
    roots = {name.partition(".")[0] for name in own}
    there = {id(own[name]) for name in given if name in own}
    for name in missing:
        if id(own[name]) in there:
            notes.append(f"tied to another weight, which is there: {name}")
        elif name.endswith(_NEEDLESS):
            notes.append(f"not in the file, left as the model makes it: {name}")
        elif other.get(name) != "":
            at = f" (the file has a {other[name]} there)" if name in other else ""
            problems.append(f"missing: {name}{at}")
    aside = [name for name in reading.values if not name.startswith(reading.prefix)]
    for name in unexpected:
        root, _, rest = name.partition(".")
        # A number without a fraction counts something; another one may be a part of the model.
        counts = isinstance(state[name], Tensor) and not (rest or state[name].is_floating_point())
        beside = root not in roots and (counts or _BESIDE.fullmatch(root))
        if beside or name.endswith("position_ids"):
            aside.append(name)
        else:
            problems.append(f"unexpected: {shown(name)}")
    if aside:
        notes.append(f"left aside, no part of the model: {shown(', '.join(aside))}")
    left = {*missing, *unexpected}
    renamed, added = sorted(given - own.keys() - left), sorted(own.keys() - given - left)
    if renamed or added:
        texts = [shown(", ".join(names)) or "nothing" for names in (renamed, added)]
        notes.append(f"migrated by its modules: {texts[0]} became {texts[1]}")
    notes += [
        f"{type(module).__name__} {name}: version {version} loaded into version {module._version}"
        for name, module in network.named_modules()
        if (version := versions.get(name, {}).get("version", module._version)) != module._version
    ]
    kinds = Counter(
        (str(state[n].dtype)[6:], str(own[n].dtype)[6:])
        for n in given & own.keys()
        if isinstance(own[n], Tensor) and state[n].dtype != own[n].dtype
    )
    notes += [f"{count_of(n, 'tensor')} converted from {a} to {b}" for (a, b), n in kinds.items()]
    _settle_lazy(network)
    problems += _non_finite(network, {*own} - {*other}, made)
    return _Fit(problems, notes)


def _unlike(name: str, value: Tensor, mine: Tensor) -> str:
    """Why a tensor can't become a weight; empty if it can."""
    if value.shape != mine.shape and not (mine.ndim == 0 and value.shape == (1,)):
        return f"wrong shape: {name} is {tuple(value.shape)}, the model's is {tuple(mine.shape)}"
    types = f"{name}, the model's is {mine.dtype}"
    if value.is_complex() and not mine.is_complex():
        return f"complex: {types}"
    whole = not (value.is_floating_point() or value.is_complex())
    if whole and mine.is_floating_point() and isinstance(mine, nn.Parameter):
        return f"integers: {types}; quantized weights are nothing without their scales"
    discrete = not (mine.is_floating_point() or mine.is_complex())
    if value.is_floating_point() and discrete and not torch.equal(value, value.trunc()):
        return f"fractions: {types}"
    return ""


def _settle_lazy(network: nn.Module) -> None:
    """Let lazy modules become what they stand for, where the file has said how large they are."""
    for module in network.modules():
        if isinstance(module, LazyModuleMixin) and not module.has_uninitialized_params():
            module._initialize_hook.remove()
            module._load_hook.remove()
            del module._initialize_hook, module._load_hook
            if module.cls_to_become is not None:
                module.__class__ = module.cls_to_become


def _not_finite(value: Tensor) -> bool:
    if is_lazy(value) or value.is_meta or not (value.is_floating_point() or value.is_complex()):
        return False
    return not bool(torch.isfinite(value).all())


def _non_finite(network: nn.Module, names: set[str], made: Mapping[str, Tensor]) -> list[str]:
    """Weights that are no numbers, but for those that the constructor itself makes so."""
    problems = []
    for name, value in (*network.named_parameters(), *network.named_buffers()):
        if name in names and _not_finite(value):
            wrong = ~torch.isfinite(value)
            if name in made:
                wrong &= ~torch.isclose(value, made[name], equal_nan=True)
            if count := int(wrong.sum()):
                problems.append(f"NaN or Inf: {name}, {count} of {value.numel()} elements")
    return problems
