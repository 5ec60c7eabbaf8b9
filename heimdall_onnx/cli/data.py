"""The commands about datasets: simulate one, make one of recordings, look at one.

Thin, as the rest of the command line: values in, results out, exit codes from the errors.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from heimdall_onnx.cli.help import Group, as_yaml, json_option, progress_bar

if TYPE_CHECKING:
    from heimdall_onnx.data.dataset.dataset import Dataset

_output = click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="DATASET",
    help="The folder to make.",
)

receivers_option = click.option(
    "--receiver",
    "receivers",
    multiple=True,
    nargs=3,
    type=(str, float, float),
    metavar="NAME LAT LON",
    help="Position of a receiver, degrees; may be repeated.",
)


@click.group(cls=Group)
def data() -> None:
    """Datasets of features with positions, for training."""


@data.command(example="heimdall-onnx data simulate -o captures.zarr --events 2000")
@_output
@click.option("--events", type=click.IntRange(min=1), default=2000, show_default=True)
@click.option(
    "--windows",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Samples of each event.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@json_option
def simulate(output: Path, events: int, windows: int, seed: int, as_json: bool) -> None:
    """Simulate transmissions between three receivers; equal seeds give equal datasets."""
    from heimdall_onnx.localization.simulate import simulate_dataset

    with progress_bar() as progress:
        made = simulate_dataset(
            output,
            events=events,
            windows_per_event=windows,
            seed=seed,
            progress=progress,
        )
    _say_written(made, as_json)


position_option = click.option(
    "--position",
    nargs=2,
    type=float,
    metavar="LAT LON",
    help="True position of the transmitter, of all recordings, degrees.",
)
recordings_argument = click.argument(
    "recordings", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RECORDING…"
)


@data.command(
    example="heimdall-onnx data features *_iq.wav -o captures.zarr --positions positions.csv"
)
@recordings_argument
@_output
@position_option
@click.option(
    "--positions",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.csv",
    help="True positions; columns recording (the file's name), latitude, longitude.",
)
@receivers_option
@click.option(
    "--mixed-receivers", is_flag=True, help="Take events of different receivers, in any order."
)
@json_option
def features(
    recordings: tuple[Path, ...],
    output: Path,
    position: tuple[float, float] | None,
    positions: Path | None,
    receivers: Sequence[tuple[str, float, float]],
    mixed_receivers: bool,
    as_json: bool,
) -> None:
    """Turn IQ recordings of any number of events into a dataset."""
    from heimdall_onnx.localization.dataset import ingest_recordings

    if position is not None and positions is not None:
        raise click.UsageError("give --position or --positions, not both")
    with progress_bar() as progress:
        made = ingest_recordings(
            recordings,
            output,
            position=position,
            positions=positions,
            receivers={name: (lat, lon) for name, lat, lon in receivers} or None,
            mixed_receivers=mixed_receivers,
            progress=progress,
        )
    _say_written(made, as_json)


@data.command(example="heimdall-onnx data info captures.zarr --verify")
@click.argument("dataset", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Read everything and hold it against the digest.")
@json_option
def info(dataset: Path, verify: bool, as_json: bool) -> None:
    """Say what is in DATASET, and where it comes from."""
    from heimdall_onnx.data.dataset.dataset import open_dataset

    opened = open_dataset(dataset)
    described = _describe(opened)
    if verify:
        opened.verify()
        described["verified"] = True
    click.echo(json.dumps(described, allow_nan=False) if as_json else as_yaml(described))


@data.command(example="heimdall-onnx data upload captures.zarr s3://datasets/captures.zarr")
@click.argument("dataset", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("address", metavar="s3://BUCKET/FOLDER")
@json_option
def upload(dataset: Path, address: str, as_json: bool) -> None:
    """Copy DATASET into a bucket, where workers can read it; what is there is not sent again."""
    from heimdall_onnx.archive.content import upload_dataset
    from heimdall_onnx.common.errors import ParameterError
    from heimdall_onnx.data.dataset.dataset import open_dataset
    from heimdall_onnx.services.connection import open_for_reading
    from heimdall_onnx.services.store import parse_uri

    name, folder = parse_uri(address)
    if not (folder := folder.strip("/")):
        raise ParameterError(f"expected a folder of its own, s3://{name}/folder, found {address}")
    opened = open_dataset(dataset)
    bucket = open_for_reading().bucket(name)
    bucket.ensure()
    stored = upload_dataset(bucket, opened, folder)
    text = f"{stored}: {opened.count} samples, digest {opened.digest}"
    click.echo(json.dumps({"address": stored, "digest": opened.digest}) if as_json else text)


def _say_written(dataset: Dataset, as_json: bool) -> None:
    text = f"{dataset.path}: {dataset.count} samples of {len(dataset.event_names)} events"
    text += f", digest {dataset.digest}"
    click.echo(json.dumps(_describe(dataset), allow_nan=False) if as_json else text)


def _describe(dataset: Dataset) -> dict[str, Any]:
    return {
        "path": str(dataset.path),
        "samples": dataset.count,
        "events": len(dataset.event_names),
        "labelled": not {"positions", "labels"}.isdisjoint(dataset.arrays),
        "arrays": {
            name: {"dtype": spec.dtype, "shape": list(spec.shape)}
            for name, spec in dataset.arrays.items()
        },
        "bytes": dataset.stored_bytes,
        "shards": dataset.shards,
        "digest": dataset.digest,
        "provenance": dataset.meta.get("provenance"),
        "receivers": {name: list(where) for name, where in dataset.receivers.items()},
    }
