"""Files that are complete or absent, their hashes, and folders that don't outlive their use.

Whoever is killed can't remove what it has downloaded. So a `TemporaryFolder` is locked for as long
as its process lives, and the next one that makes such a folder removes those whose lock nobody
holds any more.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


_LOCK = "lock"


class TemporaryFolder:
    """A temporary folder of this process.

    Args:
        prefix: How its name begins, and those of what is left of others.

    Attributes:
        folder: The folder.
    """

    def __init__(self, prefix: str) -> None:
        for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
            _remove_if_left(left)
        begun = Path(tempfile.mkdtemp(prefix=f".{prefix}"))
        self._lock = os.open(begun / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        # Nobody looks at it under that name, so none is seen that is not locked yet.
        self.folder = begun.rename(begun.with_name(begun.name.removeprefix(".")))

    def remove(self) -> None:
        """Remove it with all that is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)


def _remove_if_left(folder: Path) -> None:
    # Somebody else's, still in use, or gone meanwhile.
    with suppress(OSError), (folder / _LOCK).open("rb+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
