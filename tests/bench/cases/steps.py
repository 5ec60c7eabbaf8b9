"""A case taken through a release's own steps, and what came of it."""

from __future__ import annotations

import hashlib
import io
import re
import signal
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from heimdall_onnx import (
    compare_outputs,
    decide,
    export_model,
    first_rows,
    load_checkpoint,
    load_evaluation_data,
    validate_model,
)
from heimdall_onnx.common.errors import HeimdallError
from heimdall_onnx.common.parameters import ReleaseParameters, check_parameters
from heimdall_onnx.model.checkpoint import LoadedModel, single_file
from heimdall_onnx.model.construction import import_model
from heimdall_onnx.model.copies import pickle_model
from heimdall_onnx.model.readings import read_weights
from heimdall_onnx.model.signature import Signature, TensorSpec

from .case import Case

LONGEST_S = 240
_CHOICE = re.compile(r"^\s*-? ?--weights (\S+):", re.MULTILINE)


@dataclass(frozen=True)
class Outcome:
    """What came of a case.

    Attributes:
        name: Of the case.
        should: What should have happened.
        happened: ``release``, ``ask``, ``refuse`` or ``traceback``.
        said: The error, or what is wrong.
        seconds: It took.
        wrong: Why what was released is another model than PyTorch's; empty if it is not.
        right: Whether all is as it should be.
    """

    name: str
    should: str
    happened: str
    said: str
    seconds: float
    wrong: str
    right: bool

    def __str__(self) -> str:
        mark = "ok" if self.right else "WRONG"
        line = f"{mark:7}{self.name:<44}{self.should:<9}{self.happened:<11}{self.seconds:5.1f} s"
        note = self.wrong or self.said
        first = " ".join(note.split())[:400]
        return line if self.right or not note else f"{line}\n        {first}"


class NotAsItShouldError(Exception):
    """What was found wrong with what was loaded or released."""


def try_case(case: Case) -> Outcome:
    """Take a case through its steps and judge what comes of it."""
    started = time.perf_counter()
    happened, said, wrong = "release", "", ""

    def too_long(*_: object) -> None:
        raise TimeoutError(f"it has taken {LONGEST_S} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LONGEST_S)
    try:
        with TemporaryDirectory(prefix="heimdall-case-") as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            where = Path(folder)
            given = _written(case, where / "given")
            started = time.perf_counter()
            try:
                wrong = _release(case, given, where)
            except HeimdallError as error:
                said = f"exit {error.exit_code}: {error}"
                happened = "ask" if _CHOICE.search(str(error)) else "refuse"
                if error.exit_code not in (2, 3):
                    happened = "traceback"
                if case.should == happened == "ask":
                    said = _unlike_choices(case, given, str(error)) or said
                    wrong = "" if said.startswith("exit ") else "asked for others"
    except Exception as error:
        happened = "traceback"
        last = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{type(error).__name__}: {error} ({Path(last.filename).name}, line {last.lineno})"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    seconds = time.perf_counter() - started
    right = happened != "traceback" and case.should in (happened, "either") and not wrong
    if right and happened == "refuse" and case.says and not re.search(case.says, said):
        right, said = False, f"does not say {case.says!r}: {said}"
    if wrong and happened != "release":
        said, wrong = f"{wrong}: {said}", ""
    return Outcome(case.name, case.should, happened, said, seconds, wrong, right)


def _written(case: Case, folder: Path) -> dict[str, str]:
    """The parameters of the release, with the files that it is given."""
    folder.mkdir()
    data = folder.with_name("data")
    data.mkdir()
    model = case.model.replace("{folder}", str(folder))
    given: dict[str, Any] = {"checkpoint": str(case.write(folder)), "model": model}
    if case.data:
        given["eval_data"] = str(case.data(data))
    return given | {"opset": case.opset, **case.options}


def _release(case: Case, given: Mapping[str, Any], folder: Path) -> str:
    """The steps of a release; returns what is wrong with the model that would be released."""
    (folder / "run").mkdir()
    parameters = check_parameters(
        {**given, "profile": "smoke", "output_dir": str(folder / "run"), "measure_latency": False}
    )
    read_weights(parameters.checkpoint)
    loaded = _load(parameters, folder / "run")
    wrong = _other_weights(case, loaded)
    data = load_evaluation_data(parameters.eval_data_path, loaded.signature, loaded.model)
    if case.labelled and data.positions is None:
        wrong = wrong or "its labels are not used"
    known = _digest(case, loaded)
    if not case.data and known in _PASSED:
        return wrong
    data = data.head(parameters.limits.max_samples or data.count)
    exported = export_model(
        loaded.model, parameters.onnx_path, signature=loaded.signature, opset=parameters.opset
    )
    info = validate_model(exported.path, signature=loaded.signature)
    parity = compare_outputs(
        loaded.model,
        exported.path,
        data,
        loaded.signature,
        tolerance=parameters.tolerance,
        batch_size=parameters.batch_size,
        reference_samples=parameters.limits.reference_samples,
    )
    decide(parameters, info, parity).require()
    # As whoever measures latency does.
    handed = torch.load(io.BytesIO(pickle_model(loaded.model)), weights_only=False)
    if name := _differing(handed, loaded.model):
        wrong = wrong or f"another model is handed to other processes: {name}"
    wrong = wrong or other_answers(case, loaded, exported.path)
    if not wrong:
        _PASSED.add(known)
    return wrong


# Models that have been released with these very weights: what is found once is not sought again.
_PASSED: set[str] = set()


def _digest(case: Case, loaded: LoadedModel) -> str:
    found = hashlib.sha256(
        repr((type(loaded.model), loaded.model_kwargs, case.opset, loaded.signature)).encode()
    )
    for name, value in loaded.model.state_dict().items():
        found.update(name.encode())
        if isinstance(value, Tensor):
            found.update(value.detach().flatten().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _load(parameters: ReleaseParameters, folder: Path, **changes: Any) -> LoadedModel:
    return load_checkpoint(
        single_file(parameters.checkpoint, folder),
        model=parameters.model,
        model_kwargs=parameters.model_kwargs,
        arrays=lambda: first_rows(parameters.eval_data_path),
        **({"weights": parameters.weights, "submodule": parameters.submodule} | changes),
    )


def references(case: Case) -> list[nn.Module]:
    """The models as PyTorch loads them, one for each of the right readings."""
    found = []
    for state in case.right():
        network = (case.reference or import_model(case.model))()
        network.load_state_dict(state)
        found.append(network.eval())
    return found


def _other_weights(case: Case, loaded: LoadedModel) -> str:
    right = references(case)
    if not right:
        return ""
    differing = [_differing(loaded.model, network) for network in right]
    return "" if "" in differing else f"other weights than PyTorch loads: {differing[0]}"


def _differing(model: nn.Module, other: nn.Module) -> str:
    mine, theirs = (
        dict((*network.named_parameters(), *network.named_buffers())) for network in (model, other)
    )
    if mine.keys() != theirs.keys():
        return f"names differ: {sorted(mine.keys() ^ theirs.keys())}"
    for name, value in mine.items():
        if not _equal(value.detach(), theirs[name].detach()):
            return name
    extra = [
        name
        for name, value in other.state_dict().items()
        if name.endswith("_extra_state") and not _equal(value, model.state_dict().get(name))
    ]
    return next(iter(extra), "")


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and bool(torch.equal(one.nan_to_num(), other.nan_to_num()))
    return bool(one == other)


def _unlike_choices(case: Case, given: Mapping[str, Any], text: str) -> str:
    """Take each of the readings that were named; they must be the right ones, all of them."""
    labels = _CHOICE.findall(text)
    right = references(case)
    found = set()
    parameters = check_parameters(dict(given))
    for label in labels:
        with TemporaryDirectory() as folder:
            try:
                loaded = _load(parameters, Path(folder), weights=label)
            except HeimdallError as error:
                if case.says:  # readings that can't be taken are named too
                    continue
                return f"--weights {label} does not choose: {error}"
        matching = [i for i, network in enumerate(right) if not _differing(loaded.model, network)]
        if right and not matching:
            return f"--weights {label} gives other weights than any of the readings"
        found.update(matching)
    return "" if len(found) == len(right) else f"names {labels}, of {len(right)} readings"


def other_answers(case: Case, loaded: LoadedModel, path: Path) -> str:
    """Hold the file against PyTorch on inputs of one's own; says where they differ."""
    network = next((n for n in references(case) if not _differing(loaded.model, n)), loaded.model)
    signature = loaded.signature
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(99)
    probes = case.probes(rng) if case.probes else drawn(signature, rng)
    for inputs in probes:
        try:
            expected = _answers(network, inputs, signature)
        except Exception:
            continue
        shapes = {name: array.shape for name, array in inputs.items()}
        try:
            found = session.run(
                list(expected),
                {spec.name: inputs[spec.name] for spec in _needed(session, signature)},
            )
        except Exception as error:
            return f"ONNX Runtime fails at {shapes}: {' '.join(str(error).split())[:200]}"
        for (name, truth), answer in zip(expected.items(), found, strict=True):
            shown = case.shown(inputs) if case.shown else None
            if far := _far(truth, answer, shown):
                return f"{name} is {far} at {shapes}"
    return ""


def _needed(session: onnxruntime.InferenceSession, signature: Signature) -> list[TensorSpec]:
    taken = {one.name for one in session.get_inputs()}
    return [spec for spec in signature.inputs if spec.name in taken]


def _answers(
    network: nn.Module, inputs: Mapping[str, np.ndarray], signature: Signature
) -> dict[str, np.ndarray]:
    from heimdall_onnx.model.inference import run_pytorch

    return run_pytorch(network, {n: a.copy() for n, a in inputs.items()}, signature)


def _far(truth: np.ndarray, answer: np.ndarray, shown: np.ndarray | None) -> str:
    """How far an answer is from the truth, where it is further than rounding can explain."""
    if truth.shape != answer.shape:
        return f"of shape {answer.shape} instead of {truth.shape}"
    if shown is not None:
        truth, answer = truth[shown], answer[shown]
    if not truth.size:
        return ""
    if not np.issubdtype(truth.dtype, np.floating):
        # Ties may fall either way.
        share = float(np.mean(truth != answer))
        return f"another one in {share:.0%} of the elements" if share > 0.02 else ""
    a, b = truth.astype(np.float64), answer.astype(np.float64)
    # Infinities and NaN belong to the same places.
    odd = ~np.isfinite(a)
    if not (np.isfinite(b[~odd]).all() and np.array_equal(a[odd], b[odd], equal_nan=True)):
        return "finite elsewhere than PyTorch's"
    if not odd.all():
        largest = np.abs(a[~odd]).max()
        share = np.abs(a - b)[~odd].max() / max(largest, 1e-30)
        if share > (2e-2 if truth.dtype == np.float16 else 1e-3):
            return f"off by {share:.1%} of the largest"
    return ""


def drawn(signature: Signature, rng: np.random.Generator) -> Iterator[dict[str, np.ndarray]]:
    """Inputs within what a signature says: every length, large and small batches."""
    for axes in _lengths(signature):
        for count in (1, 3, 16):
            inputs = {spec.name: _array(spec, count, axes, rng) for spec in signature.inputs}
            yield inputs


def _lengths(signature: Signature) -> Iterator[dict[str, int]]:
    last = {axis.name: axis.lengths[-1] for axis in signature.dynamic_axes}
    yield last
    for axis in signature.dynamic_axes:
        for length in axis.lengths[:-1]:
            yield last | {axis.name: length}


def _array(
    spec: TensorSpec, count: int, axes: Mapping[str, int], rng: np.random.Generator
) -> np.ndarray:
    batch, *rest = spec.shape
    shape = (
        count if isinstance(batch, str) else batch,
        *(axes[axis] if isinstance(axis, str) else axis for axis in rest),
    )
    low, high = spec.range or (-300, 300)
    if spec.dtype == "bool":
        hidden = rng.random(shape) < 0.4
        hidden[:, :1] = False
        return hidden
    if np.issubdtype(np.dtype(spec.dtype), np.integer):
        found = rng.integers(int(low), int(high), shape, endpoint=True).astype(spec.dtype)
        if (low, high) == (0, 1):
            found[:, :1] = 1
        return found
    values = rng.normal(size=shape) if spec.range is None else rng.uniform(low, high, shape)
    return values.astype(spec.dtype)
