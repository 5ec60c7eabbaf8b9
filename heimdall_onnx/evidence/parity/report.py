"""What a comparison of outputs found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from heimdall_onnx.common.arrays import Arrays
from heimdall_onnx.common.parameters import TOLERANCE
from heimdall_onnx.common.text import apart
from heimdall_onnx.common.verdict import Gate
from heimdall_onnx.evidence.parity.ground import GroundReport
from heimdall_onnx.evidence.parity.invariance import MaskCheck, OrderCheck
from heimdall_onnx.evidence.parity.statistics import ErrorStatistics
from heimdall_onnx.evidence.parity.tolerance import (
    ADVERSARIAL_FACTOR,
    EVALUATION,
    NOISE_FLOOR_FACTOR,
    Limit,
    span_of,
    tolerance_factor,
)
from heimdall_onnx.evidence.parity.uncertainty import UncertaintyReport
from heimdall_onnx.evidence.quality.contract import Judged
from heimdall_onnx.model.examples import ALL_BUT_ONE
from heimdall_onnx.model.signature import Signature

THIS_PROCESS = "this process"


@dataclass(frozen=True)
class ParityCell:
    """Agreement on one kind of input at one batch size.

    Attributes:
        kind: ``"evaluation data"``, a further length of a dynamic axis or an adversarial kind.
        batch_size: Samples in a call.
        samples: Samples compared.
        outputs: Statistics per output, in the signature's order.
        valid: Whether the inputs are ordinary ones at a further length, with the same tolerance as
            the evaluation data.
    """

    kind: str
    batch_size: int
    samples: int
    outputs: tuple[ErrorStatistics, ...]
    valid: bool = False

    @property
    def factor(self) -> float:
        """What the tolerance of the elements is multiplied by."""
        return tolerance_factor(self.kind, self.valid)


@dataclass(frozen=True)
class NoiseFloor:
    """Both float32 models against PyTorch in float64.

    Attributes:
        output: Name of the output.
        samples: Evaluation samples used.
        onnx_error: The ONNX model's mean absolute error.
        pytorch_error: The float32 PyTorch model's own mean absolute error.
        ulp: One unit in the last place at the output's mean magnitude.
    """

    output: str
    samples: int
    onnx_error: float
    pytorch_error: float
    ulp: float

    @property
    def limit(self) -> float:
        """The largest error that rounding alone explains: twice PyTorch's own plus one ULP."""
        return NOISE_FLOOR_FACTOR * self.pytorch_error + self.ulp


@dataclass(frozen=True)
class BatchIndependence:
    """How much a row's answer moves when other rows share its batch.

    Attributes:
        largest_error: Largest absolute change of any element of the ONNX model's outputs.
        excess: Largest change in units of what is allowed, atol + rtol·|alone|.
        neighbour: The kind of neighbour that moved it most.
        output: The output that moved most.
        comparisons: Row-beside-neighbours pairs compared.
    """

    largest_error: float
    excess: float
    neighbour: str
    output: str
    comparisons: int


@dataclass(frozen=True, kw_only=True)
class ParityFigures:
    """The statistics of a comparison, as a release records them.

    Attributes:
        samples: Evaluation samples compared.
        tolerance: The documented limit of the mean absolute error, and atol of the elements.
        rtol: Relative part of the element tolerance.
        cells: Agreement by kind of input and batch size; the first is the whole evaluation data
            at the largest batch size that it fills.
        noise_floor: Per floating-point output.
        independence: Batch independence of the ONNX model.
        ground: Positions in metres; None where no output holds positions.
        uncertainty: Localization error and calibration of the PyTorch and of the ONNX model; empty
            without labels or positions.
        evaluated_by: Who took the models over the evaluation data, in words.
        notes: What else is to be known of how PyTorch was run, a sentence each.
        quality: What the ONNX model loses in its task by each metric; empty without labels.
    """

    samples: int
    tolerance: float
    rtol: float
    cells: tuple[ParityCell, ...]
    noise_floor: tuple[NoiseFloor, ...]
    independence: BatchIndependence
    ground: GroundReport | None
    uncertainty: tuple[UncertaintyReport, ...] = ()
    evaluated_by: str = THIS_PROCESS
    notes: tuple[str, ...] = ()
    quality: tuple[Judged, ...] = ()

    @property
    def evaluation(self) -> tuple[ErrorStatistics, ...]:
        """Statistics per output over the whole evaluation data."""
        return self.cells[0].outputs

    def limit(self, output: str) -> Limit:
        """What an element of an output may be off by on ordinary inputs."""
        return next(o.limit for o in self.evaluation if o.output == output)


@dataclass(frozen=True, kw_only=True)
class ParityReport(ParityFigures):
    """Everything that `compare_outputs` found: the figures, and what is drawn or judged beside.

    Attributes:
        signature: The model's signature.
        source: The evaluation data's name.
        pytorch: The PyTorch model's outputs on some evaluation samples, for figures.
        onnx: The ONNX model's outputs on the same samples.
        worst_inputs: The batch in which an element exceeded its tolerance most.
        worst_where: Kind and batch size of that batch, in words.
        worst_factor: What the tolerance was multiplied by there.
        plotted: Index of each sample of ``pytorch`` and ``onnx`` in the evaluation data.
        masks: Each mask of the signature, for both models.
        orders: Each permutable axis of the signature, for both models.
        valid_inputs: Whether signature or model say which inputs are valid, so that each of those
            compared must be answered with a number.
    """

    signature: Signature
    source: str
    pytorch: Arrays = field(repr=False)
    onnx: Arrays = field(repr=False)
    plotted: npt.NDArray[np.int64] = field(repr=False)
    worst_inputs: Arrays = field(repr=False)
    worst_where: str
    masks: tuple[MaskCheck, ...] = ()
    orders: tuple[OrderCheck, ...] = ()
    valid_inputs: bool = False
    worst_factor: float = 1.0

    def place_of(self, sample: int) -> int | None:
        """Where a sample's outputs are in ``pytorch`` and ``onnx``; None if they were not kept."""
        place = int(np.searchsorted(self.plotted, sample))
        return place if sample in self.plotted[place : place + 1] else None

    def gates(self) -> tuple[Gate, ...]:
        """Every parity gate, evaluated."""
        evaluation = [c for c in self.cells if c.factor == 1.0]
        adversarial = [c for c in self.cells if c.factor != 1.0]
        return (
            self._mean_gate(evaluation),
            self._element_gate("elements on evaluation data", evaluation, 1.0),
            self._element_gate("elements on adversarial inputs", adversarial, ADVERSARIAL_FACTOR),
            Gate.none_of(
                "NaN and Inf in the same places",
                self._places("nonfinite_mismatches", "", self.cells),
            ),
            *(
                Gate.at_most(
                    f"noise floor of {floor.output}",
                    floor.limit,
                    floor.onnx_error,
                    f"mean error against float64 over {floor.samples} samples; "
                    f"PyTorch float32: {floor.pytorch_error:.3g}",
                )
                for floor in self.noise_floor
            ),
            Gate.at_most(
                "batch independence",
                1.0,
                self.independence.excess,
                f"in units of the tolerance; {self.independence.output} beside "
                f"{self.independence.neighbour}: {self.independence.largest_error:.3g}",
            ),
            *self._range_gates(),
            *self._declared_gates(),
            *(judged.gate for judged in self.quality),
        )

    def _mean_gate(self, cells: list[ParityCell]) -> Gate:
        floors = {floor.output: floor for floor in self.noise_floor}

        def allowed(output: ErrorStatistics) -> float:
            """What is documented, unless both models' own rounding explains more.

            Whoever asks for less than what is documented gets no more than that.
            """
            floor = floors.get(output.output) if self.tolerance >= TOLERANCE else None
            return max(output.atol, floor.limit + floor.pytorch_error if floor else 0.0)

        cell, worst = max(
            ((c, o) for c in cells for o in c.outputs),
            key=lambda pair: np.nan_to_num(pair[1].mean / (allowed(pair[1]) or 1.0), nan=np.inf),
        )
        where = "" if cell.kind == EVALUATION else f"{cell.kind}, "
        return Gate.at_most(
            "mean absolute error",
            allowed(worst),
            worst.mean,
            f"{worst.output}, {where}batch {cell.batch_size}",
        )

    def _element_gate(self, name: str, cells: list[ParityCell], factor: float) -> Gate:
        statistics = [(o, c) for c in cells for o in c.outputs]
        found = [
            f"{o.output}: {o.violations} of {o.count} on {c.kind}, batch {c.batch_size}, "
            f"largest error {o.maximum:.3g}"
            for o, c in statistics
            if o.violations
        ]
        count = sum(o.violations for o, _ in statistics)
        limits = dict.fromkeys(
            f"{factor * o.atol:.3g} + {factor * o.rtol:.3g}·|{o.output}|"
            + " (less in small columns)" * (o.shares != 1.0)
            for o in self.evaluation
        )
        if not found:
            found = [
                f"{o.output}: {o.left_open} of {o.count} left open by PyTorch's own rounding on "
                f"{c.kind}, batch {c.batch_size}"
                for o, c in statistics
                if o.left_open
            ]
        return Gate(name, f"0 beyond {', '.join(limits)}", count, not count, "; ".join(found))

    def _places(self, counted: str, words: str, cells: Iterable[ParityCell]) -> Iterator[str]:
        """Where elements were counted, and how many."""
        for cell in cells:
            for output in cell.outputs:
                if count := getattr(output, counted):
                    where = f"on {cell.kind}, batch {cell.batch_size}"
                    yield f"{output.output}: {count} of {output.count}{words} {where}"

    def _declared_gates(self) -> Iterator[Gate]:
        # NaN in the same places is a faithful export, and where nothing says which inputs are
        # valid, as of a bare floating-point input, an answer to zeros need not exist.
        if self.valid_inputs:
            declared = [c for c in self.cells if c.factor == 1.0 or c.kind == ALL_BUT_ONE]
            yield Gate.none_of("finite outputs", self._places("nan", " are NaN", declared))
        if self.masks:
            problems = (check.problem for check in self.masks)
            yield Gate.none_of("masked elements", filter(None, problems))
        for axis in dict.fromkeys(check.axis for check in self.orders):
            worst = max((c for c in self.orders if c.axis == axis), key=lambda c: c.excess)
            yield Gate.at_most(
                f"order along {axis}",
                1.0,
                worst.excess,
                f"in units of the tolerance; {worst.output} of {worst.side}",
            )

    def _range_gates(self) -> Iterator[Gate]:
        for index, spec in enumerate(self.signature.outputs):
            if spec.range is None:
                continue
            found = [cell.outputs[index] for cell in self.cells]
            low, high = min(o.lowest for o in found), max(o.highest for o in found)
            nonfinite = sum(o.nonfinite for o in found)
            bottom, top = span_of(spec.range, spec.dtype)
            measured = (
                apart(found, end, 4)[0] for found, end in zip((low, high), spec.range, strict=True)
            )
            yield Gate(
                f"range of {spec.name}",
                f"in [{spec.range[0]:g}, {spec.range[1]:g}]",
                f"[{', '.join(measured)}]",
                bottom <= low <= high <= top and not nonfinite,
                f"{nonfinite} elements are NaN or Inf" if nonfinite else "",
            )
