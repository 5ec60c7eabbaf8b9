"""PyTorch's answers where it rounds otherwise: what a difference has to be held against.

Where PyTorch itself answers otherwise in float64, or with inputs and weights moved by a unit in the
last place, a difference of that size is no fault of an export: two of the values that a top-k, an
argmax or a sort chooses from tie, a threshold lies between two neighbouring numbers, or the answer
is ill-conditioned. Moving the data by what rounding does to them is the backward error analysis of
Wilkinson ("Rounding Errors in Algebraic Processes", 1963).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, cached_property
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from heimdall_onnx.common.arrays import Arrays, Floats
from heimdall_onnx.common.errors import EvidenceError
from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.evidence.parity.statistics import element_errors
from heimdall_onnx.evidence.parity.tolerance import Limit
from heimdall_onnx.model.copies import copy_model
from heimdall_onnx.model.examples import MOVED_ULPS, moved
from heimdall_onnx.model.inference import run_pytorch
from heimdall_onnx.model.signature import Signature

log = get_logger(__name__)

# Each is moved there and back, so that one of both breaks a tie of two the other way round.
_DRAWS = 6
# A few draws say of the size of an error no more than that.
SPREAD_FACTOR = 10.0
# Share by which values may differ and tie all the same, as far as they are near enough.
_TIED = 1e-5
# From here on values are there to be left out of a choice.
_SENTINEL = 1e9
_HALF = (torch.float16, torch.bfloat16)
_WIDE = dict.fromkeys((torch.float32, *_HALF), torch.float64)
_WIDE |= {torch.complex64: torch.complex128}
_aten = torch.ops.aten
_CHOOSING = {
    *(_aten.topk, _aten.sort, _aten.argsort, _aten.kthvalue, _aten.median, _aten.max, _aten.min),
    *(_aten.argmax, _aten.argmin, _aten.max_pool2d_with_indices),
}


class Rounding:
    """Answers of a PyTorch model that differ by no more than how it rounds.

    Args:
        model: In eval mode.
        signature: Its inputs and outputs.

    Attributes:
        raised: Whether the model's own code asked for less than float64 where it ran in that.
        halved: Whether it computes something in half precision; None before it ran in float64.
        missing: Why there is no reference in float64; empty where there is one.
    """

    def __init__(self, model: nn.Module, signature: Signature) -> None:
        self._model, self._signature = model, signature
        self.raised, self.missing = False, ""
        self.halved: bool | None = None

    @cached_property
    def _double(self) -> Any:
        # What is kept in half precision stays: other values may be cast to its type.
        double: Any = copy_model(self._model)
        return double._apply(lambda t: t.double() if t.dtype == torch.float32 else t)  # noqa: SLF001

    def exact(self, batch: Arrays) -> Arrays:
        """What PyTorch answers in float64.

        Raises:
            EvidenceError: If the model can't be run in it.
        """
        inputs = {
            name: array.astype(np.float64) if array.dtype.kind == "f" else array
            for name, array in batch.items()
        }
        double, usual, mode = self._double, _InDouble(), _InDouble()  # type: ignore[no-untyped-call]
        try:
            if self.halved is None:
                usual.wide = {}
                with usual:
                    run_pytorch(self._model, batch, self._signature)
                self.halved = usual.halved
            with mode:
                answers = run_pytorch(double, inputs, self._signature)
        except EvidenceError:
            return run_pytorch(double.double(), inputs, self._signature)
        self.raised |= mode.used
        return answers

    def spread(
        self, batch: Arrays, expected: Arrays, limits: Mapping[str, Limit]
    ) -> Callable[[], dict[str, Floats]]:
        """How far PyTorch's answers lie from ``expected``, its usual ones, element by element.

        Returns:
            What finds it when it is first called. By output, of the same shape: ten times the
            largest difference in the element, of floating-point outputs at least ten times its RMS
            in the sample, or in the column where ``limits`` tell columns apart. Infinite where an
            answer has another shape, or is a number on one side only. Nothing where the usual
            answers hang on chance or on the calls before.
        """

        @cache
        def found() -> dict[str, Floats]:
            again = run_pytorch(self._model, batch, self._signature)
            alike = all(_alike(again[name], array) for name, array in expected.items())
            answers = list(self._answers(batch)) if alike else []
            named = {name: [answer[name] for answer in answers] for name in expected}
            return {n: self._spread_of(a, named[n], limits[n]) for n, a in expected.items()}

        return found

    def _spread_of(self, expected: npt.NDArray[Any], answers: list[Any], limit: Limit) -> Floats:
        expected = np.atleast_1d(expected)
        found = [np.atleast_1d(answer).astype(np.float64) for answer in answers]
        if any(other.shape != expected.shape for other in found):
            return np.full(expected.shape, np.inf)
        usual = expected.astype(np.float64)
        errors = (element_errors(usual, other, Limit(1.0, 0.0))[0] for other in found)
        apart = np.max([np.zeros(expected.shape), *errors], axis=0)
        if expected.dtype.kind == "f" and apart.size:
            columns = enumerate(np.shape(limit.shares))
            within = tuple(i for i, n in columns if n == 1) or tuple(range(1, apart.ndim))
            finite = np.where(np.isfinite(apart), apart, 0.0)
            # Of what is no choice that was made otherwise: a few of those are all there is.
            most = SPREAD_FACTOR * finite.mean(axis=within, keepdims=True)
            square = np.minimum(finite, most) ** 2
            apart = np.maximum(apart, np.sqrt(square.mean(axis=within, keepdims=True)))
        return np.asarray(SPREAD_FACTOR * apart)

    def _answers(self, batch: Arrays) -> Iterator[Arrays]:
        try:
            yield self.exact(batch)
            for seed, sign in product(range(_DRAWS), (1.0, -1.0)):
                rng = np.random.default_rng(seed)
                inputs = {name: moved(array, sign, rng) for name, array in batch.items()}
                with self._weights_moved(sign, seed), _Tied(sign, seed):
                    answer = run_pytorch(self._model, inputs, self._signature)
                yield answer
        except EvidenceError as error:
            log.info("PyTorch does not answer otherwise", reason=str(error))

    @contextmanager
    def _weights_moved(self, sign: float, seed: int) -> Iterator[None]:
        saved = [(weight, weight.data) for weight in self._model.parameters()]
        chance = torch.Generator().manual_seed(seed)
        try:
            for weight, data in saved:
                if data.is_floating_point():
                    step = sign * MOVED_ULPS * torch.finfo(data.dtype).eps
                    factor = 1.0 + step * torch.rand(data.shape, generator=chance).to(data)
                    weight.data = torch.where((data * 256).frac() == 0, data, data * factor)
            yield
        finally:
            for weight, data in saved:
                weight.data = data


def _alike(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> bool:
    largest = np.abs(other[np.isfinite(other)].astype(np.float64)).max(initial=0)
    return np.allclose(one, other, rtol=0, atol=1e-3 * largest, equal_nan=True)


class _InDouble(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Has in float64 what a model's own code asks for in less: states, casts, constants.

    What it asks for in half precision is rounded to that, as part of what it computes, and goes on
    in float64: otherwise all that the rounding does would count as an error of PyTorch.
    """

    used, halved, wide = False, False, _WIDE

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def raised(value: Any) -> Any:
            dtype = value.dtype if isinstance(value, torch.Tensor) else value
            self.halved |= dtype in _HALF
            wide = self.wide.get(dtype) if isinstance(dtype, torch.dtype) else None
            if wide is None or (dtype is value and dtype in _HALF):
                return value
            self.used = True
            return value.to(wide) if isinstance(value, torch.Tensor) else wide

        if func in (_aten.type_as.default, _aten.to.other):  # as what they are made of
            func, args, kwargs = _aten._to_copy.default, args[:1], {"dtype": args[1].dtype}  # noqa: SLF001
        args, kwargs = tree_map(raised, (args, kwargs or {}))
        return tree_map(raised, func(*args, **kwargs))


class _Tied(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Has values that tie within a share of themselves chosen as chance has it.

    Only which of them are chosen changes, not what they are. Whole numbers stay as they are. What
    runtimes approximate, to a unit in the last place of 1, is moved by that.
    """

    def __init__(self, sign: float, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._share, self._chance = sign * _TIED, torch.Generator().manual_seed(seed)
        self._ulp = sign * torch.finfo(torch.float32).eps

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        usual = func(*args, **(kwargs or {}))
        if func.overloadpacket in (_aten.sigmoid, _aten.silu):
            off = self._ulp * torch.rand(usual.shape, generator=self._chance).to(usual)
            return usual + off * (args[0] if func.overloadpacket is _aten.silu else 1)
        indices = usual[1] if isinstance(usual, tuple) else usual
        values = args[0] if func.overloadpacket in _CHOOSING else None
        whole = isinstance(indices, torch.Tensor) and not indices.is_floating_point()
        if values is None or not (values.is_floating_point() and values.numel() and whole):
            return usual
        chosen = func(self._moved(values), *args[1:], **(kwargs or {}))
        return (usual[0], chosen[1]) if isinstance(usual, tuple) else chosen

    def _moved(self, values: torch.Tensor) -> torch.Tensor:
        wide = values.double().clamp(-1e300, 1e300)  # infinite ones tie as well
        sizes = wide.abs()
        usual = sizes[(sizes > 0) & (sizes < _SENTINEL)]
        size = usual.median() if usual.numel() else 1.0
        chance = torch.rand(values.shape, generator=self._chance, dtype=torch.float64)
        # Ties about zero, such as of distances, are as wide as rounding leaves of larger values.
        step = self._share * chance.to(values.device) * (sizes + (sizes < _SENTINEL) * size)
        return wide + step
