"""Files that are complete or absent, and what identifies them."""

import hashlib
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from heimdall_onnx.common.errors import DataError
from heimdall_onnx.common.files import TemporaryFolder, hash_file, replace_file


def test_hash_is_that_of_the_content(tmp_path):
    (tmp_path / "f").write_bytes(b"x" * 100_000)
    assert hash_file(tmp_path / "f") == hashlib.sha256(b"x" * 100_000).hexdigest()
    with pytest.raises(DataError, match="can't be read: No such file"):
        hash_file(tmp_path / "g")


class TestReplaceFile:
    def test_a_failure_leaves_the_old_file_and_nothing_else(self, tmp_path):
        path = tmp_path / "f.npz"
        path.write_bytes(b"old")

        def fail():
            with replace_file(path) as file:
                file.write(b"half")
                raise RuntimeError

        with pytest.raises(RuntimeError):
            fail()
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]

    def test_a_folder_that_can_t_be_made_is_an_input_error(self, tmp_path):
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(DataError, match="can't be written"), replace_file(tmp_path / "file/f"):
            pass

    def test_other_users_may_read_the_result(self, tmp_path):
        with replace_file(tmp_path / "f") as file:
            file.write(b"x")
        assert (tmp_path / "f").stat().st_mode & 0o777 == 0o644


_HOLD = """
from heimdall_onnx.common.files import TemporaryFolder
made = TemporaryFolder("of-a-test-")
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
    made = TemporaryFolder("of-a-test-")
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
        meanwhile = TemporaryFolder("of-a-test-")
        assert names(folder) == {name, meanwhile.folder.name, *others}
        assert (folder / name / "large").is_file()
        process.kill()
    after = TemporaryFolder("of-a-test-")
    assert names(folder) == {meanwhile.folder.name, after.folder.name, *others}
    meanwhile.remove()
    after.remove()


def test_many_that_begin_at_once_keep_their_own(folder):
    with ThreadPoolExecutor(8) as pool:
        made = [*pool.map(lambda _: TemporaryFolder("of-a-test-"), range(200))]
    assert all((one.folder / "lock").is_file() for one in made)
    for one in made:
        one.remove()
    assert names(folder) == set()
