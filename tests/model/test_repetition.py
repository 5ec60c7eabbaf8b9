"""What answers otherwise each time is told by what it does so with; a mere cache is let be."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from heimdall_onnx.common.errors import ExportError
from heimdall_onnx.model.onnx.export import export_model
from heimdall_onnx.model.repetition import repeatable_answer
from heimdall_onnx.model.signature import Signature, TensorSpec


class Net(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.register_buffer("level", torch.zeros(4))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("start", torch.zeros(0))
        self.steps, self.seen, self.first = 0, [], None
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.function(self, x)


def averages(net, x):
    net.level.mul_(0.9).add_(0.1 * x.mean(0))
    return x - net.level


def replaces(net, x):
    net.level = 0.5 * net.level + x.mean(0)
    return x - net.level


def counts(net, x):
    net.steps += 1
    return x * net.steps


def collects(net, x):
    net.seen.append(x.mean())
    return x * torch.stack(net.seen).mean()


def begins_with_data(net, x):
    if net.count == 0:
        net.scale.data.copy_(1 / x.std(0))
        net.count.fill_(1)
    return x * net.scale


def begins_with_a_buffer(net, x):
    if net.start.numel() == 0:
        net.start = x.abs().amax().reshape(1)
    return x / net.start


def begins_with_an_attribute(net, x):
    if net.first is None:
        net.first = x.abs().amax()
    return x / net.first


def begins_with_a_new_attribute(net, x):
    if not hasattr(net, "offset"):
        net.offset = x.mean()
    return x - net.offset


def drops(net, x):
    net.drop.train()
    return net.drop(x)


def adds_noise(net, x):
    return x + 1e-3 * torch.randn_like(x)


def rectifies(net, x):
    return functional.rrelu(x, training=True)


def counts_calls(net, x):
    net.count += 1
    net.steps += 1
    return x * 2


def caches(net, x):
    if net.level.shape != (8,):
        net.level = torch.arange(8.0)
    net.seen = [x]
    return x * net.level[: x.shape[1]]


def normalizes(net, x):
    net.norm.train()
    return net.norm(x)


def check(function):
    net = Net(function).eval()
    inputs = [torch.randn(2, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with torch.no_grad():
        try:
            answer = repeatable_answer(
                net, lambda x, one: one(x), tuple(inputs), lambda y: {"y": y}
            )
        finally:
            after = net.state_dict()
            assert all(
                torch.equal(before[n], after[n]) for n in before if n not in {"level", "start"}
            )
    assert answer.result.shape == (2, 4)
    return answer.changed


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (averages, "Net changes level when it is called, in eval mode too: y differs by"),
        (replaces, "Net changes level when"),
        (counts, "Net changes steps when"),
        (collects, "Net changes seen when"),
        (begins_with_data, "Net changes count, scale when|Net changes scale, count when"),
        (begins_with_a_buffer, "Net changes start when"),
        (begins_with_an_attribute, "Net changes first when"),
        (begins_with_a_new_attribute, "Net changes offset when"),
        (
            drops,
            r"otherwise each time: y .*since aten.bernoulli_ in drop \(line \d+, in drops",
        ),
        (adds_noise, r"since aten.randn_like \(line \d+, in adds_noise: `return x \+ 1e-3"),
        (rectifies, r"since aten.rrelu_with_noise.* \(line \d+, in rectifies"),
    ],
)
def test_what_answers_otherwise_each_time_is_named(function, words):
    with pytest.raises(ExportError, match=words):
        check(function)


@pytest.mark.parametrize(
    ("function", "changed"),
    [
        (counts_calls, ["count"]),
        (caches, []),
        (normalizes, ["norm.num_batches_tracked", "norm.running_mean", "norm.running_var"]),
    ],
)
def test_what_a_call_leaves_behind_without_another_answer_is_undone(function, changed):
    assert sorted(check(function)) == changed


class Keeps(nn.Module):
    """Keeps numbers without an axis beside its weights, which have no length."""

    def __init__(self):
        super().__init__()
        self.scale, self.shift = torch.tensor(2.0), np.array(1.0)

    def forward(self, x):
        return x * self.scale + float(self.shift)


def test_a_number_kept_as_an_attribute_has_no_length_that_could_change(tmp_path):
    signature = Signature(
        inputs=(TensorSpec("x", "float32", ("batch", 3)),),
        outputs=(TensorSpec("y", "float32", ("batch", 3)),),
    )
    assert export_model(Keeps(), tmp_path / "m.onnx", signature=signature, opset=17).path.exists()
