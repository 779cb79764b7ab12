"""The same pictures and captions as an old and a new model embedded them, joined by uid.

What an upgrade costs and brings: recall on pairs, by an old model, by a new one, and by the new one on old rows.

The head of an upgrade: a change of basis of the new space, fitted so that its first block meets old rows.

An index whose rows are carried into the space of a head: padded with zeros, not embedded again.
"""

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from vlm import __version__
from vlm.data.samples import Captions
from vlm.errors import UsageError
from vlm.evaluation.retrieval import Retrieval, measure_retrieval
from vlm.files import atomic_folder, check_not_exists, compute_fingerprint
from vlm.index.ann.index_type import TuningParams
from vlm.index.ann.index_types import fall_back_to_flat
from vlm.index.catalog import write_catalogue
from vlm.index.embeddings import Embeddings, EmbeddingSpace, normalize_rows, open_vectors
from vlm.index.encoder import absolute_spec
from vlm.index.layout import IndexDetails, catalogue_file
from vlm.index.reader import IndexSnapshot, open_snapshot
from vlm.index.segments import WrittenSegment, write_segment
from vlm.index.writer import iter_live_blocks
from vlm.manifest import write_manifest
from vlm.models.variants import CompatibilityProjection
from vlm.tensors import Array, Float, Float32, Int64

logger = logging.getLogger(__name__)

MIN_IMAGES = 30


@dataclass(frozen=True, kw_only=True, eq=False)
class EmbeddingPairs:
    """Row n of `old_images` and of `new_images` is one picture, row t of `old_texts` and of `new_texts` one caption.

    owner: for each caption the number of its picture, rising. captions: their words.
    """

    old: EmbeddingSpace
    new: EmbeddingSpace
    old_images: Float32[Array, "N d"]
    new_images: Float32[Array, "N D"]
    old_texts: Float32[Array, "T d"]
    new_texts: Float32[Array, "T D"]
    image_of: Int64[Array, " T"]
    captions: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.old_images)

    def select(self, images: Int64[Array, " K"]) -> "EmbeddingPairs":
        """These pictures (numbers, rising) with their captions."""
        texts = np.flatnonzero(np.isin(self.image_of, images))
        return EmbeddingPairs(
            old=self.old,
            new=self.new,
            old_images=self.old_images[images],
            new_images=self.new_images[images],
            old_texts=self.old_texts[texts],
            new_texts=self.new_texts[texts],
            image_of=np.searchsorted(images, self.image_of[texts]),
            captions=tuple(self.captions[text] for text in texts),
        )

    def split(self, share: float, *, seed: int) -> tuple["EmbeddingPairs", "EmbeddingPairs"]:
        """All but a share of the pictures, drawn evenly, and that share.

        Raises:
            UsageError: either has too few pictures to fit or to measure anything.
        """
        order = np.random.default_rng(seed).permutation(len(self))
        held = round(share * len(self))
        if min(held, len(self) - held) < MIN_IMAGES:
            raise UsageError(
                f"{len(self):,} pictures are in both old and new embeddings; with {share:.0%} of them held out, fewer "
                f"than {MIN_IMAGES} are left on one side. Embed more with both models."
            )
        return self.select(np.sort(order[held:])), self.select(np.sort(order[:held]))

    def captions_of(self) -> list[list[str]]:
        """The captions of each picture; one after the other they are in the order of the texts."""
        grouped: list[list[str]] = [[] for _ in range(len(self))]
        for image_of, caption in zip(self.image_of.tolist(), self.captions, strict=True):
            grouped[image_of].append(caption)
        return grouped


def read_pairs(
    old_images: Path, new_images: Path, old_texts: Path, new_texts: Path, *, max_images: int, seed: int
) -> EmbeddingPairs:
    """The pairs of four embeddings folders; of more than `most` pictures so many are drawn.

    Raises:
        UsageError: a folder is of the wrong modality or model, or the folders are not of the same samples.
        VlmError: a folder is damaged.
    """
    folders = (old_images, new_images, old_texts, new_texts)
    sources = [Embeddings.open(folder, verify=True) for folder in folders]
    _check_spaces(sources)
    images = _UidJoin(sources[0], sources[1])
    texts = _UidJoin(sources[2], sources[3])
    names = images.names
    if len(names) > max_images:
        drawn = np.sort(np.random.default_rng(seed).permutation(len(names))[:max_images])
        names = [names[number] for number in drawn]
    number_of = {name: number for number, name in enumerate(names)}
    owned = [(number_of[image_of], name) for name, image_of in texts.owners() if image_of in number_of]
    owned.sort(key=lambda one: one[0])
    if not owned:
        raise UsageError(f"No caption of {old_texts} belongs to a picture of {old_images}: embed the same shards.")
    captions = [name for _, name in owned]
    return EmbeddingPairs(
        old=sources[0].space,
        new=sources[1].space,
        old_images=images.vectors(0, names),
        new_images=images.vectors(1, names),
        old_texts=texts.vectors(0, captions),
        new_texts=texts.vectors(1, captions),
        image_of=np.array([image_of for image_of, _ in owned], np.int64),
        captions=tuple(texts.caption_of(name) for name in captions),
    )


@dataclass(frozen=True, slots=True)
class _Row:
    """What is kept of an origin while folders are joined: where its vector lies, and what it shows or says."""

    row: int
    captions: Captions
    caption_number: int | None


class _UidJoin:
    """The rows of two folders that have the same uid, in the order of the first.

    Raises:
        UsageError: there are none, or one uid stands for different samples.
    """

    def __init__(self, old: Embeddings, new: Embeddings) -> None:
        self._sources = (old, new)
        self._rows = tuple(map(_pad_rows, self._sources))
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
            logger.info(f"Left out: {left[0]:,} rows only in {old.folder}, {left[1]:,} only in {new.folder}.")

    def owners(self) -> Iterator[tuple[str, str]]:
        """Each caption's uid with that of its picture."""
        for name in self.names:
            yield name, name.removesuffix(f"#{self._rows[0][name].caption_number}")

    def caption_of(self, name: str) -> str:
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
            found[here] = normalize_rows(open_vectors(source.folder, part)[wanted[here] - first])
            first += part.rows
        return found


def _pad_rows(source: Embeddings) -> dict[str, _Row]:
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


def measure_head(pairs: EmbeddingPairs, head: CompatibilityProjection, *, seed: int) -> dict[str, Retrieval]:
    """Recall by who asks and which rows answer; pictures asked by captions, and captions by pictures."""
    images, texts = project_through(head, pairs.new_images), project_through(head, pairs.new_texts)
    return {
        "old → old": _retrieve(pairs, pairs.old_images, pairs.old_texts, pairs.old_images, pairs.old_texts),
        "new → old": query_old_rows(pairs, head),
        "new → half new": query_mixed_rows(pairs, head, seed=seed),
        "new → new": _retrieve(pairs, images, texts, images, texts),
        "new → new, no head": _retrieve(pairs, pairs.new_images, pairs.new_texts, pairs.new_images, pairs.new_texts),
    }


def query_old_rows(pairs: EmbeddingPairs, head: CompatibilityProjection) -> Retrieval:
    """The new model asks old rows."""
    size = head.dimension
    return _retrieve(
        pairs,
        project_through(head, pairs.new_images),
        project_through(head, pairs.new_texts),
        pad_to(pairs.old_images, size),
        pad_to(pairs.old_texts, size),
    )


def query_mixed_rows(pairs: EmbeddingPairs, head: CompatibilityProjection, *, seed: int) -> Retrieval:
    """The new model asks rows of which half are its own.

    seed: of the half of the pictures that count as embedded again, with their captions.
    """
    images, texts = project_through(head, pairs.new_images), project_through(head, pairs.new_texts)
    again = np.random.default_rng(seed).permutation(len(pairs)) < len(pairs) // 2
    mixed_images = np.where(again[:, None], images, pad_to(pairs.old_images, head.dimension))
    mixed_texts = np.where(again[pairs.image_of][:, None], texts, pad_to(pairs.old_texts, head.dimension))
    return _retrieve(pairs, images, texts, mixed_images, mixed_texts)


def project_through(head: CompatibilityProjection, vectors: Float32[Array, "N D"]) -> Float32[Array, "N S"]:
    """Embeddings of the new model through the head."""
    return head(torch.from_numpy(vectors)).numpy()


def pad_to(vectors: Float32[Array, "N D"], dimension: int) -> Float32[Array, "N S"]:
    """Old rows as an upgraded index holds them."""
    return np.pad(vectors, ((0, 0), (0, dimension - vectors.shape[1])))


def _retrieve(
    pairs: EmbeddingPairs,
    query_images: Float32[Array, "N S"],
    query_texts: Float32[Array, "T S"],
    images: Float32[Array, "N S"],
    texts: Float32[Array, "T S"],
) -> Retrieval:
    """Captions ask for `images`, pictures for `texts`."""
    captions = pairs.captions_of()
    by_texts = measure_retrieval(images, query_texts, captions)
    by_images = measure_retrieval(query_images, texts, captions)
    return Retrieval(
        text_to_image=by_texts.text_to_image,
        image_to_text=by_images.image_to_text,
        num_images=by_texts.num_images,
        num_texts=by_texts.num_texts,
    )


PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
_CHOOSE_BY = 0.15


@dataclass(frozen=True, kw_only=True)
class RidgeChoice:
    """What was chosen, and what it reached on pictures that were kept out for choosing.

    penalty: of the ridge regression. recall: mean over both directions and over recall@1, 5, 10, on old rows and on
    rows of which half are new.
    """

    penalty: float
    recall: float


@dataclass(frozen=True, kw_only=True)
class FittedHead:
    """A head, and how it was chosen."""

    head: CompatibilityProjection
    choice: RidgeChoice


def fit_head(pairs: EmbeddingPairs, *, seed: int = 0) -> FittedHead:
    """The change of basis nearest to a ridge regression of old on new embeddings, with the penalty that recalls best.

    On real pairs it meets old rows better than the regression itself, and better than the Procrustes turn, to which it
    comes as the penalty grows (benchmarks/model_upgrade.py).

    Raises:
        UsageError: there are too few pictures.
    """
    fitting, choosing = pairs.split(_CHOOSE_BY, seed=seed)
    tried = []
    for penalty in PENALTIES:
        head = make_head(pairs, basis_change(predict_old(fitting, penalty)))
        recall = _mean_recall(query_old_rows(choosing, head), query_mixed_rows(choosing, head, seed=seed))
        tried.append(RidgeChoice(penalty=penalty, recall=recall))
    best = max(tried, key=lambda one: one.recall)
    return FittedHead(head=make_head(pairs, basis_change(predict_old(pairs, best.penalty))), choice=best)


def predict_old(pairs: EmbeddingPairs, penalty: float) -> Float[Array, "d D"]:
    """The matrix W with the least mean |W new - old|² + penalty |W|², pictures and captions weighing alike."""
    new, old = (
        np.concatenate([images / len(images) ** 0.5, texts / len(texts) ** 0.5]).astype(np.float64)
        for images, texts in ((pairs.new_images, pairs.new_texts), (pairs.old_images, pairs.old_texts))
    )
    return np.linalg.solve(new.T @ new + penalty * np.eye(new.shape[1]), new.T @ old).T


def basis_change(prediction: Float[Array, "d D"]) -> Float[Array, "S D"]:
    """The matrix with orthonormal columns whose first d rows are the polar factor of the prediction.

    Where D > d the other D - d rows span what the first ones leave out; S is the larger of d and D.
    """
    left, _, right = np.linalg.svd(prediction, full_matrices=True)
    common = min(prediction.shape)
    return np.concatenate([left[:, :common] @ right[:common], right[common:]])


def make_head(pairs: EmbeddingPairs, matrix: Float[Array, "S D"]) -> CompatibilityProjection:
    """A head of the models of the pairs."""
    return CompatibilityProjection(
        matrix=torch.from_numpy(matrix.astype(np.float32)),
        old_dimension=pairs.old.dimension,
        old=pairs.old.fingerprint,
        new=pairs.new.fingerprint,
        model=pairs.new.model,
    )


def _mean_recall(*found: Retrieval) -> float:
    directions = [direction for one in found for direction in (one.text_to_image, one.image_to_text)]
    return float(np.mean([value for direction in directions for value in direction.recall.values()]))


_FIRST_GENERATION = 1


@dataclass(frozen=True, kw_only=True)
class UpgradeSummary:
    """The index that was made: its rows are those that lived, `dimension` the length they were padded to."""

    folder: str
    kind: str
    rows: int
    old_dimension: int
    dimension: int
    seconds: float


def upgrade_index(index: Path, out: Path, head: CompatibilityProjection, *, head_spec: str) -> UpgradeSummary:
    """A new index folder in the space of the head, with the living rows of `index` under their numbers.

    A row keeps its stored numbers, followed by zeros, so that cosines between old rows stay what they were. Kind and
    tuning stay as they were wished for; what a planner found is dropped, for it was measured with the old model.

    Args:
        head_spec: what the head was read from; kept absolute, so that a search finds it again.

    Raises:
        UsageError: the index is of another space than the head's old one, or `out` exists.
        VlmError: the index is damaged.
    """
    started = time.perf_counter()
    check_not_exists(out)
    snapshot = open_snapshot(index)
    _require_old_space(snapshot, head)
    with atomic_folder(out) as folder:
        written = _write_rows(folder, snapshot, head) if len(snapshot) else None
        catalogue = catalogue_file(_FIRST_GENERATION)
        write_catalogue(folder / catalogue, snapshot.entries(), generation=_FIRST_GENERATION)
        space = replace(
            snapshot.details.space,
            model=absolute_spec(head_spec),
            fingerprint=head.fingerprint,
            dimension=head.dimension,
        )
        _write_manifest(folder, snapshot, space, written)
    snapshot.catalogue.close()
    return UpgradeSummary(
        folder=str(out),
        kind=written.segment.kind if written else snapshot.details.kind,
        rows=len(snapshot),
        old_dimension=head.old_dimension,
        dimension=head.dimension,
        seconds=time.perf_counter() - started,
    )


def _require_old_space(snapshot: IndexSnapshot, head: CompatibilityProjection) -> None:
    space = snapshot.details.space
    if space.fingerprint != head.old:
        hint = " It was carried over by this head already." if space.fingerprint == head.fingerprint else ""
        raise UsageError(
            f"{snapshot.folder} was embedded by {space.model} (fingerprint {space.fingerprint}), "
            "the head was fitted to "
            f"rows of a model with fingerprint {head.old}.{hint} Fit one to embeddings of {space.model}."
        )
    if space.dimension != head.old_dimension:
        raise UsageError(
            f"The rows of {snapshot.folder} have {space.dimension} dimensions, "
            f"the head was fitted to {head.old_dimension}."
        )


def _write_rows(folder: Path, snapshot: IndexSnapshot, head: CompatibilityProjection) -> WrittenSegment:
    def write(kind: str, tuning: TuningParams) -> WrittenSegment:
        blocks = chain(*map(iter_live_blocks, snapshot.views))
        padded = _padded(blocks, head.dimension - head.old_dimension)
        return write_segment(folder, 0, padded, snapshot.rows, dimension=head.dimension, kind=kind, tuning=tuning)

    details = snapshot.details
    return fall_back_to_flat(write, details.kind, len(snapshot), TuningParams(**details.tuning))


def _padded(blocks: Iterable[Float[Array, "_ D"]], extra: int) -> Iterator[Float[Array, "_ S"]]:
    for block in blocks:
        yield np.pad(block, ((0, 0), (0, extra)))


def _write_manifest(
    folder: Path, snapshot: IndexSnapshot, space: EmbeddingSpace, written: WrittenSegment | None
) -> None:
    files = written.files if written else {}
    details: IndexDetails = replace(
        snapshot.details,
        space=space,
        catalogue=catalogue_file(_FIRST_GENERATION),
        segments=(written.segment,) if written else (),
        next_segment=1,
        tombstones="",
        evidence={},
    )
    checksums = [files[name].sha256 for name in sorted(files)]
    manifest = replace(
        snapshot.manifest,
        fingerprint=compute_fingerprint(snapshot.manifest.fingerprint, "upgrade", space.fingerprint, *checksums),
        generation=_FIRST_GENERATION,
        counts={"rows": len(snapshot), "dead": 0},
        configuration={"index": str(snapshot.folder.absolute()), "head": space.model},
        inputs=snapshot.manifest.inputs | {"model": space.fingerprint, "index": snapshot.manifest.fingerprint},
        files=files,
        details=asdict(details),
        made_by=f"vlm {__version__}",
        made_at="",
        command="",
    )
    write_manifest(folder, manifest)
