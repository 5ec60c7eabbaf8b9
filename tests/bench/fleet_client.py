"""One fleet in a process of its own, as the command runs it: ``fleet_client.py PLAN [OPTION …]``.

With ``--instead`` a worker does nothing for an item but answer with the outcome in that file: what
is left is planning, scheduling and collecting. Everything else is `run_fleet` as it is. Prints what
was measured as JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import psutil

from heimdall_onnx import Settings, fleet
from heimdall_onnx.costs import peak_memory_bytes
from heimdall_onnx.fleet_item import ItemOutcome
from heimdall_onnx.fleet_plan import FleetItem, read_plan

_IDLE_SHARE = 0.1
_LOOK_S = 0.5


def answering(path: str) -> Callable[[FleetItem, bool], ItemOutcome]:
    """What a worker runs in place of a release."""

    def answer(item: FleetItem, force: bool) -> ItemOutcome:
        own = {"number": item.number, "label": item.label, "checkpoint": item.checkpoint}
        return ItemOutcome(**json.loads(Path(path).read_text()) | own)

    return answer


def wait_for_imports() -> float:
    """Until the processes that this one has started compute no more; how long that took."""
    began, before = time.monotonic(), -1.0
    while (used := _processor_seconds()) - before > _IDLE_SHARE * _LOOK_S:
        before = used
        time.sleep(_LOOK_S)
    return time.monotonic() - began


def _processor_seconds() -> float:
    total = 0.0
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system
    return total


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

    def started(dashboard: str, workers: int) -> None:
        found["imports_s"] = wait_for_imports() if chosen.warm else 0.0

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
    found |= {"seconds": result.seconds, "collected_bytes": peak_memory_bytes()}
    if chosen.report:
        from heimdall_onnx.fleet_report import store_report
        from heimdall_onnx.publish import connect

        client, bucket = connect(settings).client, plan.items[0].parameters.bucket
        store_report(client, bucket, plan, result, settings.home)
    found["peak_bytes"] = peak_memory_bytes()
    found["exit_code"] = result.exit_code
    print(json.dumps(found | {"outcomes": list(map(asdict, outcomes))}))


if __name__ == "__main__":
    main()
