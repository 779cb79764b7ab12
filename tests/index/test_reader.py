from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vlm.errors import UsageError, VlmError
from vlm.index.ann.index_types import TuningParams
from vlm.index.build import build_index
from vlm.index.embeddings_folder import Embeddings, normalize_rows
from vlm.index.reader import Index

Write = Callable[..., Path]


def clustered(rows: int, *, seed: int, dimension: int = 16) -> np.ndarray:
    """Points about 40 centres, as embeddings of a data set with classes lie; the centres are always the same."""
    centres = np.random.default_rng(99).standard_normal((40, dimension))
    rng = np.random.default_rng(seed)
    points = centres[rng.integers(40, size=rows)] + 0.4 * rng.standard_normal((rows, dimension))
    return normalize_rows(points.astype(np.float32))


@pytest.fixture
def given(tmp_path: Path, embed_vectors: Write) -> Callable[..., tuple[Index, np.ndarray]]:
    """Builds an index of given vectors; gives it with its rows as they were stored."""

    def build(vectors: np.ndarray, kind: str = "flat", **tuning: int) -> tuple[Index, np.ndarray]:
        folder = embed_vectors(vectors)
        build_index(folder, tmp_path / "i", kind=kind, tuning=TuningParams(**tuning))
        return Index.open(tmp_path / "i"), np.concatenate(list(Embeddings.open(folder).blocks()))

    return build


@pytest.mark.parametrize("top", [1, 7, 3000])
def test_a_flat_search_equals_brute_force_up_to_ties(given: Callable[..., tuple[Index, np.ndarray]], top: int) -> None:
    vectors = clustered(2100, seed=0)
    vectors[500:520] = vectors[0]
    index, rows = given(vectors)
    queries = np.concatenate([clustered(20, seed=1), vectors[:1]])
    truth = queries @ rows.T
    for query, hits in enumerate(index.search(queries, top)):
        found = [hit.entry.row for hit in hits]
        assert len(set(found)) == len(found) == min(top, 2100)
        assert np.allclose([hit.score for hit in hits], np.sort(truth[query])[::-1][: len(hits)], atol=1e-5)
        assert np.allclose([hit.score for hit in hits], truth[query, found], atol=1e-5)


def test_hits_are_joined_to_the_entries_of_their_rows(given: Callable[..., tuple[Index, np.ndarray]]) -> None:
    vectors = clustered(1200, seed=0)
    index, _ = given(vectors)
    hits = index.search(vectors[[3, 1100]], 1)
    assert [hit[0].entry.key for hit in hits] == ["k3", "k1100"]


def test_equal_scores_come_in_the_order_of_their_rows(given: Callable[..., tuple[Index, np.ndarray]]) -> None:
    index, _ = given(np.tile(np.eye(4, dtype=np.float32)[:1], (30, 1)))
    assert [hit.entry.row for hit in index.search(np.eye(4, dtype=np.float32)[:1], 30)[0]] == list(range(30))


def recall(index: Index, rows: np.ndarray, queries: np.ndarray, top: int = 10) -> float:
    truth = np.argsort(-(queries @ rows.T), axis=1)[:, :top]
    found = [[hit.entry.row for hit in hits] for hits in index.search(queries, top)]
    return float(np.mean([len(set(f) & set(t)) / top for f, t in zip(found, truth.tolist(), strict=True)]))


def test_ivf_by_its_rule_recalls_nearly_all_and_with_all_lists_everything(
    given: Callable[..., tuple[Index, np.ndarray]], tmp_path: Path
) -> None:
    index, rows = given(clustered(8000, seed=0), "ivf")
    queries = clustered(50, seed=1)
    assert recall(index, rows, queries) >= 0.97
    build_index(tmp_path / "vectors", tmp_path / "all", kind="ivf", tuning=TuningParams(nprobe=205))
    assert recall(Index.open(tmp_path / "all"), rows, queries) == 1.0
    build_index(tmp_path / "vectors", tmp_path / "one", kind="ivf", tuning=TuningParams(nprobe=1))
    assert recall(Index.open(tmp_path / "one"), rows, queries) < 0.97


def test_an_ivf_search_is_never_silently_short(given: Callable[..., tuple[Index, np.ndarray]]) -> None:
    index, rows = given(clustered(2000, seed=0), "ivf", nprobe=1)
    queries = clustered(3, seed=1)
    assert [len(hits) for hits in index.search(queries, 1500)] == [1500] * 3
    assert recall(index, rows, queries, 1500) == 1.0


def test_another_model_is_refused_by_name_with_its_cure(index: Path) -> None:
    opened = Index.open(index)
    opened.require_model("colours", "runs/a")
    with pytest.raises(
        UsageError, match=r"by colours \(fingerprint colours\); runs/b .*fingerprint shapes.*Query with"
    ):
        opened.require_model("shapes", "runs/b")
    with pytest.raises(UsageError, match="colours has changed since"):
        opened.require_model("shapes", "colours")


@pytest.mark.parametrize(
    ("queries", "top", "message"),
    [
        (np.ones((1, 9), np.float32), 1, "9 dimensions, the rows of this index 8"),
        (np.stack([np.ones(8), np.zeros(8)]).astype(np.float32), 1, "Query 1 has length 0"),
        (np.full((1, 8), np.nan, np.float32), 1, "Query 0 has length nan"),
        (np.full((1, 8), np.inf, np.float32), 1, "Query 0 has length inf"),
        (np.ones((1, 8), np.float32), 0, "top = 0"),
    ],
)
def test_queries_that_mean_nothing_are_refused(index: Path, queries: np.ndarray, top: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Index.open(index).search(queries, top)


def test_the_length_of_a_query_does_not_matter(index: Path) -> None:
    query, opened = np.arange(8, dtype=np.float32)[None] + 1, Index.open(index)
    (long,), (short,) = opened.search(query * 7, 3), opened.search(query, 3)
    assert [hit.entry for hit in long] == [hit.entry for hit in short]
    assert [hit.score for hit in long] == pytest.approx([hit.score for hit in short], abs=1e-6)


@pytest.mark.parametrize("name", ["segments/segment-00000.faiss", "catalogue-00001.sqlite"])
def test_a_missing_shortened_or_overwritten_file_is_named_with_its_cure(index: Path, name: str) -> None:
    path = index / name
    data = path.read_bytes()
    path.write_bytes(b"x" * len(data))
    with pytest.raises(VlmError, match=f"{name} .*build the index again"):
        Index.open(index)
    path.write_bytes(data[:-1])
    with pytest.raises(VlmError, match=f"{name} is damaged.*build the index again"):
        Index.open(index)
    path.unlink()
    with pytest.raises(VlmError, match=f"{name} is missing.*build the index again"):
        Index.open(index)


def test_a_segment_of_another_index_is_refused(tmp_path: Path, embed_vectors: Write, index: Path) -> None:
    build_index(embed_vectors(clustered(11, seed=0, dimension=6)), tmp_path / "other")
    path, other = index / "segments/segment-00000.faiss", tmp_path / "other/segments/segment-00000.faiss"
    size = path.stat().st_size
    path.write_bytes(other.read_bytes() + b"\0" * (size - other.stat().st_size))
    with pytest.raises(VlmError, match="11 rows of 6 dimensions, 11 of 8 were written"):
        Index.open(index)


def test_a_folder_of_another_kind_is_refused(embeddings: Path) -> None:
    with pytest.raises(UsageError, match=r"'embeddings'.*'index' was expected"):
        Index.open(embeddings)


def test_info_tells_rows_model_and_origin(index: Path, embeddings: Path) -> None:
    info = Index.open(index).info()
    assert (info.rows, info.dimension, info.modality, info.num_shards) == (11, 8, "image", 3)
    assert (info.model, info.model_fingerprint) == ("colours", "colours")
    assert info.embeddings_fingerprint == Embeddings.open(embeddings).manifest.fingerprint
