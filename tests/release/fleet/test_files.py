"""Which files and objects a fleet's plan means."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from heimdall_onnx.common.errors import ParameterError
from heimdall_onnx.release.fleet import files as fleet_files
from heimdall_onnx.release.fleet.files import (
    Glob,
    absolute,
    find_checkpoints,
    missing_objects,
    require_data,
    single_checkpoint,
)
from heimdall_onnx.services import connection
from heimdall_onnx.services.store import Bucket

FILES = ("models/a.ckpt", "models/b.ckpt", "runs/1/best.ckpt", "runs/2/best.ckpt", "best.ckpt")


@pytest.fixture
def folder(tmp_path):
    """A folder of checkpoints, whose name could be a pattern."""
    here = tmp_path / "plans [x]"
    for name in FILES:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).touch()
    return here


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("models/?.ckpt", {"models/a.ckpt", "models/b.ckpt"}),
        ("models/[!a].ckpt", {"models/b.ckpt"}),
        ("./models//a*", {"models/a.ckpt"}),
        ("runs/../models/*", {"models/a.ckpt", "models/b.ckpt"}),
        ("**/best.ckpt", {"runs/1/best.ckpt", "runs/2/best.ckpt", "best.ckpt"}),
        ("**/[12]/**/*.ckpt", {"runs/1/best.ckpt", "runs/2/best.ckpt"}),
        ("runs/**", {"runs/1/best.ckpt", "runs/2/best.ckpt"}),
        ("*/best.ckpt", {"last/best.ckpt"}),
        ("runs/[1]", {"runs/[1]"}),
        ("models/a[.ckpt", {"models/a[.ckpt"}),
    ],
)
def test_patterns_fit_what_they_find(pattern, expected, folder):
    (folder / "last").symlink_to("runs/2")
    # Where every path through the link would be another one.
    (folder / "runs/again").symlink_to("..")
    if expected == {pattern}:
        (folder / pattern).touch()
    found = find_checkpoints(folder, pattern)
    assert found == [f"{folder}/{name}" for name in sorted(expected)]
    if ".." not in pattern:
        # The folder's own name has a wildcard in it, which stands for itself.
        assert find_checkpoints(folder, f"{folder}/{pattern}") == found
    glob = Glob(pattern, folder)
    for name in {*FILES, *expected}:
        assert glob.fits(f"{folder}/{name}") == (name in expected)
    assert not glob.fits(f"/elsewhere/{min(expected)}")
    # In a bucket it means the same.
    keys = {name: f"s3://some/x/{name}" for name in {*FILES, *expected}}
    stored = Glob(f"s3://some/x/{pattern}", folder)
    if ".." not in pattern and "//" not in pattern:
        assert {name for name, address in keys.items() if stored.fits(address)} == expected


def test_paths_behind_a_linked_folder_keep_their_meaning(folder, tmp_path):
    (tmp_path / "elsewhere/deep").mkdir(parents=True)
    (tmp_path / "elsewhere/c.ckpt").touch()
    (folder / "link").symlink_to(tmp_path / "elsewhere/deep")
    (tmp_path / "elsewhere/again").symlink_to(".")
    for file in ("c.ckpt", "again/c.ckpt"):
        for text in (f"link/../{file}", f"link/../{file[:-4]}*"):
            expected = f"{tmp_path}/elsewhere/{file}"
            assert find_checkpoints(folder, text) == [expected]
            assert Glob(text, folder).fits(expected)
            assert not Glob(text, folder).fits(f"{folder}/{file}")


def test_paths_become_absolute_and_addresses_stay():
    here = Path("/some/where")
    assert absolute(here, "a//./b") == "/some/where/a/b"
    assert absolute(here, "/a/b") == "/a/b"
    assert absolute(here, "s3://b/../c//d") == "s3://b/../c//d"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("models", "expected a file, found a folder at"),
        ("models/c.ckpt", "expected a file, found none at"),
        ("/dev/null", "expected a file, found a device at"),
        ("a" * 300, "none that can be looked at (File name too long)"),
        ("nowhere/*.ckpt", "no file matches 'nowhere/*.ckpt' (from "),
        ("models/a.ckpt/*", "no file matches"),
        ("models/**.ckpt", "expected ** as a whole name"),
        ("*/../a.ckpt", "no .. behind a wildcard"),
        ("s3://*/a.ckpt", "the bucket of 's3://*/a.ckpt' must be named"),
        ("s3://some", "expected s3://bucket/key"),
        ("s3://some/folder/", "what is in a folder is s3://bucket/folder/*"),
    ],
)
def test_what_names_no_checkpoint_is_refused(text, words, folder):
    with pytest.raises(ParameterError) as raised:
        find_checkpoints(folder, text)
    assert words in str(raised.value)


def test_a_single_checkpoint_is_no_pattern(folder):
    with pytest.raises(ParameterError, match="found none at"):
        single_checkpoint(folder, "models/*")
    (folder / "models/*").touch()
    assert single_checkpoint(folder, "models/*") == f"{folder}/models/*"
    assert find_checkpoints(folder, "models/*") == [f"{folder}/models/*"]
    assert single_checkpoint(folder, "s3://some/x[1].ckpt") == "s3://some/x[1].ckpt"


def test_a_checkpoint_whose_name_can_not_be_written_is_refused(folder):
    name = os.fsdecode(b"\xff.ckpt")
    (folder / "models" / name).touch()
    with pytest.raises(ParameterError, match="is no UTF-8"):
        find_checkpoints(folder, "models/*")
    with pytest.raises(ParameterError, match="is no UTF-8"):
        single_checkpoint(folder, f"models/{name}")


# In a bucket


@pytest.mark.services
def test_objects_are_found_by_pattern_and_missed_by_address(s3, bucket, folder, monkeypatch):
    for key in ("07/a.ckpt", "07/b.txt", "07/deep/c.ckpt", "07/folder/", "08/a.ckpt"):
        bucket.upload_bytes(b"", key)
    there = f"s3://{bucket.name}"
    there_is = SimpleNamespace(bucket=partial(Bucket, s3))
    monkeypatch.setattr(connection, "open_for_reading", lambda: there_is)
    assert find_checkpoints(folder, f"{there}/07/*.ckpt") == [f"{there}/07/a.ckpt"]
    assert find_checkpoints(folder, f"{there}/**/*.ckpt") == [
        f"{there}/{key}" for key in ("07/a.ckpt", "07/deep/c.ckpt", "08/a.ckpt")
    ]
    with pytest.raises(ParameterError, match="no file matches"):
        find_checkpoints(folder, f"{there}/07/folder/*")
    named = [f"{there}/{key}" for key in ("07/a.ckpt", "07/a.ckp", "08/a.ckpt", "09/a.ckpt")]
    assert missing_objects([*named, str(folder / "none.ckpt")]) == {named[1], named[3]}


def test_one_listing_finds_all_that_are_named_in_a_folder(monkeypatch):
    asked = []

    def list_stored(bucket: str, prefix: str) -> list[str]:
        asked.append((bucket, prefix))
        return [f"07/net-{n}.ckpt" for n in range(1000)]

    named = [f"s3://some/07/net-{n}.ckpt" for n in range(1001)]
    monkeypatch.setattr(fleet_files, "list_stored", list_stored)
    assert missing_objects(named) == {named[1000]}
    assert asked == [("some", "07/net-")]


# Data


def test_data_are_a_file_a_folder_where_one_may_be_or_an_object(folder):
    assert require_data(folder, "best.ckpt") == f"{folder}/best.ckpt"
    assert require_data(folder, "models", ("a file", "a folder")) == f"{folder}/models"
    assert require_data(folder, "s3://b/c.npz") == "s3://b/c.npz"
    for text, words in {
        "models": "expected a file, found a folder at",
        "none.npz": "expected a file, found none at",
        "s3://b": "expected s3://bucket/key, found 's3://b'",
    }.items():
        with pytest.raises(ParameterError, match=words):
            require_data(folder, text)
