"""papermill's engine, with a kernel that runs already."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines

if TYPE_CHECKING:
    from jupyter_client.manager import AsyncKernelManager

ENGINE = "started-kernel"


class _Client(PapermillNotebookClient):  # type: ignore[misc]
    """Ends a kernel in which nothing runs any more at once, and any other gracefully."""

    def papermill_execute_cells(self) -> None:
        super().papermill_execute_cells()
        # Not reached where a cell ran out of time or was interrupted: that cell must get the time
        # to leave nothing behind.
        self.shutdown_kernel = "immediate"


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
        client = _Client(
            nb_man,
            km=kernel,
            kernel_name=kernel_name,
            timeout=execution_timeout,
            startup_timeout=start_timeout,
        )
        client.owns_km = True
        return client.execute()


papermill_engines.register(ENGINE, _Engine)
