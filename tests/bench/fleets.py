"""What a fleet adds to its releases and what it takes from store and registry.

Every fleet here is a real one: Dask's workers, the bench's store, ``mlflow server`` on PostgreSQL.
All of them share the machine, so a figure is what a machine with all parts on it reaches.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import sqlalchemy
from processes import Run

from heimdall_onnx.services.client import make_client
from heimdall_onnx.services.settings import Settings, with_driver
from heimdall_onnx.services.store import Bucket, parse_uri

if TYPE_CHECKING:
    from proxy import Proxy

HERE = Path(__file__).parent
TESTS = HERE.parent / "support"
CLIENT = HERE / "fleet_client.py"
BUCKET = "heimdall-bench"
MODEL = "models:SmallNet"
PARAMETERS = {"profile": "smoke", "measure_latency": False, "threads": 1, "bucket": BUCKET}
DAY_S, A_DAY = 86_400, 10_000
# What a release does for its model; a bare script would have these, too.
MODEL_STEPS = {"checkpoint", "evaluation data", "export", "validation", "parity", "departure"}
_QUESTIONS, _PAGE = 9, 20
BEYOND = "records, manifest, alias"

Found = tuple[str, float | None, bool, str, tuple[float, ...], str]
Command = Callable[..., Run]


@dataclass(frozen=True)
class Sizes:
    """Items of each fleet.

    Attributes:
        compared: Released by one worker, and by two.
        single: Released by a fleet, and by single commands.
        scheduled: Of workers that do nothing for them.
        planned: Of workers that do nothing, while the client's memory is looked at.
        counted: Released while requests, bytes and rows are counted.
        history: Versions of one name that the registry holds, and folders of releases.
    """

    compared: int = 16
    single: int = 20
    scheduled: int = 1_000
    planned: int = 10_000
    counted: int = 50
    history: int = 10_000

    def scaled(self, share: float) -> Sizes:
        """That share of each, at least four items, and a history of some pages."""
        scaled = Sizes(*(max(4, round(share * getattr(self, f.name))) for f in fields(self)))
        return replace(scaled, history=max(1_000, scaled.history))


@dataclass(frozen=True)
class Counts:
    """What there is in store and registry, or what was added to it.

    Attributes:
        requests: Requests to the store and to the registry, by service and method.
        moved: Bytes of bodies that went to and from the store.
        stored: Bytes of objects by what they are.
        rows: Rows of the registry's tables that have any.
        database: Bytes of the registry's database.
    """

    requests: Counter[str]
    moved: int
    stored: Counter[str]
    rows: Counter[str]
    database: int

    def since(self, before: Counts) -> Counts:
        """What was added after ``before``; what did not change is left out."""
        return Counts(
            self.requests - before.requests,
            self.moved - before.moved,
            self.stored - before.stored,
            self.rows - before.rows,
            self.database - before.database,
        )

    def of_service(self, service: str) -> int:
        """Requests to the store, or to the registry."""
        return sum(n for name, n in self.requests.items() if name.startswith(f"{service} "))


@dataclass(frozen=True)
class Day:
    """What so many releases a day need, spread evenly; arithmetic.

    Attributes:
        workers: That are never idle.
        requests_per_second: To the store.
        bytes_stored: In the store.
        rows: In the registry's database.
        versions_per_second: Of which a folder of releases has one to give.
    """

    workers: float
    requests_per_second: float
    bytes_stored: float
    rows: float
    versions_per_second: float


def day_of(releases: int, seconds: float, counts: Counts, items: int) -> Day:
    """The needs of a day, from what some items took.

    Args:
        releases: On the day.
        seconds: Of a worker, for one item.
        counts: Of ``items`` items.
        items: How many these were.
    """
    each = releases / items
    return Day(
        releases * seconds / DAY_S,
        each * counts.of_service("store") / DAY_S,
        each * counts.stored.total(),
        each * counts.rows.total(),
        releases / DAY_S,
    )


def seconds_by_step(outcomes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Median seconds of each step of a release, the longest first.

    What an item took beyond the steps that its release has recorded is a step of its own.
    """
    found: dict[str, list[float]] = {}
    for outcome in outcomes:
        costs = {c["step"]: float(c["seconds"]) for c in outcome["result"]["costs"]}
        costs[BEYOND] = outcome["seconds"] - sum(costs.values())
        for step, seconds in costs.items():
            found.setdefault(step, []).append(seconds)
    medians = {step: statistics.median(values) for step, values in found.items()}
    return dict(sorted(medians.items(), key=lambda pair: -pair[1]))


def seconds_beside_the_model(outcome: Mapping[str, Any]) -> float:
    """Of one item: all but the steps that the model itself takes."""
    own = (c["seconds"] for c in outcome["result"]["costs"] if c["step"] in MODEL_STEPS)
    return float(outcome["seconds"]) - sum(map(float, own))


def kind_of(bucket: str, key: str) -> str:
    """What an object is, for the sums."""
    if bucket != BUCKET:
        return "MLflow's artifacts"
    if re.match(r"(fleets|aliases)/", key):
        return "records and logs"
    if key.startswith("objects/"):
        return "checkpoints and data"
    name = key.rpartition("/")[2]
    return "reports" if name.startswith("report.") else "models and manifests"


@dataclass(frozen=True)
class Place:
    """Where the fleets run.

    Attributes:
        folder: For checkpoints and plans.
        environment: With the addresses of store and registry.
        command: Runs a command, given its environment and what it consists of.
        database: Address of the registry's database, for SQLAlchemy.
    """

    folder: Path
    environment: dict[str, str]
    command: Command
    database: str

    def checkpoints(self, count: int) -> list[Path]:
        """So many checkpoints of one small model, each with weights of its own."""
        import torch
        from models import SmallNet

        folder = self.folder / "checkpoints"
        folder.mkdir(exist_ok=True)
        paths = [folder / f"net-{number:05}.pt" for number in range(count)]
        for seed, path in enumerate(paths):
            if not path.exists():
                torch.manual_seed(seed)
                model = SmallNet()
                with torch.no_grad():
                    for weights in model.parameters():
                        weights.add_(torch.randn_like(weights) * 1e-3)
                torch.save(model.state_dict(), path)
        return paths

    def eval_data(self) -> Path:
        """Evaluation data that all of them share."""
        path = self.folder / "eval.npz"
        if not path.exists():
            signal = np.random.default_rng(0).standard_normal((12, 2, 8, 8)).astype(np.float32)
            np.savez(path, signal=signal)
        return path

    def plan(self, checkpoints: Sequence[Path]) -> Path:
        """The plan of a fleet, as a program would write it."""
        own = {"model": MODEL, "name": "{stem}", "eval_data": str(self.eval_data())}
        plan = {
            "name": "bench",
            "parameters": PARAMETERS | own,
            "checkpoints": list(map(str, checkpoints)),
        }
        path = self.folder / f"plan-{len(checkpoints)}.json"
        path.write_text(json.dumps(plan))
        return path

    def client(self, *options: str | Path, environment: Mapping[str, str] = {}) -> dict[str, Any]:
        """Run a fleet in a process of its own and read what it has measured."""
        done = self.command(
            self.environment | environment, sys.executable, CLIENT, *map(str, options)
        )
        found: dict[str, Any] = json.loads(done.output.splitlines()[-1])
        if found["exit_code"]:
            errors = {o["error"] for o in found["outcomes"] if o["error"]}
            raise RuntimeError(f"a fleet of the benchmark has failed: {'; '.join(errors)}")
        return found

    def count(self, store: Proxy, registry: Proxy) -> Counts:
        """What there is now, and what has gone through the proxies."""
        requests = Counter(
            f"{service} {request.partition(' ')[0]}"
            for service, proxy in (("store", store), ("registry", registry))
            for request in proxy.requests
        )
        stored: Counter[str] = Counter()
        client = make_client(_settings(self.environment))
        for bucket in client.list_buckets()["Buckets"]:
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket["Name"])
            for entry in (entry for page in pages for entry in page.get("Contents", [])):
                stored[kind_of(bucket["Name"], entry["Key"])] += entry["Size"]
        rows, size = _count_rows(self.database)
        return Counts(requests, sum(map(sum, store.sizes)), stored, rows, size)


def _settings(environment: Mapping[str, str]) -> Settings:
    before = dict(os.environ)
    try:
        os.environ.update(environment)
        return Settings(_env_file=None)
    finally:
        os.environ.clear()
        os.environ.update(before)


def _count_rows(database: str) -> tuple[Counter[str], int]:
    engine = sqlalchemy.create_engine(database)
    with engine.connect() as connection:
        tables = sqlalchemy.inspect(connection).get_table_names()
        rows = Counter(
            {
                name: connection.execute(
                    sqlalchemy.select(sqlalchemy.func.count()).select_from(sqlalchemy.table(name))
                ).scalar_one()
                for name in tables
            }
        )
        question = sqlalchemy.text("SELECT pg_database_size(current_database())")
        size = connection.execute(question).scalar_one()
    engine.dispose()
    return rows, int(size)


@contextmanager
def place(folder: Path, environment: Mapping[str, str], command: Command) -> Iterator[Place]:
    """A registry of the fleets' own beside the bench's store."""
    sys.path.append(str(TESTS))
    import servers

    own = folder / "fleets"
    own.mkdir()
    with servers.postgres() as database, servers.mlflow_server(database, own) as address:
        paths = filter(None, (str(TESTS), environment.get("PYTHONPATH")))
        # One thread each: two workers have two processors, and a small model gains nothing by more.
        added = {
            "MLFLOW_TRACKING_URI": address,
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
        }
        yield Place(own, {**environment, **added}, command, with_driver(database))


def rows(there: Place, rounds: int, sizes: Sizes) -> Iterator[Found]:
    """Name, target, whether that is the least, unit, values and method of each row."""
    outcomes: list[dict[str, Any]] = []
    yield from _workers(there, rounds, sizes, outcomes)
    yield from _single_commands(there, rounds, sizes)
    outcome = there.folder / "outcome.json"
    outcome.write_text(json.dumps(outcomes[0]))
    yield from _scheduling(there, rounds, sizes, outcome)
    yield from _memory(there, sizes, outcome)
    yield from _costs(there, sizes, outcomes)
    yield from _registry_history(there, sizes)
    yield from _store_history(there, sizes)


def _workers(
    there: Place, rounds: int, sizes: Sizes, outcomes: list[dict[str, Any]]
) -> Iterator[Found]:
    plan = there.plan(there.checkpoints(sizes.compared))
    found: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for turn in range(rounds):
        for workers in (1, 2) if turn % 2 == 0 else (2, 1):
            options = ("--workers", str(workers), "--warm", "--force")
            found[workers].append(there.client(plan, *options))
    outcomes += [outcome for done in found[2] for outcome in done["outcomes"]]
    processor = {n: [d["processor_s"] / sizes.compared for d in done] for n, done in found.items()}
    seconds = {workers: [done["seconds"] for done in each] for workers, each in found.items()}
    imports = statistics.median(done["imports_s"] for done in found[2])
    yield (
        "two workers / one worker: releases a second",
        1.8,
        True,
        "×",
        tuple(one / two for one, two in zip(seconds[1], seconds[2], strict=True)),
        f"{sizes.compared} items released anew, {rounds} rounds in turns, no latency, one thread; "
        f"from the first submission to the last outcome: {_median(seconds[1])} and "
        f"{_median(seconds[2])} s; before that two workers import for {imports:.1f} s, once a "
        f"fleet; store, registry and PostgreSQL run on the same {os.cpu_count()} processors",
    )
    yield (
        "an item: processor seconds",
        None,
        False,
        "s",
        tuple(processor[2]),
        "workers and kernels of two workers, without client, store and registry; of one worker "
        f"{_median(processor[1])} s",
    )


def _single_commands(there: Place, rounds: int, sizes: Sizes) -> Iterator[Found]:
    checkpoints = there.checkpoints(sizes.single)
    plan = there.plan(checkpoints)
    fleet: list[float] = []
    single: list[float] = []

    def releases() -> None:
        single.append(sum(_release(there, checkpoint).seconds for checkpoint in checkpoints))

    def together() -> None:
        command = (sys.executable, "-m", "heimdall_onnx", "fleet", plan, "--force")
        fleet.append(there.command(there.environment, *command).seconds)

    for turn in range(rounds):
        for take in (together, releases) if turn % 2 == 0 else (releases, together):
            take()
    yield (
        f"a fleet of {sizes.single} / {sizes.single} single commands",
        0.6,
        False,
        "×",
        tuple(f / s for f, s in zip(fleet, single, strict=True)),
        f"whole commands {_median(fleet)} and {_median(single)} s, {rounds} rounds in turns, the "
        "same checkpoints and parameters (smoke, no latency, one thread); the fleet's has workers, "
        "their imports and the fleet's report in it, the single ones theirs each",
    )


def _release(there: Place, checkpoint: Path) -> Run:
    given = {"model": MODEL, "eval-data": there.eval_data(), "name": checkpoint.stem}
    given |= {"bucket": BUCKET, "profile": PARAMETERS["profile"]}
    options = [str(part) for name, value in given.items() for part in (f"--{name}", value)]
    options += ["-p", "measure_latency", "false", "-p", "threads", "1"]
    command = (sys.executable, "-m", "heimdall_onnx", "release", checkpoint, *options)
    return there.command(there.environment, *command)


def _scheduling(there: Place, rounds: int, sizes: Sizes, outcome: Path) -> Iterator[Found]:
    plan = there.plan(_names(there, sizes.scheduled))
    done = [there.client(plan, "--warm", "--instead", outcome) for _ in range(rounds)]
    yield (
        "scheduling, for each item",
        100.0,
        False,
        "ms",
        tuple(1000 * d["seconds"] / sizes.scheduled for d in done),
        f"{sizes.scheduled:,} items through `run_fleet` as it is, whose workers do nothing but "
        f"answer with the outcome of a real release ({outcome.stat().st_size / 1e3:.0f} kB); "
        "planning, workers' start and imports are over",
    )


def _memory(there: Place, sizes: Sizes, outcome: Path) -> Iterator[Found]:
    plan = there.plan(_names(there, sizes.planned))
    done = there.client(plan, "--warm", "--instead", outcome, "--report")
    yield (
        f"memory of the client of {sizes.planned:,} items",
        500.0,
        False,
        "MB",
        (done["peak_bytes"] / 1e6,),
        "peak resident size of that one process, in which Dask's scheduler is, too: "
        f"{done['planned_bytes'] / 1e6:.0f} MB when it has planned (in "
        f"{done['planning_s']:.1f} s), {done['collected_bytes'] / 1e6:.0f} MB when it has every "
        f"outcome (after {done['seconds']:.0f} s, as in scheduling), then the fleet's report",
    )


def _names(there: Place, count: int) -> list[Path]:
    """So many names for one checkpoint, where nobody opens it."""
    (real,) = there.checkpoints(1)
    folder = there.folder / f"names-{count}"
    if not folder.exists():
        folder.mkdir()
        for number in range(count):
            (folder / f"net-{number:05}.pt").hardlink_to(real)
    return sorted(folder.iterdir())


def _costs(there: Place, sizes: Sizes, outcomes: list[dict[str, Any]]) -> Iterator[Found]:
    beside = tuple(map(seconds_beside_the_model, outcomes))
    steps = seconds_by_step(outcomes)
    each = statistics.median(o["seconds"] for o in outcomes)
    yield (
        "an item: seconds of all but the model's own steps",
        None,
        False,
        "s",
        beside,
        f"{len(outcomes)} items of two workers, {each:.2f} s each; medians by step: "
        + ", ".join(f"{step} {seconds:.2f}" for step, seconds in steps.items()),
    )
    counts = _counted(there, sizes.counted)
    yield from _counted_rows(counts, sizes.counted)
    day = day_of(A_DAY, each, counts, sizes.counted)
    for name, unit, value in (
        ("workers", "", day.workers),
        ("requests to the store", "/s", day.requests_per_second),
        ("bytes in the store", "GB", day.bytes_stored / 1e9),
        ("rows in the registry", "million", day.rows / 1e6),
    ):
        how = "arithmetic, from the rows above, spread evenly over the day"
        yield (f"{A_DAY:,} such releases a day: {name}", None, False, unit, (value,), how)


def _counted(there: Place, count: int) -> Counts:
    """What new items add; through proxies, which is why they are not timed."""
    from proxy import proxied

    environment = there.environment
    # Others than before: what is there already is not stored again.
    first = len(list((there.folder / "checkpoints").iterdir()))
    plan = there.plan(there.checkpoints(first + count)[first:])
    with (
        proxied(environment["MLFLOW_S3_ENDPOINT_URL"]) as store,
        proxied(environment["MLFLOW_TRACKING_URI"]) as registry,
    ):
        before = there.count(store, registry)
        addresses = {
            "MLFLOW_S3_ENDPOINT_URL": store.address,
            "MLFLOW_TRACKING_URI": registry.address,
        }
        there.client(plan, environment=addresses)
        return there.count(store, registry).since(before)


def _counted_rows(counts: Counts, items: int) -> Iterator[Found]:
    def each(name: str, unit: str, total: float, said: str) -> Found:
        return (f"an item: {name}", None, False, unit, (total / items,), said)

    for service in ("store", "registry"):
        methods = {
            name.partition(" ")[2]: n / items
            for name, n in counts.requests.items()
            if name.startswith(f"{service} ")
        }
        yield each(
            f"requests to the {service}",
            "",
            counts.of_service(service),
            f"{items} new items, counted by a proxy before it; {_listed(methods, '.1f')}",
        )
    stored = {kind: size / items / 1e3 for kind, size in counts.stored.items()}
    yield each(
        "bytes in the store",
        "MB",
        counts.stored.total() / 1e6,
        f"sizes of all objects after less before, kB: {_listed(stored, '.0f')}",
    )
    yield each(
        "bytes to and from the store",
        "MB",
        counts.moved / 1e6,
        "bodies of requests and answers; whatever is uploaded is read back",
    )
    by_table = {table: n / items for table, n in counts.rows.items()}
    yield each(
        "rows in the registry",
        "",
        counts.rows.total(),
        f"all tables after less before; {_listed(by_table, '.1f')}; the database has grown by "
        f"{counts.database / items / 1e3:.0f} kB an item",
    )


def _registry_history(there: Place, sizes: Sizes) -> Iterator[Found]:
    """What a release asks of a name with many versions."""
    from heimdall_onnx.services.registry import MLflowTracker

    tracker = MLflowTracker(there.environment["MLFLOW_TRACKING_URI"])
    source = f"s3://{BUCKET}/models/localization/v20260101_000000"
    name = "history"
    tracker.set_alias(name, tracker.register_model(name, _with_mlmodel(there, source)), "staging")
    few, many = sizes.history // 100, sizes.history
    asked = {
        "where an alias points": lambda: tracker.alias_target(name, "staging"),
        "another version": lambda: tracker.register_model(name, source),
    }
    found: dict[str, dict[int, list[float]]] = {what: {few: [], many: []} for what in asked}
    for count in (few, many):
        _add_versions(there.database, name, count)
        for _ in range(_QUESTIONS):
            for what, ask in asked.items():
                began = time.perf_counter()
                ask()
                found[what][count].append(1000 * (time.perf_counter() - began))
    for what, times in found.items():
        yield (
            f"the registry, {what}: {many:,} versions / {few:,}",
            None,
            False,
            "×",
            tuple(a / b for a, b in zip(times[many], times[few], strict=True)),
            f"all versions of one name; {_QUESTIONS} questions each, {_median(times[few])} and "
            f"{_median(times[many])} ms",
        )


def _with_mlmodel(there: Place, source: str) -> str:
    """The folder, with all in it that registering looks for."""
    bucket, key = parse_uri(source)
    client = make_client(_settings(there.environment))
    client.put_object(Bucket=bucket, Key=f"{key}/MLmodel", Body=b"")
    return source


def _add_versions(database: str, name: str, count: int) -> None:
    """Copies of the name's first version, up to so many."""
    engine = sqlalchemy.create_engine(database)
    with engine.begin() as connection:
        table = sqlalchemy.Table("model_versions", sqlalchemy.MetaData(), autoload_with=connection)
        own = sqlalchemy.select(table).where(table.c.name == name).order_by(table.c.version)
        first, *_ = there_are = connection.execute(own).mappings().all()
        copies = [{**first, "version": n} for n in range(there_are[-1]["version"] + 1, count + 1)]
        if copies:
            connection.execute(table.insert(), copies)
    engine.dispose()


def _store_history(there: Place, sizes: Sizes) -> Iterator[Found]:
    """A page of a folder that has many releases."""
    client, prefix = make_client(_settings(there.environment)), "models/history"
    few, many = sizes.history // 10, sizes.history
    start = datetime(2026, 1, 1, tzinfo=UTC)
    versions = [f"v{start + timedelta(minutes=n):%Y%m%d_%H%M%S}" for n in range(many)]
    seconds: dict[int, list[float]] = {few: [], many: []}
    requests: list[str] = []
    client.meta.events.register("before-call.s3", lambda model, **_: requests.append(model.name))
    before = 0
    for count in (few, many):
        keys = [
            f"{prefix}/{version}/{name}"
            for version in versions[before:count]
            for name in ("manifest.json", "model.onnx")
        ]
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda key: client.put_object(Bucket=BUCKET, Key=key), keys))
        before = count
        requests.clear()
        for _ in range(_QUESTIONS):
            began = time.perf_counter()
            page = Bucket(client, BUCKET).list_versions(
                prefix, after=versions[count // 2], limit=_PAGE
            )
            seconds[count].append(time.perf_counter() - began)
            if len(page) != _PAGE:
                raise RuntimeError(f"expected a page of {_PAGE} versions, found {len(page)}")
    yield (
        f"a page of {_PAGE} releases: {many:,} in the folder / {few:,}",
        None,
        False,
        "×",
        tuple(a / b for a, b in zip(seconds[many], seconds[few], strict=True)),
        f"from the middle; {_median([1000 * s for s in seconds[few]])} and "
        f"{_median([1000 * s for s in seconds[many]])} ms, "
        f"{len(requests) / _QUESTIONS:g} requests each",
    )


def _listed(values: Mapping[str, float], form: str) -> str:
    largest = sorted(values.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{name} {value:{form}}" for name, value in largest)


def _median(values: Sequence[float]) -> str:
    middle = statistics.median(values)
    return f"{middle:.{max(0, 1 - math.floor(math.log10(middle)))}f}"
