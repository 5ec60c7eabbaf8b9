"""The inputs on which the models differ most, as they look, with what both answer."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from heimdall_onnx.common.arrays import Arrays
from heimdall_onnx.common.text import after, apart, name, number
from heimdall_onnx.data.evaluation import EvaluationData
from heimdall_onnx.evidence.parity.departure import compare_values
from heimdall_onnx.evidence.parity.report import ParityReport
from heimdall_onnx.evidence.parity.statistics import ErrorStatistics, WorstSample, badness
from heimdall_onnx.model.signature import Signature, TensorSpec
from heimdall_onnx.report.plot.chart import Chart, Color, new_figure, no_grid, plain, say, styled

_SAMPLES_SHOWN = 3
_CHANNELS_SHOWN = 4
_OUTPUTS_SHOWN = 3
_VALUES_SHOWN = 4
_ROWS_WRITTEN = 10
_INPUTS_SHOWN = 6
_COLUMNS = 12
_INPUTS_SHARE = 0.6  # of a figure's width
_Row = tuple[float, ...]
_Values = tuple[_Row, _Row, float]


@dataclass(frozen=True)
class _Worst:
    """A sample with what each output has to say of it."""

    index: int
    outputs: list[tuple[ErrorStatistics, WorstSample]]

    @property
    def most(self) -> tuple[ErrorStatistics, WorstSample]:
        """The output that differs most, and how."""
        return min(self.outputs, key=lambda pair: badness(pair[1]))

    def values(self, output: ErrorStatistics, report: ParityReport, shown: int) -> _Values | None:
        """Both models' answers in one output and the error; None where these were not kept."""
        known = next((w for found, w in self.outputs if found is output), None)
        kept = [array[output.output] for array in (report.pytorch, report.onnx)]
        place = report.place_of(self.index)
        if place is None or kept[0].shape != kept[1].shape:
            return None if known is None else (known.reference, known.value, known.error)
        pytorch, onnx = (array[place].ravel().astype(np.float64) for array in kept)
        error = compare_values(pytorch, onnx, report.tolerance).max_abs_error
        # The elements from the worst on, where there are too many to be shown.
        start = known.element if known and known.element >= shown else 0
        return tuple(map(float, pytorch[start:])), tuple(map(float, onnx[start:])), error


@styled
def worst_inputs(report: ParityReport, data: EvaluationData) -> Chart | None:
    """What do the inputs look like on which the models differ most?

    Up to three samples of the evaluation data, in order of their largest error in units of the
    tolerance. The input of a model that has one is drawn channel by channel, a spectrogram for
    example, each channel on a scale of its own, or as lines where it has one axis. Of several
    inputs each is an image of its own with the first axis downwards, receivers for example, so
    that what belongs together lies side by side. None where the outputs have no elements.
    """
    found = _worst_samples(report)
    if not found:
        return None
    title = _answer(found)
    many = len(report.signature.inputs) > 1
    subtitle = (
        f"{name(report.source, 60)} · beside each input both models' answers · {_scale_of(many)}"
    )
    figure = new_figure(title, subtitle, height=(2.15 if many else 1.75) * len(found))
    bands = figure.subfigures(len(found), 1, squeeze=False)[:, 0]
    for band, sample in zip(bands, found, strict=True):
        rows = data.rows([sample.index])
        inputs = {spec.name: rows[spec.name][0] for spec in report.signature.inputs}
        panels = _draw_inputs(band, inputs, report.signature, beside=True)
        _write(panels[-1], sample, report)
    alt = " ".join(
        f"Sample {sample.index}: "
        + "; ".join(
            f"{o.output} PyTorch {', ONNX '.join(_values(w.reference, w.value))}"
            for o, w in sample.outputs
        )
        + "."
        for sample in found
    )
    return Chart(figure, title, alt)


def _worst_samples(report: ParityReport) -> list[_Worst]:
    by_sample: dict[int, list[tuple[ErrorStatistics, WorstSample]]] = {}
    for output in report.evaluation:
        for worst in output.worst:
            by_sample.setdefault(worst.sample, []).append((output, worst))
    found = [_Worst(index, pairs) for index, pairs in by_sample.items()]
    return sorted(found, key=lambda sample: badness(sample.most[1]))[:_SAMPLES_SHOWN]


def _answer(found: list[_Worst]) -> str:
    first = found[0]
    output, worst = first.most
    if worst.excess == 0:
        return "The models agree to the last digit: the first samples stand for all"
    times = f"{number(worst.excess)}×" if math.isfinite(worst.excess) else "incomparably beyond"
    return (
        f"Sample {first.index} differs most: {number(worst.error)}{after(output.unit)} in "
        f"{name(output.output)}, {times} what is allowed"
    )


@styled
def sample_inputs(inputs: Arrays, signature: Signature, title: str) -> Chart | None:
    """How the inputs of one sample look, drawn as `worst_inputs` draws them.

    Args:
        inputs: One array per input, without the batch axis.
        signature: Of the model.
        title: What sample it is.

    Returns:
        None where no input has elements.
    """
    if not any(array.size for array in inputs.values()):
        return None
    many = len(inputs) > 1
    figure = new_figure(title, _scale_of(many), height=2.15 if many else 1.75)
    (band,) = figure.subfigures(1, 1, squeeze=False)[0]
    _draw_inputs(band, inputs, signature, beside=False)
    shapes = "; ".join(
        f"{n}: {' × '.join(map(str, a.shape)) or 'one value'}, from {number(float(a.min()), 3)} to "
        f"{number(float(a.max()), 3)}"
        for n, a in inputs.items()
        if a.size
    )
    return Chart(figure, title, f"Inputs: {shapes}.")


def _scale_of(many: bool) -> str:
    return (
        f"colours from each {'column' if many else 'channel'}'s smallest to its largest value"
        + (f", of inputs with more than {_COLUMNS} columns from the input's" if many else "")
    )


def _draw_inputs(
    band: SubFigure, inputs: Arrays, signature: Signature, *, beside: bool
) -> list[Axes]:
    """The panels of a sample's inputs, and ``beside`` them an empty one for text."""
    if len(inputs) > 1:
        return _draw_many(band, inputs, signature, beside=beside)
    channels = _channels(next(iter(inputs.values())))
    shown = channels[:_CHANNELS_SHOWN]
    count = max(1, len(shown))
    widths = [1.0] * count + [2.2] * beside
    panels = list(band.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0])
    for number_, (axes, channel) in enumerate(zip(panels, shown, strict=False)):
        _draw_channel(axes, channel)
        more = f" of {len(channels)}" if len(channels) > len(shown) else ""
        axes.set_title(f"channel {number_}{more}", fontsize=9)
    if not shown:
        say(panels[0], "not drawn")
    return panels


def _draw_many(
    band: SubFigure, inputs: Arrays, signature: Signature, *, beside: bool
) -> list[Axes]:
    """Each input as an image, a single value for each row as the number itself."""
    drawn = [spec for spec in signature.inputs if inputs[spec.name].size]
    drawn = drawn[:_INPUTS_SHOWN]
    widths = [1.0 if inputs[spec.name].ndim > 1 else 0.5 for spec in drawn]
    # Characters of a panel of width 1.
    share = _INPUTS_SHARE if beside else 1.0
    limit = int(100 * share / max(sum(widths), 1.0))
    text_width = [sum(widths) * (1 - _INPUTS_SHARE) / _INPUTS_SHARE] * beside
    ratios = [*widths, *text_width]
    panels = list(band.subplots(1, len(ratios), width_ratios=ratios, squeeze=False)[0])
    for axes, spec, width in zip(panels, drawn, widths, strict=False):
        values = np.atleast_1d(inputs[spec.name])
        axes.set_axis_off()
        image = values.reshape(len(values), -1)
        # What is masked is dark.
        cells = _scaled(~image if spec.masks else image)
        axes.imshow(cells, aspect="auto", cmap="viridis", interpolation="nearest", vmin=0, vmax=1)
        shape = " × ".join(map(str, inputs[spec.name].shape)) or "one value"
        axes.set_title(plain(f"{_folded(spec.name, int(limit * width))}\n{shape}"), fontsize=9)
        if image.shape[1] == 1 and len(image) <= _ROWS_WRITTEN:
            _write_values(axes, cells[:, 0], [_value(value, spec) for value in image[:, 0]])
    return panels


def _scaled(image: npt.NDArray[np.generic]) -> npt.NDArray[np.float64]:
    """Values from 0 to 1; of a few columns, which may be of several units, each by itself."""
    if image.dtype == bool:
        return image.astype(np.float64)
    axis = 0 if image.shape[1] <= _COLUMNS else None
    cells = image.astype(np.float64)
    low = cells.min(axis=axis, keepdims=True)
    span = cells.max(axis=axis, keepdims=True) - low
    return np.asarray((cells - low) / np.where(span > 0, span, 1.0))


def _folded(text: str, limit: int) -> str:
    """A name on two lines at most, broken behind an underscore."""
    parts = textwrap.wrap(name(text, 2 * limit).replace("_", "_ "), max(limit, 9))
    return "\n".join(part.replace("_ ", "_") for part in parts[:2])


def _value(value: np.generic, spec: TensorSpec) -> str:
    if spec.dtype != "bool":
        return number(float(value))
    if spec.masks:
        return "masked" if value else ""
    return str(bool(value))


def _write_values(axes: Axes, cells: npt.NDArray[np.float64], texts: list[str]) -> None:
    for row, (value, text) in enumerate(zip(cells, texts, strict=True)):
        color = "white" if value <= 0.5 else Color.INK
        axes.text(0, row, text, ha="center", va="center", size=9, color=color)


def _channels(values: npt.NDArray[np.generic]) -> list[npt.NDArray[np.generic]]:
    """Images (height, width) or lines (length,) of one sample."""
    if values.ndim == 0 or values.size == 0:
        return []
    if values.ndim == 1:
        return [values]
    if values.ndim == 2:
        # As many rows as an image may have, or a few lines.
        return [values] if values.shape[0] > _CHANNELS_SHOWN else list(values)
    return list(values.reshape(-1, *values.shape[-2:]))


def _draw_channel(axes: Axes, channel: npt.NDArray[np.generic]) -> None:
    if channel.ndim == 1:
        no_grid(axes)
        axes.plot(channel, color=Color.INK, lw=1.0)
        axes.tick_params(labelsize=9)
        return
    axes.set_axis_off()
    axes.imshow(channel, aspect="auto", origin="lower", cmap="viridis", interpolation="nearest")


def _write(axes: Axes, sample: _Worst, report: ParityReport) -> None:
    axes.set_axis_off()
    # Several inputs leave less room beside them.
    shown = _VALUES_SHOWN if len(report.signature.inputs) == 1 else _VALUES_SHOWN // 2
    lines = [f"sample {sample.index}: {number(sample.most[1].excess)}× the tolerance"]
    for output in report.evaluation[:_OUTPUTS_SHOWN]:
        values = sample.values(output, report, shown)
        if values is None:
            lines.append(f"{name(output.output)}: not among its worst")
            continue
        pytorch, onnx, error = values
        lines += [
            f"{name(output.output)}{after(output.unit)}, error {number(error)}",
            "  PyTorch " + "\n  ONNX    ".join(_values(pytorch, onnx, shown)),
        ]
    text = axes.text(
        0.0,
        0.98,
        plain("\n".join(lines)),
        va="top",
        size=9,
        family="monospace",
        transform=axes.transAxes,
    )
    # The panels of all samples keep one width, whatever is written beside them.
    text.set_in_layout(False)


def _values(pytorch: _Row, onnx: _Row, count: int = _VALUES_SHOWN) -> tuple[str, str]:
    told = [apart(*both) for both in zip(pytorch[:count], onnx[:count], strict=False)]
    more = ", …" if len(pytorch) > count else ""
    return ", ".join(one for one, _ in told) + more, ", ".join(other for _, other in told) + more
