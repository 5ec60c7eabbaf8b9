"""What a worker process of the tests is given to do; imported there, so it stays light."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

Call = Callable[[], Any]


def do_nothing() -> Call:
    return lambda: None


def load_sleeper(seconds: float) -> Call:
    return partial(time.sleep, seconds)


def load_sleeper_of_any_size(seconds: float) -> Call:
    return lambda batch=1: time.sleep(seconds)


def load_slowly(seconds: float) -> Call:
    time.sleep(seconds)
    return do_nothing()


def observe(job: Callable[[], Call], file: Path) -> Call:
    """Do ``job``, call it once, and write down what its process looks like."""
    call = job()
    call()
    maps = Path("/proc/self/maps").read_text()
    facts = {
        "pid": os.getpid(),
        "parent": os.getppid(),
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "openmp": os.environ["OMP_NUM_THREADS"],
        "imported": [name for name in ("torch", "onnxruntime") if name in sys.modules],
        "mapped": [name for name in ("libtorch", "onnxruntime") if name in maps],
    }
    file.write_text(json.dumps(facts))
    return call


def allocate(size: int) -> Call:
    return lambda: len(b"x" * size)


def allocate_by_batch(size: int) -> Call:
    return lambda batch=1: len(b"x" * (size * batch))


def print_noise() -> Call:
    def call() -> None:
        print('{"error": "no answer but noise"}', flush=True)  # noqa: T201
        os.write(1, b"noise past Python\n")

    return call


def measure_environment(found: Path, threads: int, seconds: float) -> Call:
    """Stands where the machine is measured; its rates are threads."""
    os.write(1, b"noise\n")
    rates = {"bandwidth": threads, "f32": int(os.environ["OMP_NUM_THREADS"])}
    found.write_text(json.dumps(rates))
    return do_nothing()


def fail_to_load(words: str) -> Call:
    raise ValueError(words)


def fail_to_measure(*_: object) -> Call:
    return fail_to_load("no product")


def fail_to_run(words: str) -> Call:
    def call() -> None:
        raise ValueError(words)

    return call


def leave(status: int) -> Call:
    sys.stderr.write("some words\nlast words\n")
    sys.exit(status)


def die_later(calls: int) -> Call:
    """Killed in the middle of the call after ``calls``."""
    left = [calls]

    def call() -> None:
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return call


class SlowToUnpickle:
    """As a job is whose imports take time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __setstate__(self, state: dict[str, float]) -> None:
        time.sleep(state["seconds"])

    def __call__(self) -> Call:
        return do_nothing()
