"""Bodies of JSON, read strictly and within bounds, by every route of the API."""

from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

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
            only_body = _only_body(self)

            async def handle_bounded(request: Request) -> Response:
                bounded = BoundedRequest(request.scope, request.receive)
                if only_body and request.headers.get("content-type") == _JSON:
                    name, model = only_body
                    try:
                        body = model.model_validate(await bounded.json())
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
