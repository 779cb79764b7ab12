import json

import numpy as np
import pyarrow.parquet as pq
import pytest

import vlm
from tests.index.embed_fixture import embed_shards
from vlm.cli.main import main
from vlm.data.curation.filter import parse_filter
from vlm.data.curation.pipeline import FILTERS, curate
from vlm.data.curation.score_columns import ScoreColumns
from vlm.data.tar import open_index
from vlm.errors import UsageError
from vlm.index.curation_scores import ScoreWriter
from vlm.index.embeddings_folder import Embeddings


@pytest.fixture
def writer(embeddings):
    return ScoreWriter(Embeddings.open(embeddings))


@pytest.fixture
def texts(tmp_path, shards, model):
    embed_shards(model, shards, tmp_path / "texts", model_spec="colours", modality="text", batch_size=5)
    return Embeddings.open(tmp_path / "texts")


def values(signal):
    table = pq.read_table(signal.path)
    return dict(zip(table["key"].to_pylist(), table["value"].to_pylist(), strict=True))


def test_similarity_is_the_highest_cosine_with_the_own_captions(writer, texts):
    found = values(writer.similarity(texts))
    assert len(found) == 11
    assert found["00"] == pytest.approx(1.0, abs=1e-3)


def test_each_value_names_its_sample_by_the_content_of_its_shard(writer, texts, shards):
    table = pq.read_table(writer.similarity(texts).path)
    rows = zip(table["shard"].to_pylist(), table["number"].to_pylist(), table["key"].to_pylist(), strict=True)
    contents = [open_index(address).fingerprint for address in shards]
    assert all(key == f"{contents.index(shard)}{number}" for shard, number, key in rows)


def test_duplicates_are_linked_through_chains_and_the_rest_stand_alone(writer):
    exact = values(writer.duplicates(0.999))
    same = np.isclose(writer.vectors @ writer.vectors.T, 1, atol=1e-3)
    keys = [origin.key for origin in writer.images.origins()]
    for row, key in enumerate(keys):
        others = [other for other in np.flatnonzero(same[row]) if other != row]
        assert (exact[key] == -1) == (not others)
        assert all(exact[keys[other]] == exact[key] for other in others)
    assert set(values(writer.duplicates(1e-6)).values()) == {0}


def test_scores_are_within_the_range_of_a_cosine_and_equal_rows_are_found_at_one(writer, texts, embeddings):
    for column in (writer.near(Embeddings.open(embeddings)), writer.similarity(texts)):
        assert all(-1 <= value <= 1 for value in values(column).values())
    assert all(0 <= value <= 2 for value in values(writer.clusters(3)[1]).values())
    groups = values(writer.duplicates(1.0))
    keys = [origin.key for origin in writer.images.origins()]
    for row, key in enumerate(keys):
        is_equal = (writer.vectors == writer.vectors[row]).all(axis=1)
        assert (groups[key] == -1) == (is_equal.sum() == 1)


def test_clusters_and_the_distance_to_their_centres(writer):
    cluster, distance = writer.clusters(3, seed=1)
    assert set(values(cluster).values()) == {0, 1, 2}
    assert all(-1e-6 <= value < 1 for value in values(distance).values())


def test_nearness_to_itself_is_one(writer, embeddings):
    assert min(values(writer.near(Embeddings.open(embeddings))).values()) == pytest.approx(1.0, abs=1e-3)


def test_overlap_names_the_evaluation_shards(writer, embeddings, shards):
    path = writer.overlap(Embeddings.open(embeddings)).path
    described = (pq.read_schema(path).metadata or {})[b"details"].decode()
    assert all(open_index(address).fingerprint in described for address in shards)


def test_the_call_gives_what_the_verb_prints(embeddings, texts, capsys):
    words = ["score", str(embeddings), "--texts", str(texts.folder), "--clusters", "2", "--seed", "1", "--json"]
    assert main(words) == 0
    scores = vlm.score(embeddings, texts=texts.folder, clusters=2, seed=1)
    assert json.loads(capsys.readouterr().out) == scores.to_json()
    assert [score.name for score in scores] == ["similarity", "cluster", "centre-distance"]
    with pytest.raises(UsageError, match="Nothing to compute; give texts, duplicates, clusters, near or overlap"):
        vlm.score(embeddings)


def test_curation_reads_what_was_written(writer, texts, shards):
    best = writer.similarity(texts)
    result = curate(shards, [parse_filter("similarity:min=0.99", FILTERS)], columns=ScoreColumns([best.path]))
    kept = sum(value >= 0.99 for value in values(best).values())
    assert result.selection.kept == kept > 0


def test_what_cannot_be_compared_is_refused(writer, texts, make_model, shards, tmp_path):
    other = make_model(fingerprint="another")
    embed_shards(other, shards, tmp_path / "other", model_spec="x", batch_size=5)
    with pytest.raises(UsageError, match="another model"):
        writer.near(Embeddings.open(tmp_path / "other"))
    with pytest.raises(UsageError, match="holds images"):
        writer.similarity(writer.images)
    with pytest.raises(UsageError, match="holds texts"):
        ScoreWriter(texts)
    with pytest.raises(UsageError, match="clusters"):
        writer.clusters(12)
    with pytest.raises(UsageError, match="outside 0 to 1"):
        writer.duplicates(1.5)
