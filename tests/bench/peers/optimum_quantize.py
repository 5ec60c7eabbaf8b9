"""Hugging Face optimum-onnx: ORTQuantizer on a plain ONNX file.

Its exporter does not apply, as it takes models of transformers, timm, diffusers and
sentence-transformers only; nor does its ORTOptimizer, which wants the type of a transformer.
"""

from __future__ import annotations

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "DISABLE_TELEMETRY": "1"}

from datasets import Dataset
from entry import Entry, seven_bits
from optimum.onnxruntime import ORTQuantizer
from optimum.onnxruntime.configuration import AutoCalibrationConfig, AutoQuantizationConfig
from task import INPUT, read


def main() -> None:
    entry = Entry(__doc__, ["avx2 dynamic", "avx2 static", "avx512 dynamic", "avx512 static"])
    level, kind = entry.form.split()
    configure = {"avx2": AutoQuantizationConfig.avx2, "avx512": AutoQuantizationConfig.avx512}
    quantization = configure[level](
        is_static=kind == "static", per_channel=True, reduce_range=seven_bits()
    )
    quantizer = ORTQuantizer.from_pretrained(entry.model.parent, file_name=entry.model.name)
    ranges = None
    if kind == "static":
        captures = Dataset.from_dict({INPUT: read(entry.calibration)[0]}).with_format("numpy")
        augmented = entry.out / "augmented.onnx"
        with entry.phase("calibrate"):
            ranges = quantizer.fit(
                dataset=captures,
                calibration_config=AutoCalibrationConfig.minmax(captures),
                operators_to_quantize=quantization.operators_to_quantize,
                onnx_augmented_model_name=augmented,
            )
        augmented.unlink()
    with entry.phase("quantize"):
        quantizer.quantize(
            save_dir=entry.out,
            calibration_tensors_range=ranges,
            quantization_config=quantization,
        )
    entry.made(
        next(entry.out.glob("*.onnx")),
        f"ORTQuantizer, AutoQuantizationConfig.{level}: {quantization.format.name}, "
        f"{quantization.activations_dtype.name} by {quantization.weights_dtype.name} per channel, "
        f"reduce_range={quantization.reduce_range}"
        f"{', MinMax' if kind == 'static' else ''}; from the ONNX file",
    )


if __name__ == "__main__":
    main()
