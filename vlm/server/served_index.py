"""One index as the service serves it, without HTTP: queries in batches, facets, items and images, map, readiness.

Everything here blocks; `app` calls it from threads. Several threads may use one `ServedIndex`: a search sees one
version of the index whole, and a new version that a writer commits is taken up between two searches. A version that
cannot be opened is reported and the one before keeps answering.
"""

import importlib.util
import io
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vlm.data.decode import open_image
from vlm.errors import BadSample, UsageError, VlmError
from vlm.index.catalog import Entry
from vlm.index.embeddings_folder import UNKNOWN
from vlm.index.encoder import AnyEncoder
from vlm.index.facets import FieldSummary, ValueCount
from vlm.index.metadata import metadata_fields
from vlm.index.reader import IndexSnapshot
from vlm.index.row_map import RowMap
from vlm.server.schemas import MAX_WORDS, ExplainRequest, MapRequest, decode_data_url, encode_data_url
from vlm.service.images import read_image_bytes, thumbnail
from vlm.service.query import Query, TextCache, embed_query_texts, load_query_encoder
from vlm.service.ranking import rows_matching
from vlm.service.search import RankedHit, SearchResult, SearchService, embed_query_images
from vlm.tensor_types import Array, Float32

logger = logging.getLogger(__name__)


FACET_CACHE_SIZE = 256
THUMBNAIL_CACHE_BYTES = 64 * 2**20
THUMBNAIL_SIZES = (160, 320, 640)
"""Longer sides of thumbnails in pixels; a request gets the next larger one, so that few sizes are made and cached."""


class ThumbnailCache:
    """Thumbnails by row and size, the least recently used dropped beyond a number of bytes."""

    def __init__(self, max_bytes: int = THUMBNAIL_CACHE_BYTES) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._thumbnails: OrderedDict[tuple[object, ...], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[object, ...], make: Callable[[], bytes]) -> bytes:
        """The thumbnail of this key, made unless it is cached."""
        with self._lock:
            if key in self._thumbnails:
                self._thumbnails.move_to_end(key)
                return self._thumbnails[key]
        # made without the lock, so that one slow image holds up no other; two threads may make the same one
        data = make()
        with self._lock:
            if key not in self._thumbnails:
                self._thumbnails[key] = data
                self._bytes += len(data)
            while self._bytes > self._max_bytes:
                _, dropped = self._thumbnails.popitem(last=False)
                self._bytes -= len(dropped)
        return data


@dataclass(kw_only=True)
class ServedIndex:
    """An open index under a name.

    shows_paths: answers name files and shards. reload_error: why the newest version could not be opened; empty if the
    newest is open.
    """

    name: str
    service: SearchService
    shows_paths: bool = False
    reload_error: str = ""
    thumbnails: ThumbnailCache = field(default_factory=ThumbnailCache)
    _facets: OrderedDict[tuple[object, ...], Any] = field(default_factory=OrderedDict, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    @classmethod
    def open(
        cls,
        name: str,
        folder: Path,
        *,
        model_spec: str = "",
        rerank_spec: str = "",
        shows_paths: bool = False,
        cache_size: int = 10_000,
        load: Callable[[str], AnyEncoder] = load_query_encoder,
    ) -> "ServedIndex":
        """Open an index folder; the model is loaded with the first query that needs it.

        cache_size: texts whose vectors are remembered.

        Raises: as of `SearchService.open`.
        """
        service = SearchService.open(folder, model_spec=model_spec, rerank_spec=rerank_spec, load=load)
        service.text_cache = TextCache(cache_size)
        # here and not in each search, so that a damaged new version is no error of a query
        service.refreshes = False
        return cls(name=name, service=service, shows_paths=shows_paths)

    def close(self) -> None:
        """Release the index."""
        self.service.close()

    @property
    def generation(self) -> int:
        """The version that answers now."""
        return self.service.index.snapshot.number

    def refresh(self) -> None:
        """Take up the newest version; one that cannot be opened is logged once, and the one before goes on."""
        try:
            self.service.index.refresh()
        except (VlmError, OSError) as error:
            if str(error) != self.reload_error:
                logger.warning(
                    f"Index {self.name}: the newest version cannot be opened, the one before serves: {error}"
                )
            self.reload_error = str(error)
        else:
            self.reload_error = ""

    def search_batch(self, queries: Sequence[Query]) -> list[SearchResult | VlmError]:
        """The result of each query, or the error about it; their texts are embedded together."""
        self.refresh()
        try:
            return [*self.service.search_many(queries)]
        except VlmError as error:
            if len(queries) == 1:
                return [error]
        # one of them is wrong: each alone, so that it harms no other
        results: list[SearchResult | VlmError] = []
        for query in queries:
            results += self.search_batch([query])
        return results

    def fields(self) -> list[FieldSummary]:
        """The columns of the metadata."""
        return self._cached(("fields",), lambda: self.service.index.catalogue.field_summaries())

    def facets(self, fields: Sequence[str], *, where: str = "", top: int = 20) -> dict[str, list[ValueCount]]:
        """The most frequent values of columns, with the number of rows that match `where` and have each.

        Raises:
            UsageError: there is no such column, it has too many values to count, or the filter is wrong.
        """
        known = {summary.name: summary for summary in self.fields()}
        counts: dict[str, list[ValueCount]] = {}
        for name in fields:
            if name not in known:
                raise UsageError(f"There is no column {name!r}; the columns are {', '.join(sorted(known))}.")
            if not known[name].is_category:
                raise UsageError(f"Column {name!r} has too many values to count; filter by it instead.")
            counts[name] = self._cached(("facet", name, where, top), lambda name=name: self._count(name, where, top))
        return counts

    def _count(self, name: str, where: str, top: int) -> list[ValueCount]:
        snapshot = self.service.index.snapshot
        return snapshot.catalogue.count_values(name, top=top, rows=rows_matching(snapshot, where))

    def _cached(self, key: tuple[object, ...], compute: Callable[[], Any]) -> Any:
        """A value that holds for one version of the index."""
        versioned = (self.generation, *key)
        with self._lock:
            if versioned in self._facets:
                return self._facets[versioned]
        # counted without the lock, so that other columns need not wait; the later of two writes the same
        value = compute()
        with self._lock:
            self._facets[versioned] = value
            while len(self._facets) > FACET_CACHE_SIZE:
                self._facets.popitem(last=False)
        return value

    def entry(self, uid: str) -> Entry:
        """The row of a uid.

        Raises:
            UnknownItem: there is none.
        """
        entry = self.service.index.catalogue.find(uid)
        if entry is None:
            raise UnknownItem(f"Index {self.name} has no item {uid!r}; use a uid from a search result.")
        return entry

    def entries(self, uids: Sequence[str]) -> list[Entry]:
        """The rows of several uids, in their order.

        Raises:
            UnknownItem: there is none of one of them.
        """
        catalogue = self.service.index.catalogue
        rows = catalogue.rows_by_uid(uids)
        for uid in uids:
            if uid not in rows:
                raise UnknownItem(f"Index {self.name} has no item {uid!r}; use a uid from a search result.")
        return catalogue.entries([rows[uid] for uid in uids])

    def live_entries(self, rows: Sequence[int]) -> list[Entry]:
        """The entries of row numbers, in their order.

        Raises:
            UnknownItem: there is no such row, or it was deleted.
        """
        snapshot = self.service.index.snapshot
        # an answer must not depend on whether a deleted row is still in the file
        known = set(snapshot.live(np.array([row for row in rows if 0 <= row < snapshot.details.next_row], np.int64)))
        for row in rows:
            if row not in known:
                raise UnknownItem(f"Index {self.name} has no row {row:,}; use an id from /knn-service.")
        return snapshot.catalogue.entries(rows)

    def image(self, uid: str) -> bytes:
        """The encoded image of an item, from its shard's byte range.

        Raises:
            UnknownItem: there is no such item, or its image is gone.
        """
        entry = self.entry(uid)
        try:
            return read_image_bytes(entry)
        except VlmError as error:
            raise UnknownItem(
                f"The image of {uid!r} cannot be read: {error}." if self.shows_paths else _GONE
            ) from error

    def thumbnail(self, uid: str, pixels: int) -> bytes:
        """A JPEG whose longer side is at most the smallest of `THUMBNAIL_SIZES` that reaches `pixels`.

        Raises:
            UnknownItem: there is no such item, or its image is gone or damaged.
        """
        # a few sizes, so that a page that scales its tiles freely still hits the cache
        size = next((size for size in THUMBNAIL_SIZES if size >= pixels), THUMBNAIL_SIZES[-1])
        entry = self.entry(uid)

        def make() -> bytes:
            try:
                return thumbnail(self.image(uid), pixels=size)
            except VlmError as error:
                raise UnknownItem(str(error)) from error

        # by where the image lies, not by uid: an upsert under the same uid must not show the old image
        return self.thumbnails.get((entry.shard, entry.image_offset, size), make)

    def entry_to_json(self, entry: Entry) -> dict[str, Any]:
        """An item as answers show it; where it lies only if paths are shown."""
        item: dict[str, Any] = {
            "uid": entry.uid,
            "key": entry.key,
            "captions": entry.captions,
            "metadata": entry.metadata,
        }
        if self.shows_paths:
            item["path"] = entry.path
        return item

    def hit_to_json(self, hit: RankedHit) -> dict[str, Any]:
        """A hit as answers show it, without what the query did not ask for."""
        values: dict[str, Any] = {"score": hit.score}
        for name in ("fused", "similar", "likelihood", "probability"):
            value = getattr(hit, name)
            if value is not None:
                values[name] = value
        return values | self.entry_to_json(hit.entry)

    def result_to_json(self, result: SearchResult) -> dict[str, Any]:
        """A result of a search as answers show it."""
        return {"hits": [self.hit_to_json(hit) for hit in result.hits]} | result.facts_to_json()

    def info(self) -> dict[str, Any]:
        """The newest version that can be opened, in numbers."""
        self.refresh()
        info = self.service.index.info()
        return {
            "name": self.name,
            "rows": info.rows,
            "dimension": info.dimension,
            "modality": info.modality,
            "kind": info.kind,
            "generation": info.generation,
            "model": info.model if self.shows_paths else Path(info.model).name,
            "model_fingerprint": info.model_fingerprint,
            "map_rows": info.map_rows,
            "reload_error": ("The newest version cannot be opened." if self.reload_error else ""),
        }

    def check_ready(self) -> float:
        """Embed a text unless the rows have no model, and search for it; the milliseconds this took.

        Raises:
            VlmError: the index or its model cannot answer.
        """
        started = time.perf_counter()
        self.refresh()
        index = self.service.index
        if not len(index):
            return 0.0
        if index.details.space.fingerprint == UNKNOWN:
            any_vector = (1.0, *(0.0 for _ in range(index.details.space.dimension - 1)))
            query = Query(vectors=(any_vector,), top=1)
        else:
            # past the cache of embeddings, which would answer without the model
            vector = embed_query_texts(self.service.model, [_READY_TEXT])[0]
            query = Query(vectors=(tuple(map(float, vector)),), top=1)
        self.service.search(query)
        return (time.perf_counter() - started) * 1000

    def images_of(self, data_urls: Sequence[str], uids: Sequence[str], max_pixels: int) -> list[bytes]:
        """Encoded images: those given, then those of items.

        Raises:
            UsageError: there is none, or one given is no image or too large. UnknownItem: an item has none.
        """
        images = checked_uploads(list(map(decode_data_url, data_urls)), max_pixels)
        images += [self.image(uid) for uid in uids]
        if not images:
            raise UsageError("Give an image, in `images` or by its uid in `items`.")
        return images

    def classify(
        self, images: Sequence[bytes], classes: Sequence[str], *, templates: Sequence[str], top: int
    ) -> list[dict[str, Any]]:
        """The most probable classes of each image.

        Raises:
            UsageError: a template has no {}, or an image cannot be decoded.
        """
        options = {"templates": templates} if templates else {}
        results = self._model().classify(list(images), list(classes), top=top, **options)
        return [{"classes": result.to_json()["classes"]} for result in results]

    def caption(self, images: Sequence[bytes], options: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Captions for each image. options: of `vlm.DecodingOptions`.

        Raises:
            UsageError: the model has no caption decoder, an option does not fit it, or an image cannot be decoded.
        """
        from vlm.api.inference import DecodingOptions

        results = self._torch_model.caption(list(images), decoding=DecodingOptions(**options))
        return [{"captions": result.to_json()["captions"]} for result in results]

    def _model(self) -> Any:
        # needs more than searches do
        from vlm.api.inference import Model

        return Model(self.service.model)  # pyright: ignore[reportArgumentType]

    def explain(self, image: bytes, request: ExplainRequest) -> dict[str, Any]:
        """Heat maps of an image for a text, and for each of its words if asked for, as images over it.

        Raises:
            UsageError: the tower has no map, the text too many words, or the image cannot be decoded.
        """
        from vlm.api.explanation import explain

        # each word costs as much as the text: the bound on words is one on time
        num_words = len(request.text.split())
        if request.words and num_words > MAX_WORDS:
            raise UsageError(f"The text has {num_words} words; maps are made of {MAX_WORDS} at most: shorten it.")
        explanation = explain(
            self._torch_model,
            image,
            request.text,
            method=request.method,
            against=request.against,
            words=request.words,
        )
        maps: list[dict[str, Any]] = []
        for heat_map in (explanation.whole, *explanation.words):
            overlay = io.BytesIO()
            explanation.overlay(heat_map).save(overlay, "JPEG", quality=85)
            maps.append(heat_map.to_json() | {"overlay": encode_data_url(overlay.getvalue(), "image/jpeg")})
        return {"method": explanation.method, **maps[0], "words": maps[1:]}

    @cached_property
    def _torch_model(self) -> Any:
        """The model with its network: no export has a decoder, nor gradients.

        Raises:
            UsageError: this machine has no torch. Others as of `SearchService.torch_model`.
        """
        if importlib.util.find_spec("torch") is None:
            raise UsageError("Captions and heat maps need torch, which this server has not: pip install torch there.")
        from vlm.api.inference import Model

        return Model(self.service.torch_model)  # pyright: ignore[reportArgumentType]

    def embed_texts(self, texts: Sequence[str]) -> Float32[Array, "T D"]:
        """Unit vectors of texts by the index's model."""
        assert self.service.text_cache is not None
        return self.service.text_cache.embed(self.service.model, texts)

    def embed_images(self, images: Sequence[bytes]) -> Float32[Array, "N D"]:
        """Unit vectors of encoded images by the index's model.

        Raises:
            VlmError: one is not an image.
        """
        return np.stack(embed_query_images(self.service.model, images))

    def cache_counts(self) -> tuple[int, int]:
        """Texts whose vectors were remembered, and texts that were embedded."""
        cache = self.service.text_cache
        return (cache.hits, cache.misses) if cache else (0, 0)


def num_pixels(data: bytes, max_pixels: int) -> int:
    """The pixels of an encoded image, by its header.

    Raises:
        UsageError: it is none, or has more than `max_pixels`.
    """
    try:
        # as stored, not upright: Pillow decodes a PNG whole to look for the EXIF data at its end
        width, height = open_image(data).size
    except BadSample as error:
        raise UsageError(f"The upload is not an image that can be read: {error}.") from error
    if width * height > max_pixels:
        raise UsageError(f"The image has {width:,} × {height:,} pixels; at most {max_pixels:,} in all are accepted.")
    return width * height


def checked_uploads(images: Sequence[bytes], max_pixels: int) -> list[bytes]:
    """The encoded images of one request, each of at most `max_pixels`, together of four times that.

    Raises:
        UsageError: one is none, or they have too many pixels.
    """
    # what decoding takes is known from the headers, before any pixel is in memory
    total = sum(num_pixels(image, max_pixels) for image in images)
    if total > 4 * max_pixels:
        raise UsageError(
            f"The images have {total:,} pixels together; at most {4 * max_pixels:,} are accepted: send fewer at once."
        )
    return list(images)


class UnknownItem(UsageError):
    """There is no such item, or nothing of it is left."""


_READY_TEXT = "is the service ready?"
_GONE = "The image of this item cannot be read: its shard was moved, removed or damaged."


LEGEND_SIZE = 8
"""Values of a column that have a colour of their own."""

NO_VALUE = -1
"""The value of a point whose row has none of the legend's."""

_DECIMALS = 5


@dataclass(kw_only=True)
class MapReader:
    """Answers requests for the map of one index from threads; keeps the places of rows that were added since."""

    index: ServedIndex
    _map: RowMap | None = field(default=None, init=False)
    _snapshot: IndexSnapshot | None = field(default=None, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def answer(self, request: MapRequest) -> dict[str, Any]:
        """The points of a region, the legend of their colours, and the places of the uids asked for.

        Raises:
            UnknownItem: the index has no map. UsageError: the filter or the column is wrong.
            VlmError: the map is damaged.
        """
        self.index.refresh()
        snapshot, row_map = self._open()
        legend: list[ValueCount] = []
        if request.colour:
            # refused before the rows are read
            counts = self.index.facets([request.colour], where=request.where, top=LEGEND_SIZE)
            legend = counts[request.colour]
        positions, num_inside = row_map.sample(request.box, request.top, rows_matching(snapshot, request.where))
        entries = snapshot.catalogue.entries(row_map.rows[positions].tolist())
        places = _rounded(row_map.places[positions])
        known = snapshot.catalogue.rows_by_uid(request.uids)
        return {
            "generation": snapshot.number,
            "rows": len(row_map),
            "new": row_map.num_new,
            "unplaced": row_map.num_unplaced,
            "inside": num_inside,
            "bounds": _bounds(row_map.places),
            "points": {
                "uids": [entry.uid for entry in entries],
                "x": [x for x, _ in places],
                "y": [y for _, y in places],
                "values": [_number_in_legend(entry, request.colour, legend) for entry in entries],
            },
            "legend": [{"value": count.value, "rows": count.rows} for count in legend],
            "places": _places_of(row_map, known),
        }

    def _open(self) -> tuple[IndexSnapshot, RowMap]:
        # one thread places new rows, the others wait for them
        with self._lock:
            snapshot = self.index.service.index.snapshot
            if snapshot.details.map is None:
                name = self.index.name
                raise UnknownItem(f"Index {name} has no map; make one with vlm index map, and reload the page.")
            # the map before is handed over: places that it computed for added rows are kept
            if self._map is None or self._snapshot is not snapshot:
                try:
                    self._map = RowMap.open(snapshot, self._map)
                except (VlmError, OSError) as error:
                    message = f"The map of index {self.index.name} cannot be read; make it again with vlm index map."
                    raise VlmError(message) from error
                self._snapshot = snapshot
            return snapshot, self._map


def _bounds(places: Float32[Array, "N 2"]) -> list[float]:
    if not len(places):
        return [-1.0, -1.0, 1.0, 1.0]
    low, high = _rounded(np.stack([places.min(axis=0), places.max(axis=0)]))
    return [*low, *high]


def _places_of(row_map: RowMap, known: dict[str, int]) -> dict[str, list[float]]:
    places: dict[str, list[float]] = {}
    for uid, row in known.items():
        for place in _rounded(row_map.places[row_map.positions_of(np.array([row], np.int64))]):
            places[uid] = place
    return places


def _rounded(places: Float32[Array, "N 2"]) -> list[list[float]]:
    # in double precision, or the digits after the last one would come back
    return np.round(places.astype(np.float64), _DECIMALS).tolist()


def _number_in_legend(entry: Entry, column: str, legend: Sequence[ValueCount]) -> int:
    if not legend:
        return NO_VALUE
    values = {value for name, value in metadata_fields(entry) if name == column}
    return next((number for number, count in enumerate(legend) if count.value in values), NO_VALUE)
