import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
from proxy import wait_for

from heimdall_onnx.common import processes
from heimdall_onnx.common.errors import BenchmarkError, DataError, EvidenceError
from heimdall_onnx.common.processes import WorkerProcess


def double(values):
    return os.getpid(), 2 * values


def refuse(words):
    raise DataError(words)


def begin_and_sleep(begun):
    begun.touch()
    time.sleep(600)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def test_work_is_done_by_one_other_process():
    with WorkerProcess() as process:
        first, values = process(double, np.arange(3))
        second, _ = process(double, values=np.ones(1))
        assert values.tolist() == [0, 2, 4]
        assert first == second != os.getpid()
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


def test_its_errors_are_raised_here():
    with WorkerProcess() as process:
        with pytest.raises(DataError, match="found nothing"):
            process(refuse, "found nothing")
        assert process(double, 1)[1] == 2


def test_a_process_that_dies_is_named_with_what_it_did():
    with WorkerProcess() as process:
        with pytest.raises(BenchmarkError, match="process of die ended"):
            process(die)
        # What comes next is not its fault.
        assert process(double, 1)[1] == 2
    assert issubclass(BenchmarkError, EvidenceError)


def test_what_is_under_way_ends_with_the_block(tmp_path):
    begun = tmp_path / "begun"
    with ThreadPoolExecutor(1) as beside:
        with WorkerProcess() as process:
            asked = beside.submit(process, begin_and_sleep, begun)
            assert wait_for(begun.exists, 60)
        assert isinstance(asked.exception(timeout=60), BenchmarkError)


CHILD = "import os, time; from heimdall_onnx.common.processes import exit_with_process; "


def test_child_ends_when_its_parent_is_killed():
    child = (
        f"{CHILD}exit_with_process(os.getppid()); print(os.getpid(), flush=True); time.sleep(600)"
    )
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    with subprocess.Popen(
        [sys.executable, "-c", parent, child], stdout=subprocess.PIPE, text=True
    ) as process:
        orphan = psutil.Process(int(process.stdout.readline()))
        assert orphan.ppid() == process.pid
        process.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs([orphan], timeout=60)
    assert alive == []


def test_child_ends_when_its_parent_had_ended_before_it_looked():
    with subprocess.Popen([sys.executable, "-c", "pass"]) as ended:
        pass
    code = f"{CHILD}exit_with_process({ended.pid}); time.sleep(600)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 1


def test_nothing_is_watched_where_the_system_can_not(monkeypatch):
    def refused(pid):
        raise PermissionError

    monkeypatch.setattr(os, "pidfd_open", refused)
    monkeypatch.setattr(processes.threading, "Thread", lambda **_: pytest.fail("a thread"))
    processes.exit_with_process(os.getppid())
