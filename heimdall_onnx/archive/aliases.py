"""Where each alias points and pointed: an append-only log in the bucket, which MLflow follows.

MLflow moves an alias without asking what it pointed at, so of two that move it at once one is lost
without a word. Here each move is an object with the next number, written only if there is none of
that number: of two writers one gets the number, and the other has to look again. MLflow's alias is
then made to point at what the last entry says, by everyone who has written one.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

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


def _in_utc(time: str) -> str:
    # So written, times sort as text.
    if datetime.fromisoformat(time).replace(tzinfo=UTC).isoformat(timespec="seconds") != time:
        raise ValueError("expected a time such as 2026-11-20T14:30:00+00:00")
    return time


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
        time: When (UTC, ISO 8601 to the second), by the clock of who wrote it.
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
    time: Annotated[str, AfterValidator(_in_utc)]
    follows: str | None

    @property
    def by_reviewer(self) -> bool:
        """Whether a person has decided it; a release is moved by its gates."""
        return self.action in ("promote", "rollback")


class AliasLog:
    """The log of an alias of a registered model; each entry of it is read once.

    Args:
        bucket: Bucket of the releases.
        model_name: Registered model.
        alias: The alias.
        keys: The keys in its folder, where they have been listed already.
    """

    def __init__(
        self, bucket: Bucket, model_name: str, alias: str, keys: Iterable[str] | None = None
    ) -> None:
        self.model_name, self.alias = model_name, alias
        self._bucket, self._folder = bucket, f"{ALIASES}/{model_name}/{alias}/"
        # Entries never change: the move that each one says, and the SHA-256 of its text.
        self._entries: dict[str, tuple[Move, str]] = {}
        self._keys = None if keys is None else _entries(keys)

    @property
    def moves(self) -> tuple[Move, ...]:
        """Every move, oldest first.

        Raises:
            VerificationError: If an entry can't be read, is missing, or was changed afterwards.
            StoreError: If the store fails.
        """
        moves: list[Move] = []
        follows = None
        for key in self._listed():
            move, digest = self._entry(key)
            number = len(moves) + 1
            if (move.number, move.follows, key) != (number, follows, self._key(number)):
                raise VerificationError(
                    f"{self._bucket.uri(key)} does not follow the entry before it: one was "
                    f"changed, added or deleted; expected number {number} after "
                    f"{follows or 'none'}, found number {move.number} after "
                    f"{move.follows or 'none'}"
                )
            moves.append(move)
            follows = digest
        return tuple(moves)

    @property
    def last(self) -> Move | None:
        """The last move, or None.

        Raises:
            VerificationError: If it can't be read.
            StoreError: If the store fails.
        """
        return self._last()[0]

    def append(
        self,
        *,
        action: Literal["release", "promote", "rollback", "withdraw"],
        version: str | None,
        release: str | None,
        previous: str | None,
        by: str,
        note: str = "",
        after: int | None = None,
    ) -> Move:
        """Write the next entry; `follow` then makes MLflow follow it.

        Args:
            action: What moves the alias.
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
            last, follows = self._last()
            number = last.number if last else 0
            if after is not None and number != after:
                raise PromotionError(
                    f"the alias {self.alias} of {self.model_name} was moved meanwhile, by "
                    f"{last and last.by}; look at `heimdall-onnx history` and decide again"
                )
            move = Move(
                number=number + 1,
                model_name=self.model_name,
                alias=self.alias,
                action=action,
                version=version,
                release=release,
                previous=last.version if last else previous,
                by=by,
                note=note,
                time=datetime.now(UTC).isoformat(timespec="seconds"),
                follows=follows,
            )
            text, key = move.model_dump_json(indent=2).encode(), self._key(move.number)
            try:
                stored = self._bucket.upload_bytes(text, key, if_absent=True)
            except ObjectExistsError:
                self._keys = None
                continue
            except StoreError:
                self._keys = None  # it may be there for all that
                raise
            self._entries[key] = (move, stored.sha256)
            self._listed().append(key)
            log.info("alias move written", alias=self.alias, number=move.number, version=version)
            return move
        raise StoreError(
            f"could not move the alias {self.alias} of {self.model_name}: {_TRIES} others came "
            "first"
        )

    def follow(self, tracker: MLflowTracker) -> str | None:
        """Make MLflow's alias point at what the last entry says.

        The stage of the same name goes along while the server has stages; the version that had it
        is archived.

        Returns:
            The version that the alias points at; None if the log is empty or its last entry names
            none.

        Raises:
            VerificationError: If the last entry can't be read.
            ServiceError: If a service can't be reached or refuses.
        """
        name, alias, stage = self.model_name, self.alias, STAGE_OF_ALIAS.get(self.alias)
        for _ in range(_TRIES):
            # Whoever has written meanwhile may have moved the alias before.
            self._keys = None
            last = self.last
            if last is None:
                return None
            there = tracker.alias_target(name, alias)
            if there == last.version:
                # A move that failed between stage and alias, and was taken back.
                if there and stage and tracker.get_version(name, there).stage == "Archived":
                    tracker.transition_model_stage(name, there, stage)
                return there
            if last.version is None:
                tracker.delete_alias(name, alias)
            else:
                if stage:
                    tracker.transition_model_stage(name, last.version, stage)
                    if there is not None and tracker.get_version(name, there).stage == stage:
                        tracker.transition_model_stage(name, there, "Archived")
                tracker.set_alias(name, last.version, alias)
        raise RegistryError(
            f"the alias {alias} of {name} does not stay where its log says; does another program "
            "move it?"
        )

    def point(self, tracker: MLflowTracker, version: str, release: str, by: str) -> None:
        """Point the alias at a new version, in its log and then in MLflow.

        Args:
            tracker: The registry.
            version: The version.
            release: Its folder, ``s3://bucket/…``.
            by: The run that it came from.

        Raises:
            VerificationError: If the last entry of the log can't be read.
            ServiceError: If a service can't be reached or refuses.
        """
        previous = None if self.last else tracker.alias_target(self.model_name, self.alias)
        self.append(action="release", version=version, release=release, previous=previous, by=by)
        self.follow(tracker)

    def withdraw(self, tracker: MLflowTracker, version: str, release: str) -> None:
        """Point the alias back at what it pointed at before, if it points at this version.

        Raises:
            PromotionError: If somebody moved it at the same moment.
            VerificationError: If the last entry of the log can't be read.
            ServiceError: If a service can't be reached or refuses.
        """
        # Whoever has written meanwhile has the last word.
        self._keys = None
        last = self.last
        if last is not None and (last.version, last.release) == (version, release):
            self.append(
                action="withdraw",
                version=last.previous,
                release=None,
                previous=None,
                by=last.by,
                note="the release could not be completed",
                after=last.number,
            )
        self.follow(tracker)

    def _listed(self) -> list[str]:
        if self._keys is None:
            self._keys = _entries(self._bucket.list_keys(self._folder))
        return self._keys

    def _last(self) -> tuple[Move | None, str | None]:
        """The last move, and what the next one follows."""
        if not (keys := self._listed()):
            return None, None
        last, digest = self._entry(keys[-1])
        if self._key(last.number) != keys[-1]:
            raise VerificationError(
                f"{self._bucket.uri(keys[-1])} is entry {last.number} of another place; look who "
                "wrote it, and delete it"
            )
        return last, digest

    def _entry(self, key: str) -> tuple[Move, str]:
        if key not in self._entries:
            text = self._bucket.read_bytes(key)
            try:
                move = Move.model_validate_json(text)
            except ValidationError as error:
                raise VerificationError(
                    f"{self._bucket.uri(key)} is no entry of an alias's log "
                    f"({error.error_count()} fields are wrong); look who wrote it, and delete or "
                    "restore it"
                ) from error
            self._entries[key] = (move, hashlib.sha256(text).hexdigest())
        return self._entries[key]

    def _key(self, number: int) -> str:
        return f"{self._folder}{number:08d}.json"


def alias_logs(bucket: Bucket, model_name: str) -> dict[str, AliasLog]:
    """The logs of a model's aliases, by alias."""
    folder = f"{ALIASES}/{model_name}/"
    keys = defaultdict(list)
    for key in bucket.list_keys(folder):
        keys[key.removeprefix(folder).split("/")[0]].append(key)
    return {alias: AliasLog(bucket, model_name, alias, own) for alias, own in keys.items()}


def _entries(keys: Iterable[str]) -> list[str]:
    return [key for key in keys if re.fullmatch(r"\d{8}\.json", key.rpartition("/")[2])]
