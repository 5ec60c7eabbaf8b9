"""Whether a model's claimed uncertainty is honest, where the true positions are known.

A prediction is taken as a normal distribution with independent errors in latitude and longitude,
both in degrees, as the training loss has it. Its ellipse of probability p is where the squared
Mahalanobis distance is at most the chi-square quantile for two degrees of freedom, −2·ln(1 − p).
Honest ellipses hold the share p of the true positions, for every p: the calibration of Kuleshov,
Fenner and Ermon ("Accurate Uncertainties for Deep Learning Using Calibrated Regression", ICML 2018,
section 3), with ellipses in the place of one-sided intervals. Among honest models the sharper one
is the better (Gneiting, Balabdaoui and Raftery, "Probabilistic forecasts, calibration and
sharpness", Journal of the Royal Statistical Society B 69, 2007).

One rule holds for everything that is no number: without a finite position and two finite, positive
deviations no ellipse holds the true position, and distance, likelihood and radius are infinite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from heimdall_onnx.common.arrays import Floats
from heimdall_onnx.evidence.geodesy import (
    difference_degrees,
    error_m,
    metres_per_degree,
    negative_log_likelihood,
    squared_scores,
    usable_rows,
)
from heimdall_onnx.evidence.parity.statistics import Accumulator, ExactSums, Quantiles, added
from heimdall_onnx.evidence.ratios import CONFIDENCE
from heimdall_onnx.model.inference import run_pytorch
from heimdall_onnx.model.signature import Signature, signature_of

if TYPE_CHECKING:
    from torch import nn

    from heimdall_onnx.data.evaluation import EvaluationData


# In per cent, so that the ones that are reported lie exactly on the grid.
_PER_CENT = tuple(range(1, 100))
NOMINAL = tuple(p / 100 for p in _PER_CENT)
REPORTED = (0.5, 0.9, 0.95)
GATED = 0.9
_SQUARED_RADII = -2 * np.log1p(-np.array(NOMINAL))
_MEMBER_SAMPLES = 10_000
_BATCH = 32
_DRAWS = 8  # from each claim
_RADIUS_90 = math.sqrt(-2 * math.log1p(-GATED))


@dataclass(frozen=True)
class Coverage:
    """How many true positions an ellipse holds.

    Attributes:
        nominal: Probability that the ellipse claims.
        observed: Share of the true positions in it.
        low: Lower end of the 95 % confidence interval of that share (Clopper and Pearson, "The Use
            of Confidence or Fiducial Limits", Biometrika 26, 1934), the samples taken as
            independent: windows of one transmission are not quite, so it is rather wider.
        high: Upper end of it.
    """

    nominal: float
    observed: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """``"overconfident"``, ``"underconfident"``, or ``"as claimed"`` within the interval."""
        if self.high < self.nominal:
            return "overconfident"
        return "underconfident" if self.low > self.nominal else "as claimed"

    def __str__(self) -> str:
        return f"{self.observed:.1%} ({self.low:.1%} to {self.high:.1%})"


@dataclass(frozen=True)
class Calibration:
    """What the predicted deviations are worth.

    Attributes:
        nonfinite: Samples whose position or deviations are no usable numbers.
        coverage: Of the ellipses of 50, 90 and 95 %.
        reliability: Share of true positions in the ellipse of each probability of `NOMINAL`.
        calibration_error: Mean absolute gap between those shares and `NOMINAL`: the mean absolute
            calibration error of Chung et al. ("Uncertainty Toolbox", 2021); Kuleshov et al. square
            it. With n samples of an honest model about 0.3/√n remain.
        nll: Mean negative log-likelihood of the true position in nats, of the density over degrees.
        radius_p50_m: Sharpness: median radius in metres of the circle that has the area of the 90 %
            ellipse.
        radius_quantiles_m: Quantiles of that radius at `NOMINAL`.
        claimed_error_quantiles_m: Quantiles that the localization error would have if the claims
            were true: equal to the observed ones is what Gneiting et al. call marginal calibration.
        z_rms: Root mean square of residual over deviation, of latitude and of longitude; 1 if
            the deviations are right.
    """

    nonfinite: int
    coverage: tuple[Coverage, ...]
    reliability: tuple[float, ...] = field(repr=False)
    calibration_error: float
    nll: float
    radius_p50_m: float
    radius_quantiles_m: tuple[float, ...] = field(repr=False)
    claimed_error_quantiles_m: tuple[float, ...] = field(repr=False)
    z_rms: tuple[float, float]

    def coverage_of(self, nominal: float) -> Coverage:
        """The coverage of one of the `REPORTED` ellipses."""
        return next(c for c in self.coverage if c.nominal == nominal)


@dataclass(frozen=True)
class UncertaintyReport:
    """Answers of one model beside the true positions.

    Attributes:
        who: ``"PyTorch"``, ``"ONNX"``, ``"member 1"``, …
        samples: Labelled samples.
        median_m: Median localization error in metres, on the geodesic.
        p95_m: Its 95th percentile.
        error_quantiles_m: Its quantiles at `NOMINAL`.
        calibration: Of the predicted deviations; None where the model predicts none.
    """

    who: str
    samples: int
    median_m: float
    p95_m: float
    error_quantiles_m: tuple[float, ...] = field(repr=False)
    calibration: Calibration | None


class UncertaintyAccumulator(Accumulator):
    """Collects an `UncertaintyReport` batch by batch, in constant memory; to be pickled and merged.

    Args:
        who: Whose answers these are.
        signature: Which output is what; one of them holds positions.
    """

    merging: ClassVar = dict.fromkeys(
        ("_samples", "_nonfinite", "_errors", "_radii", "_claims", "_inside", "_sums"), added
    )

    def __init__(self, who: str, signature: Signature) -> None:
        from scipy.stats import qmc

        position = signature.position_output
        if position is None:
            raise ValueError("a signature without positions has no localization error")
        self._who, self._signature, self._position = who, signature, position.name
        self._samples = self._nonfinite = 0
        self._errors, self._radii, self._claims = Quantiles(), Quantiles(), Quantiles()
        # Evenly spread rather than random, so that few draws of each claim suffice.
        self._draws = qmc.Halton(2, scramble=False)
        self._inside = np.zeros(len(NOMINAL), dtype=np.int64)
        self._sums = ExactSums(3)  # nats, squared scores of latitude and of longitude

    def update(
        self,
        outputs: Mapping[str, npt.NDArray[Any]],
        truth: npt.NDArray[Any],
        first: int,
    ) -> None:
        """Add a batch.

        Args:
            outputs: The model's outputs by name, sample axis first.
            truth: The true positions (N, 2) in degrees.
            first: Index of the first sample in the whole data, which decides on the draws from the
                claims.
        """
        positions = outputs[self._position]
        self._samples += len(positions)
        self._errors.update(error_m(positions, truth))
        deviations = self._signature.deviations(outputs)
        if deviations is not None:
            self._add(difference_degrees(positions, truth), deviations, positions[:, 0], first)

    def _add(
        self, residual: Floats, deviations: Floats, latitude: npt.NDArray[Any], start: int
    ) -> None:
        usable = usable_rows(residual, deviations)
        self._nonfinite += int((~usable).sum())
        squares = np.full(residual.shape, np.inf)
        squares[usable] = squared_scores(residual[usable], deviations[usable])
        self._sums.add(negative_log_likelihood(residual, deviations), *squares.T)
        # The first ellipse of the grid that holds it; one beyond the grid for none.
        first = np.searchsorted(_SQUARED_RADII, squares.sum(axis=1))
        self._inside += np.bincount(first, minlength=len(NOMINAL) + 1)[: len(NOMINAL)]
        metres = np.full(residual.shape, np.inf)
        metres[usable] = deviations[usable] * np.stack(metres_per_degree(latitude[usable]), axis=1)
        self._radii.update(_RADIUS_90 * np.sqrt(metres.prod(axis=1)))
        self._claims.update(self._claimed_errors(metres, start))

    def _claimed_errors(self, metres: Floats, start: int) -> Floats:
        """Errors drawn from the claims (N, 2) in metres, which are small against the Earth."""
        from scipy.special import ndtri

        # A sample has its own draws wherever it is read; the sequence's first point is 0, which has
        # no normal deviate.
        self._draws.num_generated = _DRAWS * start + 1
        deviates = ndtri(self._draws.random(_DRAWS * len(metres))).reshape(-1, _DRAWS, 2)
        usable = np.isfinite(metres).all(axis=1)
        errors = np.full(deviates.shape[:2], np.inf)
        errors[usable] = np.linalg.norm(metres[usable, None] * deviates[usable], axis=2)
        return errors

    def result(self) -> UncertaintyReport:
        """The figures of everything added so far."""
        predicted = self._signature.sigma_output is not None and self._samples > 0
        return UncertaintyReport(
            who=self._who,
            samples=self._samples,
            median_m=self._errors(0.5),
            p95_m=self._errors(0.95),
            error_quantiles_m=tuple(map(self._errors, NOMINAL)),
            calibration=self._calibration() if predicted else None,
        )

    def _calibration(self) -> Calibration:
        inside = np.cumsum(self._inside)
        shares = inside / self._samples
        nll, *mean_squares = self._sums.values(self._samples)
        return Calibration(
            nonfinite=self._nonfinite,
            coverage=tuple(
                _coverage(p, int(inside[NOMINAL.index(p)]), self._samples) for p in REPORTED
            ),
            reliability=tuple(map(float, shares)),
            calibration_error=float(np.abs(shares - NOMINAL).mean()),
            nll=nll,
            radius_p50_m=self._radii(0.5),
            radius_quantiles_m=tuple(map(self._radii, NOMINAL)),
            claimed_error_quantiles_m=tuple(map(self._claims, NOMINAL)),
            z_rms=(math.sqrt(mean_squares[0]), math.sqrt(mean_squares[1])),
        )


def _coverage(nominal: float, inside: int, samples: int) -> Coverage:
    from scipy import stats

    interval = stats.binomtest(inside, samples).proportion_ci(CONFIDENCE, method="exact")
    return Coverage(nominal, inside / samples, float(interval.low), float(interval.high))


def answers_positions(data: EvaluationData, signature: Signature) -> bool:
    """Whether a model answers positions and the true ones are known."""
    position = signature.position_output
    return data.positions is not None and position is not None and position.shape[1:] == (2,)


def assess_members(
    model: nn.Module, data: EvaluationData, signature: Signature
) -> tuple[UncertaintyReport, ...] | None:
    """What each member of an ensemble would be worth alone, in PyTorch.

    Args:
        model: The ensemble; anything else has no members to assess.
        data: Evaluation inputs, with the true positions where they are known; of more than 10,000
            so many are taken, evenly spaced.
        signature: The ensemble's; members have their own.

    Returns:
        One report for each member, in order; None for a model that is no `Ensemble`, without labels
        or without positions.

    Raises:
        EvidenceError: If a member can't run on the data.
    """
    from heimdall_onnx.model.ensemble import Ensemble

    if not isinstance(model, Ensemble) or not answers_positions(data, signature):
        return None
    data = data.spread(_MEMBER_SAMPLES)
    return tuple(
        assess_model(f"member {number}", member, data, signature_of(member))
        for number, member in enumerate(model.members, start=1)
    )


def assess_model(
    who: str, model: nn.Module, data: EvaluationData, signature: Signature
) -> UncertaintyReport:
    """What a PyTorch model's positions and deviations are worth on labelled data.

    Args:
        who: What it is called in the report.
        model: In eval mode.
        data: Evaluation inputs with the true positions.
        signature: The model's, with positions.

    Raises:
        EvidenceError: If the model can't run on the data.
    """
    accumulator = UncertaintyAccumulator(who, signature)
    for part, batch, truth in data.batches(_BATCH):
        accumulator.update(run_pytorch(model, batch, signature), truth["positions"], part.start)
    return accumulator.result()
