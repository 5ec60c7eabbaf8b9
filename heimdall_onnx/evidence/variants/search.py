"""The search for the fastest faithful variant: make each, judge it, time it, choose by evidence.

A lossy variant has to hold the gates of the task (`evidence.variants.accuracy`) on samples that no
calibration has seen. Where one fails, groups of nodes are kept in float, those first that were
measured to add most noise (`evidence.variants.sensitivity`), until it holds or half of them are.
The fastest that holds is recommended, if it is known to be faster than fp32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from heimdall_onnx.common.errors import BenchmarkError, EvidenceError, UnavailableError
from heimdall_onnx.common.files import hash_file
from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.common.parameters import FP32, MODEL, VARIANTS_FOLDER
from heimdall_onnx.common.processes import WorkerProcess
from heimdall_onnx.common.verdict import Gate
from heimdall_onnx.data.evaluation import load_evaluation_data
from heimdall_onnx.evidence.latency.benchmark import PairLatency, measure_pair
from heimdall_onnx.evidence.latency.contenders import (
    Contestant,
    default_threads,
    pytorch_contestant,
)
from heimdall_onnx.evidence.variants.accuracy import (
    Accuracy,
    accuracy_gates,
    answers_of,
    judge_accuracy,
)
from heimdall_onnx.evidence.variants.calibration import CalibrationSplit, split_calibration
from heimdall_onnx.evidence.variants.figures import VariantFigures, VariantsFigures
from heimdall_onnx.evidence.variants.recipes import (
    RECIPES,
    Recipe,
    VariantJob,
    chosen_recipes,
    make_variant,
)
from heimdall_onnx.evidence.variants.sensitivity import NoiseProfile, noise_profile
from heimdall_onnx.evidence.variants.tuning import LATENCY, THROUGHPUT, tune_session
from heimdall_onnx.model.runtimes import CPU, SessionSettings, open_runner, require_runtime

if TYPE_CHECKING:
    from torch import nn

    from heimdall_onnx.common.arrays import Arrays
    from heimdall_onnx.common.parameters import Quality, ReleaseParameters
    from heimdall_onnx.data.evaluation import EvaluationData
    from heimdall_onnx.model.signature import Signature

log = get_logger(__name__)

_PROFILE_SAMPLES = 8


@dataclass(frozen=True)
class JudgedVariant(VariantFigures):
    """A variant with its evidence, on the machine that judged it.

    Attributes:
        settings: What it was opened with, before it was tuned.
        path: Its file on this machine; that of fp32 where it has none of its own.
        noise: Where it loses accuracy, with every node quantized; None where nodes can't be chosen.
        attempts: How often it was judged, each time as something else.
    """

    latency: PairLatency | None = field(default=None, repr=False)
    accuracy: Accuracy | None = field(default=None, repr=False)
    settings: SessionSettings = field(default_factory=SessionSettings)
    path: Path | None = field(default=None, repr=False)
    noise: NoiseProfile | None = field(default=None, repr=False)
    attempts: int = field(default=0, repr=False)

    @property
    def multiplies_in(self) -> str:
        """What its products are of, as a roofline's peaks are named."""
        # Weights of 4 bits are multiplied with activations that are rounded to 8.
        names = {"fp32": "f32", "fp16": "f16", "int4": "int8"}
        return names.get(self.precision, self.precision)

    @property
    def weight_bytes(self) -> int:
        """What of its weights has to be read for a call."""
        # Two of them halve the fp32 file's weights as they open it.
        halved = self.precision in {"bf16", "fp16"} and not self.has_own_file
        return self.size_bytes // 2 if halved else self.size_bytes

    @property
    def has_own_file(self) -> bool:
        """Whether it has another file than fp32."""
        return self.file != MODEL


@dataclass(frozen=True)
class VariantsReport(VariantsFigures):
    """Everything that `compare_variants` found.

    Attributes:
        batch_size: The batch size that throughput is measured at.
    """

    calibration: CalibrationSplit = field(repr=False)
    against_pytorch: PairLatency = field(repr=False)
    judged: tuple[JudgedVariant, ...]
    batch_size: int

    def variant(self, name: str) -> JudgedVariant:
        """The variant of this name."""
        return next(variant for variant in self.judged if variant.name == name)

    @property
    def best(self) -> JudgedVariant:
        """The recommended variant."""
        return self.variant(self.recommended)


def compare_variants(
    model: nn.Module,
    onnx_path: Path,
    data: EvaluationData,
    signature: Signature,
    parameters: ReleaseParameters,
    *,
    quality: Quality | None = None,
    progress: Callable[[str], None] | None = None,
) -> VariantsReport | None:
    """Make, judge and time the variants that the parameters ask for.

    Args:
        model: The PyTorch model, in eval mode.
        onnx_path: The fp32 ONNX file; those of variants go into ``variants`` beside it.
        data: Evaluation data, a part of which calibrates unless the parameters name a file for
            that.
        signature: Names, dtypes and ranges of inputs and outputs.
        parameters: Of the release.
        quality: How much a variant may lose in the task; what the parameters say by default.
        progress: Called with the name of each variant as its turn comes.

    Returns:
        None if no variants are asked for.

    Raises:
        ParameterError: If a variant is unknown.
        DataError: If too few samples are left to judge with, or the calibration file can't be used.
        BenchmarkError: If fp32 can't be measured.
    """
    recipes = chosen_recipes(parameters.variants)
    if not recipes:
        return None
    calibration = None
    if parameters.calibration_data:
        calibration = load_evaluation_data(parameters.calibration_data, signature)
    split = split_calibration(
        data,
        samples=parameters.limits.calibration_samples,
        judged=parameters.limits.judged_samples,
        seed=parameters.seed,
        calibration=calibration,
    )
    contract = quality or parameters.quality()
    search = _Search(model, onnx_path, split, signature, parameters, contract)
    judged = search.judge(recipes, progress or (lambda name: None))
    timed = [search.time(variant) for variant in judged]
    best = search.confirmed(sorted((v for v in timed if v.passed), key=_gain, reverse=True))
    against = search.against_pytorch(best)
    log.info("recommended", variant=best.name, speedup=round(against.speedup.ratio, 2))
    return VariantsReport(
        best.name,
        split,
        parameters.accuracy_limits,
        against,
        tuple(best if variant.name == best.name else variant for variant in timed),
        parameters.batch_size,
    )


def _gain(variant: JudgedVariant) -> float:
    """Speedup over fp32; nothing where it is not known to be one."""
    if variant.name == FP32:
        return 1.0
    if variant.latency is None or variant.latency.speedup.low <= 1:
        return 0.0
    return variant.latency.speedup.ratio


class _Search:
    """What the steps of the search share."""

    def __init__(
        self,
        model: nn.Module,
        onnx_path: Path,
        split: CalibrationSplit,
        signature: Signature,
        parameters: ReleaseParameters,
        contract: Quality,
    ) -> None:
        self._contract = contract
        self._model, self._onnx, self._split = model, onnx_path, split
        self._signature, self._parameters = signature, parameters
        self._inputs: Arrays = dict(split.evaluation.inputs)  # type: ignore[arg-type]
        # A number, so that who opens the model elsewhere knows with how many it was measured.
        self._threads = SessionSettings(threads=parameters.threads or default_threads())
        self._reference: Arrays = {}

    def judge(
        self, recipes: Sequence[Recipe], progress: Callable[[str], None]
    ) -> list[JudgedVariant]:
        """Make every variant and hold it against the gates, in a process that gives back memory."""
        # The error that the confidence leaves is shared among all that may lose anything.
        self._lossy = sum(recipe.lossy for recipe in recipes)
        judged = []
        with WorkerProcess() as worker, tempfile.TemporaryDirectory(prefix="heimdall-") as cache:
            self._reference = worker(
                _answers, self._onnx, self._signature, self._threads, self._inputs
            )
            for recipe in recipes:
                progress(recipe.name)
                try:
                    judged.append(self._judge(recipe, worker, Path(cache)))
                except (UnavailableError, EvidenceError) as error:
                    status = "unavailable" if isinstance(error, UnavailableError) else "failed"
                    judged.append(
                        replace(self._described(recipe), status=status, reason=str(error))
                    )
                log.info("judged", variant=recipe.name, status=judged[-1].status)
        return judged

    def _described(self, recipe: Recipe) -> JudgedVariant:
        settings = recipe.settings.model_copy(update={"threads": self._threads.threads})
        return JudgedVariant(
            recipe.name,
            recipe.what,
            recipe.precision,
            "failed",
            file=MODEL if recipe.make is None else f"{VARIANTS_FOLDER}/{recipe.name}/{MODEL}",
            settings=settings,
            sessions=dict.fromkeys((LATENCY, THROUGHPUT), settings),
        )

    def _judge(self, recipe: Recipe, worker: WorkerProcess, cache: Path) -> JudgedVariant:
        variant = self._described(recipe)
        if recipe.name == FP32:
            return _with_file(replace(variant, status="passed"), self._onnx)
        # Before minutes are spent on making what can't run here.
        require_runtime(variant.settings)
        path = self._onnx.parent / variant.file if variant.has_own_file else self._onnx

        def make(nodes: tuple[str, ...]) -> None:
            job = VariantJob(self._onnx, path, self._split.inputs, nodes, cache)
            worker(make_variant, recipe.name, job)

        if recipe.make is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            make(())
        variant = self._held(variant, path, worker)
        if recipe.selective:
            # Of calibration inputs: those that judge have no part in what is kept in float.
            noise = worker(
                noise_profile,
                recipe.name,
                self._onnx,
                path,
                [name for name, _ in self._model.named_modules(remove_duplicate=False)],
                {name: array[:_PROFILE_SAMPLES] for name, array in self._split.inputs.items()},
            )
            variant = replace(variant, noise=noise)
            half = len(noise.groups) // 2
            counts = sorted({*(2**n for n in range(half.bit_length())), half} - {0})
            for count in counts:
                if variant.passed or self._hopeless:
                    break
                kept = noise.most_sensitive(count)
                make(tuple(node for group in kept for node in group.nodes))
                scopes = tuple(group.scope for group in kept)
                variant = self._held(replace(variant, kept_in_float=scopes), path, worker)
        return _with_file(variant, path)

    def _held(self, variant: JudgedVariant, path: Path, worker: WorkerProcess) -> JudgedVariant:
        """The variant held against the gates."""
        recipe, data = RECIPES[variant.name], self._split.evaluation
        found = worker(_answers, path, self._signature, variant.settings, self._inputs)
        # Halved with each attempt, so that however many there are the sum is what a variant has.
        attempts = variant.attempts + 1
        share = 0.5**attempts / self._lossy if recipe.lossy else 1.0
        accuracy = self._accuracy(found, share, binding=recipe.lossy)
        gates = accuracy_gates(accuracy, self._parameters.accuracy_limits)
        if recipe.lossy and data.synthetic:
            noise = "the inputs are random numbers, on which rounding is nobody's loss"
            gates = (*gates, Gate.none_of("evaluation data", [noise]))
        failed = [gate for gate in gates if not gate.passed]
        status = "not shown" if all(gate.undecided for gate in failed) else "failed"
        return replace(
            variant,
            attempts=attempts,
            accuracy=accuracy,
            gates=gates,
            status=status if failed else "passed",
            reason="; ".join(gate.summary() for gate in failed),
        )

    def _accuracy(self, found: Arrays, share: float, *, binding: bool) -> Accuracy:
        # A test run shows nothing with its few samples.
        binding = binding and self._parameters.profile != "smoke"
        contract = replace(self._contract, binding=binding)
        data = self._split.evaluation
        return judge_accuracy(self._reference, found, data, self._signature, contract, share)

    @cached_property
    def _hopeless(self) -> bool:
        """Whether there are too few samples to show even the fp32 model's own answers."""
        own = self._accuracy(self._reference, 0.25 / max(self._lossy, 1), binding=True)
        return not all(judged.gate.passed for judged in own.quality)

    def time(self, variant: JudgedVariant) -> JudgedVariant:
        """Measure a variant that could be opened in turns with fp32, and fp32 with PyTorch."""
        if variant.path is None:
            return variant
        try:
            with self._opponent(variant) as opponent:
                measured = self._measure(opponent, variant, self._parameters.limits.variant_calls)
        except BenchmarkError as error:
            if variant.name == FP32:
                raise
            return replace(variant, status="failed", reason=str(error))
        log.info("timed", variant=variant.name, speedup=round(measured.speedup.ratio, 2))
        return replace(variant, latency=measured, ran_on=measured.second.ran_on)

    def _opponent(self, variant: JudgedVariant) -> AbstractContextManager[Contestant]:
        """PyTorch for fp32, and fp32 for every other variant."""
        if variant.name == FP32:
            return self._pytorch(variant)
        return nullcontext(Contestant(FP32, self._onnx, self._threads))

    def _pytorch(self, variant: JudgedVariant) -> AbstractContextManager[Contestant]:
        """PyTorch on the device of what it is held against."""
        device = variant.settings.provider if variant.settings.on_gpu else CPU
        settings = self._threads.model_copy(update={"provider": device})
        return pytorch_contestant(self._model, settings)

    def _measure(
        self, first: Contestant, variant: JudgedVariant, calls: int, min_seconds: float = 0.0
    ) -> PairLatency:
        assert variant.path is not None
        return measure_pair(
            first,
            Contestant(variant.name, variant.path, variant.sessions[LATENCY]),
            self._call,
            self._signature,
            calls=calls,
            min_seconds=min_seconds,
            seed=self._parameters.seed,
            batch_sizes=(self._parameters.batch_size,),
            batch_calls=self._parameters.limits.batch_calls,
        )

    @property
    def _call(self) -> Arrays:
        rows = range(self._parameters.latency_batch_size)
        return self._split.evaluation.rows(rows)

    def confirmed(self, fastest_first: Sequence[JudgedVariant]) -> JudgedVariant:
        """The first that is faster than fp32 when timed anew, with the options found for it.

        The fastest of many owes something to chance; a second look, which chose nothing, does not.
        """
        for variant in fastest_first:
            if variant.name == FP32:
                break
            tuned = self.time(self._tuned(variant))
            if tuned.passed and _gain(tuned) > 0:
                return tuned
            log.info("not confirmed", variant=variant.name)
        (fp32,) = (variant for variant in fastest_first if variant.name == FP32)
        return self._tuned(fp32)

    def _tuned(self, variant: JudgedVariant) -> JudgedVariant:
        """With the session options that are fastest and still hold every gate."""
        assert variant.path is not None
        contestant = Contestant(variant.name, variant.path, variant.settings)
        sizes = {
            LATENCY: self._parameters.latency_batch_size,
            THROUGHPUT: self._parameters.batch_size,
        }
        tuned = {
            purpose: tune_session(
                contestant,
                self._call,
                self._signature,
                batch_size=size,
                calls=self._parameters.limits.tuning_calls,
                seed=self._parameters.seed,
            )
            for purpose, size in sizes.items()
        }
        sessions, tuning = dict(variant.sessions), {}
        with WorkerProcess() as worker:
            for purpose, (settings, trials) in tuned.items():
                # Another level of optimization runs other kernels, which have to be judged, too.
                judged = replace(variant, settings=settings)
                if settings != variant.settings:
                    judged = self._held(judged, variant.path, worker)
                if judged.passed:
                    sessions[purpose], tuning[purpose] = settings, trials
        return replace(variant, sessions=sessions, tuning=tuning)

    def against_pytorch(self, variant: JudgedVariant) -> PairLatency:
        """PyTorch and the variant with its options, in turns."""
        limits = self._parameters.limits
        with self._pytorch(variant) as pytorch:
            return self._measure(pytorch, variant, limits.calls, limits.min_seconds)


def _answers(path: Path, signature: Signature, settings: SessionSettings, inputs: Arrays) -> Arrays:
    return answers_of(open_runner(path, signature, settings).run, inputs)


def _with_file(variant: JudgedVariant, path: Path) -> JudgedVariant:
    digest = hash_file(path)
    beside = list(path.parent.glob(f"{path.name}.*"))
    if beside and variant.has_own_file:
        raise EvidenceError(
            f"{variant.name} has external data ({', '.join(p.name for p in beside)}); expected one "
            "file below 2 GB, which is all that is published of a variant"
        )
    size = sum(part.stat().st_size for part in (path, *beside))
    return replace(variant, path=path, sha256=digest, size_bytes=size)
