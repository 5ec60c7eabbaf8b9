"""What this process really gets of the machine: processors, instruction sets, cache.

A container sees every processor of its machine and may use the time of two. Threads beyond that
only wait for each other, so everything here that takes a number of threads starts from
`usable_processors`.

Every function takes the root of the file system that it reads, ``/`` unless told otherwise.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

_DOT_PRODUCTS = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"}
_ROOT = Path("/")
_UNIFIED = "cgroup2"  # file system type of control groups, version 2

# As Linux writes them in /proc/cpuinfo, x86 first, then ARM. Only what decides which kernels an
# inference library picks: vector width, fused multiplication, dot products of 8-bit integers,
# bfloat16, matrix tiles.
_MATTER = (
    "avx2",
    "fma",
    "avx512f",
    "avx_vnni",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)


def usable_processors(root: Path = _ROOT) -> int:
    """Processors that this process really gets, at least 1.

    The smaller of its affinity, see sched_setaffinity(2), and its `processor_quota`, rounded up.
    """
    affinity = len(os.sched_getaffinity(0))
    return max(1, math.ceil(min(affinity, processor_quota(root))))


def physical_cores(root: Path = _ROOT) -> list[tuple[int, ...]]:
    """The processors of this process's affinity, those of one physical core together.

    Two hardware threads of a core share its units, so what runs on both at a time is slower on
    each. Where the system does not tell, each processor counts as a core.
    """
    found: dict[str, list[int]] = {}
    for processor in sorted(os.sched_getaffinity(0)):
        topology = root / f"sys/devices/system/cpu/cpu{processor}/topology"
        siblings = "".join(_lines(topology / "thread_siblings_list"))
        found.setdefault(siblings or str(processor), []).append(processor)
    return [tuple(numbers) for numbers in found.values()]


def processor_quota(root: Path = _ROOT) -> float:
    """Processor time that the control groups of this process allow it, in processors.

    The smallest quota of the process's own group and of those around it, as far as they can be
    seen from here; infinity without any. Both versions of control groups are read: ``cpu.max``
    (Linux, Documentation/admin-guide/cgroup-v2.rst) and ``cpu.cfs_quota_us`` over
    ``cpu.cfs_period_us`` (Documentation/scheduler/sched-bwc.rst).
    """
    return min(map(_quota, control_groups(root)), default=math.inf)


def control_groups(root: Path) -> Iterator[Path]:
    """Folders of the control groups that bound this process's time, the innermost first."""
    own = {}
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, path = line.split(":", 2)
        if number == "0":
            own[_UNIFIED] = path
        elif "cpu" in controllers.split(","):
            own["cgroup"] = path
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        if kind not in own or (kind != _UNIFIED and "cpu" not in options.split(",")):
            continue
        shown, mount = map(_unescape, before.split(" ")[3:5])
        # What is mounted may be a part of the hierarchy, the container's own group for example;
        # a group outside of that part can't be seen.
        inside = os.path.relpath(own[kind], shown)
        below = Path() if inside.startswith("..") else Path(inside)
        for part in (below, *below.parents):
            yield root / mount.lstrip("/") / part


def _quota(group: Path) -> float:
    unified = _lines(group / "cpu.max")
    quota, period = (
        unified[0].split()
        if unified
        else ["".join(_lines(group / f"cpu.cfs_{name}_us")) for name in ("quota", "period")]
    )
    # Unbounded groups hold "max" or -1, the outermost one nothing at all.
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() else math.inf


def instruction_sets(root: Path = _ROOT) -> tuple[str, ...]:
    """The processor's instruction sets that matter for inference, as ``/proc/cpuinfo`` names them.

    Where its cores differ, those that every core has.
    """
    cores = [
        set(line.partition(":")[2].split())
        for line in _lines(root / "proc/cpuinfo")
        if re.match(r"(flags|Features)\s*:", line)
    ]
    everywhere = set.intersection(*cores) if cores else set()
    return tuple(name for name in _MATTER if name in everywhere)


def multiplies_in_8_bits(sets: Collection[str] | None = None) -> bool:
    """Whether a processor has instructions for products of 8-bit integers.

    Args:
        sets: Its instruction sets; this one's by default.
    """
    return bool(_DOT_PRODUCTS & set(instruction_sets() if sets is None else sets))


def last_level_cache_bytes(root: Path = _ROOT) -> int:
    """Size of all last-level caches that this process's processors reach, bytes; 0 if unknown.

    A cache that several processors share counts once.
    """
    found: dict[tuple[int, str], int] = {}
    for processor in os.sched_getaffinity(0):
        for cache in (root / f"sys/devices/system/cpu/cpu{processor}/cache").glob("index*"):
            level, kind, size, shared = (
                "".join(_lines(cache / name))
                for name in ("level", "type", "size", "shared_cpu_list")
            )
            if kind != "Instruction" and level.isdecimal() and re.fullmatch(r"\d+K", size):
                found[int(level), shared] = 1024 * int(size[:-1])
    last = max((level for level, _ in found), default=0)
    return sum(size for (level, _), size in found.items() if level == last)


def _lines(path: Path) -> list[str]:
    """The lines of a file; none where there is no such file, or it may not be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _unescape(text: str) -> str:
    """A path as it is: /proc writes blanks and backslashes in octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


PROC_SELF = Path("/proc/self")


def peak_memory_bytes() -> int:
    """Largest resident size of this process since it began, or since `reset_peak_memory`.

    Raises:
        OSError: If the system does not tell.
    """
    # getrusage's ru_maxrss would start from the parent's size at the fork.
    for line in (PROC_SELF / "status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM line")


def reset_peak_memory() -> None:
    """Begin a new peak at the present resident size, where the system allows it."""
    # See proc(5), clear_refs. Where it is refused, peaks are those since the process began.
    with contextlib.suppress(OSError):
        (PROC_SELF / "clear_refs").write_text("5")
