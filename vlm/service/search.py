"""Questions in words and pictures to an index, and their answers.

The terms of a question as vectors, and their mixture.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import islice
from math import isnan
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from vlm.data.tokenizers import cut_texts
from vlm.errors import BadSample, UsageError, VlmError
from vlm.index.ann.index_type import CopyToGpu
from vlm.index.catalog import Entry
from vlm.index.encoder import Encoder, absolute_spec
from vlm.index.interop.importer import UNKNOWN
from vlm.index.reader import Hit, Index, IndexSnapshot
from vlm.service.query import Query, load_query_vector
from vlm.service.ranking import Captioner, Ranker, Ranking, Reranker, require_captioner, rows_among
from vlm.tensors import Array, Float32, Int64

# two opposite unit vectors computed in float32 leave about 1e-7; a mixture this short has no direction
_SHORTEST_MIXTURE = 1e-5


def embed_query_images(model: Encoder, images: Sequence[Path | bytes]) -> list[Float32[Array, " D"]]:
    """A unit vector for each picture.

    Raises:
        UsageError: a file cannot be read. VlmError: it is no picture.
    """
    pixels = np.stack([_load_query_image(model, image) for image in images])
    return list(model.embed_images(torch.from_numpy(pixels)).numpy())


def item_vectors(snapshot: IndexSnapshot, uids: Sequence[str]) -> Float32[Array, "N D"]:
    """The stored vector of each item.

    Raises:
        UsageError: there is no such item.
    """
    rows = snapshot.catalogue.rows_by_uid(uids)
    for uid in uids:
        if uid not in rows:
            raise UsageError(f"{snapshot.folder} has no item {uid!r}; take the uid from an answer.")
    return snapshot.vectors(np.array([rows[uid] for uid in uids], np.int64))


def combine_terms(terms: Float32[Array, "T D"], weights: Float32[Array, " T"]) -> Float32[Array, " D"]:
    """The weighted sum of unit vectors, brought to unit length.

    Raises:
        UsageError: the terms cancel each other out.
    """
    mixture = weights @ terms
    length = float(np.linalg.norm(mixture))
    if not length > _SHORTEST_MIXTURE * float(np.abs(weights).sum()):
        raise UsageError("The terms of the question cancel each other out; change the minus terms or the weights.")
    return mixture / np.float32(length)


def _load_query_image(model: Encoder, image: Path | bytes) -> np.ndarray:
    name = "the picture" if isinstance(image, bytes) else str(image)
    try:
        data = image if isinstance(image, bytes) else image.read_bytes()
    except (OSError, ValueError) as error:  # no file has NUL or half a surrogate pair in its name
        reason = error.strerror if isinstance(error, OSError) else "that is no name of a file"
        raise UsageError(f"{name} cannot be read: {reason or error}.") from error
    try:
        return model.view(data)
    except BadSample as error:
        raise VlmError(f"{name} cannot be used as a question: {error}.") from error


@dataclass(frozen=True, kw_only=True)
class RankedHit(Hit):
    """A hit of a question.

    fused: the score that orders the hits of a question with words; None behind the last of these.
    similar: how many worse hits it stands for.
    likelihood: of the question's texts given the picture (`Reranking.order`); None where the hit was not re-ranked.
    """

    fused: float | None = None
    similar: int | None = None
    likelihood: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values; what the question did not ask for is left out."""
        asked = {"fused": self.fused, "similar": self.similar, "likelihood": self.likelihood}
        given = {name: value for name, value in asked.items() if value is not None}
        return {"score": self.score} | given | asdict(self.entry)


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The hits of a question, best first, and how long the embedding of the question and the search took.

    next: the cursor to go on from, empty where there is no more. generation: of the index that answered.
    rerank_milliseconds: None where nothing was re-ranked. unread: uids that kept their place because their pictures
    could not be read, with the reason. cut: texts of the query whose end lies past the model's context.
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

    def to_json(self) -> dict[str, Any]:
        """Plain values for people's scripts: what `vlm search --json` prints."""
        plain = {
            "question": self.query.to_json(),
            "hits": [{"rank": rank} | hit.to_json() for rank, hit in enumerate(self.hits, 1)],
            "next": self.next,
            "generation": self.generation,
            "embed_milliseconds": round(self.embed_milliseconds, 3),
            "search_milliseconds": round(self.search_milliseconds, 3),
        }
        if self.cut:
            plain["cut"] = list(self.cut)
        if self.rerank_milliseconds is None:
            return plain
        return plain | {"rerank_milliseconds": round(self.rerank_milliseconds, 3), "unread": self.unread}


def load_encoder(spec: str) -> Encoder:
    """The model a manifest names."""
    from vlm.models.load import load_model

    return cast(Encoder, load_model(spec))


@dataclass(kw_only=True)
class SearchService:
    """An open index with the model that asks it; the model is loaded with the first question.

    model_spec: another place of the same model, or empty for the one the index names.
    rerank_spec: the model that re-ranks; any with a caption decoder, for it reads pictures, not vectors.
    """

    index: Index
    model_spec: str = ""
    rerank_spec: str = ""
    load: Callable[[str], Encoder] = field(default=load_encoder)

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        model_spec: str = "",
        rerank_spec: str = "",
        load: Callable[[str], Encoder] = load_encoder,
        gpu: CopyToGpu | None = None,
    ) -> "SearchService":
        """Open an index folder; gpu and raises as of `Index.open`."""
        return cls(index=Index.open(folder, gpu=gpu), model_spec=model_spec, rerank_spec=rerank_spec, load=load)

    def close(self) -> None:
        """Release the index."""
        self.index.close()

    @cached_property
    def model(self) -> Encoder:
        """The model, whose space is that of the index.

        Raises:
            UsageError: there is no such model, its fingerprint is another, or the rows came without one.
        """
        if self.index.details.space.fingerprint == UNKNOWN:
            raise UsageError(
                f"{self.index.folder} was imported without its model: ask with stored items (--like UID) or vectors "
                "(--vector FILE.npy), or import again with --model."
            )
        model = self.load(self._spec)
        self.index.require_model(model.fingerprint, self._spec)
        return model

    @cached_property
    def captioner(self) -> Captioner:
        """The model that re-ranks.

        Raises:
            UsageError: none was named, there is no such model, or it has no caption decoder.
        """
        if not self.rerank_spec:
            raise UsageError("The question asks for a re-ranking, but no model for it was named: --rerank MODEL.")
        is_own = absolute_spec(self.rerank_spec) == absolute_spec(self._spec)
        return require_captioner(self.model if is_own else self.load(self.rerank_spec), self.rerank_spec)

    @property
    def _spec(self) -> str:
        return self.model_spec or self.index.details.space.model

    def search(self, query: Query) -> SearchResult:
        """The rows nearest to a question, in the newest generation of the index.

        Raises:
            UsageError: the question is empty, its filter, cursor or weights do not fit, or its terms cancel each other
                out.
            VlmError: a picture of the question cannot be read, or the index has been damaged.
        """
        return self.search_many([query])[0]

    def search_many(self, queries: Sequence[Query], *, names: Sequence[str] = ()) -> list[SearchResult]:
        """The answers to several questions, from one generation; their texts are embedded together.

        names: of the questions; a message about one of them begins with its name.

        Raises: as `answer` does.
        """
        self.index.refresh()
        snapshot = self.index.snapshot
        asked = list(zip(names or [""] * len(queries), queries, strict=True))
        allowed_rows = _resolve_filters(asked, snapshot)
        captioner = self.captioner if any(query.rerank_top for query in queries) else None
        started = time.perf_counter()
        query_vectors = self._embed(asked, snapshot)
        embed_milliseconds = (time.perf_counter() - started) * 1000 / max(1, len(queries))
        results = []
        for (name, query), query_vector in zip(asked, query_vectors, strict=True):
            reranker = None
            if captioner and query.rerank_top:
                reranker = Reranker(captioner, query, snapshot.catalogue)
            started = time.perf_counter()
            with _prefixing_errors(name):
                ranking, after = Ranker(snapshot, query_vector, query, allowed_rows[query.where], reranker).page()
            hits = _hits(ranking, snapshot.catalogue.entries(ranking.rows.tolist()))
            rerank_milliseconds = reranker.milliseconds if reranker else 0.0
            results.append(
                SearchResult(
                    query=query,
                    hits=hits,
                    next=after,
                    generation=snapshot.number,
                    embed_milliseconds=embed_milliseconds,
                    search_milliseconds=(time.perf_counter() - started) * 1000 - rerank_milliseconds,
                    rerank_milliseconds=rerank_milliseconds if reranker else None,
                    unread=reranker.unread if reranker else {},
                    cut=self._cut_texts(query),
                )
            )
        return results

    def _embed(self, asked: Sequence[tuple[str, Query]], snapshot: IndexSnapshot) -> list[Float32[Array, " D"]]:
        """The unit vector of each question; questions about items and vectors alone need no model."""
        words = [text for _, query in asked for text in (*query.texts, *query.minus)]
        model = self._checked_model() if words or any(query.images for _, query in asked) else None
        texts, query_vectors = iter(model.embed_texts(words).numpy() if model and words else ()), []
        for name, query in asked:
            plus = list(islice(texts, len(query.texts)))
            with _prefixing_errors(name):
                images = embed_query_images(model, query.images) if model and query.images else []
                items = item_vectors(snapshot, query.items)
                given = [load_query_vector(vector, self.index.details.space.dimension) for vector in query.vectors]
                terms = np.stack([*plus, *images, *items, *given, *islice(texts, len(query.minus))])
                query_vectors.append(combine_terms(terms, np.asarray(query.signed_weights(), np.float32)))
        return query_vectors

    def _cut_texts(self, query: Query) -> tuple[str, ...]:
        texts = (*query.texts, *query.minus)
        tokenizer = getattr(self.model, "tokenizer", None) if texts else None
        return tuple(cut_texts(tokenizer, texts)) if tokenizer is not None else ()

    def _checked_model(self) -> Encoder:
        """The model, whose space is still that of the index; another may lie there by now."""
        model = self.model
        self.index.require_model(model.fingerprint, self._spec)
        return model


@contextlib.contextmanager
def _prefixing_errors(name: str) -> Iterator[None]:
    """What the block raises begins with the name of the question it is about, if that has one."""
    try:
        yield
    except VlmError as error:
        if not name:
            raise
        kind = UsageError if isinstance(error, UsageError) else VlmError
        raise kind(f"{name}: {error}") from error


def _resolve_filters(
    asked: Sequence[tuple[str, Query]], snapshot: IndexSnapshot
) -> dict[str, Int64[Array, " N"] | None]:
    """The rows that each filter of the questions chooses; every question is checked."""
    allowed_rows = {}
    for name, query in asked:
        with _prefixing_errors(name):
            query.check()
            if query.where not in allowed_rows:
                allowed_rows[query.where] = rows_among(snapshot, query.where)
    return allowed_rows


def _hits(ranking: Ranking, entries: Sequence[Entry]) -> tuple[RankedHit, ...]:
    nothing = [None] * len(ranking)
    columns = (
        ranking.cosines.tolist(),
        nothing if ranking.fused is None else ranking.fused.tolist(),
        nothing if ranking.similar is None else ranking.similar.tolist(),
        nothing if ranking.likelihoods is None else ranking.likelihoods.tolist(),
    )
    return tuple(
        RankedHit(
            score=score,
            entry=entry,
            fused=_unless_nan(fused),
            similar=similar,
            likelihood=_unless_nan(likelihood),
        )
        for entry, score, fused, similar, likelihood in zip(entries, *columns, strict=True)
    )


def _unless_nan(value: float | None) -> float | None:
    return None if value is None or isnan(value) else value
