"""Releases whose latency is not measured, or only on processors of their own."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pytest
import records
from holder import holder
from releases import PREFIX, changed_notebook, nothing_is_offered, smoke

from heimdall_onnx.archive.record import Record, read_notebook
from heimdall_onnx.archive.release import Release
from heimdall_onnx.archive.verify import verify_release
from heimdall_onnx.evidence.latency.cores import lock_folder
from heimdall_onnx.evidence.latency.timed import EXCLUSIVE_CORES
from heimdall_onnx.release.result import ReleaseResult
from heimdall_onnx.release.runner import release_checkpoint
from heimdall_onnx.review.reproduce.run import reproduce_release
from heimdall_onnx.services.connection import connect
from heimdall_onnx.services.settings import Settings
from heimdall_onnx.services.store import Bucket

pytestmark = pytest.mark.services
REASON = "not measured: the parameter measure_latency is False"


@pytest.fixture
def settings(make_settings) -> Settings:
    """The embedded store with a registry and a home of the test's own."""
    return make_settings("home")


@dataclass(frozen=True)
class Released:
    result: ReleaseResult
    settings: Settings
    bucket: str

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{PREFIX}/{self.result.version}"


@pytest.fixture(scope="module")
def untimed(make_settings, s3, small) -> Released:
    """One complete release without latency, with all figures."""
    settings, bucket = make_settings("untimed"), "test-untimed"
    result = release_checkpoint(smoke(small, bucket), settings)
    assert result.success, result.error
    return Released(result, settings, bucket)


def record_of(result: ReleaseResult) -> Record:
    return records.read(Path(result.local_report).with_name("report.ipynb"))


def outputs_of(result: ReleaseResult, cell: str) -> str:
    cells = read_notebook(Path(result.local_report).with_name("report.ipynb")).cells
    return str(next(c for c in cells if c.id == cell).outputs)


# Without latency


def test_release_without_latency_is_complete_and_says_so(untimed, s3):
    result = untimed.result
    assert (result.exit_code, result.speedup, result.recommended) == (0, None, None)
    assert len(result.gates) > 8
    assert EXCLUSIVE_CORES not in {gate["name"] for gate in result.gates}
    cells = read_notebook(Path(result.local_report).with_name("report.ipynb")).cells
    assert f"| speedup | {REASON} |" in cells[0].source
    manifest = Bucket(s3, untimed.bucket).read_json(f"{PREFIX}/{result.version}/manifest.json")
    assert manifest["parameters"]["measure_latency"] is False
    assert manifest["threads"] is None


@pytest.mark.parametrize("cell", ["measure", "latency", "machine", "throughput", "members"])
def test_every_cell_of_latency_shows_the_reason(untimed, cell):
    assert "Not measured:** the parameter measure_latency is False" in outputs_of(
        untimed.result, cell
    )


def test_other_steps_are_as_ever(untimed):
    assert "No variants were asked for" in outputs_of(untimed.result, "variants")
    assert outputs_of(untimed.result, "operator-times-figure") == "[]"
    assert "image/png" in outputs_of(untimed.result, "parity-scatter")
    assert "| export |" in outputs_of(untimed.result, "cost")


def test_record_and_metrics_have_no_figure_of_speed(untimed):
    record = record_of(untimed.result)
    assert record.latency is record.speedup is record.threads is None
    assert record.speedup_text == REASON
    assert record.latency_not_measured == REASON.removeprefix("not measured: ")
    assert not [name for name in record.metrics if name.startswith(("speedup", "inference_"))]
    tracking = untimed.settings.tracking_uri.get_secret_value()
    run = mlflow.MlflowClient(tracking).get_run(untimed.result.run_id)
    assert "speedup" not in run.data.metrics
    assert run.data.metrics["positions_mae"] <= 1e-5


def test_release_without_latency_verifies_and_reproduces(untimed):
    connection = connect(untimed.settings)
    assert [f for f in verify_release(Release.at(connection, untimed.uri)) if not f.holds] == []
    repeated = reproduce_release(Release.at(connection, untimed.uri))
    assert repeated.failures == ()
    assert repeated.exact
    assert repeated.latency == ()
    assert "latency, which may differ: not measured" in repeated.to_text()


# On exclusive cores


def test_cores_that_another_measurement_holds_fail_their_gate_and_no_other(
    settings, small, s3, bucket, tmp_path, no_other_measurement
):
    number = max(os.sched_getaffinity(0))
    parameters = smoke(small, bucket.name, exclusive_cores=True, measure_latency=True)
    with holder(lock_folder(), number) as process:
        result = release_checkpoint(parameters, settings, notebook=changed_notebook(tmp_path))
    assert result.exit_code == 3
    assert result.speedup is None
    failed = [gate for gate in result.gates if not gate["passed"]]
    assert [gate["name"] for gate in failed] == [EXCLUSIVE_CORES]
    assert len(result.gates) > 8
    where = f"cores of {platform.node()}: core {number} by process {process.pid};"
    assert where in failed[0]["detail"]
    assert f"{EXCLUSIVE_CORES}: expected held by this measurement alone, measured taken" in (
        result.error
    )
    record = record_of(result)
    assert record.latency is None
    assert where in record.speedup_text
    assert "Not measured:** another measurement holds" in outputs_of(result, "measure")
    nothing_is_offered(s3, settings, bucket.name)


@pytest.mark.thorough
def test_cores_of_its_own_are_named_where_the_latency_is(
    settings, small, s3, bucket, tmp_path, no_other_measurement
):
    parameters = smoke(small, bucket.name, exclusive_cores=True, measure_latency=True)
    result = release_checkpoint(parameters, settings, notebook=changed_notebook(tmp_path))
    assert result.success, result.error
    assert result.speedup > 0
    (gate,) = [gate for gate in result.gates if gate["name"] == EXCLUSIVE_CORES]
    assert gate["passed"]
    cores = sorted(os.sched_getaffinity(0))
    found = record_of(result).latency.cores
    assert (found.host, list(found.numbers), found.exclusive) == (platform.node(), cores, True)
    assert "held against other measurements" in outputs_of(result, "machine")
    # A repetition judges nothing by its latency, so it needs no cores of its own.
    connection, uri = connect(settings), f"{bucket.uri()}{PREFIX}/{result.version}"
    with holder(lock_folder()):
        repeated = reproduce_release(Release.at(connection, uri))
    assert repeated.failures == ()
    assert repeated.latency
