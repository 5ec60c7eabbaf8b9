"""A notebook's run in a kernel that is up already, judged by the file that it leaves."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heimdall_onnx.archive.record import RECORD
from heimdall_onnx.common.errors import HeimdallError, NotebookError, error_class
from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.report.judge import NO_CELL, Judgement, judge_notebook, last_started
from heimdall_onnx.services.settings import Settings

if TYPE_CHECKING:
    from jupyter_client.manager import AsyncKernelManager
    from pydantic import BaseModel

log = get_logger(__name__)

# The kernel imports PyTorch before it answers, which takes minutes from a cold network disk.
_KERNEL_START_S = 600
# Far beyond an audit of a large model; what takes longer hangs.
_CELL_TIMEOUT_S = 6 * 3600


def execute_notebook(
    notebook: Path,
    report: Path,
    parameters: BaseModel,
    kernel: AsyncKernelManager,
    *,
    record: str = RECORD,
    cell_timeout: int | None = None,
    progress: bool = False,
) -> Judgement:
    """Run a notebook and judge the executed file.

    Args:
        notebook: The notebook.
        report: Where the executed notebook goes.
        parameters: Its parameters.
        kernel: A running kernel, which is ended.
        record: What it calls its record; empty if it keeps none.
        cell_timeout: Seconds that one cell may take; six hours by default.
        progress: Show a progress bar by cell on standard error.

    Returns:
        What the file says of the run; a notebook that did not run to its end is no exception.

    Raises:
        NotebookError: If the kernel did not start, or there is no file.
    """
    # What rendering needs is imported too, while the kernel is still busy starting.
    import nbconvert  # noqa: F401
    import papermill
    from nbclient.exceptions import CellTimeoutError
    from papermill.exceptions import PapermillException

    from heimdall_onnx.report.engine import ENGINE

    stopped = ""
    log.info("running", notebook=notebook.name, folder=str(report.parent))
    try:
        papermill.execute_notebook(
            str(notebook),
            str(report),
            parameters=_given(notebook, parameters),
            engine_name=ENGINE,
            kernel_name="python3",
            kernel=kernel,
            start_timeout=_KERNEL_START_S,
            progress_bar=progress,
            execution_timeout=cell_timeout or _CELL_TIMEOUT_S,
        )
    except (PapermillException, CellTimeoutError, RuntimeError) as error:
        # Its text is a traceback of the kernel's; the file says the same and is judged below.
        stopped = type(error).__name__
        log.info("notebook stopped", kind=stopped)
        if isinstance(error, RuntimeError) and last_started(report) == NO_CELL:
            raise NotebookError(f"the notebook's kernel did not start: {error}") from error
    if not report.is_file():
        raise NotebookError(f"papermill wrote no notebook for {notebook} ({stopped})")
    judgement = judge_notebook(report, record)
    if stopped == CellTimeoutError.__name__:
        limit = cell_timeout or _CELL_TIMEOUT_S
        problem = f"a cell took longer than the {limit} s it may: {last_started(report)}"
        judgement = replace(judgement, problem=problem, error_name="", error_message="")
    elif stopped and not judgement.problem:
        # A kernel that dies in the very last cell leaves a file in which all is well.
        judgement = replace(judgement, problem=f"the notebook was stopped by {stopped}")
    return judgement


def _given(notebook: Path, parameters: BaseModel) -> dict[str, Any]:
    """What a notebook is given: what it declares, and of the rest what is no default.

    One of somebody's own may call something else by the name of what it does not declare.
    """
    import papermill

    declared = papermill.inspect_notebook(str(notebook))
    given = parameters.model_dump(mode="json")
    default = type(parameters)().model_dump(mode="json")
    return {n: v for n, v in given.items() if n in declared or v != default[n]}


def error_of(judgement: Judgement) -> HeimdallError:
    """The error that stopped the notebook, as the class it was raised as."""
    known = error_class(judgement.error_name)
    if known is not None:
        return known(judgement.error_message)
    if judgement.error_name:
        return NotebookError(f"{judgement.problem}: {judgement.error_message}")
    return NotebookError(judgement.problem or "a gate failed")


def notebook_path(name: str = "release") -> Path:
    """A notebook of ours: in the installed package, or in the checkout beside it."""
    package = Path(__file__).parents[1]
    installed = package / "notebooks" / f"{name}.ipynb"
    beside = package.parent / "notebooks" / f"{name}.ipynb"
    return installed if installed.is_file() else beside


def kernel_environment(settings: Settings) -> dict[str, str]:
    """The environment of a notebook's kernel, with the settings that are really in use."""
    environment = dict(os.environ)
    settings.apply(environment)
    # The notebook runs a stranger's model; it has no business with the key that vouches for it.
    return {k: v for k, v in environment.items() if not k.startswith("HEIMDALL_SIGNING_")}
