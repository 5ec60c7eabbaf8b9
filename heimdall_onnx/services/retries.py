"""How often calls to services are made that fail on their way, how long they wait, and in the log.

botocore and MLflow's REST client (urllib3) each wait and repeat on their own; here are the limits
that they get. Delays between attempts grow and are random, so that many releases that fail at once
don't come back at once.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, cast

from heimdall_onnx.common.logs import get_logger

if TYPE_CHECKING:
    from botocore.hooks import BaseEventHooks
    from urllib3 import Retry

log = get_logger(__name__)

CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 20
ATTEMPTS = 5

# MLflow would try seven times for two minutes each, and print addresses to standard output. Its
# delays are 0, 2, 4 … seconds, each with up to one more by chance.
MLFLOW_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": str(READ_TIMEOUT_S),
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "1.0",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "AWS_RETRY_MODE": "standard",
    "AWS_MAX_ATTEMPTS": str(ATTEMPTS),
    # A checksum that follows the content is refused by Ceph and others.
    "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
}


def log_store_calls(events: BaseEventHooks) -> None:
    """Log each attempt of an S3 call that fails in a way that is worth another."""
    events.register("needs-retry.s3", _log_failed_attempt, unique_id="heimdall-failed-attempts")


def _log_failed_attempt(
    *,
    response: tuple[Any, dict[str, Any]] | None,
    operation: Any,
    attempts: int,
    caught_exception: Exception | None,
    request_dict: dict[str, Any],
    **_: Any,
) -> None:
    # Only an observer: whether the call is repeated is botocore's own handler's to say.
    if response is not None:
        answer, parsed = response
        if answer.status_code < 500 and answer.status_code != 429:
            return
        reason = str(parsed.get("Error", {}).get("Code") or answer.status_code)
    else:
        reason = type(caught_exception).__name__
    log.warning(
        "store call failed",
        operation=operation.name,
        attempt=attempts,
        of=request_dict["context"].get("retries", {}).get("max"),
        reason=reason,
    )


def log_http_requests() -> None:
    """Log each request of urllib3, which MLflow's REST client uses, that is made once more."""
    for name in ("urllib3.util.retry", "urllib3.connectionpool"):
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Repeated) for known in logger.filters):
            logger.addFilter(_Repeated())
    # It tells of a repeated request at this level alone.
    logging.getLogger("urllib3.util.retry").setLevel(logging.DEBUG)


class _Repeated(logging.Filter):
    """Takes what urllib3 says of repeated requests; the rest passes at the level it had."""

    def filter(self, record: logging.LogRecord) -> bool:
        message = str(record.msg)
        if message.startswith("Retrying ("):
            return False  # the same again, for connections that break
        if message.startswith("Incremented Retry"):
            url, retry = cast("tuple[str, Retry]", record.args)
            last = retry.history[-1]
            if last.redirect_location is None:
                log.warning(
                    "request failed and is made again",
                    method=last.method,
                    # A query may hold a signature.
                    path=url.partition("?")[0],
                    reason=type(last.error).__name__ if last.error else f"status {last.status}",
                    attempts_left=int(retry.total or 0) + 1,
                )
        return logging.getLogger("urllib3").isEnabledFor(record.levelno)
