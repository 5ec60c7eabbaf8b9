"""The executed notebook as a report: recording, judging from outside, the verdict as first cell."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from heimdall_onnx.environment import capture_environment, installed_distributions
from heimdall_onnx.gates import Gate, NotMeasured, Verdict, escape_markdown
from heimdall_onnx.metadata import summarize_metrics
from heimdall_onnx.publish import RegisteredRelease, Skipped, UploadedRelease
from heimdall_onnx.words import count_of

if TYPE_CHECKING:
    from nbformat import NotebookNode

    from heimdall_onnx.benchmark import LatencyReport
    from heimdall_onnx.checkpoint import LoadedModel
    from heimdall_onnx.compare import ParityReport
    from heimdall_onnx.costs import StepCost
    from heimdall_onnx.departure import Departure
    from heimdall_onnx.ensemble_cost import MemberComparison
    from heimdall_onnx.evaluation import EvaluationData
    from heimdall_onnx.operator_times import OperatorTimes
    from heimdall_onnx.roofline import Roofline
    from heimdall_onnx.uncertainty import UncertaintyReport
    from heimdall_onnx.variants import VariantsReport

_Found = TypeVar("_Found")

RECORD = "release"
VERDICT = "verdict"
NO_CELL = "no cell"


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
    from heimdall_onnx.benchmark import describe_contender

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


@dataclass(frozen=True)
class Judgement:
    """What the executed file itself says about its run.

    Attributes:
        problem: Why the notebook did not run to its end; empty if it did.
        error_name: Class of the error that stopped it; empty if none.
        error_message: That error's message.
        record: What the notebook recorded.
        verdict: The recorded gates; None if the notebook never got that far.
    """

    problem: str
    error_name: str
    error_message: str
    record: dict[str, Any] = field(repr=False)
    verdict: Verdict | None

    @property
    def passed(self) -> bool:
        """Whether every cell ran without error and every recorded gate holds."""
        return not self.problem and self.verdict is not None and self.verdict.passed


def judge_notebook(path: Path, record: str = RECORD) -> Judgement:
    """Judge an executed notebook from its file alone.

    papermill marks every cell of a dead kernel ``completed`` and takes ``sys.exit(0)`` for
    success, so neither its status nor its return is believed: each code cell must have been
    executed, in order, without an error output, and the record must be there. That of a release
    holds its gates.
    """
    return judge_cells(_code_cells(path), read_record(path, record), record)


def judge_cells(
    cells: Sequence[NotebookNode], found: dict[str, Any], record: str = RECORD
) -> Judgement:
    """Judge the code cells of an executed notebook that is read already, as `judge_notebook`.

    Args:
        cells: Code cells that aren't empty, as nbformat gives them.
        found: What the notebook recorded.
        record: What it calls its record.
    """
    verdict = recorded_verdict(found) if record == RECORD else None
    for number, cell in enumerate(cells, start=1):
        error = next((o for o in cell.outputs if o.output_type == "error"), None)
        where = _where(number, cells)
        if error is not None:
            problem = f"{where} raised {error.ename}"
            return Judgement(problem, error.ename, error.evalue, found, verdict)
        if cell.execution_count is None:
            problem = (
                f"{where} never finished: the kernel died, the cell ran out of time, or an "
                "earlier cell ended the kernel"
            )
            return Judgement(problem, "", "", found, verdict)
    counts = [cell.execution_count for cell in cells]
    if counts != sorted(counts):
        return Judgement("the code cells ran out of order", "", "", found, verdict)
    if verdict is None and record == RECORD:
        return Judgement("the notebook recorded no gates", "", "", found, verdict)
    if not found:
        return Judgement(f"the notebook recorded no {record}", "", "", found, verdict)
    return Judgement("", "", "", found, verdict)


def last_started(path: Path) -> str:
    """The last code cell of an executed notebook that began to run, in words, or `NO_CELL`."""
    cells = _code_cells(path)
    started = [n for n, cell in enumerate(cells, start=1) if cell.execution_count is not None]
    return _where(started[-1], cells) if started else NO_CELL


def _code_cells(path: Path) -> list[NotebookNode]:
    return [c for c in read_notebook(path).cells if c.cell_type == "code" and c.source.strip()]


def _where(number: int, cells: Sequence[NotebookNode]) -> str:
    first_line = cells[number - 1].source.strip().splitlines()[0]
    return f"code cell {number} of {len(cells)} ({first_line!r})"


def recorded_verdict(record: dict[str, Any]) -> Verdict | None:
    """The gates that a record holds; None if the notebook never got that far."""
    if "gates" not in record:
        return None
    return Verdict(tuple(Gate(**gate) for gate in record["gates"]), record["profile"])


def read_notebook(path: Path) -> NotebookNode:
    """Read a notebook file."""
    import nbformat

    return nbformat.read(path, as_version=4)


def put_verdict_first(
    path: Path,
    *,
    passed: bool,
    title: str,
    facts: Mapping[str, str],
    sentences: Sequence[str] = (),
    problem: str = "",
) -> None:
    """Put the verdict as the first cell of an executed notebook.

    Everything given is shown as inert text. The cell's metadata hold it as data, for the page.

    Args:
        path: The notebook, changed in place.
        passed: The verdict.
        title: What it is about, e.g. the release version.
        facts: What a reviewer may look for: label to value.
        sentences: What a reviewer must know at once.
        problem: What went wrong, in words; empty if nothing did.
    """
    import nbformat

    notebook = read_notebook(path)
    gates = recorded_verdict(read_record(path))
    found = {
        "passed": passed,
        "title": title,
        "sentences": list(sentences),
        "problem": problem,
        "failed_cell": _failed_cell(notebook) if problem else None,
        "gates": [] if gates is None else [gate.as_shown() for gate in gates.failed_first()],
        # nbformat sorts the keys of mappings.
        "facts": [list(fact) for fact in facts.items()],
    }
    lines = [f"# {'✔ PASS' if passed else '✘ FAIL'} — {escape_markdown(title)}"]
    if problem:
        lines += ["**What went wrong**", "\n".join(map(_quote, problem.splitlines()))]
    lines += map(escape_markdown, sentences)
    if gates is not None:
        lines.append(gates.to_markdown())
    rows = [f"| {escape_markdown(k)} | {escape_markdown(v)} |" for k, v in facts.items()]
    if rows:
        lines.append("\n".join(["| fact | value |", "|---|---|", *rows]))
    cell = nbformat.v4.new_markdown_cell(
        "\n\n".join(lines), id=VERDICT, metadata={"tags": [VERDICT], VERDICT: found}
    )
    notebook.cells = [cell, *(c for c in notebook.cells if c.get("id") != VERDICT)]
    nbformat.write(notebook, path)


def _quote(line: str) -> str:
    return f"> {escape_markdown(line)}  "


def _failed_cell(notebook: NotebookNode) -> str | None:
    return next(
        (
            cell.get("id")
            for cell in notebook.cells
            for output in cell.get("outputs", [])
            if output.output_type == "error"
        ),
        None,
    )


def figures(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and PNG of every figure in an executed notebook, named after its cell."""
    for cell in read_notebook(path).cells:
        images = [
            output.data["image/png"]
            for output in cell.get("outputs", [])
            if "image/png" in output.get("data", {})
        ]
        for number, image in enumerate(images):
            suffix = f"-{number + 1}" if number else ""
            yield f"{cell.id}{suffix}.png", base64.b64decode(image)
