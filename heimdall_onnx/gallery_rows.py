"""What a gallery shows of every release and failed run of a folder, read from the bucket alone.

A release and a failed run never change, so what was made of one is kept in the bucket, under the
entity tags of the objects that it was made from, and the next call reads only what is new. What may
change, who decided on a release and which alias points at it, comes from the review records and the
log of each alias, each of which is an object that never changes either.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from heimdall_onnx.aliases import ALIASES, Move
from heimdall_onnx.errors import StoreError, VerificationError
from heimdall_onnx.logs import get_logger
from heimdall_onnx.manifest import (
    MAX_MANIFEST_BYTES,
    REPORT,
    REPORT_HTML,
    REVIEWS,
    Manifest,
    parse_manifest,
)
from heimdall_onnx.report import RECORD, judge_cells
from heimdall_onnx.store import (
    GALLERY,
    MANIFEST,
    exists,
    format_uri,
    list_tagged,
    read_bytes,
    upload_bytes,
)
from heimdall_onnx.untrusted import shown

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

log = get_logger(__name__)

FAILED = "failed"
VERSION = r"v\d{8}_\d{6}"
# What is kept for the next call.
KEPT = f"{GALLERY}/rows.json"
# The cell of the release notebook whose figure stands for the whole parity.
PARITY_CELL = "parity-scatter"

_READERS = 8
_MAX_REPORT_BYTES = 64 << 20
_MAX_RECORD_BYTES = 4 << 20
_MAX_PIXELS = 40_000_000
# Twice what the page shows, for screens with small pixels.
_THUMBNAIL_WIDTH, _THUMBNAIL_QUALITY = 232, 40
_SCRAP = "application/scrapbook.scrap.json+json"

T = TypeVar("T")
_Model = TypeVar("_Model", bound=BaseModel)
State = Literal["pass", "smoke", "fail", "broken"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")


class Interval(_Frozen):
    """A ratio with its confidence interval.

    Attributes:
        ratio: The ratio.
        low: Lower end.
        high: Upper end.
    """

    ratio: Annotated[float, Field(allow_inf_nan=False)]
    low: Annotated[float, Field(allow_inf_nan=False)]
    high: Annotated[float, Field(allow_inf_nan=False)]


class Thumbnail(_Frozen):
    """A small picture.

    Attributes:
        webp: WebP, base64.
        width: Pixels.
        height: Pixels.
        alt: What is to be seen in it.
    """

    webp: Annotated[str, Field(pattern="^[A-Za-z0-9+/=]+$")]
    width: int
    height: int
    alt: str


class Facts(_Frozen):
    """What stays the same of a release or failed run; text in it is on one line, and visible.

    Attributes:
        version: Its folder's name, ``vYYYYMMDD_HHMMSS``.
        state: How it was judged; ``"smoke"`` is a test run that passed, ``"broken"`` a release
            whose manifest can't be read or whose report is another one by now.
        smoke: Whether it is a test run, however it ended.
        model_name: Registered model; empty where that can't be known.
        model_version: Its version in the registry; empty for none.
        problem: Why it failed or is broken; empty if all is well.
        commit: Git commit of the code.
        checkpoint: Name of the checkpoint's file.
        speedup: PyTorch's latency over ONNX Runtime's; None if it was not measured.
        mean_error: Largest mean absolute error of an output over the evaluation data, in units of
            the tolerance.
        max_error: Largest error of an element over the evaluation data, in units of what is
            allowed there; may be infinite.
        median_error_m: Median distance of the ONNX model's positions from the true ones, metres;
            None without labels.
        size_bytes: The model's files together.
        recommended: The variant to use; empty for the model itself.
        recommended_bytes: Its file.
        thumbnail: Both models' outputs against each other.
    """

    version: str
    state: State
    smoke: bool = False
    model_name: str = ""
    model_version: str = ""
    problem: str = ""
    commit: str = ""
    checkpoint: str = ""
    speedup: Interval | None = None
    mean_error: float | None = None
    max_error: float | None = None
    median_error_m: float | None = None
    size_bytes: int | None = None
    recommended: str = ""
    recommended_bytes: int | None = None
    thumbnail: Thumbnail | None = None


class Decision(_Frozen):
    """That a reviewer has pointed an alias at a release.

    Attributes:
        action: How.
        alias: The alias.
        reviewer: Who.
        note: Why.
        time: When (UTC, ISO 8601).
    """

    action: Literal["promote", "rollback"]
    alias: str
    reviewer: str
    note: str
    time: str


@dataclass(frozen=True)
class Row:
    """A release or a failed run as it is now.

    Attributes:
        facts: What never changes.
        failed: Whether it is a failed run, which has a report and nothing else.
        report: Where its rendered report is, relative to the folder of the releases; None if there
            is none.
        aliases: The aliases that point at it.
        decisions: Who pointed them at it, oldest first.
    """

    facts: Facts
    failed: bool
    report: str | None
    aliases: tuple[str, ...] = ()
    decisions: tuple[Decision, ...] = ()

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
        read: How many releases, failed runs, review records and log entries had to be read; the
            others were kept from before.
    """

    rows: tuple[Row, ...]
    read: int


class _Review(_Frozen):
    """What is relied on in a review record."""

    action: Literal["promote", "rollback"]
    alias: str
    release: str
    reviewer: str
    note: str
    time: str


class _Made(_Frozen, Generic[T]):
    """What was made of objects that had these entity tags."""

    tags: str
    made: T


class _Kept(_Frozen):
    """What is kept for the next call; releases and failed runs by folder, the rest by key."""

    form: Literal[1] = 1
    facts: dict[str, _Made[Facts]] = {}
    reviews: dict[str, _Made[_Review]] = {}
    moves: dict[str, _Made[Move]] = {}


def collect_rows(client: S3Client, bucket: str, prefix: str) -> Collected:
    """Every release and failed run of a folder, with who decided on it.

    What is read is kept in ``PREFIX/gallery/rows.json``, where that may be written.

    Args:
        client: Client of the store.
        bucket: Bucket of the releases, which must exist.
        prefix: Folder of the releases in it.

    Raises:
        StoreError: If the store can't be reached or refuses to be read.
    """
    place = _Place(client, bucket, prefix.strip("/"))
    kept = place.read_kept()
    facts = place.each("releases and failed runs", kept.facts, place.folders(), place.facts_of)
    reviews = place.each("review records", kept.reviews, place.reviews(), place.review_of)
    models = {one.made.model_name for one in facts.values()}
    moves = place.each("alias moves", kept.moves, place.log_entries(models), place.move_of)
    sound = {key: one for key, one in facts.items() if one.made.state != "broken"}
    now = _Kept(facts=sound, reviews=reviews, moves=moves)
    if now != kept:
        place.write_kept(now)
    rows = _rows(
        place,
        {folder: one.made for folder, one in facts.items()},
        [one.made for one in reviews.values()],
        sorted((one.made for one in moves.values()), key=lambda move: move.number),
    )
    newest_first = sorted(rows, key=lambda row: (row.facts.version, not row.failed), reverse=True)
    return Collected(tuple(newest_first), place.read)


def _rows(
    place: _Place, facts: Mapping[str, Facts], reviews: Iterable[_Review], moves: Sequence[Move]
) -> Iterator[Row]:
    pointed: dict[str | None, list[str]] = {}
    for (_, alias), move in sorted({(m.model_name, m.alias): m for m in moves}.items()):
        pointed.setdefault(move.release, []).append(shown(alias))
    # Of two reviewers who decide at once only one has decided: the one whose move is in the log.
    completed = {(m.release, m.action, m.alias, m.by, m.note) for m in moves}
    decided: dict[str, list[Decision]] = {}
    for one in reviews:
        if (one.release, one.action, one.alias, one.reviewer, one.note) in completed:
            decided.setdefault(one.release, []).append(
                Decision(
                    action=one.action,
                    alias=shown(one.alias),
                    reviewer=shown(one.reviewer),
                    note=shown(one.note, 300),
                    time=shown(one.time, 40),
                )
            )
    for folder, found in facts.items():
        release = format_uri(place.bucket, f"{place.prefix}/{folder}")
        yield Row(
            facts=found,
            failed=folder.startswith(f"{FAILED}/"),
            report=f"{folder}/{REPORT_HTML}" if place.has(f"{folder}/{REPORT_HTML}") else None,
            aliases=tuple(pointed.get(release, ())),
            decisions=tuple(sorted(decided.get(release, ()), key=lambda one: one.time)),
        )


class _Place:
    """A folder of releases, listed once; names of objects are relative to it."""

    def __init__(self, client: S3Client, bucket: str, prefix: str) -> None:
        self.client, self.bucket, self.prefix = client, bucket, prefix
        self.read = 0
        self._listed = list_tagged(client, bucket, f"{prefix}/")

    def has(self, name: str) -> bool:
        """Whether there is such an object."""
        return f"{self.prefix}/{name}" in self._listed

    def _tag(self, name: str) -> str:
        return self._listed.get(f"{self.prefix}/{name}", (0, ""))[1]

    def _size(self, name: str) -> int:
        return self._listed[f"{self.prefix}/{name}"][0]

    def folders(self) -> dict[str, str]:
        """Releases and failed runs, each with the tags of what its facts are read from."""
        found = {}
        for key in self._listed:
            folder, _, name = key.removeprefix(f"{self.prefix}/").rpartition("/")
            if (name == MANIFEST and re.fullmatch(VERSION, folder)) or (
                name == REPORT and re.fullmatch(f"{FAILED}/{VERSION}", folder)
            ):
                tags = [self._tag(f"{folder}/{own}") for own in (MANIFEST, REPORT)]
                found[folder] = " ".join(tags) if tags[0 if name == MANIFEST else 1] else ""
        return found

    def reviews(self) -> dict[str, str]:
        """The review records of releases."""
        pattern = re.compile(rf"{VERSION}/{REVIEWS}/[^/]+\.json")
        names = (key.removeprefix(f"{self.prefix}/") for key in self._listed)
        return {name: self._tag(name) for name in names if pattern.fullmatch(name)}

    def log_entries(self, models: Collection[str]) -> dict[str, str]:
        """The entries of the logs of these models' aliases, by key."""
        listed = list_tagged(self.client, self.bucket, f"{ALIASES}/")
        pattern = re.compile(rf"{ALIASES}/([^/]+)/[^/]+/\d{{8}}\.json")
        return {
            key: tag
            for key, (_, tag) in listed.items()
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
            return self._failed(folder, version)
        try:
            manifest = self._manifest(folder)
        except VerificationError as error:
            return Facts(version=version, state="broken", problem=shown(str(error), 300))
        if manifest is None:
            return None
        facts = _released(manifest)
        report = manifest.objects.get(REPORT)
        text = self._report(folder)
        if report is None or text is None:
            problem = f"its {REPORT} is missing or too large"
        elif hashlib.sha256(text).hexdigest() != report.sha256:
            problem = f"its {REPORT} is not what was released"
        else:
            return _with_measured(facts, _read_notebook(text))
        return facts.model_copy(update={"state": "broken", "problem": problem})

    def _manifest(self, folder: str) -> Manifest | None:
        """The manifest of a folder; None if it is not there any more."""
        key = f"{self.prefix}/{folder}/{MANIFEST}"
        if (size := self._size(f"{folder}/{MANIFEST}")) > MAX_MANIFEST_BYTES:
            raise VerificationError(f"expected at most {MAX_MANIFEST_BYTES} bytes, found {size}")
        try:
            text = read_bytes(self.client, self.bucket, key)
        except StoreError:
            if exists(self.client, self.bucket, key):
                raise
            return None
        return parse_manifest(text, format_uri(self.bucket, f"{self.prefix}/{folder}"))

    def _failed(self, folder: str, version: str) -> Facts:
        text = self._report(folder)
        notebook = None if text is None else _read_notebook(text)
        if notebook is None:
            return Facts(version=version, state="broken", problem="its report can't be read")
        given = notebook.metadata.papermill.parameters
        facts = Facts(
            version=version,
            state="fail",
            smoke=given.profile == "smoke",
            model_name=shown(given.name),
            checkpoint=shown(given.checkpoint.rpartition("/")[2]),
            problem=shown(notebook.problem(), 300),
        )
        return _with_measured(facts, notebook)

    def _report(self, folder: str) -> bytes | None:
        """The executed notebook; None if there is none of a size that can be."""
        name = f"{folder}/{REPORT}"
        if not self.has(name) or self._size(name) > _MAX_REPORT_BYTES:
            return None
        return read_bytes(self.client, self.bucket, f"{self.prefix}/{name}")

    def review_of(self, name: str) -> _Review | None:
        """A review record; None if it can't be read."""
        return self._parsed(_Review, f"{self.prefix}/{name}")

    def move_of(self, key: str) -> Move | None:
        """An entry of an alias's log; None if it can't be read."""
        return self._parsed(Move, key)

    def _parsed(self, model: type[_Model], key: str) -> _Model | None:
        text = read_bytes(self.client, self.bucket, key, limit=_MAX_RECORD_BYTES)
        try:
            return model.model_validate_json(text)
        except ValidationError as error:
            log.warning("left out, it can't be read", key=key, problems=error.error_count())
            return None

    def read_kept(self) -> _Kept:
        """What was kept last time; nothing if there is none, or of another form."""
        if not self.has(KEPT):
            return _Kept()
        try:
            text = read_bytes(self.client, self.bucket, f"{self.prefix}/{KEPT}")
            return _Kept.model_validate_json(text)
        except ValidationError:
            return _Kept()

    def write_kept(self, kept: _Kept) -> None:
        """Keep it for the next call, where that is allowed."""
        text = kept.model_dump_json().encode()
        key = f"{self.prefix}/{KEPT}"
        try:
            upload_bytes(self.client, text, self.bucket, key, content_type="application/json")
        except StoreError as error:
            log.warning("not kept, the next gallery reads all again", reason=str(error))


def _released(manifest: Manifest) -> Facts:
    """What the manifest says."""
    variants, told = manifest.variants, _Told.model_validate(manifest.data)
    smoke = "smoke" in manifest.verdict
    passed = manifest.verdict.startswith("pass")
    best = variants.passed.get(variants.recommended) if variants else None
    return Facts(
        version=manifest.version,
        state="smoke" if smoke and passed else "pass" if passed else "fail",
        smoke=smoke,
        model_name=shown(manifest.model_name),
        model_version=shown(manifest.model_version),
        commit=shown(told.git.commit or "", 40),
        checkpoint=shown(told.checkpoint.file),
        size_bytes=sum(entry.size for entry in manifest.model_files.values()),
        recommended=best.name if best else "",
        recommended_bytes=best.size_bytes if best else None,
    )


def _with_measured(facts: Facts, notebook: _Notebook | None) -> Facts:
    """The facts with what the report has measured, as far as that can be read."""
    if notebook is None:
        return facts
    record = notebook.record
    cell = next(iter(record.parity.cells), None) if record.parity else None
    outputs = cell.outputs if cell else []
    tolerance = record.parity.tolerance if record.parity else math.nan
    return facts.model_copy(
        update={
            "speedup": record.latency and record.latency.speedup,
            "mean_error": max((one.mean / tolerance for one in outputs), default=None),
            "max_error": max((one.excess for one in outputs), default=None),
            "median_error_m": record.metrics.get("error_onnx_median_m"),
            "thumbnail": notebook.thumbnail(),
        }
    )


# What is relied on of a manifest and of an executed notebook, both untrusted; anything of it may be
# missing, since notebooks of one's own may do without.


class _Git(_Frozen):
    commit: str | None = None


class _Checkpoint(_Frozen):
    file: str = ""


class _Told(_Frozen):
    git: _Git = _Git()
    checkpoint: _Checkpoint = _Checkpoint()


# What can't be compared is as far away as can be.
_Error = Annotated[float, AfterValidator(lambda value: value if value >= 0 else math.inf)]


class _Output(_Frozen):
    mean: _Error
    excess: _Error


class _Cell(_Frozen):
    outputs: list[_Output] = []


class _Parity(_Frozen):
    tolerance: Annotated[float, Field(gt=0)]
    cells: list[_Cell] = []


class _Latency(_Frozen):
    speedup: Interval


class _Gate(_Frozen):
    name: str
    limit: str
    measured: float | int | str
    passed: bool
    detail: str = ""


class _Record(_Frozen):
    profile: str = ""
    gates: list[_Gate] = []
    metrics: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = {}
    parity: _Parity | None = None
    latency: _Latency | None = None


class _CellOutput(_Frozen):
    output_type: str = ""
    data: dict[str, Any] = {}
    metadata: dict[str, Any] = {}
    ename: str = ""
    evalue: str = ""


class _NotebookCell(_Frozen):
    id: str = ""
    cell_type: str = ""
    source: Annotated[str, BeforeValidator(lambda v: "".join(v) if isinstance(v, list) else v)] = ""
    execution_count: int | None = None
    outputs: list[_CellOutput] = []


class _Given(_Frozen):
    name: str = ""
    profile: str = ""
    checkpoint: str = ""


class _Papermill(_Frozen):
    parameters: _Given = _Given()


class _Metadata(_Frozen):
    papermill: _Papermill = _Papermill()


class _Notebook(_Frozen):
    """An executed notebook. nbformat's own validation of one takes as long as reading ten so."""

    cells: list[_NotebookCell] = []
    metadata: _Metadata = _Metadata()

    @cached_property
    def record(self) -> _Record:
        """What `report.record_results` kept in it; nothing if that can't be read."""
        scraps = (o.data.get(_SCRAP) for cell in self.cells for o in cell.outputs)
        found = [s for s in scraps if isinstance(s, dict) and s.get("name") == RECORD]
        try:
            return _Record.model_validate(found[-1].get("data", {}) if found else {})
        except ValidationError as error:
            log.warning("a record can't be read", problems=error.error_count())
            return _Record()

    def problem(self) -> str:
        """Why it failed, in words."""
        code = [c for c in self.cells if c.cell_type == "code" and c.source.strip()]
        recorded = self.record.model_dump(include={"gates", "profile"}) if self.record.gates else {}
        judged = judge_cells(code, recorded)
        if judged.verdict is not None and not judged.verdict.passed:
            return judged.verdict.summary()
        if not judged.problem:
            return "the release was not completed"
        return ": ".join(filter(None, (judged.problem, judged.error_message)))

    def thumbnail(self) -> Thumbnail | None:
        """The figure of both models' outputs, small; None if there is none that can be read."""
        outputs = (o for cell in self.cells if cell.id == PARITY_CELL for o in cell.outputs)
        output = next((o for o in outputs if "image/png" in o.data), None)
        if output is None:
            return None
        described = output.metadata.get("image/png")
        alt = described.get("alt") if isinstance(described, dict) else None
        return shrink(str(output.data["image/png"]), alt if isinstance(alt, str) else "")


def _read_notebook(text: bytes) -> _Notebook | None:
    try:
        return _Notebook.model_validate_json(text)
    except ValidationError:
        return None


def shrink(png: str, alt: str) -> Thumbnail | None:
    """A picture as small as the page shows it.

    Args:
        png: PNG, base64; nothing about it is taken for granted.
        alt: What is to be seen in it.

    Returns:
        None if it can't be read, or is far larger than a figure.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(base64.b64decode(png)), formats=["PNG"]) as picture:
            if picture.width * picture.height > _MAX_PIXELS:
                return None
            size = _THUMBNAIL_WIDTH, max(1, _THUMBNAIL_WIDTH * picture.height // picture.width)
            small = picture.convert("RGBA").resize(size, Image.Resampling.BOX, reducing_gap=2.0)
    except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        log.warning("a figure can't be read", reason=shown(str(error)))
        return None
    # Where a figure shows nothing, the page's colour would make its black text vanish.
    opaque = Image.new("RGB", size, "white")
    opaque.paste(small, mask=small)
    made = io.BytesIO()
    opaque.save(made, "WEBP", quality=_THUMBNAIL_QUALITY)
    return Thumbnail(
        webp=base64.b64encode(made.getvalue()).decode("ascii"),
        width=size[0],
        height=size[1],
        alt=shown(alt, 240),
    )
