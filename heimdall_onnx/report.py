"""The executed notebook as a report: recording, judging from outside, verdict cell, HTML."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from heimdall_onnx.cores import NotMeasured
from heimdall_onnx.environment import capture_environment, installed_distributions
from heimdall_onnx.gates import Gate, Verdict, escape_markdown
from heimdall_onnx.metadata import summarize_metrics
from heimdall_onnx.publish import RegisteredRelease, Skipped, UploadedRelease

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
# Whatever got into a report, it can't run, load or send anything.
_NO_SCRIPTS = (
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
    "style-src 'unsafe-inline'; font-src data:; base-uri 'none'; form-action 'none'\">"
)
_TEMPLATE_SCRIPT = re.compile(r"<script\b.*?</script>", re.DOTALL)
NO_ALTERNATIVE = 'alt="No description has been provided for this image"'


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
        },
        "metrics": summarize_metrics(parity, latency),
        "parity": describe_parity(parity),
        **_describe_speed(latency),
        **{what: found and _as_json(found.to_dict()) for what, found in timed.items()},
        "roofline": machine and _as_json(asdict(machine)),
        "members": [_as_json(each.to_dict()) for each in members or ()],
        "operator_times": {
            name: _as_json(asdict(times)) for name, times in _or_none(profiles) or ()
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
        f"{latency.batch_size} on {latency.threads} threads",
        "threads": latency.threads,
    }


def _describe_checkpoint(loaded: LoadedModel) -> dict[str, Any]:
    described: dict[str, Any] = {"file": loaded.path.name, "sha256": loaded.sha256}
    if loaded.members:
        described["members"] = [member.model_dump() for member in loaded.members]
    return described


def describe_parity(parity: ParityReport) -> dict[str, Any]:
    """The statistics of a parity report as JSON, without its arrays and curves."""
    described: dict[str, Any] = _as_json(
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

    described: dict[str, Any] = _as_json(
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


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _as_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_record(path: Path) -> dict[str, Any]:
    """What `record_results` kept in an executed notebook; empty if it never got that far."""
    import scrapbook

    scraps = scrapbook.read_notebook(str(path)).scraps
    return dict(scraps[RECORD].data) if RECORD in scraps else {}


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


def judge_notebook(path: Path) -> Judgement:
    """Judge an executed notebook from its file alone.

    papermill marks every cell of a dead kernel ``completed`` and takes ``sys.exit(0)`` for
    success, so neither its status nor its return is believed: each code cell must have been
    executed, in order, without an error output, and the record must be there.
    """
    return judge_cells(_code_cells(path), read_record(path))


def judge_cells(cells: Sequence[NotebookNode], record: dict[str, Any]) -> Judgement:
    """Judge the code cells of an executed notebook that is read already, as `judge_notebook`.

    Args:
        cells: Code cells that aren't empty, as nbformat gives them.
        record: What the notebook recorded.
    """
    verdict = _recorded_verdict(record)
    for number, cell in enumerate(cells, start=1):
        error = next((o for o in cell.outputs if o.output_type == "error"), None)
        where = _where(number, cells)
        if error is not None:
            problem = f"{where} raised {error.ename}"
            return Judgement(problem, error.ename, error.evalue, record, verdict)
        if cell.execution_count is None:
            problem = (
                f"{where} never finished: the kernel died, the cell ran out of time, or an "
                "earlier cell ended the kernel"
            )
            return Judgement(problem, "", "", record, verdict)
    counts = [cell.execution_count for cell in cells]
    if counts != sorted(counts):
        return Judgement("the code cells ran out of order", "", "", record, verdict)
    if verdict is None:
        return Judgement("the notebook recorded no gates", "", "", record, verdict)
    return Judgement("", "", "", record, verdict)


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


def _recorded_verdict(record: dict[str, Any]) -> Verdict | None:
    if "gates" not in record:
        return None
    return Verdict(tuple(Gate(**gate) for gate in record["gates"]), record["profile"])


def read_notebook(path: Path) -> NotebookNode:
    """Read a notebook file."""
    import nbformat

    return nbformat.read(path, as_version=4)


def put_verdict_first(path: Path, *, passed: bool, title: str, facts: dict[str, str]) -> None:
    """Put the verdict as the first cell of an executed notebook.

    Args:
        path: The notebook, changed in place.
        passed: The verdict.
        title: What it is about, e.g. the release version.
        facts: What a reviewer must see at once: label to value, shown as inert text.
    """
    import nbformat

    notebook = read_notebook(path)
    mark = "✔ PASS" if passed else "✘ FAIL"
    lines = [f"# {mark} — {escape_markdown(title)}", "", "| | |", "|---|---|"]
    lines += [f"| **{label}** | {escape_markdown(value)} |" for label, value in facts.items()]
    verdict = _recorded_verdict(read_record(path))
    if verdict is not None:
        lines += ["", verdict.to_markdown()]
    cell = nbformat.v4.new_markdown_cell("\n".join(lines), id=VERDICT, metadata={"tags": [VERDICT]})
    notebook.cells = [cell, *(c for c in notebook.cells if c.get("id") != VERDICT)]
    nbformat.write(notebook, path)


def render_html(path: Path, title: str) -> Path:
    """Render an executed notebook beside itself as one HTML file that needs no network."""
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(
        template_name="lab",
        embed_images=True,
        # nbconvert would fetch these from a CDN; the report has neither formulas nor widgets.
        require_js_url="",
        mathjax_url="",
        mermaid_js_url="",
        jquery_url="",
    )
    notebook = read_notebook(path)
    for cell in notebook.cells:
        # The record is for programs; nbconvert would warn that it can't show it.
        cell.outputs = [o for o in cell.get("outputs", []) if not _is_record(o)]
    html, _ = exporter.from_notebook_node(notebook, resources={"metadata": {"name": title}})
    for alternative in _alternatives(notebook):
        # nbconvert's template leaves out the text that a figure brings along.
        html = html.replace(NO_ALTERNATIVE, f'alt="{escape(alternative)}"', 1)
    # What is left of nbconvert's scripts does nothing without what it would fetch.
    html = _TEMPLATE_SCRIPT.sub("", html)
    html = html.replace("<head>", f"<head>{_NO_SCRIPTS}", 1)
    target = path.with_suffix(".html")
    target.write_text(html, encoding="utf-8")
    return target


def _alternatives(notebook: NotebookNode) -> Iterator[str]:
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                described = output.metadata.get("image/png", {}).get("alt")
                yield described or f"Figure of the cell {cell.id}"


def _is_record(output: NotebookNode) -> bool:
    return "scrapbook" in output.get("metadata", {})


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
