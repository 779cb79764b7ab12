"""Verify an index of Milvus: the collection against the manifest, rows against their facts, vectors and searches."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vlm.index.catalog import LATEST
from vlm.index.embeddings_folder import find_non_unit_rows
from vlm.index.milvus.collection import FieldRegister, entry_of, uid_digest
from vlm.index.milvus.milvus_reader import MilvusSnapshot, open_milvus_snapshot
from vlm.index.verify import CheckReport, Fault
from vlm.tensor_types import Array, Int64

# Milvus sums float32 products in another order than numpy
_SCORE_TOLERANCE = 1e-4
_NEIGHBOURS = 10


def check_milvus_index(folder: Path, *, sample: int = 1000, seed: int = 0) -> CheckReport:
    """Compare a collection with the manifest, and compute the facts and distances of some rows again.

    sample: the number of these rows. What an unfinished change left behind is listed as strays: the next one removes
    it, and no search sees it.

    Raises:
        UsageError: it is not an index of this layout. VlmError: its server or its collection is not there.
    """
    snapshot = open_milvus_snapshot(folder)
    try:
        rows = snapshot.rows
        sampled = np.sort(np.random.default_rng(seed).permutation(rows)[:sample])
        faults = [Fault(part="joins", what=what) for what in _count_faults(snapshot, rows)]
        faults += [Fault(part="facts", what=what) for what in _fact_faults(snapshot, sampled)]
        if not faults:
            faults += [Fault(part="distances", what=what) for what in _distance_faults(snapshot, sampled)]
        return CheckReport(
            folder=str(folder),
            generation=snapshot.number,
            files=1,  # the manifest
            rows=snapshot.manifest.counts["rows"],
            dead=snapshot.manifest.counts["dead"],
            segments=0,
            distances=len(sampled),
            strays=tuple(_strays(snapshot)),
            faults=tuple(faults),
        )
    finally:
        snapshot.connection.close()


def _strays(snapshot: MilvusSnapshot) -> Iterator[str]:
    number = snapshot.number
    collection = snapshot.details.collection
    for expression, what in (
        (f"born > {number}", "inserted"),
        (f"died > {number} and died < {LATEST}", "marked as deleted"),
    ):
        if count := snapshot.connection.count(collection, expression):
            yield f"{count:,} rows {what} by a change that was not finished"


def _count_faults(snapshot: MilvusSnapshot, rows: Int64[Array, " N"]) -> Iterator[str]:
    counts = snapshot.manifest.counts
    if len(rows) != counts["rows"]:
        yield f"the collection has {len(rows):,} live rows, {counts['rows']:,} were written"
    if len(np.unique(rows)) != len(rows):
        yield "the collection has a row twice"
    dead = snapshot.connection.count(snapshot.details.collection, f"died <= {snapshot.number}")
    if dead != counts["dead"]:
        yield f"the collection has {dead:,} deleted rows, the manifest counts {counts['dead']:,}"
    if len(rows) and rows[-1] >= snapshot.details.next_row:
        yield f"row {rows[-1]:,} exists and would be used again: the next is {snapshot.details.next_row:,}"


def _fact_faults(snapshot: MilvusSnapshot, rows: Int64[Array, " N"]) -> Iterator[str]:
    """What differs between the facts of rows and those of what they were made from."""
    # numbers of fields that are there already, so that the facts come out as they were written
    register = FieldRegister.of(snapshot.details.fields)
    fields = ["row", "uid_digest", "origin", "terms", "bounds"]
    entities = snapshot.connection.fetch(
        snapshot.details.collection, "row", rows.tolist(), fields, where=snapshot.visible()
    )
    for entity in entities:
        entry = entry_of(entity)
        facts = register.facts(entry)
        if entity["uid_digest"] != uid_digest(entry.uid):
            yield f"row {entry.row:,} ({entry.uid}) is listed under another uid"
        if set(entity["terms"]) != set(facts.terms) or entity["bounds"] != facts.bounds:
            yield f"the facts of row {entry.row:,} ({entry.uid}) are not those of its metadata"


def _distance_faults(snapshot: MilvusSnapshot, rows: Int64[Array, " N"]) -> Iterator[str]:
    """Vectors that are not of unit length, and scores that are not the cosines of the stored vectors."""
    for first in range(0, len(rows), 100):
        block = rows[first : first + 100]
        queries = snapshot.vectors(block)
        wrong, lengths = find_non_unit_rows(queries)
        if len(wrong):
            yield f"row {block[wrong[0]]:,} has length {lengths[0]:.4g}"
            return
        scores, neighbours = snapshot.nearest(queries, _NEIGHBOURS)
        for number, query in enumerate(queries):
            is_there = neighbours[number] >= 0
            cosines = snapshot.vectors(neighbours[number, is_there]) @ query
            error = np.abs(cosines - scores[number, is_there]).max(initial=0.0)
            if error > _SCORE_TOLERANCE:
                yield f"a score of row {block[number]:,} is off by {error:.2g} from the cosine of its vectors"
                return
