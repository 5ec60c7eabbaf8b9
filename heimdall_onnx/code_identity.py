"""Which code computes: hashes of this package's files and of a model's module."""

from __future__ import annotations

import hashlib
import importlib.util
from functools import cache
from pathlib import Path

from heimdall_onnx.files import hash_file


@cache
def hash_of_package() -> str:
    """SHA-256 of this package's code and notebooks."""
    digest = hashlib.sha256()
    package = Path(__file__).parent
    # Installed they are in the package, in a checkout beside it.
    notebooks = (*package.glob("notebooks/*.ipynb"), *package.parent.glob("notebooks/*.ipynb"))
    for path in (*sorted(package.rglob("*.py")), *sorted(notebooks)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def hash_of_module(name: str) -> str:
    """SHA-256 of a module's file; empty where it has none or there is no such module."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        spec = None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        return ""
    return hash_file(Path(spec.origin))
