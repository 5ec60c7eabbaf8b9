import json

import numpy as np
import pytest

from heimdall_onnx.errors import DataError
from heimdall_onnx.signature import (
    LOCALIZATION_SIGNATURE,
    Signature,
    TensorSpec,
    localization_signature,
    signature_of,
)

TWO_INPUTS = Signature(
    inputs=(
        TensorSpec("audio", "float32", ("batch", 2, "time")),
        TensorSpec("station", "int64", ("batch",)),
    ),
    outputs=(TensorSpec("level", "float32", ("batch", "time"), range=(0.0, 1.0)),),
)


def test_localization_signature_is_the_documented_one():
    (spectrogram,) = LOCALIZATION_SIGNATURE.inputs
    positions, uncertainties = LOCALIZATION_SIGNATURE.outputs
    assert spectrogram.describe() == "mel_spectrogram: float32 (batch, 3, 128, 32)"
    assert positions.describe() == "positions: float32 (batch, 2)"
    assert uncertainties.describe() == "uncertainties: float32 (batch, 2)"
    assert positions.range is None
    assert uncertainties.range == (0.01, 1.0)
    assert positions.unit == uncertainties.unit == "degrees latitude, longitude"


def test_limits_of_the_uncertainties_can_be_given():
    assert localization_signature((0.5, 2.0)).outputs[1].range == (0.5, 2.0)


def test_position_and_sigma_outputs_are_found_by_unit_and_reference():
    assert LOCALIZATION_SIGNATURE.position_output.name == "positions"
    assert LOCALIZATION_SIGNATURE.sigma_output.name == "uncertainties"
    assert TWO_INPUTS.position_output is None
    assert TWO_INPUTS.sigma_output is None


@pytest.mark.parametrize("signature", [LOCALIZATION_SIGNATURE, TWO_INPUTS])
def test_signature_survives_json(signature):
    assert Signature.from_dict(json.loads(json.dumps(signature.to_dict()))) == signature


def test_random_inputs_have_the_declared_shapes_and_depend_on_the_seed_only():
    first, again = TWO_INPUTS.random_inputs(5, seed=3), TWO_INPUTS.random_inputs(5, seed=3)
    assert {n: (a.shape, a.dtype.name) for n, a in first.items()} == {
        "audio": ((5, 2, 8), "float32"),
        "station": ((5,), "int64"),
    }
    np.testing.assert_array_equal(first["audio"], again["audio"])
    assert not np.array_equal(first["audio"], TWO_INPUTS.random_inputs(5, seed=4)["audio"])


def test_fitting_inputs_are_counted():
    assert TWO_INPUTS.check_inputs(TWO_INPUTS.random_inputs(7), "here") == 7


def inputs(**changes):
    return TWO_INPUTS.random_inputs(4) | changes


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"station": np.zeros(4, np.int64)}, "no array 'audio'; found \\['station'\\]"),
        ({}, "no array 'audio'; found none"),
        (inputs(audio=np.zeros((4, 2, 8))), "audio has dtype float64, expected float32"),
        (inputs(audio=np.zeros((4, 3, 8), np.float32)), "audio has shape \\(4, 3, 8\\)"),
        (inputs(audio=np.zeros((4, 2), np.float32)), "audio has shape \\(4, 2\\)"),
        (inputs(station=np.int64(1)), "station has shape \\(\\)"),
        (TWO_INPUTS.random_inputs(0), "audio has no samples"),
        (inputs(station=np.zeros(3, np.int64)), "different numbers of samples: \\[3, 4\\]"),
        (
            inputs(audio=np.full((4, 2, 8), np.nan, np.float32)),
            "NaN or Inf in 4 samples, first in sample 0",
        ),
    ],
)
def test_unfit_inputs_are_refused(arrays, message):
    with pytest.raises(DataError, match=message):
        TWO_INPUTS.check_inputs(arrays, "here")


def test_all_problems_of_the_inputs_are_named_at_once():
    bad = {"audio": np.zeros((4, 9, 8)), "station": np.zeros(4)}
    with pytest.raises(DataError) as caught:
        TWO_INPUTS.check_inputs(bad, "file.npz")
    text = str(caught.value)
    assert text.startswith("file.npz can't be fed to the model. Expected audio: float32")
    assert [text.count(p) for p in ("audio has dtype", "audio has shape", "station has dtype")] == [
        1,
        1,
        1,
    ]


def test_model_without_a_signature_has_the_localization_signature():
    assert signature_of(object()) is LOCALIZATION_SIGNATURE


def test_declared_signature_wins():
    class Declares:
        signature = TWO_INPUTS

    assert signature_of(Declares()) is TWO_INPUTS


def test_signature_of_another_type_is_refused():
    class Declares:
        signature = "float32 in, float32 out"

    with pytest.raises(DataError, match=r"Declares\.signature must be .*Signature, found str"):
        signature_of(Declares())
