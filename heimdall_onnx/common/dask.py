"""Dask workers: those of a scheduler, or some on this machine for as long as they are needed."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import dask
from distributed import Client, LocalCluster, WorkerPlugin
from distributed.worker import Worker

from heimdall_onnx.common.errors import SchedulerError, SettingsError
from heimdall_onnx.common.machine import physical_cores, usable_processors

SCHEDULER_TIMEOUT_S = 30
_LOOK_S = 0.2


@contextmanager
def scheduler_client(address: str) -> Iterator[Client]:
    """A client of the scheduler at an address, e.g. ``tls://host:8786``.

    Raises:
        SchedulerError: If it can't be reached.
        SettingsError: If certificates are needed and none are set.
    """
    try:
        client = Client(address, timeout=SCHEDULER_TIMEOUT_S)
    except TypeError as error:  # Dask's own for certificates that it has not got
        raise SettingsError(
            f"the scheduler {address} can't be connected to: {error}; for tls:// set "
            "DASK_DISTRIBUTED__COMM__TLS__CA_FILE, …__TLS__CLIENT__CERT and "
            "…__TLS__CLIENT__KEY, here and on the workers"
        ) from error
    except (OSError, ValueError, TimeoutError) as error:
        raise SchedulerError(
            f"no scheduler answers at {address}: {error or type(error).__name__}; start "
            "`dask scheduler` there, or take workers on this machine"
        ) from error
    with client:
        yield client


def connected(client: Client, within_s: float = math.inf) -> bool:
    """Whether a client has its scheduler, or again has it after the connection was lost.

    Args:
        client: It tries to reach the scheduler by itself, for half a minute.
        within_s: Seconds to wait for that.
    """
    deadline = time.monotonic() + within_s
    while client.status == "connecting" and time.monotonic() < deadline:
        time.sleep(_LOOK_S)
    return bool(client.status == "running")


@contextmanager
def local_client(
    count: int,
    *,
    resources: Mapping[str, float] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Client]:
    """A client of workers on this machine, which end with the block.

    Each has one thread for tasks, and processors of its own if there are enough.

    Args:
        count: How many; 0 takes one for each processor.
        resources: What each of them has, as Dask's resources.
        environment: Theirs; by default this process's.
    """
    count = count or usable_processors()
    with (
        # Workers may start processes of their own.
        dask.config.set({"distributed.worker.daemon": False}),
        LocalCluster(
            n_workers=count,
            threads_per_worker=1,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            # Whoever reaches a scheduler runs code as its user: on loopback, too, only we do.
            security=True,
            resources=dict(resources or {}),
            memory_limit=None,
            env=dict(os.environ if environment is None else environment),
            silence_logs="ERROR",
        ) as cluster,
        Client(cluster) as client,
    ):
        client.register_plugin(_OwnProcessors(own_processors(count)))
        yield client


def own_processors(count: int) -> dict[str, tuple[int, ...]]:
    """The processors of each of ``count`` workers by its name; none where a core had to be shared.

    A core's hardware threads stay together: a neighbour on the other one would be measured too.
    """
    cores = physical_cores()
    if count > len(cores):
        return {}
    return {str(n): tuple(sorted(itertools.chain(*cores[n::count]))) for n in range(count)}


class _OwnProcessors(WorkerPlugin):  # type: ignore[misc]
    name = "heimdall-processors"

    def __init__(self, processors: dict[str, tuple[int, ...]]) -> None:
        self._processors = processors

    def setup(self, worker: Worker) -> None:
        # Threads and processes that begin from here on inherit it.
        if own := self._processors.get(str(worker.name)):
            os.sched_setaffinity(0, own)
