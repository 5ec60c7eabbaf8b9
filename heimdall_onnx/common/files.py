"""Files that are complete or absent, and their hashes."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from heimdall_onnx.common.errors import DataError


def hash_file(path: Path) -> str:
    """SHA-256 of a file in hexadecimal.

    Raises:
        DataError: If the file can't be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}") from error


@contextmanager
def replace_file(path: Path) -> Iterator[BinaryIO]:
    """A temporary file that takes the place of ``path`` when the block ends without an error.

    Raises:
        DataError: If the folder can't be made or the file can't be written.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            yield file
        temporary.chmod(0o644)  # mkstemp's 0600 would hide the result from other users
        temporary.replace(path)
    except OSError as error:
        raise DataError(f"{path} can't be written: {error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
