"""Every way a release may fail, and what it leaves behind."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext

import mlflow
import numpy as np
import psutil
import pytest
import torch
from releases import (
    PREFIX,
    Inputs,
    changed_notebook,
    keys,
    nothing_is_offered,
    smoke,
    versions,
)

from heimdall_onnx.common.errors import RegistryError, StoreError
from heimdall_onnx.release import runner as release
from heimdall_onnx.release.runner import release_checkpoint
from heimdall_onnx.services.registry import MLflowTracker
from heimdall_onnx.services.settings import Settings

pytestmark = pytest.mark.services


@pytest.fixture
def settings(make_settings) -> Settings:
    """The embedded store with a registry and a home of the test's own."""
    return make_settings("home")


# Gates and input


def test_failing_gates_keep_the_report_and_offer_nothing(settings, small, s3, bucket, tmp_path):
    parameters = smoke(small, bucket.name, model="models:UnclampedNet", tolerance=1e-12)
    result = release_checkpoint(parameters, settings, notebook=changed_notebook(tmp_path))
    assert result.exit_code == 3
    assert "mean absolute error: expected ≤ 1e-12" in result.error
    assert "range of spread: expected" in result.error
    assert len(result.gates) > 8
    assert result.report_uri.startswith(f"{bucket.uri()}{PREFIX}/failed/v")
    nothing_is_offered(s3, settings, bucket.name)
    failed = {key.rsplit("/", 1)[1] for key in keys(s3, bucket.name)}
    assert failed == {"report.ipynb", "report.html"}
    run = mlflow.MlflowClient(settings.tracking_uri.get_secret_value()).get_run(result.run_id)
    assert run.info.status == "FAILED"


def test_untraceable_model_keeps_its_report_and_offers_nothing(settings, small, s3, bucket):
    result = release_checkpoint(smoke(small, bucket.name, model="models:BranchingNet"), settings)
    assert result.exit_code == 3, result.error
    assert "`return super().forward(-signal if signal.sum() > 0 else signal)`" in result.error
    nothing_is_offered(s3, settings, bucket.name)
    assert any(key.endswith("report.html") for key in keys(s3, bucket.name))


def test_pickled_code_is_bad_input(settings, small, s3, bucket, tmp_path):
    path = tmp_path / "code.ckpt"
    torch.save({"weight": Inputs(path, path)}, path)
    result = release_checkpoint(smoke(small, bucket.name, checkpoint=str(path)), settings)
    assert result.exit_code == 2, result.error
    assert "no tensors that are plain data" in result.error
    assert "Traceback" not in result.error
    nothing_is_offered(s3, settings, bucket.name)
    assert keys(s3, bucket.name) == set()


@pytest.mark.parametrize("name", ["checkpoint", "eval_data"])
def test_missing_file_is_bad_input_before_anything_is_begun(settings, small, bucket, name):
    result = release_checkpoint(smoke(small, bucket.name, **{name: "none/there.pt"}), settings)
    assert result.exit_code == 2
    assert "there.pt, found no such file" in result.error
    assert result.run_id is result.local_report is None
    assert not (settings.home / "runs").exists()


def test_no_checkpoint_is_bad_input_and_never_the_demo(settings, small, s3, bucket):
    result = release_checkpoint(smoke(small, bucket.name, checkpoint=""), settings)
    assert result.exit_code == 2
    assert keys(s3, bucket.name) == set()


def test_bad_evaluation_data_is_bad_input(settings, small, s3, bucket, tmp_path):
    path = tmp_path / "bad.npz"
    np.savez(path, signal=np.full((2, 2, 8, 7), np.nan, np.float64))
    result = release_checkpoint(smoke(small, bucket.name, eval_data=str(path)), settings)
    assert result.exit_code == 2
    assert "signal has shape" in result.error
    assert "(2, 2, 8, 7)" in result.error
    assert keys(s3, bucket.name) == set()


@pytest.mark.parametrize(
    ("after", "source"),
    [
        ("verdict-check", "import os, time; time.sleep(1); os._exit(0)"),
        ("parameters", "import sys; sys.exit(0)"),
    ],
    ids=["killed in the last cell", "exit in an early cell"],
)
def test_kernel_that_stops_by_itself_never_passes(
    settings, small, s3, bucket, tmp_path, after, source
):
    notebook = changed_notebook(tmp_path, after, source)
    result = release_checkpoint(smoke(small, bucket.name), settings, notebook=notebook)
    assert result.exit_code == 3, result.error
    assert "Traceback" not in result.error
    nothing_is_offered(s3, settings, bucket.name)
    assert any(key.endswith("report.html") for key in keys(s3, bucket.name))


def test_cell_out_of_time_fails_the_run(settings, small, s3, bucket, tmp_path):
    tidied = tmp_path / "tidied"
    slow = "import pathlib, time\ntry: time.sleep(600)\n"
    slow += f"finally: pathlib.Path({str(tidied)!r}).touch()"
    notebook = changed_notebook(tmp_path, "parameters", slow)
    result = release_checkpoint(
        smoke(small, bucket.name), settings, notebook=notebook, cell_timeout=5
    )
    assert result.exit_code == 3
    assert "longer than the 5 s it may: code cell 5 of " in result.error
    assert tidied.exists()
    nothing_is_offered(s3, settings, bucket.name)


@pytest.mark.thorough
def test_notebook_that_publishes_nothing_is_no_release(settings, small, s3, bucket, tmp_path):
    notebook = changed_notebook(tmp_path, "check-parameters", SILENT)
    result = release_checkpoint(smoke(small, bucket.name), settings, notebook=notebook)
    assert result.exit_code == 3
    assert "recorded no upload" in result.error
    nothing_is_offered(s3, settings, bucket.name)


SILENT = "parameters = parameters.model_copy(update={'publish': False})"


def test_release_whose_page_can_not_be_written_is_taken_back(
    settings, small, s3, bucket, tmp_path, monkeypatch
):
    def fail(*_):
        raise RegistryError("the description was refused")

    monkeypatch.setattr(MLflowTracker, "describe_version", fail)
    quick = smoke(small, bucket.name)
    result = release_checkpoint(quick, settings, notebook=changed_notebook(tmp_path))
    assert result.exit_code == 4
    assert "the description was refused" in result.error
    nothing_is_offered(s3, settings, bucket.name)


def test_forbidden_bucket_is_a_service_failure(settings, small, s3, bucket, tmp_path):
    refused = {"Effect": "Deny", "Principal": "*", "Action": "s3:PutObject"}
    refused["Resource"] = f"arn:aws:s3:::{bucket.name}/*"
    policy = {"Version": "2012-10-17", "Statement": [refused]}
    s3.put_bucket_policy(Bucket=bucket.name, Policy=json.dumps(policy))
    result = release_checkpoint(
        smoke(small, bucket.name), settings, notebook=changed_notebook(tmp_path)
    )
    assert result.exit_code == 4, result.error
    assert "access is forbidden" in result.error
    s3.delete_bucket_policy(Bucket=bucket.name)
    nothing_is_offered(s3, settings, bucket.name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"s3_endpoint_url": "http://127.0.0.1:9"}, "127.0.0.1:9"),
        ({"s3_secret_access_key": "wrong-secret-of-mine"}, "key|credential|signature"),
        ({"mlflow_tracking_uri": "http://127.0.0.1:9"}, "127.0.0.1:9|mlflow"),
    ],
    ids=["store down", "wrong key", "mlflow down"],
)
def test_service_out_of_reach_is_a_service_failure(settings, small, s3, bucket, change, words):
    from pydantic import SecretStr

    secret = {"s3_secret_access_key", "mlflow_tracking_uri"}
    update = {k: SecretStr(v) if k in secret else v for k, v in change.items()}
    started = time.monotonic()
    result = release_checkpoint(smoke(small, bucket.name), settings.model_copy(update=update))
    assert result.exit_code == 4, result.error
    assert any(word in result.error.lower() for word in words.split("|")), result.error
    assert "wrong-secret-of-mine" not in result.error
    assert time.monotonic() - started < 60
    assert keys(s3, bucket.name) == set()


def running_release(
    settings: Settings, small: Inputs, bucket: str, *options: object
) -> subprocess.Popen:
    settings.apply()
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "heimdall_onnx", "release", str(small.checkpoint)),
            *("--eval-data", str(small.eval_data), "--bucket", bucket, "--name", "test-model"),
            *("--prefix", PREFIX),
            *("--model", small.model, "--json", *map(str, options)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.thorough
def test_run_interrupted_while_it_measures_ends_its_children(settings, small, s3, bucket):
    process = running_release(settings, small, bucket.name, "--profile", "audit")
    parent = psutil.Process(process.pid)

    def measuring() -> bool:
        return any(
            "heimdall_onnx.evidence.latency.worker" in " ".join(c.cmdline()) for c in family(parent)
        )

    interrupt(process, signal.SIGINT, measuring)
    nothing_is_offered(s3, settings, bucket.name)


def store_is_gone(*_, **__):
    raise StoreError("the store is gone")


@pytest.mark.parametrize(
    ("happens", "status"),
    [
        (lambda *_, **__: signal.raise_signal(signal.SIGTERM), "KILLED"),
        (store_is_gone, "FAILED"),
    ],
    ids=["interrupted", "service failed"],
)
def test_signal_does_not_break_off_the_taking_back(
    settings, small, bucket, monkeypatch, happens, status
):
    steps = []

    def impatient(connection, folder):
        signal.raise_signal(signal.SIGINT)
        steps.append("withdrawn")
        return ()

    monkeypatch.setattr(release, "withdraw", impatient)
    monkeypatch.setattr(release, "execute_notebook", happens)
    with pytest.raises(KeyboardInterrupt) if status == "KILLED" else nullcontext():
        assert release_checkpoint(smoke(small, bucket.name), settings).exit_code == 4
    assert steps == ["withdrawn"]
    client = mlflow.MlflowClient(settings.tracking_uri.get_secret_value())
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert run.info.status == status


@pytest.mark.thorough
def test_run_terminated_after_registering_is_taken_back(settings, small, s3, bucket, tmp_path):
    notebook = changed_notebook(tmp_path, "register", "import time; time.sleep(600)")
    process = running_release(
        settings, small, bucket.name, "--profile", "smoke", "--notebook", notebook
    )
    interrupt(process, signal.SIGTERM, lambda: bool(versions(settings)))
    nothing_is_offered(s3, settings, bucket.name)


def interrupt(process: subprocess.Popen, number: int, ready: Callable[[], bool]) -> None:
    """Send the signal when ``ready`` and see that the run ends as an interrupted one."""
    parent = psutil.Process(process.pid)
    deadline = time.monotonic() + 90
    while not ready():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    children = family(parent)
    process.send_signal(number)
    # A pipeline that is stopped gets impatient; the kernel takes longer than this to end.
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    _, alive = psutil.wait_procs(children, timeout=60)
    assert alive == []


def family(process: psutil.Process) -> list[psutil.Process]:
    found = []
    for child in process.children(recursive=True):
        try:
            child.cmdline()
        except psutil.NoSuchProcess:
            continue
        found.append(child)
    return found
