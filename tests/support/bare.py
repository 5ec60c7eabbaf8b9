"""Kernels in which nothing heavy can be imported, for tests of how they start and end."""

from __future__ import annotations

import os
from pathlib import Path

_HEAVY = ("torch", "onnx", "mlflow", "pandas", "matplotlib", "networkx", "onnxscript", "scrapbook")


def environment(folder: Path) -> dict[str, str]:
    """Environment variables with which what the notebook needs is not found, and not waited for."""
    for name in _HEAVY:
        (folder / f"{name}.py").write_text("raise ImportError(__name__)\n")
    return {**os.environ, "PYTHONPATH": str(folder)}
