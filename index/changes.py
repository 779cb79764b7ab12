"""What a change of an index brings, and what it did."""

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path

import numpy as np

from vlm.errors import UsageError, VlmError
from vlm.index.embeddings import Embeddings, Space
from vlm.index.parts import Origin
from vlm.index.vectors import stored_blocks
from vlm.tensors import Array, Bool, Float

_UNIT_TOLERANCE = 1e-5


@dataclass(frozen=True, kw_only=True)
class NewRows:
    """Rows to come in: as many vectors as origins, in the same order; both can be asked for several times.

    source: fingerprint of where they are from. shards: addresses of their tars.
    """

    space: Space
    count: int
    source: str
    shards: tuple[str, ...]
    blocks: Callable[[], Iterable[Float[Array, "_ D"]]]
    origins: Callable[[], Iterable[Origin]]

    @classmethod
    def of_folder(cls, folder: Path) -> "NewRows":
        """The rows of a finished embeddings folder, whose checksums are verified.

        Raises:
            UsageError: it is unfinished or of another kind.
            VlmError: it is damaged.
        """
        source = Embeddings.open(folder, verify=True)
        return cls(
            space=source.space,
            count=len(source),
            source=source.manifest.fingerprint,
            shards=tuple(source.manifest.details["shards"]),
            blocks=lambda: stored_blocks(source),
            origins=source.origins,
        )

    @classmethod
    def of_arrays(cls, vectors: Float[Array, "N D"], origins: Sequence[Origin], space: Space) -> "NewRows":
        """Rows at hand; they are brought to unit length, and stored as they are if they have it.

        Raises:
            UsageError: a vector is zero or not finite, or there are not as many as origins.
        """
        lengths = np.linalg.norm(vectors.astype(np.float32), axis=1)
        wrong = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
        if len(wrong):
            raise UsageError(f"Vector {wrong[0]} has length {lengths[wrong[0]]}: it must be finite and not zero.")
        if len(vectors) != len(origins):
            raise UsageError(f"{len(vectors):,} vectors and {len(origins):,} origins were given: one each is needed.")
        # scaled by a rounding error, a number may round to float16's other neighbour than where it was embedded
        scales = np.where(np.abs(lengths - 1) < _UNIT_TOLERANCE, 1, lengths)
        rows = (vectors / scales[:, None]).astype(np.float16)
        shards = tuple(dict.fromkeys(origin.shard for origin in origins))
        return cls(
            space=space, count=len(rows), source="", shards=shards, blocks=lambda: [rows], origins=lambda: origins
        )

    def uids(self) -> Iterator[str]:
        """The name of each row.

        Raises:
            VlmError: two rows have the same.
        """
        seen: set[str] = set()
        for origin in self.origins():
            if origin.uid in seen:
                raise VlmError(f"Two of the new rows have the same uid {origin.uid!r}; embed again with distinct keys.")
            seen.add(origin.uid)
            yield origin.uid

    def only(self, uids: Container[str]) -> "NewRows":
        """Those of these names."""
        keep = np.fromiter((origin.uid in uids for origin in self.origins()), bool, self.count)
        return replace(
            self,
            count=int(keep.sum()),
            blocks=lambda: _kept(self.blocks(), keep),
            origins=lambda: compress(self.origins(), keep),
        )

    def require_space(self, space: Space, folder: Path) -> None:
        """Refuse rows that cannot be compared with those of an index.

        Raises:
            UsageError: they are of another model, modality or dimension.
        """
        if self.space.fingerprint != space.fingerprint:
            raise UsageError(
                f"{folder} was embedded by {space.model} (fingerprint {space.fingerprint}), the new rows by "
                f"{self.space.model} (fingerprint {self.space.fingerprint}), and their vectors cannot be compared. "
                f"Embed the new shards with {space.model}."
            )
        if (self.space.modality, self.space.dimension) != (space.modality, space.dimension):
            raise UsageError(
                f"{folder} holds {space.modality} embeddings of {space.dimension} dimensions, the new rows are "
                f"{self.space.modality} embeddings of {self.space.dimension}; make an index of their own of them."
            )


def _kept(blocks: Iterable[Float[Array, "_ D"]], keep: Bool[Array, " N"]) -> Iterator[Float[Array, "_ D"]]:
    """The rows to keep, block by block."""
    first = 0
    for block in blocks:
        yield block[keep[first : first + len(block)]]
        first += len(block)


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a change did: the generation it made, and how many rows there are now.

    added: rows that were not there. replaced: those whose uid was there. removed: those deleted.
    left_out: new rows whose uid no row has that an update's filter chooses.
    dead: rows that searches leave out until `compact`.
    """

    generation: int
    rows: int
    segments: int
    dead: int
    added: int = 0
    replaced: int = 0
    removed: int = 0
    left_out: int = 0
    seconds: float = 0.0
