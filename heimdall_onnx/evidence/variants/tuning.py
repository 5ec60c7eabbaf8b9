"""Session options by measurement: for the latency of one call, and for throughput.

One option is changed at a time; a change is kept when the interval of the paired ratio lies above
1, so that what is only noise changes nothing.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from heimdall_onnx.common.arrays import Arrays
from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.evidence.latency.benchmark import take_turns
from heimdall_onnx.evidence.latency.contenders import Contestant, Worker
from heimdall_onnx.evidence.latency.statistics import Speedup, paired_speedup
from heimdall_onnx.model.runtimes import SessionSettings
from heimdall_onnx.model.signature import Signature

log = get_logger(__name__)

LATENCY, THROUGHPUT = "latency", "throughput"


@dataclass(frozen=True)
class Trial:
    """One change of an option.

    Attributes:
        option: Which, as ``"spinning = False"``.
        speedup: Time before the change over time with it.
        kept: Whether it stays.
    """

    option: str
    speedup: Speedup
    kept: bool


def tune_session(
    contestant: Contestant,
    inputs: Arrays,
    signature: Signature,
    *,
    batch_size: int,
    calls: int,
    seed: int,
) -> tuple[SessionSettings, tuple[Trial, ...]]:
    """Find the session options that are fastest on this machine.

    Args:
        contestant: The model, and the options to begin with.
        inputs: One call's inputs; their rows are repeated to the batch size.
        signature: Names and order of inputs and outputs.
        batch_size: Samples in a call.
        calls: Counted calls of each side of a trial.
        seed: Of the order in which they take turns.

    Returns:
        What to open a session with, and every change that was tried, in order.

    Raises:
        BenchmarkError: If a worker process dies, fails or does not answer in time.
    """
    rng, trials = random.Random(seed), []
    with tempfile.TemporaryDirectory(prefix="heimdall-tuning-") as scratch, ExitStack() as held:

        def start(settings: SessionSettings, stack: ExitStack, place: str) -> Worker:
            other = replace(contestant, settings=settings)
            worker = stack.enter_context(other.worker(inputs, signature, Path(scratch), place))
            worker.start()
            return worker

        best, holder = contestant.settings, held
        base = start(best, holder, "0")
        for turn, change in enumerate(_changes(best), 1):
            with ExitStack() as stack:
                changed = best.model_copy(update=change)
                worker = start(changed, stack, str(turn))
                earlier = len(base.blocks)
                take_turns((base, worker), calls, 0, rng, batch_size)
                speedup = paired_speedup(base.blocks[earlier:], worker.blocks)
                kept = speedup.low > 1
                option = ", ".join(f"{name} = {value}" for name, value in change.items())
                trials.append(Trial(option, speedup, kept))
                if kept:
                    best, base = changed, worker
                    # The one before is of no use any more, and holds the model's memory.
                    held.close()
                    held.push(stack.pop_all())
    log.info("tuned", batch_size=batch_size, kept=[trial.option for trial in trials if trial.kept])
    return best, tuple(trials)


def _changes(settings: SessionSettings) -> Iterator[dict[str, Any]]:
    threads = settings.thread_count
    while threads > 1:
        threads //= 2
        yield {"threads": threads}
    if settings.runtime != "onnxruntime":
        return
    yield {"spinning": False}
    yield {"level": "extended"}
    yield {"arena": False}
    yield {"prepacking": False}
