"""Events are readable or JSON, and never hold a secret."""

import io
import json
import os
import pty

import pytest
import structlog
from pydantic import SecretStr

from heimdall_onnx.common.logs import configure_logs, get_logger


def lines(**fields) -> list[dict]:
    stream = io.StringIO()
    configure_logs(stream=stream)
    structlog.get_logger("test").info("happened", **fields)
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_piped_events_are_json_lines_with_their_fields():
    (event,) = lines(count=3)
    assert event["event"] == "happened"
    assert event["count"] == 3
    assert event["level"] == "info"


@pytest.mark.parametrize(
    "fields",
    [
        {"value": SecretStr("hunter2")},
        {"nested": {"deep": [SecretStr("hunter2")]}},
        {"password": "hunter2"},
        {"config": {"s3_secret_access_key": "hunter2"}},
        {"tokens": ["hunter2"]},
    ],
)
def test_secrets_are_redacted_by_type_and_by_name(fields):
    (event,) = lines(**fields)
    assert "hunter2" not in json.dumps(event)


def test_a_program_that_configured_nothing_finds_its_standard_output_clean(capsys):
    structlog.reset_defaults()
    get_logger("test").debug("not told")
    get_logger("test").info("happened", password="hunter2")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "happened" in printed.err
    assert "hunter2" not in printed.err
    assert "not told" not in printed.err


def test_a_program_that_configured_its_own_logs_keeps_them():
    events = []
    structlog.configure(processors=[lambda *args: events.append(args[2]) or ""])
    get_logger("test").info("happened")
    assert [event["event"] for event in events] == ["happened"]


def test_terminal_gets_readable_lines():
    parent, child = pty.openpty()
    with os.fdopen(child, "w") as terminal:
        configure_logs(stream=terminal)
        structlog.get_logger("test").info("happened", count=3)
        terminal.flush()
        text = os.read(parent, 4096).decode()
    os.close(parent)
    assert "happened" in text
    assert not text.startswith("{")


def test_bound_run_is_in_every_event():
    with structlog.contextvars.bound_contextvars(run_id="r1"):
        (event,) = lines()
    assert event["run_id"] == "r1"
