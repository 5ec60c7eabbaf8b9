"""Small models that can be trained, data for them, and trainings that are killed."""

import math
import os
import signal
from pathlib import Path

import numpy as np
import torch
from torch import nn

from heimdall_onnx import Signature, TensorSpec
from heimdall_onnx.common.text import DEGREES
from heimdall_onnx.data.dataset.writer import create_dataset
from heimdall_onnx.localization.frame import LocalFrame
from heimdall_onnx.training.parameters import check_training
from heimdall_onnx.training.train import train
from heimdall_onnx.training.trainer import PlainCheckpoints

HERE = "trained"
MIDDLE = (50.0, 9.0)


class Framed(nn.Module):
    """A small model with a frame, with everything that draws at random."""

    def __init__(self, width=24, uncertainty_max=5.0, centroid=None, scale_m=None):
        super().__init__()
        self.signature = Signature(
            inputs=(TensorSpec("x", "float32", ("batch", 4)),),
            outputs=(
                TensorSpec("positions", "float32", ("batch", 2), unit=DEGREES),
                TensorSpec("sigma", "float32", ("batch", 2), unit=DEGREES, sigma_of="positions"),
            ),
        )
        self.net = nn.Sequential(
            nn.Linear(4, width),
            nn.BatchNorm1d(width),
            nn.GELU(),
            nn.Dropout(0.1),
            nn.Linear(width, 4),
        )
        self.frame = LocalFrame(centroid, scale_m)

    def local(self, x):
        answers = self.net(x)
        return answers[:, :2], nn.functional.softplus(answers[:, 2:]) + 1e-3

    def forward(self, x):
        return self.frame(*self.local(x))


class Fragile(Framed):
    """Diverges in its fourth epoch."""

    calls = 0

    def local(self, x):
        self.calls += self.training
        offsets, deviations = super().local(x)
        return offsets * (math.nan if self.calls > 24 else 1), deviations


class Plain(nn.Module):
    """No frame: degrees, and one log variance for both coordinates, in a dictionary."""

    signature = Signature(
        inputs=(TensorSpec("x", "float32", ("batch", 4)),),
        outputs=(
            TensorSpec("position", "float32", ("batch", 2), unit=DEGREES),
            TensorSpec("log_variance", "float32", ("batch", 1), log_variance_of="position"),
        ),
    )

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 3)

    def forward(self, x):
        answers = self.net(x)
        start = torch.tensor(MIDDLE)
        return {"position": answers[:, :2] + start, "log_variance": answers[:, 2:]}


class Unsure(nn.Module):
    """Positions without their spread."""

    signature = Signature(
        inputs=(TensorSpec("x", "float32", ("batch", 4)),),
        outputs=(TensorSpec("position", "float32", ("batch", 2), unit=DEGREES),),
    )

    def forward(self, x):
        return x[:, :2]


def write_data(path, count=360, *, labelled=True, seed=0):
    """Two samples of each event; the first two inputs say where, the third how sure."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, 4)).astype(np.float32)
    noise = 0.1 * np.exp(x[:, 2:3]) * rng.standard_normal((count, 2))
    positions = np.array(MIDDLE) + x[:, :2] * (1.0, 2.0) + noise
    with create_dataset(path, meta={"provenance": "drawn"}) as writer:
        events = [f"event {i // 2}" for i in range(count)]
        writer.append({"x": x}, positions if labelled else None, events)
    return path


def options(data, folder, **changes):
    return check_training(
        {
            "data_dir": str(data),
            "checkpoint_dir": str(folder),
            "model": f"{HERE}:Framed",
            "epochs": 8,
            "learning_rate": 0.02,
            "accelerator": "cpu",
            "release": False,
            **changes,
        }
    )


# Moments to be killed at, each in the fourth epoch.
def in_the_epoch(number, name):
    return number == 3 and name == "batch"


def before_the_best(number, name):
    return number == 3 and name.startswith("epoch-")


def before_the_last(number, name):
    return number == 3 and name == "last.ckpt"


MOMENTS = (in_the_epoch, before_the_best, before_the_last)


def be_killed(data, base):
    """Train once for each moment, in a child that kills itself then."""
    save = PlainCheckpoints.save_checkpoint

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    for moment in MOMENTS:
        pid = os.fork()
        if pid:
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
            continue
        signal.alarm(120)  # rather than wait for ever
        batches = 0

        def report(share, what, moment=moment):
            nonlocal batches
            batches += 1
            number = int(what.split()[-1]) - 1 if "epoch" in what else -1
            if batches % 3 == 0 and moment(number, "batch"):
                die()

        def save_or_die(self, checkpoint, path, storage_options=None, moment=moment):
            if moment(len(checkpoint["training"]["history"]) - 1, Path(path).name):
                Path(path).with_name(f".{Path(path).name}.cut").write_bytes(b"PK\x03\x04")
                die()
            save(self, checkpoint, path, storage_options)

        PlainCheckpoints.save_checkpoint = save_or_die
        try:
            train(options(data, Path(base) / moment.__name__), report=report)
        finally:
            os._exit(0)
