from dataclasses import replace

import numpy as np
import pytest
import torch
from faults import FEATURES, MASK, SET, STATIONS, SetNet
from models import SIGNAL, declare
from torch import nn

from heimdall_onnx.common.errors import DataError
from heimdall_onnx.data.evaluation import load_evaluation_data
from heimdall_onnx.model.examples import Examples, garbled, generic_adversarial, padded, permuted
from heimdall_onnx.model.signature import Axis, Signature, TensorSpec

AMPLITUDES = ["zeros", "constant", "amplitude ×0.01", "amplitude ×100", "silent channel"]
PLAIN = Examples(SET)


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[n], other[n]) for n in one)


def ranged(**ranges):
    """The signature of a set with other ranges of its inputs."""
    return replace(SET, inputs=tuple(replace(s, range=ranges.get(s.name)) for s in SET.inputs))


def test_inputs_depend_on_the_seed_only_and_differ_between_seeds():
    assert same(PLAIN.valid(5, seed=3), PLAIN.valid(5, seed=3))
    for name, array in PLAIN.valid(5, seed=3).items():
        assert not np.array_equal(array, PLAIN.valid(5, seed=4)[name]), name


def test_dynamic_axes_have_their_last_length_or_the_one_asked_for_in_all_inputs():
    assert {a.shape[:2] for a in PLAIN.valid(4).values()} == {(4, 8)}
    assert {a.shape[:2] for a in PLAIN.valid(4, lengths={"receivers": 3}).values()} == {(4, 3)}


def test_an_axis_without_a_declaration_is_tried_at_twice_its_length():
    examples = Examples(replace(SET, axes=()))
    assert examples.lengths() == {"receivers": 8}
    assert list(examples.at_other_lengths(2)) == ["receivers = 16"]
    declared = Examples(replace(SET, axes=(Axis("receivers"),)))
    assert list(declared.at_other_lengths(2)) == [f"receivers = {n}" for n in (1, 2, 3)]


def test_inputs_at_other_lengths_vary_one_axis_at_a_time():
    signature = replace(
        SET,
        inputs=(*SET.inputs, TensorSpec("iq", "float32", ("batch", "receivers", "time"))),
        axes=(*SET.axes, Axis("time", (4, 16))),
    )
    made = Examples(signature).at_other_lengths(2)
    shapes = {kind: inputs["iq"].shape[1:] for kind, inputs in made.items()}
    assert shapes == {
        "receivers = 1": (1, 16),
        "receivers = 2": (2, 16),
        "receivers = 3": (3, 16),
        "time = 4": (8, 4),
    }


def test_integers_cover_their_whole_range_in_each_sample_anew():
    stations = PLAIN.valid(64)["stations"]
    assert np.unique(stations).tolist() == [0, 1, 2, 3, 4]
    assert len(np.unique(stations, axis=0)) == 64


def test_integers_without_a_range_are_0_or_1_where_there_is_no_model():
    assert np.unique(Examples(ranged()).valid(9)["stations"]).tolist() == [0, 1]


class Minutes(nn.Module):
    """Takes any integer, or those that ``rows`` of a table have, or whose root is a number."""

    signature = Signature(
        (TensorSpec("minutes", "int64", ("batch", 4)),), (TensorSpec("y", "float32", ("batch", 4)),)
    )

    def __init__(self, rows=0, root=False):
        super().__init__()
        self.table = nn.Embedding(rows, 1) if rows else None
        self.root = root
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, minutes):
        self.calls += 1
        if self.table is not None:
            return self.table(minutes)[..., 0]
        return minutes.float().sqrt() if self.root else minutes / 60


@pytest.mark.parametrize(
    ("model", "ends"),
    [
        (Minutes(), (-100, 100)),
        (Minutes(rows=101), (0, 100)),
        (Minutes(rows=100), (0, 1)),
        (Minutes(root=True), (0, 100)),
    ],
)
def test_integers_without_a_range_are_as_wide_as_the_model_takes_them(model, ends):
    examples = Examples(model.signature, model)
    drawn = examples.valid(500)["minutes"]
    assert (drawn.min(), drawn.max()) == ends == examples.integers
    assert model.calls == 0
    data = load_evaluation_data(None, model.signature, model)
    assert data.provenance == f"seeded random numbers, integers from {ends[0]} to {ends[1]}"


def test_no_more_is_drawn_than_the_type_of_integers_has():
    signature = replace(Minutes.signature, inputs=(TensorSpec("minutes", "uint8", ("batch", 4)),))
    drawn = Examples(signature, Minutes()).valid(500)["minutes"]
    assert (drawn.min(), drawn.max()) == (0, 100)


def test_floats_without_a_range_are_standard_normal_and_uniform_in_one():
    free = PLAIN.valid(1000)["features"]
    assert abs(free.mean()) < 0.02
    assert abs(free.std() - 1) < 0.02
    bound = Examples(ranged(features=(5.0, 7.0))).valid(1000)["features"]
    assert 5.0 <= bound.min() < 5.01
    assert 6.99 < bound.max() <= 7.0
    assert bound.dtype == np.float32


def test_masks_hide_different_numbers_of_elements_and_never_all():
    counts = PLAIN.valid(200)["mask"].sum(axis=1)
    assert set(counts) == set(range(8))
    assert not PLAIN.valid(50, lengths={"receivers": 1})["mask"].any()


def test_signature_without_new_declarations_has_the_amplitudes_alone():
    signature = declare([SIGNAL], [])
    examples = Examples(signature)
    assert list(examples.adversarial(examples.valid(2))) == AMPLITUDES
    assert not examples.declared
    assert examples.at_other_lengths(2) == {}


def test_amplitudes_are_what_their_names_say_and_change_floats_alone():
    station = TensorSpec("station", "int64", ("batch",))
    signature = declare([SIGNAL, TensorSpec("flat", "float32", ("batch",)), station], [])
    base = Examples(signature).valid(2) | {"station": np.array([1, 2])}
    copy = {name: array.copy() for name, array in base.items()}
    kinds = generic_adversarial(signature, base)
    assert list(kinds) == AMPLITUDES
    for inputs in kinds.values():
        for name, array in inputs.items():
            assert (array.dtype, array.shape) == (base[name].dtype, base[name].shape)
        assert inputs["station"].tolist() == [1, 2]
    signal = base["signal"]
    assert (kinds["zeros"]["signal"] == 0).all()
    assert (kinds["constant"]["signal"] == 1).all()
    np.testing.assert_allclose(kinds["amplitude ×0.01"]["signal"], signal / 100, rtol=1e-6)
    np.testing.assert_allclose(kinds["amplitude ×100"]["signal"], signal * 100, rtol=1e-6)
    quiet = kinds["silent channel"]["signal"]
    assert (quiet[:, 0] == 0).all()
    np.testing.assert_array_equal(quiet[:, 1:], signal[:, 1:])
    assert (kinds["silent channel"]["flat"] == 0).all()
    assert same(base, copy)


def test_kinds_of_sets_are_what_their_names_say():
    base = PLAIN.valid(6)
    kinds = PLAIN.adversarial(base)
    assert list(kinds) == [
        *AMPLITUDES,
        "silent feature",
        "all masked but one",
        "none masked",
        "lowest ids",
        "highest ids",
        "permuted receivers",
    ]
    quiet = kinds["silent feature"]["features"]
    where = np.arange(3) == np.arange(6)[:, None] % 3
    np.testing.assert_array_equal(quiet, np.where(where[:, None, :], 0, base["features"]))
    alone = kinds["all masked but one"]["mask"]
    assert ((~alone).sum(axis=1) == 1).all()
    assert not (base["mask"] & ~alone).any()  # what is left was not hidden before
    assert len(np.unique(alone.argmin(axis=1))) > 1
    assert not kinds["none masked"]["mask"].any()
    assert (kinds["lowest ids"]["stations"] == 0).all()
    assert (kinds["highest ids"]["stations"] == 4).all()
    moved = kinds["permuted receivers"]
    assert not np.array_equal(moved["features"], base["features"])
    order = [
        next(i for i in range(8) if np.array_equal(base["features"][0, i], row))
        for row in moved["features"][0]
    ]
    assert same(moved, {name: array[:, order] for name, array in base.items()})


def test_kinds_that_would_change_nothing_are_left_out():
    base = PLAIN.valid(3, lengths={"receivers": 1})
    assert {"none masked", "all masked but one", "permuted receivers"}.isdisjoint(
        PLAIN.adversarial(base)
    )


def test_two_elements_are_permuted_too():
    base = PLAIN.valid(3, lengths={"receivers": 2})
    moved = permuted(SET.inputs, base, "receivers")
    assert all(np.array_equal(moved[name], array[:, ::-1]) for name, array in base.items())


def test_amplitudes_stay_within_a_declared_range():
    examples = Examples(ranged(features=(0.5, 7.0)))
    kinds = examples.adversarial(examples.valid(3))
    for inputs in kinds.values():
        assert 0.5 <= inputs["features"].min() <= inputs["features"].max() <= 7.0
    assert (kinds["zeros"]["features"] == 0.5).all()


@pytest.mark.parametrize("hidden", [True, False])
@pytest.mark.parametrize("signature", [SET, ranged(features=(0.0, 1.0)), ranged(stations=(3, 3))])
def test_garbled_elements_are_others_and_the_rest_is_untouched(signature, hidden):
    base = Examples(signature).valid(8)
    other = garbled(signature, signature.inputs[2], base, hidden=hidden)
    where = base["mask"] if hidden else ~base["mask"]
    assert where.any()
    assert (other["features"][where] != base["features"][where]).all()
    assert np.array_equal(other["features"][~where], base["features"][~where])
    ids = signature.inputs[1].range or (0, 1)
    if ids[0] != ids[1]:
        assert (other["stations"][where] != base["stations"][where]).all()
    assert ids[0] <= other["stations"].min() <= other["stations"].max() <= ids[1]
    assert np.array_equal(other["stations"][~where], base["stations"][~where])
    assert np.isfinite(other["features"]).all()
    if signature.inputs[0].range:
        assert 0 <= other["features"].min() <= other["features"].max() <= 1
    signature.check_inputs(other, "here")


def test_padded_inputs_end_with_hidden_elements():
    base = PLAIN.valid(4, lengths={"receivers": 3})
    longer = padded(SET, base, "receivers", 5)
    assert all(np.array_equal(longer[name][:, :3], array) for name, array in base.items())
    assert longer["mask"][:, 3:].all()
    assert longer["features"].shape == (4, 5, 3)
    assert (longer["stations"][:, 3:] == base["stations"][:, 2:]).all()
    SET.check_inputs(longer, "here")


ENDLESS = ranged(features=(0.5, np.inf), stations=(-np.inf, 4))


def test_nothing_is_drawn_from_a_range_without_an_end():
    reason = r"\[0\.5, inf\] of features, the range \[-inf, 4\] of stations: declare finite ends"
    with pytest.raises(DataError, match=reason):
        Examples(ENDLESS).valid(4)


@pytest.mark.parametrize(
    ("features", "stations"),
    [((0.25, np.inf), (-np.inf, 4)), ((-np.inf, 4.0), (2, np.inf)), ((-np.inf, np.inf),) * 2],
)
def test_models_own_examples_may_have_a_range_without_an_end(features, stations):
    signature = ranged(features=features, stations=stations)
    assert signature.problems() == []
    examples = Examples(signature, OwnNet())
    base = examples.valid(8) | {"mask": PLAIN.valid(8)["mask"]}
    ends = ("lowest ids", "highest ids")
    kinds = examples.adversarial(base)
    assert [e in kinds for e in ends] == [bool(np.isfinite(end)) for end in stations]
    others = garbled(signature, signature.inputs[2], base, hidden=True)
    assert (others["features"] != base["features"])[base["mask"]].all()
    assert (others["stations"] != base["stations"])[base["mask"]].all()
    for inputs in (*kinds.values(), others):
        signature.check_inputs(inputs, "here")
        for name, (low, high) in (("features", features), ("stations", stations)):
            assert low <= inputs[name].min() <= inputs[name].max() <= high


class OwnNet(SetNet):
    """Makes its examples itself."""

    @classmethod
    def example_inputs(cls, count, rng, lengths):
        shape = (count, lengths["receivers"])
        return {
            "features": rng.uniform(2, 3, (*shape, 3)).astype(np.float32),
            "stations": np.full(shape, 3),
            "mask": np.zeros(shape, bool),
        }

    def adversarial_inputs(self, base, rng):
        base["features"] += 1  # its own copy
        return {
            "zeros": {"features": base["features"] * 0 + 0.25},
            "the last station": {"stations": base["stations"] * 0 + 4},
        }


def test_models_own_examples_are_taken_and_its_kinds_added():
    model = OwnNet()
    examples = Examples(SET, model)
    base = examples.valid(4, seed=1, lengths={"receivers": 2})
    assert list(base) == ["features", "stations", "mask"]
    assert base["features"].shape == (4, 2, 3)
    assert base["features"].min() >= 2
    assert same(base, examples.valid(4, seed=1, lengths={"receivers": 2}))
    copy = {name: array.copy() for name, array in base.items()}
    kinds = examples.adversarial(base)
    assert same(base, copy)
    assert (kinds["zeros"]["features"] == 0.25).all()  # in the generic one's place
    assert (kinds["the last station"]["stations"] == 4).all()
    assert np.array_equal(kinds["the last station"]["features"], base["features"])
    assert "highest ids" in kinds
    assert examples.own
    assert examples.declared


GOOD = OwnNet.example_inputs(4, np.random.default_rng(0), {"receivers": 8})


@pytest.mark.parametrize(
    ("made", "problem"),
    [
        (None, r"Own\.example_inputs gave NoneType: expected a dictionary"),
        ({"features": GOOD["features"]}, "no array 'stations'"),
        (GOOD | {"features": [1.0]}, r"\['features'\] that are no NumPy arrays"),
        (GOOD | {"stations": GOOD["stations"].astype(np.int32)}, "stations has dtype int32"),
        (GOOD | {"features": GOOD["features"] * np.nan}, "NaN or Inf in 4 samples"),
        (GOOD | {"stations": GOOD["stations"] + 2}, r"values in \[5, 5\], its range is \[0, 4\]"),
        (GOOD | {"mask": ~GOOD["mask"]}, "mask hides every element of a sample"),
        (GOOD | {"mask": GOOD["mask"][:, :3]}, "length 3 along receivers, expected 8"),
        ({n: a[:3] for n, a in GOOD.items()}, "3 samples, expected 4"),
        ({n: a[:3, :7] for n, a in GOOD.items()}, "3 samples, expected 4"),
        (KeyError("station"), r"Own\.example_inputs failed: KeyError: 'station'"),
    ],
)
def test_models_own_examples_that_do_not_fit_are_refused(made, problem):
    class Own:
        def example_inputs(self, count, rng, lengths):
            if isinstance(made, Exception):
                raise made
            return made

    with pytest.raises(DataError, match=problem):
        Examples(SET, Own()).valid(4)


@pytest.mark.parametrize(
    ("made", "problem"),
    [
        ([], r"Own\.adversarial_inputs gave list"),
        ({"odd": 3}, r"kind 'odd' of Own\.adversarial_inputs is int"),
        ({"odd": {"station": GOOD["stations"]}}, r"has \['station'\]: expected some of"),
        ({"odd": {"stations": GOOD["stations"] + 9}}, r"its range is \[0, 4\]"),
        ({"odd": {"features": GOOD["features"][:, :2]}}, "length 2 along receivers, expected 8"),
    ],
)
def test_models_own_kinds_that_do_not_fit_are_refused(made, problem):
    class Own:
        def adversarial_inputs(self, base, rng):
            return made

    with pytest.raises(DataError, match=problem):
        Examples(SET, Own()).adversarial(GOOD)


def test_model_is_not_blamed_for_what_the_evaluation_data_hold():
    data = GOOD | {"stations": GOOD["stations"] + 2, "mask": ~GOOD["mask"]}
    kinds = Examples(SET, OwnNet()).adversarial(data)
    assert (kinds["the last station"]["mask"]).all()
    assert (kinds["zeros"]["stations"] == 5).all()


@pytest.mark.parametrize(
    ("signature", "declared"),
    [
        (declare([SIGNAL], []), False),
        (declare([replace(SIGNAL, range=(-1.0, 1.0))], []), True),
        (SET, True),
        (Signature((FEATURES,), (), (Axis("receivers"),)), True),
        (Signature((FEATURES, MASK), ()), True),
        (Signature((FEATURES, STATIONS), ()), True),
    ],
)
def test_whether_valid_inputs_are_declared(signature, declared):
    assert Examples(signature).declared is declared
