"""What is taken for granted of a process: folders to write to, a user, open streams.

A container with a random user and a read-only root file system has none of these. What can be used
stays as it is.
"""

from __future__ import annotations

import errno
import os
import pwd
import sys
import tempfile
import warnings
from pathlib import Path

from heimdall_onnx.common.errors import SettingsError

# Where Python looks before it takes whatever folder it is in.
_TEMPORARY = ("/tmp", "/var/tmp")  # noqa: S108
_USER = ("LOGNAME", "USER", "LNAME", "USERNAME")
# What libraries keep below a user's home, and the variables that put it elsewhere.
_OF_HOME = ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR", "XDG_CACHE_HOME")
_DISK_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO),
    *(errno.EACCES, errno.EPERM),
}


def furnish_process() -> None:
    """Put what can't be written in its usual place below ``HEIMDALL_HOME``, if that can be.

    That is temporary files, and what libraries keep in a user's home folder, which goes on being
    read where there is one. A user who is not in the system's list of them is called by number.
    """
    environment = os.environ
    if not any(map(environment.get, _USER)):
        try:
            pwd.getpwuid(os.getuid())
        except KeyError:
            environment["LOGNAME"] = str(os.getuid())
    try:
        temporary = tempfile.gettempdir()
    except FileNotFoundError:
        temporary = ""
    usual = temporary in (*map(environment.get, ("TMPDIR", "TEMP", "TMP")), *_TEMPORARY)
    home = os.path.expanduser("~")  # noqa: PTH111 - it leaves what it can't tell
    if usual and os.access(home, os.W_OK):
        return
    ours = _below_home()
    if ours and not usual:
        environment["TMPDIR"] = tempfile.tempdir = ours
    if not Path(home).is_dir():
        environment["HOME"] = ours or "/"  # as container engines do; MLflow must know of one
    elif ours and not os.access(home, os.W_OK):
        for name in _OF_HOME:
            environment.setdefault(name, f"{ours}/{name.lower()}")


def _below_home() -> str:
    """A folder below ``HEIMDALL_HOME``, as settings know it; empty if it can't be written to."""
    from dotenv import dotenv_values, find_dotenv

    try:
        kept = dotenv_values(find_dotenv(usecwd=True) or os.devnull)
        home = os.environ.get("HEIMDALL_HOME") or kept.get("HEIMDALL_HOME") or ".heimdall"
        folder = Path(home).expanduser().absolute() / "tmp"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return str(folder)
    except (OSError, RuntimeError, ValueError):
        return ""


def own_streams() -> None:
    """Open the standard streams that are closed, and let none fail for a letter that it lacks.

    For a process that is this package's: the next file to be opened would take a closed one's
    number, and get what is printed.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            number = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(number, True)
            setattr(sys, name, os.fdopen(number, mode))
        elif mode == "w" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def own_warnings() -> None:
    """Let no library's warning be an error, here or in processes that are started from here.

    For a process that is this package's, which issues no warnings: a pipeline that makes errors of
    them means its own code, and what libraries deprecate in each other must not stop a release.
    """
    kept = [option for option in sys.warnoptions if not option.lstrip().startswith("e")]
    if kept != sys.warnoptions:
        sys.warnoptions[:] = kept
        os.environ["PYTHONWARNINGS"] = ",".join(kept)
        warnings.filters[:] = [one for one in warnings.filters if one[0] != "error"]  # type: ignore[index]


def told(error: BaseException) -> SettingsError | None:
    """The error of a folder that is full, broken, gone or not to be written to; None of others."""
    if not isinstance(error, OSError):
        return None
    try:
        os.getcwd()  # noqa: PTH109 - this is what every relative path needs
    except OSError as gone:
        return SettingsError(
            f"the folder that this was started in can't be used: {gone.strerror}; change to another"
        )
    reason = error.strerror or ""
    if error.errno not in _DISK_ERRORS and "usable temporary directory" not in reason:
        return None
    return SettingsError(
        f"what a run needs can't be read or written: {reason} ({error.filename or 'no file'}); "
        "free some space, or set HEIMDALL_HOME to a folder that can be written to: temporary files "
        "go there too where TMPDIR has no place for them"
    )
