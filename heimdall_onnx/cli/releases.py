"""The commands about releases that are there: list, check, decide, repeat, mend.

Thin, as the rest of the command line: values in, results out, exit codes from the errors.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from heimdall_onnx.cli.help import Command, all_of, json_option
from heimdall_onnx.common.errors import HeimdallError, VerificationError

if TYPE_CHECKING:
    from heimdall_onnx.archive.release import Release
    from heimdall_onnx.review.promotion import Review
    from heimdall_onnx.services.connection import Connection
    from heimdall_onnx.services.settings import Settings

_Command = Callable[..., Any]


def _place_options(command: _Command) -> _Command:
    """Bucket and folder of releases, the folder by itself or by the model's name."""

    @wraps(command)
    def placed(*, prefix: str | None, name: str, **options: Any) -> None:
        from heimdall_onnx.common.parameters import folder_of

        command(prefix=folder_of(name) if prefix is None else prefix, **options)

    return all_of(
        click.option("--bucket", default="heimdall-models", show_default=True),
        click.option("--prefix", help="Folder of the releases in it.  [default: as for --name]"),
        click.option(
            "--name",
            default="",
            help="Model whose folder it is, models/NAME.  [default: the reference model]",
        ),
    )(placed)


def _trust_options(command: _Command) -> _Command:
    """Whose signature is asked for, as settings."""

    @wraps(command)
    def trusting(
        *, public_key: Path | None, trusted_certificates: Path | None, **options: Any
    ) -> None:
        from heimdall_onnx.services.settings import Settings

        given = {"public_key": public_key, "trusted_certificates": trusted_certificates}
        # One given here takes the place of both in the environment.
        update = given if any(given.values()) else {}
        try:
            settings = Settings.load().model_copy(update=update)
        except HeimdallError as error:
            _print_failed(error, options["as_json"])
            raise
        command(settings=settings, **options)

    file = click.Path(exists=True, dir_okay=False, path_type=Path)
    return all_of(
        click.option(
            "--public-key",
            type=file,
            help="Public key (PEM) of its signer; by default HEIMDALL_PUBLIC_KEY.",
        ),
        click.option(
            "--trusted-certificates",
            type=file,
            help="Root certificates (PEM) of its signer; by default HEIMDALL_TRUSTED_CERTIFICATES.",
        ),
    )(trusting)


_decision_options = all_of(
    click.option("--reviewer", required=True, help="Who decides."),
    click.option("--note", required=True, help="Why."),
    _trust_options,
    json_option,
)


_quality_options = all_of(
    click.option(
        "--metric",
        help="How good answers are: top1, f1, rmse, pkg:function…  [default: as it was released]",
    ),
    click.option("--max-loss", type=click.FloatRange(min=0), help="How much of it may be lost."),
    click.option(
        "--confidence",
        type=click.FloatRange(min=0.5, max=1, max_open=True),
        help="How surely that is shown.",
    ),
)


def _reference_model() -> str:
    from heimdall_onnx.common.parameters import REFERENCE_MODEL

    return REFERENCE_MODEL


_name_argument = click.argument("name", default=_reference_model)


def _connect(settings: Settings | None = None) -> Connection:
    from heimdall_onnx.services.connection import open_for_reading

    return open_for_reading(settings)


def _release(version: str, bucket: str, prefix: str, settings: Settings | None = None) -> Release:
    """A release: of a version, an address, or NAME@ALIAS and NAME/NUMBER."""
    from heimdall_onnx.archive.find import find_release

    return find_release(_connect(settings), version, bucket=bucket, prefix=prefix)


def _say(text: str, indent: int = 0, err: bool = False) -> None:
    """Print a line that may hold text from a bucket, which must not steer a terminal."""
    from heimdall_onnx.common.text import visible

    click.echo(" " * indent + visible(text), err=err)


def _print_json(result: Any) -> None:
    # ASCII: what it holds of a bucket's must not steer a terminal.
    click.echo(json.dumps(result, allow_nan=False))


def _print_failed(error: HeimdallError, as_json: bool) -> None:
    if as_json:
        _print_json({"success": False, "error": str(error)})


@click.command("list", cls=Command, example="heimdall-onnx list --after v20261120 --limit 20")
@_place_options
@click.option("--limit", type=click.IntRange(min=1), help="How many at most.  [default: all]")
@click.option(
    "--after",
    default="",
    metavar="VERSION",
    help="Only later ones; the beginning of a version will do: v20261120 begins with that day.",
)
def list_(bucket: str, prefix: str, limit: int | None, after: str) -> None:
    """List the releases, oldest first.

    With --limit or --after no more is read than what is shown, however many there are.
    """
    from heimdall_onnx.archive.manifest import read_manifest

    place = _connect().bucket(bucket)
    if not place.is_there():
        click.echo(f"there is no bucket {bucket} yet, and so no release", err=True)
        return
    unreadable = []
    found = place.list_versions(prefix, after=after, limit=limit and limit + 1)
    if not found:
        _say(
            f"there is no release in {place.uri(prefix)}{f' after {after}' if after else ''}; "
            "--name and --prefix are for other models and folders",
            err=True,
        )
    for version in found[:limit]:
        try:
            manifest = read_manifest(place, f"{prefix.strip('/')}/{version}")
        except VerificationError as error:
            unreadable.append(version)
            _say(f"{version}  {error}")
            continue
        _say(
            f"{version}  {manifest.said.verdict:<14}"
            f"{'signed' if manifest.said.signature else 'unsigned':<10}"
            f"{manifest.model_name} version {manifest.model_version}"
            + (f"  recommended {manifest.recommended}" if manifest.said.variants else "")
        )
    if limit and found[limit:]:
        click.echo(f"there are more: --after {found[limit - 1]}", err=True)
    if unreadable:
        raise VerificationError(f"the manifest can't be read of {', '.join(unreadable)}")


@click.command(cls=Command, example="heimdall-onnx show detector@staging")
@click.argument("version")
@_place_options
@json_option
def show(version: str, bucket: str, prefix: str, as_json: bool) -> None:
    """Print the manifest of VERSION, which may also be NAME@ALIAS or an s3:// address.

    Below it, on standard error, come the variants: what became of each, the size of its file, and
    which one is recommended.
    """
    manifest = _release(version, bucket, prefix).manifest
    click.echo(json.dumps(manifest.data, indent=None if as_json else 2))
    variants = manifest.said.variants
    for one in variants.judged if variants and not as_json else ():
        line = f"{one.name:<16}{one.status:<13}"
        if one.status == "passed":
            line += f"{one.size_bytes / 1e6:>9.2f} MB  {one.file}"
            line += "  recommended" if one.name == manifest.recommended else ""
        else:
            line += one.reason
        _say(line.rstrip(), err=True)


@click.command(cls=Command, example="heimdall-onnx verify detector@staging")
@click.argument("version")
@_place_options
@_trust_options
@click.option(
    "--no-content",
    is_flag=True,
    help="Leave out checkpoint and evaluation data, which a consumer may not read.",
)
@json_option
def verify(
    version: str,
    bucket: str,
    prefix: str,
    settings: Settings,
    no_content: bool,
    as_json: bool,
) -> None:
    """Download VERSION again and hold it against manifest, signature and registry."""
    from dataclasses import asdict

    from heimdall_onnx.archive.verify import verify_release

    release = _release(version, bucket, prefix, settings)
    findings = verify_release(release, content=not no_content)
    wrong = [finding for finding in findings if not finding.holds]
    if as_json:
        _print_json({"holds": not wrong, "findings": [asdict(f) for f in findings]})
    else:
        for finding in findings:
            _say(f"{'holds   ' if finding.holds else 'DIFFERS '} {finding.what}")
            if not finding.holds:
                _say(f"expected {finding.expected}", indent=9)
                _say(f"found    {finding.found}", indent=9)
    if wrong:
        raise VerificationError(
            f"{len(wrong)} of {len(findings)} findings differ; don't use this release"
        )


@click.command(
    cls=Command,
    example=r"""
        heimdall-onnx promote detector@staging --to production \
          --reviewer "$(id -un)" --note "parity looked at"
    """,
)
@click.argument("version")
@_place_options
@click.option("--to", "alias", default="production", show_default=True, help="The alias.")
@_quality_options
@click.option("--max-slowdown", type=click.FloatRange(min=0), help="Share; 0.1 by default.")
@click.option("--calls", type=click.IntRange(min=12), help="Timed calls of each; 200 by default.")
@click.option("--allow-smoke", is_flag=True, help="Take a test run too.")
@click.option("--allow-not-shown", is_flag=True, help="Take it though too few samples tell.")
@click.option("--no-compare", is_flag=True, help="Don't run it against what it would replace.")
@_decision_options
def promote(
    version: str,
    bucket: str,
    prefix: str,
    alias: str,
    reviewer: str,
    note: str,
    settings: Settings,
    as_json: bool,
    no_compare: bool,
    max_slowdown: float | None,
    **limits: Any,
) -> None:
    """Verify VERSION again, compare it with what holds the alias, record that, move the alias."""
    from heimdall_onnx.review.compare.gates import Limits
    from heimdall_onnx.review.promotion import promote_release

    given = {"slowdown": max_slowdown, **limits}
    review = promote_release(
        _release(version, bucket, prefix, settings),
        alias=alias,
        reviewer=reviewer,
        note=note,
        limits=Limits(**{k: v for k, v in given.items() if v is not None}),
        compare=not no_compare,
    )
    _show_review(review, as_json)


@click.command(
    cls=Command,
    example=r"""
        heimdall-onnx rollback detector --to-previous \
          --reviewer "$(id -un)" --note "too slow in the field"
    """,
)
@_name_argument
@click.option("--alias", default="production", show_default=True, help="The alias.")
@click.option("--bucket", default="heimdall-models", show_default=True)
@click.option("--to-previous", is_flag=True, help="To the version that it pointed at before.")
@click.option("--to", "version", help="To this version, which it pointed at earlier.")
@_decision_options
def rollback(
    name: str,
    alias: str,
    bucket: str,
    to_previous: bool,
    version: str | None,
    reviewer: str,
    note: str,
    settings: Settings,
    as_json: bool,
) -> None:
    """Point the alias of the registered model NAME back at an earlier version that verifies."""
    from heimdall_onnx.review.promotion import roll_back

    if to_previous == (version is not None):
        raise click.UsageError("say where to: --to-previous, or --to VERSION")
    review = roll_back(
        _connect(settings),
        bucket,
        name,
        alias=alias,
        reviewer=reviewer,
        note=note,
        version=version,
    )
    _show_review(review, as_json)


def _show_review(review: Review, as_json: bool) -> None:
    from pydantic_core import to_jsonable_python

    from heimdall_onnx.review.compare.words import loss_words

    if as_json:
        _print_json(to_jsonable_python(review, inf_nan_mode="strings"))
        return
    before = f"version {review.previous}" if review.previous else "nothing"
    click.echo(
        f"{review.model_name}@{review.alias} points at version {review.version} now, "
        f"before at {before}\nrelease  {review.release}\nrecord   {review.record_uri}"
        + (f"\npage     {review.page_uri}" if review.page_uri else "")
    )
    if review.comparison:
        found = review.comparison
        for line in (*map(loss_words, found.quality), *map(str, found.ratios), *found.notes):
            _say(line, indent=9)


@click.command(cls=Command, example="heimdall-onnx history detector")
@_name_argument
@click.option("--bucket", default="heimdall-models", show_default=True)
@json_option
def history(name: str, bucket: str, as_json: bool) -> None:
    """Show where the aliases of the registered model NAME point and pointed, and who moved them."""
    from heimdall_onnx.review.promotion import alias_history

    histories = alias_history(_connect(), bucket, name)
    if as_json:
        _print_json(
            [
                {
                    "alias": one.alias,
                    "points_at": one.points_at,
                    "problem": one.problem,
                    "moves": [move.model_dump() for move in one.moves],
                }
                for one in histories
            ]
        )
    else:
        for one in histories:
            _say(f"{name}@{one.alias}: version {one.points_at or 'none'}")
            for move in one.moves:
                version = f"version {move.version or 'none'}"
                note = f": {move.note}" if move.note else ""
                _say(
                    f"{move.number:>4}  {move.time}  {move.action:<9}{version}  by {move.by}{note}",
                    indent=2,
                )
    if wrong := [f"{name}@{one.alias}: {one.problem}" for one in histories if one.problem]:
        raise VerificationError("; ".join(wrong))


@click.command(cls=Command, example="heimdall-onnx reproduce detector@staging")
@click.argument("version")
@_place_options
@_trust_options
@click.option("--cell-timeout", type=click.IntRange(min=1), help="Seconds for one cell.")
@json_option
def reproduce(
    version: str,
    bucket: str,
    prefix: str,
    settings: Settings,
    cell_timeout: int | None,
    as_json: bool,
) -> None:
    """Run the notebook of VERSION again, on its checkpoint and data, and compare what comes out."""
    import sys

    from heimdall_onnx.review.reproduce.run import reproduce_release

    reproduction = reproduce_release(
        _release(version, bucket, prefix, settings),
        cell_timeout=cell_timeout,
        progress=sys.stderr.isatty() or not as_json,
    )
    _print_json(reproduction.to_dict()) if as_json else click.echo(reproduction.to_text())
    reproduction.require()


@click.command(
    cls=Command,
    no_args_is_help=True,
    example="heimdall-onnx compare detector@production detector@staging --store",
)
@click.argument("a")
@click.argument("b")
@_place_options
@click.option(
    "--eval-data",
    metavar="FILE.npz",
    help="Other evaluation inputs, or a dataset; by default the newer release's own.",
)
@_quality_options
@click.option("--no-latency", is_flag=True, help="Leave latency out.")
@click.option("--calls", type=click.IntRange(min=12), help="Timed calls of each; 200 by default.")
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Where the report goes; by default a folder of its own below HEIMDALL_HOME.",
)
@click.option("--store", is_flag=True, help="Store the report beside the newer release too.")
@_trust_options
@click.option("--cell-timeout", type=click.IntRange(min=1), help="Seconds for one cell.")
@json_option
def compare(
    a: str,
    b: str,
    bucket: str,
    prefix: str,
    eval_data: str | None,
    no_latency: bool,
    calls: int | None,
    output: Path | None,
    store: bool,
    settings: Settings,
    cell_timeout: int | None,
    as_json: bool,
    **quality: Any,
) -> None:
    """Run releases A and B on the same inputs, and say in what they differ.

    B is the one that would take A's place. Each is a version, NAME@ALIAS, NAME/VERSION or an s3://
    address; both must verify. The exit code is 0 whatever the comparison says; `promote` is what
    refuses.
    """
    import sys

    from heimdall_onnx.common.parameters import check_as
    from heimdall_onnx.review.compare.pair import ComparisonParameters
    from heimdall_onnx.review.compare.run import compare_releases

    given = {
        "a": a,
        "b": b,
        "bucket": bucket,
        "prefix": prefix.strip("/"),
        "measure_latency": not no_latency,
        "eval_data": eval_data,
        "calls": calls,
        "output_dir": output and str(output),
        **quality,
    }
    try:
        result = compare_releases(
            check_as(ComparisonParameters, {n: v for n, v in given.items() if v is not None}),
            settings,
            store=store,
            cell_timeout=cell_timeout,
            progress=sys.stderr.isatty() or not as_json,
        )
    except HeimdallError as error:
        _print_failed(error, as_json)
        raise
    if as_json:
        _print_json(result)
        return
    _say(f"{result['sentence']}.")
    for reason in result["worse"]:
        _say(f"worse than a promotion allows: {reason}")
    for reason in result["not_shown"]:
        _say(f"refused by a promotion without --allow-not-shown: {reason}")
    _say(f"report    {result['report']}")
    _say(f"rendered  file://{result['report_html']}")
    for address in filter(None, (result["report_uri"], result["report_html_uri"])):
        _say(f"stored    {address}")


@click.command(cls=Command, example="heimdall-onnx doctor --older-than 1 --fix")
@_place_options
@click.option(
    "--older-than",
    type=click.FloatRange(min=0),
    default=24.0,
    show_default=True,
    metavar="HOURS",
    help="What is younger may belong to a release that is under way.",
)
@click.option("--fix", is_flag=True, help="Show what would be done, and do it.")
@json_option
def doctor(bucket: str, prefix: str, older_than: float, fix: bool, as_json: bool) -> None:
    """Find what killed runs and lost services have left behind."""
    from heimdall_onnx.review.doctor import diagnose, mend_all

    found = diagnose(_connect(), bucket, prefix, older_than=timedelta(hours=older_than))
    if as_json:
        _print_json(
            [{"kind": f.kind, "what": f.what, "why": f.why, "remedy": f.remedy} for f in found]
        )
    else:
        for leftover in found:
            _say(f"{leftover.kind}: {leftover.what}")
            _say(leftover.why, indent=4)
            _say(leftover.remedy or "for a person to decide: nothing is done about it", indent=4)
    failed = mend_all(found) if fix else ()
    left = [leftover for leftover in found if not (fix and leftover.remedy)]
    if fix:
        click.echo(f"mended {len(found) - len(left) - len(failed)} of {len(found)}", err=True)
    if failed:
        raise VerificationError("could not be mended:\n  - " + "\n  - ".join(failed))
    if left:
        raise VerificationError(
            f"{len(left)} things need attention"
            + ("" if fix else "; --fix does what is said below each")
        )
    if not found:
        click.echo("nothing is left over", err=True)


@click.command(cls=Command, example="heimdall-onnx link detector@staging --hours 24")
@click.argument("version")
@_place_options
@click.option(
    "--hours",
    type=click.FloatRange(min=0, max=168, min_open=True),
    default=24.0,
    show_default=True,
    help="How long the links work.",
)
def link(version: str, bucket: str, prefix: str, hours: float) -> None:
    """Print links that open the report of VERSION without credentials, for a while."""
    from heimdall_onnx.review.links import share_release

    release = _release(version, bucket, prefix)
    for one in share_release(release, expires_s=max(1, int(hours * 3600))):
        click.echo(f"{one.name:<14}{one.url.get_secret_value()}")


@click.command(cls=Command, example="heimdall-onnx policy reviewer --bucket heimdall-models")
@click.argument("role", type=click.Choice(["releaser", "reviewer", "consumer"]))
@_place_options
@click.option("--artifact-uri", default="s3://heimdall-mlflow", show_default=True)
@click.option("--conditional", is_flag=True, help="Use s3:if-none-match, which Amazon S3 knows.")
def policy(role: str, **place: Any) -> None:
    """Print the S3 policy that gives an identity what ROLE needs, and no more."""
    from heimdall_onnx.review.policies import Place, identity_policy

    click.echo(json.dumps(identity_policy(role, Place(**place)), indent=2))


COMMANDS = (
    list_,
    show,
    verify,
    promote,
    rollback,
    history,
    reproduce,
    compare,
    doctor,
    link,
    policy,
)
