"""What a process gets of its machine, from control groups and processors as Linux shows them."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from heimdall_onnx.common.machine import (
    instruction_sets,
    last_level_cache_bytes,
    physical_cores,
    processor_quota,
    usable_processors,
)

V2 = "31 23 0:28 / /sys/fs/cgroup rw,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "32 31 0:29 {root} /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct"
MEMORY = "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
CPUINFO = "processor\t: 0\nmodel name\t: A processor\n{key}\t\t: {flags}\nbugs\t\t: fma4 sve\n\n"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def unified(root: Path, own: str, **limits: str) -> Path:
    """A system with version 2 alone; ``limits`` by group, ``_`` for the outermost one."""
    files = {"proc/self/cgroup": f"0::{own}\n", "proc/self/mountinfo": f"{MEMORY}\n{V2}\n"}
    for group, limit in limits.items():
        folder = "" if group == "_" else f"{group.replace('__', '/')}/"
        files[f"sys/fs/cgroup/{folder}cpu.max"] = f"{limit}\n"
    return write(root, files)


def split(root: Path, own: str, shown: str, limits: dict[str, tuple[int, int]]) -> Path:
    """A system with version 1, whose mount shows the hierarchy from the group ``shown`` on."""
    files = {
        "proc/self/cgroup": f"8:memory:/elsewhere\n4:cpu,cpuacct:{own}\n0::/\n",
        "proc/self/mountinfo": f"{MEMORY}\n{V1.format(root=shown)}\n",
    }
    for group, (quota, period) in limits.items():
        folder = f"sys/fs/cgroup/cpu,cpuacct/{group}"
        files[f"{folder}/cpu.cfs_quota_us"] = f"{quota}\n"
        files[f"{folder}/cpu.cfs_period_us"] = f"{period}\n"
    return write(root, files)


@pytest.mark.parametrize(
    ("limits", "quota"),
    [
        ({"job": "150000 100000"}, 1.5),
        ({"job": "max 100000"}, math.inf),
        ({"job": "max 100000", "_": "50000 100000"}, 0.5),
        ({"job": "400000 100000", "_": "300000 100000"}, 3.0),
        ({"neighbour": "100000 100000"}, math.inf),
        ({}, math.inf),
    ],
)
def test_smallest_quota_around_the_process_counts(tmp_path, limits, quota) -> None:
    assert processor_quota(unified(tmp_path, "/job", **limits)) == quota


def test_groups_are_walked_from_the_own_one_up_to_the_mount(tmp_path) -> None:
    limits = {"a__b__c": "max 100000", "a__b": "250000 100000", "a": "max 100000"}
    assert processor_quota(unified(tmp_path, "/a/b/c", **limits)) == 2.5


@pytest.mark.parametrize(
    ("own", "shown", "limits", "quota"),
    [
        ("/job", "/", {"job": (200000, 50000)}, 4.0),
        ("/job", "/", {"job": (-1, 100000), ".": (-1, 100000)}, math.inf),
        # A container that sees its own group as the whole hierarchy.
        ("/docker/0123", "/docker/0123", {".": (70000, 100000)}, 0.7),
        ("/docker/0123/inner", "/docker/0123", {"inner": (-1, 100000), ".": (1, 2)}, 0.5),
        # Its group lies outside of what it sees.
        ("/../../outside", "/docker/0123", {".": (300000, 100000)}, 3.0),
    ],
)
def test_quotas_of_version_1_are_read(tmp_path, own, shown, limits, quota) -> None:
    assert processor_quota(split(tmp_path, own, shown, limits)) == quota


def test_controllers_of_both_versions_may_stand_beside_each_other(tmp_path) -> None:
    split(tmp_path, "/job", "/", {"job": (200000, 100000)})
    mounts = tmp_path / "proc/self/mountinfo"
    mounts.write_text(mounts.read_text() + V2.replace("cgroup rw", r"my\040groups rw"))
    assert processor_quota(tmp_path) == 2.0
    write(tmp_path, {"sys/fs/my groups/cpu.max": "100000 100000\n"})
    assert processor_quota(tmp_path) == 1.0


@pytest.mark.parametrize(
    ("limit", "processors"), [("100 100000", 1), ("100000 100000", 1), ("max 100000", None)]
)
def test_usable_processors_are_whole_and_never_beyond_the_affinity(
    tmp_path, limit, processors
) -> None:
    affinity = len(os.sched_getaffinity(0))
    assert usable_processors(unified(tmp_path, "/", _=limit)) == (processors or affinity)


def test_a_part_of_a_processor_counts_as_one_more(tmp_path) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("this machine has one processor")
    assert usable_processors(unified(tmp_path, "/", _="110000 100000")) == 2


def test_hardware_threads_of_a_core_are_together(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 5, 7, 8})
    siblings = {0: "0,2", 2: "0,2", 1: "1,3", 3: "1,3", 5: "4-5", 8: "8"}
    places = {
        f"sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list": f"{text}\n"
        for number, text in siblings.items()
    }
    write(tmp_path, places)
    assert physical_cores(tmp_path) == [(0, 2), (1, 3), (5,), (7,), (8,)]


def test_affinity_bounds_the_processors() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from heimdall_onnx.common.machine import usable_processors\n"
        "assert usable_processors() == 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_this_system_is_read() -> None:
    assert 1 <= usable_processors() <= len(os.sched_getaffinity(0))
    assert processor_quota() > 0
    assert instruction_sets()
    assert last_level_cache_bytes() >= 0


def test_without_any_of_these_files_nothing_is_claimed(tmp_path) -> None:
    assert processor_quota(tmp_path) == math.inf
    assert instruction_sets(tmp_path) == ()
    assert last_level_cache_bytes(tmp_path) == 0


@pytest.mark.parametrize(
    ("key", "flags", "found"),
    [
        ("flags", "sse2 fma avx2 avx512f amx_bf16", ("avx2", "fma", "avx512f", "amx_bf16")),
        ("flags", "sse2 avx512_vnni_not fma4 avx", ()),
        ("Features", "fp asimd asimddp bf16 i8mm", ("asimd", "asimddp", "i8mm", "bf16")),
    ],
)
def test_instruction_sets_that_matter_are_named(tmp_path, key, flags, found) -> None:
    write(tmp_path, {"proc/cpuinfo": CPUINFO.format(key=key, flags=flags) * 2})
    assert instruction_sets(tmp_path) == found


def test_only_what_every_core_has_counts(tmp_path) -> None:
    cores = [CPUINFO.format(key="Features", flags=f) for f in ("asimd bf16 sve", "asimd bf16")]
    assert instruction_sets(write(tmp_path, {"proc/cpuinfo": "".join(cores)})) == ("asimd", "bf16")


def test_last_level_caches_count_once_however_many_share_them(tmp_path) -> None:
    first, *others = sorted(os.sched_getaffinity(0))
    shared = f"{first}-{[first, *others][-1]}"
    for processor in (first, *others):
        caches = [
            ("1", "Data", "32K", str(processor)),
            ("1", "Instruction", "64K", str(processor)),
            ("2", "Unified", "512K", str(processor)),
            ("3", "Unified", "32768K", shared),
        ]
        for index, values in enumerate(caches):
            folder = f"sys/devices/system/cpu/cpu{processor}/cache/index{index}"
            names = ("level", "type", "size", "shared_cpu_list")
            pairs = zip(names, values, strict=True)
            write(tmp_path, {f"{folder}/{name}": f"{value}\n" for name, value in pairs})
    assert last_level_cache_bytes(tmp_path) == 32 << 20


def test_separate_last_level_caches_add_up(tmp_path) -> None:
    processors = os.sched_getaffinity(0)
    for processor in processors:
        folder = f"sys/devices/system/cpu/cpu{processor}/cache/index2"
        files = {"level": "2", "type": "Unified", "size": "1024K", "shared_cpu_list": processor}
        write(tmp_path, {f"{folder}/{name}": f"{value}\n" for name, value in files.items()})
    assert last_level_cache_bytes(tmp_path) == len(processors) << 20
