"""The process in which mutated files are read: limits, deadlines and what may come of it.

Reads one JSON question a line from standard input (which reader, which file) and answers each with
one line. The readers hand their bytes to libraries in C++, which may crash, hang or take all
memory; here that ends this process and nothing else.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Above what the process has before it reads. The largest that a reader takes on purpose are the
# 256 MiB of an evaluation file's small arrays, and as much again while they are converted.
MEMORY_BYTES = 768 << 20
# The largest that a reader unpacks to disk on purpose is less than this.
FILE_BYTES = 1 << 30
# A message is read by a person, in a terminal and in a report.
MESSAGE_CHARACTERS = 100_000
# Payloads make a folder of this name, in the folder this process runs in.
PROOF = Path("executed")


@dataclass(frozen=True)
class Reader:
    """What is tried.

    Attributes:
        read: Reads a file, to its end.
        refusals: What it may raise.
        names_file: Whether its messages say which file is meant.
    """

    read: Callable[[Path], object]
    refusals: tuple[type[Exception], ...]
    names_file: bool = True


def answer(reader: Reader, path: Path) -> dict[str, str]:
    """How reading ``path`` ended: ``outcome``, and ``violation`` if it must not end so."""
    _limit_memory()
    try:
        reader.read(path)
        result = {"outcome": "accepted"}
    except reader.refusals as error:
        result = {"outcome": type(error).__name__}
        if problem := _problem(error, path.name if reader.names_file else ""):
            result["violation"] = problem
            result["detail"] = "".join(traceback.format_exception(error))
    except BaseException as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "heimdall" in f.filename]
        where = f"{Path(frames[-1].filename).name}, {frames[-1].name}" if frames else "reader"
        result = {"outcome": type(error).__name__}
        result["violation"] = f"{type(error).__name__} from {where}"
        result["detail"] = "".join(traceback.format_exception(error))[-4000:]
    if PROOF.exists():
        PROOF.rmdir()
        result["violation"] = "the payload ran"
    return result


def _problem(error: BaseException, name: str) -> str | None:
    """What is wrong with a refusal."""
    text = str(error)
    if any(isinstance(e, MemoryError) or "bad_alloc" in str(e) for e in _chain(error)):
        return "out of memory"
    if "allocate memory" in text or "Unable to allocate" in text:
        return "out of memory"
    if name not in text.split("\n")[0]:
        return "the message does not name the file"
    if len(text) > MESSAGE_CHARACTERS:
        return "the message is too long to be read"
    if not all(c.isprintable() or c == "\n" for c in text):
        return "the message holds control characters"
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def serve(readers: Mapping[str, Reader]) -> None:
    """Answer over the standard streams until there are no more questions."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    # What a library prints must not mix with the answers.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        _say(answers, {"outcome": "ready"})
        for line in sys.stdin:
            question: dict[str, Any] = json.loads(line)
            _say(answers, answer(readers[question["target"]], Path(question["path"])))


def _say(answers: Any, said: dict[str, str]) -> None:
    answers.write(json.dumps(said) + "\n")
    answers.flush()
