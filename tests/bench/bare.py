"""The bare script that a release is held against: what one would write without this package.

It exports, checks, compares five batches, times both models in one process, uploads and
registers; no gates, no float64 reference, no report. Prints its phases in seconds as JSON.
"""

import json
import os
import sys
import time
import uuid
from pathlib import Path

import boto3
import mlflow
import numpy as np
import onnx
import onnxruntime as ort
import torch
from boto3.s3.transfer import TransferConfig

from heimdall_onnx.localization.network import LocalizationNet

BUCKET = "heimdall-bench"


def main(checkpoint: Path, calls: int, folder: Path) -> None:
    phases: dict[str, float] = {}
    began = time.perf_counter()

    def phase(name: str) -> None:
        nonlocal began
        now = time.perf_counter()
        phases[name], began = round(now - began, 3), now

    loaded = torch.load(checkpoint, weights_only=True, mmap=True)
    model = LocalizationNet(**loaded["hyper_parameters"]).eval()
    model.load_state_dict(loaded["state_dict"])
    del loaded
    phase("load")

    path = folder / "model.onnx"
    torch.onnx.export(
        model,
        (torch.randn(2, 3, 128, 32),),
        str(path),
        dynamo=True,
        external_data=False,
        verbose=False,
        input_names=["mel_spectrogram"],
        output_names=["positions", "uncertainties"],
        dynamic_shapes=({0: "batch"},),
    )
    phase("export")

    onnx.checker.check_model(path)
    phase("check")

    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    for _ in range(5):
        batch = rng.standard_normal((8, 3, 128, 32), dtype=np.float32)
        with torch.inference_mode():
            expected = model(torch.from_numpy(batch))
        found = session.run(None, {"mel_spectrogram": batch})
        worst = max(
            float(np.abs(a.numpy() - b).max()) for a, b in zip(expected, found, strict=True)
        )
        assert worst < 1e-3, worst
    phase("compare")

    one = rng.standard_normal((1, 3, 128, 32), dtype=np.float32)
    tensor = torch.from_numpy(one)
    medians = []
    with torch.inference_mode():
        for call in (lambda: model(tensor), lambda: session.run(None, {"mel_spectrogram": one})):
            for _ in range(5):
                call()
            times = []
            for _ in range(calls):
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
            medians.append(float(np.median(times)))
    speedup = medians[0] / medians[1]
    phase("benchmark")

    client = boto3.client("s3", endpoint_url=os.environ["MLFLOW_S3_ENDPOINT_URL"])
    key = f"bare/{uuid.uuid4().hex}"
    client.upload_file(
        str(path),
        BUCKET,
        f"{key}/model.onnx",
        ExtraArgs={"ChecksumAlgorithm": "SHA256"},
        Config=TransferConfig(),
    )
    phase("upload")

    registry = mlflow.MlflowClient()
    run = registry.create_run(registry.get_experiment_by_name("bare").experiment_id)
    registry.log_metric(run.info.run_id, "speedup", speedup)
    registry.create_model_version("bare", f"s3://{BUCKET}/{key}", run.info.run_id)
    registry.set_terminated(run.info.run_id)
    phase("register")
    print(json.dumps({"phases": phases, "speedup": round(speedup, 3)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
