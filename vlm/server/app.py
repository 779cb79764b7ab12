"""The HTTP API: routes, and how a request reaches its index.

`create_app` puts everything together for any ASGI server. A search waits in the micro-batcher of its index; what reads
files or changes the index runs in a thread. Errors have one shape (`schemas.Problem`), whoever raises them.
"""

import asyncio
import contextlib
import functools
import hashlib
import importlib.resources
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Annotated, Any, TypeVar

import orjson
from fastapi import FastAPI, Request
from fastapi import Query as QueryParameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from vlm import __version__
from vlm.errors import IndexBusy, UsageError, VlmError
from vlm.index.ann.faiss_search import use_one_search_thread
from vlm.server import schemas
from vlm.server.batcher import MicroBatcher, Overloaded
from vlm.server.guard import App, Guard, Limits, Refused, Tokens, json_route, problem_json
from vlm.server.index_changes import ChangeQueue, add_items, delete_rows
from vlm.server.served_index import MapReader, ServedIndex, UnknownItem, checked_uploads
from vlm.server.service_metrics import CONTENT_TYPE, ServiceMetrics
from vlm.service.query import Query
from vlm.service.search import SearchResult

Value = TypeVar("Value")
Uid = Annotated[str, QueryParameter(min_length=1, max_length=schemas.MAX_TEXT)]

Explained = tuple[bytes, schemas.ExplainRequest]
"""An encoded image with what is asked about it."""

API = "/api/v1"
PAGE_FILES = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/map.js": ("map.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
_OPEN_PATHS = {*PAGE_FILES, "/health", "/ready", "/favicon.ico"}
_MAX_EXPLANATIONS = 16
_WRITING = ("/add", "/delete")
"""Ends of the paths that change an index."""
_CHANGE_PROBLEMS: dict[int | str, dict[str, Any]] = {
    409: {"description": "Another change of the index is under way.", "model": schemas.ProblemModel},
}

PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"description": "The request does not fit the index.", "model": schemas.ProblemModel},
    404: {"description": "There is no such index or item.", "model": schemas.ProblemModel},
    413: {"description": "The body is too large.", "model": schemas.ProblemModel},
    422: {"description": "A value is not valid.", "model": schemas.ProblemModel},
    503: {"description": "Too many requests wait.", "model": schemas.ProblemModel},
}


@dataclass(kw_only=True)
class Service:
    """Open indexes with their batchers; what the routes work on.

    max_batch: queries that are embedded and searched together; 1 turns micro-batching off. workers: threads that
    search each index.
    """

    indexes: Mapping[str, ServedIndex]
    limits: Limits = field(default_factory=Limits)
    tokens: Tokens = field(default_factory=Tokens)
    max_batch: int = 64
    max_waiting: int = 1024
    workers: int = 1
    cors_origins: tuple[str, ...] = ()
    metrics: ServiceMetrics = field(default_factory=ServiceMetrics)
    batchers: dict[str, MicroBatcher[Query, SearchResult]] = field(default_factory=dict, init=False)
    explainers: dict[str, MicroBatcher[Explained, dict[str, Any]]] = field(default_factory=dict, init=False)
    changes: dict[str, ChangeQueue] = field(default_factory=dict, init=False)
    maps: dict[str, MapReader] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for name, index in self.indexes.items():
            self.changes[name] = ChangeQueue()
            self.maps[name] = MapReader(index=index)
            self.batchers[name] = MicroBatcher(
                functools.partial(self._run_batch, index),
                max_batch=self.max_batch,
                max_waiting=self.max_waiting,
                workers=self.workers,
                # requests are answered side by side; threads that wait for one another in each would cost more
                prepare_thread=use_one_search_thread,
            )
            # one at a time: the gradients of a tower take several times the memory of an embedding
            self.explainers[name] = MicroBatcher(
                functools.partial(_explain, index), max_batch=1, max_waiting=_MAX_EXPLANATIONS
            )

    def _run_batch(self, index: ServedIndex, queries: Sequence[Query]) -> list[SearchResult | VlmError]:
        results = index.search_batch(queries)
        self.metrics.observe_batch(len(queries))
        for result in results:
            if not isinstance(result, VlmError):
                self.metrics.observe_search(result)
        return results

    def index(self, name: str) -> ServedIndex:
        """The index of this name.

        Raises:
            UnknownItem: there is none.
        """
        if name not in self.indexes:
            raise UnknownItem(f"There is no index {name!r}; the indexes are {', '.join(self.indexes)}.")
        return self.indexes[name]

    async def search(self, name: str, request: schemas.SearchRequest) -> dict[str, Any]:
        """The answer to one query; with its facets, if it asks for some.

        Raises: as of `ServedIndex.search_batch` and `ServedIndex.facets`.
        """
        index = self.index(name)
        # refused before the search, which is the larger part of the work
        counts = await in_thread(index.facets, request.facets, where=request.where) if request.facets else {}
        # decoding uploads takes long enough to hold up other requests
        query = await in_thread(self.to_query, request) if request.images else self.to_query(request)
        result = await self.batchers[name].submit(query)
        answer = index.result_to_json(result)
        if request.facets:
            answer["facets"] = facets_to_json(counts)
        return answer

    def to_query(self, request: schemas.SearchRequest) -> Query:
        """The query of a request, checked, within the limits.

        Raises:
            UsageError: it is none, asks for too many hits, or an image is too large.
        """
        if request.top > self.limits.max_results:
            raise UsageError(f"top = {request.top:,} is out of range: at most {self.limits.max_results:,} hits a page.")
        query = request.to_query()
        uploads = [image for image in query.images if isinstance(image, bytes)]
        checked_uploads(uploads, self.limits.max_pixels)
        # checked here, where a refusal is of this request alone, not of the whole batch it would join
        query.check()
        return query

    async def warm_up(self) -> None:
        """Load the models, so that the first query does not wait for them; what fails is said by `/ready`."""
        for index in self.indexes.values():
            with contextlib.suppress(VlmError):
                await in_thread(index.check_ready)

    async def close(self) -> None:
        """Answer what was accepted, then release the indexes."""
        # batches first: their answers still need the indexes open
        for batcher in (*self.batchers.values(), *self.explainers.values()):
            await batcher.close()
        for changes in self.changes.values():
            await changes.close()
        for index in self.indexes.values():
            index.close()


def _explain(index: ServedIndex, requests: Sequence[Explained]) -> list[dict[str, Any] | VlmError]:
    answers: list[dict[str, Any] | VlmError] = []
    for image, request in requests:
        try:
            answers.append(index.explain(image, request))
        # one request's mistake must not be the answer to the others of its batch
        except VlmError as error:
            answers.append(error)
    return answers


async def in_thread(function: Callable[..., Value], *arguments: Any, **options: Any) -> Value:
    """The value of a call that blocks, from a thread."""
    return await asyncio.to_thread(function, *arguments, **options)


def check_uploads(data_urls: Sequence[str], max_pixels: int) -> None:
    """Refuse images that are none or have too many pixels together.

    Raises: as of `checked_uploads`.
    """
    checked_uploads(list(map(schemas.decode_data_url, data_urls)), max_pixels)


def facets_to_json(counts: Mapping[str, Sequence[Any]]) -> dict[str, list[dict[str, Any]]]:
    """Counts of values by column, as plain values."""
    plain: dict[str, list[dict[str, Any]]] = {}
    for name, values in counts.items():
        plain[name] = [{"value": count.value, "rows": count.rows} for count in values]
    return plain


def create_app(service: Service) -> App:
    """The ASGI application: the API, the page, and what guards them."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # not awaited: the server answers /health at once, and /ready says when the models are there
        warming = asyncio.create_task(service.warm_up())
        yield
        warming.cancel()
        await service.close()

    api = FastAPI(
        title="vlm search",
        version=__version__,
        description="Search images by text, image, or both. Errors have one shape: error, kind, request_id.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=f"{API}/openapi.json",
    )
    # before any route is added, since a route takes the class at that moment
    api.router.route_class = json_route(service.limits.max_values)
    _add_error_handlers(api)
    add_search_routes(api, service)
    add_item_routes(api, service)
    add_model_routes(api, service)
    add_change_routes(api, service)
    add_operation_routes(api, service)
    add_page(api)
    from vlm.server.other_apis import add_clip_retrieval_routes, add_openai_routes

    add_openai_routes(api, service)
    add_clip_retrieval_routes(api, service)
    guard = Guard(
        app=api,
        limits=service.limits,
        tokens=service.tokens,
        is_open=lambda path: path in _OPEN_PATHS,
        is_counted=lambda path: path not in PAGE_FILES,
        needs_write=lambda method, path: path.endswith(_WRITING),
        observe=service.metrics.observe_request,
    )
    if not service.cors_origins:
        return guard
    from starlette.middleware.cors import CORSMiddleware

    # outside the guard: browsers ask for permission without the token
    return CORSMiddleware(guard, allow_origins=list(service.cors_origins), allow_methods=["*"], allow_headers=["*"])


def reply(value: Any, status: int = 200) -> Response:
    """A value as JSON."""
    return Response(orjson.dumps(value), status, media_type="application/json")


def _problem(request: Request, status: int, kind: str, message: str, headers: dict[str, str] | None = None) -> Response:
    body = problem_json(message, kind, getattr(request.state, "request_id", ""))
    return Response(body, status, headers=headers, media_type="application/json")


def _add_error_handlers(api: FastAPI) -> None:
    """Give each error the one shape and its status."""

    @api.exception_handler(VlmError)
    async def ours(request: Request, error: VlmError) -> Response:
        if isinstance(error, UnknownItem):
            return _problem(request, 404, "not_found", str(error))
        if isinstance(error, IndexBusy):
            return _problem(request, 409, "busy", str(error), {"retry-after": "5"})
        if isinstance(error, Overloaded):
            return _problem(request, 503, "overloaded", str(error), {"retry-after": str(error.retry_after)})
        if isinstance(error, UsageError):
            return _problem(request, 400, "bad_request", str(error))
        # an image that cannot be decoded is the client's, what is wrong with the index is not
        return _problem(request, 422, "unprocessable", str(error))

    @api.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return _problem(request, error.status, error.kind, str(error))

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        faults: list[str] = []
        # a body of a thousand wrong values would otherwise be answered by a thousand sentences
        for fault in error.errors()[:5]:
            where = ".".join(str(part) for part in fault["loc"] if part != "body")
            faults.append(f"{where}: {fault['msg']}" if where else str(fault["msg"]))
        return _problem(request, 422, "invalid", "; ".join(faults))

    @api.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        kinds = {404: "not_found", 405: "method_not_allowed"}
        return _problem(
            request,
            error.status_code,
            kinds.get(error.status_code, "http"),
            str(error.detail),
            dict(error.headers or {}),
        )


def add_search_routes(api: FastAPI, service: Service) -> None:
    """Search, several queries at once, columns and facets."""

    @api.post(f"{API}/indexes/{{name}}/search", responses=PROBLEMS, response_model=schemas.SearchAnswer)
    async def search(name: str, request: schemas.SearchRequest) -> Response:
        """Search by texts, images, items and vectors, combined and subtracted."""
        return reply(await service.search(name, request))

    @api.post(f"{API}/indexes/{{name}}/batch", responses=PROBLEMS, response_model=schemas.BatchAnswer)
    async def batch(name: str, request: schemas.BatchRequest) -> Response:
        """Several queries; each has its answer or its error."""
        uploads = list(chain.from_iterable(query.images for query in request.queries))
        if uploads:
            # within the limits of one request, however its images are spread over the queries
            await in_thread(check_uploads, uploads, service.limits.max_pixels)
        answers = await asyncio.gather(
            *(service.search(name, query) for query in request.queries), return_exceptions=True
        )
        results: list[dict[str, Any]] = []
        for answer in answers:
            if isinstance(answer, VlmError):
                results.append({"error": str(answer)})
            # a fault of ours, not of the query: the request ends as any other does
            elif isinstance(answer, BaseException):
                raise answer
            else:
                results.append(answer)
        return reply({"results": results})

    @api.get(f"{API}/indexes/{{name}}/fields", responses=PROBLEMS, response_model=schemas.FieldsAnswer)
    async def fields(name: str) -> Response:
        """The columns of the metadata, for filters."""
        summaries = await in_thread(service.index(name).fields)
        return reply({"fields": [summary.to_json() | {"is_category": summary.is_category} for summary in summaries]})

    @api.post(f"{API}/indexes/{{name}}/facets", responses=PROBLEMS, response_model=schemas.FacetsAnswer)
    async def facets(name: str, request: schemas.FacetsRequest) -> Response:
        """The most frequent values of columns among the rows that match a filter."""
        counts = await in_thread(service.index(name).facets, request.fields, where=request.where, top=request.top)
        return reply({"facets": facets_to_json(counts)})


def add_item_routes(api: FastAPI, service: Service) -> None:
    """Items and their images; a uid may hold slashes, so it is a parameter."""

    @api.get(f"{API}/indexes/{{name}}/item", responses=PROBLEMS, response_model=schemas.Item)
    async def item(name: str, uid: Uid) -> Response:
        """Captions and metadata of an item."""
        index = service.index(name)
        return reply(index.entry_to_json(await in_thread(index.entry, uid)))

    @api.post(f"{API}/indexes/{{name}}/items", responses=PROBLEMS, response_model=schemas.ItemsAnswer)
    async def items(name: str, request: schemas.ItemsRequest) -> Response:
        """Captions and metadata of several items."""
        index = service.index(name)
        entries = await in_thread(index.entries, request.uids)
        return reply({"items": [index.entry_to_json(entry) for entry in entries]})

    @api.post(f"{API}/indexes/{{name}}/map", responses=PROBLEMS, response_model=schemas.MapAnswer)
    async def points(name: str, request: schemas.MapRequest) -> Response:
        """A region of the map that vlm index map made: more of its rows the nearer it is looked at."""
        # an unknown name is answered by 404 here, not by the KeyError of the next line
        service.index(name)
        return reply(await in_thread(service.maps[name].answer, request))

    @api.get(f"{API}/indexes/{{name}}/image", responses=PROBLEMS, response_class=Response)
    async def image(name: str, uid: Uid, request: Request) -> Response:
        """The image of an item as it is stored."""
        data = await in_thread(service.index(name).image, uid)
        return _cacheable(request, data, image_type(data))

    @api.get(f"{API}/indexes/{{name}}/thumbnail", responses=PROBLEMS, response_class=Response)
    async def thumbnail(
        name: str, uid: Uid, request: Request, size: Annotated[int, QueryParameter(ge=1, le=4096)] = 320
    ) -> Response:
        """The image of an item as a JPEG whose longer side is about `size` pixels (160, 320 or 640)."""
        data = await in_thread(service.index(name).thumbnail, uid, size)
        return _cacheable(request, data, "image/jpeg")


def _cacheable(request: Request, data: bytes, media_type: str) -> Response:
    # an image never changes under its uid unless the row is replaced, which changes the tag
    tag = f'"{hashlib.blake2b(data, digest_size=12).hexdigest()}"'
    headers = {"etag": tag, "cache-control": "private, max-age=3600"}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(data, headers=headers, media_type=media_type)


def image_type(data: bytes) -> str:
    """The media type of an encoded image by its first bytes; never one that a browser would run.

    >>> image_type(bytes([255, 216, 255, 224]))
    'image/jpeg'
    """
    for signature, media_type in _SIGNATURES.items():
        if data.startswith(signature):
            return media_type
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return "image/avif"
    return "application/octet-stream"


_SIGNATURES = {
    b"\xff\xd8\xff": "image/jpeg",
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"GIF8": "image/gif",
    b"BM": "image/bmp",
    b"II*\x00": "image/tiff",
    b"MM\x00*": "image/tiff",
}


def add_model_routes(api: FastAPI, service: Service) -> None:
    """What the index's model says of images."""

    @api.post(f"{API}/indexes/{{name}}/classify", responses=PROBLEMS, response_model=schemas.ClassifyAnswer)
    async def classify(name: str, request: schemas.ClassifyRequest) -> Response:
        """Zero-shot classification of images, given or stored, among any classes."""
        index = service.index(name)
        images = await in_thread(index.images_of, request.images, request.items, service.limits.max_pixels)
        results = await in_thread(index.classify, images, request.classes, templates=request.templates, top=request.top)
        return reply({"results": results})

    @api.post(f"{API}/indexes/{{name}}/caption", responses=PROBLEMS, response_model=schemas.CaptionAnswer)
    async def caption(name: str, request: schemas.CaptionRequest) -> Response:
        """Captions of images, where the index's model has a caption decoder."""
        index = service.index(name)
        images = await in_thread(index.images_of, request.images, request.items, service.limits.max_pixels)
        options = request.model_dump(exclude={"images", "items"})
        results = await in_thread(index.caption, images, options)
        return reply({"captions": [result["captions"][0]["caption"] for result in results], "results": results})

    @api.post(f"{API}/indexes/{{name}}/explain", responses=PROBLEMS, response_model=schemas.ExplainAnswer)
    async def explain(name: str, request: schemas.ExplainRequest) -> Response:
        """Heat maps over an image that say where it matches a text, and each of its words."""
        uploads = [request.image] if request.image is not None else []
        uids = [request.item] if request.item is not None else []
        index = service.index(name)
        [image] = await in_thread(index.images_of, uploads, uids, service.limits.max_pixels)
        return reply(await service.explainers[name].submit((image, request)))


def add_change_routes(api: FastAPI, service: Service) -> None:
    """Changes of an index; they need a token with the right to write."""

    @api.post(f"{API}/indexes/{{name}}/add", responses=PROBLEMS | _CHANGE_PROBLEMS, response_model=schemas.ChangeAnswer)
    async def add(name: str, request: schemas.AddRequest) -> Response:
        """Embed images and add them, all or none; a search that follows the answer finds them."""
        index = service.index(name)
        add_all = functools.partial(add_items, index, request.items, service.limits.max_pixels)
        return reply(await service.changes[name].run(add_all))

    @api.post(
        f"{API}/indexes/{{name}}/delete", responses=PROBLEMS | _CHANGE_PROBLEMS, response_model=schemas.ChangeAnswer
    )
    async def delete(name: str, request: schemas.DeleteRequest) -> Response:
        """Delete rows by uid or by a filter; more than half of the index only if `expect` says how many."""
        index = service.index(name)
        delete_all = functools.partial(
            delete_rows, index, request.uids, request.where, dry_run=request.dry_run, expect=request.expect
        )
        # a dry run changes nothing, so it need not wait for its turn
        if request.dry_run:
            return reply(await in_thread(delete_all))
        return reply(await service.changes[name].run(delete_all))


def add_operation_routes(api: FastAPI, service: Service) -> None:
    """What whoever runs the service asks."""

    @api.get(f"{API}/indexes", response_model=schemas.IndexesAnswer)
    async def indexes() -> Response:
        """The indexes served, in numbers."""
        infos = [await in_thread(index.info) for index in service.indexes.values()]
        return reply({"indexes": infos})

    @api.get("/health", response_model=schemas.HealthAnswer)
    async def health() -> Response:
        """The process is alive."""
        return reply({"status": "ok"})

    @api.get("/ready", responses={503: {"model": schemas.NotReady}}, response_model=schemas.ReadyAnswer)
    async def ready() -> Response:
        """Every index has just answered a real query."""
        milliseconds: dict[str, float] = {}
        for name, index in service.indexes.items():
            try:
                milliseconds[name] = round(await in_thread(index.check_ready), 3)
            # without the reason: it may name paths, and this needs no token
            except VlmError:
                return reply({"status": "not ready", "index": name}, 503)
        return reply({"status": "ready", "milliseconds": milliseconds})

    @api.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Figures for Prometheus."""
        counts = [batcher.counts for batcher in service.batchers.values()]
        return Response(service.metrics.exposition(service.indexes.values(), counts), media_type=CONTENT_TYPE)


def add_page(api: FastAPI) -> None:
    """The search page: three files, no build, no other host."""
    folder = importlib.resources.files("vlm.server") / "page"
    for path, (name, media_type) in PAGE_FILES.items():
        data = (folder / name).read_bytes()

        async def page(request: Request, data: bytes = data, media_type: str = media_type) -> Response:
            return _cacheable(request, data, f"{media_type}; charset=utf-8")

        api.add_api_route(path, page, methods=["GET"], include_in_schema=False)
