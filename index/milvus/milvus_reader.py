"""An index of Milvus open for reading: the folder's manifest names a collection and the version that is searched.

Each entity says which version inserted it and which deleted it, so a reader of version g sees those with
born <= g < died, whatever is inserted meanwhile; the manifest, replaced last, is what commits a change.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlm.errors import UsageError, VlmError
from vlm.index.embeddings_folder import EmbeddingSpace
from vlm.index.engine_base import (
    EngineIndex,
    EngineSnapshot,
    FilteredRows,
    IndexInfo,
    RowSelection,
    ScoredRows,
    manifest_stamp,
    row_numbers,
)
from vlm.index.index_files import EngineDetails
from vlm.index.milvus.collection import MilvusCatalogue, StoredField, as_row_list, vector_of
from vlm.index.milvus.connection import MOST_RESULTS, MilvusAddress, MilvusConnection
from vlm.manifest import MANIFEST, Manifest, damage_as_error, read_manifest
from vlm.tensor_types import Array, Float32, Int64

MILVUS_LAYOUT = 1
METRIC = "cosine"
# of codes of 8 bits the stored vectors decide, among so many candidates for each result
_RESCORED = 4
_LEAST_EF = 64


@dataclass(frozen=True, kw_only=True)
class MilvusDetails(EngineDetails):
    """The details of the manifest of an index that Milvus has.

    address: as of `MilvusAddress`. kind, parameters: the index type, by our name, and its parameters.
    fields: metadata fields, in the order of their numbers.
    oldest: the first version whose rows are all there still; a compaction raises it.
    """

    address: str
    collection: str
    kind: str
    parameters: dict[str, int]
    fields: tuple[StoredField, ...]
    oldest: int = 1
    evidence: dict[str, Any] = field(default_factory=dict)
    map: None = None
    metric: str = METRIC
    engine: str = "milvus"
    layout: int = MILVUS_LAYOUT

    @classmethod
    def from_manifest(cls, manifest: Manifest, folder: Path) -> "MilvusDetails":
        """From the plain values of the manifest of `folder`.

        Raises:
            UsageError: another version of the program wrote them. VlmError: they are damaged.
        """
        with damage_as_error(folder / MANIFEST):
            details = manifest.details
            if details["layout"] != MILVUS_LAYOUT:
                raise UsageError(
                    f"{folder} has the layout {details['layout']} of Milvus, this version reads {MILVUS_LAYOUT}: use "
                    "the version that made it."
                )
            # JSON has lists for tuples
            fields: list[StoredField] = []
            for stored in details["fields"]:
                fields.append(StoredField(**(stored | {"types": tuple(stored["types"])})))
            typed = {
                "space": EmbeddingSpace(**details["space"]),
                "fields": tuple(fields),
                "shards": tuple(details["shards"]),
                "sources": tuple(details["sources"]),
            }
            return cls(**(details | typed))


def visible_at(version: int) -> str:
    """The expression that selects the rows of a version."""
    return f"born <= {version} and died > {version}"


@dataclass(frozen=True, kw_only=True, eq=False)
class MilvusSnapshot(EngineSnapshot):
    """One version of an index in a collection."""

    folder: Path
    manifest: Manifest
    details: MilvusDetails
    catalogue: MilvusCatalogue
    connection: MilvusConnection

    def visible(self) -> str:
        """The expression that selects the rows of this version.

        Raises:
            VlmError: a compaction has removed some of them since.
        """
        newest = self.manifest
        # a folder that is gone or damaged is an error of `refresh`, not of a search in what is open
        with suppress(VlmError, OSError):
            newest = read_manifest(self.folder, "index")
        # a folder that was built anew has another collection, and ours is as it was
        is_same = newest.details.get("collection") == self.details.collection
        if is_same and newest.details["oldest"] > self.number:
            raise VlmError(
                f"Version {self.number} of {self.folder} was compacted away, and {newest.generation} is the newest "
                "now: open the index again, or refresh it."
            )
        return visible_at(self.number)

    def _list_rows(self) -> Int64[Array, " N"]:
        return self.catalogue.rows()

    def vectors(self, rows: Int64[Array, " N"]) -> Float32[Array, "N D"]:
        """The stored unit vectors of live or deleted rows, in the given order.

        Raises:
            VlmError: one of the rows is missing.
        """
        # each row is fetched once, however often it is asked for
        numbers = [int(row) for row in np.unique(rows)]
        by_row: dict[int, Float32[Array, " D"]] = {}
        for entity in self.connection.fetch(
            self.details.collection, "row", numbers, ["row", "vector"], where="row >= 0"
        ):
            by_row[entity["row"]] = vector_of(entity)
        if len(by_row) < len(numbers):
            missing = next(number for number in numbers if number not in by_row)
            raise VlmError(f"The collection {self.details.collection} has no row {missing:,}; refresh the index.")
        vectors = np.zeros((len(rows), self.details.space.dimension), np.float32)
        for position, row in enumerate(rows.tolist()):
            vectors[position] = by_row[row]
        return vectors

    def nearest(self, queries: Float32[Array, "Q D"], top: int, allowed_rows: RowSelection | None = None) -> ScoredRows:
        """The `top` live rows nearest to each query, or of the allowed ones; ties by row.

        Raises:
            UsageError: more results, or allowed rows one by one, than Milvus takes.
        """
        # rows that are not there need not be asked for, but a page past the limit cannot be answered
        depth = min(top, max(1, len(self)))
        if depth > MOST_RESULTS:
            raise UsageError(f"Milvus gives at most {MOST_RESULTS:,} results of a query, {depth:,} were asked for.")
        expression = self.visible()
        if isinstance(allowed_rows, FilteredRows):
            expression = f"{expression} and ({allowed_rows.expression})"
        elif allowed_rows is not None:
            numbers = row_numbers(allowed_rows)
            if not len(numbers) or len(numbers) > MOST_RESULTS:
                return self._only_few(queries, numbers)
            expression = f"{expression} and {as_row_list(numbers)}"
        if not len(self):
            return np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64)
        results = self._search(queries, depth, expression)
        # an approximate search under a filter may stop before it has enough; a flat one never does
        if self.details.kind != "flat" and any(len(result) < depth for result in results):
            results = self._complete(queries, depth, expression, results)
        return _as_arrays(results)

    def _only_few(self, queries: Float32[Array, "Q D"], allowed_rows: Int64[Array, " N"]) -> ScoredRows:
        if len(allowed_rows):
            raise UsageError(
                f"Milvus takes at most {MOST_RESULTS:,} row numbers with a query, {len(allowed_rows):,} were given: "
                "use a filter."
            )
        return np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64)

    def _search(self, queries: Float32[Array, "Q D"], top: int, expression: str) -> list[list[tuple[float, int]]]:
        details = self.details
        is_coded = details.kind == "ivfsq"
        # codes of 8 bits misorder near neighbours, so more are taken and their stored vectors decide
        depth = min(top * _RESCORED, MOST_RESULTS) if is_coded else top
        results = self.connection.search(
            details.collection,
            queries,
            depth,
            expression=expression,
            parameters=_search_parameters(details.kind, details.parameters, depth),
        )
        if not is_coded:
            return results
        rescored: list[list[tuple[float, int]]] = []
        for query, result in zip(queries, results, strict=True):
            rows = np.array([row for _, row in result], np.int64)
            cosines = self.vectors(rows) @ query
            pairs = zip(cosines.tolist(), rows.tolist(), strict=True)
            rescored.append(sorted(pairs, key=_best_first)[:top])
        return rescored

    def _complete(
        self,
        queries: Float32[Array, "Q D"],
        top: int,
        expression: str,
        results: list[list[tuple[float, int]]],
    ) -> list[list[tuple[float, int]]]:
        """The results, with those that an approximate search under a filter has missed: all rows are compared."""
        num_allowed = self.connection.count(self.details.collection, expression)
        if all(len(result) >= min(top, num_allowed) for result in results):
            return results
        exact: list[list[tuple[float, int]]] = [[] for _ in queries]
        for entity in self.connection.iterate(self.details.collection, expression, ["row", "vector"]):
            for result, cosine in zip(exact, (queries @ vector_of(entity)).tolist(), strict=True):
                result.append((cosine, entity["row"]))
                # cut back now and then, so that memory does not grow with the rows
                if len(result) > 2 * top + 1000:
                    result[:] = sorted(result, key=_best_first)[:top]
        return [sorted(result, key=_best_first)[:top] for result in exact]


def _best_first(pair: tuple[float, int]) -> tuple[float, int]:
    return -pair[0], pair[1]


def _as_arrays(results: list[list[tuple[float, int]]]) -> ScoredRows:
    """The results as two matrices, padded where a query has fewer."""
    width = max(map(len, results), default=0)
    scores = np.full((len(results), width), -np.inf, np.float32)
    rows = np.full((len(results), width), -1, np.int64)
    for number, result in enumerate(results):
        for rank, (score, row) in enumerate(sorted(result, key=_best_first)):
            scores[number, rank] = score
            rows[number, rank] = row
    return scores, rows


def _search_parameters(kind: str, parameters: Mapping[str, int], depth: int) -> dict[str, int]:
    if kind == "hnsw":
        # Milvus refuses a search that asks for more than it looks at
        return {"ef": max(parameters.get("efSearch", _LEAST_EF), depth)}
    return {"nprobe": parameters["nprobe"]} if "nprobe" in parameters else {}


def open_milvus_snapshot(folder: Path, connection: MilvusConnection | None = None) -> MilvusSnapshot:
    """Open the version that the manifest names now.

    connection: to go on using, if the index is still at its address.

    Raises:
        UsageError: there is no finished index of this layout. VlmError: its server or its collection is not there.
    """
    manifest = read_manifest(folder, "index")
    details = MilvusDetails.from_manifest(manifest, folder)
    address = MilvusAddress.parse(details.address)
    # the folder may have been relocated to another server since
    is_reused = connection is not None and connection.address == address
    opened = connection if connection is not None and is_reused else _connect(address, folder)
    try:
        _load(opened, details.collection, folder)
    except BaseException:
        # one that was handed over still serves the version before
        if not is_reused:
            opened.close()
        raise
    # the catalogue asks the snapshot for what is visible, and the snapshot holds the catalogue: the name is bound later
    snapshot: MilvusSnapshot

    def visible() -> str:
        return snapshot.visible()

    catalogue = MilvusCatalogue(opened, details.collection, details.fields, visible, manifest.counts["rows"])
    snapshot = MilvusSnapshot(folder=folder, manifest=manifest, details=details, catalogue=catalogue, connection=opened)
    return snapshot


def _connect(address: MilvusAddress, folder: Path) -> MilvusConnection:
    if address.is_local and not Path(address.uri(folder)).exists():
        raise VlmError(f"{address.uri(folder)}, which has the rows of {folder}, is missing; restore a copy of it.")
    return MilvusConnection(address, folder)


def _load(connection: MilvusConnection, collection: str, folder: Path) -> None:
    if not connection.has(collection):
        raise VlmError(
            f"Milvus at {connection.uri} has no collection {collection}, which has the rows of {folder}: restore it, "
            "or build the index again."
        )
    connection.load(collection)


class MilvusIndex(EngineIndex[MilvusSnapshot]):
    """An index folder of Milvus open for reading: one version of it, until `refresh` moves to the newest."""

    @classmethod
    def open(cls, folder: Path) -> "MilvusIndex":
        """Open an index folder; raises as of `open_milvus_snapshot`."""
        # the stamp first: a change in between is then noticed by the next refresh
        stamp = manifest_stamp(folder)
        return cls(open_milvus_snapshot(folder), stamp)

    def _open_newest(self) -> None:
        self.snapshot = open_milvus_snapshot(self.folder, self.snapshot.connection)

    def info(self) -> IndexInfo:
        """The index in numbers, from the manifest; bytes: of the vectors alone, whose number Milvus knows."""
        manifest = self.manifest
        details = self.snapshot.details
        space = details.space
        # deleted rows take their place until a compaction
        num_stored = len(self) + manifest.counts["dead"]
        return IndexInfo(
            folder=str(self.folder),
            kind=details.kind,
            parameters=details.parameters,
            rows=len(self),
            dead=manifest.counts["dead"],
            fresh=0,
            dimension=space.dimension,
            modality=space.modality,
            metric=details.metric,
            bytes=vector_bytes(num_stored, space.dimension),
            kept_bytes=0,
            generation=manifest.generation,
            model=space.model,
            model_fingerprint=space.fingerprint,
            embeddings_fingerprint=manifest.inputs["embeddings"],
            num_shards=len(details.shards),
            map_rows=0,
            made_by=manifest.made_by,
            made_at=manifest.made_at,
            segments=(),
            evidence=details.evidence,
            engine="milvus",
            address=details.address,
            collection=details.collection,
        )


def vector_bytes(rows: int, dimension: int) -> int:
    """What the vectors of an index take, as float32."""
    return rows * dimension * np.dtype(np.float32).itemsize
