"""Faults in great numbers, on services of their own: ``python tests/soak [PART …]``.

Every part prints how many faults it has tried, how many runs have survived theirs, and every
violation of what must hold of releases at every instant. Random choices follow the seed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

# Read when PyTorch is imported: small models on several threads only wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"
for _name in list(os.environ):
    if _name.startswith(("MLFLOW_", "AWS_", "HEIMDALL_")) and _name != "HEIMDALL_RECORDINGS":
        del os.environ[_name]
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
# Where the tests' own modules are, for this process and for kernels.
_TESTS = Path(__file__).resolve().parents[1] / "support"
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (str(_TESTS), os.environ.get("PYTHONPATH")))
)
sys.path.insert(1, str(_TESTS))

import kills  # noqa: E402
import machine  # noqa: E402
import outages  # noqa: E402
import races  # noqa: E402
from tally import Tally  # noqa: E402


def _fuzz(count: int, seed: int, folder: Path) -> Tally:
    import fuzz

    found = fuzz.run(count, seed=seed)
    tried = count * len(fuzz.TARGETS)
    return Tally(
        "fuzz", tried, tried - found, [f"{found} violations, printed above"] if found else []
    )


# Each with the faults that it tries by default; mutated inputs are counted for each reader.
PARTS: dict[str, tuple[Callable[[int, int, Path], Tally], int]] = {
    "kills": (kills.run, 300),
    "services": (outages.run, 180),
    "disk": (machine.full_disk, 10),
    "clock": (machine.wrong_clock, 1),
    "concurrency": (races.run, 16),
    "fuzz": (_fuzz, 2000),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; the exit code tells whether there were no violations."""
    parser = argparse.ArgumentParser(prog="python tests/soak", description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--count", type=int, help="faults of each part")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice")
    chosen = parser.parse_args(arguments)
    if unknown := set(chosen.parts) - PARTS.keys():
        parser.error(f"there is no part {', '.join(sorted(unknown))}; known are {', '.join(PARTS)}")
    # Ended from outside as by Ctrl-C, so that its services end with it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    tallies = []
    for part in chosen.parts or PARTS:
        work = Path(tempfile.mkdtemp(prefix=f"heimdall-soak-{part}-"))
        started = time.monotonic()
        try:
            run, count = PARTS[part]
            tallies.append(run(chosen.count or count, chosen.seed, work))
        except KeyboardInterrupt:
            print(f"{part}: interrupted; what was tried until then is above", flush=True)
            return 130
        finally:
            shutil.rmtree(work, ignore_errors=True)
        print(f"\n{tallies[-1]}\n    in {time.monotonic() - started:.0f} s\n", flush=True)
    return 1 if any(tally.violations for tally in tallies) else 0


if __name__ == "__main__":
    sys.exit(main())
