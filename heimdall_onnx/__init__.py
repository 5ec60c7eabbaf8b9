"""From a PyTorch checkpoint to a released ONNX model in object storage and MLflow, with evidence.

The simplest call is the whole workflow, which runs the release notebook headlessly and judges it:

    from heimdall_onnx import ReleaseParameters, Settings, release_checkpoint
    result = release_checkpoint(ReleaseParameters(checkpoint="model.ckpt"), Settings.load())

A training script that wants no notebook exports and registers in one call:

    from heimdall_onnx import export_and_register_model
    export_and_register_model(model, run_id, s3_client, mlflow_tracker)

or takes the steps one by one, with `ONNXExporter` or with the function of each module: read the
checkpoint (`model.checkpoint`), export it (`model.onnx.export`), check the file
(`model.onnx.validate`), hold its outputs against PyTorch's (`evidence.parity.compare`), time both
(`evidence.latency.benchmark`), evaluate the gates (`evidence.verdict`), upload and register
(`release.publish`). A consumer opens what was released with `load_model`, which checks its hash;
``variant="recommended"`` opens the fastest form of it that passed (`evidence.variants`). A service
that has to follow an alias without a pause asks a `ServedModel` (`archive.serving`).

The wings stand on each other in one order: cli > training > localization > review | release >
report > archive > evidence > data > model | services > common. Each uses what stands to its right;
``make check`` holds them to it, and nothing below localization knows the reference problem.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

# MLflow reads this when it is imported; what somebody releases is not ours to report.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

_HOMES = {
    "Axis": "model.signature",
    "LocalizationNet": "localization.network",
    "MLflowTracker": "services.registry",
    "ONNXExporter": "release.exporter",
    "ReleaseParameters": "common.parameters",
    "ReleaseResult": "release.result",
    "ServedModel": "archive.serving",
    "Settings": "services.settings",
    "Signature": "model.signature",
    "TensorSpec": "model.signature",
    "ensure_store": "services.embedded",
    "export_and_register_model": "release.exporter",
    "initialize_mlflow": "services.registry",
    "load_model": "archive.load",
    "release_checkpoint": "release.runner",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    # Imported on first use, so that the command line answers without loading PyTorch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
