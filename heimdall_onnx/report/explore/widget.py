"""`report.explore.exploration` as a widget: plotly's figure between controls of ipywidgets.

Needs the extra ``lab``. All that is computed and said comes from the exploration; here it is only
shown. Each control is a native one, so that everything can be reached with the keyboard; figure and
picture are dark on white, as the report's figures are, whatever the theme.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import anywidget
import ipywidgets as widgets
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io

from heimdall_onnx.common.arrays import Floats
from heimdall_onnx.common.errors import HeimdallError
from heimdall_onnx.common.templates import render
from heimdall_onnx.common.text import after, apart, count_of, distance, name, number, unit_of
from heimdall_onnx.evidence.parity.statistics import element_errors
from heimdall_onnx.evidence.parity.tolerance import EVALUATION
from heimdall_onnx.model.signature import TensorSpec
from heimdall_onnx.report.explore.exploration import Exploration, ExploredSample
from heimdall_onnx.report.plot.chart import Color
from heimdall_onnx.report.plot.errors import span_of
from heimdall_onnx.report.plot.outputs import element_names
from heimdall_onnx.report.plot.worst import sample_inputs

ALL = "all"
_LISTED = 20
_ELEMENTS_WRITTEN = 8
# Traces of the figure: of the evaluation data, of other lengths, of adversarial inputs.
_CLASSES = 3
_HERE = Path(__file__).parent
_WIDE = {"description_width": "initial"}


def _fitted(width: str) -> dict[str, Any]:
    """A control as wide as that with its description, no wider than what it lies in."""
    return {"style": _WIDE, "layout": widgets.Layout(width=width, max_width="100%")}


class _FrontEnd(anywidget.AnyWidget):  # type: ignore[misc]
    """What the widgets around it lack in the browser: room, names, and their arrow keys.

    plotly's widget looks at its own width only when the window changes (plotly.py #5208), and a
    browser too busy to load its 5 MB within anywidget's two seconds leaves it empty for good: then
    this asks for another one. The handles of a slider have no names. In JupyterLab the arrow keys
    of a list choose cells instead.
    """

    _esm = (_HERE / "front_end.js").read_text(encoding="utf-8")


class _Key(NamedTuple):
    """Which sample: kind of input, batch size, index."""

    kind: str
    batch_size: int
    sample: int


def _key(point: Any) -> _Key:
    return _Key(point.kind, int(point.batch_size), int(point.number))


class View:
    """The widget's parts, and what happens between them; all of it is ``box``.

    It shows the evaluation data, with the worst sample chosen.
    """

    def __init__(self, exploration: Exploration) -> None:
        self._exploration, self._signature = exploration, exploration.signature
        self._quiet = False
        self._chosen: _Key | None = None
        worst = max(exploration.parity.evaluation, key=lambda output: output.excess)
        self.kind = widgets.Dropdown(
            options=[*((name(kind, 40), kind) for kind in exploration.kinds), ("all kinds", ALL)],
            description="Inputs",
            **_fitted("18em"),
        )
        self._size = widgets.Dropdown(description="Batch size", **_fitted("10em"))
        self.output = widgets.Dropdown(
            options=[(name(spec.name), spec.name) for spec in self._signature.outputs],
            value=worst.output,
            description="Output",
            **_fitted("16em"),
        )
        self._hover = widgets.Checkbox(value=False, description="choose by pointing", indent=False)
        wide = widgets.Layout(width="auto", flex="1 1 320px")
        self._magnitude, self.excess = (
            widgets.SelectionRangeSlider(
                options=[("0", 0.0), ("1", 1.0)], description=text, style=_WIDE, layout=wide
            )
            for text in ("|PyTorch|", "Error, × allowed")
        )
        self.said = widgets.HTML()
        tall = widgets.Layout(width="auto", flex="1 1 auto")
        self.list = widgets.Select(rows=12, layout=tall, description="Worst first", style=_WIDE)
        self.number = widgets.BoundedIntText(description="Sample", min=0, **_fitted("10em"))
        self.front_end = _FrontEnd()
        self.figure = self._new_figure()
        self.details = widgets.HTML()
        self.box = self._laid_out()
        self._set_sizes()
        self._load()
        self._connect()

    def _laid_out(self) -> widgets.VBox:
        def row(*children: widgets.Widget) -> widgets.Box:
            return widgets.Box(
                children,
                layout=widgets.Layout(flex_flow="row wrap", align_items="center", width="100%"),
            )

        self._plot = widgets.VBox(
            [self.front_end, self.figure],
            layout=widgets.Layout(flex="3 1 420px", min_width="0", overflow="hidden"),
        )
        choice = widgets.VBox(
            [self.number, self.list],
            layout=widgets.Layout(flex="1 1 250px", min_width="0"),
        )
        beside = widgets.Box(
            [self._plot, choice], layout=widgets.Layout(flex_flow="row wrap", width="100%")
        )
        box = widgets.VBox(
            [
                row(self.kind, self._size, self.output, self._hover),
                row(self._magnitude, self.excess),
                self.said,
                beside,
                self.details,
            ]
        )
        box.add_class("heimdall-explore")
        return box

    def _new_figure(self) -> go.FigureWidget:
        described = render(_HERE / "figure.json.j2", {}, colors=Color, evaluation=EVALUATION)
        figure = plotly.io.from_json(described, output_type="FigureWidget")
        # Plotly offers to send a chart to a server of its own; nothing here leaves the machine.
        figure._config = {  # noqa: SLF001
            "displaylogo": False,
            "showSendToCloud": False,
            "plotlyServerURL": "",
            "modeBarButtonsToRemove": ["select2d", "lasso2d"],
            "responsive": True,
        }
        return figure

    @property
    def _clouds(self) -> list[go.Scatter]:
        return list(self.figure.data[:_CLASSES])

    def _connect(self) -> None:
        for control, react in (
            (self.kind, self._kind_changed),
            (self._size, self._load),
            (self.output, self._load),
            (self._magnitude, self._refresh),
            (self.excess, self._refresh),
            (self.list, self._listed),
            (self.number, self._numbered),
        ):
            control.observe(lambda _, react=react: self._react(react), "value")
        self.front_end.on_msg(lambda *_: self._draw_anew())
        self._connect_figure()

    def _connect_figure(self) -> None:
        for index, trace in enumerate(self._clouds):
            trace.on_click(lambda _, points, __, i=index: self._pointed(i, points))
            trace.on_hover(lambda _, points, __, i=index: self._hovered(i, points))

    def _draw_anew(self) -> None:
        """Put another figure in the place of one that the browser could not load."""
        self.figure = self._new_figure()
        self._connect_figure()
        self._refresh()
        self._plot.children = [self.front_end, self.figure]

    def _react(self, react: Any) -> None:
        """Do what a control is for, unless its value was set by the program; say what is wrong."""
        if self._quiet:
            return
        try:
            react()
        except HeimdallError as error:
            self._say(f"Not shown: {error}")

    @contextmanager
    def _setting(self) -> Iterator[None]:
        before, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = before

    def _say(self, text: str) -> None:
        self.said.value = f'<span role="status">{escape(text)}</span>'

    # What is chosen.

    def _set_sizes(self) -> None:
        exploration = self._exploration
        kinds = exploration.kinds if self.kind.value == ALL else (self.kind.value,)
        sizes = list(dict.fromkeys(s for kind in kinds for s in exploration.batch_sizes(kind)))
        # Of the evaluation data the batch size at which all of it was compared.
        first = sizes[0] if self.kind.value == EVALUATION else ALL
        with self._setting():
            self._size.options = [*((str(size), size) for size in sorted(sizes)), (ALL, ALL)]
            self._size.value = first

    def _kind_changed(self) -> None:
        self._set_sizes()
        self._load()

    def _load(self) -> None:
        """Take the chosen cells, which may have to be run, and all of their errors."""
        exploration = self._exploration
        kinds = exploration.kinds if self.kind.value == ALL else (self.kind.value,)
        wanted = [
            (kind, size)
            for kind in kinds
            for size in exploration.batch_sizes(kind)
            if self._size.value in (ALL, size)
        ]
        cells = []
        for kind, size in wanted:
            self._say(f"Running both models on {kind} at batch {size} …")
            cells.append(exploration.cell(kind, size))
        self._several = len(cells) > 1
        found = pd.concat(cells, ignore_index=True)
        self._points = points = found[found.output == self.output.value].assign(
            magnitude=found.reference.abs()
        )
        with self._setting():
            _set_steps(self._magnitude, points.magnitude.to_numpy())
            _set_steps(self.excess, points.excess.to_numpy())
        self._refresh()
        if self._chosen is not None and len(self._marked()):
            self._choose(self._chosen)
        elif len(self._shown):
            self._choose(_key(next(self._shown.itertuples())))

    def _refresh(self) -> None:
        """Show the points within the limits, the worst first."""
        points = self._points
        inside = points.magnitude.between(*self._magnitude.value) | ~np.isfinite(points.magnitude)
        some = points[points.excess.between(*self.excess.value) & inside]
        self._shown = some.sort_values(["excess", "number"], ascending=[False, True])
        with self._setting():
            self.list.options = [
                (self._label(point), _key(point))
                for point in self._shown.head(_LISTED).itertuples()
            ]
            self.list.value = None
            self._mark_listed()
        self._say(
            f"{len(some):,} of {count_of(len(points), 'sample')} within the limits"
            + (f"; the {_LISTED} worst are listed" if len(some) > _LISTED else "")
        )
        self._draw(some)

    # What is drawn.

    def _spec(self) -> TensorSpec:
        return next(s for s in self._signature.outputs if s.name == self.output.value)

    def _draw(self, some: pd.DataFrame) -> None:
        limit = self._exploration.parity.limit(self.output.value)
        y = some.error.to_numpy()
        lowest, highest = span_of(some.magnitude.to_numpy())
        positive = y[(y > 0) & np.isfinite(y)]
        allowed = limit.allowed(np.array([lowest, highest]))
        floor = float(min(positive.min(initial=math.inf), allowed.min())) / 3
        top = 3 * float(max(positive.max(initial=0.0), allowed.max()))
        self._limits = (lowest, highest, floor, top)
        spec = self._spec()
        line = np.geomspace(lowest, highest, 300)
        traces = np.select([some.kind == EVALUATION, some.factor == 1.0], [0, 1], 2)
        self._drawn = [some[traces == index] for index in range(_CLASSES)]
        with self.figure.batch_update():
            for trace, mine in zip(self._clouds, self._drawn, strict=True):
                trace.x, trace.y = self._at(mine)
                trace.text = [self._hover_text(point) for point in mine.itertuples()]
                trace.showlegend = bool(len(mine))
            factors = set(some.factor)
            usual, adversarial, ulp = self.figure.data[_CLASSES:-1]
            steep = max(factors, default=1.0)
            for trace, factor, drawn in (
                (usual, 1.0, 1.0 in factors or not factors),
                (adversarial, steep, steep > 1.0),
            ):
                trace.x = line if drawn else []
                trace.y = factor * limit.allowed(line) if drawn else []
                trace.showlegend = drawn
            floating = np.issubdtype(np.dtype(spec.dtype), np.floating)
            ulp.x = line if floating else []
            with np.errstate(over="ignore"):
                ulp.y = np.spacing(line.astype(spec.dtype)).astype(float) if floating else []
            ulp.showlegend = bool(floating)
            unit = unit_of(spec.unit)
            units = f" ({escape(unit)})" if unit else ""
            self.figure.layout.xaxis.title = f"|PyTorch|{units}"
            self.figure.layout.yaxis.title = f"absolute difference{units}"
            self.figure.layout.xaxis.range = [math.log10(lowest / 1.3), math.log10(1.3 * highest)]
            self.figure.layout.yaxis.range = [math.log10(floor / 1.5), math.log10(1.5 * top)]
            self._mark_point()

    def _at(self, points: pd.DataFrame) -> tuple[Floats, Floats]:
        """Where points are drawn: equal ones on the lowest line, incomparable ones on the top."""
        lowest, highest, floor, top = self._limits
        x = points.magnitude.fillna(lowest).clip(lowest, highest)
        return x.to_numpy(), points.error.clip(floor, top).to_numpy()

    def _hover_text(self, point: Any) -> str:
        unit = after(self._spec().unit)
        pytorch, onnx = apart(point.reference, point.value, 9)
        lines = [
            f"sample {point.number}, {_times(point.excess)}",
            f"{name(point.kind, 40)}, batch {point.batch_size}",
            f"PyTorch {pytorch}, ONNX {onnx}{unit}",
            f"difference {number(point.error, 3)}{unit}",
        ]
        if np.isfinite(point.metres):
            lines.append(f"{distance(point.metres)} on the ground")
        return "<br>".join(map(escape, lines))

    def _label(self, point: Any) -> str:
        parts = [f"{point.number}: {f'{number(point.excess)}×' if point.excess else 'equal'}"]
        if np.isfinite(point.metres):
            parts.append(distance(point.metres))
        if self._several:
            parts.append(f"{name(point.kind, 24)}, batch {point.batch_size}")
        return " · ".join(parts)

    # One sample.

    def _pointed(self, trace: int, points: Any) -> None:
        if points.point_inds:
            point = self._drawn[trace].iloc[points.point_inds[0]]
            self._react(lambda: self._choose(_key(point)))

    def _hovered(self, trace: int, points: Any) -> None:
        if self._hover.value:
            self._pointed(trace, points)

    def _listed(self) -> None:
        if self.list.value is not None:
            self._choose(self.list.value)

    def _numbered(self) -> None:
        assert self._chosen is not None
        self._choose(self._chosen._replace(sample=self.number.value))

    def _choose(self, key: _Key) -> None:
        sample = self._exploration.sample(*key)
        self._chosen = key
        with self._setting():
            self.number.max = self._exploration.count(key.kind, key.batch_size) - 1
            self.number.value = key.sample
            self._mark_listed()
        with self.figure.batch_update():
            self._mark_point()
        self.details.value = _describe(sample, self._exploration)

    def _mark_listed(self) -> None:
        listed = [key for _, key in self.list.options]
        self.list.value = self._chosen if self._chosen in listed else None

    def _mark_point(self) -> None:
        ring, marked = self.figure.data[-1], self._marked()
        ring.x, ring.y = self._at(marked)
        ring.showlegend = bool(len(marked))

    def _marked(self) -> pd.DataFrame:
        """The chosen sample, where it is among these."""
        points = self._points
        if self._chosen is None:
            return points[:0]
        kind, size, sample = self._chosen
        same = (points.kind == kind) & (points.batch_size == size) & (points.number == sample)
        return points[same][:1]


def _set_steps(slider: widgets.SelectionRangeSlider, values: Floats) -> None:
    """Let a slider go in steps of 1, 2 and 5 over what ``values`` span, and open it wide."""
    some = values[(values > 0) & np.isfinite(values)]
    steps = [0.0]
    if some.size:
        first, last = (math.floor(math.log10(v)) for v in (some.min(), some.max()))
        steps += [
            float(f"{digit}e{power}") for power in range(first, last + 2) for digit in (1, 2, 5)
        ]
        # The last one at or below the smallest value, up to the first one at or above the largest.
        below = max(s for s in steps if s <= some.min())
        above = min(s for s in steps if s >= some.max())
        steps = [0.0, *(s for s in steps[1:] if below <= s <= above)]
    if np.isposinf(values).any():
        steps.append(math.inf)
    if len(steps) == 1:
        steps.append(1.0)
    slider.options = [(number(step), step) for step in steps]
    slider.index = (0, len(steps) - 1)


def _times(excess: float) -> str:
    if excess == 0:
        return "equal"
    return f"{number(excess)}× allowed" if math.isfinite(excess) else "NaN or Inf in one model only"


def _describe(sample: ExploredSample, exploration: Exploration) -> str:
    """A sample as HTML: where it is from, both models' answers, and how its inputs look."""
    heading = f"Sample {sample.index} · {sample.kind}, batch {sample.batch_size}"
    facts = [f"in {sample.shard}"] if sample.shard else []
    if sample.metres is not None:
        apart = f"positions {distance(sample.metres)} apart"
        facts.append(apart if math.isfinite(sample.metres) else "a position is NaN or Inf")
    if sample.truth_m is not None:
        pytorch, onnx = map(distance, sample.truth_m)
        facts.append(f"true position {pytorch} from PyTorch's, {onnx} from ONNX's")
    rows = [
        row for spec in exploration.signature.outputs for row in _rows(spec, sample, exploration)
    ]
    chart = sample_inputs(sample.inputs, exploration.signature, f"Inputs of sample {sample.index}")
    return render(
        _HERE / "sample.html.j2",
        {},
        heading=heading,
        facts=facts,
        head=("output", "element", "PyTorch", "ONNX", "difference", "× allowed"),
        rows=rows,
        picture=None if chart is None else chart._repr_mimebundle_()[0],
    )


def _rows(
    spec: TensorSpec, sample: ExploredSample, exploration: Exploration
) -> Iterator[tuple[str, ...]]:
    """Both models' elements of an output, the worst of many, in words."""
    signature = exploration.signature
    a, b = (side[spec.name].ravel().astype(np.float64) for side in (sample.pytorch, sample.onnx))
    limit = exploration.parity.limit(spec.name).times(sample.factor)
    error, excess, _ = element_errors(a, b, limit)
    names = element_names(spec, a.size, of_position=spec is signature.sigma_output)
    chosen = np.sort(np.argsort(-excess, kind="stable")[:_ELEMENTS_WRITTEN])
    for element in chosen.tolist():
        unit = unit_of(spec.unit)
        yield (
            f"{name(spec.name)} ({unit})" if unit else name(spec.name),
            names[element] if a.size > 1 else "",
            *apart(a[element], b[element], 9),
            number(error[element], 3),
            number(excess[element], 3),
        )
    if a.size > len(chosen):
        yield (name(spec.name), f"{a.size - len(chosen):,} more, which differ less", *[""] * 4)
