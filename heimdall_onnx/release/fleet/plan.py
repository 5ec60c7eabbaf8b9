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

import itertools
import json
import math
import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError
from pydantic_core.core_schema import ValidatorFunctionWrapHandler

from heimdall_onnx.common.errors import ParameterError
from heimdall_onnx.common.parameters import (
    ReleaseParameters,
    explain,
    explained,
)
from heimdall_onnx.common.text import listed, meant, shown
from heimdall_onnx.common.yaml import line_of, parse, place_of
from heimdall_onnx.release.fleet.files import (
    Glob,
    absolute,
    find_checkpoints,
    missing_objects,
    require_data,
    single_checkpoint,
)

# Some ten times what 10,000 items take, and what a small matrix of many values makes at once.
_MAX_BYTES = 64 << 20
_MOST_ITEMS = 100_000
# PyYAML reads some 100 kB a second; what is larger is written by a program, which can write JSON.
_MAX_YAML_BYTES = 1 << 20
# Less is a forgotten unit.
_LEAST_MEMORY = 1 << 20
_Place = tuple[str | int, ...]
# Parameters of a release that differ from item to item in the fleet's own way.
_OWN = ("checkpoint", "publish", "output_dir", "run_id")
_FILLED = re.compile(r"\{(stem|parent)\}")
# How deep in a plan the names of parameters are.
_DEPTH = {"parameters": 1, "matrix": 3, "include": 2, "exclude": 2}


def _size(value: object) -> object:
    # Pydantic takes bits too, and passes over what follows.
    pattern = r"\d+(\.\d+)?\s*([KMGT]i?)?B?"
    if re.fullmatch(pattern, str(value).strip(), re.ASCII | re.IGNORECASE) is None:
        raise PydanticCustomError("size", "no size")
    return value


_Path = Annotated[str, Field(strict=True, min_length=1, max_length=4096, pattern=r"^[^\x00]*$")]
_Memory = Annotated[ByteSize, BeforeValidator(_size), Field(ge=_LEAST_MEMORY, lt=1 << 60)]


def _folder(info: ValidationInfo) -> Path:
    """That of the plan."""
    assert isinstance(info.context, Path)
    return info.context


class _Values(ReleaseParameters):
    """Some parameters of a release, as a plan gives them: with data as absolute paths."""

    @field_validator(*_OWN, mode="before")
    @classmethod
    def _is_not_set(cls, value: object, info: ValidationInfo) -> object:
        # Items and exclusions have a checkpoint of their own.
        if info.field_name == "checkpoint" and cls is not _Values:
            return value
        raise ValueError("can't be set here; the fleet sets it for each item")

    @field_validator("eval_scheduler")
    @classmethod
    def _has_no_scheduler(cls, value: str) -> str:
        if value:
            raise ValueError(
                "can't be set for items, which would wait on the workers that they hold; "
                "eval_workers starts some for each"
            )
        return value

    @field_validator("name", "prefix", mode="wrap")
    @classmethod
    def _can_be_filled(cls, value: object, check: ValidatorFunctionWrapHandler) -> object:
        if not isinstance(value, str):
            return check(value)
        if {"{", "}"} & set(filled := _FILLED.sub("x", value)):
            raise ValueError("only {stem} and {parent} can be filled in")
        check(filled)
        return value

    @field_validator("eval_data", "calibration_data")
    @classmethod
    def _is_there(cls, value: str, info: ValidationInfo) -> str:
        # A dataset is a folder.
        kinds = ("a file", "a folder") if info.field_name == "eval_data" else ("a file",)
        return value and require_data(_folder(info), value, kinds)

    @property
    def given(self) -> dict[str, Any]:
        """What the plan has set."""
        names = self.model_fields_set & ReleaseParameters.model_fields.keys() - {*_OWN}
        return {name: getattr(self, name) for name in names}


class _Include(_Values):
    checkpoint: _Path
    memory: _Memory | None = None

    @field_validator("checkpoint")
    @classmethod
    def _is_file(cls, value: str, info: ValidationInfo) -> str:
        return single_checkpoint(_folder(info), value)


class _Exclude(_Values):
    checkpoint: _Path = ""

    @field_validator("checkpoint")
    @classmethod
    def _is_pattern(cls, value: str, info: ValidationInfo) -> str:
        Glob(value, _folder(info))
        return value

    @model_validator(mode="after")
    def _says_what(self) -> Self:
        if not self.model_fields_set:
            raise ValueError("expected a checkpoint or parameters, found neither")
        return self


class _Plan(BaseModel, strict=True, frozen=True, extra="forbid"):
    name: str | None = None
    parameters: _Values = Field(default_factory=_Values)
    checkpoints: list[_Path] = Field(default_factory=list)
    matrix: dict[str, Annotated[list[_Values], Field(min_length=1)]] = Field(default_factory=dict)
    include: list[_Include] = Field(default_factory=list)
    exclude: list[_Exclude] = Field(default_factory=list)
    memory: _Memory | None = None

    @field_validator("matrix", mode="before")
    @classmethod
    def _by_name(cls, matrix: object) -> object:
        if not isinstance(matrix, dict):
            return matrix
        return {
            name: [{name: value} for value in values] if isinstance(values, list) else values
            for name, values in matrix.items()
        }


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


def read_plan(path: Path | str) -> FleetPlan:
    """Read the plan of a fleet.

    Args:
        path: The file, YAML or JSON.

    Raises:
        ParameterError: If it can't be read, or not be used; with every problem and its place.
        StoreError: If the bucket can't be listed.
    """
    source = Path(path)
    data, node = _parse(_read(source), source)
    # The folder as it was named: it may be a link.
    folder = Path(absolute(Path.cwd(), str(source))).parent
    return _Planner(f"the plan {source}", folder, node).plan(data, source.stem)


def plan_checkpoints(
    patterns: Sequence[str],
    values: Mapping[str, Any],
    *,
    name: str,
    memory: int | str | None = None,
) -> FleetPlan:
    """Plan one release of each checkpoint.

    Args:
        patterns: Paths, patterns or addresses, as ``checkpoints`` of a plan; relative to the
            current folder.
        values: Parameters of every release, as ``parameters`` of a plan.
        name: Of the fleet.
        memory: Limit of an item, in bytes or as text, e.g. ``"4GiB"``.

    Raises:
        ParameterError: If that can't be used; with every problem.
        StoreError: If the bucket can't be listed.
    """
    data = {"checkpoints": list(patterns), "parameters": dict(values), "memory": memory}
    return _Planner("this fleet", Path.cwd(), None).plan(data, name)


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

    def __init__(self, what: str, folder: Path, node: yaml.Node | None) -> None:
        self._what, self._folder, self._node = what, folder, node
        self._problems: list[str] = []
        # Equal parameters are one object, so that the key tells equal items.
        self._parameters: dict[str, ReleaseParameters] = {}
        self._items: dict[tuple[str, int], FleetItem] = {}

    def plan(self, data: Any, default_name: str) -> FleetPlan:
        if not isinstance(data, dict):
            found = "nothing" if data is None else shown(data)
            raise ParameterError(
                f"{self._what} can't be used: expected `checkpoints` or `include`, and what else "
                f"belongs to a plan; found {found}"
            )
        form, refused = _Plan(), set[_Place]()
        try:
            form = _Plan.model_validate(data, context=self._folder)
        except ValidationError as error:
            refused = {self._refuse_entry(entry) for entry in error.errors(include_url=False)}
        if data.get("matrix") and not data.get("checkpoints"):
            self._refuse(("matrix",), "there are no `checkpoints` to combine it with")
        name = self._named(data.get("name"), default_name)
        texts = data["checkpoints"] if isinstance(data.get("checkpoints"), list) else []
        places: dict[_Place, str] = {("checkpoints", at): text for at, text in enumerate(texts)}
        usable = {path: text for path, text in places.items() if path not in refused}
        checkpoints = self._find(usable, form.include)
        combinations = math.prod(map(len, form.matrix.values()))
        if (count := len(checkpoints) * combinations + len(form.include)) > _MOST_ITEMS:
            self._refuse((), f"expected at most {_MOST_ITEMS:,} items, found {count:,}")
        # Items are made only of what is there and of values that can be used.
        self._require_no_problem()
        try:
            self._combine(form, checkpoints)
            for at, entry in enumerate(form.include):
                memory = form.memory if entry.memory is None else entry.memory
                made = self._made(form.parameters.given | entry.given, entry.checkpoint)
                self._add(("include", at), entry.checkpoint, made, memory)
            items = tuple(self._items.values())
            if not items and not self._problems:
                self._refuse((), "there is nothing to release")
            self._require_no_problem()
            return FleetPlan(name, items, _text(name, items))
        except RecursionError as error:
            # It could just be read.
            raise ParameterError(
                f"{self._what} can't be used: its values are nested too deeply"
            ) from error

    def _refuse(self, path: _Place, said: str, *, within: _Place = ()) -> None:
        if path:
            line = f"line {line_of(self._node, path + within)}, " if self._node is not None else ""
            said = f"{line}{place_of(path)}: {said}"
        self._problems.append(said)

    def _require_no_problem(self) -> None:
        if self._problems:
            raise ParameterError(f"{self._what} can't be used:{listed(self._problems)}")

    def _refuse_entry(self, entry: Any) -> _Place:
        """Say one of pydantic's problems; returns the place of what it leaves out."""
        path, said = entry["loc"], entry["msg"].removeprefix("Value error, ")
        found = "nothing" if entry["input"] is None else shown(entry["input"])
        if not path:
            self._refuse((), f"one of its keys is no text: {found}")
            return ()
        section, name = path[0], next(n for n in reversed(path) if isinstance(n, str))
        depth = _DEPTH.get(section, len(path))
        if path[depth:] and path[depth] not in ("checkpoint", "memory"):
            said = explain(ReleaseParameters, {**entry, "loc": path[depth:], "msg": said})
            self._refuse(path[:depth], said, within=path[depth:])
        elif entry["type"] == "extra_forbidden":
            self._refuse(path, f"is not known here; {meant(name, _Plan.model_fields)}")
        elif entry["type"] in ("missing", "value_error"):
            self._refuse(path, "is missing" if entry["type"] == "missing" else said)
        else:
            expected = _EXPECTED.get(name, "a list of values")
            self._refuse(path, f"expected {expected}, found {found}")
        return tuple(path[:2])

    def _named(self, given: object, default: str) -> str:
        name = given if isinstance(given, str) else default
        found = _checked({"name": name})
        for said in found if isinstance(found, list) else ():
            hint = "the name of the file can't be the fleet's, so give one"
            self._refuse(("name",), said if given is not None else f"{said}; {hint}")
        return name

    def _find(self, texts: Mapping[_Place, str], include: Sequence[_Include]) -> list[str]:
        """The checkpoints to combine with the matrix."""
        found: dict[str, str] = {}
        named: dict[_Place, str] = {}
        for path, text in texts.items():
            try:
                here = find_checkpoints(self._folder, text)
            except ParameterError as error:
                self._refuse(path, str(error))
                continue
            if again := [checkpoint for checkpoint in here if checkpoint in found]:
                more = f" and {len(again) - 1:,} more" if again[1:] else ""
                before = shown(repr(found[again[0]]))
                self._refuse(path, f"{shown(again[0])}{more}: there already, by {before}")
            found |= dict.fromkeys(here, text)
            if here == [text]:
                named[path] = text
        named |= {("include", at, "checkpoint"): e.checkpoint for at, e in enumerate(include)}
        missing = missing_objects(named.values())
        for path, address in named.items():
            if address in missing:
                self._refuse(path, f"expected an object, found none at {shown(address)}")
        return list(found)

    def _combine(self, form: _Plan, checkpoints: Iterable[str]) -> None:
        """Add each checkpoint with each combination of the matrix, but for what is left out."""
        combinations = [
            form.parameters.given | {n: v for one in chosen for n, v in one.given.items()}
            for chosen in itertools.product(*form.matrix.values())
        ]
        excluded = [
            (entry.given, Glob(entry.checkpoint, self._folder) if entry.checkpoint else None)
            for entry in form.exclude
        ]
        used: set[int] = set()
        for checkpoint, values in itertools.product(checkpoints, combinations):
            made = self._made(values, checkpoint)
            fitting = {
                at
                for at, (given, glob) in enumerate(excluded)
                if (glob is None or glob.fits(checkpoint))
                # What can't be made is left out by its checkpoint only.
                and all(
                    isinstance(made, ReleaseParameters) and getattr(made, name) == value
                    for name, value in _filled(given, checkpoint).items()
                )
            }
            used |= fitting
            if not fitting:
                place = ("matrix" if form.matrix else "checkpoints",)
                self._add(place, checkpoint, made, form.memory)
        for at in sorted({*range(len(excluded))} - used):
            self._refuse(("exclude", at), "there is nothing like this that it could leave out")

    def _made(self, values: Mapping[str, Any], checkpoint: str) -> ReleaseParameters | list[str]:
        """The parameters of an item, or what is wrong with them."""
        made = _checked(_filled(values, checkpoint))
        if isinstance(made, list):
            return made
        return self._parameters.setdefault(json.dumps(_written(made)), made)

    def _add(
        self,
        place: _Place,
        checkpoint: str,
        made: ReleaseParameters | list[str],
        memory: int | None,
    ) -> None:
        if isinstance(made, list):
            for said in made:
                self._refuse(place, f"{shown(checkpoint)}: {said}")
        elif same := self._items.get((checkpoint, id(made))):
            self._refuse(place, f"{shown(checkpoint)} is there twice as in {same.label}")
        else:
            limit = None if memory is None else int(memory)
            item = FleetItem(len(self._items) + 1, checkpoint, made, limit)
            self._items[checkpoint, id(made)] = item


def _checked(values: Mapping[str, Any]) -> ReleaseParameters | list[str]:
    """The parameters of a release, or what is wrong with them."""
    try:
        return ReleaseParameters.model_validate(values)
    except ValidationError as error:
        return explained(ReleaseParameters, error)


def _filled(values: Mapping[str, Any], checkpoint: str) -> dict[str, Any]:
    """The values, with the checkpoint's own names in theirs."""
    # Not by pathlib, which interns each part: Python's table of those grows with the fleet.
    folder, _, file = checkpoint.rpartition("/")
    words = {"stem": posixpath.splitext(file)[0], "parent": folder.rpartition("/")[2]}
    own = {what: re.sub("[^A-Za-z0-9._-]", "-", word) for what, word in words.items()}
    names = {
        name: _FILLED.sub(lambda match: own[match[1]], values[name])
        for name in ("name", "prefix")
        if name in values
    }
    return {**values, **names}


def _written(parameters: ReleaseParameters) -> dict[str, Any]:
    """The parameters as a plan has them."""
    names = (name for name in ReleaseParameters.model_fields if name not in _OWN)
    return {name: getattr(parameters, name) for name in names}


def _text(name: str, items: Sequence[FleetItem]) -> str:
    """The plan as `FleetPlan.text` has it."""
    distinct = {id(item.parameters): _written(item.parameters) for item in items}
    common, memory = distinct[id(items[0].parameters)], items[0].memory_bytes
    plan: dict[str, Any] = {"name": name, "parameters": common}
    same = all(item.memory_bytes == memory for item in items)
    if same and memory is not None:
        plan["memory"] = memory
    plan["include"] = [
        {"checkpoint": item.checkpoint}
        # Compared as text, which tells 1 from true.
        | {k: v for k, v in distinct[id(item.parameters)].items() if repr(v) != repr(common[k])}
        | ({} if same else {"memory": item.memory_bytes})
        for item in items
    ]
    return json.dumps(plan, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
