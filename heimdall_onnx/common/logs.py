"""Logging: structlog events with fields, readable on a terminal and JSON lines when piped."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import structlog
from pydantic import SecretBytes, SecretStr
from structlog.typing import EventDict, WrappedLogger

# Called with the share that is done, from 0 to 1, and with what is being done.
OnProgress = Callable[[float, str], None]

_SECRET_WORDS = ("password", "secret", "token", "access_key", "credential")


def configure_logs(
    *, stream: TextIO | None = None, file: Path | None = None, as_json: bool | None = None
) -> None:
    """Send events of this process to ``stream``, or append them to ``file``.

    Args:
        stream: Standard error by default.
        file: Takes the place of the stream; always JSON lines.
        as_json: JSON lines instead of readable ones; by default when the stream is no terminal.
    """
    target = stream or sys.stderr
    if file is not None:
        target = file.open("a", encoding="utf-8", buffering=1)
    as_json = file is not None or (not target.isatty() if as_json is None else as_json)
    # MLflow reads it when it is imported; its steps would mix with our events.
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    _configure(structlog.WriteLoggerFactory(file=target), as_json, colors=target.isatty())


def get_logger(name: str) -> Any:
    """A logger for the module ``name``.

    Where the program that imports this package has configured nothing, events go to standard
    error: structlog's own default is standard output, which belongs to the program.
    """
    if not structlog.is_configured():
        # Looked up for every event, since tests and notebooks put another stream there.
        _configure(lambda *_: structlog.WriteLogger(sys.stderr), as_json=False, colors=False)
    return structlog.get_logger(name)


def _configure(factory: Callable[..., Any], as_json: bool, colors: bool) -> None:
    renderer: Any = (
        structlog.processors.JSONRenderer(default=str)
        if as_json
        else structlog.dev.ConsoleRenderer(colors=colors)
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            redact_secrets,
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=factory,
        cache_logger_on_first_use=False,
    )


def redact_secrets(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """Replace secrets, known by their type or by the name of their field, with asterisks."""
    return {name: _redacted(name, value) for name, value in event.items()}


def _redacted(name: str, value: Any) -> Any:
    if isinstance(value, SecretStr | SecretBytes):
        return "**********"
    if any(word in name.lower() for word in _SECRET_WORDS) and value is not None:
        return "**********"
    if isinstance(value, dict):
        return {key: _redacted(str(key), entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(name, entry) for entry in value]
    return value
