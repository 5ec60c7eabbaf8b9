"""A page as a reader would open it, in Debian's Chromium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

DESKTOP, NARROW = (1280, 900), (390, 844)


@contextmanager
def chromium() -> Iterator[Browser]:
    """The browser, driven by Playwright, which brings none of its own here."""
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium")
    if program is None:
        pytest.skip("Debian's chromium is not installed; it opens pages as a reader would")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        try:
            yield browser
        finally:
            browser.close()


def violations(page: Page, **options: Any) -> list[str]:
    """What axe-core finds wrong with a page for readers without mouse or sight, each in a line.

    axe-core is by Deque Systems; its rules follow WCAG 2.2 and the best practices they name.
    """
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page, options=options or None).response["violations"]
    return [
        f"{rule['id']} ({rule['impact']}): {rule['help']}: {node['html'][:200]}"
        for rule in found
        for node in rule["nodes"]
    ]


def open_in_chromium(address: str) -> tuple[set[str], list[str], str]:
    """As `visit`, in a browser of its own."""
    with chromium() as browser:
        return visit(browser, address)


def visit(browser: Browser, address: str) -> tuple[set[str], list[str], str]:
    """Hosts asked for, console messages and the resulting document of a page, without network."""
    page = browser.new_context(offline=True).new_page()
    urls: list[str] = []
    console: list[str] = []
    page.on("request", lambda request: urls.append(request.url))
    page.on("console", lambda message: console.append(message.text))
    page.on("pageerror", lambda error: console.append(str(error)))
    page.goto(address)
    hosts = {urlsplit(u).hostname or "" for u in urls if u.startswith(("http", "ws"))}
    return hosts, console, page.content()
