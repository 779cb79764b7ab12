"""What travels through the data rooms: a pair on its way into a shard, a sample on its way out."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlm.errors import BadSample
from vlm.files import fingerprint_of

UNNAMED = ""
"""The language of captions that do not say theirs."""

Captions = dict[str, tuple[str, ...]]
"""Captions by language code; `UNNAMED` where none is given."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A picture with its captions, as a source gives it to `vlm pack`.

    key: unlike that of any other pair of its source, without a dot.
    image: the encoded file as it was found, of any kind.
    metadata: plain JSON values, kept in `key.json`.
    """

    key: str
    image: bytes
    captions: Captions
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sample as it lies in a shard: encoded picture, captions, metadata."""

    key: str
    image: bytes
    captions: Captions
    metadata: dict[str, Any]


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


def draw_caption(captions: Captions, languages: tuple[str, ...], rng: np.random.Generator) -> str:
    """One caption: a language drawn evenly, then a caption of it drawn evenly."""
    by_language = list(select_languages(captions, languages).values())
    texts = by_language[int(rng.integers(len(by_language)))]
    return texts[int(rng.integers(len(texts)))]


def sample_rng(seed: int, epoch: int, key: str) -> np.random.Generator:
    """The generator of every random choice about one sample in one epoch (crop, caption, language)."""
    return np.random.Generator(np.random.SFC64(int(fingerprint_of(f"{seed}/{epoch}/{key}"), 16)))


def _texts(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list | tuple):
        return ()
    return tuple(text.strip() for text in value if isinstance(text, str) and text.strip())
