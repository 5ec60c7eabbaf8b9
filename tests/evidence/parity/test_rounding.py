"""What is right is let through, and what is wrong in just that way is not."""

import numpy as np
import pytest
import torch
from models import declare
from torch import nn
from torch.nn.functional import gelu

from heimdall_onnx.common.errors import EvidenceError, ExportError
from heimdall_onnx.data.evaluation import EvaluationData, load_evaluation_data
from heimdall_onnx.evidence.parity.compare import compare_outputs
from heimdall_onnx.evidence.parity.rounding import Rounding
from heimdall_onnx.evidence.parity.tolerance import Limit
from heimdall_onnx.model.examples import Examples
from heimdall_onnx.model.inference import open_session
from heimdall_onnx.model.onnx.export import export_model
from heimdall_onnx.model.signature import Axis, Signature, TensorSpec

X = TensorSpec("x", "float32", ("batch", 6))
ELEMENTS = "elements on evaluation data"


class Small(nn.Module):
    """A layer of seeded weights, and what a case makes of its answer."""

    signature = declare([X], [TensorSpec("y", "float32", ("batch", 8))])

    def __init__(self, answer=lambda y, wrong: y, wrong=False):
        super().__init__()
        torch.manual_seed(1)
        self.layer, self.answer, self.wrong = nn.Linear(6, 8), answer, wrong
        self.eval()

    def forward(self, x):
        return self.answer(self.layer(x), self.wrong)


def compare(model, folder, other=None, opset=17, data=None):
    path = export_model(
        other or model, folder / "m.onnx", signature=model.signature, opset=opset
    ).path
    data = data or load_evaluation_data(None, model.signature, model)
    session = open_session(path, threads=1, spinning=False)
    return compare_outputs(model, session, data, model.signature)


def failed(report):
    return {gate.name: gate.detail for gate in report.gates() if not gate.passed}


def outputs(*specs, inputs=(X,), axes=()):
    return Signature(tuple(inputs), tuple(specs), tuple(axes))


Y = TensorSpec("y", "float32", ("batch", 8))
CASES = {
    "best": (
        outputs(TensorSpec("best", "int64", ("batch",))),
        lambda y, wrong: (y.argmax(1) + int(wrong)) % 8,
    ),
    "last of the best": (
        outputs(TensorSpec("best", "int64", ("batch", 2))),
        lambda y, wrong: y.topk(3, dim=1).indices[:, int(wrong) : int(wrong) + 2],
    ),
    "sorted": (
        outputs(TensorSpec("order", "int64", ("batch", 8))),
        lambda y, wrong: y.round().sort(dim=1, descending=wrong).indices,
    ),
    "tanh": (
        outputs(TensorSpec("y", "float32", ("batch", 8), range=(-1.0, 1.0))),
        lambda y, wrong: torch.tanh(3 * y) * (1.001 if wrong else 1.0),
    ),
    "delays": (outputs(Y), lambda y, wrong: y * (1.001e-7 if wrong else 1e-7)),
    "steep": (outputs(Y), lambda y, wrong: torch.sin(y * (1001.0 if wrong else 1000.0))),
    "cancelled": (
        outputs(TensorSpec("y", "float32", ("batch", 1))),
        lambda y, wrong: (
            (y.sum(1, keepdim=True) - y[:, :4].sum(1, keepdim=True) - y[:, 4:].sum(1, keepdim=True))
            + (1e-5 if wrong else 0.0)
        ),
    ),
    "zero": (outputs(Y), lambda y, wrong: y * 0.0 + (1e-9 if wrong else 0.0)),
    "hidden": (
        outputs(Y, axes=()),
        lambda y, wrong: torch.where(y < (0.1 if wrong else 0.0), -torch.inf, y),
    ),
    "within bfloat16": (
        outputs(Y),
        lambda y, wrong: gelu(y.bfloat16().float(), approximate="tanh" if wrong else "none"),
    ),
    "without a cast": (outputs(Y), lambda y, wrong: (y if wrong else y.half().float()).sin()),
    "small column": (
        outputs(TensorSpec("y", "float32", ("batch", 2))),
        lambda y, wrong: torch.stack(
            [100 + y[:, 0], (4e-7 + 1e-8 * y[:, 1]) * (1.3 if wrong else 1.0)], 1
        ),
    ),
    "small channel": (
        outputs(TensorSpec("y", "float32", ("batch", 2, 4))),
        lambda y, wrong: torch.stack([50 * y[:, :4], y[:, 4:] * (1.3e-6 if wrong else 1e-6)], 1),
    ),
    "column that cancels": (
        outputs(TensorSpec("y", "float32", ("batch", 2))),
        lambda y, wrong: torch.stack(
            [y[:, 0], y.sum(1) - y[:, :4].sum(1) - y[:, 4:].sum(1) + (1e-4 if wrong else 0.0)], 1
        ),
    ),
    "rare label": (
        outputs(TensorSpec("y", "float32", ("batch", 2))),
        lambda y, wrong: torch.sigmoid(y[:, :2] - torch.tensor([0.0, 12.0 if wrong else 15.0])),
    ),
    "number": (
        outputs(Y, TensorSpec("scale", "float32", ())),
        lambda y, wrong: (y, 0 * y.sum() + (1.001 if wrong else 1.0)),
    ),
    "huge": (outputs(Y), lambda y, wrong: y * 1e5 * (1.0001 if wrong else 1.0)),
}


@pytest.mark.parametrize("wrong", [False, True], ids=["right", "wrong"])
@pytest.mark.parametrize("case", CASES)
def test_what_is_right_passes_and_what_is_wrong_in_that_way_does_not(tmp_path, case, wrong):
    signature, answer = CASES[case]
    model, other = Small(answer), Small(answer, wrong)
    model.signature = signature
    assert bool(failed(compare(model, tmp_path, other))) == wrong


class Neighbours(nn.Module):
    signature = Signature(
        (TensorSpec("points", "float32", ("batch", 5, 2)),),
        (
            TensorSpec("near", "float32", ("batch", 5, 2, 2)),
            TensorSpec("edges", "int64", ("batch", 5, 2)),
        ),
    )

    def __init__(self, first=0):
        super().__init__()
        self.first = first
        self.eval()

    def forward(self, points):
        apart = ((points.unsqueeze(2) - points.unsqueeze(1)) ** 2).sum(-1)
        edges = apart.topk(self.first + 2, dim=-1, largest=False).indices[..., self.first :]
        at = edges.flatten(1).unsqueeze(-1).expand(-1, -1, 2)
        return torch.gather(points, 1, at).unflatten(1, edges.shape[1:]), edges


class Ranked(nn.Module):
    """The places of the two best marks, of which none are where the mask hides."""

    signature = Signature(
        (
            TensorSpec("marks", "float32", ("batch", "length", 2)),
            TensorSpec("hidden", "bool", ("batch", "length"), masks=("marks",)),
        ),
        (TensorSpec("best", "int64", ("batch", 3)), TensorSpec("top", "float32", ("batch", 3))),
        (Axis("length", lengths=(4, 6, 9)),),
    )

    def __init__(self, leaks=False):
        super().__init__()
        self.leaks = float(leaks)
        self.eval()

    def forward(self, marks, hidden):
        shown = marks.sum(-1).masked_fill(hidden, float("-inf"))
        found = shown.topk(3, dim=1)
        values = found.values.clamp(-9, 9)
        return found.indices, values + 1e-3 * marks.mean((1, 2))[:, None] * self.leaks


def test_ties_of_what_a_mask_hides_are_no_fault_and_leaks_are(tmp_path, monkeypatch):
    monkeypatch.setattr("heimdall_onnx.model.onnx.export.prove_axes", lambda *args: None)
    assert failed(compare(Ranked(), tmp_path, opset=20)) == {}
    assert "masked elements" in failed(compare(Ranked(leaks=True), tmp_path, opset=20))


def test_choice_between_values_that_tie_is_counted_and_no_fault(tmp_path):
    report = compare(Neighbours(), tmp_path)
    assert failed(report) == {}
    zeros = next(c for c in report.cells if c.kind == "zeros")
    assert zeros.outputs[1].violations == 0
    found = next(g for g in report.gates() if g.name == "elements on adversarial inputs")
    if zeros.outputs[1].left_open:
        assert "left open by PyTorch's own rounding" in found.detail


def test_other_neighbours_are_refused(tmp_path):
    assert ELEMENTS in failed(compare(Neighbours(), tmp_path, Neighbours(first=1)))


def test_rounding_leaves_open_what_ties_and_nothing_else():
    model = Neighbours()
    points = np.zeros((2, 5, 2), np.float32)
    points[1] = np.random.default_rng(0).standard_normal((5, 2))
    batch = {"points": points}
    rounding = Rounding(model, model.signature)
    with torch.inference_mode():
        near, edges = (tensor.numpy() for tensor in model(torch.from_numpy(points)))
    limits = dict.fromkeys(("near", "edges"), Limit(1e-5, 1e-6))
    spread = rounding.spread(batch, {"near": near, "edges": edges}, limits)()
    assert (spread["edges"][0] > 0).any(-1).all()
    assert (spread["edges"][1] == 0).all()
    assert (spread["near"] < 1e-4).all()


def test_whole_numbers_are_rounded_and_divided_as_is_defined(tmp_path):
    """Half a number more or less is another one, however near it lies."""
    signature = outputs(TensorSpec("y", "float32", ("batch", 6)))

    class Halves(nn.Module):
        def __init__(self, away=False):
            super().__init__()
            self.away, self.signature = away, signature
            self.eval()

        def forward(self, x):
            return torch.floor(x + 0.5) if self.away else torch.round(x)

    halves = np.random.default_rng(0).integers(-9, 9, (16, 6)).astype(np.float32) / 2
    data = EvaluationData({"x": halves}, None, {}, "halves", "0" * 64, {})
    assert failed(compare(Halves(), tmp_path, data=data)) == {}
    assert ELEMENTS in failed(compare(Halves(), tmp_path, Halves(away=True), data=data))


class Typed(Small):
    """Casts to the type of what it keeps in half precision."""

    def __init__(self, wrong=False):
        super().__init__(wrong=wrong)
        self.register_buffer("kept", torch.ones(1).half())

    def forward(self, x):
        cast = super().forward(x).type_as(self.kept).float()
        return gelu(cast, approximate="tanh" if self.wrong else "none")


@pytest.mark.parametrize("wrong", [False, True], ids=["right", "wrong"])
def test_cast_to_the_type_of_a_buffer_loosens_nothing(tmp_path, wrong):
    assert bool(failed(compare(Typed(), tmp_path, Typed(wrong)))) == wrong


class Half(Small):
    signature = Signature(
        (TensorSpec("x", "float16", ("batch", 6)),),
        (TensorSpec("y", "float16", ("batch", 8)),),
    )

    def __init__(self, wrong=False):
        super().__init__(lambda y, wrong: y * 1.02 if wrong else y, wrong)
        self.half()


@pytest.mark.parametrize("wrong", [False, True], ids=["right", "wrong"])
def test_half_precision_is_held_to_its_own(tmp_path, wrong):
    assert bool(failed(compare(Half(), tmp_path, Half(wrong)))) == wrong


class Clip(nn.Module):
    """Probabilities of a clip of any length, normalized over what ``axis`` says at length 16."""

    signature = Signature(
        (TensorSpec("mel", "float32", ("batch", "frames", 4)),),
        (TensorSpec("y", "float32", ("batch", "frames", 4)),),
    )

    def __init__(self, wrong=False):
        super().__init__()
        torch.manual_seed(1)
        self.layer, self.wrong = nn.Linear(4, 4), wrong
        self.eval()

    def forward(self, mel):
        y = self.layer(mel) * 2
        right = torch.softmax(y, -1)
        if not self.wrong:
            return right
        long = (torch.ones_like(mel[0, :, 0]).sum() - 8).clamp(0, 1)
        return right * (1 - long) + torch.softmax(y, 1) * long


@pytest.mark.parametrize("declared", [False, True])
def test_softmax_over_another_axis_at_another_length_is_refused(tmp_path, declared, monkeypatch):
    monkeypatch.setattr("heimdall_onnx.model.onnx.export.prove_axes", lambda *args: None)
    model, other = Clip(), Clip(wrong=True)
    if declared:
        model.signature = outputs(
            *Clip.signature.outputs,
            inputs=Clip.signature.inputs,
            axes=[Axis("frames", lengths=(3, 16, 8))],
        )
    assert failed(compare(model, tmp_path)) == {}
    found = failed(compare(model, tmp_path, other))
    assert "on frames = 16" in found[ELEMENTS]
    assert "frames = 16" in found["mean absolute error"]


class Padded(nn.Module):
    signature = Signature(
        (
            TensorSpec("frames", "float32", ("batch", 5, 8)),
            TensorSpec("padding", "bool", ("batch", 5), masks=("frames",)),
        ),
        (TensorSpec("encoded", "float32", ("batch", 5, 8)),),
    )

    def __init__(self, wrong=False):
        super().__init__()
        torch.manual_seed(1)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1
        )
        self.wrong = wrong
        self.eval()

    def forward(self, frames, padding):
        mask = padding & torch.zeros_like(padding) if self.wrong else padding
        return self.encoder(frames, src_key_padding_mask=mask) + 0.0 * padding.float().unsqueeze(-1)


def test_encoder_is_compared_without_its_fast_path_and_that_is_said(tmp_path):
    report = compare(Padded(), tmp_path, opset=20)
    assert failed(report) == {}
    assert any("fast path" in note for note in report.notes)
    assert torch.backends.mha.get_fastpath_enabled()


def test_encoder_that_looks_at_what_is_hidden_is_refused(tmp_path):
    assert ELEMENTS in failed(compare(Padded(), tmp_path, Padded(wrong=True), opset=20))


class Kept(nn.Module):
    """The mean of the embedded words that a mask in which 1 means keep shows."""

    signature = Signature(
        (
            TensorSpec("words", "int64", ("batch", "length"), range=(0, 9)),
            TensorSpec("keep", "int64", ("batch", "length"), range=(0, 1)),
            TensorSpec("last", "int64", ("batch",), range=(0, 5)),
        ),
        (TensorSpec("y", "float32", ("batch", 4)),),
        (Axis("length", lengths=(2, 4, 6)),),
    )

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.Embedding(10, 4)
        self.eval()

    def forward(self, words, keep, last):
        found = self.table(words)
        kept = keep.unsqueeze(-1).to(found.dtype)
        mean = (found * kept).sum(1) / kept.sum(1)
        return mean + found.gather(1, last.view(-1, 1, 1).expand(-1, 1, 4)).squeeze(1)


def test_what_hides_everything_is_not_drawn_nor_what_lies_beyond_an_axis(tmp_path):
    examples = Examples(Kept.signature, Kept())
    base = examples.valid(50, lengths={"length": 2})
    assert (base["keep"].sum(1) == 1).all()
    assert base["last"].max() == 1
    kinds = examples.adversarial(base)
    assert kinds["highest ids"]["last"].max() == 1
    assert kinds["lowest ids"]["keep"].any(1).all()
    assert failed(compare(Kept(), tmp_path)) == {}


class Found(nn.Module):
    """As many rows as lie above a threshold."""

    signature = Signature((X,), (TensorSpec("rows", "float32", ("found", 2)),))

    def __init__(self, least=0.0):
        super().__init__()
        self.least = least
        self.eval()

    def forward(self, x):
        rows = x.reshape(-1, 2)
        return rows[rows[:, 1] > self.least] * 2


def test_as_many_rows_as_are_found_are_compared(tmp_path):
    report = compare(Found(), tmp_path)
    assert failed(report) == {}
    assert report.evaluation[0].count > 64
    with pytest.raises(EvidenceError, match="another number of rows"):
        compare(Found(), tmp_path, Found(0.5))


class Autocast(Small):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x).float()


def test_half_precision_by_the_context_is_said(tmp_path):
    report = compare(Autocast(), tmp_path, Small())
    assert any("half precision" in note for note in report.notes)
    assert not any("half precision" in note for note in compare(Small(), tmp_path).notes)


class Insists(Small):
    """Knows no more than float32."""

    def forward(self, x):
        if x.dtype != torch.float32:
            raise ValueError("no more than float32")
        return super().forward(x)


def test_model_that_does_not_run_in_float64_is_judged_without_it_and_that_is_said(tmp_path):
    report = compare(Insists(), tmp_path)
    assert failed(report) == {}
    assert any("no more than float32" in note for note in report.notes)
    off = Small(lambda y, wrong: y + 8e-6)
    assert set(failed(compare(Insists(), tmp_path, off))) == {"noise floor of y"}


def test_what_hangs_on_chance_is_no_rounding(tmp_path):
    dropped = Small(lambda y, wrong: torch.dropout(y, 0.5, True))
    assert ELEMENTS in failed(compare(dropped, tmp_path, Small()))
    with pytest.raises(ExportError, match="answers otherwise each time"):
        compare(dropped, tmp_path)
