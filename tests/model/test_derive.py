"""Signatures that are found, of models that say nothing of themselves."""

from collections import OrderedDict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from heimdall_onnx.common.errors import DataError
from heimdall_onnx.model.derive import derive_signature
from heimdall_onnx.model.inference import run_pytorch
from heimdall_onnx.model.signature import Axis, Signature, TensorSpec

RNG = np.random.default_rng(0)


def normal(*shape, dtype="float32"):
    return RNG.normal(size=shape).astype(dtype)


class Found(NamedTuple):
    signature: Signature
    notes: tuple[str, ...]


def found(model, **arrays):
    torch.manual_seed(0)
    return Found(*derive_signature(model.eval(), arrays))


def lines(signature):
    """What a signature says, one line for each tensor."""
    return [spec.describe() for spec in (*signature.inputs, *signature.outputs)]


class Conv(nn.Module):
    def __init__(self, head=None):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), *(head or ()))

    def forward(self, image):
        return self.layers(image)


POOLED = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
FLAT = (nn.Flatten(), nn.Linear(4 * 32 * 32, 2))


class Classifier(nn.Module):
    """Tokens with a mask that may be left away, as those of Hugging Face."""

    def __init__(self, positions=32):
        super().__init__()
        self.words, self.places = nn.Embedding(50, 8), nn.Embedding(positions, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids=None, attention_mask=None, labels=None, *, scale=None):
        if input_ids is None:
            raise ValueError("You have to specify input_ids")
        hidden = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1]))
        if attention_mask is not None:
            hidden = hidden * attention_mask.unsqueeze(-1)
        if scale is not None:
            hidden = hidden * scale[:, None]
        logits = self.head(hidden.mean(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return OrderedDict(loss=loss, logits=logits, hidden_states=(hidden,))


IDS = RNG.integers(0, 50, (5, 12))


def test_inputs_are_the_arrays_that_forward_takes():
    made = found(Conv(), image=normal(6, 3, 16, 16), quality=normal(6))
    assert made.signature == Signature(
        inputs=(TensorSpec("image", "float32", ("batch", 3, "height", "width")),),
        outputs=(TensorSpec("output", "float32", ("batch", 4, "height", "width")),),
        axes=(Axis("height", (8, 17, 16)), Axis("width", (8, 17, 16))),
    )
    assert made.notes == (
        "inputs: image of the evaluation data; left aside: quality",
        "height, axis 2 of image: dynamic, the model runs at 8, 16, 17",
        "width, axis 3 of image: dynamic, the model runs at 8, 16, 17",
    )


def test_the_size_of_images_is_fixed_where_no_output_follows_it():
    made = found(Conv(POOLED), image=normal(6, 3, 16, 16))
    assert lines(made.signature)[0] == "image: float32 (batch, 3, 16, 16)"
    assert made.notes[1] == "axis 2 of image: fixed, no output has another shape at 8"


def test_the_array_of_a_single_input_may_have_another_name_and_precision():
    signature = found(Conv(FLAT), x=normal(2, 3, 32, 32, dtype="float64")).signature
    assert lines(signature) == ["x: float32 (batch, 3, 32, 32)", "output: float32 (batch, 2)"]
    assert signature.axes == ()


@pytest.mark.parametrize("name", ["", "arr_0"])
def test_an_array_without_a_name_is_the_first_input(name):
    signature, _ = derive_signature(Conv(FLAT).eval(), {name: normal(2, 3, 32, 32)})
    assert signature.inputs[0].name == "image"


def test_what_may_be_left_away_is_an_input_where_there_is_an_array_of_its_name():
    alone = found(Classifier(), input_ids=IDS, labels=np.zeros(5, np.int64)).signature
    assert lines(alone) == [
        "input_ids: int64 (batch, length)",
        "logits: float32 (batch, 3)",
        "hidden_states.0: float32 (batch, length, 8)",
    ]
    masked = found(
        Classifier(), scale=normal(5, 8), attention_mask=np.ones_like(IDS), input_ids=IDS
    )
    assert [spec.name for spec in masked.signature.inputs] == [
        *("input_ids", "attention_mask", "scale"),
    ]
    # Where both are needed of one length, neither is tried by itself.
    assert masked.signature.inputs[1] == TensorSpec(
        "attention_mask", "int64", ("batch", "length"), range=(0, 1)
    )
    assert masked.signature.axes == (Axis("length", (6, 13, 12)),)


def test_integers_have_the_range_of_the_table_that_they_are_looked_up_in():
    made = found(Classifier(), input_ids=IDS.astype("int32"))
    assert (made.signature.inputs[0].dtype, made.signature.inputs[0].range) == ("int32", (0, 49))
    assert "input_ids: the model takes 49 and fails at 50" in made.notes

    class Clamped(Classifier):
        def forward(self, input_ids):
            return self.words(input_ids.clamp(max=49))

    assert found(Clamped(), input_ids=IDS).signature.inputs[0].range is None


class Loop(nn.Module):
    """Runs at any number of steps, but its trace has as many as there were."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(4, 6)

    def forward(self, steps):
        state = steps.new_zeros(steps.shape[0], 6)
        for step in range(steps.shape[1]):
            state = self.cell(steps[:, step], state)
        return state


def test_an_axis_is_fixed_where_the_export_would_fix_it():
    made = found(Loop(), steps=normal(3, 5, 4))
    assert lines(made.signature) == ["steps: float32 (batch, 5, 4)", "output: float32 (batch, 6)"]
    assert made.notes[1] == "axis 1 of steps: fixed, since its length is a constant when exported"


class Keeping(nn.Module):
    """Makes its mask anew where it has one of another length."""

    mask = None

    def forward(self, x):
        if self.mask is None or len(self.mask) != x.shape[1]:
            self.mask = torch.ones(x.shape[1]).cumsum(0)
        return x * self.mask


def test_an_axis_is_fixed_where_an_export_after_a_call_would_fix_it():
    made = found(Keeping(), x=normal(3, 5))
    assert lines(made.signature) == ["x: float32 (batch, 5)", "output: float32 (batch, 5)"]
    assert "a constant when exported" in made.notes[-1]


class One(nn.Module):
    def forward(self, x):
        return x.reshape(1, 8) * 2


def test_a_batch_may_be_fixed():
    made = found(One(), x=normal(4, 8))
    assert lines(made.signature) == ["x: float32 (1, 8)", "output: float32 (1, 8)"]
    assert "the batch is fixed at 1: the model fails at 3" in made.notes


class Pair(NamedTuple):
    mean: torch.Tensor
    peak: torch.Tensor


@dataclass
class Answer:
    pair: Pair
    classes: torch.Tensor
    loud: torch.Tensor
    x: torch.Tensor
    note: str = "no tensor"


class Several(nn.Module):
    def forward(self, x):
        pair = Pair(x.mean(1), x[:, ::2])
        return Answer(pair, x.argmax(1).to(torch.int32), x > 0, x)


def test_outputs_lie_in_one_another_and_are_of_any_type():
    x = normal(3, 10)
    signature = found(Several(), x=x).signature
    np.testing.assert_array_equal(run_pytorch(Several(), {"x": x}, signature)["output.x"], x)
    assert lines(signature)[1:] == [
        "pair.mean: float32 (batch)",
        "pair.peak: float32 (batch, pair.peak_1)",
        "classes: int32 (batch)",
        "loud: bool (batch, length)",
        "output.x: float32 (batch, length)",
    ]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Classifier(), ["input_ids: int64 (batch, length)"]),
        (nn.Sequential(nn.Linear(7, 3)), ["input: float32 (batch, 7)"]),
        (nn.LSTM(6, 4, batch_first=True), ["input: float32 (batch, length, 6)"]),
        (
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
            ["src: float32 (batch, length, 8)"],
        ),
    ],
)
def test_without_data_inputs_are_guessed_from_the_layers_of_a_configured_model(model, expected):
    with pytest.raises(DataError, match="neither evaluation data, an example nor a configuration"):
        found(model)
    model.config = SimpleNamespace(vocab_size=32)
    made = found(model)
    assert [spec.describe() for spec in made.signature.inputs] == expected
    assert made.notes[0].startswith("there is no evaluation data, so ")


def test_a_size_that_the_model_names_is_tried_first():
    model = Conv(POOLED)
    model.config = type("Config", (), {"image_size": (48, 40)})()
    assert found(model).notes[0] == (
        "there is no evaluation data, so image was guessed: Conv2d layers.0 takes 3 channels, here "
        "3 × 48 × 40"
    )


class Spectrogram(nn.Module):
    """Frames of a spectrogram, which gets its channel inside."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(max_length=20, num_mel_bins=12)
        self.patches, self.head = nn.Conv2d(1, 4, 4, 4), nn.Linear(4, 3)
        self.places = nn.Parameter(torch.randn(1, 15, 4))

    def forward(self, input_values=None):
        patches = self.patches(input_values.unsqueeze(1).mT).flatten(2).mT
        return self.head((patches + self.places).mean(1))


def test_a_spectrogram_has_the_frames_and_bands_of_the_configuration():
    assert found(Spectrogram()).notes[0] == (
        "there is no evaluation data, so input_values was guessed: Conv2d patches takes one "
        "channel, here 20 × 12"
    )


def test_an_output_has_an_axis_of_its_own_where_any_other_length_changes_it():
    frames = nn.Sequential(nn.Conv1d(1, 2, 10, 5))
    signature = found(frames, input=normal(4, 1, 16)).signature
    assert signature.axes[0].lengths == (17, 32, 16)  # the frames of 17 are those of 16
    assert lines(signature) == [
        "input: float32 (batch, 1, length)",
        "output: float32 (batch, 2, output_2)",
    ]


def test_example_inputs_of_lightning_are_taken():
    model = Conv()
    model.example_input_array = torch.zeros(1, 3, 20, 24)
    made = found(model)
    assert made.notes[0] == "inputs: image of the model's example_input_array"
    assert [axis.lengths[-1] for axis in made.signature.axes] == [20, 24]


class Graph(nn.Module):
    def forward(self, nodes, edges, hops=2):
        return nodes[edges[0]]


def test_what_is_not_found_says_what_to_give():
    message = (
        r"Graph declares no signature, and none was found: it has neither evaluation data, an "
        r"example nor a configuration. Its forward takes nodes, edges, "
        r"hops \(optional\); evaluation data: none. Give "
        r"--eval-data with one array of those names per input, samples first, e.g. "
        r"np.savez\('eval.npz', nodes=...\), or a file <checkpoint>.signature.yaml with"
    )
    with pytest.raises(DataError, match=message):
        found(Graph())
    with pytest.raises(DataError, match=r"it has no array for edges.*data: nodes float32"):
        found(Graph(), nodes=normal(4, 3))
    with pytest.raises(DataError, match="does not run on the evaluation data: Conv can't run on"):
        found(Conv(FLAT), image=normal(4, 3, 16, 16))


def test_the_model_itself_is_not_run():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return x * 2

    model = Counting()
    found(model, x=normal(3, 4))
    assert model.calls == 0


def test_model_in_bfloat16_is_refused_in_words():
    model = nn.Linear(4, 3).bfloat16()
    with pytest.raises(DataError, match=r"input is bfloat16, which NumPy.*model.float\(\) or"):
        found(model, input=normal(3, 4))


def test_axes_that_were_not_tried_in_an_export_are_noted():
    class Untraceable(nn.Module):
        def forward(self, x):
            if torch.compiler.is_exporting():
                raise RuntimeError("not so")
            return x * 2

    notes = found(Untraceable(), x=normal(3, 4, 6)).notes
    assert "no axis was tried for a constant length when exported: not so" in notes
