"""Work in a process of its own: what it takes is given back, and what it sets disturbs nobody."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import ParamSpec, TypeVar

import structlog

from heimdall_onnx.errors import BenchmarkError
from heimdall_onnx.orphans import end_with

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class Apart:
    """Calls functions in another process."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def __call__(
        self,
        function: Callable[_Arguments, _Result],
        *args: _Arguments.args,
        **kwargs: _Arguments.kwargs,
    ) -> _Result:
        """What ``function`` returns, or raises, there; it must be importable by its name.

        Raises:
            BenchmarkError: If the process dies, for want of memory for example.
        """
        try:
            return self._pool.submit(function, *args, **kwargs).result()
        except BrokenProcessPool as error:
            raise BenchmarkError(
                f"the process of {function.__qualname__} ended without an answer; it may have "
                "been killed for want of memory"
            ) from error


@contextmanager
def process_apart() -> Iterator[Apart]:
    """One process, started anew rather than forked, that ends with the block or with this one."""
    with ProcessPoolExecutor(
        1, mp_context=get_context("spawn"), initializer=_begin, initargs=(os.getpid(),)
    ) as pool:
        yield Apart(pool)


def _begin(parent: int) -> None:
    end_with(parent)
    # What is done here is an event of the caller's, who knows where events go.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
