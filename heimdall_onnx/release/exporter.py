"""The documented class API; every method is a call into the module of its step."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from torch import nn

from heimdall_onnx.archive.aliases import STAGE_OF_ALIAS, AliasLog
from heimdall_onnx.archive.metadata import METADATA, object_metadata, release_metadata, version_tags
from heimdall_onnx.archive.mlmodel import write_mlmodel_folder
from heimdall_onnx.common.errors import (
    HeimdallError,
    InvalidModelError,
    ParameterError,
    ParityError,
)
from heimdall_onnx.common.files import hash_file
from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.common.parameters import REFERENCE_FOLDER, REFERENCE_MODEL
from heimdall_onnx.common.verdict import Verdict
from heimdall_onnx.data.evaluation import EvaluationData
from heimdall_onnx.evidence.latency.benchmark import measure_latency
from heimdall_onnx.evidence.latency.statistics import min_queries
from heimdall_onnx.evidence.parity.compare import compare_outputs
from heimdall_onnx.evidence.parity.departure import locate_departure
from heimdall_onnx.model.examples import Examples
from heimdall_onnx.model.onnx.export import eval_mode, export_model
from heimdall_onnx.model.onnx.validate import validate_model
from heimdall_onnx.model.signature import signature_of
from heimdall_onnx.services.registry import STAGES, MLflowTracker
from heimdall_onnx.services.store import Bucket, locate, to_json

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

log = get_logger(__name__)


class ONNXExporter:
    """Export, check, upload and register a model step by step.

    Args:
        s3_client: A boto3 S3 client, as `services.client.make_client` gives it.
        mlflow_tracker: As `heimdall_onnx.initialize_mlflow` gives it.
    """

    def __init__(self, s3_client: S3Client, mlflow_tracker: MLflowTracker) -> None:
        self.s3_client = s3_client
        self.mlflow_tracker = mlflow_tracker
        # A file does not say which class it was exported from.
        self._model_types: dict[Path, str] = {}

    def export_to_onnx(
        self,
        model: nn.Module,
        output_path: Path | str,
        opset_version: int = 14,
        do_constant_folding: bool = True,
    ) -> Path:
        """Export ``model``; the file's opset is the one asked for.

        Raises:
            ExportError: If the model can't be exported, or not to ``output_path``.
            ParameterError: If the opset is out of range.
        """
        exported = export_model(
            model,
            Path(output_path),
            opset=opset_version,
            do_constant_folding=do_constant_folding,
        )
        self._model_types[exported.path.resolve()] = type(model).__name__
        return exported.path

    def validate_onnx_model(self, onnx_path: Path | str) -> dict[str, Any]:
        """Check the file and describe it; a dynamic axis is shown by its name.

        Returns:
            ``{inputs, outputs: [{name, shape, dtype}], opset_version, producer_name,
            ir_version}``.

        Raises:
            InvalidModelError: If the file is not a valid ONNX model with finite weights.
        """
        return validate_model(Path(onnx_path)).to_dict()

    def test_onnx_inference(
        self,
        onnx_path: Path | str,
        pytorch_model: nn.Module,
        num_batches: int = 5,
        batch_size: int = 8,
        tolerance: float = 1e-5,
    ) -> dict[str, Any]:
        """Compare both models on seeded example inputs and time them at ``batch_size``.

        Returns:
            ``{OUTPUT_mae for each output, inference_time_onnx_ms, inference_time_pytorch_ms
            (medians), speedup, passed}``.

        Raises:
            ParityError: Naming every gate that failed and the first departing module.
            BenchmarkError: If one of the models can't be timed.
        """
        signature = signature_of(pytorch_model)
        path = Path(onnx_path)
        inputs = Examples(signature, pytorch_model).valid(num_batches * batch_size)
        data = EvaluationData(inputs, None, {}, "synthetic inputs", None, {})
        with eval_mode(pytorch_model):
            parity = compare_outputs(
                pytorch_model,
                path,
                data,
                signature,
                tolerance=tolerance,
                batch_size=batch_size,
            )
            verdict = Verdict(parity.gates(), "quick")
            if not verdict.passed:
                departure = locate_departure(parity, pytorch_model, path)
                where = f"\nfirst departing module: {departure.scope}" if departure else ""
                raise ParityError(verdict.reasons() + where)
            latency = measure_latency(
                pytorch_model,
                path,
                data.rows(range(batch_size)),
                signature,
                calls=max(num_batches, min_queries(50)),
            )
        return {
            **{f"{output.output}_mae": output.mean for output in parity.evaluation},
            "inference_time_onnx_ms": latency.onnx.median_ms,
            "inference_time_pytorch_ms": latency.pytorch.median_ms,
            "speedup": latency.speedup.ratio,
            "passed": True,
        }

    def upload_to_minio(
        self,
        onnx_path: Path | str,
        bucket_name: str = "heimdall-models",
        object_name: str | None = None,
    ) -> str:
        """Upload a file, read it back and return its ``s3://`` address.

        Without a name it becomes ``models/localization/v{YYYYMMDD_HHMMSS}.onnx``, UTC. Its
        ``model-type`` is the class this exporter exported it from, else ``unknown``.

        Raises:
            InvalidModelError: If the file is no valid ONNX model, or not the whole of one.
            StoreError: If the store can't be reached, refuses, or returns other bytes.
        """
        path = Path(onnx_path)
        now = datetime.now(UTC)
        if validate_model(path).size_bytes != path.stat().st_size:
            raise InvalidModelError(
                f"{path} keeps its weights in files beside it, and one object can't hold them all; "
                "release it with release_checkpoint, which uploads a folder"
            )
        bucket = Bucket(self.s3_client, bucket_name)
        bucket.ensure()
        described: dict[str, Any] = {
            "export_date": now.isoformat(timespec="seconds"),
            "model_type": self._model_types.get(path.resolve(), "unknown"),
            "onnx_file_size_bytes": path.stat().st_size,
        }
        if object_name is None:
            # Claimed like a release, so that two exports in one second get two names.
            prefix = REFERENCE_FOLDER
            version = bucket.claim_version(
                prefix, name=METADATA, content=lambda _: to_json(described)
            )
            object_name = f"{prefix}/{version}.onnx"
        stored = bucket.upload_file(
            path,
            object_name,
            metadata=object_metadata(described),
        )
        return stored.uri

    def get_model_metadata(
        self,
        onnx_path: Path | str,
        pytorch_model: nn.Module,
        run_id: str,
        inference_metrics: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Describe the model and its file, JSON-serialisable."""
        path = Path(onnx_path)
        return release_metadata(
            pytorch_model,
            signature_of(pytorch_model),
            size_bytes=path.stat().st_size,
            sha256=hash_file(path),
            run_id=run_id,
            inference_metrics=inference_metrics,
        )

    def register_with_mlflow(
        self,
        model_name: str,
        s3_uri: str,
        metadata: Mapping[str, Any],
        stage: str = "Staging",
    ) -> dict[str, Any]:
        """Register an uploaded model under an alias (and the stage of the same name).

        The move is an entry of the alias's log in the bucket, as a release's is.

        MLflow loads only folders. A bare object is copied within the store into one, ``vX.onnx``
        to ``vX/model.onnx``, with an ``MLmodel`` beside it; the object itself stays. A folder that
        was registered for another content of the same object stays too, and a new one is made.

        Returns:
            ``{model_name, model_version, stage, s3_uri}``.

        Raises:
            ParameterError: If MLflow has no such stage, or ``metadata`` is not what
                `get_model_metadata` returns.
            StoreError: If the object can't be read or copied.
            RegistryError: If MLflow can't be reached or refuses.
            VerificationError: If the log of the alias, in the bucket of ``s3_uri``, can't be read.
        """
        if stage not in STAGES:
            raise ParameterError(f"stage must be one of {', '.join(STAGES)}, found {stage!r}")
        needed = {"mlflow_run_id", "input_shape", "output_names", "onnx_file_sha256"}
        if missing := needed - metadata.keys():
            raise ParameterError(
                f"metadata must be what get_model_metadata returns; it lacks "
                f"{', '.join(sorted(missing))}"
            )
        source = self._loadable_folder(s3_uri, metadata)
        run_id = str(metadata["mlflow_run_id"])
        with tempfile.TemporaryDirectory(prefix="heimdall-metadata-") as folder:
            path = Path(folder) / "metadata.json"
            path.write_bytes(to_json(metadata))
            if (artifacts := self.mlflow_tracker.artifact_location()).startswith("s3://"):
                locate(self.s3_client, artifacts)[0].ensure()
            self.mlflow_tracker.log_artifact(path, run_id=run_id)
        version = self.mlflow_tracker.register_model(
            model_name, source, run_id=run_id, tags=version_tags(metadata)
        )
        alias = stage.lower()
        log_of_alias = AliasLog(locate(self.s3_client, source)[0], model_name, alias)
        try:
            if alias in STAGE_OF_ALIAS:
                log_of_alias.point(self.mlflow_tracker, version, source, by=run_id)
            else:
                self.mlflow_tracker.transition_model_stage(model_name, version, stage)
        except HeimdallError:
            # The registry may have moved the alias and failed to say so; with the version it would
            # vanish.
            if alias in STAGE_OF_ALIAS:
                log_of_alias.withdraw(self.mlflow_tracker, version, source)
            self.mlflow_tracker.delete_version(model_name, version)
            raise
        return {
            "model_name": model_name,
            "model_version": version,
            "stage": stage,
            "s3_uri": s3_uri,
        }

    def _loadable_folder(self, s3_uri: str, metadata: Mapping[str, Any]) -> str:
        bucket, key = locate(self.s3_client, s3_uri)
        folder = str(PurePosixPath(key).with_suffix(""))
        if PurePosixPath(key).name == "model.onnx":
            folder = str(PurePosixPath(key).parent)
        digest = str(metadata["onnx_file_sha256"])
        stem = folder
        for folder in (stem, f"{stem}-{digest[:12]}"):
            if not bucket.exists(f"{folder}/MLmodel"):
                break
            there = f"{folder}/model.onnx"
            # An object that others have put there records no hash.
            recorded = bucket.head(there).sha256
            if digest == (recorded or bucket.hash_object(there)[0]):
                return bucket.uri(folder)
        with tempfile.TemporaryDirectory(prefix="heimdall-register-") as scratch:
            model, beside = Path(scratch) / "model.onnx", Path(scratch) / "mlmodel"
            bucket.download_file(key, model, sha256=digest)
            beside.mkdir()
            write_mlmodel_folder(
                beside,
                validate_model(model).signature,
                model_size_bytes=model.stat().st_size,
                run_id=str(metadata["mlflow_run_id"]),
            )
            if key != f"{folder}/model.onnx":
                bucket.copy(key, f"{folder}/model.onnx")
            # MLmodel last: it is what makes the folder count.
            for path in sorted(beside.iterdir(), key=lambda path: path.name == "MLmodel"):
                bucket.upload_file(path, f"{folder}/{path.name}")
        return bucket.uri(folder)


def export_and_register_model(
    pytorch_model: nn.Module,
    run_id: str,
    s3_client: S3Client,
    mlflow_tracker: MLflowTracker,
    output_dir: Path | str = Path("outputs/onnx"),
    model_name: str = REFERENCE_MODEL,
) -> dict[str, Any]:
    """Export, check, upload and register, as a training script calls it when training ends.

    Returns:
        ``{success, model_name, run_id, onnx_path, s3_uri, model_info, metadata,
        inference_metrics, registration}``, or ``{success: False, error}`` where a step failed for
        a reason this package knows; anything else is a bug and is raised.
    """
    exporter = ONNXExporter(s3_client, mlflow_tracker)
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        onnx_path = exporter.export_to_onnx(pytorch_model, folder / f"{model_name}.onnx")
        model_info = exporter.validate_onnx_model(onnx_path)
        inference_metrics = exporter.test_onnx_inference(onnx_path, pytorch_model)
        s3_uri = exporter.upload_to_minio(onnx_path)
        metadata = exporter.get_model_metadata(onnx_path, pytorch_model, run_id, inference_metrics)
        registration = exporter.register_with_mlflow(model_name, s3_uri, metadata)
    except (HeimdallError, OSError) as error:
        log.error("not registered", run_id=run_id, error=str(error))
        return {"success": False, "error": str(error)}
    return {
        "success": True,
        "model_name": model_name,
        "run_id": run_id,
        "onnx_path": str(onnx_path),
        "s3_uri": s3_uri,
        "model_info": model_info,
        "metadata": metadata,
        "inference_metrics": inference_metrics,
        "registration": registration,
    }
