"""The report of a fleet: what ran, what failed and why, and how the released models compare.

Its data is a table with a row for each item, as CSV and Parquet; the notebook ``fleet.ipynb`` reads
that, and is executed and stored beside it and the plan: ``fleets/NAME/vYYYYMMDD_HHMMSS/``. What
the notebook shows is in `release.fleet.tables`.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from heimdall_onnx.archive.manifest import REPORT, REPORT_HTML
from heimdall_onnx.common.errors import DataError, NotebookError
from heimdall_onnx.common.parameters import Parameters
from heimdall_onnx.release.fleet.item import ItemOutcome
from heimdall_onnx.release.fleet.plan import FleetItem, FleetPlan
from heimdall_onnx.release.fleet.run import FleetResult
from heimdall_onnx.release.fleet.tables import facts
from heimdall_onnx.report.kernels import started_kernel
from heimdall_onnx.report.notebook import error_of, execute_notebook, notebook_path
from heimdall_onnx.report.page import put_verdict_first
from heimdall_onnx.report.rendering import render_html
from heimdall_onnx.services.store import Bucket

PLAN, CSV, PARQUET = "plan.json", "outcomes.csv", "outcomes.parquet"
_PREFIX = "fleets"
OUTCOME_COLUMNS = tuple(
    field.name
    for field in fields(ItemOutcome)
    if field.name not in ("processors", "result", "metrics")
)
_OF_RESULT = (
    "verdict",
    "version",
    "s3_uri",
    "report_uri",
    "report_html_uri",
    "model_name",
    "model_version",
    "run_id",
)


@dataclass(frozen=True)
class StoredFleet:
    """Where a fleet's report is.

    Attributes:
        folder_uri: Its folder in the bucket.
        report_html_uri: The rendered report.
        local_report: The same on this machine.
    """

    folder_uri: str
    report_html_uri: str
    local_report: Path


class _ReportParameters(Parameters):
    outcomes: str = ""
    name: str = ""
    bucket: str = ""


def outcomes_frame(
    outcomes: Sequence[ItemOutcome], items: Sequence[FleetItem] = ()
) -> pd.DataFrame:
    """A row for each item, in the plan's order; figures that an item lacks are NaN.

    Args:
        outcomes: What became of the items.
        items: The items; parameters in which they differ become columns ``parameter_NAME``.
    """
    frame = pd.DataFrame([dict(_row(o)) for o in outcomes]).sort_values("number", ignore_index=True)
    # Beside its number, where no shortened name loses it.
    told = frame.label.str.replace(":", " (smoke):", n=1)
    frame.label = frame.label.mask(frame.verdict.str.contains("smoke"), told)
    written = {id(i.parameters): i.parameters.model_dump(mode="json") for i in items}
    given = pd.DataFrame([written[id(i.parameters)] for i in items], [i.number for i in items])
    texts = given.map(lambda v: v if isinstance(v, str) else json.dumps(v, sort_keys=True))
    texts = texts.sort_index(axis=1).add_prefix("parameter_")
    return frame.join(texts.loc[:, texts.nunique() > 1], on="number")


def _row(outcome: ItemOutcome) -> Iterator[tuple[str, Any]]:
    yield from ((name, getattr(outcome, name)) for name in OUTCOME_COLUMNS)
    yield "processors", " ".join(map(str, outcome.processors))
    yield from ((name, outcome.result.get(name) or "") for name in _OF_RESULT)
    failed = [g["name"] for g in outcome.result.get("gates", []) if not g["passed"]]
    yield "failed_gates", "; ".join(failed)
    yield from outcome.metrics.items()


def read_outcomes(path: Path | str) -> pd.DataFrame:
    """The table of a fleet.

    Raises:
        DataError: If it is no such file.
    """
    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise DataError(
            f"expected the outcomes of a fleet at {path}, an {PARQUET}: {error}"
        ) from error
    if missing := {*OUTCOME_COLUMNS, *_OF_RESULT} - {*frame.columns}:
        raise DataError(
            f"{path} is no table of a fleet's outcomes; it lacks {', '.join(sorted(missing))}"
        )
    return frame


def store_report(bucket: Bucket, plan: FleetPlan, result: FleetResult, home: Path) -> StoredFleet:
    """Execute the fleet's notebook and store it beside its plan and its outcomes.

    Args:
        bucket: Where to; it is made if it is not there.
        plan: What was planned.
        result: What became of it.
        home: Folder below which the report stays on this machine.

    Raises:
        NotebookError: If the notebook did not run to its end.
        StoreError: If the store fails.
    """
    (home / "fleets").mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{plan.name}-", dir=home / "fleets"))
    (folder / PLAN).write_text(plan.text)
    frame = outcomes_frame(result.outcomes, plan.items)
    frame.to_csv(folder / CSV, index=False)
    frame.to_parquet(folder / PARQUET, index=False)
    outcomes = str(folder / PARQUET)
    given = _ReportParameters(outcomes=outcomes, name=result.name, bucket=bucket.name)
    with started_kernel(os.environ) as kernel:
        path = notebook_path("fleet")
        judgement = execute_notebook(path, folder / REPORT, given, kernel, record="")
    if judgement.problem:
        raise NotebookError(
            f"the fleet's report could not be made: {error_of(judgement)}; its table is "
            f"{folder / CSV}"
        )
    smoke = " (smoke)" if frame.verdict.str.contains("smoke").any() else ""
    title = f"fleet {plan.name}{smoke}"
    put_verdict_first(
        folder / REPORT,
        passed=result.exit_code == 0,
        title=title,
        facts=facts(frame, result.seconds, result.workers),
    )
    render_html(folder / REPORT, title)
    bucket.ensure()
    prefix = f"{_PREFIX}/{plan.name}"
    text = plan.text.encode()
    version = bucket.claim_version(prefix, name=PLAN, content=lambda _: text)
    for name in (CSV, PARQUET, REPORT, REPORT_HTML):
        key = f"{prefix}/{version}/{name}"
        bucket.upload_file(folder / name, key)
    uri = bucket.uri(f"{prefix}/{version}")
    return StoredFleet(uri, f"{uri}/{REPORT_HTML}", folder / REPORT_HTML)
