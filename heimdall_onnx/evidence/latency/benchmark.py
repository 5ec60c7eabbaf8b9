"""Latency of each contender, in a worker process of its own, as it would be deployed.

In one process the contenders spoil each other: the waiting threads of one spin while the other
computes. So each has a process; they take turns in blocks of calls, in randomized ABBA order
(each round is ABBA or BAAB, which cancels a linear drift of the machine's speed), and while one
works the others sleep on a pipe.

Percentiles come with distribution-free confidence intervals from order statistics (Conover,
Practical Nonparametric Statistics, 3rd ed., section 3.2). They take the calls as independent;
neighbouring calls of a real machine are not quite, so read them as lower bounds of the spread.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from heimdall_onnx.common.arrays import Arrays, Floats
from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.evidence.latency.contenders import (
    ContenderLatency,
    Contestant,
    Worker,
    default_threads,
    pytorch_contestant,
)
from heimdall_onnx.evidence.latency.cores import usable_cores
from heimdall_onnx.evidence.latency.figures import LatencyFigures, PairFigures
from heimdall_onnx.evidence.latency.machine_state import MachineState, MachineWatch
from heimdall_onnx.evidence.latency.statistics import offline_throughput, paired_speedup
from heimdall_onnx.evidence.ratios import CONFIDENCE
from heimdall_onnx.model.runtimes import SessionSettings
from heimdall_onnx.model.signature import Signature

if TYPE_CHECKING:
    from torch import nn

    from heimdall_onnx.common.parameters import ReleaseParameters
    from heimdall_onnx.data.evaluation import EvaluationData


log = get_logger(__name__)

ONNX = "ONNX Runtime"
BLOCK_CALLS = 10
# Two pairs of blocks each: six pairs are the fewest that bound a median with 95% confidence.
MIN_ROUNDS = 3


@dataclass(frozen=True)
class BatchLatency:
    """Latency at one batch size.

    Attributes:
        batch_size: Samples in a call.
        samples_ms: Latency of every counted call of each contender, milliseconds.
    """

    batch_size: int
    samples_ms: tuple[Floats, Floats] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class PairLatency(PairFigures):
    """Two contenders, measured in turns.

    Attributes:
        batches: Latency at this and the further batch sizes, ascending.
    """

    contenders: tuple[ContenderLatency, ContenderLatency]
    machine: MachineState
    batches: tuple[BatchLatency, ...] = ()

    @property
    def first(self) -> ContenderLatency:
        """The one in the numerator of the ratio."""
        return self.contenders[0]

    @property
    def second(self) -> ContenderLatency:
        """The other one."""
        return self.contenders[1]


@dataclass(frozen=True, kw_only=True)
class LatencyReport(PairLatency, LatencyFigures):
    """The PyTorch model, eager, and the ONNX model on ONNX Runtime's CPU execution provider."""

    confidence: float = CONFIDENCE

    @property
    def pytorch(self) -> ContenderLatency:
        """The PyTorch model."""
        return self.first

    @property
    def onnx(self) -> ContenderLatency:
        """The ONNX model."""
        return self.second


def measure_latency(
    model: nn.Module,
    onnx_path: Path,
    inputs: Arrays,
    signature: Signature,
    *,
    calls: int = 200,
    min_seconds: float = 0.0,
    threads: int | None = None,
    seed: int = 0,
    batch_sizes: Sequence[int] = (),
    batch_calls: int = 3,
) -> LatencyReport:
    """Measure the PyTorch model against the ONNX model on the CPU.

    Args:
        model: The PyTorch model, in eval mode.
        onnx_path: The ONNX file.
        inputs: One call's inputs; their batch size is the one measured.
        signature: Names and order of inputs and outputs.
        calls: Counted calls of each contender, at least.
        min_seconds: Go on until the blocks have taken this long as well.
        threads: Intra-op threads of each; see `default_threads` for None.
        seed: Of the order in which the contenders take turns.
        batch_sizes: Further batch sizes to measure after that, with the rows of ``inputs``
            repeated.
        batch_calls: Counted calls of each contender at each of them.

    Raises:
        EvidenceError: If the model can't be pickled.
        BenchmarkError: If a worker process dies, fails or does not answer in time.
    """
    settings = SessionSettings(threads=threads or default_threads())
    with pytorch_contestant(model, settings) as pytorch:
        pair = measure_pair(
            pytorch,
            Contestant(ONNX, onnx_path, settings),
            inputs,
            signature,
            calls=calls,
            min_seconds=min_seconds,
            seed=seed,
            batch_sizes=batch_sizes,
            batch_calls=batch_calls,
        )
    log.info(
        "measured",
        speedup=round(pair.speedup.ratio, 3),
        pairs=pair.speedup.pairs,
        threads=settings.threads,
        batch_size=pair.batch_size,
    )
    return LatencyReport(**vars(pair), threads=settings.threads, cores=usable_cores())


def benchmark_model(
    model: nn.Module,
    onnx_path: Path,
    data: EvaluationData,
    signature: Signature,
    parameters: ReleaseParameters,
) -> LatencyReport:
    """Measure as the parameters of a release say, see `measure_latency`.

    Args:
        model: The PyTorch model, in eval mode.
        onnx_path: The ONNX file.
        data: Its first samples are the inputs of a call.
        signature: Names and order of inputs and outputs.
        parameters: Of the release.

    Raises:
        BenchmarkError: As `measure_latency`.
    """
    limits = parameters.limits
    return measure_latency(
        model,
        onnx_path,
        data.rows(range(parameters.latency_batch_size)),
        signature,
        calls=limits.calls,
        min_seconds=limits.min_seconds,
        threads=parameters.thread_count,
        seed=parameters.seed,
        batch_sizes=parameters.batch_sizes,
        batch_calls=limits.batch_calls,
    )


def measure_pair(
    first: Contestant,
    second: Contestant,
    inputs: Arrays,
    signature: Signature,
    *,
    calls: int = 200,
    min_seconds: float = 0.0,
    seed: int = 0,
    batch_sizes: Sequence[int] = (),
    batch_calls: int = 3,
) -> PairLatency:
    """Measure one model against another, in turns.

    Args:
        first: The one whose latency is in the numerator of the ratio.
        second: The other one.
        inputs: One call's inputs.
        signature: Names and order of inputs and outputs, the same for both.
        calls: Counted calls of each, at least.
        min_seconds: Go on until the blocks have taken this long as well.
        seed: Of the order in which they take turns.
        batch_sizes: Further batch sizes to measure after that, with the rows of ``inputs``
            repeated; the last one is that of the throughput.
        batch_calls: Counted calls of each at each of them.

    Raises:
        BenchmarkError: If a worker process dies, fails or does not answer in time.
    """
    with tempfile.TemporaryDirectory(prefix="heimdall-latency-") as folder, ExitStack() as stack:
        workers = [
            stack.enter_context(contestant.worker(inputs, signature, Path(folder), place))
            for contestant, place in ((first, "first"), (second, "second"))
        ]
        # ONNX Runtime needs twice the model's size while it loads, so it goes before PyTorch.
        for worker in reversed(workers):
            worker.start()
        rng = random.Random(seed)
        with MachineWatch() as watch:
            take_turns(workers, calls, min_seconds, rng)
        on_device = None
        if second.settings.on_gpu:
            on_device = float(np.median(workers[1].time_calls(calls, on_device=True)))
        # Before the further sizes, whose memory is not that of these calls.
        sides = (workers[0].latency(), workers[1].latency())
        size = len(next(iter(inputs.values())))
        batches = {size: BatchLatency(size, (sides[0].samples_ms, sides[1].samples_ms))}
        for other in sorted({*batch_sizes} - {size}):
            batches[other] = _at_batch_size(workers, other, batch_calls, rng)
    last = [batches[other] for other in batch_sizes[-1:]]
    return PairLatency(
        contenders=sides,
        speedup=paired_speedup(workers[0].blocks, workers[1].blocks),
        batch_size=size,
        machine=watch.state,
        batches=tuple(batches[other] for other in sorted(batches)),
        throughput=tuple(
            offline_throughput(ms, batch.batch_size) for batch in last for ms in batch.samples_ms
        ),
        on_device_ms=on_device,
    )


def take_turns(
    workers: Sequence[Worker],
    calls: int,
    min_seconds: float,
    rng: random.Random,
    batch_size: int | None = None,
) -> int:
    """Run ABBA or BAAB rounds of two workers until there are enough calls.

    Args:
        workers: Both of them.
        calls: Counted calls of each, at least.
        min_seconds: Go on until the blocks have taken this long as well.
        rng: Draws the order of each round.
        batch_size: Samples in a call, where it is another one than that of the inputs.

    Returns:
        The number of rounds.
    """
    started, done, rounds = time.monotonic(), 0, 0
    block = max(1, min(BLOCK_CALLS, calls // (2 * MIN_ROUNDS)))
    while done < calls or rounds < MIN_ROUNDS or time.monotonic() - started < min_seconds:
        first, second = rng.sample(list(workers), 2)
        for worker in (first, second, second, first):
            worker.run_block(block, batch_size)
        done, rounds = done + 2 * block, rounds + 1
    return rounds


def _at_batch_size(
    workers: Sequence[Worker], size: int, calls: int, rng: random.Random
) -> BatchLatency:
    """One block of each contender at another batch size, in random order."""
    found = {id(w): w.time_calls(calls, size) for w in rng.sample(list(workers), 2)}
    first, second = (found[id(worker)] for worker in workers)
    return BatchLatency(size, (first, second))
