"""The rows stored with each sample: what each teacher makes of its views and captions, side by side."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from vlm.data.tar_copy import Arrays
from vlm.errors import UsageError, VlmError
from vlm.models.encoder import VisionLanguageModel
from vlm.tensors import Float32, Tensor
from vlm.train.reinforcement.batches import Viewed, ViewedBatch


@runtime_checkable
class TextEmbedder(Protocol):
    """Texts to vectors on the CPU; a `VisionLanguageModel` is one, and so is a language model."""

    @property
    def fingerprint(self) -> str:
        """Models with the same fingerprint give the same vectors."""
        ...

    @property
    def precision(self) -> torch.dtype:
        """Arithmetic of the model."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> Float32[Tensor, "T E"]:
        """A row for each text."""
        ...


@dataclass(frozen=True, kw_only=True)
class Teachers:
    """Who looks at the samples. names: of `models` and of `text_model`, as a person wrote them."""

    models: tuple[VisionLanguageModel, ...] = ()
    names: tuple[str, ...] = ()
    text_model: TextEmbedder | None = None
    text_name: str = ""

    def __post_init__(self) -> None:
        if not self.models and self.text_model is None:
            raise UsageError("There is nothing to put into the shards; give --teacher MODEL, --text-model, or both.")

    def made_of(self, batch: ViewedBatch, places: Sequence[int], *, half: bool) -> list[Arrays]:
        """The arrays of each usable sample of a batch. places: for each model, the number of the view it looks through.

        Raises:
            VlmError: a number is not finite, or the batch does not fit into memory.
        """
        usable, models = batch.usable, self.models
        made = [Arrays() for _ in usable]
        if not usable:
            return made
        try:
            if models:
                _put(made, "view_seeds", [row.seeds for row in usable])
                images = [model.embed_images(batch.views(at)) for model, at in zip(models, places, strict=True)]
                numbers = [batch.num_views] * len(usable)
                _put(made, "teacher_image", _rows(_joined(images), numbers, np.float16, self.names, usable))
            self._add_texts(made, usable, half=half)
        except torch.OutOfMemoryError as error:
            raise VlmError(
                "A batch does not fit into the device's memory; repeat the command with a smaller --batch-size: it "
                "goes on after the shards that are done."
            ) from error
        return made

    def _add_texts(self, made: list[Arrays], usable: list[Viewed], *, half: bool) -> None:
        captions = [text for row in usable for text in row.captions]
        numbers = [len(row.captions) for row in usable]
        if self.models:
            texts = _joined([model.embed_texts(captions) for model in self.models])
            _put(made, "teacher_text", _rows(texts, numbers, np.float16, self.names, usable))
        if self.text_model is not None:
            kind = np.float16 if half else np.float32
            embedded = self.text_model.embed_texts(captions)
            _put(made, "text_embedding", _rows(embedded, numbers, kind, (self.text_name,), usable))


def _joined(parts: Sequence[Float32[Tensor, "N _"]]) -> Float32[Tensor, "N D"]:
    """The teachers' unit vectors side by side, at unit length again."""
    return torch.cat(list(parts), dim=1) / math.sqrt(len(parts))


def _rows(
    vectors: Float32[Tensor, "N D"], numbers: list[int], kind: type, names: Sequence[str], usable: list[Viewed]
) -> list[np.ndarray]:
    """The vectors, so many for each sample, as stored; VlmError where one is not finite."""
    with np.errstate(over="ignore"):
        stored = vectors.numpy().astype(kind)
    parts = np.split(stored, list(accumulate(numbers))[:-1])
    for part, row in zip(parts, usable, strict=True):
        if not np.isfinite(part).all():
            raise VlmError(
                f"{' + '.join(names)} gave numbers that are no finite {np.dtype(kind)} for {row.key!r}: the weights "
                "are damaged, its training diverged, or (with --half) they are too large."
            )
    return parts


def _put(made: list[Arrays], name: str, parts: Sequence[np.ndarray]) -> None:
    for arrays, part in zip(made, parts, strict=True):
        arrays[name] = part
