"""The notebook's kernel, started while the services are still being reached.

It takes seconds to import PyTorch, which wait for nothing that the runner does meanwhile. Which
interpreter it runs is not left to the kernels that happen to be installed: it is this one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync


class _ThisInterpreter(AsyncKernelManager):  # type: ignore[misc]
    """A kernel of the running interpreter, whatever `jupyter kernelspec` knows."""

    @property
    def kernel_spec(self) -> KernelSpec:
        """How the kernel is started."""
        return KernelSpec(**get_kernel_dict())


@contextmanager
def started_kernel(environment: Mapping[str, str]) -> Iterator[AsyncKernelManager]:
    """A kernel that imports what the notebook will need; ended with the block at the latest.

    Args:
        environment: Its environment variables.
    """
    kernel = _ThisInterpreter(kernel_name="python3")
    run_sync(kernel.start_kernel)(
        extra_arguments=[
            # It warns of unencrypted TCP, which stays on loopback, and prints a traceback when it
            # is interrupted; what matters of it is in the notebook.
            "--IPKernelApp.log_level=CRITICAL",
            "--HistoryManager.hist_file=:memory:",
            f"--IPKernelApp.extra_extensions={__package__}.preload",
        ],
        env=dict(environment),
    )
    try:
        yield kernel
    finally:
        if kernel.has_kernel:
            run_sync(kernel.shutdown_kernel)(now=True)
