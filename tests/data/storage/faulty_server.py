"""A web server that fails as planned: in front of a folder, or of an S3 emulator."""

import contextlib
import http.client
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class Fault:
    """What goes wrong with the next `times` requests of these methods for paths that end in `path`.

    status: answer this and nothing else. cut: close the connection after so many bytes of the body.
    pause: seconds before each 4 KiB. length: added to the Content-Length. flip: change the byte at this place.
    """

    path: str = ""
    methods: tuple[str, ...] = ("GET",)
    times: float = 1
    status: int = 0
    cut: int | None = None
    pause: float = 0
    length: int = 0
    flip: int | None = None


@dataclass(frozen=True)
class Seen:
    """A request as it came. start: of the range asked for, None without one."""

    method: str
    path: str
    start: int | None


Answer = tuple[int, dict[str, str], bytes]


@dataclass
class FaultyServer:
    """url: where it is, without a slash at the end. ignores_range: answers every request with the whole file."""

    answer: Callable[[str, str, dict[str, str], bytes], Answer]
    url: str = ""
    requests: list[Seen] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    ignores_range: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def gets(self, path: str) -> list[Seen]:
        """The GET requests for paths with this ending."""
        return [seen for seen in self.requests if seen.method == "GET" and seen.path.endswith(path)]

    def take_fault(self, method: str, path: str) -> Fault:
        """The fault this request meets, used up by one."""
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and method in fault.methods and path.endswith(fault.path):
                    fault.times -= 1
                    return fault
        return Fault()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    faulty: FaultyServer

    def _serve(self) -> None:
        path = self.path.partition("?")[0]
        asked = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        self.faulty.requests.append(Seen(self.command, path, int(asked[1]) if asked else None))
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.faulty.take_fault(self.command, path)
        headers = dict(self.headers)
        if self.faulty.ignores_range:
            headers.pop("Range", None)
        answer = (
            (fault.status, {}, b"") if fault.status else self.faulty.answer(self.command, self.path, headers, content)
        )
        with contextlib.suppress(ConnectionError):
            self._send(answer, fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve

    def _send(self, answer: Answer, fault: Fault) -> None:
        status, headers, body = answer
        if fault.flip is not None:
            body = body[: fault.flip] + bytes([body[fault.flip] ^ 1]) + body[fault.flip + 1 :]
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, str(int(value) + fault.length) if name == "Content-Length" else value)
        self.end_headers()
        if self.command == "HEAD":
            return
        body, is_cut = body[: fault.cut], fault.cut is not None and len(body) > fault.cut
        for start in range(0, len(body), 4096) if fault.pause else [0]:
            time.sleep(fault.pause)
            self.wfile.write(body[start : start + 4096] if fault.pause else body)
            self.wfile.flush()
        if is_cut or fault.length:
            time.sleep(0.1)  # a client drops what it has not read yet when the connection ends
            self.close_connection = True
            self.connection.close()

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no news."""


@contextlib.contextmanager
def serving(answer: Callable[[str, str, dict[str, str], bytes], Answer]) -> Iterator[FaultyServer]:
    """Run a faulty server over `answer(method, path with query, headers, content)`."""
    faulty = FaultyServer(answer)
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"faulty": faulty}))
    faulty.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield faulty
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def folder_answer(folder: Path) -> Callable[[str, str, dict[str, str], bytes], Answer]:
    """The files of a folder, by range; a folder is listed as a page of links."""

    def answer(method: str, path: str, headers: dict[str, str], content: bytes) -> Answer:
        file = folder / path.partition("?")[0].lstrip("/")
        if file.is_dir():
            page = "".join(f'<a href="{inner.name}">{inner.name}</a>' for inner in sorted(file.iterdir()))
            return 200, {"Content-Type": "text/html"}, page.encode()
        if not file.is_file():
            return 404, {}, b""
        data, status = file.read_bytes(), file.stat()
        told = {"Content-Length": str(len(data)), "ETag": f'"{status.st_mtime_ns}"'}
        if method == "HEAD":
            return 200, told, b""
        asked = re.match(r"bytes=(\d+)-(\d*)", headers.get("Range", ""))
        if not asked:
            return 200, told, data
        start, stop = int(asked[1]), int(asked[2]) + 1 if asked[2] else len(data)
        if start >= len(data):
            return 416, {}, b""
        part = data[start:stop]
        span = {"Content-Range": f"bytes {start}-{start + len(part) - 1}/{len(data)}", "Content-Length": str(len(part))}
        return 206, told | span, part

    return answer


def proxy_answer(host: str, port: int) -> Callable[[str, str, dict[str, str], bytes], Answer]:
    """What another server says."""

    def answer(method: str, path: str, headers: dict[str, str], content: bytes) -> Answer:
        connection = http.client.HTTPConnection(host, port, timeout=30)
        try:
            connection.request(method, path, content or None, headers | {"Connection": "close"})
            response = connection.getresponse()
            body = response.read()
            left_out = {"transfer-encoding", "connection"} | ({"content-length"} if method != "HEAD" else set())
            kept = {name: value for name, value in response.getheaders() if name.lower() not in left_out}
            return response.status, kept, body
        finally:
            connection.close()

    return answer
