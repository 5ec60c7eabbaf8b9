"""The plan of a fleet: which checkpoints are released, each with which parameters.

It is YAML (or JSON, which is read faster), checked whole before anything starts: every problem is
named with its place. Paths are relative to the plan's folder, or addresses in the bucket.

```yaml
name: july                      # by default the name of the file
parameters: {profile: smoke, name: "net-{stem}"}        # of every item, as `release` takes them
checkpoints: [models/a.ckpt, "runs/*/best.ckpt", "s3://checkpoints/2026-07/*.ckpt"]
matrix: {opset: [14, 20], model: [pkg.mod:A]}           # each combination with each checkpoint
exclude: [{checkpoint: "models/*", opset: 14}]          # of these combinations, what is left out
include: [{checkpoint: x.ckpt, name: other, memory: 8GiB}]    # further single items
memory: 4GiB                    # limit of an item
```

In a pattern ``*``, ``?`` and ``[…]`` stand for parts of one name and ``**`` for any number of
folders, on disk and in the bucket alike; ``**`` follows no links, as they may go in circles.
The values of the matrix and of an included item replace those of ``parameters``. In ``name`` and
``prefix``, ``{stem}`` and ``{parent}`` stand for the checkpoint's name without its ending and for
its folder's name; characters in them that names don't allow become ``-``.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ByteSize, Field, ValidationError

from heimdall_onnx.common.errors import ParameterError
from heimdall_onnx.common.parameters import ReleaseParameters, parameter_problems
from heimdall_onnx.common.text import listed, shown
from heimdall_onnx.common.yaml import line_of, parse, place_of
from heimdall_onnx.release.fleet.files import (
    Checkpoints,
    Exclusion,
    Glob,
    ItemParameters,
    ListObjects,
    Made,
    absolute,
    written,
)

_T = TypeVar("_T")
_Place = Sequence[str | int]

# Some ten times what 10,000 items take, and what a small matrix of many values makes at once.
_MAX_BYTES = 64 << 20
_MOST_ITEMS = 100_000
# PyYAML reads some 100 kB a second; what is larger is written by a program, which can write JSON.
_MAX_YAML_BYTES = 1 << 20
# Less is a forgotten unit.
_LEAST_MEMORY = 1 << 20

_LISTS = ("checkpoints", "include", "exclude")


def _size(value: object) -> object:
    if isinstance(value, str):
        pattern = r"\d+(\.\d+)?\s*([KMGT]i?)?B?"
        usable = re.fullmatch(pattern, value.strip(), re.ASCII | re.IGNORECASE) is not None
    else:
        usable = isinstance(value, int) and not isinstance(value, bool)
    if not usable:
        raise ValueError("no size")
    return value


_Path = Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00]*$")]
_Memory = Annotated[ByteSize, BeforeValidator(_size), Field(ge=_LEAST_MEMORY, lt=1 << 60)]


# What else is in an entry are parameters, which are checked as such.
class _Include(BaseModel, strict=True, frozen=True, extra="allow"):
    checkpoint: _Path
    memory: _Memory | None = None


class _Exclude(BaseModel, strict=True, frozen=True, extra="allow"):
    checkpoint: _Path | None = None


class _Plan(BaseModel, strict=True, frozen=True, extra="forbid"):
    name: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    # What is None in a list was wrong and is said already.
    checkpoints: list[_Path | None] = Field(default_factory=list)
    matrix: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    include: list[_Include | None] = Field(default_factory=list)
    exclude: list[_Exclude | None] = Field(default_factory=list)
    memory: _Memory | None = None


_EXPECTED = {
    "name": "a name, in quotes if YAML takes it for something else",
    "parameters": "parameters of a release by their names",
    "checkpoints": "a list of paths, patterns or addresses s3://bucket/key",
    "checkpoint": "a path or an address s3://bucket/key",
    "matrix": "lists of values by the parameters' names",
    "include": "a list of items, each with its checkpoint",
    "exclude": "a list of what is left out, by checkpoint and parameters",
    "memory": "bytes, or a size as 4GiB, from 1MiB",
}


@dataclass(frozen=True, slots=True)
class FleetItem:
    """One release of a fleet.

    Attributes:
        number: Its place in the plan, from 1.
        checkpoint: Absolute path, or ``s3://bucket/key``.
        parameters: Of the release, without checkpoint, ``publish``, ``output_dir`` and ``run_id``;
            evaluation and calibration data as absolute paths or ``s3://`` addresses. Items whose
            parameters are equal share one object.
        memory_bytes: Limit of its memory; None for no limit.
    """

    number: int
    checkpoint: str
    parameters: ReleaseParameters
    memory_bytes: int | None

    @property
    def label(self) -> str:
        """What a person recognises it by, on one line, e.g. ``"3: a/best.ckpt, Net, opset 20"``."""
        file = "/".join(self.checkpoint.split("/")[-2:])
        model = self.parameters.model.rpartition(":")[2]
        return shown(f"{self.number}: {file}, {model}, opset {self.parameters.opset}")


@dataclass(frozen=True)
class FleetPlan:
    """What a fleet is to do.

    Attributes:
        name: Of the fleet.
        items: In their order, numbered from 1.
        text: The plan as JSON with every item by itself and every parameter written out, whatever
            the defaults or the files that match will be one day; `read_plan` reads it, from
            anywhere, as the same plan.
    """

    name: str
    items: tuple[FleetItem, ...] = field(repr=False)
    text: str = field(repr=False)


def read_plan(path: Path | str, list_objects: ListObjects | None = None) -> FleetPlan:
    """Read the plan of a fleet.

    Args:
        path: The file, YAML or JSON.
        list_objects: Yields the keys of a bucket that begin with a prefix, as `Bucket.list_keys`
            does for a client; called only if the plan names checkpoints in a bucket.

    Raises:
        ParameterError: If it can't be read, or not be used; with every problem and its place.
        SettingsError: If it names checkpoints in a bucket and ``list_objects`` is None.
        StoreError: If the bucket can't be listed.
    """
    source = Path(path)
    data, node = _parse(_read(source), source)
    # The folder as it was named: it may be a link.
    folder = Path(absolute(Path.cwd(), str(source))).parent
    return _Planner(f"the plan {source}", folder, list_objects, node).plan(data, source.stem)


def plan_checkpoints(
    patterns: Sequence[str],
    values: Mapping[str, Any],
    *,
    name: str,
    list_objects: ListObjects | None,
    memory: int | str | None = None,
) -> FleetPlan:
    """Plan one release of each checkpoint.

    Args:
        patterns: Paths, patterns or addresses, as ``checkpoints`` of a plan; relative to the
            current folder.
        values: Parameters of every release, as ``parameters`` of a plan.
        name: Of the fleet.
        list_objects: As for `read_plan`.
        memory: Limit of an item, in bytes or as text, e.g. ``"4GiB"``.

    Raises:
        ParameterError: If that can't be used; with every problem.
        SettingsError: If checkpoints are in a bucket and ``list_objects`` is None.
        StoreError: If the bucket can't be listed.
    """
    data = {"checkpoints": list(patterns), "parameters": dict(values), "memory": memory}
    return _Planner("this fleet", Path.cwd(), list_objects, None).plan(data, name)


def _read(source: Path) -> bytes:
    try:
        with source.open("rb") as file:
            # Read at once, it would take that much memory for any plan.
            chunks = iter(partial(file.read, 1 << 20), b"")
            content = b"".join(itertools.islice(chunks, (_MAX_BYTES >> 20) + 1))
    except OSError as error:
        raise ParameterError(f"can't read the plan {source}: {error.strerror or error}") from error
    if len(content) > _MAX_BYTES:
        raise ParameterError(
            f"{source} is no plan of a fleet: expected at most {_MAX_BYTES:,} bytes, found more"
        )
    return content


def _parse(content: bytes, source: Path) -> tuple[Any, yaml.Node | None]:
    """The data, and where in the text it stands, which only YAML says."""
    if content.lstrip()[:1] == b"{":
        try:
            return json.loads(content, object_pairs_hook=_each_once), None
        except (ValueError, RecursionError):
            pass  # YAML may begin so too, and says where it is wrong
    if len(content) > _MAX_YAML_BYTES:
        raise ParameterError(
            f"{source} is no plan of a fleet: expected JSON, or at most {_MAX_YAML_BYTES:,} bytes "
            f"of YAML, found {len(content):,}"
        )
    try:
        return parse(content)
    except ValueError as error:
        raise ParameterError(f"{source} is no YAML of a plan: {error}") from error


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key is there twice")
    return found


class _Planner:
    """One plan from its data to its items, with the problems that are found on the way."""

    def __init__(
        self, what: str, folder: Path, list_objects: ListObjects | None, node: yaml.Node | None
    ) -> None:
        self._what, self._folder, self._node = what, folder, node
        self._checkpoints = Checkpoints(folder, list_objects)
        self._parameters = ItemParameters(folder)
        self._problems: list[str] = []
        # Equal parameters are one object, so that the key tells equal items.
        self._items: dict[tuple[str, int], FleetItem] = {}

    def plan(self, data: Any, default_name: str) -> FleetPlan:
        if not isinstance(data, dict):
            found = "nothing" if data is None else shown(data)
            raise ParameterError(
                f"{self._what} can't be used: expected `checkpoints` or `include`, and what else "
                f"belongs to a plan; found {found}"
            )
        form = self._read(data)
        for path, values in _sections(data):
            for said in self._parameters.problems(values):
                name = re.split(r"\W", said)[0]
                self._refuse(path, said, within=[name] if name in values else [])
        if form.matrix and not data.get("checkpoints"):
            self._refuse(["matrix"], "there are no `checkpoints` to combine it with")
        globs = self._globs(form)
        name = self._named(form, default_name)
        checkpoints, included = self._find(form)
        combinations = math.prod(map(len, form.matrix.values()))
        if (count := len(checkpoints) * combinations + len(included)) > _MOST_ITEMS:
            self._refuse([], f"expected at most {_MOST_ITEMS:,} items, found {count:,}")
        # Items are made only of what is there and of values that can be used.
        self._require_no_problem()
        try:
            self._combine(form, checkpoints, globs)
            self._include(form, included)
            items = tuple(self._items.values())
            if not items and not self._problems:
                self._refuse([], "there is nothing to release")
            self._require_no_problem()
            return FleetPlan(name, items, _text(name, items))
        except RecursionError as error:
            # It could just be read.
            raise ParameterError(
                f"{self._what} can't be used: its values are nested too deeply"
            ) from error

    def _refuse(self, path: _Place, said: str, *, within: _Place = ()) -> None:
        if path:
            at = [*path, *within]
            line = f"line {line_of(self._node, at)}, " if self._node is not None else ""
            said = f"{line}{place_of(path)}: {said}"
        self._problems.append(said)

    def _require_no_problem(self) -> None:
        if self._problems:
            raise ParameterError(f"{self._what} can't be used:{listed(self._problems)}")

    def _read(self, data: dict[str, Any]) -> _Plan:
        """The plan as it is written; what can't be used of it is said and left out."""
        lists = {name: data[name] for name in _LISTS if isinstance(data.get(name), list)}
        for name, entries in lists.items():
            for at, entry in enumerate(entries):
                if entry is None:
                    self._refuse([name, at], f"expected {_EXPECTED[name]}, found nothing")
        try:
            return _Plan.model_validate(data)
        except ValidationError as error:
            problems = error.errors(include_url=False)
        left: dict[str, Any] = {**data, **{name: [*entries] for name, entries in lists.items()}}
        for entry in problems:
            if not entry["loc"]:
                self._refuse([], f"one of its keys is no text: {shown(entry['input'])}")
                self._require_no_problem()
            self._refuse(entry["loc"], _said(entry))
            section, *within = entry["loc"]
            if section in lists and within:
                left[str(section)][within[0]] = None
            else:
                left.pop(str(section), None)
        return _Plan.model_validate(left)

    def _named(self, form: _Plan, default: str) -> str:
        name = default if form.name is None else form.name
        hint = "; the name of the file can't be the fleet's, so give one"
        for said in parameter_problems({"name": name}):
            self._refuse(["name"], said + hint if form.name is None else said)
        return name

    def _find(self, form: _Plan) -> tuple[list[str], list[str]]:
        """The checkpoints to combine with the matrix, and those of the included items."""
        found: dict[str, str] = {}
        named: list[tuple[_Place, str]] = []
        for at, text in _present(form.checkpoints):
            path: _Place = ["checkpoints", at]
            with self._refused(path):
                here = self._checkpoints.matching(text)
                if again := [checkpoint for checkpoint in here if checkpoint in found]:
                    more = f" and {len(again) - 1:,} more" if again[1:] else ""
                    before = shown(repr(found[again[0]]))
                    self._refuse(path, f"{shown(again[0])}{more}: there already, by {before}")
                found |= dict.fromkeys(here, text)
                named += [(path, text)] if here == [text] else []
        included = []
        for at, entry in _present(form.include):
            path = ["include", at, "checkpoint"]
            with self._refused(path):
                included.append(self._checkpoints.single(entry.checkpoint))
                named.append((path, included[-1]))
        missing = self._checkpoints.missing(address for _, address in named)
        for path, address in named:
            if address in missing:
                self._refuse(path, f"expected an object, found none at {shown(address)}")
        return list(found), included

    @contextmanager
    def _refused(self, path: _Place) -> Iterator[None]:
        try:
            yield
        except ParameterError as error:
            self._refuse(path, str(error))

    def _globs(self, form: _Plan) -> dict[int, Glob]:
        """The patterns of the exclusions that have one."""
        globs: dict[int, Glob] = {}
        for at, entry in _present(form.exclude):
            if entry.checkpoint is not None:
                with self._refused(["exclude", at, "checkpoint"]):
                    globs[at] = Glob(entry.checkpoint, self._folder)
            elif not _extra(entry):
                self._refuse(["exclude", at], "expected a checkpoint or parameters, found neither")
        return globs

    def _combine(self, form: _Plan, checkpoints: Iterable[str], globs: Mapping[int, Glob]) -> None:
        """Add each checkpoint with each combination of the matrix, but for what is left out."""
        resolvers = [
            self._parameters.resolver(form.parameters | dict(zip(form.matrix, chosen, strict=True)))
            for chosen in itertools.product(*form.matrix.values())
        ]
        exclusions = [
            Exclusion(globs.get(at), tuple(given), self._parameters.resolver(given))
            for at, given in ((at, _extra(entry)) for at, entry in _present(form.exclude))
        ]
        place = ["matrix" if form.matrix else "checkpoints"]
        for checkpoint, resolve in itertools.product(checkpoints, resolvers):
            made = resolve(checkpoint)
            fitting = [one for one in exclusions if one.fits(checkpoint, made[0])]
            for one in fitting:
                one.used = True
            if not fitting:
                self._add(place, checkpoint, made, form.memory)
        for at, one in enumerate(exclusions):
            if not one.used:
                self._refuse(["exclude", at], "there is nothing like this that it could leave out")

    def _include(self, form: _Plan, included: Iterable[str]) -> None:
        """Add the included items."""
        for checkpoint, (at, entry) in zip(included, _present(form.include), strict=True):
            made = self._parameters.resolver(form.parameters | _extra(entry))(checkpoint)
            memory = form.memory if entry.memory is None else entry.memory
            self._add(["include", at], checkpoint, made, memory)

    def _add(self, place: _Place, checkpoint: str, made: Made, memory: int | None) -> None:
        parameters, problems = made
        if parameters is None:
            for said in problems:
                self._refuse(place, f"{shown(checkpoint)}: {said}")
        elif same := self._items.get((checkpoint, id(parameters))):
            self._refuse(place, f"{shown(checkpoint)} is there twice as in {same.label}")
        else:
            limit = None if memory is None else int(memory)
            item = FleetItem(len(self._items) + 1, checkpoint, parameters, limit)
            self._items[checkpoint, id(parameters)] = item


def _present(entries: Iterable[_T | None]) -> list[tuple[int, _T]]:
    """The entries that can be used, with their places."""
    return [(at, entry) for at, entry in enumerate(entries) if entry is not None]


def _sections(data: Mapping[str, Any]) -> Iterator[tuple[list[str | int], dict[str, Any]]]:
    """Parameters wherever a plan has some, with their place; what is none is passed over."""
    if isinstance(given := data.get("parameters"), dict):
        yield ["parameters"], given
    if isinstance(matrix := data.get("matrix"), dict):
        for name, values in matrix.items():
            for at, value in enumerate(values if isinstance(values, list) else []):
                yield ["matrix", name, at], {name: value}
    for section, form in (("include", _Include), ("exclude", _Exclude)):
        entries = data.get(section)
        for at, entry in enumerate(entries if isinstance(entries, list) else []):
            if isinstance(entry, dict):
                own = form.model_fields
                yield [section, at], {k: v for k, v in entry.items() if k not in own}


def _said(entry: Any) -> str:
    kind, path = entry["type"], entry["loc"]
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(str(path[-1]), _Plan.model_fields, n=1, cutoff=0.5)
        known = f"known are {', '.join(_Plan.model_fields)}"
        return f"is not known here; {f'did you mean {near[0]}?' if near else known}"
    if kind == "missing":
        return "is missing"
    if path[0] == "matrix" and len(path) > 1:
        return f"expected a list of values, found {shown(entry['input'])}"
    name = next(part for part in reversed(path) if isinstance(part, str))
    return f"expected {_EXPECTED.get(name) or shown(entry['msg'])}, found {shown(entry['input'])}"


def _extra(entry: _Include | _Exclude) -> dict[str, Any]:
    return entry.model_extra or {}


def _text(name: str, items: Sequence[FleetItem]) -> str:
    """The plan as `FleetPlan.text` has it."""
    distinct = {id(item.parameters): written(item.parameters) for item in items}
    first, memory = items[0], {item.memory_bytes for item in items}
    # Compared as text, which tells 1 from true.
    common = {
        name: value
        for name, value in distinct[id(first.parameters)].items()
        if len({repr(values[name]) for values in distinct.values()}) == 1
    }
    plan: dict[str, Any] = {"name": name}
    if len(memory) == 1 and first.memory_bytes is not None:
        plan["memory"] = first.memory_bytes
    plan["parameters"] = common
    plan["include"] = [
        {"checkpoint": item.checkpoint}
        | {k: v for k, v in distinct[id(item.parameters)].items() if k not in common}
        | ({} if len(memory) == 1 else {"memory": item.memory_bytes})
        for item in items
    ]
    return json.dumps(plan, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
