import pickle

import numpy as np
import pytest

from heimdall_onnx.common.errors import DataError
from heimdall_onnx.common.parameters import Quality
from heimdall_onnx.evidence.quality.contract import Scores, judge_quality
from heimdall_onnx.evidence.quality.metric import metrics_for
from heimdall_onnx.model.signature import DEGREES, Signature, TensorSpec

X = (TensorSpec("x", "float32", ("batch", 3)),)
LOGITS = Signature(X, (TensorSpec("logits", "float32", ("batch", 3)),))
PLACES = Signature(X, (TensorSpec("place", "float32", ("batch", 2), unit=DEGREES),))


def judged(spec, reference, found, labels, *, signature=LOGITS, weights=None, groups=None, **rest):
    name = "positions" if spec == "localization" else "labels"
    (metric,) = metrics_for(spec, signature, {name: labels})
    output, truth = signature.outputs[0].name, {name: labels}
    scores = Scores.of(metric, {output: reference}, {output: found}, truth)
    every = np.arange(len(labels))
    return judge_quality(metric, scores.beside(every, weights, groups), Quality(**rest))


def decided(count, wrong=0, *, lost=0, gained=0):
    """Logits of two models, of which the other one loses and gains some decisions."""
    labels = np.arange(count) % 3
    right = np.eye(3, dtype=np.float32)
    reference, found = right[labels], right[labels]
    off = right[(labels + 1) % 3]
    reference[: wrong + gained] = off[: wrong + gained]
    found[:wrong] = off[:wrong]
    found[-lost or count :] = off[-lost or count :]
    return reference, found, labels


def test_the_three_outcomes_are_told_apart():
    good = judged("top1", *decided(2000, 100, lost=1, gained=2))
    bad = judged("top1", *decided(2000, 100, lost=200))
    few = judged("top1", *decided(30))
    assert (good.outcome, bad.outcome, few.outcome) == ("shown", "worse", "not shown")
    assert (good.reference, good.value) == (pytest.approx(0.949), pytest.approx(0.9495))
    assert few.missing == f"not shown: about {few.needed:,} samples as these would show it"
    assert judged("top1", *decided(few.needed)).outcome == "shown"
    assert bad.missing == ""
    assert (
        good.headline == f"top1 is 0.9495, PyTorch's 0.949: at most {good.said(good.high)} is lost"
    )
    assert few.headline.endswith(few.missing)
    assert bad.headline.endswith(f"at least {bad.said(bad.low)} is lost")


@pytest.mark.parametrize("binding", [True, False])
def test_what_is_not_shown_passes_where_nobody_is_bound(binding):
    gate = judged("top1", *decided(30), binding=binding).gate
    assert gate.undecided
    assert gate.passed == (not binding)
    assert gate.result == ("NOT SHOWN" if binding else "not shown")
    worse = judged("top1", *decided(2000, lost=200), binding=binding).gate
    assert (worse.passed, worse.undecided, worse.result) == (False, False, "FAIL")


def test_the_confidence_is_what_several_attempts_leave():
    (metric,) = metrics_for("top1", LOGITS, {"labels": np.zeros(1)})
    reference, found, labels = decided(1000, lost=3)
    scores = Scores.of(metric, {"logits": reference}, {"logits": found}, {"labels": labels})
    alone, shared = (judge_quality(metric, scores, Quality(), share) for share in (1.0, 0.1))
    assert shared.confidence == pytest.approx(0.995)
    assert alone.high < shared.high
    assert alone.loss == shared.loss


def test_groups_are_taken_whole_and_weights_weigh():
    reference, found, labels = decided(900, lost=9)
    alone = judged("top1", reference, found, labels)
    events = judged("top1", reference, found, labels, groups=np.arange(900) // 30)
    assert (alone.groups, events.groups, events.grouped) == (900, 30, " in 30 groups")
    assert alone.high < events.high
    heavy = np.ones(900)
    heavy[-9:] = 5
    assert judged("top1", reference, found, labels, weights=heavy).loss > alone.loss


def test_localization_is_a_metric_as_others_are():
    rng = np.random.default_rng(0)
    truth = rng.uniform((45, 5), (50, 12), (500, 2))
    reference = truth + rng.normal(size=(500, 2))
    same = judged("localization", reference, reference, truth, signature=PLACES)
    assert (same.outcome, same.loss, same.relative) == ("shown", 0.0, True)
    off = truth + 1.5 * (reference - truth)
    worse = judged("localization", reference, off, truth, signature=PLACES)
    assert worse.outcome == "worse"
    assert worse.loss == pytest.approx(0.5, abs=0.02)
    assert worse.gate.detail.startswith("localization")


def test_the_order_of_all_answers_is_judged_by_folds():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 3, 400)
    logits = rng.normal(size=(400, 3)) + np.eye(3)[labels]
    close = judged("auroc", logits, logits + 1e-4 * rng.normal(size=(400, 3)), labels)
    noisy = judged("auroc", logits, logits + 3 * rng.normal(size=(400, 3)), labels)
    assert (close.outcome, noisy.outcome) == ("shown", "worse")
    assert "jackknife" in close.method


def test_one_answer_that_is_no_number_is_an_infinite_loss():
    labels = np.linspace(0, 1, 100)[:, None].repeat(3, axis=1)
    found = labels.copy()
    found[7, 0] = np.nan
    lost = judged("rmse", labels + 0.1, found, labels)
    assert (lost.outcome, lost.loss, lost.needed) == ("worse", np.inf, None)
    assert lost.headline.endswith("1 sample without a finite value")
    # What the reference has no number for either says nothing.
    both = judged("rmse", found, found, labels)
    assert (both.outcome, both.samples) == ("shown", 99)


def test_what_is_no_number_in_both_is_not_worse():
    labels = np.zeros((40, 3))
    nothing = np.full((40, 3), np.nan)
    found = judged("rmse", nothing, nothing, labels)
    assert (found.outcome, found.samples, found.needed) == ("not shown", 0, None)
    assert found.gate.passed


def test_batches_make_what_all_samples_at_once_make():
    (metric,) = metrics_for("top1", LOGITS, {"labels": np.zeros(1)})
    reference, found, labels = decided(100, 20, lost=3, gained=2)
    parts = [
        Scores.of(metric, {"logits": reference[p]}, {"logits": found[p]}, {"labels": labels[p]})
        for p in (slice(0, 33), slice(33, 100))
    ]
    joined = Scores.joined([pickle.loads(pickle.dumps(part)) for part in parts])
    assert judge_quality(metric, joined, Quality()) == judged("top1", reference, found, labels)


def test_a_ranked_metric_refuses_weights_that_it_can_not_take():
    labels = np.arange(60) % 3
    logits = np.eye(3)[labels]
    with pytest.raises(DataError, match="auroc does not weigh samples"):
        judged("auroc", logits, logits, labels, weights=np.ones(60))
