"""The committed notebook: its form, and that it runs by itself."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
import records

from heimdall_onnx.common.parameters import ReleaseParameters
from heimdall_onnx.report.engine import ENGINE
from heimdall_onnx.report.judge import judge_notebook
from heimdall_onnx.report.notebook import notebook_path
from heimdall_onnx.review.compare.pair import ComparisonParameters

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=["release", "compare"])
def notebook(request):
    return nbformat.read(notebook_path(request.param), 4)


def test_committed_notebook_carries_no_outputs(notebook):
    for cell in notebook.cells:
        assert not cell.get("outputs"), cell.id
        assert not cell.get("execution_count"), cell.id


def test_only_the_first_code_cells_import_and_none_defines(notebook):
    sources = {c.id: c.source for c in notebook.cells if c.cell_type == "code"}
    before = [sources.pop(name) for name in ("costs", "imports") if name in sources]
    assert all("import" in source for source in before)
    others = sources.values()
    logic = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.For, ast.While, ast.If)
    for source in others:
        assert not [n for n in ast.walk(ast.parse(source)) if isinstance(n, logic)], source


def test_one_cell_is_tagged_parameters_with_a_typed_and_explained_line_each(notebook):
    (cell,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    for line in cell.source.splitlines():
        assert ": " in line.split("=")[0], line
        assert "  # " in line, line


@pytest.mark.parametrize(
    ("name", "parameters"), [("release", ReleaseParameters), ("compare", ComparisonParameters)]
)
def test_papermill_can_explain_every_parameter(name, parameters):
    inspected = papermill.inspect_notebook(str(notebook_path(name)))
    assert list(inspected) == list(parameters.model_fields)
    for parameter, field in parameters.model_fields.items():
        default = field.get_default(call_default_factory=True)
        assert ast.literal_eval(inspected[parameter]["default"]) == default
    assert all(p["help"] and p["inferred_type_name"] != "None" for p in inspected.values())


def test_every_section_is_numbered_and_opens_with_prose(notebook):
    sections = [c.source for c in notebook.cells if c.source.startswith("## ")]
    assert [s.split(".")[0] for s in sections] == [f"## {n}" for n in range(1, len(sections) + 1)]
    assert all(len(s.splitlines()) > 2 for s in sections)


@pytest.mark.parametrize("name", ["release", "fleet"])
def test_prose_that_says_how_to_read_it_stands_before_every_figure(name):
    words, drawn = None, 0
    for cell in nbformat.read(notebook_path(name), 4).cells:
        if cell.cell_type == "markdown":
            words = [line for line in cell.source.splitlines() if line and line[0] != "#"]
        elif re.search(r"plot\.|pareto\(", cell.source):
            drawn += 1
            assert words, f"{cell.id} is a second figure after the same words"
            words = None
    assert drawn


@pytest.mark.slow
@pytest.mark.thorough
def test_notebook_runs_with_its_defaults_and_publishes_nothing(demo_home, tmp_path):
    # nbval runs every cell in a kernel, as JupyterLab's "run all" would.
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "--nbval-lax", str(notebook_path())),
            *("-q", "-p", "no:cacheprovider", "-o", "addopts=", "-o", "filterwarnings="),
            *("-o", "timeout=300", f"--rootdir={tmp_path}"),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,  # nbval leaves its sockets where it runs
        env={**os.environ, "HEIMDALL_HOME": str(demo_home)},
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
    assert not (demo_home / "store").exists()
    assert not (demo_home / "mlflow.db").exists()


@pytest.mark.slow
def test_papermill_alone_gives_a_report_and_publishes_nothing(small, tmp_path):
    home = tmp_path / "home"
    executed = tmp_path / "out.ipynb"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "papermill", str(notebook_path()), str(executed)),
            *("-p", "profile", "smoke", "-p", "output_dir", str(tmp_path / "run")),
            *("-p", "checkpoint", str(small.checkpoint), "-p", "eval_data", str(small.eval_data)),
            *("-p", "model", small.model, "-p", "opset", "14", "-p", "measure_latency", "False"),
            "--no-progress-bar",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "HEIMDALL_HOME": str(home)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert judge_notebook(executed).passed
    assert records.read(executed).uploaded is None
    assert (tmp_path / "run" / "model.onnx").is_file()
    assert not (home / "store").exists()
    assert not (home / "mlflow.db").exists()


def executed_to_an_error(name, folder, warm_kernels, **parameters):
    """The notebook where papermill gives it up, in a kernel that has imported all it needs."""
    executed = folder / "out.ipynb"
    with (
        warm_kernels().started({**os.environ, "HEIMDALL_HOME": str(folder)}) as kernel,
        pytest.raises(papermill.PapermillExecutionError),
    ):
        papermill.execute_notebook(
            str(notebook_path(name)),
            str(executed),
            parameters,
            engine_name=ENGINE,
            kernel=kernel,
            progress_bar=False,
        )
    return executed


def test_bad_parameters_through_papermill_stop_the_notebook(tmp_path, warm_kernels):
    bad = {"tolerence": 1, "batch_size": "many", "profile": "quik"}
    judgement = judge_notebook(executed_to_an_error("release", tmp_path, warm_kernels, **bad))
    assert judgement.error_name == "ParameterError"
    for words in ("did you mean tolerance", "batch_size", "smoke"):
        assert words in judgement.error_message


def test_comparison_without_releases_says_what_to_set(tmp_path, warm_kernels):
    executed = executed_to_an_error("compare", tmp_path, warm_kernels, a="v20261120_143000")
    judgement = judge_notebook(executed, "comparison")
    assert judgement.error_name == "ParameterError"
    assert "which releases are compared? Set b" in judgement.error_message
