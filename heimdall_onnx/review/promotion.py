"""Promotion and rollback: a release that verifies gets an alias, on a reviewer's word and in a log.

No version is ever deleted or changed; what moves is the alias, and every move leaves a record
beside the report of the release that it points at.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic_core import to_jsonable_python

from heimdall_onnx.archive.aliases import AliasLog, Move, alias_logs
from heimdall_onnx.archive.content import fetch_evaluation_data
from heimdall_onnx.archive.find import release_of
from heimdall_onnx.archive.manifest import REPORT, REVIEWS
from heimdall_onnx.archive.mlflow_page import add_review, review_line
from heimdall_onnx.archive.release import Release
from heimdall_onnx.archive.verify import (
    REVIEW_TAG,
    Finding,
    differences,
    require_verified,
    verify_release,
)
from heimdall_onnx.common.environment import capture_environment
from heimdall_onnx.common.errors import (
    EvidenceError,
    InvalidModelError,
    NotRegisteredError,
    ParameterError,
    PromotionError,
    RegistryError,
    ServiceError,
    StoreError,
    VerificationError,
)
from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.common.parameters import FP32, check_parameters
from heimdall_onnx.common.signals import uninterrupted
from heimdall_onnx.report.rendering import render_html
from heimdall_onnx.review.compare.answers import shared_signature
from heimdall_onnx.review.compare.gates import Limits, verdict_reasons
from heimdall_onnx.review.compare.head_to_head import HeadToHead, compare_models
from heimdall_onnx.services.store import Bucket, to_json

if TYPE_CHECKING:
    from heimdall_onnx.archive.signing import Trust
    from heimdall_onnx.services.connection import Connection

log = get_logger(__name__)

_MAX_NAME, _MAX_NOTE = 200, 10_000


@dataclass(frozen=True)
class _Case:
    """What is decided about, as it was before anything else was looked at.

    A move that comes after this look is somebody else's.
    """

    log: AliasLog
    after: int
    holder: str | None
    reviewer: str
    note: str

    @classmethod
    def of(
        cls, connection: Connection, bucket: Bucket, name: str, alias: str, reviewer: str, note: str
    ) -> _Case:
        if problems := "; ".join(_word_problems(reviewer, note)):
            raise ParameterError(problems)
        alias_log = AliasLog(bucket, name, alias)
        last = alias_log.moves[-1:]
        holder = connection.tracker.alias_target(name, alias)
        return cls(alias_log, last[0].number if last else 0, holder, reviewer, note)


@dataclass(frozen=True)
class Review:
    """An alias that was moved, and on what grounds.

    Attributes:
        action: ``"promote"`` or ``"rollback"``.
        model_name: Registered model.
        alias: The alias.
        version: The version that it points at now.
        release: That version's release folder.
        previous: The version that it pointed at before, or None.
        reviewer: Who decided.
        note: Why.
        record_uri: The review record.
        page_uri: The report with who has decided about it at its head; None if it could not be
            kept.
        findings: Everything that was verified.
        comparison: How it compares with the version before; None where that was not asked for.
    """

    action: Literal["promote", "rollback"]
    model_name: str
    alias: str
    version: str
    release: str
    previous: str | None
    reviewer: str
    note: str
    record_uri: str
    page_uri: str | None
    findings: tuple[Finding, ...] = field(repr=False)
    comparison: HeadToHead | None


def promote_release(
    release: Release,
    *,
    alias: str,
    reviewer: str,
    note: str,
    limits: Limits | None = None,
    compare: bool = True,
    trust: Trust | None = None,
) -> Review:
    """Verify a release again, compare it with the version that holds the alias, and move the alias.

    Args:
        release: The release.
        alias: The alias, e.g. ``"production"``.
        reviewer: Who decides.
        note: Why.
        limits: How much worse it may be than the version that it replaces.
        compare: Whether to compare both on the candidate's evaluation data.
        trust: Whose signature it must have; what the settings name by default.

    Raises:
        ParameterError: If alias, reviewer, note or metric can't be used.
        PromotionError: With every reason that speaks against it; nothing is changed then.
        VerificationError: If there is no such release.
        ServiceError: If a service can't be reached or refuses.
    """
    check_parameters({"alias": alias})
    limits = limits or Limits()
    name, version = release.manifest.model_name, release.manifest.model_version
    case = _Case.of(release.connection, release.bucket, name, alias, reviewer, note)
    findings = verify_release(release, trust=trust)
    reasons = differences(findings)
    verified = not reasons
    reasons += verdict_reasons(release.manifest.said.verdict, limits)
    if case.holder == version:
        reasons.append(f"version {version} holds the alias {alias} already")
    comparison = None
    # What does not verify is not run.
    if compare and verified and case.holder != version:
        limits = limits.as_released(release.record.parity.quality)
        try:
            comparison = _compare(release, case.holder, limits)
            reasons += comparison.worse
            reasons += () if limits.allow_not_shown else comparison.not_shown
        except EvidenceError as error:
            reasons.append(f"it can't be compared with version {case.holder}: {error}")
    if reasons:
        raise PromotionError(
            f"{release.uri} is not promoted to {alias}:\n  - " + "\n  - ".join(reasons)
        )
    return _decide(case, release, "promote", findings, comparison, limits)


def roll_back(
    connection: Connection,
    bucket: str,
    model_name: str,
    *,
    alias: str,
    reviewer: str,
    note: str,
    version: str | None = None,
    trust: Trust | None = None,
) -> Review:
    """Point an alias back at a version that it pointed at before, if that still verifies.

    Args:
        connection: Store and registry.
        bucket: Bucket of the releases.
        model_name: Registered model.
        alias: The alias.
        reviewer: Who decides.
        note: Why.
        version: The version to go back to; the one before the present one by default. Going back
            twice goes two versions back.
        trust: Whose signature it must have; what the settings name by default.

    Raises:
        ParameterError: If reviewer or note can't be used.
        PromotionError: If there is nothing to go back to, or what there is does not verify.
        VerificationError: If the alias's log can't be read.
        ServiceError: If a service can't be reached or refuses.
    """
    case = _Case.of(connection, connection.bucket(bucket), model_name, alias, reviewer, note)
    moves, holder = case.log.moves, case.holder
    if moves and moves[-1].version != holder:
        raise PromotionError(
            f"the alias {alias} of {model_name} points at version {holder or 'none'}, its log says "
            f"{moves[-1].version or 'none'}; run `heimdall-onnx doctor` first"
        )
    there = {one.version: one for one in connection.tracker.versions(model_name)}
    if version is None:
        earlier = [one for one in _held(moves)[:-1] if one in there]
        if not earlier:
            raise PromotionError(
                f"the alias {alias} of {model_name} has no version to go back to; its log has "
                f"{len(moves)} moves in bucket {bucket}"
            )
        version = earlier[-1]
    else:
        ever = {moves[0].previous, *(move.version for move in moves)} if moves else set()
        known = sorted((one for one in ever - {holder} if one in there), key=int)
        if version not in known:
            raise PromotionError(
                f"the alias {alias} of {model_name} has not pointed at version {version} before; "
                f"it has at {', '.join(known) or 'none'} (use promote for another one)"
            )
    try:
        release = release_of(connection, there[version], there[version].source)
        findings = verify_release(release, trust=trust)
    except (VerificationError, NotRegisteredError) as error:
        raise PromotionError(
            f"{model_name} version {version} can't be gone back to: {error}"
        ) from error
    if reasons := differences(findings):
        raise PromotionError(
            f"{model_name} version {version} can't be gone back to, it does not verify:\n  - "
            + "\n  - ".join(reasons)
        )
    return _decide(case, release, "rollback", findings)


@dataclass(frozen=True)
class AliasHistory:
    """Where an alias pointed, and where it points.

    Attributes:
        alias: The alias.
        moves: Every move, oldest first.
        points_at: The version that MLflow's alias points at; None for none.
        problem: Why the log can't be believed, or that MLflow does not follow it; empty if all is
            well.
    """

    alias: str
    moves: tuple[Move, ...]
    points_at: str | None
    problem: str


def alias_history(connection: Connection, bucket: str, model_name: str) -> tuple[AliasHistory, ...]:
    """The history of every alias of a model.

    Raises:
        ServiceError: If a service can't be reached or refuses.
    """
    there = connection.tracker.aliases(model_name)
    logs = alias_logs(connection.bucket(bucket), model_name)
    found = []
    for alias in sorted({*logs, *there}):
        points_at, problem = there.get(alias), ""
        moves: tuple[Move, ...] = ()
        try:
            moves = logs[alias].moves if alias in logs else moves
        except VerificationError as error:
            problem = str(error)
        expected = moves[-1].version if moves else None
        if not moves:
            problem = problem or f"it points at version {points_at}, which no entry of a log says"
        elif points_at != expected:
            problem = f"its log says version {expected or 'none'}, MLflow {points_at or 'none'}"
        found.append(AliasHistory(alias, moves, points_at, problem))
    return tuple(found)


def _held(moves: Sequence[Move]) -> list[str]:
    """The versions to go back through, the present one last."""
    held: list[str] = [moves[0].previous] if moves and moves[0].previous else []
    for move in moves:
        if move.version is None:
            held.clear()
            continue
        if move.action in ("rollback", "withdraw") and move.version in held:
            del held[held.index(move.version) + 1 :]
        else:
            held = [one for one in held if one != move.version] + [move.version]
    return held


def _compare(release: Release, holder: str | None, limits: Limits) -> HeadToHead:
    if holder is None:
        return HeadToHead(None, "", (), ("nothing holds the alias yet",))
    connection, name = release.connection, release.manifest.model_name
    try:
        theirs = Release.at(connection, connection.tracker.get_version(name, holder).source)
        # What does not verify is not run, and is no measure for anything.
        require_verified(verify_release(theirs, content=False), theirs.uri)
        takes = theirs.manifest.said.model.signature
        signature, _ = shared_signature(takes, release.manifest.said.model.signature)
    except (VerificationError, NotRegisteredError) as error:
        return HeadToHead(holder, "", (), (f"version {holder} does not verify: {error}",))
    except InvalidModelError as error:
        note = f"version {holder} does not take the candidate's inputs: {error}"
        return HeadToHead(holder, "", (), (note,))
    with tempfile.TemporaryDirectory(prefix="heimdall-review-") as folder:
        candidate, other = (
            one.fetch_model(one.manifest.variant(FP32), Path(folder))[0]
            for one in (release, theirs)
        )
        data = fetch_evaluation_data(release, Path(folder))
        return compare_models(
            candidate,
            other,
            data,
            signature,
            limits,
            version=holder,
            takes=takes,
            ignore=release.manifest.ignored,
        )


def _decide(
    case: _Case,
    release: Release,
    action: Literal["promote", "rollback"],
    findings: tuple[Finding, ...],
    comparison: HeadToHead | None = None,
    limits: Limits | None = None,
) -> Review:
    """Review record, entry of the log, alias: each only after the one before."""
    tracker, bucket, manifest = release.connection.tracker, release.bucket, release.manifest
    name, version, now = manifest.model_name, manifest.model_version, datetime.now(UTC)
    stamp = f"{now:%Y%m%d_%H%M%S}_{action}"
    decided: dict[str, Any] = {
        "action": action,
        "model_name": name,
        "alias": case.log.alias,
        "release": release.uri,
        "previous": case.holder,
        "reviewer": case.reviewer,
        "note": case.note,
    }
    record = to_json(
        {
            "schema_version": 1,
            # Two who decide the same in one second have decided twice.
            "id": secrets.token_hex(8),
            **decided,
            "model_version": version,
            "manifest_sha256": manifest.sha256,
            "time": now.isoformat(timespec="seconds"),
            "verified": [finding.what for finding in findings],
            "comparison": comparison and to_jsonable_python(comparison, inf_nan_mode="strings"),
            "limits": limits and vars(limits),
            "environment": asdict(capture_environment()),
        }
    )
    # A signal waits for the end: a decision that is half written is none.
    with uninterrupted():
        key, tag = _keep(release, stamp, record, "json")
        try:
            move = case.log.append(
                action=action,
                version=version,
                release=release.uri,
                previous=case.holder,
                by=case.reviewer,
                note=case.note,
                after=case.after,
            )
        except PromotionError:
            # Of two who decide at once only one has decided. Where a reviewer may not delete, the
            # record stays as one that was not completed.
            tracker.delete_version_tag(name, version, tag)
            with contextlib.suppress(StoreError):
                bucket.delete([key])
            raise
        case.log.follow(tracker)
        log.info("alias moved", alias=move.alias, model_name=name, version=version)
        try:
            described = tracker.get_version(name, version).description
            tracker.describe_version(name, version, add_review(described, review_line(move)))
        except RegistryError as error:
            # The decision is made and recorded; this is only where MLflow shows it.
            log.warning("review not shown in MLflow", model_name=name, reason=str(error))
        page = _store_page(release, case.log, stamp)
    return Review(
        **decided,
        version=version,
        record_uri=bucket.uri(key),
        page_uri=page,
        findings=findings,
        comparison=comparison,
    )


def _keep(release: Release, stamp: str, content: bytes, suffix: str) -> tuple[str, str]:
    """Store what was decided beside the release; gives its key, and the tag that has its hash."""
    digest = hashlib.sha256(content).hexdigest()
    key = f"{release.folder}/{REVIEWS}/{stamp}-{digest}.{suffix}"
    tag = f"{REVIEW_TAG}{stamp}_{digest[:12]}"
    release.bucket.upload_bytes(content, key)
    manifest, tracker = release.manifest, release.connection.tracker
    tracker.set_version_tags(manifest.model_name, manifest.model_version, {tag: digest})
    return key, tag


def _store_page(release: Release, alias_log: AliasLog, stamp: str) -> str | None:
    """Store the report with who has decided about it at its head, so that it alone says so.

    The decision is made and recorded: that its page can't be made changes nothing of it.
    """
    try:
        key, _ = _keep(release, stamp, _page(release, alias_log), "html")
    except (ServiceError, VerificationError) as error:
        log.warning("page of the decision not kept", release=release.uri, reason=str(error))
        return None
    return release.bucket.uri(key)


def _page(release: Release, alias_log: AliasLog) -> bytes:
    name, version = release.manifest.model_name, release.manifest.version
    logs = {**alias_logs(release.bucket, name), alias_log.alias: alias_log}
    # What the logs do not have was not decided.
    moves = [
        move
        for one in logs.values()
        for move in one.moves
        if move.release == release.uri and move.by_reviewer
    ]
    moves.sort(key=lambda move: move.time)
    with tempfile.TemporaryDirectory(prefix="heimdall-review-") as folder:
        path = Path(folder) / REPORT
        path.write_bytes(release.report)
        return render_html(path, f"{name} {version}", moves).read_bytes()


def _word_problems(reviewer: str, note: str) -> Iterator[str]:
    if not reviewer.strip() or len(reviewer) > _MAX_NAME or not reviewer.isprintable():
        yield f"the reviewer must be a name of 1 to {_MAX_NAME} printable characters on one line"
    inert = note.replace("\n", " ").replace("\t", " ")
    if not note.strip() or len(note) > _MAX_NOTE or not inert.isprintable():
        yield (
            f"the note must say why, in 1 to {_MAX_NOTE} characters; of those that can't be "
            "printed, only line breaks and tabs are taken"
        )
