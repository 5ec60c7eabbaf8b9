"""The bill of materials of a release: what the model was made of, and how well it was measured.

A CycloneDX ML-BOM (specification 1.6, https://cyclonedx.org/docs/1.6/json/): components with hashes
and package addresses, as other tools read them, and a model card whose figures are those of the
notebook's record. It is written as the JSON that it is: CycloneDX's library for Python has neither
model cards nor data sets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from uuid import UUID, uuid5

from packageurl import PackageURL

from heimdall_onnx.archive.manifest import (
    REPORT_HTML,
    Checkpoint,
    ContentRole,
    Entry,
    EvaluationInputs,
    Manifest,
)
from heimdall_onnx.common.environment import DISTRIBUTION, Environment
from heimdall_onnx.common.parameters import FP32, MODEL
from heimdall_onnx.common.text import DEGREES
from heimdall_onnx.model.signature import TensorSpec
from heimdall_onnx.services.store import format_uri

if TYPE_CHECKING:
    from heimdall_onnx.archive.record import Record
    from heimdall_onnx.evidence.variants.figures import VariantFigures

_Json = dict[str, Any]

# Namespace of the serial numbers; drawn once.
_NAMESPACE = UUID("6f0c1a52-7c0e-4f0e-9a3c-3d5b8c1e7a94")
# Files of one machine: their content is a component, by its hash.
_PATHS = {"checkpoint", "eval_data", "calibration_data", "output_dir"}
_MODEL, _CHECKPOINT, _EVALUATION_DATA = "model", "checkpoint", "evaluation-data"
_LEARNED = "machine-learning-model"
# Of an environment that was there when the model was made, and is no part of it.
_EXCLUDED = {"scope": "excluded"}


def describe_release(manifest: Manifest, record: Record) -> bytes:
    """The bill of materials of a release; the same for the same arguments.

    Whatever text the arguments hold stays text: the result is ASCII, with everything else escaped.

    Args:
        manifest: The release's manifest, as far as it is written before this one.
        record: What its notebook kept.

    Returns:
        JSON of CycloneDX 1.6.
    """
    environment = record.environment
    inputs = [
        _checkpoint(manifest, record.checkpoint),
        _evaluation_data(manifest, record.evaluation_data),
        *_signature_file(manifest),
    ]
    packages = {name: _package(name, v) for name, v in record.distributions.items()}
    ours = packages[DISTRIBUTION]
    named = [packages[name] for name in environment.packages if name != DISTRIBUTION]
    model = _model(manifest, record)
    components = [*inputs, *packages.values(), *_platform(environment)]
    alone = {*_references([model, *components])} - {_MODEL, ours["bom-ref"]}
    tool = {"type": "application", "name": ours["name"], "version": ours["version"]}
    described = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "serialNumber": uuid5(_NAMESPACE, f"{manifest.model.sha256} {manifest.version}").urn,
        "metadata": {
            "timestamp": manifest.said.created.isoformat(),
            "tools": {"components": [tool]},
            "component": model,
            "properties": _properties(
                {
                    "git:commit": environment.git_commit,
                    "git:dirty": environment.git_dirty,
                    "threads": record.threads,
                    "processors": environment.processors,
                    **{
                        f"parameter:{name}": value
                        for name, value in manifest.said.parameters.items()
                        if name not in _PATHS
                    },
                }
            ),
        },
        "components": components,
        "dependencies": [
            {"ref": _MODEL, "dependsOn": [c["bom-ref"] for c in (*inputs, ours)]},
            {"ref": ours["bom-ref"], "dependsOn": [c["bom-ref"] for c in named]},
            # What is not among them would count as unknown, and not as needing nothing.
            *({"ref": reference} for reference in sorted(alone)),
        ],
    }
    return (json.dumps(described, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _references(components: Iterable[_Json]) -> Iterator[str]:
    """Those of components and of what these are made of."""
    for one in components:
        yield one["bom-ref"]
        yield from _references(one.get("components", ()))


def _component(kind: str, reference: str, name: str, **further: Any) -> _Json:
    """A component; of what is further said of it, nothing that is empty."""
    given = {what: value for what, value in further.items() if value}
    return {"type": kind, "bom-ref": reference, "name": name, **given}


def _model(manifest: Manifest, record: Record) -> _Json:
    entry, version, said = manifest.model, manifest.version, manifest.said
    name, described = said.parameters["name"], _metadata(record)
    file = _reference(manifest, entry)
    found = {"checksum": f"sha256:{entry.sha256}", "download_url": file["url"]}
    # Beside a model that is too large for one file.
    weights = {n: e for n, e in manifest.model_files.items() if n != MODEL}
    return _component(
        _LEARNED,
        _MODEL,
        name,
        version=version,
        description=f"{described['model_type']} as an ONNX model, opset {said.parameters['opset']}",
        purl=PackageURL("generic", name=name, version=version, qualifiers=found).to_string(),
        hashes=_hashes(entry.sha256),
        externalReferences=[
            file,
            _reference(manifest, manifest.objects[REPORT_HTML], "evidence"),
        ],
        properties=_properties(
            {
                "verdict": manifest.said.verdict,
                "profile": record.profile,
                "size": entry.size,
                "trained_parameters": described["pytorch_params"]["total"],
                "mlflow:run_id": said.mlflow.run_id,
                "mlflow:model_version": manifest.model_version,
                **({"variants:recommended": manifest.recommended} if record.variants else {}),
            }
        ),
        components=[
            *(_component("file", n, n, hashes=_hashes(e.sha256)) for n, e in weights.items()),
            *_variant_files(manifest, record),
        ],
        modelCard=_model_card(record),
    )


def _metadata(record: Record) -> _Json:
    assert record.uploaded is not None  # else there is no release
    return record.uploaded.metadata


def _judged(record: Record) -> list[VariantFigures]:
    """Every variant that was asked for, the model itself left out."""
    judged = record.variants.judged if record.variants else ()
    return [one for one in judged if one.name != FP32]


def _variant_files(manifest: Manifest, record: Record) -> Iterator[_Json]:
    """The variants that are published in a file of their own."""
    for one in _judged(record):
        if not one.passed or one.file == MODEL:
            continue
        entry = manifest.objects[one.file]
        sessions = {f"session:{purpose}": s.to_dict() for purpose, s in one.sessions.items()}
        yield _component(
            _LEARNED,
            f"variant-{one.name}",
            f"{manifest.said.parameters['name']} {one.name}",
            version=manifest.version,
            description=f"Variant of the model: {one.what}",
            hashes=_hashes(entry.sha256),
            externalReferences=[_reference(manifest, entry)],
            properties=_properties(
                {
                    "size": entry.size,
                    "precision": one.precision,
                    "ran_on": one.ran_on,
                    "kept_in_float": one.kept_in_float,
                    **sessions,
                }
            ),
        )


def _checkpoint(manifest: Manifest, checkpoint: Checkpoint) -> _Json:
    return _component(
        _LEARNED,
        _CHECKPOINT,
        checkpoint.file,
        description="The trained weights that were exported",
        hashes=_hashes(checkpoint.sha256),
        externalReferences=_content_references(manifest, "checkpoint"),
        components=[
            _component(
                _LEARNED,
                f"member-{number}",
                member.file,
                description="The trained weights of one member, as the checkpoint records it",
                hashes=_hashes(member.sha256),
            )
            for number, member in enumerate(checkpoint.members, 1)
        ],
    )


def _signature_file(manifest: Manifest) -> Iterator[_Json]:
    """The file that declares inputs and outputs, where the model's class does not."""
    if (entry := manifest.content_of("signature")) is not None:
        yield _component(
            "file",
            "signature",
            entry.name,
            description="The declared inputs and outputs of the model",
            hashes=_hashes(entry.sha256),
            externalReferences=_content_references(manifest, "signature"),
        )


def _evaluation_data(manifest: Manifest, data: EvaluationInputs) -> _Json:
    return _component(
        "data",
        _EVALUATION_DATA,
        data.source,
        description=f"The inputs on which both models were compared: {data.provenance}",
        hashes=_hashes(data.sha256),
        externalReferences=_content_references(manifest, "evaluation_data"),
        properties=_properties({"samples": data.samples}),
        data=[{"type": "dataset", "name": data.source, "description": data.provenance}],
    )


def _package(name: str, version: str) -> _Json:
    purl = PackageURL("pypi", name=name, version=version).to_string()
    return _component("library", purl, name, version=version, purl=purl, **_EXCLUDED)


def _platform(environment: Environment) -> Iterator[_Json]:
    yield _component("platform", "python", "Python", version=environment.python, **_EXCLUDED)
    yield _component("operating-system", "system", environment.system, **_EXCLUDED)
    yield _component("device", "processor", environment.cpu, **_EXCLUDED)


def _hashes(sha256: str | None) -> list[_Json]:
    return [{"alg": "SHA-256", "content": sha256}] if sha256 else []


def _url(address: str) -> str:
    # What is quoted already stays so; a percent sign alone quotes nothing.
    return quote(re.sub("%(?![0-9A-Fa-f]{2})", "%25", address), safe=":/?#@!$&()*+,;=%")


def _reference(manifest: Manifest, entry: Entry, kind: str = "distribution") -> _Json:
    address = format_uri(manifest.bucket, entry.key)
    return {"type": kind, "url": _url(address), "hashes": _hashes(entry.sha256)}


def _content_references(manifest: Manifest, role: ContentRole) -> list[_Json]:
    return [
        _reference(manifest, entry) for entry in manifest.said.content if entry.role == role
    ] + [
        {
            "type": "distribution",
            "url": _url(dataset.address),
            "comment": "a dataset of many files; its digest is the component's hash",
        }
        for dataset in manifest.said.datasets
        if dataset.role == role
    ]


def _properties(values: Mapping[str, Any]) -> list[_Json]:
    """Properties in a namespace of this package's; text as it is, anything else as JSON."""
    return [
        {
            "name": f"{DISTRIBUTION}:{name}",
            "value": value if isinstance(value, str) else json.dumps(value),
        }
        for name, value in values.items()
    ]


def _model_card(record: Record) -> _Json:
    signature, backbone = record.model.signature, _metadata(record)["backbone"]
    position = signature.position_output
    task = {"task": f"regression of {position.name} in {DEGREES}"} if position else {}
    family = {"architectureFamily": backbone.partition("-")[0]} if backbone else {}
    return {
        "modelParameters": {
            **task,
            **family,
            "modelArchitecture": " ".join(filter(None, (record.model.spec, backbone))),
            "datasets": [{"ref": _EVALUATION_DATA}],
            "inputs": [{"format": _format(spec)} for spec in signature.inputs],
            "outputs": [{"format": _format(spec)} for spec in signature.outputs],
        },
        "quantitativeAnalysis": {"performanceMetrics": list(_metrics(record))},
        "considerations": {
            "users": [
                "Whoever runs this model instead of the PyTorch model that it was exported from, "
                "and whoever must know how far the two agree"
            ],
            "technicalLimitations": list(_limitations(record)),
        },
    }


def _format(spec: TensorSpec) -> str:
    span = f"in [{spec.range[0]:g}, {spec.range[1]:g}]" if spec.range else ""
    return ", ".join(filter(None, (spec.describe(), spec.unit, span)))


def _metrics(record: Record) -> Iterator[_Json]:
    """The figures as `summarize_metrics` names them, then what each variant's gates measured.

    Those of broken gates too; numbers in the fewest digits that read back as the same number.
    """
    intervals: dict[str, tuple[float, float]] = {
        f"coverage_{100 * one.nominal:.0f}_{found.who.lower()}": (one.low, one.high)
        for found in record.parity.uncertainty
        for one in (found.calibration.coverage if found.calibration else ())
    }
    if record.latency is not None:
        intervals["speedup"] = (record.latency.speedup.low, record.latency.speedup.high)
    for name, value in record.metrics.items():
        metric: _Json = {"type": name, "value": str(value), "slice": FP32}
        if name in intervals:
            low, high = map(str, intervals[name])
            metric["confidenceInterval"] = {"lowerBound": low, "upperBound": high}
        yield metric
    for one in _judged(record):
        for gate in one.gates:
            kept = "held" if gate.passed else "broken"
            where = f"variant {one.name}, limit {gate.limit} {kept}"
            yield {"type": gate.name, "value": str(gate.measured), "slice": where}


def _limitations(record: Record) -> Iterator[str]:
    data = record.evaluation_data
    yield (
        f"Agreement with the PyTorch model was checked on {data.samples} samples "
        f"({data.source}: {data.provenance}) and on adversarial inputs made from them; "
        "elsewhere it is not known."
    )
    if data.sha256 is None:
        yield "Those samples are random numbers, which say little about recordings."
    if not record.parity.quality:
        yield "How good the model's answers are in their task was not measured."
    if record.profile == "smoke":
        yield "It was measured with the profile smoke, which is for tests: this is no evidence."
    yield (
        f"Latency was {record.speedup_text}."
        if record.latency is None
        else f"Latency was measured on {record.environment.cpu} with {record.threads} threads and "
        "holds for that processor."
    )
    if _judged(record):
        yield (
            "Figures of variants other than fp32 hold for that processor: another one may compute "
            "8-bit and 16-bit products in other steps, with other results."
        )
    yield "On which data the checkpoint was trained is not recorded."
