"""The networks that the checkpoints hold; each exports in a second or two."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from heimdall_onnx.common.text import DEGREES

from .case import declared

MEL = declared("mel float32 batch,2,12", "score float32 batch,3")
TOKENS = declared("tokens int64 batch,5 0..20", "logits float32 batch,5,21")


class Net(nn.Module):
    signature = MEL

    def __init__(self, width: int = 6, classes: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(2, width, 3), nn.BatchNorm1d(width), nn.ReLU())
        self.head = nn.Linear(10 * width, classes)

    def forward(self, mel: Tensor) -> Tensor:
        return self.head(self.body(mel).flatten(1))


class Flat(nn.Module):
    """A layer on all of the input, to be varied."""

    signature = MEL

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(24, 3)

    def forward(self, mel: Tensor) -> Tensor:
        return self.head(mel.flatten(1))


class Undeclared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(24, 3)

    def forward(self, mel: Tensor) -> Tensor:
        return self.head(mel.flatten(1))


class Places(Flat):
    signature = declared("mel float32 batch,2,12", f"positions float32 batch,2 in {DEGREES}")

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(24, 2)


class Generator(Flat):
    def forward(self, mel: Tensor) -> Tensor:
        return torch.tanh(super().forward(mel))


class WeightNormed(Flat):
    def __init__(self) -> None:
        super().__init__()
        self.head = parametrizations.weight_norm(nn.Linear(24, 3))


class OldWeightNormed(Flat):
    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.head = nn.utils.weight_norm(nn.Linear(24, 3))


class SpectralNormed(Flat):
    def __init__(self) -> None:
        super().__init__()
        self.head = parametrizations.spectral_norm(nn.Linear(24, 3))


class Lazy(Flat):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.LazyLinear(3)


class LazyNormed(nn.Module):
    signature = MEL

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.LazyConv1d(4, 3), nn.LazyBatchNorm1d(), nn.Flatten())
        self.head = nn.LazyLinear(3)

    def forward(self, mel: Tensor) -> Tensor:
        return self.head(self.body(mel))


class Tied(nn.Module):
    signature = TOKENS

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(21, 8)
        self.mix = nn.Linear(8, 8)
        self.decoder = nn.Linear(8, 21)
        self.decoder.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.mix(self.embed(tokens))))


class Shared(nn.Module):
    """One block under two names."""

    signature = MEL

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.second = self.first
        self.head = nn.Linear(24, 3)

    def forward(self, mel: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(mel)))).flatten(1))


class Gain(nn.Module):
    """Keeps decibels from version 3 on; before it were amplitudes."""

    _version = 3

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * 10 ** (self.gain / 20)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        name = f"{prefix}gain"
        if name in state_dict and local_metadata.get("version", 1) < 3:
            state_dict[name] = 20 * state_dict[name].abs().clamp_min(1e-4).log10()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


class Amplified(Flat):
    def __init__(self) -> None:
        super().__init__()
        self.gain = Gain()

    def forward(self, mel: Tensor) -> Tensor:
        return super().forward(self.gain(mel))


class Deep(nn.Module):
    """A version deep inside decides about names."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(24, 3)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        if local_metadata.get("version", 1) < 2:
            for name in ("weight", "bias"):
                if f"{prefix}{name}" in state_dict:
                    state_dict[f"{prefix}layers.0.{name}"] = state_dict.pop(f"{prefix}{name}")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


class Levelled(nn.Module):
    signature = MEL

    def __init__(self) -> None:
        super().__init__()
        self.head = Deep()

    def forward(self, mel: Tensor) -> Tensor:
        return self.head(mel.flatten(1))


class Strict(Flat):
    """Takes no state without a version."""

    _version = 4

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        if local_metadata.get("version") is None:
            raise RuntimeError("this state has no version")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


class Renamed(Flat):
    """Its head was a classifier once, as a hook knows."""

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(self._rename)

    @staticmethod
    def _rename(module, state_dict, prefix, *_):
        for name in [n for n in state_dict if n.startswith(f"{prefix}classifier.")]:
            state_dict[name.replace("classifier.", "head.", 1)] = state_dict.pop(name)


class Turned(Flat):
    """Its older states had the weight the other way round."""

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        weight = state_dict.get(f"{prefix}head.weight")
        if weight is not None and tuple(weight.shape) == (24, 3):
            state_dict[f"{prefix}head.weight"] = weight.T
        super()._load_from_state_dict(state_dict, prefix, *rest)


class ExtraState(Flat):
    def __init__(self, tensor: bool = False) -> None:
        super().__init__()
        self.tensor, self.steps = tensor, 7

    def get_extra_state(self) -> Any:
        return torch.tensor(self.steps) if self.tensor else {"steps": self.steps}

    def set_extra_state(self, state: Any) -> None:
        self.steps = int(state) if self.tensor else state["steps"]


class Causal(nn.Module):
    """Attention that adds a mask of -inf."""

    signature = TOKENS

    def __init__(self, persistent: bool = True) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Embedding(21, 8), nn.Linear(8, 24)
        self.out = nn.Linear(8, 21)
        future = torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
        self.register_buffer("future", future, persistent=persistent)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(self.embed(tokens)).split(8, -1)
        return self.out((q @ k.transpose(1, 2) / 8**0.5 + self.future).softmax(-1) @ v)


class Hidden(Causal):
    """Fills in -inf where a mask of its own says so."""

    def __init__(self) -> None:
        super().__init__(persistent=False)
        self.register_buffer("later", torch.ones(5, 5, dtype=torch.bool).triu(1))

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(self.embed(tokens)).split(8, -1)
        scores = (q @ k.transpose(1, 2) / 8**0.5).masked_fill(self.later, -torch.inf)
        return self.out(scores.softmax(-1) @ v)


class MaskOfCall(Causal):
    """Makes its mask in each call."""

    def __init__(self) -> None:
        super().__init__(persistent=False)
        del self.future

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(self.embed(tokens)).split(8, -1)
        future = torch.full((5, 5), -torch.inf).triu(1)
        return self.out((q @ k.transpose(1, 2) / 8**0.5 + future).softmax(-1) @ v)


class ScaledDot(MaskOfCall):
    """PyTorch's own function, causal, on four axes."""

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length = tokens.shape
        q, k, v = (
            part.reshape(batch, length, 2, 4).transpose(1, 2)
            for part in self.qkv(self.embed(tokens)).split(8, -1)
        )
        found = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(found.transpose(1, 2).reshape(batch, length, 8))


class EncoderMasked(nn.Module):
    """PyTorch's encoder with a mask in a buffer."""

    signature = TOKENS

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(21, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.out = nn.Linear(8, 21)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(5))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.encoder(self.embed(tokens), mask=self.mask, is_causal=True))


class PaddedTokens(nn.Module):
    """Token 0 is padding, but for a first one."""

    signature = TOKENS

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(21, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.out = nn.Linear(8, 21)

    def forward(self, tokens: Tensor) -> Tensor:
        padding = (tokens == 0) & (torch.arange(5) > 0)
        return self.out(self.layer(self.embed(tokens), src_key_padding_mask=padding))


class BestOfTokens(nn.Module):
    """The largest over the tokens that are no padding."""

    signature = TOKENS

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(21, 8), nn.Linear(8, 21)

    def forward(self, tokens: Tensor) -> Tensor:
        padding = ((tokens == 0) & (torch.arange(5) > 0)).unsqueeze(-1)
        found = self.embed(tokens)
        return self.out(found + found.masked_fill(padding, -torch.inf).amax(1, keepdim=True))


class Temperature(Flat):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.5))

    def forward(self, mel: Tensor) -> Tensor:
        return super().forward(mel) / self.temperature


class HasModel(nn.Module):
    """Has a ``model`` and a ``module`` of its own."""

    signature = MEL

    def __init__(self) -> None:
        super().__init__()
        self.model, self.module = nn.Linear(24, 5), nn.Linear(5, 3)

    def forward(self, mel: Tensor) -> Tensor:
        return self.module(torch.relu(self.model(mel.flatten(1))))


class Positioned(Flat):
    """Keeps positions in a buffer that is not saved any more."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("position_ids", torch.arange(12.0), persistent=False)

    def forward(self, mel: Tensor) -> Tensor:
        return super().forward(mel + self.position_ids / 12)


class Options(Flat):
    """Takes what trainings record."""

    def __init__(
        self,
        weights: Any = None,
        shape: Any = (2, 12),
        device: Any = "cpu",
        dtype: Any = torch.float32,
        limit: float = 5.0,
        labels: Any = None,
        pretrained: bool = False,
    ) -> None:
        super().__init__()
        assert not pretrained
        self.head = nn.Linear(shape[0] * shape[1], 3, device=device, dtype=dtype)
        self.limit, self.labels, self.weights = limit, labels, weights

    def forward(self, mel: Tensor) -> Tensor:
        return super().forward(mel).clamp(-self.limit, self.limit)


class FromFolder(Flat):
    @classmethod
    def from_pretrained(cls, folder: str, strict: bool = True) -> FromFolder:
        from safetensors.torch import load_file

        made = cls()
        made.load_state_dict(load_file(Path(folder) / "model.safetensors"), strict=strict)
        return made


def make_net(width: int = 6, **unused: Any) -> Net:
    return Net(width)


make_wide = functools.partial(Net, width=6)


class Zoo:
    """No module itself; its methods make some."""

    @staticmethod
    def small() -> Net:
        return Net()


class World:
    """A trained network and what a training has beside it; the same in every process."""

    @functools.cached_property
    def net(self) -> Net:
        return trained(Net)

    @functools.cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        # Its state is named by numbers, and has tensors of the weights' own shapes.
        net = trained(Net)
        optimizer = torch.optim.AdamW(net.parameters())
        net(torch.ones(4, 2, 12)).sum().backward()
        optimizer.step()
        return optimizer

    @property
    def state(self) -> dict[str, Tensor]:
        """With the versions of its modules, as ``state_dict`` gives it."""
        return copy.deepcopy(self.net.state_dict())

    @property
    def ema(self) -> dict[str, Tensor]:
        """Another one of the same names."""
        return scaled(self.state, 0.75)


WORLD = World()


def trained(make: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """A module with weights of a seed, and running statistics that are not the initial ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = make(*args, **kwargs)
        if any(map(nn.parameter.is_lazy, network.parameters())):
            network(torch.randn(2, 2, 12))
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            for name, buffer in network.named_buffers():
                if name.endswith("running_mean"):
                    buffer.normal_(0, 0.2)
                elif name.endswith("running_var"):
                    buffer.uniform_(0.5, 2)
                elif name.endswith("num_batches_tracked"):
                    buffer.fill_(40)
    return network.eval()


def state_of(make: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    return copy.deepcopy(trained(make, *args, **kwargs).state_dict())


def scaled(state: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    """Weights beside those of ``state``, with its versions."""
    changed = copy.copy(state)
    changed.update({n: v * factor if v.is_floating_point() else v for n, v in state.items()})
    return changed


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}
