"""The inputs on which the models differ most, as they look, with what both answer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from heimdall_onnx.compare import ParityReport
from heimdall_onnx.departure import compare_values
from heimdall_onnx.evaluation import EvaluationData
from heimdall_onnx.plot.chart import (
    INK,
    Chart,
    name,
    new_figure,
    no_grid,
    number,
    plain,
    say,
    styled,
)
from heimdall_onnx.plot.outputs import after
from heimdall_onnx.statistics import ErrorStatistics, WorstSample

_SAMPLES_SHOWN = 3
_CHANNELS_SHOWN = 4
_OUTPUTS_SHOWN = 3
_VALUES_SHOWN = 4
_Values = tuple[tuple[float, ...], tuple[float, ...], float]


@dataclass(frozen=True)
class _Worst:
    """A sample with what each output has to say of it."""

    index: int
    excess: float
    outputs: list[tuple[ErrorStatistics, WorstSample]]

    def values(self, output: ErrorStatistics, report: ParityReport) -> _Values | None:
        """Both models' answers in one output and the error; None where these were not kept."""
        known = next((w for found, w in self.outputs if found is output), None)
        kept = [array[output.output] for array in (report.pytorch, report.onnx)]
        if self.index >= len(kept[0]) or kept[0].shape != kept[1].shape:
            return None if known is None else (known.reference, known.value, known.error)
        pytorch, onnx = (array[self.index].ravel().astype(np.float64) for array in kept)
        error = compare_values(pytorch, onnx, report.tolerance).error
        # The elements from the worst on, where there are too many to be shown.
        start = known.element if known and known.element >= _VALUES_SHOWN else 0
        return tuple(map(float, pytorch[start:])), tuple(map(float, onnx[start:])), error


@styled
def worst_inputs(report: ParityReport, data: EvaluationData) -> Chart | None:
    """What do the inputs look like on which the models differ most?

    Up to three samples of the evaluation data, in order of their largest error in units of the
    tolerance. A two-dimensional input is drawn channel by channel, a spectrogram for example,
    each channel on a scale of its own; a one-dimensional one as lines. None where the outputs
    have no elements.
    """
    found = _worst_samples(report)
    if not found:
        return None
    title = _answer(found)
    subtitle = (
        f"{name(report.source, 60)} · beside each input both models' answers · colours from each "
        "channel's smallest to its largest value"
    )
    figure = new_figure(title, subtitle, height=1.75 * len(found))
    bands = figure.subfigures(len(found), 1, squeeze=False)[:, 0]
    spec = next((s for s in report.signature.inputs if len(s.shape) > 1), None)
    for band, sample in zip(bands, found, strict=True):
        values = None if spec is None else data.rows([sample.index])[spec.name][0]
        _draw_sample(band, sample, values, report)
    alt = " ".join(
        f"Sample {sample.index}: "
        + "; ".join(
            f"{o.output} PyTorch {_values(w.reference)}, ONNX {_values(w.value)}"
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
    found = [
        _Worst(index, max(w.excess for _, w in pairs), pairs) for index, pairs in by_sample.items()
    ]
    return sorted(found, key=lambda sample: (-sample.excess, sample.index))[:_SAMPLES_SHOWN]


def _answer(found: list[_Worst]) -> str:
    first = found[0]
    if first.excess == 0:
        return "The models agree to the last digit: the first samples stand for all"
    output, worst = max(first.outputs, key=lambda pair: pair[1].excess)
    times = f"{number(worst.excess)}×" if math.isfinite(worst.excess) else "incomparably beyond"
    return (
        f"Sample {first.index} differs most: {number(worst.error)}{after(output.unit)} in "
        f"{name(output.output)}, {times} what is allowed"
    )


def _draw_sample(
    band: SubFigure, sample: _Worst, values: npt.NDArray[np.generic] | None, report: ParityReport
) -> None:
    channels = _channels(values)
    shown = channels[:_CHANNELS_SHOWN]
    count = max(1, len(shown))
    panels = band.subplots(1, count + 1, width_ratios=[1.0] * count + [2.2], squeeze=False)[0]
    for number_, (axes, channel) in enumerate(zip(panels, shown, strict=False)):
        _draw_channel(axes, channel)
        more = f" of {len(channels)}" if len(channels) > len(shown) else ""
        axes.set_title(f"channel {number_}{more}", fontsize=9)
    if not shown:
        say(panels[0], "not drawn")
    _write(panels[-1], sample, report)


def _channels(values: npt.NDArray[np.generic] | None) -> list[npt.NDArray[np.generic]]:
    """Images (height, width) or lines (length,) of one sample."""
    if values is None or values.ndim == 0 or values.size == 0:
        return []
    if values.ndim == 1:
        return [values]
    if values.ndim == 2:
        # As many rows as an image may have, or a few lines.
        return [values] if values.shape[0] > _CHANNELS_SHOWN else list(values)
    return list(values.reshape(-1, *values.shape[-2:]))


def _draw_channel(axes: Axes, channel: npt.NDArray[np.generic]) -> None:
    no_grid(axes)
    if channel.ndim == 1:
        axes.plot(channel, color=INK, lw=1.0)
        axes.tick_params(labelsize=9)
        return
    axes.imshow(channel, aspect="auto", origin="lower", cmap="viridis", interpolation="nearest")
    axes.set(xticks=[], yticks=[])


def _write(axes: Axes, sample: _Worst, report: ParityReport) -> None:
    no_grid(axes)
    axes.set(xticks=[], yticks=[])
    lines = [f"sample {sample.index}: {number(sample.excess)}× the tolerance"]
    for output in report.evaluation[:_OUTPUTS_SHOWN]:
        values = sample.values(output, report)
        if values is None:
            lines.append(f"{name(output.output)}: not among its worst")
            continue
        pytorch, onnx, error = values
        lines += [
            f"{name(output.output)}{after(output.unit)}, error {number(error)}",
            f"  PyTorch {_values(pytorch)}",
            f"  ONNX    {_values(onnx)}",
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


def _values(values: tuple[float, ...]) -> str:
    shown = ", ".join(f"{value:.7g}" for value in values[:_VALUES_SHOWN])
    return f"{shown}, …" if len(values) > _VALUES_SHOWN else shown
