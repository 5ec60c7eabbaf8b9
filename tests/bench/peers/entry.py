"""What the scripts of all peers share: their arguments, and the record of what they have made.

Standard library only, as it runs in every peer's environment.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RESULT = "result.json"
# With one of these a processor sums 8-bit products in 32 bits. Without, it sums pairs of them in
# 16 bits, which may overflow unless weights leave a bit unused.
_DOT_PRODUCTS = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"}


def seven_bits() -> bool:
    """Whether 8-bit weights have to leave a bit unused on this processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    words = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return not _DOT_PRODUCTS & set(words.split())


def unsigned_activations() -> bool:
    """Whether its instructions multiply unsigned by signed bytes, as those of x86 do."""
    return platform.machine() in {"x86_64", "AMD64"}


class Entry:
    """A run of ``PEER.py MODEL CALIBRATION OUT [--form F] [--evaluation FILE] …``.

    It leaves ``result.json`` in the folder OUT: ``file`` of the model there, in one line how it was
    made, ``settings`` (fields of `SessionSettings`) and ``environment`` that
    it wants to run with, seconds by phase, and notes. Without a ``file`` nothing came out, and the
    last note says why.

    Args:
        description: Of the peer.
        forms: What it can make; one a run, so that each has its own time and memory.

    Attributes:
        model: An ONNX file, or a checkpoint.
        calibration: ``.npz`` to calibrate on.
        evaluation: ``.npz`` that a search may judge on.
        out: Folder for what is made.
        form: What to make.
        threads: Intra-op threads.
        calls: Timed calls of each candidate of a search.
    """

    def __init__(self, description: str | None, forms: Sequence[str] = ("",)) -> None:
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("model", type=Path)
        parser.add_argument("calibration", type=Path)
        parser.add_argument("out", type=Path)
        parser.add_argument("--form", choices=forms, default=forms[0])
        parser.add_argument("--evaluation", type=Path)
        parser.add_argument("--threads", type=int, default=1)
        parser.add_argument("--calls", type=int, default=20)
        chosen = parser.parse_args()
        self.model: Path = chosen.model.absolute()
        self.calibration: Path = chosen.calibration.absolute()
        self.evaluation: Path | None = chosen.evaluation and chosen.evaluation.absolute()
        self.out: Path = chosen.out.absolute()
        self.form: str = chosen.form
        self.threads: int = chosen.threads
        self.calls: int = chosen.calls
        self.out.mkdir(parents=True, exist_ok=True)
        self._record: dict[str, Any] = {
            "file": "",
            "method": "",
            "settings": {},
            "environment": {},
            "phases": {},
            "notes": [],
        }
        self._write()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of the work."""
        began = time.perf_counter()
        yield
        self._record["phases"][name] = round(time.perf_counter() - began, 3)
        self._write()

    def made(
        self, file: Path, method: str, *, environment: dict[str, str] | None = None, **settings: Any
    ) -> None:
        """Record the model."""
        self._record |= {
            "file": str(file.absolute().relative_to(self.out)),
            "method": method,
            "settings": settings,
            "environment": environment or {},
        }
        self._write()

    def note(self, line: str) -> None:
        """Record what a reader of the table should know."""
        self._record["notes"].append(line)
        self._write()

    def _write(self) -> None:
        (self.out / RESULT).write_text(json.dumps(self._record, indent=2) + "\n")
