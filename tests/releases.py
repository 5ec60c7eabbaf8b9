"""What the tests release: checkpoints, evaluation data and parameters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from models import SmallNet

from heimdall_onnx.parameters import ReleaseParameters


@dataclass(frozen=True)
class Inputs:
    checkpoint: Path
    eval_data: Path
    model: str = "heimdall_onnx.localization_net:LocalizationNet"


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
        "profile": "smoke",
    }
    return ReleaseParameters(**{**values, **changes})
