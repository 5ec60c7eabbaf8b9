"""Figures of a repetition beside the recorded ones: the same, allowed, flagged, or a failure."""

import copy

import numpy as np
import pytest
import records
from models import SmallNet

from heimdall_onnx.archive.record import Record, parse_record
from heimdall_onnx.data.evaluation import EvaluationData
from heimdall_onnx.evidence.parity.compare import compare_outputs
from heimdall_onnx.evidence.parity.tolerance import EVALUATION
from heimdall_onnx.model.onnx.export import export_model
from heimdall_onnx.review.reproduce.figures import (
    METRES_PER_DEGREE,
    compare_accuracy,
    compare_latency,
    compare_recorded_variants,
)

MOVED = ("p50_m", "p99_m", "max_m", "sigma_p99")


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict:
    """What a notebook records of parity, on labelled data, and of latency."""
    model, rng = SmallNet(), np.random.default_rng(0)
    onnx = export_model(model, tmp_path_factory.mktemp("m") / "model.onnx", opset=14).path
    signal = {"signal": rng.standard_normal((12, 2, 8, 8)).astype(np.float32)}
    positions = rng.uniform((46, 4), (51, 11), (12, 2))
    data = EvaluationData(signal, positions, {}, "test", "ab", {})
    parity = compare_outputs(model, onnx, data, model.signature)
    found = records.record(model={"signature": model.signature.to_dict()})
    return found.model_copy(update={"parity": parity, "gates": parity.gates()}).to_json()


@pytest.fixture
def repeated(measured) -> dict:
    return copy.deepcopy(measured)


def read(record: dict) -> Record:
    return parse_record(record, "a test")


def statistics(record: dict, kind: str = EVALUATION) -> dict:
    """The positions' statistics at the first batch size of a kind of input."""
    return next(c for c in record["parity"]["cells"] if c["kind"] == kind)["outputs"][0]


def judged(recorded: dict, found: dict, *, exact: bool) -> dict[str, str]:
    """What is not identical, and how it was judged."""
    compared = compare_accuracy(read(recorded), read(found), exact=exact)
    assert len({c.what for c in compared}) == len(compared) > 400
    return {c.what: c.judgement for c in compared if c.judgement != "identical"}


@pytest.mark.parametrize("exact", [True, False])
def test_same_figures_are_identical(measured, repeated, exact):
    assert judged(measured, repeated, exact=exact) == {}


@pytest.mark.parametrize(
    ("name", "by", "elsewhere"),
    [
        ("mean", 0.9e-5, "within"),
        ("mean", 1.1e-5, "differs"),
        ("maximum", 1.1e-5, "differs"),
        ("excess", 0.9, "within"),
        ("excess", 1.1, "differs"),
        ("lowest", 0.9e-5, "within"),
        ("highest", 2e-5, "differs"),
        ("cosine", -2e-6, "differs"),
        ("violations", 1, "differs"),
        ("nonfinite_mismatches", 1, "differs"),
        ("p99", 0.9e-5, "within"),
        ("p99", 1.1e-5, "differs"),
        ("ulp_p50", 5.0, "not judged"),
    ],
)
def test_a_figure_must_be_the_same_here_and_within_the_gates_tolerance_elsewhere(
    measured, repeated, name, by, elsewhere
):
    statistics(repeated)[name] += by
    what = f"positions, {name} (all evaluation data, batch 8)"
    assert judged(measured, repeated, exact=True) == {what: "differs"}
    assert judged(measured, repeated, exact=False) == {what: elsewhere}


def test_adversarial_inputs_have_ten_times_the_tolerance(measured, repeated):
    statistics(repeated, "amplitude ×100")["mean"] += 9e-5
    assert set(judged(measured, repeated, exact=False).values()) == {"within"}
    statistics(repeated, "amplitude ×100")["mean"] += 2e-5
    assert set(judged(measured, repeated, exact=False).values()) == {"differs"}


def test_estimated_quantiles_may_move_a_little_and_are_only_flagged(measured, repeated):
    recorded = copy.deepcopy(measured)
    for record, p99 in ((recorded, 1e-5), (repeated, 1.04e-5)):
        record["parity"]["samples"] = 1000
        record["parity"]["ground"]["task"][0]["median_m"] = 1e9 * p99
        statistics(record).update(count=2000, p99=p99, ulp_p999=1e6 * p99)
    assert set(judged(recorded, repeated, exact=True).values()) == {"within"}
    assert len(judged(recorded, repeated, exact=True)) == 3
    statistics(repeated).update(p99=1.06e-5, ulp_p999=10.6)
    repeated["parity"]["ground"]["task"][0]["median_m"] = 1.06e4
    assert judged(recorded, repeated, exact=True) == {
        "positions, p99 (all evaluation data, batch 8)": "flagged",
        "positions, ulp_p999 (all evaluation data, batch 8)": "flagged",
        "localization error of PyTorch, median (m)": "differs",
    }


def test_metres_are_held_against_the_elements_tolerance_on_the_ground(measured, repeated):
    largest = max(abs(statistics(measured)[end]) for end in ("lowest", "highest"))
    allowed = METRES_PER_DEGREE * (1e-5 + 1.3e-6 * largest)
    task = repeated["parity"]["ground"]["task"][1]
    task["p95_m"] += 0.99 * allowed
    what = "localization error of ONNX, p95 (m)"
    assert judged(measured, repeated, exact=True) == {what: "differs"}
    assert judged(measured, repeated, exact=False) == {what: "within"}
    task["p95_m"] += 0.02 * allowed
    assert judged(measured, repeated, exact=False) == {what: "differs"}


def test_noise_floor_is_held_against_its_own_limit(measured, repeated):
    floor = repeated["parity"]["noise_floor"][0]
    limit = 2 * floor["pytorch_error"] + floor["ulp"]
    floor["onnx_error"] += 0.9 * limit
    what = "positions, mean error of ONNX against float64"
    assert judged(measured, repeated, exact=False) == {what: "within"}
    floor["onnx_error"] += 0.2 * limit
    assert judged(measured, repeated, exact=False) == {what: "differs"}


def test_gate_that_fails_now_differs_everywhere(measured, repeated):
    gate = repeated["gates"][0]
    gate.update(passed=False, measured=1.0)
    name = f"gate {gate['name']}"
    assert judged(measured, repeated, exact=False) == {f"{name}, passed": "differs"}
    assert judged(measured, repeated, exact=True) == {
        f"{name}, passed": "differs",
        f"{name}, measured": "differs",
    }


def test_what_is_missing_or_not_a_number_differs(measured, repeated):
    del repeated["parity"]["cells"][1]["outputs"][1]
    repeated["parity"]["ground"] = None
    statistics(repeated)["mean"] = "nan"
    found = judged(measured, repeated, exact=False)
    assert found["positions, mean (all evaluation data, batch 8)"] == "differs"
    assert found["localization error of ONNX, median (m)"] == "differs"
    assert found["spread, violations (evaluation data, batch 1)"] == "differs"
    assert judged(repeated, repeated, exact=True) == {}


@pytest.mark.parametrize(
    ("onnx", "judgement"),
    [(5.0, "identical"), (5.9, "within"), (6.9, "within"), (7.1, "flagged"), (2.9, "flagged")],
)
def test_latency_outside_the_recorded_interval_is_flagged(measured, onnx, judgement):
    found = {
        c.what: c
        for c in compare_latency(
            read(measured), records.record(latency=records.latency(10.0, onnx))
        )
    }
    p50 = found["ONNX Runtime, p50 (ms)"]
    assert (p50.recorded, p50.found, p50.judgement) == (5.0, onnx, judgement)
    assert p50.recorded_interval == (4.0, 6.0)
    assert found["PyTorch, p50 (ms)"].judgement == "identical"
    overlap = abs(10 / onnx - 2.0) <= 0.2
    assert (found["speedup"].judgement == "flagged") != overlap


def test_percentile_with_too_few_calls_behind_it_is_flagged(measured):
    fewer = records.latency()
    fewer["contenders"][1]["percentiles"] = []
    again = records.record(latency=fewer)
    found = {c.what: c for c in compare_latency(read(measured), again)}
    assert found["ONNX Runtime, p50 (ms)"].found is None
    assert found["ONNX Runtime, p50 (ms)"].judgement == "flagged"


def varied(count: int = 24) -> dict:
    """What a notebook records of variants."""
    accuracy = {
        "samples": 12,
        "outputs": [records.output(count=count, mean=0.1, p99=0.2)],
        "noise": [0.01],
        **dict.fromkeys(f"displacement_{what}" for what in MOVED),
        "quality": [records.judged("localization", value=5000.0)],
    }
    timed = records.pair("fp32", "int8", 2.0)
    int8 = records.variant("int8", accuracy=accuracy, latency=timed, kept_in_float=["head"])
    cuda = records.variant("cuda", "unavailable", sha256="")
    made = records.variants("int8", records.variant("fp32"), int8, cuda)
    return records.record_json(variants=made)


def different(recorded: dict, found: dict, *, exact: bool) -> dict[str, str]:
    compared = compare_recorded_variants(read(recorded), read(found), exact=exact)
    assert len({c.what for c in compared}) == len(compared) > 15
    return {c.what: c.judgement for c in compared if c.judgement != "identical"}


@pytest.mark.parametrize("exact", [True, False])
def test_same_variants_are_identical_and_none_are_nothing(exact):
    assert different(varied(), varied(), exact=exact) == {}
    assert compare_recorded_variants(records.record(), read(varied()), exact=exact) == ()


@pytest.mark.parametrize(
    ("change", "what", "here", "elsewhere"),
    [
        (lambda v: v.update(sha256="x"), "sha256", "differs", "not judged"),
        (
            lambda v: v.update(kept_in_float=["body", "head"]),
            "modules kept in float",
            "differs",
            "not judged",
        ),
        (lambda v: v.update(status="failed"), "status", "differs", "flagged"),
        (
            lambda v: v["accuracy"]["quality"][0].update(value=5000.1),
            "quality 0 value",
            "differs",
            "not judged",
        ),
        (
            lambda v: v["accuracy"]["outputs"][0].update(mean=0.11),
            "positions, mean",
            "differs",
            "not judged",
        ),
        (
            lambda v: v["latency"]["speedup"].update(ratio=1.5, low=1.4, high=1.6),
            "speedup",
            "flagged",
            "flagged",
        ),
        (lambda v: v.update(latency=None), "speedup", "flagged", "flagged"),
        (lambda v: v.update(sessions={}), "session options", "not judged", "not judged"),
    ],
)
def test_variant_must_be_the_same_here_and_is_shown_elsewhere(change, what, here, elsewhere):
    found = varied()
    change(found["variants"]["judged"][1])
    name = f"variant int8, {what}"
    assert different(varied(), found, exact=True) == {name: here}
    assert different(varied(), found, exact=False) == {name: elsewhere}


def test_estimated_quantiles_of_variants_may_move_a_little():
    recorded, found = varied(1000), varied(1000)
    output = found["variants"]["judged"][1]["accuracy"]["outputs"][0]
    for p99, judgement in ((0.208, "within"), (0.22, "flagged")):
        output["p99"] = p99
        expected = {"variant int8, positions, p99": judgement}
        assert different(recorded, found, exact=True) == expected


def test_other_recommendation_is_flagged_and_other_calibration_differs():
    found = varied()
    found["variants"]["recommended"] = "fp32"
    found["variants"]["calibration"]["sha256"] = "cd"
    for exact in (True, False):
        assert different(varied(), found, exact=exact) == {
            "recommended variant": "flagged",
            "calibration inputs, SHA-256": "differs",
        }


def test_variants_that_were_not_made_again_are_missed():
    found = different(varied(), records.record_json(), exact=True)
    assert found["variant int8, status"] == found["variant fp32, sha256"] == "differs"


@pytest.mark.parametrize(("valid", "allowed"), [(True, 1e-5), (False, 1e-4)])
def test_other_lengths_have_the_tolerance_they_were_judged_with(measured, valid, allowed):
    recorded = copy.deepcopy(measured)
    cell = copy.deepcopy(recorded["parity"]["cells"][0]) | {"kind": "time = 3", "valid": valid}
    recorded["parity"]["cells"].append(cell)
    for share, judgement in ((0.9, "within"), (1.1, "differs")):
        found = copy.deepcopy(recorded)
        statistics(found, "time = 3")["mean"] += share * allowed
        assert set(judged(recorded, found, exact=False).values()) == {judgement}
