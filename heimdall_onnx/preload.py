"""An extension of IPython that imports what the release notebook will need.

The runner lets the kernel load it as it starts, so that these seconds pass while the services are
being reached. Whatever can't be imported is left for the notebook's own cell to fail on.
"""

from __future__ import annotations

import contextlib
import importlib

_ROOMS = (
    "compare",
    "export",
    "validate",
    "levels",
    "benchmark",
    "plot",
    "tables",
    "publish",
    "report",
    "workspace",
)


def load_ipython_extension(_: object) -> None:
    """Import the rooms; no name is put into the user's namespace."""
    for room in _ROOMS:
        with contextlib.suppress(ImportError):
            importlib.import_module(f"{__package__}.{room}")
