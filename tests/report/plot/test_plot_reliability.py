"""The reliability diagram says what the numbers say."""

import numpy as np
import numpy.typing as npt
import pytest
from matplotlib.figure import Figure
from models import POSITIONS, SIGNAL, SPREAD

from heimdall_onnx.evidence.parity.report import BatchIndependence, ParityReport
from heimdall_onnx.evidence.parity.uncertainty import (
    NOMINAL,
    UncertaintyAccumulator,
    UncertaintyReport,
)
from heimdall_onnx.model.signature import Signature
from heimdall_onnx.report.plot.uncertainty import reliability

SIGNATURE = Signature((SIGNAL,), (POSITIONS, SPREAD))


def assessed(
    who: str, claimed: float, count: int = 400, scale: float = 0.3, broken: int = 0
) -> UncertaintyReport:
    rng = np.random.default_rng(0)
    truth = np.array([50.0, 8.0]) + rng.uniform(-1, 1, (count, 2))
    deviations = scale * rng.uniform(0.3, 1.5, (count, 2))
    outputs = {
        "positions": truth + deviations * rng.standard_normal((count, 2)),
        "spread": claimed * deviations,
    }
    outputs["spread"][:broken] = np.nan
    accumulator = UncertaintyAccumulator(who, SIGNATURE)
    accumulator.update(outputs, truth, 0)
    return accumulator.result()


def report_of(*uncertainty: UncertaintyReport) -> ParityReport:
    return ParityReport(
        signature=SIGNATURE,
        source="captures.npz",
        samples=400,
        tolerance=1e-5,
        rtol=1e-6,
        cells=(),
        noise_floor=(),
        independence=BatchIndependence(0.0, 0.0, "none", "positions", 0),
        ground=None,
        pytorch={},
        onnx={},
        plotted=np.arange(0),
        worst_inputs={},
        worst_where="",
        uncertainty=uncertainty,
    )


def both(claimed: float, **kwargs: float) -> ParityReport:
    return report_of(*(assessed(who, claimed, **kwargs) for who in ("PyTorch", "ONNX")))


def line(figure: Figure, gid: str) -> npt.NDArray[np.float64]:
    (found,) = figure.findobj(lambda artist: artist.get_gid() == gid)
    return np.array(found.get_xydata())


@pytest.mark.parametrize(
    ("claimed", "verdict"),
    [(0.5, "overconfident"), (1.0, "does not contradict"), (2.0, "underconfident")],
)
def test_the_title_is_the_answer(claimed: float, verdict: str) -> None:
    report = both(claimed)
    chart = reliability(report)
    assert chart is not None
    assert verdict in chart.title
    coverage = report.uncertainty[1].calibration.coverage_of(0.9)
    assert f"holds {100 * coverage.observed:.3g}%" in chart.title
    assert chart.alt.count("90% ellipse") == 4
    chart.to_png()


def test_curves_are_the_shares_and_the_band_is_the_binomials() -> None:
    report = both(0.7)
    chart = reliability(report, [assessed("member 1", 0.5), assessed("member 2", 1.2)])
    assert chart is not None
    for found in report.uncertainty:
        drawn = line(chart.figure, found.who)
        assert drawn[:, 0] == pytest.approx(100 * np.array(NOMINAL))
        assert drawn[:, 1] == pytest.approx(100 * np.array(found.calibration.reliability))
    assert (line(chart.figure, "member 1")[:, 1] < line(chart.figure, "member 2")[:, 1]).all()
    (band,) = chart.figure.findobj(lambda artist: artist.get_gid() == "band")
    outline = band.get_paths()[0].vertices
    at_half = outline[np.isclose(outline[:, 0], 50), 1]
    # 400 throws of a coin: a standard deviation of 2.5 in the hundred.
    assert (at_half.min(), at_half.max()) == pytest.approx((45, 55), abs=0.5)
    assert "member 2" in chart.alt


def test_unusable_claims_are_in_the_title() -> None:
    chart = reliability(both(1.0, broken=7))
    assert chart is not None
    assert "7 of 400 samples without a usable position or claim" in chart.title
    chart.to_png()


def test_nothing_but_unusable_claims_can_be_drawn() -> None:
    chart = reliability(both(1.0, count=3, broken=3))
    assert chart is not None
    assert "holds 0%" in chart.title
    chart.to_png()


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 3.0])
def test_any_scale_and_few_samples_can_be_drawn(scale: float) -> None:
    chart = reliability(both(1.0, count=5, scale=scale))
    assert chart is not None
    chart.to_png()


def test_without_labels_or_deviations_there_is_no_figure() -> None:
    assert reliability(report_of()) is None
    accumulator = UncertaintyAccumulator("ONNX", Signature((SIGNAL,), (POSITIONS,)))
    accumulator.update({"positions": np.zeros((3, 2))}, np.zeros((3, 2)), 0)
    assert reliability(report_of(accumulator.result())) is None
