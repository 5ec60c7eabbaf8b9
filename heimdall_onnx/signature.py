"""What a model takes and gives: names, dtypes, shapes, dynamic axes, units and ranges.

A model declares its signature in an attribute ``signature``. One that declares none is taken to
have `LOCALIZATION_SIGNATURE`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from heimdall_onnx.errors import DataError
from heimdall_onnx.npz import Rows

Arrays = dict[str, npt.NDArray[Any]]

DEGREES = "degrees latitude, longitude"
_PART_BYTES = 8 << 20


@dataclass(frozen=True)
class TensorSpec:
    """One input or output.

    Attributes:
        name: Its name in the graph.
        dtype: NumPy's name of the element type, e.g. ``"float32"``.
        shape: One entry per axis: a fixed length, or the name of a dynamic axis. Axis 0 is the
            batch.
        unit: Physical unit of the elements, e.g. ``"degrees latitude, longitude"``.
        range: Closed interval that every element must lie in, or None.
        sigma_of: For a predicted standard deviation: the output it belongs to.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    unit: str | None = None
    range: tuple[float, float] | None = None
    sigma_of: str | None = None

    def describe(self) -> str:
        """Name, dtype and shape on one line, as error messages show them."""
        return f"{self.name}: {self.dtype} ({', '.join(map(str, self.shape))})"


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of a model, in the order of its ``forward``."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def position_output(self) -> TensorSpec | None:
        """The output that holds positions on the ground, if the model has one."""
        return next((o for o in self.outputs if o.unit == DEGREES and o.sigma_of is None), None)

    @property
    def sigma_output(self) -> TensorSpec | None:
        """The output that holds the positions' predicted standard deviation, if there is one."""
        position = self.position_output
        if position is None:
            return None
        return next((o for o in self.outputs if o.sigma_of == position.name), None)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable copy; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Signature:
        """The signature that `to_dict` wrote (lists, as JSON gives them, are taken as tuples)."""

        def spec(entry: Mapping[str, Any]) -> TensorSpec:
            span = entry.get("range")
            return TensorSpec(
                **{
                    **entry,
                    "shape": tuple(entry["shape"]),
                    "range": tuple(span) if span is not None else None,
                }
            )

        return cls(tuple(map(spec, data["inputs"])), tuple(map(spec, data["outputs"])))

    def random_inputs(self, count: int, seed: int = 0) -> Arrays:
        """Random inputs: one array of ``count`` samples per input.

        Floating-point inputs are standard normal, others 0 or 1, since they may be indices.
        Dynamic axes other than the batch get length 8.
        """
        rng = np.random.default_rng(seed)
        arrays = {}
        for spec in self.inputs:
            shape = (count, *(n if isinstance(n, int) else 8 for n in spec.shape[1:]))
            normal = np.issubdtype(np.dtype(spec.dtype), np.floating)
            values = rng.standard_normal(shape) if normal else rng.integers(0, 2, shape)
            arrays[spec.name] = values.astype(spec.dtype)
        return arrays

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
        counts = {arrays[s.name].shape[0] for s in self.inputs if _has_samples(arrays, s.name)}
        if len(counts) > 1:
            problems.append(f"inputs have different numbers of samples: {sorted(counts)}")
        if problems:
            expected = "; ".join(spec.describe() for spec in self.inputs)
            raise DataError(
                f"{source} can't be fed to the model. Expected {expected}. Found:\n  - "
                + "\n  - ".join(problems)
            )
        return int(counts.pop())


def _has_samples(arrays: Mapping[str, Rows], name: str) -> bool:
    return name in arrays and arrays[name].ndim > 0


def _array_problems(spec: TensorSpec, array: Rows) -> list[str]:
    problems = []
    if array.dtype != np.dtype(spec.dtype):
        problems.append(f"{spec.name} has dtype {array.dtype}, expected {spec.dtype}")
    fits = len(array.shape) == len(spec.shape) and all(
        isinstance(want, str) or want == have
        for want, have in zip(spec.shape, array.shape, strict=True)
    )
    if not fits:
        problems.append(f"{spec.name} has shape {array.shape}, expected {spec.shape}")
    elif array.shape[0] == 0:
        problems.append(f"{spec.name} has no samples")
    elif np.issubdtype(array.dtype, np.floating):
        rows = _nonfinite_rows(array)
        if rows.size:
            problems.append(
                f"{spec.name} has NaN or Inf in {rows.size} samples, first in sample {rows[0]}"
            )
    return problems


def _nonfinite_rows(array: Rows) -> npt.NDArray[np.intp]:
    """Indices of the rows that hold NaN or Inf; read in parts, as there may be many."""
    row_bytes = math.prod(array.shape[1:]) * array.dtype.itemsize
    step = max(1, _PART_BYTES // max(row_bytes, 1))
    found = [np.empty(0, np.intp)]
    for start in range(0, array.shape[0], step):
        part = array[start : start + step]
        finite = np.isfinite(part).reshape(len(part), -1).all(axis=1)
        found.append(start + np.flatnonzero(~finite))
    return np.concatenate(found)


def localization_signature(uncertainty_range: tuple[float, float] = (0.01, 1.0)) -> Signature:
    """Signature of the reference model with the given limits of its uncertainties, in degrees."""
    return Signature(
        inputs=(TensorSpec("mel_spectrogram", "float32", ("batch", 3, 128, 32)),),
        outputs=(
            TensorSpec("positions", "float32", ("batch", 2), unit=DEGREES),
            TensorSpec(
                "uncertainties",
                "float32",
                ("batch", 2),
                unit=DEGREES,
                range=uncertainty_range,
                sigma_of="positions",
            ),
        ),
    )


LOCALIZATION_SIGNATURE = localization_signature()


def signature_of(model: object) -> Signature:
    """The signature a model declares, or the localization signature where it declares none.

    Raises:
        DataError: If the attribute ``signature`` is something else than a `Signature`.
    """
    declared = getattr(model, "signature", LOCALIZATION_SIGNATURE)
    if not isinstance(declared, Signature):
        raise DataError(
            f"{type(model).__name__}.signature must be a heimdall_onnx.Signature, "
            f"found {type(declared).__name__}"
        )
    return declared
