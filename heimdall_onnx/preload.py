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
    import_for_good(f"{__package__}.{room}" for room in ROOMS)


def import_for_good(names: Iterable[str]) -> None:
    """Import modules that stay as long as the process does; what can't be imported is left out.

    Meanwhile, and in them from then on, Python looks for no garbage. It would find none, in a fifth
    of the time that the imports take; and later on, each time that it looks through everything, it
    would write to every page of it, which a fork must copy first.
    """
    gc.disable()
    try:
        for name in names:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    finally:
        gc.freeze()
        gc.enable()
