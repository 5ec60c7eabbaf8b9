"""A command that is signalled more than once, as ``timeout`` does, and whoever presses Ctrl-C."""

import signal
import subprocess
import sys
import time

import pytest

# A command that takes back, in a process that takes its time to end.
COMMAND = """
import atexit, sys, time
from heimdall_onnx.cli.main import main
from heimdall_onnx.common.signals import first_signal_interrupts

def say(text):
    print(text, flush=True)
    time.sleep(0.5)

@main.command(example="")
def work():
    with first_signal_interrupts():
        try:
            say("working")
            time.sleep(60)
        finally:
            say("taking back")
            say("taken back")

{before}
atexit.register(say, "ended")
atexit.register(say, "ending")
sys.argv = ["heimdall-onnx", "work"]
main()
"""


def signalled_at(words, before=""):
    """Code, output and errors of the command, with both signals sent at each of the words."""
    said = []
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND.format(before=before)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stdout:
            said.append(line.strip())
            if said[-1] in words:
                process.send_signal(signal.SIGTERM)
                time.sleep(0.1)
                process.send_signal(signal.SIGINT)
        errors = process.stderr.read()
    return process.returncode, said, errors


@pytest.mark.parametrize("again", ["working", "taking back", "ending"])
def test_only_the_first_signal_ends_a_command(again):
    code, said, errors = signalled_at({"working", again})
    assert said == ["working", "taking back", "taken back", "ending", "ended"]
    assert (code, errors) == (130, "interrupted\n")


def test_an_import_that_is_struck_ends_as_interrupted():
    before = """
def struck():
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        raise ImportError("half of it is there")

main.commands["work"].callback = struck
"""
    code, said, errors = signalled_at(set(), before)
    assert (code, said, errors) == (130, ["ending", "ended"], "interrupted\n")
