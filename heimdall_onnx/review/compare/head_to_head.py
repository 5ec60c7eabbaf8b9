"""Two models beside each other before one takes the other's place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from heimdall_onnx.common.errors import DataError
from heimdall_onnx.data.dataset.dataset import Dataset
from heimdall_onnx.data.evaluation import load_evaluation_data
from heimdall_onnx.evidence.quality.contract import Judged
from heimdall_onnx.evidence.ratios import Ratio
from heimdall_onnx.model.signature import Signature
from heimdall_onnx.review.compare.answers import (
    MOST_SAMPLES,
    compare_answers,
    latency_ratio,
    measure_both,
)
from heimdall_onnx.review.compare.gates import Limits
from heimdall_onnx.review.compare.words import losses_of


@dataclass(frozen=True)
class HeadToHead:
    """How a candidate compares with the version that holds the alias.

    Attributes:
        holder: That version; None if there is none.
        evaluation_data: What both were run on, in words.
        ratios: What takes how much longer.
        notes: What could not be compared, and why.
        lost: Values that are NaN or Inf in one of them alone, in words.
        quality: What the candidate loses by each metric.
    """

    holder: str | None
    evaluation_data: str
    ratios: tuple[Ratio, ...]
    notes: tuple[str, ...]
    lost: tuple[str, ...] = ()
    quality: tuple[Judged, ...] = ()

    @property
    def worse(self) -> tuple[str, ...]:
        """In what the candidate is worse than the limits allow, in words; empty if in nothing."""
        slower = (str(ratio) for ratio in self.ratios if not ratio.holds)
        return (*losses_of(self.quality, "worse"), *slower, *self.lost)

    @property
    def not_shown(self) -> tuple[str, ...]:
        """What is not shown to be good enough, with how many samples would, in words."""
        return losses_of(self.quality, "not shown")


def compare_models(
    candidate: Path,
    holder: Path,
    eval_data: Path | Dataset | None,
    signature: Signature,
    limits: Limits,
    *,
    version: str,
    takes: Signature,
    ignore: Sequence[str] = (),
) -> HeadToHead:
    """Run both models on the same data and time them in turns, as a comparison does.

    Args:
        candidate: The ONNX file that would be promoted; B of the comparison.
        holder: The ONNX file that holds the alias; A of it.
        eval_data: The candidate's evaluation data, of which 10,000 evenly spaced samples are taken
            where there are more; None for synthetic inputs. A dataset's values are not held
            against its digest.
        signature: What both take and both give, see `shared_signature`.
        limits: How much worse it may be.
        version: The version that holds the alias.
        takes: Its own signature; where the data do not fit its inputs, nothing is compared.
        ignore: Arrays of the data that nothing is to use.

    Raises:
        DataError: If the evaluation data does not fit the candidate.
        EvidenceError: If one of them can't be opened, run or timed for another reason.
        ParameterError: If the answers can't be judged by the metric that the limits name.
    """
    given = load_evaluation_data(eval_data, signature, verify=False, ignore=ignore)
    data = given.spread(MOST_SAMPLES)
    of = f" of {given.count}" if data.count < given.count else ""
    try:
        takes.check_inputs(data.inputs, data.source)
        if takes.fixed_batch not in (None, signature.fixed_batch):
            raise DataError(f"its batch is fixed at {takes.fixed_batch}")
    except DataError as error:
        note = f"version {version} does not take the candidate's inputs: {error}"
        return HeadToHead(version, f"{data.count}{of} samples, {data.source}", (), (note,))
    answers = compare_answers(holder, candidate, data, signature, limits=limits)
    latency = measure_both(holder, candidate, data, signature, calls=limits.calls)
    ratio = latency_ratio(latency, limits)
    return HeadToHead(
        version,
        f"{data.count}{of} samples, {data.source}",
        (ratio,) if ratio else (),
        tuple(f"quality is not judged: {why}" for why in answers.not_judged),
        answers.lost,
        answers.quality,
    )
