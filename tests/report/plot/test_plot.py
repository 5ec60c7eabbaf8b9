"""The figures' answers are computed right, and what decides them is drawn where it belongs."""

from __future__ import annotations

import base64
import copy
import io
import struct
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pytest
import torch
from IPython.core.formatters import DisplayFormatter
from matplotlib.axes import Axes
from matplotlib.axis import Tick
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from torch import nn

from heimdall_onnx.common.arrays import Arrays
from heimdall_onnx.common.text import apart, distance, name, number, share
from heimdall_onnx.common.verdict import NotMeasured
from heimdall_onnx.data.evaluation import EvaluationData
from heimdall_onnx.evidence.geodesy import distance_m
from heimdall_onnx.evidence.latency.benchmark import (
    ONNX,
    BatchLatency,
    LatencyReport,
)
from heimdall_onnx.evidence.latency.contenders import PYTORCH, ContenderLatency
from heimdall_onnx.evidence.latency.machine_state import MachineState
from heimdall_onnx.evidence.latency.statistics import Speedup, paired_speedup
from heimdall_onnx.evidence.parity.compare import compare_outputs
from heimdall_onnx.evidence.parity.departure import (
    Departure,
    DepthProfile,
    ModuleDifference,
    locate_departure,
    trace_depth,
)
from heimdall_onnx.evidence.parity.ground import GroundAccumulator, middle_of
from heimdall_onnx.evidence.parity.optimization_levels import (
    LevelParity,
    LevelReport,
    compare_levels,
)
from heimdall_onnx.evidence.parity.report import BatchIndependence, ParityCell, ParityReport
from heimdall_onnx.evidence.parity.statistics import ErrorAccumulator
from heimdall_onnx.evidence.parity.tolerance import ADVERSARIAL_FACTOR, EVALUATION, RTOL, Limit
from heimdall_onnx.localization.network import LOCALIZATION_SIGNATURE
from heimdall_onnx.model.examples import generic_inputs
from heimdall_onnx.model.inference import open_session
from heimdall_onnx.model.onnx.export import export_model
from heimdall_onnx.model.signature import Signature, TensorSpec
from heimdall_onnx.report import plot, tables
from heimdall_onnx.report.plot.chart import Color

RECEIVERS = {"DF0KL": (54.1, 13.4), "HB9RYZ": (47.2, 8.1), "F1JEK": (46.6, 0.3)}
KINDS = (EVALUATION, "zeros", "amplitude ×100")
TOLERANCE = 1e-5


class Locator(nn.Module):
    """A small model with the reference model's signature."""

    signature = LOCALIZATION_SIGNATURE

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(3 * 128 * 32, 16), nn.Tanh())
        self.position, self.sigma = nn.Linear(16, 2), nn.Linear(16, 2)
        with torch.no_grad():
            self.position.bias.copy_(torch.tensor([50.0, 8.0]))

    def forward(self, mel_spectrogram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.body(mel_spectrogram)
        return self.position(hidden), 0.01 + 0.9 * torch.sigmoid(self.sigma(hidden))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Locator().eval()


@pytest.fixture(scope="module")
def onnx_path(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plot") / "model.onnx"
    export_model(model, path, signature=LOCALIZATION_SIGNATURE, opset=14)
    return path


@pytest.fixture(scope="module")
def data() -> EvaluationData:
    rng = np.random.default_rng(0)
    inputs = generic_inputs(LOCALIZATION_SIGNATURE, 24)
    truth = np.stack([rng.uniform(49, 51, 24), rng.uniform(7, 9, 24)], axis=1)
    return EvaluationData(inputs, truth, {}, "captures.npz", "ab", RECEIVERS)


@pytest.fixture(scope="module")
def passing(model: nn.Module, onnx_path: Path, data: EvaluationData) -> ParityReport:
    return compare_outputs(model, open_session(onnx_path), data, LOCALIZATION_SIGNATURE)


@pytest.fixture(scope="module")
def failing(model: nn.Module, onnx_path: Path, data: EvaluationData) -> ParityReport:
    return compare_outputs(
        moved_model(model), open_session(onnx_path), data, LOCALIZATION_SIGNATURE
    )


def moved_model(model: nn.Module) -> nn.Module:
    """Another than the one that was exported, in one place."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.position.bias[0] += 0.5
    return other


@pytest.fixture(scope="module")
def measured() -> LatencyReport:
    batches = tuple(BatchLatency(n, (n * calls(20.0, 60), n * calls(14.0, 60))) for n in (1, 2, 4))
    return replace(latency_of(calls(20.0), calls(14.0)), batches=batches)


def outputs(**shapes: tuple[int, ...]) -> Signature:
    return Signature(
        (TensorSpec("x", "float32", ("batch", 4)),),
        tuple(TensorSpec(n, "float32", ("batch", *shape)) for n, shape in shapes.items()),
    )


def report_of(
    signature: Signature,
    pytorch: Arrays,
    onnx: Arrays,
    *,
    truth: npt.NDArray[np.float64] | None = None,
) -> ParityReport:
    """A report on given outputs, put together from the statistics that `compare_outputs` uses."""

    def cell(kind: str, size: int) -> ParityCell:
        factor = 1.0 if kind == EVALUATION else ADVERSARIAL_FACTOR
        found = []
        for spec in signature.outputs:
            accumulator = ErrorAccumulator(spec, Limit(factor * TOLERANCE, factor * RTOL))
            accumulator.update(pytorch[spec.name], onnx[spec.name], 0)
            found.append(accumulator.result())
        return ParityCell(kind, size, samples, tuple(found))

    samples = len(next(iter(pytorch.values())))
    position, ground = signature.position_output, None
    if position is not None:
        accumulator = GroundAccumulator(middle_of(truth, {}))
        if pytorch[position.name].shape == onnx[position.name].shape:
            accumulator.update(pytorch[position.name], onnx[position.name], truth)
        ground = accumulator.result()
    cells = tuple(cell(kind, size) for kind in KINDS for size in (8, 1))
    return ParityReport(
        signature=signature,
        source="captures.npz",
        samples=samples,
        tolerance=TOLERANCE,
        rtol=RTOL,
        cells=cells,
        noise_floor=(),
        independence=BatchIndependence(0.0, 0.0, "none", signature.outputs[0].name, 1),
        ground=ground,
        pytorch=pytorch,
        onnx=onnx,
        plotted=np.arange(samples),
        worst_inputs={},
        worst_where="",
    )


def located(
    positions: npt.ArrayLike, moved: npt.ArrayLike = 0.0, **kwargs: npt.NDArray[np.float64]
) -> tuple[ParityReport, EvaluationData]:
    """A report on positions that the export moves by ``moved`` degrees, and its data."""
    p = np.asarray(positions, np.float32)
    o = (p.astype(np.float64) + np.asarray(moved)).astype(np.float32)
    sigma = np.full(p.shape, 0.5, np.float32)
    report = report_of(
        LOCALIZATION_SIGNATURE,
        {"positions": p, "uncertainties": sigma},
        {"positions": o, "uncertainties": sigma},
        **kwargs,
    )
    inputs = {"mel_spectrogram": np.zeros((len(p), 1), np.float32)}
    return report, EvaluationData(inputs, kwargs.get("truth"), {}, "captures.npz", "ab", {})


def contender(who: str, samples: npt.NDArray[np.float64], block: int = 10) -> ContenderLatency:
    return ContenderLatency.of_calls(
        who,
        samples,
        np.arange(samples.size) // block,
        load_ms=1.0,
        first_call_ms=1.0,
        peak_memory_bytes=1,
    )


def latency_of(
    pytorch: npt.NDArray[np.float64], onnx: npt.NDArray[np.float64], batch: int = 1
) -> LatencyReport:
    sides = contender(PYTORCH, pytorch), contender(ONNX, onnx)
    blocks = [np.split(s.samples_ms, np.arange(10, s.samples_ms.size, 10)) for s in sides]
    return LatencyReport(
        batch_size=batch,
        threads=2,
        contenders=sides,
        speedup=paired_speedup(*blocks),
        machine=MachineState(1.0, 0.5, 0.6, None, 0.5, 0.1, 0.4, 0.0, None, 1),
    )


def calls(median: float, count: int = 200, spread: float = 0.02) -> npt.NDArray[np.float64]:
    return median * np.random.default_rng(int(1000 * median)).normal(1, spread, count)


def artists(figure: Figure, gid: str) -> list[object]:
    return figure.findobj(lambda artist: artist.get_gid() == gid)


def axes_of(chart: plot.Chart, title: str) -> list[Axes]:
    return [axes for axes in chart.figure.axes if axes.get_title(loc="left").startswith(title)]


def drawn(chart: plot.Chart, gid: str) -> npt.NDArray[np.float64]:
    """Points of the only line, or of the only scatter, with this name."""
    (artist,) = artists(chart.figure, gid)
    points = artist.get_xydata() if hasattr(artist, "get_xydata") else artist.get_offsets()
    return np.asarray(points, np.float64)


def visible_text(chart: plot.Chart) -> str:
    texts = (text.get_text() for text in chart.figure.findobj(Text))
    return " ".join(" ".join(texts).split())


def png_size(png: bytes) -> tuple[int, int]:
    width, height = struct.unpack(">II", png[16:24])
    return int(width), int(height)


# --- every chart ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def charts(
    model: nn.Module,
    onnx_path: Path,
    passing: ParityReport,
    failing: ParityReport,
    measured: LatencyReport,
    data: EvaluationData,
) -> list[plot.Chart]:
    found = [plot.latency(measured), plot.throughput(measured)]
    other = moved_model(model)
    for report, pytorch in ((passing, model), (failing, other)):
        levels = compare_levels(pytorch, onnx_path, data, report)
        departure = locate_departure(report, pytorch, onnx_path)
        depth = trace_depth(report, pytorch, onnx_path)
        found += [
            plot.error_by_magnitude(report),
            plot.worst_inputs(report, data),
            plot.errors_by_sample(report),
            plot.optimization_levels(levels),
        ]
        if depth is not None:
            found.append(plot.error_along_depth(depth, departure))
        found += [
            chart
            for chart in (
                plot.parity_scatter(report),
                plot.parity_grid(report),
                plot.position_map(report, data),
            )
            if chart is not None
        ]
    return found


def test_every_chart_of_a_real_run_is_a_small_png_titled_with_its_answer(
    charts: list[plot.Chart],
) -> None:
    assert len(charts) == 17
    for chart in charts:
        png = chart.to_png()
        image = Image.open(io.BytesIO(png))
        image.load()
        assert image.size[0] == 880
        # Random numbers as spectrograms can't be compressed.
        pictures = any(axes.images for axes in chart.figure.axes)
        assert len(png) < (300_000 if pictures else 150_000), chart.title
        assert sum(map(bool, image.convert("L").histogram())) > 20
        shown = next(iter(artists(chart.figure, "title"))).get_text()
        assert shown.replace("\n", " ").replace("\N{NO-BREAK SPACE}", " ") == chart.title
        assert any(character.isdigit() for character in chart.alt)


def test_no_text_is_below_nine_points_or_cut_off(charts: list[plot.Chart]) -> None:
    for chart in charts:
        canvas = FigureCanvasAgg(chart.figure)
        chart.figure.draw_without_rendering()
        width, height = chart.figure.bbox.size
        ticks = {
            label for tick in chart.figure.findobj(Tick) for label in (tick.label1, tick.label2)
        }
        for text in chart.figure.findobj(Text):
            if not text.get_text().strip() or not text.get_visible():
                continue
            assert text.get_fontsize() >= 9, text
            if text in ticks:  # Matplotlib keeps labels of ticks beyond the axis, undrawn
                continue
            box = text.get_window_extent(canvas.get_renderer())
            inside = -1 <= box.x0 <= box.x1 <= width + 1 and -1 <= box.y0 <= box.y1 <= height + 1
            assert inside, f"{text} of {chart.title}"


def test_equal_reports_give_equal_bytes_that_name_no_software(passing: ParityReport) -> None:
    first, second = (plot.parity_scatter(passing).to_png() for _ in range(2))
    assert first == second
    assert b"Software" not in first
    assert b"tIME" not in first


def test_a_users_own_matplotlib_style_changes_nothing_and_stays(passing: ParityReport) -> None:
    expected = plot.parity_grid(passing).to_png()
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "black", "text.color": "red"}):
        assert plot.parity_grid(passing).to_png() == expected
        assert mpl.rcParams["font.size"] == 30


def test_pyplot_is_left_alone(passing: ParityReport) -> None:
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    plot.parity_scatter(passing).to_png()
    assert pyplot.get_fignums() == before


def test_save_writes_the_png_and_returns_its_path(passing: ParityReport, tmp_path: Path) -> None:
    chart = plot.parity_grid(passing)
    path = chart.save(tmp_path / "grid.png")
    assert path.read_bytes() == chart.to_png()


def test_a_chart_shows_itself_as_png_with_alternative_text(passing: ParityReport) -> None:
    chart, same = (plot.parity_scatter(passing) for _ in range(2))
    bundle, metadata = chart._repr_mimebundle_(include=None, exclude=None)
    assert base64.b64decode(bundle["image/png"]) == same.to_png()
    assert bundle["text/plain"] == metadata["image/png"]["alt"] == f"{chart.title}. {chart.alt}"
    assert f"{passing.evaluation[0].mean:.2e}"[:4] in chart.alt


def test_a_notebook_shows_the_chart_without_any_matplotlib_magic(passing: ParityReport) -> None:
    chart = plot.parity_grid(passing)
    data, metadata = DisplayFormatter().format(chart)
    assert base64.b64decode(data["image/png"]) == chart.to_png()
    assert metadata["image/png"]["alt"].startswith(chart.title)


def test_names_from_outside_can_not_break_a_figure() -> None:
    odd = outputs(**{"$\\bad{": (2,), "line\nbreak " + "x" * 90: (1,), "上海": ()})
    rng = np.random.default_rng(0)
    values = {s.name: rng.normal(size=(5, *s.shape[1:])).astype(np.float32) for s in odd.outputs}
    report = replace(report_of(odd, values, values), source="$\\frac{ <b>.npz")
    for chart in (
        plot.parity_scatter(report),
        plot.parity_grid(report),
    ):
        assert png_size(chart.to_png())[0] == 880


# --- parity_scatter ------------------------------------------------------------------------------


def test_scatter_says_that_all_elements_are_within_tolerance(passing: ParityReport) -> None:
    title = plot.parity_scatter(passing).title
    largest = max(o.maximum for o in passing.evaluation)
    assert 0 < largest < TOLERANCE
    assert title == (
        f"Largest difference {number(largest)} degrees in positions: all 96 elements within "
        "tolerance"
    )


def test_scatter_counts_the_elements_beyond_tolerance(failing: ParityReport) -> None:
    chart = plot.parity_scatter(failing)
    assert chart.title == (
        "24 of 96 elements beyond tolerance; largest difference 0.5 degrees in positions"
    )
    crosses = artists(chart.figure, "beyond")
    assert [len(c.get_xdata()) for c in crosses] == [24, 24]


def test_scatter_draws_the_identity_line_and_the_tolerance_where_they_belong(
    passing: ParityReport,
) -> None:
    chart = plot.parity_scatter(passing)
    for line in artists(chart.figure, "identity"):
        assert np.array_equal(line.get_xdata(), line.get_ydata())
    lines = artists(chart.figure, "tolerance")
    assert len(lines) == 4
    for sign, line in zip((1, -1, 1, -1), lines, strict=True):
        x, y = line.get_xydata().T
        np.testing.assert_allclose(y, sign * (TOLERANCE + RTOL * np.abs(x)))
        assert line.get_linestyle() == "--"
        low, high = line.axes.get_ylim()
        assert low <= y.min() <= y.max() <= high


def test_scatter_draws_every_difference_inside_its_panel() -> None:
    signature = outputs(y=(3,))
    rng = np.random.default_rng(0)
    a = rng.normal(0, 10, (40, 3)).astype(np.float32)
    for scale in (0.0, 1e-9, 1e-6, 1e-5, 1e-3, 10.0, 1e8):
        b = (a + scale * rng.normal(size=a.shape)).astype(np.float32)
        chart = plot.parity_scatter(report_of(signature, {"y": a}, {"y": b}))
        above, below = chart.figure.axes
        points = np.concatenate([c.get_offsets() for c in below.collections])
        np.testing.assert_allclose(
            np.sort(points[:, 1]), np.sort((b.astype(np.float64) - a).ravel()), atol=1e-12
        )
        for axes in (above, below):
            for collection in axes.collections:
                x, y = np.asarray(collection.get_offsets()).T
                assert axes.get_xlim()[0] <= x.min() <= x.max() <= axes.get_xlim()[1]
                assert axes.get_ylim()[0] <= y.min() <= y.max() <= axes.get_ylim()[1]


def test_scatter_tells_latitude_from_longitude_by_marker(passing: ParityReport) -> None:
    (above, *_) = plot.parity_scatter(passing).figure.axes
    latitude, longitude = above.collections
    assert [c.get_label() for c in above.collections] == ["latitude", "longitude"]
    assert len(latitude.get_paths()[0].vertices) != len(longitude.get_paths()[0].vertices)
    np.testing.assert_allclose(
        np.asarray(latitude.get_offsets())[:, 0], passing.pytorch["positions"][:, 0]
    )


def test_scatter_of_equal_outputs_says_so() -> None:
    report, _ = located([[50, 8]])
    assert plot.parity_scatter(report).title == "No difference: all 4 elements are equal"
    plot.parity_scatter(report).to_png()


def test_scatter_names_and_marks_what_is_nan_in_one_model_only() -> None:
    report, _ = located(np.random.default_rng(0).uniform(40, 50, (10, 2)))
    onnx = {k: v.copy() for k, v in report.onnx.items()}
    onnx["positions"][3, 0] = np.nan
    onnx["positions"][4, 1] = np.inf
    chart = plot.parity_scatter(report_of(LOCALIZATION_SIGNATURE, report.pytorch, onnx))
    assert chart.title == (
        "2 of 40 elements beyond tolerance, 2 of them NaN or Inf in one model only"
    )
    np.testing.assert_allclose(
        np.sort(drawn(chart, "missing")[:, 0]),
        np.sort([report.pytorch["positions"][3, 0], report.pytorch["positions"][4, 1]]),
    )


def test_scatter_of_nothing_finite_says_that_there_is_nothing_to_compare() -> None:
    nothing = {"y": np.full((3, 2), np.nan, np.float32)}
    report = report_of(outputs(y=(2,)), nothing, nothing)
    expected = "Nothing to compare: all 6 elements are NaN or Inf in both models"
    assert plot.parity_scatter(report).title == expected
    plot.parity_scatter(report).to_png()


def test_differing_shapes_are_named() -> None:
    a, b = np.zeros((4, 2), np.float32), np.zeros((4, 1), np.float32)
    report = report_of(outputs(y=(2,)), {"y": a}, {"y": b})
    expected = "y can't be compared: PyTorch gives (4, 2), ONNX (4, 1)"
    for draw in (plot.parity_scatter, plot.errors_by_sample):
        chart = draw(report)
        assert chart.title == expected
        chart.to_png()


def test_scatter_shows_the_worst_four_of_many_outputs() -> None:
    signature = outputs(**{f"head{i}": (3,) for i in range(24)})
    rng = np.random.default_rng(0)
    a = {s.name: rng.normal(size=(20, 3)).astype(np.float32) for s in signature.outputs}
    b = {k: (v + np.float32(1e-6 * (int(k[4:]) % 7))).astype(np.float32) for k, v in a.items()}
    b["head5"][0, 0] += 1
    chart = plot.parity_scatter(report_of(signature, a, b))
    titles = [
        axes.get_title(loc="left") for axes in chart.figure.axes if axes.get_title(loc="left")
    ]
    assert len(titles) == 4
    assert "head5" in titles
    assert all(int(t[4:]) % 7 == 6 for t in titles if t != "head5")
    assert "1 of 1,440 elements beyond tolerance" in chart.title
    assert "4 outputs of 24" in visible_text(chart)


def test_scatter_keeps_the_worst_element_of_a_million_and_stays_small() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(1000, 1000)).astype(np.float32)
    b = a.copy()
    b[777, 333] += 0.25
    chart = plot.parity_scatter(report_of(outputs(logits=(1000,)), {"logits": a}, {"logits": b}))
    assert chart.title.startswith(
        "1 of 1,000,000 elements beyond tolerance; largest difference 0.25"
    )
    assert [len(c.get_xdata()) for c in artists(chart.figure, "beyond")] == [1, 1]
    assert len(artists(chart.figure, "elements")[0].get_offsets()) <= 2000
    assert len(chart.to_png()) < 150_000


# --- parity_grid ---------------------------------------------------------------------------------


def test_grid_has_a_cell_for_every_kind_and_batch_size(passing: ParityReport) -> None:
    chart = plot.parity_grid(passing)
    assert chart.title.startswith(f"Parity holds on all {len(passing.cells)} combinations")
    for cell in passing.cells:
        (text,) = artists(chart.figure, f"text {cell.kind}/{cell.batch_size}")
        assert text.get_text().endswith("×") or text.get_text() == "equal"
        assert f"{cell.kind}, batch {cell.batch_size}: " in chart.alt


def test_grid_holds_adversarial_inputs_against_ten_times_the_tolerance() -> None:
    a, b = np.zeros((2, 1), np.float32), np.full((2, 1), 5e-5, np.float32)
    chart = plot.parity_grid(report_of(outputs(y=(1,)), {"y": a}, {"y": b}))
    assert chart.title == (
        "Parity fails on 2 of 6 combinations of input and batch size; worst: evaluation data at "
        "batch 8, 5× the tolerance"
    )
    (failed,) = artists(chart.figure, f"text {EVALUATION}/8")
    (held,) = artists(chart.figure, "text zeros/8")
    assert failed.get_text() == "5×\n2 of 2"
    assert held.get_text() == "0.5×"
    boxes = [artists(chart.figure, f"{kind}/8")[0] for kind in (EVALUATION, "zeros")]
    assert [box.get_edgecolor()[3] for box in boxes] == [1, 0]


def test_grid_measures_an_error_by_the_tolerance_at_its_own_reference() -> None:
    spec = TensorSpec("y", "float32", ("batch", 1))
    accumulator = ErrorAccumulator(spec, Limit(1e-5, 1e-6))
    accumulator.update(np.array([[90.0], [0.0]]), np.array([[90.0 + 5e-5], [1e-6]]), 0)
    assert accumulator.result().excess == pytest.approx(0.5, rel=1e-3)


def test_grid_names_what_can_not_be_compared() -> None:
    a, b = np.zeros((2, 1), np.float32), np.full((2, 1), np.nan, np.float32)
    chart = plot.parity_grid(report_of(outputs(y=(1,)), {"y": a}, {"y": b}))
    assert chart.title.startswith("Parity fails on 6 of 6 combinations")
    assert chart.title.endswith("not comparable (NaN, Inf or shape)")
    chart.to_png()


def test_grid_of_equal_outputs_says_so() -> None:
    report, _ = located([[50, 8], [51, 9]])
    assert plot.parity_grid(report).title == (
        "No difference on any of 6 combinations of input and batch size"
    )


# --- position_map --------------------------------------------------------------------------------


def test_map_states_the_displacement_in_metres_on_the_ground() -> None:
    positions = np.tile([[50.0, 8.0]], (200, 1))
    moved = np.zeros((200, 2))
    moved[0] = [0.01, 0]
    report, data = located(positions, moved)
    most = distance_m(report.pytorch["positions"][:1], report.onnx["positions"][:1])[0]
    chart = plot.position_map(report, data)
    assert chart is not None
    assert most == pytest.approx(1112, abs=2)
    assert chart.title == "The export moves positions by at most 1.1 km, 99% of them by at most 0 m"
    np.testing.assert_allclose(drawn(chart, "moved")[0], [0, most / 1000], atol=1e-6)


def test_map_draws_both_models_receivers_truth_and_sigma(
    passing: ParityReport, data: EvaluationData
) -> None:
    chart = plot.position_map(passing, data)
    assert chart is not None
    for who, color in (("PyTorch", Color.PYTORCH), ("ONNX", Color.ONNX)):
        (points,) = artists(chart.figure, who)
        face, edge = points.get_facecolor(), points.get_edgecolor()
        assert to_hex((face if len(face) else edge)[0]).upper() == color
        assert len(points.get_offsets()) == 24
    assert len(drawn(chart, "receivers")) == 3
    assert len(drawn(chart, "true")) == 24
    assert len(artists(chart.figure, "sigma")) == 10
    text = visible_text(chart)
    assert all(receiver in text for receiver in RECEIVERS)
    assert "km" in text
    assert "DF0KL at 54.10° N, 13.40° E" in chart.alt


def test_map_is_true_to_scale() -> None:
    report, data = located([[50.0, 8.0], [51.0, 8.0]])
    chart = plot.position_map(report, data)
    assert chart is not None
    chart.to_png()
    points = drawn(chart, "ONNX")
    assert np.hypot(*(points[1] - points[0])) == pytest.approx(111.2, abs=0.1)
    axes = chart.figure.axes[0]
    assert axes.get_aspect() == 1
    (ellipse, _) = artists(chart.figure, "sigma")
    assert ellipse.height == pytest.approx(111.2, abs=0.1)
    assert ellipse.width == pytest.approx(111.2 * np.cos(np.radians(50)), rel=0.01)


def test_map_keeps_neighbours_across_the_date_line_together() -> None:
    report, data = located([[10.0, 179.9], [10.0, -179.9]])
    chart = plot.position_map(report, data)
    assert chart is not None
    assert np.abs(drawn(chart, "ONNX")).max() < 12
    assert "180.00°" in visible_text(chart)


def test_map_draws_the_tolerance_box_and_says_when_it_is_out_of_view() -> None:
    near, data = located([[50.0, 8.0]] * 3, np.full((3, 2), 3e-5))
    far, _ = located([[0.001, 0.002]] * 3, np.full((3, 2), 1e-8))
    charts = [plot.position_map(report, data) for report in (near, far)]
    assert [c is not None and "out of view" in _legends(c) for c in charts] == [False, True]
    (box,) = artists(charts[0].figure, "tolerance")
    assert box.get_height() == pytest.approx(2 * (TOLERANCE + RTOL * 50) * 111_230, rel=0.01)


def _legends(chart: plot.Chart) -> str:
    legends = [axes.get_legend() for axes in chart.figure.axes]
    return " ".join(t.get_text() for legend in legends if legend for t in legend.get_texts())


@pytest.mark.parametrize(
    "positions",
    [
        [[50.0, 8.0]],
        [[50.0, 8.0]] * 30,
        [[90.0, 0.0], [-90.0, 0.0]],
        [[120.0, 400.0], [-300.0, -1000.0]],
        np.random.default_rng(0).uniform(-90, 90, (300, 2)) * [1, 2],
    ],
    ids=["one", "identical", "poles", "beyond the globe", "over the globe"],
)
def test_map_can_be_drawn_wherever_positions_are(
    positions: npt.ArrayLike, caplog: pytest.LogCaptureFixture
) -> None:
    for moved in (0.0, 1e-4):
        report, data = located(positions, moved)
        chart = plot.position_map(report, data)
        assert chart is not None
        assert len(chart.to_png()) < 150_000
    assert not caplog.records


def test_map_leaves_out_what_is_not_finite_and_counts_it() -> None:
    positions = np.random.default_rng(0).uniform(40, 50, (20, 2))
    moved = np.zeros((20, 2))
    moved[3] = np.nan
    report, data = located(positions, moved)
    chart = plot.position_map(report, data)
    assert chart is not None
    assert (
        chart.title == "The export moves 99% of the finite positions by at most 0 m; 1 not finite"
    )
    assert len(drawn(chart, "moved")) == 19
    report, data = located(positions, np.nan)
    chart = plot.position_map(report, data)
    assert chart is not None
    assert chart.title == "No position is finite in both models"
    chart.to_png()


def test_map_leaves_out_ellipses_without_a_usable_standard_deviation() -> None:
    report, data = located([[50, 8], [51, 9], [52, 10]])
    partly = report.onnx["uncertainties"].copy()
    partly[1] = np.nan
    bare = Signature(LOCALIZATION_SIGNATURE.inputs, LOCALIZATION_SIGNATURE.outputs[:1])
    for changed, ellipses in (
        (replace(report, onnx=report.onnx | {"uncertainties": partly}), 2),
        (replace(report, onnx=report.onnx | {"uncertainties": partly[:, :1]}), 0),
        (report_of(bare, report.pytorch, report.onnx), 0),
    ):
        chart = plot.position_map(changed, data)
        assert chart is not None
        assert len(artists(chart.figure, "sigma")) == ellipses


def test_map_of_differing_shapes_draws_nothing() -> None:
    report, data = located([[50, 8], [51, 9]])
    onnx = report.onnx | {"positions": report.onnx["positions"][:, :1]}
    chart = plot.position_map(report_of(LOCALIZATION_SIGNATURE, report.pytorch, onnx), data)
    assert chart is not None
    assert chart.title == "No position is finite in both models"


def test_models_without_positions_have_no_map() -> None:
    values = {"y": np.ones((3, 2), np.float32)}
    report = report_of(outputs(y=(2,)), values, values)
    data = EvaluationData(values, None, {}, "captures.npz", "ab", {})
    assert plot.position_map(report, data) is None


# --- latency -------------------------------------------------------------------------------------


def with_speedup(ratio: float, low: float, high: float, pairs: int = 20) -> LatencyReport:
    report = latency_of(calls(20), calls(10))
    return replace(report, speedup=Speedup(ratio, low, high, pairs))


@pytest.mark.parametrize(
    ("speedup", "title"),
    [
        ((2.5, 2.4, 2.6), "ONNX is 2.5× faster at batch 1 (95% interval 2.4 to 2.6)"),
        ((1.04, 1.02, 1.06), "ONNX is 1.04× faster at batch 1 (95% interval 1.02 to 1.06)"),
        ((0.5, 0.4, 0.8), "ONNX is 2.0× slower at batch 1 (95% interval 1.25 to 2.5)"),
        (
            (1.02, 0.97, 1.06),
            "No clear difference in speed at batch 1: ONNX 1.02× as fast (95% interval 0.97 to "
            "1.06)",
        ),
        (
            (2.5, 2.4, 2.6, 4),
            "ONNX is 2.5× faster at batch 1 (2.4 to 2.6 over 4 pairs of blocks, too few for an "
            "interval)",
        ),
        ((4.1, 4.08, 4.12), "ONNX is 4.1× faster at batch 1 (95% interval 4.08 to 4.12)"),
        ((float("nan"),) * 3, "The speedup at batch 1 can't be told"),
    ],
)
def test_latency_says_how_much_faster_and_how_sure(speedup: tuple[float, ...], title: str) -> None:
    assert plot.latency(with_speedup(*speedup)).title == title


def test_latency_histograms_share_bins_and_hold_every_call() -> None:
    report = latency_of(calls(20), calls(14))
    chart = plot.latency(report)
    (pytorch,), (onnx,) = (artists(chart.figure, who) for who in (PYTORCH, ONNX))
    for stairs, color in ((pytorch, Color.PYTORCH), (onnx, Color.ONNX)):
        assert np.nansum(stairs.get_data().values) == 200
        assert to_hex(stairs.get_edgecolor()).upper() == color
    np.testing.assert_array_equal(pytorch.get_data().edges, onnx.get_data().edges)
    assert pytorch.get_linestyle() != onnx.get_linestyle()
    assert chart.figure.axes[0].get_xscale() == "linear"


def test_latency_axis_is_logarithmic_when_the_contenders_lie_far_apart() -> None:
    chart = plot.latency(latency_of(calls(20), calls(4)))
    assert chart.figure.axes[0].get_xscale() == "log"
    chart.to_png()


def test_latency_draws_only_percentiles_with_enough_calls_and_their_intervals() -> None:
    report = latency_of(calls(20), calls(14))
    chart = plot.latency(report)
    labels = [t.get_text() for t in chart.figure.axes[1].get_yticklabels()]
    assert labels == ["p50", "p90", "p95"]
    (bar,) = [
        container
        for container in chart.figure.axes[1].containers
        if container.get_label() == f"{ONNX} p50" or container[0].get_gid() == f"{ONNX} p50"
    ]
    percentile = report.onnx.percentile(50)
    assert percentile is not None
    (segments,) = [c.get_segments() for c in bar[2]]
    np.testing.assert_allclose(segments[0][:, 0], [percentile.low_ms, percentile.high_ms])
    assert "200 calls" in visible_text(chart)
    assert "2 threads each" in visible_text(chart)


def test_latency_of_a_few_equal_calls_can_be_drawn() -> None:
    report = latency_of(np.full(10, 5.0), np.full(10, 5.0))
    assert "too few calls for percentiles" in visible_text(plot.latency(report))
    plot.latency(report).to_png()


# --- words and numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (3.14e-6, "3.1e-6"),
        (1e-5, "1e-5"),
        (-2.5e-7, "-2.5e-7"),
        (0.0421, "0.042"),
        (0.996, "1"),
        (0.5, "0.5"),
        (9.96, "10"),
        (84.6, "85"),
        (1234.4, "1,234"),
        (2.5e9, "2.5e9"),
        (float("inf"), "inf"),
        (float("nan"), "nan"),
    ],
)
def test_numbers_are_written_to_two_digits(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("metres", "text"),
    [
        (0.0, "0 m"),
        (4.2e-5, "42 µm"),
        (0.0042, "4.2 mm"),
        (0.42, "0.42 m"),
        (85.2, "85 m"),
        (84_900, "85 km"),
        (float("nan"), "nan m"),
    ],
)
def test_lengths_are_written_in_the_unit_that_suits_them(metres: float, text: str) -> None:
    assert distance(metres) == text


def test_a_share_that_is_not_quite_all_is_not_rounded_to_all() -> None:
    assert [share(f) for f in (0, 1e-6, 0.5, 0.99999, 1)] == [
        "0%",
        "< 0.1%",
        "50%",
        "> 99.9%",
        "100%",
    ]


def test_long_names_are_shortened_to_one_line() -> None:
    assert name("a\nb\tc") == "a b c"
    assert name("x" * 40) == "x" * 27 + "…"


# --- error against magnitude ---------------------------------------------------------------------


def erring(
    values: npt.NDArray[np.float32], errors: npt.NDArray[np.float64], **shapes: tuple[int, ...]
) -> ParityReport:
    signature = outputs(**(shapes or {"y": values.shape[1:]}))
    moved = (values.astype(np.float64) + errors).astype(np.float32)
    return report_of(signature, {"y": values}, {"y": moved})


def spread_values(count: int = 400) -> npt.NDArray[np.float32]:
    return np.logspace(-3, 3, count, dtype=np.float32)[:, None]


@pytest.mark.parametrize(
    ("errors", "words"),
    [
        (lambda v: 1e-5 * v, "The error grows with the magnitude"),
        (lambda v: np.full(v.shape, 0.01), "The error does not grow with the magnitude"),
        (lambda v: 0.05 / v, "Small values have the larger errors"),
        (lambda v: 0 * v, "No error at any magnitude"),
    ],
)
def test_course_of_the_error_over_the_magnitude_is_told(errors, words: str) -> None:
    values = spread_values()
    chart = plot.error_by_magnitude(erring(values, errors(values.astype(np.float64))))
    assert chart.title.startswith(words)
    assert chart.alt == f"y: {chart.title}."


def test_every_element_lies_at_its_magnitude_and_error() -> None:
    values = np.array([[0.5, -2.0], [8.0, 32.0]], np.float32)
    moved = np.array([[0.25, 0.0], [0.5, 1.0]])
    chart = plot.error_by_magnitude(erring(values, moved))
    np.testing.assert_allclose(drawn(chart, "elements 0"), [[0.5, 0.25], [8.0, 0.5]])
    second = drawn(chart, "elements 1")
    np.testing.assert_allclose(second[1], [32.0, 1.0])
    # An equal element is drawn below every error there is, on an axis without a zero.
    (axes,) = axes_of(chart, "y")
    assert axes.get_ylim()[0] < second[0, 1] < 1e-7
    xs, allowed = drawn(chart, "tolerance").T
    np.testing.assert_allclose(allowed, TOLERANCE + RTOL * xs)
    assert "too few" in chart.title


def test_worst_of_many_elements_is_drawn_among_them() -> None:
    values = np.ones((9000, 1), np.float32)
    errors = np.zeros((9000, 1))
    errors[4567] = 0.125
    chart = plot.error_by_magnitude(erring(values, errors))
    points = drawn(chart, "elements 0")
    assert len(points) <= 3001
    assert points[:, 1].max() == 0.125


def test_elements_that_are_not_finite_or_not_comparable_are_said() -> None:
    values = np.full((20, 1), np.nan, np.float32)
    chart = plot.error_by_magnitude(erring(values, np.zeros((20, 1))))
    assert chart.title == "Nothing to compare"
    assert "no finite element" in visible_text(chart)


def test_wide_output_is_drawn_quickly_and_within_limits() -> None:
    values = np.ones((3, 30_000), np.float32)
    errors = np.zeros((3, 30_000))
    errors[1, 22_222] = 0.25
    chart = plot.error_by_magnitude(erring(values, errors))
    points = drawn(chart, "elements 0")
    assert len(points) <= 3001
    assert points[:, 1].max() == 0.25


@pytest.mark.parametrize("dtype", ["int64", "float16", "float32", "float64"])
def test_outputs_of_any_type_have_a_magnitude(dtype: str) -> None:
    # As large as masks are filled with, where the type has that.
    large = {"float16": 65504, "float32": 3.4028235e38, "float64": 1e100, "int64": 2**31}[dtype]
    values = np.array([[0, 1], [7, 60], [500, large], [-large, 2]]).astype(dtype)
    spec = TensorSpec("y", dtype, ("batch", 2))
    signature = Signature((TensorSpec("x", "float32", ("batch", 4)),), (spec,))
    moved = values.copy()
    moved[1, 1] += 1
    chart = plot.error_by_magnitude(report_of(signature, {"y": values}, {"y": moved}))
    assert len(artists(chart.figure, "1 ULP")) == dtype.startswith("float")
    assert chart.to_png()


# --- worst inputs --------------------------------------------------------------------------------


def test_worst_inputs_are_shown_in_order_with_both_answers(
    failing: ParityReport, data: EvaluationData
) -> None:
    chart = plot.worst_inputs(failing, data)
    text = visible_text(chart)
    order = sorted(failing.evaluation[0].worst, key=lambda w: (-w.excess, -w.error, w.sample))
    for worst in order[:3]:
        assert f"sample {worst.sample}: " in text
        for texts in zip(*map(apart, worst.reference, worst.value), strict=True):
            assert ", ".join(texts) in text
    # The other output's answers too, though none of these is among its worst.
    assert text.count("uncertainties") >= 3
    assert chart.title.startswith(f"Sample {order[0].sample} differs most")
    images = [image for axes in chart.figure.axes for image in axes.images]
    assert len(images) == 3 * 3
    first = order[0].sample
    np.testing.assert_array_equal(images[1].get_array(), data.inputs["mel_spectrogram"][first][1])


@pytest.mark.parametrize(
    ("shape", "images", "lines"),
    [((7,), 0, 1), ((2, 9), 0, 2), ((30, 9), 1, 0), ((6, 5, 9), 4, 0), ((), 0, 0)],
)
def test_inputs_of_any_shape_are_drawn_or_said_not_to_be(
    shape: tuple[int, ...], images: int, lines: int
) -> None:
    report = erring(np.ones((3, 2), np.float32), np.eye(3, 2))
    signature = Signature(
        (TensorSpec("x", "float32", ("batch", *shape)),), report.signature.outputs
    )
    values = {"x": np.random.default_rng(0).standard_normal((3, *shape)).astype(np.float32)}
    given = EvaluationData(values, None, {}, "captures.npz", "ab", {})
    chart = plot.worst_inputs(replace(report, signature=signature), given)
    assert sum(len(axes.images) for axes in chart.figure.axes) == 3 * images
    assert sum(len(axes.lines) for axes in chart.figure.axes) == 3 * lines
    assert ("not drawn" in visible_text(chart)) == (images + lines == 0)


def test_several_inputs_lie_side_by_side_with_their_masks_and_ids() -> None:
    report = erring(np.ones((3, 2), np.float32), np.eye(3, 2))
    inputs = (
        TensorSpec("iq", "float32", ("batch", "receivers", 2, "time")),
        TensorSpec("places", "float32", ("batch", "receivers", 2)),
        TensorSpec("receiver_ids", "int64", ("batch", "receivers")),
        TensorSpec("mask", "bool", ("batch", "receivers"), masks=("iq",)),
        TensorSpec("flag", "bool", ("batch",)),
    )
    rng = np.random.default_rng(0)
    values = {
        "iq": rng.standard_normal((3, 4, 2, 16)).astype(np.float32),
        # Degrees of latitude and longitude: one scale for both would show neither.
        "places": rng.uniform((49, 9), (51, 11), (3, 4, 2)).astype(np.float32),
        "receiver_ids": np.tile([3, 1, 4, 11], (3, 1)),
        "mask": np.tile([False, True, False, False], (3, 1)),
        "flag": np.array([True, False, True]),
    }
    given = EvaluationData(values, None, {}, "captures.npz", "ab", {})
    signature = Signature(inputs, report.signature.outputs)
    chart = plot.worst_inputs(replace(report, signature=signature), given)
    images = [image.get_array() for axes in chart.figure.axes for image in axes.images]
    assert [image.shape for image in images[:5]] == [(4, 32), (4, 2), (4, 1), (4, 1), (1, 1)]
    assert len(images) == 15
    assert images[1].min(axis=0).tolist() == [0, 0]
    assert images[1].max(axis=0).tolist() == [1, 1]
    assert images[3].ravel().tolist() == [1, 0, 1, 1]  # what is masked is dark
    text = visible_text(chart)
    assert text.count("masked") == 3
    assert "receiver_ ids 4" in text
    assert "iq 4 × 2 × 16" in text
    for said in ("11", "True", "False"):
        assert said in text
    assert chart.to_png()


def test_worst_input_is_measured_where_the_error_is() -> None:
    # A large value beside it allows the large value an error, not this one.
    report = erring(np.array([[0, 1000]], np.float32), np.array([[1e-3, 0.0]]))
    given = EvaluationData({"x": np.zeros((1, 4), np.float32)}, None, {}, "c.npz", "ab", {})
    chart = plot.worst_inputs(report, given)
    assert report.evaluation[0].excess == pytest.approx(100, rel=1e-3)
    assert chart.title == "Sample 0 differs most: 0.001 in y, 100× what is allowed"


def test_worst_input_names_output_error_and_factor_of_one_and_the_same() -> None:
    signature = outputs(a=(1,), b=(1,))
    pytorch = {"a": np.full((1, 1), 1000, np.float32), "b": np.full((1, 1), 0.01, np.float32)}
    onnx = {"a": pytorch["a"] + np.float32(0.01), "b": pytorch["b"] + np.float32(0.005)}
    given = EvaluationData({"x": np.zeros((1, 4), np.float32)}, None, {}, "c.npz", "ab", {})
    chart = plot.worst_inputs(report_of(signature, pytorch, onnx), given)
    assert chart.title.startswith("Sample 0 differs most: 0.005 in b, ")


def test_element_that_differs_is_among_those_shown() -> None:
    values = np.arange(50, dtype=np.float32)[None]
    errors = np.zeros((1, 50))
    errors[0, 33] = 0.5
    given = EvaluationData({"x": np.zeros((1, 4), np.float32)}, None, {}, "c.npz", "ab", {})
    text = visible_text(plot.worst_inputs(erring(values, errors), given))
    assert "PyTorch 33, 34" in text
    assert "ONNX 33.5, 34" in text


def test_outputs_without_elements_have_no_worst_input() -> None:
    report = erring(np.zeros((3, 0), np.float32), np.zeros((3, 0)))
    given = EvaluationData({"x": np.zeros((3, 4), np.float32)}, None, {}, "c.npz", "ab", {})
    assert plot.worst_inputs(report, given) is None


def test_sample_that_stands_out_is_named_at_its_place() -> None:
    errors = np.full((30, 1), 1e-7)
    errors[17] = 5e-6
    chart = plot.errors_by_sample(erring(np.ones((30, 1), np.float32), errors))
    assert chart.title.startswith("Sample 17 stands out: 0.4")
    line = artists(chart.figure, "samples y")[0]
    places = dict(zip(line.get_xdata().tolist(), line.get_ydata().tolist(), strict=True))
    assert places[17] == pytest.approx(5e-6 / (TOLERANCE + RTOL), rel=0.02)
    assert artists(chart.figure, "named 17")[0].xy == (17, places[17])
    assert "sample 17, 0.4" in chart.alt


def test_even_errors_name_no_sample_as_standing_out() -> None:
    chart = plot.errors_by_sample(erring(np.ones((8, 1), np.float32), np.full((8, 1), 2e-6)))
    assert chart.title.startswith("No sample stands out")
    equal = plot.errors_by_sample(erring(np.ones((8, 1), np.float32), np.zeros((8, 1))))
    assert equal.title == "The models give equal answers to every sample"


def test_worst_sample_is_drawn_though_its_answers_were_not_kept() -> None:
    errors = np.full((30, 1), 1e-7)
    errors[17] = 5e-6
    report = erring(np.ones((30, 1), np.float32), errors)
    kept = np.array([0, 1, 2, 3, 28, 29])
    part = {side: {"y": getattr(report, side)["y"][kept]} for side in ("pytorch", "onnx")}
    chart = plot.errors_by_sample(replace(report, plotted=kept, **part))
    assert chart.title.startswith("Sample 17 stands out")
    assert 17 in artists(chart.figure, "samples y")[0].get_xdata()
    assert "6 evenly spaced" in visible_text(chart)


def test_samples_that_can_not_be_compared_are_said() -> None:
    lost = np.zeros((4, 1))
    lost[2] = np.nan
    chart = plot.errors_by_sample(erring(np.ones((4, 1), np.float32), lost))
    assert chart.title == "Sample 2 can't be compared: NaN or Inf in one model only"
    assert chart.to_png()


def test_equal_models_have_no_worst_input(data: EvaluationData) -> None:
    report, _ = located(np.tile([[50.0, 8.0]], (24, 1)))
    assert plot.worst_inputs(report, data).title.startswith("The models agree to the last digit")


# --- optimization levels -------------------------------------------------------------------------


def at_levels(**errors: float) -> LevelReport:
    levels = []
    for level, error in errors.items():
        spec = outputs(y=(2,)).outputs[0]
        found = ErrorAccumulator(spec, Limit(TOLERANCE, RTOL))
        found.update(np.zeros((3, 2), np.float32), np.full((3, 2), error, np.float32), 0)
        ran = {"Conv", "FusedConv"} if level == "all" else {"Conv", "Gelu"}
        levels.append(LevelParity(level, (found.result(),), frozenset(ran)))
    return LevelReport(tuple(levels), "16 samples of captures.npz")


@pytest.mark.parametrize(
    ("errors", "words"),
    [
        ((1e-6, 1e-6, 1e-6), "Parity holds at every optimization level, with errors up to 0.1×"),
        ((1e-7, 1e-7, 5e-6), "Parity holds at every level; optimization takes the largest error"),
        ((1e-6, 1e-6, 1e-3), "The fault comes with ONNX Runtime's level “all”: 100×"),
        ((1e-6, 1e-3, 1e-3), "The fault comes with ONNX Runtime's level “basic”: 100×"),
        ((1e-3, 1e-3, 1e-3), "The fault is in the exported file: without any optimization the"),
        ((1e-3, 1e-3, 1e-6), "The fault is in the exported file"),
        ((np.nan, 1e-6, 1e-6), "The fault is in the exported file"),
    ],
)
def test_fault_of_the_export_is_told_from_one_of_a_fusion(
    errors: tuple[float, ...], words: str
) -> None:
    report = at_levels(**dict(zip(("none", "basic", "all"), errors, strict=True)))
    chart = plot.optimization_levels(report)
    assert chart.title.startswith(words)
    assert "fused as deployed (all), which brings FusedConv" in visible_text(chart)
    if np.isfinite(errors).all():
        excess = [level.excess for level in report.levels]
        np.testing.assert_allclose(drawn(chart, "y")[:, 0], excess)


# --- error along the depth -----------------------------------------------------------------------


def profile(*errors: float) -> DepthProfile:
    modules = (
        ModuleDifference(e, 1.0, 1e-4, 1.0, 1 + e, f"block.{i}", "Linear")
        for i, e in enumerate(errors)
    )
    return DepthProfile(tuple(modules), 2, "zeros, batch 8")


def departed(scope: str) -> Departure:
    return Departure(0.5, 1.0, 1e-4, 1.0, 1.5, scope, "Linear", ("Gemm node_3", "Add node_4"))


def test_first_departing_module_is_marked_with_both_values_and_its_operators() -> None:
    chart = plot.error_along_depth(profile(1e-6, 2e-6, 0.5, 0.3), departed("block.2"))
    assert chart.title == (
        "The error begins in block.2 (Linear): 0.5, 5,000× what the tolerance allows"
    )
    assert drawn(chart, "departure").tolist() == [[2, 5000]]
    assert drawn(chart, "departs")[:, 0].tolist() == [2, 3]
    np.testing.assert_allclose(drawn(chart, "agrees"), [[0, 0.01], [1, 0.02]])
    text = visible_text(chart)
    for words in ("PyTorch 1, ONNX 1.5", "Gemm node_3, Add node_4", "zeros, batch 8", "2 fused"):
        assert words in text
    assert "block.2" in [label.get_text() for label in chart.figure.axes[0].get_xticklabels()]


def test_departure_without_a_point_of_its_own_is_named_all_the_same() -> None:
    chart = plot.error_along_depth(profile(1e-6, np.inf), departed("(model)"))
    assert "(model)" in chart.title
    assert "PyTorch 1, ONNX 1.5" in visible_text(chart)
    assert artists(chart.figure, "departure") == []


def test_no_departure_points_to_where_else_to_look() -> None:
    assert "optimization levels" in plot.error_along_depth(profile(1e-6), None).title
    healed = plot.error_along_depth(profile(1e-6, 2e-4, 1e-6), None)
    assert healed.title.startswith("Modules depart from block.1 on, 2×")
    assert "no module's output" in visible_text(plot.error_along_depth(profile(), None))


def test_without_a_profile_there_is_no_chart() -> None:
    assert plot.error_along_depth(None, None) is None


# --- throughput ----------------------------------------------------------------------------------


def test_the_table_of_latency_has_a_row_for_each_figure_of_both(measured: LatencyReport) -> None:
    first, _, *rows = tables.latency_table(measured).data.splitlines()
    assert first == "| batch 1, 2 threads | PyTorch | ONNX Runtime |"
    told = [row.split(" | ")[0].strip("| ") for row in rows]
    assert "p50, ms" in told
    assert "mean, ms" in told
    assert [row for row in told if "per second" in row] == [
        f"samples per second at batch {size}" for size in (1, 2, 4)
    ]
    assert {row.count("|") for row in rows} == {4}
    missing = NotMeasured("not asked for")
    assert tables.latency_table(missing) is missing


def test_throughput_is_samples_over_latency_at_every_batch_size() -> None:
    report = latency_of(calls(40.0), calls(10.0))
    batches = (
        BatchLatency(1, (np.full(6, 40.0), np.full(6, 10.0))),
        BatchLatency(8, (np.array([100.0, 200.0, 200.0]), np.full(3, 160.0))),
    )
    chart = plot.throughput(replace(report, batches=batches))
    assert chart.title == (
        "PyTorch does best at batch 8, 40 samples/s; ONNX does best at batch 1, 100 samples/s"
    )
    assert "Batch 8: PyTorch 200 ms, ONNX 160 ms, speedup 1.25." in chart.alt
    (rates,) = axes_of(chart, "samples a second")
    points = [line.get_xydata().tolist() for line in rates.lines if len(line.get_xydata()) == 2]
    assert [[1, 25], [8, 40]] in points
    assert [[1, 100], [8, 50]] in points
    assert "6 at batch 1, 3 at batch 8" in visible_text(chart)


@pytest.mark.parametrize(
    "draw",
    [
        plot.latency,
        plot.throughput,
        plot.variants,
        plot.noise_along_depth,
        plot.operator_times,
    ],
)
def test_figure_of_what_was_not_measured_is_the_reason(draw) -> None:
    missing = NotMeasured("because")
    assert draw(missing) is missing
