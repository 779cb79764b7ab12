import sys
from typing import Any

import numpy as np
import pytest

from vlm.errors import UsageError, VlmError
from vlm.index.embeddings import unit_rows
from vlm.index.kinds import KINDS, Tuning, choose_kind, load_faiss, prepare_ivf


class RandomRows:
    """Rows of any number, of which only the sample exists."""

    dimension = 4

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def sample(self, count: int, *, seed: int) -> np.ndarray:
        """As many as there are."""
        number = min(count, self.count)
        return unit_rows(np.random.default_rng(seed).standard_normal((number, self.dimension)).astype(np.float32))


@pytest.mark.parametrize(("rows", "kind"), [(1, "flat"), (49_999, "flat"), (50_000, "ivf")])
def test_auto_is_flat_while_an_exact_scan_is_quick(rows: int, kind: str) -> None:
    assert choose_kind("auto", rows) == kind


def test_an_unknown_kind_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'flat'"):
        choose_kind("flatt", 10)


@pytest.mark.parametrize(
    ("rows", "nlist", "nprobe"), [(312, 8, 8), (1000, 25, 8), (20_000, 512, 32), (40_000, 800, 50)]
)
def test_ivf_takes_four_root_n_lists_of_at_least_39_rows(rows: int, nlist: int, nprobe: int) -> None:
    prepared = prepare_ivf(RandomRows(rows), Tuning())
    assert prepared.parameters == {"nlist": nlist, "nprobe": nprobe, "seed": 0}
    assert prepared.index.is_trained
    assert prepared.index.ntotal == 0


@pytest.mark.parametrize(
    ("kind", "rows", "tuning", "message"),
    [
        ("ivf", 311, Tuning(), "at least 312 rows, there are 311; use the kind flat"),
        ("ivf", 50, Tuning(nlist=51), "nlist = 51 does not fit: 1 to 50"),
        ("ivf", 50, Tuning(nlist=5, nprobe=6), "nprobe = 6 does not fit: 1 to 5"),
        ("flat", 50, Tuning(nprobe=6), "flat index has no lists"),
    ],
)
def test_wishes_that_do_not_fit_are_refused(kind: str, rows: int, tuning: Tuning, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        KINDS[kind](RandomRows(rows), tuning)


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_gives_an_index_that_finds_the_rows_put_in(kind: str) -> None:
    rows = RandomRows(400)
    index: Any = KINDS[kind](rows, Tuning()).index
    index.add(rows.sample(400, seed=3))
    assert index.search(rows.sample(400, seed=3)[7:8], 1)[1].tolist() == [[7]]


def test_a_missing_faiss_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(VlmError, match=r'pip install "vlm\[cpu\]"'):
        load_faiss()
