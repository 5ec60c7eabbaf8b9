"""Evaluation data as people have them."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch

from . import nets
from .case import Case, Should, saved
from .nets import WORLD, state_of

MEL = np.random.default_rng(0).normal(size=(12, 2, 12)).astype(np.float32)
TOKENS = np.random.default_rng(1).integers(0, 21, (12, 5))
PLACES = np.random.default_rng(2).uniform(40, 50, (12, 2))


def _npz(**arrays: Any) -> Callable[[Path], Path]:
    return lambda folder: _saved_as(folder, np.savez, arrays)


def _saved_as(folder: Path, save: Callable[..., None], arrays: dict[str, Any]) -> Path:
    save(folder / "data.npz", **arrays)
    return folder / "data.npz"


def _case(
    name: str,
    should: Should,
    data: Callable[[Path], Path],
    says: str = "",
    network: type = nets.Net,
    **more: Any,
) -> Case:
    def state() -> dict[str, Any]:
        return WORLD.state if network is nets.Net else state_of(network)

    model = f"{nets.__name__}:{network.__name__}"
    name = f"data: {name}"
    return Case(name, should, saved(state), model, lambda: [state()], data=data, says=says, **more)


def _file(name: str, save: Callable[[Path], Any]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        save(folder / name)
        return folder / name

    return write


def all_cases() -> Iterator[Case]:
    some = np.where(np.arange(12)[:, None, None] == 5, np.nan, MEL).astype(np.float32)
    endless = np.where(np.arange(12)[:, None, None] == 5, np.inf, MEL).astype(np.float32)
    for name, should, arrays, says in [
        ("as it should be", "release", {"mel": MEL}, ""),
        ("float64", "release", {"mel": MEL.astype(np.float64)}, ""),
        ("float16", "release", {"mel": MEL.astype(np.float16)}, ""),
        ("bfloat16", "release", {"mel": MEL.astype(ml_dtypes.bfloat16)}, ""),
        ("uint8", "refuse", {"mel": (MEL * 9).astype(np.uint8)}, "uint8"),
        ("text", "refuse", {"mel": MEL.astype(str)}, "mel"),
        ("complex", "refuse", {"mel": MEL.astype(np.complex64)}, "complex"),
        ("Fortran's order", "release", {"mel": np.asfortranarray(MEL)}, ""),
        ("a view with steps", "release", {"mel": np.repeat(MEL, 2, 0)[::2]}, ""),
        ("objects", "refuse", {"mel": np.array([*MEL, None], dtype=object)}, ""),
        ("misspelt", "refuse", {"mels": MEL}, "mel"),
        ("without names", "either", {"arr_0": MEL}, "mel"),
        ("one sample without its axis", "refuse", {"mel": MEL[0]}, r"2, 12"),
        ("one sample", "release", {"mel": MEL[:1]}, ""),
        ("no samples", "refuse", {"mel": MEL[:0]}, ""),
        ("axes the other way round", "refuse", {"mel": MEL.transpose(0, 2, 1)}, "2, 12"),
        ("NaN", "refuse", {"mel": some}, "NaN"),
        ("Inf", "refuse", {"mel": endless}, "Inf"),
        ("classes beside", "refuse", {"mel": MEL, "labels": np.arange(12)}, "labels"),
        ("classes beside as y", "refuse", {"mel": MEL, "y": np.arange(12)}, "y"),
        ("other number of another", "refuse", {"mel": MEL, "positions": PLACES[:9]}, "positions"),
        ("pickled meta", "refuse", {"mel": MEL, "meta": np.array({"a": 1}, object)}, ""),
        ("masked", "release", {"mel": np.ma.masked_array(MEL, MEL > 1)}, ""),
        ("big endian", "release", {"mel": MEL.astype(">f4")}, ""),
    ]:
        yield _case(name, should, _npz(**arrays), says)
    for name, should, places, says in [
        ("positions", "release", PLACES, ""),
        ("positions with an axis", "release", PLACES[:, None], ""),
        ("positions, float32", "release", PLACES.astype(np.float32), ""),
        ("positions, integers", "release", PLACES.astype(int), ""),
        ("positions, big endian", "release", PLACES.astype(">f8"), ""),
        ("positions, NaN", "refuse", np.where(PLACES > 48, np.nan, PLACES), "positions"),
        (
            "positions, longitude first",
            "refuse",
            np.stack([np.full(12, 139.7), np.full(12, 35.7)], 1),
            "latitude|positions",
        ),
        ("positions with heights", "refuse", np.hstack([PLACES, PLACES[:, :1]]), "positions"),
    ]:
        yield _case(name, should, _npz(mel=MEL, positions=places), says, nets.Places, labelled=True)
    for name, label in [("position", "position"), ("Positions", "Positions"), ("gps", "gps")]:
        yield _case(
            f"positions called {name}",
            "refuse",
            _npz(mel=MEL, **{label: PLACES}),
            "positions",
            nets.Places,
        )
    for dtype in ("int64", "int32", "int16", "uint8"):
        yield _case(f"tokens, {dtype}", "release", _npz(tokens=TOKENS.astype(dtype)), "", nets.Tied)
    yield _case("tokens beyond their table", "refuse", _npz(tokens=TOKENS + 9), "0, 20", nets.Tied)
    yield _case("tokens, fractions", "refuse", _npz(tokens=TOKENS + 0.5), "tokens", nets.Tied)
    yield _case(
        "compressed", "release", lambda folder: _saved_as(folder, np.savez_compressed, {"mel": MEL})
    )
    yield _case("dataset", "release", _file("set.zarr", _zarr(3)))
    yield _case("dataset of Zarr 2", "refuse", _file("set.zarr", _zarr(2)), "(?i)zarr|v2|format")
    yield _case(".npy of one input", "release", _file("mel.npy", lambda path: np.save(path, MEL)))
    yield _case(
        "tensor", "release", _file("mel.pt", lambda path: torch.save(torch.from_numpy(MEL), path))
    )
    yield _case(
        "tensors by name",
        "release",
        _file("data.pt", lambda path: torch.save({"mel": torch.from_numpy(MEL)}, path)),
    )
    yield _case("safetensors", "release", _file("data.safetensors", _safetensors))
    for name, save in {
        "x.csv": lambda path: np.savetxt(path, MEL.reshape(12, -1), delimiter=","),
        "x.json": lambda path: path.write_text(json.dumps({"mel": MEL.tolist()})),
        "x.pkl": lambda path: path.write_bytes(pickle.dumps({"mel": MEL})),
        "x.h5": lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(600)),
        "x.mat": lambda path: path.write_bytes(b"MATLAB 5.0 MAT-file" + bytes(200)),
        "x.parquet": _parquet,
        "pictures": _pictures,
        "sparse.npz": _sparse,
        "empty.npz": lambda path: path.write_bytes(b""),
        "text.npz": lambda path: path.write_text("mel"),
    }.items():
        yield _case(name, "refuse", _file(name, save), r"\.npz|dataset")
    yield _case("that there is not", "refuse", _file("no.npz", lambda path: None), "no.npz")


def _zarr(version: int) -> Callable[[Path], None]:
    def save(path: Path) -> None:
        import zarr

        group = zarr.open_group(str(path), mode="w", zarr_format=version)
        group.create_array("mel", data=MEL)

    return save


def _safetensors(path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"mel": MEL}, path)


def _parquet(path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"mel": [row.tobytes() for row in MEL]}), path)


def _pictures(path: Path) -> None:
    from PIL import Image

    path.mkdir()
    for number in range(2):
        Image.new("RGB", (8, 8)).save(path / f"{number}.png")


def _sparse(path: Path) -> None:
    import scipy.sparse

    scipy.sparse.save_npz(path, scipy.sparse.csr_matrix(MEL.reshape(12, -1)))
