"""SIGINT and SIGTERM in a process that has something to take back."""

from __future__ import annotations

import atexit
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Interrupt:
    """Raises KeyboardInterrupt at the first signal, and does nothing at any other.

    It remembers that itself: Lightning calls it from a handler of its own, and puts it back.
    """

    def __init__(self) -> None:
        self._struck = False

    def __call__(self, number: int, frame: object) -> None:
        if not self._struck:
            self._struck = True
            raise KeyboardInterrupt


def interrupt_once() -> None:
    """As `first_signal_interrupts`, to the end of the process, which must be the caller's own.

    ``timeout`` signals a command and then its whole group, and people press Ctrl-C twice: the
    second signal must not strike while Python takes the process apart.
    """
    if threading.current_thread() is threading.main_thread():
        action = _Interrupt()
        for number in filter(_is_heard, _SIGNALS):
            signal.signal(number, action)
            # Python's last act with its handlers is to make the system's own of them.
            atexit.register(signal.signal, number, signal.SIG_IGN)


def first_signal_interrupts() -> AbstractContextManager[None]:
    """Raise KeyboardInterrupt on SIGTERM too, so that a stopped pipeline cleans up behind itself.

    Only the first of both signals counts: a pipeline that is stopped sends SIGINT and then, soon
    after, SIGTERM, while children are being ended and what was begun is taken back. Where this is
    so already, by a block further out, the end of this one changes nothing.
    """
    return _on_signals(_Interrupt())


def uninterrupted() -> AbstractContextManager[None]:
    """Go on to the end of the block; a signal that arrives in it is lost."""
    return _on_signals(_go_on)


@contextmanager
def interrupted_after() -> Iterator[None]:
    """Go on to the end of the block, where a signal that arrived in it strikes."""
    arrived: list[int] = []
    try:
        with _on_signals(lambda number, _: arrived.append(number)):
            yield
    finally:
        if arrived:
            signal.raise_signal(arrived[0])


def was_interrupted(error: BaseException) -> bool:
    """Whether a KeyboardInterrupt is behind an error, as where an extension's import is struck."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, KeyboardInterrupt):
        cause = cause.__cause__ or cause.__context__
    return cause is not None


def _go_on(number: int, frame: object) -> None:
    # Not SIG_IGN, which processes that are started meanwhile would inherit.
    pass


def _is_heard(number: int) -> bool:
    # What is ignored stays so: a shell's background jobs are not meant to hear Ctrl-C.
    return signal.getsignal(number) not in (signal.SIG_IGN, None)


@contextmanager
def _on_signals(action: Callable[[int, object], None]) -> Iterator[None]:
    # Only the main thread may handle signals, and only it receives them.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS if _is_heard(number)}
    if isinstance(action, _Interrupt):
        # An outer block's first signal is this one's too, and the only one.
        before = {n: h for n, h in before.items() if not (h is _go_on or isinstance(h, _Interrupt))}
    for number in before:
        signal.signal(number, action)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
