"""An open index: checked against its manifest, asked with unit vectors, answering with scores and catalogue entries."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlm.errors import UsageError, VlmError
from vlm.index.catalogue import Catalogue, Entry
from vlm.index.embeddings import Modality, check_files, unit_rows
from vlm.index.kinds import load_faiss
from vlm.index.layout import CATALOGUE, Details, Segment
from vlm.manifest import Manifest, read_manifest
from vlm.tensors import Array, Float, Float32, Int64

if TYPE_CHECKING:
    import faiss

_CURE = "build the index again with vlm index build"


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One answer: `score` is the cosine of query and row, in [-1, 1]."""

    score: float
    entry: Entry


@dataclass(frozen=True, kw_only=True)
class IndexInfo:
    """Facts about an index, for people."""

    folder: str
    kind: str
    parameters: dict[str, int]
    rows: int
    dimension: int
    modality: Modality
    metric: str
    bytes: int
    generation: int
    model: str
    model_fingerprint: str
    embeddings_fingerprint: str
    num_shards: int
    made_by: str
    made_at: str


class Index:
    """One generation of an index folder, open for reading."""

    def __init__(self, folder: Path, manifest: Manifest, segment: "faiss.Index", catalogue: Catalogue) -> None:
        self.folder, self.manifest, self.catalogue = folder, manifest, catalogue
        self.details = Details.from_manifest(manifest.details)
        self._segment = segment

    @classmethod
    def open(cls, folder: Path) -> "Index":
        """Open an index folder.

        Raises:
            UsageError: it is unfinished, of another kind, or of another format.
            VlmError: a file is missing or damaged, or segment and catalogue do not have the same rows.
        """
        manifest = read_manifest(folder, "index")
        check_files(folder, manifest.files, verify=False, cure=_CURE)
        details = Details.from_manifest(manifest.details)
        (described,) = details.segments
        segment = _read_segment(folder, described, details.space.dimension)
        catalogue = Catalogue(folder / CATALOGUE)
        if len(catalogue) != manifest.counts["rows"]:
            raise VlmError(
                f"{catalogue.path} has {len(catalogue):,} rows, {manifest.counts['rows']:,} were written; {_CURE}."
            )
        return cls(folder, manifest, segment, catalogue)

    def __len__(self) -> int:
        return self.manifest.counts["rows"]

    def close(self) -> None:
        """Release the catalogue."""
        self.catalogue.close()

    def require_model(self, fingerprint: str, name: str) -> None:
        """Refuse a model whose vectors do not belong to this index.

        Raises:
            UsageError: its fingerprint is another.
        """
        space = self.details.space
        if fingerprint == space.fingerprint:
            return
        if name == space.model:
            raise UsageError(
                f"{name} has changed since it embedded {self.folder}: its fingerprint was {space.fingerprint} and is "
                f"now {fingerprint}. Put the old model back, or embed and index again."
            )
        raise UsageError(
            f"{self.folder} was embedded by {space.model} (fingerprint {space.fingerprint}); {name} is another model "
            f"(fingerprint {fingerprint}), and their vectors cannot be compared. Ask with {space.model}, or embed and "
            f"index again with {name}."
        )

    def search(self, queries: Float[Array, "Q D"], top: int) -> list[list[Hit]]:
        """The `top` rows nearest to each query, best first; ties by row. Fewer only if the index has fewer rows.

        Raises:
            UsageError: another dimension, a query that is zero or not finite, or top < 1.
        """
        self._check_queries(queries, top)
        scores, rows = self._nearest(unit_rows(queries), min(top, len(self)))
        order = np.lexsort((rows, -scores), axis=1)
        answers: list[list[Hit]] = []
        for number, ranks in enumerate(order):
            entries = self.catalogue.entries(rows[number, ranks].tolist())
            answers.append(
                [Hit(score=s, entry=entry) for s, entry in zip(scores[number, ranks].tolist(), entries, strict=True)]
            )
        return answers

    def info(self) -> IndexInfo:
        """What the manifest says, in one place."""
        segment, space, manifest = self.details.segments[0], self.details.space, self.manifest
        return IndexInfo(
            folder=str(self.folder),
            kind=segment.kind,
            parameters=segment.parameters,
            rows=len(self),
            dimension=space.dimension,
            modality=space.modality,
            metric=self.details.metric,
            bytes=sum(record.bytes for record in manifest.files.values()),
            generation=manifest.generation,
            model=space.model,
            model_fingerprint=space.fingerprint,
            embeddings_fingerprint=manifest.inputs["embeddings"],
            num_shards=len(self.details.shards),
            made_by=manifest.made_by,
            made_at=manifest.made_at,
        )

    def _check_queries(self, queries: Float[Array, "Q D"], top: int) -> None:
        if top < 1:
            raise UsageError(f"top = {top} does not fit: at least one answer must be asked for.")
        dimension = self.details.space.dimension
        if queries.shape[1] != dimension:
            raise UsageError(f"Queries have {queries.shape[1]} dimensions, the rows of this index {dimension}.")
        lengths = np.linalg.norm(queries, axis=1)
        wrong = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
        if len(wrong):
            raise UsageError(f"Query {wrong[0]} has length {lengths[wrong[0]]}: it must be finite and not zero.")

    def _nearest(self, queries: Float32[Array, "Q D"], top: int) -> tuple[Float32[Array, "Q K"], Int64[Array, "Q K"]]:
        scores, rows = self._segment.search(queries, top)
        short = np.flatnonzero((rows < 0).any(axis=1))
        if len(short):
            # the lists read held fewer rows than asked for: read them all
            faiss = load_faiss()
            everything = faiss.SearchParametersIVF(nprobe=self._segment.nlist)  # pyright: ignore[reportAttributeAccessIssue]
            scores[short], rows[short] = self._segment.search(queries[short], top, params=everything)
        return scores, rows


def _read_segment(folder: Path, described: Segment, dimension: int) -> "faiss.Index":
    path = folder / described.file
    try:
        segment = load_faiss().read_index(str(path))
    except RuntimeError as error:
        raise VlmError(f"{path} is damaged ({error}); {_CURE}.") from error
    if segment.ntotal != described.rows or segment.d != dimension:
        raise VlmError(
            f"{path} holds {segment.ntotal:,} rows of {segment.d} dimensions, {described.rows:,} of {dimension} were "
            f"written; {_CURE}."
        )
    return segment
