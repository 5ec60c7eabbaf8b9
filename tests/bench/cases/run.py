"""All cases, or some by name, in processes of their own; what comes out, line by line and in sums.

A case that ends its process costs that process: the next has a new one.
"""

from __future__ import annotations

import fnmatch
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from tempfile import TemporaryDirectory

from . import checkpoints, data, models, undeclared
from .case import Case
from .steps import Outcome, try_case

_AT_ONCE = 80
GROUPS = {
    "checkpoints": checkpoints.all_cases,
    "data": data.all_cases,
    "models": models.all_cases,
    "undeclared": undeclared.all_cases,
}


def cases(patterns: Sequence[str] = ()) -> dict[str, Case]:
    """Those whose name or group fits one of the patterns; all without any.

    Raises:
        ValueError: If two have one name.
    """
    found: dict[str, Case] = {}
    for group, make in GROUPS.items():
        for case in make():
            if case.name in found:
                raise ValueError(f"two cases are called {case.name!r}")
            if not patterns or any(
                fnmatch.fnmatch(case.name.lower(), p.lower()) or p == group for p in patterns
            ):
                found[case.name] = case
    return found


def outcomes(names: Sequence[str], processes: int) -> Iterator[Outcome]:
    """What comes of each, in their order."""
    waiting = list(names)
    while waiting:
        # New processes now and then: what exporters leave behind adds up.
        pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _prepare)
        some = [(name, pool.submit(_try, name)) for name in waiting[:_AT_ONCE]]
        try:
            for _, future in some:
                outcome = future.result()
                del waiting[0]
                yield outcome
        except BrokenProcessPool:
            # Of several the first need not be the one whose process has died; alone it is.
            if processes == 1:
                case = cases()[waiting.pop(0)]
                said = "its process has died"
                yield Outcome(case.name, case.should, "traceback", said, 0, "", False)
            processes = 1
        finally:
            pool.shutdown(cancel_futures=True)


def _prepare() -> None:
    import torch

    from heimdall_onnx.common.logs import configure_logs

    # Exporters print whole graphs from C++.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    # Two processes with all threads each only wait for one another.
    torch.set_num_threads(1)
    configure_logs(file=Path(os.devnull))


_CASES: dict[str, Case] = {}


def _try(name: str) -> Outcome:
    if not _CASES:
        _CASES.update(cases())
    return try_case(_CASES[name])


def released(case: Case, environment: Mapping[str, str]) -> Outcome:
    """The same by the command, with the notebook, latency and services."""
    with TemporaryDirectory(prefix="heimdall-case-") as folder:
        given = Path(folder) / "given"
        given.mkdir()
        options = ["--model", case.model, "--opset", str(case.opset), "--profile", "smoke"]
        if case.data:
            options += ["--eval-data", str(case.data(Path(folder)))]
        for name, value in case.options.items():
            options += [
                f"--{name.replace('_', '-')}",
                value if isinstance(value, str) else json.dumps(value),
            ]
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "heimdall_onnx", "release", str(case.write(given)), *options],
            env={**environment, "PYTHONPATH": str(Path(__file__).parents[1])},
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
    seconds = time.perf_counter() - began
    happened = {0: "release", 2: "refuse", 3: "refuse"}.get(done.returncode, "traceback")
    said = "" if happened == "release" else " ".join(done.stderr.split())[-600:]
    right = happened == case.should
    return Outcome(f"{case.name}, whole", case.should, happened, said, seconds, "", right)


def spread(found: Mapping[str, Case], count: int) -> list[Case]:
    """Some that should be released, evenly from each group."""
    some = []
    for make in GROUPS.values():
        usable = [c.name for c in make() if c.should == "release" and c.name in found]
        step = max(1, len(usable) // max(count, 1))
        some += [found[name] for name in usable[::step][:count]]
    return some


def sums(found: Sequence[Outcome]) -> tuple[list[str], list[str], list[str]]:
    """Names of what is right, of the wrong models released, and of what ended in a traceback."""
    return (
        [one.name for one in found if one.right],
        [one.name for one in found if one.wrong],
        [one.name for one in found if one.happened == "traceback"],
    )


def counted(found: Sequence[Outcome]) -> str:
    """How many were to end how, and did; the others by name."""
    should = Counter(one.should for one in found)
    right = Counter(one.should for one in found if one.right)
    text = ", ".join(f"{right[kind]} of {count} to {kind}" for kind, count in should.items())
    others = "; ".join(one.name for one in found if not one.right)
    return f"{text}; not {others}" if others else text
