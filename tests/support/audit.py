"""Look up every pinned package among known vulnerabilities; run by `make check`.

A known vulnerability fails. A service that can't be reached, or knows nothing of a package, does
not, but it is said how many packages nobody has looked at.
"""

# ruff: noqa: T201

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PARTS = 6  # One package is asked for after the other, so several are asked for at once.
LIMIT_S = 18
# Whoever knows anything knows one of these.
PROBE = re.compile(r"(numpy|requests|urllib3)==")
UNREACHABLE = re.compile(r"^(?:requests\.exceptions\.|\S*ConnectionError|\S*ServiceError)", re.M)


def main(pins: Path) -> int:
    deadline = time.monotonic() + LIMIT_S
    lines = [line for line in pins.read_text().splitlines() if re.match(r"\w", line)]
    with tempfile.TemporaryDirectory(prefix="heimdall-audit-") as folder:

        def look_up(part: int, lines: list[str]) -> list[dict]:
            path = Path(folder, f"{part}.txt")
            path.write_text("\n".join(lines) + "\n")
            found = ask(path, deadline - time.monotonic())
            return [entry for entry in found if "vulns" in entry]

        known = look_up(PARTS, [line for line in lines if PROBE.match(line)])
        if known:
            with ThreadPoolExecutor(PARTS) as pool:
                parts = pool.map(look_up, range(PARTS), [lines[n::PARTS] for n in range(PARTS)])
                known = [entry for entries in parts for entry in entries]
    vulnerable = [entry for entry in known if entry["vulns"]]
    for entry in vulnerable:
        for found in entry["vulns"]:
            mended = ", ".join(found["fix_versions"]) or "no version yet"
            print(f"{entry['name']} {entry['version']}: {found['id']}, mended in {mended}")
    print(f"{len(known)} of {len(lines)} pinned packages audited, {len(vulnerable)} vulnerable")
    if missing := len(lines) - len(known):
        print(f"NOT audited: {missing}; the service can't be reached or does not know them")
    return 1 if vulnerable else 0


def ask(pins: Path, limit_s: float) -> list[dict]:
    """What pip-audit says of each package; nothing where its service does not answer."""
    command = [sys.executable, "-m", "pip_audit", "-r", str(pins), "--no-deps", "--disable-pip"]
    command += ["-f", "json", "--progress-spinner", "off", "--timeout", "5"]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=max(1, limit_s))
    except subprocess.TimeoutExpired:
        return []
    try:
        return json.loads(ended.stdout)["dependencies"]
    except ValueError:
        if UNREACHABLE.search(ended.stderr):
            return []
        sys.exit(f"pip-audit failed:\n{ended.stderr}")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
