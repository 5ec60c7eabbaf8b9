"""A LightningModule as people write it, and what a Trainer saves of it."""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torchmetrics
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .nets import MEL, WORLD, Net

# Nothing is learnt (but for averages), so that these are the weights which are saved.
WEIGHTS = WORLD.state


class LitNet(pl.LightningModule):
    signature = MEL

    def __init__(
        self,
        width: int = 6,
        attribute: str = "model",
        criterion: bool = False,
        metrics: bool = False,
        average: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        setattr(self, attribute, _network(width))
        self.criterion = nn.CrossEntropyLoss(weight=torch.ones(3)) if criterion else None
        if metrics:
            self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=3)
            self.accuracy.persistent(True)
            self.val_best = torchmetrics.MaxMetric()
            self.val_best.persistent(True)

    def forward(self, mel: Tensor) -> Tensor:
        return getattr(self, self.hparams["attribute"])(mel)

    def training_step(self, batch: Any, _: int) -> Tensor:
        return self(batch[0]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        rate = 0.1 if self.hparams.get("average") else 0.0
        return torch.optim.SGD(self.parameters(), lr=rate)


class LitArgs(LitNet):
    """Keeps the command line's namespace."""

    def __init__(self, args: argparse.Namespace) -> None:
        pl.LightningModule.__init__(self)
        self.save_hyperparameters()
        self.model = _network(args.width)

    def forward(self, mel: Tensor) -> Tensor:
        return self.model(mel)


class LitHydra(LitNet):
    """Is given its network and a partial of its optimizer, and keeps both."""

    def __init__(self, net: nn.Module, optimizer: Any) -> None:
        pl.LightningModule.__init__(self)
        net.load_state_dict(WEIGHTS)
        self.save_hyperparameters(logger=False)
        self.net = net

    def forward(self, mel: Tensor) -> Tensor:
        return self.net(mel)


class _Samples(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.ones(2, 12), index % 3


def _network(width: int) -> Net:
    network = Net(width)
    network.load_state_dict(WEIGHTS)
    return network.eval()


def fitted(module: LitNet, folder: Path) -> Path:
    """The checkpoint that a Trainer saves after a step."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    callbacks = []
    if module.hparams.get("average"):
        from pytorch_lightning.callbacks import EMAWeightAveraging

        callbacks.append(EMAWeightAveraging(decay=0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            default_root_dir=folder,
            max_steps=1,
            accelerator="cpu",
            logger=False,
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        # Statistics of batch norm stay as they are, too.
        module.on_train_start = module.eval  # type: ignore[method-assign]
        trainer.fit(module, DataLoader(_Samples(), 4))
        trainer.save_checkpoint(str(folder / "epoch=0.ckpt"))
    return folder / "epoch=0.ckpt"
