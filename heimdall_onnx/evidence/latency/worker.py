"""The process in which one contender is timed, ``python -m heimdall_onnx.evidence.latency.worker``.

Its argument is the descriptor of a pipe, over which it answers one question after the other; it
ends when the pipe does, or at once when the process ends that started it. The first question names
the file of the job, which gives a call without arguments; that may take a batch size where it is
asked for one, and may have an ``on_device`` that leaves out the way to a GPU and back.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from heimdall_onnx.common.machine import peak_memory_bytes
from heimdall_onnx.common.processes import exit_with_process


def serve(pipe: Connection) -> None:
    """Answer the questions of a pipe until it ends."""
    call: Callable[..., Any] | None = None
    with suppress(EOFError):
        while True:
            question = pipe.recv()
            try:
                if call is None:
                    call, answer = _load(question["job"], question["warmup"])
                else:
                    answer = _time_calls(_chosen(call, question), question["calls"])
            except Exception as error:  # goes to the parent, which raises it
                answer = {"error": f"{type(error).__name__}: {error}"}
            pipe.send(answer)


def _chosen(call: Any, question: dict[str, Any]) -> Callable[[], Any]:
    if question.get("on_device"):
        on_device: Callable[[], Any] = call.on_device
        return on_device
    return partial(call, question["batch"]) if "batch" in question else call


def _load(job: Path, warmup: int) -> tuple[Callable[..., Any], dict[str, Any]]:
    # Written by the parent process into a folder of its own, so it is no untrusted pickle. It
    # is read before the clock starts: imports are not part of loading a model.
    load = pickle.loads(job.read_bytes())  # noqa: S301
    start = time.perf_counter_ns()
    call = load()
    loaded = time.perf_counter_ns()
    call()
    first = time.perf_counter_ns()
    for _ in range(warmup):
        call()
    ran_on = getattr(call, "ran_on", "")
    return call, {"load_ns": loaded - start, "first_call_ns": first - loaded, "ran_on": ran_on}


def _time_calls(call: Callable[[], Any], calls: int) -> dict[str, Any]:
    clock = time.perf_counter_ns
    call()
    times = []
    for _ in range(calls):
        start = clock()
        call()
        times.append(clock() - start)
    return {"ns": times, "peak_memory_bytes": peak_memory_bytes()}


def main() -> None:
    """Serve the pipe named on the command line."""
    # Ctrl-C is for the parent, which then closes the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # It would hear of the pipe's end only after the call in hand, which may never come back.
    exit_with_process(os.getppid())
    with Connection(int(sys.argv[1])) as pipe:
        serve(pipe)


if __name__ == "__main__":
    main()
