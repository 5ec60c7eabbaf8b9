"""What MLflow's pages are told, short of MLflow itself."""

import json

import pytest
import records
from records import SHA256

from heimdall_onnx.archive.manifest import parse_manifest
from heimdall_onnx.archive.mlflow_page import (
    MOST_CHARACTERS,
    add_review,
    describe_version,
    name_data,
    review_line,
)
from heimdall_onnx.archive.record import parse_record
from heimdall_onnx.evidence.metrics import run_metrics

RUN = {"experiment_id": "7", "run_id": "0123abc"}
FOLDER = "s3://models/models/net/v20261120_143000"
HOSTILE = "| <b>x</b> [y](http://z.example) `" + "|" * 500


METRICS = {
    "positions_mae": 2.5e-8,
    "positions_max_abs_error": 1e-6,
    "score_mae": 0.0,
    "score_max_abs_error": 0.0,
    "error_onnx_median_m": 900.0,
    "error_pytorch_median_m": 901.0,
}


def outputs(*pairs):
    return [{"name": n, "dtype": "float32", "shape": ["batch", 2], "unit": u} for n, u in pairs]


def record(**changes):
    signature = {"outputs": outputs(("positions", "degrees"), ("score", None))}
    given = records.record_json(
        gates=[records.GATE] * 2, metrics=METRICS, model={"signature": signature}
    )
    return parse_record(records.changed(given, changes), "a test")


def manifest(folder=FOLDER, verdict="pass"):
    key = f"{folder.removeprefix('s3://').partition('/')[2]}/model.onnx"
    model = {"key": key, "size": 1, "sha256": SHA256}
    said = records.manifest_json(objects=[model], verdict=verdict)
    return parse_manifest(json.dumps(said).encode(), folder)


def rows(text):
    cells = [line.strip("| ").split(" | ", 1) for line in text.splitlines() if line[:1] == "|"]
    return {cell[0].removesuffix("&emsp;"): cell[1] for cell in cells if len(cell) == 2}


def test_description_says_what_was_measured_and_where_it_is():
    text = describe_version(record(), manifest(), RUN)
    assert text.startswith("PASS, speedup 2.00×, 2 gates held. ")
    assert '`heimdall_onnx.load_model("models:/net/3")`' in text
    found = rows(text)
    assert found["speedup"] == "2.00× (1.90 to 2.10) at batch 1 on 1 thread"
    assert found["parity of positions"] == "mean error 2.5e-8, largest 1e-6 degrees"
    assert found["parity of score"] == "mean error 0, largest 0"
    assert found["localization error"] == "median 900 m, of PyTorch 901 m"
    artifacts = "#/experiments/7/runs/0123abc/artifacts/report"
    assert found["report"] == f"[open]({artifacts}/report.html) · `{FOLDER}/report.html`"
    assert found["model"] == f"`{FOLDER}/model.onnx`"
    assert found["checkpoint"] == f"best.ckpt · SHA-256 `{SHA256}`"
    assert found["evaluation data"] == f"eval.npz · 64 samples · simulated · SHA-256 `{SHA256}`"
    assert found["code"] == f"commit `{'c' * 40}`"


def test_description_leaves_out_what_was_not_measured():
    bare = records.record(
        gates=[records.GATE] * 2,
        latency=None,
        latency_not_measured="left out",
        evaluation_data={"sha256": None, "source": "synthetic inputs"},
        environment={"git_commit": None, "git_dirty": None},
    )
    text = describe_version(bare, manifest(verdict="pass (smoke)"), RUN)
    assert text.startswith("PASS (SMOKE), 2 gates held, a test run, not evidence. ")
    found = rows(text)
    assert found["speedup"] == "not measured: left out"
    assert found["evaluation data"] == "synthetic inputs · 64 samples · simulated"
    assert found.keys().isdisjoint({"code", "parity of positions", "localization error"})


def test_text_from_outside_is_inert_and_fits_the_database():
    names = [f"{n}{HOSTILE}" for n in range(9)]
    hostile = record(
        checkpoint={"file": HOSTILE},
        evaluation_data={"source": HOSTILE, "provenance": HOSTILE},
        model={"signature": {"outputs": outputs(*((name, HOSTILE) for name in names))}},
        metrics={f"{name}_{what}": 1.0 for name in names for what in ("mae", "max_abs_error")},
    )
    long = "s3://" + "b" * 63 + "/" + "p" * 500 + "/v20261120_143000"
    for folder in (FOLDER, long):
        text = describe_version(hostile, manifest(folder), RUN)
        for _ in range(200):
            line = review_line(records.move(by=HOSTILE, note=HOSTILE))
            text = add_review(text, line)
        assert len(text) <= MOST_CHARACTERS
        assert text.endswith(line)
        assert "<b>" not in text
        assert "http:" not in text
        assert {row.count("|") for row in text.splitlines() if row[:1] == "|"} == {3}


def test_reviews_are_added_in_order_and_the_oldest_go():
    text = "PASS"
    for number in range(100):
        action = "promote" if number % 2 else "rollback"
        line = review_line(records.move(action=action, note=f"note {number}", previous="4"))
        text = add_review(text, line)
    head, *lines = [line for line in text.splitlines() if line]
    assert (head, lines[0]) == ("PASS", "#### Reviews")
    said = "- 2026-11-20 14:30 UTC, promoted to **production** by Ada, from version 4: note 99"
    assert lines[-1] == said
    assert lines[-2].endswith(
        "UTC, **production** rolled back to it by Ada, from version 4: note 98"
    )
    numbers = [int(line.rpartition(" ")[2]) for line in lines[1:]]
    assert numbers == list(range(numbers[0], 100))
    assert 30 < len(numbers) < 100


def test_what_a_person_wrote_is_not_cut_for_a_review():
    theirs = "x" * (MOST_CHARACTERS - 3)
    assert add_review(theirs, "- a review") == theirs
    after = add_review("PASS", "- one") + "\n\nDo not use on the old station."
    assert add_review(after, "- two") == f"{after}\n- two"


def test_data_are_named_by_hash_and_address():
    kept = {"key": f"objects/sha256/{SHA256}", "size": 1, "sha256": SHA256, "name": "x"}
    roles = ("checkpoint", "evaluation_data")
    found = record(uploaded={"content": [{**kept, "role": role} for role in roles]})
    named = name_data(found, "models", "/data/eval.npz")
    assert (named["name"], named["digest"]) == ("eval.npz", SHA256[:36])
    assert named["source_type"] == "s3"
    assert json.loads(named["source"]) == {"uri": f"s3://models/objects/sha256/{SHA256}"}
    columns = [{"name": "signal", "type": "float32 (2,)"}]
    assert json.loads(named["schema"]) == {"mlflow_colspec": columns}
    assert json.loads(named["profile"])["samples"] == 64
    dataset = {"role": "evaluation_data", "name": "x", "address": "s3://data/captures.zarr"}
    found = record(uploaded={"datasets": [{**dataset, "digest": SHA256}]})
    named = name_data(found, "models", "x")
    assert json.loads(named["source"]) == {"uri": "s3://data/captures.zarr"}


def test_data_that_were_not_kept_are_named_as_they_were_given():
    failed = record(uploaded=None)
    named = name_data(failed, "models", "/data/eval.npz")
    assert (named["source_type"], json.loads(named["source"])) == (
        "local",
        {"uri": "/data/eval.npz"},
    )
    assert name_data(failed, "models", "s3://data/captures.zarr")["source_type"] == "s3"


def test_synthetic_inputs_say_so():
    data = {"sha256": None, "source": "synthetic inputs"}
    named = name_data(record(evaluation_data=data), "models", "")
    assert (named["name"], named["source_type"]) == ("synthetic inputs", "code")
    assert len(named["digest"]) == 36
    more = record(evaluation_data={**data, "samples": 65})
    assert name_data(more, "models", "")["digest"] != named["digest"]


def test_metrics_have_the_same_paths_whatever_was_released():
    flat = {
        "positions_mae": 2.5e-7,
        "positions_max_abs_error": 4e-6,
        "positions_p99_abs_error": 1e-6,
        "speedup": 2.0,
        "speedup_low": 1.5,
        "speedup_high": 2.5,
        "inference_time_onnx_ms": 3.0,
        "inference_memory_pytorch_bytes": 3 * 2.0**20,
        "error_always_the_middle_p95_m": 7.0,
        "displacement_p99_m": 0.5,
        "nll_onnx": 1.0,
        "calibration_error_onnx": 0.1,
        "sharpness_onnx_m": 9.0,
        "coverage_90_pytorch": 0.9,
        "their own": 1.0,
    }
    paths = {
        "parity/positions_mae_1e-6": 0.25,
        "parity/positions_max_1e-6": 4.0,
        "parity/positions_p99_1e-6": 1.0,
        "parity/displacement_p99_m": 0.5,
        "speedup/ratio": 2.0,
        "speedup/ratio_low": 1.5,
        "speedup/ratio_high": 2.5,
        "latency/onnx_p50_ms": 3.0,
        "memory/pytorch_peak_mib": 3.0,
        "position_error/always_the_middle_p95_m": 7.0,
        "uncertainty/onnx_nll": 1.0,
        "uncertainty/onnx_calibration_error": 0.1,
        "uncertainty/onnx_sharpness_m": 9.0,
        "uncertainty/pytorch_coverage_90": 0.9,
        "their own": 1.0,
    }
    documented = {n: flat[n] for n in ("positions_mae", "speedup", "inference_time_onnx_ms")}
    assert run_metrics(flat) == pytest.approx(paths | documented)


@pytest.mark.parametrize("output", ["/head/Add_output_0", "out[0]", "a/../b", "größe"])
def test_any_output_gives_names_that_mlflow_takes(output):
    from mlflow.utils.validation import _validate_metric_name

    names = run_metrics({f"{output}_mae": 1.0, f"{output}_p99_abs_error": 1.0})
    assert len(names) == 2
    for name in names:
        _validate_metric_name(name)
        assert name.count("/") == 1
