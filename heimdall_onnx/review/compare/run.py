"""The runner of a comparison: executes its notebook, judges it from outside, renders and stores it.

As for a release, the notebook runs under papermill in a kernel of its own, and what it says of
itself counts only if the executed file shows that every cell ran. A stored comparison lies below
the newer release, under its reviews, as something that came after the release and vouches for
nothing in it: each of its two files has its hash in its name, and the registry has both hashes.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from heimdall_onnx.archive.manifest import COMPARISONS, REPORT, REPORT_HTML
from heimdall_onnx.archive.record import read_executed
from heimdall_onnx.archive.release import Release
from heimdall_onnx.archive.verify import COMPARISON_TAG
from heimdall_onnx.common.errors import ParameterError, SettingsError, VerificationError
from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.common.signals import first_signal_interrupts, uninterrupted
from heimdall_onnx.report.kernels import started_kernel
from heimdall_onnx.report.notebook import (
    error_of,
    execute_notebook,
    kernel_environment,
    notebook_path,
)
from heimdall_onnx.report.page import put_verdict_first
from heimdall_onnx.report.rendering import render_html
from heimdall_onnx.report.workspace import new_run_folder
from heimdall_onnx.review.compare.pair import (
    COMPARISON_RECORD,
    INPUTS,
    ComparisonParameters,
    find_pair,
    newer_of,
)
from heimdall_onnx.services.connection import open_for_reading
from heimdall_onnx.services.settings import Settings

log = get_logger(__name__)

NOTEBOOK = "compare"


def compare_releases(
    parameters: ComparisonParameters,
    settings: Settings,
    *,
    store: bool = False,
    cell_timeout: int | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Compare two releases and write the report.

    What an alias points at is looked up once, before anything else, so that all of it is about the
    same two releases. That B is worse is a result and no error.

    Args:
        parameters: What is compared; without a folder one is made below the settings' home.
        settings: Where the services are, and whose signature a release must have.
        store: Store the report beside the newer release, which changes nothing of that.
        cell_timeout: Seconds that one cell of the notebook may take; six hours by default.
        progress: Show a progress bar by cell on standard error.

    Returns:
        Everything as `ReleaseComparison.to_dict` gives it, and where the executed notebook and its
        rendering are: on this machine, and in the bucket or None.

    Raises:
        ParameterError: If both are one release, one is not named, or a report is in the folder.
        VerificationError: If one of them is no release, does not verify, or was changed meanwhile.
        InvalidModelError: If they have other inputs, or no output in common.
        HeimdallError: As the notebook raised it.
        ServiceError: If a service can't be reached or refuses.
        KeyboardInterrupt: On Ctrl-C or SIGTERM.
    """
    connection = open_for_reading(settings)
    releases = find_pair(connection, parameters)
    folder = _make_folder(parameters, settings)
    data = parameters.eval_data
    given = parameters.model_copy(
        update={
            "a": releases[0].uri,
            "b": releases[1].uri,
            "eval_data": data if not data or "://" in data else str(Path(data).absolute()),
            "output_dir": str(folder),
        }
    )
    try:
        with (
            first_signal_interrupts(),
            started_kernel(_environment(connection.settings)) as kernel,
        ):
            judgement = execute_notebook(
                notebook_path(NOTEBOOK),
                folder / REPORT,
                given,
                kernel,
                record=COMPARISON_RECORD,
                cell_timeout=cell_timeout,
                progress=progress,
            )
    finally:
        shutil.rmtree(folder / INPUTS, ignore_errors=True)
    if judgement.problem:
        error = error_of(judgement)
        raise type(error)(f"{error}\nthe notebook, as far as it came: {folder / REPORT}")
    record = read_executed((folder / REPORT).read_bytes(), REPORT).scrap(COMPARISON_RECORD)
    figures = record["figures"]
    _require_same(figures, releases)
    versions = " and ".join(release.manifest.version for release in releases)
    put_verdict_first(
        folder / REPORT,
        passed=not figures["worse"],
        title=figures["sentence"],
        facts=dict(record["facts"]),
    )
    html = render_html(folder / REPORT, f"comparison of {versions}")
    stored: dict[str, str] = {}
    if store:
        a, b = releases
        newer = newer_of(a, b)
        stored = store_comparison(newer, b if newer is a else a, folder)
    return {
        "success": True,
        **figures,
        "report": str(folder / REPORT),
        "report_html": str(html),
        "report_uri": stored.get(REPORT),
        "report_html_uri": stored.get(REPORT_HTML),
    }


def _make_folder(parameters: ComparisonParameters, settings: Settings) -> Path:
    folder = Path(parameters.output_dir or new_run_folder(settings)).absolute()
    if there := [name for name in (REPORT, REPORT_HTML) if (folder / name).exists()]:
        raise ParameterError(
            f"{folder} holds a report already ({', '.join(there)}), which is not overwritten; name "
            "another folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(
            f"the folder of the report can't be made, {folder}: {error.strerror}"
        ) from error
    return folder


def _environment(settings: Settings) -> dict[str, str]:
    """That of the kernel, which asks for the signature that is asked for here."""
    environment = kernel_environment(settings)
    for name, path in (
        ("HEIMDALL_PUBLIC_KEY", settings.public_key),
        ("HEIMDALL_TRUSTED_CERTIFICATES", settings.trusted_certificates),
    ):
        environment.pop(name, None)
        if path is not None:
            environment[name] = str(path.absolute())
    return environment


def _require_same(figures: dict[str, Any], releases: tuple[Release, Release]) -> None:
    for side, release in zip(("a", "b"), releases, strict=True):
        manifest, found = release.manifest, figures[side]["manifest_sha256"]
        if found != manifest.sha256:
            raise VerificationError(
                f"{manifest.uri} was changed while it was compared: expected a manifest with "
                f"SHA-256 {manifest.sha256}, found {found}"
            )


def store_comparison(newer: Release, other: Release, folder: Path) -> dict[str, str]:
    """Store a report beside the newer release: a name of its own, never in place of another.

    Args:
        newer: The release below which it is stored; nothing else of it changes.
        other: The one that it was compared with.
        folder: Where the executed notebook and its rendering are.

    Returns:
        Address by file name.

    Raises:
        ServiceError: If a service can't be reached or refuses.
    """
    # Whoever named the other one's folder has not named this one.
    version = re.sub("[^A-Za-z0-9_.-]", "-", other.manifest.version)[:64]
    called = f"{version}-{datetime.now(UTC):%Y%m%d_%H%M%S}"
    tags, stored = {}, {}
    with uninterrupted():
        for name in (REPORT, REPORT_HTML):
            content, suffix = (folder / name).read_bytes(), Path(name).suffix
            digest = hashlib.sha256(content).hexdigest()
            key = f"{newer.folder}/{COMPARISONS}/{called}/report-{digest}{suffix}"
            newer.bucket.upload_bytes(content, key, if_absent=True)
            tags[f"{COMPARISON_TAG}{called}.{digest[:12]}{suffix}"] = digest
            stored[name] = newer.bucket.uri(key)
        manifest, tracker = newer.manifest, newer.connection.tracker
        tracker.set_version_tags(manifest.model_name, manifest.model_version, tags)
    log.info("comparison stored", release=newer.uri, other=other.uri)
    return stored
