"""A store and a registry that go away, hang, refuse, lose and damage, at each step of a release."""

from __future__ import annotations

import random
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from invariants import violations
from kills import next_run, start
from places import Lane, lanes, side_by_side
from proxy import Fault
from tally import Tally

MOMENTS = {
    "store": {
        "first contact": "",
        "model": "PUT .*/model.onnx",
        "read back": "GET .*/model.onnx",
        "report": "PUT .*/report.html",
        "manifest": "PUT .*/v[^/]*/manifest.json",
        "alias log": "PUT /[^/]*/aliases/",
    },
    "registry": {
        "first contact": "",
        "run": "POST .*/runs/create",
        "parameters": "POST .*/runs/log-batch",
        "registering": "POST .*/model-versions/create",
        "tags": "POST .*/model-versions/set-tag",
        "alias": "POST .*/registered-models/alias",
    },
}
# Kind, how often, and whether every request after it is hit too.
TRANSIENT = (
    Fault("gone", seconds=3),
    Fault("status", times=2, status=500),
    Fault("status", times=2, status=503),
    Fault("reset"),
    Fault("lose"),
    Fault("hang"),
)
PERMANENT = (
    Fault("gone", sticky=True, times=None),
    Fault("status", sticky=True, times=None, status=500),
    Fault("status", sticky=True, times=None, status=503),
    Fault("reset", sticky=True, times=None),
    Fault("lose", sticky=True, times=None),
    Fault("hang", sticky=True, times=None),
)
# Nothing but the hashes tells of these, so they may also end the run.
DAMAGE = (Fault("corrupt request"), Fault("corrupt response"), Fault("corrupt request", times=None))
_TIMEOUT_S = 900
_NEXT_RUN_AFTER = 5


@dataclass(frozen=True)
class Case:
    """A fault, where and when.

    Attributes:
        service: ``"store"`` or ``"registry"``.
        moment: One of `MOMENTS`.
        fault: What happens to the requests of that moment.
    """

    service: str
    moment: str
    fault: Fault

    def __str__(self) -> str:
        status = f" {self.fault.status}" if self.fault.kind == "status" else ""
        lasting = "for good" if self.fault.times is None or self.permanent else "for a while"
        return f"{self.service}, {self.moment}: {self.fault.kind}{status} {lasting}"

    @property
    def permanent(self) -> bool:
        return self.fault.sticky


def cases() -> list[Case]:
    """Every kind of fault at every moment of each service."""
    return [
        Case(service, moment, fault)
        for service, moments in MOMENTS.items()
        for moment in moments
        for fault in (*TRANSIENT, *PERMANENT, *DAMAGE)
    ]


def strike(lane: Lane, case: Case) -> tuple[str, list[str]]:
    """Release into the lane with the fault.

    Returns:
        How it ended, and what was not as it must be.
    """
    pattern, kept = MOMENTS[case.service][case.moment], case.fault
    fault = Fault(
        kept.kind,
        pattern,
        times=kept.times,
        sticky=kept.sticky,
        seconds=kept.seconds,
        status=kept.status,
    )
    proxy = lane.store if case.service == "store" else lane.registry
    assert proxy is not None
    offered, started = lane.place.aliases(), time.monotonic()
    with proxy.fault(fault):
        running = start(lane)
        try:
            result = running.end(_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return "no end", [f"no end within {_TIMEOUT_S} s"]
    code, took = result["returncode"], time.monotonic() - started
    outcome = f"exit code {code}" if fault.hits else "never reached"
    found = list(_misbehaviour(case, fault, result))
    if code != 0 and lane.place.aliases() != offered:
        found.append(f"failed, and moved the alias: {offered} became {lane.place.aliases()}")
    found += [f"process {p} is left over" for p in running.left_over(15)]
    found += violations(lane.place)
    return f"{outcome}, {took:.0f} s", found


def _misbehaviour(case: Case, fault: Fault, result: dict) -> Iterator[str]:
    code, error = result["returncode"], result.get("error") or ""
    if "Traceback" in result["stderr"]:
        yield f"a traceback: {result['stderr'][-2000:]}"
    if code == 0:
        if case.permanent and fault.hits:
            yield "succeeded although the service never came back"
        return
    damage = case.fault in DAMAGE
    if code != 4 or not (case.permanent or damage):
        yield f"exit code {code}: {error}"
    word = "store" if case.service == "store" else "mlflow"
    if not damage and word not in error.lower() and proxy_free(error):
        yield f"the message names no service: {error}"


def proxy_free(error: str) -> bool:
    """Whether a message names no address."""
    return "127.0.0.1" not in error


def run(count: int, seed: int, folder: Path) -> Tally:
    """``count`` cases in random order, and a whole run after every fifth."""
    tally, lock = Tally("services"), threading.Lock()
    chosen = cases()
    random.Random(seed).shuffle(chosen)
    queue = iter(chosen[:count])

    def share(lane: Lane, stopped: threading.Event) -> None:
        lane, number = lane.fresh(), 0
        while not stopped.is_set():
            with lock:
                case = next(queue, None)
            if case is None:
                return
            outcome, found = strike(lane, case)
            number += 1
            problems = next_run(lane) if number % _NEXT_RUN_AFTER == 0 or found else []
            with lock:
                tally.tried += 1
                tally.survived += outcome.startswith("exit code 0")
                kind = "lasting" if case.permanent else "passing"
                if case.fault in DAMAGE:
                    kind = "damage"
                tally.counts[f"{kind}: {outcome.partition(',')[0]}"] += 1
                tally.tell(str(case), outcome, [*found, *problems])
            if found or problems:
                lane = lane.fresh()  # where they would be found again

    with lanes(folder, "server", "server") as both:
        side_by_side(share, both)
    return tally
