"""Tables of what goes in: parameters, checkpoint, evaluation data, the exported file."""

from __future__ import annotations

from IPython.display import Markdown
from pydantic import BaseModel

from heimdall_onnx.data.evaluation import EvaluationData
from heimdall_onnx.model.checkpoint import LoadedModel
from heimdall_onnx.model.onnx.export import ExportResult
from heimdall_onnx.model.onnx.validate import ModelInfo
from heimdall_onnx.model.signature import Axis, TensorSpec
from heimdall_onnx.report.tables.table import megabytes, shape_text, table


def parameters_table(parameters: BaseModel) -> Markdown:
    """Every parameter with its value."""
    return table(("parameter", "value"), parameters.model_dump(mode="json").items())


def checkpoint_table(loaded: LoadedModel) -> Markdown:
    """The model that was loaded and the file it came from."""
    parameters = sum(p.numel() for p in loaded.model.parameters())
    return table(
        ("checkpoint", "value"),
        [
            ("file", loaded.path.name),
            ("SHA-256", loaded.sha256),
            *(
                (
                    f"member {i}, as the checkpoint records",
                    f"{member.file}, SHA-256 {member.sha256}",
                )
                for i, member in enumerate(loaded.members, 1)
            ),
            ("layout", loaded.layout),
            ("weights", loaded.weights),
            *((f"note {i}", note) for i, note in enumerate(loaded.notes, 1)),
            ("model", " ".join((loaded.model_spec, loaded.submodule)).strip()),
            ("arguments", loaded.model_kwargs),
            ("parameters", f"{parameters:,}"),
            ("signature declared by", loaded.signature_source),
            *((f"input {i}", _spec(s)) for i, s in enumerate(loaded.signature.inputs, 1)),
            *((f"output {i}", _spec(s)) for i, s in enumerate(loaded.signature.outputs, 1)),
            *((f"axis {i}", _axis(a)) for i, a in enumerate(loaded.signature.dynamic_axes, 1)),
        ],
    )


def evaluation_table(data: EvaluationData) -> Markdown:
    """The evaluation inputs and where they come from."""
    return table(
        ("evaluation data", "value"),
        [
            ("source", data.source),
            ("provenance", data.provenance),
            *((("address", data.dataset.address),) if data.dataset else ()),
            ("SHA-256", data.sha256 or "none: seeded random numbers"),
            ("samples", data.count),
            *(
                (f"input {name}", f"{array.dtype} {shape_text(array.shape)}")
                for name, array in data.inputs.items()
            ),
            ("labelled", "no" if data.positions is None else "yes, true positions are known"),
            ("receivers with a position", ", ".join(data.receivers) or "none"),
        ],
    )


def export_table(exported: ExportResult) -> Markdown:
    """The file that was written."""
    return table(
        ("export", "value"),
        [
            ("exporter", exported.exporter),
            ("opset", exported.opset),
            ("size", f"{megabytes(exported.size_bytes)} MB"),
            ("external data", ", ".join(p.name for p in exported.external_data) or "none"),
            ("SHA-256", exported.sha256),
            ("time", f"{exported.seconds:.1f} s"),
        ],
    )


def validation_table(info: ModelInfo) -> Markdown:
    """What the file says of itself."""
    most = sorted(info.operators.items(), key=lambda item: -item[1])[:8]
    counts = ", ".join(f"{count} {name}" for name, count in most)
    return table(
        ("file", "value"),
        [
            ("opset", info.opset_version),
            ("IR version", info.ir_version),
            ("producer", f"{info.producer_name} {info.producer_version}"),
            ("operators", f"{sum(info.operators.values())}: {counts}, …"),
            *(("input", f"{t.name}: {t.dtype} {shape_text(t.shape)}") for t in info.inputs),
            *(("output", f"{t.name}: {t.dtype} {shape_text(t.shape)}") for t in info.outputs),
            ("signature", "; ".join(info.signature_problems) or "as declared"),
        ],
    )


def _spec(spec: TensorSpec) -> str:
    parts = [spec.describe()]
    if spec.unit:
        parts.append(spec.unit)
    if spec.range:
        parts.append(f"in [{spec.range[0]:g}, {spec.range[1]:g}]")
    if spec.masks:
        parts.append(f"where true, {', '.join(spec.masks)} are masked")
    if spec.sigma_of:
        parts.append(f"standard deviation of {spec.sigma_of}")
    if spec.log_variance_of:
        parts.append(f"logarithm of the variance of {spec.log_variance_of}")
    return ", ".join(parts)


def _axis(axis: Axis) -> str:
    order = ", in any order" if axis.permutable else ""
    return f"{axis.name}: dynamic, tried at {', '.join(map(str, sorted(axis.lengths)))}{order}"
