"""What a dataset's header says, and what is wrong with it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from heimdall_onnx.common.arrays import Rows, parts
from heimdall_onnx.common.text import shown
from heimdall_onnx.data.dataset.shards import DTYPES, ArraySpec, Sha256, Strict

DATASET_VERSION = 1
HEADER = "zarr.json"
INPUTS, POSITIONS, EVENT, EVENT_NAMES = "inputs/", "positions", "event", "event_names"
LABELS, WEIGHTS = "labels", "weights"

_MOST_ROW_BYTES = 1 << 30
_MOST_EVENT_NAME = 200
# What a file of evaluation data holds beside the inputs; the last is an argument of NumPy's.
_TAKEN = {POSITIONS, LABELS, WEIGHTS, "groups", "meta", "file"}
_INPUT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,99}")


class Header(Strict):
    """The attributes of the group.

    Attributes:
        schema_version: Of this layout.
        meta: Provenance and feature parameters.
        receivers: Latitude and longitude by name, degrees.
        arrays: The arrays by their names in the group.
        digest: `digest_of` all the others.
    """

    schema_version: Literal[1]
    meta: dict[str, Any]
    receivers: dict[str, tuple[float, float]]
    arrays: dict[str, ArraySpec]
    digest: Sha256


class GroupFile(Strict):
    """The ``zarr.json`` of the dataset."""

    zarr_format: Literal[3]
    node_type: Literal["group"]
    attributes: Header


def digest_of(header: Mapping[str, Any]) -> str:
    """SHA-256 of the header as JSON with sorted keys, and so of the arrays by their hashes."""
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def sample_problems(rows: Mapping[str, npt.NDArray[Any]], events: Sequence[str]) -> list[str]:
    """What keeps samples from being written; ``rows`` by their names in the group."""
    problems = []
    if not any(name.startswith(INPUTS) for name in rows):
        problems.append("there is no input")
    for name, array in rows.items():
        own = name.removeprefix(INPUTS)
        if name not in (POSITIONS, LABELS, WEIGHTS) and not _INPUT_NAME.fullmatch(own):
            problems.append(f"an input can't be called {own!r}")
        elif name.startswith(INPUTS) and own in _TAKEN:
            problems.append(f"an input can't be called {own!r}, as evaluation data have that name")
        if array.dtype.name not in DTYPES:
            problems.append(f"{name} has dtype {array.dtype}, not a number or bool")
        elif not array.ndim or len(array) != len(events):
            problems.append(f"{name} has shape {array.shape} beside {len(events)} events")
        elif array.dtype.kind in "fc" and not np.isfinite(array).all():
            problems.append(f"{name} has NaN or Inf")
    problems += _position_problems(rows.get(POSITIONS))
    return [*problems, *_name_problems(set(events))]


def header_problems(header: Header) -> Iterator[str]:
    """What in a header does not hold together."""
    arrays = header.arrays
    fixed = {POSITIONS: ("float64", (2,)), EVENT: ("int64", ()), EVENT_NAMES: ("uint8", ())}
    fixed[WEIGHTS] = ("float64", ())
    for name in (EVENT, EVENT_NAMES):
        if name not in arrays:
            yield f"there is no array {name}"
    if not any(name.startswith(INPUTS) for name in arrays):
        yield "there is no input"
    for name, spec in arrays.items():
        own = name.removeprefix(INPUTS)
        known = name in fixed or name == LABELS
        if not known and not (name.startswith(INPUTS) and _INPUT_NAME.fullmatch(own)):
            yield f"{shown(repr(name))} is no name of an array"
        elif not spec.shape:
            yield f"{name} has no samples"
        elif spec.row_bytes > _MOST_ROW_BYTES:
            yield f"{name} has samples of {spec.row_bytes:,} bytes"
        elif name in fixed and (spec.dtype, spec.shape[1:]) != fixed[name]:
            dtype, row = fixed[name]
            yield f"{name} must be {dtype} {('N', *row)}, found {spec.dtype} {spec.shape}"
    counts = {n: spec.shape[0] for n, spec in arrays.items() if spec.shape and n != EVENT_NAMES}
    if len(set(counts.values())) > 1 or 0 in counts.values():
        yield f"arrays must have equally many samples, at least one, found {counts}"
    try:
        digest = digest_of(header.model_dump(mode="json", exclude={"digest"}))
    except ValueError as error:
        yield f"the header is no JSON: {shown(str(error))}"
    else:
        if digest != header.digest:
            yield f"the header was changed: its digest is {digest}, expected {header.digest}"
    for name, position in header.receivers.items():
        if not (abs(position[0]) <= 90 and abs(position[1]) <= 180):
            yield f"receiver {shown(repr(name))} is at {position}, which is not on the globe"


def label_problems(
    positions: npt.NDArray[np.float64] | None,
    event: npt.NDArray[np.int64],
    names: tuple[str, ...],
) -> Iterator[str]:
    """What is wrong with positions, numbers and names of events."""
    yield from _position_problems(positions)
    if event.min() < 0 or event.max() >= len(names):
        yield (
            f"events are numbered from {event.min()} to {event.max()}, there are {len(names)} names"
        )
    if len(set(names)) < len(names):
        yield "two events have the same name"
    yield from _name_problems(set(names))


def _position_problems(positions: npt.NDArray[Any] | None) -> list[str]:
    if positions is None:
        return []
    if positions.ndim != 2 or positions.shape[1] != 2:
        return [f"positions must have shape (N, 2), found {positions.shape}"]
    return list(beyond_globe(positions))


def beyond_globe(positions: Rows) -> Iterator[str]:
    """What is wrong with positions that are no latitudes and longitudes, in words."""
    off = [np.empty(0, np.intp)]
    for start, part in parts(positions):
        off.append(start + np.flatnonzero(~(np.abs(part) <= (90.0, 180.0)).all(axis=1)))
    if (elsewhere := np.concatenate(off)).size:
        yield (
            "positions must be latitudes in [-90, 90] and longitudes in [-180, 180]; they are not "
            f"in {elsewhere.size} samples, first in sample {elsewhere[0]}"
        )


def weight_problems(weights: Rows) -> Iterator[str]:
    """What is wrong with the weights of samples, in words."""
    if not all((np.isfinite(part) & (part > 0)).all() for _, part in parts(weights)):
        yield "weights must be positive numbers; leave samples out that count nothing"


def _name_problems(names: set[str]) -> Iterator[str]:
    for name in sorted(names):
        if not 0 < len(name) <= _MOST_EVENT_NAME or not name.isprintable():
            yield f"{shown(repr(name))} can't name an event"
