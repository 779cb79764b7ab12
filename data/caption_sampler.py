"""Which of a sample's captions is shown: drawn by language and probability, whole or one sentence of it.

`CaptionMix` draws some of them from new captions in a folder beside the shards. `vlm caption MODEL SHARDS` writes it
(`vlm.index.recaption`): one Parquet table for each shard, a row for each sample in the order of the tar. Shards are
known by their content, so they may be moved or renamed, and a run may read some of them only.
"""

import logging
import math
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vlm.data.sampler import LruCache
from vlm.data.samples import (
    TAGS,
    UNNAMED,
    Captions,
    RandomSource,
    Sample,
    metadata_value,
    parse_tags,
    random_below,
    select_languages,
    shuffled,
)
from vlm.data.shard_cache import ShardCache
from vlm.data.tar import ShardReader, open_index
from vlm.errors import BadSample, UsageError, VlmError
from vlm.manifest import Manifest, damage_as_error, read_manifest

logger = logging.getLogger(__name__)

_WEIGHTS = "caption_weights"
# a Latin mark ends a sentence only before a space (3.5 stays whole), a CJK mark always, the last of a row
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=\S)|(?<=[。！？])(?![.!?。！？])")


class SampledCaption(NamedTuple):
    """A caption as it was drawn.

    number: its position among all captions of the sample, languages in their order; -1 for tags.
    """

    text: str
    language: str
    number: int


@dataclass(frozen=True, kw_only=True)
class CaptionSampler:
    """Draws one caption of a sample.

    languages: drawn from, uniformly or by `language_weights`; empty uses the first one of each sample.
        `tags` means the sample's tags, joined in a random order. Any group of captions stored under a name
        (`captions_synthetic`) is requested like a language.
    tag_fields: metadata fields, dots selecting nested ones, whose values are tags as well.
    sentences: of the drawn caption, show one sentence, drawn uniformly (DreamLIP's sub-captions).

    Within a language captions are drawn uniformly, or by the sample's own `caption_weights`: a list next to
    `captions`, or lists by language.
    """

    languages: tuple[str, ...] = ()
    language_weights: tuple[float, ...] = ()
    tag_fields: tuple[str, ...] = ()
    sentences: bool = False

    def __post_init__(self) -> None:
        if self.tag_fields and TAGS not in self.languages:
            raise UsageError(
                f"tag_fields = {self.tag_fields} are shown where tags are requested; give --languages en {TAGS}, with "
                "the languages of your captions."
            )
        if self.language_weights and len(self.language_weights) != len(self.languages):
            raise UsageError(
                f"{len(self.language_weights)} language_weights for {len(self.languages)} languages; give one each."
            )
        if len(set(self.languages)) < len(self.languages):
            raise UsageError(f"languages = {self.languages} names one twice; name each once, with a weight if needed.")
        if self.language_weights and (min(self.language_weights) < 0 or not 0 < sum(self.language_weights) < math.inf):
            raise UsageError(f"language_weights = {self.language_weights}: give numbers of at least 0, not all 0.")

    def __call__(self, sample: Sample, rng: RandomSource) -> SampledCaption:
        """Draw one caption.

        Raises:
            BadSample: there is none in the requested languages, or its weights do not fit.
        """
        captions = sample.captions
        if not self.languages and captions and _WEIGHTS not in sample.metadata:
            return self._draw_from_first(captions, rng)
        tags = self.tags_of(sample.metadata) if TAGS in self.languages else ()
        if tags:
            # a new dictionary: the numbers of captions are counted in the one that was stored
            captions = captions | {TAGS: (", ".join(shuffled(tags, rng)),)}

        # the language, then the caption, then the sentence: in another order a seed would give other captions
        candidates = select_languages(captions, self.languages)
        language_weights = self._weights_of(tuple(candidates))
        language = list(candidates)[_weighted_index(rng, language_weights, len(candidates))]
        texts = candidates[language]
        # captions that do not name their language are stored under none, but may have been requested under one
        stored_language = language if language in sample.captions or language == TAGS else UNNAMED
        position = _weighted_index(rng, _caption_weights(sample, stored_language, len(texts)), len(texts))
        text = texts[position]
        if self.sentences:
            sentences = split_sentences(text)
            text = sentences[random_below(rng, len(sentences))]
        number = _caption_index(sample.captions, stored_language, position)
        return SampledCaption(text=text, language=language, number=number)

    def tags_of(self, metadata: Mapping[str, Any]) -> tuple[str, ...]:
        """A sample's tags, and the texts and numbers in its `tag_fields`, each once."""
        tags = dict.fromkeys(parse_tags(metadata))
        for name in self.tag_fields:
            tags |= dict.fromkeys(_texts_of(metadata_value(metadata, name)))
        return tuple(tags)

    def _draw_from_first(self, captions: Captions, rng: RandomSource) -> SampledCaption:
        """As `__call__` where no language is requested and no weights are given, which is nearly always."""
        rng.random()  # of the one language, as where there are several
        language, texts = next(iter(captions.items()))
        position = random_below(rng, len(texts))
        text = texts[position]
        if self.sentences:
            sentences = split_sentences(text)
            text = sentences[random_below(rng, len(sentences))]
        return SampledCaption(text, language, position)

    def sentences_of(self, sample: Sample) -> list[str]:
        """The different sentences of all captions in the requested languages, in their order; tags have none."""
        requested = tuple(language for language in self.languages if language != TAGS)
        if self.languages and not requested:
            return []
        weights = dict(zip(self.languages, self.language_weights, strict=False))
        try:
            captions = select_languages(sample.captions, requested)
        except BadSample:
            return []
        sentences: dict[str, None] = {}  # as an ordered set
        for language, texts in captions.items():
            if weights.get(language, 1) > 0:
                for text in texts:
                    sentences.update(dict.fromkeys(split_sentences(text)))
        return list(sentences)

    def _weights_of(self, candidates: tuple[str, ...]) -> list[float] | None:
        if not self.language_weights:
            return None
        by_language = dict(zip(self.languages, self.language_weights, strict=True))
        weights = [by_language[language] for language in candidates]
        if sum(weights) <= 0:
            raise BadSample("no caption", f"only in languages of weight 0: {candidates}")
        return weights


def _texts_of(value: Any) -> list[str]:
    """A text or number, or a list of them, as texts."""
    texts: list[str] = []
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, float) and not math.isfinite(each):
            continue  # what a table has in place of a number it lacks
        # true and false say nothing without the name of their field
        if isinstance(each, str | int | float) and not isinstance(each, bool) and (text := str(each).strip()):
            texts.append(text)
    return texts


def warn_of_unseen_fields(names: Sequence[str], shard: str, cache: ShardCache | None = None) -> None:
    """Warn of fields that no sample of a shard has: a misspelt one would never be shown, and nothing would tell."""
    unseen = set(names)
    found: set[str] = set()
    with closing(ShardReader(shard, cache)) as reader:
        for number in range(len(reader)):
            try:
                _, _, metadata = reader.read_words(number)
            except BadSample:
                continue
            found |= metadata.keys()
            unseen = {name for name in unseen if not _texts_of(metadata_value(metadata, name))}
            if not unseen:
                return
    for name in sorted(unseen):
        logger.warning(
            f"No sample of {shard} has a text or number in the field {name!r}, which --tag-fields names; its fields "
            f"are {', '.join(sorted(found)) or 'none at all'}."
        )


def split_sentences(text: str) -> list[str]:
    """The sentences of a caption; a text without an end mark is one.

    It is split after . ! ? before a space, and after 。！？ anywhere; several marks in a row end one sentence.
    Abbreviations are not known: "Dr. Smith" is split too.

    >>> split_sentences("A dog runs. It is wet!")
    ['A dog runs.', 'It is wet!']
    """
    return list(filter(None, map(str.strip, _SENTENCE_END.split(text)))) or [text]


def _weighted_index(rng: RandomSource, weights: list[float] | None, number: int) -> int:
    if weights is None:
        return random_below(rng, number)
    # the bound guards against rounding: the product may reach the last end itself
    ends = list(accumulate(weights))
    return min(bisect_right(ends, rng.random() * ends[-1]), number - 1)


def _caption_weights(sample: Sample, language: str, number: int) -> list[float] | None:
    raw = sample.metadata.get(_WEIGHTS)
    if raw is None or language == TAGS:
        return None
    weights = raw.get(language) if isinstance(raw, dict) else raw
    # a plain list of weights goes with `captions`, which is the first language of the sample
    if weights is None or (isinstance(raw, list) and language != next(iter(sample.captions))):
        return None
    try:
        numbers = list(map(float, weights))
        is_valid = len(numbers) == number and min(numbers) >= 0 and 0 < sum(numbers) < math.inf
    except (TypeError, ValueError, OverflowError):
        numbers = []
        is_valid = False
    if not is_valid:
        preview = repr(weights)[:80]
        raise BadSample("bad caption weights", f"{number} weights of at least 0 needed for {language!r}: {preview}")
    return numbers


def _caption_index(captions: Captions, language: str, position: int) -> int:
    if language == TAGS:
        return -1
    num_before = 0
    for name, texts in captions.items():
        if name == language:
            break
        num_before += len(texts)
    return num_before + position


if TYPE_CHECKING:
    import pyarrow

KIND = "captions"
SIDECAR_LANGUAGE = "sidecar"
"""The language that a caption from a sidecar is reported under."""

# of the shards in the shuffling window; a table of 10,000 captions takes about a megabyte
_MAX_OPEN_TABLES = 64


class SidecarShard(NamedTuple):
    """A shard as the manifest names it. fingerprint: of its keys and sizes. path: of its table, in the folder."""

    shard: str
    fingerprint: str
    path: str
    samples: int


@dataclass(frozen=True, kw_only=True)
class CaptionSidecar:
    """A finished folder of captions."""

    folder: Path
    manifest: Manifest
    shards: tuple[SidecarShard, ...]

    @classmethod
    def open(cls, folder: Path) -> "CaptionSidecar":
        """Open a folder that `vlm caption` finished.

        Raises:
            UsageError: there is none, it is unfinished, or holds something else.
            VlmError: its manifest is damaged.
        """
        if not folder.is_dir():
            raise UsageError(
                f"There are no captions at {str(folder)!r}; vlm caption MODEL SHARDS writes such a folder."
            )
        manifest = read_manifest(folder, KIND)
        with damage_as_error(folder):
            shards = tuple(SidecarShard(**values) for values in manifest.details["shards"])
        return cls(folder=folder, manifest=manifest, shards=shards)

    def tables_of(self, shards: Sequence[str], cache: ShardCache | None = None) -> list[Path]:
        """The table of each of these shards.

        Raises:
            UsageError: the captions are of other shards; the first one without captions is named.
            VlmError: a table is missing.
        """
        by_content = {shard.fingerprint: shard for shard in self.shards}
        tables: list[Path] = []
        for shard in shards:
            own = by_content.get(open_index(shard, cache).fingerprint)
            if own is None:
                raise UsageError(
                    f"{self.folder} holds captions of other shards: {shard} is none of the {len(self.shards):,} it was "
                    f"made from ({self.shards[0].shard}, …). Run vlm caption MODEL with these shards and another --out."
                )
            path = self.folder / own.path
            if not path.is_file():
                raise VlmError(f"{path} is missing; run the same vlm caption again, which writes it anew.")
            tables.append(path)
        return tables


class MixedShard(NamedTuple):
    """The captions for a shard, and with which probability one of them is shown."""

    table: Path
    probability: float


@dataclass(frozen=True, kw_only=True)
class CaptionMix:
    """Draws captions from sidecars in place of those in the shards.

    shards: by the number of the shard; None where the shard's own captions are all there is.
    """

    shards: tuple[MixedShard | None, ...]
    _tables: LruCache = field(default_factory=lambda: LruCache(_MAX_OPEN_TABLES), repr=False, compare=False)

    def draw(self, shard: int, number: int, key: str, rng: RandomSource) -> SampledCaption | None:
        """One of the new captions, drawn uniformly; None where the sample keeps its own.

        That is with the rest of the probability, and where the captioner could not use the image.

        Raises:
            VlmError: the table is damaged, or its row belongs to another sample.
        """
        mixed = self.shards[shard]
        if mixed is None or rng.random() >= mixed.probability:
            return None
        table = self._tables.get(mixed.table, lambda: read_captions(mixed.table))
        if number >= len(table) or table.column("key")[number].as_py() != key:
            raise VlmError(
                f"{mixed.table} has no captions of sample {number}, {key!r}: it is of other shards; run vlm caption "
                "again with another --out."
            )
        texts: list[str] = table.column("captions")[number].as_py()
        if not texts:
            return None
        return SampledCaption(texts[random_below(rng, len(texts))], SIDECAR_LANGUAGE, -1)


def read_captions(path: Path) -> "pyarrow.Table":
    """The rows of a shard: key, captions and their log-likelihoods, in the order of the tar.

    Raises:
        VlmError: it cannot be read.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        # in one piece, so that a row is found at once
        return parquet.read_table(path).combine_chunks()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise VlmError(f"{path} cannot be read ({error}); run the same vlm caption again.") from error
