"""The command line: passes values through and turns results into output and exit codes.

Progress and messages go to standard error; results go to standard output. Everything heavy is
imported by the command that needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from heimdall_onnx.cli import release as cli_release
from heimdall_onnx.cli import releases as cli_releases
from heimdall_onnx.cli.data import data, position_option, receivers_option, recordings_argument
from heimdall_onnx.cli.fleet import fleet
from heimdall_onnx.cli.gallery import gallery
from heimdall_onnx.cli.help import Group
from heimdall_onnx.cli.train import train
from heimdall_onnx.common.errors import HeimdallError, ServiceError
from heimdall_onnx.common.signals import interrupt_once, was_interrupted
from heimdall_onnx.common.surroundings import own_streams, own_warnings, told
from heimdall_onnx.common.text import visible_lines

if TYPE_CHECKING:
    from heimdall_onnx.services.settings import Settings

INTERRUPTED = 130


class _Group(Group):
    def main(self, args: Sequence[str] | None = None, *others: Any, **options: Any) -> Any:
        if args is None:  # the process's own, which ends with the command
            interrupt_once()
            own_streams()
            own_warnings()
        return super().main(args, *others, **options)

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except (KeyboardInterrupt, Exception) as error:
            known = error if isinstance(error, HeimdallError) else told(error)
            if known is not None:
                click.echo(visible_lines(f"error: {known}"), err=True)
                context.exit(known.exit_code)
            if not was_interrupted(error):
                raise
            click.echo("interrupted", err=True)
            context.exit(INTERRUPTED)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--json-logs", is_flag=True, help="Log as JSON lines on a terminal too.")
@click.version_option(package_name="heimdall-onnx")
def main(json_logs: bool) -> None:
    """Release PyTorch checkpoints as ONNX models, with their evidence."""
    from heimdall_onnx.common.logs import configure_logs

    configure_logs(as_json=True if json_logs else None)


for command in (train, data, fleet, gallery, *cli_release.COMMANDS, *cli_releases.COMMANDS):
    main.add_command(command)


@main.command(
    example=r"""
        heimdall-onnx features A_iq.wav B_iq.wav C_iq.wav -o eval.npz \
          --position 50.0152 9.0112
    """
)
@recordings_argument
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
@position_option
@receivers_option
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
    from heimdall_onnx.localization.features import write_features
    from heimdall_onnx.localization.mel import FeatureParameters

    chosen = {k: v for k, v in parameters.items() if v is not None}
    made = write_features(
        recordings,
        output,
        parameters=FeatureParameters(channels=channels, **chosen),  # type: ignore[arg-type]
        position=position,
        receivers={name: (lat, lon) for name, lat, lon in receivers} or None,
    )
    click.echo(f"{made.path}: {made.count} windows, SHA-256 {made.sha256}")


@main.group(cls=Group)
def services() -> None:
    """The embedded store and MLflow, on loopback."""


def _show_services(call: Callable[[Settings], Sequence[Any]]) -> None:
    from heimdall_onnx.services.settings import Settings

    for status in call(Settings.load()):
        state = "running" if status.running else "stopped"
        click.echo(f"{status.name:<12}{state:<10}{status.address or '':<28}log {status.log}")


@services.command(example="heimdall-onnx services up")
def up() -> None:
    """Start what is not running."""
    from heimdall_onnx.services.embedded import services_up

    _show_services(services_up)


@services.command(example="heimdall-onnx services down")
def down() -> None:
    """Stop both; their data stays."""
    from heimdall_onnx.services.embedded import services_down

    _show_services(services_down)


@services.command(example="heimdall-onnx services status")
def status() -> None:
    """Say what is running, and where."""
    from heimdall_onnx.services.embedded import services_status

    _show_services(services_status)


@services.command(example="heimdall-onnx services check")
@click.option(
    "--bucket", default="heimdall-models", show_default=True, help="Bucket of the releases."
)
def check(bucket: str) -> None:
    """Try what releases ask of the store and the registry in use."""
    from heimdall_onnx.services.abilities import abilities
    from heimdall_onnx.services.connection import open_for_reading

    connection = open_for_reading()
    lacking = 0
    for one in abilities(connection, connection.bucket(bucket)):
        lacking += one.needed and not one.holds
        state = "yes" if one.holds else "NO" if one.needed else "no"
        click.echo(f"{one.name:<30}{state:<5}{one.found}")
    if lacking:
        raise ServiceError(f"{lacking} of the things that a release needs are not there")
