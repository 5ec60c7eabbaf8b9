"""What a model takes and gives: names, dtypes, shapes, dynamic axes, units, ranges and masks.

A model declares its signature in an attribute ``signature``, or a file beside its checkpoint does.
That of a model without either is found by `model.derive`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from heimdall_onnx.common.arrays import Rows, parts
from heimdall_onnx.common.errors import DataError
from heimdall_onnx.common.text import DEGREES, listed, shown

DEFAULT_LENGTHS = (1, 2, 3, 8)
UNDECLARED_LENGTHS = (16, 8)
_DEGREES = (DEGREES, "degrees", "degree", "deg", "°")


@dataclass(frozen=True)
class TensorSpec:
    """One input or output.

    Attributes:
        name: Its name in the graph.
        dtype: NumPy's name of the element type, e.g. ``"float32"``.
        shape: One entry per axis: a fixed length, or the name of a dynamic axis. Axis 0 is the
            batch.
        unit: Physical unit of the elements, e.g. ``"degrees latitude, longitude"``.
        range: Closed interval. Every element of an output must lie in it; example values of an
            input are drawn from it, both ends included: where an id is looked up in a table, it
            says how long the table is.
        sigma_of: For a predicted standard deviation: the output it belongs to.
        log_variance_of: For a predicted natural logarithm of a variance: the output it belongs
            to, whose squared unit the variance has.
        masks: For a boolean input: the inputs whose elements it hides, True meaning hidden. Its
            axes are the first axes of each of them.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    unit: str | None = None
    range: tuple[float, float] | None = None
    sigma_of: str | None = None
    log_variance_of: str | None = None
    masks: tuple[str, ...] = ()

    @property
    def spread_of(self) -> str | None:
        """The output whose predicted spread this is, as a deviation or a log variance."""
        return self.sigma_of or self.log_variance_of

    def describe(self) -> str:
        """Name, dtype and shape on one line, as error messages show them."""
        return f"{self.name}: {self.dtype} ({', '.join(map(str, self.shape))})"


@dataclass(frozen=True)
class Axis:
    """A dynamic axis other than the batch.

    Attributes:
        name: As the shapes call it.
        lengths: Lengths at which the model must work. It is exported and compared at the last of
            them, and then proven at each of the others.
        permutable: Whether the order along it is of no consequence to the outputs, as that of
            receivers in a set.
    """

    name: str
    lengths: tuple[int, ...] = DEFAULT_LENGTHS
    permutable: bool = False


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of a model, in the order of its ``forward``.

    Attributes:
        inputs: What it takes.
        outputs: What it gives.
        axes: What is known of its dynamic axes; one without an entry here has `UNDECLARED_LENGTHS`,
            since it may not work at shorter ones, and an order that matters.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    axes: tuple[Axis, ...] = ()

    @property
    def input_names(self) -> tuple[str, ...]:
        """What the inputs are called, in order."""
        return tuple(spec.name for spec in self.inputs)

    @property
    def fixed_batch(self) -> int | None:
        """Samples in each call of a model that takes no other number; None for any other."""
        batch = self.inputs[0].shape[0]
        return batch if isinstance(batch, int) else None

    @property
    def position_output(self) -> TensorSpec | None:
        """The output that holds positions on the ground, if the model has one."""
        return next((o for o in self.outputs if o.unit == DEGREES and o.spread_of is None), None)

    @property
    def sigma_output(self) -> TensorSpec | None:
        """The output that holds the positions' predicted spread, if there is one.

        It is a standard deviation or the logarithm of a variance; `deviations` tells them apart.
        """
        position = self.position_output
        if position is None:
            return None
        return next((o for o in self.outputs if o.spread_of == position.name), None)

    @property
    def dynamic_axes(self) -> tuple[Axis, ...]:
        """Every dynamic axis of the inputs but the batch, in the order in which they appear."""
        declared = {axis.name: axis for axis in self.axes}
        names = dict.fromkeys(n for s in self.inputs for n in s.shape[1:] if isinstance(n, str))
        return tuple(declared.get(name, Axis(name, UNDECLARED_LENGTHS)) for name in names)

    def deviations(self, outputs: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.float64] | None:
        """The predicted standard deviations of the positions.

        Args:
            outputs: One array per output, N samples each.

        Returns:
            (N, 2) in degrees, where a log variance ℓ gives exp(ℓ/2) and one value for both
            coordinates stands twice; None for a model without positions or their spread.
        """
        position, spread = self.position_output, self.sigma_output
        if position is None or spread is None:
            return None
        values = outputs[spread.name].astype(np.float64)
        if spread.log_variance_of is not None:
            with np.errstate(over="ignore"):
                values = np.exp(0.5 * values)
        shape = outputs[position.name].shape
        if values.ndim < len(shape):
            values = values.reshape(*values.shape, *(1,) * (len(shape) - values.ndim))
        return np.broadcast_to(values, shape)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable copy; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Signature:
        """The signature that `to_dict` wrote (lists, as JSON gives them, are taken as tuples).

        What is left out has its default: arguments of an ensemble that an earlier version or a
        person wrote may have less.
        """

        def fields(entry: Mapping[str, Any]) -> dict[str, Any]:
            return {n: tuple(v) if isinstance(v, list) else v for n, v in entry.items()}

        return cls(
            tuple(TensorSpec(**fields(entry)) for entry in data["inputs"]),
            tuple(TensorSpec(**fields(entry)) for entry in data["outputs"]),
            tuple(Axis(**fields(entry)) for entry in data.get("axes", ())),
        )

    def problems(self) -> list[str]:
        """What contradicts itself in the declaration, each with what to write instead."""
        return [
            *self._name_problems(),
            *(p for s in self.inputs for p in _spec_problems(s, "input")),
            *(p for s in self.outputs for p in _spec_problems(s, "output")),
            *(p for s in self.inputs for p in self._mask_problems(s)),
            *(p for s in self.outputs for p in self._spread_problems(s)),
            *self._axis_problems(),
        ]

    def require_consistent(self, source: str) -> None:
        """Return if the declaration does not contradict itself.

        Args:
            source: Whose declaration it is, for the message.

        Raises:
            DataError: With all `problems` at once.
        """
        if problems := self.problems():
            raise DataError(f"{source} contradicts itself:{listed(problems)}")

    def _name_problems(self) -> list[str]:
        counts = Counter(spec.name for spec in (*self.inputs, *self.outputs))
        found = [
            f"{count} inputs and outputs are called {name!r}: in the graph each has a name of its "
            "own; rename the others"
            for name, count in counts.items()
            if count > 1
        ]
        if not self.inputs:
            found.append("there are no inputs: a model needs one at least")
        # Named alike, or the lengths of their batches could not be told to be the same.
        batches = {str(spec.shape[0]) for spec in self.inputs if spec.shape}
        if len(batches) > 1:
            found.append(
                f"axis 0, the batch, is called {', '.join(map(repr, sorted(batches)))}: call it "
                "alike in every input"
            )
        return found

    def _mask_problems(self, mask: TensorSpec) -> list[str]:
        if not mask.masks:
            return []
        problems = []
        if mask.dtype != "bool":
            problems.append(
                f"{mask.name} masks {', '.join(mask.masks)}, but is {mask.dtype}: a mask is a "
                "boolean input (dtype 'bool'), True where an element is hidden"
            )
        inputs = {spec.name: spec for spec in self.inputs}
        for name in mask.masks:
            hidden = inputs.get(name)
            if hidden is None or hidden is mask:
                others = sorted(inputs.keys() - {mask.name})
                problems.append(
                    f"{mask.name} masks {name!r}, which is no other input: expected one of "
                    f"{others or 'none'}"
                )
            elif hidden.shape[: len(mask.shape)] != mask.shape or len(mask.shape) < 2:
                problems.append(
                    f"{mask.name} masks {name}, but its axes {_axes(mask)} are not the batch and "
                    f"further first axes of {_axes(hidden)}"
                )
        return problems

    def _spread_problems(self, spread: TensorSpec) -> list[str]:
        problems = []
        if spread.sigma_of is not None and spread.log_variance_of is not None:
            problems.append(
                f"{spread.name} has sigma_of and log_variance_of: it can be the one or the other"
            )
        others = {o.name: o for o in self.outputs if o.spread_of is None}
        for key in ("sigma_of", "log_variance_of"):
            name = getattr(spread, key)
            if name is None:
                continue
            if name not in others:
                problems.append(
                    f"{key} of {spread.name} is {name!r}, which is no output with a spread: "
                    f"expected one of {sorted(others) or 'none'}"
                )
                continue
            units = {
                DEGREES if unit in _DEGREES else unit for unit in (spread.unit, others[name].unit)
            } - {None}
            if key == "sigma_of" and len(units) > 1:
                problems.append(
                    f"{spread.name} is in {spread.unit!r}, but {name}, whose deviation it is, in "
                    f"{others[name].unit!r}: expected the same unit"
                )
            target = others[name].shape
            fits = len(spread.shape) <= len(target) and all(
                have in (want, 1) for have, want in zip(spread.shape[1:], target[1:], strict=False)
            )
            if not fits:
                problems.append(
                    f"{spread.name} with axes {_axes(spread)} can't be the spread of {name} "
                    f"with {_axes(others[name])}: expected the same axes, or length 1 for a "
                    "spread that its elements share"
                )
        return problems

    def _axis_problems(self) -> list[str]:
        named = {n for s in self.inputs for n in s.shape[1:] if isinstance(n, str)}
        known = f"the dynamic axes of the inputs are {sorted(named) or 'none'}"
        problems = []
        for name, count in Counter(axis.name for axis in self.axes).items():
            if count > 1:
                problems.append(f"axis {name!r} is declared {count} times: declare it once")
            if name not in named:
                problems.append(
                    f"axis {name!r} is in no input behind the batch: {known}. Name it in a shape, "
                    "or leave it out"
                )
        for axis in self.axes:
            whole = all(_is_length(length) for length in axis.lengths)
            if not whole or len(set(axis.lengths)) < 2 or axis.lengths[-1] < 2:
                problems.append(
                    f"axis {axis.name!r} has the lengths {axis.lengths}: expected two different "
                    "whole numbers at least, the last of them 2 or more, with which the model is "
                    "exported; a length that never changes belongs into the shape"
                )
        return problems

    def check_inputs(self, arrays: Mapping[str, Rows], source: str) -> int:
        """Check that ``arrays`` can be fed to the model and return the number of samples.

        Args:
            arrays: One array per input, sample axis first.
            source: Where the arrays come from, for the message.

        Raises:
            DataError: With every problem at once: missing inputs, wrong dtypes or shapes, no
                samples, differing sample counts, NaN or Inf.
        """
        problems = []
        for spec in self.inputs:
            array = arrays.get(spec.name)
            if array is None:
                problems.append(f"no array {spec.name!r}; found {sorted(arrays) or 'none'}")
                continue
            problems += _array_problems(spec, array)
        given = (arrays[spec.name] for spec in self.inputs if spec.name in arrays)
        counts = {array.shape[0] for array in given if array.ndim > 0}
        if len(counts) > 1:
            problems.append(f"inputs have different numbers of samples: {sorted(counts)}")
        if problems:
            expected = "; ".join(spec.describe() for spec in self.inputs)
            raise DataError(
                f"{source} can't be fed to the model. Expected {expected}. Found:{listed(problems)}"
            )
        return int(counts.pop())


def _axes(spec: TensorSpec) -> str:
    return f"({', '.join(map(str, spec.shape))})"


def _is_length(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _spec_problems(spec: TensorSpec, kind: Literal["input", "output"]) -> list[str]:
    problems = []
    if spec.dtype == "bfloat16":
        return [
            f"{spec.name} is bfloat16, which NumPy does not have and few operators of ONNX Runtime "
            "take on a CPU: convert the model with model.float() or model.half()"
        ]
    try:
        dtype = np.dtype(spec.dtype)
    except TypeError:
        return [f"{spec.name} has dtype {spec.dtype!r}: expected NumPy's name of one, as 'float32'"]
    if not spec.shape and kind == "input":
        problems.append(f"{spec.name} has no axes: axis 0 is the batch, as in ('batch',)")
    wrong = [n for n in spec.shape if not (_is_length(n) or (isinstance(n, str) and n))]
    if wrong:
        problems.append(
            f"{spec.name} has an axis {wrong[0]!r}: expected a length of 1 or more, or a name"
        )
    if spec.range is not None:
        problems += _range_problems(spec, dtype, kind)
    if kind == "output" and spec.masks:
        problems.append(f"{spec.name} is an output with `masks`: only an input can mask others")
    if kind == "input" and spec.spread_of is not None:
        problems.append(f"{spec.name} is an input with a spread: only outputs have one")
    return problems


def _range_problems(spec: TensorSpec, dtype: np.dtype[Any], kind: str) -> list[str]:
    assert spec.range is not None
    if len(spec.range) != 2 or not all(isinstance(end, int | float) for end in spec.range):
        return [f"{spec.name} has the range {spec.range!r}: expected two numbers, low and high"]
    low, high = spec.range
    if not low <= high:
        return [f"{spec.name} has the range [{low}, {high}]: the low end must come first"]
    if dtype.kind == "b":
        return [f"{spec.name} is boolean and has a range: it takes True and False"]
    if kind == "output":
        return []
    if dtype.kind in "iu":
        least, most = np.iinfo(dtype).min, np.iinfo(dtype).max
        first = least if low == -math.inf else math.ceil(low) if low < math.inf else most + 1
        last = most if high == math.inf else math.floor(high) if high > -math.inf else least - 1
        if not least <= first <= last <= most:
            return [
                f"{spec.name} has the range [{low}, {high}], which holds no {dtype} or more than "
                f"it can: expected whole numbers within [{least}, {most}]"
            ]
    return []


def _array_problems(spec: TensorSpec, array: Rows) -> list[str]:
    problems = []
    if array.dtype != np.dtype(spec.dtype):
        problems.append(f"{spec.name} has dtype {array.dtype}, expected {spec.dtype}")
    # However many samples there are, a model with a fixed batch is called with them in parts.
    fits = len(array.shape) == len(spec.shape) and all(
        isinstance(want, str) or want == have
        for want, have in zip(spec.shape[1:], array.shape[1:], strict=True)
    )
    if not fits:
        problems.append(f"{spec.name} has shape {array.shape}, expected {spec.shape}")
    elif array.shape[0] == 0:
        problems.append(f"{spec.name} has no samples")
    elif isinstance(array, np.ndarray) and np.issubdtype(array.dtype, np.floating):
        rows = _nonfinite_rows(array)
        if rows.size:
            problems.append(
                f"{spec.name} has NaN or Inf in {rows.size} samples, first in sample {rows[0]}"
            )
    return problems


def _nonfinite_rows(array: Rows) -> npt.NDArray[np.intp]:
    """Indices of the rows that hold NaN or Inf; read in parts, as there may be many."""
    found = [np.empty(0, np.intp)]
    for start, part in parts(array):
        finite = np.isfinite(part).reshape(len(part), -1).all(axis=1)
        found.append(start + np.flatnonzero(~finite))
    return np.concatenate(found)


def differences(expected: Signature, found: Signature) -> Iterator[tuple[str, str, str, str]]:
    """Kind, name, what was expected and what was found, of all in which two signatures differ."""
    kinds: tuple[tuple[str, Sequence[TensorSpec | Axis], Sequence[TensorSpec | Axis]], ...] = (
        ("input", expected.inputs, found.inputs),
        ("output", expected.outputs, found.outputs),
        ("axis", expected.axes, found.axes),
    )
    for kind, want, have in kinds:
        wanted, had = ({spec.name: spec for spec in specs} for specs in (want, have))
        for name in dict.fromkeys((*wanted, *had)):
            if wanted.get(name) != had.get(name):
                yield kind, repr(name), _described(wanted.get(name)), _described(had.get(name))
        if [*wanted] != [*had] and wanted.keys() == had.keys():
            yield kind, "order", ", ".join(wanted), ", ".join(had)


def _described(spec: Any) -> str:
    """Everything a spec says that is not left to its default; ``none`` where there is no spec."""
    if spec is None:
        return "none"
    said = {name: value for name, value in asdict(spec).items() if value not in (None, (), False)}
    return ", ".join(f"{name} {shown(value)}" for name, value in said.items() if name != "name")


def signature_of(model: object) -> Signature:
    """The signature a model declares.

    Raises:
        DataError: If the attribute ``signature`` is missing, something else than a `Signature`, or
            contradicts itself.
    """
    declared = getattr(model, "signature", None)
    if declared is None:
        raise DataError(
            f"{type(model).__name__} declares no signature: give it one, model.signature = "
            "Signature(...), or what derive_signature(model, arrays) finds"
        )
    if not isinstance(declared, Signature):
        raise DataError(
            f"{type(model).__name__}.signature must be a heimdall_onnx.Signature, "
            f"found {type(declared).__name__}"
        )
    declared.require_consistent(f"{type(model).__name__}.signature")
    return declared
