"""Files that are complete or absent, and what identifies them."""

import hashlib

import pytest

from heimdall_onnx.common.errors import DataError
from heimdall_onnx.common.files import hash_file, replace_file


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
