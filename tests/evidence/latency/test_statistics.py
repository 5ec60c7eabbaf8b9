"""Percentiles, throughput and steadiness of latencies, against chance."""

import numpy as np
import pytest

from heimdall_onnx.evidence.latency.statistics import (
    check_stationarity,
    min_queries,
    offline_throughput,
)


def test_percentiles_need_as_many_calls_as_loadgen_says():
    assert [min_queries(percentile) for percentile in (90, 95, 99)] == [64, 130, 662]


def test_throughput_is_of_the_median_call_with_the_interval_of_the_median():
    found = offline_throughput(np.arange(10.0, 110.0, 10.0), 8)
    assert found.batch_size == 8
    assert found.samples_per_second == pytest.approx(8 / 0.055)
    # Of ten values, the second and the ninth bound the median with 97.9%; the next with 89.1%.
    assert (found.low, found.high) == pytest.approx((8 / 0.090, 8 / 0.020))


def test_a_slow_call_does_not_cost_the_throughput_of_the_median_call():
    found = offline_throughput(np.array([10.0] * 9 + [110.0]), 1)
    assert found.samples_per_second == pytest.approx(100)


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
