"""Checkpoints as training tools leave them, and files that are none."""

from __future__ import annotations

import argparse
import collections
import copy
import datetime
import decimal
import enum
import functools
import gzip
import json
import lzma
import pathlib
import pickle
import random
import tarfile
import types
import typing
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import nets
from .case import Case, Should, State, foreign, saved
from .nets import WORLD as W
from .nets import scaled, state_of, under

NET = f"{nets.__name__}:Net"


def _net(
    name: str,
    should: Should,
    write: Callable[[Path], Path | str],
    right: Callable[[], list[State]] = lambda: [W.state],
    **more: Any,
) -> Case:
    return Case(name, should, write, more.pop("model", NET), right, **more)


def _of(
    name: str, network: type, make: Callable[[dict[str, Tensor]], Any], *arguments: Any, **more: Any
) -> Case:
    """A checkpoint of another network: ``make`` turns its state into what is saved."""
    should = more.pop("should", "release")
    state = functools.partial(state_of, network, *arguments)
    return Case(
        name,
        should,
        saved(lambda: make(state())),
        f"{nets.__name__}:{network.__name__}",
        more.pop("right", lambda: [make(state())]),
        **more,
    )


def prefixes() -> Iterator[Case]:
    """What wrappers put before or into the names of the weights."""

    def inside(infix: str, at: str) -> dict[str, Tensor]:
        return {name.replace(at, at + infix, 1): value for name, value in W.state.items()}

    trees: dict[str, Callable[[], Any]] = {
        "plain state dict": lambda: W.state,
        "DataParallel": lambda: nn.DataParallel(W.net).state_dict(),
        "ImageNet script, DataParallel": lambda: {
            "epoch": 5,
            "arch": "net",
            "best_acc1": torch.tensor(70.5),
            "state_dict": under("module.", W.state),
            "optimizer": W.optimizer.state_dict(),
            "scheduler": {"last_epoch": 5, "_last_lr": [0.1]},
        },
        "compiled": lambda: {"model_state_dict": under("_orig_mod.", W.state), "epoch": 2},
        "compiled in DDP": lambda: {"model": under("module._orig_mod.", W.state)},
        "DDP in compiled": lambda: {"model": under("_orig_mod.module.", W.state)},
        "compiled part": lambda: inside("_orig_mod.", "body."),
        "Lightning, compiled": lambda: {
            "state_dict": under("model._orig_mod.", W.state),
            "pytorch-lightning_version": "2.5.0",
        },
        "AveragedModel": lambda: torch.optim.swa_utils.AveragedModel(W.net).state_dict(),
        "SyncBatchNorm": lambda: nn.SyncBatchNorm.convert_sync_batchnorm(
            copy.deepcopy(W.net)
        ).state_dict(),
        "FSDP": lambda: under("_fsdp_wrapped_module.", W.state),
        "activation checkpointing": lambda: inside("_checkpoint_wrapped_module.", "body."),
        "unusual prefix": lambda: {"weights": under("tagger.deep.network.", W.state)},
        "PEFT, merged": lambda: under("base_model.model.", W.state),
        "backbone and projector": lambda: {
            "state_dict": under("backbone.", W.state)
            | {"projector.0.weight": torch.randn(4, 4), "projector.0.bias": torch.randn(4)}
        },
        "loss with weights beside": lambda: {
            "state_dict": under("model.", W.state) | {"criterion.weight": torch.ones(3)}
        },
        "scalars beside weights": lambda: {
            **W.state,
            "epoch": torch.tensor(9),
            "global_step": torch.tensor([900]),
        },
    }
    for name, make in trees.items():
        yield _net(name, "release", saved(make))
    yield _net(
        "student and teacher",
        "ask",
        saved(lambda: under("student.", W.state) | under("teacher.", W.ema)),
        lambda: [W.state, W.ema],
    )
    yield _net(
        "query and key encoder",
        "ask",
        saved(
            lambda: {
                "state_dict": under("module.encoder_q.", W.state)
                | under("module.encoder_k.", W.ema)
                | {"module.queue": torch.randn(4, 9), "module.queue_ptr": torch.tensor([0])}
            }
        ),
        lambda: [W.state, W.ema],
    )


def readings() -> Iterator[Case]:
    """Where the weights are, and which of several."""
    release: dict[str, Callable[[], Any]] = {
        "key model": lambda: {"model": W.state, "optimizer": W.optimizer.state_dict(), "epoch": 3},
        "key net": lambda: {"net": W.state, "acc": 93.5, "epoch": 7},
        "key network": lambda: {"network": W.state, "config": {"width": 6, "names": ["a", "b"]}},
        "tutorial": lambda: {
            "epoch": 4,
            "model_state_dict": W.state,
            "optimizer_state_dict": W.optimizer.state_dict(),
            "loss": torch.tensor(0.4),
            "rng_state": torch.get_rng_state(),
        },
        "Composer": lambda: {
            "state": {
                "model": under("module.", W.state),
                "optimizers": {"AdamW": W.optimizer.state_dict()},
                "timestamp": {"epoch": 1},
            },
            "rng": [{"torch": torch.get_rng_state()}],
        },
        "three keys deep": lambda: {"checkpoint": {"best": {"weights": W.state}}},
        "mmengine meta": lambda: {"meta": {"epoch": 3, "seed": None}, "state_dict": W.state},
        "DeepSpeed's states": lambda: {
            "module": W.state,
            "buffer_names": [],
            "optimizer": None,
            "param_shapes": [collections.OrderedDict((n, v.shape) for n, v in W.state.items())],
            "ds_version": "0.15.1",
            "dp_world_size": 1,
        },
        "a list": lambda: [W.state, 12],
        "a tuple of state and step": lambda: ("v2", W.state, {"step": 3}),
        "saved twice, alike": lambda: {"model": W.state, "best_model": W.state},
        "moments by name": lambda: {
            "model": W.state,
            "optimizer": {"exp_avg": W.ema, "exp_avg_sq": scaled(W.state, 0.1)},
        },
        "parameters of a generator and its critic": lambda: {
            "generator": W.state,
            "discriminator": state_of(nets.Flat),
            "g_optimizer": {},
        },
        "views of one storage": _views,
        "fastai": lambda: {"model": W.state, "opt": W.optimizer.state_dict()},
        "a module of another kind beside": lambda: {
            "state_dict": W.state,
            "criterion": nn.CrossEntropyLoss(weight=torch.ones(3)),
        },
        "the module itself beside, alike": lambda: {"state_dict": W.state, "model": W.net},
    }
    for name, make in release.items():
        yield _net(name, "release", saved(make))
    yield _net("named parameters", "release", saved(_parameters), lambda: [_parameters()])
    swag = scaled(W.state, 0.5)
    ask: dict[str, tuple[Callable[[], Any], list[State]]] = {
        "timm, EMA": (
            lambda: {"epoch": 9, "arch": "net", "state_dict": W.state, "state_dict_ema": W.ema},
            [W.state, W.ema],
        ),
        "torchvision, EMA": (
            lambda: {"model": W.state, "model_ema": under("module.", W.ema), "epoch": 4},
            [W.state, W.ema],
        ),
        "mmengine, EMA": (
            lambda: {
                "state_dict": W.state,
                "ema_state_dict": {"steps": torch.tensor(5), **under("module.", W.ema)},
            },
            [W.state, W.ema],
        ),
        "BasicSR": (lambda: {"params": W.state, "params_ema": W.ema}, [W.state, W.ema]),
        "diffusion, EMA": (
            lambda: {
                "step": 100,
                "model": W.state,
                "ema": {
                    "initted": torch.tensor(True),
                    "step": torch.tensor(100),
                    **under("online_model.", W.state),
                    **under("ema_model.", W.ema),
                },
            },
            [W.state, W.ema],
        ),
        "Lightning, EMA of a callback": (
            lambda: {
                "state_dict": under("model.", W.state),
                "callbacks": {"EMA": {"ema_state_dict": under("model.", W.ema)}},
                "pytorch-lightning_version": "2.5.0",
            },
            [W.state, W.ema],
        ),
        "average without names": (
            lambda: {
                "model": W.state,
                "ema": {"decay": 0.99, "shadow_params": [p.data * 0.5 for p in W.net.parameters()]},
            },
            [W.state],
        ),
        "two known keys": (
            lambda: {"model_state_dict": W.state, "state_dict": W.ema},
            [W.state, W.ema],
        ),
        "last and best": (lambda: {"last": W.state, "best": W.ema}, [W.state, W.ema]),
        "folds": (lambda: {"folds": [W.state, W.ema, swag]}, [W.state, W.ema, swag]),
        "generators of two ways": (lambda: {"G_A": W.state, "G_B": W.ema}, [W.state, W.ema]),
        "SWA": (
            lambda: {
                "model": W.state,
                "swa_model": {"n_averaged": torch.tensor(4), **under("module.", W.ema)},
            },
            [W.state, W.ema],
        ),
    }
    for name, (make, right) in ask.items():
        yield _net(name, "ask", saved(make), lambda right=right: right)
    yield _net(
        "EMA chosen",
        "release",
        saved(ask["timm, EMA"][0]),
        lambda: [W.ema],
        options={"weights": "state_dict_ema"},
    )
    yield _net(
        "DINO",
        "ask",
        saved(
            lambda: {
                "student": under("module.backbone.", W.state)
                | {"module.head.last.weight": torch.randn(2, 2)},
                "teacher": under("backbone.", W.ema) | {"head.last.weight": torch.randn(2, 2)},
                "optimizer": W.optimizer.state_dict(),
            }
        ),
        lambda: [W.state, W.ema],
    )
    yield _net(
        "choice that there is not",
        "refuse",
        saved(lambda: {"model": W.state}),
        options={"weights": "modle"},
        says="model",
    )
    yield _net(
        "adapter only",
        "refuse",
        saved(lambda: {"base_model.model.head.lora_A.weight": torch.randn(2, 60)}),
        says="head|fit",
    )
    yield _net("optimizer only", "refuse", saved(lambda: W.optimizer.state_dict()))
    yield _net("no tensors", "refuse", saved(lambda: {"epoch": 3, "config": {}}), says="no weights")
    yield _net(
        "arrays of NumPy",
        "refuse",
        saved(lambda: {"model": {n: v.numpy() for n, v in W.state.items()}}),
        says="torch.load|numpy",
    )


def _parameters() -> dict[str, Tensor]:
    buffers = {n: b for n, b in W.net.named_buffers() if "running" in n}
    return {**dict(W.net.named_parameters()), **buffers}


def _views() -> dict[str, Tensor]:
    state = W.state
    whole = torch.cat([value.flatten() for value in state.values() if value.is_floating_point()])
    at, found = 0, dict(state)
    for name, value in state.items():
        if value.is_floating_point():
            found[name] = whole[at : at + value.numel()].view(value.shape)
            at += value.numel()
    found["head.weight"] = state["head.weight"].T.contiguous().T
    return found


class Stage(enum.Enum):
    TRAIN = "train"


def beside() -> Iterator[Case]:
    """What lies beside the weights and is no plain value."""
    config = {
        "_metadata": foreign(
            "omegaconf.base.ContainerMetadata",
            ref_type=typing.Any,
            flags={},
            resolver_cache=collections.defaultdict(dict),
        ),
        "_parent": None,
        "_content": {
            "width": foreign("omegaconf.nodes.AnyNode", _val=6),
            "sizes": foreign("omegaconf.listconfig.ListConfig", _content=[1, 2]),
        },
    }
    values: dict[str, Callable[[], Any]] = {
        "NumPy scalar": lambda: np.float64(0.93),
        "NumPy integer": lambda: np.int64(7),
        "NumPy array": lambda: np.arange(5.0),
        "NumPy type": lambda: np.dtype("float32"),
        "NumPy generator's state": np.random.get_state,
        "Python generator's state": random.getstate,
        "Namespace": lambda: argparse.Namespace(lr=0.1, layers=[1, 2], out=Path("/data")),
        "SimpleNamespace": lambda: types.SimpleNamespace(lr=0.1),
        "path": lambda: pathlib.PurePosixPath("/data/out"),
        "OmegaConf": lambda: foreign("omegaconf.dictconfig.DictConfig", **config),
        "mmengine's history": lambda: {
            "log_scalars": {
                "loss": foreign(
                    "mmengine.logging.history_buffer.HistoryBuffer", _log_history=np.zeros(3)
                )
            }
        },
        "shape of long audio": lambda: torch.Size([1, 960000]),
        "Counter": lambda: collections.Counter({120000: 1, 900000: 2}),
        "defaultdict": lambda: collections.defaultdict(list, loss=[1.0]),
        "deque": lambda: collections.deque([1, 2], maxlen=9),
        "large integers": lambda: {"global_step": 10**15, "seed": 2**64 + 1},
        "date": lambda: datetime.datetime(2024, 5, 1, tzinfo=datetime.UTC),
        "Enum": lambda: Stage.TRAIN,
        "partial of a function": lambda: functools.partial(torch.optim.Adam, lr=0.1),
        "function": lambda: torch.nn.functional.relu,
        "Decimal": lambda: decimal.Decimal("0.1"),
        "set and frozenset": lambda: {"a": {1, 2}, "b": frozenset("xy")},
        "bytes": lambda: bytearray(b"abc"),
        "complex": lambda: 1 + 2j,
        "slice and range": lambda: [slice(1, 2), range(3)],
        "device and dtype": lambda: [torch.device("cuda", 1), torch.bfloat16],
        "dataclass of a package": lambda: foreign("trainer.config.Config", lr=0.1, width=6),
        "nothing in it": lambda: torch.empty(0, 4096),
        "sparse tensor": lambda: torch.eye(4).to_sparse(),
        "class as a key": lambda: {type(foreign("lightning.Checkpoint")): {"best": 0.1}},
    }
    for name, make in values.items():
        yield _net(
            f"beside: {name}",
            "release",
            saved(lambda make=make: {"model_state_dict": W.state, "beside": make()}),
        )
    yield _net(
        "fairseq",
        "release",
        saved(
            lambda: {
                "args": argparse.Namespace(arch="net", width=6),
                "cfg": foreign("omegaconf.dictconfig.DictConfig", **config),
                "model": W.state,
                "optimizer_history": [{"num_updates": 4}],
                "extra_state": {"train_iterator": {"epoch": 2}},
                "last_optimizer_state": {"exp_avg": [torch.randn(3)]},
            }
        ),
    )
    yield _net("Lightning 1.4", "release", saved(_lightning_1))
    for protocol in (3, 4, 5):
        yield _net(
            f"pickle protocol {protocol}",
            "release",
            saved(lambda: {"state_dict": W.state}, pickle_protocol=protocol),
        )
    yield _net("whole module", "refuse", saved(lambda: W.net), says="state_dict()")
    yield _net(
        "ultralytics",
        "refuse",
        saved(lambda: {"epoch": 1, "model": W.net, "ema": None, "train_args": {}}),
        says=r"\['model'\]",
    )
    yield _net(
        "detectron's zoo",
        "refuse",
        lambda folder: _pickled(folder, {n: v.numpy() for n, v in W.state.items()}),
        says="numpy|torch.as_tensor",
    )
    yield _net(
        "scikit-learn's estimator",
        "refuse",
        saved(lambda: foreign("sklearn.linear_model.Ridge", coef_=np.ones(3))),
        says="sklearn",
    )


def _lightning_1() -> dict[str, Any]:
    stopping = type(foreign("pytorch_lightning.callbacks.old.EarlyStopping"))
    return {
        "state_dict": under("model.", W.state),
        "callbacks": {stopping: {"best_score": torch.tensor(0.2)}},
        "hparams_name": "kwargs",
        "hyper_parameters": {"width": 6, "lr": 0.1},
        "pytorch-lightning_version": "1.4.2",
    }


def _pickled(folder: Path, tree: Any) -> Path:
    path = folder / "model_final.pkl"
    path.write_bytes(pickle.dumps(tree))
    return path


def precisions() -> Iterator[Case]:
    """Devices, precisions and layouts of tensors."""
    for device in ("cuda:3", "mps", "xpu:1", "hpu"):
        yield _net(
            f"saved on {device.partition(':')[0]}",
            "release",
            lambda folder, device=device: _tagged(folder, device),
        )
    yield _net(
        "saved on cuda, before 1.6",
        "release",
        lambda folder: _tagged(folder, "cuda:1", _use_new_zipfile_serialization=False),
    )
    yield _net(
        "before PyTorch 1.6",
        "release",
        saved(lambda: {"state_dict": W.state}, _use_new_zipfile_serialization=False),
    )

    def cast(dtype: torch.dtype) -> dict[str, Tensor]:
        return {n: v.to(dtype) if v.is_floating_point() else v for n, v in W.state.items()}

    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        yield _net(
            str(dtype)[6:],
            "release",
            saved(lambda dtype=dtype: cast(dtype)),
            lambda dtype=dtype: [cast(dtype)],
        )
    yield _net(
        "float8",
        "either",
        saved(lambda: cast(torch.float8_e4m3fn)),
        lambda: [cast(torch.float8_e4m3fn)],
    )
    whole = {n: (v * 100).to(torch.int8) if v.ndim > 1 else v for n, v in W.state.items()}
    yield _net("int8 without scales", "refuse", saved(lambda: whole), says="int8")
    yield _net("complex weights", "refuse", saved(lambda: cast(torch.complex64)), says="complex")
    for name, value in (("NaN", torch.nan), ("Inf", torch.inf)):
        broken = W.state
        broken["head.weight"][1, 2] = value
        yield _net(f"{name} in a weight", "refuse", saved(lambda b=broken: b), says="head.weight")
    meta = {n: v.to("meta") for n, v in W.state.items()}
    yield _net("no values, device meta", "refuse", saved(lambda: meta))
    wider = functools.partial(state_of, nets.Net, 6, 10)
    yield _net("other number of classes", "refuse", saved(wider), says=r"head\.weight.*\(10, 60\)")
    less = {n: v for n, v in W.state.items() if n != "head.bias"}
    yield _net("a weight is missing", "refuse", saved(lambda: less), says="head.bias")
    yield _net(
        "a layer too many",
        "refuse",
        saved(lambda: {**W.state, "head.2.weight": torch.randn(3, 3)}),
        says=r"head\.2\.weight",
    )
    yield _net("DTensor", "release", saved(_distributed_tensors))
    yield _net(
        "quantized tensors",
        "refuse",
        saved(
            lambda: {
                **W.state,
                "head.weight": torch.quantize_per_tensor(
                    W.state["head.weight"], 0.1, 0, torch.qint8
                ),
            }
        ),
    )


def _tagged(folder: Path, device: str, **options: Any) -> Path:
    original = torch.serialization.location_tag
    torch.serialization.location_tag = lambda storage: device
    try:
        return saved(lambda: {"state_dict": W.state}, **options)(folder)
    finally:
        torch.serialization.location_tag = original


def _distributed_tensors() -> dict[str, Tensor]:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    if not distributed.is_initialized():
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    return {name: distribute_tensor(value, mesh) for name, value in W.state.items()}


def files() -> Iterator[Case]:
    """Formats, folders, and what is no checkpoint."""
    from safetensors.torch import save_file

    def safe(name: str, state: Callable[[], dict[str, Tensor]], **more: Any) -> Callable:
        def write(folder: Path) -> Path:
            (folder / name).parent.mkdir(exist_ok=True)
            save_file(dict(state()), folder / name, **more)
            return folder / name

        return write

    def then(write: Callable[[Path], Path], change: Callable[[Path], Any]) -> Callable:
        def both(folder: Path) -> Path:
            path = write(folder)
            return change(path) or path

        return both

    plain = saved(lambda: W.state)
    half = {n: v.half() if v.is_floating_point() else v for n, v in W.state.items()}
    single = safe("model.safetensors", lambda: W.state)
    release: dict[str, Callable[[Path], Path | str]] = {
        "safetensors": single,
        "safetensors with metadata": safe(
            "model.safetensors", lambda: W.state, metadata={"format": "pt", "step": "4"}
        ),
        "safetensors, prefixed": safe("last.safetensors", lambda: under("model.", W.state)),
        "safetensors called .bin": safe("pytorch_model.bin", lambda: W.state),
        "Hugging Face's folder": then(single, _hugging_face),
        "Trainer's checkpoint-500": then(
            safe("checkpoint-500/model.safetensors", lambda: W.state), _trainer
        ),
        "accelerate's folder": then(single, _accelerate),
        "older Hugging Face's folder": then(
            saved(lambda: W.state, "pytorch_model.bin"), _hugging_face
        ),
        "index of shards": lambda folder: _sharded(folder) / "model.safetensors.index.json",
        "folder of shards": _sharded,
        "folder of .bin shards": _torch_shards,
        "distributed checkpoint": lambda folder: _distributed(folder, W.state),
        "distributed checkpoint with optimizer": lambda folder: _distributed(
            folder, {"model": W.state, "optim": {"state": {"0": {"step": torch.tensor(1.0)}}}}
        ),
        "DeepSpeed's folder": _deepspeed,
        "spaces and other letters": then(plain, _renamed("épreuve №2 {best} 50% = é.ckpt")),
        "a link": then(plain, _linked),
        "read only": then(plain, lambda path: path.chmod(0o444)),
        "name without an ending": then(plain, _renamed("checkpoint")),
    }
    for name, write in release.items():
        yield _net(name, "release", write)
    yield _net(
        "safetensors, float16",
        "release",
        safe("model.safetensors", lambda: half),
        lambda: [half],
    )

    def content(data: bytes, name: str = "model.pt") -> Callable[[Path], Path]:
        def write(folder: Path) -> Path:
            (folder / name).write_bytes(data)
            return folder / name

        return write

    def cut(count: int) -> Callable[[Path], None]:
        return lambda path: path.write_bytes(path.read_bytes()[:-count]) and None

    refuse: dict[str, tuple[Callable[[Path], Path | str], str]] = {
        "one shard of two": (
            lambda folder: _sharded(folder) / "model-00001-of-00002.safetensors",
            "shard",
        ),
        "a shard is missing": (
            lambda folder: (
                _without(_sharded(folder), "model-00002-of-00002.safetensors")
                / "model.safetensors.index.json"
            ),
            "model-00002|missing",
        ),
        "part of a distributed checkpoint": (
            lambda folder: next(_distributed(folder, W.state).glob("*.distcp")),
            "distributed",
        ),
        "DeepSpeed's optimizer": (
            saved(
                lambda: {"optimizer_state_dict": {}}, "zero_pp_rank_0_mp_rank_00_optim_states.pt"
            ),
            "DeepSpeed",
        ),
        "scripted": (_scripted, "TorchScript"),
        "traced": (_traced, "TorchScript"),
        "exported program": (_exported, r"pt2|torch\.export"),
        "ONNX": (_onnx, "ONNX"),
        "NumPy archive of weights": (_numpy_archive, "NumPy|npz"),
        "NumPy array": (content(b"\x93NUMPY\x01\x00v\x00" + b" " * 118, "x.npy"), "NumPy"),
        "zip of a checkpoint": (then(plain, _zipped(zipfile.ZIP_DEFLATED)), "(?i)zip|archive"),
        "zip, stored": (then(plain, _zipped(zipfile.ZIP_STORED)), "(?i)zip|archive"),
        "tar": (then(plain, _tarred("w")), "tar"),
        "tar.gz": (then(plain, _tarred("w:gz")), "gzip"),
        "gzip": (then(plain, lambda p: _packed(p, gzip.compress)), "gzip"),
        "xz": (then(plain, lambda p: _packed(p, lzma.compress)), "xz"),
        "pointer of Git LFS": (
            content(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
            "LFS",
        ),
        "web page": (content(b"<!DOCTYPE html><html><title>Quota</title></html>"), "web page"),
        "answer of an interface": (content(b'{"error": "Repository not found"}'), "JSON"),
        "text": (content(b"accuracy: 0.93\nepoch: 4\n"), ""),
        "YAML": (content(b"model:\n  width: 6\n", "hparams.yaml"), ""),
        "picture": (content(b"\x89PNG\r\n\x1a\n" + b"\0" * 60), ""),
        "random bytes": (content(np.random.default_rng(0).bytes(4096)), ""),
        "Keras": (content(b"\x89HDF\r\n\x1a\n" + b"\0" * 600, "model.h5"), "HDF5|Keras"),
        "GGUF": (content(b"GGUF\x03\0\0\0" + b"\0" * 60, "model.gguf"), "GGUF"),
        "TensorFlow Lite": (content(b"\x1c\0\0\0TFL3" + b"\0" * 60), "TensorFlow Lite"),
        "nothing in it": (content(b""), "empty"),
        "cut short": (then(plain, cut(700)), "truncated|damaged"),
        "cut short, safetensors": (then(single, cut(40)), "safetensors|truncated"),
        "empty folder": (lambda folder: folder, "folder"),
        "folder of two": (_folder_of_two, "a.pt|folder"),
        "a broken link": (_broken_link, "link"),
        "no such file": (lambda folder: folder / "model.pt", "no such file"),
        "nearly its name": (
            then(plain, lambda path: path.with_name("weight.pt")),
            r"did you mean weights\.pt",
        ),
        "pattern": (lambda folder: f"{folder}/*.ckpt", "pattern"),
        "address": (lambda folder: "https://example.org/model.pt", "address|download"),
        "name on the hub": (lambda folder: "facebook/dino-vits8", "Hugging Face"),
        "home": (lambda folder: "~/no such folder/model.pt", "no such file"),
        "in a bucket": (lambda folder: "s3://models/model.pt", "address|download"),
    }
    for name, (write, says) in refuse.items():
        yield _net(f"{name}, file" if name == "nothing in it" else name, "refuse", write, says=says)


def _hugging_face(path: Path) -> Path:
    (path.parent / "config.json").write_text('{"model_type": "net"}')
    (path.parent / "tokenizer.json").write_text("{}")
    return path.parent


def _trainer(path: Path) -> Path:
    torch.save(W.optimizer.state_dict(), path.with_name("optimizer.pt"))
    torch.save({"last_epoch": 2}, path.with_name("scheduler.pt"))
    torch.save(argparse.Namespace(lr=0.1), path.with_name("training_args.bin"))
    path.with_name("trainer_state.json").write_text('{"global_step": 500}')
    return path.parent


def _accelerate(path: Path) -> Path:
    torch.save(W.optimizer.state_dict(), path.with_name("optimizer.bin"))
    path.with_name("random_states_0.pkl").write_bytes(pickle.dumps({"step": 4}))
    return path.parent


def _renamed(name: str) -> Callable[[Path], Path]:
    return lambda path: path.rename(path.with_name(name))


def _linked(path: Path) -> Path:
    link = path.with_name("last.ckpt")
    link.symlink_to(path.name)
    return link


def _broken_link(folder: Path) -> Path:
    (folder / "last.ckpt").symlink_to("nowhere.pt")
    return folder / "last.ckpt"


def _halves() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    items = list(W.state.items())
    return dict(items[:4]), dict(items[4:])


def _sharded(folder: Path) -> Path:
    from safetensors.torch import save_file

    places = {}
    for number, part in enumerate(_halves(), 1):
        name = f"model-0000{number}-of-00002.safetensors"
        save_file(part, folder / name)
        places |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 9}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _torch_shards(folder: Path) -> Path:
    places = {}
    for number, part in enumerate(_halves(), 1):
        name = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save(part, folder / name)
        places |= dict.fromkeys(part, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def _without(folder: Path, name: str) -> Path:
    (folder / name).unlink()
    return folder


def _distributed(folder: Path, state: dict[str, Any]) -> Path:
    from torch.distributed import checkpoint

    checkpoint.save(dict(state), checkpoint_id=str(folder / "step-4"), no_dist=True)
    return folder / "step-4"


def _deepspeed(folder: Path) -> Path:
    (folder / "latest").write_text("global_step4")
    (folder / "global_step4").mkdir()
    torch.save(
        {"module": W.state, "ds_version": "0.15.1", "dp_world_size": 1},
        folder / "global_step4" / "mp_rank_00_model_states.pt",
    )
    torch.save({}, folder / "global_step4" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    return folder


def _scripted(folder: Path) -> Path:
    torch.jit.script(nn.Linear(2, 2)).save(str(folder / "model.pt"))
    return folder / "model.pt"


def _traced(folder: Path) -> Path:
    torch.jit.trace(W.net, torch.randn(1, 2, 12)).save(str(folder / "model.pt"))
    return folder / "model.pt"


def _exported(folder: Path) -> Path:
    program = torch.export.export(nn.Linear(2, 2), (torch.randn(1, 2),))
    torch.export.save(program, folder / "model.pt2")
    return folder / "model.pt2"


def _onnx(folder: Path) -> Path:
    import onnx

    x, y = (onnx.helper.make_tensor_value_info(n, 1, [2]) for n in "xy")
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    onnx.save(
        onnx.helper.make_model(onnx.helper.make_graph([node], "g", [x], [y])), folder / "m.onnx"
    )
    return folder / "m.onnx"


def _numpy_archive(folder: Path) -> Path:
    np.savez(folder / "weights.npz", **{n: v.numpy() for n, v in W.state.items()})
    return folder / "weights.npz"


def _zipped(method: int) -> Callable[[Path], Path]:
    def change(path: Path) -> Path:
        with zipfile.ZipFile(path.with_suffix(".zip"), "w", method) as archive:
            archive.write(path, "run/weights.pt")
        return path.with_suffix(".zip")

    return change


def _tarred(mode: Any) -> Callable[[Path], Path]:
    def change(path: Path) -> Path:
        with tarfile.open(path.with_suffix(".tar"), mode) as archive:
            archive.add(path, "weights.pt")
        return path.with_suffix(".tar")

    return change


def _packed(path: Path, pack: Callable[[bytes], bytes]) -> None:
    path.write_bytes(pack(path.read_bytes()))


def _folder_of_two(folder: Path) -> Path:
    for name in ("a.pt", "b.pt"):
        torch.save(W.state, folder / name)
    return folder


def migrations() -> Iterator[Case]:
    """What PyTorch or the module itself makes of older names, shapes and versions."""
    n = nets

    def same(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state

    def renamed(*pairs: tuple[str, str]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
        def change(state: dict[str, Tensor]) -> dict[str, Tensor]:
            found = {}
            for name, value in state.items():
                for old, new in pairs:
                    name = name.replace(old, new)
                found[name] = value
            return found

        return change

    def without_versions(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(state)

    old = renamed(
        ("parametrizations.weight.original0", "weight_g"),
        ("parametrizations.weight.original1", "weight_v"),
    )
    yield _of("weight norm, old names", n.WeightNormed, old)
    yield _of("weight norm, new names", n.WeightNormed, same)
    yield _of("weight norm of old", n.OldWeightNormed, same)
    yield _of("spectral norm", n.SpectralNormed, same)
    yield _of("lazy linear", n.Lazy, same)
    yield _of("lazy conv and batch norm", n.LazyNormed, same)
    yield Case(
        "lazy, saved before its first call",
        "refuse",
        saved(lambda: n.Lazy().state_dict()),
        f"{n.__name__}:Lazy",
    )
    yield _of("tied", n.Tied, same)
    yield Case(
        "tied, safetensors",
        "release",
        _save_model(n.Tied),
        f"{n.__name__}:Tied",
        lambda: [state_of(n.Tied)],
    )
    yield Case(
        "shared block, safetensors",
        "release",
        _save_model(n.Shared),
        f"{n.__name__}:Shared",
        lambda: [state_of(n.Shared)],
    )
    yield _of("version of today", n.Amplified, same)
    yield _of("version of old", n.Amplified, lambda state: _at_version(state, "gain", 2))
    yield _of("no versions", n.Amplified, without_versions)
    yield _of(
        "version of old under a prefix",
        n.Amplified,
        lambda state: {"model": _prefixed(_at_version(state, "gain", 1), "module.")},
        right=lambda: [_at_version(state_of(n.Amplified), "gain", 1)],
    )
    yield _of(
        "version of today under a prefix",
        n.Amplified,
        lambda state: {"state_dict": _prefixed(state, "net.")},
        right=lambda: [state_of(n.Amplified)],
    )
    yield _of(
        "names by version",
        n.Levelled,
        lambda state: renamed(("layers.0.", ""))(state),
    )
    yield _of("names of today by version", n.Levelled, same)
    yield _of("version required", n.Strict, same)
    yield _of("version required and lost", n.Strict, without_versions, should="refuse")
    yield _of("renamed by a hook", n.Renamed, renamed(("head.", "classifier.")))
    yield _of(
        "turned by its module",
        n.Turned,
        lambda state: {**state, "head.weight": state["head.weight"].T.contiguous()},
    )
    yield _of("extra state, a dictionary", n.ExtraState, same)
    yield _of(
        "extra state, a tensor",
        n.ExtraState,
        same,
        True,
        options={"model_kwargs": {"tensor": True}},
        reference=lambda: n.ExtraState(True),
    )
    yield _of("mask of -inf, saved", n.Causal, same)
    yield _of(
        "mask of -inf, not saved",
        n.Causal,
        same,
        False,
        options={"model_kwargs": {"persistent": False}},
        reference=lambda: n.Causal(False),
    )
    yield _of("mask of -inf, saved, opset 17", n.Causal, same, opset=17)
    for name, network in {
        "filled with -inf": n.Hidden,
        "mask made in the call": n.MaskOfCall,
        "scaled dot product": n.ScaledDot,
        "encoder with a mask": n.EncoderMasked,
        "encoder with padding": n.PaddedTokens,
        "largest of what is no padding": n.BestOfTokens,
    }.items():
        yield _of(name, network, same)
    yield _of("filled with -inf, opset 14", n.Hidden, same, opset=14)
    yield _of(
        "scalar with an axis",
        n.Temperature,
        lambda state: {**state, "temperature": state["temperature"].reshape(1)},
    )
    yield _of("a model and module of its own", n.HasModel, same)
    yield _of(
        "a model and module of its own, prefixed",
        n.HasModel,
        lambda state: {"state_dict": under("model.", state)},
        right=lambda: [state_of(n.HasModel)],
    )
    yield _of(
        "a module of its own, DataParallel",
        n.HasModel,
        lambda state: under("module.", state),
        right=lambda: [state_of(n.HasModel)],
    )
    yield _of(
        "buffer that is not saved any more",
        n.Positioned,
        lambda state: {**state, "position_ids": torch.arange(12.0)},
        right=lambda: [state_of(n.Positioned)],
    )
    yield _net(
        "left-over position_ids",
        "release",
        saved(lambda: {**W.state, "embeddings.position_ids": torch.arange(9)[None]}),
    )
    counts = {n: v for n, v in W.state.items() if not n.endswith("num_batches_tracked")}
    yield _net("without num_batches_tracked", "release", saved(lambda: counts), lambda: [counts])


def _at_version(state: dict[str, Tensor], module: str, version: int) -> dict[str, Tensor]:
    found = copy.copy(state)
    versions = copy.deepcopy(vars(state)["_metadata"])
    versions[module]["version"] = version
    found._metadata = versions  # type: ignore[attr-defined]
    return found


def _prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """As a wrapper's ``state_dict`` has it, versions too."""
    found = collections.OrderedDict(under(prefix, state))
    versions = vars(state)["_metadata"]
    found._metadata = {"": {"version": 1}} | {  # type: ignore[attr-defined]
        f"{prefix}{name}".rstrip("."): about for name, about in versions.items()
    }
    return found


def _save_model(network: type) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        from safetensors.torch import save_model

        save_model(nets.trained(network), str(folder / "model.safetensors"))
        return folder / "model.safetensors"

    return write


def hyper_parameters() -> Iterator[Case]:
    """What becomes an argument of the model, and how the model is spelled."""
    recorded: dict[str, Any] = {
        "a tensor": {"weights": torch.tensor([1.0, 2.0, 3.0])},
        "a size": {"shape": torch.Size([2, 12])},
        "a list": {"shape": [2, 12]},
        "a device": {"device": torch.device("cuda", 0)},
        "a device's name": {"device": "cuda:1"},
        "a type": {"dtype": torch.float32},
        "infinity": {"limit": float("inf")},
        "a set": {"labels": {"a", "b"}},
        "integers as keys": {"labels": {0: "cat", 1: "dog"}},
        "bytes": {"labels": b"abc"},
        "a complex number": {"weights": 1 + 2j},
        "a NumPy number": {"limit": np.float64(5.0)},
        "unknown ones": {"learning_rate": 0.1, "optimizer": "adam", "limit": 5.0},
        "pretrained": {"pretrained": True},
    }
    for name, found in recorded.items():
        yield _of(
            f"arguments: {name}",
            nets.Options,
            lambda state, found=found: {
                "state_dict": under("model.", state),
                "hyper_parameters": found,
                "pytorch-lightning_version": "2.5.0",
            },
            right=lambda: [state_of(nets.Options)],
            reference=lambda found=found: nets.Options(limit=found.get("limit", 5.0)),
        )
    wide = functools.partial(state_of, nets.Net, 9)
    yield Case(
        "width of the hyper-parameters",
        "release",
        saved(lambda: {"state_dict": under("net.", wide()), "hyper_parameters": {"width": 9}}),
        NET,
        lambda: [wide()],
        lambda: nets.Net(9),
    )
    yield Case(
        "width of the caller",
        "release",
        saved(wide),
        NET,
        lambda: [wide()],
        lambda: nets.Net(9),
        options={"model_kwargs": {"width": 9}},
    )
    yield _net(
        "an argument that there is not",
        "refuse",
        saved(lambda: W.state),
        options={"model_kwargs": {"widht": 6}},
        says="width",
    )
    for name, spelling in {
        "a function": "make_net",
        "a partial": "make_wide",
        "a static method": "Zoo.small",
    }.items():
        yield _net(
            f"made by {name}",
            "release",
            saved(lambda: W.state),
            model=f"{nets.__name__}:{spelling}",
            reference=nets.Net,
        )
    yield _net(
        "a class that there is not",
        "refuse",
        saved(lambda: W.state),
        model=f"{nets.__name__}:Nett",
        says="Net",
    )
    yield _net(
        "a class that is no module",
        "refuse",
        saved(lambda: W.state),
        model=f"{nets.__name__}:Zoo",
        says="Module",
    )
    yield Case(
        "from_pretrained",
        "release",
        _pretrained,
        f"{nets.__name__}:FromFolder.from_pretrained",
        lambda: [state_of(nets.FromFolder)],
        nets.FromFolder,
    )
    yield Case(
        "network of Hydra",
        "release",
        saved(
            lambda: {
                "state_dict": under("net.", W.state),
                "hyper_parameters": {
                    "net": W.net,
                    "optimizer": functools.partial(torch.optim.Adam, lr=0.1),
                },
            }
        ),
        NET,
        lambda: [W.state],
        options={"weights": "state_dict.net"},
    )


def _pretrained(folder: Path) -> Path:
    from safetensors.torch import save_file

    save_file(state_of(nets.FromFolder), folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def lightning() -> Iterator[Case]:
    """What Lightning itself writes."""
    from . import lit

    def of(name: str, make: Callable[[], lit.LitNet], model: str = NET, **more: Any) -> Case:
        should = more.pop("should", "release")
        return Case(
            f"Lightning: {name}", should, lambda folder: lit.fitted(make(), folder), model, **more
        )

    module = f"{lit.__name__}:LitNet"
    for attribute in ("model", "net", "backbone"):
        yield of(
            f"as {attribute}",
            lambda a=attribute: lit.LitNet(attribute=a),
            right=lambda: [lit.WEIGHTS],
        )
    for name, options in {
        "criterion": {"criterion": True},
        "metrics": {"metrics": True},
    }.items():
        yield of(name, lambda o=options: lit.LitNet(**o), right=lambda: [lit.WEIGHTS])
        yield of(
            f"{name}, itself",
            lambda o=options: lit.LitNet(**o),
            module,
            right=lambda o=options: [
                under("model.", lit.WEIGHTS)
                | {
                    n: v
                    for n, v in lit.LitNet(**o).state_dict().items()
                    if not n.startswith("model.")
                }
            ],
            reference=lambda o=options: lit.LitNet(**o),
        )
    yield of(
        "its network by submodule",
        lambda: lit.LitNet(attribute="net"),
        module,
        right=lambda: [lit.WEIGHTS],
        reference=nets.Net,
        options={"submodule": "net"},
    )
    yield of(
        "load_from_checkpoint",
        lit.LitNet,
        f"{module}.load_from_checkpoint",
        right=lambda: [under("model.", lit.WEIGHTS)],
        reference=lit.LitNet,
    )
    yield of(
        "Namespace", lambda: lit.LitArgs(argparse.Namespace(width=6)), right=lambda: [lit.WEIGHTS]
    )
    yield of("CLI", lit.LitNet, right=lambda: [lit.WEIGHTS])
    yield of(
        "network among its hyper-parameters, alike",
        lambda: lit.LitHydra(nets.Net(), functools.partial(torch.optim.Adam, lr=0.1)),
        should="either",
        right=lambda: [lit.WEIGHTS],
        says="state_dict.net",
    )
    yield of("averages of a callback", lambda: lit.LitNet(average=True), should="ask")


def beside_files() -> Iterator[Case]:
    """Signatures in a file beside the checkpoint."""
    text = (
        "inputs:\n  - {name: mel, dtype: float32, shape: [batch, 2, 12]}\n"
        "outputs:\n  - {name: score, dtype: float32, shape: [batch, 3]}\n"
    )
    model = f"{nets.__name__}:Undeclared"

    def write(name: str, signature: str, link: str = "") -> Callable[[Path], Path]:
        def both(folder: Path) -> Path:
            path = saved(lambda: state_of(nets.Undeclared), name)(folder)
            (folder / signature).write_text(text)
            if link:
                (folder / link).symlink_to(name)
                return folder / link
            return path

        return both

    for name, writes in {
        "signature beside": write("net.pt", "net.signature.yaml"),
        "signature beside .pth.tar": write("net.pth.tar", "net.signature.yaml"),
        "signature beside what a link leads to": write("net.pt", "net.signature.yaml", "last.pt"),
    }.items():
        yield Case(name, "release", writes, model, lambda: [state_of(nets.Undeclared)])


def all_cases() -> Iterator[Case]:
    for group in (
        prefixes,
        readings,
        beside,
        precisions,
        files,
        migrations,
        hyper_parameters,
        lightning,
        beside_files,
    ):
        yield from group()
