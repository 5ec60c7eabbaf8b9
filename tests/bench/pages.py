"""What a reader waits for: pages in Debian's Chromium, and what it takes to make the gallery.

`load_page` and `until_painted` measure any page; a part of the benchmark that has further pages
adds its rows to `rows`.
"""

from __future__ import annotations

import base64
import io
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from processes import Run

from heimdall_onnx.evidence.latency.statistics import Speedup
from heimdall_onnx.review.gallery.facts import Thumbnail
from heimdall_onnx.review.gallery.page import Gallery, render_page
from heimdall_onnx.review.gallery.rows import KEPT, Row, collect_rows
from heimdall_onnx.review.gallery.server import GalleryServer
from heimdall_onnx.services.client import make_client
from heimdall_onnx.services.settings import Settings
from heimdall_onnx.services.store import Bucket

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from playwright.sync_api import Browser, Page

TESTS = Path(__file__).parents[1] / "support"
BUCKET, PREFIX = "heimdall-bench-gallery", "models/localization"
RELEASES = 1000
LOADS, TURNS = 9, 9
FIRST = datetime(2026, 1, 1, tzinfo=UTC)

Found = tuple[str, float | None, bool, str, tuple[float, ...], str]


@dataclass(frozen=True)
class Place:
    """Where the pages are made.

    Attributes:
        folder: For what is made on the way.
        environment: With the addresses of store and registry.
        command: Runs a command, given its environment and what it consists of.
    """

    folder: Path
    environment: dict[str, str]
    command: Callable[..., Run]

    def run(self, *command: str | Path) -> Run:
        """Run this package with these arguments."""
        return self.command(self.with_tests(), sys.executable, "-m", "heimdall_onnx", *command)

    def with_tests(self) -> dict[str, str]:
        """The environment of a process that finds the tests' models."""
        paths = os.pathsep.join(filter(None, (str(TESTS), self.environment.get("PYTHONPATH"))))
        return {**self.environment, "PYTHONPATH": paths}


def rows(place: Place, share: float) -> Iterator[Found]:
    """Name, target, whether that is the least, unit, values and method of each row.

    Args:
        place: Where they are made.
        share: Of the releases, to try it.
    """
    sys.path.append(str(TESTS))
    yield from report_rows(place)
    yield from gallery_rows(place, max(10, round(share * RELEASES)))


def report_rows(place: Place) -> Iterator[Found]:
    """The report of a release with all variants, and that of a run that failed."""
    from browser import chromium

    made = place.run("demo", "--variants", "all", "--json")
    report = Path(json.loads(made.output.splitlines()[-1])["local_report"])
    failed = _failed_report(place)
    size = report.stat().st_size / 1e6
    what = "the report of a release with all variants"
    yield f"{what}: size", 3.0, False, "MB", (size,), "one file, pictures in it"
    with chromium() as browser:
        loads = load_page(browser, report.as_uri())
        how = f"{LOADS} loads without network, {size:.1f} MB, from a file"
        yield f"{what}: first paint", 1.0, False, "s", loads.painted, how
        yield f"{what}: all there", 1.0, False, "s", loads.ready, how
        for shown, page in ((what, report), ("the report of a failed run", failed)):
            yield _axe_row(browser, shown, page.as_uri())


def _failed_report(place: Place) -> Path:
    """Of a run whose gates fail, since nothing is as exact as they demand."""
    import torch
    from models import SmallNet

    checkpoint = place.folder / "failing.pt"
    torch.save(SmallNet().state_dict(), checkpoint)
    command = (sys.executable, "-m", "heimdall_onnx", "release", str(checkpoint))
    options = ("--model", "models:SmallNet", "--profile", "smoke", "-p", "tolerance", "1e-30")
    done = subprocess.run(
        [*command, *options, "--json"],
        env=place.with_tests(),
        capture_output=True,
        text=True,
        check=False,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    if found["exit_code"] != 3:
        raise RuntimeError(f"expected failed gates, found {found['error']}")
    return Path(found["local_report"])


def _axe_row(browser: Browser, shown: str, url: str) -> Found:
    """What axe-core finds, in each style and width, as it opens and with everything unfolded."""
    from browser import DESKTOP, NARROW, violations

    found = []
    for scheme in ("light", "dark"):
        for width, height in (DESKTOP, NARROW):
            context = browser.new_context(
                viewport={"width": width, "height": height},
                color_scheme=scheme,  # type: ignore[arg-type]
                bypass_csp=True,  # axe is a script, which the page itself forbids
            )
            page = context.new_page()
            page.goto(url)
            folded = violations(page)
            page.eval_on_selector_all("details", "all => all.forEach(d => d.open = true)")
            found.append(float(len(folded) + len(violations(page))))
            context.close()
    how = "axe-core, light and dark, 1280 and 390 pixels wide, folded and unfolded"
    return f"{shown}: rules of accessibility broken", 0.0, False, "", tuple(found), how


def gallery_rows(place: Place, count: int) -> Iterator[Found]:
    """A gallery of so many releases: made, opened, sorted, searched."""
    client = make_client(Settings(_env_file=None))  # of the environment, which has the addresses
    Bucket(client, BUCKET).ensure()
    _release(place)
    (version,) = Bucket(client, BUCKET).list_versions(PREFIX)
    (row,) = collect_rows(Bucket(client, BUCKET), PREFIX).rows
    copy_release(client, version, count)
    client.delete_object(Bucket=BUCKET, Key=f"{PREFIX}/{KEPT}")
    report = client.head_object(Bucket=BUCKET, Key=f"{PREFIX}/{version}/report.ipynb")
    cold = _gallery(place, count)
    yield (
        f"a gallery of {count:,} releases, the first time",
        None,
        False,
        "s",
        (cold,),
        f"whole command; all manifests and reports are read, {report['ContentLength'] / 1e6:.1f} "
        "MB a report, from a store on the same machine",
    )
    yield (
        f"a gallery of {count:,} releases, when it is there already",
        None,
        False,
        "s",
        tuple(_gallery(place, 0) for _ in range(5)),
        "5 whole commands; only what is new is read, which is nothing",
    )
    yield from page_rows(make_rows(row, count))


def page_rows(shown: tuple[Row, ...]) -> Iterator[Found]:
    """The page of these rows: first paint, size, sort and search."""
    count = f"{len(shown):,} releases"
    from browser import chromium

    with _served(shown) as (url, size), chromium() as browser:
        how = f"{count} with a parity picture of its own each, from loopback, {size / 1e6:.1f} MB"
        loads, how = load_page(browser, url), f"{LOADS} loads, {how}"
        yield f"a gallery of {count}: first paint", 1.0, False, "s", loads.painted, how
        yield f"a gallery of {count}: all there, can be sorted", None, False, "s", loads.ready, how
        yield f"a gallery of {count}: size", None, False, "MB", (size / 1e6,), "one file"
        page = browser.new_page()
        page.goto(url)
        buttons = "document.querySelectorAll('thead button')"
        sorts = tuple(until_painted(page, f"{buttons}[{n % 7}].click()") for n in range(TURNS))
        yield (
            f"a gallery of {count}: sort",
            None,
            False,
            "s",
            sorts,
            "columns in turn, until it is painted",
        )
        search = (
            "const box = document.getElementById('search'); box.value = '{}'; "
            "box.dispatchEvent(new Event('input', {{bubbles: true}}))"
        )
        words = ("2026", "v202601", "pass", "reviewer 3", "", "nothing", "net", "failed", "staging")
        searches = tuple(until_painted(page, search.format(word)) for word in words)
        yield (
            f"a gallery of {count}: search",
            None,
            False,
            "s",
            searches,
            f"{len(words)} words in turn, until it is painted",
        )
        page.close()


@dataclass(frozen=True)
class Loads:
    """Loads of a page, each in a context of its own; seconds from the navigation on.

    Attributes:
        painted: When it showed something (first contentful paint).
        ready: When all of it was there and its scripts had run.
    """

    painted: tuple[float, ...]
    ready: tuple[float, ...]


def load_page(browser: Browser, url: str, loads: int = LOADS) -> Loads:
    """Open a page so many times."""
    paint = "performance.getEntriesByName('first-contentful-paint').map((e) => e.startTime)"
    ready = "performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd"
    found = []
    for _ in range(loads):
        local = url.startswith("file:")
        context = browser.new_context(viewport={"width": 1280, "height": 900}, offline=local)
        page = context.new_page()
        page.goto(url)
        page.wait_for_function(f"{paint}.length")
        found.append((page.evaluate(paint)[0] / 1e3, page.evaluate(ready) / 1e3))
        context.close()
    return Loads(*zip(*found, strict=True))


def until_painted(page: Page, act: str) -> float:
    """Seconds from a script's beginning to the end of the frame that shows what it did."""
    milliseconds: float = page.evaluate(
        f"""async () => {{
          const began = performance.now();
          {act};
          await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
          return performance.now() - began;
        }}"""
    )
    return milliseconds / 1e3


def make_rows(row: Row, count: int) -> tuple[Row, ...]:
    """So many rows, newest first, that differ from one in whatever a reader may sort by."""
    import records

    rng = random.Random(0)
    made = []
    for number in range(count):
        version = f"{FIRST + number * timedelta(hours=3):v%Y%m%d_%H%M%S}"
        ratio = rng.uniform(1.5, 3.5)
        failed = number % 10 == 3
        facts = row.facts.model_copy(
            update={
                "version": version,
                "state": "fail" if failed else "smoke" if number % 10 == 7 else "pass",
                "problem": "2 of 17 gates failed: mean absolute error, elements" * failed,
                "model_name": f"net-{number % 3}",
                "model_version": "" if failed else str(number),
                "speedup": Speedup(ratio, 0.95 * ratio, 1.04 * ratio, 20),
                "max_error": rng.uniform(0.01, 0.9),
                "mean_error": rng.uniform(0.001, 0.01),
                "median_error_m": rng.uniform(50, 5000),
                "size_bytes": rng.randrange(10**6, 10**8),
                "thumbnail": row.facts.thumbnail and _varied(row.facts.thumbnail, rng),
            }
        )
        decision = records.move(
            by=f"reviewer {number % 5}",
            note="no worse than the one before on the evaluation data, and smaller",
        )
        folder = f"failed/{version}" if failed else version
        decided = (decision,) * (number % 5 == 1)
        made.append(
            replace(
                row,
                facts=facts,
                failed=failed,
                report=f"{folder}/report.html",
                aliases=(),
                decisions=decided,
            )
        )
    return tuple(reversed(made))


def _varied(thumbnail: Thumbnail, rng: random.Random) -> Thumbnail:
    # Of equal pictures a browser decodes one.
    from PIL import Image, ImageDraw

    with Image.open(io.BytesIO(base64.b64decode(thumbnail.webp))) as picture:
        ends = [rng.uniform(0, picture.width), 0, rng.uniform(0, picture.width), picture.height]
        ImageDraw.Draw(picture).line(ends, fill="teal")
        made = io.BytesIO()
        picture.save(made, "WEBP", quality=40)
    return thumbnail.model_copy(update={"webp": base64.b64encode(made.getvalue()).decode()})


def copy_release(client: S3Client, version: str, count: int) -> None:
    """Make a release many; what is not read of one is a byte long."""
    folder = f"{PREFIX}/{version}/"
    text = Bucket(client, BUCKET).read_bytes(f"{folder}manifest.json").decode()
    names = [o["key"].removeprefix(folder) for o in json.loads(text)["objects"]]
    report = Bucket(client, BUCKET).read_bytes(f"{folder}report.ipynb")

    def copy(number: int) -> None:
        other = f"{FIRST + number * timedelta(hours=3):v%Y%m%d_%H%M%S}"
        content = dict.fromkeys(names, b"x") | {
            "report.ipynb": report,
            "manifest.json": text.replace(version, other).encode(),
        }
        for name, body in content.items():
            client.put_object(Bucket=BUCKET, Key=f"{PREFIX}/{other}/{name}", Body=body)

    with ThreadPoolExecutor(8) as writers:
        list(writers.map(copy, range(count - 1)))


def _release(place: Place) -> None:
    """A test run of a small model, with the real report."""
    import torch
    from models import SmallNet

    checkpoint, data = place.folder / "gallery.pt", place.folder / "gallery.npz"
    torch.save(SmallNet().state_dict(), checkpoint)
    signal = np.random.default_rng(0).standard_normal((12, 2, 8, 8)).astype(np.float32)
    np.savez(data, signal=signal)
    given = {"model": "models:SmallNet", "eval-data": data, "profile": "smoke", "name": "net-0"}
    options = [part for name, value in given.items() for part in (f"--{name}", value)]
    place.run("release", checkpoint, *options, "--bucket", BUCKET, "--prefix", PREFIX)


def _gallery(place: Place, expected: int) -> float:
    """Seconds of the whole command, which must have read so many releases."""
    done = place.run("gallery", "--bucket", BUCKET, "--prefix", PREFIX, "--json")
    found = json.loads(done.output.splitlines()[-1])
    # All of them are under one name, whose alias was moved once.
    if found["read"] != expected + bool(expected):
        raise RuntimeError(f"expected {expected} releases to be read, found {found}")
    return done.seconds


@contextmanager
def _served(shown: tuple[Row, ...]) -> Iterator[tuple[str, int]]:
    """Address and bytes of the page, from a server on loopback that has nothing else."""
    content = render_page(shown, title="Releases", place=f"s3://{BUCKET}/{PREFIX}", above="../")
    gallery = Gallery(f"{PREFIX}/gallery/index.html", content, shown, 0)
    unused: Any = None
    with GalleryServer(unused, BUCKET, PREFIX, gallery) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server.url, len(content)
        finally:
            server.shutdown()
            thread.join()
