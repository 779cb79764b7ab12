"""Memory of an open index does not grow with its rows: what is open lies in its files, what a query needs in blocks."""

import shutil
import tracemalloc
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest
from pyroaring import BitMap

from tests.index.index_fixture import MakeIndex, vectors
from tests.index.metadata_fixture import open_bitmaps
from tests.index.test_row_map import circle
from vlm.index.facets import count_values
from vlm.index.filter_language import parse_filter
from vlm.index.index_files import MapRecord
from vlm.index.metadata import FieldValue
from vlm.index.reader import Index
from vlm.index.row_bitmaps import all_bits, bits_at, pack_bits, row_id_blocks, to_bitmap, unpack_bits
from vlm.index.row_map import RowMap
from vlm.index.writer import IndexWriter

BYTES_A_ROW = 3.0
"""A number of eight bytes for each row is more; a bit for each, with the sets of a filter, is less."""


@pytest.fixture
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a block is no larger for many rows than for few."""
    monkeypatch.setattr("vlm.index.row_bitmaps._NUMBERS_AT_ONCE", 256)
    monkeypatch.setattr("vlm.index.row_bitmaps._FETCHED_AT_ONCE", 256)
    monkeypatch.setattr("vlm.index.segments._BITS_AT_ONCE", 256)
    monkeypatch.setattr("vlm.index.segments._SCAN_ROWS", 256)
    monkeypatch.setattr("vlm.index.row_map._ROWS_AT_ONCE", 256)


def peak_of_use(folder: Path, *, with_map: bool) -> int:
    """The most bytes that Python and numpy hold while an index is opened and used as by the service."""
    tracemalloc.start()
    try:
        index = Index.open(folder)
        query = vectors(1, 3)
        index.search(query, 10)
        for where in ("number < 200", "not number = 3", "caption like '%caption%'"):
            rows = index.catalogue.where(parse_filter(where))
            index.search(query, 10, rows)
            index.catalogue.count_values("colour", top=5, rows=rows)
            if with_map:
                row_map = RowMap.open(index.snapshot)
                row_map.sample([-0.1, -0.1, 0.1, 0.1], 10, rows)
        index.snapshot.live(np.array([3, 5]))
        index.close()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("has_deleted_rows", [False, True])
def test_an_open_index_holds_nothing_for_each_row(
    make_index: MakeIndex, tmp_path: Path, has_deleted_rows: bool
) -> None:
    peaks: dict[int, int] = {}
    for count in (11_000, 31_000):
        folder = make_index(count).rename(tmp_path / f"{count}")
        shutil.rmtree(tmp_path / "embeddings")
        with IndexWriter(folder) as writer:
            if has_deleted_rows:
                writer.delete(["k7"])
            else:
                writer.set_map(
                    writer.snapshot.rows, circle(count), MapRecord(file="", rows=0, fitted=0, method="given", seed=0)
                )
        # what is imported or cached on first use is no part of it
        peak_of_use(folder, with_map=not has_deleted_rows)
        peaks[count] = peak_of_use(folder, with_map=not has_deleted_rows)
    assert (peaks[31_000] - peaks[11_000]) / 20_000 < BYTES_A_ROW


@pytest.mark.parametrize("count", [1, 8, 300, 1000])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_bits_are_those_of_the_positions(count: int, share: float) -> None:
    is_set = np.random.default_rng(count).random(count) < share
    positions = np.flatnonzero(is_set)
    bits = pack_bits(np.array_split(positions, 3), count)
    np.testing.assert_array_equal(bits, np.packbits(is_set, bitorder="little"))
    np.testing.assert_array_equal(unpack_bits(bits, 0, count), is_set)
    np.testing.assert_array_equal(bits_at(bits, np.arange(count)), is_set)
    np.testing.assert_array_equal(all_bits(count), pack_bits([np.arange(count)], count))


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("rows", [[], [5], [0, 2**31], list(range(3, 9000, 7)), [*range(5000), 2**31]])
def test_blocks_of_rows_are_all_rows_in_order(rows: list[int]) -> None:
    blocks = list(row_id_blocks(to_bitmap(np.array(rows, np.int64))))
    assert np.concatenate([np.zeros(0, np.int64), *blocks]).tolist() == rows


@pytest.mark.parametrize("facts_per_bitmap", [1, 4, 50])
def test_values_are_counted_by_bitmaps_as_by_facts(facts_per_bitmap: int) -> None:
    random = Random(0)
    metadata = [
        {"colour": random.choice(["red", "blue", 7, 7.5]), "tags": random.choices("abcdef", k=3), "number": row}
        for row in range(60)
    ]
    database = open_bitmaps(metadata, facts_per_bitmap=facts_per_bitmap)
    for rows in (None, to_bitmap(np.arange(5, 60, 3))):
        for hidden in (BitMap(), BitMap([1, 5, 7])):
            for field in ("colour", "tags", "number", "no such"):
                truth: Counter[FieldValue] = Counter()
                for row, values in enumerate(metadata):
                    if row in rows if rows is not None else row not in hidden:
                        value = values.get(field, [])
                        truth.update(set(value) if isinstance(value, list) else [value])
                for by_bitmaps in (True, False):
                    counts = count_values(database, field, top=99, rows=rows, hidden=hidden, use_bitmaps=by_bitmaps)
                    assert {count.value: count.rows for count in counts} == truth
                    order = [(-count.rows, isinstance(count.value, str), count.value) for count in counts]
                    assert order == sorted(order)
                    few = count_values(database, field, top=2, rows=rows, hidden=hidden, use_bitmaps=by_bitmaps)
                    assert few == counts[:2]
