"""Models reach other processes whatever their modules are made of."""

import io
import threading

import numpy as np
import pytest
import torch
from models import SmallNet
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from heimdall_onnx.common.errors import EvidenceError
from heimdall_onnx.model.checkpoint import load_checkpoint
from heimdall_onnx.model.copies import copy_model, pickle_model
from heimdall_onnx.model.inference import run_pytorch

SIGNAL = {"signal": np.random.default_rng(0).standard_normal((3, 2, 8, 8)).astype(np.float32)}


class Guarded(SmallNet):
    """Has a part that can be neither copied nor pickled."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = factor
        self.lock = threading.Lock()

    def forward(self, signal):
        with self.lock:
            return super().forward(signal * self.factor)


def parametrized():
    model = SmallNet()
    convolution = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    weight_norm(convolution)
    with torch.no_grad():
        convolution.parametrizations.weight.original0.mul_(2)
    return model


def local():
    class Doubled(SmallNet):
        def forward(self, signal):
            return self.louder(signal)

    model = Doubled()
    model.louder = lambda signal: SmallNet.forward(model, 2 * signal)
    return model


def unpickled(model):
    # Written a line above.
    return torch.load(io.BytesIO(pickle_model(model)), weights_only=False)


def same(one, other):
    answers = [run_pytorch(model, SIGNAL, SmallNet.signature) for model in (one, other)]
    return all((answers[0][name] == answers[1][name]).all() for name in answers[0])


@pytest.mark.parametrize("make", [parametrized, local])
def test_what_pickle_can_not_take_answers_alike_in_another_process(make):
    model = make().eval()
    again = unpickled(model)
    assert again is not model
    assert same(model, again)
    assert not same(model, SmallNet().eval())


def test_what_no_pickle_can_take_is_loaded_from_its_checkpoint_again(tmp_path):
    made = Guarded()
    torch.save({"state_dict": made.state_dict()}, tmp_path / "a.pt")
    options = {"model": f"{Guarded.__module__}:Guarded", "model_kwargs": {"factor": 3.0}}
    model = load_checkpoint(tmp_path / "a.pt", **options).model
    for again in (unpickled(model), copy_model(model)):
        assert again is not model
        assert again.factor == 3.0
        assert not again.training
        assert same(model, again)


def test_what_nobody_can_make_again_is_refused_in_words():
    with pytest.raises(EvidenceError, match=r"Guarded can't be handed .*lock.*from a checkpoint"):
        copy_model(Guarded())
