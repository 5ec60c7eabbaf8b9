import json
from dataclasses import replace

import numpy as np
import pytest
from faults import FEATURES, LOG_VARIANCE, MASK, POSITION, SET, STATIONS

from heimdall_onnx.common.errors import DataError
from heimdall_onnx.common.text import DEGREES
from heimdall_onnx.localization.network import LOCALIZATION_SIGNATURE, localization_signature
from heimdall_onnx.model.examples import generic_inputs
from heimdall_onnx.model.signature import Axis, Signature, TensorSpec, signature_of

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


@pytest.mark.parametrize("signature", [LOCALIZATION_SIGNATURE, TWO_INPUTS, SET])
def test_signature_survives_json(signature):
    assert Signature.from_dict(json.loads(json.dumps(signature.to_dict()))) == signature


def test_what_a_written_signature_leaves_out_has_its_default():
    old = LOCALIZATION_SIGNATURE.to_dict()
    del old["axes"]
    for entry in (*old["inputs"], *old["outputs"]):
        del entry["masks"], entry["log_variance_of"]
    assert Signature.from_dict(json.loads(json.dumps(old))) == LOCALIZATION_SIGNATURE


def test_dynamic_axes_are_all_but_the_batch_with_what_is_declared_of_them():
    assert TWO_INPUTS.dynamic_axes == (Axis("time", (16, 8), permutable=False),)
    named = replace(TWO_INPUTS, axes=(Axis("time"),))
    assert named.dynamic_axes == (Axis("time", (1, 2, 3, 8), permutable=False),)
    assert SET.dynamic_axes == (Axis("receivers", (1, 2, 3, 8), permutable=True),)
    assert LOCALIZATION_SIGNATURE.dynamic_axes == ()


def test_log_variance_is_the_positions_spread():
    assert SET.position_output is POSITION
    assert SET.sigma_output is LOG_VARIANCE
    in_degrees = replace(LOG_VARIANCE, unit=DEGREES)
    assert replace(SET, outputs=(in_degrees, POSITION)).position_output is POSITION


def test_deviations_are_degrees_whatever_the_output_holds():
    positions = np.zeros((2, 2), np.float32)
    outputs = {"position": positions, "log_variance": np.log([[4.0, 9.0], [1.0, 16.0]])}
    np.testing.assert_allclose(SET.deviations(outputs), [[2, 3], [1, 4]])
    outputs = {"positions": positions, "uncertainties": np.float32([[0.1, 0.2], [0.3, 0.4]])}
    found = LOCALIZATION_SIGNATURE.deviations(outputs)
    np.testing.assert_allclose(found, [[0.1, 0.2], [0.3, 0.4]], rtol=1e-6)
    assert found.dtype == np.float64


@pytest.mark.parametrize("shape", [("batch",), ("batch", 1)])
def test_one_deviation_stands_for_both_coordinates(shape):
    spread = replace(LOG_VARIANCE, shape=shape)
    signature = replace(SET, outputs=(POSITION, spread))
    assert signature.problems() == []
    values = np.log([4.0, 9.0]).reshape(2, *shape[1:])
    found = signature.deviations({"position": np.zeros((2, 2)), "log_variance": values})
    np.testing.assert_allclose(found, [[2, 2], [3, 3]])


def test_without_positions_or_their_spread_there_are_no_deviations():
    assert TWO_INPUTS.deviations({"level": np.zeros((1, 8))}) is None
    assert replace(SET, outputs=(POSITION,)).deviations({"position": np.zeros((1, 2))}) is None


def of(*specs, outputs=(POSITION, LOG_VARIANCE), axes=SET.axes):
    return Signature(specs or SET.inputs, outputs, axes)


METRES = TensorSpec("s", "float32", ("batch", 2), unit="m", sigma_of="position")
TURNED = replace(FEATURES, shape=("batch", 3, "receivers"))

CONTRADICTIONS = [
    (of(FEATURES, FEATURES), "2 inputs and outputs are called 'features'"),
    (of(FEATURES, replace(STATIONS, name="position")), "2 inputs and outputs are .*'position'"),
    (Signature((), ()), "there are no inputs"),
    (of(FEATURES, replace(STATIONS, shape=("n", "receivers"))), "batch, is called 'batch', 'n'"),
    (of(FEATURES, replace(MASK, masks=("feature",))), r"masks 'feature', .*one of \['features'\]"),
    (of(FEATURES, replace(MASK, masks=("mask",))), "masks 'mask', which is no other input"),
    (of(FEATURES, replace(MASK, dtype="int64", masks=("features",))), "but is int64: .*boolean"),
    (
        of(TURNED, replace(MASK, masks=("features",))),
        r"\(batch, receivers\) are not the batch and further first axes of \(batch, 3, receivers\)",
    ),
    (of(FEATURES, replace(MASK, shape=("batch",), masks=("features",))), "are not the batch and"),
    (of(outputs=(POSITION, replace(LOG_VARIANCE, log_variance_of="p"))), "'p', which is no output"),
    (of(outputs=(replace(POSITION, sigma_of="position"),)), "sigma_of of position is 'position'"),
    (of(outputs=(POSITION, replace(LOG_VARIANCE, sigma_of="position"))), "the one or the other"),
    (
        of(outputs=(POSITION, replace(LOG_VARIANCE, shape=("batch", 3)))),
        r"axes \(batch, 3\) can't be the spread of position with \(batch, 2\)",
    ),
    (of(outputs=(POSITION, METRES)), "s is in 'm', but position, whose deviation .*'degrees"),
    (of(outputs=(replace(POSITION, masks=("features",)),)), "only an input can mask"),
    (of(replace(FEATURES, sigma_of="stations"), STATIONS), "only outputs have one"),
    (of(axes=(*SET.axes, Axis("receivers"))), "'receivers' is declared 2 times"),
    (of(axes=(Axis("time"),)), r"'time' is in no input .*axes of the inputs are \['receivers'\]"),
    (of(axes=(Axis("batch"),)), "'batch' is in no input behind the batch"),
    *(
        (of(axes=(Axis("receivers", lengths),)), r"has the lengths \(.*two different whole numbers")
        for lengths in [(), (8,), (8, 8), (0, 8), (8, 1), (2.0, 8), (True, 8)]
    ),
    (of(replace(STATIONS, range=(4, 0))), r"range \[4, 0\]: the low end must come first"),
    (of(replace(STATIONS, range=(0.2, 0.8))), "holds no int64"),
    (of(replace(STATIONS, dtype="uint8", range=(0, 256))), r"whole numbers within \[0, 255\]"),
    (of(FEATURES, replace(MASK, masks=(), range=(0, 1))), "mask is boolean and has a range"),
    (of(replace(STATIONS, range=(np.inf, np.inf))), "holds no int64"),
    (of(replace(FEATURES, range=(float("nan"), 1.0))), "the low end must come first"),
    (of(replace(FEATURES, range=(0.0,))), "expected two numbers"),
    (of(replace(FEATURES, dtype="float31")), "has dtype 'float31': expected NumPy's name"),
    (of(replace(FEATURES, shape=("batch", "receivers", 0))), "has an axis 0: expected a length"),
    (of(FEATURES, TensorSpec("gain", "float32", ())), "gain has no axes"),
]


@pytest.mark.parametrize(("signature", "problem"), CONTRADICTIONS)
def test_contradicting_declaration_is_refused(signature, problem):
    with pytest.raises(DataError, match=problem):
        signature.require_consistent("here")


def test_all_contradictions_are_named_at_once_and_of_whom():
    class Declares:
        signature = of(
            replace(STATIONS, range=(4, 0)), replace(MASK, masks=("x",)), axes=(Axis("time"),)
        )

    with pytest.raises(DataError, match=r"^Declares\.signature contradicts itself:") as caught:
        signature_of(Declares())
    assert str(caught.value).count("\n  - ") == 3


@pytest.mark.parametrize(
    "signature",
    [
        SET,
        LOCALIZATION_SIGNATURE,
        TWO_INPUTS,
        of(outputs=(replace(POSITION, unit=None, range=(0.0, np.inf)),)),
        of(replace(FEATURES, range=(0.0, np.inf)), replace(STATIONS, range=(-np.inf, np.inf))),
        of(outputs=(replace(POSITION, shape=("n", 2)), LOG_VARIANCE)),
        of(outputs=(POSITION, replace(METRES, unit="degrees"))),
        Signature(
            (replace(FEATURES, shape=(4, "receivers", 3)),), (replace(POSITION, shape=(4, 2)),)
        ),
    ],
)
def test_sound_declarations_have_no_problems(signature):
    assert signature.problems() == []


def test_random_inputs_have_the_declared_shapes_and_depend_on_the_seed_only():
    first, again = generic_inputs(TWO_INPUTS, 5, seed=3), generic_inputs(TWO_INPUTS, 5, seed=3)
    assert {n: (a.shape, a.dtype.name) for n, a in first.items()} == {
        "audio": ((5, 2, 8), "float32"),
        "station": ((5,), "int64"),
    }
    np.testing.assert_array_equal(first["audio"], again["audio"])
    assert not np.array_equal(first["audio"], generic_inputs(TWO_INPUTS, 5, seed=4)["audio"])


def test_fitting_inputs_are_counted():
    assert TWO_INPUTS.check_inputs(generic_inputs(TWO_INPUTS, 7), "here") == 7


def inputs(**changes):
    return generic_inputs(TWO_INPUTS, 4) | changes


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"station": np.zeros(4, np.int64)}, "no array 'audio'; found \\['station'\\]"),
        ({}, "no array 'audio'; found none"),
        (inputs(audio=np.zeros((4, 2, 8))), "audio has dtype float64, expected float32"),
        (inputs(audio=np.zeros((4, 3, 8), np.float32)), "audio has shape \\(4, 3, 8\\)"),
        (inputs(audio=np.zeros((4, 2), np.float32)), "audio has shape \\(4, 2\\)"),
        (inputs(station=np.int64(1)), "station has shape \\(\\)"),
        (generic_inputs(TWO_INPUTS, 0), "audio has no samples"),
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


def test_model_without_a_signature_has_none():
    with pytest.raises(DataError, match=r"object declares no signature: give it one"):
        signature_of(object())


def test_declared_signature_wins():
    class Declares:
        signature = TWO_INPUTS

    assert signature_of(Declares()) is TWO_INPUTS


def test_signature_of_another_type_is_refused():
    class Declares:
        signature = "float32 in, float32 out"

    with pytest.raises(DataError, match=r"Declares\.signature must be .*Signature, found str"):
        signature_of(Declares())
