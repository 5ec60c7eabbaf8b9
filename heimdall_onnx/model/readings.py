"""Which weights a checkpoint holds: every mapping of names to tensors in it is a reading.

None of this needs PyTorch or the model; where the names of a model's state are there, they say
which readings can be meant, and what was put before the names of its weights.
"""

from __future__ import annotations

import io
import re
import shlex
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from heimdall_onnx.common.errors import CheckpointError
from heimdall_onnx.common.text import shown
from heimdall_onnx.model.formats import AVERAGED, Located, locate
from heimdall_onnx.model.pickles import (
    Placeholder,
    StoredTensor,
    name_of,
    read_torch,
    sizes_of,
)

# Where the arguments of a model's constructor are recorded; the first that is there counts.
_HYPER_PARAMETERS = ("hyper_parameters", "hparams", "model_kwargs", "model_args")
# Tensors under these are of the training, not of the model.
_TRAINING = re.compile(
    r"(^|_)(optim(izer)?s?|(lr_)?schedulers?|scaler|callbacks|loops|rng)(_|$)"
    rf"|^({'|'.join(_HYPER_PARAMETERS)})$",
    re.IGNORECASE,
)
# What PyTorch's own wrappers put into names.
_WRAPPERS = {
    *("module", "_orig_mod", "_forward_module"),
    *("_fsdp_wrapped_module", "_checkpoint_wrapped_module"),
}
_PLAIN = ("builtins.", "torch.")
NO_MODEL = (
    "which model are these weights of? Name its class, or a function that makes it, with --model "
    "package.module:Class (model=... in Python)"
)
_MOST_DEEP, _MOST_PREFIXES = 6, 20
_BROKEN = (ValueError, TypeError, LookupError, AttributeError, RecursionError, struct.error)


@dataclass(frozen=True)
class Reading:
    """One set of weights that a checkpoint may be read as.

    Attributes:
        keys: Where in the file it is.
        values: What is there by name: `StoredTensor` and what lies beside them.
        versions: PyTorch's versions of the modules, by their names.
        pickled: Class of the pickled module that has the weights; empty for plain ones.
        prefix: What was before the names of the model's weights in the file.
        aside: Names in the file without it, which are no values.
        matches: How many of the model's own names are among the values.
    """

    keys: tuple[str, ...]
    values: Mapping[str, Any] = field(repr=False)
    versions: Mapping[str, Any] = field(default_factory=dict, repr=False)
    pickled: str = ""
    prefix: str = ""
    aside: tuple[str, ...] = field(default=(), repr=False)
    matches: int = 0

    @property
    def label(self) -> str:
        """What chooses it: keys and prefix with dots between them; ``.`` for the whole file."""
        return ".".join((*self.keys, *self.prefix.split(".")[:-1])) or "."

    @property
    def path(self) -> str:
        """What chooses it where another has its label: keys with slashes, a colon and prefix."""
        return "/".join(self.keys) + (self.prefix and f":{self.prefix[:-1]}") or "."

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """Those of its values that are tensors."""
        return {n: v for n, v in self.values.items() if isinstance(v, StoredTensor)}

    def fitted(self, own: Iterable[str]) -> Iterator[Reading]:
        """The same without each prefix after which some of the model's own names are found.

        Names are without what wrappers have put into them, ``module`` or ``_orig_mod`` for example,
        but for what the model's own names contain too, and where two would become one.
        """
        known = set(own)
        dropped = _WRAPPERS - {part for name in known for part in name.split(".")}
        if len(_without(dropped, self.values)) < len(self.values):
            dropped = set()
        values, versions = (_without(dropped, named) for named in (self.values, self.versions))
        versions = {f"{name}.": value for name, value in versions.items()}
        counts: Counter[str] = Counter()
        for name in values:
            starts = [0, *(found.end() for found in re.finditer(r"\.", name))]
            counts.update(name[:start] for start in starts if name[start:] in known)
        if not counts:
            # The model may rename all of them when it loads them.
            heads = {name.partition(".")[0] for name in values}
            counts.update({"": 0} | {f"{head}.": 0 for head in heads if len(heads) == 1})
        for prefix, matches in counts.most_common(_MOST_PREFIXES):
            # As many of the model's names once more are another model's, a teacher's for example.
            others = [
                q.removeprefix(prefix)
                for q, count in counts.items()
                if q != prefix and q.startswith(prefix) and count >= matches > 0
            ]
            taken = {
                name: value
                for name, value in _after(prefix, values).items()
                if name in known or not name.startswith(tuple(others))
            }
            yield replace(
                self,
                values=taken,
                versions={n[:-1]: value for n, value in _after(prefix, versions).items()},
                prefix=prefix,
                aside=tuple(n for n in values if n.removeprefix(prefix) not in taken),
                matches=matches,
            )


def _without(dropped: set[str], named: Mapping[str, Any]) -> dict[str, Any]:
    # Of a wrapper and what it wraps, the latter comes later.
    return {
        ".".join(part for part in name.split(".") if part not in dropped): value
        for name, value in named.items()
    }


def _after(prefix: str, named: Mapping[str, Any]) -> dict[str, Any]:
    return {n.removeprefix(prefix): v for n, v in named.items() if n.startswith(prefix)}


@dataclass(frozen=True)
class Content:
    """What a checkpoint holds.

    Attributes:
        source: Its files.
        tree: All of it, as `read_pickle` gives it; of safetensors and shards the tensors by name.
        readings: Every mapping of names to tensors that may be a model's weights.
        skipped: Where something lies that is not loaded, and its class.
    """

    source: Located
    tree: Any = field(repr=False)
    readings: list[Reading] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def hyper_parameters(self) -> dict[str, Any]:
        """Arguments of the model's constructor as it records them, not loaded yet."""
        top = self.tree if isinstance(self.tree, dict) else {}
        found: Any = next((top[n] for n in _HYPER_PARAMETERS if isinstance(top.get(n), dict)), {})
        found = found or getattr(found, "attributes", {})
        return {name: value for name, value in found.items() if isinstance(name, str)}


def read_content(given: Path | str) -> Content:
    """Read a checkpoint's structure; of its tensors nothing but where they are.

    Raises:
        CheckpointError: If it is missing, broken, hostile or something else.
    """
    source = locate(given)
    try:
        files = source.files[:1] if source.kind == "distributed" else source.files
        tree, *others = (_READERS[source.kind](file) for file in files)
        for file, other in zip(files[1:], others, strict=True):
            if twice := tree.keys() & other.keys():
                names = shown(", ".join(sorted(map(str, twice))))
                raise CheckpointError(
                    f"shards that hold the same names: {file} has {names}, as one before it; "
                    "which is meant can't be told"
                )
            tree |= other
        content = Content(source, tree)
        _look(content, tree, (), training=False, seen=set())
    except OSError as error:
        raise CheckpointError(f"can't read {source.path}: {error.strerror or error}") from error
    except _BROKEN as error:
        raise CheckpointError(
            f"{source.path} is truncated or not a checkpoint: {shown(str(error), 500)}"
        ) from error
    return content


def labels_of(readings: Sequence[Reading]) -> list[str]:
    """What chooses each: its label, or where several have the same their paths."""
    counts = Counter(reading.label for reading in readings)
    return [one.label if counts[one.label] == 1 else one.path for one in readings]


def describe_content(content: Content) -> dict[str, Any]:
    """What a checkpoint holds, as JSON has it, with the command to go on with."""
    named = [*zip(labels_of(content.readings), content.readings, strict=True)]
    counts = {label: len(one.tensors) for label, one in named if not one.pickled}
    likely = [label for label, count in counts.items() if 2 * count >= max(counts.values())]
    command = ["heimdall-onnx", "release", str(content.source.path), "--model", "PACKAGE:CLASS"]
    command += ["--weights", likely[0]] if len(likely) > 1 else []
    hyper = {name: name_of(one) or shown(one) for name, one in content.hyper_parameters.items()}
    return {
        "file": str(content.source.path),
        "kind": content.source.kind,
        "readings": [
            {
                "weights": label,
                "names": [*one.tensors][:3],
                "tensors": len(one.tensors),
                "elements": sum(tensor.elements for tensor in one.tensors.values()),
                "dtypes": dict(Counter(tensor.dtype for tensor in one.tensors.values())),
                "pickled_in": one.pickled,
            }
            for label, one in named
        ],
        "not_loaded": content.skipped,
        "hyper_parameters": hyper,
        "command": shlex.join(command) if likely else "",
    }


def read_weights(given: Path | str) -> Content:
    """Read a checkpoint as `read_content`, if it has weights that can be read as data.

    Raises:
        CheckpointError: If it has none, with what to do, or as `read_content`.
    """
    content = read_content(given)
    if not all(reading.pickled for reading in content.readings):
        return content
    if content.readings or content.skipped:
        raise must_be_converted(content, *content.readings[:1])
    tree = content.tree
    found = ", ".join(map(str, tree)) if isinstance(tree, dict) else type(tree).__name__
    raise CheckpointError(
        f"{content.source.path} holds no weights: expected tensors by name, at the top or under a "
        f"key, found {shown(found) or 'an empty dictionary'}"
    )


def must_be_converted(content: Content, reading: Reading | None = None) -> CheckpointError:
    """That weights are no plain data, and how they become a state dict."""
    path = str(content.source.path)
    if reading is not None:
        what = f"the weights in {path} are part of a pickled {reading.pickled}"
        keys, weights = "".join(f"[{key!r}]" for key in reading.keys), "found.state_dict()"
    else:
        kinds = shown(", ".join(sorted(set(content.skipped.values()))), 2000)
        what, keys = f"{path} holds {kinds}, and no tensors that are plain data", ""
        weights = "{name: torch.as_tensor(value) for name, value in found.items()}"
        weights = "found.<its module>.state_dict()" if name_of(content.tree) else weights
    return CheckpointError(
        f"{what}, and to unpickle it would run code. Where its class can be imported, and only if "
        "you trust the file, save the weights alone:\n    import torch\n    found = torch.load("
        f"{path!r}, map_location='cpu', weights_only=False){keys}\n"
        f"    torch.save({weights}, 'weights.pt')"
    )


def _look(
    content: Content,
    value: Any,
    keys: tuple[str, ...],
    *,
    training: bool,
    seen: set[tuple[int, bool]],
) -> None:
    """Note what is in a part of a checkpoint, each part once."""
    if len(keys) > _MOST_DEEP or (id(value), training) in seen:
        return
    seen.add((id(value), training))
    where, kind = ".".join(keys) or ".", name_of(value)
    state = value.attributes if isinstance(value, Placeholder) else {}
    if kind and not kind.startswith(_PLAIN):
        content.skipped[where] = kind
    if {"_parameters", "_modules"} <= state.keys():
        if values := dict(_of_module(value, "", set())):
            content.readings.append(Reading(keys, values, pickled=kind))
        return
    entries: list[tuple[Any, Any]] = [*enumerate(value)] if isinstance(value, list | tuple) else []
    if isinstance(value, dict):
        entries = [(name, one) for name, one in value.items() if isinstance(name, str | int)]
        training = training or "param_groups" in value
        # Lightning 1.4 has classes as keys.
        for name in filter(name_of, value):
            content.skipped[f"{where} (a key)"] = name_of(name)
    # Averages are often kept without names, and are a question beside others nevertheless.
    named = {str(n): v for n, v in entries if isinstance(n, str) or AVERAGED.search(where)}
    if not training and any(isinstance(one, StoredTensor) for one in named.values()):
        versions = getattr(value, "_metadata", {}).items()
        versions = {n: v for n, v in versions if type(n) is str and type(v) is dict}
        content.readings.append(Reading(keys, named, versions))
    for name, one in entries:
        if isinstance(one, dict | list | tuple):
            of_training = (training or bool(_TRAINING.search(str(name)))) and not AVERAGED.search(
                str(name)
            )
            _look(content, one, (*keys, str(name)), training=of_training, seen=seen)


def _of_module(module: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, StoredTensor]]:
    """The state of a pickled module, as far as it has tensors."""
    state = {} if id(module) in seen else module.attributes
    seen.add(id(module))
    for name, value in (state.get("_parameters", {}) | state.get("_buffers", {})).items():
        if isinstance(value, StoredTensor):
            yield f"{prefix}{name}", value
    for name, inner in state.get("_modules", {}).items():
        if inner is not None:
            yield from _of_module(inner, f"{prefix}{name}.", seen)


def _torch(path: Path) -> Any:
    with path.open("rb") as file:
        return read_torch(file)


def _safetensors(path: Path) -> dict[str, StoredTensor]:
    from safetensors import SafetensorError, safe_open

    opened: Any = cache(partial(safe_open, path, framework="pt"))
    found = {}
    try:
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dictionary
                about = file.get_slice(name)
                tensor = partial(lambda name: opened().get_tensor(name), name)
                found[name] = StoredTensor(about.get_dtype(), tuple(about.get_shape()), tensor)
    except SafetensorError as error:
        raise ValueError(f"it is a broken safetensors file: {error}") from error
    return found


def _distributed(metadata: Path) -> dict[str, StoredTensor]:
    """The tensors of a distributed checkpoint."""
    about: Any = _torch(metadata).attributes
    parts: dict[str, list[tuple[tuple[int, ...], Any]]] = {}
    for index, place in about["storage_data"].items():
        if (offset := index.attributes.get("offset")) is not None:  # else no tensor
            entry = (sizes_of(offset), place.attributes)
            parts.setdefault(index.attributes["fqn"], []).append(entry)
    found = {}
    for name, places in parts.items():
        whole = about["state_dict_metadata"][name].attributes
        dtype = name_of(whole["properties"].attributes["state"][0]).removeprefix("torch.")
        shape = sizes_of(whole["size"])
        found[name] = StoredTensor(dtype, shape, partial(_joined, metadata.parent, shape, places))
    return found


def _joined(folder: Path, shape: tuple[int, ...], places: list[tuple[tuple[int, ...], Any]]) -> Any:
    """A tensor of a distributed checkpoint, put together of its parts."""
    import torch

    parts = []
    for _, place in places:
        with (folder / Path(place["relative_path"]).name).open("rb") as file:
            file.seek(place["offset"])
            parts.append(read_torch(io.BytesIO(file.read(place["length"]))).tensor())
    if sum(part.numel() for part in parts) != torch.Size(shape).numel():
        raise ValueError(
            f"of a tensor {shape} it holds {len(parts)} parts, which are not all of it"
        )
    whole = torch.empty(shape, dtype=parts[0].dtype)
    for part, (offset, _) in zip(parts, places, strict=True):
        ends = zip(offset, part.shape, strict=True)
        whole[tuple(slice(start, start + size) for start, size in ends)] = part
    return whole


_READERS: dict[str, Callable[[Path], Any]]
_READERS = {"pytorch": _torch, "safetensors": _safetensors, "distributed": _distributed}
