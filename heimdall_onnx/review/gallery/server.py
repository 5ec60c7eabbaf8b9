"""A gallery and the reports that it links to, on loopback, with the credentials of who starts it.

Whoever can reach the port reads what these credentials can read, other users of the machine and the
pages open in a browser among them. So every address begins with a secret that is drawn at the
start, requests for another host's name are refused, and nothing is served but the page and rendered
reports. That of a release is held against its manifest first; a failed run has none, so its report
may be anybody's who can write into the bucket. No report may run, load or send anything.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from heimdall_onnx.archive.manifest import REPORT_HTML, read_manifest
from heimdall_onnx.common.errors import (
    HeimdallError,
    MissingObjectError,
    ParameterError,
    VerificationError,
)
from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.common.text import visible_lines
from heimdall_onnx.review.gallery.page import PAGE, Gallery
from heimdall_onnx.review.gallery.rows import FAILED, VERSION
from heimdall_onnx.services.store import Bucket, media_type

log = get_logger(__name__)

_REPORT = re.compile(rf"({FAILED}/)?{VERSION}/{re.escape(REPORT_HTML)}")
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
# A report needs no script. It is no part of this site (sandbox): it can't read another one, and
# runs, loads and sends nothing.
_REPORT_POLICY = (
    "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; font-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; sandbox allow-downloads"
)
_PAGE_POLICY = "frame-ancestors 'none'"


class GalleryServer(ThreadingHTTPServer):
    """Serves a gallery until it is shut down.

    Attributes:
        url: The page's address; a secret, since it is all that is needed to read the reports.
    """

    daemon_threads = True

    def __init__(self, bucket: Bucket, prefix: str, gallery: Gallery, *, port: int = 0) -> None:
        """Listen on loopback.

        Args:
            bucket: Bucket of the releases.
            prefix: Folder of the releases in it.
            gallery: The page, with links.
            port: Port; a free one by default.

        Raises:
            ParameterError: If nothing can listen on that port.
        """
        self.bucket, self.prefix, self.gallery = bucket, prefix.strip("/"), gallery
        self.root = f"/{secrets.token_urlsafe(16)}/"
        # As deep as in the bucket, so that the page's links work.
        self.page = self.root + gallery.key.removeprefix(f"{self.prefix}/")
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise ParameterError(
                f"can't listen on port {port} of 127.0.0.1: {error.strerror}; leave --port out to "
                "take a free one"
            ) from error
        # A page elsewhere can have its own name point here; it can't have this one.
        self.hosts = {f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")}
        self.url = f"http://127.0.0.1:{self.server_port}{self.page.removesuffix(PAGE)}"

    def report(self, name: str) -> bytes | None:
        """A rendered report; None if there is none.

        Raises:
            VerificationError: If it is not the one that was released.
            StoreError: If the store can't be reached or refuses.
        """
        key = f"{self.prefix}/{name}"
        try:
            html = self.bucket.read_bytes(key)
        except MissingObjectError:
            return None
        if not name.startswith(f"{FAILED}/"):
            folder = key.rpartition("/")[0]
            manifest = read_manifest(self.bucket, folder)
            entry = manifest.objects.get(REPORT_HTML)
            if entry is None or hashlib.sha256(html).hexdigest() != entry.sha256:
                raise VerificationError(
                    f"{manifest.uri}/{REPORT_HTML} is not what was released, so it is not shown; "
                    "see `heimdall-onnx verify`"
                )
        return html


class _Handler(BaseHTTPRequestHandler):
    server: GalleryServer
    timeout = 30
    server_version, sys_version = "heimdall-onnx", ""

    def do_GET(self) -> None:
        """Answer with the page or a report."""
        server = self.server
        if self.headers.get("Host") not in server.hosts:
            self._answer_in_words(HTTPStatus.MISDIRECTED_REQUEST, "this is another host's name")
            return
        # Not decoded: no name that is served needs it, and what is spelt otherwise is not there.
        if self.path in (server.page, server.page.removesuffix(PAGE)):
            self._answer(HTTPStatus.OK, server.gallery.page, media_type(PAGE), _PAGE_POLICY)
            return
        name = self.path.removeprefix(server.root)
        if name == self.path or not _REPORT.fullmatch(name):
            self._answer_in_words(HTTPStatus.NOT_FOUND, "there is nothing at this address")
            return
        try:
            html = server.report(name)
        except HeimdallError as error:
            log.warning("report not served", name=name, reason=str(error))
            self._answer_in_words(HTTPStatus.BAD_GATEWAY, str(error))
            return
        if html is None:
            self._answer_in_words(HTTPStatus.NOT_FOUND, "this report is not there any more")
            return
        self._answer(HTTPStatus.OK, html, media_type(REPORT_HTML), _REPORT_POLICY)

    def do_HEAD(self) -> None:
        """Answer as to GET, without the body."""
        self.do_GET()

    def _answer_in_words(self, status: HTTPStatus, text: str) -> None:
        plain = f"{visible_lines(text)}\n".encode()
        self._answer(status, plain, "text/plain; charset=utf-8", "default-src 'none'")

    def _answer(self, status: HTTPStatus, body: bytes, kind: str, policy: str) -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(body)), **_HEADERS}
        for name, value in {**headers, "Content-Security-Policy": policy}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        # Addresses are secrets here, and what was asked for is anybody's text.
        log.debug("answered", status=arguments[1] if arguments[1:] else None)
