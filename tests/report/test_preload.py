"""What a kernel imports before it is asked to do anything."""

import json
import subprocess
import sys

import nbformat

from heimdall_onnx.report.notebook import notebook_path


def test_everything_that_the_notebook_imports_is_there_already():
    imports = next(c for c in nbformat.read(notebook_path(), 4).cells if c.id == "imports")
    code = (
        "import json, sys; from heimdall_onnx.report.preload import load_ipython_extension as f; "
        f"f(None); before = {{*sys.modules}}; exec({imports.source!r}); "
        "print(json.dumps([name for name in sys.modules if name not in before]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = {m for m in json.loads(done.stdout) if m.startswith("heimdall_onnx.")}
    # What makes the demo is imported by name only; making one takes minutes.
    assert found <= {"heimdall_onnx.training", "heimdall_onnx.training.demo"}


def test_what_is_imported_is_not_looked_through_for_garbage_again():
    code = (
        "import gc; from heimdall_onnx.report.preload import import_for_good; "
        "import_for_good(['json', 'no_such_module', 'email.parser']); "
        "print(gc.isenabled(), gc.get_freeze_count() > len(gc.get_objects()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True True\n"
