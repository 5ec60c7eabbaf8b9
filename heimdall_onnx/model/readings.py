"""Which weights a checkpoint holds: every mapping of names to tensors in it is a reading.

None of this needs PyTorch or the model; where the names of a model's state are there, they say
which readings can be meant, and what was put before the names of its weights.
"""

from __future__ import annotations

import itertools
import json
import re
import shlex
import struct
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from heimdall_onnx.common.errors import CheckpointError
from heimdall_onnx.common.text import shown
from heimdall_onnx.model.formats import Located, locate
from heimdall_onnx.model.pickles import (
    Placeholder,
    Storage,
    StoredTensor,
    mapped,
    name_of,
    read_pickle,
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
AVERAGED = re.compile(r"(^|[^a-z])(ema|swa|shadow|averag)", re.IGNORECASE)
# What PyTorch's own wrappers put into names.
_WRAPPERS = {
    *("module", "_orig_mod", "_forward_module"),
    *("_fsdp_wrapped_module", "_checkpoint_wrapped_module"),
}
_PLAIN = ("builtins.", "torch.")
_MOST_DEEP, _MOST_PREFIXES = 6, 20
_KINDS = {"I": "int", "U": "uint", "F": "float"}
_SAFE_TYPES = {
    f"{k}{bits}": f"{name}{bits}" for k, name in _KINDS.items() for bits in (8, 16, 32, 64)
}
_SAFE_TYPES |= {"BF16": "bfloat16", "BOOL": "bool", "C64": "complex64"}
_SAFE_TYPES |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}

_CONVERT = (
    "Where its class can be imported, and only if you trust the file, save the weights alone:\n"
    "    import torch\n"
    "    found = torch.load({path!r}, map_location='cpu', weights_only=False){keys}\n"
    "    torch.save({weights}, 'weights.pt')"
)


@dataclass(frozen=True)
class Reading:
    """One set of weights that a checkpoint may be read as.

    Attributes:
        keys: Where in the file it is.
        values: What is there by name: `StoredTensor` and what lies beside them.
        versions: PyTorch's versions of the modules, by their names.
        pickled: Class of the pickled module that has the weights; empty for plain ones.
        prefix: What the names of the model's weights begin with.
    """

    keys: tuple[str, ...]
    values: Mapping[str, Any] = field(repr=False)
    versions: Mapping[str, Any] = field(default_factory=dict, repr=False)
    pickled: str = ""
    prefix: str = ""

    @property
    def label(self) -> str:
        """What chooses it: keys and prefix with dots between them; ``.`` for the whole file."""
        return ".".join((*self.keys, *self.prefix.split(".")[:-1])) or "."

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """Those of its values that are tensors."""
        return {n: v for n, v in self.values.items() if isinstance(v, StoredTensor)}

    @property
    def inside(self) -> dict[str, Any]:
        """Values with the prefix, without it."""
        return _after(self.prefix, self.values)

    @property
    def inside_versions(self) -> dict[str, Any]:
        """Versions of the modules of the model, by the names that they have there."""
        versions = {f"{n}." if n else "": v for n, v in self.versions.items() if type(v) is dict}
        return {name[:-1]: value for name, value in _after(self.prefix, versions).items()}

    def described(self) -> dict[str, Any]:
        """What it holds, as JSON has it."""
        tensors = self.tensors
        heads = {name.partition(".")[0] for name in tensors if "." in name}
        return {
            "weights": self.label,
            "tensors": len(tensors),
            "elements": sum(tensor.elements for tensor in tensors.values()),
            "dtypes": dict(Counter(tensor.dtype for tensor in tensors.values())),
            "prefix": f"{heads.pop()}." if len(heads) == 1 else "",
            "pickled": self.pickled,
        }

    def fitted(self, own: Iterable[str]) -> Iterator[Reading]:
        """The same with each prefix after which enough of the model's own names are found.

        Names are without what wrappers have put into them, ``module`` or ``_orig_mod`` for example,
        but for what the model's own names contain too.
        """
        known = set(own)
        dropped = _WRAPPERS - {part for name in known for part in name.split(".")}
        bare = replace(
            self, values=_without(dropped, self.values), versions=_without(dropped, self.versions)
        )
        counts: Counter[str] = Counter()
        for name in bare.values:
            starts = [0, *(found.end() for found in re.finditer(r"\.", name))]
            counts.update(name[:start] for start in starts if name[start:] in known)
        most = max(counts.values(), default=0)
        prefixes = [prefix for prefix, count in counts.items() if 2 * count >= most]
        if not most:
            # The model may rename all of them when it loads them.
            heads = {name.partition(".")[0] for name in bare.tensors}
            prefixes = ["", *(f"{head}." for head in heads if len(heads) == 1)]
        yield from (replace(bare, prefix=prefix) for prefix in prefixes[:_MOST_PREFIXES])


def _without(dropped: set[str], named: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in named.items():
        bare = ".".join(part for part in name.split(".") if part not in dropped)
        # Of a wrapper and what it wraps, the latter comes later.
        found[name if bare in named and bare != name and bare else bare] = value
    return found


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
        averaged: Where averages of weights lie that have no names, and how many.
        hyper_parameters: As it records them, not loaded yet; empty if it doesn't.
    """

    source: Located
    tree: Any = field(repr=False)
    readings: tuple[Reading, ...]
    skipped: dict[str, str]
    averaged: dict[str, int]
    hyper_parameters: dict[str, Any]


def read_content(given: Path | str) -> Content:
    """Read a checkpoint's structure; of its tensors nothing but where they are.

    Raises:
        CheckpointError: If it is missing, broken, hostile or something else.
    """
    source = locate(given)
    read = _safetensors if source.kind == "safetensors" else _torch
    try:
        if source.kind == "distributed":
            tree: Any = _distributed(source.path)
        elif len(source.files) == 1:
            tree = read(source.files[0])
        else:
            tree = {name: value for file in source.files for name, value in read(file).items()}
        found = _Search(tree)
    except OSError as error:
        raise CheckpointError(f"can't read {source.path}: {error.strerror or error}") from error
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        RecursionError,
        struct.error,
    ) as error:
        raise CheckpointError(
            f"{source.path} is truncated or not a checkpoint: {shown(str(error), 500)}"
        ) from error
    hyper: Any = {}
    if isinstance(tree, dict):
        hyper = next((tree[n] for n in _HYPER_PARAMETERS if isinstance(tree.get(n), dict)), {})
    if isinstance(hyper, Placeholder):
        hyper = hyper or hyper.attributes
    hyper = {name: value for name, value in hyper.items() if isinstance(name, str)}
    return Content(source, tree, tuple(found.readings), found.skipped, found.averaged, hyper)


def describe_content(content: Content) -> dict[str, Any]:
    """What a checkpoint holds, as JSON has it, with the command to go on with."""
    readings = [reading.described() for reading in content.readings]
    most = max((found["tensors"] for found in readings if not found["pickled"]), default=0)
    likely = [r for r in readings if not r["pickled"] and 2 * r["tensors"] >= most]
    command = ["heimdall-onnx", "release", str(content.source.path), "--model", "PACKAGE:CLASS"]
    if len(likely) > 1:
        command += ["--weights", likely[0]["weights"]]
    return {
        "file": str(content.source.path),
        "kind": content.source.kind,
        "readings": readings,
        "skipped": content.skipped,
        "hyper_parameters": {
            name: name_of(value) or shown(value) for name, value in content.hyper_parameters.items()
        },
        "command": shlex.join(command) if likely else "",
    }


def require_weights(content: Content) -> None:
    """Raise a `CheckpointError` where a checkpoint has no weights that can be read as data."""
    path = content.source.path
    if all(reading.pickled for reading in content.readings) and content.readings:
        raise must_be_converted(content, content.readings[0])
    if not content.readings and content.skipped:
        found = shown(", ".join(sorted(set(content.skipped.values()))), 2000)
        weights = "found.<its module>.state_dict()"
        if not name_of(content.tree):
            weights = "{name: torch.as_tensor(value) for name, value in found.items()}"
        raise CheckpointError(
            f"{path} holds no tensors that can be read without running code; it holds {found}. "
            + _CONVERT.format(path=str(path), keys="", weights=weights)
        )
    if not content.readings:
        tree = content.tree
        found = ", ".join(map(str, tree)) if isinstance(tree, dict) else type(tree).__name__
        raise CheckpointError(
            f"{path} holds no weights: expected tensors by name, at the top or under a key, found "
            f"{shown(found) or 'an empty dictionary'}"
        )


def must_be_converted(content: Content, reading: Reading) -> CheckpointError:
    """That weights are part of a pickled module, and how they become a state dict."""
    path, keys = str(content.source.path), "".join(f"[{key!r}]" for key in reading.keys)
    return CheckpointError(
        f"the weights in {path} are part of a pickled {reading.pickled}, and to unpickle it would "
        "run code. " + _CONVERT.format(path=path, keys=keys, weights="found.state_dict()")
    )


class _Search:
    """Goes through all that a checkpoint holds, once."""

    def __init__(self, tree: Any) -> None:
        self.readings: list[Reading] = []
        self.skipped: dict[str, str] = {}
        self.averaged: dict[str, int] = {}
        self._seen: set[int] = set()
        self._look(tree, (), training=False)

    def _look(self, value: Any, keys: tuple[str, ...], *, training: bool) -> None:
        if len(keys) > _MOST_DEEP or id(value) in self._seen:
            return
        self._seen.add(id(value))
        where, kind = ".".join(keys) or ".", name_of(value)
        state = value.attributes if isinstance(value, Placeholder) else {}
        if kind and not kind.startswith(_PLAIN):
            self.skipped[where] = kind
        if {"_parameters", "_modules"} <= state.keys():
            if values := dict(_of_module(value, "", set())):
                self.readings.append(Reading(keys, values, pickled=kind))
            return
        if isinstance(value, dict):
            entries = [(name, inner) for name, inner in value.items() if isinstance(name, str)]
            # Lightning 1.4 has classes as keys.
            for name in filter(name_of, value):
                self.skipped[f"{where} (a key)"] = name_of(name)
        else:
            entries = [(str(i), v) for i, v in enumerate(value)] if _is_list(value) else []
        count = sum(isinstance(inner, StoredTensor) for _, inner in entries)
        if count and isinstance(value, dict) and not training:
            versions = vars(value).get("_metadata", {}) if type(value) is OrderedDict else {}
            self.readings.append(Reading(keys, dict(entries), versions))
        elif count > 1 and AVERAGED.search(where):
            self.averaged[where] = count
            self.skipped[where] = "averages of weights, without names"
        for name, inner in entries:
            if isinstance(inner, dict | type) or _is_list(inner):
                of_training = training or _TRAINING.search(name) is not None
                self._look(inner, (*keys, name), training=of_training)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and not isinstance(value, StoredTensor)


def _of_module(module: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, StoredTensor]]:
    """The state of a pickled module, as far as it has tensors."""
    state = {} if id(module) in seen else module.attributes
    seen.add(id(module))
    for name, value in (state.get("_parameters", {}) | state.get("_buffers", {})).items():
        if isinstance(value, StoredTensor):
            yield f"{prefix}{name}", value
    for name, inner in state.get("_modules", {}).items():
        yield from _of_module(inner, f"{prefix}{name}.", seen)


def _torch(path: Path) -> Any:
    return read_torch(mapped(path))


def _safetensors(path: Path) -> dict[str, StoredTensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            buffer = mapped(path)
    except SafetensorError as error:
        raise ValueError(f"it is a broken safetensors file: {error}") from error
    end = 8 + int.from_bytes(buffer[:8], "little")
    found = {}
    for name, about in json.loads(buffer[8:end]).items():
        if name != "__metadata__":
            first, last = about["data_offsets"]
            dtype = _SAFE_TYPES.get(about["dtype"], about["dtype"])
            storage = Storage(buffer, dtype, end + first, last - first)
            shape = tuple(about["shape"])
            found[name] = StoredTensor(storage, dtype, shape, _contiguous(shape))
    return found


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    steps = itertools.accumulate(reversed(shape[1:]), int.__mul__, initial=1)
    return tuple(steps)[::-1] if shape else ()


def _distributed(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a distributed checkpoint, each put together of its parts."""
    about = read_pickle((folder / ".metadata").read_bytes()).attributes
    parts: dict[str, list[tuple[tuple[int, ...], StoredTensor]]] = {}
    for index, place in about["storage_data"].items():
        name, offset = index.attributes["fqn"], index.attributes.get("offset")
        where = place.attributes
        if offset is not None:  # else a value that is no tensor
            start = where["offset"]
            with mapped(folder / Path(where["relative_path"]).name) as file:
                part = read_torch(bytearray(file[start : start + where["length"]]))
            parts.setdefault(name, []).append((sizes_of(offset), part))
    return {
        name: _joined(sizes_of(about["state_dict_metadata"][name].attributes["size"]), found)
        for name, found in parts.items()
    }


def _joined(
    shape: tuple[int, ...], parts: list[tuple[tuple[int, ...], StoredTensor]]
) -> StoredTensor:
    first = parts[0][1]
    if first.shape == shape:
        return first
    import torch

    if sum(part.elements for _, part in parts) != torch.Size(shape).numel():
        raise ValueError(
            f"of a tensor {shape} it holds {len(parts)} parts, which are not all of it"
        )
    tensors = [(offset, part.tensor()) for offset, part in parts]
    whole = torch.empty(shape, dtype=tensors[0][1].dtype)
    for offset, tensor in tensors:
        ends = zip(offset, tensor.shape, strict=True)
        whole[tuple(slice(start, start + size) for start, size in ends)] = tensor
    buffer = bytearray(whole.flatten().view(torch.uint8).numpy())
    storage = Storage(buffer, first.dtype, 0, len(buffer))
    return StoredTensor(storage, first.dtype, shape, _contiguous(shape))
