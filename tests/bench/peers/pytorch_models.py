"""PyTorch itself: eager, and torch.compile as PyTorch advises for inference on a CPU.

Freezing (TORCHINDUCTOR_FREEZING) makes the weights constants, so that they are laid out for the
processor once. What is compiled here stays in no cache: each process that uses the model pays that
time again, unless it keeps Inductor's.
"""

from __future__ import annotations

import torch
from entry import Entry
from task import read
from torch._inductor import config

from heimdall_onnx.model.checkpoint import load_checkpoint
from heimdall_onnx.model.copies import pickle_model


def main() -> None:
    entry = Entry(__doc__, ["eager", "compile", "frozen"])
    torch.set_num_threads(entry.threads)
    model = load_checkpoint(entry.model, model="heimdall_onnx:LocalizationNet").model.eval()
    path = entry.out / "model.pkl"
    path.write_bytes(pickle_model(model))
    example = torch.from_numpy(read(entry.calibration)[0][:1])
    if entry.form == "eager":
        with entry.phase("first call"), torch.inference_mode():
            model(example)
        entry.made(path, "inference_mode; from the checkpoint", runtime="pytorch")
        return
    frozen = entry.form == "frozen"
    with entry.phase("compile"), torch.inference_mode(), config.patch(freezing=frozen):
        torch.compile(model)(example)
    entry.made(
        path,
        f"Inductor, {'with' if frozen else 'without'} freezing, compiled for batch 1 from the "
        "checkpoint in every process anew",
        environment={"TORCHINDUCTOR_FREEZING": str(int(frozen))},
        runtime="torch.compile",
    )


if __name__ == "__main__":
    main()
