"""Branches on an input's values are found, and nothing that only looks like one."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from heimdall_onnx.model.branches import find_branch

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


@pytest.mark.filterwarnings("ignore:the mean")
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
        *((harmless, "") for harmless in (on_a_length, on_a_weight, checks, chosen, writes, says)),
    ],
)
def test_branch_on_an_inputs_values_is_found_and_nothing_else(function, text):
    inputs = {"x": torch.ones(2, 3, 4), "hidden": torch.tensor([[False, False, True]] * 2)}
    module = Module(function).eval()
    found = find_branch(lambda watched: module(**watched), inputs)
    done, _, where = found.partition(": ")
    assert where.partition(": ")[2] == text
    assert f"in {function.__name__}" in where or not text
    expected = "reads its inputs as numbers" if " = " in text else BRANCHES
    assert done == (expected if text else "")
    assert (inputs["x"] == 1).all()
    assert type(inputs["x"]) is torch.Tensor


def test_model_that_does_not_run_on_watched_inputs_is_left_alone():
    def particular(x):
        assert type(x) is torch.Tensor, "another kind"
        return x

    assert find_branch(lambda watched: particular(**watched), {"x": torch.ones(2)}) == ""
