"""Hugging Face tokenizers by the library `tokenizers` alone: ids as of transformers and open_clip, without torch."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from vlm.data.clip_bpe import clean_text
from vlm.data.tokenizers import DESCRIPTION, HuggingFaceTokenizer, Tokenizer, TransformersTokenizer
from vlm.errors import VlmError
from vlm.files import compute_fingerprint, write_text

FILE = "tokenizer.json"

# what texts look like that tokenizers treat differently: scripts, case folding, entities, controls, broken encodings
_ODD = (
    *(
        "naïve",
        "İstanbul",
        "ſ's",
        "ﬁne",
        "ǅ",
        "ẞ",
        "ΑΣ",
        "日本語",
        "犬の写真",
        "한국어",
        "ไทย",
        "😀",
        "👨‍👩‍👧",
        "½²Ⅷ",
        "…",
    ),
    *("e\u0301", "\u200b", "\u00a0", "\u2028", "\ufeff", "\x00", "\x7f", "\n", "\t", "&amp;lt;", "&#128512;", "ÃƒÂ¡"),
    *("dog", "don't", "I'LL", "a_b", "[SEP]", "</s>", "<pad>", "<|endoftext|>", "C++", "--", "x" * 60, " ", "  ", ", "),
)
_NUM_TRIAL_TEXTS = 3000


class FastTokenizer(Tokenizer):
    """A `tokenizer.json` with its truncation and padding, and the cleaning of texts before it."""

    def __init__(self, folder: Path, context_length: int) -> None:
        import tokenizers

        described = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        self._folder = folder
        self._described = described
        try:
            self._inner = tokenizers.Tokenizer.from_file(str(folder / FILE))
        except Exception as error:  # the library raises no type of its own
            raise VlmError(f"{folder / FILE} cannot be read: {error}") from error
        if context_length != described["context_length"]:
            raise VlmError(f"{folder} was saved for {described['context_length']} tokens, not {context_length}.")
        self.context_length, self.vocab_size = context_length, described["vocab_size"]
        self.start_token, self.end_token = described["start_token"], described["end_token"]
        self.pad_token = described["pad_token"]

    @override
    def encode(self, texts: Sequence[str]) -> np.ndarray:
        cleaning = self._described["cleaning"]
        if cleaning:
            texts = [clean_text(text, cleaning) for text in texts]
        rows = [encoding.ids for encoding in self._inner.encode_batch(list(texts))]
        return np.array(rows, np.int64).reshape(len(rows), self.context_length)

    @override
    def decode(self, tokens: Sequence[int]) -> str:
        return self._inner.decode(list(tokens), skip_special_tokens=True).strip()

    @override
    def save(self, folder: Path) -> None:
        write_text(folder / FILE, (self._folder / FILE).read_text(encoding="utf-8"))
        write_text(folder / DESCRIPTION, json.dumps(self._described, indent=2) + "\n")

    @override
    def fingerprint(self) -> str:
        return compute_fingerprint("fast", self._inner.to_str(), json.dumps(self._described, sort_keys=True))


def save_without_torch(tokenizer: Tokenizer, folder: Path, open_saved: Callable[[str], Tokenizer]) -> bool:
    """Save a tokenizer so that it opens without torch and gives the same ids; False if that cannot be, and saved as is.

    Compared over some thousand texts of all scripts. open_saved: as `open_tokenizer`.
    """
    if not isinstance(tokenizer, HuggingFaceTokenizer | TransformersTokenizer):
        tokenizer.save(folder)
        return True
    inner: Any = tokenizer.transformers_tokenizer
    if getattr(inner, "is_fast", False):
        tokenizer.encode(["a"])  # sets the truncation and padding that are saved with it
        write_text(folder / FILE, inner.backend_tokenizer.to_str())
        values = {"kind": "fast", "cleaning": tokenizer.cleaning}
        for name in ("context_length", "vocab_size", "start_token", "end_token", "pad_token"):
            values[name] = getattr(tokenizer, name)
        write_text(folder / DESCRIPTION, json.dumps(values, indent=2) + "\n")
        texts = trial_texts()
        if np.array_equal(open_saved(str(folder)).encode(texts), tokenizer.encode(texts)):
            return True
        (folder / FILE).unlink()
    tokenizer.save(folder)
    return False


def trial_texts(number: int = _NUM_TRIAL_TEXTS) -> list[str]:
    """Texts of odd pieces, and of characters of all planes; always the same."""
    rng = np.random.default_rng(0)
    texts = ["", "a small red circle", "Two LARGE blue stars, on a white background. " * 20]
    while len(texts) < number // 2:
        texts.append("".join(rng.choice(_ODD, rng.integers(1, 8))))
    # no half of a surrogate pair, which is no Unicode text
    codes = np.concatenate([rng.integers(0x20, 0xD800, number), rng.integers(0xE000, 0x30000, number)])
    for first, second in rng.choice(codes, (number - len(texts), 2)):
        texts.append(f"a{chr(first)} {chr(second)}b")
    return texts
