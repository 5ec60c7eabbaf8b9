"""papermill's engine, with a kernel that runs already."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines

if TYPE_CHECKING:
    from jupyter_client.manager import AsyncKernelManager

ENGINE = "started-kernel"


class _Engine(NBClientEngine):  # type: ignore[misc]
    """Executes with a kernel that runs already, and ends it."""

    @classmethod
    def execute_managed_notebook(
        cls,
        nb_man: Any,
        kernel_name: str,
        *,
        kernel: AsyncKernelManager,
        execution_timeout: int | None = None,
        start_timeout: int = 60,
        **_: Any,
    ) -> Any:
        client = PapermillNotebookClient(
            nb_man,
            km=kernel,
            kernel_name=kernel_name,
            timeout=execution_timeout,
            startup_timeout=start_timeout,
            # All that matters of the kernel is in the notebook by then.
            shutdown_kernel="immediate",
        )
        client.owns_km = True
        return client.execute()


papermill_engines.register(ENGINE, _Engine)
