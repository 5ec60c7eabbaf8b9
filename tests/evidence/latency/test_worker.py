"""The process that times a contender, driven directly; how it is driven is in test_benchmark."""

import os
import pickle
import resource
import signal
import sys
import threading
from functools import partial
from multiprocessing import Pipe

import jobs
import pytest

from heimdall_onnx.evidence.latency import worker


class Asked:
    """Stands where the pipe stands."""

    def __init__(self, questions):
        self.questions, self.answers = list(questions), []

    def recv(self):
        if not self.questions:
            raise EOFError
        return self.questions.pop(0)

    def send(self, answer):
        self.answers.append(answer)


@pytest.fixture
def ask(tmp_path):
    """A function that lets a job answer questions."""

    def ask(job, *questions):
        path = tmp_path / "job.pkl"
        path.write_bytes(pickle.dumps(job))
        pipe = Asked({"job": path, **question} for question in questions)
        worker.serve(pipe)
        return pipe.answers

    return ask


LOAD = {"warmup": 3}


class Counted:
    """Counts its loads and calls in a file."""

    def __init__(self, file):
        self.file = file

    def __call__(self):
        self.file.write_text("loaded ")
        return self.call

    def call(self):
        with self.file.open("a") as file:
            file.write("called ")


def test_loading_is_one_load_one_first_call_and_the_warm_up(ask, tmp_path):
    (answer,) = ask(Counted(tmp_path / "log"), LOAD)
    assert set(answer) == {"load_ns", "first_call_ns", "ran_on"}
    assert (tmp_path / "log").read_text().split() == ["loaded"] + ["called"] * (1 + 3)


def test_block_is_one_uncounted_call_and_those_asked_for(ask, tmp_path):
    _, block, _ = ask(Counted(tmp_path / "log"), LOAD, {"calls": 4}, {"calls": 2})
    assert len(block["ns"]) == 4
    assert all(ns > 0 for ns in block["ns"])
    calls = (tmp_path / "log").read_text().split().count("called")
    assert calls == 4 + (1 + 4) + (1 + 2)


class Sized:
    """Writes down the batch sizes that it is called with."""

    def __init__(self, file):
        self.file = file

    def __call__(self):
        return self.call

    def call(self, batch_size=None):
        with self.file.open("a") as file:
            file.write(f"{batch_size} ")


def test_call_gets_the_batch_size_it_is_asked_for(ask, tmp_path):
    questions = [LOAD | {"warmup": 0}, {"calls": 1}, {"calls": 2, "batch": 8}]
    answers = ask(Sized(tmp_path / "log"), *questions)
    assert [len(a.get("ns", [])) for a in answers] == [0, 1, 2]
    assert (tmp_path / "log").read_text().split() == ["None"] * 3 + ["8"] * 3


def test_times_are_nanoseconds_of_each_call(ask):
    load, block = ask(partial(jobs.load_sleeper, 0.01), LOAD | {"warmup": 0}, {"calls": 3})
    assert load["load_ns"] < 10e6 <= load["first_call_ns"] < 1e9
    assert all(10e6 <= ns < 1e9 for ns in block["ns"])


def test_first_call_does_not_count_the_loading(ask):
    (answer,) = ask(partial(jobs.load_slowly, 0.05), LOAD)
    assert answer["first_call_ns"] < 40e6 < answer["load_ns"]


def test_unpickling_is_no_part_of_loading(ask):
    (answer,) = ask(jobs.SlowToUnpickle(0.05), LOAD)
    assert answer["load_ns"] < 40e6


def test_failure_is_an_answer_and_the_next_question_is_heard(ask):
    job = partial(jobs.fail_to_run, "no input")
    first, second = ask(job, LOAD, LOAD)
    assert first == second == {"error": "ValueError: no input"}


def test_peak_memory_is_what_the_system_says(ask):
    _, block = ask(jobs.do_nothing, LOAD, {"calls": 1})
    # This process was started by a smaller one, so that the kernel's other count is right too.
    known = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert block["peak_memory_bytes"] == pytest.approx(known, rel=0.005)


def test_main_serves_the_pipe_named_on_the_command_line(monkeypatch, tmp_path):
    job = tmp_path / "job.pkl"
    job.write_bytes(pickle.dumps(jobs.do_nothing))
    ours, theirs = Pipe()
    monkeypatch.setattr(sys, "argv", ["worker", str(os.dup(theirs.fileno()))])
    theirs.close()
    watched, answers = [], []
    monkeypatch.setattr(worker, "exit_with_process", watched.append)

    def drive():
        with ours:
            ours.send({"job": job, **LOAD})
            answers.append(ours.recv())

    handler, driver = signal.getsignal(signal.SIGINT), threading.Thread(target=drive)
    driver.start()
    try:
        worker.main()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert watched == [os.getppid()]
    finally:
        signal.signal(signal.SIGINT, handler)
        driver.join()
    assert set(answers[0]) == {"load_ns", "first_call_ns", "ran_on"}
