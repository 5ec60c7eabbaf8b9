"""What is trained: inputs and outputs by name, the learning rate of each step, a fresh frame."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn

from heimdall_onnx import Signature, TensorSpec
from heimdall_onnx.common.errors import EvidenceError
from heimdall_onnx.common.text import DEGREES
from heimdall_onnx.localization.frame import LocalFrame
from heimdall_onnx.model.inference import run_pytorch
from heimdall_onnx.training.module import Objective, TrainingModule, TrainingProgress
from heimdall_onnx.training.parameters import TrainingParameters

SIGNATURE = Signature(
    inputs=(
        TensorSpec("a", "float32", ("batch", 2)),
        TensorSpec("b", "float32", ("batch", 2)),
    ),
    outputs=(
        TensorSpec("position", "float32", ("batch", 2), unit=DEGREES),
        TensorSpec("sigma", "float32", ("batch", 2), unit=DEGREES, sigma_of="position"),
    ),
)
INPUTS = {"a": torch.full((3, 2), 7.0), "b": torch.full((3, 2), 0.5)}
CENTROID, SCALE_M = (50.0, 9.0), 1e5


class Answer(NamedTuple):
    sigma: Tensor
    position: Tensor


class Swapped(nn.Module):
    """Takes and gives everything in another order than the signature; a is the position."""

    signature = SIGNATURE

    def forward(self, b, a):
        return Answer(b, a)


class KeywordOnly(Swapped):
    def forward(self, *, b, a):
        return {"sigma": b, "position": a}


class Positional(Swapped):
    """Calls its inputs otherwise, so that the signature's order counts."""

    def forward(self, first, second):
        return first, second


class SwappedFrame(Swapped):
    def __init__(self):
        super().__init__()
        self.frame = LocalFrame(CENTROID, SCALE_M)

    def local(self, b, a):
        return a, b

    def augment(self, b, a):
        return -b, a

    def forward(self, b, a):
        position, sigma = self.frame(*self.local(b, a))
        return Answer(sigma, position)


class OtherLocal(SwappedFrame):
    """Each method has an order of its own."""

    def local(self, a, *, b):
        return a, b

    def forward(self, b, a):
        position, sigma = self.frame(*self.local(a, b=b))
        return Answer(sigma, position)


class PassedOn(SwappedFrame):
    """Does not name its inputs, and so gets what ``forward`` gets."""

    def local(self, *inputs):
        b, a = inputs
        return a, b

    def forward(self, b, a):
        position, sigma = self.frame(*self.local(b, a))
        return Answer(sigma, position)


def module_of(model, **changes):
    chosen = TrainingParameters(learning_rate=0.1, warmup=0.0, **changes)
    objective = Objective(model, SIGNATURE, beta=0.0)
    return TrainingModule(
        model, objective, chosen, {}, TrainingProgress(), np.zeros((3, 2)), began=0.0
    )


@pytest.mark.parametrize("kind", [Swapped, KeywordOnly, Positional])
def test_a_model_is_trained_on_the_inputs_and_outputs_that_are_released(kind):
    model = kind()
    position, sigma = Objective(model, SIGNATURE, beta=0.5).answers(INPUTS)
    assert torch.equal(position, INPUTS["a"])
    assert torch.equal(sigma, INPUTS["b"])
    released = run_pytorch(model, {n: v.numpy() for n, v in INPUTS.items()}, SIGNATURE)
    np.testing.assert_array_equal(released["position"], position.numpy())


@pytest.mark.parametrize("kind", [SwappedFrame, OtherLocal, PassedOn])
def test_in_a_frame_too(kind):
    objective = Objective(kind(), SIGNATURE, beta=0.5)
    offsets, deviations = objective.answers(INPUTS)
    assert torch.equal(offsets, INPUTS["a"])
    assert torch.equal(deviations, INPUTS["b"])


def test_what_is_augmented_keeps_its_name(monkeypatch):
    seen = []
    module = module_of(SwappedFrame())
    monkeypatch.setattr(
        module.objective, "answers", lambda i: seen.append(i) or (i["a"], i["b"].abs())
    )
    module.training_step((INPUTS, torch.zeros(3, 2), torch.arange(3)), 0)
    assert torch.equal(seen[0]["b"], -INPUTS["b"])
    assert torch.equal(seen[0]["a"], INPUTS["a"])


def test_outputs_that_the_signature_does_not_name_are_refused():
    class Wrong(Swapped):
        def forward(self, b, a):
            return {"position": a, "spread": b}

    with pytest.raises(EvidenceError, match="spread"):
        Objective(Wrong(), SIGNATURE, beta=0.5).answers(INPUTS)


def test_a_calibration_is_not_carried_into_a_new_training():
    model = SwappedFrame()
    model.frame.deviation_scale.fill_(3.0)
    module_of(model)
    assert model.frame.deviation_scale.tolist() == [1.0, 1.0]


def gather(rank, folder):
    """One device of two, the second with the shorter share."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    errors = np.array([1.0, 2.0, np.inf]) if rank == 0 else np.array([5.0, 90.0])
    module = module_of(Swapped())
    module.errors.update(errors[:1])
    module.errors.update(errors[1:])
    np.save(f"{folder}/{rank}.npy", module.errors.compute().numpy())
    torch.distributed.destroy_process_group()


@pytest.mark.slow  # starts two processes
@pytest.mark.thorough
def test_the_median_is_that_of_all_devices(tmp_path):
    torch.multiprocessing.spawn(gather, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        assert np.load(tmp_path / f"{rank}.npy").tolist() == [1.0, 2.0, np.inf, 5.0, 90.0]
