"""The same pictures and captions as an old and a new model embedded them, joined by uid."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlm.console import say
from vlm.data.samples import Captions
from vlm.errors import UsageError
from vlm.index.embeddings import Embeddings, Space, unit_rows
from vlm.index.parts import open_vectors
from vlm.tensors import Array, Float32, Int64

LEAST_PICTURES = 30


@dataclass(frozen=True, kw_only=True, eq=False)
class Pairs:
    """Row n of `old_images` and of `new_images` is one picture, row t of `old_texts` and of `new_texts` one caption.

    owner: for each caption the number of its picture, rising. captions: their words.
    """

    old: Space
    new: Space
    old_images: Float32[Array, "N d"]
    new_images: Float32[Array, "N D"]
    old_texts: Float32[Array, "T d"]
    new_texts: Float32[Array, "T D"]
    owner: Int64[Array, " T"]
    captions: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.old_images)

    def choose(self, pictures: Int64[Array, " K"]) -> "Pairs":
        """These pictures (numbers, rising) with their captions."""
        texts = np.flatnonzero(np.isin(self.owner, pictures))
        return Pairs(
            old=self.old,
            new=self.new,
            old_images=self.old_images[pictures],
            new_images=self.new_images[pictures],
            old_texts=self.old_texts[texts],
            new_texts=self.new_texts[texts],
            owner=np.searchsorted(pictures, self.owner[texts]),
            captions=tuple(self.captions[text] for text in texts),
        )

    def split(self, share: float, *, seed: int) -> tuple["Pairs", "Pairs"]:
        """All but a share of the pictures, drawn evenly, and that share.

        Raises:
            UsageError: either has too few pictures to fit or to measure anything.
        """
        order = np.random.default_rng(seed).permutation(len(self))
        held = round(share * len(self))
        if min(held, len(self) - held) < LEAST_PICTURES:
            raise UsageError(
                f"{len(self):,} pictures are in both old and new embeddings; with {share:.0%} of them held out, fewer "
                f"than {LEAST_PICTURES} are left on one side. Embed more with both models."
            )
        return self.choose(np.sort(order[held:])), self.choose(np.sort(order[:held]))

    def captions_of(self) -> list[list[str]]:
        """The captions of each picture; one after the other they are in the order of the texts."""
        grouped: list[list[str]] = [[] for _ in range(len(self))]
        for owner, caption in zip(self.owner.tolist(), self.captions, strict=True):
            grouped[owner].append(caption)
        return grouped


def read_pairs(old_images: Path, new_images: Path, old_texts: Path, new_texts: Path, *, most: int, seed: int) -> Pairs:
    """The pairs of four embeddings folders; of more than `most` pictures so many are drawn.

    Raises:
        UsageError: a folder is of the wrong modality or model, or the folders are not of the same samples.
        VlmError: a folder is damaged.
    """
    folders = (old_images, new_images, old_texts, new_texts)
    sources = [Embeddings.open(folder, verify=True) for folder in folders]
    _check_spaces(sources)
    images = _Join(sources[0], sources[1])
    texts = _Join(sources[2], sources[3])
    names = images.names
    if len(names) > most:
        drawn = np.sort(np.random.default_rng(seed).permutation(len(names))[:most])
        names = [names[number] for number in drawn]
    number_of = {name: number for number, name in enumerate(names)}
    owned = [(number_of[owner], name) for name, owner in texts.owners() if owner in number_of]
    owned.sort(key=lambda one: one[0])
    if not owned:
        raise UsageError(f"No caption of {old_texts} belongs to a picture of {old_images}: embed the same shards.")
    captions = [name for _, name in owned]
    return Pairs(
        old=sources[0].space,
        new=sources[1].space,
        old_images=images.vectors(0, names),
        new_images=images.vectors(1, names),
        old_texts=texts.vectors(0, captions),
        new_texts=texts.vectors(1, captions),
        owner=np.array([owner for owner, _ in owned], np.int64),
        captions=tuple(texts.words(name) for name in captions),
    )


@dataclass(frozen=True, slots=True)
class _Row:
    """What is kept of an origin while folders are joined: where its vector lies, and what it shows or says."""

    row: int
    captions: Captions
    caption_number: int | None


class _Join:
    """The rows of two folders that have the same uid, in the order of the first.

    Raises:
        UsageError: there are none, or one uid stands for different samples.
    """

    def __init__(self, old: Embeddings, new: Embeddings) -> None:
        self._sources = (old, new)
        self._rows = tuple(map(_rows_of, self._sources))
        ours, theirs = self._rows
        self.names = [uid for uid in ours if uid in theirs]
        if not self.names:
            raise UsageError(
                f"{old.folder} and {new.folder} have no uid in common: embed the same shards by both models."
            )
        for name in self.names:
            if ours[name].captions != theirs[name].captions:
                raise UsageError(
                    f"{name!r} has the captions {ours[name].captions} in {old.folder} and {theirs[name].captions} in "
                    f"{new.folder}: they are of different samples. Embed the same shards by both models."
                )
        left = [len(rows) - len(self.names) for rows in self._rows]
        if any(left):
            say(f"Left out: {left[0]:,} rows only in {old.folder}, {left[1]:,} only in {new.folder}.")

    def owners(self) -> Iterator[tuple[str, str]]:
        """Each caption's uid with that of its picture."""
        for name in self.names:
            yield name, name.removesuffix(f"#{self._rows[0][name].caption_number}")

    def words(self, name: str) -> str:
        """The one caption of a text row."""
        return next(text for texts in self._rows[0][name].captions.values() for text in texts)

    def vectors(self, side: int, names: list[str]) -> Float32[Array, "N D"]:
        """The unit vectors of these rows in folder `side`, in their order."""
        source = self._sources[side]
        wanted = np.array([self._rows[side][name].row for name in names], np.int64)
        found = np.empty((len(names), source.dimension), np.float32)
        first = 0
        for part in source.parts:
            here = np.flatnonzero((wanted >= first) & (wanted < first + part.rows))
            found[here] = unit_rows(open_vectors(source.folder, part)[wanted[here] - first])
            first += part.rows
        return found


def _rows_of(source: Embeddings) -> dict[str, _Row]:
    rows = {
        origin.uid: _Row(row, origin.captions, origin.caption_number) for row, origin in enumerate(source.origins())
    }
    if len(rows) < len(source):
        raise UsageError(f"{source.folder} has a uid twice: embed again with distinct keys.")
    return rows


def _check_spaces(sources: list[Embeddings]) -> None:
    """Refuse folders of the wrong kind, or of more than two models."""
    old_images, new_images, old_texts, new_texts = sources
    for source, modality in zip(sources, ("image", "image", "text", "text"), strict=True):
        if source.space.modality != modality:
            raise UsageError(
                f"{source.folder} holds {source.space.modality} embeddings, {modality} ones are needed here."
            )
    for images, texts in ((old_images, old_texts), (new_images, new_texts)):
        if images.space.fingerprint != texts.space.fingerprint:
            raise UsageError(
                f"{images.folder} was embedded by {images.space.model} (fingerprint {images.space.fingerprint}), "
                f"{texts.folder} by {texts.space.model} (fingerprint {texts.space.fingerprint}): pictures and captions "
                "must be of one model."
            )
    if old_images.space.fingerprint == new_images.space.fingerprint:
        raise UsageError(
            f"{old_images.folder} and {new_images.folder} are of the same model: there is nothing to upgrade."
        )
