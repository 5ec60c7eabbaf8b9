"""The comparison with peers: its table, and how it reads what each side has left."""

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import records

from heimdall_onnx.archive.manifest import parse_manifest
from heimdall_onnx.common.parameters import AccuracyLimits, Quality
from heimdall_onnx.data.evaluation import EvaluationData
from heimdall_onnx.evidence.variants.accuracy import accuracy_gates, judge_accuracy
from heimdall_onnx.evidence.variants.recipes import weights_of_seven_bits
from heimdall_onnx.localization.network import LOCALIZATION_SIGNATURE

HERE = Path(__file__).parents[1] / "bench" / "peers"


@pytest.fixture
def peers(monkeypatch):
    """The modules by name; they are scripts', not a package's."""
    monkeypatch.syspath_prepend(str(HERE))
    return importlib.import_module


@pytest.fixture
def main(peers, monkeypatch):
    spec = importlib.util.spec_from_file_location("peers_main", HERE / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "peers_main", module)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def rows(peers):
    """This project's row and a function for a peer's."""
    table = peers("table")
    equal = table.Accuracy(1.001, -0.01, 0.1)
    own = table.Row(
        "own", "a search", "", 8.0, table.Ratio(1, 1, 1), equal, 30_000_000, 100.0, 2_000_000_000
    )

    def row(name="peer", latency=(1.0, 0.9, 1.1), accuracy=equal, **figures):
        rest = {"size_bytes": 30_000_000, "seconds": 100.0, "peak_bytes": 2_000_000_000}
        return table.Row(
            name, "by hand", "", 8.0, table.Ratio(*latency), accuracy, **{**rest, **figures}
        )

    return own, row


@pytest.mark.parametrize(
    ("figures", "verdict"),
    [
        ({}, ""),
        ({"latency": (0.9, 0.8, 0.99)}, "better: latency"),
        ({"latency": (0.9, 0.8, 1.01)}, ""),
        ({"size_bytes": 29_800_000}, ""),
        ({"size_bytes": 20_000_000, "seconds": 5.0}, "better: size, time"),
        ({"peak_bytes": 1_000_000_000, "latency": (2.0, 1.9, 2.1)}, "better: memory"),
    ],
)
def test_verdict_names_what_a_peer_is_better_in(peers, rows, figures, verdict):
    own, row = rows
    assert peers("table").verdict(row(**figures), own) == verdict


def test_speed_at_the_cost_of_accuracy_is_not_better(peers, rows):
    table, (own, row) = peers("table"), rows
    lossy = table.Accuracy(1.05, 0.0, 0.9, ("median grew by 5%",))
    fast = row("fast", (0.5, 0.4, 0.6), lossy)
    assert table.verdict(fast, own).startswith("loses accuracy")
    printed = table.render(own, [fast, row("equal", (0.8, 0.7, 0.9))])
    assert "better in latency at equal accuracy: equal (0.80×)" in printed
    assert "loses accuracy: fast" in printed
    assert "median grew by 5%" in printed
    assert "0.50× (0.40–0.60)" in printed


def test_each_row_has_its_method_below_it_and_one_that_failed_its_reason(peers, rows):
    table, (own, row) = peers("table"), rows
    broken = table.Row("broken", reason="failed: no compiler")
    lines = table.render(own, [row(), broken]).splitlines()
    assert [line.strip() for line in lines if line.strip() in {"a search", "by hand"}] == [
        "a search",
        "by hand",
    ]
    assert any("broken" in line and "none: failed: no compiler" in line for line in lines)
    assert lines[-5:] == [
        f"better in {measure} at equal accuracy: none" for measure in table.MEASURES
    ] + ["loses accuracy: none"]
    assert all(len(line) < 140 for line in lines)


def test_accuracy_without_labels_is_shown_as_displacement(peers):
    found = peers("table").Accuracy(None, None, 0.123)
    assert (str(found), found.equal) == ("moved 0.123 σ", True)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1e-2, 0.1])
@pytest.mark.parametrize("labelled", [True, False])
def test_peers_search_by_the_limits_that_they_are_judged_by(peers, scale, labelled):
    task, rng = peers("task"), np.random.default_rng(3)
    truth = rng.normal([50.0, 9.0], 0.5, (60, 2))
    sigma = rng.uniform(0.05, 0.4, (60, 2)).astype(np.float32)
    reference = {
        "positions": (truth + rng.normal(0, 0.2, truth.shape)).astype(np.float32),
        "uncertainties": sigma,
    }
    moved = reference["positions"] + rng.normal(0, scale, truth.shape) * sigma
    found = {"positions": moved.astype(np.float32), "uncertainties": sigma * np.float32(1 + scale)}
    inputs = {"mel_spectrogram": np.zeros((60, 3, 128, 32), np.float32)}
    labels = truth if labelled else None
    data = EvaluationData(inputs, labels, {}, "test", None, {})
    judged = judge_accuracy(reference, found, data, LOCALIZATION_SIGNATURE, Quality())
    growth = task.growth(reference, found, labels)
    if labelled:
        expected = 1 + max(one.loss for one in judged.quality)
    else:
        expected = 1 + 0.01 * judged.displacement_sigma_p99 / 0.25
    assert growth == pytest.approx(expected, rel=1e-9)
    if not labelled:
        gates = accuracy_gates(judged, AccuracyLimits())
        assert all(gate.passed for gate in gates) == (growth <= task.LIMIT)


def test_answers_that_are_no_numbers_are_never_equal(peers):
    task = peers("task")
    good = {name: np.ones((2, 2)) for name in task.OUTPUTS}
    bad = good | {"positions": np.array([[1.0, np.nan], [1.0, 1.0]])}
    assert task.growth(good, bad, np.ones((2, 2))) == float("inf")


def test_answers_are_those_of_all_rows_in_order(peers):
    inputs = np.arange(19, dtype=np.float32)[:, None]
    found = peers("task").answers(
        lambda rows: {"positions": rows + 1, "uncertainties": rows * 2}, inputs
    )
    np.testing.assert_array_equal(found["positions"], inputs + 1)
    np.testing.assert_array_equal(found["uncertainties"], inputs * 2)


def test_processor_is_seen_as_the_project_sees_it(peers):
    assert peers("entry").seven_bits() is weights_of_seven_bits()


PEER = """
from entry import Entry
entry = Entry(None, ["a", "b"])
entry.note(f"{entry.form} {entry.threads} {entry.calls} {entry.evaluation.name}")
with entry.phase("work"):
    pass
if entry.form == "b":
    (entry.out / "model.onnx").write_bytes(b"1234")
    entry.made(entry.out / "model.onnx", "how", environment={"X": "1"}, runtime="pytorch")
"""


@pytest.mark.parametrize("form", ["a", "b"])
def test_what_a_peer_leaves_is_read(main, tmp_path, form):
    command = [sys.executable, "-c", PEER, "model", "calibration.npz", str(tmp_path / "out")]
    options = ["--form", form, "--threads", "2", "--calls", "7", "--evaluation", "eval.npz"]
    subprocess.run([*command, *options], check=True, env={"PYTHONPATH": str(HERE)})
    model, record = main.model_of("peer", tmp_path / "out", 2)
    assert record["notes"] == [f"{form} 2 7 eval.npz"]
    assert record["phases"].keys() == {"work"}
    if form == "a":
        assert model is None
        return
    assert (model.path, model.environment) == (tmp_path / "out" / "model.onnx", {"X": "1"})
    assert (model.settings.runtime, model.settings.threads) == ("pytorch", 2)
    assert (model.size_bytes, record["method"]) == (4, "how")


@pytest.mark.parametrize("names", [("int8.xml", "int8.bin"), ("m.onnx", "m.onnx.data")])
def test_size_counts_the_weights_beside_a_file(main, tmp_path, names):
    for name in (*names, "other.onnx"):
        (tmp_path / name).write_bytes(b"12345")
    model = main.Model("any", tmp_path / names[0], main.SessionSettings())
    assert model.size_bytes == 10


def test_peer_that_makes_nothing_says_why(main, tmp_path):
    out = tmp_path / "Olive-search"
    out.mkdir()
    record = {"file": "", "method": "", "notes": ["int8: 5 ms", "no candidate holds the limits"]}
    (out / "result.json").write_text(json.dumps(record))
    task = main.Task(tmp_path, tmp_path, "all", 1, 1, tmp_path, tmp_path)
    row = main.measured(main.Row("Olive search"), task, judge=None)
    assert (row.reason, row.notes) == ("no candidate holds the limits", ("int8: 5 ms",))
    assert row.accuracy is None


def test_peer_that_fails_is_a_row_with_its_last_words(main, tmp_path):
    task = main.Task(tmp_path, tmp_path, "all", 1, 1, tmp_path, tmp_path)
    peer = main.Peer("none", "there_is_no_such.py")
    row = main.make(peer, task, [tmp_path] * 3, {})
    assert "there_is_no_such.py" in row.reason
    assert row.reason.startswith("failed: ")


def test_own_row_is_read_from_manifest_and_costs(main, tmp_path):
    folder, session = "models/localization/v20260101_000000", {"threads": 2, "spinning": False}
    file = "variants/int8-dynamic/model.onnx"
    judged = [
        {
            "name": "int8-dynamic",
            "status": "passed",
            "file": file,
            "sha256": "1" * 64,
            "size_bytes": 5,
            "sessions": {"latency": session, "throughput": {}},
            "kept_in_float": ["position_head.0"],
        },
        {"name": "int8-minmax", "status": "failed", "reason": "p95"},
    ]
    manifest = records.manifest_json(
        objects=[
            {"key": f"{folder}/{name}", "size": 5, "sha256": "1" * 64}
            for name in (
                *("model.onnx", "report.ipynb", "report.html", "metadata.json", file),
                *("MLmodel", "bom.cdx.json"),
            )
        ],
        variants={
            "recommended": "int8-dynamic",
            "judged": judged,
            "calibration": {"rows": [0, 5, 9]},
        },
    )
    costs = [{"step": "variants", "seconds": 90.5}, {"step": "export", "seconds": 9.0}]
    own = main.own_of(
        parse_manifest(json.dumps(manifest).encode(), f"s3://bucket/{folder}"),
        {"costs": costs},
        7,
        tmp_path,
    )
    assert own.model.path == tmp_path / file
    assert own.model.settings.spinning is False
    assert own.calibration == (0, 5, 9)
    assert (own.row.seconds, own.row.peak_bytes) == (90.5, 7)
    assert own.row.name == "this project: int8-dynamic"
    assert "2 variants" in own.row.method
    assert "of 1 that passed" in own.row.method.replace("the fastest ", "")
    assert own.row.notes == ("kept in float: position_head.0", "session: spinning=False")


def test_no_row_is_calibrated_and_judged_on(main, tmp_path):
    inputs = {"mel_spectrogram": np.arange(10, dtype=np.float32)[:, None]}
    positions = np.arange(20, dtype=np.float64).reshape(10, 2)
    data = EvaluationData(inputs, positions, {}, "test", None, {})
    rest = main.apart(data, (1, 4), tmp_path)
    with np.load(tmp_path / "calibration.npz") as calibration:
        assert calibration["mel_spectrogram"].ravel().tolist() == [1, 4]
    with np.load(tmp_path / "evaluation.npz") as evaluation:
        np.testing.assert_array_equal(evaluation["positions"], rest.positions)
        assert evaluation["mel_spectrogram"].ravel().tolist() == [0, 2, 3, 5, 6, 7, 8, 9]
    assert rest.count == 8


def test_constraints_give_way_to_what_a_peer_pins(main):
    requirements = "# why\noptimum-onnx==0.1.0\ntorch\nhuggingface_hub==0.36.2\nfsspec==2025.10.0\n"
    constraints = "# exactly\nfsspec==2026.9.0\nHuggingFace-Hub==2.0\ntorch==2.13.0\nnumpy==2.4.6\n"
    kept = main.constraints_for(requirements, constraints)
    assert kept.splitlines() == ["torch==2.13.0", "numpy==2.4.6"]


def test_every_package_of_a_peer_has_one_version(main):
    named = {main.package_of(line) for line in main.CONSTRAINTS.read_text().splitlines()}
    for file in HERE.glob("requirements-*.txt"):
        for line in file.read_text().splitlines():
            assert line.startswith("#") or "==" in line or main.package_of(line) in named, line


def test_rows_have_names_of_their_own_scripts_and_packages(main):
    assert len({peer.name for peer in main.PEERS}) == len(main.PEERS)
    for peer in main.PEERS:
        assert (HERE / peer.script).is_file()
        assert not peer.environment or (HERE / f"requirements-{peer.environment}.txt").is_file()


def test_search_of_olive_is_told_in_words(peers):
    static = {"quant_mode": "static", "calibrate_method": "Entropy"}
    footprint = {
        "0": {"parent_model_id": None, "from_pass": None},
        "1": {"parent_model_id": "0", "from_pass": "quantize", "pass_run_config": static},
        "2": {
            "parent_model_id": "1",
            "from_pass": "ortsessionparamstuning",
            "metrics": {
                "value": {"latency-p50": {"value": 8.0}, "growth-accuracy_score": {"value": 1.002}}
            },
        },
        "3": {"parent_model_id": "0", "from_pass": "rtn", "pass_run_config": {"bits": 4}},
        "4": {"parent_model_id": "3", "from_pass": "ortsessionparamstuning", "metrics": None},
    }
    assert peers("olive_history").history(footprint) == [
        "static int8, Entropy: 8.0 ms, growth 1.0020",
        "weights in 4 bits: failed",
    ]
