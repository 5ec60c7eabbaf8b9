"""Several networks of one kind as one model, whose doubt says where it comes from.

The members' answers are taken for the components of an equally weighted mixture of normal
distributions, and the mixture for a single one with the same mean and variance (Lakshminarayanan,
Pritzel and Blundell, "Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles",
NeurIPS 2017, section 2.4). Its variance is the mean of the members' variances, which more training
does not take away (aleatoric), plus the variance of their means, which is what they have not learnt
alike (epistemic); for the two words see Kendall and Gal, "What Uncertainties Do We Need in Bayesian
Deep Learning for Computer Vision?", NeurIPS 2017.

All members are in one graph and one checkpoint, so that an ensemble is released, verified, made
again and opened as a single model is. What members compute before their first weights is in the
graph once for each of them: it belongs to a member, and ONNX Runtime merges what is the same.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from heimdall_onnx.common.errors import CheckpointError, HeimdallError, ParameterError
from heimdall_onnx.common.files import hash_file, replace_file
from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.common.text import listed, shown
from heimdall_onnx.model.checkpoint import (
    MEMBERS,
    LoadedModel,
    Member,
    load_checkpoint,
)
from heimdall_onnx.model.construction import import_model
from heimdall_onnx.model.inference import input_order, named_outputs
from heimdall_onnx.model.signature import Signature, TensorSpec, differences, signature_of

log = get_logger(__name__)

ENSEMBLE = "heimdall_onnx:Ensemble"
TOTAL, ALEATORIC, EPISTEMIC = "uncertainties", "aleatoric", "epistemic"
_FULL_CIRCLE = 360.0
# What a model may define of its own example inputs, beside its signature.
_EXAMPLES = ("example_inputs", "adversarial_inputs")
# Some hundred times what a member's constructor takes.
_MOST_VALUES, _MOST_DEEP = 10_000, 20


class Ensemble(nn.Module):
    """Members of one class, all of them run on the same inputs.

    ``forward`` takes the members' inputs and returns its outputs in the order of ``signature``;
    which of them is which inside a member follows `input_order` and `named_outputs`:

    - the members' position output (batch, 2), degrees: the mean of their answers. Longitudes are
      averaged the short way round, about the first member's, in whose turn of the circle the mean
      stays: beside the date line it can lie beyond ±180 by as much as the members lie apart.
    - the total deviation (batch, 2), degrees: √(aleatoric² + epistemic²), never less than the
      aleatoric one. It has the name of the members' own deviation, and is called
      ``uncertainties`` where they predict a log variance.
    - ``aleatoric`` (batch, 2), degrees: the root mean square of the members' deviations, never
      outside what they say themselves, so that their range holds for it.
    - ``epistemic`` (batch, 2), degrees: the population standard deviation of the members' answers,
      from their distances to the mean, since a difference of squares of degrees would leave
      nothing of it in float32.
    - every further floating-point output of the members: its mean.

    Only ``aleatoric`` and further outputs keep a declared range: a mean longitude may leave its
    own, and how far members disagree has no bound.

    Args:
        model: The members' class, ``"package.module:Class"``. It is imported, so it must come
            from the caller: `load_checkpoint` takes none of these arguments from a file.
        members: Arguments of each member's constructor.
        signature: The members' signature, as `Signature.to_dict` gives it, where their class does
            not declare it.

    Attributes:
        members: In order; the first one stands for all in example inputs.
        signature: The members' inputs and axes, and the outputs above.
        described_as: What it is, in words.

    Raises:
        ParameterError: If there are fewer than two members, the class can't be imported, or the
            members' signatures differ or have no mixture; every problem is named.
    """

    arguments_of_caller = ("model", "members", "signature")
    made_of_checkpoints: ClassVar[bool] = True

    def __init__(
        self,
        model: str,
        members: Sequence[Mapping[str, Any]],
        signature: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(members, str | Mapping) or not all(isinstance(m, Mapping) for m in members):
            raise ParameterError(
                f"members must be a list with the arguments of each, found {shown(members)}"
            )
        _require_two(len(members))
        member_class = _member_class(model)
        self.members = nn.ModuleList(member_class(**dict(kwargs)) for kwargs in members)
        if signature is not None:
            _declare(self.members, signature)
        self._single = agreed_signature(
            {str(i): signature_of(member) for i, member in enumerate(self.members, 1)}
        )
        self.signature = mixture_signature(self._single)
        self._order = input_order(self.members[0], self._single.input_names)
        self.described_as = f"Ensemble of {len(members)} {member_class.__name__}"
        sizes = {getattr(member, "backbone_size", None) for member in self.members}
        if len(sizes) == 1 and None not in sizes:
            self.backbone_size = sizes.pop()
        # Latitudes are on no circle.
        self.register_buffer("_turn", torch.tensor([0.0, _FULL_CIRCLE]), persistent=False)
        self.eval()

    def __getattr__(self, name: str) -> Any:
        """The first member's way of making example inputs, if it has one."""
        if name in _EXAMPLES:
            return getattr(self.members[0], name)
        return super().__getattr__(name)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The mixture of the members' answers; see the class."""
        single = self._single
        position, spread = single.position_output, single.sigma_output
        assert position is not None
        assert spread is not None
        named = dict(zip(single.input_names, inputs, strict=True))
        answers = [
            named_outputs(member, self._order.call(member, named), single)
            for member in self.members
        ]
        mean, epistemic = self._mean_and_epistemic([one[position.name] for one in answers])
        deviations = torch.stack([one[spread.name] for one in answers])
        if len(spread.shape) == 1:
            deviations = deviations.unsqueeze(-1)
        if spread.log_variance_of is not None:
            deviations = torch.exp(0.5 * deviations)
        variance = deviations.square().mean(0)
        aleatoric = _between(variance.sqrt(), deviations)
        if spread.shape != position.shape:
            aleatoric = aleatoric.expand_as(mean)
        total = torch.maximum((variance + epistemic.square()).sqrt(), aleatoric)
        further = [
            torch.stack([one[spec.name] for one in answers])
            for spec in single.outputs
            if spec.name not in (position.name, spread.name)
        ]
        means = (_between(values.mean(0), values) for values in further)
        return (mean, total, aleatoric, epistemic, *means)

    def _mean_and_epistemic(self, positions: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        first = positions[0]
        away = torch.stack([position - first for position in positions])
        # Half a turn away there is no short way; floor, unlike round, is in every opset.
        away = away - torch.floor(away / _FULL_CIRCLE + 0.5) * self._turn
        shift = away.mean(0)
        return first + shift, (away - shift).square().mean(0).sqrt()


def _between(value: Tensor, members: Tensor) -> Tensor:
    """``value``, a mean of ``members`` along axis 0, without what rounding has put beyond them."""
    return torch.minimum(torch.maximum(value, members.amin(0)), members.amax(0))


def agreed_signature(signatures: Mapping[str, Signature]) -> Signature:
    """What all members take and give.

    Only the ranges of outputs may differ; the agreed one contains all of them.

    Args:
        signatures: Of the members, by what they are called.

    Raises:
        ParameterError: Naming everything in which a member differs from the first one.
    """
    (first, expected), *others = signatures.items()
    problems = [
        f"member {other}: {kind} {what} expected as in member {first}: {want}; found {have}"
        for other, found in others
        for kind, what, want, have in differences(*map(_without_ranges, (expected, found)))
    ]
    if problems:
        raise ParameterError(
            "members of an ensemble take and give the same; were they trained with other "
            f"model_kwargs?{listed(problems)}"
        )
    together = zip(*(signature.outputs for signature in signatures.values()), strict=True)
    outputs = (replace(specs[0], range=_span([spec.range for spec in specs])) for specs in together)
    return replace(expected, outputs=tuple(outputs))


def _without_ranges(signature: Signature) -> Signature:
    return replace(signature, outputs=tuple(replace(o, range=None) for o in signature.outputs))


def mixture_signature(single: Signature) -> Signature:
    """The signature of an ensemble of members with the signature ``single``.

    Raises:
        ParameterError: If the outputs have no mixture: positions (batch, 2) or their predicted
            spread are missing, an output is no floating-point number, is the spread of another
            output than the positions, or has a name that the mixture needs.
    """
    position, spread = single.position_output, single.sigma_output
    problems = []
    if position is None or position.shape[1:] != (2,):
        found = "none" if position is None else position.describe()
        problems.append(f"expected an output (batch, 2) of positions in degrees, found {found}")
    elif spread is None:
        problems.append(
            f"expected an output with sigma_of or log_variance_of {position.name!r}, found none: "
            "the mixture's variance is made of the members' variances"
        )
    elif spread.shape[1:] not in ((2,), (1,), ()):
        problems.append(f"expected a spread (batch, 2), found {spread.describe()}")
    further = [o for o in single.outputs if o not in (position, spread)]
    problems += [
        f"{output.name} is the spread of {output.spread_of}: only positions are mixed"
        for output in further
        if output.spread_of is not None
    ]
    problems += [
        f"{output.name} is {output.dtype}, of which there is no mean"
        for output in single.outputs
        if not np.issubdtype(np.dtype(output.dtype), np.floating)
    ]
    keeps_name = spread is not None and spread.sigma_of is not None
    total = spread.name if spread is not None and keeps_name else TOTAL
    new = {ALEATORIC, EPISTEMIC, *(() if keeps_name else (total,))}
    problems += [
        f"{spec.name} is a name that the mixture needs for itself"
        for spec in (*single.inputs, *single.outputs)
        if spec.name in new
    ]
    if problems:
        raise ParameterError(f"these members have no mixture:{listed(problems)}")
    assert position is not None
    assert spread is not None
    deviation = TensorSpec(EPISTEMIC, position.dtype, position.shape, unit=position.unit)
    return replace(
        single,
        outputs=(
            replace(position, range=None),
            replace(deviation, name=total, sigma_of=position.name),
            replace(deviation, name=ALEATORIC, range=spread.range if keeps_name else None),
            deviation,
            *further,
        ),
    )


def _span(ranges: Sequence[tuple[float, float] | None]) -> tuple[float, float] | None:
    """The closed interval that contains all of them; None if one of them has no limits."""
    known = [found for found in ranges if found is not None]
    if len(known) < len(ranges):
        return None
    return min(low for low, _ in known), max(high for _, high in known)


@dataclass(frozen=True)
class CombinedCheckpoint:
    """Several checkpoints in one file, ready to be released as one model.

    Attributes:
        path: The file.
        sha256: SHA-256 of it; the same members in the same order give the same one.
        model: Import string of `Ensemble`.
        model_kwargs: Its arguments, plain values only.
        members: The files that were combined, in order.
    """

    path: Path
    sha256: str
    model: str
    model_kwargs: dict[str, Any]
    members: tuple[Member, ...]

    @property
    def parameters(self) -> dict[str, Any]:
        """What a release of it has for these parameters."""
        return {
            "checkpoint": str(self.path),
            "model": self.model,
            "model_kwargs": self.model_kwargs,
            "weights": "",  # of the members, which are chosen
        }


def combine_checkpoints(
    paths: Sequence[Path | str],
    folder: Path | str,
    model: str,
    model_kwargs: Mapping[str, Any] | None = None,
    weights: str = "",
) -> CombinedCheckpoint:
    """Make one checkpoint of several that were trained apart.

    Each is read by `load_checkpoint`, with all of its checks. The result holds the weights as
    ``members.0.…``, ``members.1.…`` and the members' file names and hashes, and nothing but
    tensors and plain values. Hyper-parameters that a member's file records become arguments of
    that member.

    Args:
        paths: At least two checkpoints, no two of one content.
        folder: Where the result goes, under a name made of what it holds.
        model: The members' class, ``"package.module:Class"``, named by the caller.
        model_kwargs: Arguments of every member's constructor; they win over the files' own.
        weights: Which weights are taken of each, as for `load_checkpoint`.

    Raises:
        ParameterError: If there are fewer than two, two are the same, their signatures differ or
            have no mixture, or an argument of theirs is no plain value; every problem is named.
        CheckpointError: If one of them can't be read or does not fit the class.
        DataError: If the result can't be written.
    """
    _require_two(len(paths))
    _member_class(model)
    loaded = _load_members(
        [Path(path) for path in paths], model=model, model_kwargs=model_kwargs, weights=weights
    )
    _require_different(loaded)
    agreed = agreed_signature(
        {f"{i} ({one.path.name})": one.signature for i, one in enumerate(loaded, 1)}
    )
    mixture_signature(agreed)
    members = tuple(Member(file=one.path.name, sha256=one.sha256) for one in loaded)
    kwargs: dict[str, Any] = {
        "model": model,
        "members": [_plain_arguments(one) for one in loaded],
    }
    if any(one.signature_file is not None or one.found for one in loaded):
        kwargs["signature"] = json.loads(json.dumps(agreed.to_dict()))
    # Through JSON and back: what is the same text is then the same object, or never is, and pickle
    # writes the same bytes.
    described = json.dumps({MEMBERS: [member.model_dump() for member in members]}, sort_keys=True)
    name = hashlib.sha256((json.dumps(kwargs, sort_keys=True) + described).encode()).hexdigest()
    content = {
        "model_state_dict": {
            f"members.{index}.{key}": value
            for index, one in enumerate(loaded)
            for key, value in one.model.state_dict().items()
        },
        "hyper_parameters": json.loads(described),
    }
    path = Path(folder) / f"{name}.ckpt"
    with replace_file(path) as file:
        torch.save(content, file)
    sha256 = hash_file(path)
    log.info("combined", path=str(path), sha256=sha256, members=len(members))
    return CombinedCheckpoint(path, sha256, ENSEMBLE, kwargs, members)


def _require_two(count: int) -> None:
    if count < 2:
        raise ParameterError(
            f"an ensemble has at least two members, found {count}; a single checkpoint is released "
            "as it is"
        )


def _member_class(spec: str) -> Any:
    found = import_model(spec)
    if isinstance(found, type) and issubclass(found, Ensemble):
        raise ParameterError(
            f"members must not be ensembles themselves, found model {spec!r}: name the members' "
            "class, and give the checkpoints of all of them"
        )
    return found


def _load_members(paths: Sequence[Path], **options: Any) -> list[LoadedModel]:
    loaded, problems = [], []
    for path in paths:
        try:
            loaded.append(load_checkpoint(path, **options))
        except HeimdallError as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        texts = [str(problem) for problem in problems]
        raise CheckpointError(
            f"{len(problems)} of {len(paths)} checkpoints can't be used:{listed(texts)}"
        ) from problems[0]
    return loaded


def _require_different(loaded: Sequence[LoadedModel]) -> None:
    first: dict[str, Path] = {}
    problems = []
    for one in loaded:
        if one.sha256 in first:
            problems.append(f"{one.path} is the same as {first[one.sha256]}, SHA-256 {one.sha256}")
        first.setdefault(one.sha256, one.path)
    if problems:
        raise ParameterError(
            "expected different checkpoints; the same one twice adds nothing to an ensemble:"
            f"{listed(problems)}"
        )


def _declare(members: Iterable[nn.Module], signature: Mapping[str, Any]) -> None:
    try:
        declared = Signature.from_dict(signature)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ParameterError(
            f"signature must be what Signature.to_dict gives, found {shown(signature)}"
        ) from error
    for member in members:
        member.signature = declared  # type: ignore[assignment]


def _plain_arguments(loaded: LoadedModel) -> dict[str, Any]:
    """A member's arguments as JSON gives them back; tuples become lists."""
    problems: list[str] = []
    left = [_MOST_VALUES]

    def plain(value: Any, where: str, depth: int) -> Any:
        left[0] -= 1
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float) and math.isfinite(value):
            return value
        # Out of a file, a list may contain itself.
        if depth < _MOST_DEEP and left[0] > 0:
            if isinstance(value, list | tuple):
                return [plain(one, f"{where}[{i}]", depth + 1) for i, one in enumerate(value)]
            if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
                return {
                    key: plain(one, f"{where}.{shown(key)}", depth + 1)
                    for key, one in sorted(value.items())
                }
        problems.append(f"{where} is {type(value).__name__}: {shown(value)}")
        return None

    found = {name: plain(value, name, 0) for name, value in sorted(loaded.model_kwargs.items())}
    if problems:
        raise ParameterError(
            f"arguments of {loaded.path}, which a release repeats in its parameters, must be few "
            "and plain values: text, finite numbers, truth values, None, and lists and "
            f"dictionaries of these; found{listed(problems)}"
        )
    return found
