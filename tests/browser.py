"""A page as a reader would open it, in Debian's Chromium."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

DESKTOP, NARROW = (1280, 900), (390, 844)
_MISSING = "Debian's chromium is not installed; it opens pages as a reader would"


@contextmanager
def chromium() -> Iterator[Browser]:
    """The browser, driven by Playwright, which brings none of its own here."""
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium")
    if program is None:
        pytest.skip(_MISSING)
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


def open_in_chromium(page: str, folder: Path) -> tuple[set[str], list[str], str]:
    """Hosts asked for, console messages and the resulting document of a page, without network."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip(_MISSING)
    log = folder / "net.json"
    done = subprocess.run(
        [
            *(program, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *("--disable-quic", "--host-resolver-rules=MAP * ~NOTFOUND"),
            *("--enable-logging=stderr", f"--log-net-log={log}", "--virtual-time-budget=8000"),
            *(f"--user-data-dir={folder / 'profile'}", "--dump-dom", page),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    events = json.loads(log.read_text())["events"]
    urls = [event.get("params", {}).get("url", "") for event in events]
    hosts = {urlsplit(u).hostname or "" for u in urls if u.startswith(("http", "ws"))}
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return hosts, console, done.stdout
