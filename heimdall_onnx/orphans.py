"""A process that ends with the one that started it, however that one ended."""

from __future__ import annotations

import os
import select
import threading


def end_with(pid: int) -> None:
    """End this process, at once and without cleaning up, as soon as the process ``pid`` has ended.

    What a killed run has started must not go on publishing, measuring or waiting without it. A
    descriptor of the process tells at once and can't be mistaken for a later one of the same
    number; where the system has none (see pidfd_open(2)), nothing is watched.
    """
    try:
        watched = os.pidfd_open(pid)
    except ProcessLookupError:
        os._exit(1)
    except OSError:
        return
    threading.Thread(target=_wait_for_end, args=(watched,), name="end-with", daemon=True).start()


def _wait_for_end(watched: int) -> None:
    ended = select.poll()
    ended.register(watched, select.POLLIN)
    ended.poll()
    os._exit(1)
