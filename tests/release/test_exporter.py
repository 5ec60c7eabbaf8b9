"""The documented class API."""

import hashlib
import json

import mlflow
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from models import SmallLocalizationNet
from pydantic import SecretStr
from releases import lose_the_answer_of_set_alias

from heimdall_onnx import LocalizationNet, ONNXExporter, export_and_register_model, load_model
from heimdall_onnx.archive.aliases import AliasLog
from heimdall_onnx.common.errors import (
    ExportError,
    InvalidModelError,
    NotRegisteredError,
    ParameterError,
    ParityError,
    RegistryError,
    StoreError,
)
from heimdall_onnx.services.registry import MLflowTracker
from heimdall_onnx.services.store import Bucket

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def model() -> LocalizationNet:
    torch.manual_seed(0)
    return LocalizationNet(backbone_size="atto").eval()


@pytest.fixture(scope="module")
def onnx_path(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    return ONNXExporter(None, None).export_to_onnx(model, path)


@pytest.fixture
def exporter(s3, sqlite_tracker) -> ONNXExporter:
    return ONNXExporter(s3, sqlite_tracker)


@pytest.fixture
def run_id(sqlite_tracker) -> str:
    run_id = sqlite_tracker.start_run(run_name="training")
    sqlite_tracker.end_run()
    return run_id


class TestONNXExporter:
    def test_exporter_initialization(self, s3, sqlite_tracker):
        exporter = ONNXExporter(s3_client=s3, mlflow_tracker=sqlite_tracker)
        assert exporter.s3_client is s3
        assert exporter.mlflow_tracker is sqlite_tracker

    def test_export_to_onnx(self, onnx_path):
        assert onnx_path.is_file()
        assert onnx.load(onnx_path).opset_import[0].version == 14

    @pytest.mark.parametrize(
        "opset", [14, 20, *(pytest.param(n, marks=pytest.mark.thorough) for n in (17, 18))]
    )
    def test_opset_of_the_file_is_the_one_asked_for(self, exporter, tmp_path, opset):
        path = exporter.export_to_onnx(
            SmallLocalizationNet(), tmp_path / "m.onnx", opset_version=opset
        )
        found = {o.domain: o.version for o in onnx.load(path).opset_import}
        assert found[""] == opset

    def test_export_to_onnx_with_invalid_path(self, exporter, model, tmp_path):
        with pytest.raises(ExportError, match="no folder"):
            exporter.export_to_onnx(model, tmp_path / "nowhere" / "model.onnx")
        with pytest.raises(RuntimeError):
            exporter.export_to_onnx(model, tmp_path)

    def test_validate_onnx_model(self, exporter, onnx_path):
        info = exporter.validate_onnx_model(onnx_path)
        assert info["inputs"] == [
            {"name": "mel_spectrogram", "shape": ["batch", 3, 128, 32], "dtype": "float32"}
        ]
        assert [o["name"] for o in info["outputs"]] == ["positions", "uncertainties"]
        assert info["opset_version"] == 14
        assert info["producer_name"] == "pytorch"
        assert info["ir_version"] >= 7

    def test_validate_invalid_onnx(self, exporter, tmp_path):
        path = tmp_path / "broken.onnx"
        path.write_bytes(b"not a model")
        with pytest.raises(InvalidModelError, match=r"broken\.onnx"):
            exporter.validate_onnx_model(path)
        with pytest.raises(ValueError, match="none"):
            exporter.validate_onnx_model(tmp_path / "none.onnx")

    def test_test_onnx_inference(self, exporter, onnx_path, model):
        model.train()
        metrics = exporter.test_onnx_inference(onnx_path, model, num_batches=2, batch_size=2)
        assert model.training, "it computes in evaluation mode, and restores the one before"
        model.eval()
        assert set(metrics) == {
            "positions_mae",
            "uncertainties_mae",
            "inference_time_onnx_ms",
            "inference_time_pytorch_ms",
            "speedup",
            "passed",
        }
        assert metrics["passed"] is True
        assert 0 <= metrics["positions_mae"] <= 1e-5
        assert metrics["inference_time_onnx_ms"] > 0
        json.dumps(metrics, allow_nan=False)

    def test_inference_of_another_model_fails_and_names_the_module(self, exporter, tmp_path):
        path = exporter.export_to_onnx(SmallLocalizationNet(), tmp_path / "model.onnx")
        other = SmallLocalizationNet()
        with pytest.raises(ParityError, match="first departing module: linear"):
            exporter.test_onnx_inference(path, other, num_batches=1, batch_size=2)

    def test_upload_to_minio(self, exporter, bucket, s3, tmp_path):
        onnx_path = exporter.export_to_onnx(SmallLocalizationNet(), tmp_path / "model.onnx")
        uri = exporter.upload_to_minio(onnx_path, bucket_name=bucket.name)
        key = uri.removeprefix(f"{bucket.uri()}")
        assert key.startswith("models/localization/v")
        assert key.endswith(".onnx")
        stored = s3.get_object(Bucket=bucket.name, Key=key)
        content = onnx_path.read_bytes()
        assert stored["Body"].read() == content
        metadata = stored["Metadata"]
        assert metadata["format"] == "onnx"
        assert metadata["model-type"] == "SmallLocalizationNet"
        assert metadata["file-size"] == str(len(content))
        assert metadata["sha256"] == hashlib.sha256(content).hexdigest()
        assert "export-date" in metadata

    def test_upload_to_minio_with_custom_name(self, exporter, onnx_path, bucket):
        uri = exporter.upload_to_minio(onnx_path, bucket.name, object_name="my/own.onnx")
        assert uri == f"{bucket.uri()}my/own.onnx"

    def test_get_model_metadata(self, exporter, onnx_path, model):
        metadata = exporter.get_model_metadata(onnx_path, model, "run", {"speedup": 2.0})
        assert set(metadata) == {
            "model_type",
            "backbone",
            "input_shape",
            "output_names",
            "output_shapes",
            "export_date",
            "onnx_file_size_bytes",
            "onnx_file_size_mb",
            "onnx_file_sha256",
            "mlflow_run_id",
            "pytorch_params",
            "inference_metrics",
        }
        assert metadata["model_type"] == "LocalizationNet"
        assert metadata["input_shape"] == ["batch", 3, 128, 32]
        assert metadata["onnx_file_size_bytes"] == onnx_path.stat().st_size
        assert metadata["pytorch_params"] == model.get_params_count()
        assert metadata["inference_metrics"] == {"speedup": 2.0}
        json.dumps(metadata, allow_nan=False)

    def test_register_with_mlflow(
        self, exporter, onnx_path, model, bucket, run_id, s3, sqlite_tracker
    ):
        uri = exporter.upload_to_minio(onnx_path, bucket.name, object_name="models/v1.onnx")
        metadata = exporter.get_model_metadata(onnx_path, model, run_id)
        registration = exporter.register_with_mlflow("registered", uri, metadata)
        assert registration == {
            "model_name": "registered",
            "model_version": "1",
            "stage": "Staging",
            "s3_uri": uri,
        }
        x = np.random.default_rng(0).standard_normal((2, 3, 128, 32)).astype(np.float32)
        expected = onnxruntime.InferenceSession(onnx_path).run(None, {"mel_spectrogram": x})
        by_pyfunc = mlflow.pyfunc.load_model("models:/registered@staging")
        found = by_pyfunc.predict({"mel_spectrogram": x})
        np.testing.assert_allclose(found["positions"], expected[0], atol=1e-6)
        mlflow.onnx.load_model("models:/registered/1")
        again = exporter.register_with_mlflow("registered", uri, metadata)
        assert again["model_version"] == "2"
        client = mlflow.MlflowClient()
        assert [a.path for a in client.list_artifacts(run_id)] == ["metadata.json"]
        assert s3.head_object(Bucket=bucket.name, Key="models/v1.onnx")

    def test_bucket_of_artifacts_is_made_at_the_first_write(
        self, s3, bucket, onnx_path, model, sqlite_tracker
    ):
        artifacts = f"{bucket.name}-artifacts"
        tracker = MLflowTracker(sqlite_tracker.uri, f"s3://{artifacts}/below", "of its own")
        run_id = tracker.create_run("training")
        exporter = ONNXExporter(s3, tracker)
        uri = exporter.upload_to_minio(onnx_path, bucket.name, object_name="models/v1.onnx")
        metadata = exporter.get_model_metadata(onnx_path, model, run_id)
        assert exporter.register_with_mlflow("first", uri, metadata)["model_version"] == "1"
        (key,) = Bucket(s3, artifacts).list_keys("below/")
        assert key.endswith("/metadata.json")

    def test_alias_stays_with_its_version_when_moving_it_fails(
        self, exporter, bucket, run_id, tmp_path, monkeypatch
    ):
        path = exporter.export_to_onnx(SmallLocalizationNet(), tmp_path / "net.onnx")
        uri = exporter.upload_to_minio(path, bucket.name, object_name="net.onnx")
        metadata = exporter.get_model_metadata(path, SmallLocalizationNet(), run_id)
        exporter.register_with_mlflow("kept", uri, metadata)
        lose_the_answer_of_set_alias(monkeypatch)
        with pytest.raises(RegistryError, match="the answer was lost"):
            exporter.register_with_mlflow("kept", uri, metadata)
        assert exporter.mlflow_tracker.alias_target("kept", "staging") == "1"
        with pytest.raises(NotRegisteredError):
            exporter.mlflow_tracker.get_version("kept", "2")
        moves = AliasLog(Bucket(exporter.s3_client, bucket.name), "kept", "staging").moves
        assert [(move.action, move.version, move.by) for move in moves] == [
            ("release", "1", run_id),
            ("release", "2", run_id),
            ("withdraw", "1", run_id),
        ]

    def test_version_stays_while_its_alias_can_not_be_moved_back(
        self, exporter, bucket, run_id, tmp_path, monkeypatch
    ):
        path = exporter.export_to_onnx(SmallLocalizationNet(), tmp_path / "net.onnx")
        uri = exporter.upload_to_minio(path, bucket.name, object_name="net.onnx")
        metadata = exporter.get_model_metadata(path, SmallLocalizationNet(), run_id)
        exporter.register_with_mlflow("kept", uri, metadata)
        follow, calls = AliasLog.follow, []

        def moved_and_then_out_of_reach(*arguments):
            calls.append(arguments)
            if len(calls) == 1:
                follow(*arguments)
            raise RegistryError(f"failure {len(calls)}")

        monkeypatch.setattr(AliasLog, "follow", moved_and_then_out_of_reach)
        with pytest.raises(RegistryError, match="failure 2"):
            exporter.register_with_mlflow("kept", uri, metadata)
        assert exporter.mlflow_tracker.version_by_alias("kept", "staging").version == "2"

    def test_register_refuses_a_stage_that_mlflow_does_not_have(self, exporter, bucket):
        with pytest.raises(ParameterError, match="Staging"):
            exporter.register_with_mlflow("m", f"{bucket.uri()}x.onnx", {}, stage="Stagin")

    def test_register_refuses_an_object_that_is_not_there(self, exporter, bucket, run_id):
        with pytest.raises(StoreError):
            exporter.register_with_mlflow(
                "nothing",
                f"{bucket.uri()}none.onnx",
                {
                    "mlflow_run_id": run_id,
                    "onnx_file_sha256": "0",
                    "input_shape": [],
                    "output_names": [],
                },
            )
        assert mlflow.MlflowClient().search_registered_models() == []

    def test_register_names_what_the_metadata_lacks(self, exporter, bucket):
        with pytest.raises(ParameterError, match="lacks mlflow_run_id, onnx_file_sha256"):
            exporter.register_with_mlflow(
                "m", f"{bucket.uri()}x.onnx", {"input_shape": [], "output_names": []}
            )

    def test_version_keeps_its_content_when_its_object_is_replaced(
        self, exporter, bucket, run_id, tmp_path
    ):
        contents = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            path = exporter.export_to_onnx(SmallLocalizationNet(), tmp_path / f"{seed}.onnx")
            uri = exporter.upload_to_minio(path, bucket.name, object_name="net.onnx")
            metadata = exporter.get_model_metadata(path, SmallLocalizationNet(), run_id)
            exporter.register_with_mlflow("net", uri, metadata)
            contents.append(onnx.load(path))
        assert contents[0] != contents[1]
        for version, content in enumerate(contents, start=1):
            assert mlflow.onnx.load_model(f"models:/net/{version}") == content

    def test_upload_refuses_a_model_whose_weights_are_elsewhere(
        self, exporter, bucket, s3, tmp_path
    ):
        path = exporter.export_to_onnx(SmallLocalizationNet(), tmp_path / "one.onnx")
        onnx.save(
            onnx.load(path),
            tmp_path / "two.onnx",
            save_as_external_data=True,
            location="two.data",
            size_threshold=0,
        )
        with pytest.raises(InvalidModelError, match="keeps its weights in files beside it"):
            exporter.upload_to_minio(tmp_path / "two.onnx", bucket.name, object_name="two.onnx")
        assert "Contents" not in s3.list_objects_v2(Bucket=bucket.name)


class TestONNXExportWorkflow:
    def test_complete_export_workflow(
        self, s3, sqlite_tracker, run_id, tmp_path, embedded_settings
    ):
        result = export_and_register_model(
            SmallLocalizationNet(), run_id, s3, sqlite_tracker, output_dir=tmp_path / "out"
        )
        assert set(result) == {
            "success",
            "model_name",
            "run_id",
            "onnx_path",
            "s3_uri",
            "model_info",
            "metadata",
            "inference_metrics",
            "registration",
        }
        assert result["success"] is True
        assert result["registration"]["model_name"] == "heimdall-localization-onnx"
        json.dumps(result, allow_nan=False)
        address = "models:/heimdall-localization-onnx@staging"
        mlflow.onnx.load_model(address)
        settings = embedded_settings.model_copy(
            update={"home": tmp_path, "mlflow_tracking_uri": SecretStr(mlflow.get_tracking_uri())}
        )
        assert load_model(address, settings=settings).get_inputs()
        metrics = result["inference_metrics"]
        assert metrics == result["metadata"]["inference_metrics"]
        # Medians of pairs and the pair of medians differ on a loaded machine, but not inverted.
        ratio = metrics["inference_time_pytorch_ms"] / metrics["inference_time_onnx_ms"]
        assert 0.3 < metrics["speedup"] / ratio < 3

    def test_export_workflow_handles_errors(self, s3, sqlite_tracker, run_id, tmp_path):
        class Branching(SmallLocalizationNet):
            def forward(self, x):
                return super().forward(x[: int(x.sum()) % 2 + 1])

        result = export_and_register_model(Branching(), run_id, s3, sqlite_tracker, tmp_path)
        assert set(result) == {"success", "error"}
        assert result["success"] is False
        assert mlflow.MlflowClient().search_registered_models() == []

    def test_workflow_needs_no_main_guard_and_takes_a_local_class(
        self, s3, sqlite_tracker, run_id, tmp_path
    ):
        class Local(SmallLocalizationNet):
            pass

        result = export_and_register_model(Local(), run_id, s3, sqlite_tracker, tmp_path)
        assert result["success"], result


class TestONNXIntegration:
    def test_onnx_model_info_structure(self, exporter, onnx_path):
        info = exporter.validate_onnx_model(onnx_path)
        assert set(info) == {"inputs", "outputs", "opset_version", "producer_name", "ir_version"}
        for tensor in info["inputs"] + info["outputs"]:
            assert set(tensor) == {"name", "shape", "dtype"}
        json.dumps(info)
