"""OpenVINO as its documentation has it: convert_model, then NNCF's post-training quantization.

That is basic quantization, or quantization with accuracy control where basic loses too much.
"""

from __future__ import annotations

import os

# NNCF and OpenVINO count their users unless told that they are being tested.
os.environ |= {"NNCF_CI": "1", "CI": "true"}

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino as ov
from entry import Entry, seven_bits
from task import LIMIT, OUTPUTS, answers, errors_m, growth, read


def main() -> None:
    entry = Entry(__doc__, ["fp32", "int8", "controlled"])
    nncf.set_log_level(logging.ERROR)
    with entry.phase("convert"):
        model = ov.convert_model(entry.model)
    path = entry.out / f"{entry.form}.xml"
    samples = list(read(entry.calibration)[0][:, None])
    if entry.form == "fp32":
        method = "convert_model and save_model, which by default stores weights in 16 bits"
    else:
        # Basic quantization of OpenVINO models moves some constants of the model it is given.
        quantize = _basic if entry.form == "int8" else _controlled
        with entry.phase("quantize"):
            model, method = quantize(entry, model, samples)
    ov.save_model(model, path)
    entry.made(path, f"{method}; from the ONNX file", runtime="openvino", provider="CPU")


def _options(samples: list[Any]) -> tuple[dict[str, Any], nncf.AdvancedQuantizationParameters, str]:
    fix = nncf.OverflowFix.ENABLE if seven_bits() else nncf.OverflowFix.DISABLE
    options = {"preset": nncf.QuantizationPreset.MIXED, "subset_size": len(samples)}
    said = f"preset mixed, {len(samples)} samples, overflow_fix={fix.value}"
    return options, nncf.AdvancedQuantizationParameters(overflow_fix=fix), said


def _basic(entry: Entry, model: ov.Model, samples: list[Any]) -> tuple[ov.Model, str]:
    options, advanced, said = _options(samples)
    quantized = nncf.quantize(model, nncf.Dataset(samples), advanced_parameters=advanced, **options)
    return quantized, f"convert_model, nncf.quantize: {said}"


def _controlled(entry: Entry, model: ov.Model, samples: list[Any]) -> tuple[ov.Model, str]:
    assert entry.evaluation is not None
    inputs, truth = read(entry.evaluation)

    def run(compiled: Any, rows: Any) -> dict[str, Any]:
        def call(batch: Any) -> dict[str, Any]:
            found = compiled(batch)
            return {name: found[name] for name in OUTPUTS}

        return answers(call, inputs[rows])

    reference = run(_compiled(model, entry.threads), np.arange(len(inputs)))

    def validate(compiled: Any, items: Iterable[int]) -> tuple[float, list[float]]:
        # NNCF wants more to be better, so 1 is as good as fp32; it asks for parts of the rows too.
        rows = np.array(list(items))
        found = run(compiled, rows)
        before = {name: values[rows] for name, values in reference.items()}
        goal = before["positions"] if truth is None else truth[rows]
        score = 1 / growth(before, found, None if truth is None else truth[rows])
        return score, [-error for error in errors_m(found["positions"], goal)]

    options, advanced, said = _options(samples)
    quantized = nncf.quantize_with_accuracy_control(
        model,
        nncf.Dataset(samples),
        nncf.Dataset(list(range(len(inputs))), lambda row: inputs[row : row + 1]),
        validation_fn=validate,
        max_drop=1 - 1 / LIMIT,
        drop_type=nncf.DropType.ABSOLUTE,
        advanced_quantization_parameters=advanced,
        **options,
    )
    return quantized, (
        f"convert_model, nncf.quantize_with_accuracy_control: {said}, drop of the task at most 1%"
    )


def _compiled(model: ov.Model | Path, threads: int) -> Any:
    return ov.Core().compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": threads})


if __name__ == "__main__":
    main()
