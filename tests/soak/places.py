"""Services of the soak's own, with a proxy before each."""

from __future__ import annotations

import secrets
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import mlflow
import servers
from invariants import Place
from proxy import Proxy, proxied
from pydantic import SecretStr
from releases import Inputs, changed_notebook, make_small_inputs

from heimdall_onnx.services.client import make_client
from heimdall_onnx.services.embedded import ensure_store, services_down
from heimdall_onnx.services.settings import Settings
from heimdall_onnx.services.store import Bucket


@dataclass(frozen=True)
class Lane:
    """Where one release after the other goes, through proxies.

    Attributes:
        inputs: What is released.
        notebook: The notebook without figures.
        place: Where to look afterwards, past the proxies.
        settings: What the releases are given: the proxies' addresses.
        store: The proxy before the store.
        registry: The one before MLflow's server; None where the registry is a SQLite file.
    """

    inputs: Inputs
    notebook: Path
    place: Place
    settings: Settings
    store: Proxy
    registry: Proxy | None

    def fresh(self) -> Lane:
        """The same with a bucket and a model of its own."""
        token = secrets.token_hex(4)
        place = replace(self.place, bucket=f"soak-{token}", name=f"soak-{token}")
        return replace(self, place=place)

    @property
    def proxies(self) -> list[Proxy]:
        return [proxy for proxy in (self.store, self.registry) if proxy is not None]


@contextmanager
def store_and_inputs(folder: Path) -> Iterator[tuple[Settings, Inputs, Path]]:
    """A store of its own below ``folder``, what to release, and the notebook to do it with."""
    bare = Settings(_env_file=None, HEIMDALL_HOME=folder / "home")
    try:
        settings = ensure_store(bare)
        Bucket(make_client(settings), "heimdall-mlflow").ensure()
        yield settings, make_small_inputs(folder), changed_notebook(folder)
    finally:
        services_down(bare)


def side_by_side(share: Callable[..., None], *arguments: Sequence[object]) -> None:
    """Call ``share`` for each of the arguments at the same time; what goes wrong ends all.

    Args:
        share: Its last argument is an event that tells it to stop.
        arguments: As `map` takes them.
    """
    stopped = threading.Event()
    with ThreadPoolExecutor(len(arguments[0])) as pool:
        shares = [pool.submit(share, *each, stopped) for each in zip(*arguments, strict=True)]
        try:
            for each in as_completed(shares):
                each.result()
        except BaseException:
            stopped.set()
            raise


@contextmanager
def lanes(folder: Path, *registries: str) -> Iterator[list[Lane]]:
    """A lane for each registry, ``"server"`` or ``"sqlite"``, before one store.

    All servers are one ``mlflow server`` on PostgreSQL.
    """
    with ExitStack() as stack:
        settings, inputs, notebook = stack.enter_context(store_and_inputs(folder))
        database = folder / "mlflow.db"
        mlflow.MlflowClient(f"sqlite:///{database}").search_experiments()
        server = None
        if "server" in registries:
            uri = stack.enter_context(servers.postgres())
            server = stack.enter_context(servers.mlflow_server(uri, folder))
        found = []
        for number, registry in enumerate(registries):
            home = folder / f"lane-{number}"
            home.mkdir()
            shutil.copyfile(database, home / "mlflow.db")
            here = {"home": home, "mlflow_tracking_uri": None}
            if registry == "server":
                here["mlflow_tracking_uri"] = SecretStr(str(server))
            direct = settings.model_copy(update=here)
            store = stack.enter_context(proxied(str(settings.s3_endpoint_url)))
            through = {"s3_endpoint_url": store.address}
            proxy = None
            if registry == "server":
                proxy = stack.enter_context(proxied(str(server)))
                through["mlflow_tracking_uri"] = SecretStr(proxy.address)
            found.append(
                Lane(
                    inputs=inputs,
                    notebook=notebook,
                    place=Place(direct, "soak"),
                    settings=direct.model_copy(update=through),
                    store=store,
                    registry=proxy,
                )
            )
        yield found
