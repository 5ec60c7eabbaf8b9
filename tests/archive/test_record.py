"""Judging an executed notebook from its file, the verdict cell, and the HTML."""

import contextlib
import json
import shutil
from pathlib import Path

import nbformat
import papermill
import pytest
from models import NaNNet
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from papermill.exceptions import PapermillException

from heimdall_onnx.archive.record import describe_parity
from heimdall_onnx.data.evaluation import load_evaluation_data
from heimdall_onnx.evidence.parity.compare import compare_outputs
from heimdall_onnx.model.onnx.export import export_model
from heimdall_onnx.report.judge import judge_notebook
from heimdall_onnx.report.page import figures, put_verdict_first

RECORDED = """
import scrapbook
scrapbook.glue("release", {"profile": "quick", "gates": [
    {"name": "mean absolute error", "limit": "≤ 1e-05", "measured": 1e-7, "passed": True,
     "detail": ""}]}, encoder="json")
"""
PICTURE = """
from IPython.display import Image
Image(b"\\x89PNG\\r\\n\\x1a\\n" + bytes(60), format="png")
"""


def write(path: Path, *sources: str) -> Path:
    cells = [new_code_cell(source) for source in sources]
    kernel = {"kernelspec": {"name": "python3", "display_name": "p", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), path)
    return path


def execute(folder: Path, *sources: str, **options) -> Path:
    """Run a notebook as the runner does, whatever papermill thinks of its end."""
    source, executed = write(folder / "source.ipynb", *sources), folder / "report.ipynb"
    # How papermill ends is what must not matter.
    with contextlib.suppress(PapermillException, DeadKernelError, CellTimeoutError):
        papermill.execute_notebook(
            str(source), str(executed), progress_bar=False, kernel_name="python3", **options
        )
    return executed


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> Path:
    return execute(tmp_path_factory.mktemp("complete"), RECORDED, PICTURE, "1 + 1")


def test_complete_notebook_passes(complete):
    judgement = judge_notebook(complete)
    assert judgement.passed
    assert judgement.problem == ""
    assert judgement.verdict.gates[0].name == "mean absolute error"


def test_cell_with_an_error_is_named_with_its_error(tmp_path):
    judgement = judge_notebook(execute(tmp_path, RECORDED, "1 / 0", "2"))
    assert not judgement.passed
    assert "code cell 2 of 3" in judgement.problem
    assert judgement.error_name == "ZeroDivisionError"
    assert judgement.verdict is not None


def test_killed_kernel_never_passes(tmp_path):
    executed = execute(tmp_path, RECORDED, "import os; os.kill(os.getpid(), 9)", "2")
    assert not judge_notebook(executed).passed


def test_exit_with_zero_never_passes(tmp_path):
    executed = execute(tmp_path, RECORDED, "import sys; sys.exit(0)")
    assert not judge_notebook(executed).passed


def test_cell_out_of_time_never_passes(tmp_path):
    executed = execute(tmp_path, RECORDED, "import time; time.sleep(60)", execution_timeout=2)
    assert not judge_notebook(executed).passed


def test_notebook_without_a_record_never_passes(tmp_path):
    judgement = judge_notebook(execute(tmp_path, "1"))
    assert judgement.problem == "the notebook recorded no gates"


def test_failed_gate_never_passes(tmp_path):
    failing = RECORDED.replace("True", "False")
    judgement = judge_notebook(execute(tmp_path, failing))
    assert judgement.problem == ""
    assert not judgement.passed


def test_cells_run_out_of_order_never_pass(complete, tmp_path):
    notebook = nbformat.read(complete, 4)
    notebook.cells[0].execution_count = 99
    changed = tmp_path / "report.ipynb"
    nbformat.write(notebook, changed)
    assert "out of order" in judge_notebook(changed).problem


def test_markdown_and_empty_cells_need_no_execution(tmp_path):
    done = new_code_cell("1", execution_count=1)
    cells = [new_markdown_cell("text"), new_code_cell(""), done]
    path = tmp_path / "report.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    assert judge_notebook(path).problem == "the notebook recorded no gates"


def test_recorded_statistics_hold_all_figures_as_json(tmp_path):
    model = NaNNet()
    onnx = export_model(model, tmp_path / "nan.onnx", opset=14).path
    parity = compare_outputs(
        model, onnx, load_evaluation_data(None, model.signature), model.signature, batch_size=2
    )
    found = json.loads(json.dumps(describe_parity(parity), allow_nan=False))
    cells = {(c["kind"], c["batch_size"]): c for c in found["cells"]}
    assert len(cells) == len(parity.cells) > 10
    assert found["cells"][0]["outputs"] == [parity.evaluation[0].summary()]
    zeros = cells["zeros", 2]["outputs"][0]  # its logarithm is -Inf, and nothing finite is left
    assert (zeros["mean"], zeros["lowest"], zeros["count"]) == ("nan", "inf", 6)
    assert found["noise_floor"][0]["pytorch_error"] == parity.noise_floor[0].pytorch_error


def test_verdict_is_the_first_cell_with_failed_gates_first(complete, tmp_path):
    path = Path(shutil.copy(complete, tmp_path))
    put_verdict_first(path, passed=True, title="v1", facts={"model": "m"})
    first = nbformat.read(path, 4).cells[0]
    assert first.source.startswith("# ✔ PASS — v1")
    assert "mean absolute error" in first.source


def test_putting_the_verdict_twice_leaves_one(complete, tmp_path):
    path = Path(shutil.copy(complete, tmp_path))
    put_verdict_first(path, passed=True, title="v1", facts={})
    put_verdict_first(path, passed=False, title="v1", facts={})
    sources = [cell.source for cell in nbformat.read(path, 4).cells]
    assert [s.split(" — ")[0] for s in sources if "# ✔" in s or "# ✘" in s] == ["# ✘ FAIL"]


def test_figures_are_named_after_their_cells(complete):
    cells = nbformat.read(complete, 4).cells
    assert [name for name, _ in figures(complete)] == [f"{cells[1].id}.png"]


def test_two_figures_of_one_cell_get_two_names(tmp_path):
    image = new_output("display_data", data={"image/png": "AAAA"})
    cell = new_code_cell("x", outputs=[image, image], id="plot")
    path = tmp_path / "n.ipynb"
    nbformat.write(new_notebook(cells=[cell]), path)
    assert [name for name, _ in figures(path)] == ["plot.png", "plot-2.png"]
