"""S3 stores of other makers for tests, each on free ports of loopback and ended with its block.

None is installed with this project. They are looked for on ``PATH``, or where a variable says:

- ``HEIMDALL_TEST_CEPH``: a folder that Debian's packages ``ceph-mon``, ``ceph-osd``, ``radosgw``
  and ``ceph-common`` were unpacked to, with all that they need (``dpkg-deb -x``).
- ``HEIMDALL_TEST_S3RVER``, ``HEIMDALL_TEST_MOTO``: the program ``s3rver``, ``moto_server``.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import servers
from keys import make_server_certificate

from heimdall_onnx.services.settings import Settings

_PATIENCE_S = 120
_CONFIGURATION = """
[global]
fsid = {fsid}
mon_host = v1:127.0.0.1:{port}
mon_initial_members = a
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
ms_bind_msgr2 = false
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 4
osd_pool_default_pgp_num = 4
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 1000
osd_crush_chooseleaf_type = 0
osd_crush_update_on_start = false
osd_class_update_on_start = false
osd_class_load_list = *
osd_class_default_list = *
osd_objectstore = memstore
memstore_device_bytes = 4294967296
run_dir = {folder}
admin_socket = {folder}/$name.asok
pid_file = {folder}/$name.pid
log_file = {folder}/$name.log
keyring = {folder}/keyring
mon_data = {folder}/mon
osd_data = {folder}/osd
"""
_OF_A_FOLDER = """
osd_class_dir = {libraries}/rados-classes
erasure_code_dir = {libraries}/ceph/erasure-code
plugin_dir = {libraries}/ceph
"""
_GATEWAY = """
[client.rgw]
rgw_data = {folder}
rgw_crypt_require_ssl = false
rgw_frontends = beast endpoint=127.0.0.1:{http} ssl_endpoint=127.0.0.1:{https} \
ssl_certificate={certificate} ssl_private_key={key}
"""


@dataclass(frozen=True)
class ForeignStore:
    """Where a store is, and who may use it.

    Attributes:
        address: Its endpoint.
        access_key: Of a user who may do everything.
        secret_key: Its other half.
        authority: The certificate that vouches for an ``https`` address.
    """

    address: str
    access_key: str
    secret_key: str
    authority: Path | None = None

    def variables(self) -> dict[str, str]:
        """What a caller puts into the environment."""
        return {
            "MLFLOW_S3_ENDPOINT_URL": self.address,
            "MLFLOW_S3_ACCESS_KEY_ID": self.access_key,
            "MLFLOW_S3_SECRET_ACCESS_KEY": self.secret_key,
        } | ({"AWS_CA_BUNDLE": str(self.authority)} if self.authority else {})

    def settings(self, home: Path) -> Settings:
        """Settings of it, with a home and a registry in SQLite of their own."""
        values = {k: v for k, v in self.variables().items() if k.startswith("MLFLOW_")}
        return Settings(_env_file=None, HEIMDALL_HOME=home, **values)


@contextmanager
def ceph(folder: Path) -> Iterator[dict[str, ForeignStore]]:
    """A cluster of one monitor and one OSD in memory, with a gateway by ``http`` and ``https``."""
    root = _folder_of_ceph()
    libraries = next(root.glob("usr/lib/*-linux-gnu"))
    environment = dict(os.environ)
    unpacked = root != Path("/")
    if unpacked:
        paths = (libraries, libraries / "ceph", root / "lib" / libraries.name)
        environment["LD_LIBRARY_PATH"] = ":".join(map(str, paths))
        environment["PYTHONPATH"] = str(root / "usr/lib/python3/dist-packages")
    certificate, key = make_server_certificate(folder)
    mon, http, https = servers.free_port(), servers.free_port(), servers.free_port()
    fsid, osd = str(uuid.uuid4()), str(uuid.uuid4())
    configuration = folder / "ceph.conf"
    configuration.write_text(
        (_CONFIGURATION + _OF_A_FOLDER * unpacked + _GATEWAY).format(
            folder=folder,
            fsid=fsid,
            libraries=libraries,
            certificate=certificate,
            key=key,
            port=mon,
            http=http,
            https=https,
        )
    )
    for name in ("mon", "osd"):
        (folder / name).mkdir()

    def run(program: str, *arguments: object, by: tuple[str, ...] = ()) -> None:
        # Ceph's own command is of Debian's Python, whichever is first on PATH.
        with (folder / "programs.log").open("ab") as output:
            subprocess.run(
                [*by, *map(str, (root / "usr/bin" / program, *arguments))],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                check=True,
                timeout=_PATIENCE_S,
            )

    def daemon(program: str, *arguments: object) -> subprocess.Popen:
        command = (root / "usr/bin" / program, "-f", *of_cluster, *arguments)
        return stack.enter_context(_running(list(map(str, command)), folder, environment))

    def tell(*arguments: object) -> None:
        waiting = ("--connect-timeout", _PATIENCE_S)
        run("ceph", *of_cluster, *waiting, *arguments, by=("/usr/bin/python3", "-W", "ignore"))

    of_cluster = ("-c", configuration)
    everything = ("--cap", "mon", "allow *", "--cap", "osd", "allow *")
    run("ceph-authtool", "--create-keyring", "keyring", "--gen-key", "-n", "mon.", *everything[:3])
    for user in ("client.admin", "client.rgw"):
        run("ceph-authtool", "keyring", "--gen-key", "-n", user, *everything)
    monitor = f"[v1:127.0.0.1:{mon}]"
    run("monmaptool", "--create", "--addv", "a", monitor, "--fsid", fsid, "monmap")
    map_of_it = ("--monmap", "monmap", "--keyring", "keyring")
    run("ceph-mon", *of_cluster, "--mkfs", "-i", "a", *map_of_it)
    with ExitStack() as stack:
        daemon("ceph-mon", "-i", "a")
        tell("osd", "new", osd)
        run("ceph-osd", *of_cluster, "-i", "0", "--mkfs", "--osd-uuid", osd)
        daemon("ceph-osd", "-i", "0")
        tell("osd", "crush", "add", "osd.0", "1.0", "root=default", "host=here")
        gateway = daemon("radosgw", "-n", "client.rgw")
        user = ("--uid=tests", "--display-name=tests", "--access-key=AKTEST", "--secret-key=SKTEST")
        run("radosgw-admin", *of_cluster, "user", "create", *user)
        for port in (http, https):
            _wait(lambda port=port: _listens(port), gateway, folder)
        yield {
            "http": ForeignStore(f"http://127.0.0.1:{http}", "AKTEST", "SKTEST"),
            "https": ForeignStore(f"https://localhost:{https}", "AKTEST", "SKTEST", certificate),
        }


@contextmanager
def s3rver(folder: Path) -> Iterator[ForeignStore]:
    """s3rver, which takes no notice of conditions."""
    program, port = _program("s3rver", "HEIMDALL_TEST_S3RVER"), servers.free_port()
    command = [program, "-d", str(folder), "-a", "127.0.0.1", "-p", str(port)]
    with _running(command, folder, dict(os.environ)) as process:
        _wait(lambda: _listens(port), process, folder)
        yield ForeignStore(f"http://127.0.0.1:{port}", "S3RVER", "S3RVER")


@contextmanager
def moto(folder: Path) -> Iterator[ForeignStore]:
    """moto, which keeps a condition of one writer, and not of several at once."""
    program, port = _program("moto_server", "HEIMDALL_TEST_MOTO"), servers.free_port()
    # Another Python's, which is to see none of this project's packages.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    with _running([program, "-p", str(port)], folder, environment) as process:
        _wait(lambda: _listens(port), process, folder)
        yield ForeignStore(f"http://127.0.0.1:{port}", "AKTEST", "SKTEST")


def _folder_of_ceph() -> Path:
    named = os.environ.get("HEIMDALL_TEST_CEPH")
    root = Path(named) if named else Path("/")
    needed = ("ceph", "ceph-authtool", "ceph-mon", "ceph-osd", "monmaptool", "radosgw")
    missing = [n for n in (*needed, "radosgw-admin") if not (root / "usr/bin" / n).exists()]
    if missing:
        where = f"HEIMDALL_TEST_CEPH={root}" if named else "HEIMDALL_TEST_CEPH is not set and"
        pytest.skip(f"no Ceph: {where} {root / 'usr/bin'} has no {', '.join(missing)}")
    return root


def _program(name: str, variable: str) -> str:
    found = shutil.which(os.environ.get(variable) or name)
    if found is None:
        pytest.skip(f"no {name}: it is not on PATH, and {variable} names no program")
    return found


@contextmanager
def _running(
    command: list[str], folder: Path, environment: dict[str, str]
) -> Iterator[subprocess.Popen]:
    with (folder / f"{Path(command[0]).name}.output").open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        yield process
    finally:
        # What it holds is nobody's, and an orderly end takes Ceph seconds.
        process.kill()
        process.wait()


def _wait(condition: Callable[[], bool], process: subprocess.Popen, folder: Path) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            said = "\n".join(path.read_text() for path in folder.glob("*.output"))
            pytest.fail(f"{process.args[0]} did not start:\n{said[-4000:]}")
        time.sleep(0.1)


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return False
    return True
