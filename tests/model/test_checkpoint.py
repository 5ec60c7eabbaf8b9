import hashlib
import os
import pathlib
import pickle
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from heimdall_onnx.common.errors import CheckpointError, ParameterError
from heimdall_onnx.model.checkpoint import load_checkpoint
from heimdall_onnx.model.construction import import_model


class Small(nn.Module):
    """A model of another package: required and optional arguments, a buffer, no signature."""

    def __init__(self, width, *, pretrained=True, dropout=0.1):
        super().__init__()
        if pretrained:
            raise RuntimeError("would download")
        if width < 0:
            raise ValueError("width must not be negative")
        self.width, self.dropout = width, dropout
        self.line = nn.Linear(3, width)
        self.norm = nn.BatchNorm1d(width)


class Wrapped(nn.Module):
    """Its own names begin with ``model.``, like Lightning's prefix."""

    def __init__(self):
        super().__init__()
        self.model = nn.Linear(2, 2)


class TakesAnything(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options
        self.line = nn.Linear(1, 1)


class NotAModel:
    pass


SMALL = f"{__name__}:Small"
HYPER = {"width": 4, "dropout": 0.25, "pretrained": True, "learning_rate": 1e-3}


@pytest.fixture
def state():
    torch.manual_seed(0)
    return Small(4, pretrained=False).state_dict()


def prefixed(state):
    return {f"model.{name}": value for name, value in state.items()}


def save_lightning(state, path):
    torch.save({"state_dict": prefixed(state), "hyper_parameters": HYPER, "epoch": 3}, path)


def save_unprefixed(state, path):
    torch.save({"state_dict": state, "hyper_parameters": HYPER}, path)


def save_model_state_dict(state, path):
    torch.save({"model_state_dict": state, "epoch": 3, "optimizer": {"lr": 0.1}}, path)


def save_legacy(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)


LAYOUTS = [
    (save_lightning, "state_dict.model"),
    (save_unprefixed, "state_dict"),
    (save_model_state_dict, "model_state_dict"),
    (torch.save, "."),
    (save_legacy, "."),
    (save_file, "."),
]


@pytest.mark.parametrize(("save", "weights"), LAYOUTS)
@pytest.mark.parametrize("name", ["weights.ckpt", "weights.safetensors"])
def test_layout_is_told_by_content(state, tmp_path, save, weights, name):
    path = tmp_path / name
    save(state, path)
    loaded = load_checkpoint(path, model=SMALL, model_kwargs={"width": 4})
    assert loaded.weights == weights
    assert all(torch.equal(v, state[n]) for n, v in loaded.model.state_dict().items())
    assert not any(module.training for module in loaded.model.modules())
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (loaded.path, loaded.model_spec) == (path, SMALL)


def test_hyper_parameters_become_arguments_where_the_constructor_has_them(state, tmp_path):
    save_lightning(state, tmp_path / "a.ckpt")
    loaded = load_checkpoint(tmp_path / "a.ckpt", model=SMALL)
    assert loaded.model_kwargs == {"width": 4, "dropout": 0.25, "pretrained": False}
    assert loaded.hyper_parameters == HYPER
    assert loaded.model.dropout == 0.25
    assert f"hyper-parameters that {SMALL} does not take: learning_rate" in loaded.notes


def test_hyper_parameter_that_nobody_takes_is_not_copied(state, tmp_path):
    hyper = {"width": 4, "mean": torch.zeros(1)}
    torch.save({"state_dict": state, "hparams": hyper}, tmp_path / "a.pt")
    loaded = load_checkpoint(tmp_path / "a.pt", model=SMALL)
    assert loaded.hyper_parameters == {"width": 4}
    assert f"hyper-parameters that {SMALL} does not take: mean" in loaded.notes


@pytest.mark.parametrize(
    "value", [7, [{"file": name, "sha256": "0" * 64} for name in ("a.pt", "b.pt")]]
)
def test_only_an_ensemble_s_checkpoint_says_what_it_was_made_of(value, state, tmp_path):
    hyper = HYPER | {"member_checkpoints": value}
    torch.save({"state_dict": state, "hyper_parameters": hyper}, tmp_path / "a.ckpt")
    loaded = load_checkpoint(tmp_path / "a.ckpt", model=SMALL)
    assert loaded.members == ()
    assert loaded.hyper_parameters == hyper


def test_given_arguments_win_over_hyper_parameters(state, tmp_path):
    save_lightning(state, tmp_path / "a.ckpt")
    loaded = load_checkpoint(tmp_path / "a.ckpt", model=SMALL, model_kwargs={"dropout": 0.5})
    assert loaded.model.dropout == 0.5


@pytest.mark.parametrize("pretrained", [True, "weights.pth", False])
def test_pretrained_weights_are_never_fetched(state, tmp_path, pretrained):
    torch.save(state, tmp_path / "a.pt")
    kwargs = {"width": 4, "pretrained": pretrained}
    loaded = load_checkpoint(tmp_path / "a.pt", model=SMALL, model_kwargs=kwargs)
    assert loaded.model_kwargs["pretrained"] is False


def test_reference_model_is_built_as_its_checkpoint_says(tmp_path):
    model_kwargs = {"backbone_size": "tiny", "uncertainty_max": 2.0}
    with torch.device("meta"):
        shapes = import_model("heimdall_onnx:LocalizationNet")(**model_kwargs).state_dict()
    state = {name: torch.zeros(v.shape, dtype=v.dtype) for name, v in shapes.items()}
    torch.save(
        {"state_dict": prefixed(state), "hyper_parameters": model_kwargs}, tmp_path / "a.ckpt"
    )
    loaded = load_checkpoint(tmp_path / "a.ckpt", model="heimdall_onnx:LocalizationNet")
    assert loaded.model.backbone_size == "tiny"
    assert loaded.signature.outputs[1].range == (0.01, 2.0)


def test_own_names_with_lightnings_prefix_are_kept(tmp_path):
    torch.save(Wrapped().state_dict(), tmp_path / "a.pt")
    assert load_checkpoint(tmp_path / "a.pt", model=f"{__name__}:Wrapped").weights == "."


def test_constructor_with_open_arguments_takes_all_of_them(tmp_path):
    state = prefixed(TakesAnything().state_dict())
    torch.save(
        {"state_dict": state, "hyper_parameters": {"lr": 1, "pretrained": True}},
        tmp_path / "a.ckpt",
    )
    loaded = load_checkpoint(
        tmp_path / "a.ckpt", model=f"{__name__}:TakesAnything", model_kwargs={"any": 1}
    )
    assert loaded.model.options == {"lr": 1, "any": 1, "pretrained": False}
    fewer = {"lr": None, "other": None}
    loaded = load_checkpoint(
        tmp_path / "a.ckpt", model=f"{__name__}:TakesAnything", model_kwargs=fewer
    )
    assert loaded.model.options == {"other": None, "pretrained": False}


def test_every_unfit_weight_is_named_once(state, tmp_path):
    del state["norm.bias"]
    state["head.weight"] = torch.ones(1)
    state["line.weight"] = torch.ones(4, 5)
    state["line.bias"] = torch.tensor([1.0, float("nan"), float("inf"), 0.0])
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "a.pt", model=SMALL, model_kwargs={"width": 4})
    assert sorted(str(caught.value).split("\n  - ")[1:]) == [
        "NaN or Inf: line.bias, 2 of 4 elements",
        "missing: norm.bias",
        "unexpected: head.weight",
        "wrong shape: line.weight is (4, 5), the model's is (4, 3)",
    ]
    assert "4 problems" in str(caught.value)


def test_prefixed_and_bare_name_of_one_weight_are_not_merged(state, tmp_path):
    torch.save(state | {"model.line.bias": torch.zeros(4)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"1 problem:\n  - unexpected: model\.line\.bias"):
        load_checkpoint(tmp_path / "a.pt", model=SMALL, model_kwargs={"width": 4})


class Explodes:
    def __reduce__(self):
        return os.mkdir, (str(pathlib.Path(os.environ["PROOF"])),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_pickled_code_is_named_and_not_run(state, tmp_path, monkeypatch, zipped, protocol):
    proof = tmp_path / "executed"
    monkeypatch.setenv("PROOF", str(proof))
    path, content = tmp_path / "evil.ckpt", {"state_dict": state, "x": Explodes()}
    if protocol == 0:  # too old for PyTorch, but not for an attack
        path.write_bytes(pickle.dumps(content["x"], 0))
    else:
        torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"holds posix\.mkdir, which no training leaves"):
        load_checkpoint(path, model=SMALL, model_kwargs={"width": 4})
    assert not proof.exists()


def test_width_that_the_file_records_takes_no_memory(tmp_path):
    state = Small(4, pretrained=False).state_dict()
    hyper = {"width": 10**11}  # 1.2 TB of weights
    torch.save({"state_dict": state, "hyper_parameters": hyper}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"wrong shape: line.weight is .*100000000000, 3"):
        load_checkpoint(tmp_path / "a.ckpt", model=SMALL)


@pytest.mark.parametrize("width", ["wide", -1])
def test_argument_that_the_file_records_is_named_with_it(tmp_path, width):
    hyper = {"width": width}
    torch.save({"state_dict": {"a": torch.ones(1)}, "hyper_parameters": hyper}, tmp_path / "a.ckpt")
    with pytest.raises(ParameterError, match=rf"of which {tmp_path}/a\.ckpt records width: "):
        load_checkpoint(tmp_path / "a.ckpt", model=SMALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.to(torch.float64) * 1e300, "NaN or Inf: line.weight, 12 of 12"),
        (
            lambda t: t.to(torch.complex64),
            "wrong type: line.weight is torch.complex64, the model's is torch.float32",
        ),
        (
            lambda t: t.to(torch.int8),
            "wrong type: line.weight is torch.int8, the model's is torch.float32",
        ),
        (lambda t: t.to_sparse(), "missing: line.weight .*_rebuild_sparse_tensor there"),
        (lambda t: t.to("meta"), "missing: line.weight .*_rebuild_meta_tensor_no_storage there"),
        (
            lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
            "missing: line.weight .*_rebuild_qtensor there|type that is not read here",
        ),
        (lambda t: t[:1, :1].expand(10**6, 10**6), "line.weight: it claims 1,000,000,000,000"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*[Qq]uantiz")
def test_weight_that_would_not_arrive_as_it_is_is_refused(tmp_path, change, message):
    state = Small(4, pretrained=False).state_dict()
    state["line.weight"] = change(torch.ones(4, 3))
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "a.pt", model=SMALL, model_kwargs={"width": 4})


def test_weight_in_a_small_precision_is_read(state, tmp_path):
    small = {name: v.to(torch.float8_e5m2) if v.ndim == 2 else v for name, v in state.items()}
    save_file(small, tmp_path / "a.safetensors")
    loaded = load_checkpoint(tmp_path / "a.safetensors", model=SMALL, model_kwargs={"width": 4})
    assert loaded.model.line.weight.dtype == torch.float32


def test_names_in_a_message_are_visible(state, tmp_path):
    torch.save(state | {"\x1b[2J\nhead": torch.ones(2)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"\n  - unexpected: \\x1b\[2J head$"):
        load_checkpoint(tmp_path / "a.pt", model=SMALL, model_kwargs={"width": 4})


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("Small", "must look like 'package.module:Class', found 'Small'"),
        (":Small", "must look like"),
        (f"{__name__}:Smal", "has no 'Smal'. Did you mean 'Small'"),
        (f"{__name__}:NotAModel", "must be a subclass of torch.nn.Module"),
        (f"{__name__}:SMALL", "must be a subclass of torch.nn.Module or a function"),
        (f"{__name__}:Small.nothing", "has no 'Small.nothing'"),
        ("heimdall_onnx.localisation:X", "Did you mean 'localization'"),
        ("heimdal_onnx.x:X", "no module 'heimdal_onnx'. Did you mean 'heimdall_onnx'"),
    ],
)
def test_bad_import_string_names_the_nearest(model, message):
    with pytest.raises(ParameterError, match=message):
        import_model(model)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import no_such_package_x", "needs no_such_package_x, which is not installed"),
        ("1 / 0", "can't be imported: ZeroDivisionError"),
    ],
)
def test_module_that_fails_to_import_is_a_parameter_error(tmp_path, monkeypatch, source, message):
    (tmp_path / "failing_model_module.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ParameterError, match=message):
        import_model("failing_model_module:X")
    assert "failing_model_module" not in sys.modules


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"widht": 4}, "no parameter 'widht'. Did you mean 'width'"),
        ({"widht": 4}, "parameter 'width' is required"),
        ({"width": -1}, "ValueError: width must not be negative"),
        ({"width": "wide"}, "can't build .*:Small with width=wide.*TypeError"),
    ],
)
def test_unfit_arguments_are_a_parameter_error(state, tmp_path, kwargs, message):
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(ParameterError, match=message):
        load_checkpoint(tmp_path / "a.pt", model=SMALL, model_kwargs=kwargs)


def test_model_that_refuses_its_arguments_keeps_its_own_message(state, tmp_path):
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(ParameterError, match=r"^backbone_size must be one of"):
        load_checkpoint(
            tmp_path / "a.pt",
            model="heimdall_onnx:LocalizationNet",
            model_kwargs={"backbone_size": "tinny"},
        )


def test_model_in_a_file_is_found_with_what_lies_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "beside_the_file.py").write_text(
        "import torch\nBase = torch.nn.Identity\n"
    )
    (tmp_path / "nets" / "in_a_file.py").write_text(
        "from beside_the_file import Base\nclass Net(Base): pass\n"
    )
    assert import_model("nets/in_a_file.py:Net").__name__ == "Net"
    for missing in ("nets/missing_file.py:Net", "elsewhere/in_a_file.py:Net"):
        with pytest.raises(ParameterError, match="there is no such file"):
            import_model(missing)
    for other in ("other/in_a_file.py", "nets/json.py"):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).write_text("import torch\nclass Net(torch.nn.Linear): pass\n")
        with pytest.raises(ParameterError, match=r"another module .* rename the file"):
            import_model(f"{other}:Net")


class Renaming(nn.Module):
    """Reads its weights itself, under names that they had in an earlier version."""

    old = "linear"

    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(3, 2)

    @classmethod
    def from_pretrained(cls, folder):
        made = cls()
        saved = torch.load(f"{folder}/pytorch_model.bin")
        renamed = {name.replace(cls.old, "dense"): value for name, value in saved.items()}
        made.load_state_dict(renamed, strict=False)
        return made


@pytest.mark.parametrize(("old", "fits"), [("linear", True), ("layer", False)])
def test_weights_that_a_model_reads_under_other_names_are_those_of_the_file(
    tmp_path, monkeypatch, old, fits
):
    monkeypatch.setattr(Renaming, "old", old)
    state = {"linear.weight": torch.randn(2, 3), "linear.bias": torch.randn(2)}
    torch.save(state, tmp_path / "pytorch_model.bin")
    if not fits:  # some are as the constructor has left them
        with pytest.raises(CheckpointError, match=r"missing: dense\.weight"):
            load_checkpoint(tmp_path, model=f"{__name__}:Renaming.from_pretrained")
        return
    loaded = load_checkpoint(tmp_path, model=f"{__name__}:Renaming.from_pretrained")
    assert torch.equal(loaded.model.dense.weight, state["linear.weight"])
    with pytest.raises(
        CheckpointError, match=r"'ema' can't be chosen: from_pretrained has read \."
    ):
        load_checkpoint(tmp_path, model=f"{__name__}:Renaming.from_pretrained", weights="ema")
    assert loaded.notes == ("read by from_pretrained, which gives weights other names",)
