"""The table of ratios: every peer beside this project, and where a peer is better."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field

NOISE = 0.02  # Of size, time and memory; latency has an interval of its own.


@dataclass(frozen=True)
class Accuracy:
    """What a model loses against the fp32 ONNX model, by this project's own gates.

    Attributes:
        median: Median localization error over that of fp32; None without labels.
        nats: Growth of the mean negative log-likelihood.
        displacement: 99th percentile of the displacement, in predicted deviations.
        lost: The gates that do not hold, in words; none of them: equal accuracy.
    """

    median: float | None
    nats: float | None
    displacement: float | None
    lost: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        """Whether it is as good as the model that it was made of, to 1%."""
        return not self.lost

    def __str__(self) -> str:
        if self.median is None:
            return "" if self.displacement is None else f"moved {self.displacement:.3f} σ"
        nats = "" if self.nats is None else f" {self.nats:+.3f}"
        return f"{100 * (self.median - 1):+.2f}%{nats}"


@dataclass(frozen=True)
class Ratio:
    """A figure over this project's; with its confidence interval where there is one.

    Attributes:
        value: Below 1 the peer is better.
        low: Lower end of the interval.
        high: Its upper end.
    """

    value: float
    low: float
    high: float

    @property
    def better(self) -> bool:
        """Whether the peer is better, by the whole interval."""
        return self.high < 1

    @classmethod
    def of(cls, peer: float, own: float) -> Ratio:
        """Of two figures measured once."""
        value = peer / own
        return cls(value, value * (1 - NOISE), value * (1 + NOISE))


@dataclass(frozen=True)
class Row:
    """A model and what it took to get there.

    Attributes:
        name: What it is called.
        method: How it was made and measured.
        reason: Why there are no figures; empty if there are.
        latency_ms: Median latency of one sample.
        latency: Its ratio to this project's, from blocks in turns.
        accuracy: What it loses.
        size_bytes: All files that are needed to run it.
        seconds: Wall-clock time of getting there.
        peak_bytes: Peak memory of getting there.
        notes: What else a reader should know.
    """

    name: str
    method: str = ""
    reason: str = ""
    latency_ms: float = 0.0
    latency: Ratio = field(default=Ratio(1, 1, 1))
    accuracy: Accuracy | None = None
    size_bytes: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    notes: tuple[str, ...] = ()


MEASURES = ("latency", "size", "time", "memory")


def ratios(row: Row, own: Row) -> dict[str, Ratio]:
    """The figures of a row over this project's, by the names of `MEASURES`."""
    return {
        "latency": row.latency,
        "size": Ratio.of(row.size_bytes, own.size_bytes),
        "time": Ratio.of(row.seconds, own.seconds),
        "memory": Ratio.of(row.peak_bytes, own.peak_bytes),
    }


def verdict(row: Row, own: Row) -> str:
    """Where a peer is better; faster counts for nothing where it costs accuracy."""
    if row.accuracy is None:
        return row.reason
    better = [name for name, ratio in ratios(row, own).items() if ratio.better]
    where = f"better: {', '.join(better)}" if better else ""
    return where if row.accuracy.equal else "; ".join(filter(None, ["loses accuracy", where]))


def render(own: Row, peers: Sequence[Row], width: int = 118) -> str:
    """The table, a method below each row, and what it comes to in the last lines."""
    head = f"{'':30}{'latency':>24}{'median, nats':>24}{'size':>8}{'time':>8}{'memory':>8}"
    lines = [
        f"{head}  verdict",
        f"{own.name:30.30}{own.latency_ms:>21.2f} ms{own.accuracy or ''!s:>24}"
        f"{own.size_bytes / 1e6:>5.0f} MB{own.seconds:>6.0f} s{own.peak_bytes / 1e9:>5.1f} GB",
        *_below(own, width),
    ]
    for row in peers:
        lines += described(row, own, width)
    return "\n".join([*lines, "", *summary(own, peers)])


def described(row: Row, own: Row, width: int = 118) -> list[str]:
    """A peer's lines: its ratios and verdict, or why there are none, and its method."""
    if row.accuracy is None:
        return [f"{row.name:30.30}  none: {row.reason}", *_below(row, width)]
    found = ratios(row, own)
    speed = f"{row.latency.value:.2f}× ({row.latency.low:.2f}–{row.latency.high:.2f})"
    others = "".join(f"{found[name].value:>7.2f}×" for name in ("size", "time", "memory"))
    line = f"{row.name:30.30}{speed:>24}{row.accuracy!s:>24}{others}  {verdict(row, own)}"
    return [line, *_below(row, width)]


def summary(own: Row, peers: Sequence[Row]) -> list[str]:
    """What the table comes to, a line each."""
    equal = [row for row in peers if row.accuracy and row.accuracy.equal]
    lines = []
    for name in MEASURES:
        best = sorted(
            (row for row in equal if ratios(row, own)[name].better),
            key=lambda row: ratios(row, own)[name].value,
        )
        said = ", ".join(f"{row.name} ({ratios(row, own)[name].value:.2f}×)" for row in best)
        lines.append(f"better in {name} at equal accuracy: {said or 'none'}")
    inaccurate = [row.name for row in peers if row.accuracy and not row.accuracy.equal]
    lines.append(f"loses accuracy: {', '.join(inaccurate) or 'none'}")
    return lines


def _below(row: Row, width: int) -> list[str]:
    said = [row.method, *row.notes, *(row.accuracy.lost if row.accuracy else ())]
    shape = {"initial_indent": "    ", "subsequent_indent": "      ", "width": width}
    return [line for text in said for line in textwrap.wrap(text, **shape)]
