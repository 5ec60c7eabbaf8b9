"""The signature of a model that declares none, found by running it.

What goes in is read from the parameters of ``forward`` and the arrays that there are for them, or
guessed from the layers and the configuration of a model that has one. What may be longer or
shorter, and what comes out, is seen by running a copy of the model at other sizes. Nothing is said
of units or masks, nor of ranges but where the model was seen to fail beyond them.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from heimdall_onnx.common.arrays import FIRST_ROWS, UNNAMED, Arrays, Rows
from heimdall_onnx.common.errors import DataError, EvidenceError
from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.common.text import shown
from heimdall_onnx.model.copies import copy_model
from heimdall_onnx.model.inference import (
    call_pytorch,
    flatten_outputs,
    input_order,
    plain_attention,
)
from heimdall_onnx.model.signature import Axis, Signature, TensorSpec

log = get_logger(__name__)

# What training wants beside the inputs: no input where it may be left away.
_LABELS = {"label", "labels", "target", "targets"}
_MOST_TRIES = 300
# Of sequences; images have no usual size.
_LENGTHS = (16, 4)
# Of Hugging Face and of timm.
_CONFIGURATIONS = ("config", "default_cfg")
# Where a model or its configuration says for which size it was made.
_SIZE_FIELDS = ("image_size", "img_size", "sample_size", "max_source_positions")
_SPECTROGRAM_FIELDS = ("max_length", "num_mel_bins")
_AXES = {(4, 2): "height", (4, 3): "width"}

_Axis = tuple[str, int]  # of an input
# An axis, its length before it was changed, and the answers at each one after that.
_Change = tuple[str, int, Mapping[int, Mapping[str, Tensor]]]
_Guess = tuple[tuple[int, ...], int | None]  # a shape without the batch, the largest of integers


def derive_signature(
    model: nn.Module, arrays: Mapping[str, Rows] | None = None
) -> tuple[Signature, tuple[str, ...]]:
    """Find what ``model`` takes and gives by running a copy of it.

    Inputs are those of the arrays that are called as a parameter of ``forward``, which a single
    array for a single parameter need not be; a parameter with a default is left at it where no
    array has its name. Axis 0 is the batch, of a fixed size where the model fails at others;
    another axis is dynamic where the model runs at other lengths of it, by itself or together
    with those of the same length, and can be exported so. Integers have a range where the model
    takes the last row of a table and fails at the next one.

    Args:
        model: In eval mode.
        arrays: Sample axis first; the first rows are enough. Without any, the model's
            ``example_input_array`` is taken, or inputs are guessed by its layers and its
            configuration, as Hugging Face and timm leave one.

    Returns:
        The signature as far as the model was run, and how it was found, in words.

    Raises:
        DataError: If nothing is found that the model runs on, saying what to give.
        EvidenceError: If the model can't be copied.
    """
    search = _Search(copy_model(model).eval())  # a call may change it
    source = "the evaluation data"
    if not arrays:
        arrays, source = search.example(), "the model's example_input_array"
    inputs = search.chosen(arrays, source) if arrays else search.guessed()
    signature = search.describe(inputs)
    log.info("signature found", notes=search.notes)
    return signature, tuple(search.notes)


class _Search:
    """Runs a model on one thing after the other, and notes what it does."""

    def __init__(self, model: nn.Module) -> None:
        self.notes: list[str] = []
        self._model, self._name = model, type(model).__name__
        parameters = inspect.signature(model.forward).parameters.values()
        self._required = {
            p.name: p.default is p.empty
            for p in parameters
            if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        }

    def example(self) -> Arrays:
        """The arrays of Lightning's ``example_input_array``, if there is one."""
        given = getattr(self._model, "example_input_array", ())
        given = [given] if isinstance(given, Tensor) else given or ()
        named = given if isinstance(given, Mapping) else dict(zip(self._required, given))  # noqa: B905
        return {n: t.detach().cpu().numpy() for n, t in named.items() if torch.is_tensor(t)}

    def chosen(self, arrays: Mapping[str, Rows], source: str) -> Arrays:
        """The inputs among ``arrays``, in the order of ``forward``."""
        if len(arrays) == 1 and (only := next(iter(arrays))) in UNNAMED:
            arrays = {next(iter(self._required), "input"): arrays[only]}
        names = [
            n for n, must in self._required.items() if n in arrays and (must or n not in _LABELS)
        ]
        others = [name for name in arrays if name not in self._required]
        missing = [n for n, must in self._required.items() if must and n not in names]
        single = len(others) == 1 and len(missing) <= 1 and (missing or not names)
        if single or not self._required:
            names, others, missing = [*names, *others], [], []
        if missing or not names:
            raise self._unknown(f"has no array for {', '.join(missing) or 'it'}", arrays)
        aside = f"; left aside: {', '.join(others)}" if others else ""
        self.notes.append(f"inputs: {', '.join(names)} of {source}{aside}")
        rows = np.arange(FIRST_ROWS) % min(arrays[name].shape[0] for name in names)
        try:
            return self._batched(
                {name: np.asarray(arrays[name][:FIRST_ROWS])[rows] for name in names}
            )
        except EvidenceError as error:
            raise self._unknown(f"does not run on {source}: {error}", arrays) from error

    def guessed(self) -> Arrays:
        """Inputs as the model's configuration has them, each row of which it answers by itself.

        Layers alone don't tell: what is flattened may have had any shape before.
        """
        if not any(getattr(self._model, name, None) for name in _CONFIGURATIONS):
            raise self._unknown("has neither evaluation data, an example nor a configuration", {})
        names = [name for name, must in self._required.items() if must]
        main = getattr(self._model, "main_input_name", None)  # of Hugging Face
        if main in self._required and set(names) <= {main}:
            names = [main]
        names = names or [*self._required][:1]
        every = itertools.product(_guesses(self._model).items(), repeat=len(names))
        for guesses in itertools.islice(every, _MOST_TRIES):
            inputs = {n: _drawn(*guess) for n, (guess, _) in zip(names, guesses, strict=True)}
            try:
                batched = self._batched(inputs)
                last = self._answers({name: array[-1:] for name, array in inputs.items()})
            except EvidenceError:
                continue
            if _ends_with(self._answers(batched), last):
                self.notes += [
                    f"there is no evaluation data, so {name} was guessed: {because}"
                    for name, (_, because) in zip(names, guesses, strict=True)
                ]
                return batched
        raise self._unknown("runs on nothing that was guessed", {})

    def _batched(self, inputs: Arrays) -> Arrays:
        """All rows, or as many as the model takes.

        Raises:
            EvidenceError: If it takes none, with what it says of all.
        """
        for count in (FIRST_ROWS, 1, 2):
            part = {name: array[:count] for name, array in inputs.items()}
            if self._runs(part):
                return part
        self._answers(inputs)
        raise EvidenceError(f"{self._name} returned no tensor")

    def describe(self, inputs: Arrays) -> Signature:
        """The signature of a model that runs on ``inputs``."""
        rows = len(next(iter(inputs.values())))
        two = {name: array[:2] for name, array in inputs.items()}
        base, changes, axes = self._answers(two), list[_Change](), list[Axis]()
        batch: int | str = rows
        if rows == FIRST_ROWS:
            batch = "batch"
            changes.append(("batch", 2, {FIRST_ROWS: self._answers(inputs)}))
        else:
            self.notes.append(f"the batch is fixed at {rows}: the model fails at {FIRST_ROWS}")
        shapes: dict[str, list[int | str]] = {n: [batch, *a.shape[1:]] for n, a in two.items()}
        fixed: set[_Axis] | None = None
        for group, here, lengths in self._resizable(two):
            where = " and ".join(f"axis {axis} of {name}" for name, axis in group)
            answers = {n: self._answers(_resized(two, group, n)) for n in lengths}
            first = answers[lengths[0]].values()
            same = [a.shape for a in first] == [a.shape for a in base.values()]
            # A network for images was made for one size, unless what it gives has that size too.
            image = len(dict(group)) == 1 and all(two[name].ndim > 3 for name, _ in group)
            if same and image:
                self.notes.append(f"{where}: fixed, no output has another shape at {lengths[0]}")
                continue
            fixed = self._fixed_in_export(two) if fixed is None else fixed
            if fixed.intersection(group):
                self.notes.append(f"{where}: fixed, since its length is a constant when exported")
                continue
            owner, position = group[0]
            kind = _AXES.get((two[owner].ndim, position), "length")
            names = (kind, f"{owner}_{kind}", f"{owner}_{position}")
            name = next(n for n in names if all(n != axis.name for axis in axes))
            axes.append(Axis(name, (*lengths, here)))
            changes.append((name, here, answers))
            for one, axis in group:
                shapes[one][axis] = name
            ran = ", ".join(map(str, sorted((*lengths, here))))
            self.notes.append(f"{name}, {where}: dynamic, the model runs at {ran}")
        specs = (
            TensorSpec(name, self._dtype(array), tuple(shapes[name]), range=self._range(name, two))
            for name, array in two.items()
        )
        return self._with_outputs(Signature(tuple(specs), (), tuple(axes)), base, changes)

    def _resizable(self, inputs: Arrays) -> Iterator[tuple[list[_Axis], int, list[int]]]:
        """Axes that can have other lengths, those that must be alike together, and two of them."""
        left = {
            (name, axis): length
            for name, array in inputs.items()
            for axis, length in enumerate(array.shape)
            if axis and length > 1
        }
        for axis, length in [*left.items()]:
            alike = [one for one, other in left.items() if other == length]
            for group in ([axis], alike)[: len(alike)] if axis in left else ():
                tries = (length // 2, length + 1, 2 * length, length - 1)
                runs = (n for n in tries if n > 1 and self._runs(_resized(inputs, group, n)))
                if found := [*itertools.islice(runs, 2)]:
                    yield group, length, found
                    left = {one: n for one, n in left.items() if one not in group}
                    break

    def _fixed_in_export(self, inputs: Arrays) -> set[_Axis]:
        """Axes whose length becomes a constant when the model is traced, by a loop for example."""
        order = input_order(self._model, inputs)
        tensors = {name: torch.from_numpy(array.copy()) for name, array in inputs.items()}
        auto = torch.export.Dim.AUTO
        shapes = {n: dict.fromkeys(range(tensors[n].ndim), auto) for n in order.names}
        printed = io.StringIO()
        self._answers(inputs)  # an export finds what a call keeps, a mask of this length, say
        try:
            with (
                contextlib.redirect_stdout(printed),
                contextlib.redirect_stderr(printed),
                plain_attention(),
            ):
                program = torch.export.export(
                    self._model,
                    tuple(tensors[name] for name in order.positional),
                    {name: tensors[name] for name in order.keywords},
                    dynamic_shapes=shapes if order.keywords else tuple(shapes.values()),
                    strict=False,
                )
        except Exception as error:  # whatever can't be traced
            reason = shown(str(error).partition("\n")[0])
            self.notes.append(f"no axis was tried for a constant length when exported: {reason}")
            return set()
        taken = [n for n in program.graph.nodes if n.name in program.graph_signature.user_inputs]
        return {
            (name, axis)
            for name, node in zip(order.names, taken, strict=True)
            for axis, length in enumerate(node.meta["val"].shape)
            if str(length).isdecimal()
        }

    def _range(self, name: str, inputs: Arrays) -> tuple[float, float] | None:
        """From 0 to the last row of the table that integers are looked up in; 0 and 1 of a mask."""
        array = inputs[name]
        if array.dtype.kind not in "iu" or array.min() < 0:
            return None
        if array.max() <= 1 and "mask" in name:
            return 0, 1
        tables = (nn.Embedding, nn.EmbeddingBag)
        rows = {m.num_embeddings for m in self._model.modules() if isinstance(m, tables)}
        for count in sorted(n for n in rows if array.max() < n <= np.iinfo(array.dtype).max):
            ends = (inputs | {name: np.full_like(array, last)} for last in (count - 1, count))
            if [self._runs(end) for end in ends] == [True, False]:
                self.notes.append(f"{name}: the model takes {count - 1} and fails at {count}")
                return 0, count - 1
        return None

    def _dtype(self, array: npt.NDArray[Any]) -> str:
        """The array's, but of floating-point numbers the model's own."""
        state = (*self._model.parameters(), *self._model.buffers())
        own = next((t.dtype for t in state if t.is_floating_point()), array.dtype)
        return str(own if array.dtype.kind == "f" else array.dtype).removeprefix("torch.")

    def _with_outputs(
        self, signature: Signature, base: Mapping[str, Tensor], changes: Sequence[_Change]
    ) -> Signature:
        """``signature`` with the outputs that can be declared; the others are noted."""
        taken, outputs = {spec.name for spec in signature.inputs}, []
        taken |= self._model.state_dict().keys()  # of the file's initializers
        for name, value in base.items():
            shape: list[int | str] = [*value.shape]
            problems = []
            for along, was, answers in changes:
                others = [a[name].shape for a in answers.values() if name in a]
                if {len(other) for other in others} != {value.ndim} or len(others) < len(answers):
                    problems = ["it has not always as many axes"]
                    break
                for axis, length in enumerate(value.shape):
                    found = [other[axis] for other in others]
                    if {*found} != {length}:
                        known = shape[axis] == was and found == [*answers]
                        shape[axis] = along if known else f"{name}_{axis}"
            called = f"output.{name}" if name in taken else name
            spec = TensorSpec(called, str(value.dtype).removeprefix("torch."), tuple(shape))
            problems += replace(signature, outputs=(spec,)).problems()
            if problems:
                self.notes.append(f"output {spec.describe()} was left out: {problems[0]}")
            else:
                outputs.append(spec)
        if not outputs:
            raise self._unknown(f"has no output to compare; {'; '.join(self.notes)}", {})
        return replace(signature, outputs=tuple(outputs))

    def _answers(self, inputs: Arrays) -> dict[str, Tensor]:
        return flatten_outputs(call_pytorch(self._model, inputs))

    def _runs(self, inputs: Arrays) -> bool:
        try:
            return bool(self._answers(inputs))
        except EvidenceError:
            return False

    def _unknown(self, problem: str, arrays: Mapping[str, Rows]) -> DataError:
        takes = ", ".join(
            f"{n}{'' if must else ' (optional)'}" for n, must in self._required.items()
        )
        found = ", ".join(f"{n} {a.dtype} {tuple(a.shape)}" for n, a in arrays.items())
        name = next(iter(self._required), "x")
        return DataError(
            f"{self._name} declares no signature, and none was found: it {problem}. Its forward "
            f"takes {shown(takes) or 'no names'}; evaluation data: {shown(found) or 'none'}. "
            "Give --eval-data with one array of those names per input, samples first, e.g. "
            f"np.savez('eval.npz', {name}=...), or a file <checkpoint>.signature.yaml with\n"
            f"inputs:\n  - {{name: {name}, dtype: float32, shape: [batch, 3, 224, 224]}}\n"
            "outputs:\n  - {name: scores, dtype: float32, shape: [batch, 10]}"
        )


def _resized(inputs: Arrays, axes: Sequence[_Axis], length: int) -> Arrays:
    """``inputs`` with another length along some axes, by leaving out or repeating."""
    changed = dict(inputs)
    for name, axis in axes:
        places = np.arange(length) % changed[name].shape[axis]
        changed[name] = np.take(changed[name], places, axis)
    return changed


def _ends_with(many: Mapping[str, Tensor], one: Mapping[str, Tensor]) -> bool:
    """Whether the first output that has rows ends with what the last row by itself gives."""
    for name, alone in one.items():
        value = many.get(name, alone)
        if alone.ndim and len(value) > len(alone):
            last = value[-len(alone) :].double()
            same = last.shape == alone.shape
            return same and torch.allclose(last, alone.double(), 1e-2, 1e-3, equal_nan=True)
    return many.keys() == one.keys()


def _drawn(shape: tuple[int, ...], largest: int | None) -> npt.NDArray[Any]:
    rng = np.random.default_rng(0)
    if largest is None:
        return rng.standard_normal((FIRST_ROWS, *shape)).astype(np.float32)
    return rng.integers(0, largest, (FIRST_ROWS, *shape), endpoint=True)


def _guesses(model: nn.Module) -> dict[_Guess, str]:
    """What an input may be, by the layers that may take it, the first ones first; and why."""
    found: list[Any] = []
    for owner in (model, getattr(model, "config", None), *model.modules()):
        configured = getattr(owner, "default_cfg", None)  # of timm
        found += [getattr(owner, field, None) for field in _SIZE_FIELDS]
        found.append(tuple(getattr(owner, field, None) for field in _SPECTROGRAM_FIELDS))
        found += [configured.get("input_size", ())[1:]] if isinstance(configured, dict) else []
    named = [(size,) if isinstance(size, int) else size for size in found]
    sizes = dict.fromkeys(tuple(s) for s in named if isinstance(s, list | tuple) and s and all(s))
    guesses: dict[_Guess, str] = {}
    for name, layer in model.named_modules():
        for shape, largest, what in _taken_by(layer, [*sizes]):
            said = f"{type(layer).__name__} {name} takes {what}, here {' × '.join(map(str, shape))}"
            guesses.setdefault((shape, largest), said)
    return guesses


def _taken_by(
    layer: nn.Module, sizes: Sequence[tuple[int, ...]]
) -> Iterator[tuple[tuple[int, ...], int | None, str]]:
    """Shapes without the batch, the largest of integers, and in words."""
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
        last = layer.num_embeddings - 1
        yield from (((length,), last, f"integers from 0 to {last}") for length in _LENGTHS)
    elif isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        count, channels = len(layer.kernel_size), layer.in_channels
        # A sound may have twice as many frames as there are positions behind its convolutions.
        own = [size * (count // len(size)) for size in sizes] if count > 1 else []
        own += [(n * size[0],) for size in sizes for n in (2, 1) if count == len(size) == 1]
        for sides in own:
            yield (channels, *sides), None, f"{channels} channels"
            if channels == 1:
                yield sides, None, "one channel"
    elif isinstance(layer, nn.Linear | nn.RNNBase | nn.LayerNorm):
        norm = layer.normalized_shape[-1] if isinstance(layer, nn.LayerNorm) else None
        width: Any = norm or getattr(layer, "in_features", None) or layer.input_size
        for shape in ((width,), *((length, width) for length in _LENGTHS)):
            yield shape, None, f"{width} features"
