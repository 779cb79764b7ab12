"""The tokenizer of one of our models with open_clip's call, for networks that are exported there.

`open_clip.get_tokenizer("local-dir:FOLDER")` knows CLIP's byte pairs and Hugging Face tokenizers only; for a
SentencePiece model it gives the ids of CLIP's, most of which are larger than its vocabulary: an index error in the
network, and at worst wrong embeddings.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch

from vlm.data.tokenizers import open_tokenizer
from vlm.tensor_types import Int64, Tensor


class OpenClipTokenizer:
    """Texts to ids as open_clip calls its tokenizers: `tokenizer(["a dog"])`, `tokenizer(texts, context_length=32)`."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = str(folder).removeprefix("local-dir:")
        self._tokenizer = open_tokenizer(self._folder)
        # of one length after another in training code
        self._open = lru_cache(maxsize=4)(lambda length: open_tokenizer(self._folder, length))

    @property
    def context_length(self) -> int:
        """Tokens of a row."""
        return self._tokenizer.context_length

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self._tokenizer.vocab_size

    @property
    def sot_token_id(self) -> int:
        """The id before a text."""
        return self._tokenizer.start_token

    @property
    def eot_token_id(self) -> int:
        """The id behind a text."""
        return self._tokenizer.end_token

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Int64[Tensor, "T L"]:
        """Rows of ids; what does not fit is cut, the end token is kept."""
        tokenizer = self._open(context_length) if context_length else self._tokenizer
        return torch.from_numpy(tokenizer.encode([texts] if isinstance(texts, str) else list(texts)))

    def decode(self, tokens: Sequence[int] | Tensor) -> str:
        """The text of a row, up to its end token."""
        ids = tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)
        return self._tokenizer.decode(ids)


def get_tokenizer(folder: str | Path) -> OpenClipTokenizer:
    """The tokenizer of an exported folder, as `open_clip.get_tokenizer` gives one.

    Raises:
        UsageError: the folder has none.
    """
    return OpenClipTokenizer(folder)
