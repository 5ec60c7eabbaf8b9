"""Evaluation data that many workers read, each a part of a dataset, on Dask distributed.

Each worker opens the dataset for itself, in a folder that all of them see or in the bucket, with
the credentials of its own environment. The models travel once to each. What comes back is an
`EvaluationPass` of each part, and they are merged as they come, so that the memory of neither grows
with the data. Meanwhile all values are held against the dataset's digest, an array at a time, on
every machine that has a folder of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from distributed import Client, Future, as_completed
from distributed.comm import get_address_host
from distributed.scheduler import KilledWorker
from distributed.utils import CancelledError

from heimdall_onnx.common.dask import connected, local_client, scheduler_client
from heimdall_onnx.common.errors import EvidenceError, HeimdallError, ParameterError, SchedulerError
from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.common.parameters import EvaluationWorkers
from heimdall_onnx.common.text import count_of, shown
from heimdall_onnx.data.dataset.shards import refuse
from heimdall_onnx.data.evaluation import EvaluationData
from heimdall_onnx.evidence.parity.one_pass import EvaluationPass, PassSettings
from heimdall_onnx.evidence.parity.worker import (
    EvaluationWorker,
    Job,
    check_array,
    evaluate_part,
    place,
)
from heimdall_onnx.model.copies import pickle_model

log = get_logger(__name__)

# A part is that much of the inputs, so that its answers come back every minute or so.
_PART_BYTES = 64 << 20
_PARTS_A_WORKER = 4
# So many parts are with the scheduler for each that can run: no worker waits for this process.
_AHEAD = 2
RECONNECTS_WITHIN_S = 5


def evaluate_on(
    workers: EvaluationWorkers,
    model: Any,
    onnx_path: Path,
    data: EvaluationData,
    settings: PassSettings,
    progress: Callable[[int, int], None] | None = None,
) -> EvaluationPass:
    """Take both models over all of the data.

    Args:
        workers: Who takes them.
        model: The PyTorch model, in eval mode; its class must be known to the workers.
        onnx_path: The ONNX file.
        data: A dataset.
        settings: Of the pass.
        progress: Called with (samples done, samples in all).

    Raises:
        DataError: If the data can't be read, or are not what their digest says.
        EvidenceError: If a model can't run on a batch or be pickled, the outputs have different
            shapes, or the workers died.
        ParameterError: If the data are no dataset.
        SchedulerError: If the scheduler can't be reached, or has no workers, or some that would
            compute something else.
        StoreError: If the store of a dataset fails.
    """
    dataset = data.dataset
    if dataset is None or dataset.count != data.count:
        raise ParameterError(
            f"workers share the samples of a dataset; {data.source} is none, or only its "
            "beginning is taken: leave eval_workers and eval_scheduler out"
        )
    job = Job(pickle_model(model), onnx_path.read_bytes(), settings, data)
    plugin = EvaluationWorker(job, type(model).__module__)
    opened = (
        scheduler_client(workers.scheduler) if workers.scheduler else local_client(workers.count)
    )
    with opened as client, _prepared(client, plugin):
        if not (count := len(client.nthreads())):
            raise SchedulerError(f"the scheduler {workers.scheduler} has no workers: start some")
        places: Mapping[str, tuple[str, str]] = client.run(place)
        checks = _submit_checks(client, plugin.name, data, places)
        found = EvaluationPass(settings)
        done = 0
        for rows, part in _parts(client, plugin.name, part_ranges(data, settings, count), count):
            found.merge(part)
            done += len(rows)
            if progress is not None:
                progress(done, data.count)
        refuse(dataset.address, {problem for c in checks if (problem := _result_of(c))})
    found.evaluated_by = f"{count_of(count, 'worker')} on this machine"
    if workers.scheduler:
        hosts = {host for host, _ in places.values()}
        processors = sorted({processor for _, processor in places.values()})
        where = f"{count_of(len(hosts), 'machine')}: {', '.join(processors)}"
        found.evaluated_by = f"{count_of(count, 'worker')}, {where}"
    log.info("evaluated on workers", workers=count, samples=done)
    return found


@contextmanager
def _prepared(client: Client, plugin: Any) -> Iterator[None]:
    """Give every worker, and those to come, what they need."""
    try:
        client.register_plugin(plugin)
    except HeimdallError as error:
        raise type(error)(f"a worker can't take part in the evaluation: {error}") from error
    except Exception as error:  # whatever a worker of another version raises
        raise SchedulerError(
            f"a worker can't be prepared for the evaluation: {type(error).__name__}: "
            f"{shown(str(error))}; it needs the same version of this package as the client"
        ) from error
    try:
        yield
    finally:
        # One that only the connection to was lost would keep model and data for good; to ask one
        # that is gone takes half a minute.
        if connected(client, within_s=RECONNECTS_WITHIN_S):
            with suppress(Exception):
                client.unregister_worker_plugin(plugin.name)


def _submit_checks(
    client: Client, name: str, data: EvaluationData, places: Mapping[str, tuple[str, str]]
) -> list[Future]:
    """Hold each array against its hash: once in the bucket, once on each machine for a folder."""
    assert data.dataset is not None
    anywhere: list[dict[str, Any]] = [{}]
    # A machine's workers may be others by then, or gone with it.
    by_host: list[dict[str, Any]] = [
        {"workers": host, "allow_other_workers": True}
        for host in {get_address_host(address) for address in places}
    ]
    stored = data.dataset.address.startswith("s3://")
    return [
        client.submit(check_array, name, array, pure=False, **where)
        for array in data.dataset.arrays
        for where in (anywhere if stored else by_host)
    ]


def part_ranges(data: EvaluationData, settings: PassSettings, workers: int) -> Iterator[range]:
    """The samples in parts that begin where batches do."""
    wanted = min(_PART_BYTES // max(data.row_bytes, 1), data.count // (_PARTS_A_WORKER * workers))
    step = max(1, wanted // settings.batch_size) * settings.batch_size
    for start in range(0, data.count, step):
        yield range(start, min(start + step, data.count))


def _parts(
    client: Client, name: str, ranges: Iterator[range], workers: int
) -> Iterator[tuple[range, EvaluationPass]]:
    running: dict[Future, range] = {}

    def submit(rows: range) -> Future:
        future = client.submit(evaluate_part, name, rows.start, rows.stop, pure=False)
        running[future] = rows
        return future

    finished = as_completed([submit(rows) for rows in itertools.islice(ranges, _AHEAD * workers)])
    for future in finished:
        rows = running.pop(future)
        part: EvaluationPass = _result_of(future)
        for further in itertools.islice(ranges, 1):
            finished.add(submit(further))
        yield rows, part
        future.release()


def _result_of(future: Future) -> Any:
    """What a task gave.

    Raises:
        EvidenceError: If the workers that had it died.
        HeimdallError: As the task raised it.
        SchedulerError: If the connection to the scheduler was lost.
    """
    try:
        return future.result()
    except KilledWorker as error:
        raise EvidenceError(
            f"the workers that had a part of the evaluation data died, the last one at "
            f"{error.last_worker.address}; if they ran out of memory, take fewer"
        ) from error
    except CancelledError as error:
        raise SchedulerError(
            "the connection to the scheduler of the evaluation was lost; start it again, and run "
            "again"
        ) from error
