"""A service that answers everything alike, as no good store or registry does."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LOGIN_PAGE = (
    "<!DOCTYPE html>\n<html><head><title>Sign in &amp; go on</title></head><body>"
    + "<p>Your organisation asks for your password.</p>" * 100
    + "</body></html>"
)


# Stands in a body for the request's headers, which some services repeat in what they refuse.
HEADERS = "HEADERS"


def refusal(code: str, message: str, **details: str) -> str:
    """What S3 answers."""
    more = "".join(f"<{name}>{value}</{name}>" for name, value in details.items())
    return f"<Error><Code>{code}</Code><Message>{message}</Message>{more}</Error>"


@contextmanager
def answering(
    status: int, body: str = "", headers: Mapping[str, str] | None = None
) -> Iterator[str]:
    """The address of a service that answers each request so; HEAD gets no body."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            content = body.replace(HEADERS, " ".join(str(self.headers).split())).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_DELETE = do_GET = do_HEAD = do_PATCH = do_POST = do_PUT = answer

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
