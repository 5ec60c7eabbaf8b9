"""What all figures share: `Chart`, colours, the heading, and how numbers and names are written."""

from __future__ import annotations

import base64
import io
import re
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from heimdall_onnx.common.text import number, unit_of


class Color:
    """What is drawn in which colour; PyTorch and ONNX have the same one everywhere.

    Okabe and Ito's palette, "Color Universal Design", 2008. The contenders also differ in marker
    and line style.
    """

    PYTORCH = "#0072B2"
    ONNX = "#D55E00"
    # Of two releases, each of which has both of these. The second is the darker one of Paul Tol's
    # muted scheme (SRON/EPS/TN/09-002, 2021), since the first must differ from it in lightness too.
    A = "#009E73"
    B = "#882255"
    ELEMENTS = ("#009E73", "#CC79A7", "#56B4E9", "#E69F00")
    INK = "#222222"
    QUIET = "#595959"
    GRID = "#E3E3E3"


_WIDTH = 8.0  # inches; legible at half of it, so no text is below 9 points
_DPI = 110
_STYLE = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.9,
    "axes.edgecolor": Color.QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": Color.GRID,
    "grid.linewidth": 0.7,
    "axes.titlepad": 8,
    "lines.linewidth": 1.6,
    "errorbar.capsize": 3,
    "axes.unicode_minus": True,
}

_UNITS = "km|m|mm|µm|ms|degrees"

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Chart:
    """A figure with its answer in words; in a notebook it shows itself as PNG.

    A bare Matplotlib figure made without pyplot would show there as text only.

    Attributes:
        figure: The figure, unknown to pyplot.
        title: The answer that the figure gives.
        alt: The numbers behind it as text, for whoever can't see the figure.
    """

    figure: Figure = field(repr=False)
    title: str
    alt: str

    def to_png(self) -> bytes:
        """The figure as PNG; equal figures give equal bytes."""
        buffer = io.BytesIO()
        with _styled(), warnings.catch_warnings():
            # A receiver may be named in a script that the font lacks: it is drawn as boxes.
            warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
            self.figure.savefig(
                buffer,
                format="png",
                dpi=_DPI,
                metadata={"Software": None},
            )
        return buffer.getvalue()

    def save(self, path: Path | str) -> Path:
        """Write the PNG to ``path`` and return that."""
        path = Path(path)
        path.write_bytes(self.to_png())
        return path

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
        image = base64.b64encode(self.to_png()).decode("ascii")
        return (
            {"image/png": image, "text/plain": f"{self.title}. {self.alt}"},
            {"image/png": {"alt": f"{self.title}. {self.alt}"}},
        )


def _styled() -> Any:
    # Matplotlib's own defaults first: a user's matplotlibrc must not change the report.
    return matplotlib.style.context(["default", _STYLE])


def styled(draw: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Make ``draw`` work in the report's style, whatever the user's own is."""

    @wraps(draw)
    def wrapper(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with _styled():
            return draw(*args, **kwargs)

    return wrapper


def new_figure(title: str, subtitle: str, *, height: float) -> Figure:
    """A figure with its heading; ``height`` inches below the heading are left for the axes."""
    # Characters to an inch of DejaVu Sans, bold 12 points and regular 9.5 points, on average.
    heading = _wrap(title, int(_WIDTH * 9.7))
    below = _wrap(subtitle, int(_WIDTH * 13))
    title_height = 0.2 * (heading.count("\n") + 1)
    head = 0.12 + title_height + 0.06 + 0.17 * (below.count("\n") + 1) + 0.06
    total = height + head
    layout = ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - head / total), w_pad=0.06, h_pad=0.06)
    figure = Figure(figsize=(_WIDTH, total), layout=layout)
    left = 0.1 / _WIDTH
    figure.text(
        left, 1 - 0.1 / total, plain(heading), va="top", size=12, weight="bold", color=Color.INK
    ).set_gid("title")
    figure.text(
        left,
        1 - (0.16 + title_height) / total,
        plain(below),
        va="top",
        size=9.5,
        color=Color.QUIET,
    ).set_gid("subtitle")
    return figure


def _wrap(text: str, width: int) -> str:
    """``text`` in even lines of at most ``width`` characters, no number torn from its unit."""
    text = re.sub(rf"(?<=\d) (?=({_UNITS})\b)", "\N{NO-BREAK SPACE}", text)
    lines = textwrap.wrap(text, width)
    while len(narrower := textwrap.wrap(text, width - 1)) == len(lines) > 1:
        lines, width = narrower, width - 1
    return "\n".join(lines)


def log_axis(axis: Axis) -> None:
    """Label a logarithmic axis, whose limits are there, as `number` writes.

    Its powers of ten are marked, and 2 and 5 between them where it spans less than two. Further
    marks, and powers set as formulas, take a quarter of a second for each axis.
    """
    low, high = axis.get_view_interval()
    fine = low > 0 and high < 100 * low
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if fine else (1.0,), numticks=9))
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axis.set_minor_locator(NullLocator())


def no_grid(axes: Axes) -> None:
    """Take grid, ticks and frame away, for panels that hold something else than a plot."""
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def draw_bars(
    axes: Axes,
    rows: Sequence[str],
    sides: Sequence[tuple[str, str, Sequence[float]]],
    text: Callable[[float], str],
) -> None:
    """One or two horizontal bars a row, the first row on top; the second of a pair is hatched.

    Args:
        axes: Where to.
        rows: Name of each row.
        sides: Label, colour, and a value for each row, of one side or of both.
        text: What is written behind a bar.
    """
    for index, (label, color, values) in enumerate(sides):
        hatch = "////" if index else ""
        bars = axes.barh(
            np.arange(len(rows)) + 0.4 * index - 0.2 * (len(sides) - 1),
            values,
            height=0.76 / len(sides),
            facecolor=f"{color}66",
            edgecolor=color,
            hatch=hatch,
            label=label,
            gid=f"bars {label}",
        )
        axes.bar_label(bars, [text(value) for value in values], padding=3, fontsize=9)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")


def note(
    axes: Axes, text: str, point: tuple[float, float], offset: tuple[float, float], **style: Any
) -> Annotation:
    """Write ``text`` next to a point, ``offset`` printer's points away from it."""
    style = {"size": 9, **style}
    return axes.annotate(plain(text), point, offset, textcoords="offset points", **style)


def legend_below(axes: Axes, down: float, **style: Any) -> None:
    """A legend beneath the axes, ``down`` of their heights below them."""
    style = {"handletextpad": 0.5, "columnspacing": 1.2, **style}
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -down), borderaxespad=0, **style)


def say(axes: Axes, text: str) -> None:
    """Put words where there is nothing to draw."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, plain(text), ha="center", va="center", transform=axes.transAxes, size=10)


def labelled(what: str, unit: str | None) -> str:
    """``what`` with its unit, as an axis is labelled."""
    shown = unit_of(unit)
    return plain(f"{what} ({shown})" if shown else what)


def plain(text: str) -> str:
    """``text`` as it is: a dollar sign in a name must not start a formula."""
    return text.replace("$", r"\$")
