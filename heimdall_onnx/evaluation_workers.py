"""Evaluation data that many workers read, each a part of a dataset, on Dask distributed.

Each worker opens the dataset for itself, in a folder that all of them see or in the bucket, with
the credentials of its own environment. The models travel once to each. What comes back is an
`EvaluationPass` of each part, and they are merged as they come, so that the memory of neither grows
with the data. Meanwhile all values are held against the dataset's digest, an array at a time.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloudpickle

from heimdall_onnx.environment import NUMERICAL, capture_environment, installed_distributions
from heimdall_onnx.errors import EvidenceError, ParameterError, SchedulerError, UnavailableError
from heimdall_onnx.evaluation import EvaluationData
from heimdall_onnx.evaluation_pass import EvaluationPass, Models, PassSettings, pass_over
from heimdall_onnx.logs import get_logger
from heimdall_onnx.processors import usable_processors
from heimdall_onnx.shards import refuse
from heimdall_onnx.untrusted import listed

if TYPE_CHECKING:
    from distributed import Client, Future

log = get_logger(__name__)

# A part is that much of the inputs, so that its answers come back every minute or so.
_PART_BYTES = 64 << 20
_PARTS_A_WORKER = 4
# So many parts are with the scheduler for each that can run: no worker waits for this process.
_AHEAD = 2


@dataclass(frozen=True)
class EvaluationWorkers:
    """Who takes the models over a dataset.

    Attributes:
        count: Workers to start on this machine, each with its share of the processors.
        scheduler: Address of a Dask scheduler whose workers to take instead, e.g.
            ``tls://host:8786``.
    """

    count: int = 0
    scheduler: str = ""

    def pass_over(
        self,
        model: Any,
        onnx_path: Path,
        data: EvaluationData,
        settings: PassSettings,
        progress: Callable[[int, int], None] | None = None,
    ) -> EvaluationPass:
        """Take both models over all of the data.

        Args:
            model: The PyTorch model, in eval mode; its class must be known to the workers.
            onnx_path: The ONNX file.
            data: A dataset.
            settings: Of the pass.
            progress: Called with (samples done, samples in all).

        Raises:
            DataError: If the data can't be read, or are not what their digest says.
            EvidenceError: If a model can't run on a batch, the outputs have different shapes, or
                the workers died.
            ParameterError: If the data are no dataset.
            SchedulerError: If the scheduler can't be reached, or has no workers, or some with other
                versions of the packages that compute.
            StoreError: If the store of a dataset fails.
        """
        dataset = data.dataset
        if dataset is None or dataset.count != data.count:
            raise ParameterError(
                f"workers share the samples of a dataset; {data.source} is none, or only its "
                "beginning is taken: leave eval_workers and eval_scheduler out"
            )
        shipped = _Shipped.of(model, onnx_path, settings)
        with self._client() as client:
            if not (workers := sum(client.nthreads().values())):
                raise SchedulerError(
                    f"the scheduler at {self.scheduler} has no workers: start some"
                )
            where = _require_same_versions(client.run(_place))
            sent = client.scatter([shipped, data], broadcast=True, hash=False)
            checks = [
                client.submit(dataset.problem_of, name, pure=False) for name in dataset.arrays
            ]
            found = EvaluationPass(settings)
            done = 0
            for rows, part in _parts(client, sent, _ranges(data, settings, workers), workers):
                found.merge(part)
                done += len(rows)
                if progress is not None:
                    progress(done, data.count)
            refuse(dataset.address, filter(None, client.gather(checks)))
        found.evaluated_by = (
            f"{workers} workers, {where}"
            if self.scheduler
            else f"{workers} workers on this machine"
        )
        log.info("evaluated on workers", workers=workers, samples=done)
        return found

    @contextmanager
    def _client(self) -> Iterator[Client]:
        try:
            from heimdall_onnx.dask_workers import local_client, scheduler_client
        except ModuleNotFoundError as error:
            raise UnavailableError(
                f"workers need the package {error.name}: pip install 'heimdall-onnx[fleet]'"
            ) from error
        opened = scheduler_client(self.scheduler) if self.scheduler else local_client(self.count)
        with opened as client:
            yield client


def _place() -> tuple[str, str, dict[str, str | None]]:
    """Host, processor and what computes on the worker that this runs on."""
    here, installed = capture_environment(), installed_distributions()
    return socket.gethostname(), here.cpu, {name: installed.get(name) for name in NUMERICAL}


def _require_same_versions(places: Mapping[str, tuple[str, str, dict[str, str | None]]]) -> str:
    """Where the workers are, in words, if they compute with this process's versions."""
    wanted = _place()[2]
    differing = [
        f"{address}: {name} {versions[name] or 'missing'}, expected {wanted[name] or 'none'}"
        for address, (_, _, versions) in places.items()
        for name in wanted
        if versions[name] != wanted[name]
    ]
    if differing:
        raise SchedulerError(
            "these workers would compute something else than what is released; give them the same "
            "versions:" + listed(differing)
        )
    hosts = {host for host, _, _ in places.values()}
    processors = sorted({processor for _, processor, _ in places.values()})
    return f"{len(hosts)} machines: {', '.join(processors)}"


@dataclass(frozen=True)
class _Shipped:
    """Both models on their way to a worker; equal ones are opened once there."""

    model: bytes = field(repr=False)
    onnx: bytes = field(repr=False)
    settings: PassSettings
    digest: str

    @classmethod
    def of(cls, model: Any, onnx_path: Path, settings: PassSettings) -> _Shipped:
        pickled, onnx = cloudpickle.dumps(model), onnx_path.read_bytes()
        digest = hashlib.sha256(pickled + onnx).hexdigest()
        return cls(pickled, onnx, settings, digest)

    def __hash__(self) -> int:
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Shipped) and self.digest == other.digest


@lru_cache(maxsize=1)
def _opened(shipped: _Shipped) -> Models:
    """Both models, on a worker that has its processors for one part at a time."""
    import torch

    from heimdall_onnx.inference import open_session, run_onnx, run_pytorch

    threads = usable_processors()
    torch.set_num_threads(threads)
    # Made by the process that this worker takes its work from, which may run any code here.
    model = cloudpickle.loads(shipped.model)
    signature = shipped.settings.signature
    with tempfile.TemporaryDirectory(prefix="heimdall-evaluation-") as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(shipped.onnx)
        session = open_session(path, threads=threads, spinning=False)
    return Models(
        lambda inputs: run_pytorch(model, inputs, signature),
        lambda inputs: run_onnx(session, inputs, signature),
    )


def evaluate_part(shipped: _Shipped, data: EvaluationData, start: int, stop: int) -> EvaluationPass:
    """The pass over the samples from ``start`` to ``stop``, on the worker that this runs on."""
    return pass_over(_opened(shipped), data, shipped.settings, range(start, stop))


def _ranges(data: EvaluationData, settings: PassSettings, workers: int) -> Iterator[range]:
    """The samples in parts that begin where batches do."""
    row_bytes = sum(a.dtype.itemsize * math.prod(a.shape[1:]) for a in data.inputs.values())
    wanted = min(_PART_BYTES // max(row_bytes, 1), data.count // (_PARTS_A_WORKER * workers))
    step = max(1, wanted // settings.batch_size) * settings.batch_size
    for start in range(0, data.count, step):
        yield range(start, min(start + step, data.count))


def _parts(
    client: Client, sent: list[Future], ranges: Iterator[range], workers: int
) -> Iterator[tuple[range, EvaluationPass]]:
    from distributed import as_completed
    from distributed.scheduler import KilledWorker

    running: dict[Future, range] = {}

    def submit(rows: range) -> Future:
        future = client.submit(evaluate_part, *sent, rows.start, rows.stop, pure=False)
        running[future] = rows
        return future

    finished = as_completed([submit(rows) for rows in itertools.islice(ranges, _AHEAD * workers)])
    for future in finished:
        rows = running.pop(future)
        try:
            part = future.result()
        except KilledWorker as error:
            raise EvidenceError(
                f"the workers that had the samples {rows.start} to {rows.stop - 1} died, the last "
                f"one at {error.last_worker.address}; if they ran out of memory, take fewer"
            ) from error
        for further in itertools.islice(ranges, 1):
            finished.add(submit(further))
        yield rows, part
        future.release()
