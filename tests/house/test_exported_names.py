"""The public names are there, and importing the package stays cheap."""

import subprocess
import sys

import heimdall_onnx


def test_public_names_are_exactly_these():
    assert heimdall_onnx.__all__ == [
        "Axis",
        "LocalizationNet",
        "MLflowTracker",
        "ONNXExporter",
        "ReleaseParameters",
        "ReleaseResult",
        "ServedModel",
        "Settings",
        "Signature",
        "TensorSpec",
        "ensure_store",
        "export_and_register_model",
        "initialize_mlflow",
        "load_model",
        "release_checkpoint",
    ]


def test_every_public_name_can_be_had_and_is_documented():
    for name in heimdall_onnx.__all__:
        assert getattr(heimdall_onnx, name).__doc__, name
        assert name in dir(heimdall_onnx)


def test_importing_the_package_imports_no_framework():
    code = "import sys, heimdall_onnx; print({'torch', 'mlflow', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
