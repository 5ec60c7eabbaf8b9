"""Where a run keeps its files, and what it takes where nothing was given."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import structlog

from heimdall_onnx.common.errors import SettingsError
from heimdall_onnx.common.logs import configure_logs
from heimdall_onnx.common.parameters import ReleaseParameters
from heimdall_onnx.services.settings import Settings

# In a run's folder: the process that runs it headlessly.
RUNNER = "runner.pid"
# How the folder begins that holds a combined checkpoint while it is released, beside the runs.
ENSEMBLE = "ensemble-"


def new_run_folder(settings: Settings) -> Path:
    """A folder name of its own for a run below the settings' home; not made yet."""
    return settings.home / "runs" / f"{datetime.now(UTC):%Y%m%d_%H%M%S}-{uuid4().hex[:8]}"


def claim_folder(folder: Path) -> Path:
    """Make a folder below the settings' home that says whose files it holds: this process's.

    Raises:
        SettingsError: If it can't be made.
    """
    try:
        folder.mkdir(parents=True)
        (folder / RUNNER).write_text(str(os.getpid()))
    except OSError as error:
        raise SettingsError(
            f"HEIMDALL_HOME must be a folder that can be written to; {folder} can't be made: "
            f"{error.strerror}"
        ) from error
    return folder


def prepare_run(
    parameters: ReleaseParameters, settings: Settings, make_demo: Callable[[Path], Any]
) -> ReleaseParameters:
    """Complete the parameters of a notebook and make its folder.

    Events go to ``events.jsonl`` in the folder, so that they don't mix with the report.

    Args:
        parameters: As they were given.
        settings: Say where a folder is made if none is given.
        make_demo: Called without a checkpoint, with the folder of the demo: makes checkpoint and
            evaluation data if they are not there yet, which may take minutes. What it returns has
            a method ``completing`` that gives them as parameters.
    """
    updates: dict[str, str] = {}
    if not parameters.output_dir:
        updates["output_dir"] = str(new_run_folder(settings))
    folder = Path(updates.get("output_dir", parameters.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    configure_logs(file=folder / "events.jsonl")
    if parameters.run_id:
        structlog.contextvars.bind_contextvars(run_id=parameters.run_id)
    if not parameters.checkpoint:
        updates |= make_demo(settings.home / "demo").completing(parameters)
    else:
        from heimdall_onnx.model.checkpoint import single_file

        # A release keeps one file, and this is the one that it is made of.
        updates["checkpoint"] = str(single_file(parameters.checkpoint, folder))
    return parameters.model_copy(update=updates)
