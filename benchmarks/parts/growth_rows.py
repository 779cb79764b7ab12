"""Rows for the index size benchmark: synthetic vectors with captions and typed metadata, streamed into a folder."""

from collections.abc import Iterator
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from index_vectors import Mixture

from vlm.index.embeddings_folder import EmbeddingSpace, EmbeddingsWriter, Origin
from vlm.tensor_types import Array, Float32

_ROWS_A_PART = 50_000
_QUESTIONS = "questions.npy"
_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
_WORDS = [first + second for first in _SYLLABLES for second in _SYLLABLES]
_LANGUAGES = ("en", "en", "en", "en", "en", "de", "de", "de", "fr", "fr")
_CAPTION_WORDS, _TAGS = 8, 200


def write_rows(
    folder: Path, rows: int, mixture: Mixture, *, dimension: int, name: str, seed: int, questions: int = 0
) -> None:
    """Write an embeddings folder of `rows` rows, or resume it; next to it, texts about some of the first rows.

    name: prefix of the uids. Memory: one part of 50,000 rows.
    """
    space = EmbeddingSpace(model="drawn", fingerprint="drawn", dimension=dimension, modality="image")
    writer = EmbeddingsWriter(folder, space=space, identity={"rows": rows, "seed": seed})
    for number in range(len(writer.parts), ceil(rows / _ROWS_A_PART)):
        first, generator = number * _ROWS_A_PART, np.random.default_rng((seed, number))
        count = min(_ROWS_A_PART, rows - first)
        vectors, texts = mixture.draw(count, 0 if number else questions, generator)
        if not number:
            np.save(folder / _QUESTIONS, texts)
        shard = f"/drawn/{name}-{number:05d}.tar"
        writer.add(shard, vectors, list(_origins(shard, name, first, count, generator)))
    writer.finish(inputs={}, details={"shards": [part.shard for part in writer.parts]})


def read_questions(folder: Path) -> Float32[Array, "Q D"]:
    """The texts that `write_rows` wrote."""
    return np.load(folder / _QUESTIONS)


def _origins(shard: str, name: str, first: int, count: int, generator: np.random.Generator) -> Iterator[Origin]:
    """Captions of eight words and metadata; word and tag frequencies follow a power law, as in language."""
    words = (len(_WORDS) ** generator.random((count, _CAPTION_WORDS))).astype(int)
    tags = (_TAGS ** generator.random((count, 3))).astype(int)
    num_tags, language = generator.integers(0, 4, count), generator.integers(0, len(_LANGUAGES), count)
    width, year = (100 * 40 ** generator.random(count)).astype(int), generator.integers(1990, 2026, count)
    for place in range(count):
        caption = " ".join(_WORDS[word] for word in words[place])
        metadata: dict[str, Any] = {
            "width": int(width[place]),
            "year": int(year[place]),
            "tags": sorted({_WORDS[tag] for tag in tags[place, : num_tags[place]]}),
        }
        yield Origin(
            uid=f"{name}{first + place:09d}",
            key=f"{name}{first + place:09d}",
            shard=shard,
            number=place,
            image_offset=1536 + 20_480 * place,
            image_size=18_000,
            caption_number=None,
            captions={_LANGUAGES[language[place]]: (caption,)},
            metadata=metadata,
        )
