"""The executed notebook as a report: recording, judging from outside, the verdict as first cell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from heimdall_onnx.common.environment import capture_environment, installed_distributions
from heimdall_onnx.common.gates import NotMeasured, Verdict
from heimdall_onnx.common.text import count_of
from heimdall_onnx.evidence.metrics import summarize_metrics
from heimdall_onnx.services.store import StoredObject

if TYPE_CHECKING:
    from nbformat import NotebookNode

    from heimdall_onnx.data.evaluation import EvaluationData
    from heimdall_onnx.evidence.costs import StepCost
    from heimdall_onnx.evidence.latency.benchmark import LatencyReport
    from heimdall_onnx.evidence.latency.members import MemberComparison
    from heimdall_onnx.evidence.parity.departure import Departure
    from heimdall_onnx.evidence.parity.report import ParityReport
    from heimdall_onnx.evidence.parity.uncertainty import UncertaintyReport
    from heimdall_onnx.evidence.variants.operators import OperatorTimes
    from heimdall_onnx.evidence.variants.roofline import Roofline
    from heimdall_onnx.evidence.variants.search import VariantsReport
    from heimdall_onnx.model.checkpoint import LoadedModel

_Found = TypeVar("_Found")

RECORD = "release"


def record_results(
    *,
    loaded: LoadedModel,
    data: EvaluationData,
    parity: ParityReport,
    departure: Departure | None,
    latency: LatencyReport | NotMeasured,
    verdict: Verdict,
    uploaded: UploadedRelease | Skipped,
    registered: RegisteredRelease | Skipped,
    variants: VariantsReport | NotMeasured | None = None,
    roofline: Roofline | NotMeasured | None = None,
    member: MemberComparison | NotMeasured | None = None,
    members: Sequence[UncertaintyReport] | None = None,
    profiles: Sequence[tuple[str, OperatorTimes]] | NotMeasured | None = (),
    costs: Sequence[StepCost] = (),
) -> None:
    """Keep in the running notebook what the runner must know of it, as JSON.

    Beside what the runner needs these are all statistics of parity and latency, without which a
    repetition could not be held against this run: ``parity`` with the grid of kinds of input and
    batch sizes (its first cell is the whole evaluation data), noise floor, batch independence and
    errors in metres; ``latency`` with the percentiles of both contenders and their intervals, host
    and cores; and the version of every installed distribution. Numbers that JSON has no form for,
    NaN and Inf, are text in them. What was not measured is None, and ``latency_not_measured`` says
    why.
    """
    import scrapbook

    timed = {"variants": _or_none(variants), "member": _or_none(member)}
    machine = _or_none(roofline)
    results = {
        "profile": verdict.profile,
        "gates": [gate.to_dict() for gate in verdict.gates],
        "checkpoint": _describe_checkpoint(loaded),
        "model": {
            "class": loaded.model_spec,
            "signature": loaded.signature.to_dict(),
            "signature_source": loaded.signature_source,
        },
        "evaluation_data": {
            "source": data.source,
            "provenance": data.provenance,
            "sha256": data.sha256,
            "samples": data.count,
            "labelled": data.positions is not None,
            "inputs": {
                name: {"dtype": str(array.dtype), "shape": list(array.shape[1:])}
                for name, array in data.inputs.items()
            },
        },
        "metrics": summarize_metrics(parity, latency),
        "parity": describe_parity(parity),
        **_describe_speed(latency),
        **{what: found and as_json(found.to_dict()) for what, found in timed.items()},
        "roofline": machine and as_json(asdict(machine)),
        "members": [as_json(each.to_dict()) for each in members or ()],
        "operator_times": {
            name: as_json(asdict(times)) for name, times in _or_none(profiles) or ()
        },
        "costs": [cost.to_dict() for cost in costs],
        "departure": None if departure is None else departure.scope,
        "environment": capture_environment().to_dict(),
        "distributions": installed_distributions(),
        "uploaded": None if isinstance(uploaded, Skipped) else asdict(uploaded),
        "registered": None if isinstance(registered, Skipped) else asdict(registered),
    }
    scrapbook.glue(RECORD, results, encoder="json")


def _or_none(found: _Found | NotMeasured) -> _Found | None:
    return None if isinstance(found, NotMeasured) else found


def _describe_speed(latency: LatencyReport | NotMeasured) -> dict[str, Any]:
    if isinstance(latency, NotMeasured):
        return {
            "latency": None,
            "latency_not_measured": latency.reason,
            "speedup": None,
            "speedup_text": str(latency),
            "threads": None,
        }
    speedup = latency.speedup
    return {
        "latency": describe_latency(latency),
        "latency_not_measured": None,
        "speedup": speedup.ratio,
        "speedup_text": f"{speedup.ratio:.2f}× ({speedup.low:.2f} to {speedup.high:.2f}) at batch "
        f"{latency.batch_size} on {count_of(latency.threads, 'thread')}",
        "threads": latency.threads,
    }


def _describe_checkpoint(loaded: LoadedModel) -> dict[str, Any]:
    described: dict[str, Any] = {"file": loaded.path.name, "sha256": loaded.sha256}
    if loaded.members:
        described["members"] = [member.model_dump() for member in loaded.members]
    return described


def describe_parity(parity: ParityReport) -> dict[str, Any]:
    """The statistics of a parity report as JSON, without its arrays and curves."""
    described: dict[str, Any] = as_json(
        {
            "samples": parity.samples,
            "evaluated_by": parity.evaluated_by,
            "tolerance": parity.tolerance,
            "rtol": parity.rtol,
            "cells": [
                {
                    "kind": cell.kind,
                    "batch_size": cell.batch_size,
                    "samples": cell.samples,
                    **({"valid": True} if cell.valid else {}),
                    "outputs": [output.summary() for output in cell.outputs],
                }
                for cell in parity.cells
            ],
            "noise_floor": [asdict(floor) for floor in parity.noise_floor],
            "independence": asdict(parity.independence),
            "ground": None if parity.ground is None else asdict(parity.ground),
            "uncertainty": [found.to_dict() for found in parity.uncertainty],
        }
    )
    return described


def describe_latency(latency: LatencyReport) -> dict[str, Any]:
    """The statistics of a latency report as JSON, without the single calls."""
    # It imports PyTorch, which the runner does without.
    from heimdall_onnx.evidence.latency.contenders import describe_contender

    described: dict[str, Any] = as_json(
        {
            "batch_size": latency.batch_size,
            "threads": latency.threads,
            "confidence": latency.confidence,
            "speedup": asdict(latency.speedup),
            "machine": latency.machine and latency.machine.to_dict(),
            "cores": latency.cores and latency.cores.to_dict(),
            "contenders": [
                describe_contender(c, latency.batch_size) for c in (latency.pytorch, latency.onnx)
            ],
        }
    )
    return described


def as_json(value: Any) -> Any:
    """A copy for JSON: NaN and Inf, which it has no form for, as text."""
    if isinstance(value, Mapping):
        return {key: as_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_record(path: Path, record: str = RECORD) -> dict[str, Any]:
    """What `record_results` kept in an executed notebook; empty if it never got that far.

    Args:
        path: The notebook.
        record: What it calls its record; that of a comparison has a name of its own.
    """
    import scrapbook

    scraps = scrapbook.read_notebook(str(path)).scraps
    return dict(scraps[record].data) if record in scraps else {}


def read_notebook(path: Path) -> NotebookNode:
    """Read a notebook file."""
    import nbformat

    return nbformat.read(path, as_version=4)


@dataclass(frozen=True)
class Skipped:
    """A step that was not taken.

    Attributes:
        reason: Why, in words.
    """

    reason: str

    def _repr_markdown_(self) -> str:
        return f"**Skipped:** {self.reason}"


@dataclass(frozen=True)
class UploadedRelease:
    """A release folder without its report and manifest.

    Attributes:
        version: ``vYYYYMMDD_HHMMSS``, UTC.
        folder_uri: ``s3://bucket/prefix/version``.
        s3_uri: The model in it.
        sha256: SHA-256 of the model, read back from the store.
        run_id: MLflow run of the release.
        metadata: Content of ``metadata.json``.
        objects: Everything in the folder.
        content: Checkpoint, declared signature, evaluation and calibration data, kept under their
            hashes; see `Content`.
        datasets: Evaluation data that are a dataset; see `KeptDataset`.
    """

    version: str
    folder_uri: str
    s3_uri: str
    sha256: str
    run_id: str
    metadata: dict[str, Any] = field(repr=False)
    objects: tuple[StoredObject, ...] = field(repr=False)
    content: tuple[dict[str, Any], ...] = field(repr=False)
    datasets: tuple[dict[str, Any], ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class RegisteredRelease:
    """A version in the registry.

    Attributes:
        model_name: The registered model.
        model_version: Its version.
        source: The release folder.
    """

    model_name: str
    model_version: str
    source: str
