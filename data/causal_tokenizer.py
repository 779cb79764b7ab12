"""Captions as rows for a causal language model: its own pieces between a start and an end token, padded by a new id."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm.data.tokenizers import describe_tokenizer
from vlm.errors import UsageError
from vlm.files import compute_fingerprint


class CausalTokenizer:
    """The tokenizer in a folder of a causal language model (GPT-2, OPT, Llama).

    These put no end token after a text, and many pad with it, so that a captioner would never learn to stop: here each
    row has both, and `pad_token` is one more than all ids of the folder.

    Raises:
        UsageError: the folder has no tokenizer, or one without an end token.
    """

    def __init__(self, source: str, context_length: int) -> None:
        from transformers import AutoTokenizer

        try:
            self._wrapped: Any = AutoTokenizer.from_pretrained(source, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UsageError(f"No tokenizer of a language model at {source!r}: {error}") from error
        end = self._wrapped.eos_token_id
        if end is None:
            raise UsageError(f"The tokenizer of {source} has no end token, so captions would never end; give it one.")
        start = self._wrapped.bos_token_id
        self.start_token, self.end_token = end if start is None else start, end
        self.pad_token = len(self._wrapped)
        self.vocab_size = self.pad_token + 1
        self.context_length = context_length

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Texts to int64 [T, L]; what does not fit is cut, the end token is kept."""
        rows = np.full((len(texts), self.context_length), self.pad_token, np.int64)
        for row, text in zip(rows, texts, strict=True):
            pieces = self._wrapped.encode(text, add_special_tokens=False)[: self.context_length - 2]
            row[: len(pieces) + 2] = [self.start_token, *pieces, self.end_token]
        return rows

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of one row, up to its end token."""
        pieces: list[int] = []
        for place, token in enumerate(tokens):
            # the start token may be the end token itself
            if token in (self.end_token, self.pad_token) and place:
                break
            if token not in (self.start_token, self.pad_token):
                pieces.append(token)
        return self._wrapped.decode(pieces, skip_special_tokens=True).strip()

    def save(self, folder: Path) -> None:
        """Write what `open_tokenizer(folder)` needs."""
        self._wrapped.save_pretrained(folder)
        describe_tokenizer(folder, {"kind": "causal", "context_length": self.context_length})

    def fingerprint(self) -> str:
        """Identity of the mapping from text to ids."""
        vocabulary = json.dumps(self._wrapped.get_vocab(), sort_keys=True)
        return compute_fingerprint("causal", vocabulary, str(self.context_length))
