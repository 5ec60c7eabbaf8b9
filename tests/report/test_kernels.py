"""Which interpreter a notebook runs in, and when its kernel ends."""

import json
import os
import subprocess
import sys
import time

import bare
import psutil
import pytest
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync

from heimdall_onnx.report import kernels
from heimdall_onnx.report.kernels import started_kernel
from heimdall_onnx.report.notebook import kernel_environment
from heimdall_onnx.services.settings import Settings


def processes():
    return {p.pid for p in psutil.Process().children()}


@pytest.fixture
def another(tmp_path, monkeypatch):
    """A kernel of the usual name that can't run."""
    folder = tmp_path / "kernels" / "python3"
    folder.mkdir(parents=True)
    spec = {"argv": ["/bin/false"], "display_name": "another", "language": "python"}
    (folder / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))


def test_no_other_kernel_of_the_same_name_is_taken(another):
    assert AsyncKernelManager(kernel_name="python3").kernel_spec.argv[0] == "/bin/false"
    with started_kernel(os.environ | {"HEIMDALL_TEST": "here"}) as kernel:
        process = psutil.Process(kernel.provisioner.pid)
        assert process.cmdline()[0] == sys.executable
        assert process.environ()["HEIMDALL_TEST"] == "here"
        assert kernel.get_connection_info()["transport"] == "ipc"


def test_kernel_below_a_deep_temporary_folder_is_reached_by_ports(tmp_path, monkeypatch):
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with started_kernel(os.environ) as kernel:
        client = kernel.client()
        client.start_channels()
        run_sync(client.wait_for_ready)(timeout=120)
        client.stop_channels()
    assert list(deep.iterdir()) == []


def test_kernel_is_told_the_settings_in_use_and_nothing_of_the_signer(monkeypatch, tmp_path):
    for name in ("KEY", "KEY_PASSWORD", "CERTIFICATE", "CERTIFICATE_CHAIN"):
        monkeypatch.setenv(f"HEIMDALL_SIGNING_{name}", str(tmp_path / "signer"))
    monkeypatch.setenv("HEIMDALL_HOME", "elsewhere")
    told = kernel_environment(Settings(_env_file=None).model_copy(update={"home": tmp_path}))
    assert told["HEIMDALL_HOME"] == str(tmp_path)
    assert [name for name in told if name.startswith("HEIMDALL_SIGNING")] == []


def test_kernel_ends_with_the_block_however_that_ends():
    before = processes()

    def fail():
        with started_kernel(os.environ):
            started.update(processes() - before)
            raise ValueError("no service")

    started = set()
    with pytest.raises(ValueError, match="no service"):
        fail()
    assert len(started) == 1
    assert processes() == before


def test_kernel_ends_when_its_start_is_interrupted(monkeypatch):
    class Interrupted(AsyncKernelManager):
        async def _async_post_start_kernel(self, **options):
            await super()._async_post_start_kernel(**options)
            raise KeyboardInterrupt

    monkeypatch.setattr(kernels, "AsyncKernelManager", Interrupted)
    before = processes()
    with pytest.raises(KeyboardInterrupt), started_kernel(os.environ):
        pass
    assert processes() == before


def test_kernel_ends_with_a_killed_runner_before_and_after_it_has_started(tmp_path):
    code = "import os, sys; from heimdall_onnx.report.kernels import started_kernel\n"
    code += "with started_kernel(os.environ) as kernel:\n"
    code += "    print(kernel.provisioner.pid, flush=True); sys.stdin.read()"
    for seconds in (0, 1.5):
        with subprocess.Popen(
            [sys.executable, "-c", code],
            env=bare.environment(tmp_path),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as runner:
            kernel = psutil.Process(int(runner.stdout.readline()))
            time.sleep(seconds)
            assert kernel.is_running()
            runner.kill()
        _, alive = psutil.wait_procs([kernel], timeout=60)
        assert alive == []
