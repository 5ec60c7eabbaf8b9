"""What a worker does with one item of a fleet: find out whether it is done, release it, record it.

Equal bytes of checkpoint, data and declared signature with equal parameters and code have one key.
What became of a key is an object in the bucket of its releases, ``fleets/items/KEY.json``, so that
any worker of any later fleet finds it by one request, however many releases there are. It is
written before a release begins, with the MLflow run, and again after it; where the second writing
is missing, the run leads to the release, if there is one.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from heimdall_onnx.archive.manifest import Manifest, read_manifest
from heimdall_onnx.archive.metadata import METADATA
from heimdall_onnx.common.environment import capture_environment, hash_of_module, hash_of_package
from heimdall_onnx.common.errors import (
    HeimdallError,
    InputError,
    MissingObjectError,
    ServiceError,
    SettingsError,
    VerificationError,
)
from heimdall_onnx.common.files import hash_file
from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.common.parameters import ReleaseParameters
from heimdall_onnx.data.dataset.dataset import open_dataset
from heimdall_onnx.data.evaluation import is_dataset
from heimdall_onnx.model.signature_file import signature_path
from heimdall_onnx.release.fleet.plan import FleetItem
from heimdall_onnx.release.publish import close_own_run
from heimdall_onnx.release.result import ReleaseResult
from heimdall_onnx.release.runner import release_checkpoint
from heimdall_onnx.report.notebook import kernel_environment
from heimdall_onnx.report.warm_kernels import WarmKernels
from heimdall_onnx.services.connection import Connection, connect
from heimdall_onnx.services.settings import Settings
from heimdall_onnx.services.store import Bucket, to_json

log = get_logger(__name__)

RECORDS = "fleets/items"
FLEET_TAG = "heimdall.fleet"
KEY_TAG = "heimdall.fleet.item"
Status = Literal["released", "kept", "failed"]
_SIZE = "onnx_file_size_bytes"

# Where things are, and what a run is given: no part of what is released.
_NO_PART = {
    *("checkpoint", "eval_data", "calibration_data", "run_id", "output_dir", "publish"),
    *("eval_workers", "eval_scheduler"),
}


@dataclass(frozen=True)
class ItemOutcome:
    """What became of an item.

    Attributes:
        number: The item's place in the plan.
        label: What a person recognises it by.
        checkpoint: Its path or address.
        key: Hash of all that makes the release; empty where its inputs could not be read.
        status: ``released`` now, ``kept`` as an earlier fleet has released it, or ``failed``.
        exit_code: As the single command's.
        error: What went wrong; empty if nothing did.
        attempts: How often it was tried.
        host: Name of the machine it was tried on; of one that is kept, where it was released, and
            empty where nobody has noted that.
        processors: Processors that the worker may use there.
        load: Load average of the machine over the last minute, when the item ended.
        seconds: From the item's arrival at the worker to its end, the last attempt's.
        result: The release, as the single command prints it.
        metrics: Its parity, latency and size as numbers by name.
    """

    number: int
    label: str
    checkpoint: str
    key: str
    status: Status
    exit_code: int
    error: str = ""
    attempts: int = 1
    host: str = ""
    processors: tuple[int, ...] = ()
    load: float = 0.0
    seconds: float = 0.0
    result: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of_failure(cls, item: FleetItem, error: str, exit_code: int) -> ItemOutcome:
        """That of an item that could not be begun, or broke off; without its inputs' key."""
        return cls(item.number, item.label, item.checkpoint, "", "failed", exit_code, error)

    @property
    def service_failed(self) -> bool:
        """Whether another attempt may succeed."""
        return self.exit_code == ServiceError.exit_code

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable copy."""
        return {**asdict(self), "service_failed": self.service_failed}


class _Record(BaseModel):
    """Content of ``fleets/items/KEY.json``; what was read is not trusted."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fleet: str
    run_id: str
    model_name: str
    release: str = ""
    host: str = ""
    processors: tuple[int, ...] = ()
    load: float = 0.0
    result: dict[str, Any] = Field(default_factory=dict)


class ItemRunner:
    """Releases one item after another in this process; a context manager.

    Args:
        settings: With the addresses of store and registry, the same for every worker of a fleet.
        folder: For what is downloaded; Dask removes that of a worker, of a killed one too.

    Raises:
        SettingsError: If the settings name no store or no registry that other workers share.
    """

    def __init__(self, settings: Settings, folder: Path | str) -> None:
        if settings.s3_endpoint_url is None or settings.mlflow_tracking_uri is None:
            raise SettingsError(
                "a worker of a fleet needs MLFLOW_S3_ENDPOINT_URL and MLFLOW_TRACKING_URI, the "
                "same ones as every other; one of them is not set on this worker"
            )
        self._settings, self._folder = settings, folder
        # Begins to import what kernels need; nobody waits for it yet.
        self._kernels = WarmKernels(kernel_environment(settings))

    def __enter__(self) -> ItemRunner:
        """Nothing is waited for."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process that kernels are forked from."""
        self._kernels.__exit__()

    def run(self, item: FleetItem, fleet: str, *, force: bool = False) -> ItemOutcome:
        """Release an item, unless that is done already.

        Errors of this package end up in the outcome, since the other items go on.

        Args:
            item: The item.
            fleet: Name of the fleet.
            force: Release it anew even if it is done.
        """
        started = time.perf_counter()
        outcome = ItemOutcome.of_failure(item, "", HeimdallError.exit_code)
        with tempfile.TemporaryDirectory(dir=self._folder) as scratch:
            try:
                outcome = self._run(item, fleet, outcome, Path(scratch), force=force)
            except HeimdallError as error:
                outcome = replace(outcome, exit_code=error.exit_code, error=str(error))
        where = {} if outcome.status == "kept" else _where()
        return replace(outcome, **where, seconds=time.perf_counter() - started)

    def _run(
        self, item: FleetItem, fleet: str, outcome: ItemOutcome, scratch: Path, *, force: bool
    ) -> ItemOutcome:
        connection = connect(self._settings)
        bucket = connection.bucket(item.parameters.bucket)
        parameters = _fetch_inputs(connection, item, scratch)
        if parameters.measure_latency:
            # Other items are measured on the same machine.
            parameters = parameters.model_copy(update={"exclusive_cores": True})
        outcome = replace(outcome, key=item_key(parameters))
        bucket.ensure()
        if not force and (kept := _find(connection, bucket, outcome.key)):
            return replace(
                outcome,
                status="kept",
                exit_code=0,
                host=kept.host,
                processors=kept.processors,
                load=kept.load,
                result=kept.result,
                metrics=_read_metrics(connection, kept.result),
            )
        tracker = connection.tracker
        run_id = tracker.create_run(f"fleet {fleet} item {item.number}")
        tracker.set_tags({FLEET_TAG: fleet, KEY_TAG: outcome.key}, run_id=run_id)
        record = _Record(fleet=fleet, run_id=run_id, model_name=parameters.name)
        _write(bucket, outcome.key, record)
        status = "KILLED"
        try:
            result = release_checkpoint(
                parameters.model_copy(update={"run_id": run_id}),
                self._settings,
                start_kernel=self._kernels.started,
            )
            status = "FINISHED" if result.success else "FAILED"
        finally:
            close_own_run(tracker, run_id, status)
        if result.success:
            folder = str(result.manifest_uri).rpartition("/")[0]
            done = {"release": folder, "result": result.to_dict(), **_where()}
            _write(bucket, outcome.key, record.model_copy(update=done))
        return replace(
            outcome,
            status="released" if result.success else "failed",
            exit_code=result.exit_code,
            error=result.error or "",
            result=result.to_dict(),
            metrics=_read_metrics(connection, result.to_dict()) if result.success else {},
        )


def _where() -> dict[str, Any]:
    """Where this runs, and how busy it is there."""
    processors = tuple(sorted(os.sched_getaffinity(0)))
    return {"host": socket.gethostname(), "processors": processors, "load": os.getloadavg()[0]}


def _find(connection: Connection, bucket: Bucket, key: str) -> _Record | None:
    """The record of a key with its result; None if there is no valid release of it."""
    place = f"{RECORDS}/{key}.json"
    try:
        record = _Record.model_validate_json(bucket.read_bytes(place))
    except MissingObjectError:
        return None
    except ValidationError:
        log.warning("record of an item can't be read; it is released anew", key=key)
        return None
    if record.release:
        return record if _valid(connection, record.release) else None
    # Whoever began it may have finished it and had no time to say so.
    for version in connection.tracker.versions_of_run(record.run_id):
        found = _valid(connection, version.source) if version.name == record.model_name else None
        if found:
            done = {"release": found.uri, "result": ReleaseResult.of_manifest(found).to_dict()}
            record = record.model_copy(update=done)
            _write(bucket, key, record)
            return record
    return None


def item_key(parameters: ReleaseParameters) -> str:
    """Hash of all that makes a release: bytes, parameters and code.

    Args:
        parameters: Of the release; checkpoint and data are files that are there.

    Returns:
        SHA-256 in hexadecimal.

    Raises:
        DataError: If a file can't be read.
        ParameterError: If there is no checkpoint at its path.
    """
    checkpoint = Path(parameters.checkpoint)
    files: dict[str, Any] = {
        "checkpoint": checkpoint,
        "signature": signature_path(checkpoint),
        "eval_data": parameters.eval_data_path,
        "calibration_data": (
            Path(parameters.calibration_data) if parameters.calibration_data else None
        ),
    }
    made_of = {
        "files": {
            what: open_dataset(path, labels=False).digest if is_dataset(path) else hash_file(path)
            for what, path in files.items()
            if path is not None and (what != "signature" or path.is_file())
        },
        "parameters": parameters.model_dump(mode="json", exclude=_NO_PART),
        "model_code": hash_of_module(parameters.model.partition(":")[0]),
        "code": hash_of_package(),
        "packages": capture_environment().packages,
    }
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def _fetch_inputs(connection: Connection, item: FleetItem, scratch: Path) -> ReleaseParameters:
    """The parameters of the release, with what is in a bucket downloaded."""
    paths = {"checkpoint": item.checkpoint} | {
        name: getattr(item.parameters, name) for name in ("eval_data", "calibration_data")
    }
    for name, address in paths.items():
        # A dataset is read where it is.
        if not address.startswith("s3://") or (name == "eval_data" and is_dataset(address)):
            continue
        bucket, key = connection.locate(address)
        folder = scratch / name
        folder.mkdir()
        path = folder / PurePosixPath(key).name
        bucket.download_file(key, path)
        if name == "checkpoint":
            beside = str(PurePosixPath(key).with_name(signature_path(path).name))
            with suppress(MissingObjectError):
                bucket.download_file(beside, signature_path(path))
        paths[name] = str(path)
    return item.parameters.model_copy(update=paths)


def _valid(connection: Connection, folder_uri: str) -> Manifest | None:
    """The manifest of a release; None where there is none that can be read."""
    try:
        return read_manifest(*connection.locate(folder_uri))
    except (InputError, VerificationError):
        return None


def _read_metrics(connection: Connection, result: Mapping[str, Any]) -> dict[str, float]:
    """The figures that the release's metadata name."""
    bucket, key = connection.locate(str(result["s3_uri"]))
    described = bucket.read_json(f"{key.rpartition('/')[0]}/{METADATA}")
    size = {_SIZE: described.get(_SIZE)}
    found = {**described.get("inference_metrics", {}), **size}
    return {k: float(v) for k, v in found.items() if isinstance(v, int | float)}


def _write(bucket: Bucket, key: str, record: _Record) -> None:
    bucket.upload_bytes(to_json(record.model_dump()), f"{RECORDS}/{key}.json")
