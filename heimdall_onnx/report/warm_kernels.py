"""Kernels that begin with everything imported, as forks of one process that has done it once.

What a kernel needs takes seconds of processor time to import, most of a small model's release.
Whoever releases many pays that once: ``python -m heimdall_onnx.report.warm_kernels`` imports, and
forks when it is asked to. Each kernel is still a process of its own that ends with its notebook,
and a model's code is imported after the fork only, so nothing of one release reaches the next.

Before a fork libraries have been imported, and nothing was computed, connected or opened: there are
no threads but OpenBLAS's, which the child starts anew, and no CUDA context.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from functools import partialmethod
from pathlib import Path
from typing import Any, TextIO

import psutil
from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning import LocalProvisioner

from heimdall_onnx.common.errors import NotebookError
from heimdall_onnx.report.kernels import started_kernel

# Beside the rooms of the release notebook: what is imported by the first use of it.
_LIBRARIES = (
    "ipykernel.kernelapp",
    "matplotlib_inline.backend_inline",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.store.model_registry.sqlalchemy_store",
    "heimdall_onnx.services.registry",
    "heimdall_onnx.archive.mlmodel",
    "torch.onnx._internal.exporter._core",
    # What the exporter imports as it exports, half of its time for a small model.
    "torch.export._trace",
    "networkx",
    "onnxscript.function_libs.torch_lib.ops",
    "scrapbook",
)


class WarmKernels:
    """Starts kernels for one notebook after another; the process they are forks of ends with it.

    Args:
        environment: Environment variables with which the libraries are imported.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = dict(environment)
        self._lock = threading.Lock()
        self.template = self._launch()

    def _launch(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", __spec__.name],
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Ctrl-C is for the runner, which ends each kernel as it sees fit.
            start_new_session=True,
        )

    def __enter__(self) -> WarmKernels:
        """Nothing is waited for: the first kernel waits for the imports."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the template; kernels that still run end by themselves or with this process."""
        self._end_template()

    def _end_template(self) -> None:
        assert self.template.stdin is not None
        assert self.template.stdout is not None
        with suppress(OSError):
            self.template.stdin.close()
        try:
            self.template.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.template.kill()
            self.template.wait()
        self.template.stdout.close()

    def started(self, environment: Mapping[str, str]) -> AbstractContextManager[AsyncKernelManager]:
        """As `report.kernels.started_kernel`.

        Raises:
            NotebookError: If no kernel can be forked.
        """
        return started_kernel(
            environment,
            lambda kernel: _Provisioner(
                kernels=self, kernel_spec=kernel.kernel_spec, parent=kernel
            ),
        )

    def fork(self, arguments: list[str], environment: Mapping[str, str], folder: str) -> int:
        """The process number of a new kernel."""
        asked = {"arguments": arguments, "environment": dict(environment), "folder": folder}
        with self._lock:
            if self.template.poll() is not None:
                # Killed, as where memory is short: this kernel need not be lost with it.
                self._end_template()
                self.template = self._launch()
            assert self.template.stdin is not None
            assert self.template.stdout is not None
            try:
                self.template.stdin.write(json.dumps(asked) + "\n")
                self.template.stdin.flush()
                return int(self.template.stdout.readline())
            except (OSError, ValueError) as error:
                raise NotebookError(
                    "the notebook's kernel did not start: the process that kernels are forked "
                    f"from has ended with {self.template.poll()}"
                ) from error


class _Forked(psutil.Process):
    """A kernel as `subprocess.Popen` shows one; how it ended is known to its parent only."""

    stdin = stdout = stderr = None

    def poll(self) -> int | None:
        """None while it runs."""
        with suppress(psutil.NoSuchProcess):
            if self.is_running() and self.status() != psutil.STATUS_ZOMBIE:
                return None
        return -1

    def wait(self, _: float | None = None) -> int:
        """Only called for one that has ended."""
        return self.poll() or 0

    def send_signal(self, number: int) -> None:
        """Send a signal; none where it has ended."""
        with suppress(psutil.NoSuchProcess):
            super().send_signal(number)

    # psutil's own send it another way.
    terminate = partialmethod(send_signal, signal.SIGTERM)
    kill = partialmethod(send_signal, signal.SIGKILL)


class _Provisioner(LocalProvisioner):  # type: ignore[misc]
    """Forks a kernel where Jupyter's own would start one."""

    def __init__(self, *, kernels: WarmKernels, **options: Any) -> None:
        super().__init__(**options)
        self._kernels = kernels

    async def launch_kernel(self, cmd: list[str], **options: Any) -> dict[str, Any]:
        # [python, -m, ipykernel_launcher, arguments…]; the parent's number is what it ends with.
        environment = {**options["env"], "JPY_PARENT_PID": str(os.getpid())}
        folder = options.get("cwd") or str(Path.cwd())
        # The first one waits until all is imported.
        pid = await asyncio.to_thread(self._kernels.fork, cmd[3:], environment, folder)
        try:
            self.process = _Forked(pid)
        except psutil.NoSuchProcess as error:
            raise NotebookError("the notebook's kernel ended as it began") from error
        self.pid = self.pgid = pid
        self.cwd = folder
        info: dict[str, Any] = self.connection_info
        return info


def serve(questions: TextIO, answers: TextIO) -> None:
    """Fork a kernel for each line of ``questions`` and answer with its process number."""
    from heimdall_onnx.report.preload import ROOMS, import_for_good

    # As a kernel's, which sets it before anything is imported.
    os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    # Whatever can't be imported is left for the notebook's own cell to fail on.
    import_for_good((*ROOMS, *_LIBRARIES))
    # Where modules are besides, as a kernel's own environment says.
    own = {"", *sys.path[:1], *_paths(os.environ)}
    base = [path for path in sys.path if path not in own]
    # Ended kernels are nobody's to wait for.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in questions:
        with warnings.catch_warnings():
            # Python counts OpenBLAS's threads as well.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            questions.close()
            answers.close()
            _become_kernel(base, **json.loads(line))
            os._exit(0)
        answers.write(f"{pid}\n")
        answers.flush()


def _paths(environment: Mapping[str, str]) -> list[str]:
    return [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]


def _become_kernel(
    base: list[str], arguments: list[str], environment: dict[str, str], folder: str
) -> None:
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:] = [*_paths(environment), *base]
    sys.argv = ["ipykernel_launcher", *arguments]
    from ipykernel.kernelapp import launch_new_instance

    launch_new_instance(argv=arguments)


def main() -> None:
    """Serve over the standard streams; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with answers:
        serve(sys.stdin, answers)
    # To take apart what was imported would take Python seconds.
    os._exit(0)


if __name__ == "__main__":
    main()
