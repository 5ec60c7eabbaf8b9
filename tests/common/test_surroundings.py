import errno
import getpass
import os
import pwd
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from heimdall_onnx.common.errors import SettingsError
from heimdall_onnx.common.surroundings import furnish_process, told
from heimdall_onnx.services.settings import Settings

NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")
OF_HOME = ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR", "XDG_CACHE_HOME")


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A process with a home of ours that can be written to; what is furnished is taken back."""
    for name in (*NAMES, *OF_HOME, "TMPDIR", "TEMP", "TMP"):
        # Set before it is deleted, so that what the code sets is undone.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HEIMDALL_HOME", str(tmp_path / "ours"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.chdir(tmp_path)
    return monkeypatch


def unknown(_):
    raise KeyError("uid not found")


def test_what_can_be_used_stays_as_it_is(bare, tmp_path):
    before = dict(os.environ)
    furnish_process()
    assert dict(os.environ) == before
    assert list(tmp_path.iterdir()) == []


def test_a_user_that_nobody_knows_is_called_by_number(bare):
    bare.setattr(pwd, "getpwuid", unknown)
    furnish_process()
    assert getpass.getuser() == str(os.getuid())


def test_temporary_files_go_where_everything_else_goes(bare, tmp_path):
    def none(*_):
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in []")

    bare.setattr(tempfile, "_get_default_tempdir", none)
    furnish_process()
    assert os.environ["TMPDIR"] == tempfile.gettempdir() == str(tmp_path / "ours" / "tmp")
    with tempfile.NamedTemporaryFile() as file:
        assert Path(file.name).parent == tmp_path / "ours" / "tmp"


@pytest.mark.parametrize("home", ["/nonexistent", "/proc/version/home"])
def test_a_home_that_is_none_is_ours(bare, tmp_path, home):
    bare.setenv("HOME", home)
    furnish_process()
    assert Path.home() == tmp_path / "ours" / "tmp"


def test_a_home_that_can_not_be_written_to_is_still_read(bare, tmp_path):
    bare.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path))
    furnish_process()
    assert os.environ["HOME"] == str(tmp_path)
    for name in OF_HOME:
        assert os.environ[name].startswith(str(tmp_path / "ours" / "tmp"))


def test_where_nothing_can_be_written_what_only_reads_goes_on(bare):
    bare.setenv("HOME", "/nonexistent")
    bare.setenv("HEIMDALL_HOME", "/proc/version/ours")
    furnish_process()
    assert Path.home() == Path("/")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.EROFS, "Read-only file system", "/srv/x"), r"/srv/x.*set HEIMDALL_HOME"),
        (PermissionError(errno.EACCES, "Permission denied", "/srv/x"), "Permission denied"),
        (FileNotFoundError(errno.ENOENT, "No usable temporary directory found"), "HEIMDALL_HOME"),
    ],
)
def test_what_can_not_be_written_is_one_sentence_and_one_variable(error, says):
    with pytest.raises(SettingsError, match=says):
        raise told(error)


def test_what_is_no_matter_of_folders_is_not_told():
    assert told(FileNotFoundError(errno.ENOENT, "No such file", "model.pt")) is None
    assert told(ValueError("x")) is None


def test_a_folder_that_is_gone_is_told(bare, tmp_path):
    (tmp_path / "gone").mkdir()
    bare.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert "the folder that this was started in can't be used" in str(told(OSError(errno.ENOENT)))


def test_a_file_of_variables_that_is_no_text_is_named(bare, tmp_path):
    (tmp_path / ".env").write_bytes(b"NAME=\xff\xfe\n")
    with pytest.raises(SettingsError, match=r"\.env.*can't be read.*UTF-8"):
        Settings.load()


SHELL = {
    "closed streams": 'exec "$@" <&- 2>&-',
    "a folder that is gone": 'mkdir gone && cd gone && rmdir ../gone && exec "$@"',
    "no home": 'unset HOME; exec "$@"',
    "a home that is none": 'HOME=/nonexistent exec "$@"',
    "errors of warnings": 'PYTHONWARNINGS=error exec "$@"',
    "no letters": 'LC_ALL=C PYTHONIOENCODING=ascii PYTHONUTF8=0 exec "$@"',
}


@pytest.mark.parametrize("kind", SHELL)
def test_commands_work_or_say_why_not_in_a_sentence(kind, tmp_path):
    command = [sys.executable, "-m", "heimdall_onnx", "services", "status"]
    done = subprocess.run(
        ["/bin/sh", "-c", SHELL[kind], "sh", *command],
        cwd=tmp_path,
        env={**os.environ, "HEIMDALL_HOME": str(tmp_path / "ours")},
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stdout + done.stderr
    if kind == "a folder that is gone":
        assert done.returncode == SettingsError.exit_code
        assert "change to another" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert "store" in done.stdout


def test_ours_is_looked_for_as_settings_are(bare, tmp_path):
    bare.delenv("HEIMDALL_HOME")
    bare.setenv("HOME", "/nonexistent")
    (tmp_path / ".env").write_text("HEIMDALL_HOME=elsewhere\n")
    furnish_process()
    assert Path.home() == tmp_path / "elsewhere" / "tmp"


@pytest.mark.parametrize("option", ["error", "e::DeprecationWarning", "ignore::UserWarning"])
def test_a_librarys_warning_ends_no_command(option, tmp_path):
    code = """
import os, sys, warnings
import click
from heimdall_onnx.cli.main import main
main.add_command(click.command("warn")(lambda: warnings.warn("old", DeprecationWarning)))
sys.argv = ["heimdall-onnx", "warn"]
try:
    main()
finally:
    print(os.environ["PYTHONWARNINGS"])
"""
    (tmp_path / "run.py").write_text(code)
    done = subprocess.run(
        [sys.executable, tmp_path / "run.py"],
        env={**os.environ, "PYTHONWARNINGS": option},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ("" if option.startswith("e") else option)


def test_a_file_of_variables_that_may_not_be_read_is_named(bare, tmp_path):
    (tmp_path / ".env").write_text("A=b")

    def refused(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", ".env")

    bare.setattr("heimdall_onnx.services.settings.dotenv_values", refused)
    with pytest.raises(SettingsError, match=r"the file `\.env`.*Permission denied"):
        Settings.load()
