"""The command that trains, and releases what it has trained."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from heimdall_onnx.cli.help import Command, ParameterOption, json_option
from heimdall_onnx.cli.release import parameter_options, show_result
from heimdall_onnx.common.errors import EvidenceError, HeimdallError, ParameterError
from heimdall_onnx.common.text import visible_lines

if TYPE_CHECKING:
    from heimdall_onnx.training.result import TrainingResult

_INTERRUPTED = 130
_option = partial(
    click.option,
    cls=ParameterOption,
    parameters="heimdall_onnx.training.parameters:TrainingParameters",
)


@click.command(
    cls=Command,
    example=r"""
        heimdall-onnx train --data-dir captures.zarr \
          --model-kwargs '{"backbone_size": "atto"}'
    """,
)
@_option("--data-dir", metavar="DATASET", help="What `data simulate` or `features` has made.")
@_option("--epochs", type=int, help="At most.")
@_option("--batch-size", type=int, help="Samples in a step, on each device.")
@_option("--learning-rate", "--lr", type=float, help="At the end of the warm-up.")
@_option("--weight-decay", type=float, help="AdamW's.")
@_option("--warmup", type=float, help="Share with a rising learning rate.")
@_option("--validation-split", type=float, help="Share of the events.")
@_option("--test-split", type=float, help="Share never trained on.")
@_option("--split-seed", type=int, help="Of the division into parts.")
@_option("--num-workers", type=int, help="Processes that read data.")
@_option("--accelerator", help="auto, cpu, gpu, …")
@_option("--devices", type=int, help="Number of devices.")
@click.option("--threads", type=int, help="On the CPU.  [default: one for each processor]")
@_option("--max-time", type=float, metavar="SECONDS", help="Of the training.")
@_option("--checkpoint-dir", help="For what is made.  [default: below HEIMDALL_HOME]")
@_option("--checkpoint", help="To start or go on from, or to release.")
@click.option("--resume-training", is_flag=True, help="Go on where it was left.")
@click.option("--export-only", is_flag=True, help="Release, without training.")
@_option("--experiment-name", help="Of MLflow.  [default: MLFLOW_EXPERIMENT_NAME]")
@_option("--run-name-prefix", help="Of the MLflow run.")
@_option("--model", help="Model class, pkg.mod:Class.")
@_option("--model-kwargs", help="Its keyword arguments, JSON.")
@_option("--seed", type=int, help="Of weights, order and dropout.")
@_option("--patience", type=int, help="Epochs without a better loss.")
@_option("--beta", type=float, help="Weight of the variance in the loss.")
@click.option("--release/--no-release", default=True, help="Release the best checkpoint.")
@parameter_options
@json_option
def train(extra: Sequence[tuple[str, str]], as_json: bool, **options: Any) -> None:
    """Train a model on a dataset, measure it on held-out events, and release it."""
    from heimdall_onnx.training.result import DIVERGED

    try:
        result = _train(options, extra, as_json=as_json)
    except (HeimdallError, KeyboardInterrupt) as error:
        for note in getattr(error, "__notes__", ()):
            click.echo(visible_lines(note), err=True)
        if as_json:
            failed = {"success": False, "exit_code": _INTERRUPTED, "error": "interrupted"}
            if isinstance(error, HeimdallError):
                failed |= {"exit_code": error.exit_code, "error": str(error)}
            click.echo(json.dumps(failed))
        raise
    release = result.release
    code = 0 if release is None else release.exit_code
    failed = {}
    if result.stopped == DIVERGED and release is None:
        code = EvidenceError.exit_code
        failed["error"] = (
            "the training diverged: its last validation loss is not finite; lower the learning "
            "rate. Its best checkpoint of before is kept, and released only on demand"
        )
    click.echo(summary(result), err=as_json)
    if as_json:
        content = {"success": code == 0, "exit_code": code, **failed, **result.to_dict()}
        click.echo(json.dumps(content, allow_nan=False))
    if failed:
        raise EvidenceError(failed["error"])
    if release is not None:
        show_result(release, as_json=as_json)
    click.get_current_context().exit(code)


def _train(
    options: dict[str, Any],
    extra: Sequence[tuple[str, str]],
    *,
    as_json: bool,
) -> TrainingResult:
    # Everything is checked before anything heavy is imported.
    from heimdall_onnx.common.parameters import check_parameters
    from heimdall_onnx.services.settings import Settings
    from heimdall_onnx.training.parameters import BY_TRAINING, NAMED, check_training
    from heimdall_onnx.training.train import train as run

    if own := BY_TRAINING & {name for name, _ in extra}:
        raise ParameterError(f"{', '.join(sorted(own))} can't be set here; the training sets it")
    given = {name: value for name, value in options.items() if value is not None}
    named = {name: given.pop(name) for name in NAMED if name in given}
    parameters, release = check_training(given), check_parameters(named | dict(extra))
    return run(
        parameters,
        Settings.load(),
        release=release,
        progress=sys.stderr.isatty() or not as_json,
    )


def summary(result: TrainingResult) -> str:
    """What a person wants to know of a training, and what to do next."""
    from heimdall_onnx.training.result import DIVERGED

    best = next(e for e in result.history if int(e["epoch"]) == result.best_epoch)
    why = {
        "time": ", out of time",
        "early stopping": ", no longer improving",
        DIVERGED: ", diverged",
    }
    error, middle = result.median_error_m, result.baseline_median_error_m
    lines = [
        (
            "epochs",
            f"{len(result.history)} in {result.seconds:.0f} s"
            f"{why.get(result.stopped or '', '')}; best {result.best_epoch + 1}",
        ),
        ("loss", f"{best['train_loss']:.3f} trained on, {best['val_loss']:.3f} validation"),
    ]
    if math.isfinite(error):  # of another checkpoint than the best nothing was measured
        line = (
            f"{error / 1000:.1f} km median on {result.samples['test']} held-out samples; always "
            f"answering the centroid {middle / 1000:.1f} km ({error / middle:.2f}×)"
        )
        lines.append(("error", line))
    if result.coverage:
        shares = ", ".join(f"{s:.0%} in {float(p):.0%}" for p, s in result.coverage.items())
        lines.append(("ellipses", f"{shares}"))
    lines += [("checkpoint", str(result.best)), ("held out", str(result.eval_data))]
    if result.run_id:
        lines.append(("MLflow run", result.run_id))
    text = "\n".join(f"{label:<11}{value}" for label, value in lines)
    same = f"the same options with --checkpoint-dir {shlex.quote(str(result.folder))}"
    if result.stopped in (None, "time"):
        text += f"\n\ngo on:     {same} --resume-training, and more --epochs or --max-time"
    if result.release is None or not result.release.success:
        text += f"\nrelease:   {same} --export-only"
    return visible_lines(text)
