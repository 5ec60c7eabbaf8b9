from dataclasses import replace

import numpy as np
import pytest
from models import POSITIONS, SIGNAL, SPREAD
from scipy import stats

from heimdall_onnx.common.parameters import AccuracyLimits, Quality
from heimdall_onnx.data.evaluation import EvaluationData
from heimdall_onnx.evidence.geodesy import distance_m
from heimdall_onnx.evidence.variants.accuracy import accuracy_gates, answers_of, judge_accuracy
from heimdall_onnx.model.signature import Signature, TensorSpec

SIGNATURE = Signature((SIGNAL,), (POSITIONS, SPREAD))
LIMITS = AccuracyLimits()
CONTRACT = Quality(binding=True)
COUNT = 200


def data_with(positions):
    signal = np.zeros((COUNT, 2, 8, 8), np.float32)
    return EvaluationData({"signal": signal}, positions, {}, "test.npz", "0" * 64, {})


@pytest.fixture
def truth():
    rng = np.random.default_rng(0)
    return rng.uniform((45, 5), (50, 12), (COUNT, 2))


@pytest.fixture
def reference(truth):
    rng = np.random.default_rng(1)
    spread = rng.uniform(0.2, 0.4, (COUNT, 2))
    positions = truth + spread * rng.standard_normal((COUNT, 2))
    return {"positions": positions.astype(np.float32), "spread": spread.astype(np.float32)}


def moved(outputs, degrees):
    return outputs | {"positions": outputs["positions"] + np.float32(degrees)}


def test_scores_are_those_of_the_definition(reference, truth):
    found = judge_accuracy(reference, reference, data_with(truth), SIGNATURE, CONTRACT)
    place, nats = found.quality
    errors = distance_m(reference["positions"], truth)
    assert (place.metric, nats.metric) == ("localization", "nll")
    assert place.reference == place.value == pytest.approx(np.median(errors), rel=0.02)
    densities = stats.norm(reference["positions"], reference["spread"]).logpdf(truth)
    assert nats.reference == nats.value == pytest.approx(-densities.sum(axis=1).mean(), rel=1e-5)
    assert (place.loss, nats.loss) == (0.0, 0.0)
    assert found.displacement_max_m == 0
    assert all(gate.passed for gate in accuracy_gates(found, LIMITS))


def test_displacement_is_in_metres_and_in_predicted_deviations(reference, truth):
    shift = np.zeros((COUNT, 2))
    shift[:, 1] = 0.1
    found = judge_accuracy(reference, moved(reference, shift), data_with(None), SIGNATURE, CONTRACT)
    there = reference["positions"] + shift.astype(np.float32)
    metres = distance_m(reference["positions"], there)
    assert found.displacement_p99_m == pytest.approx(np.quantile(metres, 0.99))
    in_sigma = 0.1 / reference["spread"][:, 1]
    assert found.displacement_sigma_p99 == pytest.approx(np.quantile(in_sigma, 0.99), rel=1e-3)
    assert found.quality == ()


def test_the_short_way_round_the_globe_counts(truth):
    west = {
        "positions": np.full((COUNT, 2), (0, 179.99), np.float32),
        "spread": np.ones((COUNT, 2)),
    }
    east = west | {"positions": np.full((COUNT, 2), (0, -179.99), np.float32)}
    labels = np.full((COUNT, 2), (0.0, -179.99))
    found = judge_accuracy(west, east, data_with(labels), SIGNATURE, CONTRACT)
    assert found.displacement_sigma_p99 == pytest.approx(0.02, rel=1e-2)
    assert found.quality[1].reference == pytest.approx(np.log(2 * np.pi), abs=1e-3)


def test_a_log_variance_is_worth_what_its_deviation_is(reference, truth):
    logged = reference | {"spread": 2 * np.log(reference["spread"])}
    spec = replace(SPREAD, range=None, sigma_of=None, log_variance_of="positions", unit=None)
    signature = Signature((SIGNAL,), (POSITIONS, spec))
    found = judge_accuracy(logged, moved(logged, 0.1), data_with(truth), signature, CONTRACT)
    same = judge_accuracy(reference, moved(reference, 0.1), data_with(truth), SIGNATURE, CONTRACT)
    assert found.quality[1].value == pytest.approx(same.quality[1].value, rel=1e-5)
    assert found.displacement_sigma_p99 == pytest.approx(same.displacement_sigma_p99, rel=1e-5)


@pytest.mark.parametrize(("growth", "outcome"), [(0.005, "shown"), (0.015, "worse")])
def test_errors_may_grow_by_one_per_cent(reference, truth, growth, outcome):
    worse = reference["positions"] + growth * (reference["positions"] - truth)
    variant = reference | {"positions": worse}
    found = judge_accuracy(reference, variant, data_with(truth), SIGNATURE, CONTRACT)
    assert found.quality[0].outcome == outcome
    assert found.quality[0].loss == pytest.approx(growth, abs=1e-3)
    _, gate, _ = accuracy_gates(found, LIMITS)
    assert gate.passed == (outcome == "shown")


def test_overconfidence_fails_though_every_position_is_the_same(reference, truth):
    variant = reference | {"spread": reference["spread"] / 2}
    found = judge_accuracy(reference, variant, data_with(truth), SIGNATURE, CONTRACT)
    (failed,) = (gate for gate in accuracy_gates(found, LIMITS) if not gate.passed)
    assert failed.name == "loss of nll"
    assert found.quality[1].outcome == "worse"


def test_without_labels_the_displacement_decides(reference):
    for fraction, passes in ((0.2, True), (0.3, False)):
        variant = moved(reference, fraction * reference["spread"])
        found = judge_accuracy(reference, variant, data_with(None), SIGNATURE, CONTRACT)
        *_, gate = accuracy_gates(found, LIMITS)
        assert gate.passed == passes
        assert gate.measured == pytest.approx(fraction, rel=1e-3)


def test_without_positions_the_noise_of_each_output_decides():
    signature = Signature((SIGNAL,), (TensorSpec("y", "float32", ("batch", 3)),))
    rng = np.random.default_rng(0)
    reference = {"y": 100 + rng.standard_normal((COUNT, 3)).astype(np.float32)}
    for noise, passes in ((0.009, True), (0.011, False)):
        # Relative to the spread about the mean: the 100 that all have in common say nothing.
        variant = {"y": reference["y"] + np.float32(noise) * (reference["y"] - 100)}
        found = judge_accuracy(reference, variant, data_with(None), signature, CONTRACT)
        *_, gate = accuracy_gates(found, LIMITS)
        assert gate.passed == passes
        assert gate.measured == pytest.approx(noise, rel=0.02)


@pytest.mark.parametrize("value", [np.nan, np.inf, 7.0])
def test_broken_outputs_fail_whatever_the_rest_says(reference, truth, value):
    spread = reference["spread"].copy()
    spread[3, 0] = value
    signature = Signature((SIGNAL,), (POSITIONS, replace(SPREAD, range=(0.01, 1.0))))
    found = judge_accuracy(
        reference, reference | {"spread": spread}, data_with(truth), signature, CONTRACT
    )
    gate = accuracy_gates(found, LIMITS)[0]
    assert not gate.passed
    assert gate.detail.startswith("spread: 1 of 400")


def test_nan_positions_are_refused_and_not_an_error(reference, truth):
    positions = reference["positions"].copy()
    positions[0] = np.nan
    found = judge_accuracy(
        reference, reference | {"positions": positions}, data_with(truth), SIGNATURE, CONTRACT
    )
    assert not accuracy_gates(found, LIMITS)[0].passed


def test_answers_come_in_order_from_any_number_of_rows():
    sizes = []

    def run(inputs):
        sizes.append(len(inputs["x"]))
        return {"y": inputs["x"] * 2}

    rows = np.arange(19.0)
    assert (answers_of(run, {"x": rows})["y"] == rows * 2).all()
    assert max(sizes) <= 8
