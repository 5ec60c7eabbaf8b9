import os
import signal
import time

import numpy as np
import pytest

from heimdall_onnx.apart import process_apart
from heimdall_onnx.errors import BenchmarkError, DataError, EvidenceError


def double(values):
    return os.getpid(), 2 * values


def refuse(words):
    raise DataError(words)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def test_work_is_done_by_one_other_process():
    with process_apart() as apart:
        (first, values), (second, _) = apart(double, np.arange(3)), apart(double, values=np.ones(1))
        assert values.tolist() == [0, 2, 4]
        assert first == second != os.getpid()
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


def test_its_errors_are_raised_here():
    with process_apart() as apart:
        with pytest.raises(DataError, match="found nothing"):
            apart(refuse, "found nothing")
        assert apart(double, 1)[1] == 2


def test_a_process_that_dies_is_named_with_what_it_did():
    with process_apart() as apart:
        with pytest.raises(BenchmarkError, match="process of die ended"):
            apart(die)
        # What comes next is not its fault.
        assert apart(double, 1)[1] == 2
    assert issubclass(BenchmarkError, EvidenceError)


def test_what_is_under_way_ends_with_the_block():
    started = time.monotonic()
    with process_apart() as apart:
        apart(double, 1)
        apart._pool.submit(time.sleep, 60)
    assert time.monotonic() - started < 30
