"""The errors by sample as a figure, and for a person at the notebook something to ask."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from IPython.display import Markdown, display
from torch import nn

from heimdall_onnx.data.evaluation import EvaluationData
from heimdall_onnx.evidence.parity.report import ParityReport
from heimdall_onnx.report import plot
from heimdall_onnx.report.explore.exploration import Exploration
from heimdall_onnx.report.plot.chart import Chart

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
NOTE = "Here an open notebook lets samples be chosen; without its kernel see the figure above."
INSTALL = (
    "To choose samples here, install what makes figures answer to mouse and keyboard: "
    "`pip install 'heimdall-onnx[lab]'`, and start the kernel again."
)


@dataclass(frozen=True)
class Explorable:
    """The static figure, and below it what a person at an open notebook gets besides.

    They are two outputs of their cell: a notebook that is opened again without its kernel has lost
    the second, and shows the first.

    Attributes:
        chart: The figure.
        below: A widget, or what to do to have one.
    """

    chart: Chart
    below: Any = field(repr=False)

    def _ipython_display_(self) -> None:
        display(self.chart)
        if isinstance(self.below, Markdown):
            display(self.below)
            return
        view = self.below._repr_mimebundle_()[WIDGET_VIEW]
        display({WIDGET_VIEW: view, "text/plain": NOTE}, raw=True)


def explore_parity(
    parity: ParityReport, data: EvaluationData, model: nn.Module, onnx_path: Path
) -> Chart | Explorable:
    """Which sample is behind an error, and what do both models answer to it?

    Args:
        parity: What was found.
        data: The evaluation data that it was found on.
        model: The PyTorch model, in eval mode.
        onnx_path: The ONNX file.

    Returns:
        The errors by sample as a figure, and where a person is at the notebook, below it a widget
        in which samples can be chosen by mouse or keyboard. Headless runs get the figure alone.
    """
    chart = plot.errors_by_sample(parity)
    if not person_at_notebook():
        return chart
    try:
        from heimdall_onnx.report.explore.widget import View
    except ImportError:
        return Explorable(chart, Markdown(INSTALL))
    return Explorable(chart, View(Exploration(parity, data, model, onnx_path)).box)


def person_at_notebook() -> bool:
    """Whether the running cell was started by a front end at which somebody can be asked.

    Every request to run code says so in ``allow_stdin`` (Jupyter's messaging protocol): JupyterLab,
    Notebook and editors send true, what executes notebooks by itself (nbclient, and so papermill
    and nbconvert; nbval) sends false.
    """
    from IPython.core.getipython import get_ipython

    kernel = getattr(get_ipython(), "kernel", None)
    if kernel is None:  # a plain script, or a terminal
        return False
    return kernel.get_parent().get("content", {}).get("allow_stdin") is True
