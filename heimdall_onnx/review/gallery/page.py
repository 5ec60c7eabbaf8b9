"""All releases of a model on one page: what was judged, measured and decided, failed runs too.

The page is one HTML file that asks no network for anything. Its table stands in it as it is, and a
small script of its own, the only one that its policy lets run, sorts, filters and searches that.
Equal releases give an equal page.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heimdall_onnx.common.errors import MissingObjectError, ParameterError
from heimdall_onnx.common.parameters import NAME
from heimdall_onnx.common.templates import render
from heimdall_onnx.common.text import count_of, distance, number, shown
from heimdall_onnx.review.gallery.facts import Facts
from heimdall_onnx.review.gallery.rows import Row, collect_rows
from heimdall_onnx.services.store import GALLERY, Bucket

PAGE = "index.html"
_TEMPLATES = Path(__file__).parent
_STATES = {
    "pass": "pass",
    "smoke": "test run",
    "fail": "failed",
    "broken": "broken",
}
# More curves than these say less than the table.
_MOST_CURVES = 24


@dataclass(frozen=True)
class Gallery:
    """A gallery as it was made.

    Attributes:
        key: Where in the bucket it belongs.
        page: The HTML.
        rows: What is on it.
        read: How much of it had to be read, see `Collected`.
    """

    key: str
    page: bytes
    rows: tuple[Row, ...]
    read: int

    @property
    def broken(self) -> tuple[str, ...]:
        """Versions that can't be believed."""
        return tuple(row.facts.version for row in self.rows if row.facts.state == "broken")

    def counts(self) -> dict[str, int]:
        """Releases, test runs among them, failed runs, and what is broken."""
        failed = sum(row.failed for row in self.rows)
        return {
            "releases": len(self.rows) - failed,
            "test_runs": sum(row.facts.state == "smoke" for row in self.rows),
            "failed": failed,
            "broken": len(self.broken),
        }


def make_gallery(bucket: Bucket, prefix: str, *, name: str = "", links: bool = True) -> Gallery:
    """The page of all releases and failed runs of a folder.

    Args:
        bucket: Bucket of the releases, which must exist.
        prefix: Folder of the releases in it.
        name: Only those of this registered model; all by default.
        links: Whether the page stands where its links to the reports lead to them: in its folder
            of the bucket, however that is served.

    Raises:
        ParameterError: If there is nothing of that model, its name is none, or there is no prefix.
        StoreError: If the store can't be reached or refuses.
    """
    folder = prefix.strip("/")
    if not folder:
        raise ParameterError(
            f"expected the folder of the releases in {bucket.name}, found an empty prefix; name "
            "one, e.g. models/localization"
        )
    # It becomes a part of the page's key.
    if name and not re.fullmatch(NAME, name):
        raise ParameterError(
            "expected the name of a registered model, of letters, digits, '.', '_' and '-', the "
            f"first a letter or digit; found {shown(name)}"
        )
    collected = collect_rows(bucket, prefix)
    rows = tuple(row for row in collected.rows if name in ("", row.facts.model_name))
    if name and not rows:
        there = sorted({row.facts.model_name for row in collected.rows} - {""})
        raise ParameterError(
            f"there is no release of {shown(name)} in {bucket.uri(folder)}, found those of "
            f"{', '.join(there[:20]) or 'none'}"
        )
    key = "/".join(filter(None, (folder, GALLERY, name, PAGE)))
    above = "../" * (2 if name else 1)
    page = render_page(
        rows,
        title=f"Releases of {name}" if name else "Releases",
        place=bucket.uri(folder),
        above=above if links else None,
    )
    return Gallery(key, page, rows, collected.read)


def store_gallery(bucket: Bucket, gallery: Gallery) -> bool:
    """Write the page into the bucket, unless the same is there already.

    Returns:
        Whether it was written.

    Raises:
        StoreError: If the store can't be reached or refuses.
    """
    digest = hashlib.sha256(gallery.page).hexdigest()
    with contextlib.suppress(MissingObjectError):
        if bucket.head(gallery.key).sha256 == digest:
            return False
    bucket.upload_bytes(gallery.page, gallery.key)
    return True


def render_page(rows: Sequence[Row], *, title: str, place: str, above: str | None) -> bytes:
    """The page as UTF-8.

    Args:
        rows: Newest first.
        title: Its heading.
        place: Address of the folder of the releases.
        above: What leads from the page to that folder; None for a page without links.
    """
    style, script = (
        (_TEMPLATES / f"gallery.{suffix}").read_text(encoding="utf-8") for suffix in ("css", "js")
    )
    models = sorted({row.facts.model_name for row in rows} - {""})
    aliases = sorted({alias for row in rows for alias in row.aliases})
    page = render(
        _TEMPLATES / "gallery.html",
        {
            "ratio": lambda value: f"{value:.2f}×",
            "error": lambda value: "∞" if math.isinf(value) else number(value),
            "size": lambda count: f"{number(count / 1e6)} MB",
        },
        policy=_policy(style, script),
        style=style,
        script=script,
        title=title,
        place=place,
        above=above,
        rows=rows,
        states=_STATES,
        counts=Counter(row.facts.state for row in rows),
        models=models,
        aliases=aliases,
        summary=summary(rows),
        curves=list(model_curves(rows)),
    )
    return page.encode()


def _policy(style: str, script: str) -> str:
    """Whatever got into the page, only its own script runs, and nothing is loaded or sent."""

    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; img-src data:; style-src {digest(style)}; "
        f"script-src {digest(script)}; base-uri 'none'; form-action 'none'"
    )


def summary(rows: Sequence[Row]) -> str:
    """How many releases and failed runs there are, in words."""
    failed = sum(row.failed for row in rows)
    told = [count_of(len(rows) - failed, "release"), count_of(failed, "failed run")]
    if tests := sum(row.facts.state == "smoke" for row in rows):
        told.append(f"{count_of(tests, 'test run')} among the releases")
    return ", ".join(told)


def model_curves(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """How each model's figures went over its releases; test runs and failed runs left out.

    Those with the most releases, of which at least two were measured: name of the model, count of
    its releases, and its curves.
    """
    by_model: dict[str, list[Facts]] = defaultdict(list)
    for row in reversed(rows):
        if row.facts.state == "pass" and row.facts.model_name:
            by_model[row.facts.model_name].append(row.facts)
    most = sorted(by_model.items(), key=lambda item: (-len(item[1]), item[0]))[:_MOST_CURVES]
    for name, releases in sorted(most):
        if curves := list(_curves(releases)):
            yield {"name": name, "count": len(releases), "curves": curves}


def _curves(facts: Sequence[Facts]) -> Iterator[dict[str, Any]]:
    speedups = [one.speedup for one in facts if one.speedup is not None]
    if len(speedups) > 1:
        yield _curve(
            "Speedup",
            [one.ratio for one in speedups],
            lambda value: f"{value:.2f}×",
            ([one.low for one in speedups], [one.high for one in speedups]),
        )
    located = [one.median_error_m for one in facts if one.median_error_m is not None]
    if len(located) > 1:
        yield _curve("Localization error", located, distance)
    # In units of what is allowed, as in the table.
    errors = [e for one in facts if (e := one.max_error) is not None and math.isfinite(e)]
    if len(errors) > 1:
        yield _curve("Parity error", errors, number)


def _curve(
    name: str,
    values: Sequence[float],
    write: Callable[[float], str],
    interval: tuple[Sequence[float], Sequence[float]] | None = None,
) -> dict[str, Any]:
    """What the page draws as a curve, with the figure in words for who can't see it."""
    low, high = interval or (values, values)
    first, last = write(values[0]), write(values[-1])
    title = (
        f"{name} over {count_of(len(values), 'release')}: first {first}, last {last}, "
        f"between {write(min(values))} and {write(max(values))}"
    )
    return {
        "name": name,
        "title": title,
        "last": last,
        "course": values,
        "interval": interval,
        "bottom": min(0.0, *low),
        "top": max(high) or 1.0,
    }
