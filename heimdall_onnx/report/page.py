"""The verdict as the notebook's first cell, and the figures that are in its file."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from heimdall_onnx.archive.record import read_notebook
from heimdall_onnx.common.text import escape_markdown, markdown_table

if TYPE_CHECKING:
    from nbformat import NotebookNode

    from heimdall_onnx.common.verdict import Verdict
VERDICT = "verdict"


def put_verdict_first(
    path: Path,
    *,
    passed: bool,
    title: str,
    facts: Mapping[str, str],
    gates: Verdict | None = None,
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
        gates: What was judged; None if the notebook never got that far.
        sentences: What a reviewer must know at once.
        problem: What went wrong, in words; empty if nothing did.
    """
    import nbformat

    notebook = read_notebook(path)
    word = "pass" if passed else "not shown" if gates and gates.word == "not shown" else "fail"
    found = {
        "passed": passed,
        "word": word.upper(),
        "title": title,
        "sentences": list(sentences),
        "problem": problem,
        "failed_cell": _failed_cell(notebook) if problem else None,
        "gates": [] if gates is None else [gate.as_shown() for gate in gates.failed_first()],
        # nbformat sorts the keys of mappings.
        "facts": [list(fact) for fact in facts.items()],
    }
    lines = [f"# {'✔' if passed else '✘'} {word.upper()} — {escape_markdown(title)}"]
    if problem:
        quoted = (f"> {escape_markdown(line)}  " for line in problem.splitlines())
        lines += ["**What went wrong**", "\n".join(quoted)]
    lines += map(escape_markdown, sentences)
    if gates is not None:
        lines.append(gates.to_markdown())
    if facts:
        rows = (tuple(map(escape_markdown, fact)) for fact in facts.items())
        lines.append(markdown_table(("fact", "value"), rows))
    cell = nbformat.v4.new_markdown_cell(
        "\n\n".join(lines), id=VERDICT, metadata={"tags": [VERDICT], VERDICT: found}
    )
    notebook.cells = [cell, *(c for c in notebook.cells if c.get("id") != VERDICT)]
    nbformat.write(notebook, path)


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
