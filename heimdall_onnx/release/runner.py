"""The runner: executes the notebook headlessly, judges it from outside, and finishes.

A notebook can't contain its own hash, nor see that its kernel died. So this process, outside the
kernel, decides: it puts the verdict first, renders the HTML, uploads both, writes the manifest
last, and only then moves the alias. Whatever goes wrong before that is taken back.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from heimdall_onnx.archive.aliases import AliasLog
from heimdall_onnx.archive.manifest import REPORT, REPORT_HTML, Manifest
from heimdall_onnx.archive.mlflow_page import name_data
from heimdall_onnx.archive.signing import Signer, open_signer
from heimdall_onnx.common.errors import (
    GateError,
    HeimdallError,
    InputError,
    NotebookError,
    ParameterError,
    ServiceError,
)
from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.common.parameters import VARIANTS_FOLDER, ReleaseParameters
from heimdall_onnx.common.signals import first_signal_interrupts, uninterrupted
from heimdall_onnx.common.surroundings import told
from heimdall_onnx.data.evaluation import is_dataset
from heimdall_onnx.evidence.costs import CostWatch
from heimdall_onnx.model.readings import read_weights
from heimdall_onnx.release.complete import (
    add_bom,
    complete_release,
    describe_manifest,
    present_release,
)
from heimdall_onnx.release.publish import close_own_run, withdraw
from heimdall_onnx.release.result import ReleaseResult
from heimdall_onnx.report.judge import Judgement
from heimdall_onnx.report.kernels import StartKernel, started_kernel
from heimdall_onnx.report.notebook import (
    error_of,
    execute_notebook,
    kernel_environment,
    notebook_path,
)
from heimdall_onnx.report.page import figures, put_verdict_first
from heimdall_onnx.report.rendering import render_html
from heimdall_onnx.report.summary import release_facts, three_sentences
from heimdall_onnx.report.workspace import claim_folder, new_run_folder
from heimdall_onnx.services.connection import Connection, connect
from heimdall_onnx.services.embedded import ensure_store
from heimdall_onnx.services.retention import Protection, prepare_bucket
from heimdall_onnx.services.settings import Settings
from heimdall_onnx.services.store import StoredObject

if TYPE_CHECKING:
    from jupyter_client.manager import AsyncKernelManager

    from heimdall_onnx.archive.record import Record

log = get_logger(__name__)


def release_checkpoint(
    parameters: ReleaseParameters,
    settings: Settings,
    *,
    notebook: Path | None = None,
    cell_timeout: int | None = None,
    progress: bool = False,
    start_kernel: StartKernel | None = None,
) -> ReleaseResult:
    """Run the whole workflow headlessly.

    Errors of this package end up in the result, so that a caller has one thing to look at.

    Args:
        parameters: What to release; `publish` and `output_dir` are set here.
        settings: Where the services are.
        notebook: Another notebook than the one that comes with the package.
        cell_timeout: Seconds that one cell may take; six hours by default.
        progress: Show a progress bar by cell on standard error.
        start_kernel: Starts the notebook's kernel, as `WarmKernels.started` does; by default it is
            a fresh process of this interpreter.

    Raises:
        KeyboardInterrupt: On Ctrl-C or SIGTERM, after what was begun has been taken back.
    """
    run = _Run(parameters, settings, start_kernel or started_kernel)
    try:
        with (
            first_signal_interrupts(),
            structlog.contextvars.bound_contextvars(release=run.id, run_id=parameters.run_id),
        ):
            return run.execute(notebook or notebook_path(), cell_timeout, progress)
    except (HeimdallError, OSError) as error:
        known = _known(error)
        if known is None:
            raise
        return run.failed(known)


class _Run:
    """One release from its parameters to its result."""

    def __init__(
        self, parameters: ReleaseParameters, settings: Settings, start_kernel: StartKernel
    ) -> None:
        self._start_kernel = start_kernel
        self.folder = new_run_folder(settings)
        self.id = self.folder.name
        self.parameters = parameters.model_copy(
            update={
                "publish": True,
                "output_dir": str(self.folder),
                "eval_data": _absolute(parameters.eval_data),
                "calibration_data": _absolute(parameters.calibration_data),
            }
        )
        self.settings = settings
        self.result = ReleaseResult(success=False, exit_code=1, verdict="fail")
        self._judgement: Judgement | None = None
        self._alias_moved = False
        self._signer: Signer | None = None
        self._protection: Protection | None = None
        self._manifest: Manifest | None = None
        self._taken_back = False
        self._costs = CostWatch()

    def execute(self, notebook: Path, cell_timeout: int | None, progress: bool) -> ReleaseResult:
        if not self.parameters.checkpoint:
            raise ParameterError("there is no checkpoint to release: its path is empty")
        checkpoint = str(read_weights(self.parameters.checkpoint).source.path.absolute())
        self.parameters = self.parameters.model_copy(update={"checkpoint": checkpoint})
        data, calibration = self.parameters.eval_data, self.parameters.calibration_data
        if is_dataset(calibration):
            raise ParameterError(
                f"expected calibration data in an .npz, found a dataset at {calibration}; leave "
                "calibration_data out to set a part of the evaluation data apart"
            )
        for path, what in (
            # Whether a dataset is in its bucket is seen when it is opened.
            ("" if is_dataset(data) else data, "evaluation data"),
            (calibration, "calibration data"),
        ):
            if path.startswith("s3://"):
                raise ParameterError(
                    f"expected {what} in a file, found {path}; only datasets are read from a bucket"
                )
            if path and not Path(path).exists():
                raise ParameterError(f"expected {what} at {path}, found no such file")
        if self.parameters.evaluation_workers is not None and not is_dataset(data):
            raise ParameterError(
                "eval_workers and eval_scheduler are for a dataset, a folder or s3://bucket/folder "
                f"as `heimdall-onnx data` writes it; found evaluation data at {data or 'no path'}"
            )
        claim_folder(self.folder)
        with self._costs.step("services"):
            settings = ensure_store(self.settings)
        with self._start_kernel(kernel_environment(settings)) as kernel:
            with self._costs.step("services"):
                # Before anything is spent on a release that could not be signed in the end.
                self._signer = open_signer(self.settings)
                connection = connect(settings)
                bucket = connection.bucket(self.parameters.bucket)
                bucket.ensure()
                bucket.prove_conditional_writes()
                if settings.versioning or settings.retention_days:
                    # Before the first upload: what is there already has no version.
                    self._protection = prepare_bucket(bucket, settings)
                given, tracker = self.parameters.run_id, connection.tracker
                # Never the process's active run, which is its caller's, as are name and end of a
                # given one.
                if given:
                    tracker.check_run(given)
                run_id = given or tracker.create_run(f"release {self.id}")
            structlog.contextvars.bind_contextvars(run_id=run_id)
            self.result = replace(self.result, run_id=run_id, model_name=self.parameters.name)
            self.parameters = self.parameters.model_copy(update={"run_id": run_id})
            run_notebook = partial(self._run_notebook, notebook, kernel, cell_timeout, progress)
            return self._complete(connection, run_notebook, own_run=not given)

    def _complete(
        self, connection: Connection, run_notebook: Callable[[], Judgement], *, own_run: bool
    ) -> ReleaseResult:
        """Run the notebook and finish what it began, or take it back."""
        status = "KILLED"
        try:
            judgement = run_notebook()
            if judgement.passed and judgement.record is not None:
                result = self._finish(connection, judgement, judgement.record)
                status = "FINISHED"
            else:
                status = "FAILED"
                result = self._keep_failed(connection, judgement)
        except BaseException as error:
            # Whatever it is, a bug of ours or Ctrl-C: what was begun must not stay.
            known = _known(error)
            status = "FAILED" if known else "KILLED"
            with uninterrupted():
                left = self._take_back(connection)
                upload = known is not None and not isinstance(known, InputError)
                self._mark_failed(connection, str(known or type(error).__name__), upload=upload)
            if known is None:
                raise
            raise (_with_left(known, left) if left else known) from error
        finally:
            with uninterrupted():
                if status != "FINISHED" and not self._taken_back:
                    # A signal has interrupted the handling of an error.
                    self._take_back(connection)
                if own_run:
                    close_own_run(connection.tracker, self.parameters.run_id, status)
                for model in self.folder.glob("model.onnx*"):
                    model.unlink()
                shutil.rmtree(self.folder / VARIANTS_FOLDER, ignore_errors=True)
        return result

    def failed(self, error: HeimdallError) -> ReleaseResult:
        report = self.folder / REPORT
        return replace(
            self.result,
            success=False,
            exit_code=error.exit_code,
            verdict=self._verdict(self._word if isinstance(error, GateError) else "fail"),
            local_report=self.result.local_report or (str(report) if report.is_file() else None),
            error=str(error),
        )

    def _run_notebook(
        self,
        notebook: Path,
        kernel: AsyncKernelManager,
        cell_timeout: int | None,
        progress: bool,
    ) -> Judgement:
        started = time.perf_counter()
        judgement = execute_notebook(
            notebook,
            self.folder / REPORT,
            self.parameters,
            kernel,
            cell_timeout=cell_timeout,
            progress=progress,
        )
        seconds = time.perf_counter() - started
        record = judgement.record
        if record is not None:
            gates = [gate.to_dict() for gate in record.gates]
            self.result = replace(self.result, speedup=record.speedup, gates=gates)
        steps = record.costs if record else ()
        self._costs.add("kernel start and end", seconds - sum(cost.seconds for cost in steps))
        for cost in steps:
            self._costs.add(cost.step, cost.seconds, cost.peak_memory_bytes)
        self._judgement = judgement
        return judgement

    def _finish(
        self, connection: Connection, judgement: Judgement, record: Record
    ) -> ReleaseResult:
        """Report, manifest and alias of a release whose model is uploaded and registered."""
        uploaded = record.uploaded
        if uploaded is None or record.registered is None:
            raise NotebookError(
                "the notebook passed but has recorded no upload and no registration; it must call "
                "upload_release, register_release and record_results as the release notebook does"
            )
        with self._costs.step("report"):
            self._write_report(judgement, uploaded.version, passed=True)
            with ThreadPoolExecutor(1) as beside:
                reports = beside.submit(
                    copy_context().run, self._upload_reports, connection, uploaded.folder_uri
                )
                self._log_to_run(connection, record)
                written = reports.result()
        self.result = replace(self.result, costs=[c.to_dict() for c in self._costs.costs()])
        bucket = connection.bucket(self.parameters.bucket)
        described = describe_manifest(
            record,
            self.parameters,
            written,
            verdict=self._verdict("pass"),
            costs=self.result.costs,
            signer=self._signer,
            protection=self._protection or prepare_bucket(bucket, connection.settings),
        )
        described = add_bom(connection, uploaded.folder_uri, described, record)
        manifest = complete_release(connection, uploaded.folder_uri, described, self._signer)
        self._manifest = manifest
        present_release(connection, manifest, record)
        # Only a complete release is offered.
        with uninterrupted():
            self._alias_log(connection).point(
                connection.tracker,
                manifest.model_version,
                manifest.uri,
                f"run {self.parameters.run_id}",
            )
            self._alias_moved = True
        return replace(
            ReleaseResult.of_manifest(manifest),
            alias=self.parameters.alias,
            retained_until=self._protection.retained_until if self._protection else None,
            speedup=record.speedup,
            local_report=str(self.folder / REPORT_HTML),
        )

    def _upload_reports(self, connection: Connection, folder_uri: str) -> list[StoredObject]:
        bucket, folder = connection.locate(folder_uri)
        names = (REPORT, REPORT_HTML)
        return [bucket.upload_file(self.folder / name, f"{folder}/{name}") for name in names]

    def _alias_log(self, connection: Connection) -> AliasLog:
        parameters = self.parameters
        return AliasLog(connection.bucket(parameters.bucket), parameters.name, parameters.alias)

    def _keep_failed(self, connection: Connection, judgement: Judgement) -> ReleaseResult:
        """Keep the report of a run that failed, since that is the one to be understood."""
        error = error_of(judgement)
        left = self._take_back(connection)
        if left:
            error = _with_left(error, left)
        if not isinstance(error, InputError):
            # The table of gates below says where and by how much.
            verdict = judgement.verdict if isinstance(error, GateError) and not left else None
            reason = str(error) if verdict is None else verdict.summary()
            self._keep_report(connection, judgement, reason, upload=True)
        return self.failed(error)

    def _mark_failed(self, connection: Connection, reason: str, *, upload: bool) -> None:
        """Make the report of a passed notebook say that its release failed all the same."""
        if self._alias_moved or self._judgement is None or not self._judgement.passed:
            return
        judgement = replace(self._judgement, problem="the release was not completed")
        try:
            self._keep_report(connection, judgement, reason, upload=upload)
        except OSError as error:
            # On a full disk there is no place for it.
            log.warning("report not kept", reason=str(error), local=str(self.folder))

    def _keep_report(
        self, connection: Connection, judgement: Judgement, error: str, *, upload: bool
    ) -> None:
        self._write_report(judgement, f"failed run {self.id}", passed=False, error=error)
        self.result = replace(self.result, local_report=str(self.folder / REPORT_HTML))
        try:
            if upload:
                self._upload_failed_report(connection)
            self._log_to_run(connection, judgement.record)
        except ServiceError as trouble:
            # The verdict stands, whether or not its report could be kept there.
            log.warning("report not kept", reason=str(trouble), local=str(self.folder))

    def _upload_failed_report(self, connection: Connection) -> None:
        bucket = connection.bucket(self.parameters.bucket)
        prefix = f"{self.parameters.prefix}/failed"
        bucket.ensure()
        report = (self.folder / REPORT).read_bytes()
        version = bucket.claim_version(prefix, name=REPORT, content=lambda _: report)
        bucket.upload_file(self.folder / REPORT_HTML, f"{prefix}/{version}/{REPORT_HTML}")
        address = bucket.uri(f"{prefix}/{version}")
        self.result = replace(
            self.result,
            version=version,
            report_uri=f"{address}/{REPORT}",
            report_html_uri=f"{address}/{REPORT_HTML}",
        )

    def _write_report(
        self, judgement: Judgement, title: str, *, passed: bool, error: str = ""
    ) -> None:
        done, alias = judgement.record, self.parameters.alias if passed else None
        facts = release_facts(done, self.parameters, alias, self._signer)
        report = self.folder / REPORT
        if self.parameters.profile == "smoke":
            title += " (smoke)"
        put_verdict_first(
            report,
            passed=passed,
            title=title,
            facts=facts,
            gates=judgement.verdict,
            sentences=three_sentences(done, alias),
            problem=error,
        )
        render_html(report, f"{self.parameters.name} {title}")

    def _log_to_run(self, connection: Connection, record: Record | None) -> None:
        tracker, run_id = connection.tracker, self.parameters.run_id
        if record is not None:
            data = name_data(record, self.parameters.bucket, self.parameters.eval_data)
            tracker.log_dataset(data, run_id=run_id)
        for name in (REPORT, REPORT_HTML):
            tracker.log_artifact(self.folder / name, "report", run_id=run_id)
        pictures = self.folder / "figures"
        pictures.mkdir(exist_ok=True)
        for name, png in figures(self.folder / REPORT):
            (pictures / name).write_bytes(png)
        tracker.log_artifact(pictures, run_id=run_id)

    def _take_back(self, connection: Connection) -> tuple[str, ...]:
        """Withdraw what this run has claimed, unless it is offered already; say what is left."""
        if self._alias_moved:
            return ()
        self._taken_back = True
        # What the alias may still point at has to stay whole.
        left = tuple(self._unassign_alias(connection)) or withdraw(connection, self.folder)
        if left:
            log.error("could not be taken back", left=left)
        return left

    def _unassign_alias(self, connection: Connection) -> Iterator[str]:
        """Move the alias back if it was moved and the registry failed to say so."""
        if (manifest := self._manifest) is not None:
            try:
                self._alias_log(connection).withdraw(
                    connection.tracker, manifest.model_version, manifest.uri
                )
            except HeimdallError as error:
                yield f"alias {self.parameters.alias} of {manifest.model_name}: {error}"

    @property
    def _word(self) -> str:
        """What the gates say; that they fail where none were judged."""
        judged = self._judgement and self._judgement.verdict
        return judged.word if judged else "fail"

    def _verdict(self, word: str) -> str:
        return f"{word} (smoke)" if self.parameters.profile == "smoke" else word


def _known(error: BaseException) -> HeimdallError | None:
    return error if isinstance(error, HeimdallError) else told(error)


def _with_left(error: HeimdallError, left: tuple[str, ...]) -> HeimdallError:
    return type(error)(f"{error}\nCould not be taken back: {'; '.join(left)}")


def _absolute(path: str) -> str:
    return str(Path(path).absolute()) if path and not path.startswith("s3://") else path
