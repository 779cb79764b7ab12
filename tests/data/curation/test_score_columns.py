import numpy as np
import pytest

from vlm.data.curation.score_columns import ScoreColumns, ScoreRows, write_score_column
from vlm.data.tar import open_index
from vlm.errors import UsageError, VlmError


@pytest.fixture
def shard(make_shard, make_image):
    sizes = [(40, 30), (80, 60), (40, 30), (40, 30), (40, 30)]
    return make_shard([{"image": make_image(n, size=size)} for n, size in enumerate(sizes)])


@pytest.fixture
def column(tmp_path):
    def write(shard, score, values, *, numbers=None, keys=None, **options):
        index = open_index(shard)
        numbers = list(range(len(values))) if numbers is None else numbers
        rows = ScoreRows(
            shards=[index.fingerprint] * len(values),
            numbers=numbers,
            keys=keys or [index[number].key for number in numbers],
            values=values,
        )
        path = tmp_path / f"{score}-{len(list(tmp_path.glob('*.parquet')))}.parquet"
        write_score_column(path, score, rows, **options)
        return path

    return write


def test_similarity_keeps_by_value_or_by_share_and_drops_what_has_none(shard, column, apply, times_by):
    path = column(shard, "similarity", [0.3, 0.25, 0.1, float("nan")], model="m1")
    curated = apply(shard, "similarity:min=0.25", columns=[path])
    assert curated.selection.times[0].tolist() == [1, 1, 0, 0, 0]
    assert curated.steps[0].result.without_value == 2
    assert curated.selection.lineage[1]["model"] == "m1"
    assert curated.selection.lineage[1]["without_value"] == 2
    assert times_by(shard, "similarity:top=0.34", columns=[path]) == [1, 0, 0, 0, 0]


def test_near_typical_and_atypical_rank_what_is_left(shard, column, times_by):
    near = column(shard, "near", [0.1, 0.2, 0.3, 0.4, 0.5])
    distance = column(shard, "centre-distance", [0.5, 0.1, 0.2, 0.2, 0.9])
    assert times_by(shard, "near:top=0.4", columns=[near]) == [0, 0, 0, 1, 1]
    assert times_by(shard, "typical:k=2", columns=[distance]) == [0, 1, 1, 0, 0]
    assert times_by(shard, "atypical:share=0.4", columns=[distance]) == [1, 0, 0, 0, 1]
    both = [near, distance]
    assert times_by(shard, "near:min=0.3", "typical:k=1", columns=both) == [0, 0, 1, 0, 0]


def test_groups_of_embeddings_keep_the_largest_image(shard, column, times_by):
    path = column(shard, "duplicates", [7, 7, -1, 3], numbers=[0, 1, 2, 4])
    assert times_by(shard, "embedding-duplicates", columns=[path]) == [0, 1, 1, 0, 1]


def test_clusters_are_capped_on_the_mean(make_shard, make_image, column, apply):
    image = make_image(0)
    shard = make_shard([{"image": image}] * 1010)
    path = column(shard, "cluster", [0] * 1000 + [1] * 9 + [-1])
    curated = apply(shard, "cluster-balance:cap=100", columns=[path])
    times = curated.selection.times[0]
    assert times[1000:].tolist() == [1] * 10
    assert 60 < times[:1000].sum() < 140
    assert curated.steps[0].result.curve[0] == {"cluster": 0, "samples": 1000, "expected": pytest.approx(100)}


def test_overlap_counts_only_against_the_same_evaluation_shards(shard, column, make_shard, make_image, apply):
    held = make_shard([{"image": make_image(99)}], name="val.tar")
    path = column(shard, "overlap", [0.96, 0.1], details={"against": [open_index(held).fingerprint]})
    curated = apply(shard, f"decontaminate:against={held}", columns=[path])
    assert curated.selection.times[0].tolist() == [0, 1, 1, 1, 1]
    other = column(shard, "overlap", [0.96], details={"against": ["other"]})
    with pytest.raises(VlmError, match="against other shards"):
        apply(shard, f"decontaminate:against={held}", columns=[other])


def test_a_signal_may_lie_in_several_files_and_in_a_folder(shard, column, times_by, tmp_path):
    column(shard, "near", [1.0, 2.0], numbers=[3, 1])
    column(shard, "near", [3.0], numbers=[0])
    assert times_by(shard, "near:min=2", columns=[tmp_path]) == [1, 1, 0, 0, 0]


def test_columns_that_do_not_fit_are_refused(shard, column, apply, tmp_path):
    with pytest.raises(UsageError, match="vlm score EMBEDDINGS"):
        apply(shard, "similarity:min=0")
    with pytest.raises(VlmError, match="calls sample 1 of a shard other"):
        apply(shard, "near:min=0", columns=[column(shard, "near", [1, 2], keys=["s00000", "other"])])
    with pytest.raises(VlmError, match="compute it again"):
        apply(shard, "cluster-balance:cap=1", columns=[_beyond(tmp_path, shard)])
    twice = column(shard, "similarity", [1, 2], numbers=[0, 0])
    with pytest.raises(VlmError, match="has two rows of one sample"):
        apply(shard, "similarity:min=0", columns=[twice])
    models = [column(shard, "near", [1], model=model) for model in ("a", "b")]
    with pytest.raises(VlmError, match="different models"):
        apply(shard, "near:min=0", columns=models)
    (tmp_path / "no.parquet").write_bytes(b"PAR1")
    with pytest.raises(UsageError, match="not a score column"):
        ScoreColumns([tmp_path / "no.parquet"])
    with pytest.raises(UsageError, match="no column file"):
        ScoreColumns([tmp_path / "absent"])
    with pytest.raises(UsageError, match="did you mean 'near'"):
        write_score_column(tmp_path / "x", "neer", ScoreRows(shards=[], numbers=[], keys=[], values=np.zeros(0)))


def _beyond(folder, shard):
    path = folder / "beyond.parquet"
    rows = ScoreRows(shards=[open_index(shard).fingerprint], numbers=[5], keys=["s00005"], values=[1])
    write_score_column(path, "cluster", rows)
    return path
