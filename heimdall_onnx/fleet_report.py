"""The report of a fleet: what ran, what failed and why, and how the released models compare.

Its data is a table with a row for each item, as CSV and Parquet; the notebook ``fleet.ipynb`` reads
that, and is executed and stored beside it and the plan: ``fleets/NAME/vYYYYMMDD_HHMMSS/``.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from IPython.display import Markdown

from heimdall_onnx.errors import DataError, NotebookError
from heimdall_onnx.fleet import FleetResult
from heimdall_onnx.fleet_item import ItemOutcome
from heimdall_onnx.fleet_plan import FleetPlan
from heimdall_onnx.kernel import started_kernel
from heimdall_onnx.manifest import REPORT, REPORT_HTML
from heimdall_onnx.publish import content_type
from heimdall_onnx.release import notebook_path
from heimdall_onnx.report import render_html
from heimdall_onnx.store import claim_version, ensure_bucket, upload_file

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

PLAN, CSV, PARQUET = "plan.json", "outcomes.csv", "outcomes.parquet"
_PREFIX = "fleets"
_ROWS = 20
_MOST_ROWS = 1000
_OWN = (
    "number",
    "label",
    "checkpoint",
    "key",
    "status",
    "exit_code",
    "error",
    "attempts",
    "host",
    "load",
    "seconds",
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
# By what items are ranked, the first that all have: the task, where it is known, before parity.
_RANKS = (
    ("error_onnx_median_m", "median localization error, m"),
    ("displacement_p99_m", "p99 of the displacement by the export, m"),
)
_COSTS = (
    ("inference_time_onnx_ms", "latency of ONNX Runtime, ms"),
    ("onnx_file_size_bytes", "size of the model, bytes"),
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


def outcomes_frame(outcomes: Sequence[ItemOutcome]) -> pd.DataFrame:
    """A row for each item, in the plan's order; figures that an item lacks are NaN."""
    frame = pd.DataFrame([dict(_row(outcome)) for outcome in outcomes])
    return frame.sort_values("number", ignore_index=True)


def _row(outcome: ItemOutcome) -> Iterator[tuple[str, Any]]:
    yield from ((name, getattr(outcome, name)) for name in _OWN)
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
    if missing := {*_OWN, *_OF_RESULT} - {*frame.columns}:
        raise DataError(
            f"{path} is no table of a fleet's outcomes; it lacks {', '.join(sorted(missing))}"
        )
    return frame


def store_report(
    client: S3Client, bucket: str, plan: FleetPlan, result: FleetResult, home: Path
) -> StoredFleet:
    """Execute the fleet's notebook and store it beside its plan and its outcomes.

    Args:
        client: Client of the store.
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
    frame = outcomes_frame(result.outcomes)
    frame.to_csv(folder / CSV, index=False)
    frame.to_parquet(folder / PARQUET, index=False)
    _execute(folder, plan.name)
    ensure_bucket(client, bucket)
    prefix = f"{_PREFIX}/{plan.name}"
    text = plan.text.encode()
    version = claim_version(client, bucket, prefix, name=PLAN, content=lambda _: text)
    for name in (CSV, PARQUET, REPORT, REPORT_HTML):
        key = f"{prefix}/{version}/{name}"
        upload_file(client, folder / name, bucket, key, content_type=content_type(name))
    uri = f"s3://{bucket}/{prefix}/{version}"
    return StoredFleet(uri, f"{uri}/{REPORT_HTML}", folder / REPORT_HTML)


def _execute(folder: Path, name: str) -> None:
    import papermill
    from papermill.exceptions import PapermillException

    from heimdall_onnx.engine import ENGINE

    report = folder / REPORT
    with started_kernel(os.environ) as kernel:
        try:
            papermill.execute_notebook(
                str(notebook_path("fleet")),
                str(report),
                parameters={"outcomes": str(folder / PARQUET), "name": name},
                engine_name=ENGINE,
                kernel_name="python3",
                kernel=kernel,
                progress_bar=False,
            )
        except (PapermillException, RuntimeError) as error:
            raise NotebookError(
                f"the fleet's report could not be made: {error}; its table is {folder / CSV}"
            ) from error
    render_html(report, f"fleet {name}")


# What the notebook shows


def overview(frame: pd.DataFrame) -> Markdown:
    """How many items ended how, and what they took."""
    seconds = frame.seconds
    rows = [(status, f"{count:,}") for status, count in frame.status.value_counts().items()]
    rows += [
        ("items", f"{len(frame):,}"),
        ("attempts", f"{frame.attempts.sum():,}"),
        ("machines", ", ".join(sorted(set(frame.host) - {""})) or "none"),
        ("seconds an item, median", _number(seconds.median())),
        ("seconds an item, longest", _number(seconds.max())),
    ]
    return _table(("fleet", ""), rows)


def failures(frame: pd.DataFrame) -> Markdown:
    """Every item that failed, and why."""
    failed = frame[frame.status == "failed"]
    if failed.empty:
        return Markdown("No item failed.")
    rows = [
        (row.label, row.exit_code, row.failed_gates or row.error, row.report_html_uri or "none")
        for row in failed.itertuples()
    ]
    return _table(("item", "exit code", "why", "its report"), rows)


def ranked(frame: pd.DataFrame) -> tuple[pd.DataFrame, str, str]:
    """Released items from the best to the worst, by which column, and that in words."""
    done = frame[frame.status != "failed"]
    parity = [(name, f"{name}, in its unit") for name in done.columns if name.endswith("_mae")]
    for column, words in (*_RANKS, *parity):
        if column in done and done[column].notna().any():
            return done.sort_values(column, kind="stable", ignore_index=True), column, words
    return done, "", ""


def ranking(frame: pd.DataFrame) -> Markdown:
    """The best items, and how far each is from the export's limits."""
    done, column, words = ranked(frame)
    if not column:
        return Markdown("No released item has a figure to be ranked by.")
    cost, cost_words = cost_of(done)
    rows = [
        (
            place,
            row.label,
            _number(getattr(row, column), 4),
            _number(getattr(row, cost), 4),
            row.s3_uri,
        )
        for place, row in enumerate(done.head(_ROWS).itertuples(), 1)
    ]
    return _table(("", "item", words, cost_words, "model"), rows)


def cost_of(frame: pd.DataFrame) -> tuple[str, str]:
    """The column that says what an answer costs: latency where it was measured, else size."""
    for column, words in _COSTS:
        if column in frame and frame[column].notna().all():
            return column, words
    return _COSTS[-1]


def outliers(frame: pd.DataFrame) -> pd.DataFrame:
    """Items farther from the median than 3.5 scaled median absolute deviations, farthest first.

    Iglewicz and Hoaglin, How to Detect and Handle Outliers (1993); of each figure by itself.
    """
    found = []
    done = frame[frame.status != "failed"]
    for column in done.select_dtypes("number").columns.difference(_OWN):
        values = done[column]
        deviation = (values - values.median()).abs()
        if (scale := deviation.median()) > 0:
            score = 0.6745 * deviation / scale
            found += [
                (done.label[row], column, values[row], values.median(), score[row])
                for row in score.index[score > 3.5]
            ]
    columns = ["label", "figure", "value", "median", "score"]
    return pd.DataFrame(found, columns=columns).sort_values("score", ascending=False)


def outliers_table(frame: pd.DataFrame) -> Markdown:
    """The items that stand out, the most so first."""
    found = outliers(frame)
    if found.empty:
        return Markdown("No item stands out in any figure.")
    rows = [
        (
            row.label,
            row.figure,
            _number(row.value, 4),
            _number(row.median, 4),
            _number(row.score, 2),
        )
        for row in found.head(_ROWS).itertuples()
    ]
    return _table(("item", "figure", "its value", "median", "modified z-score"), rows)


def every_item(frame: pd.DataFrame) -> Markdown:
    """Every item with where it ran and where its report is; of many, the first thousand."""
    rows = [
        (
            row.label,
            row.status,
            f"{row.seconds:.1f}",
            f"{row.host} {row.processors}",
            f"{row.load:.2f}",
            row.report_html_uri or "none",
        )
        for row in frame.head(_MOST_ROWS).itertuples()
    ]
    return _table(("item", "", "seconds", "host and processors", "load", "report"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> Markdown:
    # PyTorch comes along with it; the client, which only stores the report, needs none.
    from heimdall_onnx.tables import table

    return table(head, rows)


def _number(value: float, digits: int = 2) -> str:
    from heimdall_onnx.plot.chart import number

    return number(value, digits)
