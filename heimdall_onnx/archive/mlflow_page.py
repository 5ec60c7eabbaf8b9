"""What MLflow's own pages show of a release: its description, its evaluation data, its reviews.

They are for who looks there first, and say where the evidence is. Nothing is decided by them:
anybody who can write to the registry can change them, and `verify` reads none.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from heimdall_onnx.archive.manifest import REPORT, REPORT_HTML
from heimdall_onnx.common.parameters import MODEL
from heimdall_onnx.common.text import (
    count_of,
    distance,
    escape_markdown,
    markdown_table,
    name,
    number,
    shown,
)
from heimdall_onnx.services.store import MANIFEST, format_uri

if TYPE_CHECKING:
    from heimdall_onnx.archive.aliases import Move
    from heimdall_onnx.archive.manifest import Manifest
    from heimdall_onnx.archive.record import Record, UploadedRelease

# What MLflow's database takes, and what is left of it for reviews.
MOST_CHARACTERS, _MOST_OF_RELEASE = 5_000, 4_000
_DIGEST_CHARACTERS = 36
_MOST_OUTPUTS = 4
_REVIEWS = "\n\n#### Reviews\n\n"
_OLDEST_REVIEW = re.compile(re.escape(_REVIEWS) + r"- .*\n(?=- )")


def name_data(record: Record, bucket: str, given: str) -> dict[str, str]:
    """The evaluation data of a run, as `MLflowTracker.log_dataset` takes them.

    The digest is the first 36 digits of their SHA-256, as many as MLflow takes; of synthetic inputs
    that of what is said about them here.

    Args:
        record: What the notebook has recorded.
        bucket: Bucket of the release.
        given: The parameter ``eval_data``.
    """
    data = record.evaluation_data
    columns = [
        {"name": input_name, "type": f"{spec.dtype} {spec.shape}"}
        for input_name, spec in data.inputs.items()
    ]
    profile = {
        "samples": data.samples,
        "true positions": "yes" if data.labelled else "no",
        "provenance": shown(data.provenance, 300),
    }
    digest, kind = data.sha256, "local"
    source: Mapping[str, Any] = {"uri": given}
    if digest is None:
        kind, source = "code", {"tags": {"made by": "heimdall_onnx.model.examples"}}
        digest = hashlib.sha256(json.dumps([columns, profile]).encode()).hexdigest()
    elif kept := _kept_at(record.uploaded, bucket):
        kind, source = "s3", {"uri": kept}
    elif given.startswith("s3://"):
        kind = "s3"
    return {
        "name": shown(data.source),
        "digest": digest[:_DIGEST_CHARACTERS],
        "source_type": kind,
        "source": json.dumps(source),
        "schema": json.dumps({"mlflow_colspec": columns}),
        "profile": json.dumps(profile),
    }


def _kept_at(uploaded: UploadedRelease | None, bucket: str) -> str | None:
    if uploaded is None:
        return None
    kept = [dataset.address for dataset in uploaded.datasets]
    kept += [
        format_uri(bucket, entry.key)
        for entry in uploaded.content
        if entry.role == "evaluation_data"
    ]
    return kept[0] if kept else None


def describe_model(model_name: str) -> str:
    """What a registered model's page says where nobody has said anything."""
    return (
        "ONNX models exported from PyTorch. The page of each version says what was measured, and "
        "where its report is.\n\n"
        f"Who moved its aliases, and why: `heimdall-onnx history {model_name}`."
    )


def describe_version(record: Record, manifest: Manifest, run: Mapping[str, Any]) -> str:
    """What a version's page says, in Markdown; text from outside stands in it as such.

    Args:
        record: What the notebook has recorded.
        manifest: Of the release.
        run: Its MLflow run, as `MLflowTracker.get_run_info` describes it.
    """
    model, verdict = f"models:/{manifest.model_name}/{manifest.model_version}", manifest.verdict
    # MLflow's list of versions shows how it begins, as it is written.
    facts = [escape_markdown(verdict.upper()), f"{count_of(len(record.gates), 'gate')} held"]
    if (speedup := record.speedup) is not None:
        facts.insert(1, f"speedup {speedup:.2f}×")
    if "smoke" in verdict:
        facts.append("a test run, not evidence")
    load = f'`heimdall_onnx.load_model("{model}")` opens it if it verifies.'
    for rows in (_rows(record, manifest.uri, run), _rows(record, manifest.uri, run, brief=True)):
        # MLflow draws tables without any space between their columns.
        lines = ((f"{what}&emsp;", found) for what, found in rows)
        text = f"{', '.join(facts)}. {load}\n\n{markdown_table(('', ''), lines)}"
        if len(text) <= _MOST_OF_RELEASE:
            break
    return text


def _rows(
    record: Record, folder_uri: str, run: Mapping[str, Any], *, brief: bool = False
) -> Iterator[tuple[str, str]]:
    """The facts; in brief without those whose length others decide on."""
    artifacts = f"#/experiments/{run['experiment_id']}/runs/{run['run_id']}/artifacts/report"
    yield "speedup", escape_markdown(record.speedup_text)
    if record.variants is not None:
        yield "recommended variant", escape_markdown(record.variants.recommended)
    if not brief:
        yield from _accuracy(record)
    yield "report", f"[open]({artifacts}/{REPORT_HTML}) · `{folder_uri}/{REPORT_HTML}`"
    yield "notebook", f"[open]({artifacts}/{REPORT}) · `{folder_uri}/{REPORT}`"
    yield "manifest", f"`{folder_uri}/{MANIFEST}`"
    yield "model", f"`{folder_uri}/{MODEL}`"
    checkpoint, data = record.checkpoint, record.evaluation_data
    yield "checkpoint", f"{_outside(checkpoint.file)} · SHA-256 `{checkpoint.sha256}`"
    digest = f" · SHA-256 `{data.sha256}`" if data.sha256 else ""
    said = "" if brief else f" · {_outside(data.provenance, 200)}"
    samples = count_of(data.samples, "sample")
    yield "evaluation data", f"{_outside(data.source)} · {samples}{said}{digest}"
    if commit := record.environment.git_commit:
        changed = ", with changes that are not committed" if record.environment.git_dirty else ""
        yield "code", f"commit `{commit}`{changed}"


def _accuracy(record: Record) -> Iterator[tuple[str, str]]:
    metrics, outputs = record.metrics, record.model.signature.outputs
    for output in outputs[:_MOST_OUTPUTS]:
        called = output.name
        if (mean := metrics.get(f"{called}_mae")) is not None:
            unit = f" {_outside(output.unit)}" if output.unit else ""
            largest = metrics[f"{called}_max_abs_error"]
            found = f"mean error {number(mean)}, largest {number(largest)}{unit}"
            yield f"parity of {_outside(called)}", found
    if (more := len(outputs) - _MOST_OUTPUTS) > 0:
        yield "parity", f"{count_of(more, 'output')} more in the report"
    here, there = (metrics.get(f"error_{who}_median_m") for who in ("onnx", "pytorch"))
    if here is not None and there is not None:
        yield "localization error", f"median {distance(here)}, of PyTorch {distance(there)}"


def _outside(text: str, limit: int = 60) -> str:
    """Text from outside, inert, in at most twice ``limit`` characters."""
    inert = escape_markdown(name(text, limit))
    return inert if len(inert) <= 2 * limit else escape_markdown(name(text, limit // 5))


def review_line(move: Move) -> str:
    """Who pointed an alias at a version, when and why, as a line of its page."""
    pointed = f"**{escape_markdown(move.alias)}**"
    did = f"promoted to {pointed}" if move.action == "promote" else f"{pointed} rolled back to it"
    before = f", from version {move.previous}" if move.previous else ""
    by = f"by {_outside(move.by)}{before}: {_outside(move.note, 300)}"
    return f"- {move.time[:16].replace('T', ' ')} UTC, {did} {by}"


def add_review(description: str, line: str) -> str:
    """A version's description with one more review.

    Where there is no room for it the oldest reviews go, which are kept beside the report; what
    somebody else has written stays, and if that fills the page, the line is left out.
    """
    known = _REVIEWS in description
    text = f"{description}\n{line}" if known else f"{description}{_REVIEWS}{line}"
    while len(text) > MOST_CHARACTERS:
        text, dropped = _OLDEST_REVIEW.subn(_REVIEWS, text, count=1)
        if not dropped:
            return description
    return text
