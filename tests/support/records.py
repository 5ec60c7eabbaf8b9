"""Records and manifests of releases that nobody has made: complete, and changed where it matters.

Everything is as JSON has it. A change of a nested object changes what it names, and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from heimdall_onnx.archive.aliases import Move
from heimdall_onnx.archive.manifest import SCHEMA_VERSION
from heimdall_onnx.archive.record import Record, parse_record, require_record
from heimdall_onnx.model.runtimes import SessionSettings
from heimdall_onnx.model.signature import Signature, TensorSpec

SHA256 = "5" * 40 + "a" * 24
SIGNATURE = Signature(
    (TensorSpec("signal", "float32", ("batch", 2)),),
    (TensorSpec("positions", "float32", ("batch", 2), unit="degrees latitude, longitude"),),
)
GATE = {"name": "opset", "limit": "= 14", "measured": 14, "passed": True, "detail": ""}
ENVIRONMENT = {
    "python": "3.11.7",
    "packages": {"heimdall-onnx": "0.2.0"},
    "system": "Linux",
    "cpu": "one",
    "processors": 2,
    "instruction_sets": ["avx2"],
    "git_commit": "c" * 40,
    "git_dirty": False,
}


def changed(given: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with changes, those of nested objects put into them."""
    found = dict(given)
    for name, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(given.get(name), Mapping)
        found[name] = changed(given[name], value) if nested else value
    return found


def move(**changes: Any) -> Move:
    """That a reviewer has pointed an alias at a release."""
    given = {
        "number": 1,
        "model_name": "net",
        "alias": "production",
        "action": "promote",
        "version": "1",
        "release": "s3://models/models/net/v20261120_143000",
        "previous": None,
        "by": "Ada",
        "note": "looked at",
        "time": "2026-11-20T14:30:00+00:00",
        "follows": None,
    }
    return Move(**{**given, **changes})


def output(name: str = "positions", **changes: Any) -> dict[str, Any]:
    """The statistics of an output."""
    errors = dict.fromkeys(("mean", "maximum", "p50", "p99", "p999", "ulp_p50", "ulp_p999"), 1e-7)
    counts = dict.fromkeys(("violations", "nonfinite_mismatches", "nonfinite"), 0)
    span = {"cosine": 1.0, "excess": 0.5, "lowest": 45.0, "highest": 50.0}
    return {"output": name, "unit": None, "count": 128, **errors, **counts, **span, **changes}


def judged(metric: str = "top1", **changes: Any) -> dict[str, Any]:
    """What a model loses by a metric."""
    found = {"reference": 0.9, "value": 0.9, "loss": 0.0, "low": -0.001, "high": 0.001}
    counts = {"samples": 400, "groups": 400, "needed": 300}
    how = {"max_loss": 0.01, "confidence": 0.95, "outcome": "shown", "method": "exact"}
    return {"metric": metric, "relative": False, **found, **counts, **how, **changes}


def speedup(ratio: float, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    """A ratio with its interval."""
    ends = (ratio - 0.1 if low is None else low, ratio + 0.1 if high is None else high)
    return {"ratio": ratio, "low": ends[0], "high": ends[1], "pairs": 12}


def contender(name: str, median_ms: float, **changes: Any) -> dict[str, Any]:
    """What was measured of a contender."""
    p50 = {"percentile": 50.0, "value_ms": median_ms}
    ends = {"low_ms": median_ms - 1, "high_ms": median_ms + 1}
    return {
        "name": name,
        "calls": 30,
        "percentiles": [{**p50, **ends}],
        "stationarity": None,
        "median_ms": median_ms,
        "mean_ms": median_ms,
        "load_ms": 1.0,
        "first_call_ms": 1.0,
        "peak_memory_bytes": 1,
        **changes,
    }


def latency(pytorch: float = 10.0, onnx: float = 5.0, **changes: Any) -> dict[str, Any]:
    """PyTorch and ONNX Runtime, in turns."""
    return {
        "speedup": speedup(pytorch / onnx),
        "batch_size": 1,
        "contenders": [contender("PyTorch", pytorch), contender("ONNX Runtime", onnx)],
        "machine": None,
        "threads": 1,
        "confidence": 0.95,
        "cores": None,
        **changes,
    }


def pair(first: str, second: str, ratio: float, **changes: Any) -> dict[str, Any]:
    """Two models in turns."""
    return {
        "speedup": speedup(ratio),
        "batch_size": 1,
        "contenders": [contender(first, 4.0 * ratio), contender(second, 4.0)],
        "machine": None,
        "throughput": [],
        "on_device_ms": None,
        **changes,
    }


def variant(name: str, status: str = "passed", **changes: Any) -> dict[str, Any]:
    """A variant with its evidence."""
    return {
        "name": name,
        "what": f"what {name} is",
        "precision": name.partition("-")[0],
        "status": status,
        "reason": "" if status == "passed" else "a gate",
        "file": "model.onnx",
        "sha256": SHA256,
        "size_bytes": 7,
        "ran_on": "CPUExecutionProvider",
        "sessions": {p: SessionSettings().to_dict() for p in ("latency", "throughput")},
        "kept_in_float": [],
        "gates": [],
        "latency": None,
        "accuracy": None,
        "tuning": {},
        **changes,
    }


def variants(recommended: str, *judged: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """All variants of a release."""
    limits = ("displacement_sigma", "output_noise")
    return {
        "recommended": recommended,
        "calibration": {"source": "eval.npz", "rows": [3, 9], "sha256": SHA256, "left_out": 0},
        "limits": dict.fromkeys(limits, 0.01),
        "against_pytorch": pair("PyTorch", recommended, 3.5),
        "judged": list(judged),
        **changes,
    }


def described(**changes: Any) -> dict[str, Any]:
    """What record and manifest both say."""
    inputs = {"signal": {"dtype": "float32", "shape": [2]}}
    given = {
        "schema_version": SCHEMA_VERSION,
        "gates": [GATE],
        "checkpoint": {"file": "best.ckpt", "sha256": SHA256, "members": []},
        "model": {
            "spec": "none",
            "signature": SIGNATURE.to_dict(),
            "signature_source": "the model's class",
        },
        "evaluation_data": {
            "source": "eval.npz",
            "provenance": "simulated",
            "sha256": SHA256,
            "samples": 64,
            "labelled": True,
            "inputs": inputs,
        },
        "variants": None,
        "environment": ENVIRONMENT,
    }
    return changed(given, changes)


def record_json(**changes: Any) -> dict[str, Any]:
    """What a notebook has recorded."""
    independence = {"largest_error": 0.0, "excess": 0.0, "neighbour": "zeros", "comparisons": 9}
    cell = {"kind": "evaluation data", "batch_size": 8, "samples": 64, "valid": False}
    given = {
        **described(),
        "profile": "quick",
        "metrics": {},
        "parity": {
            "samples": 64,
            "tolerance": 1e-5,
            "rtol": 1.3e-6,
            "cells": [{**cell, "outputs": [output()]}],
            "noise_floor": [],
            "independence": {**independence, "output": "positions"},
            "ground": None,
            "uncertainty": [],
            "evaluated_by": "this process",
        },
        "latency": latency(),
        "latency_not_measured": None,
        "roofline": None,
        "member": None,
        "members": [],
        "operator_times": {},
        "costs": [],
        "departure": None,
        "distributions": {"torch": "2.13.0", "numpy": "2.4.6"},
        "uploaded": {
            "version": "v20261120_143000",
            "folder_uri": "s3://models/models/net/v20261120_143000",
            "s3_uri": "s3://models/models/net/v20261120_143000/model.onnx",
            "sha256": SHA256,
            "run_id": "0123abc",
            "metadata": {},
            "objects": [],
            "content": [],
            "datasets": [],
        },
        "registered": {"model_name": "net", "model_version": "3", "source": "s3://models"},
    }
    return changed(given, changes)


def record(**changes: Any) -> Record:
    """The same, as it is read."""
    return parse_record(record_json(**changes), "a test")


def read(path: Path) -> Record:
    """What an executed notebook has recorded."""
    return require_record(path.read_bytes(), path.name)


def manifest_json(**changes: Any) -> dict[str, Any]:
    """What a manifest says, as far as it is no record of one folder's objects."""
    given = {
        **described(),
        "created": "2026-11-20T14:30:00+00:00",
        "verdict": "pass",
        "objects": [],
        "content": [],
        "datasets": [],
        "signature": None,
        "protection": {"versioning": False, "retained_until": None, "note": ""},
        "parameters": {"name": "net", "opset": 14, "profile": "quick"},
        "git": {"commit": "c" * 40, "dirty": False},
        "threads": 1,
        "costs": [],
        "mlflow": {"run_id": "0123abc", "model_name": "net", "model_version": "3"},
    }
    return changed(given, changes)
