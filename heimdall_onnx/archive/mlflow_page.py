"""What MLflow's own pages show of a release: its description, its evaluation data, its reviews.

They are for who looks there first, and say where the evidence is. Nothing is decided by them:
anybody who can write to the registry can change them, and `verify` reads none.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heimdall_onnx.archive.manifest import REPORT, REPORT_HTML
from heimdall_onnx.common.parameters import MODEL
from heimdall_onnx.common.templates import render
from heimdall_onnx.common.text import escape_markdown, name, shown
from heimdall_onnx.services.store import MANIFEST, format_uri

if TYPE_CHECKING:
    from heimdall_onnx.archive.aliases import Move
    from heimdall_onnx.archive.manifest import Manifest
    from heimdall_onnx.archive.record import Record

# What MLflow's database takes, and what is left of it for reviews.
MOST_CHARACTERS, _MOST_OF_RELEASE = 5_000, 4_000
_DIGEST_CHARACTERS = 36
_MOST_OUTPUTS = 4
_TEMPLATE = Path(__file__).with_suffix(".md.j2")
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
        "labels": "yes" if data.labelled else "no",
        "provenance": shown(data.provenance, 300),
    }
    uploaded = record.uploaded
    kept = uploaded and [
        *(dataset.address for dataset in uploaded.datasets),
        *(format_uri(bucket, e.key) for e in uploaded.content if e.role == "evaluation_data"),
    ]
    digest, kind = data.sha256, "local"
    source: Mapping[str, Any] = {"uri": given}
    if digest is None:
        kind, source = "code", {"tags": {"made by": "heimdall_onnx.model.examples"}}
        digest = hashlib.sha256(json.dumps([columns, profile]).encode()).hexdigest()
    elif kept:
        kind, source = "s3", {"uri": kept[0]}
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


def describe_version(record: Record, manifest: Manifest, run: Mapping[str, Any]) -> str:
    """What a version's page says, in Markdown; text from outside stands in it as such.

    Args:
        record: What the notebook has recorded.
        manifest: Of the release.
        run: Its MLflow run, as `MLflowTracker.get_run_info` describes it.
    """
    for brief in (False, True):
        # In brief without those whose length others decide on.
        text = render(
            _TEMPLATE,
            {"outside": _outside},
            record=record,
            manifest=manifest,
            run=run,
            brief=brief,
            most_outputs=_MOST_OUTPUTS,
            files={
                "report": REPORT_HTML,
                "notebook": REPORT,
                "manifest": MANIFEST,
                "model": MODEL,
            },
        )
        if len(text) <= _MOST_OF_RELEASE:
            break
    return text


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
