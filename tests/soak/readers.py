"""Everything that reads untrusted bytes, to its end: ``python tests/soak/readers.py``."""

from __future__ import annotations

import ast
import json
from pathlib import Path

from models import SmallNet
from reader import Reader, serve
from seeds import FOLDER_URI

from heimdall_onnx.archive.manifest import parse_manifest
from heimdall_onnx.common.errors import (
    CheckpointError,
    DataError,
    InvalidModelError,
    ParameterError,
    VerificationError,
)
from heimdall_onnx.common.parameters import check_parameters, parameters_of_notebook
from heimdall_onnx.data.evaluation import load_evaluation_data
from heimdall_onnx.localization.features import write_features
from heimdall_onnx.localization.mel import FeatureParameters
from heimdall_onnx.model.checkpoint import load_checkpoint
from heimdall_onnx.model.inference import open_session
from heimdall_onnx.model.onnx.validate import validate_model


def read_checkpoint(path: Path) -> None:
    load_checkpoint(path, model="models:SmallNet")


def read_onnx(path: Path) -> None:
    validate_model(path, signature=SmallNet.signature)
    open_session(path, threads=1)


def read_session(path: Path) -> None:
    open_session(path, threads=1)


def read_evaluation(path: Path) -> None:
    data = load_evaluation_data(path, SmallNet.signature)
    assert sum(part.stop - part.start for part, _, _ in data.batches(64)) == data.count
    json.dumps([data.provenance, data.receivers]).encode()


def read_recording(path: Path) -> None:
    # Windows short enough for short files.
    parameters = FeatureParameters(channels="iqm", n_fft=256, hop_length=128, n_mels=16)
    write_features([path], path.with_suffix(".features"), parameters=parameters)


def read_parameters(path: Path) -> None:
    """A cell as papermill injects it: assignments of literals."""
    cell = path.read_text("utf-8", "surrogatepass")
    values = {}
    try:
        for statement in ast.parse(cell).body:
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                values[statement.targets[0].id] = ast.literal_eval(statement.value)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        pass  # what such a cell has assigned until there
    parameters_of_notebook({"In": ["", cell], **values}).model_dump_json()
    check_parameters(values)


def read_manifest(path: Path) -> None:
    manifest = parse_manifest(path.read_bytes(), FOLDER_URI)
    assert manifest.model.key == manifest.objects["model.onnx"].key
    assert all(entry.key.endswith(entry.sha256) for entry in manifest.said.content)
    for name in (
        "fp32",
        "recommended",
        *(manifest.said.variants.passed if manifest.said.variants else ()),
    ):
        variant = manifest.variant(name)
        assert all(entry.key.startswith(manifest.folder) for entry in variant.files.values())
        settings = variant.sessions and variant.sessions.latency
        assert settings is None or settings.runtime in ("onnxruntime", "openvino")


READERS = {
    "checkpoint": Reader(read_checkpoint, (CheckpointError, ParameterError)),
    "onnx": Reader(read_onnx, (InvalidModelError,)),
    "session": Reader(read_session, (InvalidModelError,)),
    "evaluation": Reader(read_evaluation, (DataError,)),
    "recording": Reader(read_recording, (DataError,)),
    "parameters": Reader(read_parameters, (ParameterError,), names_file=False),
    "manifest": Reader(read_manifest, (VerificationError,)),
}

if __name__ == "__main__":
    serve(READERS)
