"""The frame: exact there and back, in the graph, in its own precision."""

import math
import re

import numpy as np
import pytest
import torch
from pyproj import Geod

from heimdall_onnx.common.errors import DataError, ParameterError
from heimdall_onnx.localization.frame import (
    LocalFrame,
    calibration_of,
    placement_of,
)

FRAME = LocalFrame((50.0152, 9.0112), 250e3)


def degrees(frame: LocalFrame, offsets: np.ndarray) -> np.ndarray:
    positions, _ = frame(torch.from_numpy(offsets), torch.ones(len(offsets), 2).double())
    return positions.numpy()


@pytest.mark.parametrize("centroid", [(50.0152, 9.0112), (-33.9, 151.2), (0.0, -179.9), (70, 0)])
def test_normalizing_is_the_exact_inverse(centroid):
    frame = LocalFrame(centroid, 123_456.789).double()
    offsets = np.random.default_rng(0).normal(size=(100, 2))
    np.testing.assert_allclose(frame.normalize(degrees(frame, offsets)), offsets, atol=1e-12)


def test_the_rounding_of_the_buffers_biases_nothing():
    # The double-precision map and the inverse of the rounded buffers agree far below one ULP.
    offsets = np.random.default_rng(0).normal(size=(1000, 2))
    exact = FRAME.centroid.double().numpy() + offsets * FRAME.degrees_per_unit.double().numpy()
    np.testing.assert_allclose(FRAME.normalize(exact), offsets, atol=1e-12)


@pytest.mark.parametrize(("axis", "azimuth"), [(0, 0.0), (1, 90.0)])
def test_a_unit_is_the_scale_in_metres_on_the_ellipsoid(axis, azimuth):
    offset = np.zeros((1, 2))
    offset[0, axis] = 1e-3
    latitude, longitude = FRAME.centroid.double().tolist()
    east, north, _ = Geod(ellps="WGS84").fwd(longitude, latitude, azimuth, 250.0)
    found = degrees(LocalFrame((latitude, longitude), 250e3).double(), offset)[0]
    np.testing.assert_allclose(found, [north, east], atol=1e-8)


def test_deviations_are_scaled_and_not_moved():
    _, found = FRAME(torch.zeros(1, 2), torch.full((1, 2), 0.5))
    torch.testing.assert_close(found[0], 0.5 * FRAME.degrees_per_unit)


def test_labels_across_the_date_line_go_the_short_way():
    positions = np.array([[-17.0, 179.0], [-18.0, -179.0]])
    centroid, scale_m = placement_of(positions)
    assert centroid[0] == pytest.approx(-17.5)
    assert abs(centroid[1]) == pytest.approx(180)
    frame = LocalFrame(centroid, scale_m)
    offsets = frame.normalize(positions)
    assert np.abs(offsets).max() < 2
    back = degrees(frame.double(), offsets)
    assert back[1, 1] - back[0, 1] == pytest.approx(2, abs=1e-5)  # they go on beyond ±180


def test_the_scale_is_that_of_the_labels():
    frame = LocalFrame((50.0, 9.0), 80e3).double()
    labels = degrees(frame, np.random.default_rng(0).normal(size=(4000, 2)))
    centroid, scale_m = placement_of(labels)
    assert scale_m == pytest.approx(80e3, rel=0.05)
    offsets = LocalFrame(centroid, scale_m).normalize(labels)
    assert np.sqrt(np.mean(offsets**2)) == pytest.approx(1, rel=1e-6)
    np.testing.assert_allclose(offsets.mean(0), 0, atol=1e-3)


def test_labels_in_one_place_have_a_scale_too():
    assert placement_of([[50.0, 9.0], [50.0, 9.0]])[1] > 0


def test_half_precision_offsets_give_degrees_in_full_precision():
    offsets = torch.linspace(-1, 1, 200).repeat(2, 1).T.bfloat16()
    positions, deviations = FRAME(offsets, offsets.abs())
    assert positions.dtype == deviations.dtype == torch.float32
    expected = FRAME.centroid + offsets.float() * FRAME.degrees_per_unit
    assert torch.equal(positions, expected)
    assert (expected.bfloat16().float() - expected).abs().max() > 0.01  # what it is spared


def test_in_double_precision_all_of_it_is():
    positions, _ = LocalFrame((50.0, 9.0), 1e3).double()(torch.zeros(1, 2).double(), torch.ones(1))
    assert positions.dtype == torch.float64


def test_a_state_dict_carries_the_frame():
    other = LocalFrame((0.0, 0.0), 1.0)
    other.load_state_dict(FRAME.state_dict(), strict=True)
    assert torch.equal(other.centroid, FRAME.centroid)
    assert torch.equal(other.degrees_per_unit, FRAME.degrees_per_unit)
    assert not list(FRAME.parameters())  # nothing an optimizer could move


@pytest.mark.parametrize(
    ("centroid", "scale", "words"),
    [
        ((90.0, 0.0), 1.0, ["at a pole", "latitude 90.0"]),
        ((-89.5, 0.0), 1.0, ["at a pole"]),
        ((91.0, 0.0), 0.0, [r"\[-90, 90\]", "scale_m"]),
        ((math.nan, 0.0), math.inf, ["centroid", "scale_m must be a positive"]),
        ((50.0,), 1.0, ["a latitude and a longitude"]),
        ("here", "far", ["centroid", "scale_m"]),
    ],
)
def test_what_is_no_frame_is_refused_with_every_reason(centroid, scale, words):
    with pytest.raises(ParameterError) as error:
        LocalFrame(centroid, scale)
    for word in words:
        assert re.search(word, str(error.value)), word


def test_labels_about_a_pole_are_refused():
    with pytest.raises(ParameterError, match="at a pole"):
        placement_of([[89.9, 0.0], [89.9, 120.0], [89.9, -120.0]])


@pytest.mark.parametrize("bad", [[[math.nan, 1.0]], [1.0, 2.0], [[1.0, 2.0, 3.0]]])
def test_labels_that_are_no_positions_are_refused(bad):
    with pytest.raises(DataError, match=r"\(samples, 2\)"):
        FRAME.normalize(bad)


def test_no_labels_have_no_place():
    with pytest.raises(DataError, match="no labelled rows"):
        placement_of(np.empty((0, 2)))


def test_calibrated_deviations_are_as_large_as_the_errors():
    rng = np.random.default_rng(0)
    deviations = rng.uniform(0.1, 3, (20_000, 2))
    residuals = rng.normal(size=deviations.shape) * deviations * (0.5, 2.0)
    scale = calibration_of(residuals, deviations)
    np.testing.assert_allclose(scale, (0.5, 2.0), rtol=0.02)
    frame = LocalFrame((50.0, 9.0), 1e5).double()
    frame.deviation_scale.copy_(torch.from_numpy(scale))
    _, sigma = frame(torch.zeros(20_000, 2), torch.from_numpy(deviations))
    inside = np.abs(residuals * frame.degrees_per_unit.numpy()) < sigma.numpy()
    np.testing.assert_allclose(inside.mean(0), 0.683, atol=0.02)
