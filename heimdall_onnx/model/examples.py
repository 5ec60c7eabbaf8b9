"""Example inputs of a model: valid ones, and ones on which a wrong export betrays itself.

They are made from the signature, unless the model has methods of its own for it, which may be
class methods:

- ``example_inputs(count, rng, lengths)`` gives one array per input, with ``count`` samples and
  the length in ``lengths`` along each dynamic axis, drawn with ``rng``.
- ``adversarial_inputs(base, rng)`` gives further kinds of inputs made from ``base``, by name: each
  has the arrays that differ from ``base``. A kind called as a generic one takes its place.

Neither is a test of the model's accuracy: what they make only has to be allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from math import ceil, floor, inf, isfinite
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from heimdall_onnx.common.arrays import Arrays
from heimdall_onnx.common.errors import DataError, EvidenceError
from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.common.text import listed
from heimdall_onnx.model.inference import run_pytorch
from heimdall_onnx.model.signature import Signature, TensorSpec

log = get_logger(__name__)

ALL_BUT_ONE = "all masked but one"
# Ends of integers without a range, the first that the model takes: they may be indices.
_INDICES = (0, 1)
_ENDS = ((-100, 100), (0, 100), _INDICES)
_FOUND: WeakKeyDictionary[Any, tuple[int, int]] = WeakKeyDictionary()

MOVED_ULPS = 2

_Array = npt.NDArray[Any]


class Examples:
    """Makes the example inputs of one model; the same each time.

    Args:
        signature: What the inputs must fit.
        model: May have the methods ``example_inputs`` and ``adversarial_inputs``.
    """

    def __init__(self, signature: Signature, model: object = None) -> None:
        self.signature = signature
        self._model = model
        self._owner = type(model).__name__
        self._make = getattr(model, "example_inputs", None)
        self._distort = getattr(model, "adversarial_inputs", None)

    @property
    def own(self) -> bool:
        """Whether the model makes its valid inputs itself."""
        return self._make is not None

    @property
    def declared(self) -> bool:
        """Whether it is known which inputs are valid, from the signature or from the model.

        A bare floating-point input says nothing: zeros may be out of the question for it.
        """
        return self.own or _says_what_is_valid(self.signature)

    @property
    def integers(self) -> tuple[int, int] | None:
        """Ends between which integers without a range are drawn; None where there are none.

        Found by calling a copy of the model: from -100 to 100 if it answers these with numbers,
        else from 0 to 100, else 0 and 1, since they may be indices.
        """
        if self.own or not any(map(_is_open, self.signature.inputs)):
            return None
        if not hasattr(self._model, "named_buffers"):
            return _INDICES
        if self._model not in _FOUND:
            _FOUND[self._model] = _ends_taken(self.signature, self._model, self.lengths())
        return _FOUND[self._model]

    def lengths(self, **changes: int) -> dict[str, int]:
        """The length of each dynamic axis: the last declared one, or what ``changes`` says."""
        return {axis.name: axis.lengths[-1] for axis in self.signature.dynamic_axes} | changes

    def valid(self, count: int, seed: int = 0, lengths: Mapping[str, int] | None = None) -> Arrays:
        """Inputs that the model must be able to answer.

        From the signature alone: floating-point elements are standard normal, or uniform in the
        input's ``range``; integers are uniform in it, both ends included, and without one in
        `integers`. A mask hides a different number of elements in each sample and
        never all of them. What else says yes or no of elements, as an attention mask in which 1
        means keep, says both in each sample. Integers that go up to the largest length of an axis
        go no further than it is long.

        Args:
            count: Samples.
            seed: The same seed gives the same inputs.
            lengths: Of dynamic axes by name; of the others the last declared one.

        Returns:
            One array per input, sample axis first.

        Raises:
            DataError: If what the model's own ``example_inputs`` gives does not fit the signature,
                or there is no such method and an input's range has an infinite end.
        """
        rng = np.random.default_rng(seed)
        wanted = self.lengths(**(lengths or {}))
        if self._make is None:
            return generic_inputs(self.signature, count, rng, wanted, self.integers or _INDICES)
        made = self._call("example_inputs", self._make, count, rng, wanted)
        source = f"what {self._owner}.example_inputs gave"
        self._check(made, source, count, wanted, own=made.keys())
        return {spec.name: np.asarray(made[spec.name]) for spec in self.signature.inputs}

    def adversarial(self, base: Arrays) -> dict[str, Arrays]:
        """Inputs made from ``base`` that a wrong export is likely to betray itself on.

        Floating-point inputs, kept within their declared ranges: zeros, a constant, amplitudes
        ×0.01 and ×100, and one silent channel (index 0 of axis 1). The rest is for signatures that
        declare axes, ranges or masks. One silent feature, another in each sample, along the last
        axis of a fixed length: there an angle of two of them is next to its cut. Masks: all masked
        but one element of each sample, and none. Integers with a range: its lowest, its highest;
        not 0 throughout where 0 and 1 may mean hidden and kept.
        Axes whose order is of no consequence: permuted, in all inputs alike. A kind that has no
        input to work on, or would change nothing, is left out.

        Args:
            base: Valid inputs, one array per input; they are left as they are.

        Returns:
            Inputs of the same shapes by the name of their kind, the model's own kinds last.

        Raises:
            DataError: If what the model's own ``adversarial_inputs`` gives does not fit.
        """
        kinds = generic_adversarial(self.signature, base)
        if self._distort is None:
            return kinds
        count = len(next(iter(base.values())))
        lengths = found_lengths(self.signature, base)
        copies = {name: array.copy() for name, array in base.items()}
        own = self._call("adversarial_inputs", self._distort, copies, np.random.default_rng(0))
        for kind, changed in own.items():
            source = f"kind {kind!r} of {self._owner}.adversarial_inputs"
            if not isinstance(changed, Mapping):
                raise DataError(
                    f"{source} is {type(changed).__name__}: expected a dictionary of the arrays "
                    "that differ from the base"
                )
            if unknown := sorted(changed.keys() - base.keys()):
                raise DataError(f"{source} has {unknown}: expected some of {sorted(base)}")
            inputs = base | dict(changed)
            # What the base holds is not the method's doing.
            self._check(inputs, source, count, lengths, own=changed.keys())
            kinds[str(kind)] = {name: np.asarray(array) for name, array in inputs.items()}
        return kinds

    def at_other_lengths(self, count: int, seed: int = 0) -> dict[str, Arrays]:
        """Valid inputs at every other length of each dynamic axis, one axis at a time.

        Returns:
            By the axis and its length, as ``"receivers = 3"``.
        """
        return {
            f"{axis.name} = {length}": self.valid(count, seed, {axis.name: length})
            for axis in self.signature.dynamic_axes
            for length in axis.lengths[:-1]
            if length != axis.lengths[-1]
        }

    def _call(self, method: str, make: Callable[..., Any], *args: Any) -> Mapping[str, Any]:
        try:
            made = make(*args)
        except Exception as error:  # the model's own code
            raise DataError(
                f"{self._owner}.{method} failed: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(made, Mapping):
            raise DataError(
                f"{self._owner}.{method} gave {type(made).__name__}: expected a dictionary by name"
            )
        return made

    def _check(
        self,
        inputs: Mapping[str, Any],
        source: str,
        count: int,
        lengths: Mapping[str, int],
        own: Collection[str],
    ) -> None:
        """Hold inputs, those called ``own`` from the model's code, against the signature."""
        problems = []
        strange = [name for name, array in inputs.items() if not isinstance(array, np.ndarray)]
        if strange:
            raise DataError(f"{source} has {strange} that are no NumPy arrays")
        found = self.signature.check_inputs(inputs, source)
        if found != count:
            problems.append(f"{found} samples, expected {count}")
        for spec in self.signature.inputs:
            array = inputs[spec.name]
            problems += [
                f"{spec.name} has length {have} along {name}, expected {lengths[name]}"
                for name, have in zip(spec.shape[1:], array.shape[1:], strict=True)
                if isinstance(name, str) and have != lengths[name]
            ]
            if spec.name not in own:
                continue
            if spec.range is not None and array.size:
                low, high = array.min(), array.max()
                bottom, top = _limits(spec)
                if low < bottom or high > top:
                    problems.append(
                        f"{spec.name} has values in [{low:g}, {high:g}], its range is "
                        f"[{spec.range[0]:g}, {spec.range[1]:g}]"
                    )
            if spec.masks and array.reshape(len(array), -1).all(axis=1).any():
                problems.append(f"{spec.name} hides every element of a sample")
        if problems:
            raise DataError(f"{source} does not fit the signature:{listed(problems)}")


def generic_inputs(
    signature: Signature,
    count: int,
    seed: int | np.random.Generator = 0,
    lengths: Mapping[str, int] | None = None,
    integers: tuple[int, int] = _INDICES,
) -> Arrays:
    """Inputs from the signature alone; `Examples` asks the model too.

    Args:
        signature: Says names, dtypes, shapes and what values may be.
        count: Number of samples.
        seed: Seed of the values, or what draws them.
        lengths: Of dynamic axes, by name.
        integers: Ends of those without a range, as far as their type has them.

    Raises:
        DataError: If the range of an input, which values are drawn from, has an infinite end.
    """
    endless = [
        f"the range [{spec.range[0]:g}, {spec.range[1]:g}] of {spec.name}"
        for spec in signature.inputs
        if spec.range and not all(map(isfinite, spec.range))
    ]
    if endless:
        raise DataError(
            f"no example inputs can be drawn from {', '.join(endless)}: declare finite ends, or "
            "give the model a method example_inputs(count, rng, lengths)"
        )
    rng = np.random.default_rng(seed)
    wanted = Examples(signature).lengths(**(lengths or {}))

    def values(spec: TensorSpec) -> _Array:
        shape = (count, *(n if isinstance(n, int) else wanted[n] for n in spec.shape[1:]))
        dtype = np.dtype(spec.dtype)
        if spec.masks:
            return _random_mask(shape, rng)
        if dtype.kind == "f":
            if spec.range is None:
                return rng.standard_normal(shape).astype(dtype)
            uniform: _Array = rng.uniform(*spec.range, shape).astype(dtype)
            return uniform.clip(*_limits(spec))
        if dtype.kind == "b":
            return _mixed(rng.integers(0, 2, shape).astype(dtype), rng)
        low, high = _limits(_along(signature, replace(spec, range=spec.range or integers), wanted))
        drawn: _Array = rng.integers(low, high, shape, dtype=dtype, endpoint=True)
        return _mixed(drawn, rng) if _says_yes_or_no(spec) else drawn

    return {spec.name: values(spec) for spec in signature.inputs}


def _says_yes_or_no(spec: TensorSpec) -> bool:
    """Whether it may be a mask in which 1 means keep; a sample that keeps nothing has no answer."""
    return np.dtype(spec.dtype).kind in "iu" and len(spec.shape) > 1 and spec.range == (0, 1)


def _along(signature: Signature, spec: TensorSpec, lengths: Mapping[str, int]) -> TensorSpec:
    """The same, no larger than an axis is long if it goes up to the largest length of that axis."""
    assert spec.range is not None
    low, high = spec.range
    for axis in signature.dynamic_axes:
        largest, length = max(axis.lengths), lengths[axis.name]
        if high in (largest, largest - 1) and length < largest:
            return replace(spec, range=(low, max(low, high - largest + length)))
    return spec


def _mixed(array: _Array, rng: np.random.Generator) -> _Array:
    """Of each sample's elements one made 1, and another one 0."""
    flat = array.reshape(len(array), -1)
    rows, width = np.arange(len(flat)), flat.shape[1]
    if array.ndim > 1 and width:
        first = rng.integers(0, width, len(flat))
        flat[rows, (first + rng.integers(1, max(width, 2), len(flat))) % width] = 0
        flat[rows, first] = 1
    return array


def _is_open(spec: TensorSpec) -> bool:
    return spec.range is None and np.dtype(spec.dtype).kind in "iu"


def _ends_taken(signature: Signature, model: Any, lengths: Mapping[str, int]) -> tuple[int, int]:
    """The widest of `_ENDS` at both of which, and between which, a model answers with numbers."""
    from heimdall_onnx.model.copies import copy_model

    try:
        trial = copy_model(model).eval()  # a call may change it
    except EvidenceError as error:
        log.info("integers are drawn from 0 and 1", reason=str(error))
        return _INDICES
    for low, high in _ENDS:
        try:
            answers = [
                run_pytorch(trial, generic_inputs(signature, 2, 0, lengths, ends), signature)
                for ends in ((low, low), (high, high), (low, high))
            ]
        except EvidenceError:
            continue
        if all(np.isfinite(array).all() for found in answers for array in found.values()):
            return low, high
    return _INDICES


def generic_adversarial(signature: Signature, base: Arrays) -> dict[str, Arrays]:
    """What `Examples.adversarial` makes for a model without a method of its own."""

    def silence(array: _Array) -> _Array:
        quiet = array.copy()
        quiet[:, :1] = 0
        return quiet

    amplitudes: dict[str, Callable[[_Array], _Array]] = {
        "zeros": np.zeros_like,
        "constant": np.ones_like,
        "amplitude ×0.01": lambda a: a * a.dtype.type(0.01),
        "amplitude ×100": lambda a: a * a.dtype.type(100),
        "silent channel": lambda a: silence(a) if a.ndim > 1 else np.zeros_like(a),
    }
    floats = [s for s in signature.inputs if np.dtype(s.dtype).kind == "f"]
    lengths = found_lengths(signature, base)
    ids = [
        _along(signature, s, lengths)
        for s in signature.inputs
        if s.range and np.dtype(s.dtype).kind in "iu"
    ]
    masks = [s for s in signature.inputs if s.masks]
    kinds: dict[str, Arrays] = {}
    if floats:
        for kind, change in amplitudes.items():
            # Only amplitudes: a scaled index would be another kind of input.
            kinds[kind] = base | {s.name: _within(s, change(base[s.name])) for s in floats}
    featured = floats if _says_what_is_valid(signature) else []
    further = {
        "silent feature": {
            s.name: _within(s, _silence_features(s, base[s.name])) for s in featured
        },
        ALL_BUT_ONE: {s.name: _all_but_one(base[s.name]) for s in masks},
        "none masked": {s.name: np.zeros_like(base[s.name]) for s in masks},
        **{
            kind: {
                s.name: np.full_like(base[s.name], _limits(s)[end])
                for s in ids
                if s.range and isfinite(s.range[end]) and (end or not _says_yes_or_no(s))
            }
            for end, kind in enumerate(("lowest ids", "highest ids"))
        },
    }
    for axis in signature.dynamic_axes:
        if axis.permutable:
            further[f"permuted {axis.name}"] = permuted(signature.inputs, base, axis.name)
    for kind, changed in further.items():
        if any(not np.array_equal(base[name], array) for name, array in changed.items()):
            kinds[kind] = base | changed
    return kinds


def moved(array: _Array, sign: float, rng: np.random.Generator) -> _Array:
    """Floating-point numbers moved by up to two units in the last place.

    Those of few digits stay, since they are meant: rounding of whole and half ones is defined.
    """
    if array.dtype.kind != "f":
        return array
    step = sign * MOVED_ULPS * float(np.finfo(array.dtype).eps) * rng.random(array.shape)
    few = np.modf(array.astype(np.float64) * 256)[0] == 0
    return np.where(few, array, array * (1.0 + step)).astype(array.dtype)


def permuted(specs: tuple[TensorSpec, ...], arrays: Arrays, axis: str) -> Arrays:
    """Those of ``arrays`` that have ``axis``, in another order along it, the same in all."""

    def reorder(array: _Array, position: int) -> _Array:
        length = array.shape[position]
        order = np.random.default_rng(length).permutation(length)
        if (order == np.arange(length)).all():
            order = order[::-1]
        return np.take(array, order, axis=position)

    changed = {}
    for spec in specs:
        if axis in spec.shape[1:]:
            array = arrays[spec.name]
            for position in (p for p, name in enumerate(spec.shape) if p and name == axis):
                array = reorder(array, position)
            changed[spec.name] = array
    return changed


def garbled(signature: Signature, mask: TensorSpec, base: Arrays, *, hidden: bool) -> Arrays:
    """``base`` with other values in the elements that ``mask`` hides, or in those it does not.

    They are finite and allowed: a thousand times a standard normal number, or one from the input's
    range; an integer without a range is 0 or 1, whichever it was not.
    """
    rng = np.random.default_rng(1)
    chosen = base[mask.name] if hidden else ~base[mask.name]

    def change(spec: TensorSpec) -> _Array:
        array = base[spec.name]
        where = chosen.reshape(*chosen.shape, *(1,) * (array.ndim - chosen.ndim))
        dtype = np.dtype(spec.dtype)
        other: _Array
        if dtype.kind == "f":
            other = 1000 * rng.standard_normal(array.shape)
            if spec.range is not None:
                other = _elsewhere(spec, array, np.abs(other))
        elif spec.range is not None and not all(map(isfinite, spec.range)):
            other = array + 1 if spec.range[1] == inf else array - 1
        elif spec.range is not None:
            low, high = map(int, _limits(spec))
            # Never the same id again, unless there is only one.
            step = rng.integers(1, max(high - low, 1), array.shape, endpoint=True)
            other = low + (array.astype(np.int64) - low + step) % (high - low + 1)
        else:
            other = array == 0
        return np.where(where, other, array).astype(dtype)

    by_name = {spec.name: spec for spec in signature.inputs}
    return base | {name: change(by_name[name]) for name in mask.masks}


def padded(signature: Signature, base: Arrays, axis: str, length: int) -> Arrays:
    """``base`` made longer along ``axis`` by elements that every mask with this axis hides.

    Beneath the masks the last element is repeated.
    """

    def lengthen(spec: TensorSpec) -> _Array:
        array = base[spec.name]
        axes = zip((None, *spec.shape[1:]), array.shape, strict=True)  # the batch has no name
        widths = [(0, length - n if name == axis else 0) for name, n in axes]
        if spec.masks:
            return np.pad(array, widths, constant_values=True)
        return np.pad(array, widths, mode="edge")

    return {spec.name: lengthen(spec) for spec in signature.inputs}


def _says_what_is_valid(signature: Signature) -> bool:
    return bool(signature.axes) or any(spec.range or spec.masks for spec in signature.inputs)


def _within(spec: TensorSpec, array: _Array) -> _Array:
    return array if spec.range is None else array.clip(*_limits(spec))


def _elsewhere(spec: TensorSpec, array: _Array, far: _Array) -> _Array:
    """The end of the range that is further away; ``far`` from the finite one if one is infinite."""
    low, high = _limits(spec)
    other: _Array
    if np.isfinite(low) and np.isfinite(high):
        other = np.where(array - low < high - array, high, low)
    elif np.isfinite(low):
        other = low + far
    else:
        other = high - far if np.isfinite(high) else far
    return other


def _silence_features(spec: TensorSpec, array: _Array) -> _Array:
    """Zero at one index of the last axis of a fixed length, the next one in each sample."""
    axes = [a for a, length in enumerate(spec.shape) if a and isinstance(length, int)]
    quiet = array.copy()
    if axes:
        features = np.moveaxis(quiet, axes[-1], 1)
        rows = np.arange(len(quiet))
        features[rows, rows % features.shape[1]] = 0
    return quiet


def _random_mask(shape: tuple[int, ...], rng: np.random.Generator) -> _Array:
    size = int(np.prod(shape[1:]))
    hidden = rng.integers(0, max(size, 1), shape[0])
    ranks = rng.permuted(np.tile(np.arange(size), (shape[0], 1)), axis=1)
    return (ranks < hidden[:, None]).reshape(shape)


def _all_but_one(mask: _Array) -> _Array:
    """Everything hidden but one element of each sample that was not, another in each sample."""
    flat = mask.reshape(len(mask), -1)
    open_ = ~flat | flat.all(axis=1, keepdims=True)
    kept = np.arange(len(flat)) % open_.sum(axis=1)
    is_kept = open_ & (open_.cumsum(axis=1) - 1 == kept[:, None])
    result: _Array = ~is_kept.reshape(mask.shape)
    return result


def _limits(spec: TensorSpec) -> tuple[Any, Any]:
    """The ends of the range as the dtype holds them, within it for whole numbers."""
    assert spec.range is not None
    low, high = spec.range
    dtype = np.dtype(spec.dtype)
    if dtype.kind in "iu":
        least, most = np.iinfo(dtype).min, np.iinfo(dtype).max
        first, last = (min(max(end, least), most) for end in (low, high))
        return dtype.type(ceil(first)), dtype.type(floor(last))
    return dtype.type(low), dtype.type(high)


def found_lengths(signature: Signature, arrays: Arrays) -> dict[str, int]:
    """The length of each dynamic axis but the batch in inputs that fit the signature."""
    return {
        name: length
        for spec in signature.inputs
        for name, length in zip(spec.shape[1:], arrays[spec.name].shape[1:], strict=True)
        if isinstance(name, str)
    }
