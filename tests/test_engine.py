"""What is on the disk while a notebook runs, and after it."""

import os

import nbformat
import papermill
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from papermill import engines
from papermill.exceptions import PapermillExecutionError

from heimdall_onnx.engine import ENGINE
from heimdall_onnx.kernel import started_kernel


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Runs cells; gives what was written each time, and leaves the file that came last."""

    def run(*cells):
        written = []
        write = engines.write_ipynb

        def watched(notebook, path):
            write(notebook, path)
            written.append(nbformat.read(path, 4).cells)

        monkeypatch.setattr(engines, "write_ipynb", watched)
        nbformat.write(new_notebook(cells=cells), tmp_path / "in.ipynb")
        with started_kernel(os.environ) as kernel:
            papermill.execute_notebook(
                str(tmp_path / "in.ipynb"),
                str(tmp_path / "out.ipynb"),
                engine_name=ENGINE,
                kernel_name="python3",
                kernel=kernel,
                progress_bar=False,
            )
        return written

    return run


def statuses(cells):
    return [cell.metadata.papermill["status"] for cell in cells]


def test_file_says_which_cell_runs_and_has_all_before_it_and_is_written_no_oftener(execute):
    written = execute(
        new_markdown_cell("# First"),
        new_code_cell("print(1)"),
        *(new_markdown_cell("prose") for _ in range(5)),
        new_code_cell("print(2)"),
        new_markdown_cell("end"),
    )
    first, second = 1, 7
    running = [cells for cells in written if "running" in statuses(cells)]
    assert [statuses(cells).index("running") for cells in running] == [first, second]
    assert running[1][first].outputs[0].text == "1\n"
    assert statuses(running[1]) == ["completed"] * second + ["running", "pending"]
    # Before the first cell and at the end, too.
    assert len(written) == len(running) + 2
    assert statuses(written[-1]) == ["completed"] * 9
    assert written[-1][second].outputs[0].text == "2\n"


def test_what_a_cell_that_failed_has_said_is_in_the_file(execute, tmp_path):
    with pytest.raises(PapermillExecutionError, match="no good"):
        execute(new_code_cell("print(1)\nraise ValueError('no good')"), new_markdown_cell("end"))
    failed = next(
        cell for cell in nbformat.read(tmp_path / "out.ipynb", 4).cells if cell.cell_type == "code"
    )
    assert failed.metadata.papermill["status"] == "failed"
    assert [output.output_type for output in failed.outputs] == ["stream", "error"]
