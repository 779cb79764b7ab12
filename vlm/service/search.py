"""Search an index: queries of texts, images, stored items and vectors to ranked hits.

A query is a weighted sum of unit vectors, one a term; `SearchService.search_many` embeds the terms of all queries
together and ranks each query (`vlm.service.ranking`).
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm.data.samples import Captions
from vlm.data.tokenizers import cut_texts
from vlm.errors import BadSample, UsageError, VlmError
from vlm.index.ann.faiss_search import CopyToGpu
from vlm.index.embeddings_folder import UNKNOWN
from vlm.index.encoder import AnyEncoder, Encoder
from vlm.index.engine_base import EngineIndex, EngineSnapshot, Entry, Hit, RowSelection, open_engine_index
from vlm.model_spec import absolute_spec
from vlm.models.onnx_encoder import OnnxEncoder
from vlm.service.query import (
    Query,
    TextCache,
    embed_pixels,
    embed_query_texts,
    load_bulk_encoder,
    load_encoder,
    load_query_encoder,
    load_query_vector,
)
from vlm.service.ranking import NUM_CANDIDATES, Ranker, Ranking, rows_matching
from vlm.service.relevance import Calibrator, NullScores, Relevance, find_best, null_kind
from vlm.tensor_types import Array, Float32

# imported where it is used: it needs torch, which most searches do without
if TYPE_CHECKING:
    import PIL.Image

    import vlm.models.model
    import vlm.models.poly_encoder
    import vlm.service.reranking

logger = logging.getLogger(__name__)

LoadEncoder = Callable[[str], AnyEncoder]

# two opposite unit vectors computed in float32 leave about 1e-7; a sum this short has no direction
_MIN_SUM_LENGTH = 1e-5
# a model that takes longer to load is worth a line in the log
_LOAD_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class RankedHit(Hit):
    """A hit of a query.

    fused: the score of rank fusion that orders the hits of a query with words; None for those ordered by cosine.
    similar: how many worse hits it stands for.
    likelihood: of the query's texts given the image, or a poly-encoder's score of both (`Reranker.order`); None if it
    was not reranked.
    probability: that an unrelated query has no row as near (`vlm.service.relevance`); None if it was not asked for.
    """

    fused: float | None = None
    similar: int | None = None
    likelihood: float | None = None
    probability: float | None = None

    @property
    def uid(self) -> str:
        """The row's uid."""
        return self.entry.uid

    @property
    def path(self) -> str:
        """Where its image lies: a file, or `SHARD/KEY` for a member of a shard; empty for a row without an image."""
        return self.entry.path

    @property
    def captions(self) -> Captions:
        """All its captions, by language."""
        return self.entry.captions

    @property
    def caption(self) -> str:
        """Its first caption; empty if it has none."""
        return next((texts[0] for texts in self.entry.captions.values() if texts), "")

    @property
    def metadata(self) -> dict[str, Any]:
        """Its metadata."""
        return self.entry.metadata

    def image(self) -> "PIL.Image.Image":
        """Its image, upright and in RGB.

        Raises:
            VlmError: the file or shard is gone or unreadable, or the row was imported without an image.
        """
        # needs Pillow and fsspec, which a search does without
        from vlm.service.images import read_rgb_image

        return read_rgb_image(self.entry)

    def to_json(self) -> dict[str, Any]:
        """Plain values; without those that the query did not ask for."""
        optional = {
            "fused": self.fused,
            "similar": self.similar,
            "likelihood": self.likelihood,
            "probability": self.probability,
        }
        present = {name: value for name, value in optional.items() if value is not None}
        # not asdict, whose deep copies took two thirds of the time of a request to the service
        return {"score": self.score} | present | vars(self.entry) | {"path": self.path}


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The hits of a query, best first, and how long embedding the query and searching took.

    next: the cursor of the next page, empty at the end. generation: version of the index that was searched.
    rerank_milliseconds: None without reranking. unread: uids that were not reranked because their images cannot be
    read, with the reason. cut: texts of the query that are longer than the model's context.
    hint: why its filter matches no row, or that nothing is likely relevant; empty otherwise.
    relevance: the cut, if the query asks for what is relevant.
    """

    query: Query
    hits: tuple[RankedHit, ...]
    next: str
    generation: int
    embed_milliseconds: float
    search_milliseconds: float
    rerank_milliseconds: float | None = None
    unread: dict[str, str] = field(default_factory=dict)
    cut: tuple[str, ...] = ()
    hint: str = ""
    relevance: Relevance | None = None

    def __iter__(self) -> Iterator[RankedHit]:
        return iter(self.hits)

    def __len__(self) -> int:
        return len(self.hits)

    def __getitem__(self, rank: int) -> RankedHit:
        return self.hits[rank]

    def to_json(self) -> dict[str, Any]:
        """Plain values: what `vlm search --json` prints."""
        hits: list[dict[str, Any]] = []
        for rank, hit in enumerate(self.hits, 1):
            hits.append({"rank": rank} | hit.to_json())
        plain = {"question": self.query.to_json(), "hits": hits} | self.facts_to_json()
        if self.rerank_milliseconds is None:
            return plain
        return plain | {"rerank_milliseconds": round(self.rerank_milliseconds, 3), "unread": self.unread}

    def facts_to_json(self) -> dict[str, Any]:
        """What is said of the hits as a whole: the next page, the version, the times, what was cut, the hint."""
        facts: dict[str, Any] = {
            "next": self.next,
            "generation": self.generation,
            "embed_milliseconds": round(self.embed_milliseconds, 3),
            "search_milliseconds": round(self.search_milliseconds, 3),
        }
        if self.cut:
            facts["cut"] = list(self.cut)
        if self.hint:
            facts["hint"] = self.hint
        if self.relevance is not None:
            facts["relevance"] = self.relevance.to_json()
        return facts


@dataclass(kw_only=True)
class SearchService:
    """An open index with the model that embeds its queries; the model is loaded with the first query.

    model_spec: new location of the same model, or empty for the one the index names.
    rerank_spec: what reranks: a folder of `vlm index fit-reranker`, which reads the rows' vectors, or a model with a
    caption decoder, any, since it reads images.
    num_candidates: as of `Ranker`. refreshes: whether each search looks for a newer version of the index first.
    text_cache: remembers the vectors of texts, for a service that is asked the same again.
    optional_fields: filters may name them although no row has them.
    """

    index: EngineIndex
    model_spec: str = ""
    rerank_spec: str = ""
    load: LoadEncoder = field(default=load_query_encoder)
    num_candidates: int = NUM_CANDIDATES
    refreshes: bool = True
    text_cache: TextCache | None = None
    optional_fields: frozenset[str] = frozenset()
    _model: AnyEncoder | None = field(default=None, init=False, repr=False)
    _text_encoder: "tuple[str, vlm.models.model.VisionLanguageModel] | None" = field(
        default=None, init=False, repr=False
    )

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        model_spec: str = "",
        rerank_spec: str = "",
        load: LoadEncoder = load_query_encoder,
        gpu: CopyToGpu | None = None,
    ) -> "SearchService":
        """Open an index folder; gpu and raises as of `open_engine_index`."""
        return cls(index=open_engine_index(folder, gpu=gpu), model_spec=model_spec, rerank_spec=rerank_spec, load=load)

    def close(self) -> None:
        """Release the index."""
        self.index.close()

    @property
    def model(self) -> AnyEncoder:
        """The model, whose embedding space is that of the index.

        Raises:
            UsageError: there is no such model, its fingerprint differs, or the rows were imported without one.
        """
        if self.index.details.space.fingerprint == UNKNOWN:
            raise UsageError(
                f"{self.index.folder} was imported without its model: search by stored items (--like UID) or vectors "
                "(--vector FILE.npy), or import again with --model."
            )
        model = self._model or self.load(self._spec)
        # checked each time: an index of another model may have taken this one's place
        self.index.require_model(model.fingerprint, self._spec)
        self._model = model
        return model

    @property
    def row_encoder(self) -> AnyEncoder:
        """The model for rows to add: where queries use its ONNX export, what embeds many rows (`load_bulk_encoder`).

        Raises: as of `model`.
        """
        model = self.model
        if not isinstance(model, OnnxEncoder):
            return model
        encoder = load_bulk_encoder(self._spec, device="auto", precision="fp32", backend="auto", needs_network=False)
        self.index.require_model(encoder.fingerprint, self._spec)
        return encoder

    @property
    def torch_model(self) -> Encoder:
        """The model with its network, where queries use its ONNX export, too.

        Raises: as of `model`.
        """
        model = self.model
        return load_encoder(self._spec) if isinstance(model, OnnxEncoder) else model

    @property
    def text_encoder(self) -> "vlm.models.model.VisionLanguageModel":
        """Torch's own model, whose text tower a poly-encoder looks into; loaded once where queries use an export.

        Raises: as of `model`; UsageError: its text tower cannot be looked into.
        """
        from vlm.service.reranking import require_text_tower

        model = self.model
        if self._text_encoder is None or self._text_encoder[0] != model.fingerprint:
            self._text_encoder = model.fingerprint, require_text_tower(self.torch_model)
        return self._text_encoder[1]

    @cached_property
    def poly_encoder(self) -> "vlm.models.poly_encoder.FittedPolyEncoder | None":
        """The poly-encoder that reranks; None where a captioner does, or nothing."""
        from vlm.models.poly_encoder import is_reranker_folder, read_poly_encoder

        folder = Path(self.rerank_spec)
        return read_poly_encoder(folder) if self.rerank_spec and is_reranker_folder(folder) else None

    @cached_property
    def captioner(self) -> "vlm.service.reranking.Captioner":
        """The model that reranks.

        Raises:
            UsageError: none was named, there is no such model, or it has no caption decoder.
        """
        from vlm.service.reranking import require_captioner

        if not self.rerank_spec:
            raise UsageError("The query asks for reranking, but no model for it was named: --rerank MODEL.")
        is_own = absolute_spec(self.rerank_spec) == absolute_spec(self._spec)
        model = self.model if is_own else self.load(self.rerank_spec)
        # no export has a decoder
        if isinstance(model, OnnxEncoder):
            model = load_encoder(self.rerank_spec)
        return require_captioner(model, self.rerank_spec)

    @property
    def _spec(self) -> str:
        return self.model_spec or self.index.details.space.model

    def search(self, query: Query) -> SearchResult:
        """The rows nearest to a query, in the newest snapshot of the index.

        Raises:
            UsageError: the query is empty, its filter, cursor or weights do not fit, or its terms cancel out.
            VlmError: an image of the query cannot be read, or the index is damaged.
        """
        return self.search_many([query])[0]

    def search_many(self, queries: Sequence[Query], *, names: Sequence[str] = ()) -> list[SearchResult]:
        """The results of several queries, from one snapshot; their texts are embedded together.

        names: of the queries; an error about one of them begins with its name.

        Raises: as of `search`.
        """
        # all queries see one snapshot, whatever a writer commits meanwhile
        if self.refreshes:
            self.index.refresh()
        snapshot = self.index.snapshot
        named_queries = list(zip(names or [""] * len(queries), queries, strict=True))
        allowed_rows = _resolve_filters(named_queries, snapshot, self.optional_fields)
        rerankers = self._rerankers(queries, snapshot)
        # loading models is no part of the time that embedding takes
        model = self._ready_model(queries)
        null_scores: list[NullScores | None] = []
        for name, query in named_queries:
            with _prefixing_errors(name):
                null_scores.append(self._null_scores(query, snapshot))
        started = time.perf_counter()
        query_vectors = self._embed(model, named_queries, snapshot)
        embed_milliseconds = (time.perf_counter() - started) * 1000 / max(1, len(queries))
        results: list[SearchResult] = []
        for (name, query), query_vector, reranker, null in zip(
            named_queries, query_vectors, rerankers, null_scores, strict=True
        ):
            ranker = Ranker(
                snapshot=snapshot,
                query_vector=query_vector,
                query=query,
                allowed_rows=allowed_rows[query.where],
                reranker=reranker,
                num_candidates=self.num_candidates,
                min_cosine=null.min_cosine(query.relevant) if null and query.relevant else None,
            )
            with _prefixing_errors(name):
                results.append(self._rank(ranker, reranker, null, embed_milliseconds))
        return results

    def _ready_model(self, queries: Sequence[Query]) -> AnyEncoder | None:
        """The model with all that embeds the queries in memory; None if they need none."""
        has_texts = any(query.texts or query.minus for query in queries)
        has_images = any(query.images for query in queries)
        if not (has_texts or has_images):
            return None
        started = time.perf_counter()
        model = self.model
        if isinstance(model, OnnxEncoder):
            model.open_towers(texts=has_texts, images=has_images)
        seconds = time.perf_counter() - started
        if seconds > _LOAD_SECONDS:
            logger.info(f"The model {self._spec} was loaded in {seconds:.1f} s")
        return model

    def _rerankers(
        self, queries: Sequence[Query], snapshot: EngineSnapshot
    ) -> "list[vlm.service.reranking.TimedReranker | None]":
        """For each query what reranks its results, if it asks for that."""
        if not any(query.rerank_top for query in queries):
            return [None] * len(queries)
        return [self._reranker(query, snapshot) if query.rerank_top else None for query in queries]

    def _reranker(self, query: Query, snapshot: EngineSnapshot) -> "vlm.service.reranking.TimedReranker":
        from vlm.service.reranking import LikelihoodReranker, PolyEncoderReranker

        if self.poly_encoder is None:
            return LikelihoodReranker(self.captioner, query, snapshot.catalogue)
        # torch's own model: an export gives no states of tokens
        return PolyEncoderReranker(self.poly_encoder, self.text_encoder, query, snapshot)

    def _embed(
        self, model: AnyEncoder | None, named_queries: Sequence[tuple[str, Query]], snapshot: EngineSnapshot
    ) -> list[Float32[Array, " D"]]:
        """The unit vector of each query; queries of items and vectors alone need no model."""
        all_texts: list[str] = []
        for _, query in named_queries:
            all_texts += [*query.texts, *query.minus]
        # one batch for all queries, taken apart below: of each in turn the plus texts, then the minus texts
        text_vectors = iter(self._embed_texts(model, all_texts) if model and all_texts else ())
        query_vectors: list[Float32[Array, " D"]] = []
        for name, query in named_queries:
            with _prefixing_errors(name):
                plus = list(islice(text_vectors, len(query.texts)))
                images = embed_query_images(model, query.images) if model and query.images else []
                items = item_vectors(snapshot, query.items)
                dimension = self.index.details.space.dimension
                vectors = [load_query_vector(vector, dimension) for vector in query.vectors]
                minus = list(islice(text_vectors, len(query.minus)))
                terms = np.stack([*plus, *images, *items, *vectors, *minus])
                query_vectors.append(combine_terms(terms, np.asarray(query.signed_weights(), np.float32)))
        return query_vectors

    def _embed_texts(self, model: AnyEncoder, texts: Sequence[str]) -> Float32[Array, "T D"]:
        return self.text_cache.embed(model, texts) if self.text_cache else embed_query_texts(model, texts)

    def _rank(
        self,
        ranker: Ranker,
        reranker: "vlm.service.reranking.TimedReranker | None",
        null_scores: NullScores | None,
        embed_milliseconds: float,
    ) -> SearchResult:
        started = time.perf_counter()
        ranking, next_cursor = ranker.page()
        hits = _ranked_hits(ranking, ranker.snapshot.catalogue.entries(ranking.rows.tolist()), null_scores)
        relevance = _relevance(ranker, null_scores, has_hits=bool(hits)) if null_scores else None
        milliseconds = (time.perf_counter() - started) * 1000
        return SearchResult(
            query=ranker.query,
            hits=hits,
            next=next_cursor,
            generation=ranker.snapshot.number,
            embed_milliseconds=embed_milliseconds,
            search_milliseconds=milliseconds - (reranker.milliseconds if reranker else 0.0),
            rerank_milliseconds=reranker.milliseconds if reranker else None,
            unread=reranker.unread if reranker else {},
            cut=self._cut_texts(ranker.query),
            hint=_explain_filter(ranker, hits, self.optional_fields) or (relevance.explain() if relevance else ""),
            relevance=relevance,
        )

    @cached_property
    def _calibrator(self) -> Calibrator:
        return Calibrator()

    def _null_scores(self, query: Query, snapshot: EngineSnapshot) -> NullScores | None:
        """What the query's cosines are measured against, if it asks for what is relevant."""
        if query.relevant is None:
            return None
        kind = null_kind(query, snapshot)
        return self._calibrator.null_scores(snapshot, kind, lambda texts: embed_query_texts(self.model, texts))

    def _cut_texts(self, query: Query) -> tuple[str, ...]:
        texts = (*query.texts, *query.minus)
        tokenizer = getattr(self.model, "tokenizer", None) if texts else None
        return tuple(cut_texts(tokenizer, texts)) if tokenizer is not None else ()


@contextlib.contextmanager
def _prefixing_errors(name: str) -> Iterator[None]:
    """Errors of the block begin with the name of the query they are about, if it has one."""
    try:
        yield
    except VlmError as error:
        if not name:
            raise
        kind = UsageError if isinstance(error, UsageError) else VlmError
        raise kind(f"{name}: {error}") from error


def _resolve_filters(
    named_queries: Sequence[tuple[str, Query]], snapshot: EngineSnapshot, optional_fields: frozenset[str]
) -> dict[str, RowSelection | None]:
    """The rows that match each filter of the queries, by filter; every query is checked."""
    allowed_rows = {}
    for name, query in named_queries:
        with _prefixing_errors(name):
            query.check()
            # queries of one file mostly share their filter, which may scan every row of the catalogue
            if query.where not in allowed_rows:
                allowed_rows[query.where] = rows_matching(snapshot, query.where, optional_fields=optional_fields)
    return allowed_rows


def embed_query_images(model: AnyEncoder, images: Sequence[Path | bytes]) -> list[Float32[Array, " D"]]:
    """A unit vector for each image.

    Raises:
        UsageError: a file cannot be read. VlmError: it is not an image.
    """
    return list(embed_pixels(model, np.stack([_load_query_image(model, image) for image in images])))


def _load_query_image(model: AnyEncoder, image: Path | bytes) -> np.ndarray:
    name = "the image" if isinstance(image, bytes) else str(image)
    try:
        data = image if isinstance(image, bytes) else image.read_bytes()
    except (OSError, ValueError) as error:  # no file has NUL or half a surrogate pair in its name
        reason = error.strerror if isinstance(error, OSError) else "that is not a valid file name"
        raise UsageError(f"{name} cannot be read: {reason or error}.") from error
    try:
        return model.view(data)
    except BadSample as error:
        raise VlmError(f"{name} cannot be used as a query: {error}.") from error


def item_vectors(snapshot: EngineSnapshot, uids: Sequence[str]) -> Float32[Array, "N D"]:
    """The stored vector of each item.

    Raises:
        UsageError: there is no such item.
    """
    if not uids:
        return np.zeros((0, snapshot.details.space.dimension), np.float32)
    rows = snapshot.catalogue.rows_by_uid(uids)
    for uid in uids:
        if uid not in rows:
            raise UsageError(f"{snapshot.folder} has no item {uid!r}; use a uid from a search result.")
    return snapshot.vectors(np.array([rows[uid] for uid in uids], np.int64))


def combine_terms(terms: Float32[Array, "T D"], weights: Float32[Array, " T"]) -> Float32[Array, " D"]:
    """The weighted sum of unit vectors, scaled to unit length.

    Raises:
        UsageError: the terms cancel out.
    """
    total = weights @ terms
    length = float(np.linalg.norm(total))
    # "not greater" instead of "less or equal", so that NaN is refused as well
    if not length > _MIN_SUM_LENGTH * float(np.abs(weights).sum()):
        raise UsageError("The terms of the query cancel out; change the minus terms or the weights.")
    return total / np.float32(length)


def _explain_filter(ranker: Ranker, hits: Sequence[RankedHit], optional_fields: frozenset[str]) -> str:
    # hits first: a server counts the rows of a filter only if asked
    if hits or ranker.allowed_rows is None or len(ranker.allowed_rows):
        return ""
    from vlm.index.filter_hints import explain_no_match

    return explain_no_match(ranker.snapshot.catalogue, ranker.query.where, optional_fields=optional_fields)


def _relevance(ranker: Ranker, null_scores: NullScores, *, has_hits: bool) -> Relevance:
    assert ranker.query.relevant is not None
    assert ranker.min_cosine is not None
    relevance = Relevance(
        kind=null_kind(ranker.query, ranker.snapshot),
        min_probability=ranker.query.relevant,
        min_cosine=ranker.min_cosine,
    )
    if has_hits or ranker.query.after:
        return relevance
    best = find_best(ranker.snapshot, ranker.query_vector, ranker.allowed_rows, null_scores)
    # there may be relevant rows that another option left out
    return relevance if best is None or best >= relevance.min_probability else replace(relevance, best=best)


def _ranked_hits(ranking: Ranking, entries: Sequence[Entry], null_scores: NullScores | None) -> tuple[RankedHit, ...]:
    none = [None] * len(ranking)
    # plain Python numbers and None: JSON has neither NumPy's types nor NaN
    columns = zip(
        entries,
        ranking.cosines.tolist(),
        none if ranking.fused is None else ranking.fused.tolist(),
        none if ranking.similar is None else ranking.similar.tolist(),
        none if ranking.likelihoods is None else ranking.likelihoods.tolist(),
        strict=True,
    )
    hits: list[RankedHit] = []
    for entry, score, fused, similar, likelihood in columns:
        hits.append(
            RankedHit(
                score=score,
                entry=entry,
                fused=_none_if_nan(fused),
                similar=similar,
                likelihood=_none_if_nan(likelihood),
                probability=null_scores.probability(score) if null_scores else None,
            )
        )
    return tuple(hits)


def _none_if_nan(value: float | None) -> float | None:
    return None if value is None or isnan(value) else value
