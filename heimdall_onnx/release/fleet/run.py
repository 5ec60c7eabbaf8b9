"""Many releases on Dask's workers: each item of a plan once, wherever it fits.

An item is a complete release, as the single command makes it. Workers declare what they have as
Dask resources, and items what they need:

========== ============================================================================
release    one for each item that the worker may have at a time
memory     bytes; an item with a limit waits until that much is left
cores      one where the worker's processors are nobody else's; latency is measured there
========== ============================================================================

The scheduler gives an item of a lost worker to another one. What fails for a service's reasons is
tried again after a while, what fails for its own is recorded and stops nothing. Only as many items
as the workers can have are with the scheduler, so that neither it nor the client grows with the
plan.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4

import psutil
from distributed import Client, Future, wait
from distributed.scheduler import KilledWorker
from distributed.utils import CancelledError

from heimdall_onnx.common.dask import connected, local_client, own_processors, scheduler_client
from heimdall_onnx.common.errors import EvidenceError, HeimdallError, ParameterError, SchedulerError
from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.common.machine import physical_cores, usable_processors
from heimdall_onnx.release.fleet.item import ItemOutcome
from heimdall_onnx.release.fleet.plan import FleetItem, FleetPlan
from heimdall_onnx.release.fleet.worker import CORES, MEMORY, RELEASE, FleetWorker, run_item
from heimdall_onnx.report.notebook import kernel_environment
from heimdall_onnx.services.client import redact_url
from heimdall_onnx.services.connection import connect
from heimdall_onnx.services.settings import Settings

log = get_logger(__name__)

ITEM_ATTEMPTS = 5
LONGEST_PAUSE_S = 60.0
_LOOK_S = 1.0
# Workers of a cluster come and go.
COUNT_WORKERS_S = 5.0
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
        workers: How many of these; by default one for each processor, or for each physical core
            where latency is measured.
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
    count = workers or usable_processors()
    if not workers and any(item.parameters.measure_latency for item in plan.items):
        count = min(count, len(physical_cores()))
    with worker_pool(settings, scheduler, count) as pool:
        resources = pool.worker_resources()
        _require_places(plan, resources)
        on_start(pool.client.dashboard_link or "", len(resources))
        started = time.perf_counter()
        outcomes = {}
        for outcome in _outcomes(pool, plan, force=force):
            on_outcome(outcome)
            kept = {name: value for name, value in outcome.result.items() if name != "costs"}
            outcomes[outcome.number] = replace(outcome, result=kept)
        seconds = time.perf_counter() - started
    ordered = tuple(outcomes[item.number] for item in plan.items)
    return FleetResult(plan.name, ordered, seconds, len(resources))


class WorkerPool:
    """The workers of a scheduler, as they come and go.

    Args:
        client: Of the scheduler; its workers are told what to do.

    Raises:
        SettingsError: If a worker lacks an address of a service.
        SchedulerError: If a worker can't be prepared.
    """

    def __init__(self, client: Client) -> None:
        self.client, self._plugin = client, FleetWorker()
        self._slots, self._counted = 0, -math.inf
        self._equip()

    def _equip(self) -> None:
        try:
            self.client.register_plugin(self._plugin)
        except Exception as error:
            with suppress(Exception):
                # Or the next fleet would take it for what every worker has.
                self.client.unregister_worker_plugin(self._plugin.name)
            if isinstance(error, HeimdallError):
                raise
            raise SchedulerError(  # whatever a worker of another version raises
                f"a worker can't be prepared for releases: {type(error).__name__}: {error}; it "
                "needs the same version of this package as the client"
            ) from error

    def worker_resources(self) -> dict[str, dict[str, float]]:
        """The resources of each worker that takes releases.

        Raises:
            SchedulerError: If there is none.
        """
        found, known = self._takers()
        if not found:
            raise SchedulerError(
                f"none of the scheduler's {known} workers takes releases: start them with "
                f'`dask worker … --nthreads 1 --resources "{RELEASE}=1 {CORES}=1 {MEMORY}=16e9"`, '
                f"without {CORES} where others compute on the same processors"
            )
        return found

    def _takers(self) -> tuple[dict[str, dict[str, float]], int]:
        known = self.client.scheduler_info(n_workers=-1)["workers"]
        resources = {address: worker["resources"] for address, worker in known.items()}
        return {a: has for a, has in resources.items() if has.get(RELEASE)}, len(known)

    def slots(self) -> int:
        """How many items the workers can have at a time, at least one."""
        if time.monotonic() - self._counted >= COUNT_WORKERS_S:
            found, _ = self._takers()
            before, self._slots = self._slots, int(sum(has[RELEASE] for has in found.values()))
            self._counted = time.monotonic()
            if before and not self._slots:
                log.warning("no worker takes releases any more; the fleet waits for one")
        return max(1, self._slots)

    def recover(self) -> None:
        """Go on with the scheduler to which the connection was lost.

        Raises:
            SchedulerError: If it does not answer any more.
        """
        if not connected(self.client):
            raise SchedulerError(
                "the connection to the scheduler was lost and it answers no more; what is "
                "released stays so: start it again and call the fleet again, which goes on"
            )
        self._equip()


@contextmanager
def worker_pool(settings: Settings, scheduler: str, workers: int) -> Iterator[WorkerPool]:
    """A client of the scheduler, whose workers know what to do."""
    if scheduler:
        with scheduler_client(scheduler) as client:
            yield WorkerPool(client)
        return
    memory = int(_MEMORY_SHARE * psutil.virtual_memory().available / workers)
    resources = {RELEASE: 1, MEMORY: memory, **({CORES: 1} if own_processors(workers) else {})}
    environment = kernel_environment(settings)
    with local_client(workers, resources=resources, environment=environment) as client:
        yield WorkerPool(client)


def _needs(item: FleetItem) -> dict[str, float]:
    memory = {} if item.memory_bytes is None else {MEMORY: item.memory_bytes}
    return {RELEASE: 1, **memory, **({CORES: 1} if item.parameters.measure_latency else {})}


def _require_places(plan: FleetPlan, workers: dict[str, dict[str, float]]) -> None:
    """Refuse what would wait for ever."""
    for item in plan.items:
        needs = _needs(item)
        if any(all(has.get(n, 0) >= v for n, v in needs.items()) for has in workers.values()):
            continue
        largest = {n: max(has.get(n, 0) for has in workers.values()) for n in needs}
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


def _outcomes(pool: WorkerPool, plan: FleetPlan, *, force: bool) -> Iterator[ItemOutcome]:
    """Each item's outcome as it comes, with what failed for a service's reasons tried again."""
    # Another fleet of the same name may be with the same scheduler.
    run = uuid4().hex[:8]
    # When, in which order, how often before, and what.
    order = itertools.count()
    waiting = [(0.0, next(order), 0, item) for item in plan.items]
    running: dict[Future, tuple[FleetItem, int]] = {}
    while waiting or running:
        # No more than can run: what waits behind an item whose worker dies is suspected with it.
        while waiting and waiting[0][0] <= time.monotonic() and len(running) < pool.slots():
            _, _, tried, item = heapq.heappop(waiting)
            future = pool.client.submit(
                run_item,
                item,
                plan.name,
                force,
                key=f"release-{plan.name}-{run}-{item.number}-{tried}",
                resources=_needs(item),
                pure=False,
            )
            running[future] = (item, tried + 1)
        done = _done(running)
        if any(future.cancelled() for future in done):
            pool.recover()
        for future in done:
            item, tried = running.pop(future)
            outcome = replace(_outcome_of(future, item), attempts=tried)
            if outcome.service_failed and tried < ITEM_ATTEMPTS:
                pause = min(LONGEST_PAUSE_S, 2.0**tried) * random.uniform(0.5, 1)
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
    except CancelledError:
        return [future for future in running if future.done()]


def _outcome_of(future: Future, item: FleetItem) -> ItemOutcome:
    exit_code = HeimdallError.exit_code
    try:
        outcome: ItemOutcome = future.result()
        return outcome
    except KilledWorker as error:
        problem = (
            f"the workers that had it died, the last one at {error.last_worker.address}; if they "
            "ran out of memory, give the item a limit (memory: …) that few workers meet"
        )
    except CancelledError:
        exit_code = SchedulerError.exit_code
        problem = "the connection to the scheduler was lost"
    except Exception as error:  # a fault of ours, or of Dask's, in one item of many
        told = redact_url("".join(traceback.format_exception(error)))
        log.error("item broke off", item=item.label, exception=told)
        problem = f"it broke off with {type(error).__name__}: {redact_url(str(error))}"
    return ItemOutcome.of_failure(item, problem, exit_code)
