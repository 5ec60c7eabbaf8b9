"""The benchmark's own arithmetic: what it calls a target met, and what it takes for memory."""

import importlib
import importlib.util
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
    ("values", "target", "holds", "mark"),
    [
        ((1.0, 9.0, 2.0), 2.0, True, "ok"),
        ((1.0, 9.0, 2.1), 2.0, False, "ABOVE"),
        ((5.0,), None, None, "  "),
    ],
)
def test_row_holds_if_its_median_does(bench, values, target, holds, mark):
    path = Path(__file__).parent / "bench" / "__main__.py"
    spec = importlib.util.spec_from_file_location("bench_main", path)
    main = importlib.util.module_from_spec(spec)
    sys.modules["bench_main"] = main  # where dataclasses look for their module
    try:
        spec.loader.exec_module(main)
    finally:
        del sys.modules["bench_main"]
    row = main.Row("import", target, "s", values, "9 processes")
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
