"""What the machine did while something was measured on it.

A latency means little without the state of the machine behind it: who else was computing, how
fast the processors ran, how much of them a hypervisor or a quota took away.

All of it is of the whole machine, or of what a container shows as such, except for the quota,
which is that of this process's control groups.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from heimdall_onnx.common.machine import control_groups

# Of one processor, for the looks between the first and the last.
_LARGEST_SHARE = 0.01
_IDLE = ("idle", "iowait")
_USER = ("user", "nice")
# Time of guests is counted in user and nice already, see proc_stat(5).
_UNCOUNTED = ("guest", "guest_nice")


@dataclass(frozen=True)
class MachineState:
    """The machine while it was watched.

    The shares are fractions of the time of all processors and sum to 1; all are None when the
    watch was shorter than the system's clock tick, mostly 10 ms.

    Attributes:
        seconds: How long it was watched.
        load_before: Load average over the last minute at the start.
        load_after: The same at the end.
        frequency_mhz: Lowest, median and highest frequency over all processors and samples, MHz;
            None where the machine does not tell. A virtual machine may tell a constant.
        user_share: Computing in user mode.
        system_share: In the kernel, interrupts included.
        idle_share: Idle, or waiting for input and output.
        steal_share: Ready to run while the hypervisor ran somebody else; None also where the
            system does not count it.
        throttled: Scheduling periods in which a CPU quota held back this process's control group
            or one above it; None where no such count is found.
        samples: How often the frequency was looked at.
    """

    seconds: float
    load_before: float
    load_after: float
    frequency_mhz: tuple[float, float, float] | None
    user_share: float | None
    system_share: float | None
    idle_share: float | None
    steal_share: float | None
    throttled: int | None
    samples: int

    @property
    def busy_share(self) -> float | None:
        """Computing, in user mode or the kernel, for whomever."""
        if self.user_share is None or self.system_share is None:
            return None
        return self.user_share + self.system_share


class MachineWatch:
    """Watches the machine from a thread of its own while the ``with`` block runs.

    It looks at the start, at the end and after every interval. Measured with 2 processors, a look
    takes 0.4 ms of processor time, 0.04% of one processor at an interval of a second. It grows
    with the number of processors; where it would exceed 1% of one, the watch looks less often.

    Args:
        interval_s: Seconds between two looks at the frequency, at least.

    Attributes:
        state: What was seen; there once the ``with`` block has ended.
    """

    state: MachineState

    def __init__(self, interval_s: float = 1.0) -> None:
        self._interval_s = interval_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="machine-watch", daemon=True)
        self._frequencies: list[list[float]] = []

    def __enter__(self) -> MachineWatch:
        """Take down the start and start to watch."""
        self._load = os.getloadavg()[0]
        self._throttled = throttled_periods()
        self._times = psutil.cpu_times()._asdict()
        self._started = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop and take down the end."""
        self._ended.set()
        self._thread.join()
        seconds = time.perf_counter() - self._started
        shares = _shares(self._times, psutil.cpu_times()._asdict())
        throttled = throttled_periods()
        load = os.getloadavg()[0]
        told = [frequency for look in self._frequencies for frequency in look]
        self.state = MachineState(
            seconds=seconds,
            load_before=self._load,
            load_after=load,
            frequency_mhz=(min(told), float(np.median(told)), max(told)) if told else None,
            **shares,
            throttled=(
                None
                if self._throttled is None or throttled is None
                else throttled - self._throttled
            ),
            samples=len(self._frequencies),
        )

    def _watch(self) -> None:
        ended = False
        while not ended:
            looked = time.thread_time()
            self._frequencies.append(processor_frequencies())
            pause = (time.thread_time() - looked) / _LARGEST_SHARE
            ended = self._ended.wait(max(self._interval_s, pause))
        self._frequencies.append(processor_frequencies())


def processor_frequencies() -> list[float]:
    """Frequency of each processor that tells it, MHz; empty where none does."""
    try:
        told = psutil.cpu_freq(percpu=True)
    except (AttributeError, OSError, RuntimeError, ValueError):
        # What psutil raises where a system has no such files, or not all of them.
        return []
    # A processor that is offline tells 0.
    return [processor.current for processor in told or () if processor.current > 0]


def _shares(before: dict[str, float], after: dict[str, float]) -> dict[str, float | None]:
    # The kernel may count waiting for input and output backwards, see proc_stat(5).
    spent = {
        state: max(0.0, seconds - before[state])
        for state, seconds in after.items()
        if state not in _UNCOUNTED
    }
    total = sum(spent.values())
    if not total:
        return dict.fromkeys(("user_share", "system_share", "idle_share", "steal_share"))
    user, idle = (sum(spent.pop(state, 0.0) for state in states) for states in (_USER, _IDLE))
    steal = spent.pop("steal", None)
    return {
        "user_share": user / total,
        "system_share": sum(spent.values()) / total,
        "idle_share": idle / total,
        "steal_share": None if steal is None else steal / total,
    }


def throttled_periods(root: Path = Path("/")) -> int | None:
    """Scheduling periods in which a CPU quota was used up, since the control groups were made.

    ``nr_throttled`` of ``cpu.stat`` (Linux, Documentation/admin-guide/cgroup-v2.rst and
    Documentation/scheduler/sched-bwc.rst), summed over the control group of this process and those
    above it, because each counts only its own quota.

    Args:
        root: Where the file system with ``proc`` and ``sys`` begins.

    Returns:
        The sum; None where no control group that can be seen counts it.
    """
    counted: dict[tuple[int, int], int] = {}
    for group in control_groups(root):
        file = group / "cpu.stat"
        try:
            lines, status = file.read_text().splitlines(), file.stat()
        except OSError:
            continue
        for line in lines:
            if line.startswith("nr_throttled "):
                # The same hierarchy may be mounted in several places.
                counted[status.st_dev, status.st_ino] = int(line.split()[1])
    return sum(counted.values()) if counted else None
