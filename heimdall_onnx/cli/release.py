"""The commands that release: a checkpoint, several as an ensemble, or the demo.

Thin, as the rest of the command line: values in, results out, exit codes from the errors.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import click

from heimdall_onnx.cli.help import (
    Command,
    ParameterOption,
    all_of,
    as_yaml,
    json_option,
    progress_bar,
)
from heimdall_onnx.common.errors import EvidenceError, HeimdallError, ParameterError
from heimdall_onnx.common.signals import first_signal_interrupts
from heimdall_onnx.common.text import visible_lines

if TYPE_CHECKING:
    from heimdall_onnx.common.parameters import ReleaseParameters
    from heimdall_onnx.release.result import ReleaseResult
    from heimdall_onnx.services.settings import Settings


_file = click.Path(dir_okay=False, path_type=Path)


parameter_option = partial(
    click.option,
    cls=ParameterOption,
    parameters="heimdall_onnx.common.parameters:ReleaseParameters",
)


# Of which model the checkpoints are, and what it is compared on.
model_options = all_of(
    parameter_option("--model", help="Model, pkg.mod:Class or file.py:Class, or what makes it."),
    parameter_option("--model-kwargs", help="Its keyword arguments, JSON; null drops a **kwarg."),
    parameter_option("--weights", help="Which weights of the checkpoint, where several fit."),
    parameter_option("--submodule", help="The network is this module of the model."),
    parameter_option(
        "--eval-data", help="Evaluation inputs: .npz or dataset.  [default: synthetic]"
    ),
    parameter_option("--ignore", help="Arrays of it that nothing is to use, with commas."),
)


# What is released under which name, and how; None means the default of the parameters.
parameter_options = all_of(
    parameter_option("--name", help="Name of the registered model.  [default: its class's]"),
    parameter_option("--bucket", help="Bucket of the releases."),
    parameter_option("--prefix", help="Their folder in the bucket.  [default: models/NAME]"),
    parameter_option("--tolerance", type=float, help="Limit of the mean absolute error."),
    parameter_option("--metric", help="How good answers are: top1, f1, rmse, pkg:function…"),
    parameter_option("--max-loss", type=float, help="How much of it may be lost."),
    parameter_option("--alias", help="Registry alias that is moved to the release."),
    parameter_option("--profile", help="How much is measured: smoke, quick or audit."),
    parameter_option("--variants", help="Other forms of the model: all, or names with commas."),
    click.option(
        "-p",
        "extra",
        nargs=2,
        multiple=True,
        metavar="NAME VALUE",
        help="Any other parameter of the notebook; may be repeated.",
    ),
)


# Of the commands that do nothing but release.
release_options = all_of(
    parameter_options,
    parameter_option("--run-id", help="MLflow run to log into."),
    click.option(
        "--cell-timeout",
        type=click.IntRange(min=1),
        help="Seconds for one cell.  [default: six hours]",
    ),
    click.option(
        "--notebook",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="Another notebook.",
    ),
    json_option,
    click.option(
        "--junit",
        "junit_file",
        type=_file,
        metavar="FILE.xml",
        help="Write the gates as JUnit XML, however the release ends.",
    ),
    click.option(
        "--summary",
        "summary_file",
        type=_file,
        metavar="FILE.md",
        help="Write a summary in Markdown, e.g. for a merge request.",
    ),
)


@click.command(
    cls=Command,
    example=r"""
        heimdall-onnx release detector.pt --model detector:Detector \
          --eval-data eval.npz --name detector
    """,
)
@click.argument("checkpoints", nargs=-1, required=True, metavar="CHECKPOINT…")
@model_options
@release_options
def release(checkpoints: tuple[str, ...], **options: Any) -> None:
    """Release CHECKPOINT: run the notebook headlessly, judge it, publish, move the alias.

    Several of one model are released as one ensemble.
    """
    if len(checkpoints) == 1:
        _release(lambda settings, parameters: {}, checkpoint=checkpoints[0], **options)
    else:
        # A SIGTERM, too, must not leave the combined checkpoint behind.
        with first_signal_interrupts(), ExitStack() as until_released:
            _release(partial(_combine, checkpoints, until_released), **options)


@click.command(cls=Command, example="heimdall-onnx inspect last.ckpt")
@click.argument("checkpoint")
@json_option
def inspect(checkpoint: str, as_json: bool) -> None:
    """Show what CHECKPOINT holds, and how to go on. Nothing in it is executed."""
    from heimdall_onnx.model.readings import describe_content, read_content

    found = describe_content(read_content(checkpoint))
    click.echo(json.dumps(found) if as_json else as_yaml(found))


@click.command(
    cls=Command,
    example=r"""
        heimdall-onnx signature detector.pt --model detector:Detector --eval-data eval.npz
    """,
)
@click.argument("checkpoint")
@model_options
def signature(checkpoint: str, **options: Any) -> None:
    """Write what CHECKPOINT's model takes and gives beside it, where a release looks for it.

    What the class declares, or else what is found by running the model.
    """
    from heimdall_onnx.common.parameters import check_parameters
    from heimdall_onnx.data.evaluation import first_rows
    from heimdall_onnx.model.checkpoint import load_checkpoint
    from heimdall_onnx.model.formats import locate
    from heimdall_onnx.model.signature_file import signature_path, write_signature_file

    given = check_parameters({name: v for name, v in options.items() if v is not None})
    source = locate(checkpoint)
    target = signature_path(source.path if len(source.files) > 1 else source.files[0])
    if target.exists():
        raise ParameterError(f"{target} is there already, and counts: mend it, or remove it")
    loaded = load_checkpoint(
        checkpoint,
        model=given.model,
        model_kwargs=given.model_kwargs,
        weights=given.weights,
        submodule=given.submodule,
        arrays=lambda: first_rows(given.eval_data_path, given.ignored),
    )
    write_signature_file(loaded.signature, target)
    click.echo("\n".join(visible_lines(line) for line in (*loaded.found, f"written: {target}")))


def _combine(
    checkpoints: Sequence[str],
    until_released: ExitStack,
    settings: Settings,
    parameters: ReleaseParameters,
) -> dict[str, Any]:
    """The checkpoints as one, which is there until the release ends, as parameters of it."""
    from heimdall_onnx.model.ensemble import combine_checkpoints
    from heimdall_onnx.report.workspace import ENSEMBLE, claim_folder

    if parameters.submodule:
        raise ParameterError("members of an ensemble are whole models; submodule can't be given")
    folder = claim_folder(settings.home / f"{ENSEMBLE}{uuid4().hex[:8]}")
    until_released.callback(shutil.rmtree, folder, ignore_errors=True)
    made = combine_checkpoints(
        checkpoints, folder, parameters.model, parameters.model_kwargs, parameters.weights
    )
    click.echo(
        f"{len(made.members)} checkpoints combined in {made.path}, which is removed when the "
        "release ends; the same ones make the same file again",
        err=True,
    )
    return made.parameters


@click.command(cls=Command, example="heimdall-onnx demo --variants all")
@release_options
def demo(**options: Any) -> None:
    """Make a small trained checkpoint, if there is none yet, and release it."""
    _release(_make_demo, **options)


def _make_demo(settings: Settings, parameters: ReleaseParameters) -> dict[str, Any]:
    """The demo's files as parameters of a release."""
    from heimdall_onnx.training.demo import make_demo

    folder = settings.home / "demo"
    click.echo(f"demo checkpoint in {folder}; training takes two minutes if it is new", err=True)
    with progress_bar() as progress:
        made = make_demo(folder, progress=progress)
    click.echo(
        f"{'taken as it is' if made.reused else 'trained'}: median error "
        f"{made.median_error_m / 1000:.0f} km, always answering the middle "
        f"{made.baseline_median_error_m / 1000:.0f} km",
        err=True,
    )
    return made.completing(parameters)


def _release(
    inputs: Callable[[Settings, ReleaseParameters], Mapping[str, Any]],
    *,
    extra: Sequence[tuple[str, str]],
    cell_timeout: int | None,
    notebook: Path | None,
    as_json: bool,
    junit_file: Path | None,
    summary_file: Path | None,
    **options: Any,
) -> None:
    from heimdall_onnx.services.settings import Settings

    # Read before anything heavy is imported, so that a misspelt name is answered at once.
    values = {k: v for k, v in options.items() if v is not None} | dict(extra)
    try:
        from heimdall_onnx.common.parameters import check_parameters
        from heimdall_onnx.model.readings import NO_MODEL, read_weights

        if own := {"publish", "output_dir"} & {name for name, _ in extra}:
            raise ParameterError(f"{', '.join(sorted(own))} can't be set here; the command sets it")
        parameters = check_parameters(values)
        settings = Settings.load()
        if parameters.checkpoint:
            # What the file alone tells is told before PyTorch is imported.
            read_weights(parameters.checkpoint)
            if not parameters.model:
                raise ParameterError(NO_MODEL)
        parameters = parameters.model_copy(update=inputs(settings, parameters))
    except HeimdallError as error:
        if as_json or junit_file or summary_file:
            from heimdall_onnx.release.result import ReleaseResult

            failed = ReleaseResult(False, error.exit_code, "fail", error=str(error))
            _write(failed, junit_file, summary_file)
            if as_json:
                click.echo(json.dumps(failed.to_dict()))
        raise
    from heimdall_onnx.release.runner import release_checkpoint

    result = release_checkpoint(
        parameters,
        settings,
        notebook=notebook,
        cell_timeout=cell_timeout,
        progress=sys.stderr.isatty() or not as_json,
    )
    _write(result, junit_file, summary_file)
    if as_json:
        click.echo(json.dumps(result.to_dict(), allow_nan=False))
    show_result(result, as_json=as_json)
    click.get_current_context().exit(result.exit_code)


def _write(result: ReleaseResult, junit_file: Path | None, summary_file: Path | None) -> None:
    """Write what continuous integration shows; that it can't be written changes no outcome."""
    from heimdall_onnx.cli.ci_output import junit, markdown
    from heimdall_onnx.common.files import replace_file

    for path, text in ((junit_file, junit), (summary_file, lambda r: markdown(r).encode())):
        if path is not None:
            try:
                with replace_file(path) as file:
                    file.write(text(result))
            except HeimdallError as error:
                click.echo(visible_lines(f"warning: {error}"), err=True)


def show_result(result: ReleaseResult, *, as_json: bool = False) -> None:
    """Say how a release ended; only what went wrong where the result is printed as JSON."""
    if not as_json and (text := summary(result)):
        click.echo(text, err=not result.success)
    if result.error:
        click.echo(visible_lines(f"error: {result.error}"), err=True)


def summary(result: ReleaseResult) -> str:
    """What a person wants to know of a release, and what to do next."""
    from heimdall_onnx.services.client import redact_url
    from heimdall_onnx.services.settings import Settings

    judged = result.exit_code in (0, EvidenceError.exit_code)
    lines = [("verdict", result.verdict)] if judged else []
    if result.speedup is not None:
        lines.append(("speedup", f"{result.speedup:.2f}× (PyTorch over ONNX Runtime)"))
    signed = "no, since HEIMDALL_SIGNING_KEY is not set; its hashes can be verified all the same"
    if result.signer_sha256 is not None:
        signed = f"by the key with SHA-256 {result.signer_sha256}"
    lines += [
        (label, value)
        for label, value in (
            ("model", result.s3_uri),
            ("report", result.report_uri),
            ("rendered", result.report_html_uri),
            ("manifest", result.manifest_uri),
            (
                "registered",
                result.model_version
                and f"{result.model_name} version {result.model_version}, alias {result.alias}",
            ),
            ("signed", result.success and signed),
            ("retained", result.retained_until and f"until {result.retained_until}"),
            ("MLflow run", result.run_id),
        )
        if value
    ]
    if costs := sorted(result.costs, key=lambda cost: -float(cost["seconds"])):
        longest = ", ".join(f"{cost['step']} {cost['seconds']:.0f}" for cost in costs[:3])
        total = sum(cost["seconds"] for cost in costs)
        lines.append(("took", f"{total:.0f} s, most of it {longest}"))
    text = "\n".join(f"{label:<11}{value}" for label, value in lines)
    if result.local_report:
        text += f"\n\nread the report:   file://{result.local_report}"
    if result.success:
        # As they can be typed here: the environment need not be the activated one.
        here = shutil.which("python") == sys.executable
        python = "python" if here else shlex.quote(sys.executable)
        program = "heimdall-onnx" if here else f"{python} -m heimdall_onnx"
        folder = str(result.s3_uri).removesuffix("/model.onnx")
        tracking = Settings.load().tracking_uri.get_secret_value()
        page = redact_url(tracking) if tracking.startswith("http") else f"{program} services up"
        text += (
            f'\nopen the model:    {python} -c "import heimdall_onnx; '
            f"print(heimdall_onnx.load_model('{result.s3_uri}'))\""
            f"\ncheck the release: {program} verify {folder}"
            f"\nbrowse in MLflow:  {page}"
        )
    return text


COMMANDS = (release, inspect, signature, demo)
