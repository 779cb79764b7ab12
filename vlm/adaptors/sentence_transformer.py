"""A model with the calls of sentence-transformers: `encode`, `similarity`, for code that is written for it."""

from collections.abc import Sequence
from typing import Any, Literal, overload

import numpy as np
import torch
from PIL import Image

from vlm.api.inference import IMAGE_BATCH_SIZE, Model
from vlm.errors import UsageError
from vlm.tensor_types import Array, Float32, Tensor


class SentenceTransformerStyle:
    """`SentenceTransformer`'s calls over one of our models: texts and images, also mixed, to rows of one space.

    As there, an image is a `PIL.Image.Image` and a text a `str`; a path is a text here, too.
    """

    def __init__(self, model: Model) -> None:
        self._model = model

    @overload
    def encode(
        self, sentences: Any, *, convert_to_tensor: Literal[True], batch_size: int = ..., **options: Any
    ) -> Tensor: ...

    @overload
    def encode(
        self, sentences: Any, *, convert_to_tensor: Literal[False] = False, batch_size: int = ..., **options: Any
    ) -> Float32[Array, "*N D"]: ...

    def encode(
        self,
        sentences: str | Image.Image | Sequence[str | Image.Image],
        *,
        convert_to_tensor: bool = False,
        batch_size: int = IMAGE_BATCH_SIZE,
        normalize_embeddings: bool = True,
        show_progress_bar: bool | None = None,
        convert_to_numpy: bool = True,
        prompt: str = "",
        **unknown: Any,
    ) -> Float32[Array, "*N D"] | Tensor:
        """Rows for several inputs, [N, D]; a vector, [D], for one.

        Args:
            normalize_embeddings: as they are in any case. prompt: put before each text.
            show_progress_bar, convert_to_numpy: without effect; progress follows the package's logging.

        Raises:
            UsageError: an input is neither a text nor a PIL image, or an option is not known.
        """
        if unknown:
            raise UsageError(f"encode has no option {', '.join(sorted(unknown))} here.")
        is_single = isinstance(sentences, str | Image.Image)
        inputs = [sentences] if is_single else list(sentences)
        rows = np.zeros((len(inputs), self._model.embedding_size), np.float32)
        # by their places in the answer: texts and images are embedded apart, each kind in batches
        texts: dict[int, str] = {}
        images: dict[int, Image.Image] = {}
        for number, content in enumerate(inputs):
            if isinstance(content, str):
                texts[number] = f"{prompt}{content}"
            elif isinstance(content, Image.Image):
                images[number] = content
            else:
                raise UsageError("encode takes texts and PIL images; open others with PIL.Image.open.")
        if texts:
            rows[list(texts)] = self._model.embed_texts(list(texts.values()))
        if images:
            rows[list(images)] = self._model.embed_images(list(images.values()), batch_size=batch_size)
        answer = rows[0] if is_single else rows
        return torch.from_numpy(answer) if convert_to_tensor else answer

    # the names for both sides of a search, which are one for a dual encoder
    encode_query = encode
    encode_document = encode

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Cosines of each row with each."""
        first = torch.nn.functional.normalize(torch.atleast_2d(torch.as_tensor(embeddings1)), dim=-1)
        second = torch.nn.functional.normalize(torch.atleast_2d(torch.as_tensor(embeddings2)), dim=-1)
        return first @ second.T

    def get_embedding_dimension(self) -> int:
        """D."""
        return self._model.embedding_size

    # its name before sentence-transformers 5.4
    get_sentence_embedding_dimension = get_embedding_dimension

    @property
    def max_seq_length(self) -> int:
        """Tokens of a text."""
        return self._model.tokenizer.context_length
