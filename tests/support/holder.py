"""Another process that holds processors, as a measurement of somebody else would."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CODE = """
import os, sys
from pathlib import Path
from heimdall_onnx.evidence.latency.cores import exclusive_cores
os.umask(0o077)
os.sched_setaffinity(0, {int(number) for number in sys.argv[2].split(",")})
with exclusive_cores(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(folder: Path, *numbers: int) -> Iterator[subprocess.Popen]:
    """Hold processors, all by default, until the block ends or the process is killed."""
    chosen = ",".join(map(str, numbers or sorted(os.sched_getaffinity(0))))
    process = subprocess.Popen(
        [sys.executable, "-c", _CODE, str(folder), chosen],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.stdin.close()
            process.wait(timeout=20)
