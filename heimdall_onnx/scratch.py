"""A folder for what a process needs for a while, which somebody removes however it ends.

Whoever is killed can't remove what it has downloaded. So its folder is locked for as long as it
lives, and the next one that makes such a folder removes those whose lock nobody holds any more.
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import filelock

_LOCK = "lock"


class Scratch:
    """A temporary folder of this process.

    Args:
        prefix: How its name begins, and those of what is left of others.

    Attributes:
        folder: The folder.
    """

    def __init__(self, prefix: str) -> None:
        for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
            _remove_if_left(left)
        self.folder = Path(tempfile.mkdtemp(prefix=prefix))
        self._lock = filelock.FileLock(self.folder / _LOCK, timeout=0)
        self._lock.acquire()

    def remove(self) -> None:
        """Remove it with all that is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()


def _remove_if_left(folder: Path) -> None:
    # Without a lock it may be just being made; it is locked before anything is in it.
    if not (folder / _LOCK).is_file():
        return
    # Somebody else's, or still in use.
    with suppress(OSError, filelock.Timeout), filelock.FileLock(folder / _LOCK, timeout=0):
        shutil.rmtree(folder, ignore_errors=True)
