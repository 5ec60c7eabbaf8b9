"""An extension of IPython that imports what the release notebook will need.

The runner lets the kernel load it as it starts, so that these seconds pass while the services are
being reached. Whatever can't be imported is left for the notebook's own cell to fail on. The kernel
ends with its runner: ipykernel looks for that once a second, and not at all if the runner had ended
before it began to look.
"""

from __future__ import annotations

import contextlib
import importlib
import os

from heimdall_onnx.orphans import end_with

ROOMS = (
    "compare",
    "export",
    "validate",
    "levels",
    "explore",
    "benchmark",
    "plot",
    "tables",
    "publish",
    "report",
    "workspace",
)


def load_ipython_extension(_: object) -> None:
    """Import the rooms; no name is put into the user's namespace."""
    if runner := os.environ.get("JPY_PARENT_PID"):
        end_with(int(runner))
    for room in ROOMS:
        with contextlib.suppress(ImportError):
            importlib.import_module(f"{__package__}.{room}")
