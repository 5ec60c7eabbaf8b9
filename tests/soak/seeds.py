"""Valid files of every kind, small, so that a mutation hits what matters."""

from __future__ import annotations

import io
import json
import os
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import records
import torch
from models import SmallNet
from onnx import TensorProto, helper
from safetensors.torch import save

from heimdall_onnx.model.onnx.export import export_model

# Of a real recording, this much: some ten stamped blocks.
RECORDING_BYTES = 24_000
FOLDER_URI = "s3://heimdall-models/models/localization/v20261120_143000"
META = {
    "provenance": "recordings",
    "centre": [50, 8],
    "receivers": [{"name": "Alpha", "latitude": 50, "longitude": 8.5}],
    "events": [{"recordings": [{"start": "2020-08-13T09:00:00", "receiver": "Alpha"}]}],
}


def checkpoints() -> list[bytes]:
    """Every layout that is accepted, in every container."""
    state = SmallNet(2).state_dict()
    layouts = [
        {
            "state_dict": {f"model.{name}": value for name, value in state.items()},
            "hyper_parameters": {"width": 2, "learning_rate": 1e-3, "tags": ["a", ("b", None)]},
        },
        {"model_state_dict": state, "hyper_parameters": {"width": 2}, "epoch": 3},
        SmallNet().state_dict(),
    ]
    files = [_written(torch.save, layout) for layout in layouts]
    files += [_written(_save_legacy, layout) for layout in layouts]
    return [*files, save(SmallNet().state_dict())]


def models() -> list[bytes]:
    """An exported model, and one with branches, a loop and a function by hand."""
    with tempfile.TemporaryDirectory() as folder:
        exported = export_model(_Line().eval(), Path(folder) / "model.onnx", opset=14)
        return [exported.path.read_bytes(), _model_by_hand().SerializeToString()]


def evaluation_data() -> list[bytes]:
    """Evaluation data with and without what is optional, stored and compressed."""
    signal = np.random.default_rng(0).standard_normal((5, 2, 8, 8)).astype(np.float32)
    everything = {
        "signal": signal,
        "positions": np.tile([50.0, 8.0], (5, 1)),
        "meta": np.array(json.dumps(META)),
    }
    return [
        _written(lambda content, file: np.savez(file, **content), {"signal": signal}),
        _written(lambda content, file: np.savez(file, **content), everything),
        _written(lambda content, file: np.savez_compressed(file, **content), everything),
    ]


def recordings() -> list[bytes]:
    """A KiwiSDR file, plain WAV files, and the beginnings of real recordings if there are any."""
    rng = np.random.default_rng(0)
    samples = rng.integers(-9000, 9000, (10 * 512, 2))
    kiwi = [_fmt(1, 2, 12_000, 16)]
    for block in range(10):
        seconds, nanoseconds = divmod(1000_000_000_000 + block * 512_000_000_000 // 12_000, 10**9)
        kiwi.append(chunk(b"kiwi", struct.pack("<BBII", 1, 0, seconds, nanoseconds)))
        kiwi.append(chunk(b"data", samples[block * 512 :][:512].astype("<i2").tobytes()))
    plain = [
        [_fmt(code, 2, 12_000, bits), chunk(b"LIST", b"INFO"), chunk(b"data", values.tobytes())]
        for code, bits, values in (
            (1, 16, samples.astype("<i2")),
            (1, 24, samples.astype("<i4").view("u1").reshape(-1, 4)[:, 1:].copy()),
            (3, 32, (samples / 2**15).astype("<f4")),
        )
    ]
    made = [riff(*chunks) for chunks in (kiwi, *plain)]
    folder = os.environ.get("HEIMDALL_RECORDINGS")
    real = sorted(Path(folder).rglob("*_iq.wav"))[:3] if folder else []
    return made + [_beginning(path) for path in real]


def parameters() -> list[bytes]:
    """Cells as papermill injects them."""
    return [
        b'# Parameters\ncheckpoint = "model.ckpt"\neval_data = "eval.npz"\ntolerance = 1e-05\n'
        b'name = "heimdall"\nbucket = "heimdall-models"\nmodel_kwargs = {"width": 2}\nseed = 3\n',
        b'# Parameters\nmodel_kwargs = \'{"width": [2, {"deep": null}]}\'\nprofile = "audit"\n'
        b'alias = "staging"\nopset = 14\nbatch_size = 4\nthreads = 0\npublish = True\n',
    ]


def manifests() -> list[bytes]:
    """Manifests with and without what is optional."""
    folder = FOLDER_URI.removeprefix("s3://heimdall-models/")
    digest = "0123456789abcdef" * 4
    objects = [
        {"key": f"{folder}/{name}", "size": 1234, "sha256": digest}
        for name in ("model.onnx", "MLmodel", "report.ipynb", "report.html", "metadata.json")
    ]
    bare = records.manifest_json(version=folder.rpartition("/")[2], objects=objects)
    kept = [
        {
            "role": role,
            "key": f"objects/sha256/{digest}",
            "size": 99,
            "sha256": digest,
            "name": name,
        }
        for role, name in (("checkpoint", "model.ckpt"), ("evaluation_data", "eval.npz"))
    ]
    signature = {"key": f"{folder}/model.sig", "signer_sha256": digest}
    full = records.changed(bare, {"content": kept, "signature": signature})
    file = "variants/int8-minmax/model.onnx"
    own = {"key": f"{folder}/{file}", "size": 99, "sha256": digest}
    settings = {"runtime": "onnxruntime", "threads": 2, "provider_options": {"device_id": "0"}}
    sessions = {"latency": settings, "throughput": {**settings, "runtime": "openvino"}}
    judged = records.variants(
        "int8-minmax",
        records.variant("fp32", sha256=digest, sessions=sessions),
        records.variant("int8-minmax", file=file, sha256=digest, sessions=sessions),
        records.variant("int4-weights", "failed"),
    )
    varied = {**full, "objects": [*objects, own], "variants": judged}
    return [json.dumps(document, indent=2).encode() for document in (bare, full, varied)]


def chunk(name: bytes, payload: bytes) -> bytes:
    """A chunk of a RIFF file, without the byte that follows one of odd length."""
    return name + struct.pack("<I", len(payload)) + payload


def riff(*chunks: bytes) -> bytes:
    """A WAV file of ``chunks``."""
    return b"RIFF" + chunk(b"WAVE", b"".join(chunks))[4:8] + b"WAVE" + b"".join(chunks)


def members(archive: bytes) -> list[tuple[str, bytes]]:
    """Name and content of what a ZIP file holds."""
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return [(name, opened.read(name)) for name in opened.namelist()]


class _Line(SmallNet):
    """Small enough that most bytes of its file are structure."""

    def __init__(self) -> None:
        super().__init__(2)


def _model_by_hand() -> onnx.ModelProto:
    number = helper.make_tensor_value_info("n", TensorProto.FLOAT, ["batch", 2])
    branch = helper.make_graph([helper.make_node("Neg", ["x"], ["n"])], "branch", [], [number])
    scalar = helper.make_tensor_value_info
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["on"]),
            helper.make_node("Add", ["last", "one"], ["next"]),
        ],
        "body",
        [
            scalar("i", TensorProto.INT64, []),
            scalar("go", TensorProto.BOOL, []),
            scalar("last", TensorProto.FLOAT, ["batch", 2]),
        ],
        [scalar("on", TensorProto.BOOL, []), scalar("next", TensorProto.FLOAT, ["batch", 2])],
    )
    graph = helper.make_graph(
        [
            helper.make_node("Constant", [], ["one"], value_float=1.0),
            helper.make_node("If", ["c"], ["b"], then_branch=branch, else_branch=branch),
            helper.make_node("Loop", ["count", "", "b"], ["l"], body=body),
            helper.make_node("Double", ["l"], ["d"], domain="local"),
            helper.make_node("Reshape", ["d", "shape"], ["y"]),
        ],
        "choice",
        [scalar("c", TensorProto.BOOL, []), scalar("x", TensorProto.FLOAT, ["batch", 2])],
        [scalar("y", TensorProto.FLOAT, ["rows", 2])],
        [
            helper.make_tensor("count", TensorProto.INT64, [], [3]),
            helper.make_tensor("shape", TensorProto.INT64, [2], [-1, 2]),
        ],
    )
    double = helper.make_function(
        "local",
        "Double",
        ["a"],
        ["r"],
        [helper.make_node("Add", ["a", "a"], ["r"])],
        [helper.make_opsetid("", 14)],
    )
    opsets = [helper.make_opsetid("", 14), helper.make_opsetid("local", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=[double])


def _written(write: Callable[..., object], content: object) -> bytes:
    file = io.BytesIO()
    write(content, file)
    return file.getvalue()


def _save_legacy(content: object, file: io.BytesIO) -> None:
    torch.save(content, file, _use_new_zipfile_serialization=False)


def _fmt(code: int, channels: int, rate: int, bits: int) -> bytes:
    align = channels * bits // 8
    return chunk(b"fmt ", struct.pack("<HHIIHH", code, channels, rate, rate * align, align, bits))


def _beginning(path: Path) -> bytes:
    """The first whole chunks of a WAV file, as a file of their own."""
    with path.open("rb") as file:
        content = file.read(RECORDING_BYTES)
    end = offset = 12
    while offset + 8 <= len(content):
        size = int.from_bytes(content[offset + 4 : offset + 8], "little")
        offset += 8 + size + size % 2
        if offset <= len(content):
            end = offset
    return riff(content[12:end])
