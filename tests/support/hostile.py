"""Text that tries to be more than text, and a model that says it wherever it may say anything."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from models import POSITIONS, SIGNAL, SPREAD, SmallNet, declare
from releases import Inputs
from torch import Tensor, nn

# What it does if it is believed: it marks the page, loads a picture, leads away.
MARK = "PWNED"
HOST = "leak.invalid"
SCRIPT = f"<script>document.documentElement.title='{MARK}'</script>"
IMAGE = f"<img src=http://{HOST}/i.png onerror=\"document.documentElement.title='{MARK}'\">"
LINKS = f"[a](javascript:alert(1)) ![b](http://{HOST}/m.png) <http://{HOST}/u> http://{HOST}/b"
BREAKS = (
    "\n\n# heading\n\n```mermaid\ngraph\n```\n| a | b |\n|---|---|\n</td></table>{{7*7}}$\\frac{$"
)
REVERSED = "\u202egnp.exe\u2066\x1b[31m\x00"
EVERYTHING = f"{SCRIPT}{IMAGE}{LINKS}{BREAKS}{REVERSED}\"'`;&amp;"

# What a file can be called.
FILE_NAME = f"{IMAGE}{LINKS}$\\frac{{$".replace("/", "\u2215")


class HostileNet(SmallNet):
    """`SmallNet` that calls its unit and its parts something else."""

    signature = declare(
        [SIGNAL], [POSITIONS, replace(SPREAD, unit=EVERYTHING, sigma_of=None, name="spread")]
    )

    def __init__(self, width: int = 8, note: str = "") -> None:
        super().__init__(width)
        self.note = note
        self.add_module(f"{SCRIPT}{LINKS}$\\frac{{$".replace(".", "_"), nn.Identity())
        self.wrapped = next(reversed(self._modules))

    def forward(self, signal: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(self.get_submodule(self.wrapped)(signal))


HostileNet.__qualname__ = HostileNet.__name__


def make_hostile_inputs(folder: Path) -> Inputs:
    """A checkpoint and evaluation data that say it in their names and in all that they tell."""
    checkpoint = folder / f"{FILE_NAME}.pt"
    torch.save(HostileNet().state_dict(), checkpoint)
    rng = np.random.default_rng(0)
    receiver = {"name": EVERYTHING, "latitude": 47.0, "longitude": 8.0}
    recording = {"receiver": EVERYTHING, "start": EVERYTHING, "file": EVERYTHING}
    meta = {
        "receivers": [receiver],
        "source": EVERYTHING,
        "events": [{"recordings": [recording]}],
        EVERYTHING: EVERYTHING,
    }
    np.savez(
        folder / f"{FILE_NAME}.npz",
        signal=rng.standard_normal((12, 2, 8, 8)).astype(np.float32),
        positions=rng.uniform((46, 4), (51, 11), (12, 2)),
        meta=json.dumps(meta),
    )
    return Inputs(checkpoint, folder / f"{FILE_NAME}.npz", "hostile:HostileNet")
