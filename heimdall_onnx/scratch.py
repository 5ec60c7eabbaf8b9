"""A folder for what a process needs for a while, which somebody removes however it ends.

Whoever is killed can't remove what it has downloaded. So its folder is locked for as long as it
lives, and the next one that makes such a folder removes those whose lock nobody holds any more.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

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
