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

import json
import os
import pickle
import random
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import cloudpickle
import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from heimdall_onnx.cores import Cores, usable_cores
from heimdall_onnx.errors import BenchmarkError
from heimdall_onnx.inference import load_onnx, load_pytorch
from heimdall_onnx.logs import get_logger
from heimdall_onnx.machine_watch import MachineState, MachineWatch
from heimdall_onnx.processors import usable_processors
from heimdall_onnx.runtimes import SessionSettings, load_runner
from heimdall_onnx.signature import Arrays, Signature
from heimdall_onnx.single_stream import (
    Throughput,
    early_stopping_estimate,
    min_queries,
    offline_throughput,
)
from heimdall_onnx.stationarity import check_stationarity

if TYPE_CHECKING:
    from heimdall_onnx.evaluation import EvaluationData
    from heimdall_onnx.parameters import ReleaseParameters

log = get_logger(__name__)

Floats = npt.NDArray[np.float64]

PYTORCH, ONNX = "PyTorch", "ONNX Runtime"
PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)
CONFIDENCE = 0.95
BLOCK_CALLS = 10
WARMUP_CALLS = 5
# Two pairs of blocks each: six pairs are the fewest that bound a median with 95% confidence.
MIN_ROUNDS = 3
_WORKER_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Percentile:
    """A percentile of the latency with its confidence interval.

    Attributes:
        percentile: In (0, 100).
        value_ms: Milliseconds.
        low_ms: Lower end of the interval.
        high_ms: Upper end of the interval.
    """

    percentile: float
    value_ms: float
    low_ms: float
    high_ms: float


@dataclass(frozen=True)
class ContenderLatency:
    """What was measured of one contender.

    Attributes:
        name: ``"PyTorch"`` or ``"ONNX Runtime"``.
        samples_ms: Latency of every counted call, in order, milliseconds.
        blocks: Index of the block that each call belongs to.
        load_ms: Reading the model: session creation for ONNX Runtime.
        first_call_ms: The first call after that.
        warmup_calls: Further calls that were not counted.
        percentiles: Those with enough samples behind them.
        mean_ms: Mean of the counted calls.
        peak_memory_bytes: Largest resident size of its process.
        ran_on: Execution provider or device, as the runtime told it.
        precision: What it multiplied in, as far as the runtime decides that.
    """

    name: str
    samples_ms: Floats = field(repr=False)
    blocks: npt.NDArray[np.int64] = field(repr=False)
    load_ms: float
    first_call_ms: float
    warmup_calls: int
    percentiles: tuple[Percentile, ...]
    mean_ms: float
    peak_memory_bytes: int
    ran_on: str = ""
    precision: str = ""

    @property
    def median_ms(self) -> float:
        """Median of the counted calls."""
        return float(np.median(self.samples_ms))

    def percentile(self, wanted: float) -> Percentile | None:
        """The percentile ``wanted``, or None where too few samples stand behind it."""
        return next((p for p in self.percentiles if p.percentile == wanted), None)


@dataclass(frozen=True)
class Speedup:
    """Paired ratio of block medians, PyTorch over ONNX Runtime.

    Attributes:
        ratio: Median over the pairs; above 1 the ONNX model is faster.
        low: Lower end of its confidence interval.
        high: Upper end.
        pairs: Number of pairs.
    """

    ratio: float
    low: float
    high: float
    pairs: int


@dataclass(frozen=True)
class BatchLatency:
    """Latency at one batch size.

    Attributes:
        batch_size: Samples in a call.
        pytorch_ms: Latency of every counted call, milliseconds.
        onnx_ms: The same for ONNX Runtime.
    """

    batch_size: int
    pytorch_ms: Floats = field(repr=False)
    onnx_ms: Floats = field(repr=False)


@dataclass(frozen=True)
class LatencyReport:
    """Everything that `measure_latency` found.

    Attributes:
        batch_size: Samples in a call.
        threads: Intra-op threads of each contender.
        pytorch: The PyTorch model, eager.
        onnx: The ONNX model on ONNX Runtime's CPU execution provider.
        speedup: PyTorch's latency over ONNX Runtime's.
        load_average: Of the machine over the last minute, before and after.
        batches: Latency at this and the further batch sizes, ascending.
        machine: What the machine did while they took turns.
        confidence: Of every interval.
        cores: The processors that both ran on, and whether others could measure on them.
    """

    batch_size: int
    threads: int
    pytorch: ContenderLatency
    onnx: ContenderLatency
    speedup: Speedup
    load_average: tuple[float, float]
    batches: tuple[BatchLatency, ...] = ()
    machine: MachineState | None = None
    confidence: float = CONFIDENCE
    cores: Cores | None = None


@dataclass(frozen=True)
class Contestant:
    """A model that can be measured against another.

    Attributes:
        name: What it is called.
        path: The ONNX file; for PyTorch a model that this program pickled itself.
        settings: With what it runs.
    """

    name: str
    path: Path
    settings: SessionSettings

    def worker(self, inputs: Arrays, signature: Signature, folder: Path, place: str = "") -> Worker:
        """Its process, not started yet; ``place`` tells two of one name apart."""
        job = partial(load_runner, self.path.absolute(), inputs, signature, self.settings)
        return Worker(self.name, job, folder, self.settings.thread_count, place)


@dataclass(frozen=True)
class PairLatency:
    """Two contenders, measured in turns.

    Attributes:
        first: The one in the numerator of the ratio.
        second: The other one.
        speedup: The first one's latency over the second one's.
        batch_size: Samples in a call.
        machine: What the machine did while they took turns.
        larger: Size of a further, larger batch; 0 if none was asked for.
        throughput: Of both at that batch size.
        on_device_ms: Median of the second one's calls without the way to its GPU and back; None
            where it runs on the processor.
    """

    first: ContenderLatency
    second: ContenderLatency
    speedup: Speedup
    batch_size: int
    machine: MachineState
    larger: int = 0
    throughput: tuple[Throughput, ...] = ()
    on_device_ms: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON, without the single calls."""
        return {
            "speedup": asdict(self.speedup),
            "batch_size": self.batch_size,
            "contenders": [
                describe_contender(side, self.batch_size) for side in (self.first, self.second)
            ],
            "throughput": [asdict(found) for found in self.throughput],
            "on_device_ms": self.on_device_ms,
            "machine": self.machine.to_dict(),
        }


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
    progress: Callable[[int, int], None] | None = None,
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
        progress: Called with (calls done, calls wanted) of each contender.

    Raises:
        BenchmarkError: If the model can't be pickled, or a worker process dies, fails or does not
            answer in time.
    """
    threads = threads or default_threads()
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="heimdall-latency-") as folder, ExitStack() as stack:
        model_file = Path(folder) / "model.pkl"
        write_model(model, model_file)
        workers = [
            stack.enter_context(Worker(name, job, Path(folder), threads))
            for name, job in (
                (PYTORCH, partial(load_pytorch, model_file, inputs, signature, threads)),
                (ONNX, partial(load_onnx, onnx_path.absolute(), inputs, signature, threads)),
            )
        ]
        # ONNX Runtime needs twice the model's size while it loads, so it goes first.
        for worker in reversed(workers):
            worker.start()
        rng = random.Random(seed)
        with MachineWatch() as watch:
            order = take_turns(workers, calls, min_seconds, rng, progress)
        size = len(next(iter(inputs.values())))
        pytorch, onnx = (worker.latency() for worker in workers)
        batches = [BatchLatency(size, pytorch.samples_ms, onnx.samples_ms)]
        batches += [
            _at_batch_size(workers, other, batch_calls, rng)
            for other in sorted({*batch_sizes} - {size})
        ]
        report = LatencyReport(
            batch_size=size,
            threads=threads,
            pytorch=pytorch,
            onnx=onnx,
            speedup=paired_speedup(workers[0].blocks, workers[1].blocks),
            load_average=(before, os.getloadavg()[0]),
            batches=tuple(sorted(batches, key=lambda found: found.batch_size)),
            machine=watch.state,
            cores=usable_cores(),
        )
    log.info(
        "measured",
        speedup=round(report.speedup.ratio, 3),
        rounds=order,
        threads=threads,
        batch_size=report.batch_size,
    )
    return report


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
    larger: int = 0,
    larger_calls: int = 3,
) -> PairLatency:
    """Measure one model against another, in turns, as `measure_latency` does.

    Args:
        first: The one whose latency is in the numerator of the ratio.
        second: The other one.
        inputs: One call's inputs.
        signature: Names and order of inputs and outputs, the same for both.
        calls: Counted calls of each, at least.
        min_seconds: Go on until the blocks have taken this long as well.
        seed: Of the order in which they take turns.
        larger: A further batch size for the throughput, with the rows of ``inputs`` repeated.
        larger_calls: Counted calls of each at that size.

    Raises:
        BenchmarkError: If a worker process dies, fails or does not answer in time.
    """
    with tempfile.TemporaryDirectory(prefix="heimdall-latency-") as folder, ExitStack() as stack:
        workers = [
            stack.enter_context(contestant.worker(inputs, signature, Path(folder), place))
            for contestant, place in ((first, "first"), (second, "second"))
        ]
        for worker in workers:
            worker.start()
        rng = random.Random(seed)
        with MachineWatch() as watch:
            take_turns(workers, calls, min_seconds, rng, None)
        on_device = None
        if second.settings.on_gpu:
            on_device = float(np.median(workers[1].time_calls(calls, on_device=True)))
        throughput: tuple[Throughput, ...] = ()
        if larger:
            batch = _at_batch_size(workers, larger, larger_calls, rng)
            sides = (batch.pytorch_ms, batch.onnx_ms)
            throughput = tuple(offline_throughput(side, larger) for side in sides)
        return PairLatency(
            workers[0].latency(),
            workers[1].latency(),
            paired_speedup(workers[0].blocks, workers[1].blocks),
            len(next(iter(inputs.values()))),
            watch.state,
            larger,
            throughput,
            on_device,
        )


def write_model(model: nn.Module, path: Path) -> None:
    """Write a model for a process of one's own to read.

    Raises:
        BenchmarkError: If it can't be pickled.
    """
    try:
        with path.open("wb") as file:
            torch.save(model, file, pickle_module=cloudpickle)
    except Exception as error:  # whatever an attribute of the model raises that can't be pickled
        raise BenchmarkError(
            f"{type(model).__name__} can't be handed to a process of its own: {error}. Every "
            "attribute of it must be picklable"
        ) from error


def take_turns(
    workers: Sequence[Worker],
    calls: int,
    min_seconds: float,
    rng: random.Random,
    progress: Callable[[int, int], None] | None,
) -> int:
    """Run ABBA or BAAB rounds of two workers until there are enough calls.

    Returns:
        The number of rounds.
    """
    started, done, rounds = time.monotonic(), 0, 0
    block = max(1, min(BLOCK_CALLS, calls // (2 * MIN_ROUNDS)))
    while done < calls or rounds < MIN_ROUNDS or time.monotonic() - started < min_seconds:
        first, second = rng.sample(list(workers), 2)
        for worker in (first, second, second, first):
            worker.run_block(block)
        done, rounds = done + 2 * block, rounds + 1
        if progress is not None:
            progress(min(done, calls), calls)
    return rounds


def _at_batch_size(
    workers: Sequence[Worker], size: int, calls: int, rng: random.Random
) -> BatchLatency:
    """One block of each contender at another batch size, in random order."""
    found = {id(w): w.time_calls(calls, size) for w in rng.sample(list(workers), 2)}
    pytorch, onnx = (found[id(worker)] for worker in workers)
    return BatchLatency(size, pytorch, onnx)


def default_threads() -> int:
    """As many threads as PyTorch takes (``OMP_NUM_THREADS``, else cores), if a quota allows it."""
    return min(torch.get_num_threads(), usable_processors())


def min_samples(percentile: float) -> int:
    """Samples needed before a percentile is worth printing.

    The fewest for which, with 99% confidence, at least two of them lie at or beyond the
    percentile, so that it is not merely the largest value seen.
    """
    return min_queries(percentile)


def percentiles_with_intervals(samples_ms: Floats) -> tuple[Percentile, ...]:
    """Every percentile of `PERCENTILES` that ``samples_ms`` are enough for."""
    from scipy import stats

    found = []
    for percentile in PERCENTILES:
        if samples_ms.size < min_samples(percentile):
            continue
        interval = stats.quantile_test(samples_ms, p=percentile / 100).confidence_interval(
            CONFIDENCE
        )
        # With the fewest samples allowed a two-sided end can fall beyond the largest one, where
        # order statistics know no bound.
        found.append(
            Percentile(
                percentile,
                float(np.percentile(samples_ms, percentile)),
                float(interval.low),
                float(interval.high if np.isfinite(interval.high) else samples_ms.max()),
            )
        )
    return tuple(found)


def paired_speedup(slow: Sequence[Floats], fast: Sequence[Floats]) -> Speedup:
    """Ratio of the medians of blocks that ran next to each other, with its interval.

    With fewer than six pairs, too few for the confidence, the interval is their whole range.

    Args:
        slow: Blocks of the contender in the numerator, milliseconds, in order.
        fast: Blocks of the other; the i-th ran in the same half of a round as the i-th of
            ``slow``.
    """
    from scipy import stats

    ratios = np.array(
        [np.median(a) / np.median(b) for a, b in zip(slow, fast, strict=True)], dtype=np.float64
    )
    interval = stats.quantile_test(ratios, p=0.5).confidence_interval(CONFIDENCE)
    low, high = (
        float(end) if np.isfinite(end) else float(bound)
        for end, bound in ((interval.low, ratios.min()), (interval.high, ratios.max()))
    )
    return Speedup(float(np.median(ratios)), low, high, ratios.size)


def describe_contender(contender: ContenderLatency, batch_size: int) -> dict[str, Any]:
    """The figures of a contender as JSON, without its single calls."""
    single_stream = early_stopping_estimate(contender.samples_ms)
    steady = check_stationarity(contender.samples_ms, contender.blocks)
    return {
        "name": contender.name,
        "calls": contender.samples_ms.size,
        "percentiles": [asdict(percentile) for percentile in contender.percentiles],
        "single_stream": single_stream
        and {**asdict(single_stream), "discarded": single_stream.discarded},
        "throughput": asdict(offline_throughput(contender.samples_ms, batch_size)),
        "stationarity": steady and {**asdict(steady), "holds": steady.holds},
        "median_ms": contender.median_ms,
        "mean_ms": contender.mean_ms,
        "load_ms": contender.load_ms,
        "first_call_ms": contender.first_call_ms,
        "peak_memory_bytes": contender.peak_memory_bytes,
    }


class Worker:
    """A contender in its own process, driven over pipes; ends when the pipe closes.

    Args:
        name: The contender's name.
        job: Picklable; called in the worker, it loads the model and returns the call to time.
        folder: Where the job is handed over.
        threads: Put into the environment for libraries that read it at import.
        place: Tells two contenders of one name apart.
    """

    def __init__(
        self, name: str, job: Callable[[], Any], folder: Path, threads: int, place: str = ""
    ) -> None:
        self.name, self.blocks = name, list[Floats]()
        stem = f"{name.replace(' ', '-')}{place}"
        self._job = folder / f"{stem}.pkl"
        self._job.write_bytes(pickle.dumps(job))
        self._log = folder / f"{stem}.log"
        self._environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        self._loaded: dict[str, Any] = {}
        self._peak = 0

    def __enter__(self) -> Worker:
        """Start the process."""
        with self._log.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "heimdall_onnx.worker", str(self._job)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=self._environment,
                text=True,
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def start(self) -> None:
        """Load the model, make the first call and the warm-up."""
        self._loaded = self._ask({"load": True, "warmup": WARMUP_CALLS})

    def run_block(self, calls: int) -> None:
        """Time ``calls`` calls after one uncounted, which brings the model back into cache."""
        self.blocks.append(self.time_calls(calls))

    def time_calls(
        self, calls: int, batch_size: int | None = None, *, on_device: bool = False
    ) -> Floats:
        """Milliseconds of ``calls`` calls after one uncounted, at another batch size if given.

        With ``on_device`` inputs and outputs stay on the contender's GPU.
        """
        sized: dict[str, Any] = {} if batch_size is None else {"batch": batch_size}
        answer = self._ask({"calls": calls, "on_device": on_device, **sized})
        self._peak = answer["peak_memory_bytes"]
        return np.array(answer["ns"], dtype=np.float64) / 1e6

    def latency(self) -> ContenderLatency:
        """What has been measured so far."""
        samples = np.concatenate(self.blocks)
        return ContenderLatency(
            name=self.name,
            samples_ms=samples,
            blocks=np.repeat(np.arange(len(self.blocks)), [b.size for b in self.blocks]),
            load_ms=self._loaded["load_ns"] / 1e6,
            first_call_ms=self._loaded["first_call_ns"] / 1e6,
            warmup_calls=WARMUP_CALLS + len(self.blocks),
            percentiles=percentiles_with_intervals(samples),
            mean_ms=float(samples.mean()),
            peak_memory_bytes=self._peak,
            ran_on=self._loaded["ran_on"],
            precision=self._loaded["precision"],
        )

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._read_line()
        except BrokenPipeError:
            line = ""
        if not line:
            raise BenchmarkError(f"the worker process of {self.name} ended: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BenchmarkError(f"{self.name} failed in its worker process: {answer['error']}")
        return answer

    def _read_line(self) -> str:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(_WORKER_TIMEOUT_S):
                raise BenchmarkError(
                    f"the worker process of {self.name} gave no answer in {_WORKER_TIMEOUT_S:g} s"
                )
        return self._process.stdout.readline()

    def _last_words(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1)
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return f"exit status {self._process.returncode}; {lines[-1] if lines else 'no message'}"
