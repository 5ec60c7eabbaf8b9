"""Many releases at the same second, and reviewers who move one alias at the same time."""

from __future__ import annotations

import random
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from invariants import Place, violations
from models import SmallNet
from places import lanes
from releases import Inputs
from runs import short, start_release
from tally import Tally

from heimdall_onnx.archive.aliases import AliasLog
from heimdall_onnx.archive.release import Release
from heimdall_onnx.common.errors import PromotionError
from heimdall_onnx.review.compare.gates import Limits
from heimdall_onnx.review.promotion import promote_release, roll_back
from heimdall_onnx.services.connection import open_for_reading
from heimdall_onnx.services.settings import Settings
from heimdall_onnx.services.store import Bucket

_TIMEOUT_S = 1800
_REVIEWERS = 6


def different(inputs: Inputs, number: int) -> Inputs:
    """The same with another checkpoint."""
    path = inputs.checkpoint.with_name(f"model-{number}.pt")
    state = SmallNet().state_dict()
    state["position_head.bias"] += number
    torch.save(state, path)
    return replace(inputs, checkpoint=path)


def release_together(
    place: Place, settings: Settings, inputs: Inputs, notebook: Path, count: int
) -> list[str]:
    """Start ``count`` releases of different checkpoints at once; what was not as it must be."""
    each = [different(inputs, number) for number in range(count)]
    running = [
        start_release(settings, one, place.bucket, *short(notebook), name=place.name)
        for one in each
    ]
    with ThreadPoolExecutor(count) as pool:
        results = list(pool.map(lambda one: one.end(_TIMEOUT_S), running))
    found = [
        f"exit code {r['returncode']}: {r.get('error')}: {r['stderr'][-2000:]}"
        for r in results
        if r["returncode"] != 0
    ]
    for what in ("version", "model_version", "run_id", "s3_uri"):
        if len({r.get(what) for r in results}) != count:
            found.append(f"not {count} different of {what}: {[r.get(what) for r in results]}")
    if len(place.releases()) != count or len(place.versions()) != count:
        found.append(f"{len(place.releases())} releases, {len(place.versions())} versions")
    moves = AliasLog(
        Bucket(open_for_reading(place.settings).client, place.bucket), place.name, place.alias
    ).moves
    if sorted(m.release for m in moves) != place.releases():
        found.append(f"the log names {[m.release for m in moves]}")
    return found + violations(place, settled=True)


def move_together(place: Place, count: int, seed: int, alias: str = "production") -> Tally:
    """Let reviewers promote and roll back, ``count`` times, all at once."""
    rng, releases, tally = random.Random(seed), place.releases(), Tally("reviews")
    place = replace(place, alias=alias)
    wishes = [
        (rng.choice(("promote", "promote", "rollback")), rng.choice(releases), f"decision {number}")
        for number in range(count)
    ]

    def decide(wish: tuple[str, str, str]) -> str:
        connection, (what, folder, note) = open_for_reading(place.settings), wish
        said = {"alias": alias, "reviewer": "reviewer", "note": note}
        try:
            if what == "promote":
                promote_release(
                    Release.at(connection, folder),
                    limits=Limits(allow_smoke=True),
                    compare=False,
                    **said,
                )
            else:
                roll_back(connection, place.bucket, place.name, **said)
        except PromotionError as error:
            told = str(error)
            if "does not verify" in told or ": expected " in told:
                return f"refused as damaged: {told}"
            return f"{what} refused"
        except Exception as error:  # whatever it is, it is told
            return f"failed: {type(error).__name__}: {error}"
        return f"{what} done"

    with ThreadPoolExecutor(_REVIEWERS) as pool:
        outcomes = Counter(pool.map(decide, wishes))
    tally.tried = count
    tally.survived = sum(n for what, n in outcomes.items() if what.endswith("done"))
    tally.counts = Counter({w: n for w, n in outcomes.items() if not _bad(w)})
    tally.violations = [what for what in outcomes if _bad(what)]
    tally.violations += violations(place, settled=True)
    moves = AliasLog(
        Bucket(open_for_reading(place.settings).client, place.bucket), place.name, alias
    ).moves
    if len(moves) != tally.survived:
        tally.violations.append(f"{tally.survived} moves done, {len(moves)} in the log")
    return tally


def _bad(outcome: str) -> bool:
    return outcome.startswith(("failed", "refused as damaged"))


def run(count: int, seed: int, folder: Path) -> Tally:
    """``count`` releases at once, then ten times as many decisions."""
    tally = Tally("concurrency")
    with lanes(folder, "server") as (lane,):
        lane = lane.fresh()
        try:
            found = release_together(
                lane.place, lane.place.settings, lane.inputs, lane.notebook, count
            )
        except subprocess.TimeoutExpired as error:
            found = [f"no end: {error}"]
        complete = len(lane.place.releases())
        tally.tried, tally.survived, tally.violations = count, complete, found
        print(f"{count} releases at once: {complete} complete, {len(found)} violations", flush=True)
        moved = move_together(lane.place, 10 * count, seed)
        tally.tried += moved.tried
        tally.survived += moved.survived
        tally.counts = Counter({"releases complete": complete}) + moved.counts
        tally.violations += moved.violations
    return tally
