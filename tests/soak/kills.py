"""SIGKILL at random moments of a release, and what it leaves behind."""

from __future__ import annotations

import random
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from invariants import violations
from places import Lane, lanes, side_by_side
from proxy import Fault, wait_for
from releases import PREFIX
from runs import STEPS, RunningRelease, short, start_release
from tally import Tally

from heimdall_onnx.release.publish import Journal
from heimdall_onnx.services.connection import open_for_reading
from heimdall_onnx.services.store import Bucket

VICTIMS = (("runner",), ("kernel",), ("runner", "kernel"))
ROUND = 10
_TIMEOUT_S = 300
# ipykernel looks for its parent once a second; under load that may take longer.
_ORPHANS_S = 15


@dataclass(frozen=True)
class Moment:
    """When a kill falls.

    Attributes:
        seconds: After the start; None if a request decides.
        proxy: Which proxy's request.
        request: Number of that request, from 0.
        kind: ``"before"`` it is passed on, which it then is not, or ``"after"`` it is done.
    """

    seconds: float | None = None
    proxy: int = 0
    request: int = 0
    kind: str = "before"

    def __str__(self) -> str:
        if self.seconds is not None:
            return f"after {self.seconds:.1f} s"
        return f"{self.kind} request {self.request} of {('store', 'registry')[self.proxy]}"


@dataclass(frozen=True)
class Measured:
    """A release that nothing happens to.

    Attributes:
        seconds: How long it takes.
        requests: How many it makes to each proxy.
    """

    seconds: float
    requests: tuple[int, ...]

    def moments(self, count: int, rng: random.Random) -> Iterator[Moment]:
        """Half of them spread over its time, half over its requests."""
        total = sum(self.requests)
        for number in range(count):
            share = (number // 2 + rng.random()) / ((count + 1) // 2)
            if number % 2 == 0:
                yield Moment(seconds=share * self.seconds)
                continue
            place, proxy = int(share * total) % total, 0
            while place >= self.requests[proxy]:
                place, proxy = place - self.requests[proxy], proxy + 1
            yield Moment(proxy=proxy, request=place, kind=rng.choice(("before", "after")))


def measure(lane: Lane) -> Measured:
    """Release once and look at it."""
    before, started = [len(p.requests) for p in lane.proxies], time.monotonic()
    running = start(lane)
    result = running.end(_TIMEOUT_S)
    if result["returncode"] != 0:
        raise RuntimeError(f"a release that nothing happens to fails: {result}")
    found = tuple(len(p.requests) - b for p, b in zip(lane.proxies, before, strict=True))
    return Measured(time.monotonic() - started, found)


def start(lane: Lane) -> RunningRelease:
    """Start the shortest release into the lane."""
    place, options = lane.place, short(lane.notebook)
    return start_release(lane.settings, lane.inputs, place.bucket, *options, name=place.name)


def kill(lane: Lane, victims: tuple[str, ...], moment: Moment) -> tuple[str, list[str]]:
    """Release into the lane and kill it.

    Returns:
        What it had reached, and what was not as it must be afterwards.
    """
    reached, struck = [], threading.Event()
    running = start(lane)

    def strike() -> None:
        if not struck.is_set():
            running.kill(*victims)
            reached.append(running.reached(lane.place))
            struck.set()

    with ExitStack() as stack:
        if moment.seconds is None:
            fault = Fault(moment.kind, skip=moment.request, action=strike)
            stack.enter_context(lane.proxies[moment.proxy].fault(fault))
            wait_for(lambda: struck.is_set() or running.process.poll() is not None, _TIMEOUT_S)
        else:
            wait_for(lambda: running.process.poll() is not None, moment.seconds)
            strike()
        try:
            result = running.end(_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return reached[0] if reached else "start", ["the run did not end"]
    found = [f"process {p} is left over" for p in running.left_over(_ORPHANS_S)]
    if victims == ("kernel",) and result["returncode"] not in (0, -9):
        found += _remains(lane, running)
        if result["returncode"] != 3:
            found.append(f"exit code {result['returncode']}: {result['stderr'][-2000:]}")
    found += violations(lane.place)
    return reached[0] if reached else "end", found


def _remains(lane: Lane, running: RunningRelease) -> list[str]:
    """What a runner whose kernel was killed has not taken back."""
    folder = running.folder()
    version = Journal(folder).read().get("version") if folder else None
    if version is None:
        return []
    place, prefix = lane.place, f"{PREFIX}/{version}/"
    keys = Bucket(open_for_reading(place.settings).client, place.bucket).list_keys(prefix)
    own = [v for v in place.versions() if v.source == f"s3://{place.bucket}/{prefix[:-1]}"]
    return [f"not taken back: {what}" for what in (*keys, *own)]


def next_run(lane: Lane) -> list[str]:
    """A whole release after everything that went before."""
    result = start(lane).end(_TIMEOUT_S)
    if result["returncode"] != 0:
        return [f"the next run fails: {result.get('error')}: {result['stderr'][-2000:]}"]
    return violations(lane.place, settled=True)


def run(count: int, seed: int, folder: Path) -> Tally:
    """``count`` kills, and a whole run after every tenth."""
    tally, lock = Tally("kills"), threading.Lock()
    tally.counts.update({f"killed at {step}": 0 for step in STEPS})

    def share(lane: Lane, kills: int, seed: int, stopped: threading.Event) -> None:
        rng, lane = random.Random(seed), lane.fresh()
        measured = measure(lane)
        moments = list(measured.moments(kills, rng))
        rng.shuffle(moments)
        with lock:
            print(f"a release takes {measured.seconds:.1f} s, requests {measured.requests}")
        for number, moment in enumerate(moments):
            if stopped.is_set():
                return
            victims = VICTIMS[number % len(VICTIMS)]
            reached, found = kill(lane, victims, moment)
            last = (number + 1) % ROUND == 0 or number + 1 == kills
            again = next_run(lane) if last else []
            with lock:
                tally.tried += 1
                tally.survived += reached == "end"
                tally.counts[f"killed at {reached}"] += 1
                tally.counts[f"victim {' and '.join(victims)}"] += 1
                tally.counts["whole next runs"] += last
                told = f"kill {tally.tried} (seed {seed}, {' and '.join(victims)}, {moment})"
                tally.tell(told, f"at {reached}", [*found, *again])
            if last or found:
                lane = lane.fresh()

    with lanes(folder, "server", "sqlite") as both:
        side_by_side(share, both, [count - count // 2, count // 2], [seed, seed + 1])
    return tally
