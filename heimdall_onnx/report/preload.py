"""An extension of IPython that imports what the release notebook will need.

The runner lets the kernel load it as it starts, so that these seconds pass while the services are
being reached. Whatever can't be imported is left for the notebook's own cell to fail on. The kernel
ends with its runner: ipykernel looks for that once a second, and not at all if the runner had ended
before it began to look.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
from collections.abc import Iterable

from heimdall_onnx.common.processes import exit_with_process, without_garbage_collection

ROOMS = (
    "evidence.parity.compare",
    "model.onnx.export",
    "model.onnx.validate",
    "evidence.parity.optimization_levels",
    "report.explore.entry",
    "evidence.latency.benchmark",
    "evidence.latency.timed",
    "evidence.verdict",
    "report.plot",
    "report.tables",
    "release.publish",
    "archive.record",
    "report.workspace",
)


def load_ipython_extension(_: object) -> None:
    """Import the rooms; no name is put into the user's namespace."""
    if runner := os.environ.get("JPY_PARENT_PID"):
        exit_with_process(int(runner))
    import_for_good(f"heimdall_onnx.{room}" for room in ROOMS)


def import_for_good(names: Iterable[str]) -> None:
    """Import modules in a process that is theirs; what can't be imported is left out.

    Whatever there is afterwards is never looked through for garbage again. That would be in vain,
    and write to every page of it, which a fork must copy first.
    """
    with without_garbage_collection():
        for name in names:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        gc.freeze()
