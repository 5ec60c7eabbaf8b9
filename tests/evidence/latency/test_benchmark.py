"""Latency: who runs where, in which order, and what the numbers may claim."""

import html
import json
import math
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import jobs
import numpy as np
import psutil
import pytest
import records
import torch
from models import SmallNet

from heimdall_onnx.common.errors import BenchmarkError, EvidenceError
from heimdall_onnx.common.parameters import PROFILES, ReleaseParameters
from heimdall_onnx.data.evaluation import EvaluationData
from heimdall_onnx.evidence.latency import benchmark, contenders
from heimdall_onnx.evidence.latency.benchmark import benchmark_model, measure_latency
from heimdall_onnx.evidence.latency.contenders import Contestant, Worker
from heimdall_onnx.evidence.latency.cores import Cores
from heimdall_onnx.evidence.latency.statistics import (
    PERCENTILES,
    min_queries,
    paired_speedup,
    percentiles_with_intervals,
)
from heimdall_onnx.evidence.latency.timed import TimedSteps
from heimdall_onnx.model.examples import generic_inputs
from heimdall_onnx.model.onnx.export import export_model
from heimdall_onnx.model.runtimes import Contender, SessionSettings
from heimdall_onnx.report import tables

SIGNATURE = SmallNet.signature
TESTS = Path(__file__).parents[2] / "support"


@pytest.fixture(scope="module")
def onnx_path(tmp_path_factory):
    return export_model(SmallNet(), tmp_path_factory.mktemp("onnx") / "m.onnx", opset=17).path


@pytest.fixture
def worker(tmp_path):
    """A function that makes a worker for a job."""
    return lambda job, name="contender", threads=1: Worker(name, job, tmp_path, threads)


def gone(pid, seconds=60.0):
    """Whether the process ends in time; one that waits to be reaped has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


# Numbers


@pytest.mark.parametrize(
    ("percentile", "wanted"), [(50, 11), (90, 64), (95, 130), (99, 662), (99.9, 6636)]
)
def test_fewest_samples_behind_each_percentile(percentile, wanted):
    assert min_queries(percentile) == wanted
    below = percentile / 100

    def at_least_two_beyond(n):
        return 1 - below**n - n * (1 - below) * below ** (n - 1)

    assert at_least_two_beyond(wanted) > 0.99 >= at_least_two_beyond(wanted - 1)


@pytest.mark.parametrize(
    ("count", "given"),
    [(10, []), (11, [50]), (63, [50]), (64, [50, 90]), (661, [50, 90, 95]), (6636, PERCENTILES)],
)
def test_percentile_without_enough_samples_is_not_given(count, given):
    found = percentiles_with_intervals(np.arange(float(count)))
    assert [p.percentile for p in found] == list(given)


@pytest.mark.parametrize(
    "count", [11, *(pytest.param(n, marks=pytest.mark.thorough) for n in (64, 130, 662)), 200]
)
def test_intervals_cover_the_true_percentile_as_often_as_they_say(count):
    """Also with the fewest samples allowed, where an end may be the largest one."""
    rng = np.random.default_rng(count)
    trials = 400
    hits = dict.fromkeys((p for p in PERCENTILES if min_queries(p) <= count), 0)
    for _ in range(trials):
        for found in percentiles_with_intervals(rng.exponential(size=count)):
            true = -math.log1p(-found.percentile / 100)
            assert found.low_ms <= found.value_ms <= found.high_ms < math.inf
            hits[found.percentile] += found.low_ms <= true <= found.high_ms
    for percentile, count_of_hits in hits.items():
        # Order statistics are conservative, so the upper bound only refuses "always".
        assert 0.92 <= count_of_hits / trials < 0.9975, percentile


def test_percentile_is_that_of_the_samples():
    samples = np.random.default_rng(0).permutation(np.arange(1.0, 202.0))
    median, p90, p95 = percentiles_with_intervals(samples)
    assert (median.value_ms, p90.value_ms, p95.value_ms) == (101, 181, 191)


def blocks(values, seed=0):
    return [np.array([v, v * 3, v / 2]) for v in values]


def test_speedup_is_the_median_of_paired_ratios_and_ignores_a_shared_drift():
    drift = 2.0 ** np.arange(9)
    ratios = np.array([2, 2.5, 3, 1.5, 4, 2.2, 2.1, 2.3, 2.4])
    speedup = paired_speedup(blocks(drift * ratios), blocks(drift))
    assert speedup.ratio == pytest.approx(2.3)
    assert (speedup.low, speedup.high) == pytest.approx((2.0, 3.0))
    assert speedup.pairs == 9


def test_interval_of_few_pairs_is_their_range():
    speedup = paired_speedup(blocks([2, 4, 3]), blocks([1, 1, 1]))
    assert (speedup.low, speedup.ratio, speedup.high, speedup.pairs) == (2, 3, 4, 3)


@pytest.mark.parametrize("pairs", [6, pytest.param(20, marks=pytest.mark.thorough)])
def test_interval_of_the_speedup_covers_the_true_ratio(pairs):
    rng = np.random.default_rng(pairs)
    hits = 0
    for _ in range(600):
        slow = [rng.lognormal(math.log(3), 0.3, 1) for _ in range(pairs)]
        fast = [rng.lognormal(0, 0.3, 1) for _ in range(pairs)]
        found = paired_speedup(slow, fast)
        hits += found.low <= 3 <= found.high
    assert 0.93 <= hits / 600 <= 0.99


# Turns


class Recorder:
    """Stands where a worker stands, and writes down its turns."""

    def __init__(self, name, order, seconds=0.0):
        self.name, self.order, self.seconds, self.calls = name, order, seconds, 0

    def run_block(self, count, batch_size=None):
        self.order.append(self.name)
        self.calls += count
        time.sleep(self.seconds)


def take_turns(calls, *, seed=0, min_seconds=0.0, seconds=0.0):
    order = []
    workers = [Recorder("A", order, seconds), Recorder("B", order, seconds)]
    rounds = benchmark.take_turns(workers, calls, min_seconds, random.Random(seed))
    return rounds, "".join(order), [w.calls for w in workers]


@pytest.mark.parametrize("calls", [1, 5, 11, 30, 200, 1024])
def test_rounds_are_abba_or_baab_with_enough_calls_and_pairs(calls):
    rounds, order, counts = take_turns(calls)
    parts = [order[i : i + 4] for i in range(0, len(order), 4)]
    assert set(parts) <= {"ABBA", "BAAB"}
    assert len(parts) == rounds
    assert calls <= counts[0] == counts[1] <= max(calls + 2 * benchmark.BLOCK_CALLS, 6)
    assert order.count("A") == order.count("B") >= 6


def test_both_orders_occur_about_equally_often_and_the_seed_settles_them():
    _, order, _ = take_turns(4000)
    assert 0.4 < order[::4].count("A") / (len(order) / 4) < 0.6
    assert take_turns(4000)[1] == order != take_turns(4000, seed=1)[1]


def test_least_duration_is_kept_too():
    started = time.monotonic()
    rounds, _, _ = take_turns(6, min_seconds=0.3, seconds=0.005)
    assert time.monotonic() - started >= 0.3
    assert rounds > 3


# Workers


def test_worker_is_another_process_and_ends_with_its_context(worker, tmp_path):
    facts = tmp_path / "facts"
    with worker(partial(jobs.observe, jobs.do_nothing, facts), threads=3) as contender:
        contender.start()
        found = json.loads(facts.read_text())
        assert found["openmp"] == "3"
        assert found["parent"] == os.getpid() != found["pid"]
    assert not psutil.pid_exists(found["pid"])


def test_worker_answers_with_every_latency_in_order(worker):
    with worker(partial(jobs.load_sleeper, 0.002), "sleepy one") as contender:
        contender.start()
        for calls in (3, 1, 4):
            contender.run_block(calls)
        found = contender.latency()
    assert found.name == "sleepy one"
    assert found.blocks.tolist() == [0, 0, 0, 1, 2, 2, 2, 2]
    assert (found.samples_ms >= 2).all()
    np.testing.assert_array_equal(found.samples_ms, np.concatenate(contender.blocks))
    assert found.mean_ms == found.samples_ms.mean()
    assert found.median_ms == np.median(found.samples_ms)
    assert (found.percentiles, found.percentile(50)) == ((), None)
    assert found.first_call_ms >= 2
    assert 0 <= found.load_ms < 1000


def test_slower_contender_is_found_slower_by_about_as_much(worker):
    with (
        worker(partial(jobs.load_sleeper, 0.09), "slow") as slow,
        worker(partial(jobs.load_sleeper, 0.01), "fast") as fast,
    ):
        slow.start()
        fast.start()
        benchmark.take_turns([slow, fast], 12, 0, random.Random(0))
    speedup = paired_speedup(slow.blocks, fast.blocks)
    # Nine times; a busy machine wakes nobody in time.
    assert 3 < speedup.low <= speedup.ratio <= speedup.high < 27


def test_peak_memory_is_the_workers_own(worker):
    ballast = np.ones(40_000_000)  # 320 MB that a fork would have inherited
    with (
        worker(jobs.do_nothing, "small") as small,
        worker(partial(jobs.allocate, 150_000_000), "large") as large,
    ):
        for contender in (small, large):
            contender.start()
            contender.run_block(1)
        peaks = [contender.latency().peak_memory_bytes for contender in (small, large)]
    assert 5e6 < peaks[0] < 150e6
    assert 150e6 < peaks[1] < 300e6 < ballast.nbytes


def test_onnx_contender_has_its_threads_and_no_pytorch(worker, onnx_path, tmp_path):
    inputs = generic_inputs(SIGNATURE, 1)
    found = {}
    for threads in (1, 3):
        settings = SessionSettings(threads=threads)
        job = partial(Contender, onnx_path, inputs, SIGNATURE, settings)
        facts = tmp_path / "facts"
        with worker(partial(jobs.observe, job, facts)) as contender:
            contender.start()
        found[threads] = json.loads(facts.read_text())
        assert found[threads]["imported"] == found[threads]["mapped"] == ["onnxruntime"]
    # Whatever else runs in the process, two more threads are two more.
    assert found[3]["threads"] - found[1]["threads"] == 2


def test_printing_does_not_disturb_the_answers(worker, capfd):
    with worker(jobs.print_noise) as contender:
        contender.start()
        contender.run_block(3)
    assert contender.blocks[0].size == 3
    assert "noise" not in "".join(capfd.readouterr())


def test_interrupt_is_for_the_parent(worker):
    with worker(jobs.do_nothing) as contender:
        contender.start()
        os.kill(contender.process.pid, signal.SIGINT)
        contender.run_block(2)
    assert contender.blocks[0].size == 2


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (partial(jobs.fail_to_load, "no weights"), "slow one failed .*: ValueError: no weights"),
        (partial(jobs.fail_to_run, "no input"), "slow one failed .*: ValueError: no input"),
        (partial(jobs.leave, 7), "process of slow one ended: exit status 7; last words"),
        (partial(jobs.die_later, 0), "process of slow one ended: exit status -9; no message"),
    ],
)
def test_worker_that_fails_says_how(worker, job, words):
    with worker(job, "slow one") as contender, pytest.raises(BenchmarkError, match=words):
        contender.start()
    assert contender.process.poll() is not None


def test_worker_killed_between_blocks_is_noticed(worker):
    with worker(partial(jobs.die_later, 1 + 5 + 1 + 4)) as contender:
        contender.start()
        contender.run_block(3)
        with pytest.raises(BenchmarkError, match="exit status -9"):
            contender.run_block(3)
        with pytest.raises(BenchmarkError, match="exit status -9"):
            contender.run_block(3)  # its pipe is broken by now


def test_worker_that_hangs_is_given_up_and_ended(worker, monkeypatch):
    monkeypatch.setattr(contenders, "WORKER_TIMEOUT_S", 1.0)
    monkeypatch.setattr(contenders, "ENDS_WITHIN_S", 0.0)
    with worker(partial(jobs.load_sleeper, 600)) as contender:
        with pytest.raises(BenchmarkError, match="contender gave no answer in 1 s"):
            contender.start()
        pid = contender.process.pid
    assert not psutil.pid_exists(pid)


def test_job_that_nobody_reads_is_given_up_however_large(worker, monkeypatch):
    monkeypatch.setattr(contenders, "WORKER_TIMEOUT_S", 0.2)
    monkeypatch.setattr(contenders, "ENDS_WITHIN_S", 0.0)
    with worker(partial(jobs.fail_to_load, "x" * 10_000_000)) as contender:
        os.kill(contender.process.pid, signal.SIGSTOP)
        with pytest.raises(BenchmarkError, match=r"contender gave no answer in 0\.2 s"):
            contender.start()


def test_pipe_is_closed_where_the_process_can_not_be_started(worker, monkeypatch):
    contender, ends = worker(jobs.do_nothing), contenders.Pipe()
    monkeypatch.setattr(contenders, "Pipe", lambda: ends)
    monkeypatch.setattr(contenders.sys, "executable", "no such program")
    with pytest.raises(FileNotFoundError):
        contender.__enter__()
    assert [end.closed for end in ends] == [True, True]


def test_workers_end_when_their_parent_is_killed(tmp_path):
    code = (
        "import sys, time; from functools import partial; from pathlib import Path; import jobs\n"
        "from heimdall_onnx.evidence.latency.benchmark import Worker\n"
        "folder = Path(sys.argv[1])\n"
        "with Worker('a', jobs.do_nothing, folder, 1) as a, "
        "Worker('b', partial(jobs.load_sleeper, 0.01), folder, 1) as b:\n"
        "    a.start(); b.start()\n"
        "    print(a.process.pid, b.process.pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=TESTS, stdout=subprocess.PIPE, text=True
    )
    with parent:
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert all(map(psutil.pid_exists, pids))
        parent.kill()
    assert all(map(gone, pids))


# All together


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder for temporary files, empty."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_local_model_is_measured_in_its_own_process_with_the_threads_asked_for(
    onnx_path, temporary, tmp_path, capfd
):
    facts, wanted = tmp_path / "facts", torch.get_num_threads() + 1

    class Talkative(SmallNet):
        """Only cloudpickle can send a class of a function."""

        def forward(self, signal):
            print("noise", flush=True)  # noqa: T201
            facts.write_text(f"{os.getpid()} {torch.get_num_threads()} {self.training}")
            return super().forward(signal)

    report = measure_latency(
        Talkative(),
        onnx_path,
        generic_inputs(SIGNATURE, 2),
        SIGNATURE,
        calls=66,
        threads=wanted,
    )
    pid, threads, training = facts.read_text().split()
    assert (int(threads), training) == (wanted, "False")
    assert int(pid) != os.getpid()
    assert not psutil.pid_exists(int(pid))
    assert (report.batch_size, report.threads) == (2, wanted)
    assert (report.pytorch.name, report.onnx.name) == ("PyTorch", "ONNX Runtime")
    for contender in (report.pytorch, report.onnx):
        assert contender.samples_ms.size == 80
        assert [p.percentile for p in contender.percentiles] == [50, 90]
        assert contender.load_ms > 0
        assert contender.first_call_ms > 0
    assert report.speedup.pairs == 8
    assert report.onnx.peak_memory_bytes < 0.7 * report.pytorch.peak_memory_bytes
    assert report.speedup.low <= report.speedup.ratio <= report.speedup.high
    assert report.confidence == 0.95
    assert list(temporary.iterdir()) == []
    assert "noise" not in "".join(capfd.readouterr())


def test_further_batch_sizes_are_measured_after_the_first(onnx_path, tmp_path):
    log = tmp_path / "sizes"

    class Sized(SmallNet):
        """Slow, so that nobody takes its times for the other's."""

        def forward(self, signal):
            with log.open("a") as file:
                file.write(f"{len(signal)} ")
            time.sleep(0.02)
            return super().forward(signal)

    report = measure_latency(
        Sized(),
        onnx_path,
        generic_inputs(SIGNATURE, 2),
        SIGNATURE,
        calls=12,
        threads=1,
        batch_sizes=(8, 1, 2, 8),
        batch_calls=3,
    )
    assert [b.batch_size for b in report.batches] == [1, 2, 8]
    assert [b.samples_ms[0].size for b in report.batches] == [3, 12, 3]
    assert [b.samples_ms[1].size for b in report.batches] == [3, 12, 3]
    # The main measurement is over before the others begin, and is what the report speaks of.
    sizes = log.read_text().split()
    assert sizes == ["2"] * sizes.count("2") + ["1"] * 4 + ["8"] * 4
    np.testing.assert_array_equal(report.batches[1].samples_ms[0], report.pytorch.samples_ms)
    assert report.batch_size == 2
    assert report.speedup.low > 2
    assert report.speedup.pairs == 6
    for found in report.batches:
        assert found.samples_ms[0].min() >= 20 > found.samples_ms[1].min()


def test_throughput_of_a_pair_is_in_its_order(worker, tmp_path):
    class Sleeper(Contestant):
        def worker(self, inputs, signature, folder, place=""):
            return worker(partial(jobs.load_sleeper_of_any_size, float(self.path.name)), self.name)

    slow, fast = (
        Sleeper(name, tmp_path / seconds, SessionSettings())
        for name, seconds in (("slow", "0.04"), ("fast", "0"))
    )
    inputs = generic_inputs(SIGNATURE, 2)
    found = benchmark.measure_pair(
        slow, fast, inputs, SIGNATURE, calls=6, batch_sizes=(8,), batch_calls=2
    )
    assert (found.first.name, found.second.name, found.batch_size) == ("slow", "fast", 2)
    assert found.speedup.low > 1
    assert [side.batch_size for side in found.throughput] == [8, 8]
    assert (
        found.throughput[0].samples_per_second < 8 / 0.04 < found.throughput[1].samples_per_second
    )


def test_peak_memory_is_that_of_the_calls_that_count(worker, tmp_path):
    class Allocator(Contestant):
        def worker(self, inputs, signature, folder, place=""):
            return worker(partial(jobs.allocate_by_batch, 50_000_000), self.name)

    sides = (Allocator(name, tmp_path, SessionSettings()) for name in ("first", "second"))
    inputs = generic_inputs(SIGNATURE, 1)
    found = benchmark.measure_pair(
        *sides, inputs, SIGNATURE, calls=6, batch_sizes=(8,), batch_calls=1
    )
    for side in found.contenders:
        assert 50e6 < side.peak_memory_bytes < 400e6


@pytest.mark.parametrize("profile", ["smoke", "audit"])
def test_release_is_measured_as_its_parameters_say(monkeypatch, tmp_path, profile):
    asked = {}
    monkeypatch.setattr(benchmark, "measure_latency", lambda *_, **options: asked.update(options))
    parameters = ReleaseParameters(
        profile=profile, threads=3, seed=5, latency_batch_size=2, batch_size=4
    )
    data = EvaluationData(generic_inputs(SIGNATURE, 3), None, {}, "test", None, {})
    benchmark_model(SmallNet(), tmp_path / "m.onnx", data, SIGNATURE, parameters)
    limits = PROFILES[profile]
    assert asked.pop("batch_sizes") == parameters.batch_sizes
    assert asked == {
        "calls": limits.calls,
        "min_seconds": limits.min_seconds,
        "batch_calls": limits.batch_calls,
        "threads": 3,
        "seed": 5,
    }


def test_report_says_where_it_was_measured_and_who_else_could(onnx_path, tmp_path):
    parameters = ReleaseParameters(
        profile="smoke", exclusive_cores=True, latency_batch_size=2, batch_size=4, threads=1
    )
    data = EvaluationData(generic_inputs(SIGNATURE, 3), None, {}, "test", None, {})
    timed = TimedSteps(parameters, tmp_path)
    report = timed.run(lambda: benchmark_model(SmallNet(), onnx_path, data, SIGNATURE, parameters))
    timed.end()
    assert (report.batch_size, report.threads) == (2, 1)
    assert report.onnx.samples_ms.size >= PROFILES["smoke"].calls
    assert [b.batch_size for b in report.batches] == [1, 2, 4]
    cores = tuple(sorted(os.sched_getaffinity(0)))
    assert report.cores == Cores(platform.node(), cores, exclusive=True)
    record = records.record().model_copy(update={"latency": report})
    found = json.loads(json.dumps(record.to_json(), allow_nan=False))["latency"]
    assert found["cores"] == {"host": platform.node(), "numbers": [*cores], "exclusive": True}
    assert found["machine"].keys() >= {"user_share", "load_before", "load_after"}
    assert [one["calls"] for one in found["contenders"]] == [report.onnx.samples_ms.size] * 2
    shared = replace(report, cores=replace(report.cores, exclusive=False))
    for shown, words in ((report, "yes, held against"), (shared, "not held: other measurements")):
        text = html.unescape(tables.machine_table(shown).data)
        assert f"| measured on | {report.cores} |" in text
        assert f"| exclusively ours | {words}" in text
        assert "`" not in text
        assert "processors busy" in text


@pytest.mark.thorough
def test_model_of_a_script_is_measured(onnx_path, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys; from pathlib import Path\n"
        "from models import SmallNet\n"
        "from heimdall_onnx.evidence.latency.benchmark import measure_latency\n"
        "from heimdall_onnx.model.examples import generic_inputs\n"
        "class Mine(SmallNet):\n"
        "    def forward(self, signal):\n"
        "        return super().forward(signal)\n"
        "if __name__ == '__main__':\n"
        "    report = measure_latency(Mine(), Path(sys.argv[1]),\n"
        "        generic_inputs(Mine.signature, 1), Mine.signature, calls=6, threads=1)\n"
        "    print(report.speedup.pairs)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), str(onnx_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.splitlines()[-1:] == ["6"], done.stderr


def test_model_that_can_not_be_pickled_is_refused_in_words(onnx_path, temporary):
    model = SmallNet()
    model.lock = threading.Lock()
    with pytest.raises(EvidenceError, match=r"SmallNet can't be handed .*lock"):
        measure_latency(model, onnx_path, generic_inputs(SIGNATURE, 1), SIGNATURE)
    assert list(temporary.iterdir()) == []


def test_failure_of_one_contender_ends_the_other_and_leaves_no_files(
    tmp_path, temporary, monkeypatch
):
    started, enter = [], Worker.__enter__

    def remember(self):
        started.append(enter(self))
        return self

    monkeypatch.setattr(Worker, "__enter__", remember)
    with pytest.raises(BenchmarkError, match=r"ONNX Runtime failed .*InvalidModelError"):
        measure_latency(
            SmallNet(), tmp_path / "none.onnx", generic_inputs(SIGNATURE, 1), SIGNATURE, threads=1
        )
    assert [w.process.poll() is not None for w in started] == [True, True]
    assert list(temporary.iterdir()) == []
