"""The benchmark's own arithmetic: what it calls a target met, and what it takes for memory."""

import importlib
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def bench(monkeypatch):
    """The benchmark's modules by name; they are a script's, not a package's."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "bench"))
    return importlib.import_module


@pytest.mark.parametrize(
    ("values", "target", "at_least", "holds", "mark"),
    [
        ((1.0, 9.0, 2.0), 2.0, False, True, "ok"),
        ((1.0, 9.0, 2.1), 2.0, False, False, "MISSED"),
        ((1.0, 9.0, 2.1), 2.0, True, True, "ok"),
        ((1.0, 9.0, 1.9), 2.0, True, False, "MISSED"),
        ((5.0,), None, False, None, "  "),
    ],
)
def test_row_holds_if_its_median_does(bench, values, target, at_least, holds, mark):
    path = Path(__file__).parent / "bench" / "__main__.py"
    spec = importlib.util.spec_from_file_location("bench_main", path)
    main = importlib.util.module_from_spec(spec)
    sys.modules["bench_main"] = main  # where dataclasses look for their module
    try:
        spec.loader.exec_module(main)
    finally:
        del sys.modules["bench_main"]
    row = main.Row("import", target, "s", values, "9 processes", at_least)
    assert row.holds is holds
    assert str(row).startswith(mark)
    assert "9 processes" in str(row)
    if len(values) > 1:
        assert "(1 to 9)" in str(row)


def test_peak_is_that_of_a_process_and_its_children_together(bench, tmp_path):
    child = "b = bytearray(200_000_000); import time; time.sleep(2)"
    parent = (
        "import subprocess, sys; a = bytearray(150_000_000); "
        f"subprocess.run([sys.executable, '-c', {child!r}]); print('done')"
    )
    done = bench("processes").run([sys.executable, "-c", parent], tmp_path, {})
    assert done.output == "done\n"
    assert done.seconds > 2
    assert 350e6 < done.peak_bytes < 450e6


def test_command_that_fails_says_how(bench, tmp_path):
    with pytest.raises(RuntimeError, match=r"ended with 3:\nwhy"):
        bench("processes").run(
            [sys.executable, "-c", "import sys; print('why', file=sys.stderr); sys.exit(3)"],
            tmp_path,
            {},
        )


def test_samples_are_written_as_numpy_would(bench, tmp_path):
    bench("growth").write_samples(tmp_path / "a.npz", 700)
    with np.load(tmp_path / "a.npz") as archive:
        found = archive["mel_spectrogram"]
    assert (found.shape, found.dtype) == ((700, 3, 128, 32), np.float32)
    np.testing.assert_array_equal(found[500:700], found[:200])


def test_rows_of_a_search_come_from_the_record_of_its_release(bench, monkeypatch):
    search = bench("search")

    def judged(name, status, ratio, size):
        latency = {"speedup": {"ratio": ratio}}
        return {"name": name, "status": status, "size_bytes": size, "latency": latency}

    def run(name, batch, ms, compute, memory):
        floor = {"compute_ms": compute, "memory_ms": memory}
        return {"name": name, "batch_size": batch, "measured_ms": ms, "floor": floor}

    record = {
        "variants": {
            "recommended": "int8-minmax",
            "against_pytorch": {"speedup": {"ratio": 9.0, "low": 8.5, "high": 9.5, "pairs": 20}},
            "judged": [
                judged("fp32", "passed", 3.0, 800_000_000),
                judged("int8-minmax", "passed", 2.5, 210_000_000),
                judged("int4-weights", "failed", 4.0, 120_000_000),
            ],
        },
        "roofline": {
            "machine": {"bandwidth_gb_s": 20.0, "peaks": {"f32": 180.0}},
            "rows": [run("int8-minmax", 1, 12.0, 3.0, 6.0), run("int4-weights", 1, 9.0, 1.0, 1.0)],
        },
        "environment": {"instruction_sets": ["avx2"]},
        "operator_times": {
            "fp32": {"total_ms": 30.0, "operators": [{"name": "MatMul", "ms": 20.0, "share": 0.6}]}
        },
    }
    monkeypatch.setattr(search, "read_record", lambda path: record)
    costs = [{"step": "variants", "seconds": 300.0}, {"step": "export", "seconds": 20.0}]
    output = json.dumps({"local_report": "runs/a/report.html", "costs": costs})
    done = bench("processes").Run(400.0, 4_000_000_000, output)
    rows = {
        name.partition(": ")[2]: (target, values)
        for name, target, _, _, values, _ in search.rows_of("large", done)
    }
    assert rows["int8-minmax (recommended) / PyTorch eager, batch 1"] == (8.0, (9.0,))
    assert rows["size of the recommended variant"] == (230.0, (210.0,))
    assert rows["int8-minmax / its floor, batch 1"] == (None, (2.0,))
    assert rows["the search"] == (None, (300.0,))
    assert rows["peak memory of a release with all variants"] == (4.5, (4.0,))
    assert not any(name.startswith("int4-weights") for name in rows)
