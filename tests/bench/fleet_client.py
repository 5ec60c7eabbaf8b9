"""One fleet in a process of its own, as the command runs it: ``fleet_client.py PLAN [OPTION …]``.

With ``--instead`` a worker does nothing for an item but answer with the outcome in that file: what
is left is planning, scheduling and collecting. Everything else is `run_fleet` as it is. Prints what
was measured as JSON.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import psutil

from heimdall_onnx import Settings
from heimdall_onnx.common.machine import peak_memory_bytes
from heimdall_onnx.release.fleet import run as fleet
from heimdall_onnx.release.fleet.item import ItemOutcome
from heimdall_onnx.release.fleet.plan import FleetItem, read_plan
from heimdall_onnx.services.store import Bucket

_IDLE_SHARE, _IDLE_S, _LONGEST_S = 0.2, 1.0, 90.0
_LOOK_S = 0.5


def answering(path: str) -> Callable[[FleetItem, str, bool], ItemOutcome]:
    """What a worker runs in place of a release."""

    def answer(item: FleetItem, fleet: str, force: bool) -> ItemOutcome:
        own = {"number": item.number, "label": item.label, "checkpoint": item.checkpoint}
        return ItemOutcome(**json.loads(Path(path).read_text()) | own)

    return answer


class ProcessorTime(threading.Thread):
    """Sums up the processor time of all that this process has started.

    It looks again and again: nobody waits for the kernels, whose time would be lost with them.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._seconds: dict[int, float] = {}
        self._lock = threading.Lock()

    def run(self) -> None:
        while True:
            self.seconds()
            time.sleep(_LOOK_S)

    def seconds(self) -> float:
        """So far, but for what processes that have ended computed after the last look."""
        with self._lock:
            for process in psutil.Process().children(recursive=True):
                try:
                    times = process.cpu_times()
                except psutil.Error:
                    continue
                self._seconds[process.pid] = times.user + times.system
            return sum(self._seconds.values())

    def wait_until_idle(self) -> float:
        """Until little is computed any more, or for long enough; how long that took."""
        began, before = time.monotonic(), -1.0
        while (used := self.seconds()) - before > _IDLE_SHARE * _IDLE_S:
            if time.monotonic() - began > _LONGEST_S:
                break
            before = used
            time.sleep(_IDLE_S)
        return time.monotonic() - began


def main() -> None:
    """Run it, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--warm", action="store_true", help="start when workers have imported")
    parser.add_argument("--force", action="store_true", help="release anew")
    parser.add_argument("--instead", help="file with the outcome to answer with")
    parser.add_argument("--report", action="store_true", help="make the fleet's report, too")
    chosen = parser.parse_args()
    settings = Settings.load()
    began = time.perf_counter()
    plan = read_plan(chosen.plan)
    found = {"planning_s": time.perf_counter() - began, "planned_bytes": peak_memory_bytes()}
    if chosen.instead:
        fleet.run_item = answering(chosen.instead)

    outcomes: list[ItemOutcome] = []
    processors = ProcessorTime()
    processors.start()

    def started(dashboard: str, workers: int) -> None:
        found["imports_s"] = processors.wait_until_idle() if chosen.warm else 0.0
        found["processor_s"] = processors.seconds()

    def ended(outcome: ItemOutcome) -> None:
        if not chosen.instead:
            outcomes.append(outcome)

    result = fleet.run_fleet(
        plan,
        settings,
        workers=chosen.workers,
        force=chosen.force,
        on_start=started,
        on_outcome=ended,
    )
    found["processor_s"] = processors.seconds() - found["processor_s"]
    found |= {"seconds": result.seconds, "collected_bytes": peak_memory_bytes()}
    if chosen.report:
        from heimdall_onnx.release.fleet.report import store_report
        from heimdall_onnx.services.connection import connect

        client, bucket = connect(settings).client, plan.items[0].parameters.bucket
        store_report(Bucket(client, bucket), plan, result, settings.home)
    found["peak_bytes"] = peak_memory_bytes()
    found["exit_code"] = result.exit_code
    print(json.dumps(found | {"outcomes": list(map(asdict, outcomes))}))


if __name__ == "__main__":
    main()
