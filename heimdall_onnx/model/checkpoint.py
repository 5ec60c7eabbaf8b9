"""Trained weights, read without running code, and the model built around them."""

from __future__ import annotations

import copy
import hashlib
import re
import shutil
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, FailFast, Field, TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from heimdall_onnx.common.arrays import Rows
from heimdall_onnx.common.errors import CheckpointError, DataError
from heimdall_onnx.common.files import hash_file
from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.common.parameters import Quality
from heimdall_onnx.common.text import count_of, listed, shown
from heimdall_onnx.model.construction import plan_model
from heimdall_onnx.model.copies import remember_maker
from heimdall_onnx.model.derive import derive_signature
from heimdall_onnx.model.formats import AVERAGED, Located, locate
from heimdall_onnx.model.pickles import StoredTensor, name_of
from heimdall_onnx.model.readings import (
    Content,
    Reading,
    labels_of,
    must_be_converted,
    read_content,
    read_weights,
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
        path: The checkpoint.
        sha256: SHA-256 of the checkpoint.
        weights: Which of the weights in the file were taken, as ``weights`` of `load_checkpoint`.
        notes: What was migrated, converted, skipped or left aside, in words.
        hyper_parameters: As the checkpoint records them; empty if it doesn't.
        model_spec: Import string of the model's class or what else makes it.
        submodule: Which of its modules ``model`` is; empty for all of it.
        model_kwargs: The arguments it was built with.
        signature_file: The file beside the checkpoint that declares the signature, if there is one.
        arrays: Reads the first rows of evaluation data, to find a signature that nobody declares.
        members: The checkpoints that an ensemble's was made of, as it records them; empty for any
            other.
    """

    model: nn.Module
    path: Path
    sha256: str
    weights: str
    notes: tuple[str, ...]
    hyper_parameters: dict[str, Any]
    model_spec: str
    model_kwargs: dict[str, Any]
    submodule: str = ""
    signature_file: SignatureFile | None = None
    arrays: Callable[[], Mapping[str, Rows] | None] | None = field(default=None, repr=False)
    members: tuple[Member, ...] = ()

    @cached_property
    def _known(self) -> tuple[Signature, tuple[str, ...]]:
        if getattr(self.model, "signature", None) is not None:
            return signature_of(self.model), ()
        signature, found = derive_signature(self.model, self.arrays() if self.arrays else None)
        _declare(self.model, signature, "what was found")
        return signature, found

    @property
    def signature(self) -> Signature:
        """What it takes and gives: declared by the file beside the checkpoint, or by its class.

        Where neither declares it, it is found by running the model when it is first asked for.

        Raises:
            DataError: If it can't be found.
        """
        return self._known[0]

    @property
    def found(self) -> tuple[str, ...]:
        """How the signature was found, in words; empty where it is declared."""
        return self._known[1]

    @property
    def quality(self) -> Quality | None:
        """How much worse answers may be, where the file beside the checkpoint says it."""
        return None if self.signature_file is None else self.signature_file.quality

    @property
    def signature_source(self) -> str:
        """Where the signature comes from, in words."""
        if self.signature_file is not None:
            return f"the file {self.signature_file.path.name}"
        return "found, not declared" if self.found else "the model's class"


def load_checkpoint(
    path: Path | str,
    *,
    model: str,
    model_kwargs: Mapping[str, Any] | None = None,
    weights: str = "",
    submodule: str = "",
    arrays: Callable[[], Mapping[str, Rows] | None] | None = None,
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
        arrays: Reads the first rows of evaluation data, to find a signature that nobody declares.

    Raises:
        CheckpointError: If the file is missing, broken, something else, does not fit the model, or
            fits it in several ways; every weight or way is named.
        ParameterError: If the model can't be imported or built.
        DataError: If the signature can't be read or contradicts itself.
    """
    content = read_weights(path)
    source = content.source.path
    planned = plan_model(model, content, model_kwargs or {}, submodule)
    declared = find_signature_file(source)
    # A file's own numbers must not decide how much memory a model takes.
    built = planned.build() if planned.reads_weights else None
    if built is not None and (own := _read_already(built, content)):
        if weights.strip("/").replace("/", ".") not in ("", own.label, ".".join(own.keys)):
            raise CheckpointError(
                f"weights {weights!r} can't be chosen: from_pretrained has read {own.label}; leave "
                "them out, or name the model's class itself"
            )
        reading, notes = own, ["read by from_pretrained, which gives weights other names"]
    else:
        reading = _choose(content, planned.outline, planned.about, weights)
        built = built or planned.build()
        notes = _load(built, content, reading, planned.about)
    if declared is not None:
        _declare(built, declared.signature, str(declared.path))
    elif getattr(built, "signature", None) is not None:
        signature_of(built)
    sha256 = hash_checkpoint(content.source)
    skipped = [f"not loaded: {where}, {kind}" for where, kind in content.skipped.items()]
    options = {"model": model, "model_kwargs": model_kwargs, "weights": weights}
    remember_maker(built, partial(_load_again, path, **options, submodule=submodule))
    log.info("loaded", path=str(source), sha256=sha256, weights=reading.label, model=model)
    return LoadedModel(
        model=built.cpu().eval(),
        path=source,
        sha256=sha256,
        weights=reading.label,
        notes=tuple(dict.fromkeys((*notes, *skipped, *planned.notes))),
        hyper_parameters=planned.hyper_parameters,
        model_spec=model,
        model_kwargs=planned.kwargs,
        submodule=submodule,
        signature_file=declared,
        arrays=arrays,
        members=_members(planned.hyper_parameters, planned.make, source),
    )


def _load_again(path: Path | str, **options: Any) -> nn.Module:
    return load_checkpoint(path, **options).model


def load_weights(network: nn.Module, path: Path | str) -> None:
    """Load the weights in ``path`` into a module that is there, as `load_checkpoint` does.

    Raises:
        CheckpointError: As `load_checkpoint`.
    """
    content, about = read_weights(path), type(network).__name__
    reading = _choose(content, lambda: copy.deepcopy(network), about)
    _load(network, content, reading, about)


def read_plain(path: Path | str) -> Any:
    """All that a checkpoint holds, if it is nothing but tensors and plain values.

    Raises:
        CheckpointError: If it can't be read, or naming what else it holds.
    """
    content = read_content(path)
    try:
        return copy.deepcopy(content.tree)
    except Exception as error:
        found = ", ".join(content.skipped.values()) or str(error)
        raise CheckpointError(
            f"{path} was not loaded: it holds {shown(found, 2000)}, and only tensors and plain "
            "values are read"
        ) from error


def hash_checkpoint(source: Located) -> str:
    """SHA-256 of a checkpoint's file; of several, of their names and hashes."""
    hashes = [hash_file(file) for file in source.files]
    lines = [f"{one}  {file.name}\n" for one, file in zip(hashes, source.files, strict=True)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(lines).encode()).hexdigest()


def single_file(path: Path | str, folder: Path) -> Path:
    """A checkpoint of several files as one in ``folder``, which can be kept; any other's file.

    Raises:
        CheckpointError: If it can't be read.
    """
    source = locate(path)
    if len(source.files) == 1:
        return source.files[0]
    from safetensors.torch import save_file

    readings = read_content(path).readings
    if len(readings) != 1:
        raise CheckpointError(
            f"{path} can't become one file: expected tensors by name in its shards, found "
            f"{count_of(len(readings), 'set')} of them; give one file with the weights"
        )
    (reading,) = readings
    target = folder / f"{source.path.name.partition('.')[0]}.safetensors"
    tensors = {name: stored.tensor().contiguous() for name, stored in reading.tensors.items()}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, target)
    beside = {
        signature_path(source.path): signature_path(target),
        source.files[0].with_name("config.json"): folder / "config.json",  # of Hugging Face
    }
    for there, here in beside.items():
        if there.exists():
            shutil.copy(there, here)
    return target


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


def _declare(model: nn.Module, signature: Signature, source: str) -> None:
    """Let the model itself declare its signature, for whoever is handed only the model."""
    try:
        model.signature = signature  # type: ignore[assignment]
    except AttributeError as error:
        raise DataError(
            f"{source} declares a signature, but {type(model).__name__}.signature can't be "
            f"replaced ({error}): remove one of the two"
        ) from error


def _choose(
    content: Content, fresh: Callable[[], nn.Module], about: str, weights: str = ""
) -> Reading:
    """The weights that are meant, which are tried on ``fresh`` modules."""
    _require_one(content)
    known = {*fresh().state_dict()}
    readings = [found for reading in content.readings for found in reading.fitted(known)]
    path, chosen = content.source.path, weights.strip("/").replace("/", ".")
    named = [r for r in readings if chosen in ("", r.label, ".".join(r.keys)) or r.path == weights]
    if not named:
        labels = shown(", ".join(dict.fromkeys(reading.label for reading in readings)))
        raise CheckpointError(f"{path} holds no weights {chosen!r}; it holds {labels}")
    most = max(reading.matches for reading in named)
    tried = [(r, load_reading(fresh(), r)[0]) for r in named if 2 * r.matches >= most]
    fitting = sorted((r for r, problems in tried if not problems), key=lambda r: r.pickled != "")
    fits = [r for r in fitting if r.path == weights] or fitting
    fits = [r for r in fits if r.label == chosen] or fits
    keys = content.tree if isinstance(content.tree, dict) else ()
    # The same saved twice is no question; averages always are one, whichever of both they are.
    if len(fits) > 1 and not any(AVERAGED.search(str(key)) for key in keys):
        fits = [*{_contents_of(reading): reading for reading in fits[::-1]}.values()][::-1]
    if not fits:
        raise _unfit(content, about, *min(tried, key=lambda one: len(one[1])))
    enough = max(sum(1 for _ in fresh().parameters()), 1) / 2  # averages may leave out buffers
    averaged = [
        r.label
        for r in named
        if r not in fitting and AVERAGED.search(r.label)
        if (r.matches or len(r.tensors)) >= enough
    ]
    for reading in content.readings:
        others = [
            name
            for name, one in reading.tensors.items()
            if one.shape and AVERAGED.search(name) and known.isdisjoint(_ends(name))
        ]
        if not reading.pickled and len(others) >= enough:
            averaged.append(f"{reading.label}, {others[0]} and others")
    averaged = [
        f"{shown(name)}: averages of weights under names that do not fit"
        for name in averaged
        if not chosen
    ]
    if len(fits) == 1 and not averaged:
        if fits[0].pickled:
            raise must_be_converted(content, fits[0])
        return fits[0]
    ways = [
        f"--weights {shown(label)}: {count_of(len(r.values), 'value')}"
        + (f", in a pickled {shown(r.pickled)}, not taken" if r.pickled else "")
        for label, r in zip(labels_of(fits), fits, strict=True)
    ]
    raise CheckpointError(
        f"{path} holds several sets of weights that may be meant for {about}; choose one with "
        f"--weights (weights=... in Python):{listed(ways + averaged)}"
    )


def _require_one(content: Content) -> None:
    """Refuse a folder's other files with other weights of the same names, or of other names."""
    for file in content.source.beside:
        mine, others = (
            {name: stored for one in found.readings for name, stored in one.tensors.items()}
            for found in (content, read_content(file))
        )
        both = mine.keys() & others.keys()
        if not both or any(
            _content_of(mine[n].tensor()) != _content_of(others[n].tensor()) for n in both
        ):
            found = ", ".join(one.name for one in (*content.source.files[:9], file))
            raise CheckpointError(
                f"{content.source.path} holds several models: {found} differ; give the file that "
                "is meant in the folder's place"
            )


def _ends(name: str) -> list[str]:
    """A name without each of its first parts."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _read_already(network: nn.Module, content: Content) -> Reading | None:
    """The weights that a model has read itself under other names, each of them once."""
    state = network.state_dict()
    own = Counter(map(_content_of, {value.data_ptr(): value for value in state.values()}.values()))
    for reading in content.readings:
        found = reading.tensors
        if found.keys() - state.keys() and own == Counter(
            _content_of(stored.tensor()) for stored in found.values()
        ):
            return reading
    return None


def _contents_of(reading: Reading) -> tuple[str, frozenset[Any]]:
    averaged = reading.label if AVERAGED.search(reading.label) else ""
    tensors = reading.tensors.items()
    return averaged, frozenset((n, _content_of(stored.tensor())) for n, stored in tensors)


def _content_of(value: Tensor) -> tuple[torch.Size, bytes]:
    raw = value.detach().contiguous().flatten().view(torch.uint8).numpy()
    return value.shape, hashlib.sha256(raw.tobytes()).digest()


def _load(network: nn.Module, content: Content, reading: Reading, about: str) -> list[str]:
    problems, notes = load_reading(network, reading)
    if problems:
        raise _unfit(content, about, reading, problems)
    return notes


def _unfit(
    content: Content, about: str, reading: Reading, problems: Sequence[str]
) -> CheckpointError:
    where = "" if reading.label == "." else f" (its weights {reading.label})"
    return CheckpointError(
        f"{content.source.path}{where} does not fit {about}; "
        f"{count_of(len(problems), 'problem')}:{listed(problems)}"
    )


def load_reading(network: nn.Module, reading: Reading) -> tuple[list[str], list[str]]:
    """Load weights by the module's own ``load_state_dict``.

    On the device "meta" only names, shapes and the file's own values are judged.

    Returns:
        What is wrong, and what was migrated or left aside, in words.
    """
    own: dict[str, Any] = network.state_dict(keep_vars=True)
    state, other = OrderedDict[str, Any](), dict[str, str]()
    problems: dict[str, str] = {}
    notes = []
    # What a module's own code may turn around while loading is PyTorch's to judge.
    hooked = any(
        module._load_state_dict_pre_hooks
        or not module._load_from_state_dict.__module__.startswith("torch.")
        for module in network.modules()
    )
    for name, value in reading.values.items():
        try:
            if name.endswith("_extra_state") and not isinstance(value, StoredTensor):
                state[name] = copy.deepcopy(value)
            elif isinstance(value, StoredTensor):
                state[name], mine = value.tensor(), own.get(name)
                if isinstance(mine, Tensor) and is_lazy(mine):
                    if problem := _not_finite(name, state[name]):
                        problems[name] = problem
                    notes.append(f"as large as in the file: {name}")
                elif hooked and isinstance(mine, Tensor) and state[name].shape != mine.shape:
                    continue
                elif isinstance(mine, Tensor) and (problem := _unlike(name, state[name], mine)):
                    problems[name] = problem
                    del state[name]
                elif isinstance(mine, Tensor) and state[name].shape != mine.shape:
                    notes.append(f"taken as a scalar: {name}, saved with an axis")
            else:
                other[name] = f" (the file has a {name_of(value) or type(value).__name__} there)"
        except Exception as error:  # the file says what it likes
            problems[name] = f"can't be read: {shown(name)}: {shown(str(error))}"
    first_of: dict[int, str] = {}
    for name, value in state.items() if not hooked else ():
        mine = own.get(name)
        if not isinstance(mine, Tensor):
            continue
        tied = first_of.setdefault(id(mine), name)
        if tied != name and not torch.equal(value.to(mine.dtype), state[tied].to(mine.dtype)):
            problems[name] = f"tied in the model, but different in the file: {tied} and {name}"
    state._metadata = reading.versions or None  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nothing is copied to the device "meta"
            missing, unexpected = network.load_state_dict(state, strict=False)
    except Exception as error:  # whatever the model's hooks raise; PyTorch has a line for each
        first, *lines = str(error).splitlines() or [""]
        texts = lines or [f"{type(error).__name__}: {first}"]
        return [*problems.values(), *(shown(text, 500) for text in texts)], notes
    there = {id(own[name]) for name in state if name in own}
    for name in missing:
        if id(own[name]) in there:
            notes.append(f"tied to another weight, which is there: {name}")
        elif name.endswith(_NEEDLESS):
            notes.append(f"not in the file, left as the model makes it: {name}")
        else:
            problems.setdefault(name, f"missing: {name}{other.get(name, '')}")
    roots, aside = {name.partition(".")[0] for name in own}, [*reading.aside]
    for name in unexpected:
        root, _, rest = name.partition(".")
        # A number without a fraction counts something; another one may be a part of the model.
        one = isinstance(state[name], Tensor) and state[name].numel() == 1
        counts = one and not (rest or state[name].is_floating_point())
        beside = root not in roots and (counts or _BESIDE.fullmatch(root))
        if beside or name.endswith("position_ids"):
            aside.append(name)
        else:
            problems[name] = f"unexpected: {shown(name)}"
    if aside:
        notes.append(f"left aside, no part of the model: {shown(', '.join(aside))}")
    left = {*missing, *unexpected, *problems}
    renamed, added = (
        sorted(state.keys() - own.keys() - left),
        sorted(own.keys() - state.keys() - left),
    )
    if renamed or added:
        texts = [shown(", ".join(names)) or "nothing" for names in (renamed, added)]
        notes.append(f"migrated by its modules: {texts[0]} became {texts[1]}")
    for name in renamed:
        if isinstance(state[name], Tensor) and (problem := _not_finite(name, state[name])):
            problems[name] = problem
    for name, module in network.named_modules():
        version = reading.versions.get(name, {}).get("version", module._version)
        if version != module._version:
            kind = type(module).__name__
            notes.append(f"{kind} {name}: version {version} loaded into version {module._version}")
    kinds = Counter(
        (str(state[n].dtype)[6:], str(own[n].dtype)[6:])
        for n in state.keys() & own.keys()
        if isinstance(own[n], Tensor) and state[n].dtype != own[n].dtype
    )
    notes += [f"{count_of(n, 'tensor')} converted from {a} to {b}" for (a, b), n in kinds.items()]
    _settle_lazy(network)
    return [*problems.values()], notes


def _unlike(name: str, value: Tensor, mine: Tensor) -> str:
    """Why a tensor can't become a weight; empty if it can."""
    if value.shape != mine.shape and not (mine.ndim == 0 and value.shape == (1,)):
        return f"wrong shape: {name} is {tuple(value.shape)}, the model's is {tuple(mine.shape)}"
    whole = not (value.is_floating_point() or value.is_complex())
    weight = isinstance(mine, nn.Parameter) and mine.is_floating_point()
    counter = not whole and not value.is_complex() and not mine.is_floating_point()
    fits = torch.can_cast(value.dtype, mine.dtype) or (
        counter and torch.equal(value, value.trunc())
    )
    if not fits or (whole and weight):  # quantized weights are nothing without their scales
        return f"wrong type: {name} is {value.dtype}, the model's is {mine.dtype}"
    if isinstance(mine, nn.Parameter):
        return _not_finite(name, value.to(mine.dtype))
    # A buffer may hold them by its constructor, as a mask does.
    return "" if mine.is_meta else _not_finite(name, value.to(mine.dtype), mine)


def _not_finite(name: str, value: Tensor, made: Tensor | None = None) -> str:
    wrong = ~torch.isfinite(value)
    if made is not None and wrong.any():
        wrong &= ~torch.isclose(value, made, equal_nan=True)
    count = int(wrong.sum())
    return f"NaN or Inf: {name}, {count} of {value.numel()} elements" if count else ""


def _settle_lazy(network: nn.Module) -> None:
    """Let lazy modules become what they stand for, where the file has said how large they are."""
    for module in network.modules():
        if isinstance(module, LazyModuleMixin) and not module.has_uninitialized_params():
            module._initialize_hook.remove()
            module._load_hook.remove()
            del module._initialize_hook, module._load_hook
            if module.cls_to_become is not None:
                module.__class__ = module.cls_to_become
