"""How parity's time and memory grow: ``growth.py samples N | model CKPT | statistics CKPT``.

Each call measures one point in a process of its own and prints it as JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from heimdall_onnx.common.machine import peak_memory_bytes, reset_peak_memory
from heimdall_onnx.common.text import number
from heimdall_onnx.data.evaluation import EvaluationData, load_evaluation_data
from heimdall_onnx.evidence.parity.compare import compare_outputs
from heimdall_onnx.evidence.parity.one_pass import Models, pass_over, pass_settings
from heimdall_onnx.evidence.parity.rounding import Rounding
from heimdall_onnx.localization.network import LOCALIZATION_SIGNATURE
from heimdall_onnx.model.checkpoint import load_checkpoint
from heimdall_onnx.model.examples import generic_inputs
from heimdall_onnx.model.inference import open_session, run_onnx, run_pytorch
from heimdall_onnx.model.onnx.export import export_model
from heimdall_onnx.model.onnx.validate import validate_model
from heimdall_onnx.report.plot import Chart
from heimdall_onnx.report.plot.chart import Color, new_figure, styled

SAMPLES = (1, 10, 100, 1_000, 10_000, 100_000)
SIZES = ("tiny", "small", "medium", "large")
STATISTICS_SAMPLES = 512
STATISTICS_REPEATS = 3


class Stem(nn.Module):
    """The reference model's inputs and outputs, and little between.

    With Tiny, 100,000 samples would take more than an hour.
    """

    signature = LOCALIZATION_SIGNATURE

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 4, stride=4), nn.GELU(), nn.Conv2d(16, 16, 3))
        self.positions, self.uncertainties = nn.Linear(16, 2), nn.Linear(16, 2)
        self.eval()

    def forward(self, mel_spectrogram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pooled = self.stem(mel_spectrogram).mean((2, 3))
        return self.positions(pooled), torch.sigmoid(self.uncertainties(pooled)).clamp(0.01, 1.0)


def write_samples(path: Path, count: int) -> None:
    """An ``.npz`` as `numpy.savez` would write it, a part at a time."""
    shape = (count, 3, 128, 32)
    part = np.random.default_rng(0).standard_normal((min(count, 500), *shape[1:]), np.float32)
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive,
        archive.open("mel_spectrogram.npy", "w", force_zip64=True) as member,
    ):
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(member, header)
        for start in range(0, count, len(part)):
            member.write(part[: count - start].tobytes())


def samples(count: int) -> dict[str, Any]:
    """Parity on ``count`` samples from a file."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        file = Path(folder) / "samples.npz"
        write_samples(file, count)
        model = Stem()
        path = export_model(model, Path(folder) / "model.onnx", opset=14).path
        # What the export needed before would hide what grows.
        reset_peak_memory()
        began = time.perf_counter()
        data = load_evaluation_data(file, model.signature)
        read = time.perf_counter() - began
        compare_outputs(model, path, data, model.signature)
        return {
            "samples": count,
            "seconds": time.perf_counter() - began,
            "read_seconds": read,
            "peak_bytes": peak_memory_bytes(),
            "file_bytes": file.stat().st_size,
        }


def model(checkpoint: Path) -> dict[str, Any]:
    """Export, validation and parity of one size."""
    loaded = load_checkpoint(checkpoint, model="heimdall_onnx:LocalizationNet")
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(name: str) -> Any:
        began = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - began

    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        path = Path(folder) / "model.onnx"
        with timed("export"):
            export_model(loaded.model, path)
        with timed("validation"):
            validate_model(path, signature=loaded.signature)
        data = load_evaluation_data(None, loaded.signature)
        with timed("parity"):
            compare_outputs(loaded.model, path, data, loaded.signature)
    parameters = sum(p.numel() for p in loaded.model.parameters())
    return {"parameters": parameters, "seconds": seconds, "peak_bytes": peak_memory_bytes()}


def statistics(checkpoint: Path) -> dict[str, Any]:
    """What part of the pass over the evaluation data is not the models' own."""
    loaded = load_checkpoint(checkpoint, model="heimdall_onnx:LocalizationNet")
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        path = export_model(loaded.model, Path(folder) / "model.onnx", opset=14).path
        session = open_session(path, spinning=False)
    inputs = generic_inputs(loaded.signature, STATISTICS_SAMPLES)
    data = EvaluationData(inputs, None, {}, "random", None, {})
    models = 0.0

    def timed(call: Any) -> Any:
        def run(*arguments: Any) -> Any:
            nonlocal models
            began = time.perf_counter()
            result = call(*arguments)
            models += time.perf_counter() - began
            return result

        return run

    signature = loaded.signature
    pair = Models(
        timed(lambda batch: run_pytorch(loaded.model, batch, signature)),
        timed(lambda batch: run_onnx(session, batch, signature)),
        Rounding(loaded.model, signature),
    )
    settings = pass_settings(
        data,
        signature,
        tolerance=1e-5,
        batch_size=8,
        reference_samples=32,
        pytorch=pair.pytorch,
    )
    shares = []
    for _ in range(STATISTICS_REPEATS):
        models, began = 0.0, time.perf_counter()
        pass_over(pair, data, settings, range(data.count))
        shares.append((time.perf_counter() - began - models) / models)
    return {"shares": shares, "samples": STATISTICS_SAMPLES}


@styled
def draw(by_samples: Sequence[dict[str, Any]], by_model: Sequence[dict[str, Any]]) -> Chart:
    """Time and memory against the number of samples, and against the size of the model."""
    last, first = by_samples[-1], by_samples[0]
    title = (
        f"From {first['samples']:,} to {last['samples']:,} samples memory goes from "
        f"{number(first['peak_bytes'] / 1e9)} to {number(last['peak_bytes'] / 1e9)} GB"
    )
    subtitle = (
        "Above: parity of a small model on evaluation data from a file, "
        f"{number(last['file_bytes'] / 1e9)} GB at the end · below: the reference model's sizes, "
        "64 samples, opset 20"
    )
    figure = new_figure(title, subtitle, height=5.4)
    (time_axes, memory_axes), (model_axes, model_memory) = figure.subplots(2, 2)
    counts = [s["samples"] for s in by_samples]
    time_axes.plot(
        counts, [s["seconds"] for s in by_samples], "o-", color=Color.ELEMENTS[0], label="parity"
    )
    time_axes.plot(
        counts,
        [s["read_seconds"] for s in by_samples],
        "s--",
        color=Color.QUIET,
        label="of it reading",
    )
    time_axes.set(xscale="log", yscale="log", xlabel="samples", ylabel="seconds")
    time_axes.legend()
    memory_axes.plot(
        counts,
        [s["peak_bytes"] / 1e9 for s in by_samples],
        "o-",
        color=Color.ELEMENTS[0],
        label="process",
    )
    memory_axes.plot(
        counts,
        [s["file_bytes"] / 1e9 for s in by_samples],
        "s--",
        color=Color.QUIET,
        label="the data",
    )
    memory_axes.set(xscale="log", xlabel="samples", ylabel="largest memory (GB)", ylim=(0, None))
    memory_axes.legend()
    sizes = [m["parameters"] / 1e6 for m in by_model]
    for (step, marker), color in zip(
        (("export", "o"), ("validation", "s"), ("parity", "^")), Color.ELEMENTS, strict=False
    ):
        model_axes.plot(
            sizes, [m["seconds"][step] for m in by_model], f"{marker}-", color=color, label=step
        )
    model_axes.set(xlabel="parameters (millions)", ylabel="seconds", ylim=(0, None))
    model_axes.legend()
    model_memory.plot(
        sizes,
        [m["peak_bytes"] / 1e9 for m in by_model],
        "o-",
        color=Color.ELEMENTS[0],
        label="process",
    )
    model_memory.plot(
        sizes, [4 * s / 1e3 for s in sizes], "s--", color=Color.QUIET, label="the weights"
    )
    model_memory.set(xlabel="parameters (millions)", ylabel="largest memory (GB)", ylim=(0, None))
    model_memory.legend()
    return Chart(figure, title, subtitle)


if __name__ == "__main__":
    kind, value = sys.argv[1:]
    measure: Any = {
        "samples": lambda: samples(int(value)),
        "model": lambda: model(Path(value)),
        "statistics": lambda: statistics(Path(value)),
    }[kind]
    print(json.dumps(measure()))
