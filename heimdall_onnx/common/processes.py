"""Work in a process of its own, and processes that end with the one that started them."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import select
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import ParamSpec, TypeVar

import structlog

from heimdall_onnx.common.errors import BenchmarkError

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class WorkerProcess(contextlib.AbstractContextManager["WorkerProcess"]):
    """Calls functions in one other process, started anew, that ends with the block or with this."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    def __call__(
        self,
        function: Callable[_Arguments, _Result],
        *args: _Arguments.args,
        **kwargs: _Arguments.kwargs,
    ) -> _Result:
        """What ``function`` returns, or raises, there; it must be importable by its name.

        Raises:
            BenchmarkError: If the process dies, for want of memory for example. The next call gets
                a new one.
        """
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                1, mp_context=get_context("spawn"), initializer=_begin, initargs=(os.getpid(),)
            )
        try:
            return self._pool.submit(function, *args, **kwargs).result()
        except BrokenProcessPool as error:
            self.__exit__()
            raise BenchmarkError(
                f"the process of {function.__qualname__} ended without an answer: killed for want "
                "of memory, perhaps, or never begun, if this runs in a script without "
                '`if __name__ == "__main__"`'
            ) from error

    def __exit__(self, *_: object) -> None:
        """End the process, whatever it is doing."""
        pool, self._pool = self._pool, None
        if pool is None:
            return
        for process in list((pool._processes or {}).values()):  # noqa: SLF001
            process.kill()
        pool.shutdown()


def _begin(parent: int) -> None:
    exit_with_process(parent)
    # What is done here is an event of the caller's, who knows where events go.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))


def exit_with_process(pid: int) -> None:
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
    threading.Thread(target=_wait_for_end, args=(watched,), name="watcher", daemon=True).start()


def _wait_for_end(watched: int) -> None:
    ended = select.poll()
    ended.register(watched, select.POLLIN)
    ended.poll()
    os._exit(1)


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """For imports, a fifth of whose time goes into looking for garbage that is not there."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
