import math

import numpy as np
import pytest
from scipy import stats

from heimdall_onnx.evidence.quality.intervals import jackknifed, paired_proportions, resampled


def counted(worse, better, samples, *, max_loss=0.01, confidence=0.95):
    lost, gained = np.zeros(samples), np.zeros(samples)
    lost[:worse], gained[worse : worse + better] = 1, 1
    return paired_proportions(lost, gained, np.ones(samples), max_loss, confidence)


def test_without_a_discordant_sample_the_end_is_that_of_the_rule_of_three():
    found = counted(0, 0, 300)
    assert found.loss == 0
    # The largest rate of which none is seen in 300 with a chance of one in twenty.
    assert found.high == pytest.approx(1 - 0.05 ** (1 / 300), abs=3e-5)
    assert found.low == -found.high


def test_ends_are_exact_where_every_outcome_is_counted():
    # Of all outcomes of 12 samples with these rates, those whose upper end is below the true loss.
    n, lost, gained = 12, 0.4, 0.1
    missed = 0.0
    for b in range(n + 1):
        for c in range(n + 1 - b):
            chance = stats.multinomial.pmf([b, c, n - b - c], n, [lost, gained, 1 - lost - gained])
            if chance > 1e-7 and counted(b, c, n).high <= lost - gained:
                missed += chance
    assert 0.02 < missed <= 0.05


def test_more_discordant_samples_are_more_loss_and_more_doubt():
    one, two, wide = counted(3, 0, 500), counted(6, 0, 500), counted(23, 20, 500)
    assert one.high < two.high
    assert one.loss == wide.loss == 3 / 500
    assert wide.low < one.low < one.high < wide.high


def test_the_number_of_samples_that_would_show_it_does():
    found = counted(2, 2, 200)
    assert found.high > 0.01
    many = math.ceil(found.times)
    assert counted(2 * many, 2 * many, 200 * many).high <= 0.0103
    assert counted(4, 0, 200).times == math.inf


def test_samples_of_one_group_are_no_evidence_twice():
    groups = 60
    alone = counted(0, 0, groups)
    none, sizes = np.zeros(groups), np.full(groups, 10.0)
    assert paired_proportions(none, none, sizes, 0.01, 0.95).high == pytest.approx(alone.high)
    # Losses that come in bursts tell less than as many that don't.
    spread, burst = none.copy(), none.copy()
    spread[:20], burst[:2] = 1, 10
    ends = [paired_proportions(lost, none, sizes, 0.01, 0.95).high for lost in (spread, burst)]
    assert counted(20, 0, 600).high <= ends[0] < ends[1]


def test_equal_weights_weigh_as_none():
    lost = np.zeros(400)
    lost[:5] = 1
    even = paired_proportions(lost, np.zeros(400), np.ones(400), 0.01, 0.95)
    halved = paired_proportions(lost / 2, np.zeros(400), np.full(400, 0.5), 0.01, 0.95)
    assert halved.loss == even.loss
    assert halved.high >= even.high


@pytest.mark.parametrize("groups", [40, 400])
def test_bootstrap_and_jackknife_agree_with_the_error_of_a_mean(groups):
    values = np.random.default_rng(3).normal(size=groups)
    error = values.std(ddof=1) / math.sqrt(groups)
    by_draws = resampled(lambda drawn: drawn @ values / drawn.sum(axis=1), groups, 1.0, 0.95)
    by_folds = jackknifed(lambda kept: float(values[kept].mean()), groups, 1.0, 0.95)
    for found in (by_draws, by_folds):
        assert found.loss == pytest.approx(values.mean())
        assert (found.high - found.low) / 2 == pytest.approx(2 * error, rel=0.2)
    assert by_draws == resampled(
        lambda drawn: drawn @ values / drawn.sum(axis=1), groups, 1.0, 0.95
    )


def test_few_groups_are_never_enough_whatever_the_interval_says():
    found = resampled(lambda drawn: np.zeros(len(drawn)), 10, 0.01, 0.95)
    assert (found.low, found.high) == (0, 0)
    assert found.times == 3
