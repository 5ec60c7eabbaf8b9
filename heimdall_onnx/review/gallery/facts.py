"""What a gallery shows of one release or failed run: read from its manifest and its report.

Both are untrusted, and anything that is read of them may be missing, since a notebook of one's own
may do without.
"""

from __future__ import annotations

import base64
import io
import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from heimdall_onnx.archive.manifest import REPORT, Manifest
from heimdall_onnx.archive.record import RECORD, ExecutedNotebook, Record, read_executed
from heimdall_onnx.common.errors import VerificationError
from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.common.text import shown
from heimdall_onnx.evidence.latency.statistics import Speedup
from heimdall_onnx.report.judge import Judgement, judge

log = get_logger(__name__)

# The cell of the release notebook whose figure stands for the whole parity.
PARITY_CELL = "parity-scatter"

_MAX_PIXELS = 40_000_000
# Twice what the page shows, for screens with small pixels.
_THUMBNAIL_WIDTH, _THUMBNAIL_QUALITY = 232, 40

State = Literal["pass", "smoke", "fail", "broken"]


class Frozen(BaseModel):
    """Read from a bucket, or kept there."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")


# More than any program is faster than another.
_FASTEST = 1e6
# More than any store holds.
_MAX_BYTES = 1 << 62


class Thumbnail(Frozen):
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


class Facts(Frozen):
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
    speedup: Speedup | None = None
    mean_error: float | None = None
    max_error: float | None = None
    median_error_m: float | None = None
    size_bytes: int | None = None
    recommended: str = ""
    recommended_bytes: int | None = None
    thumbnail: Thumbnail | None = None


def read_release(manifest: Manifest) -> Facts:
    """What the manifest of a release says; what was measured is not in it."""
    variants = manifest.said.variants
    smoke = "smoke" in manifest.said.verdict
    passed = manifest.said.verdict.startswith("pass")
    best = variants.passed.get(variants.recommended) if variants else None
    return Facts(
        version=manifest.version,
        state="smoke" if smoke and passed else "pass" if passed else "fail",
        smoke=smoke,
        model_name=shown(manifest.model_name),
        model_version=shown(manifest.model_version),
        commit=shown(manifest.said.environment.git_commit or "", 40),
        checkpoint=shown(manifest.said.checkpoint.file),
        size_bytes=min(_MAX_BYTES, sum(entry.size for entry in manifest.model_files.values())),
        recommended=best.name if best else "",
        recommended_bytes=min(_MAX_BYTES, best.size_bytes) if best else None,
    )


def read_failed(version: str, report: bytes) -> Facts:
    """What the report of a failed run says.

    Args:
        version: Its folder's name.
        report: The executed notebook.
    """
    try:
        notebook = read_executed(report, REPORT)
        given = _Papermill.model_validate(notebook.metadata.get("papermill", {})).parameters
    except (VerificationError, ValidationError):
        return Facts(version=version, state="broken", problem="its report can't be read")
    judged = judge(notebook, REPORT)
    facts = Facts(
        version=version,
        state="fail",
        smoke=given.profile == "smoke",
        model_name=shown(given.name),
        checkpoint=shown(given.checkpoint.rpartition("/")[2]),
        problem=shown(_problem(judged), 300),
    )
    return _with_measured(facts, notebook, judged)


def with_measured(facts: Facts, report: bytes) -> Facts:
    """The facts with what a report has measured, as far as that can be read."""
    try:
        notebook = read_executed(report, REPORT)
    except VerificationError:
        return facts
    return _with_measured(facts, notebook, judge(notebook, REPORT))


def _with_measured(facts: Facts, notebook: ExecutedNotebook, judged: Judgement) -> Facts:
    record = judged.record
    if record is None:
        if notebook.scrap(RECORD) is not None:
            log.warning("a record can't be read", version=facts.version, problem=judged.problem)
        return facts.model_copy(update={"thumbnail": _thumbnail(notebook)})
    outputs = record.parity.cells[0].outputs if record.parity.cells else ()
    return facts.model_copy(
        update={
            "speedup": _speedup(record, facts.version),
            "mean_error": max(
                (_far(one.mean / (one.atol or math.nan)) for one in outputs), default=None
            ),
            "max_error": max((_far(one.excess) for one in outputs), default=None),
            "median_error_m": record.metrics.get("error_onnx_median_m"),
            "thumbnail": _thumbnail(notebook),
        }
    )


def _speedup(record: Record, version: str) -> Speedup | None:
    found = record.latency.speedup if record.latency else None
    if found and not 0 <= found.low <= found.ratio <= found.high <= _FASTEST:
        log.warning("a speedup can't be", version=version, speedup=str(found))
        return None
    return found


def _far(error: float) -> float:
    """What can't be compared is as far away as can be."""
    return error if error >= 0 else math.inf


class _Given(Frozen):
    name: str = ""
    profile: str = ""
    checkpoint: str = ""


class _Papermill(Frozen):
    parameters: _Given = _Given()


def _problem(judged: Judgement) -> str:
    """Why a run failed, in words."""
    if judged.verdict is not None and not judged.verdict.passed:
        return judged.verdict.summary()
    if not judged.problem:
        return "the release was not completed"
    return ": ".join(filter(None, (judged.problem, judged.error_message)))


def _thumbnail(notebook: ExecutedNotebook) -> Thumbnail | None:
    """The figure of both models' outputs, small; None if there is none that can be read."""
    outputs = (o for cell in notebook.cells if cell.id == PARITY_CELL for o in cell.outputs)
    output = next((o for o in outputs if "image/png" in o.data), None)
    if output is None:
        return None
    described = output.metadata.get("image/png")
    alt = described.get("alt") if isinstance(described, dict) else None
    return shrink(str(output.data["image/png"]), alt if isinstance(alt, str) else "")


def shrink(png: str, alt: str) -> Thumbnail | None:
    """A picture as small as the page shows it.

    Args:
        png: PNG, base64; nothing about it is taken for granted.
        alt: What is to be seen in it.

    Returns:
        None if it can't be read, or is far larger or taller than a figure.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(base64.b64decode(png)), formats=["PNG"]) as picture:
            if picture.width * picture.height > _MAX_PIXELS or picture.height > 4 * picture.width:
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
