"""Mutated files for everything that reads untrusted bytes.

Every input must end in success or in a refusal of the reader's own error class, with a message
that names the file, within its time and its memory. Hypothesis makes the inputs out of valid ones,
and shrinks what goes wrong; a seed repeats a run.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path

import mutations
import seeds
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis.errors import HypothesisWarning
from hypothesis.strategies import SearchStrategy

HERE = Path(__file__).parent
# Most inputs take milliseconds, the slowest (an archive that unpacks to 256 MiB) a second, while
# other processes may have the processor.
DEADLINE_S = 20
START_S = 120


@dataclass(frozen=True)
class Target:
    """A reader and what is given to it.

    Attributes:
        suffix: Of the files' names.
        seeds: Makes valid files, each of which the reader must accept.
        inputs: Makes the strategy of mutated ones.
    """

    suffix: str
    seeds: Callable[[], list[bytes]]
    inputs: Callable[[Sequence[bytes]], SearchStrategy[bytes]]


TARGETS = {
    "checkpoint": Target(".ckpt", seeds.checkpoints, mutations.checkpoints),
    "onnx": Target(".onnx", seeds.models, mutations.models),
    "session": Target(".onnx", seeds.models, mutations.models),
    "evaluation": Target(".npz", seeds.evaluation_data, mutations.evaluation_data),
    "recording": Target(".wav", seeds.recordings, mutations.recordings),
    "parameters": Target(".py", seeds.parameters, mutations.parameters),
    "manifest": Target(".json", seeds.manifests, mutations.manifests),
}


class Violation(AssertionError):
    """An input ended as none may; Hypothesis tells its subclasses apart and shrinks each."""


@cache
def _kind(name: str) -> type[Violation]:
    return type(name, (Violation,), {})


class ReaderProcess:
    """The process that reads, started again after it ended.

    Args:
        folder: For its files.
        script: What it runs.
    """

    def __init__(self, folder: Path, script: Path = HERE / "readers.py") -> None:
        self._folder, self._script = folder, script
        self._errors = folder / "stderr"
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> ReaderProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def ask(self, target: str, path: Path) -> dict[str, str]:
        """How reading ``path`` ended; see ``reader.answer``."""
        if self._process is None:
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"target": target, "path": str(path)}) + "\n")
        self._process.stdin.flush()
        return self._answer(DEADLINE_S)

    def _answer(self, seconds: float) -> dict[str, str]:
        assert self._process is not None
        assert self._process.stdout is not None
        if not wait([self._process.stdout], seconds):
            self._end()
            return {"outcome": "hang", "violation": f"no end after {seconds} s", "detail": ""}
        if line := self._process.stdout.readline():
            return json.loads(line)
        code = self._process.wait()
        self._end()
        said = self._errors.read_text(errors="replace")[-2000:]
        return {"outcome": "death", "violation": f"the process ended with {code}", "detail": said}

    def _start(self) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HERE.parent / "support"), str(HERE)]),
            # Threads reserve address space, which is what is limited.
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "MALLOC_ARENA_MAX": "2",
            "TMPDIR": str(self._folder),
        }
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, self._script],
                cwd=self._folder,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        if (ready := self._answer(START_S))["outcome"] != "ready":
            raise RuntimeError(f"the reader did not start: {ready}")

    def _end(self) -> None:
        if self._process is not None:
            with self._process as process:
                process.kill()
            self._process = None


def run(count: int, *, seed: int) -> int:
    """Try ``count`` inputs of every target and print what became of them.

    Args:
        count: Inputs of each target.
        seed: The same one gives the same inputs.

    Returns:
        The number of violations, each of which is printed with the file that shows it.
    """
    kept = Path(tempfile.mkdtemp(prefix="heimdall-fuzz-"))
    with (
        tempfile.TemporaryDirectory(prefix="heimdall-fuzz-") as folder,
        ReaderProcess(Path(folder)) as reader,
    ):
        violations = [
            line
            for name in TARGETS
            for line in try_target(name, count, seed, reader, Path(folder), kept)
        ]
    if not violations:
        kept.rmdir()
    return len(violations)


def try_target(
    name: str, count: int, seed: int, reader: ReaderProcess, folder: Path, kept: Path
) -> list[str]:
    """Try ``count`` inputs of one target, print the outcomes, and return the violations.

    Args:
        name: The target.
        count: Inputs, besides its seeds.
        seed: The same one gives the same inputs.
        reader: Reads them.
        folder: For the file that is read.
        kept: For the files that show a violation.
    """
    target, outcomes, violations = TARGETS[name], Counter[str](), {}
    path = folder / f"{name}{target.suffix}"
    valid = [mutations.Blob(content) for content in target.seeds()]
    for number, content in enumerate(valid):
        path.write_bytes(content)
        if (said := reader.ask(name, path))["outcome"] != "accepted" or "violation" in said:
            violations[f"valid file {number} was not accepted"] = _keep(said, path, kept)

    @seeded(seed)
    @settings(
        max_examples=count,
        deadline=None,  # the reader has its own
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(target.inputs(valid).map(mutations.Blob))
    def every_input_ends_well(content: bytes) -> None:
        path.write_bytes(content)
        said = reader.ask(name, path)
        outcomes[said["outcome"]] += 1
        if "violation" in said:
            # The last one of a kind is the one that Hypothesis has shrunk.
            violations[said["violation"]] = _keep(said, path, kept)
            # Not shrunk is what takes seconds each time: a hang, or a start after a death.
            if said["outcome"] not in ("hang", "death"):
                raise _kind(said["violation"])(said["detail"])

    with warnings.catch_warnings(), suppress(Violation, ExceptionGroup):  # which are in the list
        # Of the length in which Hypothesis would show a strategy.
        warnings.simplefilter("ignore", HypothesisWarning)
        every_input_ends_well()
    told = ", ".join(f"{outcome} {n:,}" for outcome, n in sorted(outcomes.items()))
    print(f"{name}: {sum(outcomes.values()):,} tried: {told}; {len(violations)} violations")
    lines = [f"{name}: {what}; seed {seed}, see {file}" for what, file in violations.items()]
    for line in lines:
        print(f"  {line}")
    return lines


def _keep(said: dict[str, str], path: Path, kept: Path) -> Path:
    what = re.sub(r"\W+", "-", said.get("violation", "refused"))
    file = kept / f"{path.stem}-{what}{path.suffix}"
    file.write_bytes(path.read_bytes())
    file.with_suffix(".txt").write_text(said.get("detail", ""), "utf-8", "backslashreplace")
    return file
