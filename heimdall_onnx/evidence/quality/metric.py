"""What answers are worth in their task: metrics by name, of torchmetrics, or of one's own.

A metric gives each sample a row of numbers, and a score to the sums of rows, so that the score of
any part of the samples is quickly computed; one that looks at the order of all answers, as the area
under a curve does, is computed of the answers themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from heimdall_onnx.common.arrays import Arrays, Floats
from heimdall_onnx.common.errors import DataError, EvidenceError, HeimdallError, ParameterError
from heimdall_onnx.common.text import meant, names_in, shown
from heimdall_onnx.evidence.geodesy import difference_degrees, error_m, negative_log_likelihood
from heimdall_onnx.model.signature import Signature

LABELS: Literal["labels"] = "labels"
POSITIONS: Literal["positions"] = "positions"
LOCALIZATION = "localization"
# What segmentations are labelled with where nobody knows, beside what is below 0.
_UNKNOWN = 255
_HALF = 0.5

_Rows = Callable[[Arrays, npt.NDArray[Any]], npt.NDArray[Any]]


@dataclass(frozen=True)
class Metric:
    """How answers are judged.

    Attributes:
        name: What it is called.
        higher: Whether more of it is better.
        relative: Whether a loss is a share of the reference's value, as of errors that have a unit;
            else it is a difference.
        labels: The array that it holds answers against.
        rows: Of a batch's outputs by name and its labels, a row (n, S) for each sample; a ranked
            one's are the answers.
        unit: Of its values; empty for a share or what has the outputs' own.
        binary: Whether a sample whose row is 0 is right, and one whose row is 1 wrong.
        score: Of sums of rows (K, S) over weights (K,) the metric (K,); None for the median of the
            rows, and for a ranked metric.
        ranked: Of the rows and labels of samples, for a metric that looks at all of them together.
    """

    name: str
    higher: bool
    relative: bool
    labels: Literal["labels", "positions"]
    rows: _Rows = field(repr=False)
    unit: str = ""
    binary: bool = False
    score: Callable[[Floats, Floats], Floats] | None = field(default=None, repr=False)
    ranked: Callable[[npt.NDArray[Any], npt.NDArray[Any]], float] | None = field(
        default=None, repr=False
    )

    def loss(self, reference: Any, found: Any) -> Any:
        """What is lost from a value to another one, both of any shape; below 0 what is gained."""
        if self.relative:
            # Two perfect answers are equally good.
            tiny = np.finfo(np.float64).tiny
            return (found + tiny) / (reference + tiny) - 1
        return reference - found if self.higher else found - reference


def metrics_for(spec: str, signature: Signature, labels: Mapping[str, Any]) -> tuple[Metric, ...]:
    """The metrics of a contract.

    Args:
        spec: Names with commas between them, torchmetrics' classes or functions of one's own, as
            `ReleaseParameters.metric` has them. Empty takes ``localization``, and ``nll`` where
            deviations are predicted, for positions; where there are only labels the kind of output
            decides.
        signature: Which output is what.
        labels: What is known of the samples, by ``"labels"`` and ``"positions"``.

    Raises:
        ParameterError: If there is no such metric, or it does not fit the model.
    """
    position = signature.position_output
    located = POSITIONS in labels and position is not None and position.shape[1:] == (2,)
    names = [*names_in(spec)]
    if not names and located:
        names = [LOCALIZATION, *(["nll"] if signature.sigma_output is not None else [])]
    elif not names and LABELS in labels:
        names = [_usual(signature, labels[LABELS])]
    found = tuple(_metric(name, signature, located) for name in names)
    for metric in found:
        if metric.labels not in labels:
            raise ParameterError(
                f"the metric {metric.name} needs the array `{metric.labels}`, with a value for "
                "each sample, and the evaluation data have none: add it, or choose another metric"
            )
    return found


def _usual(signature: Signature, labels: Any) -> str:
    answers = signature.outputs[0]
    if np.dtype(labels.dtype).kind == "f":
        return "rmse"
    if np.dtype(answers.dtype).kind != "f" or len(answers.shape) <= len(labels.shape):
        return "top1"
    return "iou" if len(answers.shape) == len(labels.shape) + 1 == 4 else "top1"


def _metric(name: str, signature: Signature, located: bool) -> Metric:
    if name == LOCALIZATION or (name == "nll" and located):
        position = signature.position_output
        if position is None or not located:
            raise ParameterError(
                "the metric localization needs an output in degrees latitude, longitude, and the "
                "true `positions` in the evaluation data"
            )
        if name == LOCALIZATION:
            place = partial(_distances, position.name)
            return Metric(name, higher=False, relative=True, labels=POSITIONS, rows=place, unit="m")
        if signature.sigma_output is None:
            raise ParameterError(
                "the metric nll needs the deviations of the positions: an output with `sigma_of` "
                "or `log_variance_of` in the signature"
            )
        nats = partial(_nats, position.name, signature)
        return Metric(
            name,
            higher=False,
            relative=False,
            labels=POSITIONS,
            rows=nats,
            score=_mean,
            unit="nats",
        )
    answers = signature.outputs[0].name
    if name in _SUMMED:
        higher, relative, rows, score = _SUMMED[name]
        unit, counted = "nats" * (name == "nll"), partial(_of, answers, rows)
        return Metric(name, higher, relative, LABELS, counted, unit, score is _right, score)
    if name in _RANKED:
        function, higher = _RANKED[name]
        ranked = partial(_classified, function)
        kept = partial(_of, answers, _kept)
        return Metric(name, higher, relative=False, labels=LABELS, rows=kept, ranked=ranked)
    if ":" in name:
        return _own(name, signature)
    raise ParameterError(
        f"there is no metric {shown(name)}: {meant(name, NAMES)}; one "
        "of your own is named as package.module:function, one of torchmetrics as "
        "torchmetrics.classification:MulticlassF1Score"
    )


def _own(spec: str, signature: Signature) -> Metric:
    # It takes PyTorch, which who only reads a record does without.
    from heimdall_onnx.model.construction import import_model

    path, _, direction = spec.partition(":")[2].partition(":")
    try:
        found = import_model(f"{spec.partition(':')[0]}:{path}")
    except ParameterError as error:
        raise ParameterError(f"the metric can't be used: {error}") from error
    higher = {"higher": True, "lower": False}.get(
        direction, getattr(found, "higher_is_better", None)
    )
    if not isinstance(higher, bool):
        raise ParameterError(
            f"nothing says whether more of the metric {shown(spec)} is better: write {spec}:higher "
            f"or {spec}:lower, or set higher_is_better = True or False on {path}"
        )
    answers = signature.outputs[0].name
    if isinstance(found, type):
        ranked = partial(_torchmetric, found)
        kept = partial(_of, answers, _kept)
        return Metric(path, higher, relative=False, labels=LABELS, rows=kept, ranked=ranked)
    single = answers if len(signature.outputs) == 1 else None
    rows = partial(_values, path, found, single)
    return Metric(path, higher, relative=False, labels=LABELS, rows=rows, score=_mean)


def _of(
    name: str,
    rows: Callable[[npt.NDArray[Any], npt.NDArray[Any]], npt.NDArray[Any]],
    outputs: Arrays,
    labels: npt.NDArray[Any],
) -> npt.NDArray[Any]:
    return rows(outputs[name], labels)


def _values(
    what: str,
    function: Callable[[Any, npt.NDArray[Any]], Any],
    single: str | None,
    outputs: Arrays,
    labels: npt.NDArray[Any],
) -> Floats:
    try:
        found = np.asarray(function(outputs[single] if single else outputs, labels), np.float64)
    except HeimdallError:
        raise
    except Exception as error:  # whatever somebody's own function raises
        raise EvidenceError(f"the metric {what} failed: {type(error).__name__}: {error}") from error
    if found.shape != labels.shape[:1]:
        raise EvidenceError(
            f"the metric {what} must give a value for each of {len(labels)} samples, found the "
            f"shape {found.shape}"
        )
    return found[:, None]


def _distances(position: str, outputs: Arrays, truth: npt.NDArray[Any]) -> Floats:
    return error_m(outputs[position], truth)[:, None]


def _nats(position: str, signature: Signature, outputs: Arrays, truth: npt.NDArray[Any]) -> Floats:
    deviations = signature.deviations(outputs)
    assert deviations is not None
    residual = difference_degrees(outputs[position], truth)
    return negative_log_likelihood(residual, deviations)[:, None]


def _mean(sums: Floats, weights: Floats) -> Floats:
    return np.asarray(sums[:, 0] / weights)


def _root(sums: Floats, weights: Floats) -> Floats:
    return np.sqrt(_mean(sums, weights))


def _right(sums: Floats, weights: Floats) -> Floats:
    return 1 - _mean(sums, weights)


def _overlap(times: int, sums: Floats, _: Floats) -> Floats:
    """Mean over the classes that are there of ``times`` TP over itself, FP and FN."""
    counts = sums.reshape(len(sums), -1, 3).astype(np.float64)
    both = times * counts[..., 0]
    union = both + counts[..., 1] + counts[..., 2]
    there = union > 0
    share = np.divide(both, union, out=np.zeros_like(both), where=there)
    return np.asarray(share.sum(axis=1) / np.maximum(there.sum(axis=1), 1))


def _as_classes(answers: npt.NDArray[Any], labels: npt.NDArray[Any]) -> tuple[Any, Any, int]:
    """Scores (n, C, d) and classes (n, d) as torch has them, −1 where nobody knows, and C.

    Classes are the second axis, as torch has them, or the last one.
    """
    import torch

    if labels.ndim > 1 and labels.shape[1] == 1 and labels.ndim == answers.ndim:
        labels = labels[:, 0]
    if answers.ndim == labels.ndim:
        answers = answers[:, None]
    if answers.shape[:1] + answers.shape[2:] != labels.shape == answers.shape[:-1]:
        answers = np.moveaxis(answers, -1, 1)
    if answers.shape[:1] + answers.shape[2:] != labels.shape:
        raise _unfit(answers, labels, "a class for each sample, or for each of its elements")
    if answers.shape[1] == 1:
        # One number for two classes, as a probability or before its sigmoid.
        inside = ((answers >= 0) & (answers <= 1)).all()
        answers = np.concatenate([(1.0 - answers) if inside else -answers, answers], axis=1)
    classes = answers.shape[1]
    known = labels.astype(np.int64)
    known = np.where((known < 0) | ((known == _UNKNOWN) & (classes <= _UNKNOWN)), -1, known)
    if known.max(initial=-1) >= classes:
        raise DataError(
            f"`labels` go up to {known.max()}, and the answers have {classes} classes, from 0 to "
            f"{classes - 1}"
        )
    shape = (len(answers), classes, -1)
    scores = torch.from_numpy(np.ascontiguousarray(answers, np.float32)).reshape(shape)
    return scores, torch.from_numpy(known).reshape(len(known), -1), classes


def _unfit(answers: npt.NDArray[Any], labels: npt.NDArray[Any], expected: str) -> DataError:
    return DataError(
        f"`labels` of shape {('N', *labels.shape[1:])} do not fit answers of shape "
        f"{('N', *answers.shape[1:])}: expected {expected}; choose another metric (--metric), or "
        "say that nothing is to use them (--ignore labels)"
    )


def _wrong(most: int, answers: npt.NDArray[Any], labels: npt.NDArray[Any]) -> Floats:
    """Share of a sample's elements whose class is not among the first ``most``."""
    if answers.dtype.kind != "f":  # the classes themselves
        if answers.size != labels.size:
            raise _unfit(answers, labels, "a class for each of them")
        wrong = answers != labels.reshape(answers.shape)
        return np.asarray(wrong.reshape(len(labels), -1).mean(axis=1))[:, None]
    from torchmetrics.functional.classification import multiclass_accuracy

    scores, known, classes = _as_classes(answers, labels)
    right = multiclass_accuracy(
        scores,
        known,
        num_classes=classes,
        average="micro",
        top_k=min(most, classes),
        multidim_average="samplewise",
        ignore_index=-1,
    )
    # What nobody knows any element of is neither right nor wrong.
    return np.where((known < 0).all(1).numpy(), np.nan, 1 - right.double().numpy())[:, None]


def _counted(answers: npt.NDArray[Any], labels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """TP, FP and FN of each class (n, 3 C)."""
    from torchmetrics.functional.classification import multiclass_stat_scores

    scores, known, classes = _as_classes(answers, labels)
    found = multiclass_stat_scores(
        scores,
        known,
        num_classes=classes,
        average=None,
        multidim_average="samplewise",
        ignore_index=-1,
    )
    return np.asarray(found[..., [0, 1, 3]].reshape(len(labels), -1).numpy())


def _apart(power: int, answers: npt.NDArray[Any], labels: npt.NDArray[Any]) -> Floats:
    if answers.size != labels.size:
        raise _unfit(answers, labels, "a value for each of them")
    apart = answers.astype(np.float64) - labels.reshape(answers.shape)
    return np.asarray((np.abs(apart) ** power).reshape(len(labels), -1).mean(axis=1))[:, None]


def _cross_entropy(answers: npt.NDArray[Any], labels: npt.NDArray[Any]) -> Floats:
    from torch.nn.functional import nll_loss

    scores, known, _ = _as_classes(answers, labels)
    scores = scores.double()
    likely = bool((scores >= 0).all()) and bool(((scores.sum(1) - 1).abs() < 1e-3).all())
    logs = scores.log() if likely else scores.log_softmax(1)
    nats = nll_loss(logs, known, ignore_index=-1, reduction="none")
    return np.asarray((nats.sum(dim=1) / (known >= 0).sum(dim=1)).numpy())[:, None]


def _kept(answers: npt.NDArray[Any], _: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return answers


def _classified(function: str, answers: npt.NDArray[Any], labels: npt.NDArray[Any]) -> float:
    """A function of torchmetrics for two, several or independent classes."""
    from torchmetrics.functional import classification

    if answers.ndim == labels.ndim and answers.ndim > 1 and answers.shape[1] > 1:
        import torch

        scores, known = torch.from_numpy(answers), torch.from_numpy(labels.astype(np.int64))
        kind, sizes = "multilabel", {"num_labels": answers.shape[1]}
    else:
        scores, known, classes = _as_classes(answers, labels)
        kind, sizes = "multiclass", {"num_classes": classes}
        if classes == 2:
            kind, sizes, scores = "binary", {}, scores.softmax(1)[:, 1]
    return float(getattr(classification, f"{kind}_{function}")(scores, known, **sizes))


def _torchmetric(
    kind: Callable[..., Any], answers: npt.NDArray[Any], labels: npt.NDArray[Any]
) -> float:
    import inspect

    import torch

    known = inspect.signature(kind).parameters
    classes = answers.shape[1] if answers.ndim > 1 else 1
    sizes = {name: classes for name in ("num_classes", "num_labels") if name in known}
    try:
        metric = kind(**sizes)
        metric.update(torch.from_numpy(answers), torch.from_numpy(labels))
        return float(metric.compute())
    except Exception as error:  # whatever a metric of somebody's own raises
        raise EvidenceError(
            f"the metric {kind.__name__} failed: {type(error).__name__}: {error}"
        ) from error


_SUMMED: dict[str, tuple[bool, bool, Any, Callable[[Floats, Floats], Floats]]] = {
    "top1": (True, False, partial(_wrong, 1), _right),
    "top5": (True, False, partial(_wrong, 5), _right),
    "f1": (True, False, _counted, partial(_overlap, 2)),
    "iou": (True, False, _counted, partial(_overlap, 1)),
    "rmse": (False, True, partial(_apart, 2), _root),
    "mae": (False, True, partial(_apart, 1), _mean),
    "nll": (False, False, _cross_entropy, _mean),
}
_RANKED = {
    "auroc": ("auroc", True),
    "map": ("average_precision", True),
    "ece": ("calibration_error", False),
}
NAMES = (*_SUMMED, *_RANKED, LOCALIZATION)
