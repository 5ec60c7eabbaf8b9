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
    "heimdall_onnx.evidence.parity.compare",
    "heimdall_onnx.model.onnx.export",
    "heimdall_onnx.model.onnx.validate",
    "heimdall_onnx.evidence.parity.optimization_levels",
    "heimdall_onnx.report.explore.entry",
    "heimdall_onnx.evidence.latency.benchmark",
    "heimdall_onnx.evidence.latency.members",
    "heimdall_onnx.evidence.latency.timed",
    "heimdall_onnx.evidence.gates",
    "heimdall_onnx.report.plot",
    "heimdall_onnx.report.tables",
    "heimdall_onnx.release.publish",
    "heimdall_onnx.archive.record",
    "heimdall_onnx.report.workspace",
)


def load_ipython_extension(_: object) -> None:
    """Import the rooms; no name is put into the user's namespace."""
    if runner := os.environ.get("JPY_PARENT_PID"):
        exit_with_process(int(runner))
    import_for_good(ROOMS)


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
