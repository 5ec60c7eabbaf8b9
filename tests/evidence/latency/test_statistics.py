"""MLPerf's estimate of a percentile, against LoadGen's own logs and against chance."""

import numpy as np
import pytest
from scipy.special import betainc

from heimdall_onnx.evidence.latency.statistics import (
    EarlyStopping,
    check_stationarity,
    early_stopping_estimate,
    min_queries,
    offline_throughput,
)


def ranks(count):
    """Latencies whose value is their rank, in a fixed random order."""
    return np.random.default_rng(0).permutation(np.arange(1.0, count + 1))


@pytest.mark.parametrize(
    ("queries", "discarded"),
    # "Processed at least 64 queries (...). Would discard ... highest latency queries." in the
    # summaries that LoadGen wrote for published runs of the single-stream scenario.
    [
        (100, 2),
        (201, 9),
        (659, 47),
        (708, 51),
        (2_048, 172),
        (2_116, 178),
        (2_145, 181),
        (7_469, 685),
        (79_944, 7_796),
        (4_776_846, 476_158),
    ],
)
def test_discards_as_many_queries_as_loadgen(queries, discarded):
    found = early_stopping_estimate(np.arange(1.0, queries + 1))
    assert found.discarded == discarded
    assert found.value_ms == queries - discarded


def test_reports_the_slowest_of_the_queries_that_are_left():
    found = early_stopping_estimate(ranks(200))
    assert found == EarlyStopping(
        percentile=90.0,
        value_ms=191.0,
        confidence=0.99,
        queries=200,
        overlatency=10,
        min_queries=64,
    )


def test_too_few_queries_give_no_estimate():
    # 64 and 662 are what LoadGen says it needs at least.
    assert [min_queries(percentile) for percentile in (90, 95, 99)] == [64, 130, 662]
    assert early_stopping_estimate(ranks(63)) is None
    least = early_stopping_estimate(ranks(64))
    assert (least.discarded, least.value_ms, least.min_queries) == (0, 64, 64)
    assert early_stopping_estimate(np.array([])) is None


def test_overlatency_is_the_largest_that_meets_the_condition_of_the_rules():
    for queries in range(64, 1500, 7):
        t = early_stopping_estimate(ranks(queries)).overlatency
        assert betainc(queries - t, t + 1, 0.9) < 0.01
        assert betainc(queries - t - 1, t + 2, 0.9) >= 0.01


def test_true_percentile_is_above_the_estimate_in_less_than_one_of_a_hundred_runs():
    rng = np.random.default_rng(1)
    true_p90 = np.log(10)
    estimates = np.array(
        [early_stopping_estimate(rng.exponential(size=200)).value_ms for _ in range(3000)]
    )
    assert (estimates < true_p90).mean() < 0.01
    # It is a bound, but no idle one: half of the runs stay below the 96th percentile.
    assert np.median(estimates) < np.log(25)


def test_more_queries_come_nearer_to_the_percentile_from_above():
    above = [
        early_stopping_estimate(ranks(count)).value_ms / count for count in (64, 200, 1000, 24_576)
    ]
    assert above == sorted(above, reverse=True)
    assert 0.9 < above[-1] < 0.905


def test_samples_are_left_as_they_were():
    samples = ranks(100)
    early_stopping_estimate(samples)
    np.testing.assert_array_equal(samples, ranks(100))


def test_throughput_is_of_the_median_call_with_the_interval_of_the_median():
    found = offline_throughput(np.arange(10.0, 110.0, 10.0), 8)
    assert (found.batch_size, found.calls, found.confidence) == (8, 10, 0.95)
    assert found.samples_per_second == pytest.approx(8 / 0.055)
    # Of ten values, the second and the ninth bound the median with 97.9%; the next with 89.1%.
    assert (found.low, found.high) == pytest.approx((8 / 0.090, 8 / 0.020))
    assert found.overall == pytest.approx(80 / 0.55)


def test_slow_calls_cost_overall_throughput_but_not_that_of_the_median_call():
    found = offline_throughput(np.array([10.0] * 9 + [110.0]), 1)
    assert found.samples_per_second == pytest.approx(100)
    assert found.overall == pytest.approx(50)


@pytest.mark.parametrize("calls", [1, 2, 5])
def test_interval_of_few_calls_is_their_whole_range(calls):
    found = offline_throughput(10.0 * np.arange(1.0, calls + 1), 4)
    assert (found.low, found.high) == pytest.approx((400 / calls, 400))
    assert found.low <= found.samples_per_second <= found.high


def stationarity(samples):
    """That of calls each of which is a block of its own."""
    return check_stationarity(samples, np.arange(samples.size))


def levels(*levels_ms, calls=20):
    """Windows of calls around one level each; every window's median is its level."""
    noise = np.linspace(-0.01, 0.01, calls + 1 - calls % 2)[:calls]
    noise -= np.median(noise)
    return np.concatenate([level * (1 + noise) for level in levels_ms])


def test_steady_machine_holds():
    found = stationarity(levels(10, 10.1, 10, 10.2, 9.9))
    assert found.medians_ms == pytest.approx((10, 10.1, 10, 10.2, 9.9))
    assert found.spread == pytest.approx(0.03)
    assert found.holds
    assert found.sentence == "the last three windows agree within 3.0%"


def test_drift_does_not_hold():
    found = stationarity(levels(10, 10, 10, 11, 12))
    assert found.spread == pytest.approx(2 / 11)
    assert not found.holds
    assert found.sentence == (
        "the machine was not stationary: the medians of the last three windows, 10, 11 and 12 ms, "
        "are 18.2% apart (limit 10%)"
    )


def test_slow_start_is_said_but_forgiven():
    found = stationarity(levels(15, 10, 10, 10, 10))
    assert found.holds
    assert found.early == pytest.approx(0.5)
    assert found.sentence == (
        "the last three windows agree within 0.0%, but earlier ones are up to 50.0% off"
    )


@pytest.mark.parametrize(("last", "holds"), [(10.99, True), (11.01, False), (9.01, True)])
def test_limit_is_a_tenth_of_the_median(last, holds):
    assert stationarity(levels(10, 10, 10, 10, last)).holds is holds


def test_few_slow_calls_decide_nothing():
    samples = levels(10, 10, 10, 10, 10)
    samples[::10] *= 20
    assert stationarity(samples).holds


def test_order_of_time_matters():
    samples = levels(10, 10, 10, 11.5, 13)
    shuffled = np.random.default_rng(0).permutation(samples)
    assert not stationarity(samples).holds
    assert stationarity(shuffled).spread < stationarity(samples).spread


def test_no_window_ends_within_a_block():
    # Nine blocks of ten calls, each at a level of its own: windows of two blocks, the last of one.
    samples = np.repeat(np.arange(1.0, 10.0), 10)
    blocks = np.repeat(np.arange(9), 10)
    assert check_stationarity(samples, blocks).medians_ms == (1.5, 3.5, 5.5, 7.5, 9)
    # Without them the last window would begin within a block.
    assert stationarity(samples).medians_ms == pytest.approx((1.5, 3, 5, 7, 8.5), abs=0.5)


def test_fewer_calls_make_fewer_windows_and_too_few_none():
    assert len(stationarity(np.ones(1000)).medians_ms) == 5
    assert len(stationarity(np.ones(49)).medians_ms) == 4
    assert len(stationarity(np.ones(30)).medians_ms) == 3
    assert stationarity(np.ones(29)) is None
    assert stationarity(np.array([])) is None
    assert check_stationarity(np.ones(100), np.repeat([0, 1], 50)) is None


def test_three_windows_have_no_earlier_one():
    found = stationarity(levels(10, 10, 10, calls=10))
    assert (len(found.medians_ms), found.early, found.holds) == (3, 0, True)
