"""The notebook's kernel, started while the services are still being reached.

It takes seconds to import PyTorch, which wait for nothing that the runner does meanwhile.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning import LocalProvisioner
from jupyter_core.utils import run_sync

# Of a Unix socket's path, which each system takes; a temporary folder may be deeper.
_MAX_SOCKET_PATH = 100
# Takes the kernel's environment variables; the kernel ends with the block at the latest.
StartKernel = Callable[[Mapping[str, str]], AbstractContextManager[AsyncKernelManager]]


@contextmanager
def started_kernel(
    environment: Mapping[str, str],
    provision: Callable[[AsyncKernelManager], LocalProvisioner] | None = None,
) -> Iterator[AsyncKernelManager]:
    """A kernel of this interpreter that imports what the notebook will need.

    Outside a virtual environment of the user's own, Jupyter prefers a kernel ``python3`` that is
    registered in the home folder, whichever interpreter that one names; here none of these counts.

    It is spoken to over Unix sockets. TCP ports are picked seconds before the kernel takes them,
    and by then another process may have one; besides, every user of the machine reaches them.

    Args:
        environment: Its environment variables.
        provision: Makes what launches it, where that is not Jupyter's own.

    Yields:
        The running kernel, which ends with the block at the latest.
    """
    kernel = AsyncKernelManager(
        kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[])
    )
    if provision is not None:
        kernel.provisioner = provision(kernel)
    with tempfile.TemporaryDirectory(prefix="kernel-") as folder:
        kernel.connection_file = f"{folder}/kernel.json"
        if len(os.fsencode(folder)) < _MAX_SOCKET_PATH:
            kernel.transport, kernel.ip = "ipc", f"{folder}/s"
        try:
            run_sync(kernel.start_kernel)(
                extra_arguments=[
                    # It prints a traceback when it is interrupted, and warns of TCP; what matters
                    # of it is in the notebook.
                    "--IPKernelApp.log_level=CRITICAL",
                    "--HistoryManager.hist_file=:memory:",
                    f"--IPKernelApp.extra_extensions={__package__}.preload",
                ],
                env=dict(environment),
            )
            yield kernel
        finally:
            if kernel.has_kernel:
                run_sync(kernel.shutdown_kernel)(now=True)
