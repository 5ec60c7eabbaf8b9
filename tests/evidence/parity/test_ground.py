import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parts import partings, read_in_parts

from heimdall_onnx.evidence.geodesy import (
    difference_degrees,
    distance_m,
    error_m,
    metres_per_degree,
    offset_km,
)
from heimdall_onnx.evidence.parity.ground import GroundAccumulator, mean_place, middle_of

LATITUDES, LONGITUDES = st.floats(-90, 90), st.floats(-180, 180)


def between(a, b):
    return float(distance_m(np.array([a]), np.array([b]))[0])


@pytest.mark.parametrize(
    ("a", "b", "metres"),
    [
        # The equator is a circle of 6,378,137 m.
        ((0, 0), (0, 1), math.radians(1) * 6_378_137),
        # A quarter of the meridian, from the ellipsoid's definition.
        ((0, 10), (90, 10), 10_001_965.729),
        # GeographicLib's GeodSolve example: JFK to LHR.
        ((40.6, -73.8), (51.6, -0.5), 5_551_759.400),
        # Neither the date line nor a full turn is a distance.
        ((0, 179.5), (0, -179.5), math.radians(1) * 6_378_137),
        ((0, 181), (0, -179), 0),
        ((12, 0), (12, 360), 0),
        # At a pole every longitude is the same place, and over it the way is short.
        ((90, 0), (90, 123), 0),
        ((-90, 7), (-90, -170), 0),
        ((89, 0), (89, 180), 2 * 111_693.9),
        # An unbounded regression can leave the globe.
        ((95, 0), (90, 0), 0),
        ((-200, 0), (-90, 0), 0),
    ],
)
def test_distances_are_geodesics_of_wgs84(a, b, metres):
    assert between(a, b) == pytest.approx(metres, rel=1e-6, abs=1e-3)
    assert between(b, a) == pytest.approx(between(a, b))


def test_distance_takes_float32_and_gives_float64():
    moved = distance_m(np.array([[50, 8]], np.float32), np.array([[50.5, 8]], np.float32))
    assert moved.dtype == np.float64
    assert moved == pytest.approx(55_615, rel=1e-3)


def test_distances_of_no_positions_are_none():
    assert distance_m(np.zeros((0, 2)), np.zeros((0, 2))).size == 0


@pytest.mark.parametrize(
    ("position", "east", "north"),
    [
        ((1, 0), 0, 110.574),
        ((-1, 0), 0, -110.574),
        ((0, 1), 111.319, 0),
        ((0, -1), -111.319, 0),
    ],
)
def test_offset_is_east_then_north(position, east, north):
    found = offset_km(np.array([position], float), (0.0, 0.0))
    assert found[0] == pytest.approx((east, north), abs=1e-3)


def test_offset_points_east_across_the_date_line():
    east, north = offset_km(np.array([[0.0, -179.5]]), (0.0, 179.5))[0]
    assert (east, north) == pytest.approx((111.319, 0), abs=1e-3)


@given(LATITUDES, LONGITUDES, LATITUDES, LONGITUDES)
def test_offset_is_as_long_as_the_distance(lat, lon, lat0, lon0):
    (east, north), origin = offset_km(np.array([[lat, lon]]), (lat0, lon0))[0], (lat0, lon0)
    assert math.hypot(east, north) * 1000 == pytest.approx(between((lat, lon), origin), abs=1e-3)


@pytest.mark.parametrize(
    ("latitude", "north", "east"),
    [
        # Published lengths of a degree on WGS84.
        (0, 110.574, 111.320),
        (45, 111.132, 78.847),
        (-45, 111.132, 78.847),
        (60, 111.412, 55.800),
        (89.9, 111.694, 0.19494),
        (90, 111.694, 0),
        (-90, 111.694, 0),
    ],
)
def test_length_of_a_degree_holds_from_pole_to_pole(latitude, north, east):
    found = [float(metres) / 1000 for metres in metres_per_degree(latitude)]
    assert found == pytest.approx((north, east), rel=2e-4, abs=1e-6)


def test_length_of_a_degree_is_that_of_a_short_geodesic():
    latitudes = np.array([-89.0, -50.0, 0.0, 0.5, 33.0, 71.0])
    here, north, east = np.zeros((3, latitudes.size, 2))
    here[:, 0] = latitudes
    north[:, 0] = east[:, 1] = 1e-4
    up, across = metres_per_degree(latitudes)
    assert up * 1e-4 == pytest.approx(distance_m(here - north, here + north) / 2, rel=1e-6)
    assert across * 1e-4 == pytest.approx(distance_m(here, here + east), rel=1e-6)


def test_an_answer_that_is_no_place_is_infinitely_far_from_the_truth():
    answers = np.array([[0, 1], [np.nan, 0], [0, np.inf], [-np.inf, np.nan]])
    found = error_m(answers, np.zeros((4, 2)))
    assert found == pytest.approx([math.radians(1) * 6_378_137, *[np.inf] * 3])


def test_differences_go_the_short_way_round():
    a = np.array([[1, 179.5], [1, -179.5], [0, 540], [np.inf, 0], [0, np.nan]])
    b = np.array([[0, -179.5], [2, 179.5], [0, 0], [0, 0], [0, 0]], np.float32)
    expected = [[1, -1], [-1, 1], [0, -180], [np.nan, 0], [0, np.nan]]
    assert difference_degrees(a, b) == pytest.approx(np.array(expected), nan_ok=True)


def test_mean_place_lies_between_the_positions_wherever_these_are():
    assert mean_place(np.array([[-17.0, 178.0], [-17.0, -178.0]])) == pytest.approx(
        (-17.0, 180.0), abs=0.02
    )
    assert mean_place(np.array([[89.0, 0.0], [89.0, 180.0]]))[0] == pytest.approx(90.0)
    assert mean_place(np.empty((0, 2))) is None
    assert mean_place(np.array([[0.0, 0.0], [0.0, 180.0]])) is None


def test_ground_report_is_what_the_whole_data_gives():
    rng = np.random.default_rng(0)
    truth = rng.uniform((50, 7), (52, 10), (90, 2))
    pytorch = truth + rng.normal(0, 0.1, truth.shape)
    onnx = pytorch + rng.normal(0, 1e-6, truth.shape)
    middle = (51.0, 8.5)
    accumulator = GroundAccumulator(middle)
    for part in np.array_split(np.arange(90), 7):
        accumulator.update(pytorch[part], onnx[part], truth[part])
    report = accumulator.result()

    def order(values, rank):
        return pytest.approx(np.sort(values)[math.floor(rank * values.size + 1e-9)], rel=1e-6)

    moved = distance_m(pytorch, onnx)
    assert report.displacement_p50_m == order(moved, 0.5)
    assert report.displacement_p99_m == order(moved, 0.99)
    assert report.displacement_max_m == moved.max()
    assert report.middle == middle
    answers = {
        "PyTorch": pytorch,
        "ONNX": onnx,
        "always the middle": np.tile(middle, (90, 1)),
    }
    assert [task.who for task in report.task] == list(answers)
    for task in report.task:
        error = distance_m(answers[task.who], truth)
        assert task.median_m == order(error, 0.5)
        assert task.p95_m == order(error, 0.95)


def test_without_labels_there_is_a_displacement_but_no_task_error():
    accumulator = GroundAccumulator(None)
    accumulator.update(np.array([[0.0, 0.0]]), np.array([[0.0, 1.0]]), None)
    report = accumulator.result()
    assert report.displacement_max_m == pytest.approx(111_319.49)
    assert (report.middle, report.task) == (None, ())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("batch", [0, 1])
def test_a_position_that_is_no_place_leaves_no_largest_displacement(bad, batch):
    accumulator = GroundAccumulator(None)
    positions = np.array([[50.0, 8.0], [50.0, 9.0]])
    for number in range(2):
        moved = positions.copy()
        if number == batch:
            moved[1, 1] = bad
        accumulator.update(positions, moved, None)
    assert np.isnan(accumulator.result().displacement_max_m)


def test_middle_is_the_recorded_centre_else_the_mean_of_the_labels():
    positions = np.array([[50.0, 8.0], [51.0, 9.0]])
    assert middle_of(None, {"centre": [1, 2]}) is None
    assert middle_of(positions, {"centre": [1, 2]}) == (1.0, 2.0)
    assert middle_of(positions, {}) == pytest.approx((50.5, 8.5))


def test_middle_of_an_area_across_the_date_line_lies_in_it():
    latitude, longitude = middle_of(np.array([[-17.0, 178.0], [-16.0, -178.0]]), {})
    assert latitude == -16.5
    assert abs(longitude) == pytest.approx(180)


# --- In parts ---


def positions(count, *, bad=()):
    """True positions, and those of two models; rows ``bad`` of the second are no places."""
    rng = np.random.default_rng(count)
    truth = np.stack([rng.uniform(-89, 89, count), rng.uniform(-180, 180, count)], axis=1)
    pytorch = (truth + rng.normal(0, 0.1, truth.shape)).astype(np.float32)
    onnx = (pytorch + rng.normal(0, 1e-4, truth.shape)).astype(np.float32)
    onnx[list(bad), 1] = np.nan
    return pytorch, onnx, truth


@settings(deadline=None)
@given(
    data=st.data(),
    count=st.integers(1, 60),
    middle=st.sampled_from([None, (51.0, 8.5)]),
    broken=st.booleans(),
)
def test_parts_merged_in_any_order_are_the_whole(data, count, middle, broken):
    pytorch, onnx, truth = positions(count, bad=[count // 2] if broken else [])

    def feed(accumulator, part):
        labels = None if middle is None else truth[part]
        accumulator.update(pytorch[part], onnx[part], labels)

    whole = GroundAccumulator(middle)
    feed(whole, slice(count))
    found = read_in_parts(lambda: GroundAccumulator(middle), feed, data.draw(partings(count)))
    assert repr(found.result()) == repr(whole.result())
    assert np.isnan(found.result().displacement_max_m) == broken


def test_many_positions_in_parts_have_the_extremes_of_the_whole():
    pytorch, onnx, _ = positions(50_000)
    whole = GroundAccumulator(None)
    whole.update(pytorch, onnx, None)
    merged = GroundAccumulator(None)
    for rows in np.array_split(np.arange(50_000), 23):
        part = GroundAccumulator(None)
        part.update(pytorch[rows], onnx[rows], None)
        merged.merge(part)
    found, expected = merged.result(), whole.result()
    assert found.displacement_max_m == expected.displacement_max_m
    assert found.displacement_p99_m == pytest.approx(expected.displacement_p99_m, rel=0.01)
