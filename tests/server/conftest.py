"""An index of striped pictures, served without a socket."""

import asyncio
import base64
import runpy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.browser import CHROMIUM, watched_pages
from vlm.server.app import Service, create_app
from vlm.server.serving import open_service, serve_in_background
from vlm.service.query import Query
from vlm.service.search import SearchService

_SHARED = runpy.run_path(str(Path(__file__).parents[1] / "index" / "conftest.py"))

ColourModel = _SHARED["ColourModel"]
make_model = _SHARED["make_model"]
paint = _SHARED["paint"]
write_shard = _SHARED["write_shard"]
shards = _SHARED["shards"]
embeddings = _SHARED["embeddings"]
index = _SHARED["index"]


class ClassifyingModel(ColourModel):
    """Knows colours, and how sure it is."""

    name = "colours"
    embeds_images = True
    logit_scale = 10.0


@pytest.fixture
def model() -> Any:
    """A model whose right answers are known."""
    return ClassifyingModel()


@dataclass
class Caller:
    """Calls an application in its own event loop, as a client would over the network."""

    app: Any
    headers: dict[str, str]

    def __call__(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def call() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
                return await client.request(method, path, headers=self.headers | options.pop("headers", {}), **options)

        return asyncio.run(call())

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self("GET", path, **options)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return self("POST", path, json=body, **options)

    def search(self, **body: Any) -> Any:
        response = self.post("/api/v1/indexes/index/search", body)
        assert response.status_code == 200, response.text
        return response.json()


@pytest.fixture
def service(index: Path, model: Any) -> Service:
    """The index under its folder's name, with the model that knows colours."""
    return open_service({"index": index}, load=lambda _: model)


@pytest.fixture
def caller(service: Service) -> Caller:
    """A client without a token."""
    return Caller(create_app(service), {})


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The system's Chromium, without a window."""
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def address(service: Service) -> Iterator[str]:
    """Where the index is served."""
    with serve_in_background(service) as address:
        yield address


@pytest.fixture
def open_page(browser: Any, address: str) -> Iterator[Callable[..., Any]]:
    """Opens the page with a query; errors in it and requests to other hosts fail the test."""
    with watched_pages(browser, address) as make:
        yield make


@pytest.fixture
def expected(index: Path, model: Any) -> Callable[..., list[str]]:
    """The uids that the same query gives without HTTP."""
    service = SearchService.open(index, load=lambda _: model)

    def ask(**options: Any) -> list[str]:
        return [hit.entry.uid for hit in service.search(Query(**options)).hits]

    return ask


@pytest.fixture
def data_url(paint: Callable[..., bytes]) -> Callable[..., str]:
    """A picture with one stripe of each colour named, as a data URL."""

    def make(*colours: str) -> str:
        return "data:image/png;base64," + base64.b64encode(paint(*colours)).decode()

    return make
