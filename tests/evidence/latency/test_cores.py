"""Locks on processors: who gets them, who does not, and what is said of it."""

import os
import signal
import stat
import threading

import pytest
from holder import holder

from heimdall_onnx.common.errors import BenchmarkError
from heimdall_onnx.common.parameters import ReleaseParameters
from heimdall_onnx.common.verdict import NotMeasured, unless_not_measured
from heimdall_onnx.evidence.gates import decide
from heimdall_onnx.evidence.latency import cores
from heimdall_onnx.evidence.latency.cores import Cores, exclusive_cores, lock_folder, usable_cores
from heimdall_onnx.evidence.latency.timed import EXCLUSIVE_CORES, TimedSteps

ALL = sorted(os.sched_getaffinity(0))
EXCLUSIVE = ReleaseParameters(exclusive_cores=True)
two_cores = pytest.mark.skipif(len(ALL) < 2, reason="this machine gives one processor only")


@pytest.fixture
def on():
    """A function that restricts this process to some processors until the test ends."""
    yield lambda *numbers: os.sched_setaffinity(0, numbers)
    os.sched_setaffinity(0, ALL)


# Locks


def test_cores_are_those_of_the_affinity_and_held_only_within_the_block(tmp_path):
    before = usable_cores()
    assert before == Cores(os.uname().nodename, tuple(ALL), exclusive=False)
    with exclusive_cores(tmp_path) as held:
        assert held == usable_cores() == Cores(before.host, before.numbers, exclusive=True)
    assert usable_cores() == before
    with exclusive_cores(tmp_path):
        pass  # they can be had again


def test_cores_of_another_process_are_refused_at_once_naming_them_and_it(tmp_path):
    with holder(tmp_path) as process, pytest.raises(BenchmarkError) as refused:
        exclusive_cores(tmp_path).__enter__()
    words = str(refused.value)
    assert f"another measurement holds cores of {os.uname().nodename}: " in words
    every = f"cores {ALL[0]}-{ALL[-1]}" if len(ALL) > 1 else f"core {ALL[0]}"
    assert f"{every} by process {process.pid};" in words
    assert not usable_cores().exclusive
    with exclusive_cores(tmp_path):
        pass  # it has ended


@two_cores
def test_what_was_taken_before_a_core_of_another_is_given_back(tmp_path, on):
    with holder(tmp_path, ALL[-1]) as process:
        with pytest.raises(BenchmarkError, match=f": core {ALL[-1]} by process {process.pid};"):
            exclusive_cores(tmp_path).__enter__()
        on(*ALL[:-1])
        with exclusive_cores(tmp_path) as held:
            assert held.numbers == tuple(ALL[:-1])


@two_cores
def test_disjoint_cores_do_not_contend(tmp_path, on):
    on(ALL[0])
    with holder(tmp_path, ALL[1]), exclusive_cores(tmp_path) as held:
        assert (held.numbers, held.exclusive) == ((ALL[0],), True)
        os.sched_setaffinity(0, ALL)
        assert not usable_cores().exclusive  # not of the other one


def test_killed_holder_releases(tmp_path):
    with holder(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(list(tmp_path.iterdir())) == len(ALL)
        with exclusive_cores(tmp_path) as held:
            assert held.exclusive


def test_failed_measurement_releases(tmp_path):
    with pytest.raises(ZeroDivisionError), exclusive_cores(tmp_path):
        1 / 0  # noqa: B018
    with exclusive_cores(tmp_path):
        pass


def test_second_measurement_of_the_same_process_is_refused_too(tmp_path):
    found = []

    def measure():
        try:
            with exclusive_cores(tmp_path):
                found.append("held")
        except BenchmarkError as error:
            found.append(str(error))

    with exclusive_cores(tmp_path):
        thread = threading.Thread(target=measure)
        thread.start()
        thread.join()
    assert f"by process {os.getpid()};" in found[0]


def test_files_are_for_every_user_whatever_the_first_ones_mask(tmp_path):
    with holder(tmp_path):
        modes = {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert modes == {0o666}


@pytest.mark.parametrize("listed", [None, "", "7: -> FLOCK  ADVISORY  WRITE 1 00:00:0 0 EOF\n"])
def test_holder_that_the_system_does_not_tell_is_unknown(tmp_path, monkeypatch, listed):
    locks = tmp_path / "proc-locks"
    if listed is not None:
        locks.write_text(listed)
    monkeypatch.setattr(cores, "PROC_LOCKS", locks)
    folder = tmp_path / "locks"
    folder.mkdir()
    with (
        exclusive_cores(folder),
        pytest.raises(BenchmarkError, match=f": core {ALL[0]} by an unknown process; "),
    ):
        exclusive_cores(folder).__enter__()


def test_lock_that_can_not_be_used_is_named(tmp_path):
    lock = tmp_path / f"heimdall-onnx-core-{ALL[0]}.lock"
    lock.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BenchmarkError, match=f"core {ALL[0]} of .* can't be held: its lock {lock}"):
        exclusive_cores(tmp_path).__enter__()
    assert not (tmp_path / "elsewhere").exists()


def test_folder_is_one_that_every_user_can_write_to_whatever_theirs_for_temporary_files(
    tmp_path, monkeypatch
):
    own, shared = tmp_path / "own", tmp_path / "shared"
    own.mkdir(mode=0o755)
    shared.mkdir()
    shared.chmod(0o1777)
    monkeypatch.setenv("TMPDIR", str(own))
    monkeypatch.setattr(cores, "LOCK_FOLDERS", (str(tmp_path / "none"), str(own), str(shared)))
    assert lock_folder() == shared
    monkeypatch.setattr(cores, "LOCK_FOLDERS", ())
    monkeypatch.setattr(cores.tempfile, "tempdir", str(own))
    assert lock_folder() == own


def test_folder_of_this_machine_is_there():
    assert lock_folder().stat().st_mode & stat.S_IRWXO == stat.S_IRWXO


@pytest.mark.parametrize(
    ("numbers", "text"),
    [((3,), "core 3"), ((0, 1), "cores 0-1"), ((0, 2, 3, 4, 8), "cores 0, 2-4, 8")],
)
def test_cores_are_named_by_their_ranges_and_host(numbers, text):
    assert str(Cores("ship", numbers, exclusive=True)) == f"{text} of ship"


# Steps


def not_to_be_run():
    raise AssertionError("it was run")


def test_steps_are_run_without_locks_unless_they_are_asked_for(tmp_path):
    timed = TimedSteps(ReleaseParameters(), tmp_path)
    assert timed.run(usable_cores) == usable_cores()
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_timed_where_latency_is_not_measured(tmp_path):
    parameters = ReleaseParameters(measure_latency=False, exclusive_cores=True)
    timed = TimedSteps(parameters, tmp_path)
    found = timed.run(not_to_be_run)
    assert str(found) == "not measured: the parameter measure_latency is False"
    assert found._repr_markdown_().startswith("**Not measured:** the parameter")
    assert list(tmp_path.iterdir()) == []


def test_step_that_was_not_asked_for_takes_no_core(tmp_path):
    timed = TimedSteps(EXCLUSIVE, tmp_path)
    with holder(tmp_path):
        assert timed.run(not_to_be_run, wanted=False) is None
    assert timed.run(lambda: 3) == 3


def test_cores_are_held_from_the_first_step_to_the_end(tmp_path):
    timed = TimedSteps(EXCLUSIVE, tmp_path)
    assert timed.run(usable_cores).exclusive
    with pytest.raises(BenchmarkError):
        exclusive_cores(tmp_path).__enter__()
    assert timed.run(usable_cores).exclusive
    timed.end()
    assert not usable_cores().exclusive
    assert timed.gate().passed
    assert timed.gate().detail == str(usable_cores())


def test_cores_that_nobody_waits_for_any_more_are_let_go(tmp_path):
    """As where a notebook's cell is run again."""
    timed = TimedSteps(EXCLUSIVE, tmp_path)
    timed.run(lambda: None)
    timed = TimedSteps(EXCLUSIVE, tmp_path)
    assert timed.run(usable_cores).exclusive
    timed.end()


def test_taken_cores_fail_the_gate_and_run_no_step_however_soon_they_are_free(tmp_path):
    timed = TimedSteps(EXCLUSIVE, tmp_path)
    with holder(tmp_path) as process:
        found = timed.run(not_to_be_run)
    assert isinstance(found, NotMeasured)
    assert timed.run(not_to_be_run) is found
    gate = timed.gate()
    assert (gate.name, gate.passed, gate.measured) == (EXCLUSIVE_CORES, False, "taken")
    assert f"by process {process.pid};" in gate.detail


def test_error_of_a_step_is_the_steps_own(tmp_path):
    timed = TimedSteps(EXCLUSIVE, tmp_path)
    with pytest.raises(AssertionError, match="it was run"):
        timed.run(not_to_be_run)
    timed.end()


class NoParity:
    uncertainty = ()

    def gates(self):
        return ()


class Info:
    opset_version, signature_problems = 20, ()


@pytest.mark.parametrize(
    ("parameters", "timed", "passed"),
    [
        (ReleaseParameters(), None, None),
        (ReleaseParameters(measure_latency=False, exclusive_cores=True), None, None),
        (EXCLUSIVE, None, False),  # a notebook of one's own that leaves it out
        (EXCLUSIVE, "unused", False),
        (EXCLUSIVE, "used", True),
    ],
)
def test_gate_is_there_where_exclusive_cores_are_asked_for(tmp_path, parameters, timed, passed):
    steps = TimedSteps(parameters, tmp_path) if timed else None
    if timed == "used":
        steps.run(lambda: None)
        steps.end()
    verdict = decide(parameters, Info(), NoParity(), steps)
    found = {gate.name: gate.passed for gate in verdict.gates}
    assert found.get(EXCLUSIVE_CORES) == passed


def test_what_was_not_measured_is_shown_instead():
    @unless_not_measured
    def shown(found, factor=1):
        """What it does."""
        return found * factor

    assert shown(3, factor=2) == 6
    assert shown.__doc__ == "What it does."
    missing = NotMeasured("a <reason>")
    assert shown(missing, factor=2) is missing
    assert "<" not in missing._repr_markdown_()
