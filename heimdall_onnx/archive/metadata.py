"""What is written about a model beside the model."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from heimdall_onnx.model.signature import Signature


def release_metadata(
    model: nn.Module,
    signature: Signature,
    *,
    size_bytes: int,
    sha256: str,
    run_id: str,
    inference_metrics: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The documented metadata of a release, JSON-serialisable.

    Args:
        model: The PyTorch model.
        signature: Its signature; dynamic axes are shown by their names.
        size_bytes: Size of the ONNX file.
        sha256: Its SHA-256, hexadecimal.
        run_id: MLflow run that it belongs to.
        inference_metrics: Parity and latency figures.
    """
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    backbone = getattr(model, "backbone_size", None)
    shapes = {spec.name: list(spec.shape) for spec in signature.inputs}
    return {
        "model_type": getattr(model, "described_as", type(model).__name__),
        "backbone": f"ConvNeXt-{str(backbone).capitalize()}" if backbone else None,
        "input_shape": list(signature.inputs[0].shape),
        # Of a single input the one shape says it all, and callers know these keys.
        **({"input_shapes": shapes} if len(shapes) > 1 else {}),
        "output_names": [spec.name for spec in signature.outputs],
        "output_shapes": {spec.name: list(spec.shape) for spec in signature.outputs},
        "export_date": datetime.now(UTC).isoformat(timespec="seconds"),
        "onnx_file_size_bytes": size_bytes,
        "onnx_file_size_mb": round(size_bytes / 1e6, 3),
        "onnx_file_sha256": sha256,
        "mlflow_run_id": run_id,
        "pytorch_params": {
            "total": total,
            "trainable": trainable,
            "frozen": total - trainable,
        },
        "inference_metrics": dict(inference_metrics or {}),
    }


METADATA = "metadata.json"


def object_metadata(described: Mapping[str, Any]) -> dict[str, str]:
    """The documented metadata of a model object; stores allow ``[a-z0-9-]`` in its keys."""
    return {
        "export-date": str(described["export_date"]),
        "model-type": str(described["model_type"]),
        "format": "onnx",
        "file-size": str(described["onnx_file_size_bytes"]),
    }


def version_tags(described: Mapping[str, Any]) -> dict[str, str]:
    """The documented tags of a registered version; of several inputs all shapes by their names."""
    shapes = described.get("input_shapes", {})
    shape = shapes if len(shapes) > 1 else described["input_shape"]
    return {
        "framework": "pytorch",
        "format": "onnx",
        "input_shape": str(shape),
        "output_count": str(len(described["output_names"])),
        "sha256": str(described["onnx_file_sha256"]),
    }
