"""The processors that latency is measured on, and a machine-wide lock on each of them.

Two measurements at a time on one processor make each other slower, and neither number says so. So
whoever measures with `exclusive_cores` holds a lock on every processor that it may run on, by its
affinity, and refuses to measure where another measurement holds one of them.

The locks keep measurements of this package apart, whoever runs them; they do not keep other
programs away, nor a measurement on the other hardware thread of a core. They are files in
`lock_folder`, so containers know of each other only if they share that folder.
"""

from __future__ import annotations

import os
import platform
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import filelock

from heimdall_onnx.common.errors import BenchmarkError

# Not what TMPDIR says: everybody on a machine has to look in the same place.
LOCK_FOLDERS = ("/run/lock", "/dev/shm", "/tmp")  # noqa: S108
PROC_LOCKS = Path("/proc/locks")

# What this process holds.
_held: set[int] = set()


@dataclass(frozen=True)
class Cores:
    """The processors that this process, and those that it starts, may run on.

    Attributes:
        host: Name of the machine.
        numbers: The processors as the system numbers them, ascending.
        exclusive: Whether this process holds them all against other measurements.
    """

    host: str
    numbers: tuple[int, ...]
    exclusive: bool

    def __str__(self) -> str:
        return f"{_in_words(self.numbers)} of {self.host}"


def usable_cores() -> Cores:
    """The processors of this process's affinity, see sched_setaffinity(2), as they are now."""
    numbers = tuple(sorted(os.sched_getaffinity(0)))
    return Cores(platform.node(), numbers, _held.issuperset(numbers))


def lock_folder() -> Path:
    """Where the locks of this machine's processors are: the same folder for all its users."""
    for name in LOCK_FOLDERS:
        folder = Path(name)
        if folder.is_dir() and folder.stat().st_mode & stat.S_IRWXO == stat.S_IRWXO:
            return folder
    return Path(tempfile.gettempdir())


@contextmanager
def exclusive_cores(folder: Path | None = None) -> Iterator[Cores]:
    """Hold every processor that this process may run on against other measurements.

    It never waits. The locks end with the process, however it ends; their files stay, and are
    written to by nobody.

    Args:
        folder: Where the locks are; `lock_folder` by default.

    Yields:
        The processors.

    Raises:
        BenchmarkError: Naming the processors that others hold, and who; or if a lock can't be used.
    """
    cores, folder = usable_cores(), folder or lock_folder()
    files = {number: folder / f"heimdall-onnx-core-{number}.lock" for number in cores.numbers}
    with ExitStack() as stack:
        # In ascending order, and no further than the first that is taken: of several that begin at
        # once, one always gets all of its own.
        for number, file in files.items():
            try:
                # Another user's process must be able to open the file that this one makes.
                stack.enter_context(filelock.FileLock(file, timeout=0, mode=0o666))
            except filelock.Timeout:
                raise BenchmarkError(_taken(cores, number, files)) from None
            except OSError as error:
                raise BenchmarkError(
                    f"core {number} of {cores.host} can't be held: its lock {file} can't be used "
                    f"({error.strerror}); delete that file if nothing is measured"
                ) from error
        stack.callback(_held.difference_update, cores.numbers)
        _held.update(cores.numbers)
        yield usable_cores()


def _taken(cores: Cores, first: int, files: dict[int, Path]) -> str:
    """Which processors are held by others: the first that was found so, and what the system tells.

    Seen from a container, the system does not tell of processes outside of it.
    """
    holders = _holders()
    held = {number: holders.get(_identity(file)) for number, file in files.items()}
    others = [n for n in cores.numbers if n == first or (n > first and held[n])]
    words = [
        f"{_in_words(tuple(numbers))} by {f'process {pid}' if pid else 'an unknown process'}"
        for pid, numbers in groupby(others, key=lambda number: held[number])
    ]
    return (
        f"another measurement holds cores of {cores.host}: {', '.join(words)}; give each its own "
        "with taskset, or let one end before the next begins"
    )


def _identity(file: Path) -> str:
    """A file as /proc/locks names it; empty if it is not there."""
    try:
        found = file.stat()
    except FileNotFoundError:
        return ""
    device = found.st_dev
    return f"{os.major(device):02x}:{os.minor(device):02x}:{found.st_ino}"


def _holders() -> dict[str, int]:
    """Who holds which file, see proc_locks(5); empty where the system does not tell."""
    try:
        lines = PROC_LOCKS.read_text().splitlines()
    except OSError:
        return {}
    # Of one that waits, "->" comes after the number.
    locks = [line.split() for line in lines if "->" not in line]
    return {lock[5]: int(lock[4]) for lock in locks if lock[1] == "FLOCK" and int(lock[4]) > 0}


def _in_words(numbers: Sequence[int]) -> str:
    """Processors in words, ``"cores 0-3, 8"``."""
    runs = [
        [number for _, number in run]
        for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    ]
    shown = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
    return f"core{'s' if len(numbers) > 1 else ''} {shown}"
