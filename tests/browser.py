"""A page as a reader without a network would open it."""

import json
import shutil
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import pytest


def open_in_chromium(page: str, folder: Path) -> tuple[set[str], list[str], str]:
    """Hosts asked for, console messages and the resulting document of a page, without network."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("Debian's chromium is not installed; it opens the report as a reader would")
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
