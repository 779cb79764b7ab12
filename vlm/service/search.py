"""Questions in words and pictures to an index, and their answers."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from vlm.errors import BadSample, UsageError, VlmError
from vlm.index.encoder import Encoder
from vlm.index.read import Hit, Index
from vlm.tensors import Array, Float32

# two opposite unit vectors computed in float32 leave about 1e-7; a mixture this short has no direction
_SHORTEST_MIXTURE = 1e-5


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is looked for: the sum of all texts and pictures, less the `minus` texts.

    images: files, or encoded pictures as bytes. weights: one a term, in the order texts, images, minus; empty
    counts every term once. top: how many answers.
    """

    texts: tuple[str, ...] = ()
    images: tuple[Path | bytes, ...] = ()
    minus: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    top: int = 10

    def signed_weights(self) -> list[float]:
        """The factor of each term in the order texts, images, minus; those of minus terms are negative.

        Raises:
            UsageError: nothing to look for is given, or the weights do not fit the terms.
        """
        num_plus, num_terms = len(self.texts) + len(self.images), self.num_terms
        if not num_plus:
            raise UsageError("A question needs a text or a picture to look for; minus alone is none.")
        if any(not text.strip() for text in (*self.texts, *self.minus)):
            raise UsageError("A text of the question is empty.")
        weights = self.weights or (1.0,) * num_terms
        if len(weights) != num_terms or not all(np.isfinite(weight) and weight > 0 for weight in weights):
            raise UsageError(f"{num_terms} terms need as many weights above 0, given: {list(weights)}.")
        return [weight if number < num_plus else -weight for number, weight in enumerate(weights)]

    @property
    def num_terms(self) -> int:
        """Texts, pictures and minus texts together."""
        return len(self.texts) + len(self.images) + len(self.minus)

    def to_json(self) -> dict[str, Any]:
        """Plain values; a picture given as bytes is told by its size."""
        names = [f"({len(image):,} bytes)" if isinstance(image, bytes) else str(image) for image in self.images]
        return {"texts": list(self.texts), "images": names, "minus": list(self.minus)} | {
            "weights": self.signed_weights(),
            "top": self.top,
        }


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The hits of a question, best first, and how long the embedding of the question and the search took."""

    question: Question
    hits: tuple[Hit, ...]
    embed_milliseconds: float
    search_milliseconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain values for people's scripts: what `vlm search --json` prints."""
        return {
            "question": self.question.to_json(),
            "hits": [{"rank": rank, "score": hit.score} | asdict(hit.entry) for rank, hit in enumerate(self.hits, 1)],
            "embed_milliseconds": round(self.embed_milliseconds, 3),
            "search_milliseconds": round(self.search_milliseconds, 3),
        }


def load_encoder(spec: str) -> Encoder:
    """The model a manifest names."""
    from vlm.models.loading import load_model

    return cast(Encoder, load_model(spec))


@dataclass(kw_only=True)
class SearchService:
    """An open index with the model that asks it; the model is loaded with the first question.

    model_spec: another place of the same model, or empty for the one the index names.
    """

    index: Index
    model_spec: str = ""
    load: Callable[[str], Encoder] = field(default=load_encoder)

    @classmethod
    def open(
        cls, folder: Path, *, model_spec: str = "", load: Callable[[str], Encoder] = load_encoder
    ) -> "SearchService":
        """Open an index folder; raises as `Index.open` does."""
        return cls(index=Index.open(folder), model_spec=model_spec, load=load)

    def close(self) -> None:
        """Release the index."""
        self.index.close()

    @cached_property
    def model(self) -> Encoder:
        """The model, whose space is that of the index.

        Raises:
            UsageError: there is no such model, or its fingerprint is another.
        """
        spec = self.model_spec or self.index.details.space.model
        model = self.load(spec)
        self.index.require_model(model.fingerprint, spec)
        return model

    def answer(self, question: Question) -> Answer:
        """The rows nearest to a question.

        Raises:
            UsageError: the question is empty, its weights do not fit, or its terms cancel each other out.
            VlmError: a picture of the question cannot be read.
        """
        weights = question.signed_weights()
        model = self.model
        started = time.perf_counter()
        query = mix_terms(self._embed_terms(model, question), np.asarray(weights, np.float32))
        embedded = time.perf_counter()
        hits = self.index.search(query[None], question.top)[0]
        searched = time.perf_counter()
        return Answer(
            question=question,
            hits=tuple(hits),
            embed_milliseconds=(embedded - started) * 1000,
            search_milliseconds=(searched - embedded) * 1000,
        )

    def _embed_terms(self, model: Encoder, question: Question) -> Float32[Array, "T D"]:
        """Unit vectors in the order texts, images, minus."""
        words = [*question.texts, *question.minus]
        num_texts, terms = len(question.texts), []
        texts = model.embed_texts(words).numpy() if words else np.zeros((0, model.embedding_size), np.float32)
        terms.append(texts[:num_texts])
        if question.images:
            pixels = np.stack([_view_picture(model, image) for image in question.images])
            terms.append(model.embed_images(torch.from_numpy(pixels)).numpy())
        terms.append(texts[num_texts:])
        return np.concatenate(terms)


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
        return model.view(image if isinstance(image, bytes) else image.read_bytes())
    except OSError as error:
        raise UsageError(f"{name} cannot be read: {error.strerror or error}.") from error
    except BadSample as error:
        raise VlmError(f"{name} cannot be used as a question: {error}.") from error
