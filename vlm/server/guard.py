"""What stands between the network and the API: request ids, tokens, limits, headers, bodies, one shape of errors.

`Guard` is ASGI middleware. It refuses a request before its body is read where it can: without the right token (401,
403), too many from one address (429), a body too large (413) or too slow (408). Requests that take too long end with
503. The API behind it gets bodies whole.
"""

import asyncio
import hmac
import json
import logging
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Literal

import orjson
from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

logger = logging.getLogger(__name__)


Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Right = Literal["none", "read", "write"]

_MOST_ADDRESSES = 10_000
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

SECURITY_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "x-frame-options": "DENY",
}
_SECURITY_HEADERS = [(name.encode(), value.encode()) for name, value in SECURITY_HEADERS.items()]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may take, and one client.

    max_body_bytes: size of a request's body. max_buffered_bytes: of the bodies of all requests under way. max_values:
    numbers, texts and lists of a body of JSON. body_seconds: time for the body to arrive. request_seconds: time for the
    whole request. change_seconds: time for a request that changes an index. max_results: hits of one page. max_pixels:
    of an uploaded image. requests_per_second: of one address, on average, with bursts of twice that; 0 does not limit
    them.
    """

    max_body_bytes: int = 20 * 2**20
    max_buffered_bytes: int = 256 * 2**20
    max_values: int = 1_000_000
    body_seconds: float = 20.0
    request_seconds: float = 60.0
    change_seconds: float = 900.0
    max_results: int = 1000
    max_pixels: int = 50_000_000
    requests_per_second: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Bearer tokens by right; a token to write may read as well.

    Without tokens to read, everyone may read. Without tokens to write, nobody may write.
    """

    read: frozenset[str] = frozenset()
    write: frozenset[str] = frozenset()

    def right_of(self, authorization: str) -> Right:
        """What the bearer of an Authorization header may do."""
        scheme, _, token = authorization.partition(" ")
        token = token.strip() if scheme.lower() == "bearer" else ""
        # without tokens to read every request may read, yet writing needs a token even then
        if token and _is_among(token, self.write):
            return "write"
        if not self.read or (token and _is_among(token, self.read)):
            return "read"
        return "none"


def _is_among(token: str, tokens: frozenset[str]) -> bool:
    # all are compared, each in constant time, so that the time tells nothing of how much of a token is right
    matches = [hmac.compare_digest(token.encode(), other.encode()) for other in tokens]
    return any(matches)


@dataclass
class RateLimiter:
    """A token bucket for each address: `rate` requests a second on average, `2 * rate` at once."""

    rate: float
    _buckets: OrderedDict[str, tuple[float, float]] = field(default_factory=OrderedDict)

    def allows(self, address: str, now: float) -> bool:
        """Whether the address may make a request now, which then counts."""
        if self.rate <= 0:
            return True
        # a rate below one a second must still let a single request through
        burst = max(1.0, 2 * self.rate)
        # popped and put back, so that the order of the dictionary is that of the last requests
        level, last = self._buckets.pop(address, (burst, now))
        level = min(burst, level + (now - last) * self.rate)
        is_allowed = level >= 1
        self._buckets[address] = (level - 1 if is_allowed else level, now)
        # the addresses that were seen last stay, so that memory is bounded whoever asks
        while len(self._buckets) > _MOST_ADDRESSES:
            self._buckets.popitem(last=False)
        return is_allowed


class Refused(Exception):
    """A request that ends here: HTTP status, the name of the reason for programs, a sentence for people."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind


@dataclass(kw_only=True)
class Guard:
    """ASGI middleware around the API.

    is_open: whether a path needs no token (health, the page's own files). is_counted: whether a request for it counts
    towards the limit of an address. needs_write: whether a request changes something. observe: called with method,
    route, status and seconds when a request ends.
    """

    app: App
    limits: Limits
    tokens: Tokens
    is_open: Callable[[str], bool]
    is_counted: Callable[[str], bool]
    needs_write: Callable[[str, str], bool]
    observe: Callable[[str, str, int, float], None]
    limiter: RateLimiter = field(init=False)
    _buffered: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.limiter = RateLimiter(self.limits.requests_per_second)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check, pass on, add headers, log."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        request_id = _request_id(headers)
        scope.setdefault("state", {})["request_id"] = request_id
        reply = _Reply(send, request_id)
        held = _HeldBody()
        is_change = self.needs_write(scope["method"], scope["path"])
        seconds_allowed = self.limits.change_seconds if is_change else self.limits.request_seconds
        try:
            self._check(scope, headers)
            # read before the application starts: a slow client holds a few bytes here, no thread and no place in a
            # batch
            body = await self._read_body(receive, held) if _has_body(headers) else b""
            async with asyncio.timeout(seconds_allowed):
                await self.app(scope, _replay(body, receive), reply.send)
        except Refused as refused:
            await reply.refuse(refused)
        except TimeoutError:
            message = f"The request took longer than {seconds_allowed:g} seconds."
            await reply.refuse(Refused(503, "timeout", message))
        # the client gets a number, not the text: it may hold paths, or what another request sent
        except Exception:
            logger.exception(f"request {request_id} failed")
            message = f"The server failed; its log has the reason under {request_id}."
            await reply.refuse(Refused(500, "internal", message))
        finally:
            self._buffered -= held.size
        seconds_taken = time.perf_counter() - started
        # the route, not the path: uids in paths would make a series of metrics each
        route = getattr(scope.get("route"), "path", "unmatched")
        self.observe(scope["method"], route, reply.status, seconds_taken)
        if logger.isEnabledFor(logging.DEBUG):
            facts = {
                "request": request_id,
                "method": scope["method"],
                "path": scope["path"],
                "status": reply.status,
                "milliseconds": round(1000 * seconds_taken, 2),
            }
            logger.debug(json.dumps(facts))

    def _check(self, scope: Scope, headers: dict[str, str]) -> None:
        """Refuse what needs no look at the body.

        Raises:
            Refused: rate, token, right or length.
        """
        client = scope.get("client")
        address = client[0] if client else ""
        if self.is_counted(scope["path"]) and not self.limiter.allows(address, time.monotonic()):
            rate = f"{self.limits.requests_per_second:g}"
            raise Refused(429, "rate_limit", f"More than {rate} requests a second from one address; try again later.")
        path = scope["path"]
        # a route matches a path that ends in a line break as well, and the right it needs would not be seen
        if not path.isprintable():
            raise Refused(400, "bad_request", "The path holds a character that cannot be printed.")
        if not self.is_open(path):
            right = self.tokens.right_of(headers.get("authorization", ""))
            if right == "none":
                raise Refused(401, "unauthorized", "A token is needed: Authorization: Bearer TOKEN.")
            if right != "write" and self.needs_write(scope["method"], path):
                raise Refused(403, "forbidden", "Changing an index needs a token with the right to write.")
        length = headers.get("content-length", "")
        # only a hint, which a client may leave out: the body is counted as it arrives, too
        if length.isdecimal() and int(length) > self.limits.max_body_bytes:
            raise _too_large(self.limits)

    async def _read_body(self, receive: Receive, held: "_HeldBody") -> bytes:
        """The whole body; its size is counted among those of all requests.

        Raises:
            Refused: it is too large or too slow, the server holds too many, or the client has left.
        """
        limits = self.limits
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refused(400, "disconnected", "The client left before the body was whole.")
                    part = message.get("body", b"")
                    held.size += len(part)
                    self._buffered += len(part)
                    if held.size > limits.max_body_bytes:
                        raise _too_large(limits)
                    # many bodies, each within its limit, may still be more than the memory holds
                    if self._buffered > limits.max_buffered_bytes:
                        raise Refused(503, "overloaded", "The service holds too many large requests; try again later.")
                    parts.append(part)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            reason = f"The body did not arrive within {limits.body_seconds:g} seconds."
            raise Refused(408, "slow_body", reason) from None


@dataclass
class _HeldBody:
    """How much of a request's body is in memory."""

    size: int = 0


def _request_id(headers: dict[str, str]) -> str:
    """The client's id of the request if it is plain, else a new one."""
    # only plain ids: anything else could forge lines of the log
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)


def _too_large(limits: Limits) -> Refused:
    return Refused(413, "too_large", f"The body is larger than {limits.max_body_bytes:,} bytes.")


def _has_body(headers: dict[str, str]) -> bool:
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers


def _replay(body: bytes, receive: Receive) -> Receive:
    """A receive that gives a body that was read already, then what the server says."""
    is_sent = False

    async def replay() -> Message:
        nonlocal is_sent
        if is_sent:
            return await receive()
        is_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


class _Reply:
    """Sends the answer with the headers that every answer has; refuses unless the answer has begun."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._request_id = request_id
        self.status = 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            present = {name.lower() for name, _ in message["headers"]}
            missing = [header for header in _SECURITY_HEADERS if header[0] not in present]
            message["headers"] = [*message["headers"], *missing, (b"x-request-id", self._request_id.encode())]
        await self._send(message)

    async def refuse(self, refused: Refused) -> None:
        # headers are out already: a second answer would corrupt the first
        if self.status:
            return
        body = problem_json(str(refused), refused.kind, self._request_id)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        if refused.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if refused.status in (429, 503):
            headers.append((b"retry-after", b"1"))
        if refused.status in (408, 413, 503):
            # the rest of the body would be taken for the next request
            headers.append((b"connection", b"close"))
        await self.send({"type": "http.response.start", "status": refused.status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})


def problem_json(message: str, kind: str, request_id: str) -> bytes:
    """The one shape of an error: `error` for people, `kind` for programs, `request_id` for the log."""
    return json.dumps({"error": message, "kind": kind, "request_id": request_id}).encode()


_SEPARATORS = (b",", b"[", b"{")


def load_json(body: bytes, max_values: int) -> Any:
    """The value of a body of JSON: no NaN, no infinity, no half of a surrogate pair, no more than 1,024 levels.

    Python's own parser lets all of these through, and they would fail later, in the middle of an answer or in a row
    that is stored. `max_values` bounds the memory: an empty list takes 3 bytes of JSON and 64 of memory.

    Raises:
        Refused: it has more values. orjson.JSONDecodeError: it is no such JSON.
    """
    # separators within texts count as well, which only makes the bound a little stricter
    if sum(map(body.count, _SEPARATORS)) > max_values:
        raise Refused(413, "too_large", f"The body has more than {max_values:,} values; send several smaller requests.")
    return orjson.loads(body)


def json_route(max_values: int) -> type[APIRoute]:
    """The class of routes whose requests read JSON so.

    A route that takes one body of JSON, and names of its path alone, is called at once with a body that is valid:
    FastAPI's way there costs a fifth of a short search. Whatever is not valid goes that way, which says why.
    """

    class BoundedRequest(Request):
        async def json(self) -> Any:
            return load_json(await self.body(), max_values)

    class BoundedRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()
            # looked at once a route, not once a request
            only_body = _only_body(self)

            async def handle_bounded(request: Request) -> Response:
                bounded = BoundedRequest(request.scope, request.receive)
                if only_body and request.headers.get("content-type") == _JSON:
                    name, model = only_body
                    try:
                        body = model.model_validate(await bounded.json())
                    # FastAPI reads it again, and its error names the field
                    except (orjson.JSONDecodeError, ValidationError):
                        return await handle(bounded)
                    return await self.endpoint(**request.path_params, **{name: body})
                try:
                    return await handle(bounded)
                except HTTPException as error:
                    # FastAPI makes one of its own of whatever is raised while the body is read
                    if isinstance(error.__cause__, Refused):
                        raise error.__cause__ from None
                    raise

            return handle_bounded

    return BoundedRoute


def _only_body(route: APIRoute) -> tuple[str, type[BaseModel]] | None:
    """The name and model of the body of a route that takes nothing else but plain names of its path."""
    parts = route.dependant
    others = (parts.query_params, parts.header_params, parts.cookie_params, parts.dependencies)
    if any(others) or len(parts.body_params) != 1:
        return None
    if any(parameter.field_info.annotation is not str for parameter in parts.path_params):
        return None
    body = parts.body_params[0]
    model = body.field_info.annotation
    return (body.name, model) if isinstance(model, type) and issubclass(model, BaseModel) else None


_JSON = "application/json"
