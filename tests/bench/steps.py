"""Single steps of Tiny in a process that has imported everything: ``steps.py CHECKPOINT``.

Prints every measurement as JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import uuid
from pathlib import Path

from boto3.s3.transfer import TransferConfig

from heimdall_onnx import LocalizationNet, Settings
from heimdall_onnx.archive.mlmodel import write_mlmodel_folder
from heimdall_onnx.model.checkpoint import load_checkpoint
from heimdall_onnx.model.onnx.export import export_model
from heimdall_onnx.model.onnx.validate import validate_model
from heimdall_onnx.services.client import make_client
from heimdall_onnx.services.registry import initialize_mlflow
from heimdall_onnx.services.store import Bucket

BUCKET = "heimdall-bench"
REPEATS = 5
ROWS = {
    "Tiny: export at opset 14": (2.0, "s", f"{REPEATS} times in one process, after imports"),
    "Tiny: validation": (1.0, "s", f"{REPEATS} times, on those files"),
    "Tiny: registration": (2.0, "s", f"{REPEATS} versions in SQLite"),
    "Tiny: upload / boto3's own transfer with checksums": (
        1.0,
        "×",
        f"{REPEATS} pairs in turns on the embedded store; the upload without its read-back",
    ),
    "Tiny: reading back and hashing / that transfer": (
        None,
        "×",
        "what the proof that the store has the very bytes takes beside that",
    ),
}


def main(checkpoint: Path) -> None:
    """Measure and print."""
    settings = Settings.load()
    client, tracker = make_client(settings), initialize_mlflow(settings)
    loaded = load_checkpoint(
        checkpoint, model="heimdall_onnx:LocalizationNet", model_kwargs={"backbone_size": "tiny"}
    )
    assert isinstance(loaded.model, LocalizationNet)
    found: dict[str, list[float]] = {name: [] for name in ROWS}

    def timed(name: str, began: float) -> float:
        seconds = time.perf_counter() - began
        found[name].append(seconds)
        return seconds

    names = list(ROWS)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        # What the first export and the first registration import is no part of either.
        export_model(loaded.model, path, opset=14)
        for _ in range(REPEATS):
            began = time.perf_counter()
            exported = export_model(loaded.model, path, opset=14)
            timed(names[0], began)
            began = time.perf_counter()
            validate_model(path, signature=loaded.signature)
            timed(names[1], began)
        for turn in range(REPEATS):
            key = f"steps/{uuid.uuid4().hex}"
            seconds = {}

            def theirs(key: str = key, seconds: dict[str, float] = seconds) -> None:
                began = time.perf_counter()
                client.upload_file(
                    str(path),
                    BUCKET,
                    f"{key}/theirs",
                    ExtraArgs={"ChecksumAlgorithm": "SHA256"},
                    Config=TransferConfig(),
                )
                seconds["theirs"] = time.perf_counter() - began

            def ours(key: str = key, seconds: dict[str, float] = seconds) -> None:
                began = time.perf_counter()
                Bucket(client, BUCKET).upload_file(
                    path, f"{key}/model.onnx", sha256=exported.sha256
                )
                seconds["ours"] = time.perf_counter() - began

            for take in (ours, theirs) if turn % 2 else (theirs, ours):
                take()
            began = time.perf_counter()
            Bucket(client, BUCKET).hash_object(f"{key}/model.onnx")
            back = time.perf_counter() - began
            found[names[3]].append((seconds["ours"] - back) / seconds["theirs"])
            found[names[4]].append(back / seconds["theirs"])
            beside = Path(folder) / f"beside-{turn}"
            write_mlmodel_folder(beside, loaded.signature, model_size_bytes=exported.size_bytes)
            for file in beside.iterdir():
                Bucket(client, BUCKET).upload_file(file, f"{key}/{file.name}")
            began = time.perf_counter()
            tracker.register_model("steps", f"s3://{BUCKET}/{key}")
            timed(names[2], began)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
