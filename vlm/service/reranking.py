"""The first answers of a question, put in the order in which a captioner finds the question's texts likely."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from vlm.data.views import FixedView
from vlm.errors import BadSample, UsageError, VlmError
from vlm.index.catalogue import Catalogue, Entry
from vlm.service.pictures import read_picture
from vlm.service.question import Question
from vlm.tensors import Array, Float32, Int64, Tensor, UInt8

_PICTURES_AT_ONCE = 64
_READERS = 8


@runtime_checkable
class Captioner(Protocol):
    """A model that says how likely a text is, given a picture."""

    @property
    def view(self) -> FixedView:
        """From an encoded picture to the pixels the model sees."""
        ...

    @property
    def fingerprint(self) -> str:
        """Models with the same fingerprint give the same likelihoods."""
        ...

    @property
    def can_caption(self) -> bool:
        """Whether it has a caption decoder."""
        ...

    def text_likelihoods(self, images: UInt8[Tensor, "B 3 H W"], texts: Sequence[str]) -> Float32[Tensor, "B T"]:
        """Mean log-likelihood of each text's tokens given each picture, in nats."""
        ...


def as_captioner(model: object, spec: str) -> Captioner:
    """The model, if it can re-rank.

    Raises:
        UsageError: it has no caption decoder.
    """
    if isinstance(model, Captioner) and model.can_caption:
        return model
    raise UsageError(f"{spec} has no caption decoder to re-rank with; train one, e.g. vlm train tiny-coca.")


class Reranking:
    """The re-ranking of one question.

    unread: why a picture could not be read, by uid. milliseconds: spent reading pictures and asking the captioner.
    """

    def __init__(self, captioner: Captioner, question: Question, catalogue: Catalogue) -> None:
        self.captioner, self.catalogue = captioner, catalogue
        self.unread: dict[str, str] = {}
        self.milliseconds = 0.0
        self._texts = [*question.texts, *question.minus]
        weights = question.signed_weights()
        chosen = [*weights[: len(question.texts)], *weights[len(weights) - len(question.minus) :]]
        self._weights = torch.tensor(chosen) / sum(map(abs, chosen))

    def order(self, rows: Int64[Array, " N"]) -> tuple[Int64[Array, " N"], Float32[Array, " N"]]:
        """Places of the rows, the likeliest first, and the likelihood of each in this order.

        The likelihood of a row is the weighted mean over the texts of log p(text | picture) / tokens, in nats; minus
        texts count against it. A row whose picture cannot be read keeps its place, and its likelihood is NaN.
        """
        started = time.perf_counter()
        likelihoods = self._likelihoods(self.catalogue.entries(rows.tolist()))
        is_read = ~np.isnan(likelihoods)
        places, readable = np.arange(len(rows)), np.flatnonzero(is_read)
        places[is_read] = readable[np.argsort(-likelihoods[readable], kind="stable")]
        self.milliseconds += (time.perf_counter() - started) * 1000
        return places, likelihoods[places]

    def _likelihoods(self, entries: Sequence[Entry]) -> Float32[Array, " N"]:
        found = np.full(len(entries), np.nan, np.float32)
        with ThreadPoolExecutor(_READERS) as readers:
            for first in range(0, len(entries), _PICTURES_AT_ONCE):
                views = list(readers.map(self._view, entries[first : first + _PICTURES_AT_ONCE]))
                places = [first + place for place, view in enumerate(views) if view is not None]
                pixels = [view for view in views if view is not None]
                if pixels:
                    images = torch.from_numpy(np.stack(pixels))
                    found[places] = (self.captioner.text_likelihoods(images, self._texts) @ self._weights).numpy()
        return found

    def _view(self, entry: Entry) -> UInt8[Array, "3 H W"] | None:
        try:
            return self.captioner.view(read_picture(entry))
        except (VlmError, BadSample) as error:
            self.unread[entry.uid] = str(error)
            return None
