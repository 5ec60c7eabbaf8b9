from dataclasses import replace

import numpy as np
import pytest
from faults import MASK, POSITION, SET

from heimdall_onnx.evidence.parity.invariance import (
    MaskCheck,
    OrderCheck,
    check_masks,
    check_orders,
    excess,
)
from heimdall_onnx.evidence.parity.tolerance import Limit
from heimdall_onnx.model.examples import Examples
from heimdall_onnx.model.signature import Axis, TensorSpec

LIMIT = Limit(1e-5, 1e-6)
WEIGHTS = TensorSpec("weights", "float32", ("batch", "receivers"))
WEIGHED = replace(SET, outputs=(WEIGHTS,))


def check(promise, answer, signature=WEIGHED, data=None):
    examples = Examples(signature)
    sides = {"PyTorch": lambda inputs: {"weights": answer(inputs)}}
    return promise(sides, signature, examples, data or examples.valid(4, seed=5), excess_at)


def excess_at(inputs, name, before, after):
    return excess(before, after, LIMIT)


def first(inputs):
    return inputs["features"][..., 0]


def test_output_of_each_element_may_say_anything_of_a_hidden_one():
    (found,) = check(check_masks, first)
    assert found.problem is None
    assert found.excess == 0
    assert found.seen
    assert found.samples > 8


def test_output_of_each_element_must_not_depend_on_hidden_ones():
    (found,) = check(check_masks, lambda inputs: first(inputs) - first(inputs).mean(1)[:, None])
    assert found.excess > 1e3
    assert "moves by" in found.problem


def in_sum(inputs):
    """The mean of what may be seen, for each element."""
    seen = np.where(inputs["mask"], 0, first(inputs))
    mean = seen.sum(1) / (~inputs["mask"]).sum(1)
    return first(inputs) + mean[:, None]


def counting(inputs):
    """The same over all elements."""
    seen = np.where(inputs["mask"], 0, first(inputs))
    return first(inputs) + seen.mean(1)[:, None]


def test_output_must_not_depend_on_how_much_is_hidden():
    (right,) = check(check_masks, in_sum)
    assert right.problem is None
    assert right.padding < 1e-2
    (wrong,) = check(check_masks, counting)
    assert wrong.excess == 0
    assert wrong.padding > 1e3
    assert wrong.padded_output == "weights"
    assert wrong.problem.startswith("PyTorch: weights moves by")
    assert wrong.problem.endswith("the number of elements that mask hides: padding is counted")


@pytest.mark.parametrize("lengths", [(4, 12), (12, 4)])
def test_elements_are_appended_up_to_a_length_that_the_model_must_work_at(lengths):
    seen = set()

    def answer(inputs):
        seen.add(inputs["mask"].shape[1])
        return in_sum(inputs)

    signature = replace(WEIGHED, axes=(Axis("receivers", lengths),))
    data = Examples(signature).valid(4, lengths={"receivers": 6})
    (found,) = check(check_masks, answer, signature, data)
    assert found.problem is None
    assert seen == {4, 6, 12}
    # Where there is no longer one, the evaluation data stay as they are.
    seen.clear()
    check(check_masks, answer, signature, Examples(signature).valid(4))
    assert seen == {4, 12}


def test_elements_of_an_input_that_nothing_hides_are_not_appended():
    signature = replace(WEIGHED, inputs=(*SET.inputs[:2], replace(MASK, masks=("features",))))
    (found,) = check(check_masks, counting, signature)
    assert found.padding == 0
    assert found.problem is None


@pytest.mark.parametrize("output", [POSITION, replace(POSITION, shape=("batch", "receivers"))])
def test_two_coordinates_are_not_taken_for_two_receivers(output):
    """A mask of a fixed length that is ignored, beside an output of the same length."""
    length = output.shape[1]
    inputs = (
        TensorSpec("features", "float32", ("batch", length)),
        TensorSpec("mask", "bool", ("batch", length), masks=("features",)),
    )
    signature = replace(SET, inputs=inputs, outputs=(output,), axes=())
    examples = Examples(signature)
    sides = {"ONNX": lambda inputs: {"position": inputs["features"] + 0}}
    (found,) = check_masks(sides, signature, examples, examples.valid(8), excess_at)
    assert (found.problem is None) == (length == "receivers")


def test_answer_that_becomes_nan_with_hidden_elements_is_beyond_any_limit():
    def answer(inputs):
        return np.where(np.abs(inputs["features"]).max() > 100, np.nan, first(inputs))

    (found,) = check(check_masks, answer)
    assert found.excess == np.inf


def test_samples_of_which_everything_is_hidden_are_left_out():
    examples = Examples(WEIGHED)
    data = examples.valid(4) | {"mask": np.ones((4, 8), bool)}
    (with_them,) = check(check_masks, first, data=data)
    (without,) = check(
        check_masks, first, data=examples.valid(4) | {"mask": np.zeros((4, 8), bool)}
    )
    assert with_them.samples == without.samples


def test_signature_that_promises_nothing_is_held_to_nothing():
    plain = replace(WEIGHED, inputs=(*SET.inputs[:2], replace(MASK, masks=())), axes=())
    assert check(check_masks, first, plain) == ()
    assert check(check_orders, first, plain) == ()


def test_each_mask_and_each_side_is_checked():
    signature = replace(
        WEIGHED,
        inputs=(
            *SET.inputs[:2],
            replace(MASK, masks=("features",)),
            replace(MASK, name="unknown", masks=("stations",)),
        ),
    )
    sides = {side: lambda inputs: {"weights": first(inputs)} for side in ("PyTorch", "ONNX")}
    examples = Examples(signature)
    found = check_masks(sides, signature, examples, examples.valid(4), excess_at)
    assert [(c.mask, c.side, c.seen) for c in found] == [
        ("mask", "PyTorch", True),
        ("mask", "ONNX", True),
        ("unknown", "PyTorch", False),
        ("unknown", "ONNX", False),
    ]


def test_output_along_a_permuted_axis_must_come_in_the_new_order():
    (found,) = check(check_orders, first)
    assert found == OrderCheck("receivers", "PyTorch", 0.0, "weights")
    (fixed,) = check(check_orders, lambda inputs: np.tile(np.arange(8.0), (len(first(inputs)), 1)))
    assert fixed.excess > 1e4


@pytest.mark.parametrize(
    ("excess_", "seen", "samples", "problem"),
    [
        (0.9, True, 3, None),
        (1.1, True, 3, "ONNX: y moves by 1.1 times the tolerance with the elements that m hides"),
        (1.1, False, 3, "its polarity is inverted, True must mean hidden"),
        (0.0, False, 3, "ONNX: no output depends on the elements that m does not hide"),
        (0.0, True, 0, "ONNX: no example has an element that m hides"),
    ],
)
def test_problems_of_a_mask_are_told_apart(excess_, seen, samples, problem):
    found = MaskCheck("m", "ONNX", excess_, "y", seen, samples).problem
    assert found is problem is None or found.endswith(problem)


def test_excess_is_in_units_of_what_is_allowed():
    moved, error = excess(np.float32([0, 10]), np.float32([0, 10.1]), Limit(0.1, 0.01))
    assert moved == pytest.approx(0.5, rel=1e-4)
    assert error == pytest.approx(0.1, rel=1e-4)
    assert excess(np.zeros(2), np.zeros(3), LIMIT) == (np.inf, np.inf)
    same = np.array([np.nan, np.inf])
    assert excess(same, same, LIMIT) == (0, 0)
    assert excess(same, -same, LIMIT)[0] == np.inf
