"""Where each alias points and pointed: an append-only log in the bucket, which MLflow follows.

MLflow moves an alias without asking what it pointed at, so of two that move it at once one is lost
without a word. Here each move is an object with the next number, written only if there is none of
that number: of two writers one gets the number, and the other has to look again. MLflow's alias is
then made to point at what the last entry says, by everyone who has written one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from heimdall_onnx.common.errors import (
    ObjectExistsError,
    PromotionError,
    RegistryError,
    StoreError,
    VerificationError,
)
from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.services.store import Bucket

if TYPE_CHECKING:
    from heimdall_onnx.services.registry import MLflowTracker

log = get_logger(__name__)

ALIASES = "aliases"
STAGE_OF_ALIAS: Mapping[str, str] = {"staging": "Staging", "production": "Production"}
# As many writers at once would have to come first.
_TRIES = 200


class Move(BaseModel):
    """One move of an alias.

    Attributes:
        number: Its place in the log, from 1.
        model_name: Registered model.
        alias: The alias.
        action: What moved it; ``withdraw`` takes back a release that could not be completed.
        version: The version that it points at from now on; None for none.
        release: That version's release folder.
        previous: The version that it pointed at before.
        by: Who moved it: a reviewer's name, or the run of a release.
        note: Why, in the reviewer's words.
        time: When (UTC, ISO 8601), by the clock of who wrote it.
        follows: SHA-256 of the entry before, so that none can be changed or left out unseen.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    number: int
    model_name: str
    alias: str
    action: Literal["release", "promote", "rollback", "withdraw"]
    version: str | None
    release: str | None
    previous: str | None
    by: str
    note: str = ""
    time: str
    follows: str | None


@dataclass(frozen=True)
class AliasTarget:
    """A version that an alias shall point at.

    Attributes:
        model_name: Registered model.
        alias: The alias.
        version: The version.
        release: Its folder, ``s3://bucket/…``.
    """

    model_name: str
    alias: str
    version: str
    release: str


def append_move(
    bucket: Bucket,
    *,
    model_name: str,
    alias: str,
    action: Literal["release", "promote", "rollback", "withdraw"],
    version: str | None,
    release: str | None,
    previous: str | None,
    by: str,
    note: str = "",
    after: int | None = None,
) -> Move:
    """Write the next entry of an alias's log; `follow_log` then makes MLflow follow it.

    Args:
        bucket: Bucket of the releases.
        model_name: Registered model.
        alias: The alias.
        action: What moves it.
        version: The version that it shall point at.
        release: That version's release folder.
        previous: The version that it points at now, where the log does not know it yet.
        by: Who moves it.
        note: Why.
        after: Number of the entry that this one must follow; whichever is the last by default.

    Raises:
        PromotionError: If another entry came after ``after``.
        VerificationError: If the last entry can't be read.
        StoreError: If the store fails.
    """
    for _ in range(_TRIES):
        last, follows = _last_entry(bucket, model_name, alias)
        number = last.number if last else 0
        if after is not None and number != after:
            raise PromotionError(
                f"the alias {alias} of {model_name} was moved meanwhile, by {last and last.by}; "
                "look at `heimdall-onnx history` and decide again"
            )
        move = Move(
            number=number + 1,
            model_name=model_name,
            alias=alias,
            action=action,
            version=version,
            release=release,
            previous=last.version if last else previous,
            by=by,
            note=note,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            follows=follows,
        )
        try:
            bucket.upload_bytes(
                move.model_dump_json(indent=2).encode(),
                _key(model_name, alias, move.number),
                if_absent=True,
            )
        except ObjectExistsError:
            continue
        log.info("alias move written", alias=alias, number=move.number, version=version)
        return move
    raise StoreError(
        f"could not move the alias {alias} of {model_name}: {_TRIES} others came first"
    )


def follow_log(bucket: Bucket, tracker: MLflowTracker, model_name: str, alias: str) -> str | None:
    """Make MLflow's alias point at what the last entry of its log says.

    The stage of the same name goes along while the server has stages; the version that had it is
    archived.

    Returns:
        The version that the alias points at; None if the log is empty or its last entry names none.

    Raises:
        VerificationError: If the last entry can't be read.
        ServiceError: If a service can't be reached or refuses.
    """
    for _ in range(_TRIES):
        last = read_last(bucket, model_name, alias)
        if last is None:
            return None
        there = tracker.alias_target(model_name, alias)
        stage = STAGE_OF_ALIAS.get(alias)
        if there == last.version:
            # A move that failed between stage and alias, and was taken back.
            if there and stage and tracker.get_version(model_name, there).stage == "Archived":
                tracker.transition_model_stage(model_name, there, stage)
            return there
        if last.version is None:
            tracker.delete_alias(model_name, alias)
            continue
        if stage:
            tracker.transition_model_stage(model_name, last.version, stage)
            if there is not None and tracker.get_version(model_name, there).stage == stage:
                tracker.transition_model_stage(model_name, there, "Archived")
        tracker.set_alias(model_name, last.version, alias)
    raise RegistryError(
        f"the alias {alias} of {model_name} does not stay where its log says; does another "
        "program move it?"
    )


def point_alias(bucket: Bucket, tracker: MLflowTracker, target: AliasTarget, by: str) -> None:
    """Point an alias at a new version, in its log and then in MLflow.

    Args:
        bucket: Bucket with the log.
        tracker: The registry.
        target: The alias and the version.
        by: The run that it came from.

    Raises:
        VerificationError: If the last entry of the log can't be read.
        ServiceError: If a service can't be reached or refuses.
    """
    append_move(
        bucket,
        model_name=target.model_name,
        alias=target.alias,
        action="release",
        version=target.version,
        release=target.release,
        previous=tracker.alias_target(target.model_name, target.alias),
        by=by,
    )
    follow_log(bucket, tracker, target.model_name, target.alias)


def withdraw_alias(bucket: Bucket, tracker: MLflowTracker, target: AliasTarget) -> None:
    """Point an alias back at what it pointed at before, if it points at this version.

    Raises:
        PromotionError: If somebody moved it at the same moment.
        VerificationError: If the last entry of the log can't be read.
        ServiceError: If a service can't be reached or refuses.
    """
    last = read_last(bucket, target.model_name, target.alias)
    if last is not None and (last.version, last.release) == (target.version, target.release):
        append_move(
            bucket,
            model_name=target.model_name,
            alias=target.alias,
            action="withdraw",
            version=last.previous,
            release=None,
            previous=None,
            by=last.by,
            note="the release could not be completed",
            after=last.number,
        )
    follow_log(bucket, tracker, target.model_name, target.alias)


def read_last(bucket: Bucket, model_name: str, alias: str) -> Move | None:
    """The last move of an alias, or None.

    Raises:
        VerificationError: If it can't be read.
        StoreError: If the store fails.
    """
    return _last_entry(bucket, model_name, alias)[0]


def read_log(bucket: Bucket, model_name: str, alias: str) -> tuple[Move, ...]:
    """Every move of an alias, oldest first.

    Raises:
        VerificationError: If an entry can't be read, is missing, or was changed afterwards.
        StoreError: If the store fails.
    """
    moves: list[Move] = []
    follows = None
    for key in _keys(bucket, model_name, alias):
        text = bucket.read_bytes(key)
        move = _parse(text, bucket.uri(key))
        number = len(moves) + 1
        if (move.number, move.follows, key) != (number, follows, _key(model_name, alias, number)):
            raise VerificationError(
                f"{bucket.uri(key)} does not follow the entry before it: one was changed, "
                f"added or deleted; expected number {number} after {follows or 'none'}, found "
                f"number {move.number} after {move.follows or 'none'}"
            )
        moves.append(move)
        follows = hashlib.sha256(text).hexdigest()
    return tuple(moves)


def logged_aliases(bucket: Bucket, model_name: str) -> tuple[str, ...]:
    """The aliases of a model that have a log."""
    folder = f"{ALIASES}/{model_name}/"
    keys = bucket.list_keys(folder)
    return tuple(sorted({key.removeprefix(folder).split("/")[0] for key in keys}))


def _last_entry(bucket: Bucket, model_name: str, alias: str) -> tuple[Move | None, str | None]:
    keys = _keys(bucket, model_name, alias)
    if not keys:
        return None, None
    text = bucket.read_bytes(keys[-1])
    last = _parse(text, bucket.uri(keys[-1]))
    if _key(model_name, alias, last.number) != keys[-1]:
        raise VerificationError(
            f"{bucket.uri(keys[-1])} is entry {last.number} of another place; look who "
            "wrote it, and delete it"
        )
    return last, hashlib.sha256(text).hexdigest()


def _keys(bucket: Bucket, model_name: str, alias: str) -> tuple[str, ...]:
    found = bucket.list_keys(f"{ALIASES}/{model_name}/{alias}/")
    return tuple(key for key in found if re.fullmatch(r"\d{8}\.json", key.rpartition("/")[2]))


def _key(model_name: str, alias: str, number: int) -> str:
    return f"{ALIASES}/{model_name}/{alias}/{number:08d}.json"


def _parse(text: bytes, where: str) -> Move:
    try:
        return Move.model_validate_json(text)
    except ValidationError as error:
        raise VerificationError(
            f"{where} is no entry of an alias's log ({error.error_count()} fields are wrong); "
            "look who wrote it, and delete or restore it"
        ) from error
