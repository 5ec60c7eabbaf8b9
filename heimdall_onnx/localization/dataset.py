"""From recordings to a dataset: grouped into events, aligned, as windows with their positions."""

from __future__ import annotations

import csv
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from heimdall_onnx.common.errors import DataError
from heimdall_onnx.common.logs import OnProgress
from heimdall_onnx.common.text import listed, shown
from heimdall_onnx.data.dataset.dataset import Dataset, open_dataset
from heimdall_onnx.data.dataset.writer import create_dataset
from heimdall_onnx.localization.events import align_recordings, group_recordings
from heimdall_onnx.localization.features import (
    check_positions,
    check_receivers,
    event_provenance,
    read_all,
    too_short,
)
from heimdall_onnx.localization.mel import FeatureParameters, mel_windows
from heimdall_onnx.localization.recordings import Recording, read_recording

Recordings = tuple[Recording, ...]
Position = tuple[float, float]

_COLUMNS = ("recording", "latitude", "longitude")
_LARGEST_TABLE = 64 << 20


def ingest_recordings(
    recordings: Sequence[Path | str],
    output: Path | str,
    *,
    parameters: FeatureParameters | None = None,
    position: Position | None = None,
    positions: Path | str | None = None,
    receivers: Mapping[str, Position] | None = None,
    mixed_receivers: bool = False,
    progress: OnProgress | None = None,
) -> Dataset:
    """Write a dataset of the windows of recordings, three receivers' of each event.

    An event's name is the SHA-256 of those of its recordings' files. Events that share a recording
    share the name, so that no recording gets into two parts of a split. Each file is read twice,
    so that memory holds the recordings of one event only.

    Args:
        recordings: IQ recordings, see `read_recording`; `group_recordings` says how they form
            events.
        output: The folder to make; must not exist.
        parameters: None means `FeatureParameters()`.
        position: True position of the transmitter of all recordings, degrees latitude, longitude.
        positions: CSV file with the columns ``recording`` (a file's name), ``latitude`` and
            ``longitude`` in place of ``position``.
        receivers: Positions of receivers by name.
        mixed_receivers: Take events of different receivers, for a model to which a channel stands
            for no one receiver. Otherwise every event must be of the same ones; where the files'
            names tell them, each feeds the same channel as in the first event.
        progress: Called with the share of the work done, 0 to 1, and what is being done.

    Raises:
        DataError: If a recording can't be used, the same event is given twice, events are of
            different receivers, positions are missing or contradict each other, no event is long
            enough for a window, or the output can't be written.
        ParameterError: If a position is out of range, or a receiver is in no recording.
        UnavailableError: Without the package Zarr.
    """
    parameters = parameters or FeatureParameters()
    sites = dict(receivers or {})
    say = progress or (lambda share, what: None)
    check_positions(position, sites)
    labels = None if positions is None else read_positions(positions)
    found = read_all(
        recordings, samples=False, progress=lambda share: say(share / 2, "reading recordings")
    )
    check_receivers(sites, found)
    groups = _in_one_order(group_recordings(found), mixed=mixed_receivers)
    truth = _positions(groups, position, labels)
    names = _event_names(groups)
    meta = {"provenance": "recordings", "features": asdict(parameters), "events": []}
    with create_dataset(output, meta=meta, receivers=sites) as writer:
        for number, (group, name, where) in enumerate(zip(groups, names, truth, strict=True)):
            say(0.5 + number / len(groups) / 2, "computing features")
            event = align_recordings([_read_again(recording) for recording in group])
            windows = mel_windows(event.iq, event.sample_rate_hz, parameters)
            known = None if where is None else np.tile(np.array(where), (len(windows), 1))
            if len(windows):
                writer.append({"mel_spectrogram": windows}, known, [name] * len(windows))
            writer.meta["events"].append(
                {"event": name, **event_provenance(event, len(windows), sites)}
            )
        if not writer.count:
            raise DataError(too_short(found, parameters))
    say(1.0, "computing features")
    return open_dataset(output)


def read_positions(path: Path | str) -> dict[str, Position]:
    """Read true positions by file name from a CSV file (RFC 4180, with a header).

    Raises:
        DataError: If it can't be read, or a line is not what it should be; every one is named.
    """
    path, expected = Path(path), ",".join(_COLUMNS)
    try:
        if path.stat().st_size > _LARGEST_TABLE:
            raise DataError(f"{path} is larger than {_LARGEST_TABLE >> 20} MiB")
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"positions {path} can't be read: {error}; expected {expected}") from error
    positions: dict[str, Position] = {}
    problems = [] if rows else ["there is no line below the header"]
    for number, row in enumerate(rows, 2):
        try:
            name, pair = row["recording"], (float(row["latitude"]), float(row["longitude"]))
        except (KeyError, TypeError, ValueError):
            problems.append(f"line {number}: {shown(row)}")
            continue
        if not (abs(pair[0]) <= 90 and abs(pair[1]) <= 180):
            problems.append(f"line {number}: {pair} is not on the globe")
        elif positions.setdefault(name, pair) != pair:
            problems.append(f"line {number}: {shown(name)} has another position further up")
    if problems:
        raise DataError(f"positions {path}: expected lines of {expected}; found" + listed(problems))
    return positions


def _read_again(before: Recording) -> Recording:
    recording = read_recording(before.path)
    if recording.sha256 != before.sha256:
        raise DataError(f"recording {before.path} was changed while it was in use")
    return recording


def _positions(
    groups: Sequence[Recordings], position: Position | None, labels: Mapping[str, Position] | None
) -> list[Position | None]:
    if labels is None:
        return [position] * len(groups)
    if position is not None:
        raise DataError("positions are given twice: in a file, and one for all recordings")
    problems = []
    found: list[Position | None] = []
    for group in groups:
        own = {r.path.name: labels.get(r.path.name) for r in group}
        if len(set(own.values())) > 1 or None in own.values():
            problems.append(", ".join(f"{name} at {where}" for name, where in own.items()))
        found.append(next(iter(own.values())))
    if problems:
        raise DataError(
            "the file of positions must give the recordings of an event one position each, all "
            "the same; found" + listed(problems)
        )
    return found


def _in_one_order(groups: Sequence[Recordings], *, mixed: bool) -> list[Recordings]:
    """The recordings of each event, its receivers in the order of the first event of the same."""
    orders: dict[tuple[str, ...], list[str | None]] = {}
    ordered = []
    for group in groups:
        names = [recording.receiver for recording in group]
        if None in names or len(set(names)) < len(names):
            # What the names don't tell is as whoever gave the files has put it.
            return list(groups)
        by_name = {recording.receiver: recording for recording in group}
        order = orders.setdefault(tuple(sorted(map(str, names))), names)
        ordered.append(tuple(by_name[name] for name in order))
    if len(orders) > 1 and not mixed:
        raise DataError(
            "expected events of the same receivers, since each feeds a channel of its own; found "
            f"{len(orders)} sets of them:{listed([', '.join(names) for names in orders])}\nMake a "
            "dataset of each, or say that a channel stands for no one receiver (--mixed-receivers)"
        )
    return ordered


def _event_names(groups: Sequence[Recordings]) -> list[str]:
    """A name for each group, the same for groups that share a recording, at one remove or more."""
    repeated = Counter(tuple(sorted(r.sha256 for r in group)) for group in groups)
    if twice := [g for g in groups if repeated[tuple(sorted(r.sha256 for r in g))] > 1]:
        raise DataError(
            "the same recordings are given more than once:"
            + listed([", ".join(str(r.path) for r in group) for group in twice])
        )
    files = {sha256: i for i, sha256 in enumerate({r.sha256: None for g in groups for r in g})}
    pairs = [(i, len(groups) + files[r.sha256]) for i, group in enumerate(groups) for r in group]
    size = len(groups) + len(files)
    links = coo_array((np.ones(len(pairs)), np.array(pairs).T), shape=(size, size))
    _, part = connected_components(links, directed=False)
    members: dict[int, set[str]] = {}
    for number, group in zip(part.tolist(), groups, strict=False):
        members.setdefault(number, set()).update(r.sha256 for r in group)
    names = {
        number: hashlib.sha256("\n".join(sorted(own)).encode()).hexdigest()
        for number, own in members.items()
    }
    return [names[number] for number in part[: len(groups)].tolist()]
