"""A client of `vlm serve`, blocking and asynchronous; its `search` is that of an open index.

    client = vlm.Client("http://127.0.0.1:8000")
    for hit in client.search("a dog", minus="snow", where="year > 2020", top=20):
        print(hit.score, hit.uid, hit.caption)

Both clients build the same requests and read the same answers; only sending differs. What a busy or restarting server
refuses is sent again after a growing pause; a change of an index is not sent again where its answer was lost.
"""

import base64
import io
import itertools
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self, cast

from vlm.config import number_list, text_list
from vlm.errors import UsageError, VlmError
from vlm.results import Result

if TYPE_CHECKING:
    import httpx
    from PIL.Image import Image

API = "/api/v1"
RETRIED = frozenset({409, 429, 502, 503, 504})
"""Statuses of a server that may answer later."""

RETRIED_CHANGES = frozenset({409, 429})
"""Those of them after which a change was certainly not made."""

_FIRST_PAUSE = 0.2
_LONGEST_PAUSE = 5.0
# shorter than any server keeps a connection (uvicorn: 5 s, as httpx by default): a request sent on one that the server
# is just closing would be lost, and a change must not be sent again
_IDLE_SECONDS = 3.0
_CHANGING: dict[str, Any] = {"is_repeatable": False, "timeout": 960.0}
"""Options of a request that changes an index: sent once, and with more time than the server takes for it."""

Texts = str | Sequence[str]
ImageInput = Any
"""A path, bytes, a PIL image, or an array of pixels, as everywhere (`vlm.data.image_inputs`)."""


@dataclass(frozen=True, kw_only=True)
class RemoteHit(Result):
    """A hit as the server gives it; the attributes are those of a hit of an open index.

    path: only where the server shows paths. client: what `image` asks.
    """

    uid: str
    score: float
    captions: dict[str, list[str]]
    metadata: dict[str, Any]
    path: str = ""
    fused: float | None = None
    similar: int | None = None
    likelihood: float | None = None
    probability: float | None = None
    client: "Client | None" = field(default=None, repr=False, compare=False)

    @property
    def caption(self) -> str:
        """Its first caption; empty if it has none."""
        return next((texts[0] for texts in self.captions.values() if texts), "")

    def image(self) -> "Image":
        """Its image, fetched from the server.

        Raises:
            UsageError: the hit came from an `AsyncClient`, whose `image` is awaited. VlmError: the image is gone.
        """
        if self.client is None:
            raise UsageError("Await client.image(hit.uid) with an AsyncClient.")
        return self.client.image(self.uid)

    def to_json(self) -> dict[str, Any]:
        """Plain values, without those that the query did not ask for."""
        optional = {
            "fused": self.fused,
            "similar": self.similar,
            "likelihood": self.likelihood,
            "probability": self.probability,
            "path": self.path,
        }
        present = {name: value for name, value in optional.items() if value not in (None, "")}
        plain = {"uid": self.uid, "score": self.score, "captions": self.captions, "metadata": self.metadata}
        return plain | present


@dataclass(frozen=True, kw_only=True)
class RemoteResult(Result):
    """The hits of a query, best first; iterates over them. next: cursor of the next page, empty at the end."""

    hits: tuple[RemoteHit, ...]
    next: str
    generation: int
    embed_milliseconds: float
    search_milliseconds: float
    cut: tuple[str, ...] = ()
    hint: str = ""
    facets: dict[str, dict[int | float | str, int]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[RemoteHit]:
        return iter(self.hits)

    def __len__(self) -> int:
        return len(self.hits)

    def __getitem__(self, rank: int) -> RemoteHit:
        return self.hits[rank]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "hits": [hit.to_json() for hit in self.hits],
            "next": self.next,
            "generation": self.generation,
            "embed_milliseconds": self.embed_milliseconds,
            "search_milliseconds": self.search_milliseconds,
            "cut": list(self.cut),
            "hint": self.hint,
            "facets": self.facets,
        }


@dataclass(frozen=True, kw_only=True)
class RemoteClass(Result):
    """A class of an image and its probability."""

    name: str
    probability: float


class _Connection:
    """What both clients share: the address, the token, how often a request is sent, requests and answers."""

    def __init__(self, url: str, *, index: str = "", token: str = "", retries: int = 4, timeout: float = 60.0) -> None:
        try:
            import httpx
        except ImportError as error:
            raise UsageError("The client needs httpx: pip install httpx.") from error
        if not url.startswith(("http://", "https://")):
            raise UsageError(f"{url!r} is not the address of a server; give one as http://127.0.0.1:8000.")
        if retries < 0:
            raise UsageError(f"retries = {retries} is out of range: at least 0.")
        self._index = index
        self._retries = retries
        headers = {"authorization": f"Bearer {token}"} if token else {}
        self._options: dict[str, Any] = {
            "base_url": url.rstrip("/"),
            "headers": headers,
            "timeout": timeout,
            "limits": httpx.Limits(keepalive_expiry=_IDLE_SECONDS),
        }
        self._errors = (httpx.TransportError,)
        self._unsent = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.UnsupportedProtocol)

    def _path(self, verb: str) -> str:
        return f"{API}/indexes/{self._index}/{verb}"

    def _request(
        self, http: "httpx.Client | httpx.AsyncClient", method: str, path: str, options: dict[str, Any]
    ) -> "httpx.Request":
        """A request to send.

        Raises:
            UsageError: the client is closed, or a value of the request is no JSON.
        """
        if http.is_closed:
            raise UsageError(f"The client of {self._options['base_url']} is closed; make a new one.")
        try:
            return http.build_request(method, path, **options)
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"The request cannot be sent: {error}; give texts, numbers, lists and mappings."
            ) from error

    def _broken(self, error: Exception, *, is_change: bool) -> VlmError:
        """The error for a connection that could not be made, or that broke."""
        url = self._options["base_url"]
        # errors of broken connections have no text
        reason = str(error) or type(error).__name__
        if is_change and not isinstance(error, self._unsent):
            return VlmError(
                f"The connection to {url} broke before the answer came ({reason}). Whether the change was made is not "
                "known: look at the items, and make it again if they are as before."
            )
        return VlmError(f"{url} cannot be reached: {reason}.")

    def _pause(self, attempt: int) -> float:
        """Seconds before the next attempt."""
        # spread, so that clients that were refused together do not come back together
        return min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**attempt) * random.uniform(0.5, 1.0)

    @staticmethod
    def _read(response: "httpx.Response") -> Any:
        """The answer.

        Raises:
            UsageError: the request is wrong or not allowed. VlmError: the server failed.
        """
        # an image comes as it is stored, everything else as JSON
        if response.status_code < 400:
            return response.json() if response.headers.get("content-type") == "application/json" else response.content
        try:
            message = str(response.json()["error"])
        except (ValueError, KeyError, TypeError):
            # a proxy in front of the server answers with a page of its own
            message = f"The server answered {response.status_code}."
        # the same errors as of an open index, so that code runs with either
        raise (UsageError if response.status_code < 500 else VlmError)(message)


def search_body(
    texts: Texts = (),
    *,
    image: ImageInput | Sequence[ImageInput] = (),
    like: Texts = (),
    minus: Texts = (),
    vector: Sequence[float] | Sequence[Sequence[float]] = (),
    weights: Sequence[float] = (),
    where: str = "",
    words: str = "",
    top: int = 10,
    at_least: float | None = None,
    group_duplicates: float | None = None,
    diversity: float = 0.0,
    relevant: bool | float | None = None,
    rerank_top: int = 0,
    after: str = "",
    facets: Texts = (),
) -> dict[str, Any]:
    """The body of a search; arguments as `vlm.api.index.SearchIndex.search`, but `like` takes uids alone.

    facets: columns whose values are counted over all rows that match `where`.

    Raises:
        UsageError: an image cannot be read.
    """
    # through float, since JSON has no numbers of numpy
    vectors = [list(map(float, number_list(row, "vector"))) for row in _rows(vector)]
    return {
        "texts": text_list(texts, "texts"),
        "images": list(map(data_url, _images(image))),
        "items": text_list(like, "like"),
        "vectors": vectors,
        "minus": text_list(minus, "minus"),
        "weights": list(map(float, number_list(weights, "weights"))),
        "where": where,
        "words": words,
        "top": top,
        "at_least": at_least,
        "duplicates": group_duplicates,
        "diversity": diversity,
        "relevant": relevant,
        "rerank_top": rerank_top,
        "after": after,
        "facets": text_list(facets, "facets"),
    }


def _rows(vector: Any) -> Sequence[Any]:
    if not hasattr(vector, "__len__") or isinstance(vector, str | Mapping):
        raise UsageError(f"vector = {vector!r}: give numbers, or a matrix of one vector a row.")
    # a single vector, given as plain numbers
    if len(vector) and not hasattr(vector[0], "__len__"):
        return [vector]
    return vector


def _images(image: Any) -> list[Any]:
    # here, so that queries by text do not load what reads images
    from vlm.data.image_inputs import image_list

    return image_list(image)


def data_url(image: ImageInput) -> str:
    """An image as a data URL.

    Raises:
        UsageError: it cannot be read or is not an image.
    """
    from vlm.data.image_inputs import encoded_image

    encoded = encoded_image(image)
    try:
        data = encoded if isinstance(encoded, bytes) else encoded.read_bytes()
    except OSError as error:
        raise UsageError(f"{encoded} cannot be read: {error.strerror}.") from error
    return f"data:image/*;base64,{base64.b64encode(data).decode()}"


def _result_of(answer: Mapping[str, Any], client: "Client | None") -> RemoteResult:
    hits: list[RemoteHit] = []
    for values in answer["hits"]:
        hits.append(
            RemoteHit(
                uid=values["uid"],
                score=values["score"],
                captions=values["captions"],
                metadata=values["metadata"],
                # the rest is there only if the query asked for it, or the server shows it
                path=values.get("path", ""),
                fused=values.get("fused"),
                similar=values.get("similar"),
                likelihood=values.get("likelihood"),
                probability=values.get("probability"),
                client=client,
            )
        )
    facets: dict[str, dict[int | float | str, int]] = {}
    for name, counts in answer.get("facets", {}).items():
        # a list in JSON, whose objects have texts as keys alone: a year stays a number
        facets[name] = {count["value"]: count["rows"] for count in counts}
    return RemoteResult(
        hits=tuple(hits),
        next=answer["next"],
        generation=answer["generation"],
        embed_milliseconds=answer["embed_milliseconds"],
        search_milliseconds=answer["search_milliseconds"],
        cut=tuple(answer.get("cut", ())),
        hint=answer.get("hint", ""),
        facets=facets,
    )


def _opened(data: bytes) -> "Image":
    from PIL import Image

    return Image.open(io.BytesIO(data))


def _classification(image: ImageInput | Sequence[ImageInput], classes: Sequence[str], top: int) -> dict[str, Any]:
    """The body of a request to classify images."""
    return {"images": list(map(data_url, _images(image))), "classes": text_list(classes, "classes"), "top": top}


def _classes_of(answer: Mapping[str, Any]) -> list[tuple[RemoteClass, ...]]:
    ranked: list[tuple[RemoteClass, ...]] = []
    for result in answer["results"]:
        ranked.append(tuple(RemoteClass(name=one["name"], probability=one["probability"]) for one in result["classes"]))
    return ranked


def _caption_body(image: ImageInput | Sequence[ImageInput], prompt: str) -> dict[str, Any]:
    return {"images": list(map(data_url, _images(image))), "prompt": prompt}


def explain_body(
    text: str,
    *,
    item: str = "",
    image: ImageInput = None,
    words: bool = False,
    against: Texts = (),
    method: str = "auto",
) -> dict[str, Any]:
    """The body of a request for heat maps of one image, `item` by its uid or `image` itself, as of `vlm.explain`.

    Raises:
        UsageError: neither is given, or both; or the image cannot be used.
    """
    if bool(item) == (image is not None):
        raise UsageError("Give the image to explain: either item, a uid, or image.")
    shown = {"item": item} if item else {"image": data_url(image)}
    return shown | {"text": text, "words": words, "against": text_list(against, "against"), "method": method}


def map_body(
    box: Sequence[float] | None = None, *, top: int = 2000, colour: str = "", where: str = "", uids: Texts = ()
) -> dict[str, Any]:
    """The body of a request for a region of the map.

    Args:
        box: left, bottom, right, top; None is the whole map.
        top: most points. colour: a column whose most frequent values are numbered. where: only rows that match it.
        uids: rows whose places are asked for.
    """
    region = None if box is None else list(map(float, number_list(box, "box")))
    return {"box": region, "top": top, "colour": colour, "where": where, "uids": text_list(uids, "uids")}


def _add_body(items: Any) -> dict[str, Any]:
    is_list = isinstance(items, Iterable) and not isinstance(items, str | bytes | Mapping)
    described: list[dict[str, Any]] = []
    for item in items if is_list else (items,):
        # a mapping alone is refused as well: an addition is a list, as in the service's own API
        if not is_list or not isinstance(item, Mapping) or "image" not in item:
            raise UsageError(f"{item!r} cannot be added: give a list of mappings, as [{{'image': 'new.jpg'}}].")
        values = dict(cast(Mapping[str, Any], item))
        described.append(values | {"image": data_url(values["image"])})
    return {"items": described}


def _delete_body(uids: Texts, where: str, dry_run: bool, expect: int | None) -> dict[str, Any]:
    return {"uids": text_list(uids, "uids"), "where": where, "dry_run": dry_run, "expect": expect}


class Client(_Connection):
    """A blocking client; several threads may share it.

    Args:
        url: address of the server. index: name of an index; empty takes the server's first.
        token: a bearer token, if the server asks for one.
        retries: how often a refused request is sent again. timeout: seconds that one request may take.
    """

    def __init__(self, url: str, *, index: str = "", token: str = "", retries: int = 4, timeout: float = 60.0) -> None:
        super().__init__(url, index=index, token=token, retries=retries, timeout=timeout)
        import httpx

        self._http = httpx.Client(**self._options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _call(self, method: str, path: str, *, is_repeatable: bool = True, **options: Any) -> Any:
        for attempt in itertools.count():
            is_last = attempt == self._retries
            try:
                response = self._http.send(self._request(self._http, method, path, options))
            except self._errors as error:
                # a connection may break after the change was made: sent again, it could be made twice
                if is_last or not (is_repeatable or isinstance(error, self._unsent)):
                    raise self._broken(error, is_change=not is_repeatable) from error
            else:
                if is_last or response.status_code not in (RETRIED if is_repeatable else RETRIED_CHANGES):
                    return self._read(response)
            time.sleep(self._pause(attempt))

    def _use_index(self) -> None:
        # once: what follows goes to the same index, whatever else the server opens
        self._index = self._index or self.indexes()[0]["name"]

    def indexes(self) -> list[dict[str, Any]]:
        """The indexes of the server, in numbers."""
        return self._call("GET", f"{API}/indexes")["indexes"]

    def search(self, texts: Texts = (), **options: Any) -> RemoteResult:
        """The rows nearest to a query; options as those of `search_body`.

        Raises:
            UsageError: the query, its filter or a value of it is not valid. VlmError: the server cannot answer.
        """
        self._use_index()
        answer = self._call("POST", self._path("search"), json=search_body(texts, **options))
        return _result_of(answer, self)

    def classify(
        self, image: ImageInput | Sequence[ImageInput], classes: Sequence[str], *, top: int = 5
    ) -> list[tuple[RemoteClass, ...]]:
        """The classes of each image, the most probable first."""
        self._use_index()
        body = _classification(image, classes, top)
        return _classes_of(self._call("POST", self._path("classify"), json=body))

    def image(self, uid: str) -> "Image":
        """The image of an item.

        Raises:
            UsageError: there is no such item, or its image is gone.
        """
        self._use_index()
        return _opened(self._call("GET", self._path("image"), params={"uid": uid}))

    def caption(self, image: ImageInput | Sequence[ImageInput], *, prompt: str = "") -> list[str]:
        """A caption for each image, beginning with the prompt, where the index's model has a caption decoder.

        Raises:
            UsageError: it has none, or an image cannot be used.
        """
        self._use_index()
        return self._call("POST", self._path("caption"), json=_caption_body(image, prompt))["captions"]

    def explain(self, text: str, **options: Any) -> dict[str, Any]:
        """Heat maps over an image that say where it matches a text; options as those of `explain_body`.

        The overlays are images as data URLs: docs/serve.md has the fields.

        Raises:
            UsageError: the model's image tower gives no map, there is no such item, or the image cannot be used.
        """
        self._use_index()
        return self._call("POST", self._path("explain"), json=explain_body(text, **options))

    def items(self, uids: Texts) -> list[dict[str, Any]]:
        """Captions and metadata of items, in the order of their uids.

        Raises:
            UsageError: there is no such item.
        """
        self._use_index()
        return self._call("POST", self._path("items"), json={"uids": text_list(uids, "uids")})["items"]

    def map(self, box: Sequence[float] | None = None, **options: Any) -> dict[str, Any]:
        """A region of the map that `vlm index map` made; options as those of `map_body`.

        Raises:
            UsageError: the index has no map, or the column or the filter is wrong.
        """
        self._use_index()
        return self._call("POST", self._path("map"), json=map_body(box, **options))

    def fields(self) -> list[dict[str, Any]]:
        """The columns of the metadata."""
        self._use_index()
        return self._call("GET", self._path("fields"))["fields"]

    def add(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Add images, each a mapping with `image` and, if wished, uid, captions and metadata. Needs a write token."""
        self._use_index()
        return self._call("POST", self._path("add"), json=_add_body(items), **_CHANGING)

    def delete(
        self, uids: Texts = (), *, where: str = "", dry_run: bool = False, expect: int | None = None
    ) -> dict[str, Any]:
        """Delete rows by uid or by a filter. Needs a write token.

        dry_run: only say how many rows would go, as `deleted`, and name some, as `examples`.
        expect: that number: if it is another by now, nothing is deleted. Needed for more than half of the index.

        Raises:
            UsageError: a uid does not exist, the filter is malformed, or `expect` is missing or another number.
        """
        self._use_index()
        body = _delete_body(uids, where, dry_run, expect)
        return self._call("POST", self._path("delete"), json=body, **_CHANGING)


class AsyncClient(_Connection):
    """As `Client`, with methods to await."""

    def __init__(self, url: str, *, index: str = "", token: str = "", retries: int = 4, timeout: float = 60.0) -> None:
        super().__init__(url, index=index, token=token, retries=retries, timeout=timeout)
        import httpx

        self._http = httpx.AsyncClient(**self._options)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _call(self, method: str, path: str, *, is_repeatable: bool = True, **options: Any) -> Any:
        import asyncio

        for attempt in itertools.count():
            is_last = attempt == self._retries
            try:
                response = await self._http.send(self._request(self._http, method, path, options))
            except self._errors as error:
                # a connection may break after the change was made: sent again, it could be made twice
                if is_last or not (is_repeatable or isinstance(error, self._unsent)):
                    raise self._broken(error, is_change=not is_repeatable) from error
            else:
                if is_last or response.status_code not in (RETRIED if is_repeatable else RETRIED_CHANGES):
                    return self._read(response)
            await asyncio.sleep(self._pause(attempt))

    async def _use_index(self) -> None:
        self._index = self._index or (await self.indexes())[0]["name"]

    async def indexes(self) -> list[dict[str, Any]]:
        """The indexes of the server, in numbers."""
        return (await self._call("GET", f"{API}/indexes"))["indexes"]

    async def search(self, texts: Texts = (), **options: Any) -> RemoteResult:
        """As `Client.search`."""
        await self._use_index()
        return _result_of(await self._call("POST", self._path("search"), json=search_body(texts, **options)), None)

    async def classify(
        self, image: ImageInput | Sequence[ImageInput], classes: Sequence[str], *, top: int = 5
    ) -> list[tuple[RemoteClass, ...]]:
        """As `Client.classify`."""
        await self._use_index()
        body = _classification(image, classes, top)
        return _classes_of(await self._call("POST", self._path("classify"), json=body))

    async def image(self, uid: str) -> "Image":
        """As `Client.image`."""
        await self._use_index()
        return _opened(await self._call("GET", self._path("image"), params={"uid": uid}))

    async def caption(self, image: ImageInput | Sequence[ImageInput], *, prompt: str = "") -> list[str]:
        """As `Client.caption`."""
        await self._use_index()
        return (await self._call("POST", self._path("caption"), json=_caption_body(image, prompt)))["captions"]

    async def explain(self, text: str, **options: Any) -> dict[str, Any]:
        """As `Client.explain`."""
        await self._use_index()
        return await self._call("POST", self._path("explain"), json=explain_body(text, **options))

    async def items(self, uids: Texts) -> list[dict[str, Any]]:
        """As `Client.items`."""
        await self._use_index()
        return (await self._call("POST", self._path("items"), json={"uids": text_list(uids, "uids")}))["items"]

    async def map(self, box: Sequence[float] | None = None, **options: Any) -> dict[str, Any]:
        """As `Client.map`."""
        await self._use_index()
        return await self._call("POST", self._path("map"), json=map_body(box, **options))

    async def fields(self) -> list[dict[str, Any]]:
        """As `Client.fields`."""
        await self._use_index()
        return (await self._call("GET", self._path("fields")))["fields"]

    async def add(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """As `Client.add`."""
        await self._use_index()
        return await self._call("POST", self._path("add"), json=_add_body(items), **_CHANGING)

    async def delete(
        self, uids: Texts = (), *, where: str = "", dry_run: bool = False, expect: int | None = None
    ) -> dict[str, Any]:
        """As `Client.delete`."""
        await self._use_index()
        body = _delete_body(uids, where, dry_run, expect)
        return await self._call("POST", self._path("delete"), json=body, **_CHANGING)
