"""What a release's notebook has measured and done: one record, kept in the executed notebook.

The notebook writes it with `record_results`, and everybody who looks at a release later reads the
same model with `record_in`. Its statistics are those of `evidence`, without arrays and curves;
numbers that JSON has no form for, NaN and Inf, are text in the file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from heimdall_onnx.archive.manifest import (
    SCHEMA_VERSION,
    Checkpoint,
    CheckpointFile,
    Content,
    EvaluationInputs,
    InputArray,
    KeptDataset,
    ReleasedModel,
    describe_problems,
    require_schema,
)
from heimdall_onnx.common.environment import (
    DISTRIBUTION,
    Environment,
    capture_environment,
    installed_distributions,
)
from heimdall_onnx.common.errors import VerificationError
from heimdall_onnx.common.text import count_of
from heimdall_onnx.common.verdict import Gate, NotMeasured, Verdict
from heimdall_onnx.evidence.costs import StepCost
from heimdall_onnx.evidence.latency.figures import LatencyFigures, MemberFigures
from heimdall_onnx.evidence.metrics import summarize_metrics
from heimdall_onnx.evidence.parity.report import ParityFigures
from heimdall_onnx.evidence.parity.uncertainty import UncertaintyReport
from heimdall_onnx.evidence.variants.figures import VariantsFigures
from heimdall_onnx.evidence.variants.operators import OperatorTimes
from heimdall_onnx.evidence.variants.roofline import Roofline
from heimdall_onnx.services.store import StoredObject

if TYPE_CHECKING:
    from nbformat import NotebookNode

    from heimdall_onnx.data.evaluation import EvaluationData
    from heimdall_onnx.evidence.latency.benchmark import LatencyReport
    from heimdall_onnx.evidence.parity.departure import Departure
    from heimdall_onnx.evidence.parity.report import ParityReport
    from heimdall_onnx.evidence.variants.search import VariantsReport
    from heimdall_onnx.model.checkpoint import LoadedModel

_Found = TypeVar("_Found")

RECORD = "release"


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
            hashes.
        datasets: Evaluation data that are a dataset.
    """

    version: str
    folder_uri: str
    s3_uri: str
    sha256: str
    run_id: str
    metadata: dict[str, Any] = field(repr=False)
    objects: tuple[StoredObject, ...] = field(repr=False)
    content: tuple[Content, ...] = field(repr=False)
    datasets: tuple[KeptDataset, ...] = field(default=(), repr=False)


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


class Record(BaseModel):
    """What a release's notebook has measured and done.

    Attributes:
        schema_version: Of records and manifests.
        profile: How much was measured.
        gates: Every gate, evaluated.
        checkpoint: What was exported.
        model: What was made of it.
        evaluation_data: What both models were compared on.
        metrics: The figures that are logged as metrics.
        parity: Agreement of both models; its first cell is the whole evaluation data.
        latency: How long both take; None where it was not measured.
        latency_not_measured: Why it was not; None where it was.
        variants: Every variant that was asked for; None where none were.
        roofline: How near the runs come to what the machine allows; None where that was not
            measured.
        member: What an ensemble costs beside one of its members; None for any other model.
        members: Localization error and calibration of each member of an ensemble.
        operator_times: Where the time of a call goes, by variant.
        costs: What each step took.
        departure: The first module whose output differs; None where it was not determined.
        environment: Where it ran.
        distributions: Version of every distribution that was installed.
        uploaded: The release's folder; None where nothing was uploaded.
        registered: Its version in the registry; None where nothing was registered.
    """

    # Figures that a later or an earlier version also had are left out, not refused.
    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="strings")

    schema_version: Literal[4] = SCHEMA_VERSION
    profile: str
    gates: tuple[Gate, ...]
    checkpoint: Checkpoint
    model: ReleasedModel
    evaluation_data: EvaluationInputs
    metrics: dict[str, Annotated[float, Field(allow_inf_nan=False)]]
    parity: ParityFigures
    latency: LatencyFigures | None
    latency_not_measured: str | None
    variants: VariantsFigures | None
    roofline: Roofline | None
    member: MemberFigures | None
    members: tuple[UncertaintyReport, ...]
    operator_times: dict[str, OperatorTimes]
    costs: tuple[StepCost, ...]
    departure: str | None
    environment: Environment
    distributions: dict[str, str]
    uploaded: UploadedRelease | None
    registered: RegisteredRelease | None

    @property
    def verdict(self) -> Verdict:
        """All gates together."""
        return Verdict(self.gates, self.profile)

    @property
    def speedup(self) -> float | None:
        """PyTorch's latency over ONNX Runtime's; None if it was not measured."""
        return None if self.latency is None else self.latency.speedup.ratio

    @property
    def speedup_text(self) -> str:
        """The speedup with its interval, or why there is none."""
        if self.latency is None:
            return str(NotMeasured(self.latency_not_measured or ""))
        found = self.latency.speedup
        return (
            f"{found.ratio:.2f}× ({found.low:.2f} to {found.high:.2f}) at batch "
            f"{self.latency.batch_size} on {count_of(self.latency.threads, 'thread')}"
        )

    @property
    def threads(self) -> int | None:
        """Intra-op threads of each contender; None where latency was not measured."""
        return None if self.latency is None else self.latency.threads

    @property
    def code(self) -> str:
        """Version and commit of the code that ran, and whether that was all of it."""
        environment = self.environment
        found = f"{DISTRIBUTION} {environment.packages[DISTRIBUTION]}"
        if environment.git_commit is not None:
            found += f", commit {environment.git_commit[:12]}"
        return found + (" with uncommitted changes" if environment.git_dirty else "")

    def to_json(self) -> dict[str, Any]:
        """A copy as JSON has it."""
        written: dict[str, Any] = json.loads(self.model_dump_json())
        return written


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
    member: MemberFigures | NotMeasured | None = None,
    members: Sequence[UncertaintyReport] | None = None,
    profiles: Sequence[tuple[str, OperatorTimes]] | NotMeasured | None = (),
    costs: Sequence[StepCost] = (),
) -> None:
    """Keep in the running notebook what it has found and done, as a `Record`.

    Beside what the runner needs these are all statistics of parity and latency and the version of
    every installed distribution, without which a repetition could not be held against this run.
    """
    import scrapbook

    record = Record(
        profile=verdict.profile,
        gates=verdict.gates,
        checkpoint=Checkpoint(
            file=loaded.path.name,
            sha256=loaded.sha256,
            members=tuple(CheckpointFile(file=m.file, sha256=m.sha256) for m in loaded.members),
            weights=loaded.weights,
            notes=loaded.notes,
        ),
        model=ReleasedModel(
            spec=loaded.model_spec,
            signature=loaded.signature,
            signature_source=loaded.signature_source,
        ),
        evaluation_data=EvaluationInputs(
            source=data.source,
            provenance=data.provenance,
            sha256=data.sha256,
            samples=data.count,
            labelled=bool(data.truth),
            inputs={
                name: InputArray(dtype=str(array.dtype), shape=array.shape[1:])
                for name, array in data.inputs.items()
            },
        ),
        metrics=summarize_metrics(parity, latency),
        parity=parity,
        latency=_or_none(latency),
        latency_not_measured=latency.reason if isinstance(latency, NotMeasured) else None,
        variants=_or_none(variants),
        roofline=_or_none(roofline),
        member=_or_none(member),
        members=tuple(members or ()),
        operator_times=dict(_or_none(profiles) or ()),
        costs=tuple(costs),
        departure=None if departure is None else departure.scope,
        environment=capture_environment(),
        distributions=installed_distributions(),
        uploaded=None if isinstance(uploaded, Skipped) else uploaded,
        registered=None if isinstance(registered, Skipped) else registered,
    )
    scrapbook.glue(RECORD, record.to_json(), encoder="json")


def _or_none(found: _Found | NotMeasured | None) -> _Found | None:
    return None if isinstance(found, NotMeasured) else found


def record_in(notebook: bytes, where: str) -> Record | None:
    """The record in the bytes of an executed notebook; None if there is none.

    Args:
        notebook: The bytes; nothing about them is taken for granted.
        where: Where they were found, for messages.

    Raises:
        VerificationError: If they can't be read, or what is there is no record of this version.
    """
    found = read_executed(notebook, where).scrap(RECORD)
    return None if found is None else parse_record(found, where)


def require_record(notebook: bytes, where: str) -> Record:
    """The record in the bytes of an executed notebook, as `record_in`, which must be there."""
    if (record := record_in(notebook, where)) is None:
        raise VerificationError(
            f"{where} holds no record of a release: its notebook does not call record_results as "
            "the release notebook does"
        )
    return record


def parse_record(found: object, where: str) -> Record:
    """Read a record as JSON has it; nothing about it is taken for granted.

    Raises:
        VerificationError: If it is no record of this version.
    """
    # That of 0.1 had no number yet.
    require_schema(found.get("schema_version", 0) if isinstance(found, dict) else None, where)
    try:
        # As text, in which lists are as good as tuples.
        return Record.model_validate_json(json.dumps(found))
    except ValidationError as error:
        raise VerificationError(
            f"{where} holds no record of a release: {describe_problems(error)}"
        ) from error


class CellOutput(BaseModel):
    """What is relied on of an output of a cell."""

    output_type: str = ""
    data: dict[str, Any] = {}
    metadata: dict[str, Any] = {}
    ename: str = ""
    evalue: str = ""


def _joined(lines: object) -> object:
    """A notebook's file has text line by line."""
    return "".join(map(str, lines)) if isinstance(lines, list) else lines


class NotebookCell(BaseModel):
    """What is relied on of a cell."""

    id: str = ""
    cell_type: str = ""
    source: Annotated[str, BeforeValidator(_joined)] = ""
    execution_count: int | None = None
    outputs: list[CellOutput] = []


class ExecutedNotebook(BaseModel):
    """An executed notebook. nbformat's own validation of one takes as long as reading ten so."""

    cells: list[NotebookCell] = []
    metadata: dict[str, Any] = {}

    @property
    def code(self) -> list[NotebookCell]:
        """The code cells that aren't empty."""
        return [cell for cell in self.cells if cell.cell_type == "code" and cell.source.strip()]

    def scrap(self, name: str) -> Any:
        """What it keeps under a name; None if there is nothing."""
        kept = (
            output.data.get("application/scrapbook.scrap.json+json")
            for cell in self.cells
            for output in cell.outputs
        )
        found = [s for s in kept if isinstance(s, dict) and s.get("name") == name]
        return found[-1].get("data") if found else None


def read_executed(notebook: bytes, where: str) -> ExecutedNotebook:
    """Read the bytes of an executed notebook; nothing about them is taken for granted.

    Args:
        notebook: The bytes.
        where: Where they were found, for messages.

    Raises:
        VerificationError: If they can't be read.
    """
    try:
        return ExecutedNotebook.model_validate_json(notebook)
    except ValidationError as error:
        raise VerificationError(
            f"{where} is no executed notebook that can be read: {describe_problems(error)}"
        ) from error


def read_notebook(path: Path) -> NotebookNode:
    """Read a notebook file."""
    import nbformat

    return nbformat.read(path, as_version=4)
