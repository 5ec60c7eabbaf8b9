"""Evaluation data that workers share: ``evaluation.py SAMPLES ROUNDS``.

One process with one thread and two workers with one thread each take the same models over the same
dataset, in turns. Prints seconds, memory and how many figures differ, as JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from growth import Stem

from heimdall_onnx.common.machine import peak_memory_bytes, reset_peak_memory
from heimdall_onnx.common.parameters import EvaluationWorkers
from heimdall_onnx.data.dataset.writer import create_dataset
from heimdall_onnx.data.evaluation import EvaluationData, load_evaluation_data
from heimdall_onnx.evidence.parity.one_pass import EvaluationPass, Models, pass_over, pass_settings
from heimdall_onnx.evidence.parity.workers import evaluate_on
from heimdall_onnx.model.inference import open_session
from heimdall_onnx.model.onnx.export import export_model

# Estimates of a sketch; everything else must be equal to the last bit.
ESTIMATES = {"p50", "p99", "p999", "ulp_p50", "ulp_p999"}
PORTION = 500
SAMPLES = (4_000, 40_000)


def write_dataset(path: Path, count: int) -> None:
    """Standard-normal spectrograms with positions, a portion at a time."""
    rng = np.random.default_rng(0)
    with create_dataset(path, meta={"provenance": "random numbers"}) as writer:
        for start in range(0, count, PORTION):
            size = min(PORTION, count - start)
            inputs = {"mel_spectrogram": rng.standard_normal((size, 3, 128, 32), np.float32)}
            positions = rng.uniform((46, 4), (54, 14), (size, 2))
            writer.append(inputs, positions, [f"event {start + i}" for i in range(size)])


def figures(found: EvaluationPass, data: EvaluationData) -> list[Any]:
    """What must not depend on who took which part."""
    outputs = [
        value
        for output in found.outputs(data)
        for name, value in vars(output).items()
        if name not in ESTIMATES
    ]
    told = [
        value
        for report in found.uncertainty()
        if report.calibration
        for value in (report.samples, report.calibration.nll, *report.calibration.coverage)
    ]
    ground = found.ground()
    assert ground is not None
    return [*outputs, *told, ground.displacement_max_m, found.worst.first, found.worst.excess]


def main(count: int, rounds: int) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    model = Stem()
    signature = model.signature
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        path = export_model(model, Path(folder) / "model.onnx", opset=14).path
        write_dataset(Path(folder) / "data.zarr", count)
        data = load_evaluation_data(Path(folder) / "data.zarr", signature, verify=False)
        session = open_session(path, threads=1, spinning=False)
        models = Models.of(model, session, signature)
        settings = pass_settings(
            data,
            signature,
            tolerance=1e-5,
            batch_size=8,
            reference_samples=32,
            pytorch=models.pytorch,
        )
        workers = EvaluationWorkers(count=2)
        seconds: dict[str, list[float]] = {"alone": [], "shared": []}
        client_bytes, differing = [], []

        def alone() -> EvaluationPass:
            assert data.dataset is not None
            # Workers hold all values against the digest, too.
            data.dataset.verify()
            return pass_over(models, data, settings, range(data.count))

        def shared() -> EvaluationPass:
            reset_peak_memory()
            found = evaluate_on(workers, model, path, data, settings)
            client_bytes.append(peak_memory_bytes())
            return found

        for turn in range(rounds):
            found = {}
            takes = {"alone": alone, "shared": shared}
            for name in takes if turn % 2 == 0 else reversed(takes):
                began = time.perf_counter()
                found[name] = takes[name]()
                seconds[name].append(time.perf_counter() - began)
            pairs = zip(figures(found["alone"], data), figures(found["shared"], data), strict=True)
            differing.append(sum(a != b for a, b in pairs))
        print(
            json.dumps(
                {
                    "samples": count,
                    "bytes": data.dataset.stored_bytes if data.dataset else 0,
                    "seconds": seconds,
                    "client_bytes": client_bytes,
                    "differing": differing,
                    "figures": len(figures(found["alone"], data)),
                }
            )
        )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
