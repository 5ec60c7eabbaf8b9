"""This project beside what one would take instead: ``make bench-peers``.

Each peer starts from the same checkpoint or the same fp32 ONNX file of it, calibrates on the same
rows, and runs as one whole command in an environment of its own where its packages need that. What
it makes is then measured here: latency of one sample in turns with this project's recommended
variant, on the same threads and input, and accuracy on rows that no calibration has seen.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from entry import RESULT
from measure import Judge, Model, answers_apart
from processes import run
from table import Row, described, render

from heimdall_onnx.archive.manifest import Manifest, read_manifest
from heimdall_onnx.common.environment import capture_environment
from heimdall_onnx.common.machine import usable_processors
from heimdall_onnx.common.parameters import PROFILES
from heimdall_onnx.data.evaluation import EvaluationData, load_evaluation_data
from heimdall_onnx.model.checkpoint import load_checkpoint
from heimdall_onnx.model.onnx.export import export_model
from heimdall_onnx.model.runtimes import SessionSettings
from heimdall_onnx.model.signature import Signature
from heimdall_onnx.services.client import make_client
from heimdall_onnx.services.settings import Settings
from heimdall_onnx.services.store import Bucket, locate
from heimdall_onnx.training.demo import make_demo

HERE = Path(__file__).resolve().parent
CONSTRAINTS = HERE.parents[2] / "constraints.txt"
OWN = "this project"
# Nobody is told that a benchmark ran, and nothing is looked for on a hub.
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "DISABLE_TELEMETRY": "1",
    "OLIVE_DISABLE_TELEMETRY": "1",
    "NNCF_CI": "1",
}


@dataclass(frozen=True)
class Peer:
    """A row of the table.

    Attributes:
        name: What it is called.
        script: Its script here.
        form: What the script is to make.
        environment: Its own environment, whose packages are in ``requirements-….txt``; this
            project's if empty.
        from_checkpoint: Whether it starts from the checkpoint rather than the ONNX file.
        slow: Left out for a large model unless it is named.
    """

    name: str
    script: str
    form: str = ""
    environment: str = ""
    from_checkpoint: bool = False
    slow: bool = False


PEERS = (
    Peer("PyTorch eager", "pytorch_models.py", "eager", from_checkpoint=True),
    Peer("torch.compile", "pytorch_models.py", "compile", from_checkpoint=True),
    Peer("torch.compile frozen", "pytorch_models.py", "frozen", from_checkpoint=True),
    Peer("bare script fp32", "bare_script.py", "fp32", from_checkpoint=True),
    Peer("bare script int8", "bare_script.py", "int8", from_checkpoint=True),
    Peer("OpenVINO fp32", "openvino_nncf.py", "fp32"),
    Peer("OpenVINO int8", "openvino_nncf.py", "int8"),
    Peer("OpenVINO int8 controlled", "openvino_nncf.py", "controlled", slow=True),
    *(
        Peer(f"optimum {form}", "optimum_quantize.py", form, "optimum")
        for form in ("avx2 dynamic", "avx2 static", "avx512 dynamic", "avx512 static")
    ),
    Peer("Olive search", "olive_search.py", "", "olive"),
)


@dataclass(frozen=True)
class Task:
    """What all start from.

    Attributes:
        checkpoint: The checkpoint.
        eval_data: Its evaluation data.
        variants: What this project searches.
        threads: Of every model.
        calls: Counted calls of each side of a pair.
        folder: For what is made on the way.
        environments: Where the peers' environments are.
    """

    checkpoint: Path
    eval_data: Path
    variants: str
    threads: int
    calls: int
    folder: Path
    environments: Path


@dataclass(frozen=True)
class Own:
    """What this project's release has made.

    Attributes:
        model: The recommended variant.
        row: Its row, latency and accuracy still to come.
        calibration: Rows of the evaluation data that it was calibrated on.
    """

    model: Model
    row: Row
    calibration: tuple[int, ...]


def python_of(name: str, folder: Path) -> Path:
    """The interpreter of a peer's environment, which is made or brought up to date."""
    if not name:
        return Path(sys.executable)
    requirements = HERE / f"requirements-{name}.txt"
    python, stamp = folder / name / "bin" / "python", folder / name / "installed.txt"
    constraints = constraints_for(requirements.read_text(), CONSTRAINTS.read_text())
    wanted = requirements.read_text() + constraints
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    print(f"filling the environment in {folder / name}, which takes some minutes", flush=True)
    if not python.is_file():
        venv.create(folder / name, with_pip=True)
    file = folder / name / "constraints.txt"
    file.write_text(constraints)
    command = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", file]
    subprocess.run([python, *command, "-r", requirements], check=True)
    stamp.write_text(wanted)
    return python


def constraints_for(requirements: str, constraints: str) -> str:
    """The constraints without the packages whose version the requirements name themselves."""
    pinned = {package_of(line) for line in requirements.splitlines() if "==" in line}
    lines = (line for line in constraints.splitlines() if re.match(r"\w", line))
    return "".join(f"{line}\n" for line in lines if package_of(line) not in pinned)


def package_of(line: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[=;\[ ]", line.strip(), maxsplit=1)[0]).lower()


def own_release(task: Task, environment: dict[str, str]) -> Own:
    """Release with all variants, and fetch the one that it recommends."""
    options = ["--variants", task.variants, "--json", "-p", "threads", str(task.threads)]
    done = run(
        [
            *(sys.executable, "-m", "heimdall_onnx", "release", task.checkpoint),
            *("--eval-data", task.eval_data, *options),
        ],
        task.folder,
        environment,
    )
    result = json.loads(done.output.splitlines()[-1])
    client = make_client(Settings.load())
    manifest = read_manifest(*locate(client, result["manifest_uri"].rpartition("/")[0]))
    own = own_of(manifest, result, done.peak_bytes, task.folder / "own")
    for name, entry in manifest.variant("recommended").files.items():
        target = task.folder / "own" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        Bucket(client, manifest.bucket).download_file(entry.key, target, sha256=entry.sha256)
    return own


def own_of(manifest: Manifest, result: dict[str, Any], peak_bytes: int, folder: Path) -> Own:
    """What a release's manifest and result say of the variant that it recommends."""
    chosen = manifest.variant("recommended")
    assert chosen.sessions is not None
    details = manifest.data["variants"]
    judged = {one["name"]: one for one in details["judged"]}
    passed = [name for name, one in judged.items() if one["status"] == "passed"]
    kept = judged[chosen.name].get("kept_in_float") or []
    seconds = sum(c["seconds"] for c in result["costs"] if c["step"] == "variants")
    row = Row(
        f"{OWN}: {chosen.name}",
        f"release --variants: {len(judged)} variants made, judged and timed, the fastest of "
        f"{len(passed)} that passed its gates, session tuned; time of the step `variants`, memory "
        "of the whole release with report and upload",
        seconds=seconds,
        peak_bytes=peak_bytes,
        notes=(
            *([f"kept in float: {', '.join(kept)}"] if kept else []),
            *([f"session: {options}"] if (options := _options(chosen.sessions.latency)) else []),
        ),
    )
    model = Model(row.name, folder / next(iter(chosen.files)), chosen.sessions.latency)
    return Own(model, row, tuple(details["calibration"]["rows"]))


def _options(settings: SessionSettings) -> str:
    """What differs from the defaults; threads are the same for all."""
    found = settings.model_dump(exclude_defaults=True, exclude={"threads"})
    return ", ".join(f"{name}={value}" for name, value in found.items())


def make(peer: Peer, task: Task, inputs: Sequence[Path], environment: dict[str, str]) -> Row:
    """Let a peer make its model; a row without figures tells why it could not."""
    onnx, calibration, evaluation = inputs
    out = task.folder / re.sub(r"\W+", "-", peer.name)
    out.mkdir()
    options = ["--threads", str(task.threads), "--calls", str(PROFILES["quick"].variant_calls)]
    command = [
        *(python_of(peer.environment, task.environments), HERE / peer.script),
        *(task.checkpoint if peer.from_checkpoint else onnx, calibration, out),
        *("--evaluation", evaluation, *(["--form", peer.form] if peer.form else []), *options),
    ]
    try:
        # What is compiled is not found compiled already.
        done = run(command, out, {**environment, "TORCHINDUCTOR_CACHE_DIR": str(out / "inductor")})
    except RuntimeError as error:
        said = [line for line in str(error).splitlines() if line.strip()]
        return Row(peer.name, f"{peer.script} {peer.form}", reason=f"failed: {said[-1]}")
    return Row(peer.name, seconds=done.seconds, peak_bytes=done.peak_bytes)


def model_of(name: str, out: Path, threads: int) -> tuple[Model | None, dict[str, Any]]:
    """The model in a peer's folder, or None if there is none, and the peer's record."""
    record = json.loads((out / RESULT).read_text())
    if not record["file"]:
        return None, record
    settings = SessionSettings(threads=threads, **record["settings"])
    return Model(name, out / record["file"], settings, record["environment"]), record


def measured(row: Row, task: Task, judge: Judge) -> Row:
    """A peer's row with its figures."""
    if row.reason:
        return row
    out = task.folder / re.sub(r"\W+", "-", row.name)
    model, record = model_of(row.name, out, task.threads)
    notes = tuple(record["notes"])
    if model is None:
        return Row(row.name, reason=notes[-1] if notes else "made nothing", notes=notes[:-1])
    try:
        accuracy = judge.accuracy(model)
        latency_ms, _, ratio = judge.latency(model)
    except Exception as error:  # a peer's model may fail in any way, which is a result too
        return Row(row.name, record["method"], f"can't be run: {error}", notes=notes)
    return Row(
        row.name,
        record["method"],
        latency_ms=latency_ms,
        latency=ratio,
        accuracy=accuracy,
        size_bytes=model.size_bytes,
        seconds=row.seconds,
        peak_bytes=row.peak_bytes,
        notes=notes,
    )


def apart(data: EvaluationData, calibration: Sequence[int], folder: Path) -> EvaluationData:
    """Write the calibration rows and the others to files; return the others."""
    rest = np.setdiff1d(np.arange(data.count), calibration)
    for name, rows in (("calibration", np.array(calibration)), ("evaluation", rest)):
        labels = {} if data.positions is None else {"positions": data.positions[rows]}
        np.savez(folder / f"{name}.npz", **data.rows(rows), **labels)
    return EvaluationData(
        data.rows(rest),
        None if data.positions is None else data.positions[rest],
        data.meta,
        data.source,
        data.sha256,
        data.receivers,
    )


def compare(
    task: Task, peers: Sequence[Peer], environment: dict[str, str]
) -> tuple[Row, list[Row]]:
    """Make and measure everything: this project's row, and the peers'."""
    loaded = load_checkpoint(task.checkpoint, model="heimdall_onnx:LocalizationNet")
    onnx = task.folder / "onnx" / "model.onnx"
    onnx.parent.mkdir()
    export_model(loaded.model, onnx)
    signature: Signature = loaded.signature
    del loaded
    print(f"{OWN} …", flush=True)
    own = own_release(task, environment)
    print(f"{own.row.name}: {own.row.seconds:.0f} s", flush=True)
    data = apart(load_evaluation_data(task.eval_data, signature), own.calibration, task.folder)
    inputs = [onnx, *(task.folder / f"{name}.npz" for name in ("calibration", "evaluation"))]
    fp32 = Model("fp32", onnx, SessionSettings(threads=task.threads))
    # The same threads for all, whatever the search has found.
    settings = own.model.settings.model_copy(update={"threads": task.threads})
    model = Model(own.model.name, own.model.path, settings)
    judge = Judge(data, signature, answers_apart(fp32, data, signature), model, task.calls)
    plain_ms, latency_ms, _ = judge.latency(fp32)
    row = Row(
        own.row.name,
        own.row.method,
        latency_ms=latency_ms,
        accuracy=judge.accuracy(model),
        size_bytes=model.size_bytes,
        seconds=own.row.seconds,
        peak_bytes=own.row.peak_bytes,
        notes=(*own.row.notes, f"the fp32 ONNX file on ONNX Runtime: {plain_ms:.2f} ms"),
    )
    rows: list[Row] = []
    for peer in peers:
        rows.append(measured(make(peer, task, inputs, environment), task, judge))
        print("\n".join(described(rows[-1], row)), flush=True)
    return row, rows


def _bench() -> ModuleType:
    """The other benchmark, for its services and its checkpoints."""
    spec = importlib.util.spec_from_file_location("bench_main", HERE.parent / "__main__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_main"] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


def inputs_of(chosen: argparse.Namespace, output: Path, bench: ModuleType) -> tuple[Path, Path]:
    """Checkpoint and evaluation data: those given, the trained demo, or Large with any weights."""
    if chosen.checkpoint:
        return chosen.checkpoint.absolute(), chosen.eval_data.absolute()
    if chosen.model == "tiny":
        demo = make_demo(output / "demo-tiny", seconds=600, backbone_size="tiny")
        return demo.checkpoint, demo.eval_data
    demo = make_demo(output / "demo")
    # Labels mean nothing to weights that were never trained.
    unlabelled = output / "unlabelled.npz"
    with np.load(demo.eval_data) as archive:
        np.savez(unlabelled, mel_spectrogram=archive["mel_spectrogram"])
    return bench.Bench(output, 1, {}).checkpoint("large"), unlabelled


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="make bench-peers", description=__doc__)
    parser.add_argument("peers", nargs="*", help="words that a row's name has one of; all")
    parser.add_argument("--model", choices=["tiny", "large"], default="tiny")
    parser.add_argument("--checkpoint", type=Path, help="another one, with --eval-data")
    parser.add_argument("--eval-data", type=Path)
    parser.add_argument("--variants", default="all", help="what this project searches")
    parser.add_argument("--threads", type=int, default=usable_processors())
    parser.add_argument("--calls", type=int, default=100, help="counted calls of each side")
    parser.add_argument("--output", type=Path, default=Path(".heimdall/peers"), help="folder")
    parser.add_argument("--environments", type=Path, help="folder of the peers' environments")
    chosen = parser.parse_args(arguments)
    if (chosen.checkpoint is None) != (chosen.eval_data is None):
        parser.error("--checkpoint and --eval-data go together")
    peers = [
        peer
        for peer in PEERS
        if any(word in peer.name for word in chosen.peers)
        or (not chosen.peers and not (peer.slow and chosen.model == "large"))
    ]
    if not peers:
        parser.error(f"no row has {chosen.peers} in its name: {', '.join(p.name for p in PEERS)}")
    # Ended from outside as by Ctrl-C, so that its services end with it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    output = chosen.output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    machine = capture_environment()
    print(f"{machine.cpu}, {machine.processors} processors, {machine.system}, ", end="")
    print(f"Python {machine.python}; load average {os.getloadavg()[0]:.1f}", flush=True)
    bench = _bench()
    checkpoint, eval_data = inputs_of(chosen, output, bench)
    environments = (chosen.environments or output / "environments").absolute()
    for name in sorted({peer.environment for peer in peers}):
        python_of(name, environments)
    work = Path(tempfile.mkdtemp(prefix="work-", dir=output))
    try:
        task = Task(
            checkpoint=checkpoint,
            eval_data=eval_data,
            variants=chosen.variants,
            threads=chosen.threads,
            calls=chosen.calls,
            folder=work,
            environments=environments,
        )
        with bench.services(work) as environment:
            threads = {"OMP_NUM_THREADS": str(chosen.threads)}
            own, rows = compare(task, peers, {**environment, **QUIET, **threads})
    finally:
        shutil.rmtree(work)
    found = {"machine": asdict(machine), "own": asdict(own), "peers": [asdict(r) for r in rows]}
    (output / "peers.json").write_text(json.dumps(found, indent=2) + "\n")
    print(f"\n{chosen.threads} threads, batch 1, {chosen.calls} calls of each side of a pair\n")
    print(render(own, rows), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
