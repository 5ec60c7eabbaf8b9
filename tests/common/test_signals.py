"""Signals, raised for real in this process."""

import signal
import subprocess
import sys
import threading

import pytest

from heimdall_onnx.common.signals import first_signal_interrupts, interrupted_after, uninterrupted

BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@pytest.fixture(autouse=True)
def handlers_are_put_back():
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


@BOTH
def test_first_signal_interrupts_and_the_next_do_not(number):
    steps = []

    def work():
        try:
            signal.raise_signal(number)
            steps.append("not reached")
        finally:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            steps.append("taken back")

    with pytest.raises(KeyboardInterrupt), first_signal_interrupts():
        work()
    assert steps == ["taken back"]


@BOTH
def test_block_goes_on_to_its_end_and_signals_count_again_after_it(number):
    steps = []

    def work():
        with uninterrupted():
            signal.raise_signal(number)
            steps.append("ended")
        signal.raise_signal(number)
        steps.append("not reached")

    with pytest.raises(KeyboardInterrupt), first_signal_interrupts():
        work()
    assert steps == ["ended"]


@BOTH
def test_signal_strikes_at_the_end_of_a_block_that_is_done_whole(number):
    steps = []

    def work():
        with interrupted_after():
            signal.raise_signal(number)
            with interrupted_after():
                signal.raise_signal(signal.SIGTERM)
            steps.append("ended")
        steps.append("not reached")

    with pytest.raises(KeyboardInterrupt), first_signal_interrupts():
        work()
    assert steps == ["ended"]


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with first_signal_interrupts():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_process_started_meanwhile_hears_signals():
    code = "import signal; print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)"
    with uninterrupted():
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout.strip() == b"True"


def test_other_threads_do_without():
    failed = []

    def enter():
        try:
            with first_signal_interrupts(), uninterrupted():
                pass
        except ValueError as error:
            failed.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert failed == []


def test_second_signal_is_lost_in_what_surrounds_the_interrupted_block():
    steps = []

    def work():
        try:
            with first_signal_interrupts():
                signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            steps.append("taken back")

    with pytest.raises(KeyboardInterrupt), first_signal_interrupts():
        work()
    assert steps == ["taken back"]


def test_nothing_interrupts_a_block_within_an_uninterrupted_one():
    with uninterrupted(), first_signal_interrupts():
        signal.raise_signal(signal.SIGTERM)


def test_second_signal_is_lost_too_where_a_library_has_put_its_handler_around_ours():
    def work():
        ours = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, lambda *arguments: ours(*arguments))
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            signal.signal(signal.SIGTERM, ours)
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt), first_signal_interrupts():
        work()
