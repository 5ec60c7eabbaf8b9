"""A full disk and a wrong clock under a release."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

from invariants import violations
from kills import next_run
from places import Lane, lanes
from runs import short, start_release
from tally import Tally

_TIMEOUT_S = 300
_SIZES_KIB = {"home": (8, 16, 32, 64, 128, 256), "tmp": (4, 16, 64)}


def full_disk(count: int, seed: int, folder: Path) -> Tally:
    """Homes and temporary folders that have room for less than a release needs."""
    tally, rng = Tally("disk"), random.Random(seed)
    with lanes(folder, "server") as (lane,):
        for number in range(count):
            lane = lane.fresh()
            what = ("home", "tmp")[number % 2]
            size = rng.choice(_SIZES_KIB[what])
            code, found = fill(lane, what, size, folder)
            tally.tried += 1
            tally.survived += code == 0
            tally.counts[f"{what}, {size} KiB: exit code {code}"] += 1
            problems = next_run(lane) if number + 1 == count else []
            tally.tell(f"{what} of {size} KiB", f"exit code {code}", (*found, *problems))
    return tally


def fill(lane: Lane, what: str, size_kib: int, folder: Path) -> tuple[int, list[str]]:
    """Release with a disk of ``size_kib`` as its home or its temporary folder."""
    disk = folder / "disk"
    disk.mkdir(exist_ok=True)
    variable = {"home": "HEIMDALL_HOME", "tmp": "TMPDIR"}[what]
    running = start_release(
        lane.settings,
        lane.inputs,
        lane.place.bucket,
        *short(lane.notebook),
        name=lane.place.name,
        # A mount of its own namespace, which ends with its processes.
        within=(
            *("unshare", "--user", "--map-root-user", "--mount", "sh", "-c"),
            f'mount -t tmpfs -o size={size_kib}k none "$1" && shift && exec "$@"',
            *("sh", str(disk)),
        ),
        **{variable: str(disk)},
    )
    try:
        result = running.end(_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return -1, [f"no end within {_TIMEOUT_S} s"]
    code, found = result["returncode"], violations(lane.place)
    if (code in (0, 1) and "Traceback" in result["stderr"]) or code == 1:
        found.append(f"exit code {code}: {result['stderr'][-3000:]}")
    if code != 0:
        error = result.get("error") or ""
        if "No space left" not in error and "can't be made" not in error:
            found.append(f"the message does not say what is full: {error or result['stderr']}")
        if lane.place.releases() or lane.place.aliases():
            found.append("something is offered")
    return code, found


def wrong_clock(count: int, seed: int, folder: Path) -> Tally:
    """A clock set back between releases: by minutes it must not matter, by a day it must."""
    tally = Tally("clock")
    with lanes(folder, "server") as (lane,):
        for _ in range(count):
            lane = lane.fresh()
            for minutes in (0, -10, -24 * 60):
                code, found = release_at(lane, timedelta(minutes=minutes))
                tally.tried += 1
                tally.survived += code == 0
                tally.counts[f"{minutes} minutes: exit code {code}"] += 1
                tally.tell(f"{minutes} minutes", f"exit code {code}", found)
            tally.tell("then", "a whole run", next_run(lane))
    return tally


def release_at(lane: Lane, offset: timedelta) -> tuple[int, list[str]]:
    """Release with a clock that is wrong by ``offset``."""
    before = set(lane.place.releases())
    running = start_release(
        lane.settings,
        lane.inputs,
        lane.place.bucket,
        *short(lane.notebook),
        name=lane.place.name,
        **wrong_by(offset),
    )
    result = running.end(_TIMEOUT_S)
    code, found = result["returncode"], violations(lane.place, settled=True)
    new = set(lane.place.releases()) - before
    if not before <= set(lane.place.releases()):
        found.append("an earlier release is gone")
    if abs(offset) < timedelta(minutes=15):
        if code != 0:
            found.append(f"exit code {code}: {result.get('error')}")
        shown = (datetime.now(UTC) + offset).strftime("v%Y%m%d")
        if len(new) != 1 or not next(iter(new)).rsplit("/", 1)[1].startswith(shown):
            found.append(f"expected one new release {shown}…, found {new}")
    elif code != 4 or "clock" not in (result.get("error") or ""):
        found.append(f"exit code {code}, expected 4 and a word of the clock: {result.get('error')}")
    elif new:
        found.append(f"released all the same: {new}")
    return code, found


def wrong_by(offset: timedelta) -> dict[str, str]:
    """Variables under which a program sees a clock that is wrong by ``offset``."""
    if not offset:
        return {}
    spec = importlib.util.find_spec("libfaketime")
    assert spec is not None
    assert spec.origin is not None
    library = Path(spec.origin).parent / "vendor/libfaketime/src/libfaketime.so.1"
    return {
        "LD_PRELOAD": os.fspath(library),
        "FAKETIME": f"{offset.total_seconds():+.0f}",
        "FAKETIME_NO_CACHE": "1",
        # How long something takes is no matter of the date.
        "DONT_FAKE_MONOTONIC": "1",
    }
