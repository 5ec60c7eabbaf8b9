"""From a PyTorch checkpoint to a released ONNX model in object storage and MLflow, with evidence.

The simplest call is the whole workflow, which runs the release notebook headlessly and judges it:

    from heimdall_onnx import ReleaseParameters, Settings, release_checkpoint
    given = ReleaseParameters(checkpoint="model.ckpt", model="package.module:Class")
    result = release_checkpoint(given, Settings.load())

A training script that wants no notebook exports and registers in one call:

    from heimdall_onnx import export_and_register_model
    export_and_register_model(model, run_id, s3_client, mlflow_tracker)

or takes the steps one by one, as the release notebook does: read checkpoint and evaluation data
(`load_checkpoint`, `load_evaluation_data`), export (`export_model`), check the file
(`validate_model`), hold its outputs against PyTorch's (`compare_outputs`), time both
(`benchmark_model`), evaluate the gates (`decide`), upload and register (`upload_release`,
`register_release`); `ONNXExporter` has them as methods. A consumer opens what was released with
`load_model`, which checks its hash; ``variant="recommended"`` opens the fastest form of it that
passed. A service that has to follow an alias without a pause asks a `ServedModel`.

The wings stand on each other in one order: cli > training > localization > review | release >
report > archive > evidence > data > model | services > common. Each uses what stands to its right;
``make check`` holds them to it, and nothing below localization knows the reference problem.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

from heimdall_onnx.common.surroundings import furnish_process

# Before any library looks for its folders.
furnish_process()
# MLflow reads this when it is imported; what somebody releases is not ours to report.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

_HOMES = {
    "Axis": "model.signature",
    "Ensemble": "model.ensemble",
    "LocalizationNet": "localization.network",
    "MLflowTracker": "services.registry",
    "ONNXExporter": "release.exporter",
    "ReleaseParameters": "common.parameters",
    "ReleaseResult": "release.result",
    "ServedModel": "archive.serving",
    "Settings": "services.settings",
    "Signature": "model.signature",
    "TensorSpec": "model.signature",
    "TimedSteps": "evidence.latency.timed",
    "assess_members": "evidence.parity.uncertainty",
    "benchmark_model": "evidence.latency.benchmark",
    "capture_environment": "common.environment",
    "compare_levels": "evidence.parity.optimization_levels",
    "compare_member": "evidence.latency.members",
    "compare_outputs": "evidence.parity.compare",
    "compare_variants": "evidence.variants.search",
    "decide": "evidence.gates",
    "derive_signature": "model.derive",
    "ensure_store": "services.embedded",
    "explore_parity": "report.explore.entry",
    "export_and_register_model": "release.exporter",
    "export_model": "model.onnx.export",
    "first_rows": "data.evaluation",
    "initialize_mlflow": "services.registry",
    "load_checkpoint": "model.checkpoint",
    "load_evaluation_data": "data.evaluation",
    "load_model": "archive.load",
    "locate_departure": "evidence.parity.departure",
    "make_demo": "training.demo",
    "measure_roofline": "evidence.variants.roofline",
    "parameters_of_notebook": "common.parameters",
    "prepare_run": "report.workspace",
    "profile_variants": "evidence.variants.operators",
    "record_results": "archive.record",
    "register_release": "release.publish",
    "release_checkpoint": "release.runner",
    "summarize_metrics": "evidence.metrics",
    "trace_depth": "evidence.parity.departure",
    "upload_release": "release.publish",
    "validate_model": "model.onnx.validate",
    "watch_cells": "evidence.costs",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    # Imported on first use, so that the command line answers without loading PyTorch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
