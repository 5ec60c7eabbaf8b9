"""Time and memory are those of the step that they are booked on."""

import json
import subprocess
import sys
import time

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell

from heimdall_onnx.common import machine
from heimdall_onnx.common.machine import peak_memory_bytes
from heimdall_onnx.evidence import costs
from heimdall_onnx.evidence.costs import IMPORTS, OTHER, CostWatch, step_of, watch_cells
from heimdall_onnx.report.notebook import notebook_path


def test_step_has_its_own_time_and_peak():
    # In a process of its own: what another test has freed and its allocator has kept is filled
    # first, and then no peak is seen.
    code = """if True:
        import json, time
        import numpy as np
        from heimdall_onnx.evidence.costs import CostWatch
        watch = CostWatch()
        with watch.step("large"):
            np.ones(25_000_000)  # 200 MB
        with watch.step("long"):
            time.sleep(0.05)
        print(json.dumps([cost.to_dict() for cost in watch.costs()]))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    large, long = json.loads(done.stdout)
    assert (large["step"], long["step"]) == ("large", "long")
    assert 0.05 <= long["seconds"] < 1
    assert large["peak_memory_bytes"] - long["peak_memory_bytes"] > 150e6


def test_steps_add_up_and_keep_the_largest_peak():
    watch = CostWatch()
    for seconds, peak in ((1.0, 5), (2.0, None), (0.5, 3)):
        watch.add("figures", seconds, peak)
    watch.add("latency", 4.0)
    first, second = watch.costs()
    assert first.to_dict() == {"step": "figures", "seconds": 3.5, "peak_memory_bytes": 5}
    assert second.to_dict() == {"step": "latency", "seconds": 4.0, "peak_memory_bytes": None}


def test_step_that_fails_has_cost_something_too():
    watch = CostWatch()
    with pytest.raises(ValueError, match="no"), watch.step("export"):
        raise ValueError("no")
    assert [cost.step for cost in watch.costs()] == ["export"]


@pytest.mark.parametrize(
    ("source", "step"),
    [
        ("loaded = load_checkpoint(\n    Path(p.checkpoint))\ntables.t(loaded)", "checkpoint"),
        ("m = summarize_metrics(p, l)\nu = upload_release(m)\ntables.t(u)", "upload"),
        ("plot.parity_scatter(parity)", "figures"),
        ("levels = compare_levels(a, b)\nplot.optimization_levels(levels)", "parity"),
        ("from pathlib import Path\nwatch_cells()", IMPORTS),
        ("1 + 1", OTHER),
        ("%matplotlib inline", OTHER),
        ("", OTHER),
    ],
)
def test_cell_belongs_to_the_step_it_calls(source, step):
    assert step_of(source) == step


def test_every_step_has_a_cell_in_the_notebook():
    cells = [c for c in nbformat.read(notebook_path(), 4).cells if c.cell_type == "code"]
    assert {step_of(cell.source) for cell in cells} == {*costs.STEPS.values(), IMPORTS, OTHER}


def test_cells_of_a_notebook_are_measured_from_the_first_on(monkeypatch):
    InteractiveShell.clear_instance()
    shell = InteractiveShell.instance()
    try:
        shell.push({"watch_cells": watch_cells, "load_checkpoint": lambda: time.sleep(0.03)})
        shell.run_cell("from pathlib import Path\nwatch = watch_cells()")
        shell.run_cell("loaded = load_checkpoint()")
        shell.run_cell("1 / 0")
        shell.run_cell("loaded = load_checkpoint()")
        found = {cost.step: cost for cost in shell.user_ns["watch"].costs()}
    finally:
        InteractiveShell.clear_instance()
    assert list(found) == [IMPORTS, "checkpoint", OTHER]
    assert 0.06 <= found["checkpoint"].seconds < 1
    assert found["checkpoint"].peak_memory_bytes == pytest.approx(peak_memory_bytes(), rel=0.5)


def test_outside_a_notebook_nothing_is_watched():
    assert watch_cells().costs() == ()


def test_peak_is_kept_where_the_system_refuses_to_reset_it(monkeypatch, tmp_path):
    (tmp_path / "status").write_text("Name:\tx\nVmHWM:\t    2048 kB\n")
    monkeypatch.setattr(machine, "PROC_SELF", tmp_path)
    (tmp_path / "clear_refs").mkdir()  # can't be written to
    machine.reset_peak_memory()
    assert peak_memory_bytes() == 2048 * 1024
    (tmp_path / "status").write_text("Name:\tx\n")
    with pytest.raises(OSError, match="VmHWM"):
        peak_memory_bytes()


def test_step_is_not_failed_by_what_the_system_does_not_tell(monkeypatch, tmp_path):
    (tmp_path / "status").write_text("Name:\tx\n")
    monkeypatch.setattr(machine, "PROC_SELF", tmp_path)
    watch = CostWatch()
    with pytest.raises(ValueError, match="the real problem"), watch.step("export"):
        raise ValueError("the real problem")
    assert [(c.step, c.peak_memory_bytes) for c in watch.costs()] == [("export", None)]
