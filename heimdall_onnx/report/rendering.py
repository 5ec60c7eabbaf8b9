"""The executed notebook as a page: nbconvert, with the template of this package.

One file that needs neither network nor script. The verdict, its reasons and its gates come first,
then contents, then the notebook in its own order: code, tracebacks and what is tagged ``details``
folded, and the prose before a figure as the caption that says how to read it.
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heimdall_onnx.archive.record import read_notebook
from heimdall_onnx.report.page import VERDICT

if TYPE_CHECKING:
    from nbformat import NotebookNode

    from heimdall_onnx.archive.aliases import Move

# Cells with this tag are for whoever doubts: the page folds what they show.
DETAILS = "details"
# A section of such cells is left out if they ran and show nothing.
OPTIONAL = "optional"
_TEMPLATE = Path(__file__).parent / "template"
# papermill's own words on a failure, which the verdict says better.
_ERROR_MARK = "papermill-error-cell-tag"
# What a page without scripts can show.
_SHOWN = frozenset({"image/png", "text/html", "text/markdown", "text/plain"})


def render_html(path: Path, title: str, decisions: Sequence[Move] = ()) -> Path:
    """Render an executed notebook beside itself as one HTML file that needs no network.

    Args:
        path: The notebook, with the verdict as its first cell or without.
        title: Title of the page.
        decisions: Moves by which a person has approved it since, the latest last.
    """
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(
        template_name=_TEMPLATE.name,
        extra_template_basedirs=[str(_TEMPLATE.parent)],
        embed_images=True,
        exclude_anchor_links=True,
    )
    notebook = read_notebook(path)
    resources = {
        "metadata": {"name": title},
        **arrange(notebook),
        "decisions": decisions,
        "notebook": path.name,
    }
    html, _ = exporter.from_notebook_node(notebook, resources=resources)
    target = path.with_suffix(".html")
    target.write_text(html, encoding="utf-8")
    return target


def arrange(notebook: NotebookNode) -> dict[str, Any]:
    """Decide how a notebook is shown: on each cell in ``cell.page``, the rest as resources.

    Args:
        notebook: The notebook, changed in place; verdict, records and widgets are taken out.

    Returns:
        ``verdict`` as `put_verdict_first` has left it, ``contents`` as headings with level and id,
        and ``left_out``, the headings of questions that did not arise.
    """
    for number, cell in enumerate(notebook.cells):
        # Notebooks of an older format have none.
        cell.setdefault("id", f"cell-{number}")
    verdict = next((c.metadata[VERDICT] for c in notebook.cells if VERDICT in c.metadata), None)
    notebook.cells = [
        cell
        for cell in notebook.cells
        if VERDICT not in cell.metadata and _ERROR_MARK not in cell.metadata.get("tags", [])
    ]
    # Without scripts a widget is what it carries as picture or text.
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        injected = "injected-parameters" in cell.metadata.get("tags", [])
        cell.page = {"name": "injected parameters" if injected else cell.id}
        if "outputs" in cell:
            # Records are for programs.
            cell.outputs = [o for o in cell.outputs if "scrapbook" not in o.get("metadata", {})]
            for output in cell.outputs:
                _arrange_output(cell, output)
    contents: list[dict[str, Any]] = []
    left_out: list[str] = []
    for block in _blocks(notebook.cells):
        head = block[0].page if block[0].cell_type == "markdown" else {}
        outputs = [o for cell in block for o in cell.get("outputs", [])]
        if _did_not_arise(block, outputs):
            left_out += filter(None, [head.get("heading")])
            for cell in block:
                cell.page["left_out"] = True
            continue
        if head.get("heading"):
            contents.append({**head, "id": block[0].id})
        _arrange_block(block, outputs)
    return {"verdict": verdict, "contents": contents, "left_out": left_out}


def _blocks(cells: list[NotebookNode]) -> Iterator[list[NotebookNode]]:
    """Each Markdown cell with the code cells that follow it; its heading is split off."""
    block: list[NotebookNode] = []
    for cell in cells:
        if cell.cell_type == "markdown":
            if block:
                yield block
            block = []
            cell.page |= _split(cell.source)
        block.append(cell)
    if block:
        yield block


def _did_not_arise(block: list[NotebookNode], outputs: list[NotebookNode]) -> bool:
    """Whether all that a section would show, it has found not to be there to be shown."""
    code = [cell for cell in block[1:] if cell.cell_type == "code" and cell.source.strip()]
    optional = all(OPTIONAL in cell.metadata.get("tags", []) for cell in code)
    ran = all(cell.execution_count for cell in code)
    return block[0].cell_type == "markdown" and bool(code) and optional and ran and not outputs


def _split(source: str) -> dict[str, Any]:
    first, _, rest = source.partition("\n")
    marks, _, heading = first.partition(" ")
    if not heading or set(marks) != {"#"}:
        return {"prose": source.strip()}
    # The page's own title is the verdict's.
    return {
        "level": min(max(len(marks), 2), 6),
        "heading": heading.strip().translate(str.maketrans("", "", "`*")),
        "prose": rest.strip(),
    }


def _arrange_output(cell: NotebookNode, output: NotebookNode) -> None:
    output.page = {}
    if "data" not in output:
        return
    output.data = {kind: data for kind, data in output.data.items() if kind in _SHOWN}
    if "image/png" in output.data:
        # A figure's text is what is said where it can't be seen.
        output.data = {"image/png": output.data["image/png"]}
        described = output.get("metadata", {}).get("image/png", {}).get("alt")
        output.page = {
            "alt": described or f"Figure of the cell {cell.id}",
            "size": _size(output.data["image/png"]),
        }


def _arrange_block(block: list[NotebookNode], outputs: list[NotebookNode]) -> None:
    head = block[0].page
    figure = next((o for o in outputs if "alt" in o.page), None)
    if figure is not None and head.get("prose"):
        figure.page["caption"] = head["prose"]
        head["is_caption"] = True
    for cell in block:
        if DETAILS in cell.metadata.get("tags", []):
            cell.page["folded"] = head.get("heading") or cell.page["name"]


def _size(png: str) -> tuple[int, int] | None:
    """Width and height of a PNG, so that the page keeps room for it; None if it is none."""
    try:
        start = base64.b64decode(png[:64])
        return struct.unpack(">II", start[16:24]) if start[12:16] == b"IHDR" else None
    except (binascii.Error, struct.error):
        return None
