"""A table as the notebook shows it, and how its cells are written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from IPython.display import Markdown

from heimdall_onnx.common.text import escape_markdown, markdown_table, number
from heimdall_onnx.evidence.parity.statistics import ErrorStatistics


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> Markdown:
    """A Markdown table; every cell that is not Markdown of our own is shown as inert text."""
    first, *others = (
        [c.data if isinstance(c, Markdown) else escape_markdown(str(c)) for c in row]
        for row in (head, *rows)
    )
    return Markdown(markdown_table(first, others))


def value_text(statistics: ErrorStatistics, name: str) -> str:
    """One statistic of an output's error."""
    value = getattr(statistics, name)
    if name == "cosine":
        return f"{1 - value:.2g}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def megabytes(size_bytes: int) -> str:
    """A size in megabytes."""
    return f"{size_bytes / 1e6:,.1f}" if size_bytes >= 1e6 else number(size_bytes / 1e6)


def shape_text(shape: Sequence[int | str]) -> str:
    """A shape as a tuple."""
    return f"({', '.join(map(str, shape))})"
