"""What a signature declares of a model, held against PyTorch and ONNX each by itself.

Two models that make the same mistake agree, so parity finds none of these: a mask that hides what
it should show, one that hides a part only, a mean that counts the padding, an order that should be
of no consequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from heimdall_onnx.common.arrays import Arrays
from heimdall_onnx.evidence.parity.statistics import element_errors
from heimdall_onnx.evidence.parity.tolerance import Limit
from heimdall_onnx.model.examples import (
    ALL_BUT_ONE,
    Examples,
    found_lengths,
    garbled,
    padded,
    permuted,
)
from heimdall_onnx.model.signature import Signature, TensorSpec

SAMPLES = 8

Sides = Mapping[str, Callable[[Arrays], Arrays]]
# The excess of an output, by its name, over another, where inputs are of no consequence.
Excess = Callable[[Arrays, str, npt.NDArray[Any], npt.NDArray[Any]], tuple[float, float]]
_Moves = Iterator[tuple[Arrays, Arrays, Arrays]]


@dataclass(frozen=True)
class MaskCheck:
    """Whether one model's answers depend on what a mask hides, and on what it does not.

    Attributes:
        mask: The boolean input, True where an element is hidden.
        side: ``"PyTorch"`` or ``"ONNX"``.
        excess: Largest change of an output when hidden elements change, in units of the tolerance;
            infinite where it becomes NaN or Inf.
        output: The output that moved most.
        seen: Whether an answer changes at all when the elements that are not hidden do.
        samples: Samples with hidden elements.
        padding: Largest change when further elements are appended that are all hidden; 0 where the
            mask has no dynamic axis, or one that an input has which no mask hides.
        padded_output: The output that moved most with them.
    """

    mask: str
    side: str
    excess: float
    output: str
    seen: bool
    samples: int
    padding: float = 0.0
    padded_output: str = ""

    @property
    def problem(self) -> str | None:
        """What is wrong, in words; None if nothing is."""
        if self.samples == 0:
            return f"{self.side}: no example has an element that {self.mask} hides"
        if self.excess > 1.0:
            found = (
                f"{self.output} moves by {self.excess:.3g} times the tolerance with the elements "
                f"that {self.mask} hides"
            )
            if not self.seen:
                found += (
                    ", and not at all with those it does not hide: its polarity is inverted, True "
                    "must mean hidden"
                )
        elif not self.seen:
            found = f"no output depends on the elements that {self.mask} does not hide"
        elif self.padding > 1.0:
            found = (
                f"{self.padded_output} moves by {self.padding:.3g} times the tolerance with the "
                f"number of elements that {self.mask} hides: padding is counted"
            )
        else:
            return None
        return f"{self.side}: {found}"


@dataclass(frozen=True)
class OrderCheck:
    """How much one model's answers move when the order along an axis changes.

    Attributes:
        axis: An axis that the signature declares permutable.
        side: ``"PyTorch"`` or ``"ONNX"``.
        excess: Largest change in units of the tolerance; infinite where it becomes NaN or Inf.
        output: The output that moved most.
    """

    axis: str
    side: str
    excess: float
    output: str


def check_masks(
    sides: Sides, signature: Signature, examples: Examples, data: Arrays, excess_at: Excess
) -> tuple[MaskCheck, ...]:
    """Change what each mask hides, how much, and what it does not; see whether the answers do.

    Args:
        sides: Each model, as a function of its inputs.
        signature: Says which inputs are masks, and of what.
        examples: Makes further inputs, among them some in which a single element is not hidden.
        data: A few samples of the evaluation data.
        excess_at: How far an output moves that should stay, for these inputs.
    """
    masks = [spec for spec in signature.inputs if spec.masks]
    if not masks:
        return ()
    valid = examples.valid(SAMPLES)
    # The last, so that some are hidden whatever the data and the model's own examples are like.
    bases = [data, valid, examples.adversarial(valid).get(ALL_BUT_ONE, valid)]
    checks = []
    for mask in masks:
        padded_pairs = list(_padded_pairs(mask, signature, examples, data))
        for side, run in sides.items():
            looks = [look for base in bases if (look := _look(mask, run, signature, base))]
            moved = ((look.inputs, look.before, look.beneath) for look in looks)
            counted = _padded_answers(mask, run, signature, padded_pairs)
            checks.append(
                MaskCheck(
                    mask.name,
                    side,
                    *_largest_move(moved, signature, excess_at),
                    any(look.seen for look in looks),
                    sum(look.samples for look in looks),
                    *_largest_move(counted, signature, excess_at),
                )
            )
    return tuple(checks)


class _Look(NamedTuple):
    """What a model answers, and what when the elements that a mask hides are others."""

    inputs: Arrays
    before: Arrays
    beneath: Arrays
    seen: bool
    samples: int


def _look(
    mask: TensorSpec, run: Callable[[Arrays], Arrays], signature: Signature, base: Arrays
) -> _Look | None:
    """Change what a mask hides, and what it does not; None where it hides nothing."""
    flat = base[mask.name].reshape(len(base[mask.name]), -1)
    # A sample of which nothing is left has no answer that could stay.
    partly = flat.any(axis=1) & ~flat.all(axis=1)
    if not partly.any():
        return None
    part = {name: array[partly] for name, array in base.items()}
    visible = partial(_visible, signature, mask, part[mask.name])
    before = visible(run(part))
    beneath = visible(run(garbled(signature, mask, part, hidden=True)))
    beside = visible(run(garbled(signature, mask, part, hidden=False)))
    seen = any(not np.array_equal(value, beside[name]) for name, value in before.items())
    return _Look(part, before, beneath, seen, int(partly.sum()))


def _padded_pairs(
    mask: TensorSpec, signature: Signature, examples: Examples, data: Arrays
) -> Iterator[tuple[Arrays, Arrays]]:
    """Inputs, and the same with further hidden elements along a dynamic axis of the mask.

    Both have lengths at which the model must work, but for the evaluation data's own.
    """
    for axis in signature.dynamic_axes:
        if axis.name not in mask.shape[1:]:
            continue
        having = [spec for spec in signature.inputs if axis.name in spec.shape[1:]]
        hidden = {name for spec in having for name in spec.masks}
        if any(not spec.masks and spec.name not in hidden for spec in having):
            continue  # Elements of that input would be new ones.
        shorter = sorted(axis.lengths)[-2]
        place = mask.shape.index(axis.name, 1)
        for base in (data, examples.valid(SAMPLES, lengths={axis.name: shorter})):
            found = base[mask.name]
            longer = [length for length in axis.lengths if length > found.shape[place]]
            rows = ~np.all(found.reshape(len(found), -1), axis=1)
            if longer and rows.any():
                part = {name: array[rows] for name, array in base.items()}
                yield part, padded(signature, part, axis.name, min(longer))


def _padded_answers(
    mask: TensorSpec,
    run: Callable[[Arrays], Arrays],
    signature: Signature,
    pairs: Iterable[tuple[Arrays, Arrays]],
) -> _Moves:
    """What is answered to inputs without and with further hidden elements, which both have."""
    for base, more in pairs:
        lengths = found_lengths(signature, base)
        visible = partial(_visible, signature, mask, base[mask.name])
        yield base, visible(run(base)), visible(_cut(run(more), signature, lengths))


def _cut(outputs: Arrays, signature: Signature, lengths: Mapping[str, int]) -> Arrays:
    """The first elements of outputs along the dynamic axes, as many as ``lengths`` says."""

    def along(name: int | str) -> slice:
        return slice(lengths.get(name) if isinstance(name, str) else None)

    return {
        spec.name: outputs[spec.name][(slice(None), *map(along, spec.shape[1:]))]
        for spec in signature.outputs
    }


def _visible(
    signature: Signature, mask: TensorSpec, hidden: npt.NDArray[np.bool_], outputs: Arrays
) -> Arrays:
    """The outputs, without what an output of one value per element says of hidden elements.

    By its axes it is known as one, which lengths alone do not tell unless it has further axes: two
    coordinates are no two receivers.
    """
    axes = len(mask.shape)
    named = any(isinstance(name, str) for name in mask.shape[1:])
    alike = [
        s.name
        for s in signature.outputs
        if (named or len(s.shape) > axes) and s.shape[1:axes] == mask.shape[1:]
    ]
    return outputs | {
        name: np.where(
            hidden.reshape(*hidden.shape, *(1,) * (outputs[name].ndim - axes)), 0, outputs[name]
        )
        for name in alike
    }


def check_orders(
    sides: Sides, signature: Signature, examples: Examples, data: Arrays, excess_at: Excess
) -> tuple[OrderCheck, ...]:
    """Change the order along each permutable axis, in all inputs alike.

    An output that has the axis itself must come in the new order.

    Args:
        sides: Each model, as a function of its inputs.
        signature: Says which axes are permutable.
        examples: Makes further inputs.
        data: A few samples of the evaluation data.
        excess_at: How far an output moves that should stay, for these inputs.
    """
    axes = [axis.name for axis in signature.dynamic_axes if axis.permutable]
    bases = [data, examples.valid(SAMPLES)] if axes else []

    def answers(axis: str, run: Callable[[Arrays], Arrays]) -> _Moves:
        for base in bases:
            before, other = run(base), base | permuted(signature.inputs, base, axis)
            yield other, before | permuted(signature.outputs, before, axis), run(other)

    return tuple(
        OrderCheck(axis, side, *_largest_move(answers(axis, run), signature, excess_at))
        for axis in axes
        for side, run in sides.items()
    )


def excess(
    reference: npt.NDArray[Any],
    value: npt.NDArray[Any],
    limit: Limit,
    spread: npt.NDArray[Any] | float = 0.0,
) -> tuple[float, float]:
    """Largest error in units of what is allowed, and as it is; infinite where not comparable.

    An element counts only where its error exceeds what is allowed by more than ``spread``.
    """
    if reference.shape != value.shape:
        return float("inf"), float("inf")
    a, b = reference.astype(np.float64), value.astype(np.float64)
    error, share, allowed = element_errors(a, b, limit)
    judged = error > allowed + spread if np.any(spread) else np.ones(a.shape, bool)
    error, share = error[judged], share[judged]
    return float(share.max(initial=0)), float(error.max(initial=0))


def _largest_move(moves: _Moves, signature: Signature, excess_at: Excess) -> tuple[float, str]:
    """The largest change between answers before and after, and the output that has it."""
    worst, output = 0.0, signature.outputs[0].name
    for inputs, before, after in moves:
        for name, value in before.items():
            moved, _ = excess_at(inputs, name, value, after[name])
            if moved > worst:
                worst, output = moved, name
    return worst, output
