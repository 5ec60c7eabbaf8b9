"""A proxy between a client and a real HTTP service that does harm when it is told to."""

from __future__ import annotations

import base64
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import BinaryIO
from urllib.parse import urlsplit

_BLOCK = 1 << 16
_WHO_ARE_YOU = (
    b"HTTP/1.1 401 Unauthorized\r\n"
    b'WWW-Authenticate: Basic realm="here"\r\n'
    b"Content-Length: 0\r\n\r\n"
)
KINDS = (
    "gone",  # connections are refused, this one is reset
    "hang",  # it is read and never answered
    "status",  # it is answered with `status` and goes no further
    "reset",  # the connection is reset when half of its body is read
    "lose",  # it is done, and the connection reset instead of an answer
    "corrupt request",  # a byte of its body is changed
    "corrupt response",  # a byte of the answer's body is changed
    "before",  # `action` is called, and it goes no further
    "after",  # `action` is called after it is done and before it is answered
)


@dataclass
class Fault:
    """What happens to which requests.

    Attributes:
        kind: One of `KINDS`.
        match: Regular expression, searched in ``METHOD path``.
        skip: How many of these pass before.
        times: To how many requests; None for all.
        sticky: To all requests after the first that matches, whatever they are.
        seconds: How long a service is gone; None until the fault is taken away.
        status: Of the answer.
        action: What is called.
        hits: To how many requests it has happened.
    """

    kind: str
    match: str = ""
    skip: int = 0
    times: int | None = 1
    sticky: bool = False
    seconds: float | None = None
    status: int = 503
    action: Callable[[], object] = lambda: None
    hits: int = 0

    def hit(self, request: str) -> bool:
        """Whether it happens to this request; counts it."""
        if self.times is not None and self.hits >= self.times:
            return False
        if not (self.sticky and self.hits) and not re.search(self.match, request):
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.hits += 1
        return True


@dataclass
class _Message:
    """A request or an answer as far as it has been read: its head."""

    start: str
    lines: list[bytes]
    headers: dict[str, str]

    @property
    def head(self) -> bytes:
        return b"".join(self.lines)


@dataclass
class Proxy:
    """Listens on a port of its own and passes on to ``target``, ``http://host:port``.

    Attributes:
        target: The real service.
        requests: ``METHOD path`` of every request, in order.
        sizes: Bytes of the bodies of each request that was answered, and of its answer.
        login: ``user:password`` that every request must be sent with; none for all.
    """

    target: str
    requests: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    login: str = ""
    _fault: Fault | None = None

    def __post_init__(self) -> None:
        parts = urlsplit(self.target)
        self._upstream = (str(parts.hostname), int(parts.port or 80))
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._mended = threading.Event()
        self._connections: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self._port = 0
        self._listen()

    @property
    def address(self) -> str:
        """Where clients find it."""
        return f"http://127.0.0.1:{self._port}"

    @contextmanager
    def fault(self, fault: Fault) -> Iterator[Fault]:
        """Do harm until the block ends."""
        self._mended.clear()
        self._fault = fault
        try:
            yield fault
        finally:
            self._fault = None
            self._mended.set()
            self._listen()

    def close(self) -> None:
        """Stop listening and break off every connection."""
        self._ended.set()
        self._mended.set()
        self._refuse()
        self._break_off()

    def _listen(self) -> None:
        with self._lock:
            if self._listener is not None or self._ended.is_set():
                return
            listener = socket.socket()
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", self._port))
            listener.listen(64)
            self._port, self._listener = listener.getsockname()[1], listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def _refuse(self) -> None:
        with self._lock:
            listener, self._listener = self._listener, None
        if listener is not None:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        self._connections.add(connection)
        try:
            with (
                socket.create_connection(self._upstream, timeout=60) as upstream,
                connection.makefile("rb") as client,
                upstream.makefile("rb") as server,
            ):
                for each in (connection, upstream):
                    each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while self._exchange(connection, client, upstream, server):
                    pass
        except (OSError, ValueError):
            _resets_when_closed(connection)
        finally:
            self._connections.discard(connection)
            connection.close()

    def _exchange(
        self,
        connection: socket.socket,
        client: BinaryIO,
        upstream: socket.socket,
        server: BinaryIO,
    ) -> bool:
        """Pass on one request and its answer; False when the connection has ended."""
        request = _read_head(client)
        if request is None:
            return False
        method, path, _ = request.start.split(" ", 2)
        name = f"{method} {path}"
        self.requests.append(name)
        fault = self._fault
        if fault is None or not fault.hit(name):
            fault = Fault("none")
        if request.headers.get("expect", "").lower() == "100-continue":
            connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.lines = [x for x in request.lines if not x.lower().startswith(b"expect:")]
        if fault.kind == "reset":
            _exactly(client, int(request.headers.get("content-length", 0)) // 2)
            raise OSError("reset")
        body = list(_body(client, request.headers))
        basic = f"Basic {base64.b64encode(self.login.encode()).decode()}"
        if self.login and request.headers.get("authorization") != basic:
            connection.sendall(_WHO_ARE_YOU)
            return True
        if fault.kind == "gone":
            self._leave(fault)
            raise OSError("gone")
        if fault.kind == "hang":
            self._mended.wait()
            raise OSError("hung")
        if fault.kind == "status":
            said = f"HTTP/1.1 {fault.status} Fault\r\nContent-Length: 0\r\n\r\n"
            connection.sendall(said.encode())
            return True
        if fault.kind == "before":
            fault.action()
            raise OSError("dropped")
        if fault.kind == "corrupt request":
            body = _corrupted(body)
        upstream.sendall(request.head)
        for block in body:
            upstream.sendall(block)
        answer = _read_head(server)
        if answer is None:
            raise OSError("the service has closed the connection")
        status = int(answer.start.split(" ", 2)[1])
        bare = method == "HEAD" or status in (204, 304)
        content = [] if bare else list(_body(server, answer.headers, to_end=True))
        self.sizes.append((sum(map(len, body)), sum(map(len, content))))
        if fault.kind == "after":
            fault.action()
        if fault.kind == "lose":
            raise OSError("lost")
        if fault.kind == "corrupt response":
            content = _corrupted(content)
        connection.sendall(answer.head)
        for block in content:
            connection.sendall(block)
        return "close" not in answer.headers.get("connection", "").lower()

    def _break_off(self) -> None:
        for connection in list(self._connections):
            _resets_when_closed(connection)
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _leave(self, fault: Fault) -> None:
        self._refuse()
        self._break_off()
        if fault.seconds is not None:
            threading.Timer(fault.seconds, self._listen).start()


@contextmanager
def proxied(target: str, login: str = "") -> Iterator[Proxy]:
    """A proxy before ``target`` for the length of the block, which may ask for a login."""
    proxy = Proxy(target, login=login)
    try:
        yield proxy
    finally:
        proxy.close()


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait until ``condition`` holds; whether it did in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _read_head(stream: BinaryIO) -> _Message | None:
    lines = [stream.readline(_BLOCK)]
    if not lines[0]:
        return None
    headers = {}
    while (line := stream.readline(_BLOCK)) not in (b"\r\n", b""):
        lines.append(line)
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    lines.append(b"\r\n")
    return _Message(lines[0].decode("latin-1").rstrip(), lines, headers)


def _body(stream: BinaryIO, headers: dict[str, str], *, to_end: bool = False) -> Iterator[bytes]:
    """The body as it is on the wire, in blocks."""
    if "chunked" in headers.get("transfer-encoding", "").lower():
        size = -1
        while size:
            line = stream.readline(_BLOCK)
            size = int(line.partition(b";")[0], 16)
            yield line
            # After the last chunk come trailers, up to an empty line.
            if size:
                yield _exactly(stream, size + 2)
        while (line := stream.readline(_BLOCK)) != b"\r\n":
            yield line
        yield line
    elif "content-length" in headers:
        left = int(headers["content-length"])
        while left:
            block = _exactly(stream, min(left, _BLOCK))
            left -= len(block)
            yield block
    elif to_end:
        while block := stream.read(_BLOCK):
            yield block


def _exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise OSError("the connection has ended in the middle of a body")
    return data


def _corrupted(blocks: list[bytes]) -> list[bytes]:
    """One byte in the middle of the longest block is another."""
    if not blocks:
        return blocks
    place = max(range(len(blocks)), key=lambda i: len(blocks[i]))
    changed = bytearray(blocks[place])
    changed[len(changed) // 2] ^= 1
    return [*blocks[:place], bytes(changed), *blocks[place + 1 :]]


def _resets_when_closed(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
