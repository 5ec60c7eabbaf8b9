"""SIGINT and SIGTERM in a process that has something to take back."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def first_signal_interrupts() -> AbstractContextManager[None]:
    """Raise KeyboardInterrupt on SIGTERM too, so that a stopped pipeline cleans up behind itself.

    Only the first of both signals counts: a pipeline that is stopped sends SIGINT and then, soon
    after, SIGTERM, while children are being ended and what was begun is taken back.
    """

    def interrupt(number: int, frame: object) -> None:
        for each in _SIGNALS:
            if signal.getsignal(each) is interrupt:
                signal.signal(each, _go_on)
        raise KeyboardInterrupt

    return _on_signals(interrupt)


def uninterrupted() -> AbstractContextManager[None]:
    """Go on to the end of the block; a signal that arrives in it is lost."""
    return _on_signals(_go_on)


def _go_on(number: int, frame: object) -> None:
    # Not SIG_IGN, which processes that are started meanwhile would inherit.
    pass


@contextmanager
def _on_signals(action: Callable[[int, object], None]) -> Iterator[None]:
    # Only the main thread may handle signals, and only it receives them.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    # What is ignored stays so: a shell's background jobs are not meant to hear Ctrl-C.
    heard = {n: h for n, h in before.items() if h not in (signal.SIG_IGN, None)}
    for number in heard:
        signal.signal(number, action)
    try:
        yield
    finally:
        for number, handler in heard.items():
            signal.signal(number, handler)
