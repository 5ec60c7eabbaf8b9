"""A pass that several workers share says what one process says, and refuses what it would."""

import itertools
import random
import shutil
import time
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch
from distributed import LocalCluster, Status, default_client
from models import SmallNet
from parts import rank_bounds
from runs import environment

from heimdall_onnx.archive.content import upload_dataset
from heimdall_onnx.common.errors import DataError, EvidenceError, ParameterError, SchedulerError
from heimdall_onnx.common.parameters import EvaluationWorkers
from heimdall_onnx.data.dataset.dataset import open_dataset
from heimdall_onnx.data.dataset.writer import create_dataset
from heimdall_onnx.data.evaluation import load_evaluation_data
from heimdall_onnx.evidence.parity.compare import compare_outputs
from heimdall_onnx.evidence.parity.one_pass import EvaluationPass, Models, pass_over, pass_settings
from heimdall_onnx.evidence.parity.statistics import Quantiles
from heimdall_onnx.evidence.parity.worker import Code
from heimdall_onnx.evidence.parity.workers import evaluate_on, part_ranges
from heimdall_onnx.model.inference import open_session, run_onnx, run_pytorch
from heimdall_onnx.model.onnx.export import export_model

COUNT = 1200
# Quantiles of that many values are estimates; everything else is exact.
ESTIMATES = {"p50", "p99", "p999", "ulp_p50", "ulp_p999"}
TWO = EvaluationWorkers(count=2)
SIGNATURE = SmallNet.signature


@pytest.fixture(scope="module")
def model():
    return SmallNet()


@pytest.fixture(scope="module")
def onnx_path(model, tmp_path_factory):
    return export_model(model, tmp_path_factory.mktemp("model") / "model.onnx", opset=14).path


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "own.zarr"
    with create_dataset(path, meta={"provenance": "drawn"}) as writer:
        for start in range(0, COUNT, 400):
            scale = rng.lognormal(0, 2, (400, 1, 1, 1))
            inputs = {"signal": (scale * rng.standard_normal((400, 2, 8, 8))).astype(np.float32)}
            positions = rng.uniform([45, 5], [55, 15], (400, 2))
            writer.append(inputs, positions, [f"event {start + i}" for i in range(400)])
    return open_dataset(path)


@pytest.fixture
def own(dataset, tmp_path):
    """A copy to damage."""
    return shutil.copytree(dataset.path, tmp_path / "own.zarr")


@pytest.fixture(scope="module")
def alone(model, onnx_path, dataset):
    """The report of one process with one thread, as each worker has it."""
    torch.set_num_threads(1)
    data = load_evaluation_data(dataset.path, model.signature)
    session = open_session(onnx_path, threads=1, spinning=False)
    return data, compare_outputs(model, session, data, model.signature)


def without_estimates(report):
    return [
        {k: v for k, v in vars(output).items() if k not in ESTIMATES}
        for output in report.evaluation
    ]


def require_equal(found, expected):
    assert without_estimates(found) == without_estimates(expected)
    assert [g.passed for g in found.gates()] == [g.passed for g in expected.gates()]
    assert found.noise_floor == expected.noise_floor
    assert (found.samples, found.worst_where) == (expected.samples, expected.worst_where)
    for side in ("pytorch", "onnx", "worst_inputs"):
        ours, theirs = getattr(found, side), getattr(expected, side)
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    for ours, theirs in zip(found.uncertainty, expected.uncertainty, strict=True):
        assert ours.samples == theirs.samples == COUNT
        assert ours.median_m == pytest.approx(theirs.median_m, rel=0.02)
        assert ours.calibration.coverage == theirs.calibration.coverage
        assert ours.calibration.nll == theirs.calibration.nll
        assert ours.calibration.z_rms == theirs.calibration.z_rms
    assert found.ground.displacement_max_m == expected.ground.displacement_max_m


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(n, marks=pytest.mark.thorough) for n in (1, 2))]
)
def test_parts_in_any_order_merge_to_the_whole_bit_by_bit(model, onnx_path, alone, seed):
    data, _ = alone
    signature = model.signature
    session = open_session(onnx_path, threads=1, spinning=False)
    models = Models.of(model, session, signature)
    settings = settings_of(data, reference_samples=32)
    rng = random.Random(seed)
    cuts = [0, *sorted(rng.sample(range(8, COUNT, 8), 5)), COUNT]
    parts = [pass_over(models, data, settings, range(a, b)) for a, b in itertools.pairwise(cuts)]
    rng.shuffle(parts)
    merged = EvaluationPass(settings)
    for part in parts:
        merged.merge(part)
    whole = pass_over(models, data, settings, range(COUNT))
    for ours, theirs in zip(merged.outputs(data), whole.outputs(data), strict=True):
        kept = vars(theirs).keys() - ESTIMATES
        assert {k: getattr(ours, k) for k in kept} == {k: getattr(theirs, k) for k in kept}
    assert (merged.worst.first, merged.worst.excess) == (whole.worst.first, whole.worst.excess)
    for side in (0, 1):
        for name, array in whole.kept(side).items():
            np.testing.assert_array_equal(merged.kept(side)[name], array)
    assert len(merged.reference()) == len(whole.reference())


class Killer:
    """Kills one of the workers at the first sign of progress, and writes down all of it."""

    def __init__(self, count):
        self.count, self.seen = count, []
        self.others = psutil.Process().children(recursive=True)

    def __call__(self, done, of):
        if not self.seen:
            started = set(psutil.Process().children(recursive=True)).difference(self.others)
            workers = [p for p in started if "spawn_main" in str(p.cmdline())]
            assert len(workers) == self.count
            workers[0].kill()
        self.seen.append((done, of))


@pytest.mark.thorough
def test_single_worker_that_is_lost_is_started_again(model, onnx_path, alone):
    data, expected = alone
    one = EvaluationWorkers(count=1)
    found = compare_outputs(model, onnx_path, data, SIGNATURE, workers=one, progress=Killer(1))
    assert [o.count for o in found.evaluation] == [o.count for o in expected.evaluation]


def test_workers_of_which_one_is_lost_say_what_one_process_says(model, onnx_path, alone):
    data, expected = alone
    session = open_session(onnx_path, threads=1, spinning=False)
    watch = Killer(2)
    found = compare_outputs(model, onnx_path, data, SIGNATURE, workers=TWO, progress=watch)
    require_equal(found, expected)  # each has one thread, as one process had
    for output in found.evaluation:
        errors = np.concatenate(
            [
                np.abs(
                    run_pytorch(model, batch, SIGNATURE)[output.output].astype(np.float64)
                    - run_onnx(session, batch, SIGNATURE)[output.output]
                ).ravel()
                for _, batch, _ in data.batches(8)
            ]
        )
        stated = Quantiles()
        stated.update(errors)
        for rank, value in ((0.5, output.p50), (0.99, output.p99), (0.999, output.p999)):
            low, high = rank_bounds(stated, rank)
            kept = np.float32(errors)
            assert (kept < value).mean() <= high
            assert (kept <= value).mean() >= low
    assert found.evaluated_by == "2 workers on this machine"
    assert watch.seen[-1] == (COUNT, COUNT)
    assert len(watch.seen) > 4
    worst = found.evaluation[0].worst[0]
    assert worst.shard == "inputs/signal/c/0/0/0/0"
    # The sample can be looked at where it is.
    looked_at = data.dataset.rows([worst.sample])["signal"]
    np.testing.assert_array_equal(looked_at, data.rows([worst.sample])["signal"])


def scheduler_of(**options):
    """A scheduler on loopback and its worker, a thread of this process unless told otherwise."""
    there = {"host": "127.0.0.1", "protocol": "tcp://", "dashboard_address": "127.0.0.1:0"}
    one = {"n_workers": 1, "threads_per_worker": 1, "processes": False}
    return LocalCluster(**{**there, **one, **options})


@pytest.fixture(scope="module")
def cluster():
    with scheduler_of() as started:
        yield started


@pytest.fixture
def shared(cluster):
    return EvaluationWorkers(scheduler=cluster.scheduler_address)


@pytest.mark.services
@pytest.mark.thorough
def test_worker_of_a_scheduler_reads_a_dataset_in_the_bucket(
    model, onnx_path, dataset, alone, embedded_settings, bucket, mlflow_environment
):
    address = upload_dataset(bucket, dataset, "sets/own")
    data = load_evaluation_data(address, model.signature, verify=False)
    own = {**environment(embedded_settings), "OMP_NUM_THREADS": "1"}
    with scheduler_of(processes=True, env=own) as cluster:
        shared = EvaluationWorkers(scheduler=cluster.scheduler_address)
        found = compare_outputs(model, onnx_path, data, model.signature, workers=shared)
    expected = alone[1]
    assert found.evaluated_by.startswith("1 worker, 1 machine: ")
    assert [(o.count, o.violations) for o in found.evaluation] == [
        (o.count, o.violations) for o in expected.evaluation
    ]
    # It is not held to the processors that a sum is rounded by.
    for ours, theirs in zip(found.evaluation, expected.evaluation, strict=True):
        assert ours.mean == pytest.approx(theirs.mean, rel=0.5)
    assert [u.samples for u in found.uncertainty] == [COUNT, COUNT]


def test_values_that_are_not_those_of_the_digest_are_refused(model, onnx_path, own, shared):
    shard = own / "positions" / "c" / "0" / "0"
    other = open_dataset(own)
    swapped = other.readers["positions"].rows(np.arange(COUNT))[::-1]
    with create_dataset(own.parent / "other.zarr", meta={}) as writer:
        writer.append(other.rows(range(COUNT)), swapped, [f"e{i}" for i in range(COUNT)])
    shard.write_bytes((own.parent / "other.zarr" / "positions" / "c" / "0" / "0").read_bytes())
    data = load_evaluation_data(own, model.signature, verify=False)
    with pytest.raises(DataError, match="positions: expected SHA-256"):
        compare_outputs(model, onnx_path, data, model.signature, workers=shared)
    with pytest.raises(DataError, match="positions: expected SHA-256"):
        load_evaluation_data(own, model.signature)


def test_model_that_can_not_run_is_said_as_by_one_process(onnx_path, alone, shared):
    class Deaf(SmallNet):
        def forward(self, signal):
            raise RuntimeError("no ears")

    with pytest.raises(EvidenceError, match=r"can't run on .*no ears"):
        evaluate_on(shared, Deaf(), onnx_path, alone[0], settings_of(alone[0]))


def settings_of(data, batch_size=8, reference_samples=8):
    return pass_settings(
        data,
        SmallNet.signature,
        tolerance=1e-5,
        batch_size=batch_size,
        reference_samples=reference_samples,
        pytorch=lambda batch: run_pytorch(SmallNet(), batch, SmallNet.signature),
    )


def test_only_a_whole_dataset_is_shared(model, onnx_path, alone):
    data = alone[0].head(20)
    with pytest.raises(ParameterError, match="workers share the samples of a dataset"):
        evaluate_on(TWO, model, onnx_path, data, settings_of(data))
    with pytest.raises(ParameterError, match="workers share the samples of a dataset"):
        evaluate_on(TWO, model, onnx_path, replace(alone[0], dataset=None), settings_of(data))


def test_scheduler_that_is_not_there_is_named(model, onnx_path, alone, unused_port, monkeypatch):
    monkeypatch.setattr("heimdall_onnx.common.dask.SCHEDULER_TIMEOUT_S", 1)
    workers = EvaluationWorkers(scheduler=f"tcp://127.0.0.1:{unused_port}")
    with pytest.raises(SchedulerError, match="no scheduler answers at tcp://"):
        evaluate_on(workers, model, onnx_path, alone[0], settings_of(alone[0]))


def test_workers_with_other_code_are_refused():
    here = Code.here("models")
    other = replace(here, packages={**here.packages, "onnxruntime": "1.0", "torch": None})
    assert here.differences(here) == []
    found = "; ".join(here.differences(other))
    assert "onnxruntime 1.0, expected 1." in found
    assert "torch missing, expected" in found
    assert here.differences(replace(here, package="x")) == [
        "another heimdall_onnx than the client's"
    ]
    assert here.differences(replace(here, model="")) == ["no module of the model's class"]
    assert here.differences(replace(here, model="x")) == ["another module of the model's class"]


@pytest.mark.thorough
def test_what_keeps_a_worker_from_taking_part_is_said(model, onnx_path, dataset, alone, tmp_path):
    own = shutil.copytree(dataset.path, tmp_path / "own.zarr")
    data = load_evaluation_data(own, model.signature)
    settings = settings_of(data)

    def refusal(cluster, kind, evaluated=data):
        workers = EvaluationWorkers(scheduler=cluster.scheduler_address)
        with pytest.raises(kind) as refused:
            evaluate_on(workers, model, onnx_path, evaluated, settings)
        return str(refused.value)

    with scheduler_of(threads_per_worker=2) as cluster:
        assert "takes 2 parts at a time" in refusal(cluster, SchedulerError)
    with scheduler_of(n_workers=0) as cluster:
        assert "has no workers" in refusal(cluster, SchedulerError)
    with scheduler_of() as cluster:
        # As on another machine, where the folder is not, or another one is.
        own.rename(tmp_path / "gone.zarr")
        assert "can't be opened" in refusal(cluster, DataError)
        shutil.copytree(tmp_path / "gone.zarr", own, copy_function=shutil.copyfile)
        assert "is not the file that was there" in refusal(cluster, DataError)


LOST = r"connection to the scheduler .* was lost"


def test_scheduler_that_is_lost_is_a_service_that_failed(model, onnx_path, alone, monkeypatch):
    data, _ = alone
    closed = []

    def close(done, of):
        cluster.close()
        closed.append(time.monotonic())

    monkeypatch.setattr("heimdall_onnx.evidence.parity.workers.RECONNECTS_WITHIN_S", 0.5)
    with scheduler_of() as cluster:
        workers = EvaluationWorkers(scheduler=cluster.scheduler_address)
        with pytest.raises(SchedulerError, match=LOST):
            evaluate_on(workers, model, onnx_path, data, settings_of(data), close)
    # Dask would go on asking it for half a minute.
    assert time.monotonic() - closed[0] < 25


def test_scheduler_keeps_nothing_when_only_the_connection_is_lost(
    model, onnx_path, alone, cluster, shared
):
    data, _ = alone

    def cut(done, of):
        client = default_client()
        client.loop.add_callback(client.scheduler_comm.comm.abort)

    with pytest.raises(SchedulerError, match=LOST):
        evaluate_on(shared, model, onnx_path, data, settings_of(data), cut)
    assert cluster.status == Status.running
    assert not [name for name in cluster.scheduler.worker_plugins if "evaluation" in name]


@pytest.mark.parametrize(("workers", "batch"), [(1, 8), (2, 7), (64, 512), (3, 5000)])
def test_parts_begin_where_batches_do_and_leave_nothing_out(alone, workers, batch):
    data = alone[0]
    settings = settings_of(data, batch)
    found = [*part_ranges(data, settings, workers)]
    assert [i for rows in found for i in rows] == [*range(COUNT)]
    assert all(rows.start % settings.batch_size == 0 for rows in found)
