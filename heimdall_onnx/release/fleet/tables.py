"""What the report of a fleet shows, from its table: first what needs somebody, then the best."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import pandas as pd
from IPython.display import Markdown

from heimdall_onnx.common.errors import EvidenceError, InputError, ServiceError
from heimdall_onnx.common.text import count_of, distance, escape_markdown, number

_ROWS = 20
_MOST_ROWS = 1000
_LONGEST_REASON = 300
_S3 = "s3://"
# From fleets/NAME/VERSION/report.html to the bucket.
_UP = "../../../"
# By what items are ranked, the first that all have: the task, where it is known, before parity.
_RANKS = (
    ("error_onnx_median_m", "median localization error, m"),
    ("displacement_p99_m", "p99 of the displacement by the export, m"),
)
_COSTS = (
    ("inference_time_onnx_ms", "latency of ONNX Runtime, ms"),
    ("onnx_file_size_bytes", "size of the model, bytes"),
)
# Numbers of the table that are no figures of a model.
_NO_FIGURES = ("number", "exit_code", "attempts", "load", "seconds")
# Iglewicz and Hoaglin, How to Detect and Handle Outliers (1993).
_FAR = 3.5
_MEDIAN_DEVIATION, _MEAN_DEVIATION = 0.6745, 0.7979


def facts(frame: pd.DataFrame, seconds: float, workers: int) -> dict[str, str]:
    """What somebody must see at once, by its label.

    Args:
        frame: The table.
        seconds: That the fleet took.
        workers: That it began with.
    """
    counts = frame.status.value_counts()
    ended = [f"{counts.get(status, 0):,} {status}" for status in ("released", "kept", "failed")]
    if smoke := frame.verdict.str.contains("smoke").sum():
        ended.append(f"{smoke:,} of them smoke runs, which are no evidence")
    far = outliers(frame).label.drop_duplicates()
    shown = "; ".join(far.head(3)) + (f" and {len(far) - 3:,} more" if len(far) > 3 else "")
    done, column, words = ranked(frame)
    found = {
        "items": f"{len(frame):,}: {', '.join(ended)}",
        "failed": _reasons(frame[frame.status == "failed"]) or "none",
        "stands out": shown or "none",
    }
    if column:
        found["best"] = f"{done.label[0]} ({words.rpartition(', ')[0]} {_value(done, 0, column)})"
    return found | {
        "took": f"{seconds:,.0f} s on {count_of(workers, 'worker')}, "
        f"an item {number(frame.seconds.median())} s (median), {number(frame.seconds.max())} s "
        "(longest)",
        "tried more than once": f"{(frame.attempts > 1).sum():,}",
    }


def _reasons(failed: pd.DataFrame) -> str:
    meaning = {
        InputError.exit_code: "for their input",
        EvidenceError.exit_code: "at a gate or in the notebook",
        ServiceError.exit_code: "for a service",
    }
    counts = failed.exit_code.value_counts()
    return ", ".join(
        f"{count:,} {meaning.get(int(code), 'for a fault of a worker or of ours')}"
        for code, count in counts.items()
    )


def failures(frame: pd.DataFrame, bucket: str = "") -> Markdown:
    """Items that failed and why, equal reasons together; of many, the first thousand.

    Args:
        frame: The table.
        bucket: Where the report is; reports there are linked to.
    """
    failed = frame[frame.status == "failed"]
    if failed.empty:
        return Markdown("No item failed.")
    ordered = failed.sort_values(["exit_code", "failed_gates", "error", "number"])
    rows = [
        (_linked(row, bucket), row.exit_code, _shortened(row.error or row.failed_gates))
        for row in ordered.head(_MOST_ROWS).itertuples()
    ]
    return _with_rest(_table(("item", "exit code", "why"), rows), len(ordered))


def ranked(frame: pd.DataFrame) -> tuple[pd.DataFrame, str, str]:
    """Released items from the best to the worst, by which column, and that in words."""
    done = frame[frame.status != "failed"]
    parity = [(name, f"{name}, in its unit") for name in done.columns if name.endswith("_mae")]
    for column, words in (*_RANKS, *parity):
        if column in done and done[column].notna().any():
            return done.sort_values(column, kind="stable", ignore_index=True), column, words
    return done.reset_index(drop=True), "", ""


def ranking(frame: pd.DataFrame, bucket: str = "") -> Markdown:
    """The best items with their cost, and where that was measured.

    Args:
        frame: The table.
        bucket: Where the report is; reports there are linked to.
    """
    done, column, words = ranked(frame)
    if not column:
        return Markdown("No released item has a figure to be ranked by.")
    cost, cost_words = cost_of(done)
    rows = [
        (
            place + 1,
            _linked(row, bucket),
            _value(done, place, column),
            number(done[cost][place], 4),
            _place(row),
            row.s3_uri,
        )
        for place, row in enumerate(done.head(_ROWS).itertuples())
    ]
    head = ("", "item", words.removesuffix(", m"), cost_words, "measured on", "model")
    return _with_rest(_table(head, rows), len(done))


def cost_of(frame: pd.DataFrame) -> tuple[str, str]:
    """The column that says what an answer costs: latency where it was measured, else size."""
    for column, words in _COSTS:
        if column in frame and frame[column].notna().all():
            return column, words
    return _COSTS[-1]


def outliers(frame: pd.DataFrame) -> pd.DataFrame:
    """Figures farther than 3.5 scaled deviations from their median over all items, farthest first.

    The deviations' median is the scale; their mean where most items have the same figure.
    """
    done = frame[frame.status != "failed"]
    figures = done[done.select_dtypes("number").columns.difference(_NO_FIGURES)]
    medians = figures.median()
    deviations = (figures - medians).abs()
    scales = deviations.median() / _MEDIAN_DEVIATION
    scales = scales.where(scales > 0, deviations.mean() / _MEAN_DEVIATION)
    scores = (deviations / scales.where(scales > 0)).stack()
    far = scores[scores > _FAR].sort_values(ascending=False)
    columns = ["row", "label", "figure", "value", "median", "score"]
    rows = (
        (row, done.label[row], name, figures.loc[row, name], medians[name], score)
        for (row, name), score in far.items()
    )
    return pd.DataFrame(rows, columns=columns)


def outliers_table(frame: pd.DataFrame, bucket: str = "") -> Markdown:
    """The items that stand out, the most so first, each with its farthest figure.

    Args:
        frame: The table.
        bucket: Where the report is; reports there are linked to.
    """
    found = outliers(frame)
    if found.empty:
        return Markdown("No item stands out in any figure.")
    items = found.drop_duplicates("row")
    rows = [
        (
            _linked(frame.loc[one.row], bucket),
            one.figure,
            number(one.value, 4),
            number(one.median, 4),
            number(one.score, 2),
        )
        for one in items.head(_ROWS).itertuples()
    ]
    head = ("item", "figure", "its value", "median", "modified z-score")
    return _with_rest(_table(head, rows), len(items))


def every_item(frame: pd.DataFrame, bucket: str = "") -> Markdown:
    """Every item with where it ran and where its report is; of many, the first thousand.

    Args:
        frame: The table.
        bucket: Where the report is; reports there are linked to.
    """
    rows = [
        (
            _linked(row, bucket),
            row.status,
            f"{row.seconds:.1f}",
            _place(row),
            row.report_html_uri or "none",
        )
        for row in frame.head(_MOST_ROWS).itertuples()
    ]
    head = ("item", "ended", "seconds", "released or tried on", "report")
    return _with_rest(_table(head, rows), len(frame))


def _with_rest(shown: Markdown, count: int) -> Markdown:
    left = count - (shown.data.count("\n") - 1)
    if left <= 0:
        return shown
    return Markdown(f"{shown.data}\n\nand {left:,} more, which are in the stored table.")


def _linked(row: Any, bucket: str) -> Markdown:
    """An item's name; with its report behind it, if that is in the same bucket."""
    text, address = escape_markdown(row.label), row.report_html_uri
    if not bucket or not address.startswith(f"{_S3}{bucket}/"):
        return Markdown(text)
    key = address.removeprefix(f"{_S3}{bucket}/")
    return Markdown(f"[{text}]({_UP}{quote(key)})")


def _place(row: Any) -> str:
    if not row.host:
        return "not noted"
    processors = f", processors {row.processors}" if row.processors else ""
    return f"{row.host}{processors}, load {row.load:.2f}"


def _value(done: pd.DataFrame, row: int, column: str) -> str:
    value = done[column][row]
    return distance(value) if column.endswith("_m") else number(value, 4)


def _shortened(text: str) -> str:
    listed = re.sub(r"\n\s*- ", "; ", text).replace(":; ", ": ")
    flat = " ".join(listed.split())
    return flat if len(flat) <= _LONGEST_REASON else f"{flat[: _LONGEST_REASON - 1]}…"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> Markdown:
    # PyTorch comes along with it; the client, which only says the facts, needs none.
    from heimdall_onnx.report.tables import table

    return table(head, rows)
