"""Running a whole command and measuring it from outside: wall-clock time and memory of its tree."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

_SAMPLE_S = 0.1
PSS_EVERY_S = 0.4


@dataclass(frozen=True)
class Run:
    """A command that has ended well.

    Attributes:
        seconds: Wall-clock time of the whole process.
        peak_bytes: Largest memory of the process and all that it started: the sum of their
            proportional set sizes, in which a page that several share counts once.
        output: Its standard output.
    """

    seconds: float
    peak_bytes: int
    output: str


def run(command: Sequence[str | Path], folder: Path, environment: Mapping[str, str]) -> Run:
    """Run a command to its end.

    Raises:
        RuntimeError: If it fails; with the end of what it printed.
    """
    errors = folder / "stderr.log"
    with errors.open("wb") as stderr:
        started = time.perf_counter()
        process = subprocess.Popen(
            list(map(str, command)),
            cwd=folder,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        watch = _Watch(process.pid)
        watch.start()
        try:
            output, _ = process.communicate()
        except BaseException:
            process.terminate()
            process.wait()
            raise
        finally:
            watch.stop()
        seconds = time.perf_counter() - started
    if process.returncode:
        said = errors.read_text(errors="replace")[-2000:]
        raise RuntimeError(
            f"{' '.join(map(str, command))} ended with {process.returncode}:\n{said}"
        )
    return Run(seconds, watch.peak_bytes, output)


class _Watch(threading.Thread):
    """Samples the memory of a process and its children.

    Proportional set sizes are dear to read, so they are read only when the resident sizes, which
    are never smaller, leave room for a new maximum.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._root, self._ended = psutil.Process(pid), threading.Event()
        self.peak_bytes = 0

    def run(self) -> None:
        read = 0.0
        while not self._ended.wait(_SAMPLE_S):
            tree = self._tree()
            room = sum(_resident(process) for process in tree) > 1.01 * self.peak_bytes
            if room and time.monotonic() - read > PSS_EVERY_S:
                self.peak_bytes = max(self.peak_bytes, sum(map(_proportional, tree)))
                read = time.monotonic()

    def stop(self) -> None:
        self._ended.set()
        self.join()

    def _tree(self) -> list[psutil.Process]:
        try:
            return [self._root, *self._root.children(recursive=True)]
        except psutil.Error:
            return []


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0


def _proportional(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:
        return 0
