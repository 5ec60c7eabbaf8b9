"""The benchmark's own arithmetic: what it calls a target met, and what it takes for memory."""

import importlib
import importlib.util
import inspect
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import records

from heimdall_onnx.release.fleet.worker import run_item


@pytest.fixture
def bench(monkeypatch):
    """The benchmark's modules by name; they are a script's, not a package's."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
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
    path = Path(__file__).parents[1] / "bench" / "__main__.py"
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


def test_rows_of_a_search_come_from_the_record_of_its_release(bench, monkeypatch, tmp_path):
    search = bench("search")

    def judged(name, status, ratio, size):
        timed = records.pair("fp32", name, ratio)
        return records.variant(name, status, size_bytes=size, latency=timed)

    def run(name, batch, ms, compute, memory):
        floor = {"compute_ms": compute, "memory_ms": memory}
        found = {"name": name, "batch_size": batch, "measured_ms": ms, "floor": floor}
        return {**found, "precision": "f32", "size_bytes": 1}

    machine = {"bandwidth_gb_s": 20.0, "peaks": {"f32": 180.0}, "threads": 1}
    matmul = {"name": "MatMul", "nodes": 1, "ms": 20.0, "share": 0.6}
    times = {"total_ms": 30.0, "operators": [matmul], "slowest": [], "between_ms": 0, "calls": 9}
    record = records.record(
        variants=records.variants(
            "int8-minmax",
            judged("fp32", "passed", 3.0, 800_000_000),
            judged("int8-minmax", "passed", 2.5, 210_000_000),
            judged("int4-weights", "failed", 4.0, 120_000_000),
            against_pytorch=records.pair("PyTorch", "int8-minmax", 9.0),
        ),
        roofline={
            "machine": {**machine, "cache_bytes": 0, "instruction_sets": []},
            "work": {"flops": 1.0, "parameters": 1},
            "rows": [run("int8-minmax", 1, 12.0, 3.0, 6.0), run("int4-weights", 1, 9.0, 1.0, 1.0)],
        },
        operator_times={"fp32": times},
    )
    monkeypatch.setattr(search, "require_record", lambda notebook, where: record)
    (tmp_path / "report.ipynb").write_bytes(b"")
    costs = [{"step": "variants", "seconds": 300.0}, {"step": "export", "seconds": 20.0}]
    output = json.dumps({"local_report": str(tmp_path / "report.html"), "costs": costs})
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


def test_what_an_item_takes_beside_its_model_is_all_but_the_models_steps(bench):
    fleets = bench("fleets")

    def item(seconds, **steps):
        costs = [{"step": step, "seconds": taken} for step, taken in steps.items()]
        return {"seconds": seconds, "result": {"costs": costs}}

    items = [item(9.0, export=3.0, upload=4.0), item(6.0, export=2.0, upload=1.0, report=2.0)]
    assert [fleets.seconds_beside_the_model(one) for one in items] == [6.0, 4.0]
    assert fleets.seconds_by_step(items) == {
        "export": 2.5,
        "upload": 2.5,
        "report": 2.0,
        fleets.BEYOND: 1.5,
    }


def test_needs_of_a_day_follow_from_what_was_counted(bench):
    fleets = bench("fleets")

    def counts(requests, stored, rows):
        return fleets.Counts(Counter(requests), 0, Counter(stored), Counter(rows), 0)

    before = counts({"store GET": 5}, {"reports": 100}, {"runs": 7, "tags": 3})
    after = counts(
        {"store GET": 25, "store PUT": 20, "registry POST": 9},
        {"reports": 1100, "records and logs": 1000},
        {"runs": 17, "tags": 3},
    )
    added = after.since(before)
    assert added.rows == {"runs": 10}
    assert added.of_service("store") == 40
    day = fleets.day_of(86_400, 3.0, added, 10)
    assert (day.workers, day.requests_per_second, day.versions_per_second) == (3.0, 4.0, 1.0)
    assert (day.bytes_stored, day.rows) == (86_400 * 200, 86_400)


@pytest.mark.parametrize(
    ("bucket", "key", "kind"),
    [
        ("heimdall-mlflow", "ab/artifacts/report/report.html", "MLflow's artifacts"),
        ("heimdall-bench", "models/localization/v20261120_143000/report.html", "reports"),
        ("heimdall-bench", "models/localization/v20261120_143000/MLmodel", "models and manifests"),
        ("heimdall-bench", "objects/sha256/ab", "checkpoints and data"),
        ("heimdall-bench", "fleets/items/ab.json", "records and logs"),
        ("heimdall-bench", "aliases/net/staging/00000001.json", "records and logs"),
    ],
)
def test_objects_are_told_apart_by_their_keys(bench, bucket, key, kind):
    assert bench("fleets").kind_of(bucket, key) == kind


def test_a_share_of_every_fleet_is_at_least_a_few_items(bench):
    scaled = bench("fleets").Sizes(compared=16, planned=10_000).scaled(0.01)
    assert (scaled.compared, scaled.planned, scaled.history) == (4, 100, 1_000)


def test_workers_that_do_nothing_are_asked_as_those_of_a_fleet(bench):
    answer = bench("fleet_client").answering("outcome.json")
    assert [*inspect.signature(answer).parameters] == [*inspect.signature(run_item).parameters]
