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

from vlm.errors import BadSample, UsageError, VlmError
from vlm.index.ann.index_type import Copy
from vlm.index.catalog import Entry
from vlm.index.encoder import Encoder, absolute_spec
from vlm.index.interop.importer import UNKNOWN
from vlm.index.reader import Generation, Hit, Index
from vlm.service.query import Question, unit_vector
from vlm.service.ranking import Captioner, Ranker, Ranking, Reranking, as_captioner, rows_among
from vlm.tensors import Array, Float32, Int64

# two opposite unit vectors computed in float32 leave about 1e-7; a mixture this short has no direction
_SHORTEST_MIXTURE = 1e-5


def embed_pictures(model: Encoder, images: Sequence[Path | bytes]) -> list[Float32[Array, " D"]]:
    """A unit vector for each picture.

    Raises:
        UsageError: a file cannot be read. VlmError: it is no picture.
    """
    pixels = np.stack([_view_picture(model, image) for image in images])
    return list(model.embed_images(torch.from_numpy(pixels)).numpy())


def item_vectors(generation: Generation, uids: Sequence[str]) -> Float32[Array, "N D"]:
    """The stored vector of each item.

    Raises:
        UsageError: there is no such item.
    """
    rows = generation.catalogue.rows_of(uids)
    for uid in uids:
        if uid not in rows:
            raise UsageError(f"{generation.folder} has no item {uid!r}; take the uid from an answer.")
    return generation.vectors(np.array([rows[uid] for uid in uids], np.int64))


def mix_terms(terms: Float32[Array, "T D"], weights: Float32[Array, " T"]) -> Float32[Array, " D"]:
    """The weighted sum of unit vectors, brought to unit length.

    Raises:
        UsageError: the terms cancel each other out.
    """
    mixture = weights @ terms
    length = float(np.linalg.norm(mixture))
    if not length > _SHORTEST_MIXTURE * float(np.abs(weights).sum()):
        raise UsageError("The terms of the question cancel each other out; change the minus terms or the weights.")
    return mixture / np.float32(length)


def _view_picture(model: Encoder, image: Path | bytes) -> np.ndarray:
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
class Found(Hit):
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
class Answer:
    """The hits of a question, best first, and how long the embedding of the question and the search took.

    next: the cursor to go on from, empty where there is no more. generation: of the index that answered.
    rerank_milliseconds: None where nothing was re-ranked. unread: uids that kept their place because their pictures
    could not be read, with the reason.
    """

    question: Question
    hits: tuple[Found, ...]
    next: str
    generation: int
    embed_milliseconds: float
    search_milliseconds: float
    rerank_milliseconds: float | None = None
    unread: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values for people's scripts: what `vlm search --json` prints."""
        plain = {
            "question": self.question.to_json(),
            "hits": [{"rank": rank} | hit.to_json() for rank, hit in enumerate(self.hits, 1)],
            "next": self.next,
            "generation": self.generation,
            "embed_milliseconds": round(self.embed_milliseconds, 3),
            "search_milliseconds": round(self.search_milliseconds, 3),
        }
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
        gpu: Copy | None = None,
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
        return as_captioner(self.model if is_own else self.load(self.rerank_spec), self.rerank_spec)

    @property
    def _spec(self) -> str:
        return self.model_spec or self.index.details.space.model

    def answer(self, question: Question) -> Answer:
        """The rows nearest to a question, in the newest generation of the index.

        Raises:
            UsageError: the question is empty, its filter, cursor or weights do not fit, or its terms cancel each other
                out.
            VlmError: a picture of the question cannot be read, or the index has been damaged.
        """
        return self.answer_all([question])[0]

    def answer_all(self, questions: Sequence[Question], *, names: Sequence[str] = ()) -> list[Answer]:
        """The answers to several questions, from one generation; their texts are embedded together.

        names: of the questions; a message about one of them begins with its name.

        Raises: as `answer` does.
        """
        self.index.refresh()
        generation = self.index.generation
        asked = list(zip(names or [""] * len(questions), questions, strict=True))
        among = _narrowed(asked, generation)
        captioner = self.captioner if any(question.rerank_top for question in questions) else None
        started = time.perf_counter()
        queries = self._embed(asked, generation)
        embed_milliseconds = (time.perf_counter() - started) * 1000 / max(1, len(questions))
        answers = []
        for (name, question), query in zip(asked, queries, strict=True):
            reranking = None
            if captioner and question.rerank_top:
                reranking = Reranking(captioner, question, generation.catalogue)
            started = time.perf_counter()
            with _naming(name):
                ranking, after = Ranker(generation, query, question, among[question.where], reranking).page()
            hits = _found(ranking, generation.catalogue.entries(ranking.rows.tolist()))
            rerank_milliseconds = reranking.milliseconds if reranking else 0.0
            answers.append(
                Answer(
                    question=question,
                    hits=hits,
                    next=after,
                    generation=generation.number,
                    embed_milliseconds=embed_milliseconds,
                    search_milliseconds=(time.perf_counter() - started) * 1000 - rerank_milliseconds,
                    rerank_milliseconds=rerank_milliseconds if reranking else None,
                    unread=reranking.unread if reranking else {},
                )
            )
        return answers

    def _embed(self, asked: Sequence[tuple[str, Question]], generation: Generation) -> list[Float32[Array, " D"]]:
        """The unit vector of each question; questions about items and vectors alone need no model."""
        words = [text for _, question in asked for text in (*question.texts, *question.minus)]
        model = self._checked_model() if words or any(question.images for _, question in asked) else None
        texts, queries = iter(model.embed_texts(words).numpy() if model and words else ()), []
        for name, question in asked:
            plus = list(islice(texts, len(question.texts)))
            with _naming(name):
                pictures = embed_pictures(model, question.images) if model and question.images else []
                items = item_vectors(generation, question.items)
                given = [unit_vector(vector, self.index.details.space.dimension) for vector in question.vectors]
                terms = np.stack([*plus, *pictures, *items, *given, *islice(texts, len(question.minus))])
                queries.append(mix_terms(terms, np.asarray(question.signed_weights(), np.float32)))
        return queries

    def _checked_model(self) -> Encoder:
        """The model, whose space is still that of the index; another may lie there by now."""
        model = self.model
        self.index.require_model(model.fingerprint, self._spec)
        return model


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """What the block raises begins with the name of the question it is about, if that has one."""
    try:
        yield
    except VlmError as error:
        if not name:
            raise
        kind = UsageError if isinstance(error, UsageError) else VlmError
        raise kind(f"{name}: {error}") from error


def _narrowed(asked: Sequence[tuple[str, Question]], generation: Generation) -> dict[str, Int64[Array, " N"] | None]:
    """The rows that each filter of the questions chooses; every question is checked."""
    among = {}
    for name, question in asked:
        with _naming(name):
            question.check()
            if question.where not in among:
                among[question.where] = rows_among(generation, question.where)
    return among


def _found(ranking: Ranking, entries: Sequence[Entry]) -> tuple[Found, ...]:
    nothing = [None] * len(ranking)
    columns = (
        ranking.cosines.tolist(),
        nothing if ranking.fused is None else ranking.fused.tolist(),
        nothing if ranking.similar is None else ranking.similar.tolist(),
        nothing if ranking.likelihoods is None else ranking.likelihoods.tolist(),
    )
    return tuple(
        Found(
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
