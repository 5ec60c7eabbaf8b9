"""Positions on the ground as a network learns them: metres about a centroid, over a scale.

A network's raw answers are of order one, and a degree of longitude is not a degree of latitude. So
training takes offsets north and east of the centroid in metres, divided by a scale, and the frame,
which is part of the model and of its exported graph, gives degrees: whoever calls the model needs
no normalization.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from heimdall_onnx.common.arrays import Floats
from heimdall_onnx.common.errors import DataError, ParameterError
from heimdall_onnx.evidence.geodesy import difference_degrees, metres_per_degree
from heimdall_onnx.evidence.parity.ground import middle_of

# There a degree of longitude is two kilometres, and shrinks by as much with every degree further.
_MAX_LATITUDE = 89.0


class LocalFrame(nn.Module):
    """The affine map from normalized offsets to degrees, as a part of a model.

    ``degrees = centroid + offset · scale / metres per degree``, the metres per degree of latitude
    and of longitude being those of the WGS 84 ellipsoid at the centroid, see
    `evidence.parity.ground.metres_per_degree`. Deviations are scaled besides by a factor that is
    found after training, see `calibration_of`. All of these are buffers, so that a checkpoint
    carries them and loads them strictly.

    Args:
        centroid: Latitude and longitude in degrees.
        scale_m: Metres of one unit.

    Raises:
        ParameterError: If the centroid is no position, lies at a pole, or the scale is not
            positive; every problem is named.
    """

    centroid: Tensor
    degrees_per_unit: Tensor
    deviation_scale: Tensor

    def __init__(self, centroid: Sequence[float], scale_m: float) -> None:
        super().__init__()
        latitude, longitude = _checked(centroid, scale_m)
        per_unit = [float(scale_m) / float(m) for m in metres_per_degree(latitude)]
        self.register_buffer("centroid", torch.tensor([latitude, longitude]))
        self.register_buffer("degrees_per_unit", torch.tensor(per_unit))
        self.register_buffer("deviation_scale", torch.ones(2))

    def forward(self, offsets: Tensor, deviations: Tensor) -> tuple[Tensor, Tensor]:
        """Positions and deviations in degrees.

        Both are computed in the frame's own precision: in mixed precision the offsets may be
        bfloat16, in which degrees would come in steps of a quarter.

        Args:
            offsets: (batch, 2), units north and east of the centroid.
            deviations: (batch, 2), units.

        Returns:
            (batch, 2) degrees latitude and longitude, and (batch, 2) degrees. Longitudes go on
            beyond ±180 where the area lies across the date line.
        """
        precision = self.centroid.dtype
        positions = self.centroid + offsets.to(precision) * self.degrees_per_unit
        return positions, deviations.to(precision) * (self.degrees_per_unit * self.deviation_scale)

    def normalize(self, positions: npt.ArrayLike) -> Floats:
        """Offsets of true positions: what the network is to answer.

        The inverse of `forward` with the buffers as they are, that is rounded to their precision,
        so that the rounding biases nothing. Longitudes are taken the short way round.

        Args:
            positions: (N, 2) degrees latitude and longitude.

        Returns:
            (N, 2) units north and east.

        Raises:
            DataError: If positions are not finite, or no such array.
        """
        degrees = np.asarray(positions, np.float64)
        if degrees.ndim != 2 or degrees.shape[1] != 2 or not np.isfinite(degrees).all():
            raise DataError(
                "positions must be finite degrees of shape (samples, 2), found shape "
                f"{degrees.shape} with {np.count_nonzero(~np.isfinite(degrees))} NaN or Inf"
            )
        centroid, per_unit = (
            b.detach().cpu().double().numpy() for b in (self.centroid, self.degrees_per_unit)
        )
        return np.asarray(difference_degrees(degrees, centroid) / per_unit)


def placement_of(positions: npt.ArrayLike) -> tuple[tuple[float, float], float]:
    """Where the labels lie that a model is trained on.

    An area across the date line has its centroid in it.

    Args:
        positions: (N, 2) degrees latitude and longitude.

    Returns:
        Their mean, degrees latitude and longitude, and the root mean square of the offsets north
        and east of it, metres.

    Raises:
        DataError: If there are no positions.
        ParameterError: If they lie about a pole.
    """
    degrees = np.asarray(positions, np.float64)
    if not degrees.size:
        raise DataError("there are no labelled rows to take a centroid from")
    centroid = middle_of(degrees, {})
    assert centroid is not None
    _checked(centroid, 1.0)
    along = np.stack(metres_per_degree(centroid[0]), axis=-1)
    metres = difference_degrees(degrees, np.array(centroid)) * along
    scale = float(np.sqrt(np.mean(np.square(metres))))
    # All in one place: any scale does, and one kilometre keeps the numbers small.
    return centroid, scale or 1000.0


def calibration_of(residuals: npt.ArrayLike, deviations: npt.ArrayLike) -> Floats:
    """Factors (2,) by which predicted deviations become as large as the errors are.

    Dropout makes a network more careful than it need be, and many epochs make it too sure of
    itself. The factor that maximizes the likelihood of labels it was not trained on is the root
    mean square of residual over deviation (Laves et al., "Well-calibrated Regression Uncertainty in
    Medical Imaging with Deep Learning", MIDL 2020, σ scaling); here one for each coordinate.

    Args:
        residuals: Answers less labels (N, 2).
        deviations: Predicted for them (N, 2), same unit, above 0.
    """
    scores = np.asarray(residuals, np.float64) / np.asarray(deviations, np.float64)
    return np.asarray(np.sqrt(np.mean(np.square(scores), axis=0)))


def _checked(centroid: Any, scale_m: Any) -> tuple[float, float]:
    problems = []
    latitude = longitude = math.nan
    try:
        latitude, longitude = map(float, centroid)
    except (TypeError, ValueError):
        problems.append(f"centroid must be a latitude and a longitude, found {centroid!r}")
    else:
        if not (abs(latitude) <= 90 and abs(longitude) <= 180):
            problems.append(
                "centroid must be degrees latitude in [-90, 90] and longitude in [-180, 180], "
                f"found {centroid!r}"
            )
        elif abs(latitude) > _MAX_LATITUDE:
            problems.append(
                f"centroid must lie within {_MAX_LATITUDE:g}° of the equator, found latitude "
                f"{latitude!r}: at a pole longitudes run together, and no straight map of degrees "
                "is one of the ground"
            )
    try:
        positive = math.isfinite(scale_m) and scale_m > 0
    except TypeError:
        positive = False
    if not positive:
        problems.append(f"scale_m must be a positive number of metres, found {scale_m!r}")
    if problems:
        raise ParameterError("; ".join(problems))
    return latitude, longitude
