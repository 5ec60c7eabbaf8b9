"""Workers that were started elsewhere: which are refused, which join, which are lost."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from clusters import dask_cluster
from models import SmallNet
from pydantic import SecretStr

import heimdall_onnx
from heimdall_onnx.common.errors import SchedulerError, SettingsError
from heimdall_onnx.release.fleet import run as fleet
from heimdall_onnx.release.fleet.plan import plan_checkpoints
from heimdall_onnx.release.fleet.run import run_fleet
from heimdall_onnx.report.notebook import kernel_environment

pytestmark = pytest.mark.services
TESTS = str(Path(__file__).parents[2] / "support")


@pytest.fixture
def settings(make_settings, mlflow_server):
    update = {"mlflow_tracking_uri": SecretStr(mlflow_server)}
    return make_settings("home").model_copy(update=update)


@pytest.fixture
def environment(settings, monkeypatch):
    """What a worker has that can release."""
    monkeypatch.setenv("PYTHONPATH", TESTS)
    return kernel_environment(settings) | {"HEIMDALL_HOME": str(settings.home)}


@pytest.fixture
def incomplete(environment):
    """What a worker has that lacks the store's address."""
    return {k: v for k, v in environment.items() if k != "MLFLOW_S3_ENDPOINT_URL"}


@pytest.fixture
def cluster(tmp_path):
    with dask_cluster(tmp_path / "cluster") as made:
        yield made


@pytest.fixture
def plan(bucket, tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for number in range(2):
        torch.save(SmallNet().state_dict(), folder / f"net-{number}.pt")
    values = {"profile": "smoke", "opset": 14, "bucket": bucket.name, "name": "net-{stem}"}
    values |= {"model": "models:SmallNet", "measure_latency": False}
    return plan_checkpoints([f"{folder}/*.pt"], values, name="july")


def test_a_worker_with_other_code_is_refused(cluster, environment, settings, plan, tmp_path):
    other = tmp_path / "other"
    package = Path(heimdall_onnx.__file__).parent
    shutil.copytree(package, other / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(package.parent / "notebooks", other / "notebooks")
    with (other / package.name / "compare.py").open("a") as file:
        file.write("# changed\n")
    cluster.start_worker({**environment, "PYTHONPATH": f"{other}:{TESTS}"})
    with pytest.raises(SchedulerError, match=r"heimdall_onnx differs from the client's"):
        run_fleet(plan, settings, scheduler=cluster.address)


def test_what_a_worker_lacks_is_said_each_time(cluster, incomplete, settings, plan):
    cluster.start_worker(incomplete)
    for _ in range(2):
        with pytest.raises(SettingsError, match="MLFLOW_S3_ENDPOINT_URL"):
            run_fleet(plan, settings, scheduler=cluster.address)


@pytest.mark.thorough
def test_a_worker_that_joins_is_given_items(cluster, environment, settings, monkeypatch):
    monkeypatch.setattr(fleet, "COUNT_WORKERS_S", 0)
    cluster.start_worker({**os.environ, "PYTHONPATH": TESTS}, resources="other=1")
    cluster.start_worker(environment)
    with fleet.worker_pool(settings, cluster.address, 0) as pool:
        assert pool.slots() == 1
        cluster.start_worker(environment, resources="release=2")
        assert pool.slots() == 3


@pytest.mark.thorough
def test_a_worker_that_joins_and_can_not_release_fails_no_item(
    cluster, environment, incomplete, settings, plan, monkeypatch
):
    monkeypatch.setattr(fleet, "LONGEST_PAUSE_S", 0.1)
    monkeypatch.setattr(fleet, "COUNT_WORKERS_S", 0)
    cluster.start_worker(environment)
    done = run_fleet(
        plan,
        settings,
        scheduler=cluster.address,
        on_start=lambda *_: cluster.start_worker(incomplete, resources="release=5"),
    )
    assert [o.status for o in done.outcomes] == ["released"] * 2, done.outcomes
    assert max(o.attempts for o in done.outcomes) > 1
    with fleet.Client(cluster.address) as client:
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
    assert sorted(w["resources"]["release"] for w in workers) == [0, 1]
