"""An executed notebook judged from its file alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heimdall_onnx.archive.record import RECORD, read_notebook, read_record
from heimdall_onnx.common.gates import Gate, Verdict

if TYPE_CHECKING:
    from nbformat import NotebookNode
NO_CELL = "no cell"


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
        record: What it calls its record; empty if it keeps none.
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
    if record and not found:
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
