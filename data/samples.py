"""What travels through the data rooms: a pair on its way into a shard, a sample on its way out."""

from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence

from vlm.errors import BadSample

UNNAMED = ""
"""The language of captions that do not say theirs."""

Captions = dict[str, tuple[str, ...]]
"""Captions by language code; `UNNAMED` where none is given."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A picture with its captions, as a source gives it to `vlm pack`.

    key: unlike that of any other pair of its source, without a dot.
    image: the encoded file as it was found, of any kind.
    metadata: plain JSON values, kept in `key.json`. arrays: kept as `key.NAME.npy`.
    """

    key: str
    image: bytes
    captions: Captions
    metadata: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sample as it lies in a shard: encoded picture, captions, metadata, and the stored arrays asked for."""

    key: str
    image: bytes
    captions: Captions
    metadata: dict[str, Any]
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


def captions_of(text: str | None, metadata: dict[str, Any]) -> Captions:
    """Captions from the `key.txt` and `key.json` of a sample.

    Read in this order: `captions` (a list, or lists by language) with any `captions_LANGUAGE` beside it;
    the text file; `caption` (img2dataset).

    >>> captions_of(None, {"captions": ["a dog"], "captions_zh": ["狗"]})
    {'': ('a dog',), 'zh': ('狗',)}
    """
    given = metadata.get("captions")
    if isinstance(given, dict):
        found = {str(language): _texts(texts) for language, texts in given.items()}
    else:
        found = {UNNAMED: _texts(given) or _texts(text) or _texts(metadata.get("caption"))}
    for name, value in metadata.items():
        if name.startswith("captions_"):
            found[name.removeprefix("captions_")] = _texts(value)
    return {language: texts for language, texts in found.items() if texts}


def select_languages(captions: Captions, languages: tuple[str, ...]) -> Captions:
    """The captions in the asked languages; without a wish, those of the first language.

    Captions that do not name their language count as the first one asked for.

    Raises:
        BadSample: none is left.
    """
    if not languages:
        chosen = dict(list(captions.items())[:1])
    else:
        named = {languages[0] if language == UNNAMED else language: texts for language, texts in captions.items()}
        chosen = {language: named[language] for language in languages if language in named}
    if not chosen:
        raise BadSample("no caption", f"languages asked {languages or 'any'}, found {tuple(captions)}")
    return chosen


def sample_rng(seed: int, epoch: int, key: str, repeat: int = 0) -> np.random.Generator:
    """The generator of every random choice about one sample at one visit (crop, caption, language).

    repeat: which visit of the sample in this epoch, from 0, where a selection asks for several.
    """
    visit = f"{seed}/{epoch}/{key}/{repeat}" if repeat else f"{seed}/{epoch}/{key}"
    digest: Any = _Digest(visit)  # what numpy takes, though its annotations do not say so
    return np.random.Generator(np.random.SFC64(digest))


class _Digest(ISeedSequence):
    """A generator's first state out of a SHA-256, in a fifth of the time numpy takes to stretch a number to it."""

    def __init__(self, text: str) -> None:
        self._digest = sha256(text.encode(errors="surrogatepass")).digest()

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        return np.frombuffer(self._digest, np.dtype(dtype).newbyteorder("<"), n_words).astype(dtype, copy=False)


def _texts(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list | tuple):
        return ()
    return tuple([stripped for text in value if isinstance(text, str) and (stripped := text.strip())])
