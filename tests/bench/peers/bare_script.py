"""What one would write by hand from the documentation: torch.onnx.export, then quantize_static.

The parameters are those that ``quantize_static`` itself recommends for the processor ("Choosing
parameters for CPU inference" in its documentation), after ONNX Runtime's pre-processing. Nothing
is compared, and nothing is searched.
"""

from __future__ import annotations

from typing import Any

import onnx
import torch
from entry import Entry, seven_bits, unsigned_activations
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from task import INPUT, OUTPUTS, read

from heimdall_onnx.localization.network import LocalizationNet


class Captures(CalibrationDataReader):
    def __init__(self, inputs: Any) -> None:
        self._rows = iter(inputs)

    def get_next(self) -> dict[str, Any] | None:
        row = next(self._rows, None)
        return None if row is None else {INPUT: row[None]}


def main() -> None:
    entry = Entry(__doc__, ["fp32", "int8"])
    torch.set_num_threads(entry.threads)
    content = torch.load(entry.model, weights_only=True)
    weights = {name.removeprefix("model."): w for name, w in content["state_dict"].items()}
    model = LocalizationNet(backbone_size=content["hyper_parameters"]["backbone_size"]).eval()
    model.load_state_dict(weights)
    plain = entry.out / "model.onnx"
    with entry.phase("export"):
        torch.onnx.export(
            model,
            (torch.randn(2, 3, 128, 32),),
            str(plain),
            dynamo=True,
            external_data=False,
            verbose=False,
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            dynamic_shapes=({0: "batch"},),
        )
        onnx.checker.check_model(plain)
    if entry.form == "fp32":
        entry.made(plain, "torch.onnx.export with its defaults, from the checkpoint")
        return
    prepared, quantized = entry.out / "prepared.onnx", entry.out / "int8.onnx"
    activations = QuantType.QUInt8 if unsigned_activations() else QuantType.QInt8
    with entry.phase("quantize"):
        quant_pre_process(plain, prepared, auto_merge=True)
        quantize_static(
            prepared,
            quantized,
            Captures(read(entry.calibration)[0]),
            quant_format=QuantFormat.QDQ,
            activation_type=activations,
            weight_type=QuantType.QInt8,
            reduce_range=seven_bits(),
            per_channel=True,
        )
    plain.unlink()
    prepared.unlink()
    entry.made(
        quantized,
        f"torch.onnx.export, quant_pre_process, quantize_static: QDQ, MinMax, {activations.name} "
        f"by QInt8 per channel, reduce_range={seven_bits()}; from the checkpoint",
    )


if __name__ == "__main__":
    main()
