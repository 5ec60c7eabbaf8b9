"""The command that releases a fleet of checkpoints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from heimdall_onnx.cli.help import Command
from heimdall_onnx.cli.release import model_options, parameter_options
from heimdall_onnx.common.errors import ParameterError, UnavailableError
from heimdall_onnx.common.text import visible_lines

if TYPE_CHECKING:
    from heimdall_onnx.release.fleet.item import ItemOutcome


@click.command(
    cls=Command,
    example=r"""
        heimdall-onnx fleet --checkpoints 'runs/*.pt' --model detector:Detector \
          --eval-data eval.npz --name 'detector-{stem}'
    """,
)
@click.argument(
    "plan",
    required=False,
    metavar="PLAN.yml",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
)
@click.option(
    "--checkpoints",
    multiple=True,
    metavar="GLOB",
    help="Checkpoints to release with the options below, in place of a plan; may be repeated.",
)
@model_options
@parameter_options
@click.option("--memory", help="Memory that one release may need, e.g. 4GiB.")
@click.option("--scheduler", default="", help="Address of a Dask scheduler, e.g. tls://host:8786.")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Workers on this machine.  [default: one for each processor or, to measure, core]",
)
@click.option("--force", is_flag=True, help="Release anew what is released already.")
@click.option("--json", "as_json", is_flag=True, help="Print outcomes and end as lines of JSON.")
def fleet(
    plan: Path | None,
    checkpoints: Sequence[str],
    extra: Sequence[tuple[str, str]],
    memory: str | None,
    scheduler: str,
    workers: int | None,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Release every checkpoint of PLAN.yml, or of --checkpoints, that is not released yet.

    Items are spread over Dask's workers. Called again, it goes on where it was left.
    """
    if scheduler and workers:
        raise ParameterError(
            "--workers is for workers on this machine; those of --scheduler are started there"
        )
    values = {name: value for name, value in options.items() if value is not None} | dict(extra)
    if (plan is None) == (not checkpoints):
        raise ParameterError("expected either PLAN.yml or --checkpoints, found both or none")
    if plan is not None and (values or memory):
        given = ", ".join(sorted({*values, *(["memory"] if memory else [])}))
        raise ParameterError(f"with a plan, parameters are in it; these were given beside: {given}")

    from heimdall_onnx.common.signals import first_signal_interrupts
    from heimdall_onnx.release.fleet.plan import plan_checkpoints, read_plan
    from heimdall_onnx.services.settings import Settings

    settings = Settings.load()
    planned = (
        plan_checkpoints(checkpoints, values, name="fleet", memory=memory)
        if plan is None
        else read_plan(plan)
    )
    try:
        from heimdall_onnx.release.fleet.report import store_report
        from heimdall_onnx.release.fleet.run import run_fleet
    except ModuleNotFoundError as error:
        raise UnavailableError(
            f"fleets need the package {error.name}: pip install 'heimdall-onnx[fleet]'"
        ) from error

    def say_start(dashboard: str, workers: int) -> None:
        where = f", dashboard {dashboard}" if dashboard else ""
        begun = f"fleet {planned.name}: {len(planned.items)} items on {workers} workers"
        click.echo(f"{begun}{where}", err=True)

    with first_signal_interrupts():
        result = run_fleet(
            planned,
            settings,
            scheduler=scheduler,
            workers=workers or 0,
            force=force,
            on_start=say_start,
            on_outcome=partial(_show_outcome, as_json=as_json),
        )
        ended = {status: result.count(status) for status in ("released", "kept", "failed")}
        counts = ", ".join(f"{count} {status}" for status, count in ended.items())
        click.echo(f"fleet {result.name}: {counts}, in {result.seconds:.0f} s", err=True)
        from heimdall_onnx.services.connection import connect

        bucket = connect(settings).bucket(planned.items[0].parameters.bucket)
        stored = store_report(bucket, planned, result, settings.home)
        click.echo(
            f"report: {stored.report_html_uri}\n        file://{stored.local_report}", err=True
        )
    if as_json:
        # What a program needs that has not kept the other lines.
        end = {
            "success": result.exit_code == 0,
            "fleet": result.name,
            **ended,
            "seconds": result.seconds,
            "workers": result.workers,
            "folder_uri": stored.folder_uri,
            "report_html_uri": stored.report_html_uri,
            "local_report": str(stored.local_report),
        }
        click.echo(json.dumps(end, allow_nan=False))
    click.get_current_context().exit(result.exit_code)


def _show_outcome(outcome: ItemOutcome, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(outcome.to_dict(), allow_nan=False))
        return
    where = outcome.result.get("s3_uri") or outcome.result.get("report_html_uri") or ""
    attempts = f", attempt {outcome.attempts}" if outcome.attempts > 1 else ""
    text = f"{outcome.label}: {outcome.status}, {outcome.seconds:.1f} s{attempts}"
    click.echo(visible_lines(f"{text}  {where}".rstrip()))
    if outcome.error:
        click.echo(visible_lines(f"error: {outcome.label}: {outcome.error}"), err=True)
