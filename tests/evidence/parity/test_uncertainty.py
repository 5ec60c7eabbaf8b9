"""Coverage, likelihood and sharpness against their definitions, and the gate on coverage."""

import json
import pickle
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import records
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import POSITIONS, SIGNAL, SPREAD, SmallNet
from parts import partings, read_in_parts
from pydantic_core import to_json
from scipy import stats
from torch import nn

from heimdall_onnx.common.parameters import ReleaseParameters
from heimdall_onnx.common.text import DEGREES
from heimdall_onnx.data.evaluation import EvaluationData
from heimdall_onnx.evidence.gates import coverage_gates, decide
from heimdall_onnx.evidence.geodesy import distance_m, negative_log_likelihood
from heimdall_onnx.evidence.metrics import summarize_metrics
from heimdall_onnx.evidence.parity.compare import compare_outputs
from heimdall_onnx.evidence.parity.uncertainty import (
    NOMINAL,
    Coverage,
    UncertaintyAccumulator,
    assess_members,
)
from heimdall_onnx.model.ensemble import Ensemble
from heimdall_onnx.model.examples import generic_inputs
from heimdall_onnx.model.onnx.export import export_model
from heimdall_onnx.model.signature import Signature, TensorSpec
from heimdall_onnx.report import tables

SIGNATURE = Signature((SIGNAL,), (POSITIONS, SPREAD))
PLACE = np.array([50.0, 8.0])


def answers(count, *, claimed=1.0, seed=0):
    """Normal errors about true positions, and deviations ``claimed`` times as large as theirs."""
    rng = np.random.default_rng(seed)
    truth = PLACE + rng.uniform(-2, 2, (count, 2))
    deviations = rng.uniform(0.1, 0.5, (count, 2))
    positions = truth + deviations * rng.standard_normal((count, 2))
    return {"positions": positions, "spread": claimed * deviations}, truth


def assessed(outputs, truth, *, who="ONNX", signature=SIGNATURE, parts=1):
    accumulator = UncertaintyAccumulator(who, signature)
    for rows in np.array_split(np.arange(len(truth)), parts):
        batch = {name: array[rows] for name, array in outputs.items()}
        accumulator.update(batch, truth[rows], int(rows[0]) if len(rows) else 0)
    return accumulator.result()


def test_figures_are_those_of_their_definitions():
    outputs, truth = answers(300)
    found = assessed(outputs, truth, parts=7)
    errors = np.sort(distance_m(outputs["positions"], truth))
    assert found.samples == 300
    assert found.median_m == pytest.approx(errors[150], rel=1e-6)
    assert found.p95_m == pytest.approx(errors[285], rel=1e-6)
    z = (outputs["positions"] - truth) / outputs["spread"]
    densities = stats.norm(outputs["positions"], outputs["spread"]).logpdf(truth).sum(axis=1)
    calibration = found.calibration
    assert calibration.nll == pytest.approx(-densities.mean())
    assert calibration.z_rms == pytest.approx(np.sqrt((z**2).mean(axis=0)))
    for coverage in calibration.coverage:
        inside = (z**2).sum(axis=1) <= stats.chi2(2).ppf(coverage.nominal)
        assert coverage.observed == inside.mean()
        # Clopper and Pearson's interval as quantiles of the beta distribution.
        k = inside.sum()
        low, high = stats.beta.ppf((0.025, 0.975), (k, k + 1), (301 - k, 300 - k))
        assert (coverage.low, coverage.high) == pytest.approx((low, high))
    claims = stats.chi2(2).cdf((z**2).sum(axis=1))
    shares = [(claims <= p).mean() for p in NOMINAL]
    assert calibration.reliability == pytest.approx(shares)
    gaps = np.abs(np.array(shares) - NOMINAL)
    assert calibration.calibration_error == pytest.approx(gaps.mean())


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.7, 0.89, "overconfident"),
        (0.7, 0.9, "as claimed"),
        (0.9, 0.99, "as claimed"),
        (0.91, 0.99, "underconfident"),
    ],
)
def test_only_an_interval_without_the_claim_in_it_speaks_against_it(low, high, verdict):
    assert Coverage(0.9, (low + high) / 2, low, high).verdict == verdict


def test_an_honest_model_is_found_honest_and_others_are_not():
    verdicts, z = {}, {}
    for claimed in (0.5, 1.0, 2.0):
        calibration = assessed(*answers(4000, claimed=claimed)).calibration
        verdicts[claimed] = calibration.coverage_of(0.9).verdict
        z[claimed] = calibration.z_rms[0]
    assert verdicts == {0.5: "overconfident", 1.0: "as claimed", 2.0: "underconfident"}
    assert [z[c] for c in z] == pytest.approx([2, 1, 0.5], rel=0.05)
    honest = assessed(*answers(4000)).calibration
    assert honest.calibration_error < 0.02
    assert honest.nll < assessed(*answers(4000, claimed=0.5)).calibration.nll
    assert honest.nll < assessed(*answers(4000, claimed=2.0)).calibration.nll


def test_the_radius_is_that_of_a_circle_with_the_area_of_the_ellipse():
    # Half a degree north and one degree east, around a place on the equator.
    outputs = {"positions": np.zeros((1, 2)), "spread": np.array([[0.5, 1.0]])}
    found = assessed(outputs, np.zeros((1, 2))).calibration
    north = 0.5 * distance_m(np.array([[-0.5, 0]]), np.array([[0.5, 0]]))[0]
    east = distance_m(np.array([[0, 0]]), np.array([[0, 1]]))[0]
    area = np.pi * stats.chi2(2).ppf(0.9) * north * east
    assert np.pi * found.radius_p50_m**2 == pytest.approx(area, rel=1e-5)


def test_errors_as_claimed_are_those_that_the_claims_would_give():
    # The same on the ground in both directions: distances follow Rayleigh's distribution.
    metres = np.array([distance_m(PLACE[None], PLACE[None] + step)[0] for step in 1e-3 * np.eye(2)])
    spread = np.tile(7 / metres, (1000, 1))
    outputs = {"positions": np.tile(PLACE, (1000, 1)), "spread": spread}
    found = assessed(outputs, outputs["positions"], parts=9).calibration
    # By rank, which is what the sketch of the quantiles is sure of to a good percent.
    ranks = stats.rayleigh(scale=7000).cdf(found.claimed_error_quantiles_m)
    assert ranks == pytest.approx(np.array(NOMINAL), abs=0.025)
    honest = assessed(*answers(4000))
    ratio = np.array(honest.calibration.claimed_error_quantiles_m) / honest.error_quantiles_m
    assert ratio[39:] == pytest.approx(np.ones(60), rel=0.08)


def test_wide_claims_cover_everything_but_are_not_sharp():
    sharp, wide = (assessed(*answers(500, claimed=c)).calibration for c in (1, 10))
    assert wide.coverage_of(0.5).observed == 1
    assert wide.radius_p50_m == pytest.approx(10 * sharp.radius_p50_m, rel=1e-5)
    assert wide.nll > sharp.nll


def test_longitude_counts_the_short_way_round():
    outputs = {"positions": np.array([[0.0, 179.99]]), "spread": np.full((1, 2), 0.02)}
    found = assessed(outputs, np.array([[0.0, -179.99]]))
    assert found.calibration.z_rms == pytest.approx((0, 1))
    assert found.median_m == pytest.approx(0.02 * 111_319.49, rel=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, -0.3])
def test_a_deviation_that_is_none_covers_nothing(value):
    outputs, truth = answers(40, claimed=100)
    outputs["spread"][3, 1] = value
    found = assessed(outputs, truth).calibration
    assert found.nonfinite == 1
    assert {c.observed for c in found.coverage} == {39 / 40}
    assert found.nll == np.inf
    assert np.isfinite(found.radius_p50_m)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_position_that_is_no_place_is_infinitely_wrong(value):
    outputs, truth = answers(40, claimed=100)
    outputs["positions"][:21, 1] = value
    found = assessed(outputs, truth)
    assert found.median_m == np.inf
    assert found.calibration.nonfinite == 21
    assert found.calibration.coverage_of(0.95).observed == 19 / 40
    json.dumps(describe_json(found), allow_nan=False)


def describe_json(found):
    """As the record keeps it."""
    return json.loads(to_json(found, inf_nan_mode="strings"))


def test_deviations_next_to_nothing_are_wrong_and_raise_no_alarm():
    outputs = {"positions": np.array([[51.0, 8.0]]), "spread": np.full((1, 2), 1e-200)}
    found = assessed(outputs, PLACE[None]).calibration
    assert (found.nonfinite, found.nll, found.z_rms[0]) == (0, np.inf, np.inf)
    assert found.coverage_of(0.95).observed == 0


def test_likelihood_is_infinite_row_by_row():
    residual = np.array([[0.0, 0.0], [np.nan, 0.0], [0.0, 0.0]])
    nats = negative_log_likelihood(residual, np.array([[1.0, 1.0], [1, 1], [0, 1]]))
    assert nats == pytest.approx([np.log(2 * np.pi), np.inf, np.inf])


def test_a_model_without_deviations_has_an_error_and_no_calibration():
    outputs, truth = answers(50)
    found = assessed(outputs, truth, signature=Signature((SIGNAL,), (POSITIONS,)))
    assert found.calibration is None
    assert found.median_m > 0


def test_a_log_variance_is_worth_what_its_deviation_is():
    outputs, truth = answers(200)
    spec = TensorSpec("spread", "float32", ("batch", 2), log_variance_of="positions")
    logged = outputs | {"spread": 2 * np.log(outputs["spread"])}
    found = assessed(logged, truth, signature=Signature((SIGNAL,), (POSITIONS, spec)))
    assert found.calibration.nll == pytest.approx(assessed(outputs, truth).calibration.nll)


def test_memory_does_not_grow_with_the_samples():
    accumulator = UncertaintyAccumulator("ONNX", SIGNATURE)
    sizes = []
    for seed in range(3):
        accumulator.update(*answers(100_000, seed=seed), 100_000 * seed)
        sizes.append(len(pickle.dumps(accumulator)))
    assert sizes[2] < 1.3 * sizes[0] < 120_000
    found = accumulator.result().calibration
    assert found.coverage_of(0.9).observed == pytest.approx(0.9, abs=0.003)


# --- In parts ---


@settings(deadline=None)
@given(
    data=st.data(),
    count=st.integers(1, 40),
    bad=st.sampled_from([0.3, 0.0, 1e-200, np.nan, np.inf]),
    signature=st.sampled_from([SIGNATURE, Signature((SIGNAL,), (POSITIONS,))]),
)
def test_parts_merged_in_any_order_are_the_whole(data, count, bad, signature):
    outputs, truth = answers(count, seed=count)
    outputs["spread"][count // 2, 1] = bad

    def feed(accumulator, part):
        batch = {name: array[part] for name, array in outputs.items()}
        accumulator.update(batch, truth[part], part.start)

    found = read_in_parts(
        lambda: UncertaintyAccumulator("ONNX", signature), feed, data.draw(partings(count))
    )
    assert repr(found.result()) == repr(assessed(outputs, truth, signature=signature))


def test_many_samples_in_parts_have_the_figures_of_the_whole():
    outputs, truth = answers(30_000)
    whole = assessed(outputs, truth)
    merged = UncertaintyAccumulator("ONNX", SIGNATURE)
    for rows in reversed(np.array_split(np.arange(30_000), 17)):
        part = UncertaintyAccumulator("ONNX", SIGNATURE)
        batch = {name: array[rows] for name, array in outputs.items()}
        part.update(batch, truth[rows], first=int(rows[0]))
        merged.merge(pickle.loads(pickle.dumps(part)))
    found = merged.result()
    assert found.samples == whole.samples
    for name in ("nonfinite", "coverage", "reliability", "calibration_error", "nll", "z_rms"):
        assert getattr(found.calibration, name) == getattr(whole.calibration, name), name
    # Sketches of the same values, so that ranks agree to twice what one of them is sure of.
    claims = np.array(found.calibration.claimed_error_quantiles_m)
    assert claims[49:] == pytest.approx(whole.calibration.claimed_error_quantiles_m[49:], rel=0.02)
    assert found.median_m == pytest.approx(whole.median_m, rel=0.02)


def test_draws_from_a_claim_follow_its_place_in_the_data():
    outputs, truth = answers(20)
    halves = slice(10), slice(10, 20)

    def read(*firsts):
        accumulator = UncertaintyAccumulator("ONNX", SIGNATURE)
        for part, first in zip(halves, firsts, strict=True):
            batch = {name: array[part] for name, array in outputs.items()}
            accumulator.update(batch, truth[part], first)
        return accumulator.result()

    assert read(0, 10) == assessed(outputs, truth)
    assert read(0, 0) != read(0, 10)
    # Far into the sequence is still within it.
    assert np.isfinite(read(10**11, 10**12).calibration.claimed_error_quantiles_m).all()


def test_pickled_size_hardly_grows_with_the_samples():
    sizes = []
    for count in (12_500, 125_000):
        accumulator = UncertaintyAccumulator("ONNX", SIGNATURE)
        accumulator.update(*answers(count), 0)
        sizes.append(len(pickle.dumps(accumulator)))
    assert sizes[1] < 2 * sizes[0] < 150_000


# --- The gate ---


def gate(count, covered, demand):
    truth = np.tile(PLACE, (count, 1))
    positions = truth.copy()
    positions[covered:] += 1
    outputs = {"positions": positions, "spread": np.full((count, 2), 0.1)}
    (found,) = coverage_gates((assessed(outputs, truth),), demand)
    return found


@pytest.mark.parametrize(
    ("count", "covered", "demand", "passes"),
    [
        (70, 63, 0.8, True),
        (200, 181, 0.85, True),
        (200, 160, 0.85, False),
        (2000, 1800, 0.9, False),
        (8, 8, 0.85, False),  # every one, but of eight: nothing is shown
        (1000, 1000, 0.99, True),
    ],
)
def test_what_is_demanded_must_be_shown(count, covered, demand, passes):
    found = gate(count, covered, demand)
    assert found.passed == passes
    assert found.measured == covered / count
    assert f"over {count} labelled samples" in found.detail
    assert ("too few" in found.detail) == (not found.passed and covered / count >= demand)


def test_nothing_is_demanded_by_default():
    assert coverage_gates((), ReleaseParameters().min_coverage) == ()


def test_a_demand_without_labels_or_deviations_fails_and_says_why():
    (unlabelled,) = coverage_gates((), 0.8)
    assert not unlabelled.passed
    assert "no true positions" in unlabelled.detail
    outputs, truth = answers(50)
    bare = assessed(outputs, truth, signature=Signature((SIGNAL,), (POSITIONS,)))
    (silent,) = coverage_gates((bare,), 0.8)
    assert not silent.passed
    assert "sigma_of" in silent.detail


def test_the_gate_judges_onnx_and_names_what_is_unusable():
    outputs, truth = answers(400, claimed=3)
    honest = assessed(outputs, truth, who="PyTorch")
    broken = outputs | {"spread": np.full((400, 2), np.nan)}
    (found,) = coverage_gates((honest, assessed(broken, truth)), 0.5)
    assert (found.passed, found.measured) == (False, 0.0)
    assert "400 of them" in found.detail


# --- In the comparison ---


@pytest.fixture(scope="module")
def ensemble():
    """Two members, the second of which is a degree off."""
    model = Ensemble("models:SmallNet", [{}, {}])
    with torch.no_grad():
        model.members[1].position_head.bias += 1.0
    return model


@pytest.fixture(scope="module")
def data(ensemble):
    """Around the first member's own answers, with half of the deviation that it claims."""
    inputs = generic_inputs(SIGNATURE, 60)
    with torch.no_grad():
        positions, spread = ensemble.members[0](torch.from_numpy(inputs["signal"]))
    noise = np.random.default_rng(1).standard_normal((60, 2))
    truth = positions.numpy() + 0.5 * spread.numpy() * noise
    return EvaluationData(inputs, truth, {}, "test.npz", "0" * 64, {})


@pytest.fixture(scope="module")
def parity(ensemble, data, tmp_path_factory):
    path = tmp_path_factory.mktemp("uncertainty") / "model.onnx"
    export_model(ensemble, path, signature=ensemble.signature, opset=14)
    return compare_outputs(ensemble, path, data, ensemble.signature)


def test_comparison_assesses_both_models_on_every_sample(parity, data, ensemble):
    pytorch, onnx = parity.uncertainty
    assert [r.who for r in parity.uncertainty] == ["PyTorch", "ONNX"]
    assert pytorch.samples == onnx.samples == data.count
    with torch.no_grad():
        positions, spread, *_ = ensemble(torch.from_numpy(data.inputs["signal"]))
    outputs = {"positions": positions.numpy(), "spread": spread.numpy()}
    alone = assessed(outputs, data.positions, who="PyTorch")
    # Batches of another size round otherwise.
    assert pytorch.median_m == pytest.approx(alone.median_m, rel=1e-4)
    assert pytorch.calibration.nll == pytest.approx(alone.calibration.nll, rel=1e-4)
    assert onnx.calibration.nll == pytest.approx(pytorch.calibration.nll, rel=1e-4)
    task = {task.who: task for task in parity.ground.task}
    assert (task["ONNX"].median_m, task["ONNX"].p95_m) == (onnx.median_m, onnx.p95_m)


def test_members_are_assessed_alone(ensemble, data, parity):
    first, second = assess_members(ensemble, data, SIGNATURE)
    assert (first.who, second.who) == ("member 1", "member 2")
    assert first.calibration.coverage_of(0.9).observed > 0.97
    assert second.calibration.coverage_of(0.9).observed < 0.6
    assert first.median_m < parity.uncertainty[0].median_m < second.median_m
    text = tables.uncertainty_table(parity, (first, second)).data
    rows = [line.split(" | ")[0].strip("| ") for line in text.splitlines()[2:]]
    assert rows == ["PyTorch", "ONNX", "member 1", "member 2", "always the middle"]
    assert {line.count("|") for line in text.splitlines()} == {text.splitlines()[0].count("|")}


def test_without_members_or_labels_there_are_no_members_reports(ensemble, data):
    assert assess_members(SmallNet(), data, SIGNATURE) is None
    assert assess_members(ensemble, replace(data, positions=None), SIGNATURE) is None
    bare = Signature((SIGNAL,), (TensorSpec("y", "float32", ("batch", 2)),))
    assert assess_members(ensemble, data, bare) is None


class PartsOfItsOwn(SmallNet):
    """No ensemble, though its parts are called as an ensemble's."""

    def __init__(self):
        super().__init__()
        self.members = nn.ModuleList([nn.Linear(2, 2)])


def test_model_whose_parts_are_called_members_is_no_ensemble(data):
    assert assess_members(PartsOfItsOwn(), data, SIGNATURE) is None


def test_release_demands_coverage_and_records_it(parity):
    info = SimpleNamespace(opset_version=20, signature_problems=())
    demanded = decide(ReleaseParameters(min_coverage=0.999), info, parity)
    (failed,) = demanded.failed_gates
    assert failed.name == "coverage of the 90% ellipse"
    assert decide(ReleaseParameters(), info, parity).passed
    recorded = records.record().model_copy(update={"parity": parity}).to_json()
    (_, onnx) = recorded["parity"]["uncertainty"]
    assert onnx["calibration"]["coverage"][1]["observed"] == failed.measured
    json.dumps(recorded, allow_nan=False)
    side = SimpleNamespace(median_ms=1.0, peak_memory_bytes=1)
    speedup = SimpleNamespace(ratio=1.0, low=1.0, high=1.0)
    latency = SimpleNamespace(speedup=speedup, pytorch=side, onnx=side)
    metrics = summarize_metrics(parity, latency)
    assert metrics["coverage_90_onnx"] == failed.measured
    assert metrics["nll_onnx"] == parity.uncertainty[1].calibration.nll
    assert metrics["sharpness_pytorch_m"] > 0


def test_table_without_true_positions_says_so():
    without = SimpleNamespace(ground=None, uncertainty=())
    assert "not known" in tables.uncertainty_table(without).data


def test_unusable_answers_are_counted_under_the_table():
    outputs, truth = answers(30)
    outputs["spread"][:2] = np.nan
    silent = Signature((SIGNAL,), (replace(POSITIONS, unit=DEGREES),))
    report = SimpleNamespace(
        ground=None,
        uncertainty=(assessed(outputs, truth), assessed(outputs, truth, signature=silent)),
    )
    text = tables.uncertainty_table(report).data
    assert "2 of 30 samples have no usable" in text
    assert "none predicted" in text
