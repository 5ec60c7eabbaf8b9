"""The public names are there, and importing the package stays cheap."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import heimdall_onnx
from heimdall_onnx.report import plot, tables


def test_public_names_are_exactly_these():
    assert heimdall_onnx.__all__ == [
        "Axis",
        "Ensemble",
        "LocalizationNet",
        "MLflowTracker",
        "ONNXExporter",
        "ReleaseParameters",
        "ReleaseResult",
        "ServedModel",
        "Settings",
        "Signature",
        "TensorSpec",
        "TimedSteps",
        "assess_members",
        "benchmark_model",
        "capture_environment",
        "compare_levels",
        "compare_member",
        "compare_outputs",
        "compare_variants",
        "decide",
        "derive_signature",
        "ensure_store",
        "explore_parity",
        "export_and_register_model",
        "export_model",
        "first_rows",
        "initialize_mlflow",
        "load_checkpoint",
        "load_evaluation_data",
        "load_model",
        "locate_departure",
        "make_demo",
        "measure_roofline",
        "parameters_of_notebook",
        "prepare_run",
        "profile_variants",
        "record_results",
        "register_release",
        "release_checkpoint",
        "summarize_metrics",
        "trace_depth",
        "upload_release",
        "validate_model",
        "watch_cells",
    ]


def test_every_public_name_can_be_had_and_is_documented():
    for name in heimdall_onnx.__all__:
        assert getattr(heimdall_onnx, name).__doc__, name
        assert name in dir(heimdall_onnx)


def test_importing_the_package_imports_no_framework():
    code = "import sys, heimdall_onnx; print({'torch', 'mlflow', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# What stored notebooks import. They are run again long after: nothing of this may go.
FACES = {
    "release": {
        "heimdall_onnx": {
            *("Settings", "TimedSteps", "assess_members", "benchmark_model"),
            *("capture_environment", "compare_levels", "compare_member", "compare_outputs"),
            *("compare_variants", "decide", "explore_parity", "export_model", "first_rows"),
            "load_checkpoint",
            *("load_evaluation_data", "locate_departure", "make_demo", "measure_roofline"),
            *("parameters_of_notebook", "prepare_run", "profile_variants", "record_results"),
            *("register_release", "summarize_metrics", "trace_depth", "upload_release"),
            *("validate_model", "watch_cells"),
        },
        "heimdall_onnx.report": {"plot", "tables"},
    },
    "compare": {
        "heimdall_onnx": {"Settings", "capture_environment"},
        "heimdall_onnx.report": {"plot", "tables"},
        "heimdall_onnx.review.compare": {"notebook"},
    },
    "fleet": {"heimdall_onnx.release.fleet": {"notebook"}},
}


@pytest.mark.parametrize("name", FACES)
def test_a_notebook_imports_from_faces_only(name):
    notebook = Path(__file__).parents[2] / "notebooks" / f"{name}.ipynb"
    found = {}
    for cell in json.loads(notebook.read_text())["cells"]:
        if cell["cell_type"] == "code":
            for node in ast.walk(ast.parse("".join(cell["source"]))):
                assert not isinstance(node, ast.Import)
                if isinstance(node, ast.ImportFrom) and node.module.startswith("heimdall_onnx"):
                    found.setdefault(node.module, set()).update(n.name for n in node.names)
    assert found == FACES[name]


@pytest.mark.parametrize(
    ("face", "name"),
    [
        *((plot, "error_distribution"), (plot, "latency_over_time"), (plot, "release_cost")),
        *((plot, "members_disagreement"), (plot, "operators"), (plot, "roofline")),
        *((plot, "task_error"), (tables, "resolution_table"), (tables, "variant_parity_table")),
    ],
)
def test_what_earlier_notebooks_show_beside_is_nothing_and_no_error(face, name):
    assert getattr(face, name)("a report", "and its data") is None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = face.nothing
