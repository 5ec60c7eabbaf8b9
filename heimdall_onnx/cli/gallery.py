"""The command that shows all releases of a model on one page."""

from __future__ import annotations

import json
from pathlib import Path

import click

from heimdall_onnx.cli.help import Command, json_option
from heimdall_onnx.common.errors import VerificationError


@click.command(cls=Command, example="heimdall-onnx gallery --serve")
@click.option("--bucket", default="heimdall-models", show_default=True)
@click.option("--prefix", help="Folder of the releases in it.  [default: as for --name]")
@click.option(
    "--name",
    default="",
    help="Only this registered model, in models/NAME.  [default: all in the reference model's]",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.html",
    help="Write the page to this file, without links to the reports, in place of the bucket.",
)
@click.option("--serve", is_flag=True, help="Show it on loopback, reports too, until Ctrl-C.")
@click.option(
    "--port", type=click.IntRange(1, 65535), help="Port of --serve.  [default: a free one]"
)
@json_option
def gallery(
    bucket: str,
    prefix: str | None,
    name: str,
    output: Path | None,
    serve: bool,
    port: int | None,
    as_json: bool,
) -> None:
    """Write a page of all releases and failed runs, to be sorted, filtered and searched.

    It goes to PREFIX/gallery/index.html of the bucket, with --name to PREFIX/gallery/NAME/, and its
    links work however that folder is served. What was read once is kept beside it, so that the next
    call reads only what is new.
    """
    if port is not None and not serve:
        raise click.UsageError("--port is for --serve")

    from heimdall_onnx.common.files import replace_file
    from heimdall_onnx.common.parameters import folder_of
    from heimdall_onnx.review.gallery.page import make_gallery, store_gallery, summary
    from heimdall_onnx.services.connection import open_for_reading

    place = open_for_reading().bucket(bucket)
    if not place.is_there():
        click.echo(f"there is no bucket {bucket} yet, and so no release", err=True)
        return
    if prefix is None:
        prefix = folder_of(name)
    made = make_gallery(place, prefix, name=name, links=output is None)
    if output is not None:
        with replace_file(output) as file:
            file.write(made.page)
        address, changed = str(output), True
    else:
        address, changed = place.uri(made.key), store_gallery(place, made)
    result = {"gallery": address, "changed": changed, "read": made.read, **made.counts()}
    if not serve:
        click.echo(json.dumps(result) if as_json else f"{address}: {summary(made.rows)}")
    else:
        if output is not None:
            made = make_gallery(place, prefix, name=name)
        from heimdall_onnx.common.signals import first_signal_interrupts
        from heimdall_onnx.review.gallery.server import GalleryServer

        with GalleryServer(place, prefix, made, port=port or 0) as server:
            click.echo(json.dumps({**result, "url": server.url}) if as_json else server.url)
            click.echo(
                "Ctrl-C ends it; the address is a secret, like a key to the reports", err=True
            )
            try:
                with first_signal_interrupts():
                    server.serve_forever()
            except KeyboardInterrupt:  # which is how it is meant to end
                click.echo("ended", err=True)
    if made.broken:
        raise VerificationError(f"these can't be believed, see the page: {', '.join(made.broken)}")
