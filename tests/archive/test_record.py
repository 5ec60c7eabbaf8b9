"""Judging an executed notebook from its file, the verdict cell, and the HTML."""

import contextlib
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
import papermill
import pytest
import records
from models import NaNNet
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from papermill.exceptions import PapermillException

from heimdall_onnx.archive.record import parse_record, record_in, require_record
from heimdall_onnx.common.errors import VerificationError
from heimdall_onnx.data.evaluation import load_evaluation_data
from heimdall_onnx.evidence.parity.compare import compare_outputs
from heimdall_onnx.model.onnx.export import export_model
from heimdall_onnx.report.judge import judge_notebook
from heimdall_onnx.report.page import figures, put_verdict_first

RECORDED = f"""
import json
import scrapbook
scrapbook.glue("release", json.loads({json.dumps(records.record_json())!r}), encoder="json")
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
    assert judgement.verdict.gates[0].name == "opset"


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
    executed = execute(tmp_path, "import time; time.sleep(60)", execution_timeout=1)
    # It is interrupted, or is found where it was.
    assert judge_notebook(executed).problem.startswith("code cell 1 of 1 ")


def changed(complete, folder, change) -> Path:
    """A copy of a complete notebook whose record is another one."""
    notebook, path = nbformat.read(complete, 4), folder / "report.ipynb"
    change(notebook.cells[0].outputs[0].data["application/scrapbook.scrap.json+json"].data)
    nbformat.write(notebook, path)
    return path


def test_failed_gate_never_passes(complete, tmp_path):
    failing = changed(complete, tmp_path, lambda kept: kept.gates[0].update(passed=False))
    judgement = judge_notebook(failing)
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
    record = records.record().model_copy(update={"parity": parity})
    text = json.dumps(record.to_json(), allow_nan=False)
    assert "shard" not in text
    found = parse_record(json.loads(text), "a test").parity
    assert len(found.cells) == len(parity.cells) > 10
    shown = replace(parity.evaluation[0], worst=())
    assert repr(found.evaluation[0]) == repr(shown)
    cells = {(c.kind, c.batch_size): c for c in found.cells}
    zeros = cells["zeros", 2].outputs[0]  # its logarithm is -Inf, and nothing finite is left
    assert math.isnan(zeros.mean)
    assert (zeros.lowest, zeros.count) == (math.inf, 6)
    assert found.noise_floor == parity.noise_floor


def test_record_is_read_as_it_was_written():
    judged = [
        records.variant("fp32"),
        records.variant("int8", latency=records.pair("fp32", "int8", 2.0)),
    ]
    record = records.record(variants=records.variants("int8", *judged))
    assert parse_record(json.loads(json.dumps(record.to_json())), "a test") == record


def test_record_is_read_without_what_runs_models():
    code = (
        "import sys, heimdall_onnx.archive.record; print({'torch', 'onnxruntime'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_record_of_0_1_is_refused_in_one_sentence():
    old = records.record_json()
    del old["schema_version"]
    with pytest.raises(VerificationError) as raised:
        parse_record(old, "report.ipynb")
    assert str(raised.value) == (
        "report.ipynb was made by heimdall-onnx 0.1: reproduce it with that version"
    )


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"gates": [{"name": "opset"}]}, r"gates\.0\.limit: Field required"),
        ({"parity": {"cells": 1}}, r"parity\.cells: "),
        ({"distributions": {"torch": [1]}}, r"distributions\.torch: "),
        ({"latency": {"speedup": {"ratio": "fast"}}}, r"latency\.speedup\.ratio: "),
        ({"distributions": {"more\x1b[2J": 1}}, r"distributions\.more\\x1b\[2J: "),
    ],
)
def test_what_is_no_record_is_refused_with_its_place(changes, problem):
    with pytest.raises(VerificationError, match=f"report.ipynb holds no record.*{problem}"):
        parse_record(records.record_json(**changes), "report.ipynb")


@pytest.mark.parametrize("found", [None, 1, [], "text"])
def test_what_is_no_object_is_no_record(found):
    with pytest.raises(VerificationError, match="holds no record of a release"):
        parse_record(found, "report.ipynb")


def test_notebook_that_recorded_nothing_has_no_record(tmp_path):
    path = write(tmp_path / "empty.ipynb", "1")
    assert record_in(path.read_bytes(), path.name) is None
    with pytest.raises(VerificationError, match="does not call record_results"):
        require_record(path.read_bytes(), "report.ipynb")
    with pytest.raises(VerificationError, match="no executed notebook that can be read"):
        require_record(b"{", "report.ipynb")


def test_record_that_can_not_be_read_never_passes(complete, tmp_path):
    judgement = judge_notebook(changed(complete, tmp_path, lambda kept: kept.pop("gates")))
    assert not judgement.passed
    assert "report.ipynb holds no record of a release" in judgement.problem


def test_verdict_is_the_first_cell_with_failed_gates_first(complete, tmp_path):
    path = Path(shutil.copy(complete, tmp_path))
    gates = judge_notebook(path).verdict
    put_verdict_first(path, passed=True, title="v1", facts={"model": "m"}, gates=gates)
    first = nbformat.read(path, 4).cells[0]
    assert first.source.startswith("# ✔ PASS — v1")
    assert "opset" in first.source


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


def test_record_with_figures_of_another_version_stays_readable():
    record = records.record(latency=records.latency())
    written = record.to_json()
    written["further"] = {"figure": 1}
    written["latency"]["contenders"][0]["single_stream"] = {"value_ms": 2.0}
    assert parse_record(written, "a test") == record
