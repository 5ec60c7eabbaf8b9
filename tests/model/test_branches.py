"""Branches on an input's values are found, and nothing that only looks like one."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from heimdall_onnx.common.errors import ExportError
from heimdall_onnx.model.branches import find_branch
from heimdall_onnx.model.onnx.export import export_model
from heimdall_onnx.model.signature import Signature, TensorSpec

BRANCHES = "branches on the values of its inputs"


def on_data(x):
    if x.mean() > 100:
        return x * 3
    return x


def in_an_expression(x):
    return x * 3 if (x[0] > 1).any() else x


def in_a_loop(x):
    while x.max() > 100:
        x = x / 2
    return x


def on_a_length(x):
    return x * 3 if x.shape[0] > 2 else x


def on_a_weight(x):
    return x * 3 if torch.ones(1) > 0 else x


def checks(x):
    assert torch.isfinite(x).all()
    if torch.isnan(x).any():
        raise ValueError("not a number")
    return x


def caught(x):
    try:
        if x.max() > 100:
            raise ValueError("loud")
    except ValueError:
        return x / 2
    return x


def as_a_number(x):
    scale = x.max().item()
    return x * scale


def as_numbers(x):
    count = len(set(x.flatten().tolist()))
    return x * count


def by_numpy(x):
    loudest = np.asarray(x).max()
    return x * float(loudest)


def alike(x):
    return x * 3 if torch.equal(x, -x) else x


def _fixed(x, loud):
    return x / 10 if loud else x * 2


def in_a_statement(x):
    found = []
    found.append(_fixed(x, bool((x > 100).any())))
    return found[0]


def written(x):
    kept = torch.zeros(x.shape)
    kept[:] = x
    return x * 3 if kept.max() > 100 else x


def written_out(x):
    kept = torch.empty(x.shape)
    torch.mul(x, 2, out=kept)
    return x * 3 if kept.max() > 100 else x


def particular(x):
    assert type(x) is torch.Tensor
    return x * 3 if x.max() > 100 else x


def scripted(x):
    x = torch.jit.script(nn.ReLU())(x)
    return x * 3 if x.max() > 100 else x


def counts(x):
    loud = x[x > 100]
    return x * 3 if loud.numel() > 0 else x


def counts_before(x):
    rows = (2 * x[x > 100]).shape[0]
    return x * 3 if rows else x


def counts_rows(x):
    number = len((x > 100).nonzero())
    return x * number


def goes_through(x):
    for value in x[x > 0.5]:
        x = x + value
    return x


def chooses(x):
    loud = x[x.sum(-1) > 0]
    if loud.shape[-1] == 4:
        loud = loud * 2
    return x + torch.zeros(loud.shape[0]).sum() + torch.zeros_like(x).max().item()


def says(x):
    warnings.warn(f"the mean is {x.mean().item()}", stacklevel=1)
    return x.to(torch.float32)


def chosen(x):
    return torch.where(x.mean() > 0, x, -x)


def writes(x):
    return x.mul_(2)


class Module(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)

    def forward(self, x, *, hidden):
        return self.encoder(self.function(x), src_key_padding_mask=hidden)


@pytest.mark.filterwarnings("ignore:the mean", "ignore:.*jit.script:DeprecationWarning")
@pytest.mark.parametrize(
    ("function", "text"),
    [
        (on_data, "`if x.mean() > 100:`"),
        (in_an_expression, "`return x * 3 if (x[0] > 1).any() else x`"),
        (in_a_loop, "`while x.max() > 100:`"),
        (caught, "`if x.max() > 100:`"),
        (as_a_number, "`scale = x.max().item()`"),
        (as_numbers, "`count = len(set(x.flatten().tolist()))`"),
        (by_numpy, "`loudest = np.asarray(x).max()`"),
        (alike, "`return x * 3 if torch.equal(x, -x) else x`"),
        (in_a_statement, "`found.append(_fixed(x, bool((x > 100).any())))`"),
        (written, "`return x * 3 if kept.max() > 100 else x`"),
        (written_out, "`return x * 3 if kept.max() > 100 else x`"),
        (particular, "`return x * 3 if x.max() > 100 else x`"),
        (scripted, "`return x * 3 if x.max() > 100 else x`"),
        (counts, "`return x * 3 if loud.numel() > 0 else x`"),
        (counts_before, "`return x * 3 if rows else x`"),
        (counts_rows, "`number = len((x > 100).nonzero())`"),
        (goes_through, "`for value in x[x > 0.5]:`"),
        *((harmless, "") for harmless in (on_a_length, on_a_weight, checks, chosen, writes, says)),
        (chooses, ""),
    ],
)
def test_branch_on_an_inputs_values_is_found_and_nothing_else(function, text):
    inputs = {"x": torch.ones(2, 3, 4), "hidden": torch.tensor([[False, False, True]] * 2)}
    module = Module(function).eval()
    found = find_branch(lambda watched: module(**watched), inputs)
    done, _, where = found.partition(": ")
    assert where.partition(": ")[2] == text
    assert f"in {function.__name__}" in where or not text
    read = any(sign in text for sign in (" = ", "append", "for "))
    expected = "reads its inputs as numbers" if read else BRANCHES
    assert done == (expected if text else "")
    assert (inputs["x"] == 1).all()
    assert type(inputs["x"]) is torch.Tensor


def test_model_that_can_not_be_watched_has_no_answer():
    def fails(x):
        raise ValueError("watched")

    assert find_branch(fails, {"x": torch.ones(2)}) is None


def test_what_the_tracer_warned_of_counts_where_a_model_can_not_be_watched(tmp_path):
    signature = Signature(
        (TensorSpec("x", "float32", ("batch", 4)),), (TensorSpec("y", "float32", ("batch", 4)),)
    )

    class Unwatched(nn.Module):
        def forward(self, x):
            if torch._C._len_torch_function_stack():  # noqa: SLF001
                raise RuntimeError("watched")
            y = x * 2 if x.shape[1] > 3 else x
            return y * 3 if y.max() > 1e5 else y

    with pytest.raises(
        ExportError, match=r"does not run while .*`return y \* 3 if y.max\(\) > 1e5"
    ):
        export_model(Unwatched(), tmp_path / "m.onnx", signature=signature, opset=17)
