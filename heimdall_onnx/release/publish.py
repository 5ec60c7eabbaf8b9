"""From a passed verdict to a folder in the bucket and a version in the registry, without alias.

What a notebook's run has claimed is written into a journal beside its files before it is used, so
that the runner can take it back with `withdraw` even if the kernel died.
"""

from __future__ import annotations

import json
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heimdall_onnx.archive.content import keep_content, keep_dataset
from heimdall_onnx.archive.manifest import Content
from heimdall_onnx.archive.metadata import METADATA, object_metadata, release_metadata, version_tags
from heimdall_onnx.archive.record import RegisteredRelease, Skipped, UploadedRelease
from heimdall_onnx.common.errors import HeimdallError, ServiceError
from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.common.parameters import MODEL
from heimdall_onnx.evidence.metrics import run_metrics
from heimdall_onnx.services.connection import Connection, connect
from heimdall_onnx.services.settings import Settings
from heimdall_onnx.services.store import MANIFEST, Bucket, to_json

if TYPE_CHECKING:
    from heimdall_onnx.common.parameters import ReleaseParameters
    from heimdall_onnx.common.verdict import Verdict
    from heimdall_onnx.data.evaluation import EvaluationData
    from heimdall_onnx.evidence.variants.search import VariantsReport
    from heimdall_onnx.model.checkpoint import LoadedModel
    from heimdall_onnx.model.onnx.export import ExportResult
    from heimdall_onnx.model.signature import Signature
    from heimdall_onnx.services.registry import MLflowTracker
    from heimdall_onnx.services.store import StoredObject

log = get_logger(__name__)


class Journal:
    """What a run has claimed so far, in a file beside its other files."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "journal.json"

    def read(self) -> dict[str, Any]:
        """All entries; empty when nothing was claimed."""
        if not self._path.is_file():
            return {}
        entries: dict[str, Any] = json.loads(self._path.read_text())
        return entries

    def clear(self) -> None:
        """Forget what was claimed before."""
        self._path.unlink(missing_ok=True)

    def write(self, **entries: Any) -> None:
        """Add ``entries``, atomically."""
        draft = self._path.with_suffix(".tmp")
        draft.write_text(json.dumps({**self.read(), **entries}))
        draft.replace(self._path)


def upload_release(
    settings: Settings,
    parameters: ReleaseParameters,
    verdict: Verdict,
    loaded: LoadedModel,
    data: EvaluationData,
    exported: ExportResult,
    metrics: Mapping[str, float],
    variants: VariantsReport | None = None,
) -> UploadedRelease | Skipped:
    """Keep what the model was made of, claim a version and upload the model into it.

    Nothing is uploaded unless the parameters ask for it and every gate holds. The metadata is
    written first, conditionally, which is what claims the version. What a failed upload has claimed
    is taken back, so that it can be called again. Of the variants those are uploaded that passed
    and have a file of their own, each into a folder of its own below ``variants/``.

    Raises:
        DataError: If checkpoint, evaluation data, the model or a variant have changed since they
            were read.
        ServiceError: If a service can't be reached, refuses, or returns other bytes.
    """
    if not parameters.publish:
        return Skipped("nothing is published unless the parameter `publish` is true")
    if not verdict.passed:
        return Skipped(f"{len(verdict.failed_gates)} gates failed")
    with ThreadPoolExecutor(1) as beside, ExitStack() as undo:
        connection = connect(settings, beside)
        journal = Journal(exported.path.parent)
        journal.clear()
        run_id = parameters.run_id
        if not run_id:
            tracker = connection.tracker
            run_id = tracker.create_run("release")
            undo.callback(close_own_run, tracker, run_id, "FAILED")
        undo.callback(withdraw, connection, exported.path.parent)
        described = release_metadata(
            loaded.model,
            loaded.signature,
            size_bytes=exported.size_bytes,
            sha256=exported.sha256,
            run_id=run_id,
            inference_metrics=metrics,
        )
        bucket = connection.bucket(parameters.bucket)
        bucket.ensure()
        content = _keep_content(bucket, parameters, loaded, data, variants)
        datasets = tuple(keep_dataset(bucket, dataset) for dataset in filter(None, [data.dataset]))
        version = _claim(bucket, parameters, journal, described)
        folder = f"{parameters.prefix}/{version}"
        model = bucket.upload_file(
            exported.path,
            f"{folder}/{MODEL}",
            sha256=exported.sha256,
            metadata=object_metadata(described),
        )
        # Waits for MLflow, which is not to be imported by this thread at the same time.
        connection.tracker.check_run(run_id)
        files = _upload_beside(bucket, folder, described, exported, loaded.signature, variants)
        objects = (model, *files, bucket.head(f"{folder}/{METADATA}"))
        undo.pop_all()
    folder_uri = bucket.uri(folder)
    log.info("uploaded", version=version, folder=folder_uri, objects=len(objects))
    return UploadedRelease(
        version=version,
        folder_uri=folder_uri,
        s3_uri=f"{folder_uri}/{MODEL}",
        sha256=exported.sha256,
        run_id=run_id,
        metadata={**described, "version": version},
        objects=objects,
        content=content,
        datasets=datasets,
    )


def _keep_content(
    bucket: Bucket,
    parameters: ReleaseParameters,
    loaded: LoadedModel,
    data: EvaluationData,
    variants: VariantsReport | None,
) -> tuple[Content, ...]:
    # It is shared between releases, so that it stays when this one is taken back.
    path = parameters.eval_data_path
    kept = [keep_content(bucket, loaded.path, loaded.sha256, "checkpoint")]
    if (declared := loaded.signature_file) is not None:
        kept.append(keep_content(bucket, declared.path, declared.sha256, "signature"))
    if isinstance(path, Path) and data.dataset is None and data.sha256 is not None:
        kept.append(keep_content(bucket, path, data.sha256, "evaluation_data"))
    if variants is not None and parameters.calibration_data:
        path, digest = Path(parameters.calibration_data), variants.calibration.file_sha256
        assert digest is not None  # it was read from a file
        kept.append(keep_content(bucket, path, digest, "calibration_data"))
    return tuple(kept)


def close_own_run(tracker: MLflowTracker, run_id: str, status: str) -> None:
    """End a run that `MLflowTracker.create_run` made; that it can't be ended is only logged."""
    try:
        tracker.close_run(run_id, status)
    except ServiceError as error:
        log.warning("MLflow run not ended", run_id=run_id, reason=str(error))


def _claim(
    bucket: Bucket, parameters: ReleaseParameters, journal: Journal, described: Mapping[str, Any]
) -> str:
    token = secrets.token_hex(16)

    def claim(version: str) -> bytes:
        journal.write(
            bucket=bucket.name,
            prefix=parameters.prefix,
            version=version,
            run_id=described["mlflow_run_id"],
            model_name=parameters.name,
            claim=token,
        )
        return to_json({**described, "version": version, "claim": token})

    return bucket.claim_version(parameters.prefix, name=METADATA, content=claim)


def _upload_beside(
    bucket: Bucket,
    folder: str,
    described: Mapping[str, Any],
    exported: ExportResult,
    signature: Signature,
    variants: VariantsReport | None,
) -> Iterator[StoredObject]:
    """What lets MLflow load the model, and those variants that are no other way to run it."""
    from heimdall_onnx.archive.mlmodel import write_mlmodel_folder

    with tempfile.TemporaryDirectory(prefix="heimdall-mlmodel-") as beside:
        size, run_id = exported.size_bytes, described["mlflow_run_id"]
        write_mlmodel_folder(Path(beside), signature, model_size_bytes=size, run_id=run_id)
        for path in (*exported.external_data, *sorted(Path(beside).iterdir())):
            yield bucket.upload_file(path, f"{folder}/{path.name}")
    for one in variants.judged if variants else ():
        if one.passed and one.has_own_file and one.path is not None:
            yield bucket.upload_file(one.path, f"{folder}/{one.file}", sha256=one.sha256)


def register_release(
    settings: Settings,
    parameters: ReleaseParameters,
    uploaded: UploadedRelease | Skipped,
    metrics: Mapping[str, float],
) -> RegisteredRelease | Skipped:
    """Log the run's parameters and metrics and register the release folder, without an alias.

    Raises:
        RegistryError: If MLflow can't be reached or refuses.
    """
    if isinstance(uploaded, Skipped):
        return uploaded
    tracker = connect(settings).tracker
    status = "FAILED"
    try:
        # A run that is released into has parameters of its own, or of a release before; MLflow
        # refuses to change one, so ours carry a prefix.
        before = tracker.get_run_info(uploaded.run_id)["params"]
        again = any(name.startswith("release.") for name in before)
        prefix = f"release.{uploaded.version}" if again else "release"
        logged = parameters.model_dump(mode="json", exclude={"output_dir", "run_id", "publish"})
        named = {f"{prefix}.{name}": value for name, value in logged.items()}
        tracker.log_params(named, run_id=uploaded.run_id)
        Journal(Path(parameters.output_dir)).write(registering=True)
        # Without the hash nothing loads it; that is tagged when the release is complete.
        tags = {k: v for k, v in version_tags(uploaded.metadata).items() if k != "sha256"}
        version = tracker.register_model(
            parameters.name,
            uploaded.folder_uri,
            run_id=uploaded.run_id,
            tags=tags,
            description=f"ONNX release {uploaded.version}",
        )
        # Of a chart's axis each version is a step, whichever runs they came from.
        tracker.log_metrics(run_metrics(metrics), int(version), run_id=uploaded.run_id)
        status = "FINISHED"
    finally:
        if not parameters.run_id:
            close_own_run(tracker, uploaded.run_id, status)
    log.info("registered", model_name=parameters.name, model_version=version)
    return RegisteredRelease(parameters.name, version, uploaded.folder_uri)


def withdraw(connection: Connection, folder: Path) -> tuple[str, ...]:
    """Take back what the run in ``folder`` has claimed: its version and its release folder.

    Returns:
        What could not be taken back, in words; empty when nothing is left.
    """
    claimed = Journal(folder).read()
    if "version" not in claimed:
        return ()
    bucket, name = connection.bucket(claimed["bucket"]), claimed["model_name"]
    place = f"{claimed['prefix']}/{claimed['version']}"
    uri = bucket.uri(place)
    # Its own: a run may be released into twice in one second.
    delete = partial(_delete_own, bucket, f"{place}/", claimed["claim"])
    # Without its manifest it is no release, whatever else can't be taken back.
    steps: list[tuple[str, Callable[[], object]]] = [
        (f"{uri}/{MANIFEST}", partial(delete, ending=f"/{MANIFEST}"))
    ]
    if claimed.get("registering"):
        run_id = claimed["run_id"]
        steps.append(
            (
                f"the version of {name} with source {uri}",
                lambda: _delete_own_versions(connection.tracker, name, uri, run_id),
            )
        )
    steps.append((uri, delete))
    left = []
    for what, step in steps:
        try:
            step()
        except HeimdallError as error:
            log.warning("not withdrawn", what=what, reason=str(error))
            left.append(f"{what}: {error}")
            if what.endswith(MANIFEST):
                break  # What has a manifest has to stay whole.
    return tuple(left)


def _delete_own_versions(tracker: MLflowTracker, name: str, source: str, run_id: str) -> None:
    # By its source: a kernel may die between registering and noting the version's number.
    for version in tracker.find_versions(name, source, run_id):
        tracker.delete_version(name, version)


def _delete_own(bucket: Bucket, folder: str, token: str, ending: str = "") -> None:
    # The journal is written before the claim, so the folder may be somebody else's, or nobody's.
    claim = folder + METADATA
    keys = bucket.list_keys(folder)
    if claim not in keys:
        return
    claimed = bucket.read_json(claim)
    if not isinstance(claimed, dict) or claimed.get("claim") != token:
        return
    chosen = [key for key in keys if key.endswith(ending)]
    # The claim last: without it nobody would know whose the rest is.
    bucket.delete([key for key in chosen if key != claim])
    if claim in chosen:
        bucket.delete([claim])
