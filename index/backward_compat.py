"""A new model for an old index: its head is fitted to pairs that both models embedded, and the index is migrated.

`read_pairs` joins the embeddings of an old and a new model by uid, `fit_head` fits a projection of the new space whose
first dimensions meet the old rows, `measure_head` compares recall with and without it, and `upgrade_index` pads the
stored rows with zeros into the new space, so that nothing is embedded again.
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
from vlm.evaluation.retrieval_metrics import RetrievalResult, measure_retrieval
from vlm.files import atomic_folder, check_not_exists, compute_fingerprint
from vlm.index.ann.index_types import TuningParams, fall_back_to_flat
from vlm.index.catalog import write_catalogue
from vlm.index.embeddings_folder import Embeddings, EmbeddingSpace
from vlm.index.ids import UID_COLUMN
from vlm.index.index_files import FIRST_VERSION, IndexDetails, catalogue_file, write_link_queries
from vlm.index.reader import IndexSnapshot, open_snapshot
from vlm.index.segments import WrittenSegment, write_segment
from vlm.index.writer import iter_live_blocks
from vlm.manifest import sorted_checksums, write_manifest
from vlm.model_spec import absolute_spec
from vlm.models.variants import CompatibilityProjection
from vlm.results import Result
from vlm.tensor_types import Array, Float, Float32, Int64

logger = logging.getLogger(__name__)

MIN_IMAGES = 30


@dataclass(frozen=True, kw_only=True, eq=False)
class EmbeddingPairs:
    """Row n of `old_images` and of `new_images` is one image, row t of `old_texts` and of `new_texts` one caption.

    image_of: for each caption the number of its image, ascending. captions: their texts.
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
        """These images (numbers, ascending) with their captions."""
        texts = np.flatnonzero(np.isin(self.image_of, images))
        return EmbeddingPairs(
            old=self.old,
            new=self.new,
            old_images=self.old_images[images],
            new_images=self.new_images[images],
            old_texts=self.old_texts[texts],
            new_texts=self.new_texts[texts],
            # image numbers now count within the selection
            image_of=np.searchsorted(images, self.image_of[texts]),
            captions=tuple(self.captions[text] for text in texts),
        )

    def split(self, share: float, *, seed: int) -> tuple["EmbeddingPairs", "EmbeddingPairs"]:
        """All but a random share of the images, and that share.

        Raises:
            UsageError: either has too few images to fit or measure anything.
        """
        order = np.random.default_rng(seed).permutation(len(self))
        num_held_out = round(share * len(self))
        if min(num_held_out, len(self) - num_held_out) < MIN_IMAGES:
            raise UsageError(
                f"{len(self):,} images are in both old and new embeddings; with {share:.0%} of them held out, fewer "
                f"than {MIN_IMAGES} are left on one side. Embed more with both models."
            )
        # by image, so that no caption of a held-out image is fitted to; ascending, as `select` needs them
        return self.select(np.sort(order[num_held_out:])), self.select(np.sort(order[:num_held_out]))

    def captions_of(self) -> list[list[str]]:
        """The captions of each image, in the order of the texts."""
        grouped: list[list[str]] = [[] for _ in range(len(self))]
        for image_of, caption in zip(self.image_of.tolist(), self.captions, strict=True):
            grouped[image_of].append(caption)
        return grouped


def read_pairs(
    old_images: Path, new_images: Path, old_texts: Path, new_texts: Path, *, max_images: int, seed: int
) -> EmbeddingPairs:
    """The pairs of four embeddings folders; of more than `max_images` images a random sample.

    Raises:
        UsageError: a folder is of the wrong modality or model, or the folders are not of the same samples.
        VlmError: a folder is damaged.
    """
    folders = (old_images, new_images, old_texts, new_texts)
    # checksums now: a head fitted to damaged rows would only show in searches
    sources = [Embeddings.open(folder, verify=True) for folder in folders]
    _check_spaces(sources)
    images = _UidJoin(sources[0], sources[1])
    texts = _UidJoin(sources[2], sources[3])
    names = images.names
    # images are drawn, not captions: each keeps all of its captions
    if len(names) > max_images:
        drawn = np.sort(np.random.default_rng(seed).permutation(len(names))[:max_images])
        names = [names[number] for number in drawn]
    number_of = {name: number for number, name in enumerate(names)}
    # texts have rows of their own; only those of the drawn images are of use
    captions_of_images = []
    for name, image_name in texts.images_of_captions():
        if image_name in number_of:
            captions_of_images.append((number_of[image_name], name))
    if not captions_of_images:
        raise UsageError(f"No caption of {old_texts} belongs to an image of {old_images}: embed the same shards.")
    # stable, so that the captions of an image keep their order
    captions_of_images.sort(key=lambda pair: pair[0])
    image_of: list[int] = []
    captions: list[str] = []
    for number, name in captions_of_images:
        image_of.append(number)
        captions.append(name)
    return EmbeddingPairs(
        old=sources[0].space,
        new=sources[1].space,
        old_images=images.vectors(0, names),
        new_images=images.vectors(1, names),
        old_texts=texts.vectors(0, captions),
        new_texts=texts.vectors(1, captions),
        image_of=np.array(image_of, np.int64),
        captions=tuple(map(texts.caption_of, captions)),
    )


@dataclass(frozen=True, slots=True)
class _Row:
    """What a join needs of an origin: the number of its row, and its captions."""

    row: int
    captions: Captions
    caption_number: int | None


class _UidJoin:
    """The rows of two folders that have the same uid, in the order of the first.

    Raises:
        UsageError: there are none, or a uid has different samples.
    """

    def __init__(self, old: Embeddings, new: Embeddings) -> None:
        self._sources = (old, new)
        self._rows = tuple(map(_rows_by_uid, self._sources))
        old_rows, new_rows = self._rows
        self.names = [uid for uid in old_rows if uid in new_rows]
        if not self.names:
            raise UsageError(
                f"{old.folder} and {new.folder} have no uid in common: embed the same shards by both models."
            )
        # equal uids prove little: keys such as 00000 are in many datasets
        for name in self.names:
            if old_rows[name].captions != new_rows[name].captions:
                raise UsageError(
                    f"{name!r} has the captions {old_rows[name].captions} in {old.folder} and "
                    f"{new_rows[name].captions} in {new.folder}: they are of different samples. "
                    "Embed the same shards by both models."
                )
        only_old = len(old_rows) - len(self.names)
        only_new = len(new_rows) - len(self.names)
        if only_old or only_new:
            logger.info(f"Skipped {only_old:,} rows only in {old.folder} and {only_new:,} only in {new.folder}.")

    def images_of_captions(self) -> Iterator[tuple[str, str]]:
        """The uid of each caption with that of its image."""
        # a caption's uid is its image's with #caption_number behind it (`ids.UidAssigner`)
        for name in self.names:
            yield name, name.removesuffix(f"#{self._rows[0][name].caption_number}")

    def caption_of(self, name: str) -> str:
        """The caption of a text row, which has just one."""
        return next(chain.from_iterable(self._rows[0][name].captions.values()))

    def vectors(self, side: int, names: list[str]) -> Float32[Array, "N D"]:
        """The unit vectors of these rows in folder `side`, in their order."""
        rows = np.array([self._rows[side][name].row for name in names], np.int64)
        # `take` reads ascending rows only
        order = np.argsort(rows)
        vectors = np.empty((len(names), self._sources[side].dimension), np.float32)
        vectors[order] = self._sources[side].take(rows[order])
        return vectors


def _rows_by_uid(source: Embeddings) -> dict[str, _Row]:
    rows: dict[str, _Row] = {}
    for row, origin in enumerate(source.origins()):
        rows[origin.uid] = _Row(row, origin.captions, origin.caption_number)
    if len(rows) < len(source):
        raise UsageError(f"{source.folder} has a uid twice: embed again with distinct keys.")
    return rows


def _check_spaces(sources: list[Embeddings]) -> None:
    """Refuse folders of the wrong modality, or of more than two models."""
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
                f"{texts.folder} by {texts.space.model} (fingerprint {texts.space.fingerprint}): images and captions "
                "must be of one model."
            )
    if old_images.space.fingerprint == new_images.space.fingerprint:
        raise UsageError(
            f"{old_images.folder} and {new_images.folder} are of the same model: there is nothing to upgrade."
        )


def measure_head(pairs: EmbeddingPairs, head: CompatibilityProjection, *, seed: int) -> dict[str, RetrievalResult]:
    """Recall by the model of queries and of rows, each of images by captions and of captions by images."""
    images = project_through(head, pairs.new_images)
    texts = project_through(head, pairs.new_texts)
    return {
        "old → old": _retrieve(pairs, pairs.old_images, pairs.old_texts, pairs.old_images, pairs.old_texts),
        "new → old": query_old_rows(pairs, head),
        "new → half new": query_mixed_rows(pairs, head, seed=seed),
        "new → new": _retrieve(pairs, images, texts, images, texts),
        "new → new, no head": _retrieve(pairs, pairs.new_images, pairs.new_texts, pairs.new_images, pairs.new_texts),
    }


def query_old_rows(pairs: EmbeddingPairs, head: CompatibilityProjection) -> RetrievalResult:
    """Queries of the new model over old rows."""
    size = head.dimension
    return _retrieve(
        pairs,
        project_through(head, pairs.new_images),
        project_through(head, pairs.new_texts),
        pad_to(pairs.old_images, size),
        pad_to(pairs.old_texts, size),
    )


def query_mixed_rows(pairs: EmbeddingPairs, head: CompatibilityProjection, *, seed: int) -> RetrievalResult:
    """Queries of the new model over rows of which half are its own.

    seed: of the half of the images that count as embedded again, with their captions.
    """
    images = project_through(head, pairs.new_images)
    texts = project_through(head, pairs.new_texts)
    again = np.random.default_rng(seed).permutation(len(pairs)) < len(pairs) // 2
    mixed_images = np.where(again[:, None], images, pad_to(pairs.old_images, head.dimension))
    # a caption is of the same model as its image
    mixed_texts = np.where(again[pairs.image_of][:, None], texts, pad_to(pairs.old_texts, head.dimension))
    return _retrieve(pairs, images, texts, mixed_images, mixed_texts)


def project_through(head: CompatibilityProjection, vectors: Float32[Array, "N D"]) -> Float32[Array, "N S"]:
    """Embeddings of the new model through the head."""
    return head(torch.from_numpy(vectors)).numpy()


def pad_to(vectors: Float32[Array, "N D"], dimension: int) -> Float32[Array, "N S"]:
    """Old rows as a migrated index holds them."""
    return np.pad(vectors, ((0, 0), (0, dimension - vectors.shape[1])))


def _retrieve(
    pairs: EmbeddingPairs,
    query_images: Float32[Array, "N S"],
    query_texts: Float32[Array, "T S"],
    images: Float32[Array, "N S"],
    texts: Float32[Array, "T S"],
) -> RetrievalResult:
    """Captions query `images`, images query `texts`."""
    captions = pairs.captions_of()
    # each call measures both directions, of which one has the queries and rows asked for
    by_texts = measure_retrieval(images, query_texts, captions)
    by_images = measure_retrieval(query_images, texts, captions)
    return RetrievalResult(
        text_to_image=by_texts.text_to_image,
        image_to_text=by_images.image_to_text,
        num_images=by_texts.num_images,
        num_texts=by_texts.num_texts,
    )


PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
_VALIDATION_SHARE = 0.15


@dataclass(frozen=True, kw_only=True)
class RidgeChoice:
    """The penalty that was chosen, and the recall it reached on images held out for the choice.

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
    """The change of basis nearest to a ridge regression of old on new embeddings, with the penalty of the best recall.

    On real pairs it meets old rows better than the regression itself, and better than the Procrustes rotation, which it
    approaches as the penalty grows (benchmarks/model_upgrade.py).

    Raises:
        UsageError: there are too few images.
    """
    training, validation = pairs.split(_VALIDATION_SHARE, seed=seed)
    choices = []
    for penalty in PENALTIES:
        head = make_head(pairs, basis_change(predict_old(training, penalty)))
        # both stages of a migration count: all rows old, and half of them embedded again
        recall = _mean_recall(query_old_rows(validation, head), query_mixed_rows(validation, head, seed=seed))
        choices.append(RidgeChoice(penalty=penalty, recall=recall))
    best = max(choices, key=lambda choice: choice.recall)
    # the winner is fitted again, with all pairs
    return FittedHead(head=make_head(pairs, basis_change(predict_old(pairs, best.penalty))), choice=best)


def predict_old(pairs: EmbeddingPairs, penalty: float) -> Float[Array, "d D"]:
    """The matrix W with the least mean |W new - old|² + penalty |W|², images and captions equally weighted."""
    # the normal equations of ridge regression (Hoerl and Kennard 1970)
    new = _equally_weighted(pairs.new_images, pairs.new_texts)
    old = _equally_weighted(pairs.old_images, pairs.old_texts)
    return np.linalg.solve(new.T @ new + penalty * np.eye(new.shape[1]), new.T @ old).T


def _equally_weighted(images: Float32[Array, "N D"], texts: Float32[Array, "T D"]) -> Float[Array, "M D"]:
    # 1 / √n turns sums of squares into means; float64, because the normal equations square the condition number
    return np.concatenate([images / len(images) ** 0.5, texts / len(texts) ** 0.5]).astype(np.float64)


def basis_change(prediction: Float[Array, "d D"]) -> Float[Array, "S D"]:
    """The matrix with orthonormal columns whose first d rows are the polar factor of the prediction.

    Where D > d the other D - d rows span the rest of the space; S is the larger of d and D.
    """
    # the polar factor is the orthonormal matrix nearest to the prediction
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


def _mean_recall(*retrievals: RetrievalResult) -> float:
    values: list[float] = []
    for retrieval in retrievals:
        values += retrieval.text_to_image.recall.values()
        values += retrieval.image_to_text.recall.values()
    return float(np.mean(values))


@dataclass(frozen=True, kw_only=True)
class UpgradeSummary(Result):
    """The migrated index: `rows` live ones, padded to `dimension`."""

    folder: str
    kind: str
    rows: int
    old_dimension: int
    dimension: int
    seconds: float


def upgrade_index(index: Path, out: Path, head: CompatibilityProjection, *, head_spec: str) -> UpgradeSummary:
    """A new index folder in the space of the head, with the live rows of `index` under the same row numbers.

    A row keeps its stored values, followed by zeros, so cosines between old rows do not change. Index type and tuning
    parameters stay; the evidence of an autotuner is dropped, because it was measured with the old model.

    Args:
        head_spec: what the head was read from; stored as an absolute path, so that a search finds it again.

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
        # live rows only: the new index begins without deleted ones
        catalogue = catalogue_file(FIRST_VERSION)
        write_catalogue(folder / catalogue, snapshot.entries(), generation=FIRST_VERSION)
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
    # zeros after a row change no cosine, but only rows of the old model meet the first dimensions of the head
    space = snapshot.details.space
    if space.fingerprint != head.old:
        hint = " It was migrated by this head already." if space.fingerprint == head.fingerprint else ""
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
    extra = head.dimension - head.old_dimension
    # padded queries of the old model have the answers that they had
    link_queries = snapshot.link_queries()
    if link_queries is not None:
        (link_queries,) = _padded([link_queries], extra)

    def write(kind: str, tuning: TuningParams) -> WrittenSegment:
        padded = _padded(chain(*map(iter_live_blocks, snapshot.views)), extra)
        return write_segment(
            folder,
            0,
            padded,
            snapshot.rows,
            dimension=head.dimension,
            kind=kind,
            tuning=tuning,
            link_queries=link_queries,
        )

    details = snapshot.details
    written = fall_back_to_flat(write, details.kind, len(snapshot), TuningParams(**details.tuning))
    if link_queries is None:
        return written
    return replace(written, files=written.files | write_link_queries(folder, link_queries))


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
        catalogue=catalogue_file(FIRST_VERSION),
        segments=(written.segment,) if written else (),
        next_segment=1,
        tombstones="",
        evidence={},
        map=None,
    )
    checksums = sorted_checksums(files)
    manifest = replace(
        snapshot.manifest,
        fingerprint=compute_fingerprint(snapshot.manifest.fingerprint, "upgrade", space.fingerprint, *checksums),
        generation=FIRST_VERSION,
        counts={"rows": len(snapshot), "dead": 0},
        configuration={
            "index": str(snapshot.folder.absolute()),
            "head": space.model,
            UID_COLUMN: snapshot.manifest.configuration.get(UID_COLUMN, ""),
        },
        inputs=snapshot.manifest.inputs | {"model": space.fingerprint, "index": snapshot.manifest.fingerprint},
        files=files,
        details=asdict(details),
        made_by=f"vlm {__version__}",
        made_at="",
        command="",
    )
    write_manifest(folder, manifest)
