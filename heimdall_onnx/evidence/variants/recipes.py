"""The forms that an exported model can take, and how each is made.

Each recipe is a tool of ONNX Runtime's, OpenVINO's or NNCF's, as its maker recommends it for the
processor at hand. What decides between them is measured, see `evidence.variants.search`.
"""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from heimdall_onnx.common.arrays import Arrays, in_batches
from heimdall_onnx.common.errors import EvidenceError, UnavailableError
from heimdall_onnx.common.machine import multiplies_in_8_bits
from heimdall_onnx.common.parameters import FP32
from heimdall_onnx.common.text import shown
from heimdall_onnx.evidence.variants.sensitivity import QUANTIZABLE
from heimdall_onnx.model.runtimes import CUDA, EXTRAS, TENSORRT, SessionSettings

_CALIBRATION_BATCH = 4
_BLOCK = 32


@dataclass(frozen=True)
class VariantJob:
    """What a recipe needs.

    Attributes:
        source: The fp32 ONNX file.
        target: Where the variant goes.
        calibration: Calibration inputs, one array per input.
        keep_in_float: Names of nodes that are not quantized.
        cache: Folder for the calibrated ranges, so that they are computed once.
    """

    source: Path
    target: Path
    calibration: Arrays = field(repr=False)
    keep_in_float: tuple[str, ...]
    cache: Path


@dataclass(frozen=True)
class Recipe:
    """A variant before it is made.

    Attributes:
        name: What it is called everywhere.
        what: What it is, in a few words.
        precision: Of its multiplications, ``"fp32"``, ``"int8"``, ``"int4"``, ….
        settings: With what it runs.
        make: Writes the file; None for one that runs the fp32 file as it is.
        lossy: Whether it rounds more than fp32 does, so that random inputs can't judge it.
        selective: Whether single nodes can be kept in float.
        package: The package that makes it, where that is an extra.
    """

    name: str
    what: str
    precision: str
    settings: SessionSettings = field(default_factory=SessionSettings)
    make: Callable[[VariantJob], None] | None = None
    lossy: bool = True
    selective: bool = False
    package: str = ""


def make_variant(name: str, job: VariantJob) -> None:
    """Write the file of a variant.

    Raises:
        UnavailableError: If what makes it is not installed.
        EvidenceError: If the tool can't make it of this model.
    """
    recipe = RECIPES[name]
    assert recipe.make is not None
    try:
        with _quiet():
            recipe.make(job)
    except ImportError as error:
        raise UnavailableError(
            f"{name} is made by {recipe.package or 'a package'} that is not installed; it comes "
            f"with {EXTRAS.get(recipe.package, 'the package itself')} ({error})"
        ) from error
    except Exception as error:  # these tools' errors share no narrower base
        raise EvidenceError(
            f"{name} can't be made of this model: {type(error).__name__}: {shown(str(error), 500)}"
        ) from error


def chosen_recipes(variants: str) -> tuple[Recipe, ...]:
    """The recipes that the parameter ``variants`` names, fp32 first; empty for ``"none"``."""
    if variants == "none":
        return ()
    names = {FP32, *(name.strip() for name in variants.split(","))}
    return tuple(r for r in RECIPES.values() if variants == "all" or r.name in names)


def weights_of_seven_bits() -> bool:
    """Whether 8-bit weights have to leave a bit unused on this processor.

    Without instructions for 8-bit products these are summed in pairs of 16 bits and may overflow
    there, which 7-bit weights keep them from (ONNX Runtime, "Quantize ONNX models").
    """
    return not multiplies_in_8_bits()


@contextmanager
def _quiet() -> Iterator[None]:
    # These tools give advice on the root logger and print progress for a terminal.
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _optimize(job: VariantJob) -> None:
    from heimdall_onnx.model.inference import open_session

    # "all" would write layouts that suit this very processor.
    open_session(job.source, level="extended", optimized=job.target)


def _quantize_dynamic(job: VariantJob) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        job.source,
        job.target,
        # Convolutions with ranges found at run time have no fast kernel in ONNX Runtime.
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        reduce_range=weights_of_seven_bits(),
        weight_type=QuantType.QInt8,
        # A Gemm is rewritten as a MatMul of this name before names are looked at.
        nodes_to_exclude=[name + end for name in job.keep_in_float for end in ("", "_MatMul")],
    )


def _quantize_static(job: VariantJob, method: str) -> None:
    from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static

    chosen = CalibrationMethod[method]
    ranges = job.cache / f"{method.lower()}.json"
    if not ranges.is_file():
        _calibrate(job, chosen, ranges)
    quantize_static(
        job.source,
        job.target,
        calibrate_method=chosen,
        calibration_cache_path=ranges,
        op_types_to_quantize=list(QUANTIZABLE),
        per_channel=True,
        reduce_range=weights_of_seven_bits(),
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=list(job.keep_in_float),
    )


def _calibrate(job: VariantJob, method: Any, ranges: Path) -> None:
    """Find ranges a few inputs at a time, so that memory does not grow with their number."""
    from onnxruntime.quantization import create_calibrator, save_tensors_data

    calibrator = create_calibrator(
        job.source,
        list(QUANTIZABLE),
        augmented_model_path=str(job.cache / "augmented.onnx"),
        calibrate_method=method,
    )
    for _, batch in in_batches(job.calibration, _CALIBRATION_BATCH):
        answers = iter((batch, None))  # it asks until it gets None
        calibrator.collect_data(SimpleNamespace(get_next=partial(next, answers)))
    save_tensors_data(calibrator.compute_data(), ranges)
    (job.cache / "augmented.onnx").unlink()


def _quantize_with_nncf(job: VariantJob) -> None:
    # NNCF counts its users unless told that it is being tested.
    os.environ.setdefault("NNCF_CI", "1")
    import nncf
    import onnx

    nncf.set_log_level(logging.ERROR)
    model = onnx.load(job.source)
    samples = [sample for _, sample in in_batches(job.calibration, 1)]
    ignored = nncf.IgnoredScope(names=list(job.keep_in_float), validate=False)
    quantized = nncf.quantize(
        model,
        nncf.Dataset(samples),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(samples),
        ignored_scope=ignored if job.keep_in_float else None,
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            overflow_fix=nncf.OverflowFix.ENABLE
            if weights_of_seven_bits()
            else nncf.OverflowFix.DISABLE
        ),
    )
    onnx.save(quantized, job.target)


def _quantize_weights(job: VariantJob, bits: int) -> None:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(
        onnx.load(job.source),
        bits=bits,
        block_size=_BLOCK,
        is_symmetric=True,
        # Activations are rounded to 8 bits on the way, which is where its speed comes from.
        accuracy_level=4,
        nodes_to_exclude=list(job.keep_in_float),
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(job.target), False)


def _halve(job: VariantJob) -> None:
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    model = OnnxModel(convert_float_to_float16(onnx.load(job.source), keep_io_types=True))
    model.topological_sort()  # the converter puts its casts at the end
    onnx.save(model.model, job.target)


_OPENVINO = SessionSettings(runtime="openvino", provider="CPU")

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(FP32, "the model as it was exported", "fp32", lossy=False),
        Recipe(
            "fp32-optimized",
            "fused by ONNX Runtime beforehand",
            "fp32",
            make=_optimize,
            lossy=False,
        ),
        Recipe("fp32-openvino", "on OpenVINO", "fp32", _OPENVINO, lossy=False),
        Recipe(
            "bf16-openvino",
            "multiplied in bfloat16 by OpenVINO",
            "bf16",
            _OPENVINO.model_copy(update={"precision": "bf16"}),
        ),
        Recipe(
            "int8-dynamic",
            "linear layers in 8 bits, ranges found at run time",
            "int8",
            make=_quantize_dynamic,
            selective=True,
        ),
        *(
            Recipe(
                f"int8-{method.lower()}",
                f"8 bits (QDQ), ranges calibrated by {words}",
                "int8",
                make=partial(_quantize_static, method=method),
                selective=True,
            )
            for method, words in (
                ("MinMax", "their extremes"),
                ("Entropy", "entropy"),
                ("Percentile", "percentiles"),
            )
        ),
        Recipe(
            "int8-nncf",
            "8 bits (QDQ) by NNCF with bias correction, on OpenVINO",
            "int8",
            _OPENVINO,
            make=_quantize_with_nncf,
            selective=True,
            package="nncf",
        ),
        *(
            Recipe(
                f"int{bits}-weights",
                f"weights of linear layers in {bits} bits",
                f"int{bits}",
                make=partial(_quantize_weights, bits=bits),
                selective=True,
            )
            for bits in (8, 4)
        ),
        Recipe(
            "fp16-cuda",
            "half precision on CUDA",
            "fp16",
            SessionSettings(provider=CUDA),
            make=_halve,
        ),
        Recipe(
            "fp16-tensorrt",
            "half precision on TensorRT, with its engine kept for the next start",
            "fp16",
            SessionSettings(
                provider=TENSORRT,
                provider_options={
                    "trt_fp16_enable": "1",
                    "trt_engine_cache_enable": "1",
                    "trt_timing_cache_enable": "1",
                },
            ),
        ),
    )
}
