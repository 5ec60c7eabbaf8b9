import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heimdall_onnx.ground import (
    GroundAccumulator,
    distance_m,
    km_per_degree,
    middle_of,
    offset_km,
)

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
    assert km_per_degree(latitude) == pytest.approx((north, east), rel=2e-4, abs=1e-6)


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
