"""Many releases on Dask's workers: each item of a plan once, wherever it fits.

An item is a complete release, as the single command makes it. Workers declare what they have as
Dask resources, and items what they need:

========== ============================================================================
release    one for each item that the worker may have at a time
memory     bytes; an item with a limit waits until that much is left
cores      one where the worker's processors are nobody else's; latency is measured there
========== ============================================================================

The scheduler gives an item of a lost worker to another one. What fails for a service's reasons is
tried again after a while, what fails for its own is recorded and stops nothing. Only a few items
are with the scheduler at a time, so that neither it nor the client grows with the plan.
"""

from __future__ import annotations

import heapq
import itertools
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4

import dask
import psutil
from distributed import Client, Future, LocalCluster, WorkerPlugin, get_worker, wait
from distributed.scheduler import KilledWorker
from distributed.worker import Worker

from heimdall_onnx.errors import (
    EvidenceError,
    HeimdallError,
    ParameterError,
    SchedulerError,
)
from heimdall_onnx.fleet_item import ItemOutcome, ItemRunner
from heimdall_onnx.fleet_plan import FleetItem, FleetPlan
from heimdall_onnx.logs import get_logger
from heimdall_onnx.processors import usable_processors
from heimdall_onnx.publish import connect
from heimdall_onnx.release import kernel_environment
from heimdall_onnx.settings import Settings

log = get_logger(__name__)

ATTEMPTS = 5
RELEASE, MEMORY, CORES = "release", "memory", "cores"
_PLUGIN = "heimdall-fleet"
_LONGEST_PAUSE_S = 60.0
_SCHEDULER_TIMEOUT_S = 30
# So many items are with the scheduler for each that can run: no worker waits for the client.
_AHEAD = 2
_LOOK_S = 1.0
# What stays free for the system, the store and the client.
_MEMORY_SHARE = 0.9


@dataclass(frozen=True)
class FleetResult:
    """What became of a fleet.

    Attributes:
        name: Of the fleet.
        outcomes: Of every item, in the plan's order; what its steps cost is in its manifest only,
            since of thousands the client could not hold it.
        seconds: From the first submission to the last outcome.
        workers: Workers there were when it began.
    """

    name: str
    outcomes: tuple[ItemOutcome, ...] = field(repr=False)
    seconds: float
    workers: int

    @property
    def exit_code(self) -> int:
        """0 if every item is released, 3 otherwise."""
        return 0 if all(o.exit_code == 0 for o in self.outcomes) else EvidenceError.exit_code

    def count(self, status: str) -> int:
        """Number of items that are ``released``, ``kept`` or ``failed``."""
        return sum(outcome.status == status for outcome in self.outcomes)


class _FleetWorker(WorkerPlugin):  # type: ignore[misc]
    """Gives a worker what all its items share."""

    name = _PLUGIN

    def __init__(self, fleet: str, cores: dict[str, tuple[int, ...]]) -> None:
        self._fleet, self._cores = fleet, cores
        self.runner: ItemRunner | None = None

    def setup(self, worker: Worker) -> None:
        # Threads and processes that begin from here on inherit it.
        if cores := self._cores.get(str(worker.name)):
            os.sched_setaffinity(0, cores)
        self.runner = ItemRunner(Settings.load(), self._fleet)

    def teardown(self, worker: Worker) -> None:
        if self.runner is not None:
            self.runner.__exit__(None, None, None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "runner": None}


def run_item(item: FleetItem, force: bool) -> ItemOutcome:
    """Release an item on the worker that this runs on."""
    runner: ItemRunner = get_worker().plugins[_PLUGIN].runner
    return runner.run(item, force=force)


def run_fleet(
    plan: FleetPlan,
    settings: Settings,
    *,
    scheduler: str = "",
    workers: int = 0,
    force: bool = False,
    on_start: Callable[[str, int], None] = lambda dashboard, workers: None,
    on_outcome: Callable[[ItemOutcome], None] = lambda outcome: None,
) -> FleetResult:
    """Release every item of a plan that is not released yet.

    Args:
        plan: The plan.
        settings: Where the services are; workers of another scheduler have their own, which must
            name the same ones.
        scheduler: Address of a Dask scheduler, e.g. ``tls://host:8786``; by default workers are
            started on this machine for the time of the fleet.
        workers: How many of these; by default one for each processor.
        force: Release anew what is released already.
        on_start: Called with the dashboard's address and the number of workers.
        on_outcome: Called with each outcome as it comes, all of it.

    Raises:
        ParameterError: If an item needs what no worker has.
        SchedulerError: If the scheduler can't be reached or has no workers for releases.
        ServiceError: If store or registry can't be reached.
    """
    # Before the workers, of which several would make the tables of a new registry at once.
    settings = connect(settings).settings
    with _connected(plan, settings, scheduler, workers) as client:
        offered = _offered(client)
        _require_places(plan, offered)
        on_start(client.dashboard_link or "", len(offered))
        started = time.perf_counter()
        slots = int(sum(resources[RELEASE] for resources in offered.values()))
        outcomes = {}
        for outcome in _outcomes(client, plan, slots, force=force):
            on_outcome(outcome)
            kept = {name: value for name, value in outcome.result.items() if name != "costs"}
            outcomes[outcome.number] = replace(outcome, result=kept)
        seconds = time.perf_counter() - started
    ordered = tuple(outcomes[item.number] for item in plan.items)
    return FleetResult(plan.name, ordered, seconds, len(offered))


@contextmanager
def _connected(
    plan: FleetPlan, settings: Settings, scheduler: str, workers: int
) -> Iterator[Client]:
    """A client of the scheduler, whose workers know what to do."""
    if scheduler:
        try:
            client = Client(scheduler, timeout=_SCHEDULER_TIMEOUT_S)
        except (OSError, ValueError, TimeoutError) as error:
            raise SchedulerError(
                f"no scheduler answers at {scheduler}: {error or type(error).__name__}; start "
                "`dask scheduler` there, or leave --scheduler out to use this machine's processors"
            ) from error
        with client:
            _equip(client, _FleetWorker(plan.name, {}))
            yield client
        return
    with _local_cluster(settings, workers) as (cluster, cores), Client(cluster) as client:
        _equip(client, _FleetWorker(plan.name, cores))
        yield client


def _equip(client: Client, plugin: _FleetWorker) -> None:
    try:
        client.register_plugin(plugin)
    except HeimdallError:
        raise
    except Exception as error:  # whatever a worker of another version raises
        raise SchedulerError(
            f"a worker can't be prepared for releases: {type(error).__name__}: {error}; it needs "
            "the same version of this package as the client"
        ) from error


@contextmanager
def _local_cluster(
    settings: Settings, workers: int
) -> Iterator[tuple[LocalCluster, dict[str, tuple[int, ...]]]]:
    """Workers on this machine, each with processors of its own if there are enough."""
    processors = sorted(os.sched_getaffinity(0))
    count = workers or usable_processors()
    cores = {str(n): tuple(processors[n::count]) for n in range(count)}
    resources = {
        RELEASE: 1,
        MEMORY: int(_MEMORY_SHARE * psutil.virtual_memory().available / count),
    }
    if count <= len(processors):
        resources[CORES] = 1
    else:
        cores = {}
    with (
        # Workers start kernels, and each is the whole of its own.
        dask.config.set({"distributed.worker.daemon": False}),
        LocalCluster(
            n_workers=count,
            threads_per_worker=1,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            # Whoever reaches a scheduler runs code as its user: on loopback, too, only we do.
            security=True,
            resources=resources,
            memory_limit=None,
            env=kernel_environment(settings),
            silence_logs="ERROR",
        ) as cluster,
    ):
        yield cluster, cores


def _offered(client: Client) -> dict[str, dict[str, float]]:
    """The resources of each worker that takes releases."""
    known = client.scheduler_info(n_workers=-1)["workers"]
    offered = {
        address: worker["resources"]
        for address, worker in known.items()
        if worker["resources"].get(RELEASE)
    }
    if not offered:
        raise SchedulerError(
            f"none of the scheduler's {len(known)} workers takes releases: start them with "
            f'`dask worker … --nthreads 1 --resources "{RELEASE}=1 {CORES}=1 {MEMORY}=16e9"`, '
            f"without {CORES} where others compute on the same processors"
        )
    return offered


def _needs(item: FleetItem) -> dict[str, float]:
    needs: dict[str, float] = {RELEASE: 1}
    if item.memory_bytes is not None:
        needs[MEMORY] = item.memory_bytes
    if item.parameters.measure_latency:
        needs[CORES] = 1
    return needs


def _require_places(plan: FleetPlan, offered: dict[str, dict[str, float]]) -> None:
    """Refuse what would wait for ever."""
    for item in plan.items:
        needs = _needs(item)
        if any(all(has.get(n, 0) >= v for n, v in needs.items()) for has in offered.values()):
            continue
        largest = {n: max(has.get(n, 0) for has in offered.values()) for n in needs}
        lacking = ", ".join(
            f"{n} {v:g} (the most that one has is {largest[n]:g})"
            for n, v in needs.items()
            if largest[n] < v
        )
        raise ParameterError(
            f"no worker can take item {item.label}: it needs "
            f"{lacking or 'all of it on one worker'}; latency is measured only where a worker "
            "has its processors for itself: take fewer workers, or measure_latency: false"
        )


def _outcomes(client: Client, plan: FleetPlan, slots: int, *, force: bool) -> Iterator[ItemOutcome]:
    """Each item's outcome as it comes, with what failed for a service's reasons tried again."""
    # Another fleet of the same name may be with the same scheduler.
    run = uuid4().hex[:8]
    # When, in which order, how often before, and what.
    order = itertools.count()
    waiting = [(0.0, next(order), 0, item) for item in plan.items]
    running: dict[Future, tuple[FleetItem, int]] = {}
    while waiting or running:
        while waiting and waiting[0][0] <= time.monotonic() and len(running) < _AHEAD * slots:
            _, _, tried, item = heapq.heappop(waiting)
            future = client.submit(
                run_item,
                item,
                force,
                key=f"release-{plan.name}-{run}-{item.number}-{tried}",
                resources=_needs(item),
                pure=False,
            )
            running[future] = (item, tried + 1)
        for future in _done(running):
            item, tried = running.pop(future)
            outcome = replace(_outcome_of(future, item), attempts=tried)
            if outcome.service_failed and tried < ATTEMPTS:
                pause = min(_LONGEST_PAUSE_S, 2.0**tried) * random.uniform(0.5, 1)
                log.warning(
                    "item is tried again", item=item.label, seconds=pause, reason=outcome.error
                )
                heapq.heappush(waiting, (time.monotonic() + pause, next(order), tried, item))
            else:
                yield outcome


def _done(running: dict[Future, Any]) -> list[Future]:
    """Those that have ended within a while."""
    if not running:
        time.sleep(_LOOK_S)
        return []
    try:
        return list(wait(list(running), timeout=_LOOK_S, return_when="FIRST_COMPLETED").done)
    except TimeoutError:
        return []


def _outcome_of(future: Future, item: FleetItem) -> ItemOutcome:
    try:
        outcome: ItemOutcome = future.result()
        return outcome
    except KilledWorker as error:
        problem = (
            f"the workers that had it died, the last one at {error.last_worker.address}; if they "
            "ran out of memory, give the item a limit (memory: …) that few workers meet"
        )
    except Exception as error:  # a fault of ours, or of Dask's, in one item of many
        log.exception("item broke off", item=item.label)
        problem = f"it broke off with {type(error).__name__}: {error}"
    return ItemOutcome(
        item.number,
        item.label,
        item.checkpoint,
        "",
        "failed",
        HeimdallError.exit_code,
        error=problem,
    )
