"""Reranking of results: by how likely a captioner finds the query's texts given their images, or by a poly-encoder."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from typing_extensions import override

from vlm.data.transforms import EvalTransform
from vlm.errors import BadSample, UsageError, VlmError
from vlm.index.engine_base import EngineCatalogue, EngineSnapshot, Entry
from vlm.models.model import VisionLanguageModel
from vlm.models.poly_encoder import FittedPolyEncoder, token_states
from vlm.service.images import read_image_bytes
from vlm.service.query import Query
from vlm.service.ranking import Reranker
from vlm.tensor_types import Array, Float32, Int64, Tensor, UInt8

_IMAGES_AT_ONCE = 64
# reading waits for disk or network, and decoding releases Python's lock, so threads suffice
_READERS = 8


@runtime_checkable
class Captioner(Protocol):
    """A model that gives the likelihood of a text, given an image."""

    @property
    def view(self) -> EvalTransform:
        """From an encoded image to the pixels the model sees."""
        ...

    @property
    def fingerprint(self) -> str:
        """Models with the same fingerprint give the same likelihoods."""
        ...

    @property
    def can_caption(self) -> bool:
        """Whether it has a caption decoder."""
        ...

    def text_log_likelihoods(self, images: UInt8[Tensor, "B 3 H W"], texts: Sequence[str]) -> Float32[Tensor, "B T"]:
        """Mean log-likelihood of each text's tokens given each image, in nats."""
        ...


def require_captioner(model: object, spec: str) -> Captioner:
    """The model, if it can rerank.

    Raises:
        UsageError: it has no caption decoder.
    """
    if isinstance(model, Captioner) and model.can_caption:
        return model
    raise UsageError(f"{spec} has no caption decoder to rerank with; train one, e.g. vlm train tiny-coca.")


@runtime_checkable
class TimedReranker(Reranker, Protocol):
    """A reranker that says how long it took, in milliseconds, and which images it could not read, and why, by uid."""

    unread: dict[str, str]
    milliseconds: float


def require_text_tower(model: object) -> VisionLanguageModel:
    """The model, if its text tower can be looked into.

    Raises:
        UsageError: it is not one of torch's.
    """
    if isinstance(model, VisionLanguageModel):
        return model
    raise UsageError("A poly-encoder needs the index's model itself, and this one is not loaded by torch.")


def text_weights(query: Query) -> Float32[Tensor, " T"]:
    """The weight of each plus text, then of each minus text, negative; their magnitudes sum to 1."""
    # signed_weights are those of texts, images, items, vectors, minus: the texts' are at both ends
    weights = query.signed_weights()
    first_minus = len(weights) - len(query.minus)
    own = [*weights[: len(query.texts)], *weights[first_minus:]]
    # so that a likelihood stays one in nats per token whatever the scale of the weights
    return torch.tensor(own, dtype=torch.float32) / sum(map(abs, own))


class LikelihoodReranker(TimedReranker):
    """Orders rows by how likely a captioner finds the texts of a query, given their images.

    unread: why an image could not be read, by uid. milliseconds: spent reading images and running the captioner.
    """

    def __init__(self, captioner: Captioner, query: Query, catalogue: EngineCatalogue) -> None:
        self.captioner = captioner
        self.catalogue = catalogue
        self.unread: dict[str, str] = {}
        self.milliseconds = 0.0
        self._texts = [*query.texts, *query.minus]
        self._weights = text_weights(query)

    @property
    @override
    def fingerprint(self) -> str:
        return self.captioner.fingerprint

    @override
    def order(self, rows: Int64[Array, " N"]) -> tuple[Int64[Array, " N"], Float32[Array, " N"]]:
        """Positions of the rows, the likeliest first, and the likelihood of each in this order.

        The likelihood of a row is the weighted mean over the texts of log p(text | image) / tokens, in nats; minus
        texts count against it. A row whose image cannot be read keeps its position, and its likelihood is NaN.
        """
        started = time.perf_counter()
        likelihoods = self._likelihoods(self.catalogue.entries(rows.tolist()))
        is_read = ~np.isnan(likelihoods)
        readable = np.flatnonzero(is_read)
        # readable rows are sorted among their own positions; stable, so that equal likelihoods keep their order
        positions = np.arange(len(rows))
        positions[is_read] = readable[np.argsort(-likelihoods[readable], kind="stable")]
        self.milliseconds += (time.perf_counter() - started) * 1000
        return positions, likelihoods[positions]

    def _likelihoods(self, entries: Sequence[Entry]) -> Float32[Array, " N"]:
        likelihoods = np.full(len(entries), np.nan, np.float32)
        with ThreadPoolExecutor(_READERS) as readers:
            for first in range(0, len(entries), _IMAGES_AT_ONCE):
                views = list(readers.map(self._read_view, entries[first : first + _IMAGES_AT_ONCE]))
                positions: list[int] = []
                pixels: list[UInt8[Array, "3 H W"]] = []
                for position, view in enumerate(views, first):
                    if view is not None:
                        positions.append(position)
                        pixels.append(view)
                if pixels:
                    images = torch.from_numpy(np.stack(pixels))
                    of_texts = self.captioner.text_log_likelihoods(images, self._texts)
                    likelihoods[positions] = (of_texts @ self._weights).numpy()
        return likelihoods

    def _read_view(self, entry: Entry) -> UInt8[Array, "3 H W"] | None:
        try:
            return self.captioner.view(read_image_bytes(entry))
        except (VlmError, BadSample) as error:
            self.unread[entry.uid] = str(error)
            return None


class PolyEncoderReranker(TimedReranker):
    """Orders rows by a poly-encoder's score of the query's texts and their stored embeddings; no image is read.

    unread: always empty. milliseconds: spent encoding the texts and scoring.

    Raises:
        UsageError: the poly-encoder was fitted to another model than the index's.
    """

    def __init__(
        self, fitted: FittedPolyEncoder, model: VisionLanguageModel, query: Query, snapshot: EngineSnapshot
    ) -> None:
        if fitted.model_fingerprint != model.fingerprint:
            raise UsageError(
                f"The reranker was fitted to {fitted.model}, and the index was made by another model ({model.name}); "
                "fit one by vlm index fit-reranker with embeddings of that."
            )
        self.fitted = fitted
        self.unread: dict[str, str] = {}
        self.milliseconds = 0.0
        self._model = model
        self._snapshot = snapshot
        self._texts = [*query.texts, *query.minus]
        self._weights = text_weights(query)

    @property
    @override
    def fingerprint(self) -> str:
        return self.fitted.fingerprint

    @override
    def order(self, rows: Int64[Array, " N"]) -> tuple[Int64[Array, " N"], Float32[Array, " N"]]:
        """Positions of the rows, the best first, and the score of each in this order.

        The score of a row is the weighted mean over the texts of the poly-encoder's; minus texts count against it.
        """
        started = time.perf_counter()
        states, mask, texts = token_states(self._model, self._texts)
        vectors = torch.from_numpy(self._snapshot.vectors(rows)).expand(len(texts), -1, -1)
        scores = (self._weights @ self.fitted.network(states.cpu(), mask.cpu(), texts.cpu(), vectors)).numpy()
        # stable, so that equal scores keep their order
        positions = np.argsort(-scores, kind="stable")
        self.milliseconds += (time.perf_counter() - started) * 1000
        return positions, scores[positions]
