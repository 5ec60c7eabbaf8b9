"""Does a release come out again: its notebook run once more on what the store has kept.

The model and its variants must be the same to the last byte and their accuracy to the last digit
where the same versions run on the same processor. Elsewhere the model must be within the tolerances
of the gates; variants are other ones there. Latency is a matter of the machine and its mood: one
that does not fit is flagged, and no failure.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heimdall_onnx.archive.content import fetch_content, fetch_dataset
from heimdall_onnx.archive.manifest import REPORT
from heimdall_onnx.archive.record import Record, read_notebook
from heimdall_onnx.archive.release import Release
from heimdall_onnx.archive.verify import require_verified, verify_release
from heimdall_onnx.common.errors import (
    GateError,
    NotebookError,
    SettingsError,
    VerificationError,
)
from heimdall_onnx.common.files import hash_file
from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.common.parameters import (
    MODEL,
    VARIANTS_FOLDER,
    ReleaseParameters,
    check_parameters,
)
from heimdall_onnx.common.signals import first_signal_interrupts
from heimdall_onnx.common.templates import render
from heimdall_onnx.common.text import shown
from heimdall_onnx.model.onnx.diff import describe_differences
from heimdall_onnx.model.signature_file import signature_path
from heimdall_onnx.report.kernels import started_kernel
from heimdall_onnx.report.notebook import error_of, execute_notebook
from heimdall_onnx.report.page import VERDICT
from heimdall_onnx.report.workspace import new_run_folder
from heimdall_onnx.review.reproduce.figures import (
    Comparison,
    Difference,
    Figure,
    compare_accuracy,
    compare_latency,
    compare_recorded_variants,
    environment_differences,
)

if TYPE_CHECKING:
    from heimdall_onnx.services.settings import Settings

log = get_logger(__name__)

_NOTEBOOK, _RECORDED = "notebook.ipynb", "recorded"
# The notebook publishes nothing this time, so its kernel gets no credentials.
_CREDENTIALS = ("AWS_", "HEIMDALL_SIGNING_", "MLFLOW_S3_", "MLFLOW_TRACKING_", "MLFLOW_REGISTRY_")
# What is shown even where it is as recorded, and how many failures an error names.
_MAIN = (", mean (all ", ", maximum (all ", "localization error", "speedup", ", status")
_SHOWN = 12
_TEXT = Path(__file__).with_name("reproduction.txt.j2")


@dataclass(frozen=True)
class ModelComparison:
    """The exported model beside the recorded one.

    Attributes:
        identical: Whether all its files are the same to the last byte.
        recorded_sha256: SHA-256 of the recorded ``model.onnx``.
        found_sha256: SHA-256 of the one exported here.
        differences: Where they depart, in words; empty where they are identical.
    """

    identical: bool
    recorded_sha256: str
    found_sha256: str
    differences: tuple[str, ...]


@dataclass(frozen=True)
class Reproduction:
    """What came out when a release was made again.

    Attributes:
        folder_uri: The release, ``s3://bucket/prefix/version``.
        exact: Whether the figures must be the same, since nothing differs that they come from:
            processor, threads, Python and the numerical packages.
        model: The model.
        accuracy: Gates, parity statistics and localization errors.
        variants: What each variant is and how good its answers are; empty without variants.
        latency: Latency and speedup; empty where the release has not measured them.
        environment: What differs between the two environments.
        report: The notebook executed here.
    """

    folder_uri: str
    exact: bool
    model: ModelComparison
    accuracy: tuple[Comparison, ...]
    variants: tuple[Comparison, ...]
    latency: tuple[Comparison, ...]
    environment: tuple[Difference, ...]
    report: Path

    @property
    def failures(self) -> tuple[str, ...]:
        """Why the release does not reproduce; empty if it does."""
        model = () if self.model.identical or not self.exact else self.model.differences
        return (
            *(f"{MODEL}: {difference}" for difference in model),
            *(_in_words(c) for c in (*self.accuracy, *self.variants) if c.judgement == "differs"),
        )

    @property
    def reproduced(self) -> bool:
        """Whether model, variants and accuracy are what the release says."""
        return not self.failures

    def require(self) -> None:
        """Return if the release reproduces.

        Raises:
            VerificationError: With the `failures`.
        """
        if not self.reproduced:
            first = self.failures[:_SHOWN]
            more = len(self.failures) - len(first)
            raise VerificationError(
                f"{self.folder_uri} does not reproduce; differences: {len(self.failures)}\n  - "
                + "\n  - ".join((*first, *([f"and {more} more"] if more else [])))
            )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable copy."""
        return {**asdict(self), "reproduced": self.reproduced, "report": str(self.report)}

    def to_text(self) -> str:
        """What a person wants to know of it."""
        return render(
            _TEXT,
            {"short": _short, "counted": _counted, "main": _is_main},
            **vars(self),
            reproduced=self.reproduced,
        )


def reproduce_release(
    release: Release,
    *,
    cell_timeout: int | None = None,
    progress: bool = False,
) -> Reproduction:
    """Run a release's own notebook again, on its checkpoint and data, and compare what comes out.

    The release is verified first, since the code in its notebook is about to run. Nothing is
    published, and the kernel gets none of this process's credentials. That a release does not
    reproduce is a result, not an error; `Reproduction.require` makes it one.

    Args:
        release: The release.
        cell_timeout: Seconds that one cell may take.
        progress: Show a progress bar by cell on standard error.

    Raises:
        VerificationError: If the release does not verify, or the store has not kept what is needed
            to make it again.
        HeimdallError: As the notebook raised it, if it does not run here, e.g. because the model's
            class can't be imported.
        ServiceError: If a service can't be reached or refuses.
        KeyboardInterrupt: On Ctrl-C or SIGTERM.
    """
    manifest, settings = release.manifest, release.connection.settings
    require_verified(verify_release(release), release.uri)
    folder = new_run_folder(settings)
    with first_signal_interrupts(), _emptied(folder):
        recorded = _fetch_notebook(release, folder)
        parameters = _fetch_inputs(release, folder)
        with started_kernel(_without_credentials(settings)) as kernel:
            judgement = execute_notebook(
                folder / _NOTEBOOK,
                folder / REPORT,
                parameters,
                kernel,
                cell_timeout=cell_timeout,
                progress=progress,
            )
        # A gate that fails here is one of the figures.
        if judgement.problem and judgement.error_name != GateError.__name__:
            error = error_of(judgement)
            raise type(error)(
                f"the notebook of {manifest.uri} does not run here, so nothing can be said of it. "
                "It needs the model's class and whatever else it imports as it had them: "
                f"{error}"
            )
        if (found := judgement.record) is None:
            raise VerificationError(
                f"the repetition of {manifest.uri} has recorded nothing to hold against it"
            )
        differences = environment_differences(recorded, found)
        exact = not any(difference.numerical for difference in differences)
        result = Reproduction(
            folder_uri=manifest.uri,
            exact=exact,
            model=_compare_model(release, parameters.onnx_path),
            accuracy=compare_accuracy(recorded, found, exact=exact),
            variants=compare_recorded_variants(recorded, found, exact=exact),
            latency=compare_latency(recorded, found),
            environment=differences,
            report=folder / REPORT,
        )
    log.info("reproduced", release=manifest.uri, reproduced=result.reproduced, exact=exact)
    return result


@contextmanager
def _emptied(folder: Path) -> Iterator[None]:
    """Make the folder, and leave in it what is small, and a model that differs."""
    recorded = folder / _RECORDED
    try:
        recorded.mkdir(parents=True)
    except OSError as error:
        raise SettingsError(
            f"HEIMDALL_HOME must be a folder that can be written to; {folder} can't be made: "
            f"{error.strerror}"
        ) from error
    try:
        yield
    finally:
        if not (recorded / MODEL).is_file():
            for path in folder.glob(f"{MODEL}*"):
                path.unlink()
        shutil.rmtree(folder / VARIANTS_FOLDER, ignore_errors=True)
        shutil.rmtree(recorded)


def _without_credentials(settings: Settings) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(_CREDENTIALS)}
    return {**kept, "HEIMDALL_HOME": str(settings.home)}


def _fetch_notebook(release: Release, folder: Path) -> Record:
    """Write the notebook as it was before it ran, and return what it recorded."""
    import nbformat

    path, record = folder / _NOTEBOOK, release.record
    path.write_bytes(release.report)
    notebook = read_notebook(path)
    notebook.cells = [cell for cell in notebook.cells if not _is_added(cell)]
    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, path)
    return record


def _is_added(cell: Mapping[str, Any]) -> bool:
    """Whether a cell of an executed notebook was put there by the runner or by papermill."""
    return cell.get("id") == VERDICT or "injected-parameters" in cell["metadata"].get("tags", [])


def _fetch_inputs(release: Release, folder: Path) -> ReleaseParameters:
    """Bring the data that it was made of back, and name them in the release's parameters."""
    manifest, inputs = release.manifest, folder / _RECORDED
    known = manifest.said
    updates: dict[str, Any] = {"publish": False, "run_id": "", "output_dir": str(folder)}
    # Nothing is judged by its latency, which would be no reason to end here.
    updates["exclusive_cores"] = False
    # The kernel may talk to nobody.
    updates["eval_scheduler"] = ""
    kept = manifest.content_of("calibration_data")
    # Of its content there is no other hash; what was drawn from it is held against the record.
    calibration = kept.sha256 if kept else "that nobody noted"
    for role, name, sha256 in (
        ("checkpoint", "checkpoint", known.checkpoint.sha256),
        ("evaluation_data", "eval_data", known.evaluation_data.sha256),
        (
            "calibration_data",
            "calibration_data",
            calibration if known.parameters.get("calibration_data") else None,
        ),
    ):
        content = manifest.content_of(role)
        kept_dataset = manifest.dataset if role == "evaluation_data" else None
        if kept_dataset is not None and kept_dataset.digest == sha256:
            updates[name] = str(fetch_dataset(release.bucket.client, kept_dataset, inputs))
        elif sha256 is None:
            # Synthetic inputs are made again from their seed, as is a draw of evaluation data.
            updates[name] = ""
        elif content is None or content.sha256 != sha256:
            raise VerificationError(
                f"{manifest.uri} can't be made again: the store has not kept its "
                f"{role.replace('_', ' ')} with SHA-256 {sha256}"
            )
        else:
            updates[name] = str(fetch_content(release.bucket, content, inputs))
    declared = manifest.content_of("signature")
    if declared is not None and updates["checkpoint"]:
        # Found again where it was: beside the checkpoint.
        fetched = fetch_content(release.bucket, declared, inputs)
        fetched.rename(signature_path(updates["checkpoint"]))
    return check_parameters({**known.parameters, **updates})


def _compare_model(release: Release, path: Path) -> ModelComparison:
    """Hold the exported model, with its weights outside if it has any, against the recorded one."""
    manifest = release.manifest
    if not path.is_file():
        raise NotebookError(f"the notebook of {manifest.uri} has exported no {path.name} here")
    recorded = {n: e for n, e in manifest.objects.items() if f"{n}.".startswith(f"{MODEL}.")}
    found = {p.name: hash_file(p) for p in path.parent.glob(f"{MODEL}*")}
    differences: tuple[str, ...] = ()
    if found != {name: entry.sha256 for name, entry in recorded.items()}:
        beside = path.parent / _RECORDED
        for name, entry in recorded.items():
            release.fetch(entry, beside / name)
        differences = describe_differences(beside / MODEL, path)
    return ModelComparison(not differences, manifest.model.sha256, found[MODEL], differences)


def _in_words(comparison: Comparison) -> str:
    return (
        f"{shown(comparison.what)}: recorded {_short(comparison.recorded)}, found "
        f"{_short(comparison.found)} ({comparison.rule})"
    )


def _short(figure: Figure) -> str:
    if figure is None:
        return "none"
    return f"{figure:.6g}" if isinstance(figure, float) else shown(figure)


def _is_main(comparison: Comparison) -> bool:
    return any(part in comparison.what for part in _MAIN) or comparison.what.endswith("p50 (ms)")


def _counted(comparisons: Iterable[Comparison]) -> str:
    counts = Counter(c.judgement for c in comparisons)
    return ", ".join(f"{count} {judgement}" for judgement, count in counts.most_common())
