"""Captions to token rows and back: CLIP's BPE, a SentencePiece model, a Hugging Face folder.

CLIP's byte-pair encoding (Radford et al. 2021, after GPT-2's) is computed here, with open_clip's cleaning of texts and
its vocabulary: importing open_clip itself would load torch, which takes seconds.
"""

import gzip
import html
import importlib.util
import io
import json
import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from typing_extensions import override

from vlm.errors import UsageError, VlmError
from vlm.files import compute_fingerprint, write_bytes, write_text
from vlm.model_spec import locate_weights
from vlm.tensor_types import Array, Int64

DESCRIPTION = "vlm_tokenizer.json"
CLIP_CONTEXT_LENGTH = 77
_MIN_CONTEXT_LENGTH = 3
_WIDTH_STEP = 8

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
NUM_MERGES = 49152 - 256 - 2
START = "<start_of_text>"
END = "<end_of_text>"
_END_OF_WORD = "</w>"
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
# five megabytes; words that are met once must not fill the memory of a loader, of which there are several
_MAX_CACHED_WORDS = 1 << 15
# the merges that are used take 525 KB
_USED_BYTES = 600_000

# the expressions of open_clip's SimpleTokenizer: for any text, and for lower-case ASCII, where `re` says the same
_ANY_PART = rf"""{START}|{END}|'s|'t|'re|'ve|'m|'ll|'d|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+"""
_ASCII_PART = re.compile(rf"""{START}|{END}|'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+""")


@runtime_checkable
class Tokenizer(Protocol):
    """Rows of `context_length` ids: start_token, pieces, end_token, then pad_token."""

    context_length: int
    vocab_size: int
    start_token: int
    end_token: int
    pad_token: int

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Texts to int64 [T, L]; what does not fit is cut, the end token is kept."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of one row, up to its end token."""
        ...

    def save(self, folder: Path) -> None:
        """Write what `open_tokenizer(folder)` needs."""
        ...

    def fingerprint(self) -> str:
        """Identity of the mapping from text to ids."""
        ...


class ClipTokenizer(Tokenizer):
    """CLIP's byte-pair encoding of 49,408 pieces.

    vocabulary: the compressed file of merges; None takes the one that open_clip ships.
    """

    start_token = 49406
    end_token = 49407
    pad_token = 0

    def __init__(self, context_length: int = CLIP_CONTEXT_LENGTH, *, vocabulary: bytes | None = None) -> None:
        self._bpe = ClipBpe(shipped_vocabulary() if vocabulary is None else vocabulary)
        self.context_length, self.vocab_size = context_length, len(self._bpe.pieces)

    @override
    def encode(self, texts: Sequence[str]) -> np.ndarray:
        return _pad_rows(map(self._bpe.encode, texts), self)

    @override
    def decode(self, tokens: Sequence[int]) -> str:
        return self._bpe.decode(_inner(self, tokens)).strip()

    @override
    def save(self, folder: Path) -> None:
        describe_tokenizer(folder, {"kind": "clip", "context_length": self.context_length})

    @override
    def fingerprint(self) -> str:
        return compute_fingerprint("clip", str(self.context_length))


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model with padding as piece 0; start and end follow its vocabulary.

    The end token is thereby the largest id, which open_clip's `argmax` pooling looks for.
    """

    pad_token = 0

    def __init__(self, model: bytes, context_length: int = 32) -> None:
        from sentencepiece import SentencePieceProcessor

        self._model = model
        self._pieces = SentencePieceProcessor(model_proto=model)
        if self._pieces.pad_id() != self.pad_token:
            raise UsageError(
                f"The SentencePiece model has its padding at {self._pieces.pad_id()}, not 0; train it with "
                "pad_id=0 (vlm tokenizer train does)."
            )
        size = self._pieces.vocab_size()
        self.context_length, self.vocab_size = context_length, size + 2
        # behind the pieces, so that no text can hold them
        self.start_token = size
        self.end_token = size + 1

    @override
    def encode(self, texts: Sequence[str]) -> np.ndarray:
        # one by one: given a list, SentencePiece 0.2.3 starts threads, which takes 40 times as long for one text; what
        # they save on a batch, 1 to 2 µs a text, is nothing beside the model
        return _pad_rows([self._pieces.encode(text) for text in texts], self)

    @override
    def decode(self, tokens: Sequence[int]) -> str:
        return self._pieces.decode(_inner(self, tokens))

    @override
    def save(self, folder: Path) -> None:
        write_bytes(folder / "tokenizer.model", self._model)
        describe_tokenizer(folder, {"kind": "sentencepiece", "context_length": self.context_length})

    @override
    def fingerprint(self) -> str:
        return compute_fingerprint("sentencepiece", self._model, str(self.context_length))


class HuggingFaceTokenizer(Tokenizer):
    """A Hugging Face tokenizer folder, or a name the network or cache can resolve, through open_clip.

    options: open_clip's `tokenizer_kwargs` of the model, such as {"clean": "canonicalize"} of its SigLIP models.
    cleaning: what open_clip does with a text first (`clean_text`).
    """

    def __init__(
        self, source: str, context_length: int = CLIP_CONTEXT_LENGTH, options: Mapping[str, Any] | None = None
    ) -> None:
        from vlm.data.open_clip_private import HFTokenizer

        self.options = dict(options or {})
        try:
            self._wrapped = HFTokenizer(source, context_length=context_length, **self.options)
        except (OSError, ValueError) as error:
            raise UsageError(f"No Hugging Face tokenizer at {source!r}: {error}") from error
        inner: Any = self._wrapped.tokenizer
        self.context_length, self.vocab_size = context_length, len(inner)
        if inner.pad_token_id is None:
            if inner.eos_token_id is None:
                raise UsageError(f"The tokenizer of {source} has neither a padding nor an end token; give it one.")
            # as GPT-2's, which was trained without padding
            inner.pad_token = inner.eos_token
        # some models of this kind pad on the left; everything here expects the text first
        inner.padding_side = "right"
        self.pad_token = inner.pad_token_id or 0
        self.start_token = _first_not_none(inner.bos_token_id, inner.cls_token_id, self.pad_token)
        self.end_token = _first_not_none(inner.eos_token_id, inner.sep_token_id, self.pad_token)
        self.transformers_tokenizer = inner
        self.cleaning = str(self.options.get("clean", "whitespace"))

    @override
    def encode(self, texts: Sequence[str]) -> np.ndarray:
        return self._wrapped(list(texts)).numpy().astype(np.int64)

    @override
    def decode(self, tokens: Sequence[int]) -> str:
        return self._wrapped.tokenizer.decode(list(tokens), skip_special_tokens=True).strip()

    @override
    def save(self, folder: Path) -> None:
        self._wrapped.tokenizer.save_pretrained(folder)
        options = {"options": self.options} if self.options else {}
        describe_tokenizer(folder, {"kind": "huggingface", "context_length": self.context_length, **options})

    @override
    def fingerprint(self) -> str:
        # sorted: the library gives them in no order
        vocabulary = json.dumps(self._wrapped.tokenizer.get_vocab(), sort_keys=True)
        options = [json.dumps(self.options, sort_keys=True)] if self.options else []
        return compute_fingerprint("huggingface", vocabulary, str(self.context_length), *options)


class TransformersTokenizer(Tokenizer):
    """A Hugging Face tokenizer folder as transformers itself calls it, for models that come from there.

    open_clip cleans texts first, and for SigLIP turns an underscore into a space, which transformers leaves out; so the
    same folder gives other ids through `HuggingFaceTokenizer`.

    gives_mask: whether its models are also given a mask of the padding.
    """

    def __init__(self, source: str, context_length: int = CLIP_CONTEXT_LENGTH) -> None:
        from transformers import AutoTokenizer

        try:
            self._wrapped: Any = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise UsageError(f"No Hugging Face tokenizer at {source!r}: {error}") from error
        if self._wrapped.pad_token_id is None:
            raise UsageError(f"The tokenizer of {source} has no padding token; give it one.")
        self.context_length, self.vocab_size = context_length, len(self._wrapped)
        self.pad_token = self._wrapped.pad_token_id
        inner = self._wrapped
        self.start_token = _first_not_none(inner.bos_token_id, inner.cls_token_id, self.pad_token)
        self.end_token = _first_not_none(inner.eos_token_id, inner.sep_token_id, self.pad_token)
        self.gives_mask = "attention_mask" in inner.model_input_names
        self.transformers_tokenizer = inner
        self.cleaning = ""

    @override
    def encode(self, texts: Sequence[str]) -> np.ndarray:
        if not texts:
            return np.zeros((0, self.context_length), np.int64)
        encoded = self._wrapped(
            list(texts), padding="max_length", truncation=True, max_length=self.context_length, return_tensors="np"
        )
        return encoded["input_ids"].astype(np.int64)

    @override
    def decode(self, tokens: Sequence[int]) -> str:
        return self._wrapped.decode(list(tokens), skip_special_tokens=True).strip()

    @override
    def save(self, folder: Path) -> None:
        self._wrapped.save_pretrained(folder)
        describe_tokenizer(folder, {"kind": "transformers", "context_length": self.context_length})

    @override
    def fingerprint(self) -> str:
        vocabulary = json.dumps(self._wrapped.get_vocab(), sort_keys=True)
        return compute_fingerprint("transformers", vocabulary, str(self.context_length), self._wrapped.padding_side)


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
        # without a start token a row begins with the end token, as the texts of GPT-2 and OPT do
        self.start_token = end if start is None else start
        self.end_token = end
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


_FAST_FILE = "tokenizer.json"


class FastTokenizer(Tokenizer):
    """A `tokenizer.json` with its truncation and padding, and the cleaning of texts before it.

    By the library `tokenizers` alone: the ids of transformers and open_clip, without torch.
    """

    def __init__(self, folder: Path, context_length: int) -> None:
        import tokenizers

        described = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        self._folder = folder
        self._described = described
        try:
            self._inner = tokenizers.Tokenizer.from_file(str(folder / _FAST_FILE))
        except Exception as error:  # the library raises no type of its own
            raise VlmError(f"{folder / _FAST_FILE} cannot be read: {error}") from error
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
        write_text(folder / _FAST_FILE, (self._folder / _FAST_FILE).read_text(encoding="utf-8"))
        write_text(folder / DESCRIPTION, json.dumps(self._described, indent=2) + "\n")

    @override
    def fingerprint(self) -> str:
        return compute_fingerprint("fast", self._inner.to_str(), json.dumps(self._described, sort_keys=True))


_SAVED: dict[str, Callable[[Path, int, dict[str, Any]], Tokenizer]] = {
    "clip": lambda folder, length, saved: _open_clip_bpe(folder, length),
    "sentencepiece": lambda folder, length, saved: SentencePieceTokenizer(
        (folder / "tokenizer.model").read_bytes(), length
    ),
    "huggingface": lambda folder, length, saved: HuggingFaceTokenizer(str(folder), length, saved.get("options")),
    "transformers": lambda folder, length, saved: TransformersTokenizer(str(folder), length),
    "causal": lambda folder, length, saved: CausalTokenizer(str(folder), length),
    "fast": lambda folder, length, saved: FastTokenizer(folder, length),
}


def _open_clip_bpe(folder: Path, context_length: int) -> Tokenizer:
    """With the vocabulary that an export has beside it, so that it needs no open_clip."""
    path = folder / VOCABULARY
    return ClipTokenizer(context_length, vocabulary=path.read_bytes() if path.is_file() else None)


CAUSAL_PREFIX = "causal:"
"""Before the folder of a causal language model, whose captions need an end (`CausalTokenizer`)."""


def open_tokenizer(source: str, context_length: int | None = None) -> Tokenizer:
    """The tokenizer named by `clip`, a SentencePiece `.model` file, a saved folder, a Hugging Face folder, or `causal:`
    with the folder of a causal language model.

    context_length: tokens a row; None or 0 takes the tokenizer's own.

    Raises:
        UsageError: nothing of the kind is there, or the context length holds no piece.
    """
    if context_length and context_length < _MIN_CONTEXT_LENGTH:
        raise UsageError(
            f"context_length = {context_length} holds no piece between start and end; "
            f"give {_MIN_CONTEXT_LENGTH} or more."
        )
    if source == "clip":
        return ClipTokenizer(context_length or CLIP_CONTEXT_LENGTH)
    if source.startswith(CAUSAL_PREFIX):
        language_model = locate_weights(source.removeprefix(CAUSAL_PREFIX))
        return CausalTokenizer(language_model, context_length or CLIP_CONTEXT_LENGTH)
    source = locate_weights(source)
    path = Path(source)
    if path.is_file():
        return SentencePieceTokenizer(path.read_bytes(), context_length or 32)
    if (path / DESCRIPTION).is_file():
        saved = json.loads((path / DESCRIPTION).read_text(encoding="utf-8"))
        return _SAVED[saved["kind"]](path, context_length or saved["context_length"], saved)
    if path.is_dir():
        return HuggingFaceTokenizer(source, context_length or CLIP_CONTEXT_LENGTH)
    raise UsageError(
        f"There is no tokenizer {source!r}; give clip, a SentencePiece .model file (vlm tokenizer train makes one), "
        "or a Hugging Face folder."
    )


_MARKS = 8
"""More tokens than any tokenizer here adds of its own: a start, an end, the mark of a first word, of a language."""


def cut_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[str]:
    """Those of the texts that do not fit into the context, whose end is therefore never seen.

    A text is cut when its row is the same without its last word, or without its last character, where there are no
    words (Chinese) or the last one is cut in its middle.
    """
    long_texts: list[str] = []
    for text in texts:
        # no token is less than a character of ASCII, so that most queries need not be encoded a second time
        if not text.isascii() or len(text) > tokenizer.context_length - _MARKS:
            long_texts.append(text)
    if not long_texts:
        return []
    cut: list[str] = []
    for text, row in zip(long_texts, tokenizer.encode(long_texts), strict=True):
        # a row with padding left has room, so its text was not cut; the costly check is for full rows alone
        is_full = row[-1] == tokenizer.end_token or row[-1] != tokenizer.pad_token
        if not is_full or not text.strip():
            continue
        shorter = [" ".join(text.split()[:-1]), text.strip()[:-1]]
        if (tokenizer.encode(shorter) == row).all(axis=1).any():
            cut.append(text)
    return cut


@dataclass(frozen=True, kw_only=True)
class Padding:
    """What rows of ids are filled with. is_end: it is the end token, so each row has to keep one."""

    token: int
    is_end: bool

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Padding":
        """The padding of a tokenizer."""
        return cls(token=tokenizer.pad_token, is_end=tokenizer.pad_token == tokenizer.end_token)


def trim_tokens(tokens: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Rows of ids [..., L] cut to the longest of them, rounded up to a multiple of 8."""
    widths = text_widths(tokens.reshape(-1, tokens.shape[-1]), Padding.of(tokenizer))
    return tokens[..., : widths.max(initial=_WIDTH_STEP)]


def text_widths(tokens: Int64[Array, "T L"], padding: Padding) -> Int64[Array, " T"]:
    """How many positions of each row are enough: up to its last token, rounded up."""
    used = tokens != padding.token
    lengths = np.where(used.any(axis=1), tokens.shape[1] - used[:, ::-1].argmax(axis=1), 1)
    lengths += padding.is_end
    return np.minimum(round_widths(lengths), tokens.shape[1])


def round_widths(lengths: Int64[Array, " T"]) -> Int64[Array, " T"]:
    """Lengths of texts rounded up to a multiple of 8, so that few widths occur."""
    return -(-lengths // _WIDTH_STEP) * _WIDTH_STEP


def _pad_rows(texts: Iterable[list[int]], tokenizer: Tokenizer) -> np.ndarray:
    """Pieces of each text between start and end token, cut and padded: int64 [T, L]."""
    room, start, end = tokenizer.context_length - 2, tokenizer.start_token, tokenizer.end_token
    cut = [[start, *pieces[:room], end] for pieces in texts]
    rows = np.full((len(cut), tokenizer.context_length), tokenizer.pad_token, np.int64)
    lengths = np.fromiter(map(len, cut), np.int64)
    # one assignment for all rows: a mask is filled row by row, the order of the pieces
    rows[np.arange(tokenizer.context_length) < lengths[:, None]] = np.fromiter(chain.from_iterable(cut), np.int64)
    return rows


def _inner(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[int]:
    inner: list[int] = []
    for token in tokens:
        if token == tokenizer.end_token:
            break
        if token not in (tokenizer.start_token, tokenizer.pad_token):
            inner.append(int(token))
    return inner


def _first_not_none(*values: int | None) -> int:
    return next(value for value in values if value is not None)


def describe_tokenizer(folder: Path, values: dict[str, Any]) -> None:
    """Say in a folder what `open_tokenizer` finds there: the kind of tokenizer and its settings."""
    write_text(folder / DESCRIPTION, json.dumps(values, indent=2) + "\n")


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
        write_text(folder / _FAST_FILE, inner.backend_tokenizer.to_str())
        values = {"kind": "fast", "cleaning": tokenizer.cleaning}
        for name in ("context_length", "vocab_size", "start_token", "end_token", "pad_token"):
            values[name] = getattr(tokenizer, name)
        write_text(folder / DESCRIPTION, json.dumps(values, indent=2) + "\n")
        texts = trial_texts()
        if np.array_equal(open_saved(str(folder)).encode(texts), tokenizer.encode(texts)):
            return True
        (folder / _FAST_FILE).unlink()
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


def shipped_vocabulary() -> bytes:
    """The compressed file of merges that is part of open_clip.

    Raises:
        VlmError: open_clip is not installed.
    """
    spec = importlib.util.find_spec("open_clip")  # finds the package without importing it
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    if not folders:
        raise VlmError("CLIP's vocabulary comes with open_clip, which is not installed: pip install open_clip_torch.")
    return (Path(folders[0]) / VOCABULARY).read_bytes()


class ClipBpe:
    """From text to ids and back; ids are those of open_clip's SimpleTokenizer.

    No piece reaches over a space, so the pieces of words are kept: most words of a caption have been met before.
    """

    def __init__(self, vocabulary: bytes) -> None:
        # the file goes on with merges that CLIP does not use, more than four times as many
        with gzip.open(io.BytesIO(vocabulary)) as file:
            whole_lines = file.read(_USED_BYTES).rpartition(b"\n")[0].decode()
        merges = whole_lines.split("\n", NUM_MERGES + 1)[1 : NUM_MERGES + 1]
        # bytes as visible characters, the printable ones first, as GPT-2 orders them
        printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
        others = sorted(set(range(256)).difference(printable))
        self._character_of_byte = dict(zip(printable, map(chr, printable), strict=True))
        self._character_of_byte |= {byte: chr(256 + number) for number, byte in enumerate(others)}
        characters = [*self._character_of_byte.values()]
        ends = [f"{character}{_END_OF_WORD}" for character in characters]
        self.pieces = [*characters, *ends, *(merge.replace(" ", "") for merge in merges), START, END]
        self.ids = dict(zip(self.pieces, range(len(self.pieces)), strict=True))
        self._ranks = dict(zip(merges, range(len(merges)), strict=True))
        self._words: dict[str, tuple[int, ...]] = {}

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without those of start and end."""
        ids: list[int] = []
        # plain text needs no cleaning; ftfy and html may join, part or change words of anything else
        if text.isascii() and text.isprintable() and "&" not in text:
            for word in text.lower().split():
                ids += self._words.get(word) or self._ids_of_word(word)
            return ids
        for part in self._any_part.findall(clean_text(text, "lower")):
            ids += self._ids_of_part(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of ids, with a space after each word."""
        characters = "".join(self.pieces[token] for token in ids)
        byte_of_character = {character: byte for byte, character in self._character_of_byte.items()}
        return bytes(map(byte_of_character.__getitem__, characters)).decode(errors="replace").replace("</w>", " ")

    @cached_property
    def _any_part(self) -> Any:
        import regex  # only here, since most queries are plain, and it has classes of Unicode, which `re` lacks

        return regex.compile(_ANY_PART, regex.IGNORECASE)

    def _ids_of_word(self, word: str) -> tuple[int, ...]:
        # emptied rather than trimmed: the frequent words are back within a few batches
        if len(self._words) >= _MAX_CACHED_WORDS:
            self._words.clear()
        ids: list[int] = []
        # most words are one piece of letters alone, which needs no expression
        whole = self.ids.get(f"{word}{_END_OF_WORD}") if word.isalpha() else None
        if whole is not None:
            ids.append(whole)
        else:
            for part in _ASCII_PART.findall(word):
                ids += self._ids_of_part(part)
        pieces = self._words[word] = tuple(ids)
        # not read back: another thread may have emptied it since
        return pieces

    def _ids_of_part(self, part: str) -> list[int]:
        """The ids of what holds neither spaces nor both letters and signs."""
        if part in (START, END):
            return [self.ids[part]]
        shown = "".join(map(self._character_of_byte.__getitem__, part.encode()))
        # what the vocabulary has whole is left whole by its merges (there is a test), which take ten times as long
        whole = self.ids.get(f"{shown}{_END_OF_WORD}")
        return [whole] if whole is not None else [self.ids[piece] for piece in self._merge(shown)]

    def _merge(self, shown: str) -> list[str]:
        """The pieces of a word: the pair of neighbours with the lowest rank is joined until none has one."""
        pieces = [*shown[:-1], f"{shown[-1]}{_END_OF_WORD}"]
        rank_of = self._ranks.get
        while len(pieces) > 1:
            # each pair has a rank of its own, so that equal ranks are equal pairs
            ranks = [rank_of(f"{first} {second}", NUM_MERGES) for first, second in pairwise(pieces)]
            lowest = min(ranks)
            if lowest == NUM_MERGES:
                break
            joined: list[str] = []
            position = 0
            while position < len(pieces):
                # from left to right, so that of three equal pieces the first two are joined
                is_pair = position < len(ranks) and ranks[position] == lowest
                joined.append("".join(pieces[position : position + 2]) if is_pair else pieces[position])
                position += 2 if is_pair else 1
            pieces = joined
        return pieces


def clean_text(text: str, how: str) -> str:
    """A text as open_clip's tokenizers clean it: `lower`, `whitespace` (case is kept) or `canonicalize` (SigLIP's).

    Broken encodings and HTML entities are mended, white space becomes single; `canonicalize` also removes punctuation.
    """
    # of plain text all that would be left as it is
    if not (text.isascii() and text.isprintable() and "&" not in text):
        import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    if how == "canonicalize":
        text = text.replace("_", " ").translate(_WITHOUT_PUNCTUATION)
    if how != "whitespace":
        text = text.lower()
    return " ".join(text.split())
