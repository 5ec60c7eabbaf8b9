"""Where a run keeps its files, and what it takes where nothing was given."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar, Protocol
from uuid import uuid4

import structlog

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


class StandIn(Protocol):
    """What stands in for a checkpoint where none is given."""

    model: ClassVar[str]

    @property
    def checkpoint(self) -> Path:
        """The trained weights."""

    @property
    def eval_data(self) -> Path:
        """Evaluation data of theirs."""


def prepare_run(
    parameters: ReleaseParameters, settings: Settings, make_demo: Callable[[Path], StandIn]
) -> ReleaseParameters:
    """Complete the parameters of a notebook and make its folder.

    Events go to ``events.jsonl`` in the folder, so that they don't mix with the report.

    Args:
        parameters: As they were given.
        settings: Say where a folder is made if none is given.
        make_demo: Called without a checkpoint, with the folder of the demo: makes checkpoint and
            evaluation data if they are not there yet, which may take minutes.
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
        demo = make_demo(settings.home / "demo")
        updates["checkpoint"] = str(demo.checkpoint)
        updates["model"] = parameters.model or demo.model
        updates["eval_data"] = parameters.eval_data or str(demo.eval_data)
    else:
        from heimdall_onnx.model.checkpoint import single_file

        # A release keeps one file, and this is the one that it is made of.
        updates["checkpoint"] = str(single_file(parameters.checkpoint, folder))
    return parameters.model_copy(update=updates)
