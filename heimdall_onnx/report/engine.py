"""papermill's engine, with a kernel that runs already.

papermill writes the whole file, with every figure so far, before and after each cell, prose
included, which took a second of a release. Here it is written as a cell of code begins, after the
last one or the one that failed, and, as by papermill, every half minute in which a cell prints:
when the runner is killed, the file says which cell of code began last and has all before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines

if TYPE_CHECKING:
    from jupyter_client.manager import AsyncKernelManager

ENGINE = "started-kernel"


class _Client(PapermillNotebookClient):  # type: ignore[misc]
    """Ends a kernel in which nothing runs any more at once, and any other gracefully."""

    def papermill_execute_cells(self) -> None:
        with _saved_as_code_begins(self.nb_man):
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


@contextmanager
def _saved_as_code_begins(nb_man: Any) -> Iterator[None]:
    save = nb_man.save

    def save_if_code_runs(**options: Any) -> None:
        if any(
            cell.cell_type == "code" and cell.metadata.papermill["status"] == nb_man.RUNNING
            for cell in nb_man.nb.cells
        ):
            save(**options)

    nb_man.save = save_if_code_runs
    try:
        yield
    finally:
        del nb_man.save  # papermill's own is its class's
        # A kernel may take its time to end what it was doing.
        nb_man.save()


papermill_engines.register(ENGINE, _Engine)
