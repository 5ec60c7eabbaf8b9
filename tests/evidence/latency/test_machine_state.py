"""The state of the machine: read from the real one, and from files with known numbers."""

import json
import os
import threading
import time
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from heimdall_onnx.evidence.latency import machine_state as machine_watch
from heimdall_onnx.evidence.latency.machine_state import (
    MachineWatch,
    throttled_periods,
)

CPUS = Path("/sys/devices/system/cpu")
SHARES = ("user_share", "system_share", "idle_share", "steal_share")
# user, nice, system, idle, iowait, irq, softirq, steal, guest, guest_nice; in ticks
TICKS = (1000, 100, 300, 5000, 200, 10, 20, 70, 400, 50)


@pytest.fixture
def proc(tmp_path, monkeypatch):
    """A function that writes what /proc/stat says of all processors."""
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))

    def write(ticks):
        (tmp_path / "stat").write_text(f"cpu  {' '.join(map(str, ticks))}\nintr 1\n")

    write(TICKS)
    (tmp_path / "cpuinfo").write_text("")
    return write


def spin(seconds):
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends:
        pass


def test_real_machine():
    with MachineWatch(interval_s=0.1) as watch:
        spin(0.5)
    state = watch.state
    assert 0.5 <= state.seconds < 5
    assert state.load_before >= 0
    assert state.load_after >= 0
    if state.frequency_mhz is not None:
        lowest, middle, highest = state.frequency_mhz
        assert 100 < lowest <= middle <= highest < 10_000
    shares = [getattr(state, name) or 0 for name in SHARES]
    assert all(0 <= share <= 1 for share in shares)
    assert sum(shares) == pytest.approx(1)
    # One processor was busy all the time; a shared machine may not let it be.
    assert state.busy_share > 0.2 / os.cpu_count()
    assert state.throttled is None or state.throttled >= 0
    # At the start, at the end and meanwhile.
    assert 3 <= state.samples <= 3 + state.seconds / 0.1
    json.dumps(asdict(state))


def test_looks_at_start_and_end_of_a_short_measurement():
    with MachineWatch(interval_s=60) as watch:
        pass
    assert watch.state.samples == 2
    assert watch.state.seconds < 5


def test_error_of_the_measurement_comes_through_and_the_thread_ends():
    with pytest.raises(ZeroDivisionError), MachineWatch(interval_s=60) as watch:
        _ = 1 / 0
    assert watch.state.samples == 2
    assert "machine-watch" not in {thread.name for thread in threading.enumerate()}


def test_shares_are_those_of_the_time_between(proc):
    spent = (400, 100, 150, 200, 50, 20, 30, 50, 300, 0)
    with MachineWatch() as watch:
        proc([a + b for a, b in zip(TICKS, spent, strict=True)])
    state = watch.state
    # Guests are not counted twice; waiting is idle; interrupts are the kernel's.
    assert [getattr(state, name) for name in SHARES] == pytest.approx([0.5, 0.2, 0.25, 0.05])
    assert state.busy_share == pytest.approx(0.7)


def test_waiting_time_that_runs_backwards_is_none(proc):
    with MachineWatch() as watch:
        proc([*TICKS[:3], TICKS[3] + 100, TICKS[4] - 50, *TICKS[5:]])
    assert (watch.state.idle_share, watch.state.busy_share) == (1, 0)


def test_no_shares_within_one_tick(proc):
    with MachineWatch() as watch:
        pass
    assert [getattr(watch.state, name) for name in SHARES] == [None] * 4
    assert watch.state.busy_share is None


def test_no_frequency_where_the_machine_tells_none(monkeypatch):
    def refuse(percpu):
        raise NotImplementedError("can't find current frequency file")

    monkeypatch.setattr(psutil, "cpu_freq", refuse)
    assert machine_watch.processor_frequencies() == []
    # On some systems psutil has no such function at all.
    monkeypatch.delattr(psutil, "cpu_freq")
    with MachineWatch() as watch:
        pass
    assert watch.state.frequency_mhz is None


def test_looks_that_take_long_become_rare(monkeypatch):
    def compute(percpu):
        ends = time.thread_time() + 0.02
        while time.thread_time() < ends:
            pass
        return []

    monkeypatch.setattr(psutil, "cpu_freq", compute)
    with MachineWatch(interval_s=0.01) as watch:
        time.sleep(0.5)
    # A hundred times 20 ms later would be the next.
    assert watch.state.samples == 2


@pytest.mark.skipif(
    any((CPUS / name).exists() for name in ("cpufreq/policy0", "cpu0/cpufreq")),
    reason="there psutil asks the kernel and not the file written here",
)
def test_frequency_is_lowest_median_and_highest_of_all_processors(proc, tmp_path):
    told = "".join(f"cpu MHz\t\t: {mhz}\n" for mhz in (1200.0, 3100.0, 0.0, 2900.0))
    (tmp_path / "cpuinfo").write_text(told)
    with MachineWatch() as watch:
        pass
    assert watch.state.frequency_mhz == (1200, 2900, 3100)


# Quotas


@pytest.fixture
def groups(tmp_path):
    """A function that makes a file system with control groups and says what is throttled."""

    def make(cgroup, mounts, stats):
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(cgroup)
        (tmp_path / "proc/self/mountinfo").write_text(mounts)
        for folder, text in stats.items():
            path = tmp_path / folder
            path.mkdir(parents=True, exist_ok=True)
            (path / "cpu.stat").write_text(text)
        return throttled_periods(tmp_path)

    return make


ROOTED = "29 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n"
FIRST_VERSION = (
    "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"
    "32 31 0:29 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"
    "33 31 0:30 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
)


def stat(throttled):
    return f"usage_usec 5\nnr_periods 90\nnr_throttled {throttled}\nthrottled_usec 12\n"


def test_quotas_of_the_group_and_those_above_it_count(groups):
    stats = {"a/b": stat(3), "a": stat(40), "": "usage_usec 5\n", "other": stat(500)}
    stats = {f"sys/fs/cgroup/{name}": text for name, text in stats.items()}
    assert groups("0::/a/b\n", ROOTED, stats) == 43


def test_first_version(groups):
    stats = {
        "sys/fs/cgroup/cpu,cpuacct/a": "nr_periods 5\nnr_throttled 2\nthrottled_time 7\n",
        "sys/fs/cgroup/cpuset/a": stat(100),
    }
    assert groups("4:cpuset:/a\n3:cpu,cpuacct:/a\n0::/a\n", FIRST_VERSION, stats) == 2


def test_container_that_sees_only_the_end_of_the_hosts_path(groups):
    mounts = "29 23 0:26 /pods/x /sys/fs/cgroup ro - cgroup2 cgroup rw\n"
    stats = {"sys/fs/cgroup": stat(6), "sys/fs/cgroup/inner": stat(1)}
    assert groups("0::/pods/x/inner\n", mounts, stats) == 7


def test_container_whose_path_is_not_mounted_at_all(groups):
    mounts = "29 23 0:26 /docker/y /sys/fs/cgroup ro - cgroup2 cgroup rw\n"
    assert groups("0::/elsewhere\n", mounts, {"sys/fs/cgroup": stat(6)}) == 6


def test_hierarchy_that_is_mounted_twice_counts_once(groups, tmp_path):
    again = ROOTED.replace("/sys/fs/cgroup", "/run")
    (tmp_path / "run").symlink_to(tmp_path / "sys/fs/cgroup")
    stats = {"sys/fs/cgroup/a": stat(6), "sys/fs/cgroup": stat(1)}
    assert groups("0::/a\n", ROOTED + again, stats) == 7


def test_none_where_nothing_counts(groups, tmp_path):
    assert throttled_periods(tmp_path / "nowhere") is None
    assert groups("0::/\n", ROOTED, {"sys/fs/cgroup": "usage_usec 5\n"}) is None


def test_real_groups_can_be_read():
    assert (throttled_periods() or 0) >= 0
