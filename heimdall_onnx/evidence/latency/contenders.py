"""Who is timed: a model in a process of its own, and what was measured of it."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import Pipe
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from heimdall_onnx.common.arrays import Arrays, Floats
from heimdall_onnx.common.errors import BenchmarkError
from heimdall_onnx.common.machine import usable_processors
from heimdall_onnx.evidence.latency import worker
from heimdall_onnx.evidence.latency.figures import ContenderFigures
from heimdall_onnx.evidence.latency.statistics import (
    Percentile,
    check_stationarity,
    percentiles_with_intervals,
)
from heimdall_onnx.model.runtimes import Contender, SessionSettings
from heimdall_onnx.model.signature import Signature

if TYPE_CHECKING:
    from torch import nn

PYTORCH = "PyTorch"
WARMUP_CALLS = 5
WORKER_TIMEOUT_S = 600.0
ENDS_WITHIN_S = 5.0


@dataclass(frozen=True, kw_only=True)
class ContenderLatency(ContenderFigures):
    """What was measured of one contender, call by call.

    Attributes:
        samples_ms: Latency of every counted call, in order, milliseconds.
        blocks: Index of the block that each call belongs to.
        ran_on: Execution provider or device, as the runtime told it.
    """

    samples_ms: Floats = field(repr=False)
    blocks: npt.NDArray[np.int64] = field(repr=False)
    ran_on: str = ""

    @classmethod
    def of_calls(
        cls, name: str, samples_ms: Floats, blocks: npt.NDArray[np.int64], **measured: Any
    ) -> ContenderLatency:
        """Its calls with their statistics, and whatever else was ``measured``."""
        return cls(
            name=name,
            samples_ms=samples_ms,
            blocks=blocks,
            calls=samples_ms.size,
            percentiles=percentiles_with_intervals(samples_ms),
            stationarity=check_stationarity(samples_ms, blocks),
            median_ms=float(np.median(samples_ms)),
            mean_ms=float(samples_ms.mean()),
            **measured,
        )

    def percentile(self, wanted: float) -> Percentile | None:
        """The percentile ``wanted``, or None where too few samples stand behind it."""
        return next((p for p in self.percentiles if p.percentile == wanted), None)


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
        job = partial(Contender, self.path.absolute(), inputs, signature, self.settings)
        return Worker(self.name, job, folder, self.settings.thread_count, place)


@contextmanager
def pytorch_contestant(model: nn.Module, settings: SessionSettings) -> Iterator[Contestant]:
    """A PyTorch model to be measured, in eval mode; its file is there until the block ends.

    Raises:
        EvidenceError: If it can't be pickled.
    """
    from heimdall_onnx.model.copies import pickle_model

    with tempfile.TemporaryDirectory(prefix="heimdall-pytorch-") as folder:
        path = Path(folder) / "model.pkl"
        path.write_bytes(pickle_model(model))
        yield Contestant(PYTORCH, path, settings.model_copy(update={"runtime": "pytorch"}))


def default_threads() -> int:
    """As many threads as PyTorch takes (``OMP_NUM_THREADS``, else cores), if a quota allows it."""
    import torch

    return min(torch.get_num_threads(), usable_processors())


class Worker:
    """A contender in its own process, driven over a pipe; ends when the pipe closes.

    Args:
        name: The contender's name.
        job: Picklable; called in the worker, it loads the model and returns the call to time.
        folder: Where the job is handed over, and its log goes.
        threads: Put into the environment for libraries that read it at import.
        place: Tells two contenders of one name apart.
    """

    def __init__(
        self, name: str, job: Callable[[], Any], folder: Path, threads: int, place: str = ""
    ) -> None:
        self.name, self.blocks = name, list[Floats]()
        stem = f"{name.replace(' ', '-')}{place}"
        # What a pipe can't hold would wait, without limit, for the process to read it.
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
        self._pipe, theirs = Pipe()
        # What a model prints must not mix with the caller's.
        try:
            with theirs, self._log.open("wb") as said:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", worker.__name__, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=said,
                    env=self._environment,
                )
        except BaseException:
            self._pipe.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self._pipe.close()
        try:
            self.process.wait(timeout=ENDS_WITHIN_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def start(self) -> None:
        """Load the model, make the first call and the warm-up."""
        self._loaded = self._ask({"job": self._job, "warmup": WARMUP_CALLS})

    def run_block(self, calls: int, batch_size: int | None = None) -> None:
        """Time ``calls`` calls after one uncounted, which brings the model back into cache."""
        self.blocks.append(self.time_calls(calls, batch_size))

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
        return ContenderLatency.of_calls(
            self.name,
            np.concatenate(self.blocks),
            np.repeat(np.arange(len(self.blocks)), [b.size for b in self.blocks]),
            load_ms=self._loaded["load_ns"] / 1e6,
            first_call_ms=self._loaded["first_call_ns"] / 1e6,
            peak_memory_bytes=self._peak,
            ran_on=self._loaded["ran_on"],
        )

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        try:
            self._pipe.send(question)
            if not self._pipe.poll(WORKER_TIMEOUT_S):
                raise BenchmarkError(
                    f"the worker process of {self.name} gave no answer in {WORKER_TIMEOUT_S:g} s"
                )
            answer: dict[str, Any] = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise BenchmarkError(
                f"the worker process of {self.name} ended: {self._last_words()}"
            ) from error
        if "error" in answer:
            raise BenchmarkError(f"{self.name} failed in its worker process: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=1)
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return f"exit status {self.process.returncode}; {lines[-1] if lines else 'no message'}"
