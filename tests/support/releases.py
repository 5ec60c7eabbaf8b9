"""What the tests release: checkpoints, evaluation data and parameters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mlflow
import nbformat
import numpy as np
import torch
from models import SmallNet

from heimdall_onnx.archive.aliases import ALIASES
from heimdall_onnx.archive.manifest import CONTENT
from heimdall_onnx.common.errors import RegistryError
from heimdall_onnx.common.parameters import ReleaseParameters
from heimdall_onnx.report.notebook import notebook_path
from heimdall_onnx.services.registry import MLflowTracker
from heimdall_onnx.services.settings import Settings
from heimdall_onnx.services.store import Bucket

PREFIX = "models/localization"


@dataclass(frozen=True)
class Inputs:
    checkpoint: Path
    eval_data: Path
    model: str = "heimdall_onnx:LocalizationNet"


def make_small_inputs(folder: Path) -> Inputs:
    """A model of the user's own that takes no time."""
    torch.save(SmallNet().state_dict(), folder / "model.pt")
    rng = np.random.default_rng(0)
    signal = rng.standard_normal((12, 2, 8, 8)).astype(np.float32)
    np.savez(folder / "eval.npz", signal=signal)
    return Inputs(folder / "model.pt", folder / "eval.npz", "models:SmallNet")


def smoke(inputs: Inputs, bucket: str, **changes: object) -> ReleaseParameters:
    """Parameters of the shortest complete release."""
    values = {
        "checkpoint": str(inputs.checkpoint),
        "eval_data": str(inputs.eval_data),
        "model": inputs.model,
        "bucket": bucket,
        "name": "test-model",
        "prefix": PREFIX,
        "profile": "smoke",
        "opset": 14,  # its exporter takes a third of the other's time
        # In two processes that import all anew; variants are chosen by it.
        "measure_latency": "variants" in changes,
    }
    return ReleaseParameters(**{**values, **changes})


def keys(s3, bucket: str) -> set[str]:
    """What is in a bucket, beside the proof of what its store can do."""
    return {k for k in Bucket(s3, bucket).list_keys("") if not k.startswith("aliases/.store/")}


def versions(settings: Settings, name: str = "test-model") -> list:
    client = mlflow.MlflowClient(settings.tracking_uri.get_secret_value())
    return list(client.search_model_versions(f"name = '{name}'"))


def nothing_is_offered(s3, settings: Settings, bucket: str) -> None:
    """No folder outside failed/, no registered version, no alias; content and logs may stay."""
    apart = (f"{PREFIX}/failed/", f"{CONTENT}/", f"{ALIASES}/")
    left = {key for key in keys(s3, bucket) if not key.startswith(apart)}
    assert left == set()
    assert versions(settings) == []


def changed_notebook(folder: Path, after: str = "", source: str = "", figure: str = "") -> Path:
    """The release notebook without figures but that of the cell ``figure``, and with one more cell
    after the cell ``after``."""
    notebook = nbformat.read(notebook_path(), 4)
    if after:
        place = next(i for i, cell in enumerate(notebook.cells) if cell.id == after)
        notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(source))
    notebook.cells = [
        cell
        for cell in notebook.cells
        if cell.cell_type != "code" or "plot." not in cell.source or cell.id == figure
    ]
    path = folder / "changed.ipynb"
    nbformat.write(notebook, path)
    return path


def lose_the_answer_of_set_alias(monkeypatch) -> None:
    """The registry moves an alias once and fails to say so."""
    set_alias, faults = MLflowTracker.set_alias, iter([True])

    def moved_but_failed(tracker, *arguments):
        set_alias(tracker, *arguments)
        if next(faults, False):
            raise RegistryError("the answer was lost")

    monkeypatch.setattr(MLflowTracker, "set_alias", moved_but_failed)
