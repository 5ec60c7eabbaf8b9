"""All releases of a folder on one page: what is on it, how it behaves, and who may see it."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import nbformat
import pytest
import records
import structlog
from browser import DESKTOP, NARROW, chromium, violations
from click.testing import CliRunner, Result
from hostile import EVERYTHING, HOST, MARK
from PIL import Image, ImageDraw
from quick_release import PREFIX, Factory, make_notebook

from heimdall_onnx.archive.release import Release
from heimdall_onnx.cli.main import main
from heimdall_onnx.review.doctor import diagnose
from heimdall_onnx.review.gallery.facts import read_failed, shrink
from heimdall_onnx.review.gallery.page import make_gallery, store_gallery
from heimdall_onnx.review.gallery.rows import KEPT, collect_rows
from heimdall_onnx.review.gallery.server import GalleryServer
from heimdall_onnx.review.promotion import promote_release
from heimdall_onnx.services.connection import Connection, connect
from heimdall_onnx.services.store import Bucket

pytestmark = pytest.mark.services

BUCKET = "test-gallery"
HOSTILE_BUCKET = "test-gallery-hostile"
NOTE = "held against recordings of a whole week"


def measured(speedup: float, excess: float, median_m: float | None = None) -> dict:
    """What a notebook would have recorded of one output."""
    gate = {**records.GATE, "name": "elements", "limit": "0 beyond", "measured": 0}
    output = records.output(mean=excess * 1e-6, excess=excess)
    cell = {"kind": "evaluation data", "batch_size": 8, "samples": 64, "outputs": [output]}
    return {
        "gates": [gate],
        "metrics": {} if median_m is None else {"error_onnx_median_m": median_m},
        "parity": {"cells": [cell]},
        "latency": {"speedup": records.speedup(speedup)},
    }


def figure(alt: str) -> nbformat.NotebookNode:
    """The cell of the parity figure."""
    picture = Image.new("RGBA", (880, 640))
    ImageDraw.Draw(picture).line((0, 640, 880, 0), fill="black", width=4)
    png = io.BytesIO()
    picture.save(png, "PNG")
    shown = nbformat.v4.new_output(
        "display_data",
        data={"image/png": base64.b64encode(png.getvalue()).decode()},
        metadata={"image/png": {"alt": alt}},
    )
    return nbformat.v4.new_code_cell(
        "plot.parity_scatter(parity)", id="parity-scatter", outputs=[shown], execution_count=1
    )


def keep_failed(
    client, bucket: str, version: str, record: dict, *cells, name: str = "net", **given
) -> None:
    """A failed run's folder, as the runner leaves it."""
    notebook = json.loads(make_notebook(records.record_json(**record), cells))
    notebook["metadata"]["papermill"] = {"parameters": {"name": name, **given}}
    folder = f"{PREFIX}/failed/{version}"
    Bucket(client, bucket).upload_bytes(json.dumps(notebook).encode(), f"{folder}/report.ipynb")
    Bucket(client, bucket).upload_bytes(b"<h1>failed</h1>", f"{folder}/report.html")


@dataclass(frozen=True)
class Place:
    """A bucket with releases of all sorts."""

    connection: Connection
    factory: Factory
    versions: dict[str, str]

    @property
    def client(self):
        return self.connection.client

    def gallery(self, **options):
        return make_gallery(Bucket(self.client, BUCKET), PREFIX, **options)


@pytest.fixture(scope="module")
def settings(make_settings):
    return make_settings("gallery")


@pytest.fixture(scope="module")
def place(settings, tmp_path_factory) -> Place:
    connection = connect(settings)
    factory = Factory(connection, BUCKET, tmp_path_factory.mktemp("gallery"))
    alt = figure("Largest difference 1.2e-7 degrees")
    first = factory(recorded=measured(2.0, 0.5, 120.0), cells=[alt])
    second = factory(recorded=measured(2.6, 0.2, 90.0), cells=[alt], recommended="int8-minmax")
    smoke = factory(recorded=measured(9.0, 0.1), verdict="pass (smoke)", alias=None)
    other = replace(factory, name="other")(recorded=measured(1.5, 0.9), alias=None)
    promote_release(
        Release.at(connection, first.uri),
        alias="production",
        reviewer="the reviewer",
        note=NOTE,
        compare=False,
    )
    failing = measured(2.2, 3.5, 110.0)
    failing["gates"][0] |= {"passed": False, "measured": 7}
    keep_failed(connection.client, BUCKET, "v20200101_000000", failing, alt, profile="quick")
    manifests = {"first": first, "second": second, "smoke": smoke, "other": other}
    versions = {name: manifest.version for name, manifest in manifests.items()}
    return Place(connection, factory, {**versions, "failed": "v20200101_000000"})


@contextmanager
def counted(client) -> Iterator[Counter]:
    """Calls of the store by name."""
    calls: Counter[str] = Counter()

    def count(model, **_) -> None:
        calls[model.name] += 1

    client.meta.events.register("before-call.s3", count)
    try:
        yield calls
    finally:
        client.meta.events.unregister("before-call.s3", count)


# What is collected


def test_every_release_and_failed_run_is_collected_newest_first(place):
    rows = collect_rows(Bucket(place.client, BUCKET), PREFIX).rows
    names = {version: name for name, version in place.versions.items()}
    by_name = {names[row.facts.version]: row for row in rows}
    assert list(by_name) == ["other", "smoke", "second", "first", "failed"]
    states = {name: row.facts.state for name, row in by_name.items()}
    assert states == {
        "other": "pass",
        "smoke": "smoke",
        "second": "pass",
        "first": "pass",
        "failed": "fail",
    }
    first, second, failed = (by_name[name] for name in ("first", "second", "failed"))
    facts = first.facts
    assert (facts.model_name, facts.model_version) == ("net", "1")
    assert (facts.speedup.ratio, facts.speedup.low, facts.speedup.high) == (2.0, 1.9, 2.1)
    assert (facts.max_error, facts.median_error_m) == (0.5, 120.0)
    assert facts.mean_error == pytest.approx(0.05)
    assert facts.thumbnail.alt == "Largest difference 1.2e-7 degrees"
    assert first.report == f"{first.facts.version}/report.html"
    assert first.aliases == ("production",)
    (decision,) = first.decisions
    assert (decision.by, decision.action, decision.alias) == (
        "the reviewer",
        "promote",
        "production",
    )
    assert decision.note == NOTE
    assert (second.aliases, second.facts.recommended) == (("staging",), "int8-minmax")
    assert failed.report == "failed/v20200101_000000/report.html"
    assert failed.facts.problem == "1 of 1 gates failed: elements"
    assert (failed.facts.max_error, failed.facts.model_name) == (3.5, "net")


@pytest.mark.parametrize(
    ("cell", "problem"),
    [
        (
            nbformat.v4.new_code_cell(
                "train()",
                execution_count=1,
                outputs=[nbformat.v4.new_output("error", ename="ExportError", evalue="no such op")],
            ),
            "raised ExportError: no such op",
        ),
        (nbformat.v4.new_code_cell("train()"), "never finished: the kernel died"),
        (nbformat.v4.new_code_cell("train()", execution_count=1), "the release was not completed"),
    ],
    ids=["error", "dead kernel", "service"],
)
def test_failed_run_says_why(s3, bucket, cell, problem):
    keep_failed(s3, bucket.name, "v20200101_000000", measured(1, 1), cell, profile="smoke")
    (row,) = collect_rows(bucket, PREFIX).rows
    assert problem in row.facts.problem
    assert (row.facts.state, row.facts.smoke) == ("fail", True)


def test_what_0_1_made_is_listed_as_such(s3, settings, tmp_path, bucket, mlflow_environment):
    release = Factory(connect(settings), bucket.name, tmp_path)(alias=None)
    old = json.dumps({**release.data, "schema_version": 3}).encode()
    s3.put_object(Bucket=bucket.name, Key=release.key, Body=old)
    keep_failed(s3, bucket.name, "v20200101_000000", {"schema_version": 0}, name="net")
    made, failed = collect_rows(bucket, PREFIX).rows
    assert (made.facts.state, failed.facts.state) == ("broken", "fail")
    for row in (made, failed):
        said = "was made by heimdall-onnx 0.1: reproduce it with that version"
        assert row.facts.problem.endswith(said)


def test_second_gallery_reads_only_what_is_new(place):
    collect_rows(Bucket(place.client, BUCKET), PREFIX)
    with counted(place.client) as calls:
        again = collect_rows(Bucket(place.client, BUCKET), PREFIX)
    assert again.read == 0
    # The list of the folder, that of the aliases' logs, and what was kept.
    assert calls == {"ListObjectsV2": 2, "GetObject": 1}
    keep_failed(place.client, BUCKET, "v20200101_000001", measured(1, 1))
    try:
        with counted(place.client) as calls:
            more = collect_rows(Bucket(place.client, BUCKET), PREFIX)
    finally:
        for name in ("report.ipynb", "report.html"):
            key = f"{PREFIX}/failed/v20200101_000001/{name}"
            place.client.delete_object(Bucket=BUCKET, Key=key)
    assert more.read == 1
    # Besides: the report, and what is kept now, which is read back.
    assert calls == {"ListObjectsV2": 2, "GetObject": 3, "PutObject": 1}
    assert len(more.rows) == len(again.rows) + 1
    assert collect_rows(Bucket(place.client, BUCKET), PREFIX).rows == again.rows


def test_what_was_kept_in_another_form_or_by_somebody_else_is_made_anew(place):
    before = collect_rows(Bucket(place.client, BUCKET), PREFIX).rows
    for kept in (b"not JSON", b'{"form": 99}', b'{"form": 1, "facts": {"v1": 3}}'):
        place.client.put_object(Bucket=BUCKET, Key=f"{PREFIX}/{KEPT}", Body=kept)
        assert collect_rows(Bucket(place.client, BUCKET), PREFIX).rows == before


def test_review_without_a_move_has_decided_nothing(place):
    key = f"{PREFIX}/{place.versions['other']}/reviews/20261120_143000_promote-ab.json"
    record = {
        "action": "promote",
        "alias": "production",
        "release": f"s3://{BUCKET}/{PREFIX}/{place.versions['other']}",
        "reviewer": "somebody too late",
        "note": "mine",
        "time": "2026-11-20T14:30:00+00:00",
    }
    place.client.put_object(Bucket=BUCKET, Key=key, Body=json.dumps(record).encode())
    try:
        page = place.gallery().page.decode()
    finally:
        place.client.delete_object(Bucket=BUCKET, Key=key)
    assert "somebody too late" not in page


def test_changed_report_or_manifest_is_shown_as_broken_and_costs_the_exit_code(place, call):
    keys = [f"{PREFIX}/{place.versions['other']}/{n}" for n in ("report.ipynb", "manifest.json")]
    for key, why in zip(keys, ("is not what was released", "is no manifest"), strict=True):
        before = Bucket(place.client, BUCKET).read_bytes(key)
        place.client.put_object(Bucket=BUCKET, Key=key, Body=before.replace(b'"', b"'", 1))
        try:
            done = call("--json")
            row = next(r for r in place.gallery().rows if r.facts.state == "broken")
        finally:
            place.client.put_object(Bucket=BUCKET, Key=key, Body=before)
        assert why in row.facts.problem
        assert row.facts.speedup is None
        assert done.exit_code == 3
        assert json.loads(done.stdout)["broken"] == 1
        assert f"these can't be believed, see the page: {place.versions['other']}" in done.stderr
    assert place.gallery().broken == ()


def test_gallery_is_no_release_and_nothing_left_over(place, call):
    assert call().exit_code == call("--name", "net").exit_code == 0
    versions = Bucket(place.client, BUCKET).list_versions(PREFIX)
    assert set(versions) == set(place.versions.values()) - {place.versions["failed"]}
    assert diagnose(place.connection, BUCKET, PREFIX, older_than=timedelta(0)) == ()


@pytest.mark.parametrize(
    "png",
    [b"", b"no picture", b"GIF89a" + bytes(20), b"\x89PNG\r\n\x1a\n" + bytes(60)],
    ids=["empty", "text", "another format", "damaged"],
)
def test_what_is_no_figure_gives_no_thumbnail(png):
    assert shrink(base64.b64encode(png).decode(), "") is None
    assert shrink("not base64", "") is None


@pytest.mark.parametrize(
    ("recorded", "said"),
    [
        (
            measured(2.0, 0.5) | {"latency": {"speedup": records.speedup(2, 3, 1)}},
            "a speedup can't be",
        ),
        (measured(2.0, 0.5) | {"schema_version": 3}, "a record can't be read"),
        (measured(2.0, 0.5), None),
    ],
    ids=["speedup", "record", "neither"],
)
def test_what_can_not_be_read_of_a_report_is_logged(recorded, said):
    report = make_notebook(records.record_json(**recorded)).encode()
    with structlog.testing.capture_logs() as events:
        facts = read_failed("v20200101_000000", report)
    assert (facts.speedup is None) == (said is not None)
    expected = [] if said is None else [(said, "warning", "v20200101_000000")]
    assert [(e["event"], e["log_level"], e["version"]) for e in events] == expected


@pytest.mark.parametrize("size", [(50_000, 900), (2, 100_000)], ids=["large", "tall"])
def test_figure_far_too_large_gives_no_thumbnail(size):
    png = io.BytesIO()
    Image.new("1", size).save(png, "PNG")
    assert len(png.getvalue()) < 100_000
    assert shrink(base64.b64encode(png.getvalue()).decode(), "") is None


@pytest.mark.parametrize(
    "change",
    [
        {"environment": 3},
        {"checkpoint": {"file": ["a"]}},
        {"objects": [{"key": "a", "size": 10**400, "sha256": "0" * 64}]},
        {"verdict": None},
    ],
    ids=["environment", "checkpoint", "objects", "verdict"],
)
def test_manifest_that_is_none_is_shown_as_broken(place, change):
    key = f"{PREFIX}/{place.versions['other']}/manifest.json"
    before = Bucket(place.client, BUCKET).read_bytes(key)
    forged = json.dumps(json.loads(before) | change)
    place.client.put_object(Bucket=BUCKET, Key=key, Body=forged.encode())
    try:
        assert place.gallery().broken == (place.versions["other"],)
    finally:
        place.client.put_object(Bucket=BUCKET, Key=key, Body=before)


@pytest.mark.parametrize(
    "notebook",
    [b"{", b"[" * 100_000, b'{"cells": [{"source": [3, {}], "outputs": 3}]}', b"null"],
    ids=["cut off", "deep", "forms", "null"],
)
def test_report_that_is_no_notebook_is_shown_as_broken(s3, bucket, notebook):
    bucket.upload_bytes(notebook, f"{PREFIX}/failed/v20200101_000000/report.ipynb")
    (row,) = collect_rows(bucket, PREFIX).rows
    assert (row.facts.state, row.facts.problem) == ("broken", "its report can't be read")
    assert row.report is None


def test_release_that_is_taken_back_while_it_is_read_is_no_row(bucket, monkeypatch):
    folder = f"{PREFIX}/v20200101_000000"
    for name in ("manifest.json", "report.ipynb"):
        bucket.upload_bytes(b"{}", f"{folder}/{name}")
    read = Bucket.read_start

    def taken_back(self, key, most):
        bucket.delete([f"{folder}/manifest.json", f"{folder}/report.ipynb"])
        return read(self, key, most)

    monkeypatch.setattr(Bucket, "read_start", taken_back)
    assert collect_rows(bucket, PREFIX).rows == ()


# The command


@pytest.fixture
def call(settings, place, monkeypatch):
    settings.apply()

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(
            main, ["gallery", "--bucket", BUCKET, "--prefix", PREFIX, *arguments]
        )

    return run


def test_command_writes_the_page_once(place, call):
    place.client.delete_object(Bucket=BUCKET, Key=f"{PREFIX}/gallery/index.html")
    first, second = (json.loads(call("--json").stdout) for _ in range(2))
    assert first == {
        "gallery": f"s3://{BUCKET}/{PREFIX}/gallery/index.html",
        "changed": True,
        "read": first["read"],
        "releases": 4,
        "test_runs": 1,
        "failed": 1,
        "broken": 0,
    }
    assert second == {**first, "changed": False, "read": 0}
    stored = place.client.get_object(Bucket=BUCKET, Key=f"{PREFIX}/gallery/index.html")
    assert stored["ContentType"] == "text/html; charset=utf-8"
    assert f'href="../{place.versions["first"]}/report.html"'.encode() in stored["Body"].read()


def test_page_of_one_model_has_nothing_of_others(place, call):
    done = json.loads(call("--name", "other", "--json").stdout)
    assert done["gallery"] == f"s3://{BUCKET}/{PREFIX}/gallery/other/index.html"
    assert (done["releases"], done["failed"]) == (1, 0)
    page = Bucket(place.client, BUCKET).read_bytes(f"{PREFIX}/gallery/other/index.html").decode()
    assert f'href="../../{place.versions["other"]}/report.html"' in page
    assert place.versions["first"] not in page


def test_unknown_model_is_named_beside_those_that_are_there(call):
    done = call("--name", "nett")
    assert done.exit_code == 2
    assert f"no release of nett in s3://{BUCKET}/{PREFIX}, found those of net, other" in done.stderr


def test_one_model_is_looked_for_in_its_own_folder(place, call):
    done = CliRunner().invoke(main, ["gallery", "--bucket", BUCKET, "--name", "nett"])
    assert done.exit_code == 2
    assert f"no release of nett in s3://{BUCKET}/models/nett, found those of none" in done.stderr


@pytest.mark.parametrize("name", ["../net", "a/b", ".net", "net\n"])
def test_name_that_no_model_can_have_is_bad_input(call, name):
    done = call("--name", name)
    assert done.exit_code == 2
    assert "expected the name of a registered model" in done.stderr


@pytest.mark.parametrize("prefix", ["", "/"])
def test_gallery_of_no_folder_is_bad_input(call, prefix):
    done = call("--prefix", prefix)
    assert done.exit_code == 2
    assert "found an empty prefix" in done.stderr


def test_page_in_a_file_has_no_links_that_lead_nowhere(place, call, tmp_path):
    done = call("-o", str(tmp_path / "pages" / "gallery.html"))
    assert done.exit_code == 0, done.output
    page = (tmp_path / "pages" / "gallery.html").read_text()
    assert "href=" not in page
    assert place.versions["first"] in page


def test_without_a_bucket_or_releases_there_is_nothing_to_show(call, s3, bucket):
    missing = call("--bucket", "test-no-such-bucket")
    assert (missing.exit_code, missing.stdout) == (0, "")
    assert "there is no bucket" in missing.stderr
    assert json.loads(call("--bucket", bucket.name, "--json").stdout)["releases"] == 0
    page = bucket.read_bytes(f"{PREFIX}/gallery/index.html").decode()
    assert "There is no release here yet" in page


def test_port_without_serving_is_bad_usage(call):
    assert call("--port", "8000").exit_code == 2


# The page in a browser


@pytest.fixture(scope="module")
def browser():
    with chromium() as opened:
        yield opened


@contextmanager
def opened(browser, url: str, *, size=DESKTOP, **options):
    """The page, which must say nothing on the console and ask for nothing but itself."""
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]}, reduced_motion="reduce", **options
    )
    page = context.new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    try:
        page.goto(url)
        yield page
        assert said == []
        assert {u for u in asked if not u.startswith("data:")} == {url}
    finally:
        context.close()


@pytest.fixture(scope="module")
def file_url(place, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("page") / "index.html"
    path.write_bytes(place.gallery().page)
    return path.as_uri()


def shown(page) -> list[str]:
    """The versions that are to be seen, from top to bottom."""
    heads = page.locator("tbody tr:visible th")
    return [re.search(r"v\d{8}_\d{6}", text)[0] for text in heads.all_text_contents()]


def test_columns_sort_both_ways_with_missing_values_last(place, browser, file_url):
    versions = place.versions
    with opened(browser, file_url) as page:
        assert shown(page) == sorted(versions.values(), reverse=True)
        for _ in range(2):
            page.get_by_role("button", name="Localization error").click()
            header = page.get_by_role("columnheader", name="Localization error")
            if header.get_attribute("aria-sort") == "ascending":
                ascending = shown(page)
        assert header.get_attribute("aria-sort") == "descending"
        labelled = [versions[name] for name in ("second", "failed", "first")]
        assert ascending[:3] == labelled
        assert shown(page)[:3] == labelled[::-1]
        assert page.locator("[aria-sort]").count() == 1
        page.get_by_role("button", name="Speedup").click()
        assert shown(page)[0] == versions["smoke"]
        page.get_by_role("button", name="Release").press("Enter")
        assert shown(page) == sorted(versions.values())


def test_search_and_filters_narrow_the_table_and_say_how_much_is_left(place, browser, file_url):
    versions = place.versions
    with opened(browser, file_url) as page:
        search, count = page.get_by_role("searchbox"), page.get_by_role("status")
        assert count.inner_text() == "5 of 5"
        search.fill("WHOLE week")
        assert shown(page) == [versions["first"]]
        assert count.inner_text() == "1 of 5"
        search.fill("gates failed")
        assert shown(page) == [versions["failed"]]
        search.fill("nothing like it")
        assert shown(page) == []
        assert page.get_by_text("Nothing matches.").is_visible()
        search.fill("")
        page.get_by_label("Verdict").select_option(label="test run (1)")
        assert shown(page) == [versions["smoke"]]
        page.get_by_label("Verdict").select_option("")
        page.get_by_label("Model").select_option("other")
        assert shown(page) == [versions["other"]]
        assert page.get_by_role("heading", name="net").count() == 0
        page.get_by_label("Model").select_option("")
        page.get_by_label("Alias").select_option("production")
        assert shown(page) == [versions["first"]]


def test_page_without_scripts_is_a_plain_table(place, browser, file_url):
    with opened(browser, file_url, java_script_enabled=False) as page:
        assert shown(page) == sorted(place.versions.values(), reverse=True)
        assert page.get_by_role("searchbox").count() == 0
        assert page.get_by_role("button").count() == 0
        text = page.inner_text("main")
        assert f"the reviewer promoted it to production on {NOTE}"[:40] in text
        assert NOTE in text
        assert "test run" in text


def test_curves_say_what_they_show(browser, file_url):
    with opened(browser, file_url) as page:
        titles = [c.get_attribute("aria-label") for c in page.locator(".curves svg").all()]
    assert titles == [
        "Speedup over 2 releases: first 2.00×, last 2.60×, between 2.00× and 2.60×",
        "Localization error over 2 releases: first 120 m, last 90 m, between 90 m and 120 m",
        "Parity error over 2 releases: first 0.5, last 0.2, between 0.2 and 0.5",
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, NARROW], ids=["desktop", "narrow"])
def test_page_is_usable_without_mouse_or_sight(browser, file_url, size, scheme):
    with opened(browser, file_url, size=size, color_scheme=scheme, bypass_csp=True) as page:
        assert violations(page) == []
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= size[0]
        # The release stays in sight while the table is scrolled.
        page.locator(".scroll").evaluate("box => box.scrollLeft = 10000")
        left = page.locator("tbody th").first.bounding_box()["x"]
        assert 0 <= left < 60


def test_hostile_text_stays_text(s3, settings, browser, tmp_path, mlflow_environment):
    factory = Factory(connect(settings), HOSTILE_BUCKET, tmp_path, name="hostile")
    release = factory(recorded=measured(2, 0.5), cells=[figure(EVERYTHING)])
    said = {"environment": {"git_commit": EVERYTHING}, "checkpoint": {"file": EVERYTHING}}
    forged = records.changed(release.data, said)
    error = nbformat.v4.new_output("error", ename=EVERYTHING, evalue=EVERYTHING)
    cell = nbformat.v4.new_code_cell(EVERYTHING, execution_count=1, outputs=[error])
    failed = {"name": EVERYTHING, "checkpoint": EVERYTHING, "profile": EVERYTHING}
    keep_failed(s3, HOSTILE_BUCKET, "v20200101_000000", {"gates": 3}, cell, **failed)
    said = {"release": release.uri, "alias": "production", "note": EVERYTHING}
    said["time"] = "2026-11-20T14:30:00+00:00"
    review = {**said, "action": "promote", "reviewer": EVERYTHING}
    move = {
        **said,
        "action": "promote",
        "by": EVERYTHING,
        "number": 1,
        "model_name": "hostile",
        "version": "1",
        "previous": None,
        "follows": None,
    }
    for key, body in (
        (release.key, forged),
        (f"{release.folder}/reviews/1.json", review),
        ("aliases/hostile/production/00000001.json", move),
    ):
        s3.put_object(Bucket=HOSTILE_BUCKET, Key=key, Body=json.dumps(body).encode())
    gallery = make_gallery(Bucket(s3, HOSTILE_BUCKET), PREFIX)
    facts = [row.facts for row in gallery.rows]
    # All of it is on the page.
    told = [facts[0].commit, facts[0].checkpoint, facts[0].thumbnail.alt]
    told += [gallery.rows[0].decisions, gallery.rows[0].aliases]
    assert all([*told, facts[1].model_name, facts[1].problem])
    path = tmp_path / "index.html"
    path.write_bytes(gallery.page)
    with opened(browser, path.as_uri()) as tab:
        assert tab.title() == "Releases"
        assert tab.locator("tbody tr").count() == 2
        assert tab.locator("script").count() == 1
        assert tab.locator(f"[src*='{HOST}'], [href*='{HOST}'], [onerror], h1 ~ h1").count() == 0
        assert f"<script>document.documentElement.title='{MARK}'" in tab.inner_text("tbody")
        tab.get_by_role("searchbox").fill(MARK)
        assert len(shown(tab)) == 2
    assert not {"\u202e", "\u2066", "\x1b", "\0"} & {*gallery.page.decode()}


# Serving


@pytest.fixture
def served(place) -> Iterator[GalleryServer]:
    with GalleryServer(Bucket(place.client, BUCKET), PREFIX, place.gallery()) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def get(url: str, **headers: str) -> tuple[int, str, dict]:
    """Status, body and headers of an answer."""
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(), dict(error.headers)


def test_links_of_the_served_page_open_the_reports(place, browser, served):
    page = browser.new_page()
    try:
        page.goto(served.url)
        for name, words in (("first", "report"), ("failed", "failed")):
            page.get_by_role("link", name=place.versions[name]).click()
            assert page.inner_text("h1") == words
            assert page.url.endswith(f"{place.versions[name]}/report.html")
            page.go_back()
    finally:
        page.close()


def test_served_report_can_neither_load_nor_read_anything(place, served):
    root = served.url.removesuffix("gallery/")
    status, _, headers = get(f"{root}{place.versions['first']}/report.html")
    policy = headers["Content-Security-Policy"]
    assert status == 200
    assert "default-src 'none'" in policy
    assert policy.endswith("sandbox allow-downloads")
    assert "script" not in policy
    assert (headers["X-Content-Type-Options"], headers["Referrer-Policy"]) == (
        "nosniff",
        "no-referrer",
    )


def test_script_in_a_report_does_not_run(place, browser, served):
    key = f"{PREFIX}/failed/{place.versions['failed']}/report.html"
    before = Bucket(place.client, BUCKET).read_bytes(key)
    script = b"<title>before</title><script>document.title = 'ran'</script><h1>failed</h1>"
    place.client.put_object(Bucket=BUCKET, Key=key, Body=script)
    page = browser.new_page()
    try:
        page.goto(served.url.removesuffix("gallery/") + key.removeprefix(f"{PREFIX}/"))
        assert page.inner_text("h1") == "failed"
        assert page.title() == "before"
    finally:
        page.close()
        place.client.put_object(Bucket=BUCKET, Key=key, Body=before)


@pytest.mark.parametrize(
    "path",
    [
        "manifest.json",
        "{version}/model.onnx",
        "{version}/manifest.json",
        "{version}/report.ipynb",
        "{version}/../{version}/report.html",
        "../{token}/{version}/report.html",
        "%2e%2e/{version}/report.html",
        "{version}%2freport.html",
        "{version}/report.html?a",
        "failed/../{version}/report.html",
        "gallery/rows.json",
        "v20200101_000000/report.html",
    ],
)
def test_nothing_but_page_and_reports_is_served(place, served, path):
    _, token, _ = served.url.removeprefix("http://").split("/", 2)
    target = f"/{token}/" + path.format(version=place.versions["first"], token=token)
    connection = http.client.HTTPConnection("127.0.0.1", served.server_port, timeout=60)
    connection.putrequest("GET", target)  # as it is, where urllib would tidy it up
    connection.endheaders()
    answer = connection.getresponse()
    assert answer.status == 404
    assert place.versions["first"] not in answer.read().decode()
    connection.close()


def test_only_who_was_given_the_address_is_answered(place, served):
    root = f"http://127.0.0.1:{served.server_port}/"
    report = f"{place.versions['first']}/report.html"
    for path in ("", "gallery/", report, f"{'A' * 22}/gallery/", f"{'A' * 22}/{report}"):
        assert get(root + path)[0] == 404, path
    status, body, _ = get(served.url, Host="leak.invalid")
    assert (status, body) == (421, "this is another host's name\n")
    assert get(served.url, Host=f"localhost:{served.server_port}")[0] == 200


def test_changed_report_is_not_served(place, served):
    version = place.versions["other"]
    key = f"{PREFIX}/{version}/report.html"
    before = Bucket(place.client, BUCKET).read_bytes(key)
    place.client.put_object(Bucket=BUCKET, Key=key, Body=b"<script>alert(1)</script>")
    try:
        status, body, headers = get(served.url.removesuffix("gallery/") + f"{version}/report.html")
    finally:
        place.client.put_object(Bucket=BUCKET, Key=key, Body=before)
    assert status == 502
    assert headers["Content-Type"].startswith("text/plain")
    assert "is not what was released, so it is not shown" in body
    assert "<script>" not in body


def test_serving_ends_with_ctrl_c(settings, place, tmp_path):
    settings.apply()
    command = [sys.executable, "-m", "heimdall_onnx", "gallery", "--bucket", BUCKET, "--serve"]
    with subprocess.Popen(
        [*command, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
        cwd=tmp_path,
    ) as process:
        found = json.loads(process.stdout.readline())
        status, body, _ = get(found["url"])
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert (status, found["releases"]) == (200, 4)
    assert place.versions["first"] in body
    assert process.returncode == 0, told
    assert "Traceback" not in told


def test_port_that_is_taken_is_bad_input(call, served):
    done = call("--serve", "--port", str(served.server_port))
    assert done.exit_code == 2
    assert f"can't listen on port {served.server_port}" in done.stderr


def test_gallery_is_stored_with_what_it_was_read_from(place):
    made = place.gallery()
    store_gallery(Bucket(place.client, BUCKET), made)
    assert store_gallery(Bucket(place.client, BUCKET), made) is False
    assert Path(made.key).parent.name == "gallery"
