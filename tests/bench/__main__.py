"""What a release costs, row by row, against its targets: ``make bench``.

Every figure is measured in this run on this machine. Whole commands are timed from outside, in
turns with what they are compared with, so that the machine's mood meets both; a row gives the
median with its range, or a single value where one run takes minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import evaluation
import fleets
import growth
import numpy as np
import pages
import quality
import search
import steps
from processes import PSS_EVERY_S, Run, run

from heimdall_onnx import LocalizationNet, Settings, ensure_store
from heimdall_onnx.common.environment import capture_environment
from heimdall_onnx.services.client import make_client
from heimdall_onnx.services.embedded import services_down
from heimdall_onnx.services.store import Bucket

HERE = Path(__file__).parent
PYTHON = sys.executable
# Parts of a release that a bare script has too; the rest is what the notebook machinery costs.
WORK = {
    "checkpoint",
    "evaluation data",
    "export",
    "validation",
    "parity",
    "departure",
    "latency",
    "upload",
    "registration",
}
FIGURES = "figures"


@dataclass(frozen=True)
class Row:
    """A measured value and its target.

    Attributes:
        name: What is measured.
        target: The largest allowed value; None for a value without one.
        unit: Of both.
        values: Every measurement.
        method: How it was measured.
        at_least: Whether the target is the least allowed value instead.
    """

    name: str
    target: float | None
    unit: str
    values: tuple[float, ...]
    method: str
    at_least: bool = False

    @property
    def value(self) -> float:
        return statistics.median(self.values)

    @property
    def holds(self) -> bool | None:
        if self.target is None:
            return None
        return self.value >= self.target if self.at_least else self.value <= self.target

    def __str__(self) -> str:
        spread = f" ({min(self.values):.3g} to {max(self.values):.3g})" if self.values[1:] else ""
        sign = "≥" if self.at_least else "≤"
        target = "" if self.target is None else f"{sign} {self.target:g}"
        verdict = {True: "ok", False: "MISSED", None: ""}[self.holds]
        value = f"{self.value:.3g} {self.unit}{spread}"
        return f"{verdict:7}{self.name:<58}{target:<9}{value}\n        {self.method}"


@dataclass(frozen=True)
class Bench:
    """What the rows need: folders, checkpoints and running services.

    Attributes:
        folder: For what is made on the way.
        pairs: How often whole commands are compared.
        environment: With the services' addresses in it.
        share: Of the items that fleets have, and of the samples that workers share.
        only: Names of cases, or patterns of them; all by default.
        whole: How many cases of each group are released by the command, too.
    """

    folder: Path
    pairs: int
    environment: dict[str, str]
    share: float = 1.0
    only: tuple[str, ...] = ()
    whole: int = 0

    def run(self, *command: str | Path) -> Run:
        """Run a command in a folder of its own, which goes with it."""
        return self.run_with(self.environment, *command)

    def run_with(self, environment: dict[str, str], *command: str | Path) -> Run:
        """The same in another environment."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            return run(command, Path(folder), environment)

    def checkpoint(self, size: str) -> Path:
        """A checkpoint of the reference model with random weights of one seed."""
        import torch

        path = self.folder / f"{size}.ckpt"
        if not path.exists():
            torch.manual_seed(0)
            model = LocalizationNet(backbone_size=size)
            for name, parameter in model.named_parameters():
                # As trained: at their initial 1e-6 the blocks would add nothing.
                if name.endswith("layer_scale"):
                    parameter.data.fill_(0.1)
            kwargs = {"backbone_size": size}
            torch.save({"state_dict": model.state_dict(), "hyper_parameters": kwargs}, path)
        return path


def startup(bench: Bench) -> Iterator[Row]:
    """Import and command line."""
    seconds: dict[str, list[float]] = {"pass": [], "import heimdall_onnx": []}
    for _ in range(9):
        for code, found in seconds.items():
            found.append(bench.run(PYTHON, "-c", code).seconds)
    bare = statistics.median(seconds["pass"])
    yield Row(
        "import heimdall_onnx adds",
        0.3,
        "s",
        tuple(s - bare for s in seconds["import heimdall_onnx"]),
        "9 processes in turns with an empty one, whose median is taken off",
    )
    command = Path(PYTHON).with_name("heimdall-onnx")
    values = tuple(bench.run(command, "--help").seconds for _ in range(9))
    yield Row("heimdall-onnx --help", 0.5, "s", values, "9 whole processes")


def release_of(
    size: str, pairs: int | None, memory: float | None
) -> Callable[[Bench], Iterator[Row]]:
    """Rows that hold a quick release of this size against the bare script."""

    def rows(bench: Bench) -> Iterator[Row]:
        checkpoint, shown = bench.checkpoint(size), size.capitalize()
        bare: list[Run] = []
        quick: list[Run] = []

        def script() -> None:
            bare.append(bench.run(PYTHON, HERE / "bare.py", checkpoint, "200", bench.folder))
            (bench.folder / "model.onnx").unlink()

        def release() -> None:
            quick.append(bench.run(PYTHON, "-m", "heimdall_onnx", "release", checkpoint, "--json"))

        for turn in range(pairs or bench.pairs):
            for take in (script, release) if turn % 2 == 0 else (release, script):
                take()
        costs = [json.loads(done.output.splitlines()[-1])["costs"] for done in quick]
        machinery = [
            done.seconds - sum(c["seconds"] for c in found if c["step"] in {*WORK, FIGURES})
            for done, found in zip(quick, costs, strict=True)
        ]
        ratios = tuple(q.seconds / b.seconds for q, b in zip(quick, bare, strict=True))
        how = (
            f"bare {statistics.median(b.seconds for b in bare):.1f} s, release "
            f"{statistics.median(q.seconds for q in quick):.1f} s; {len(ratios)} pairs in turns, "
            "200 calls a side, 64 synthetic samples"
        )
        yield Row(f"{shown}: a quick release / a bare script", 2.0, "×", ratios, how)
        yield Row(
            f"{shown}: the notebook machinery",
            15.0,
            "s",
            tuple(machinery),
            "whole command less figures and steps (float64 reference, optimization levels and "
            "MLflow's import before the upload count as steps): services, kernel, imports, "
            "rendering, report, manifest, alias",
        )
        yield Row(
            f"{shown}: peak memory of all processes of the release",
            memory,
            "GB",
            tuple(q.peak_bytes / 1e9 for q in quick),
            f"proportional set sizes, read every {PSS_EVERY_S} s at most; store and registry are "
            f"other processes, running already; the bare script: "
            f"{max(b.peak_bytes for b in bare) / 1e9:.2f} GB",
        )
        longest = sorted(costs[-1], key=lambda c: -float(c["seconds"]))
        yield Row(
            f"{shown}: the longest step of a release",
            None,
            "s",
            (longest[0]["seconds"],),
            ", ".join(f"{c['step']} {c['seconds']:.1f}" for c in longest),
        )

    return rows


def single_steps(bench: Bench) -> Iterator[Row]:
    """Steps of Tiny by themselves, after imports."""
    done = bench.run(PYTHON, HERE / "steps.py", bench.checkpoint("tiny"))
    found = json.loads(done.output.splitlines()[-1])
    for name, (target, unit, method) in steps.ROWS.items():
        yield Row(name, target, unit, tuple(found[name]), method)


def growing(bench: Bench) -> Iterator[Row]:
    """Time and memory as samples and model grow."""
    samples = [
        json.loads(
            bench.run(PYTHON, HERE / "growth.py", "samples", str(count)).output.splitlines()[-1]
        )
        for count in growth.SAMPLES
    ]
    models = [
        json.loads(
            bench.run(
                PYTHON, HERE / "growth.py", "model", str(bench.checkpoint(size))
            ).output.splitlines()[-1]
        )
        for size in growth.SIZES
    ]
    picture = growth.draw(samples, models).save(bench.folder.parent / "growth.png")
    last, first = samples[-1], next(s for s in samples if s["samples"] >= 1000)
    yield Row(
        f"memory of parity at {last['samples']:,} / at {first['samples']:,} samples",
        1.1,
        "×",
        (last["peak_bytes"] / first["peak_bytes"],),
        f"evaluation data of {last['file_bytes'] / 1e9:.1f} GB read from its file; see {picture}",
    )
    shares = json.loads(
        bench.run(
            PYTHON, HERE / "growth.py", "statistics", str(bench.checkpoint("tiny"))
        ).output.splitlines()[-1]
    )
    yield Row(
        "statistics / the models' own time, Tiny",
        0.05,
        "×",
        tuple(shares["shares"]),
        f"{shares['samples']} samples in batches of 8, {len(shares['shares'])} times; both models "
        "run, everything else is statistics",
    )


def variants_of(size: str) -> Callable[[Bench], Iterator[Row]]:
    """Rows of a release with all variants.

    Of Tiny it is a checkpoint trained for ten minutes, with labels; Large has weights of a seed,
    with layer scales as after training, and is judged by displacement on the same inputs.
    """

    def rows(bench: Bench) -> Iterator[Row]:
        from heimdall_onnx.training.demo import make_demo

        seconds, sort = (600, "tiny") if size == "tiny" else (120, "atto")
        demo = make_demo(bench.folder.parent / f"demo-{sort}", seconds=seconds, backbone_size=sort)
        checkpoint, data = demo.checkpoint, demo.eval_data
        if size != "tiny":
            checkpoint, data = bench.checkpoint(size), bench.folder / "unlabelled.npz"
            np.savez(data, mel_spectrogram=np.load(demo.eval_data)["mel_spectrogram"])
        options = ("--eval-data", data, "--variants", "all", "--json")
        done = bench.run(PYTHON, "-m", "heimdall_onnx", "release", checkpoint, *options)
        for name, target, at_least, unit, values, method in search.rows_of(size, done):
            yield Row(name, target, unit, values, method, at_least)

    return rows


def training_rows(bench: Bench) -> Iterator[Row]:
    """The training entry beside loops one would write oneself."""
    import training  # brings Lightning, which nobody else here needs

    done = json.loads(bench.run(PYTHON, HERE / "training.py").output.splitlines()[-1])
    for name, (by, of, to, target) in training.PAIRS.items():
        found = done[by]
        values = training.ratios(found, of, to)
        low, high = training.interval(values)
        speeds = ", ".join(f"{n} {statistics.median(v):.0f}" for n, v in found.items())
        yield Row(
            name,
            target,
            "×",
            values,
            f"atto, {len(values)} rounds in turns, 95 % interval {low:.3f} to {high:.3f}; medians "
            f"on {done['threads']} threads: {speeds}",
            at_least=True,
        )


def fleet_rows(bench: Bench) -> Iterator[Row]:
    """Fleets beside single releases, and what an item takes from store and registry."""
    with fleets.place(bench.folder, bench.environment, bench.run_with) as there:
        sizes = fleets.Sizes().scaled(bench.share)
        for name, target, at_least, unit, values, method in fleets.rows(there, bench.pairs, sizes):
            yield Row(name, target, unit, values, method, at_least)


def evaluation_rows(bench: Bench) -> Iterator[Row]:
    """A dataset that two workers share beside one process, and the memory that it takes."""
    found = []
    for samples in evaluation.SAMPLES:
        count = str(max(100, round(bench.share * samples)))
        rounds = str(bench.pairs if samples == evaluation.SAMPLES[0] else 1)
        done = bench.run(PYTHON, HERE / "evaluation.py", count, rounds)
        found.append(json.loads(done.output.splitlines()[-1]))
    few, many = found
    seconds, counts = few["seconds"], f"{few['samples']:,} samples"
    yield Row(
        "figures of a shared evaluation that differ from one process's",
        0,
        "",
        tuple(few["differing"]),
        f"of {few['figures']}, quantiles left out, which are estimates; {counts}, all gates' "
        "statistics, task error and calibration",
    )
    yield Row(
        "evaluation by one process / by two workers",
        None,
        "×",
        tuple(a / b for a, b in zip(seconds["alone"], seconds["shared"], strict=True)),
        f"{counts} of a small model, one thread each, in turns; all values are held against their "
        "digest; "
        f"one process {statistics.median(seconds['alone']):.1f} s, workers "
        f"{statistics.median(seconds['shared']):.1f} s with their start",
    )
    yield Row(
        f"memory of the client at {many['samples']:,} / at {few['samples']:,} samples",
        1.1,
        "×",
        (many["client_bytes"][0] / max(few["client_bytes"]),),
        f"a dataset of {many['bytes'] / 1e9:.2g} GB; {many['client_bytes'][0] / 1e6:.0f} MB",
    )


def page_rows(bench: Bench) -> Iterator[Row]:
    """What a reader waits for: pages in a browser, and what it takes to make them."""
    place = pages.Place(bench.folder, bench.environment, bench.run_with)
    for name, target, at_least, unit, values, method in pages.rows(place, bench.share):
        yield Row(name, target, unit, values, method, at_least)


def case_rows(bench: Bench) -> Iterator[Row]:
    """Models and checkpoints of every kind, and whether they end as they should."""
    from cases import run as tried

    chosen, found, began = tried.cases(bench.only), [], time.perf_counter()
    processes = min(4, len(os.sched_getaffinity(0)))
    for outcome in tried.outcomes(list(chosen), processes):
        found.append(outcome)
        print(outcome, flush=True)
    for case in tried.spread(chosen, bench.whole):
        found.append(tried.released(case, bench.environment))
        print(found[-1], flush=True)
    right, wrong, broken = tried.sums(found)
    share = 100 * len(right) / max(len(found), 1)
    yield Row("cases that end as they should", 95, "%", (share,), tried.counted(found), True)
    how = ", ".join(wrong) or "weights and answers of all that are released, beside PyTorch's"
    yield Row("wrong models released", 0, "", (len(wrong),), how)
    how = ", ".join(broken) or "errors that are none of the product's own"
    yield Row("tracebacks", 0, "", (len(broken),), how)
    seconds = time.perf_counter() - began
    yield Row("all cases", None, "s", (seconds,), f"{len(found)}, in {processes} processes")


def quality_rows(bench: Bench) -> Iterator[Row]:
    """How often a contract on quality is passed by what loses as much as is allowed."""
    for name, target, unit, values, method in quality.rows(bench.share):
        yield Row(name, target, unit, values, method)


PARTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "startup": startup,
    "steps": single_steps,
    "tiny": release_of("tiny", None, None),
    "large": release_of("large", 1, 4.5),
    "growth": growing,
    "training": training_rows,
    "variants-tiny": variants_of("tiny"),
    "variants-large": variants_of("large"),
    "fleet": fleet_rows,
    "evaluation": evaluation_rows,
    "pages": page_rows,
    "cases": case_rows,
    "quality": quality_rows,
}


@contextmanager
def services(folder: Path) -> Iterator[dict[str, str]]:
    """A store and a registry of the benchmark's own, in the environment of what it runs."""
    settings = Settings(_env_file=None, HEIMDALL_HOME=folder / "home")
    before = dict(os.environ)
    try:
        filled = ensure_store(settings)
        filled.apply()
        import mlflow

        from heimdall_onnx.services.registry import initialize_mlflow

        Bucket(make_client(filled), "heimdall-bench").ensure()
        # Whoever comes first would otherwise pay for making the database.
        _ = initialize_mlflow(filled).experiment_id
        client = mlflow.MlflowClient(filled.tracking_uri.get_secret_value())
        client.create_experiment("bare")
        client.create_registered_model("bare")
        yield dict(os.environ)
    finally:
        services_down(settings)
        os.environ.clear()
        os.environ.update(before)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; the exit code tells whether every target was met."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--pairs", type=int, default=3, help="how often commands are compared")
    parser.add_argument("--share", type=float, default=1.0, help="of items and samples, to try it")
    parser.add_argument("--only", nargs="+", default=[], help="cases, by name, pattern or group")
    parser.add_argument("--whole", type=int, default=0, help="cases of a group released whole, too")
    parser.add_argument("--output", type=Path, default=Path(".heimdall/bench"), help="folder")
    chosen = parser.parse_args(arguments)
    if unknown := set(chosen.parts) - PARTS.keys():
        parser.error(f"there is no part {', '.join(sorted(unknown))}; known are {', '.join(PARTS)}")
    # Ended from outside as by Ctrl-C, so that its services end with it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    output = chosen.output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    machine = capture_environment()
    print(f"{machine.cpu}, {machine.processors} processors, {machine.system}, ", end="")
    print(f"Python {machine.python}; load average {os.getloadavg()[0]:.1f}\n", flush=True)
    rows = []
    work = Path(tempfile.mkdtemp(prefix="work-", dir=output))
    try:
        # Neither these nor a release's steps, which cases take, need services.
        alone = bool(chosen.parts) and {*chosen.parts} <= {"cases", "quality"} and not chosen.whole
        with nullcontext(dict(os.environ)) if alone else services(work) as environment:
            only = tuple(chosen.only)
            bench = Bench(work, chosen.pairs, environment, chosen.share, only, chosen.whole)
            for part in chosen.parts or PARTS:
                for row in PARTS[part](bench):
                    rows.append(row)
                    print(row, flush=True)
    finally:
        shutil.rmtree(work)
    result = {"machine": asdict(machine), "rows": [{**asdict(r), "holds": r.holds} for r in rows]}
    (output / "bench.json").write_text(json.dumps(result, indent=2) + "\n")
    missed = [row.name for row in rows if row.holds is False]
    print(f"\n{len(missed)} of {len(rows)} rows miss their target: {'; '.join(missed) or 'none'}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
