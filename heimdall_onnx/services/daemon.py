"""A detached process that outlives its starter and is found again."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import psutil

from heimdall_onnx.common.errors import ServiceError
from heimdall_onnx.services.client import redact_url

LOOPBACK = "127.0.0.1"

# With the gRPC ports 10,000 above them, below those that systems take for outgoing connections.
_PORTS = range(11_000, 21_000)
_LOCK_TIMEOUT_S = 180.0
_MARKER = "HEIMDALL_SERVICE"
STOP_TIMEOUT_S = 5.0
_DETACH = 'umask 077; log=$1; shift; "$@" >>"$log" 2>&1 &'


@dataclass(frozen=True)
class Daemon:
    """A service that runs on its own in a folder of its own.

    It is recognised by a marker in its environment, so there is no PID file that could be stale:
    whatever carries the marker is ours, nothing else is.

    Attributes:
        name: What messages call it.
        folder: Its working folder, with its log, record and lock.
        error: The class of its errors.
    """

    name: str
    folder: Path
    error: type[ServiceError]

    @property
    def log(self) -> Path:
        """File with its output."""
        return self.folder / f"{self.name}.log"

    def read_record(self) -> dict[str, Any]:
        """What `write_record` kept; empty where there is nothing readable."""
        try:
            record = json.loads((self.folder / "service.json").read_text())
        except (OSError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Keep what the next start needs to know, credentials among it."""
        write_private(self.folder / "service.json", json.dumps(record, indent=1))

    def processes(self) -> list[psutil.Process]:
        """Its living processes, parents first."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(_MARKER) == str(self.folder) and _is_alive(process):
                    found.append(process)
        return sorted(found, key=psutil.Process.create_time)

    def listens(self, port: int) -> bool:
        """Whether the port is one of its processes', and not of another home's server."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                for at in process.net_connections("tcp"):
                    if at.status == psutil.CONN_LISTEN and at.laddr.port == port:
                        return True
        return False

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from starting or stopping it meanwhile."""
        lock = filelock.FileLock(self.folder / "lock", timeout=_LOCK_TIMEOUT_S, mode=0o600)
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.folder.chmod(0o700)
            lock.acquire()
        except filelock.Timeout as error:
            raise self.error(
                f"another process holds {lock.lock_file} and has not finished starting or "
                f"stopping the {self.name} service; end it and try again"
            ) from error
        except OSError as error:
            raise self.error(
                f"the {self.name} service needs {self.folder} for its files, which can't be "
                f"used ({error.strerror}); set HEIMDALL_HOME to a folder that can"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def start(self, command: list[str], environment: Mapping[str, str]) -> None:
        """Start it detached: own session, no inherited file, its output in the log."""
        # The shell hands the service over to init, so that it neither becomes a zombie of ours
        # nor ends with us.
        subprocess.run(
            ["/bin/sh", "-c", _DETACH, "sh", str(self.log), *command],
            cwd=self.folder,
            env={**environment, _MARKER: str(self.folder)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            check=True,
        )

    def wait(self, healthy: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until it answers; False when it has ended or time is up."""
        deadline = time.monotonic() + timeout_s
        missed = 0
        # A process has no environment for a moment while it becomes another program.
        while time.monotonic() < deadline and missed < 3:
            if healthy():
                return True
            missed = 0 if self.processes() else missed + 1
            time.sleep(0.1)
        return False

    def stop(self) -> None:
        """Ask its processes to end, and end those that don't."""
        processes = self.processes()
        for signal in (psutil.Process.terminate, psutil.Process.kill):
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    signal(process)
            deadline = time.monotonic() + STOP_TIMEOUT_S
            while processes and time.monotonic() < deadline:
                time.sleep(0.05)
                processes = [process for process in processes if _is_alive(process)]
        if processes:
            raise self.error(f"process {processes[0].pid} ({self.name}) can't be ended")

    def failure(self) -> ServiceError:
        """The error of a start that failed, with the end of the log."""
        with contextlib.suppress(OSError):
            tail = self.log.read_text(errors="replace").splitlines()[-15:]
            return self.error(
                f"the embedded {self.name} service did not start; the end of {self.log}:\n  "
                + redact_url("\n  ".join(tail))
            )
        return self.error(f"the embedded {self.name} service did not start and wrote no log")


def _is_alive(process: psutil.Process) -> bool:
    # What has ended stays a zombie until init looks after it, which may take seconds.
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, whole or not at all."""
    partial = path.with_name(f".{path.name}.part")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    partial.replace(path)


def free_ports(
    wanted: Mapping[str, int], names: tuple[str, ...], offset: int = 0
) -> dict[str, int]:
    """A free port for each name, the wanted one where it is still free.

    Args:
        wanted: Ports to keep if possible, by name.
        names: Who needs a port.
        offset: The port at this distance must be free too.
    """
    ports: dict[str, int] = {}
    for name in names:
        port = wanted.get(name) or secrets.choice(_PORTS)
        while port in ports.values() or not (_is_free(port) and _is_free(port + offset)):
            port = secrets.choice(_PORTS)
        ports[name] = port
    return ports


def is_listening(port: int) -> bool:
    """Whether somebody accepts connections at the port."""
    try:
        socket.create_connection((LOOPBACK, port), timeout=2).close()
    except OSError:
        return False
    return True


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As servers do: connections that have ended don't keep a port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True
