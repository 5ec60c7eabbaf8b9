"""An executed notebook judged from its file alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from heimdall_onnx.archive.record import (
    RECORD,
    ExecutedNotebook,
    NotebookCell,
    Record,
    parse_record,
    read_executed,
)
from heimdall_onnx.common.errors import VerificationError
from heimdall_onnx.common.verdict import Verdict

NO_CELL = "no cell"


@dataclass(frozen=True)
class Judgement:
    """What the executed file itself says about its run.

    Attributes:
        problem: Why the notebook did not run to its end; empty if it did.
        error_name: Class of the error that stopped it; empty if none.
        error_message: That error's message.
        record: What the notebook of a release recorded; None if it never got that far.
    """

    problem: str
    error_name: str
    error_message: str
    record: Record | None = field(repr=False)

    @property
    def verdict(self) -> Verdict | None:
        """The recorded gates; None if the notebook never got that far."""
        return None if self.record is None else self.record.verdict

    @property
    def passed(self) -> bool:
        """Whether every cell ran without error and every recorded gate holds."""
        return not self.problem and self.verdict is not None and self.verdict.passed


def judge_notebook(path: Path, record: str = RECORD) -> Judgement:
    """Judge an executed notebook from its file alone, as `judge`."""
    return judge(_read(path), path.name, record)


def judge(notebook: ExecutedNotebook, where: str, record: str = RECORD) -> Judgement:
    """Judge what an executed notebook says of its run.

    papermill marks every cell of a dead kernel ``completed`` and takes ``sys.exit(0)`` for
    success, so neither its status nor its return is believed: each code cell must have been
    executed, in order, without an error output, and the record must be there. That of a release
    holds its gates.

    Args:
        notebook: The notebook.
        where: Where it was found, for messages.
        record: What it calls its record, of which that of a release is read; empty if it keeps
            none.
    """
    cells, found, missing = notebook.code, None, ""
    kept = notebook.scrap(record)
    if kept is None and record:
        missing = f"the notebook recorded no {'gates' if record == RECORD else record}"
    elif record == RECORD:
        try:
            found = parse_record(kept, where)
        except VerificationError as error:
            missing = str(error)
    for number, cell in enumerate(cells, start=1):
        raised = next((o for o in cell.outputs if o.output_type == "error"), None)
        where = _where(number, cells)
        if raised is not None:
            problem = f"{where} raised {raised.ename}"
            return Judgement(problem, raised.ename, raised.evalue, found)
        if cell.execution_count is None:
            problem = (
                f"{where} never finished: the kernel died, the cell ran out of time, or an "
                "earlier cell ended the kernel"
            )
            return Judgement(problem, "", "", found)
    counts = [cell.execution_count or 0 for cell in cells]
    if counts != sorted(counts):
        return Judgement("the code cells ran out of order", "", "", found)
    return Judgement(missing, "", "", found)


def last_started(path: Path) -> str:
    """The last code cell of an executed notebook that began to run, in words, or `NO_CELL`."""
    cells = _read(path).code
    started = [n for n, cell in enumerate(cells, start=1) if cell.execution_count is not None]
    return _where(started[-1], cells) if started else NO_CELL


def _read(path: Path) -> ExecutedNotebook:
    return read_executed(path.read_bytes(), path.name)


def _where(number: int, cells: Sequence[NotebookCell]) -> str:
    first_line = cells[number - 1].source.strip().splitlines()[0]
    return f"code cell {number} of {len(cells)} ({first_line!r})"
