"""What a killed process has started ends too."""

import os
import signal
import subprocess
import sys

import psutil
import pytest

from heimdall_onnx import orphans

CHILD = "import os, time; from heimdall_onnx.orphans import end_with; "


def test_child_ends_when_its_parent_is_killed():
    child = f"{CHILD}end_with(os.getppid()); print(os.getpid(), flush=True); time.sleep(600)"
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    with subprocess.Popen(
        [sys.executable, "-c", parent, child], stdout=subprocess.PIPE, text=True
    ) as process:
        orphan = psutil.Process(int(process.stdout.readline()))
        assert orphan.ppid() == process.pid
        process.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs([orphan], timeout=10)
    assert alive == []


def test_child_ends_when_its_parent_had_ended_before_it_looked():
    with subprocess.Popen([sys.executable, "-c", "pass"]) as ended:
        pass
    code = f"{CHILD}end_with({ended.pid}); time.sleep(600)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 1


def test_nothing_is_watched_where_the_system_can_not(monkeypatch):
    def refused(pid):
        raise PermissionError

    monkeypatch.setattr(os, "pidfd_open", refused)
    monkeypatch.setattr(orphans.threading, "Thread", lambda **_: pytest.fail("a thread"))
    orphans.end_with(os.getppid())
