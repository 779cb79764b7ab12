"""HTTP/1.1 read by llhttp, through httptools, with a bound on all that no limit of the API sees.

uvicorn takes httptools where it is installed, but bounds headers only in its slower parser, h11.
"""

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEADER_BYTES = 65_536
"""Of the request line, all headers and trailers together; also of any other bytes in a row that are no body."""


class BoundedHttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol; answers 400 and closes when a client sends more than `MAX_HEADER_BYTES` of headers.

    One read of the socket (at most 256 KiB) may be in memory beyond that.
    """

    _header_bytes = 0
    _unused_bytes = 0
    _was_used = False

    def data_received(self, data: bytes) -> None:
        """Parse, then count what completed nothing: the parser itself would collect a header without end."""
        self._was_used = False
        super().data_received(data)
        self._unused_bytes = 0 if self._was_used else self._unused_bytes + len(data)
        if self._unused_bytes > MAX_HEADER_BYTES:
            self.send_400_response("The headers are too large.")

    def on_message_begin(self) -> None:
        """Begin to count the headers of a request."""
        self._was_used = True
        self._header_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Count the request line."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a header, or a trailer of a chunked body."""
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        """A part of the body, whose size the API bounds."""
        self._was_used = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole."""
        self._was_used = True
        super().on_message_complete()

    def _count(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > MAX_HEADER_BYTES:
            # the parser turns this into its own error, which uvicorn answers with 400
            raise ValueError("The headers are too large.")
