"""The command line: passes values through and turns results into output and exit codes.

Progress and messages go to standard error; results go to standard output. Everything heavy is
imported by the command that needs it.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from heimdall_onnx.cli_releases import COMMANDS
from heimdall_onnx.errors import EvidenceError, HeimdallError, ParameterError
from heimdall_onnx.untrusted import visible_lines

if TYPE_CHECKING:
    from heimdall_onnx.release import ReleaseResult
    from heimdall_onnx.settings import Settings

INTERRUPTED = 130


class _Group(click.Group):
    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except HeimdallError as error:
            click.echo(visible_lines(f"error: {error}"), err=True)
            context.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            context.exit(INTERRUPTED)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--json-logs", is_flag=True, help="Log as JSON lines on a terminal too.")
@click.version_option(package_name="heimdall-onnx")
def main(json_logs: bool) -> None:
    """Release PyTorch checkpoints as ONNX models, with their evidence."""
    from heimdall_onnx.logs import configure_logs

    configure_logs(as_json=True if json_logs else None)


for about_a_release in COMMANDS:
    main.add_command(about_a_release)


def _release_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of `release` and `demo`; None means the default of the parameters."""
    for option in (
        click.option("--name", help="Name of the registered model."),
        click.option("--bucket", help="Bucket of the releases."),
        click.option("--prefix", help="Folder of the releases in the bucket."),
        click.option("--tolerance", type=float, help="Limit of the mean absolute error."),
        click.option("--alias", help="Registry alias that is moved to the release."),
        click.option("--profile", help="How much is measured: smoke, quick or audit."),
        click.option("--variants", help="Other forms of the model: all, or names with commas."),
        click.option("--run-id", help="MLflow run to log into."),
        click.option(
            "-p",
            "extra",
            nargs=2,
            multiple=True,
            metavar="NAME VALUE",
            help="Any other parameter of the notebook; may be repeated.",
        ),
        click.option("--cell-timeout", type=click.IntRange(min=1), help="Seconds for one cell."),
        click.option(
            "--notebook",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="Another notebook.",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    ):
        command = option(command)
    return command


@main.command()
@click.argument("checkpoint")
@click.option("--model", help="Model class, pkg.mod:Class.")
@click.option("--model-kwargs", help="Its keyword arguments, JSON.")
@click.option("--eval-data", help="Evaluation inputs, .npz.")
@_release_options
def release(**options: Any) -> None:
    """Release CHECKPOINT: run the notebook headlessly, judge it, publish, move the alias."""
    _release(lambda settings: {}, **options)


@main.command()
@_release_options
def demo(**options: Any) -> None:
    """Make a small trained checkpoint, if there is none yet, and release it."""
    _release(_make_demo, **options)


def _make_demo(settings: Settings) -> dict[str, str]:
    """The demo's files as parameters of a release."""
    from heimdall_onnx.demo import make_demo

    folder = settings.home / "demo"
    click.echo(f"demo checkpoint in {folder}; training takes two minutes if it is new", err=True)
    with click.progressbar(
        length=100, file=sys.stderr, item_show_func=lambda what: what or ""
    ) as bar:
        made = make_demo(
            folder, progress=lambda share, what: bar.update(int(100 * share) - bar.pos, what)
        )
    click.echo(
        f"{'taken as it is' if made.reused else 'trained'}: median error "
        f"{made.median_error_m / 1000:.0f} km, always answering the middle "
        f"{made.baseline_median_error_m / 1000:.0f} km",
        err=True,
    )
    return {"checkpoint": str(made.checkpoint), "eval_data": str(made.eval_data)}


def _release(
    inputs: Callable[[Settings], dict[str, str]],
    *,
    extra: Sequence[tuple[str, str]],
    cell_timeout: int | None,
    notebook: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    from heimdall_onnx.settings import Settings

    # Read before anything heavy is imported, so that a misspelt name is answered at once.
    values = {k: v for k, v in options.items() if v is not None} | dict(extra)
    try:
        from heimdall_onnx.parameters import check_parameters

        if own := {"publish", "output_dir"} & {name for name, _ in extra}:
            raise ParameterError(f"{', '.join(sorted(own))} can't be set here; the command sets it")
        parameters = check_parameters(values)
        settings = Settings.load()
        given = dict(extra)
        made = {name: path for name, path in inputs(settings).items() if name not in given}
        parameters = parameters.model_copy(update=made)
    except HeimdallError as error:
        if as_json:
            from heimdall_onnx.release import ReleaseResult

            failed = ReleaseResult(False, error.exit_code, "fail", error=str(error))
            click.echo(json.dumps(failed.to_dict()))
        raise
    from heimdall_onnx.release import release_checkpoint

    result = release_checkpoint(
        parameters,
        settings,
        notebook=notebook,
        cell_timeout=cell_timeout,
        progress=sys.stderr.isatty() or not as_json,
    )
    if as_json:
        click.echo(json.dumps(result.to_dict(), allow_nan=False))
    elif text := summary(result):
        click.echo(text, err=not result.success)
    if result.error:
        click.echo(visible_lines(f"error: {result.error}"), err=True)
    click.get_current_context().exit(result.exit_code)


def summary(result: ReleaseResult) -> str:
    """What a person wants to know of a release, and what to do next."""
    judged = result.exit_code in (0, EvidenceError.exit_code)
    lines = [("verdict", result.verdict)] if judged else []
    if result.speedup is not None:
        lines.append(("speedup", f"{result.speedup:.2f}× (PyTorch over ONNX Runtime)"))
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
            ("signed", result.success and _signed(result)),
            ("retained", result.retained_until and f"until {result.retained_until}"),
            ("MLflow run", result.run_id),
        )
        if value
    ]
    if result.costs:
        lines.append(("took", _most_costly(result.costs)))
    text = "\n".join(f"{label:<11}{value}" for label, value in lines)
    if result.local_report:
        text += f"\n\nread the report:   file://{result.local_report}"
    if result.success:
        # As they can be typed here: the environment need not be the activated one.
        here = shutil.which("python") == sys.executable
        python = "python" if here else shlex.quote(sys.executable)
        program = "heimdall-onnx" if here else f"{python} -m heimdall_onnx"
        folder = str(result.s3_uri).removesuffix("/model.onnx")
        text += (
            f'\nopen the model:    {python} -c "import heimdall_onnx; '
            f"print(heimdall_onnx.load_model('{result.s3_uri}'))\""
            f"\ncheck the release: {program} verify {folder}"
            f"\nbrowse in MLflow:  {program} services up"
        )
    return text


def _signed(result: ReleaseResult) -> str:
    if result.signer_sha256 is None:
        return "no, since HEIMDALL_SIGNING_KEY is not set; its hashes can be verified all the same"
    return f"by the key with SHA-256 {result.signer_sha256}"


def _most_costly(costs: Sequence[dict[str, Any]]) -> str:
    total = sum(cost["seconds"] for cost in costs)
    longest = sorted(costs, key=lambda cost: -float(cost["seconds"]))[:3]
    steps = ", ".join(f"{cost['step']} {cost['seconds']:.0f}" for cost in longest)
    return f"{total:.0f} s, most of it {steps}"


@main.command()
@click.argument(
    "recordings", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RECORDING…"
)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE.npz",
    help="The file to write.",
)
@click.option(
    "--channels",
    type=click.Choice(["receivers", "iqm"]),
    default="receivers",
    show_default=True,
    help="Three receivers, or I, Q and magnitude of one.",
)
@click.option(
    "--position",
    nargs=2,
    type=float,
    metavar="LAT LON",
    help="True position of the transmitter, degrees.",
)
@click.option(
    "--receiver",
    "receivers",
    multiple=True,
    nargs=3,
    type=(str, float, float),
    metavar="NAME LAT LON",
    help="Position of a receiver, degrees; may be repeated.",
)
@click.option("--n-fft", type=int, help="Samples in a Fourier transform.")
@click.option("--hop-length", type=int, help="Samples between frames.")
def features(
    recordings: tuple[Path, ...],
    output: Path,
    channels: str,
    position: tuple[float, float] | None,
    receivers: Sequence[tuple[str, float, float]],
    **parameters: int | None,
) -> None:
    """Turn IQ recordings into evaluation inputs."""
    from heimdall_onnx.features import FeatureParameters, write_features

    chosen = {k: v for k, v in parameters.items() if v is not None}
    made = write_features(
        recordings,
        output,
        parameters=FeatureParameters(channels=channels, **chosen),  # type: ignore[arg-type]
        position=position,
        receivers={name: (lat, lon) for name, lat, lon in receivers} or None,
    )
    click.echo(f"{made.path}: {made.count} windows, SHA-256 {made.sha256}")


@main.group()
def services() -> None:
    """The embedded store and MLflow, on loopback."""


def _show_services(call: Callable[[Settings], Sequence[Any]]) -> None:
    from heimdall_onnx.settings import Settings

    for status in call(Settings.load()):
        state = "running" if status.running else "stopped"
        detail = f"{status.address or '':<28}log {status.log}" if status.log else status.address
        click.echo(f"{status.name:<12}{state:<10}{detail or ''}")


@services.command()
def up() -> None:
    """Start what is not running."""
    from heimdall_onnx.services import services_up

    _show_services(services_up)


@services.command()
def down() -> None:
    """Stop both; their data stays."""
    from heimdall_onnx.services import services_down

    _show_services(services_down)


@services.command()
def status() -> None:
    """Say what is running, and where."""
    from heimdall_onnx.services import services_status

    _show_services(services_status)
