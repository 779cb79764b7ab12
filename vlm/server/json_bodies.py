"""Bodies of JSON, read strictly and within bounds, by every route of the API."""

from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute

from vlm.server.guard import Refused

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
    """The class of routes whose requests read JSON so."""

    class BoundedRequest(Request):
        async def json(self) -> Any:
            return load_json(await self.body(), max_values)

    class BoundedRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def handle_bounded(request: Request) -> Response:
                return await handle(BoundedRequest(request.scope, request.receive))

            return handle_bounded

    return BoundedRoute
