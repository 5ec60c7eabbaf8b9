"""What a gallery shows of every release and failed run of a folder, read from the bucket alone.

A release and a failed run never change, so what was made of one is kept in the bucket, under the
entity tags of the objects that it was made from, and the next call reads only what is new. What may
change, who decided on a release and which alias points at it, comes from the log of each alias,
whose entries never change either.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Generic, Literal, TypeVar

from pydantic import Field, ValidationError

from heimdall_onnx.archive.aliases import ALIASES, Move
from heimdall_onnx.archive.manifest import REPORT, REPORT_HTML, read_manifest
from heimdall_onnx.common.errors import MissingObjectError, StoreError, VerificationError
from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.common.text import shown
from heimdall_onnx.review.gallery.facts import (
    Facts,
    Frozen,
    read_failed,
    read_release,
    with_measured,
)
from heimdall_onnx.services.store import GALLERY, MANIFEST, Bucket

log = get_logger(__name__)

FAILED = "failed"
VERSION = r"v\d{8}_\d{6}"
# What is kept for the next call.
KEPT = f"{GALLERY}/rows.json"

_READERS = 8
_MAX_REPORT_BYTES = 64 << 20
_MAX_ENTRY_BYTES = 4 << 20

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """A release or a failed run as it is now.

    Attributes:
        facts: What never changes.
        failed: Whether it is a failed run, which has a report and nothing else.
        report: Where its rendered report is, relative to the folder of the releases; None if there
            is none.
        aliases: The aliases that point at it.
        decisions: The moves by which reviewers pointed them at it, oldest first.
    """

    facts: Facts
    failed: bool
    report: str | None
    aliases: tuple[str, ...] = ()
    decisions: tuple[Move, ...] = ()

    @property
    def created(self) -> datetime | None:
        """When it was uploaded, by its name; None if that is no time."""
        try:
            return datetime.strptime(self.facts.version, "v%Y%m%d_%H%M%S").replace(tzinfo=UTC)
        except ValueError:
            return None


@dataclass(frozen=True)
class Collected:
    """All there is in a folder of releases.

    Attributes:
        rows: Releases and failed runs, newest first.
        read: How many releases, failed runs and log entries had to be read; the others were kept
            from before.
    """

    rows: tuple[Row, ...]
    read: int


class _Made(Frozen, Generic[T]):
    """What was made of objects that had these entity tags."""

    tags: str
    made: T


class _Kept(Frozen):
    """What is kept for the next call; releases and failed runs by folder, the rest by key."""

    form: Literal[3] = 3
    facts: dict[str, _Made[Facts]] = Field(default_factory=dict)
    moves: dict[str, _Made[Move]] = Field(default_factory=dict)


def collect_rows(bucket: Bucket, prefix: str) -> Collected:
    """Every release and failed run of a folder, with who decided on it.

    What is read is kept in ``PREFIX/gallery/rows.json``, where that may be written.

    Args:
        bucket: Bucket of the releases, which must exist.
        prefix: Folder of the releases in it.

    Raises:
        StoreError: If the store can't be reached or refuses to be read.
    """
    place = _Place(bucket, prefix.strip("/"))
    kept = place.read_kept()
    facts = place.each("releases and failed runs", kept.facts, place.folders(), place.facts_of)
    models = {one.made.model_name for one in facts.values()}
    moves = place.each("alias moves", kept.moves, place.log_entries(models), place.move_of)
    sound = {key: one for key, one in facts.items() if one.made.state != "broken"}
    now = _Kept(facts=sound, moves=moves)
    if now != kept:
        place.write_kept(now)
    rows = _rows(
        place,
        {folder: one.made for folder, one in facts.items()},
        sorted((one.made for one in moves.values()), key=lambda move: move.number),
    )
    newest_first = sorted(rows, key=lambda row: (row.facts.version, not row.failed), reverse=True)
    return Collected(tuple(newest_first), place.read)


def _rows(place: _Place, facts: Mapping[str, Facts], moves: Sequence[Move]) -> Iterator[Row]:
    pointed: dict[str | None, list[str]] = {}
    for (_, alias), move in sorted({(m.model_name, m.alias): m for m in moves}.items()):
        pointed.setdefault(move.release, []).append(shown(alias))
    decided: dict[str | None, list[Move]] = {}
    for move in sorted(moves, key=lambda move: move.time):
        if move.by_reviewer:
            decided.setdefault(move.release, []).append(move)
    for folder, found in facts.items():
        release = place.bucket.uri(f"{place.prefix}/{folder}")
        yield Row(
            facts=found,
            failed=folder.startswith(f"{FAILED}/"),
            report=f"{folder}/{REPORT_HTML}" if f"{folder}/{REPORT_HTML}" in place.listed else None,
            aliases=tuple(pointed.get(release, ())),
            decisions=tuple(decided.get(release, ())),
        )


class _Place:
    """A folder of releases, listed once; names of objects are relative to it."""

    def __init__(self, bucket: Bucket, prefix: str) -> None:
        self.bucket, self.prefix = bucket, prefix
        self.read = 0
        listed = bucket.list_objects(f"{prefix}/")
        self.listed = {key.removeprefix(f"{prefix}/"): one for key, one in listed.items()}

    def folders(self) -> dict[str, str]:
        """Releases and failed runs, each with the tags of what its facts are read from."""
        found = {}
        for path, one in self.listed.items():
            folder, _, name = path.rpartition("/")
            if (name == MANIFEST and re.fullmatch(VERSION, folder)) or (
                name == REPORT and re.fullmatch(f"{FAILED}/{VERSION}", folder)
            ):
                both = (self.listed.get(f"{folder}/{own}") for own in (MANIFEST, REPORT))
                tags = " ".join(own.tag if own else "" for own in both)
                found[folder] = tags if one.tag else ""
        return found

    def log_entries(self, models: Collection[str]) -> dict[str, str]:
        """The entries of the logs of these models' aliases, by key."""
        pattern = re.compile(rf"{ALIASES}/([^/]+)/[^/]+/\d{{8}}\.json")
        return {
            key: one.tag
            for key, one in self.bucket.list_objects(f"{ALIASES}/").items()
            if (match := pattern.fullmatch(key)) and match[1] in models
        }

    def each(
        self,
        what: str,
        kept: Mapping[str, _Made[T]],
        there: Mapping[str, str],
        make: Callable[[str], T | None],
    ) -> dict[str, _Made[T]]:
        """What there is, made anew where it was not kept or its objects are others by now."""
        # Without a tag nobody can tell.
        same = {n: one for n, one in kept.items() if one.tags and there.get(n) == one.tags}
        new = sorted(there.keys() - same.keys())
        self.read += len(new)
        if new:
            log.info("reading", what=what, count=len(new))
        with ThreadPoolExecutor(_READERS) as readers:
            made = list(readers.map(make, new))
        return same | {
            name: _Made(tags=there[name], made=one)
            for name, one in zip(new, made, strict=True)
            if one is not None
        }

    def facts_of(self, folder: str) -> Facts | None:
        """The facts of a release or failed run; None if a release was taken back meanwhile."""
        version = folder.rpartition("/")[2]
        if folder.startswith(f"{FAILED}/"):
            if (text := self._report(folder)) is not None:
                return read_failed(version, text)
            return Facts(version=version, state="broken", problem=f"its {REPORT} is too large")
        try:
            manifest = read_manifest(self.bucket, f"{self.prefix}/{folder}")
        except VerificationError as error:
            if isinstance(error.__cause__, MissingObjectError):
                return None
            return Facts(version=version, state="broken", problem=shown(str(error), 300))
        facts = read_release(manifest)
        report, text = manifest.objects.get(REPORT), self._report(folder)
        if report is None or text is None:
            problem = f"its {REPORT} is missing or too large"
        elif hashlib.sha256(text).hexdigest() != report.sha256:
            problem = f"its {REPORT} is not what was released"
        else:
            return with_measured(facts, text)
        return facts.model_copy(update={"state": "broken", "problem": problem})

    def _report(self, folder: str) -> bytes | None:
        """The executed notebook; None if there is none of a size that can be."""
        name = f"{folder}/{REPORT}"
        if name not in self.listed or self.listed[name].size > _MAX_REPORT_BYTES:
            return None
        return self.bucket.read_bytes(f"{self.prefix}/{name}")

    def move_of(self, key: str) -> Move | None:
        """An entry of an alias's log; None if it can't be read or belongs elsewhere."""
        try:
            move = Move.model_validate_json(self.bucket.read_bytes(key, limit=_MAX_ENTRY_BYTES))
        except ValidationError as error:
            log.warning("left out, it can't be read", key=shown(key), problems=error.error_count())
            return None
        if key.split("/")[1:3] == [move.model_name, move.alias]:
            return move
        log.warning("left out, it is an entry of another log", key=shown(key))
        return None

    def read_kept(self) -> _Kept:
        """What was kept last time; nothing if there is none, or of another form."""
        if KEPT not in self.listed:
            return _Kept()
        try:
            text = self.bucket.read_bytes(f"{self.prefix}/{KEPT}")
            return _Kept.model_validate_json(text)
        except ValidationError:
            return _Kept()

    def write_kept(self, kept: _Kept) -> None:
        """Keep it for the next call, where that is allowed."""
        text = kept.model_dump_json().encode()
        key = f"{self.prefix}/{KEPT}"
        try:
            self.bucket.upload_bytes(text, key)
        except StoreError as error:
            log.warning("not kept, the next gallery reads all again", reason=str(error))
