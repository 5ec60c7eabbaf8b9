"""What is on the disk while a notebook runs, and after it."""

from dataclasses import dataclass

import bare
import nbformat
import papermill
import psutil
import pytest
from nbclient.exceptions import CellTimeoutError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from papermill import engines
from papermill.exceptions import PapermillExecutionError

from heimdall_onnx.report.engine import ENGINE
from heimdall_onnx.report.kernels import started_kernel


@dataclass(frozen=True)
class Written:
    """The cells in the file, and whether the kernel still ran when it was written."""

    cells: list[nbformat.NotebookNode]
    kernel_runs: bool


@pytest.fixture
def written():
    """Every time that the file was written."""
    return []


@pytest.fixture
def execute(tmp_path, monkeypatch, written):
    """Runs cells, and leaves the file that came last."""

    def run(*cells, **options):
        write = engines.write_ipynb
        nbformat.write(new_notebook(cells=cells), tmp_path / "in.ipynb")
        with started_kernel(bare.environment(tmp_path)) as kernel:
            pid = kernel.provisioner.pid

            def watched(notebook, path):
                write(notebook, path)
                cells = nbformat.read(path, 4).cells
                written.append(Written(cells, psutil.pid_exists(pid)))

            monkeypatch.setattr(engines, "write_ipynb", watched)
            papermill.execute_notebook(
                str(tmp_path / "in.ipynb"),
                str(tmp_path / "out.ipynb"),
                engine_name=ENGINE,
                kernel_name="python3",
                kernel=kernel,
                progress_bar=False,
                **options,
            )

    return run


def statuses(cells):
    return [cell.metadata.papermill["status"] for cell in cells]


def test_file_says_which_cell_runs_and_has_all_before_it_and_is_written_no_oftener(
    execute, written
):
    execute(
        new_markdown_cell("# First"),
        new_code_cell("print(1)"),
        *(new_markdown_cell("prose") for _ in range(5)),
        new_code_cell("print(2)"),
        new_markdown_cell("end"),
    )
    first, second = 1, 7
    running = [one.cells for one in written if "running" in statuses(one.cells)]
    assert [statuses(cells).index("running") for cells in running] == [first, second]
    assert running[1][first].outputs[0].text == "1\n"
    assert statuses(running[1]) == ["completed"] * second + ["running", "pending"]
    # Before the first cell, after the last one, and when the kernel has ended.
    assert len(written) == len(running) + 3
    assert statuses(written[-1].cells) == ["completed"] * 9
    assert written[-1].cells[second].outputs[0].text == "2\n"


def test_what_a_cell_that_failed_has_said_is_in_the_file(execute, tmp_path):
    with pytest.raises(PapermillExecutionError, match="no good"):
        execute(new_code_cell("print(1)\nraise ValueError('no good')"), new_markdown_cell("end"))
    failed = next(
        cell for cell in nbformat.read(tmp_path / "out.ipynb", 4).cells if cell.cell_type == "code"
    )
    assert failed.metadata.papermill["status"] == "failed"
    assert [output.output_type for output in failed.outputs] == ["stream", "error"]


def test_what_a_cell_out_of_time_has_said_is_written_before_its_kernel_may_end(execute, written):
    slow = new_code_cell("print(1, flush=True)\nimport time\ntime.sleep(60)")
    with pytest.raises(CellTimeoutError):
        execute(slow, execution_timeout=2)
    said = [one for one in written if one.cells[0].outputs and one.kernel_runs]
    assert said
    assert said[0].cells[0].outputs[0].text == "1\n"
