"""Ensembles: the mixture against NumPy, its graph, its checkpoint, and a whole release of one."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner, Result
from models import POSITIONS, SIGNAL, SmallNet
from onnx import numpy_helper
from pydantic import TypeAdapter
from releases import PREFIX, changed_notebook
from torch import Tensor, nn

from heimdall_onnx.archive.release import Release
from heimdall_onnx.archive.verify import verify_release
from heimdall_onnx.cli.main import main
from heimdall_onnx.common.errors import CheckpointError, ParameterError
from heimdall_onnx.common.text import DEGREES
from heimdall_onnx.data.evaluation import load_evaluation_data
from heimdall_onnx.evidence.latency.figures import MemberFigures
from heimdall_onnx.evidence.latency.members import compare_member
from heimdall_onnx.evidence.parity.compare import compare_outputs
from heimdall_onnx.evidence.parity.departure import locate_departure
from heimdall_onnx.model.checkpoint import load_checkpoint
from heimdall_onnx.model.copies import pickle_model
from heimdall_onnx.model.ensemble import (
    ALEATORIC,
    ENSEMBLE,
    EPISTEMIC,
    TOTAL,
    CombinedCheckpoint,
    Ensemble,
    combine_checkpoints,
)
from heimdall_onnx.model.examples import generic_inputs
from heimdall_onnx.model.inference import open_session, run_onnx, run_pytorch
from heimdall_onnx.model.onnx.export import export_model
from heimdall_onnx.model.signature import Signature, TensorSpec
from heimdall_onnx.report.tables import checkpoint_table, member_table
from heimdall_onnx.review.reproduce.run import reproduce_release
from heimdall_onnx.services.connection import connect
from heimdall_onnx.services.store import Bucket

SMALL = "models:SmallNet"
ANSWERS = f"{__name__}:Answers"
LOW, HIGH = 0.01, 1.0


class Answers(nn.Module):
    """Answers what it is given, moved by weights of its own: the mixture of these is known."""

    def __init__(
        self,
        spread: str = "sigma",
        columns: int = 2,
        limit: float = HIGH,
        further: str = "",
        unit: str = DEGREES,
        note: object = None,
    ) -> None:
        super().__init__()
        self.spread, self.columns, self.further = spread, columns, further
        self.shift = nn.Parameter(torch.zeros(2))
        self.factor = nn.Parameter(torch.ones(()))
        shape = ("batch", columns) if columns else ("batch",)
        span = (LOW, limit) if spread == "sigma" else None
        relation = {"sigma": "sigma_of", "log": "log_variance_of"}.get(spread)
        outputs = [TensorSpec("positions", "float32", ("batch", 2), unit=unit)]
        if relation:
            outputs.append(
                TensorSpec("claimed", "float32", shape, range=span, **{relation: "positions"})
            )
        if further:
            outputs.append(TensorSpec("further", further, ("batch", 2), range=(0.0, 1.0)))
        given = (TensorSpec("given", "float32", ("batch", 4)),)
        self.signature = Signature(given, tuple(outputs))

    def forward(self, given: Tensor) -> dict[str, Tensor]:
        claimed = given[:, 2 : 2 + max(self.columns, 1)] * self.factor
        found = {
            "further": claimed.to(getattr(torch, self.further or "float32")),
            "claimed": claimed if self.columns else claimed[:, 0],
            "positions": given[:, :2] + self.shift,
        }
        return {spec.name: found[spec.name] for spec in self.signature.outputs}


class Example(SmallNet):
    """Says itself what may be fed to it."""

    def example_inputs(self, count, rng, lengths):
        return {"signal": np.full((count, 2, 8, 8), 3, np.float32)}

    def adversarial_inputs(self, base, rng):
        return {"own": base}


class TwoInputs(nn.Module):
    """Takes and gives two things of one shape, which nothing but their names tells apart."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(2))
        self.signature = Signature(
            tuple(TensorSpec(name, "float32", ("batch", 2)) for name in ("first", "second")),
            (
                TensorSpec("positions", "float32", ("batch", 2), unit=DEGREES),
                TensorSpec("claimed", "float32", ("batch", 2), sigma_of="positions"),
            ),
        )

    def answer(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return 48 + first + self.shift, 1 + second.square()


class Swapped(TwoInputs):
    def forward(self, second: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        return self.answer(first, second)


class OnlyNamed(TwoInputs):
    def forward(self, second: Tensor, *, first: Tensor) -> tuple[Tensor, Tensor]:
        return self.answer(first, second)


class Turned(NamedTuple):
    claimed: Tensor
    positions: Tensor


class TurnedOutputs(TwoInputs):
    def forward(self, first: Tensor, second: Tensor) -> Turned:
        positions, claimed = self.answer(first, second)
        return Turned(claimed=claimed, positions=positions)


class Undeclared(nn.Module):
    """A net as training left it: without a signature."""

    def __init__(self) -> None:
        super().__init__()
        self.net = SmallNet()

    def forward(self, signal: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(signal)


def answers(shifts, factors=None, **arguments) -> Ensemble:
    ensemble = Ensemble(ANSWERS, [arguments for _ in shifts])
    for i, member in enumerate(ensemble.members):
        member.shift.data = torch.tensor(shifts[i])
        if factors is not None:
            member.factor.data = torch.tensor(factors[i])
    return ensemble


def ask(model: nn.Module, given: np.ndarray) -> dict[str, np.ndarray]:
    return run_pytorch(model, {"given": given.astype(np.float32)}, model.signature)


def mixture(positions, deviations):
    """Mean and deviations (total, aleatoric, epistemic) in float64, as the paper has them."""
    p = np.asarray(positions, np.float64)
    for place in p[1:]:
        place[:, 1] = p[0, :, 1] + (place[:, 1] - p[0, :, 1] + 180) % 360 - 180
    variance, between = (np.asarray(deviations, np.float64) ** 2).mean(0), p.var(0)
    return p.mean(0), np.sqrt(variance + between), np.sqrt(variance), np.sqrt(between)


def net(seed: int, of: type[nn.Module] = SmallNet, **arguments) -> nn.Module:
    """Weights of its own, and positions where receivers are."""
    made = of(**arguments)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for module in made.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.reset_parameters()
        made.position_head.bias += torch.tensor([48.0, 9.0])
    return made


def save(folder: Path, count: int = 3, **content) -> list[Path]:
    paths = [folder / f"run-{i}.pt" for i in range(count)]
    for i, path in enumerate(paths):
        torch.save({"model_state_dict": net(i).state_dict(), **content}, path)
    return paths


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> list[Path]:
    return save(tmp_path_factory.mktemp("members"))


@pytest.fixture(scope="module")
def combined(paths, tmp_path_factory) -> CombinedCheckpoint:
    return combine_checkpoints(paths, tmp_path_factory.mktemp("combined"), SMALL)


@pytest.fixture(scope="module")
def ensemble(combined) -> Ensemble:
    return load_checkpoint(
        combined.path, model=combined.model, model_kwargs=combined.model_kwargs
    ).model


@pytest.fixture(scope="module", params=[14, 20])
def exported(request, ensemble, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    return export_model(ensemble, path, opset=request.param).path


# The mixture


@pytest.mark.parametrize("spread", ["sigma", "log"])
@pytest.mark.parametrize("columns", [2, 1, 0])
def test_mixture_is_that_of_the_paper(spread, columns):
    rng = np.random.default_rng(0)
    shifts, factors = rng.normal(0, 0.3, (5, 2)), rng.uniform(0.5, 1, 5)
    model = answers(
        shifts.astype(np.float32), factors.astype(np.float32), spread=spread, columns=columns
    )
    given = np.hstack([rng.uniform((46, 4), (51, 11), (200, 2)), rng.uniform(LOW, HIGH, (200, 2))])
    found = ask(model, given)
    claimed = [given[:, 2 : 2 + max(columns, 1)] * factor for factor in factors]
    if spread == "log":
        claimed = np.exp(np.divide(claimed, 2))
    expected = mixture([given[:, :2] + shift for shift in shifts], claimed)
    total = "claimed" if spread == "sigma" else TOTAL
    assert list(found) == ["positions", total, ALEATORIC, EPISTEMIC]
    for name, value in zip(found, expected, strict=True):
        assert found[name].shape == (200, 2)
        np.testing.assert_allclose(found[name], np.broadcast_to(value, (200, 2)), atol=1e-5)
    assert (found[total] >= found[ALEATORIC]).all()


def test_members_on_both_sides_of_the_date_line_are_neighbours():
    model = answers([[0.0, 179.9], [0.0, -179.9], [0.0, -179.6]])
    found = ask(model, np.array([[10.0, 0.0, 0.1, 0.1]]))
    np.testing.assert_allclose(found["positions"], [[10.0, 180.1333]], atol=1e-4)
    expected = np.std([179.9, 180.1, 180.4])
    np.testing.assert_allclose(found[EPISTEMIC], [[0.0, expected]], atol=1e-4)
    # From the other side the mean stays on that side; a latitude has no other way round.
    model = answers([[-100.0, -179.9], [150.0, 179.9]])
    found = ask(model, np.array([[0.0, 0.0, 0.1, 0.1]]))
    np.testing.assert_allclose(found["positions"], [[25.0, -180.0]], atol=1e-4)
    np.testing.assert_allclose(found[EPISTEMIC], [[125.0, 0.1]], atol=1e-4)


def test_members_turns_apart_do_not_differ():
    model = answers([[0.0, 9.0], [0.0, 369.0], [0.0, -711.0]])
    found = ask(model, np.array([[48.0, 0.0, 0.1, 0.1]]))
    np.testing.assert_allclose(found["positions"], [[48.0, 9.0]], atol=1e-5)
    assert (found[EPISTEMIC] == 0).all()


def test_small_disagreement_survives_float32():
    # A few steps of float32 apart, where a difference of squares leaves nothing.
    step = float(np.spacing(np.float32(48)))
    model = answers([[0.0, 0.0], [8 * step, 0.0], [-4 * step, 0.0]])
    given = np.array([[48.0, 9.0, 0.1, 0.1]])
    found = ask(model, given)[EPISTEMIC]
    np.testing.assert_allclose(found[:, 0], np.std([0, 8, -4]) * step, rtol=1e-5)
    assert found[0, 1] == 0


def test_aleatoric_deviation_keeps_the_members_range_to_the_last_bit():
    rng = np.random.default_rng(1)
    same = rng.uniform(LOW, HIGH, (5000, 2)).astype(np.float32)
    given = np.hstack([np.full((5000, 2), 48, np.float32), same])
    found = ask(answers([[0.0, 0.0]] * 7), given)
    # Seven times the same number is that number, which rounding alone would not give.
    np.testing.assert_array_equal(found[ALEATORIC], same)
    naive = torch.from_numpy(np.stack([same] * 7)).square().mean(0).sqrt().numpy()
    assert (naive < same).any()
    assert (naive > same).any()
    spec = next(o for o in answers([[0.0, 0.0]] * 2).signature.outputs if o.name == ALEATORIC)
    assert spec.range == (LOW, HIGH)


@pytest.mark.parametrize("member", ["Swapped", "OnlyNamed", "TurnedOutputs"])
def test_members_are_called_and_answer_by_name(member, tmp_path):
    model = Ensemble(f"{__name__}:{member}", [{}, {}])
    model.members[1].shift.data += 0.5
    inputs = generic_inputs(model.signature, 5)
    single = [run_pytorch(one, inputs, one.signature) for one in model.members]
    expected = mixture([s["positions"] for s in single], [s["claimed"] for s in single])
    np.testing.assert_allclose(expected[0], 48.25 + inputs["first"], rtol=1e-6)
    found = [run_pytorch(model, inputs, model.signature)]
    for opset in (14, 20):
        path = export_model(model, tmp_path / f"{opset}.onnx", opset=opset).path
        found.append(run_onnx(open_session(path), inputs, model.signature))
    for one in found:
        for name, value in zip(one, expected, strict=True):
            np.testing.assert_allclose(one[name], value, rtol=1e-5, atol=1e-5)


def test_further_outputs_are_averaged():
    model = answers([[0.0, 0.0]] * 2, [0.5, 1.0], further="float32")
    found = ask(model, np.array([[48.0, 9.0, 0.2, 0.8]]))
    np.testing.assert_allclose(found["further"], [[0.15, 0.6]], rtol=1e-6)
    assert model.signature.outputs[-1].range == (0.0, 1.0)


def test_ranges_of_all_members_are_kept():
    model = Ensemble(ANSWERS, [{"limit": 0.5}, {"limit": 2.0}])
    assert model.signature.outputs[2].range == (LOW, 2.0)
    assert Ensemble(ANSWERS, [{"spread": "log"}] * 2).signature.outputs[2].range is None


def test_signature_is_the_members_with_the_mixture_in_it(ensemble):
    assert ensemble.signature == Signature(
        (SIGNAL,),
        (
            POSITIONS,
            TensorSpec("spread", "float32", ("batch", 2), unit=DEGREES, sigma_of="positions"),
            TensorSpec(ALEATORIC, "float32", ("batch", 2), unit=DEGREES, range=(0.01, 1.0)),
            TensorSpec(EPISTEMIC, "float32", ("batch", 2), unit=DEGREES),
        ),
    )
    assert ensemble.signature.position_output == POSITIONS
    assert ensemble.signature.sigma_output.name == "spread"
    assert ensemble.signature.problems() == []
    assert ensemble.described_as == "Ensemble of 3 SmallNet"
    assert not ensemble.training


def test_ensemble_computes_in_float64_and_can_be_handed_to_another_process(ensemble, tmp_path):
    signal = {"signal": np.random.default_rng(0).standard_normal((3, 2, 8, 8))}
    double = Ensemble(SMALL, [{}, {}, {}])
    double.load_state_dict(ensemble.state_dict())
    exact = run_pytorch(double.double(), signal, ensemble.signature)
    single = {"signal": signal["signal"].astype(np.float32)}
    found = run_pytorch(ensemble, single, ensemble.signature)
    for name, value in exact.items():
        assert value.dtype == np.float64
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5)
    (tmp_path / "model.pkl").write_bytes(pickle_model(ensemble))
    again = torch.load(tmp_path / "model.pkl", weights_only=False)  # written a line above
    repeated = run_pytorch(again, single, ensemble.signature)
    assert all((repeated[name] == found[name]).all() for name in found)


def test_first_member_makes_the_examples():
    model = Ensemble(f"{__name__}:Example", [{}, {}])
    assert (model.example_inputs(2, None, {})["signal"] == 3).all()
    assert model.adversarial_inputs({}, None) == {"own": {}}
    assert not hasattr(Ensemble(SMALL, [{}, {}]), "example_inputs")


# Members that have no mixture


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([{}], "at least two members, found 1"),
        ({"spread": "sigma"}, "list with the arguments of each"),
        ([{"unit": "metres"}] * 2, r"output \(batch, 2\) of positions in degrees, found none"),
        ([{"spread": "none"}] * 2, "found none: the mixture's variance"),
        ([{"further": "int64"}] * 2, "further is int64, of which there is no mean"),
        (
            [{}, {"spread": "log"}, {"further": "float32"}],
            r"(?s)member 2: output 'claimed' expected as in member 1: .*sigma_of positions; found "
            r".*log_variance_of positions.*member 3: output 'further' .*: none; found dtype",
        ),
    ],
)
def test_members_without_a_mixture_are_refused(arguments, message):
    with pytest.raises(ParameterError, match=message):
        Ensemble(ANSWERS, arguments)


def test_every_problem_of_the_outputs_is_named():
    with pytest.raises(ParameterError, match=r"(?s)positions in degrees.*level is int64"):
        Ensemble("models:IntegerNet", [{}, {}])


def test_ensembles_are_no_members():
    with pytest.raises(ParameterError, match="must not be ensembles"):
        Ensemble(ENSEMBLE, [{"model": SMALL, "members": [{}, {}]}] * 2)


def test_names_of_the_mixture_are_taken():
    outputs = (POSITIONS, TensorSpec("s", "float32", ("batch", 2), sigma_of="positions"))
    clash = Signature((TensorSpec("aleatoric", "float32", ("batch", 2, 8, 8)),), outputs)
    with pytest.raises(ParameterError, match="aleatoric is a name that the mixture needs"):
        Ensemble(f"{__name__}:Undeclared", [{}, {}], signature=clash.to_dict())
    with pytest.raises(ParameterError, match=r"what Signature\.to_dict gives"):
        Ensemble(SMALL, [{}, {}], signature={"inputs": 3})


# The graph


def test_every_gate_holds_at_every_batch_size(ensemble, exported):
    data = load_evaluation_data(None, ensemble.signature)
    report = compare_outputs(ensemble, exported, data, ensemble.signature)
    assert {cell.batch_size for cell in report.cells} == {1, 2, 3, 8}
    assert [str(gate) for gate in report.gates() if not gate.passed] == []
    names = {gate.name for gate in report.gates()}
    assert {"range of aleatoric", "noise floor of epistemic"} <= names
    # The members do disagree, and nearly nothing of it is lost.
    assert report.onnx[EPISTEMIC].min() > 1e-4
    expected = mixture(
        [
            run_pytorch(m, dict(data.inputs), m.signature)["positions"][
                : len(report.onnx[EPISTEMIC])
            ]
            for m in ensemble.members
        ],
        np.ones((3, 1, 2)),
    )
    np.testing.assert_allclose(report.onnx["positions"], expected[0], atol=1e-5)
    np.testing.assert_allclose(report.onnx[EPISTEMIC], expected[3], atol=1e-5)


def test_graph_gives_numpys_mixture_on_both_sides_of_the_date_line(tmp_path):
    rng = np.random.default_rng(2)
    shifts = rng.uniform((-1, 178), (1, 182), (4, 2)).astype(np.float32)
    shifts[:, 1] = (shifts[:, 1] + 180) % 360 - 180
    factors = rng.uniform(0.5, 1, 4).astype(np.float32)
    model = answers(shifts, factors)
    path = export_model(model, tmp_path / "model.onnx", opset=14).path
    given = np.hstack([rng.uniform(-0.5, 0.5, (64, 2)), rng.uniform(LOW, HIGH, (64, 2))])
    session = open_session(path)
    found = run_onnx(session, {"given": given.astype(np.float32)}, model.signature)
    expected = mixture(
        [given[:, :2] + shift for shift in shifts], [given[:, 2:] * factor for factor in factors]
    )
    for name, value in zip(found, expected, strict=True):
        np.testing.assert_allclose(found[name], value, atol=5e-5)
    # NaN is answered with NaN, in the same places as by PyTorch.
    given[1, 2] = given[3, 0] = np.nan
    broken = run_onnx(session, {"given": given.astype(np.float32)}, model.signature)
    for name, value in ask(model, given).items():
        np.testing.assert_array_equal(np.isnan(broken[name]), np.isnan(value))
        assert np.isnan(value).any()


@pytest.mark.parametrize("exported", [20], indirect=True)
def test_fault_in_one_member_is_found_there(ensemble, exported, tmp_path):
    graph = onnx.load(exported)
    weight = next(w for w in graph.graph.initializer if w.name == "members.1.body.3.weight")
    changed = numpy_helper.to_array(weight) * np.float32(1.5)
    weight.CopyFrom(numpy_helper.from_array(changed, weight.name))
    path = tmp_path / "model.onnx"
    onnx.save(graph, path)
    data = load_evaluation_data(None, ensemble.signature)
    report = compare_outputs(ensemble, path, data, ensemble.signature)
    found = locate_departure(report, ensemble, path)
    assert found is not None
    assert found.scope == "members.1.body.3"


def test_members_may_have_parts_of_other_lengths(tmp_path):
    model = Ensemble("models:BlockNet", [{"blocks": 2}, {"blocks": 3}])
    path = export_model(model, tmp_path / "model.onnx", opset=14).path
    signal = generic_inputs(model.signature, 3)
    found = run_onnx(open_session(path), signal, model.signature)
    for name, value in run_pytorch(model, signal, model.signature).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-4)


# The checkpoint


def test_combined_checkpoint_holds_every_member(combined, ensemble, paths):
    assert combined.path.name.endswith(".ckpt")
    assert [p.name for p in combined.path.parent.iterdir()] == [combined.path.name]
    assert combined.sha256 == hashlib.sha256(combined.path.read_bytes()).hexdigest()
    assert combined.model == ENSEMBLE
    assert combined.model_kwargs == {"model": SMALL, "members": [{}, {}, {}]}
    assert combined.parameters["checkpoint"] == str(combined.path)
    for i, (member, path) in enumerate(zip(ensemble.members, paths, strict=True)):
        assert combined.members[i].file == path.name
        assert combined.members[i].sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        own = torch.load(path, weights_only=True)["model_state_dict"]
        assert all((value == own[name]).all() for name, value in member.state_dict().items())
    plain = torch.load(combined.path, weights_only=True)
    assert plain["hyper_parameters"] == {
        "member_checkpoints": [member.model_dump() for member in combined.members]
    }


def test_loaded_ensemble_names_its_members(combined):
    loaded = load_checkpoint(
        combined.path, model=combined.model, model_kwargs=combined.model_kwargs
    )
    assert loaded.members == combined.members
    text = checkpoint_table(loaded).data
    for number, member in enumerate(combined.members, 1):
        assert f"member {number}, as the checkpoint records" in text
        assert member.sha256 in text


def test_same_members_in_the_same_order_give_the_same_bytes(combined, paths, tmp_path):
    copies = [Path(shutil.copy(path, tmp_path)) for path in paths]
    again = combine_checkpoints(copies, tmp_path / "a" / "b", SMALL)
    assert again.sha256 == combined.sha256
    assert again.path.name == combined.path.name
    other = combine_checkpoints(copies[::-1], tmp_path, SMALL)
    assert other.sha256 != combined.sha256
    assert other.path.name != combined.path.name


def test_what_files_record_becomes_arguments_of_their_members(tmp_path):
    paths = []
    for width in (8, 16):
        paths.append(tmp_path / f"{width}.ckpt")
        content = {"state_dict": net(width, width=width).state_dict()}
        torch.save({**content, "hyper_parameters": {"width": width, "other": "x"}}, paths[-1])
    found = combine_checkpoints(paths, tmp_path, SMALL)
    assert found.model_kwargs["members"] == [{"width": 8}, {"width": 16}]
    load_checkpoint(found.path, model=found.model, model_kwargs=found.model_kwargs)


def test_signature_beside_the_checkpoints_travels_with_them(tmp_path):
    paths = []
    for i in range(2):
        paths.append(tmp_path / f"{i}.pt")
        torch.save({f"net.{k}": v for k, v in net(i).state_dict().items()}, paths[-1])
        (tmp_path / f"{i}.signature.yaml").write_text(
            "inputs: [{name: signal, dtype: float32, shape: [batch, 2, 8, 8]}]\n"
            "outputs:\n"
            f"  - {{name: where, dtype: float32, shape: [batch, 2], unit: '{DEGREES}'}}\n"
            "  - {name: doubt, dtype: float32, shape: [batch, 2], sigma_of: where}\n"
        )
    found = combine_checkpoints(paths, tmp_path / "out", f"{__name__}:Undeclared")
    kwargs = json.loads(json.dumps(found.model_kwargs))
    loaded = load_checkpoint(found.path, model=found.model, model_kwargs=kwargs)
    names = [output.name for output in loaded.signature.outputs]
    assert names == ["where", "doubt", ALEATORIC, EPISTEMIC]
    answer = run_pytorch(loaded.model, generic_inputs(loaded.signature, 2), loaded.signature)
    assert answer["where"].shape == (2, 2)


def test_every_fault_of_the_members_is_named(paths, tmp_path):
    with pytest.raises(ParameterError, match="at least two members, found 1"):
        combine_checkpoints(paths[:1], tmp_path, SMALL)
    copy = shutil.copy(paths[0], tmp_path / "copy.pt")
    with pytest.raises(
        ParameterError, match=r"copy\.pt is the same as .*run-0\.pt, SHA-256 [0-9a-f]"
    ):
        combine_checkpoints([*paths, copy], tmp_path, SMALL)
    (tmp_path / "broken.pt").write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match=r"(?s)2 of 3 .*broken\.pt.*absent\.pt"):
        combine_checkpoints(
            [paths[0], tmp_path / "broken.pt", tmp_path / "absent.pt"], tmp_path, SMALL
        )
    with pytest.raises(CheckpointError, match=r"broken\.pt is truncated"):
        combine_checkpoints([paths[0], tmp_path / "broken.pt"], tmp_path, SMALL)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"copy.pt", "broken.pt"}


def test_members_that_differ_are_named_with_their_files(tmp_path):
    paths = []
    for spread in ("sigma", "log"):
        paths.append(tmp_path / f"{spread}.ckpt")
        content = {"state_dict": Answers(spread).state_dict()}
        torch.save({**content, "hyper_parameters": {"spread": spread}}, paths[-1])
    with pytest.raises(
        ParameterError, match=r"member 2 \(log\.ckpt\): output 'claimed' expected as"
    ):
        combine_checkpoints(paths, tmp_path, ANSWERS)


def endless() -> list:
    value: list = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("note", "found"),
    [
        (torch.zeros(2), "note is Tensor"),
        (float("nan"), "note is float: nan"),
        ({"a": [b"bytes"]}, r"note\.a\[0\] is bytes"),
        (endless(), r"note(\[0\])+ is list"),
        ([[[0] * 1000] * 1000] * 1000, r"note.* is list"),
    ],
)
def test_arguments_that_no_release_can_repeat_are_refused(note, found, tmp_path):
    paths = [tmp_path / f"{i}.ckpt" for i in range(2)]
    for i, path in enumerate(paths):
        member = Answers()
        member.shift.data += i
        content = {"state_dict": member.state_dict(), "hyper_parameters": {"note": note}}
        torch.save(content, path)
    with pytest.raises(ParameterError, match=found):
        combine_checkpoints(paths, tmp_path, ANSWERS)


def test_no_class_that_a_file_names_is_imported(combined, tmp_path):
    (tmp_path / "planted.py").write_text("raise SystemExit('was imported')")
    content = torch.load(combined.path, weights_only=True)
    content["hyper_parameters"] |= {
        "model": "planted:Net",
        "members": [{}, {}, {}],
        "signature": {"inputs": [], "outputs": []},
    }
    path = tmp_path / "hostile.ckpt"
    torch.save(content, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        with pytest.raises(ParameterError, match=r"(?s)'model' is required.*'members' is required"):
            load_checkpoint(path, model=ENSEMBLE)
        loaded = load_checkpoint(path, model=ENSEMBLE, model_kwargs=combined.model_kwargs)
    assert type(loaded.model.members[0]) is SmallNet
    assert loaded.signature.inputs == (SIGNAL,)


@pytest.mark.parametrize(
    "members", [3, [], [{"file": "a"}] * 2, [{"file": "a", "sha256": "x"}] * 2, "text"]
)
def test_members_that_a_file_does_not_name_rightly_are_refused(combined, members, tmp_path):
    content = torch.load(combined.path, weights_only=True)
    content["hyper_parameters"]["member_checkpoints"] = members
    torch.save(content, tmp_path / "hostile.ckpt")
    with pytest.raises(CheckpointError, match="does not say which checkpoints it was made of"):
        load_checkpoint(
            tmp_path / "hostile.ckpt", model=combined.model, model_kwargs=combined.model_kwargs
        )


# What it costs


def test_ensemble_is_measured_beside_its_first_member(ensemble, tmp_path):
    data = load_evaluation_data(None, ensemble.signature)
    path = export_model(ensemble, tmp_path / "model.onnx", opset=14).path
    found = compare_member(
        ensemble, path, data, ensemble.signature, opset=14, calls=12, threads=1, batch_size=2
    )
    assert found is not None
    assert found.members == 3
    assert found.latency.batch_size == 2
    assert [side.name for side in found.latency.contenders] == ["Ensemble", "Single member"]
    assert found.latency.speedup.low <= found.latency.speedup.ratio <= found.latency.speedup.high
    assert found.size_bytes == path.stat().st_size > 2 * found.member_size_bytes > 0
    json.dumps(TypeAdapter(MemberFigures).dump_python(found, mode="json"))
    text = member_table(found).data
    assert f"{found.latency.speedup.ratio:.2f} (" in text
    assert "| networks | 3 | 1 |" in text


def test_model_without_members_is_compared_with_none(tmp_path):
    data = load_evaluation_data(None, SmallNet.signature)
    options = {"opset": 14, "calls": 1, "threads": 1}
    assert compare_member(SmallNet(), tmp_path, data, SmallNet.signature, **options) is None
    assert member_table(None) is None


# A whole release


def release(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["release", *map(str, arguments), "--model", SMALL, "--json"])


def test_combined_checkpoint_does_not_stay_behind_a_failed_release(paths, monkeypatch, tmp_path):
    home = tmp_path / "home"
    monkeypatch.setenv("HEIMDALL_HOME", str(home))
    # The checkpoint is looked for before the evaluation data, so it was there.
    failed = release(*paths, "--eval-data", tmp_path / "absent.npz")
    assert failed.exit_code == 2
    assert "expected evaluation data" in json.loads(failed.stdout)["error"]
    assert f"3 checkpoints combined in {home}" in failed.stderr
    assert list(home.rglob("*")) == []
    refused = release(paths[0], paths[0])
    assert refused.exit_code == 2
    assert "expected different checkpoints" in json.loads(refused.stdout)["error"]
    assert list(home.rglob("*")) == []


def test_home_that_is_no_folder_is_said(paths, monkeypatch, tmp_path):
    (tmp_path / "home").write_text("")
    monkeypatch.setenv("HEIMDALL_HOME", str(tmp_path / "home"))
    refused = release(*paths)
    assert refused.exit_code == 2
    assert "HEIMDALL_HOME must be a folder" in json.loads(refused.stdout)["error"]


@pytest.mark.services
@pytest.mark.thorough
def test_ensemble_is_released_verified_and_made_again(make_settings, s3, paths, tmp_path):
    settings, bucket = make_settings("ensemble"), "test-ensemble"
    settings.apply()
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "eval.npz",
        signal=rng.standard_normal((12, 2, 8, 8)).astype(np.float32),
        positions=rng.uniform((46, 4), (51, 11), (12, 2)),
    )
    made = combine_checkpoints(paths, tmp_path / "same", SMALL)
    done = release(
        *paths,
        *("--eval-data", tmp_path / "eval.npz", "--bucket", bucket, "--name", "test-model"),
        *("--profile", "smoke", "-p", "opset", 14, "--notebook", changed_notebook(tmp_path)),
        *("--prefix", PREFIX),
    )
    assert done.exit_code == 0, done.stderr
    assert list(settings.home.rglob("*.ckpt")) == []
    result = json.loads(done.stdout)
    folder = f"{PREFIX}/{result['version']}"
    manifest = Bucket(s3, bucket).read_json(f"{folder}/manifest.json")
    members = [member.model_dump() for member in made.members]
    assert manifest["checkpoint"] == {
        "file": made.path.name,
        "sha256": made.sha256,
        "members": members,
        "weights": "model_state_dict",
        "notes": [],
    }
    assert manifest["parameters"]["model_kwargs"] == made.model_kwargs
    assert manifest["content"][0]["sha256"] == made.sha256
    assert (
        Bucket(s3, bucket).read_json(f"{folder}/metadata.json")["model_type"]
        == "Ensemble of 3 SmallNet"
    )
    bom = Bucket(s3, bucket).read_json(f"{folder}/bom.cdx.json")
    checkpoint = next(c for c in bom["components"] if c["bom-ref"] == "checkpoint")
    recorded = [(c["name"], c["hashes"][0]["content"]) for c in checkpoint["components"]]
    assert recorded == [(m["file"], m["sha256"]) for m in members]
    assert all("as the checkpoint records" in c["description"] for c in checkpoint["components"])
    report = Path(result["local_report"]).with_suffix(".ipynb").read_text()
    assert all(m["sha256"] in report for m in members)
    uri, connection = f"s3://{bucket}/{folder}", connect(settings)
    assert [f for f in verify_release(Release.at(connection, uri)) if not f.holds] == []
    again = reproduce_release(Release.at(connection, uri))
    assert again.failures == ()
    assert again.model.identical


def test_chosen_weights_are_those_of_every_member(tmp_path):
    paths = [tmp_path / f"{i}.ckpt" for i in range(2)]
    for i, path in enumerate(paths):
        states = [Answers().state_dict() for _ in range(2)]
        states[1]["shift"] = states[1]["shift"] + 1 + i
        torch.save({"model": states[0], "model_ema": states[1]}, path)
    with pytest.raises(CheckpointError, match="2 of 2 checkpoints can't be used"):
        combine_checkpoints(paths, tmp_path, ANSWERS)
    made = combine_checkpoints(paths, tmp_path, ANSWERS, weights="model_ema")
    assert made.parameters["weights"] == ""
    assert torch.load(made.path)["model_state_dict"].keys() >= {
        "members.0.shift",
        "members.1.shift",
    }
