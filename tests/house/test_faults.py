"""Killed runs, services that fail on the way, a full disk and a wrong clock.

The long forms are in ``tests/soak``.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from invariants import Place, violations
from proxy import Fault, proxied
from pydantic import SecretStr
from releases import changed_notebook, smoke
from runs import environment, short, start_release

from heimdall_onnx.common.errors import StoreError
from heimdall_onnx.release.runner import release_checkpoint
from heimdall_onnx.services.client import make_client
from heimdall_onnx.services.registry import MLflowTracker
from heimdall_onnx.services.store import Bucket

pytestmark = [pytest.mark.services, pytest.mark.slow]


@pytest.fixture
def store(embedded_settings):
    with proxied(embedded_settings.s3_endpoint_url) as proxy:
        yield proxy


@pytest.fixture
def registry(mlflow_server):
    with proxied(mlflow_server) as proxy:
        yield proxy


@pytest.fixture
def direct(make_settings, mlflow_server):
    update = {"mlflow_tracking_uri": SecretStr(mlflow_server)}
    return make_settings("home").model_copy(update=update)


@pytest.fixture
def settings(direct, store, registry):
    """Store and registry behind proxies."""
    update = {"s3_endpoint_url": store.address, "mlflow_tracking_uri": SecretStr(registry.address)}
    return direct.model_copy(update=update)


@pytest.fixture
def place(direct, bucket):
    return Place(direct, bucket.name, name=bucket.name)


@pytest.mark.thorough
def test_killed_runs_leave_nothing_that_can_be_taken_for_a_release(
    settings, place, small, store, registry, tmp_path
):
    notebook = changed_notebook(tmp_path)
    kills = (
        # Registered and tagged, without a manifest; complete, and not offered yet.
        ("before", "PUT .*/v[^/]*/manifest.json", ("runner",)),
        ("after", "PUT /[^/]*/aliases/", ("runner", "kernel")),
    )
    with ThreadPoolExecutor(len(kills)) as pool:
        list(pool.map(lambda kill: one_killed(settings, place, small, notebook, *kill), kills))
    assert violations(place) == []
    assert len(place.versions()) == 2
    assert len(place.releases()) == 1
    assert place.aliases() == {}

    # The next run, with answers that are lost and services that are not there for a moment.
    parameters = smoke(small, place.bucket, name=place.name)
    with (
        registry.fault(Fault("lose", "POST .*/model-versions/create")) as lost,
        store.fault(Fault("status", "PUT .*/model.onnx", times=2)) as refused,
    ):
        result = release_checkpoint(parameters, settings, notebook=notebook)
    assert (lost.hits, refused.hits) == (1, 2)
    assert result.exit_code == 0, result.error
    assert violations(place, settled=True) == []
    assert len(place.releases()) == 2
    assert len(place.versions()) == 3


def one_killed(settings, place, inputs, notebook, kind, match, victims):
    """A run that is killed at a request to the store, through a proxy of its own."""
    with proxied(settings.s3_endpoint_url) as own:
        home = settings.home / kind
        home.mkdir()
        settings = settings.model_copy(update={"s3_endpoint_url": own.address, "home": home})
        running = start_release(settings, inputs, place.bucket, *short(notebook), name=place.name)
        fault = Fault(kind, match, action=lambda: running.kill(*victims))
        with own.fault(fault):
            result = running.end(200)
    assert fault.hits == 1, result["stderr"]
    assert result["returncode"] == -9
    assert running.left_over(10) == []


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault("reset", "partNumber=2"), None),
        (Fault("lose", "POST .*uploadId"), None),
        (Fault("gone", "partNumber=3", seconds=0.1), None),
        (Fault("corrupt request", "partNumber=2"), "reads back differently.*it was deleted"),
        (Fault("status", "partNumber=2", times=None), "overloaded"),
    ],
    ids=["reset", "answer lost", "gone for a moment", "damaged", "refused for good"],
)
def test_upload_in_parts_is_whole_or_not_there(
    embedded_settings, store, s3, bucket, tmp_path, fault, error
):
    path = tmp_path / "model.onnx"
    path.write_bytes(os.urandom(65 << 20))
    through = embedded_settings.model_copy(update={"s3_endpoint_url": store.address})
    client = make_client(through, attempts=5)
    with store.fault(fault):
        if error:
            with pytest.raises(StoreError, match=error):
                Bucket(client, bucket.name).upload_file(path, "model.onnx")
        else:
            Bucket(client, bucket.name).upload_file(path, "model.onnx")
    assert fault.hits
    assert bucket.list_keys("") == (() if error else ("model.onnx",))


def test_version_whose_registration_was_answered_by_silence_is_registered_once(
    settings, registry, s3, bucket, reset_mlflow
):
    settings.apply()
    s3.put_object(Bucket=bucket.name, Key="v1/MLmodel", Body=b"flavors: {}")
    tracker = MLflowTracker(registry.address)
    run_id = tracker.create_run("once")
    with registry.fault(Fault("lose", "POST .*/model-versions/create")) as fault:
        version = tracker.register_model(bucket.name, f"{bucket.uri()}v1", run_id)
    assert fault.hits == 1
    assert tracker.find_versions(bucket.name, f"{bucket.uri()}v1", run_id) == (version,)


def test_full_disk_is_named_and_nothing_is_offered(direct, place, small, tmp_path):
    mount = ("unshare", "--user", "--map-root-user", "--mount")
    if subprocess.run([*mount, "mount", "-t", "tmpfs", "none", "/mnt"]).returncode:
        pytest.skip("no mount of its own is allowed here")
    home = tmp_path / "disk"
    home.mkdir()
    shell = 'mount -t tmpfs -o size=16k none "$1" && shift && exec "$@"'
    result = start_release(
        direct.model_copy(update={"home": home}),
        small,
        place.bucket,
        *short(changed_notebook(tmp_path)),
        name=place.name,
        within=(*mount, "sh", "-c", shell, "sh", str(home)),
    ).end(120)
    assert "Traceback" not in result["stderr"]
    assert result["returncode"] not in (0, 1)
    assert "No space left on device" in result["error"]
    assert place.releases() == []
    assert place.aliases() == {}


def test_clock_that_is_a_day_wrong_is_named(embedded_settings, bucket):
    libfaketime = pytest.importorskip("libfaketime")
    library = Path(libfaketime.__file__).parent / "vendor/libfaketime/src/libfaketime.so.1"
    code = (
        "from heimdall_onnx.services.settings import Settings\n"
        "from heimdall_onnx.services.client import make_client\n"
        "from heimdall_onnx.services.store import Bucket\n"
        f"print(Bucket(make_client(Settings.load()), {bucket.name!r}).is_there())"
    )
    for wrong_by, words in (("-600", "True"), ("-86400", "differ by 1 day, 0:00:00")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment(embedded_settings)
            | {"LD_PRELOAD": str(library), "FAKETIME": wrong_by, "DONT_FAKE_MONOTONIC": "1"},
            capture_output=True,
            text=True,
        )
        assert words in done.stdout + done.stderr
