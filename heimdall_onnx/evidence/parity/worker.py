"""What a worker needs to take both models over a part of a dataset, and how it does.

It comes as a plugin, so that a worker that joins late or is started again has it too. One whose
code, packages or threads would give other answers is refused.
"""

from __future__ import annotations

import io
import socket
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

import cloudpickle
from distributed import WorkerPlugin, get_worker
from distributed.worker import Worker

from heimdall_onnx.common.environment import (
    NUMERICAL,
    capture_environment,
    hash_of_module,
    hash_of_package,
    installed_distributions,
)
from heimdall_onnx.common.errors import HeimdallError, SchedulerError
from heimdall_onnx.common.machine import usable_processors
from heimdall_onnx.common.text import listed, shown
from heimdall_onnx.data.evaluation import EvaluationData
from heimdall_onnx.evidence.parity.one_pass import EvaluationPass, Models, PassSettings, pass_over


@dataclass(frozen=True)
class Code:
    """What decides on the answers beside models and data.

    Attributes:
        package: Hash of this package.
        model: Hash of the module of the PyTorch model's class; empty where it has no file.
        packages: Versions of the packages that compute; None where one is missing.
    """

    package: str
    model: str
    packages: dict[str, str | None]

    @classmethod
    def here(cls, module: str) -> Code:
        """That of this process, for a model of ``module``."""
        installed = installed_distributions()
        return cls(
            hash_of_package(), hash_of_module(module), {n: installed.get(n) for n in NUMERICAL}
        )

    def differences(self, other: Code) -> list[str]:
        """What ``other`` has otherwise, in words."""
        found = [
            f"{name} {other.packages[name] or 'missing'}, expected {version or 'none'}"
            for name, version in self.packages.items()
            if other.packages[name] != version
        ]
        if other.package != self.package:
            found.append("another heimdall_onnx than the client's")
        if other.model != self.model:
            found.append(f"{'another' if other.model else 'no'} module of the model's class")
        return found


@dataclass(frozen=True)
class Job:
    """A pass that workers share.

    Attributes:
        model: The PyTorch model, pickled.
        onnx: The ONNX file's bytes.
        settings: Of the pass.
        data: The whole data, which each process opens for itself.
    """

    model: bytes = field(repr=False)
    onnx: bytes = field(repr=False)
    settings: PassSettings
    data: EvaluationData = field(repr=False)


class EvaluationWorker(WorkerPlugin):  # type: ignore[misc]
    """Gives a worker what all parts of a pass share.

    Args:
        job: The pass.
        module: Of the PyTorch model's class.
    """

    def __init__(self, job: Job, module: str) -> None:
        self.name = f"heimdall-evaluation-{uuid4().hex}"
        # Opened by the worker, so that what is wrong with it there is said as what it is.
        self._pickled: bytes = cloudpickle.dumps(job)
        self._code, self._module = Code.here(module), module
        self.problem = ""

    def setup(self, worker: Worker) -> None:
        """Called by Dask on the worker."""
        try:
            if worker.state.nthreads != 1:
                raise SchedulerError(
                    f"it takes {worker.state.nthreads} parts at a time, each with all of its "
                    "processors: start it with --nthreads 1"
                )
            if found := self._code.differences(Code.here(self._module)):
                raise SchedulerError("it would compute something else:" + listed(found))
        except HeimdallError as error:
            self.problem = str(error)
            raise

    # One part is worked on at a time, so that both are made once.

    @cached_property
    def job(self) -> Job:
        """The pass.

        Raises:
            DataError: If this worker can't open the data.
            SchedulerError: If it can't open the model.
        """
        if self.problem:
            raise SchedulerError(f"a worker on {socket.gethostname()}: {self.problem}")
        # Made by the process that this worker takes its work from, which runs code here.
        job: Job = cloudpickle.loads(self._pickled)
        return job

    @cached_property
    def models(self) -> Models:
        """Both models; raises what `job` does."""
        return _open(self.job)


def _open(job: Job) -> Models:
    import torch

    from heimdall_onnx.model.inference import open_session

    threads = usable_processors()
    torch.set_num_threads(threads)
    try:
        # As the job itself: made by the process that this worker takes its work from.
        model = torch.load(io.BytesIO(job.model), weights_only=False)
    except Exception as error:  # whatever the model's own code raises
        raise SchedulerError(
            f"a worker on {socket.gethostname()} can't open the model: {type(error).__name__}: "
            f"{shown(str(error))}; give it the model's code"
        ) from error
    with TemporaryDirectory(prefix="heimdall-evaluation-") as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(job.onnx)
        session = open_session(path, threads=threads, spinning=False)
    return Models.of(model, session, job.settings.signature)


def _plugin(name: str) -> EvaluationWorker:
    plugin: EvaluationWorker | None = get_worker().plugins.get(name)
    if plugin is None:
        raise SchedulerError(
            f"a worker on {socket.gethostname()} has not been prepared; it joined too late"
        )
    return plugin


def evaluate_part(name: str, start: int, stop: int) -> EvaluationPass:
    """The pass over the samples from ``start`` to ``stop``, on the worker that this runs on."""
    plugin = _plugin(name)
    job = plugin.job
    return pass_over(plugin.models, job.data, job.settings, range(start, stop))


def check_array(name: str, array: str) -> str:
    """What is wrong with the values of one of the dataset's arrays, as that worker sees them."""
    dataset = _plugin(name).job.data.dataset
    assert dataset is not None
    return dataset.problem_of(array)


def place() -> tuple[str, str]:
    """Host and processor of the worker that this runs on."""
    return socket.gethostname(), capture_environment().cpu
