"""Forked kernels: as fresh as started ones, and gone when they should be."""

import os
import signal
import subprocess
import sys
import time

import bare
import psutil
import pytest
from jupyter_core.utils import run_sync

from heimdall_onnx.common.errors import NotebookError
from heimdall_onnx.report.preload import ROOMS
from heimdall_onnx.report.warm_kernels import WarmKernels


@pytest.fixture
def kernels(warm_kernels):
    """Those that all tests fork their kernels from: another start would import everything anew."""
    return warm_kernels()


def ask(kernel, code: str) -> str:
    client = kernel.client()
    client.start_channels()
    try:
        run_sync(client.wait_for_ready)(timeout=60)
        said: list[str] = []
        run_sync(client.execute_interactive)(
            code, timeout=60, output_hook=lambda m: said.append(m["content"].get("text", ""))
        )
        return "".join(filter(None, said)).strip()
    finally:
        client.stop_channels()


def test_nothing_of_one_kernel_reaches_the_next(kernels):
    leave = (
        "import os, sys, json; json.left = kept = 1; os.environ['LEFT'] = '1'; print(os.getpid())"
    )
    look = (
        "import os, sys, json; print(hasattr(json, 'left'), 'kept' in dir(), 'LEFT' in os.environ)"
    )
    with kernels.started(os.environ) as kernel:
        assert int(ask(kernel, leave)) == kernel.provisioner.pid
    with kernels.started(os.environ) as kernel:
        assert ask(kernel, look) == "False False False"


def test_environment_and_folder_are_those_of_each_start(kernels, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with kernels.started({**os.environ, "HEIMDALL_TEST": "here"}) as kernel:
        said = ask(kernel, "import os; print(os.environ['HEIMDALL_TEST'], os.getcwd())")
    assert said == f"here {tmp_path}"
    with kernels.started(os.environ) as kernel:
        assert ask(kernel, "import os; print('HEIMDALL_TEST' in os.environ)") == "False"


def test_modules_are_looked_for_where_each_start_says(kernels, tmp_path):
    (tmp_path / "a_module_of_one_kernel.py").write_text("answer = 42")
    look = "import importlib.util as u; print(u.find_spec('a_module_of_one_kernel') is not None)"
    with kernels.started({**os.environ, "PYTHONPATH": str(tmp_path)}) as kernel:
        assert ask(kernel, look) == "True"
        assert ask(kernel, "import a_module_of_one_kernel as m; print(m.answer)") == "42"
    with kernels.started({**os.environ, "PYTHONPATH": ""}) as kernel:
        assert ask(kernel, look) == "False"


def test_imports_are_there_and_figures_appear_in_the_notebook(kernels):
    names = {"mlflow", "torch._dynamo", "networkx", *ROOMS}
    code = f"import sys; print({names} - sys.modules.keys())"
    with kernels.started(os.environ) as kernel:
        assert ask(kernel, code) == "set()"
        backend = ask(kernel, "import matplotlib; print(matplotlib.get_backend())")
        collected = ask(kernel, "import gc; print(gc.isenabled(), gc.get_freeze_count() > 100_000)")
    assert backend.endswith("matplotlib_inline.backend_inline")
    # A fork copies every page that the collector writes to.
    assert collected == "True True"


def test_two_run_at_once_and_each_ends_with_its_block(kernels):
    with kernels.started(os.environ) as one, kernels.started(os.environ) as other:
        pids = [one.provisioner.pid, other.provisioner.pid]
        assert [int(ask(k, "import os; print(os.getpid())")) for k in (one, other)] == pids
    _, alive = psutil.wait_procs([psutil.Process(p) for p in pids if psutil.pid_exists(p)], 60)
    assert alive == []


def test_kernel_that_dies_is_noticed(kernels):
    with kernels.started(os.environ) as kernel:
        ask(kernel, "1")
        psutil.Process(kernel.provisioner.pid).kill()
        deadline = time.monotonic() + 60
        while run_sync(kernel.is_alive)() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not run_sync(kernel.is_alive)()


def test_kernel_can_be_interrupted(kernels):
    with kernels.started(os.environ) as kernel:
        client = kernel.client()
        client.start_channels()
        run_sync(client.wait_for_ready)(timeout=60)
        request = client.execute("print(1, flush=True)\nimport time; time.sleep(600)")
        while run_sync(client.get_iopub_msg)(timeout=60)["msg_type"] != "stream":
            pass
        run_sync(kernel.interrupt_kernel)()
        reply = run_sync(client.get_shell_msg)(timeout=60)
        while reply["parent_header"]["msg_id"] != request:
            reply = run_sync(client.get_shell_msg)(timeout=60)
        assert reply["content"]["ename"] == "KeyboardInterrupt"
        client.stop_channels()


def test_signals_to_a_kernel_that_has_ended_are_no_error(kernels):
    with kernels.started(os.environ) as started:
        kernel = started.provisioner.process
        assert kernel.poll() is None
        kernel.kill()
        deadline = time.monotonic() + 60
        while kernel.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        kernel.kill()
        kernel.terminate()
        kernel.send_signal(signal.SIGINT)
        assert kernel.poll() == -1


def test_lost_template_is_replaced(tmp_path):
    environment = bare.environment(tmp_path)
    with WarmKernels(environment) as kernels:
        kernels.template.kill()
        kernels.template.wait()
        with kernels.started(environment) as kernel:
            assert ask(kernel, "print(6 * 7)") == "42"


def test_template_that_can_not_start_is_an_error_in_words():
    environment = {**os.environ, "PYTHONPATH": "", "PYTHONHOME": "/nowhere"}
    with (
        WarmKernels(environment) as warm,
        pytest.raises(NotebookError, match="the process that kernels are forked from has ended"),
        warm.started(os.environ),
    ):
        pass


def test_all_end_with_a_killed_runner(tmp_path):
    code = "import os, sys; from heimdall_onnx.report.warm_kernels import WarmKernels\n"
    code += "with WarmKernels(os.environ) as warm, warm.started(os.environ) as kernel:\n"
    code += "    print(warm.template.pid, kernel.provisioner.pid, flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env=bare.environment(tmp_path),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as runner:
        processes = [psutil.Process(int(pid)) for pid in runner.stdout.readline().split()]
        assert all(process.is_running() for process in processes)
        runner.kill()
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert alive == []
