"""Weights are found wherever training tools leave them, and loaded as PyTorch itself loads them."""

import argparse
import enum
import json
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from heimdall_onnx.common.errors import CheckpointError, ParameterError
from heimdall_onnx.model.checkpoint import load_checkpoint, read_plain, single_file


class Net(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.conv = nn.Conv1d(2, width, 1)
        self.norm = nn.BatchNorm1d(width)


class Renamed(nn.Module):
    """Its line was once called ``fc``."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(2, 1)
        self.register_load_state_dict_pre_hook(self._rename)

    @staticmethod
    def _rename(module, state, prefix, *_):
        for name in ("weight", "bias"):
            if f"{prefix}fc.{name}" in state:
                state[f"{prefix}line.{name}"] = state.pop(f"{prefix}fc.{name}")


class Logarithm(nn.Module):
    """From version 2 on it keeps a logarithm."""

    _version = 2

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(2))

    def _load_from_state_dict(self, state, prefix, metadata, *others):
        if metadata.get("version", 1) < 2:
            state[prefix + "scale"] = state[prefix + "scale"].log()
        super()._load_from_state_dict(state, prefix, metadata, *others)


class Holds(nn.Module):
    """What the cases about one module each are loaded into."""

    def __init__(self, kind):
        super().__init__()
        self.part = KINDS[kind]()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(4, 2)
        self.out = nn.Linear(2, 4, bias=False)
        self.out.weight = self.embed.weight


class Scalar(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))


class Counts(nn.Module):
    """Has a state beside its tensors."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def get_extra_state(self):
        return {"calls": self.calls}

    def set_extra_state(self, state):
        self.calls = state["calls"]


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))


KINDS = {
    "weight norm": lambda: weight_norm(nn.Linear(2, 1)),
    "lazy": lambda: nn.LazyLinear(1),
    "logarithm": Logarithm,
    "tied": Tied,
    "scalar": Scalar,
    "counts": Counts,
    "masked": Masked,
    "renamed": Renamed,
}
NET = f"{__name__}:Net"


class Options(dict):
    """A dictionary of a training tool's own, with attributes."""


class Color(enum.Enum):
    RED = 1


class Wrapper(nn.Module):
    """The network is an attribute, beside what only training needs."""

    def __init__(self, net=None, width=3):
        super().__init__()
        self.net = net or Net(width)
        self.criterion = nn.CrossEntropyLoss(weight=torch.ones(2))


class FromFolder(Net):
    @classmethod
    def from_pretrained(cls, folder, **options):
        return cls(**json.loads((Path(folder) / "config.json").read_text()), **options)


def make_net(width=3):
    return Net(width)


@pytest.fixture
def state():
    torch.manual_seed(0)
    net = Net()
    net.norm.running_mean.normal_()
    return net.state_dict()


def prefixed(prefix, state):
    return {f"{prefix}{name}": value for name, value in state.items()}


def loaded(content, path, model=NET, **options):
    torch.save(content, path / "a.pt")
    return load_checkpoint(path / "a.pt", model=model, **options)


def part(kind, content, path):
    return loaded(content, path, f"{__name__}:Holds", model_kwargs={"kind": kind})


def is_loaded(found, state):
    return all(torch.equal(value, state[name]) for name, value in found.model.state_dict().items())


@pytest.mark.parametrize(
    ("wrap", "label"),
    [
        (lambda s: prefixed("module.", s), "."),
        (
            lambda s: {"model_state_dict": prefixed("module._orig_mod.", s), "epoch": 1},
            "model_state_dict",
        ),
        (lambda s: {"state_dict": prefixed("model._orig_mod.", s)}, "state_dict.model"),
        (lambda s: {"state_dict": prefixed("backbone.net.", s)}, "state_dict.backbone.net"),
        (lambda s: prefixed("_fsdp_wrapped_module.", s), "."),
        (
            lambda s: {
                n.replace("conv.", "conv._checkpoint_wrapped_module."): v for n, v in s.items()
            },
            ".",
        ),
        (lambda s: {"n_averaged": torch.tensor(3), **prefixed("module.", s)}, "."),
        (lambda s: {"epoch": torch.tensor(3), **s}, "."),
        (
            lambda s: {
                "net": s,
                "acc": 93.1,
                "optimizer": {"state": {0: {"exp_avg": s["conv.bias"]}}},
            },
            "net",
        ),
        (lambda s: {"runs": {"best": {"params": s}}}, "runs.best.params"),
        (lambda s: [s, 3], "0"),
        (lambda s: {"folds": {7: s, 8: {}}}, "folds.7"),
        (lambda s: {"opt": {"param_groups": [], "state": {"a": s}}, "net": s}, "net"),
        (lambda s: {"generator": s, "discriminator": {"conv.weight": torch.ones(9)}}, "generator"),
        (
            lambda s: {"state_dict": {**prefixed("model.", s), "criterion.weight": torch.ones(2)}},
            "state_dict.model",
        ),
        (lambda s: {n: nn.Parameter(v) if v.is_floating_point() else v for n, v in s.items()}, "."),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_the_reading_that_fits_is_found(state, tmp_path, wrap, label, protocol):
    torch.save(wrap(state), tmp_path / "a.pt", pickle_protocol=protocol)
    found = load_checkpoint(tmp_path / "a.pt", model=NET)
    assert found.weights == label
    assert is_loaded(found, state)


@pytest.mark.parametrize(
    ("wrap", "labels"),
    [
        (lambda s, e: {"state_dict": s, "state_dict_ema": e}, ["state_dict", "state_dict_ema"]),
        (lambda s, e: {"model": s, "ema": prefixed("module.", e)}, ["model", "ema"]),
        (lambda s, e: {**prefixed("G.", s), **prefixed("D.", e)}, ["G", "D"]),
        (lambda s, e: {**s, **prefixed("teacher.", e)}, [".", "teacher"]),
        (lambda s, e: {"net": {**s, **prefixed("best.", e)}}, ["net", "net.best"]),
        (
            lambda s, e: {**prefixed("module.", s), **prefixed("module.module.", e)},
            ["module", "module.module"],
        ),
        (
            lambda s, e: {**prefixed("net.module.", s), **prefixed("net._orig_mod.", e)},
            ["net.module", "net._orig_mod"],
        ),
        (
            lambda s, e: {
                **prefixed("net.", s),
                **{n: v for n, v in prefixed("ema_net.", e).items() if "num_" not in n},
            },
            ["net", "ema_net"],
        ),
    ],
)
def test_several_that_fit_are_a_question(state, tmp_path, wrap, labels):
    other = {name: value * 2 for name, value in state.items()}
    with pytest.raises(CheckpointError, match="several sets of weights") as caught:
        loaded(wrap(state, other), tmp_path)
    assert [line.split(":")[0] for line in str(caught.value).split("\n  - ")[1:]] == [
        f"--weights {label}" for label in labels
    ]
    for label, wanted in zip(labels, (state, other), strict=True):
        found = load_checkpoint(tmp_path / "a.pt", model=NET, weights=label)
        assert found.weights == label
        assert is_loaded(found, {**state, **wanted})
    with pytest.raises(CheckpointError, match=f"no weights 'other'; it holds {labels[0]}, "):
        load_checkpoint(tmp_path / "a.pt", model=NET, weights="other")


@pytest.mark.parametrize(
    ("wrap", "labels"),
    [
        (lambda one, other: {"a.b": one, "a": {"b": other}}, ("a.b", "a/b")),
        (
            lambda one, other: {"a": {**{f"b.{n}": v for n, v in one.items()}, "b": other}},
            ("a:b", "a/b"),
        ),
    ],
)
def test_each_of_two_with_one_label_can_be_chosen(tmp_path, wrap, labels):
    one, other = Net().state_dict(), Net().state_dict()
    torch.save(wrap(one, other), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="choose one") as caught:
        load_checkpoint(tmp_path / "a.pt", model=NET)
    for label, meant in zip(labels, (one, other), strict=True):
        assert f"--weights {label}:" in str(caught.value)
        loaded = load_checkpoint(tmp_path / "a.pt", model=NET, weights=label)
        assert torch.equal(loaded.model.conv.weight, meant["conv.weight"])


def test_the_same_saved_twice_is_no_question(state, tmp_path):
    found = loaded({"model": state, "net": {n: v.clone() for n, v in state.items()}}, tmp_path)
    assert is_loaded(found, state)
    with pytest.raises(CheckpointError, match="several sets of weights"):
        loaded({"model": state, "ema": prefixed("module.", state)}, tmp_path)


def test_averages_that_are_the_weights_themselves_are_a_question(state, tmp_path):
    # As Lightning's own averaging leaves them: which of both is averaged, the names don't say.
    content = {"state_dict": state, "current_model_state": dict(state), "averaging_state": {}}
    with pytest.raises(CheckpointError, match="--weights current_model_state"):
        loaded(content, tmp_path)


def test_averages_of_a_callback_are_a_question(state, tmp_path):
    average = {"EMA": {"ema_state_dict": {n: v * 2 for n, v in state.items()}}}
    with pytest.raises(CheckpointError, match=r"--weights callbacks\.EMA\.ema_state_dict"):
        loaded({"state_dict": state, "callbacks": average}, tmp_path)


class Turned(nn.Linear):
    """Turns the weights of a layout before its own."""

    def __init__(self):
        super().__init__(3, 24)

    def _load_from_state_dict(self, state_dict, prefix, *others):
        name = f"{prefix}weight"
        if state_dict[name].shape == (3, 24):
            state_dict[name] = state_dict[name].T
        super()._load_from_state_dict(state_dict, prefix, *others)


def test_what_a_module_turns_while_loading_is_not_judged_before(tmp_path):
    state = nn.Linear(3, 24).state_dict()
    torch.save(state | {"weight": state["weight"].T.clone()}, tmp_path / "a.pt")
    found = load_checkpoint(tmp_path / "a.pt", model=f"{__name__}:Turned")
    assert is_loaded(found, state)


@pytest.mark.parametrize("names", [True, False])
def test_averages_that_can_not_be_taken_are_a_question_too(state, tmp_path, names):
    shadow = {n: v for n, v in state.items() if "num" not in n and "running" not in n}
    ema = {"decay": 0.9, "shadow": shadow if names else [*shadow.values()]}
    with pytest.raises(CheckpointError, match=r"ema\.shadow: averages of weights"):
        loaded({"model": state, "ema": ema}, tmp_path)
    assert load_checkpoint(tmp_path / "a.pt", model=NET, weights="model").weights == "model"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s, e: {
            **prefixed("model.", s),
            **{"model_ema." + n.replace(".", ""): v for n, v in e.items()},
            "model_ema.decay": torch.tensor(0.9),
        },
        lambda s, e: {**s, **{"ema." + n.replace(".", ""): v for n, v in e.items()}},
        lambda s, e: {"state_dict": s, "callbacks": {"EMA": {"ema_weights": [*e.values()]}}},
        lambda s, e: {"state_dict": s, "optimizer_states": [{"ema": tuple(e.values())}]},
        lambda s, e: {"net": s, "avg_model": {n.replace(".", "_"): v for n, v in e.items()}},
        lambda s, e: {"net": s, "ModelEMA": [*e.values()]},
    ],
)
def test_averages_are_a_question_wherever_they_are(state, tmp_path, wrap):
    average = {n: v * 2 for n, v in state.items() if "num" not in n and "running" not in n}
    with pytest.raises(
        CheckpointError, match="averages of weights under names that do not fit"
    ) as e:
        loaded(wrap(state, average), tmp_path)
    label = str(e.value).split("--weights ")[2].split(":")[0]
    assert is_loaded(load_checkpoint(tmp_path / "a.pt", model=NET, weights=label), state)


def test_what_an_optimizer_averages_is_no_question(state, tmp_path):
    moments = {f"exp_avg.{n}": v for n, v in state.items()} | {"square_avg": torch.ones(2)}
    assert loaded({"net": state, "moments": moments}, tmp_path, NET).weights == "net"


def test_a_pickled_network_beside_its_weights_is_a_question(state, tmp_path):
    content = {"state_dict": prefixed("net.", state), "hyper_parameters": {"net": Net()}}
    with pytest.raises(CheckpointError, match=r"in a pickled .*\.Net, not taken"):
        loaded(content, tmp_path)
    found = load_checkpoint(tmp_path / "a.pt", model=NET, weights="state_dict.net")
    assert is_loaded(found, state)
    with pytest.raises(CheckpointError, match=r"\['hyper_parameters'\]\['net'\]\n"):
        load_checkpoint(tmp_path / "a.pt", model=NET, weights="hyper_parameters.net")


def test_what_is_not_loaded_is_said_and_harms_nothing(state, tmp_path):
    beside = {
        "args": argparse.Namespace(lr=0.1),
        "cfg": Options(color=Color.RED),
        "best": np.float64(0.9),
        "rng": np.random.default_rng(0).bit_generator.state,
        "stats": defaultdict(list, {"loss": [1.0]}),
        "steps": Counter({10**12: 1}),
        "last": deque([1], 3),
        "shape": torch.Size([1, 10**9]),
        "seed": 2**63,
        "queue": torch.zeros(1).expand(10**12),
    }
    found = loaded({"model": state, **beside}, tmp_path)
    assert is_loaded(found, state)
    names = [note.split(": ")[1].split(",")[0] for note in found.notes]
    assert names == ["args", "cfg", "cfg.color", "last"]


@pytest.mark.parametrize(
    ("kind", "content", "note"),
    [
        (
            "weight norm",
            {"weight_g": torch.ones(1, 1), "weight_v": torch.ones(1, 2), "bias": torch.ones(1)},
            "migrated by its modules: part.weight_g, part.weight_v became part.parametrizations",
        ),
        ("lazy", nn.Linear(5, 1).state_dict(), "as large as in the file: part.weight"),
        ("tied", {"embed.weight": torch.ones(4, 2)}, "tied to another weight, which is there"),
        ("scalar", {"scale": torch.ones(1)}, "taken as a scalar: part.scale"),
        ("renamed", {"fc.weight": torch.ones(1, 2), "fc.bias": torch.ones(1)}, "part.line.weight"),
        ("masked", Masked().state_dict(), ""),
        ("counts", {"_extra_state": {"calls": 7}}, ""),
    ],
)
@pytest.mark.parametrize("prefix", ["", "model."])
def test_what_pytorch_migrates_is_migrated_and_said(tmp_path, kind, content, note, prefix):
    own = prefixed("part.", content)
    expected = Holds(kind)
    expected.load_state_dict(dict(own), strict=kind != "tied")
    beside = (
        {} if any(torch.is_tensor(value) for value in own.values()) else {"epoch": torch.ones(1)}
    )
    found = part(kind, {"state_dict": prefixed(prefix, own) | beside}, tmp_path)
    assert note in "\n".join(found.notes)
    for name, value in expected.state_dict().items():
        assert str(found.model.state_dict()[name]) == str(value)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_versions_of_modules_survive(tmp_path, version, prefix):
    content = OrderedDict({f"{prefix}part.scale": torch.full((2,), 2.0)})
    content._metadata = OrderedDict({"": {"version": 1}, f"{prefix}part": {"version": version}})
    found = part("logarithm", {"state_dict": content}, tmp_path)
    assert found.model.part.scale[0].item() == pytest.approx(np.log(2) if version == 1 else 2)
    assert ("Logarithm part: version 1 loaded into version 2" in found.notes) == (version == 1)


def test_a_mask_with_other_infinities_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"NaN or Inf: part\.mask, 3 of 4 elements"):
        part("masked", {"part.mask": torch.full((2, 2), -torch.inf).tril()}, tmp_path)


def test_a_missing_counter_of_batches_and_left_over_positions_are_no_fault(state, tmp_path):
    del state["norm.num_batches_tracked"]
    state["embeddings.position_ids"] = torch.arange(3)
    notes = loaded(dict(state), tmp_path).notes
    assert notes[0] == "left aside, no part of the model: embeddings.position_ids"
    assert "num_batches_tracked" in notes[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_conversions_are_said(state, tmp_path, dtype):
    content = {n: v.to(dtype) if v.is_floating_point() else v for n, v in state.items()}
    found = loaded(content, tmp_path)
    assert found.notes == (f"6 tensors converted from {str(dtype)[6:]} to float32",)


def test_shards_are_one_checkpoint_and_become_one_file(state, tmp_path):
    names = sorted(state)
    for number, part_of in enumerate((names[:3], names[3:]), 1):
        file = tmp_path / f"model-0000{number}-of-00002.safetensors"
        save_file({name: state[name] for name in part_of}, file)
    found = load_checkpoint(tmp_path, model=NET)
    assert is_loaded(found, state)
    (tmp_path / "run").mkdir()
    (tmp_path / "config.json").write_text('{"width": 3}')
    single = single_file(tmp_path, tmp_path / "run")
    assert is_loaded(load_checkpoint(single, model=f"{__name__}:FromFolder.from_pretrained"), state)
    assert is_loaded(load_checkpoint(single, model=NET), state)
    assert single_file(single, tmp_path) == single


def test_integers_that_count_nothing_are_not_left_aside(state, tmp_path):
    with pytest.raises(CheckpointError, match="unexpected: order"):
        loaded({**state, "order": torch.tensor([1, 0])}, tmp_path)


def test_tied_weights_with_two_values_are_refused(tmp_path):
    content = {"embed.weight": torch.zeros(4, 2), "out.weight": torch.ones(4, 2)}
    with pytest.raises(CheckpointError, match="tied in the model, but different in the file"):
        loaded(content, tmp_path, f"{__name__}:Tied")


def test_lazy_weights_are_finite(tmp_path):
    content = {"part.weight": torch.full((1, 3), float("nan")), "part.bias": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"NaN or Inf: part\.weight"):
        part("lazy", content, tmp_path)


def test_a_pickled_network_may_lack_a_part(state, tmp_path):
    network = Net()
    network.norm = None
    found = loaded({"state_dict": state, "small": network}, tmp_path)
    assert found.weights == "state_dict"


def test_shards_of_nested_weights_do_not_become_one_file(tmp_path):
    for number, key in enumerate("ab", 1):
        path = tmp_path / f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({key: {"weight": torch.ones(1)}}, path)
    with pytest.raises(CheckpointError, match="can't become one file"):
        single_file(tmp_path, tmp_path)


def test_a_name_in_two_shards_is_refused(state, tmp_path):
    for number, shard in enumerate((state, {"norm.bias": torch.ones(3)}), 1):
        save_file(shard, tmp_path / f"model-0000{number}-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"00002-of-00002.safetensors has norm\.bias"):
        load_checkpoint(tmp_path, model=NET)


def test_of_a_folder_with_several_models_one_must_be_named(state, tmp_path):
    save_file(state, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert is_loaded(load_checkpoint(tmp_path, model=NET), state)
    torch.save({**state, "norm.bias": torch.ones(3)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"model\.safetensors, pytorch_model\.bin differ"):
        load_checkpoint(tmp_path, model=NET)
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "model_ema.bin")
    with pytest.raises(CheckpointError, match=r"with model\.safetensors and model_ema\.bin"):
        load_checkpoint(tmp_path, model=NET)
    assert is_loaded(load_checkpoint(tmp_path / "model.safetensors", model=NET), state)


def test_tied_weights_of_safetensors_are_found(tmp_path):
    model = Holds("tied")
    save_model(model, tmp_path / "a.safetensors")
    found = load_checkpoint(
        tmp_path / "a.safetensors", model=f"{__name__}:Holds", model_kwargs={"kind": "tied"}
    )
    assert torch.equal(found.model.part.out.weight, model.part.embed.weight)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_parts_of_a_distributed_checkpoint_are_put_together(state, tmp_path):
    import torch.distributed.checkpoint as dcp

    dcp.save(prefixed("model.", state) | {"epoch": 3}, checkpoint_id=tmp_path / "a", no_dist=True)
    found = load_checkpoint(tmp_path / "a", model=NET)
    assert found.weights == "model"
    assert is_loaded(found, state)


def test_a_scalar_that_may_belong_to_the_model_is_not_left_aside(state, tmp_path):
    with pytest.raises(CheckpointError, match=r"unexpected: logit_scale"):
        loaded({**state, "logit_scale": torch.tensor(2.5)}, tmp_path)


@pytest.mark.parametrize("model", ["Wrapper", "Wrapper.load_from_checkpoint"])
def test_a_network_inside_the_model_is_taken(state, tmp_path, model):
    content = {"state_dict": prefixed("net.", state), "hyper_parameters": {"width": 3}}
    found = loaded(content, tmp_path, f"{__name__}:{model}", submodule="net")
    assert isinstance(found.model, Net)
    assert (found.weights, found.submodule) == ("state_dict.net", "net")
    with pytest.raises(ParameterError, match=r"no submodule 'nets'; it has net, criterion"):
        load_checkpoint(tmp_path / "a.pt", model=f"{__name__}:Wrapper", submodule="nets")


def test_a_function_makes_a_model_as_well(state, tmp_path):
    found = loaded({"model": state, "hparams": {"width": 3}}, tmp_path, f"{__name__}:make_net")
    assert found.model_kwargs == {"width": 3}


@pytest.mark.parametrize("name", ["", "model.safetensors"])
def test_a_folder_with_a_configuration_makes_its_model(tmp_path, name):
    (tmp_path / "config.json").write_text('{"width": 5}')
    state = Net(5).state_dict()
    save_file(state, tmp_path / "model.safetensors")
    model = f"{__name__}:FromFolder.from_pretrained"
    assert is_loaded(load_checkpoint(tmp_path / name, model=model), state)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.Size([2, 3]), torch.Size([2, 3])),
        (torch.device("cuda", 1), torch.device("cpu")),
        ("cuda:0", "cpu"),
        (torch.float16, torch.float16),
        ({"a", "b"}, {"a", "b"}),
        (b"abc", b"abc"),
        (1 + 2j, 1 + 2j),
        (np.int64(7), 7),
        ({0: (1, [float("inf")])}, {0: (1, [float("inf")])}),
    ],
)
def test_plain_arguments_of_all_kinds_arrive(tmp_path, value, expected):
    content = {"state_dict": {"line.weight": torch.ones(1)}, "hyper_parameters": {"option": value}}
    with pytest.raises(ParameterError, match="option is") as caught:
        loaded(content, tmp_path, f"{__name__}:Tells")
    assert caught.value.__cause__.args[1] == expected


class Tells(nn.Module):
    def __init__(self, option):
        super().__init__()
        raise ValueError("option is", option)


def test_an_argument_that_is_not_loaded_is_asked_for(state, tmp_path):
    content = {"state_dict": state, "hyper_parameters": {"option": argparse.Namespace(a=1)}}
    with pytest.raises(ParameterError, match=r"has a argparse\.Namespace there, which is not"):
        loaded(content, tmp_path, f"{__name__}:Tells")


def test_plain_content_comes_back_whole(state, tmp_path):
    content = {"state_dict": state, "list": [1, {"a": (2.5, None)}]}
    torch.save(content, tmp_path / "a.pt")
    found = read_plain(tmp_path / "a.pt")
    assert found["list"] == content["list"]
    assert found["state_dict"]._metadata == state._metadata
    torch.save(content | {"args": argparse.Namespace()}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"it holds argparse\.Namespace, and only tensors"):
        read_plain(tmp_path / "a.pt")
