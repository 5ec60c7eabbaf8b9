"""A scheduler and workers of Dask in processes of their own, as the README has them started."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from distributed import Client, LocalCluster
from servers import free_port

_WAIT_S = 60.0


@contextmanager
def threads_as_workers(
    count: int, *, resources: Mapping[str, float], environment: Mapping[str, str]
) -> Iterator[Client]:
    """As `local_client`, without processes, of which each would import everything anew."""
    with (
        LocalCluster(
            n_workers=count,
            threads_per_worker=1,
            processes=False,
            dashboard_address=None,
            resources=dict(resources),
            memory_limit=None,
            silence_logs="ERROR",
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


@dataclass
class DaskCluster:
    """What was started.

    Attributes:
        address: Of the scheduler.
        folder: Where the processes' output goes.
        scheduler: Its process.
    """

    address: str
    folder: Path
    scheduler: subprocess.Popen[bytes]
    _workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start_worker(
        self,
        environment: Mapping[str, str],
        *,
        resources: str = "release=1",
        cores: set[int] | None = None,
    ) -> subprocess.Popen[bytes]:
        """A worker that has joined; on these processors only if there are some given."""
        name = f"worker-{len(self._workers)}"
        command = ["worker", self.address, "--name", name, "--nthreads", "1", "--no-dashboard"]
        log = self.folder / f"{name}.log"
        worker = _start([*command, "--resources", resources], log, environment, cores)
        self._workers.append(worker)
        _wait_for("Registered to", log, worker)
        return worker

    def end(self) -> None:
        """End all processes."""
        for process in (*self._workers, self.scheduler):
            process.terminate()
        for process in (*self._workers, self.scheduler):
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def start_scheduler(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """A scheduler on loopback that listens already."""
    command = ["scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard"]
    log = folder / "scheduler.log"
    log.unlink(missing_ok=True)
    scheduler = _start(command, log, os.environ)
    _wait_for("Scheduler at", log, scheduler)
    return scheduler


@contextmanager
def dask_cluster(folder: Path) -> Iterator[DaskCluster]:
    """A scheduler without workers; everything that was started ends with the block."""
    folder.mkdir(exist_ok=True)
    port = free_port()
    cluster = DaskCluster(f"tcp://127.0.0.1:{port}", folder, start_scheduler(folder, port))
    try:
        yield cluster
    finally:
        cluster.end()


def _start(
    command: list[str],
    log: Path,
    environment: Mapping[str, str],
    cores: set[int] | None = None,
) -> subprocess.Popen[bytes]:
    pinned = ["taskset", "-c", ",".join(map(str, cores))] if cores else []
    with log.open("wb") as output:
        return subprocess.Popen(
            [*pinned, sys.executable, "-m", "dask", *command],
            cwd=log.parent,
            env=dict(environment),
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def _wait_for(text: str, log: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _WAIT_S
    while text not in (said := log.read_text(errors="replace")):
        assert process.poll() is None, said
        assert time.monotonic() < deadline, said
        time.sleep(0.1)
