"""A process's folder goes with it, and that of a killed one with the next."""

import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from heimdall_onnx.scratch import Scratch

_HOLD = """
from heimdall_onnx.scratch import Scratch
made = Scratch("of-a-test-")
(made.folder / "large").write_bytes(b"x")
print(made.folder.name, flush=True)
input()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_it_goes_with_all_that_is_in_it(folder):
    made = Scratch("of-a-test-")
    (made.folder / "large").write_bytes(b"x")
    made.remove()
    assert names(folder) == set()


def test_what_a_killed_process_has_left_goes_with_the_next(folder):
    (folder / "of-a-test-just-begun").mkdir()
    (folder / "of-another").mkdir()
    others = {"of-a-test-just-begun", "of-another"}
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        name = process.stdout.readline().strip()
        meanwhile = Scratch("of-a-test-")
        assert names(folder) == {name, meanwhile.folder.name, *others}
        assert (folder / name / "large").is_file()
        process.kill()
    after = Scratch("of-a-test-")
    assert names(folder) == {meanwhile.folder.name, after.folder.name, *others}
    meanwhile.remove()
    after.remove()


def test_many_that_begin_at_once_keep_their_own(folder):
    with ThreadPoolExecutor(8) as pool:
        made = [*pool.map(lambda _: Scratch("of-a-test-"), range(200))]
    assert all((one.folder / "lock").is_file() for one in made)
    for one in made:
        one.remove()
    assert names(folder) == set()
