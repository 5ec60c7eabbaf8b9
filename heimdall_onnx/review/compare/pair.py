"""Two releases to be compared: found, verified, and fetched with what they record of themselves.

Their manifests and reports are anybody's until they verify, and even then they say what whoever
released them wrote; so what is read from them is checked before it is believed to have a form.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import Field

from heimdall_onnx.archive.content import fetch_evaluation_data
from heimdall_onnx.archive.find import find_release
from heimdall_onnx.archive.release import Release
from heimdall_onnx.archive.verify import require_verified, verify_release
from heimdall_onnx.common.errors import ParameterError
from heimdall_onnx.common.logs import configure_logs, get_logger
from heimdall_onnx.common.parameters import BUCKET, FP32, PREFIX, REFERENCE_FOLDER, Parameters
from heimdall_onnx.common.text import shown
from heimdall_onnx.common.verdict import NotMeasured
from heimdall_onnx.data.evaluation import EvaluationData, is_dataset, load_evaluation_data
from heimdall_onnx.model.signature import Signature
from heimdall_onnx.report.workspace import new_run_folder
from heimdall_onnx.review.compare.answers import (
    MOST_SAMPLES,
    A,
    Answers,
    B,
    compare_answers,
    measure_both,
    shared_signature,
)
from heimdall_onnx.review.compare.comparison import (
    ReleaseComparison,
    VerifiedRelease,
)
from heimdall_onnx.review.compare.gates import Limits, pair_gates
from heimdall_onnx.review.reproduce.figures import Difference, Figure, environment_differences
from heimdall_onnx.services.connection import open_for_reading

if TYPE_CHECKING:
    from heimdall_onnx.data.dataset.dataset import Dataset
    from heimdall_onnx.evidence.latency.benchmark import PairLatency
    from heimdall_onnx.services.connection import Connection
    from heimdall_onnx.services.settings import Settings

log = get_logger(__name__)

_Side = TypeVar("_Side", Release, VerifiedRelease)

COMPARISON_RECORD = "comparison"
INPUTS = "inputs"
# Where a run kept its files, and what it was called: they differ from run to run.
_OWN_TO_A_RUN = ("output_dir", "run_id")


class ComparisonParameters(Parameters):
    """What is compared; the fields are the notebook's parameters, in its order."""

    a: str = Field("", max_length=2000)
    b: str = Field("", max_length=2000)
    eval_data: str = ""
    bucket: str = Field("heimdall-models", pattern=BUCKET)
    prefix: str = Field(REFERENCE_FOLDER, pattern=PREFIX, max_length=500)
    measure_latency: bool = True
    calls: int = Field(200, ge=12, le=1_000_000)
    seed: int = Field(0, ge=0)
    metric: str = Field("", max_length=500)
    # Papermill explains no types with None.
    max_loss: float = Field(-1.0, ge=-1)
    confidence: float = Field(0.0, ge=0, lt=1)
    output_dir: str = ""


@dataclass(frozen=True)
class Pair:
    """Two releases that can be compared.

    Attributes:
        a: The one that is there.
        b: The one that would take its place.
        signature: What both take and both give.
        alone: Outputs that only one of them gives, in words.
        eval_data: The newer one's evaluation data, or those that were given; None for synthetic.
        verify_data: Whether a dataset's values are still to be held against its digest.
        limits: How much worse B may be.
    """

    a: VerifiedRelease
    b: VerifiedRelease
    signature: Signature
    alone: tuple[str, ...]
    eval_data: Path | str | Dataset | None = field(repr=False)
    verify_data: bool
    limits: Limits

    @property
    def sides(self) -> tuple[VerifiedRelease, VerifiedRelease]:
        """A and B."""
        return self.a, self.b

    def load_data(self) -> EvaluationData:
        """At most 10,000 evenly spaced samples of the evaluation data.

        Raises:
            DataError: If they can't be read, or don't fit both models.
            StoreError: If the store of a dataset fails.
        """
        given = self.verify_data
        ignore = () if given else newer_of(*self.sides).manifest.ignored
        data = load_evaluation_data(self.eval_data, self.signature, verify=given, ignore=ignore)
        return data.spread(MOST_SAMPLES)


def newer_of(a: _Side, b: _Side) -> _Side:
    """Whichever was released later; B of two of one second."""
    return a if a.manifest.version > b.manifest.version else b


def prepare(parameters: ComparisonParameters, settings: Settings) -> ComparisonParameters:
    """Complete the parameters of a notebook and make its folder; its log goes there.

    Raises:
        ParameterError: If a release is not named.
    """
    if missing := [who for who in ("a", "b") if not getattr(parameters, who).strip()]:
        raise ParameterError(
            f"which releases are compared? Set {' and '.join(missing)}: a version as "
            "`heimdall-onnx list` shows them, NAME@ALIAS, NAME/VERSION or an s3:// address"
        )
    folder = Path(parameters.output_dir or new_run_folder(settings))
    folder.mkdir(parents=True, exist_ok=True)
    configure_logs(file=folder / "events.jsonl")
    return parameters.model_copy(update={"output_dir": str(folder)})


def find_pair(connection: Connection, parameters: ComparisonParameters) -> tuple[Release, Release]:
    """Releases A and B, neither of them verified.

    Raises:
        ParameterError: If both are one release, or one is not named.
        VerificationError: If one of them is no release, or its manifest can't be read.
        ServiceError: If a service can't be reached or refuses, or has no such version.
    """
    place = {"bucket": parameters.bucket, "prefix": parameters.prefix}
    a, b = (find_release(connection, address, **place) for address in (parameters.a, parameters.b))
    if a.uri == b.uri:
        raise ParameterError(
            f"{shown(parameters.a)} and {shown(parameters.b)} are one release, {a.uri}; name two"
        )
    return a, b


def open_pair(parameters: ComparisonParameters, settings: Settings) -> Pair:
    """Verify both releases and bring their models, their records and the evaluation data here.

    A model is kept below the settings' home under its hash, as `load_model` keeps it; the rest is
    in the folder of this comparison. Nothing is opened that does not verify.

    Args:
        parameters: Of the comparison, with a folder.
        settings: Where the services are, and whose signature a release must have.

    Raises:
        ParameterError: If both are one release, or the evaluation data are nowhere.
        VerificationError: If one of them does not verify, or says something that can't be read.
        InvalidModelError: If they can't be compared, see `shared_signature`.
        ServiceError: If a service can't be reached or refuses.
    """
    connection = open_for_reading(settings)
    releases = find_pair(connection, parameters)
    folder = Path(parameters.output_dir) / INPUTS
    folder.mkdir(parents=True, exist_ok=True)
    newer = newer_of(*releases)
    a, b = (
        # Of what it was made of only the evaluation data that are used have to be right.
        _open(who, one, content=one is newer and not parameters.eval_data)
        for who, one in zip((A, B), releases, strict=True)
    )
    signature, alone = shared_signature(*(one.manifest.said.model.signature for one in (a, b)))
    if parameters.eval_data:
        data: Path | str | Dataset | None = _given(parameters.eval_data)
    else:
        data = fetch_evaluation_data(newer, folder)
    loss = None if parameters.max_loss < 0 else parameters.max_loss
    limits = Limits(
        metric=parameters.metric, max_loss=loss, confidence=parameters.confidence or None
    ).as_released(b.record.parity.quality)
    return Pair(a, b, signature, alone, data, bool(parameters.eval_data), limits)


def _given(path: str) -> Path | str:
    if path.startswith("s3://"):
        return path
    if not (is_dataset(path) or Path(path).is_file()):
        raise ParameterError(f"expected evaluation data at {shown(path)}, found no such file")
    return Path(path)


def _open(who: str, release: Release, *, content: bool) -> VerifiedRelease:
    # In the store, whatever may be here already of an earlier look.
    findings = verify_release(release, content=content)
    require_verified(findings, f"{who}, {release.uri},")
    manifest, cache = release.manifest, release.connection.settings.home / "models"
    path, _ = release.fetch_model(manifest.variant(FP32), cache)
    return VerifiedRelease(who, manifest, release.record, path, len(findings))


def compare_pair(pair: Pair, data: EvaluationData) -> Answers:
    """What both models say of the evaluation data; raises as `compare_answers` does."""
    a, b = (one.model for one in pair.sides)
    return compare_answers(a, b, data, pair.signature, alone=pair.alone, limits=pair.limits)


def time_pair(
    pair: Pair, data: EvaluationData, parameters: ComparisonParameters
) -> PairLatency | NotMeasured:
    """How long both models take; raises as `measure_both` does."""
    if not parameters.measure_latency:
        return NotMeasured("the parameter measure_latency is False")
    return measure_both(
        pair.a.model,
        pair.b.model,
        data,
        pair.signature,
        calls=parameters.calls,
        seed=parameters.seed,
    )


def conclude(pair: Pair, answers: Answers, latency: PairLatency | NotMeasured) -> ReleaseComparison:
    """All of it together, with what the two releases record of themselves."""
    found = ReleaseComparison(
        a=pair.a,
        b=pair.b,
        answers=answers,
        latency=latency,
        gates=pair_gates(*(one.record.gates for one in pair.sides)),
        parameters=_parameter_differences(pair),
        environment=environment_differences(*(one.record for one in pair.sides)),
        limits=pair.limits,
    )
    a, b = (one.manifest.uri for one in pair.sides)
    log.info("compared", a=a, b=b, sentence=found.sentence)
    return found


def _parameter_differences(pair: Pair) -> tuple[Difference, ...]:
    was, has = (dict(_made_of(one)) for one in pair.sides)
    return tuple(
        Difference(what, _figure(was.get(what)), _figure(has.get(what)), numerical=True)
        for what in dict.fromkeys((*was, *has))
        if _written(was.get(what)) != _written(has.get(what))
    )


def _made_of(one: VerifiedRelease) -> Iterator[tuple[str, object]]:
    """What a release was made of, and with which parameters."""
    said = one.manifest.said
    yield "checkpoint, SHA-256", said.checkpoint.sha256
    yield "evaluation data, SHA-256", said.evaluation_data.sha256
    yield "evaluation samples", said.evaluation_data.samples
    for what, value in said.parameters.items():
        if what not in _OWN_TO_A_RUN:
            yield what, value


def _figure(value: object) -> Figure:
    return value if isinstance(value, float | int | str | None) else _written(value)


def _written(value: object) -> str:
    """All of a value: abbreviated, two that differ may look the same."""
    return json.dumps(value, sort_keys=True)


def record_comparison(found: ReleaseComparison) -> None:
    """Keep the comparison in the running notebook, for the process that judges it from outside."""
    import scrapbook

    # nbformat sorts the keys of mappings.
    record = {"figures": found.to_dict(), "facts": list(found.facts.items())}
    scrapbook.glue(COMPARISON_RECORD, record, encoder="json")
