"""Complete releases without a notebook's run: real objects, versions and manifests, in a second.

The model adds an offset to a position, so that its error is known, after as many products of
matrices as are asked for, so that its latency is, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import onnx
import records
from models import POSITIONS
from onnx import TensorProto, helper, numpy_helper
from pydantic import TypeAdapter

from heimdall_onnx.archive.aliases import AliasLog
from heimdall_onnx.archive.content import keep_content
from heimdall_onnx.archive.manifest import BOM, Manifest
from heimdall_onnx.archive.metadata import METADATA
from heimdall_onnx.archive.mlmodel import write_mlmodel_folder
from heimdall_onnx.archive.signing import Signer
from heimdall_onnx.common.files import hash_file
from heimdall_onnx.evidence.variants.figures import VariantFigures
from heimdall_onnx.evidence.variants.search import JudgedVariant
from heimdall_onnx.model.runtimes import SessionSettings
from heimdall_onnx.model.signature import Signature, TensorSpec
from heimdall_onnx.release.complete import complete_release
from heimdall_onnx.services.connection import Connection
from heimdall_onnx.services.store import Bucket

SIGNATURE = Signature((TensorSpec("signal", "float32", ("batch", 2)),), (POSITIONS,))
PREFIX = "models/localization"
OPENVINO = SessionSettings(runtime="openvino", provider="CPU", threads=1)
# What becomes of a release's variants, and by how many degrees each misses: the files differ.
VARIANTS = {
    "fp32": ("passed", SessionSettings(), None),
    "fp32-openvino": ("passed", OPENVINO, None),
    "int8-minmax": ("passed", SessionSettings(threads=1, level="extended", arena=False), 0.25),
    "int8-nncf": ("passed", OPENVINO, 0.5),
    "int4-weights": ("failed", SessionSettings(), 1.0),
    "fp16-cuda": ("unavailable", SessionSettings(provider="CUDAExecutionProvider"), None),
}


@dataclass(frozen=True)
class Factory:
    """Makes releases of one registered model in one bucket."""

    connection: Connection
    bucket: str
    folder: Path
    name: str = "net"

    def __call__(
        self,
        *,
        error_degrees: float = 0.01,
        products: int = 0,
        verdict: str = "pass",
        alias: str | None = "staging",
        signer: Signer | None = None,
        labelled: bool = True,
        arrays: Mapping[str, Any] | None = None,
        recommended: str = "",
        signature: Signature | None = None,
        described: Mapping[str, Any] | None = None,
        recorded: Mapping[str, Any] | None = None,
        cells: Sequence[nbformat.NotebookNode] = (),
    ) -> Manifest:
        """Make a release; with a name of one that is ``recommended`` it has all `VARIANTS`.

        What is ``described`` changes its manifest, and its notebook's record where that says it
        too; what is ``recorded`` changes the record alone, which comes after these ``cells``.
        Other ``arrays`` take the place of its evaluation data.
        """
        client, tracker = self.connection.client, self.connection.tracker
        Bucket(client, self.bucket).ensure()
        version = Bucket(client, self.bucket).claim_version(
            PREFIX, name=METADATA, content=lambda _: b'{"mlflow_run_id": ""}'
        )
        key, folder = f"{PREFIX}/{version}", self.folder / version
        write_mlmodel_folder(folder, SIGNATURE, model_size_bytes=0)
        onnx.save(make_model(error_degrees, products), folder / "model.onnx")
        sha256 = hash_file(folder / "model.onnx")
        variants = None
        if recommended:
            variants = records.variants(recommended, *map(_written, _judge(folder)))
        told = {
            "model": {"signature": (signature or SIGNATURE).to_dict()},
            "variants": variants,
            **(described or {}),
        }
        shared = {name: told[name] for name in told.keys() & records.described().keys()}
        record = records.record_json(**shared, uploaded={"sha256": sha256})
        record = records.changed(record, recorded or {})
        (folder / "report.ipynb").write_text(make_notebook(record, cells))
        (folder / "report.html").write_text("<h1>report</h1>")
        (folder / BOM).write_text('{"bomFormat": "CycloneDX"}')
        objects = [
            Bucket(client, self.bucket).upload_file(path, f"{key}/{path.relative_to(folder)}")
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        ]
        objects.append(Bucket(client, self.bucket).head(f"{key}/{METADATA}"))
        uri = f"s3://{self.bucket}/{key}"
        number = tracker.register_model(self.name, uri)
        keep = partial(keep_content, Bucket(client, self.bucket))
        checkpoint, data = self.folder / "model.ckpt", self._evaluation_data(labelled)
        if arrays is not None:
            np.savez(data := self.folder / f"eval-{version}.npz", **arrays)
        checkpoint.write_bytes(b"weights")
        content = [
            keep(checkpoint, hash_file(checkpoint), "checkpoint").model_dump(),
            keep(data, hash_file(data), "evaluation_data").model_dump(),
        ]
        manifest = records.manifest_json(
            version=version,
            verdict=verdict,
            objects=[{"key": o.key, "size": o.size_bytes, "sha256": o.sha256} for o in objects],
            content=content,
            signature=signer and {"key": f"{key}/model.sig", "signer_sha256": signer.sha256},
            mlflow={"model_name": self.name, "model_version": number},
        )
        manifest = records.changed(manifest, told)
        released = complete_release(self.connection, uri, manifest, signer)
        if alias:
            log = AliasLog(Bucket(client, self.bucket), self.name, alias)
            log.point(tracker, released.model_version, released.uri, "a run")
        return released

    def _evaluation_data(self, labelled: bool) -> Path:
        signal = np.random.default_rng(0).uniform(45, 50, (64, 2)).astype(np.float32)
        labels = {"positions": signal.astype(np.float64)} if labelled else {}
        path = self.folder / f"eval-{labelled}.npz"
        np.savez(path, signal=signal, **labels)
        return path


def _written(variant: JudgedVariant) -> dict[str, Any]:
    return TypeAdapter(VariantFigures).dump_python(variant, mode="json")


def _judge(folder: Path) -> Iterator[JudgedVariant]:
    """All `VARIANTS`; the files of those that passed are in ``folder`` then."""
    for name, (status, settings, offset) in VARIANTS.items():
        file = "model.onnx" if offset is None else f"variants/{name}/model.onnx"
        sessions = dict.fromkeys(("latency", "throughput"), settings)
        variant = JudgedVariant(name, name, "int8", status, sessions=sessions, file=file)
        if status != "passed":
            yield replace(variant, reason=f"a reason for {name}")
            continue
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if offset is not None:
            onnx.save(make_model(offset, 0), path)
        size = path.stat().st_size
        yield replace(variant, path=path, sha256=hash_file(path), size_bytes=size)


def make_model(offset: float, products: int = 0) -> onnx.ModelProto:
    """Adds ``offset`` degrees to a latitude after so many products of matrices."""
    size = 256
    matrix = np.full((size, size), 1 / size, np.float32)
    weights = [
        numpy_helper.from_array(np.array([offset, 0], np.float32), "offset"),
        numpy_helper.from_array(np.full((2, size), 1e-9, np.float32), "widen"),
        numpy_helper.from_array(np.zeros((size, 2), np.float32), "narrow"),
    ]
    nodes, last = [helper.make_node("MatMul", ["signal", "widen"], ["wide"])], "wide"
    for number in range(products):
        weights.append(numpy_helper.from_array(matrix, f"matrix{number}"))
        nodes.append(helper.make_node("MatMul", [last, f"matrix{number}"], [f"wide{number}"]))
        last = f"wide{number}"
    nodes += [
        helper.make_node("MatMul", [last, "narrow"], ["nothing"]),
        helper.make_node("Add", ["signal", "nothing"], ["same"]),
        helper.make_node("Add", ["same", "offset"], ["positions"]),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2])
        for name in ("signal", "positions")
    ]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], weights)
    opsets = [helper.make_opsetid("", 20)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def make_notebook(record: Mapping[str, Any], cells: Sequence[nbformat.NotebookNode] = ()) -> str:
    """An executed notebook of these cells, with what scrapbook would have put into it."""
    scrap = {"name": "release", "data": record, "encoder": "json", "version": 1}
    output = nbformat.v4.new_output(
        "display_data",
        data={"application/scrapbook.scrap.json+json": scrap},
        metadata={"scrapbook": {"name": "release", "data": True, "display": False}},
    )
    cell = nbformat.v4.new_code_cell("record()", outputs=[output], execution_count=1)
    return json.dumps(nbformat.v4.new_notebook(cells=[*cells, cell]))
