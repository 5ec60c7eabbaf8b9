import gc
import math
import pickle
import subprocess
import sys
import tracemalloc
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from parts import partings, rank_bounds, read_in_parts
from pydantic import TypeAdapter

from heimdall_onnx.common.errors import InputError
from heimdall_onnx.evidence.parity.ground import GroundAccumulator
from heimdall_onnx.evidence.parity.statistics import (
    WORST_SAMPLES,
    ErrorAccumulator,
    ErrorStatistics,
    ExactSums,
    Quantiles,
)
from heimdall_onnx.evidence.parity.tolerance import Limit
from heimdall_onnx.model.signature import TensorSpec

SPEC = TensorSpec("positions", "float32", ("batch", 2), unit="metres")
ATOL, RTOL = 1e-5, 1.3e-6
FLOATS = st.floats(-1e6, 1e6, width=32)
# Every kind of number, and pairs of rows among which many are equally bad.
ANY = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan]),
    st.floats(width=32),
)


def collect(reference, value, sizes=None, spec=SPEC):
    accumulator = ErrorAccumulator(spec, Limit(ATOL, RTOL))
    start = 0
    for size in sizes or [len(reference)]:
        part = slice(start, start + size)
        accumulator.update(reference[part], value[part], start)
        start += size
    return accumulator.result()


def pair(count=100, error=1e-5, seed=0):
    rng = np.random.default_rng(seed)
    reference = rng.standard_normal((count, 2)).astype(np.float32)
    noise = rng.standard_normal((count, 2)) * error
    return reference, (reference + noise).astype(np.float32)


def order_statistic(values, rank):
    ordered = np.sort(values.astype(np.float32).ravel())
    return ordered[min(math.floor(rank * ordered.size + 1e-9), ordered.size - 1)]


def test_every_statistic_is_what_numpy_finds_on_the_whole_data():
    reference, value = pair()
    found = collect(reference, value, [7] * 14 + [2])
    a, b = reference.astype(np.float64), value.astype(np.float64)
    error = np.abs(a - b)
    ulps = error / np.spacing(np.abs(reference)).astype(np.float64)
    assert (found.output, found.unit, found.count) == ("positions", "metres", 200)
    assert found.mean == pytest.approx(error.mean(), rel=1e-12)
    assert found.maximum == error.max()
    assert found.violations == (error > ATOL + RTOL * np.abs(a)).sum() > 0
    assert found.nonfinite_mismatches == found.nonfinite == 0
    assert (found.lowest, found.highest) == (b.min(), b.max())
    cosine = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
    assert found.cosine == pytest.approx(cosine, rel=1e-12)
    # Up to some hundred values nothing is thrown away, so these are order statistics exactly.
    assert found.p50 == order_statistic(error, 0.5)
    assert found.p99 == order_statistic(error, 0.99)
    assert found.p999 == order_statistic(error, 0.999)
    assert found.ulp_p50 == order_statistic(ulps, 0.5)
    assert found.ulp_p999 == order_statistic(ulps, 0.999)


def test_error_that_is_exactly_allowed_is_no_violation():
    spec = TensorSpec("y", "float64", ("batch",))
    at_limit = ATOL + RTOL * 2.0
    accumulator = ErrorAccumulator(spec, Limit(at_limit, 0))
    zero = np.zeros(2)
    accumulator.update(zero, np.array([at_limit, np.nextafter(at_limit, 1)]), 0)
    assert accumulator.result().violations == 1


@pytest.mark.parametrize(("reference", "value", "violations"), [(2.0, 1.0, 0), (1.0, 2.0, 1)])
def test_tolerance_grows_with_the_reference_not_with_the_value(reference, value, violations):
    accumulator = ErrorAccumulator(TensorSpec("y", "float64", ("batch",)), Limit(0, 0.5))
    accumulator.update(np.array([reference]), np.array([value]), 0)
    assert accumulator.result().violations == violations


@given(
    data=hnp.arrays(np.float32, st.tuples(st.integers(1, 60), st.just(4)), elements=FLOATS),
    cuts=st.lists(st.integers(1, 10), min_size=60, max_size=60),
)
def test_splitting_into_batches_changes_nothing(data, cuts):
    reference, value = data[:, :2], data[:, 2:]
    sizes, left = [], len(data)
    for cut in cuts:
        sizes.append(min(cut, left))
        left -= sizes[-1]
        if not left:
            break
    whole, parts = collect(reference, value), collect(reference, value, sizes)
    assert repr(parts) == repr(whole)


def test_order_of_batches_does_not_matter():
    reference, value = pair(64)
    forward, backward = (ErrorAccumulator(SPEC, Limit(ATOL, RTOL)) for _ in range(2))
    starts = range(0, 64, 8)
    for accumulator, order in ((forward, starts), (backward, reversed(starts))):
        for start in order:
            part = slice(start, start + 8)
            accumulator.update(reference[part], value[part], start)
    assert backward.result() == forward.result()


def test_quantiles_of_a_million_values_are_as_close_as_promised():
    values = np.abs(np.random.default_rng(0).standard_normal(1_000_000)).astype(np.float32)
    quantiles = Quantiles()
    for part in np.array_split(values, 100):
        quantiles.update(part)
    for rank in (0.5, 0.9, 0.99, 0.999):
        true = (values < quantiles(rank)).mean()
        assert abs(true - rank) <= 0.02 * (1 - rank), rank


def test_memory_does_not_grow_with_the_number_of_samples():
    accumulator = ErrorAccumulator(SPEC, Limit(ATOL, RTOL))
    reference, value = pair(1000)
    pickled, sizes = [], []
    tracemalloc.start()
    try:
        for part in range(40):
            accumulator.update(reference, value + np.float32(part * 1e-7), part * 1000)
            if part in (3, 39):
                pickled.append(len(pickle.dumps(accumulator)))
                gc.collect()
                sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert accumulator.result().count == 80_000
    assert pickled[1] < 3 * pickled[0] < 200_000
    # Other threads of the process allocate too; to keep the errors would take ten times this.
    assert sizes[1] - sizes[0] < 36 * reference.nbytes / 10
    assert len(accumulator.result().worst) == WORST_SAMPLES


def test_nan_on_both_sides_is_agreement():
    reference, value = pair(10, error=0)
    reference[3, 1] = value[3, 1] = np.nan
    found = collect(reference, value)
    assert (found.nonfinite_mismatches, found.violations, found.nonfinite) == (0, 0, 1)
    assert (found.count, found.mean, found.maximum) == (20, 0, 0)
    assert np.isfinite(found.cosine)


def test_mean_is_taken_over_the_elements_that_can_be_compared():
    reference, value = pair(10, error=1e-3)
    reference[:5] = value[:5] = np.nan
    error = np.abs(reference.astype(np.float64) - value)
    assert collect(reference, value).mean == pytest.approx(np.nanmean(error), rel=1e-12)


@pytest.mark.parametrize(
    ("reference", "value"),
    [
        (np.nan, 1.0),
        (1.0, np.nan),
        (np.inf, 1.0),
        (1.0, np.inf),
        (np.inf, -np.inf),
        (-np.inf, np.inf),
        (np.nan, np.inf),
        (np.inf, np.nan),
    ],
)
def test_nan_or_inf_that_differs_is_as_wrong_as_can_be(reference, value):
    a, b = pair(10, error=0)
    a[4, 0], b[4, 0] = reference, value
    found = collect(a, b)
    assert (found.nonfinite_mismatches, found.violations) == (1, 1)
    assert found.mean == found.maximum == np.inf
    assert (found.worst[0].sample, found.worst[0].error) == (4, np.inf)
    assert found.nonfinite == (not np.isfinite(value))


def test_inf_of_the_same_sign_is_agreement():
    a, b = pair(10, error=0)
    a[4] = b[4] = (np.inf, -np.inf)
    found = collect(a, b)
    assert (found.nonfinite_mismatches, found.violations, found.maximum) == (0, 0, 0)
    assert found.nonfinite == 2
    assert np.isfinite([found.lowest, found.highest]).all()


@pytest.mark.parametrize("shape", [(10, 3), (9, 2), (10,), (10, 2, 1)])
def test_wrong_shape_makes_every_element_a_mismatch(shape):
    found = collect(np.zeros((10, 2), np.float32), np.zeros(shape, np.float32))
    assert found.nonfinite_mismatches == found.count == 20
    assert not found.mean <= 1e-5


def test_one_batch_of_wrong_shape_spoils_a_good_rest():
    accumulator = ErrorAccumulator(SPEC, Limit(ATOL, RTOL))
    reference, _ = pair(8)
    accumulator.update(reference, reference, 0)
    accumulator.update(reference, reference[:4], 8)
    found = accumulator.result()
    assert (found.mean, found.maximum, found.nonfinite_mismatches) == (np.inf, np.inf, 16)


def test_equal_outputs_have_no_error_at_all():
    reference, _ = pair()
    found = collect(reference, reference.copy())
    zeros = (found.mean, found.maximum, found.p50, found.p999, found.ulp_p50, found.ulp_p999)
    assert zeros == (0,) * 6
    assert found.violations == 0
    assert found.cosine == pytest.approx(1, rel=1e-15)


def test_nothing_to_compare_is_not_agreement():
    found = ErrorAccumulator(SPEC, Limit(ATOL, RTOL)).result()
    assert (found.count, found.worst) == (0, ())
    assert np.isnan([found.mean, found.maximum, found.p50, found.ulp_p50, found.cosine]).all()


def test_empty_batch_adds_nothing():
    reference, value = pair(8)
    accumulator = ErrorAccumulator(SPEC, Limit(ATOL, RTOL))
    accumulator.update(reference[:0], value[:0], 0)
    accumulator.update(reference, value, 0)
    assert accumulator.result() == collect(reference, value)


def test_worst_samples_come_with_their_indices_and_values_the_worst_first():
    reference, _ = pair(100)
    value = reference.copy()
    planted = {93: 0.5, 2: 0.4, 55: 0.3, 54: 0.2}
    for sample, error in planted.items():
        value[sample, sample % 2] += np.float32(error)
    found = collect(reference, value, [10] * 10).worst
    assert len(found) == WORST_SAMPLES
    assert [w.sample for w in found[:4]] == list(planted)
    for worst in found:
        assert worst.reference == tuple(map(float, reference[worst.sample]))
        assert worst.value == tuple(map(float, value[worst.sample]))
        error = np.abs(value[worst.sample].astype(float) - reference[worst.sample])
        excess = error / (ATOL + RTOL * np.abs(reference[worst.sample].astype(float)))
        assert (worst.error, worst.excess) == (error[excess.argmax()], excess.max())


def test_samples_are_ranked_by_the_share_of_what_is_allowed():
    reference = np.array([[1e6, 0.0]] * 2 * WORST_SAMPLES, np.float32)
    value = reference.copy()
    value[: WORST_SAMPLES + 1, 0] += 0.25
    value[-3, 1] += np.float32(1e-4)
    found = collect(reference, value).worst
    assert [w.sample for w in found] == [len(value) - 3, *range(WORST_SAMPLES - 1)]
    assert (found[0].element, found[1].element) == (1, 0)


def test_where_nothing_is_allowed_the_largest_error_is_the_worst():
    reference = np.zeros((4, 2), np.float32)
    value = np.array([[0, 1], [3, 2], [0, 0], [1, 2]], np.float32)
    accumulator = ErrorAccumulator(SPEC, Limit(0.0, 0.0))
    accumulator.update(reference, value, 0)
    found = accumulator.result().worst
    assert [(w.sample, w.element, w.error) for w in found] == [
        (1, 0, 3.0),
        (3, 1, 2.0),
        (0, 1, 1.0),
        (2, 0, 0.0),
    ]


@pytest.mark.parametrize("sizes", [[20], [3, 17], [17, 3], [1] * 20])
def test_of_equally_bad_samples_the_first_are_kept(sizes):
    zeros = np.zeros((20, 2), np.float32)
    samples = [w.sample for w in collect(zeros, zeros, sizes).worst]
    assert samples == list(range(WORST_SAMPLES))


def test_a_constant_error_of_one_ulp_is_one_ulp():
    reference, _ = pair()
    found = collect(reference, np.nextafter(reference, np.float32(np.inf)))
    assert found.ulp_p50 == found.ulp_p999 == 1


def test_ulps_are_the_references():
    below = np.nextafter(np.float32(1), np.float32(0))
    spec = TensorSpec("y", "float32", ("batch",))
    assert collect(np.ones(1, np.float32), np.array([below]), spec=spec).ulp_p50 == 0.5


def test_error_next_to_zero_is_an_infinity_of_ulps_without_a_warning():
    found = collect(np.zeros((4, 2), np.float32), np.full((4, 2), 1e-6, np.float32))
    assert (found.ulp_p50, found.violations) == (np.inf, 0)


def test_integer_outputs_are_compared_without_ulps():
    spec = TensorSpec("level", "int64", ("batch", 2))
    reference = np.arange(20).reshape(10, 2)
    value = reference.copy()
    value[7, 1] += 3
    found = collect(reference, value, spec=spec)
    assert (found.violations, found.maximum, found.mean) == (1, 3, 3 / 20)
    assert (found.lowest, found.highest) == (0, 19)
    assert np.isnan([found.ulp_p50, found.ulp_p999]).all()


def test_sample_of_many_elements_shows_its_first_eight():
    reference = np.zeros((2, 5, 5), np.float32)
    found = collect(reference, reference + 1)
    assert [len(w.reference) for w in found.worst] == [8, 8]


def test_scalar_per_sample_is_compared_too():
    found = collect(np.zeros(3, np.float32), np.array([0, 0, 2], np.float32))
    assert (found.worst[0].sample, found.maximum, found.count) == (2, 2, 3)


def test_cosine_of_opposite_outputs_is_minus_one():
    reference, _ = pair()
    assert collect(reference, -reference).cosine == pytest.approx(-1, rel=1e-12)


def test_summary_holds_scalars_only():
    summary = TypeAdapter(ErrorStatistics).dump_python(collect(*pair()))
    assert all(isinstance(v, float | int | str) for v in summary.values())
    assert {"mean", "maximum", "violations", "p999"} <= set(summary)


def test_quantiles_leave_nan_out():
    quantiles = Quantiles()
    assert np.isnan(quantiles(0.5))
    quantiles.update(np.array([np.nan, 1.0, np.nan]))
    assert (quantiles(0), quantiles(0.5), quantiles(1)) == (1, 1, 1)


# --- In parts ---


def accumulate(count, *, seed=0, first=0):
    accumulator = ErrorAccumulator(SPEC, Limit(ATOL, RTOL))
    accumulator.update(*pair(count, seed=seed), first)
    return accumulator


@settings(deadline=None)
@given(
    data=st.data(),
    rows=hnp.arrays(np.float32, st.tuples(st.integers(1, 40), st.just(4)), elements=ANY),
)
def test_parts_merged_in_any_order_are_the_whole(data, rows):
    reference, value = rows[:, :2], rows[:, 2:]
    found = read_in_parts(
        lambda: ErrorAccumulator(SPEC, Limit(ATOL, RTOL)),
        lambda accumulator, part: accumulator.update(reference[part], value[part], part.start),
        data.draw(partings(len(rows))),
    )
    assert repr(found.result()) == repr(collect(reference, value))


@pytest.mark.parametrize("first", [0.0, -0.0])
def test_zeros_of_either_sign_give_the_same_extremes_in_any_order(first):
    whole = ErrorAccumulator(SPEC, Limit(ATOL, RTOL))
    for value in (first, -first):
        part = ErrorAccumulator(SPEC, Limit(ATOL, RTOL))
        part.update(np.zeros((1, 2)), np.full((1, 2), value), 0)
        whole.merge(part)
    assert (repr(whole.result().lowest), repr(whole.result().highest)) == ("0.0", "0.0")


def test_where_nothing_is_allowed_only_an_error_exceeds_it():
    for errors, excess in (([0.0, 0.0], 0), ([0.0, 0.1], np.inf), ([0.1, 0.0], np.inf)):
        whole = ErrorAccumulator(SPEC, Limit(0, 0))
        for error in errors:
            part = ErrorAccumulator(SPEC, Limit(0, 0))
            part.update(np.zeros((1, 2)), np.full((1, 2), error), 0)
            whole.merge(part)
        assert whole.result().excess == excess


def test_a_batch_of_wrong_shape_is_not_lost_in_merging():
    whole, part = accumulate(8), ErrorAccumulator(SPEC, Limit(ATOL, RTOL))
    part.update(np.zeros((4, 2)), np.zeros((4, 1)), 8)
    whole.merge(part)
    found = whole.result()
    assert (found.count, found.nonfinite_mismatches, found.excess) == (24, 8, np.inf)
    assert found.mean == np.inf


@pytest.mark.parametrize("sizes", [[20_000] * 3, [1, 59_999], [500] * 120])
def test_many_values_in_parts_have_the_sums_and_extremes_of_the_whole(sizes):
    reference, value = pair(60_000, seed=3)
    whole = collect(reference, value)
    merged = ErrorAccumulator(SPEC, Limit(ATOL, RTOL))
    stop = len(reference)
    for size in reversed(sizes):
        part = ErrorAccumulator(SPEC, Limit(ATOL, RTOL))
        part.update(reference[stop - size : stop], value[stop - size : stop], stop - size)
        merged.merge(part)
        stop -= size
    found = merged.result()
    estimated = {"p50", "p99", "p999", "ulp_p50", "ulp_p999"}
    for name in TypeAdapter(ErrorStatistics).dump_python(whole).keys() - estimated:
        assert getattr(found, name) == getattr(whole, name), name
    assert found.worst == whole.worst


def test_equally_bad_samples_come_in_the_order_of_the_data():
    zeros = np.zeros((1, 2))
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        whole = ErrorAccumulator(SPEC, Limit(ATOL, RTOL))
        for first in order:
            part = ErrorAccumulator(SPEC, Limit(ATOL, RTOL))
            part.update(zeros, zeros, first)
            whole.merge(part)
        assert [w.sample for w in whole.result().worst] == [0, 1, 2]


def test_an_accumulator_of_another_kind_is_not_merged():
    whole = accumulate(8)
    before = whole.result()
    with pytest.raises(InputError, match="merged with GroundAccumulator: expected ErrorAcc"):
        whole.merge(GroundAccumulator(None))
    assert whole.result() == before


def test_an_accumulator_is_not_merged_with_itself():
    whole = accumulate(8)
    with pytest.raises(InputError, match="twice"):
        whole.merge(whole)
    assert whole.result().count == 16


def test_an_accumulator_goes_on_in_another_process():
    reference, value = pair(64)
    accumulator = ErrorAccumulator(SPEC, Limit(ATOL, RTOL))
    accumulator.update(reference[:32], value[:32], 0)
    code = (
        "import pickle, sys\n"
        "accumulator, reference, value = pickle.load(sys.stdin.buffer)\n"
        "accumulator.update(reference, value, 32)\n"
        "pickle.dump(accumulator, sys.stdout.buffer)"
    )
    sent = pickle.dumps((accumulator, reference[32:], value[32:]))
    ended = subprocess.run(
        [sys.executable, "-c", code], input=sent, capture_output=True, check=True
    )
    assert pickle.loads(ended.stdout).result() == collect(reference, value)


def test_pickled_size_hardly_grows_with_the_samples():
    accumulator = ErrorAccumulator(SPEC, Limit(ATOL, RTOL))
    reference, value = pair(5000)
    sizes = {}
    for batch in range(100):
        accumulator.update(reference, value + np.float32(batch * 1e-7), batch * 5000)
        sizes[accumulator.result().count] = len(pickle.dumps(accumulator))
    assert sizes[1_000_000] < 2 * sizes[100_000]
    # Doubled until there are more values than could be added one by one.
    while accumulator.result().count < 1e12:
        accumulator.merge(pickle.loads(pickle.dumps(accumulator)))
    assert len(pickle.dumps(accumulator)) < 4 * sizes[100_000] < 250_000
    assert len(accumulator.result().worst) == WORST_SAMPLES


RANKS = (0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)


def between(values, low, found, high):
    """Whether ``found`` lies between the exact quantiles of two ranks."""
    least = np.quantile(values, max(low, 0), method="lower")
    return least <= found <= np.quantile(values, min(high, 1), method="higher")


@pytest.mark.parametrize("kind", ["mixed", "sorted"])
def test_merged_quantiles_lie_within_the_stated_bound(kind):
    rng = np.random.default_rng(0)
    values = np.sort(np.abs(rng.standard_normal(200_000))).astype(np.float32)
    order = rng.permutation(values) if kind == "mixed" else values
    inside = []
    for count in (2, 3, 7, 20, 64, 200):
        whole = Quantiles()
        for part in np.array_split(order, count):
            read = Quantiles()
            read.update(part)
            whole.merge(pickle.loads(pickle.dumps(read)))
        assert whole.sketch.n == values.size
        for rank in RANKS:
            low, high = rank_bounds(whole, rank)
            assert low <= rank <= high
            assert high - low <= 0.0125 * (1 - rank)
            found = whole(rank)
            inside.append(between(values, low, found, high))
            # The bound is three standard deviations; twice that is never to be seen.
            assert between(values, 2 * low - rank, found, 2 * high - rank), (count, rank)
    assert np.mean(inside) > 0.95


def test_few_merged_values_are_kept_every_one():
    values = np.random.default_rng(0).uniform(size=150)
    whole = Quantiles()
    assert rank_bounds(whole, 0.5) == (0.5, 0.5)
    for part in np.array_split(values, 11):
        read = Quantiles()
        read.update(part)
        whole.merge(read)
    for rank in RANKS:
        assert whole(rank) == order_statistic(values, rank)
        assert rank_bounds(whole, rank) == (rank, rank)


def test_empty_quantiles_can_be_sent_and_merged():
    empty = pickle.loads(pickle.dumps(Quantiles()))
    assert (np.isnan(empty(0.5)), empty.sketch.n) == (True, 0)
    full = Quantiles()
    full.update(np.array([1.0, 2.0, np.nan]))
    full.merge(empty)
    empty.merge(full)
    assert (full.sketch.n, empty.sketch.n, empty(1)) == (2, 2, 2)


# --- Sums ---

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)


@given(
    columns=st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=60),
    cuts=st.lists(st.integers(0, 60), max_size=6),
    divisor=st.integers(1, 10**6),
)
def test_sums_are_those_of_rational_numbers_rounded_once(columns, cuts, divisor):
    rows = np.array(columns)
    whole = ExactSums(2)
    edges = sorted([0, *(cut for cut in cuts if cut < len(rows)), len(rows)])
    for start, stop in reversed(list(pairwise(edges))):
        part = ExactSums(2)
        part.add(*rows[start:stop].T)
        whole.merge(pickle.loads(pickle.dumps(part)))
    for found, column in zip(whole.values(divisor), rows.T, strict=True):
        exact = sum(map(Fraction, column.tolist())) / divisor
        if abs(exact) < Fraction(sys.float_info.max):
            assert found == float(exact)
        else:
            assert abs(found) in (math.inf, sys.float_info.max)
            assert (found > 0) == (exact > 0)


def test_more_numbers_than_are_summed_at_once_are_summed_too():
    values = np.random.default_rng(0).standard_normal(100_000) * 10.0 ** np.arange(-300, 300, 0.006)
    sums = ExactSums(1)
    sums.add(values)
    sums.add(-values[::-1])
    assert sums.values() == (0.0,)
    sums.add(values)
    assert sums.values() == (math.fsum(values),)


def test_a_sum_too_large_for_float64_is_infinite_and_comes_back():
    largest = np.full(3, sys.float_info.max)
    sums = ExactSums(2)
    sums.add(largest, -largest)
    assert sums.values() == (np.inf, -np.inf)
    assert sums.values(3) == (largest[0], -largest[0])
    sums.add(-largest[:2], largest[:2])
    assert sums.values() == (largest[0], -largest[0])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, np.inf], np.inf),
        ([-np.inf, 1], -np.inf),
        ([np.inf, -np.inf], np.nan),
        ([np.inf, np.nan], np.nan),
        ([], 0),
        ([-0.0], 0),
        ([5e-324] * 3, 1.5e-323),
    ],
)
def test_sums_have_nan_and_inf_as_float64_has_them(values, expected):
    together, whole = ExactSums(2), ExactSums(2)
    together.add(np.array(values, float), np.zeros(len(values)))
    for value in values:
        part = ExactSums(2)
        part.add(np.array([value]), np.zeros(1))
        whole.merge(part)
    for sums in (together, whole):
        assert sums.values() == pytest.approx((expected, 0), nan_ok=True, rel=0, abs=0)
