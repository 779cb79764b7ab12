"""What is likely relevant, in a space where an unrelated text is a random direction and `row N` is near row N."""

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.service.circle_fixture import origin
from vlm.data.transforms import EvalTransform
from vlm.errors import UsageError
from vlm.index.ann.index_types import TuningParams
from vlm.index.build import build_index
from vlm.index.embeddings_folder import UNKNOWN, EmbeddingSpace, EmbeddingsWriter, Modality, normalize_rows
from vlm.index.writer import IndexWriter
from vlm.service.query import MIN_PROBABILITY, Query, read_queries
from vlm.service.relevance import NullScores, unrelated_texts
from vlm.service.search import SearchService
from vlm.tensor_types import Float32, Tensor, UInt8

DIMENSION = 24


def direction(name: str) -> np.ndarray:
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(DIMENSION)


@dataclass
class RandomModel:
    """Texts are random directions; `row N` and `row N weakly` are more and less near to row N."""

    fingerprint: str = "random"
    embedding_size: int = DIMENSION
    texts: list[str] = field(default_factory=list)

    @property
    def view(self) -> EvalTransform:
        return EvalTransform(size=8)

    def embed_images(self, images: UInt8[Tensor, "B 3 H W"]) -> Float32[Tensor, "B D"]:
        raise AssertionError("No picture is asked for.")

    def embed_texts(self, texts: Sequence[str]) -> Float32[Tensor, "T D"]:
        self.texts += texts
        rows: list[np.ndarray] = []
        for text in texts:
            words = text.split()
            row = direction(text)
            if words[0] == "row":
                row = direction(f"image {words[1]}") + row * (2.0 if len(words) > 2 else 0.2)
            rows.append(row)
        return torch.from_numpy(normalize_rows(np.stack(rows).astype(np.float32)))


Open = Callable[..., SearchService]


@pytest.fixture
def model() -> RandomModel:
    return RandomModel()


@pytest.fixture
def open_random(tmp_path: Path, model: RandomModel) -> Open:
    def make(
        count: int = 400, *, copies: int = 0, fingerprint: str = "random", modality: Modality = "image"
    ) -> SearchService:
        """An index of `count` random rows; the last `copies` of them repeat row 0."""
        space = EmbeddingSpace(model="random", fingerprint=fingerprint, dimension=DIMENSION, modality=modality)
        writer = EmbeddingsWriter(tmp_path / "vectors", space=space, identity={})
        names = [f"image {0 if number >= count - copies else number}" for number in range(count)]
        vectors = normalize_rows(np.stack([direction(name) for name in names]).astype(np.float32))
        origins = [origin(f"u{number}", f"caption {number}", n=number) for number in range(count)]
        writer.add("/nowhere/0.tar", vectors, origins)
        writer.finish(inputs={}, details={"shards": ["/nowhere/0.tar"]})
        build_index(tmp_path / "vectors", tmp_path / "index", kind="flat", tuning=TuningParams())
        return reopened(tmp_path / "index", model)

    return make


def reopened(folder: Path, model: Any) -> SearchService:
    return SearchService.open(folder, load=lambda _: model)


def uids(result: Any) -> list[str]:
    return [hit.uid for hit in result.hits]


def test_a_related_query_is_answered_and_unrelated_ones_rarely_are(open_random: Open) -> None:
    service = open_random()
    result = service.search(Query(texts="row 7", relevant=True))
    assert uids(result) == ["u7"]
    assert result.hits[0].probability is not None
    assert result.hits[0].probability > 0.999
    strangers = service.search_many([Query(texts=f"stranger {number}", relevant=True) for number in range(300)])
    # one in ten, with five standard deviations on either side
    assert 0.02 < np.mean([bool(stranger.hits) for stranger in strangers]) < 0.19


def test_nothing_here_is_an_answer_that_says_how_near_the_nearest_is(open_random: Open) -> None:
    service = open_random()
    query = next(
        query
        for query in (Query(texts=f"stranger {number}", relevant=True) for number in range(20))
        if not service.search(query).hits
    )
    result = service.search(query)
    assert result.relevance is not None
    assert result.relevance.best is not None
    assert result.relevance.best < MIN_PROBABILITY
    assert f"the nearest row has a probability of {result.relevance.best:.2f}" in result.hint
    plain = result.to_json()
    assert plain["hits"] == []
    assert plain["relevance"] == {
        "kind": "words",
        "min_probability": MIN_PROBABILITY,
        "min_cosine": result.relevance.min_cosine,
        "best": result.relevance.best,
    }


def test_without_it_nothing_changes(open_random: Open, model: RandomModel) -> None:
    service = open_random()
    result = service.search(Query(texts="row 7"))
    assert len(result.hits) == 10
    plain = result.to_json()
    assert not {"relevance", "hint"} & set(plain)
    assert "relevant" not in plain["question"]
    assert "probability" not in plain["hits"][0]
    assert model.texts == ["row 7"]
    assert not (service.index.folder / "relevance.json").exists()
    assert Query(texts="a", relevant=False) == Query(texts="a")


def test_a_lower_probability_keeps_more(open_random: Open) -> None:
    service = open_random()
    counts = []
    for probability in (0.001, 0.5, 0.9, 0.999):
        result = service.search(Query(texts="row 7 weakly", relevant=probability, top=400))
        counts.append(len(result.hits))
        assert all(hit.probability is not None and hit.probability >= probability - 1e-6 for hit in result.hits)
        probabilities = [hit.probability or 0.0 for hit in result.hits]
        assert probabilities == sorted(probabilities, reverse=True)
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]


def test_rows_are_measured_against_random_rows_without_a_model(open_random: Open) -> None:
    service = open_random(copies=3)
    service = reopened(service.index.folder, None)
    result = service.search(Query(items="u0", relevant=True))
    assert uids(result) == ["u0", "u397", "u398", "u399"]
    assert result.relevance is not None
    assert result.relevance.kind == "rows"
    assert uids(service.search(Query(items="u7", relevant=True))) == ["u7"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"at_least": 0.99999}, ["u0", "u397", "u398", "u399"]),
        ({"at_least": -1.0}, ["u0", "u397", "u398", "u399"]),
        ({"duplicates": 0.99}, ["u0"]),
        ({"where": "n > 100"}, ["u397", "u398", "u399"]),
        # boosted, but not near enough
        ({"words": "caption 5"}, ["u0", "u397", "u398", "u399"]),
        ({"words": "caption 398"}, ["u398", "u0", "u397", "u399"]),
    ],
)
def test_it_is_a_minimum_cosine_beside_the_other_options(
    open_random: Open, options: dict[str, Any], expected: list[str]
) -> None:
    service = open_random(copies=3)
    result = service.search(Query(items="u0", relevant=True, **options))
    assert uids(result) == expected
    assert result.hint == ""
    spread = service.search(Query(items="u0", relevant=True, diversity=0.5, **options))
    assert sorted(uids(spread)) == sorted(expected)


def test_a_row_that_another_option_leaves_out_is_not_called_irrelevant(open_random: Open) -> None:
    result = open_random().search(Query(texts="row 7", relevant=True, at_least=1.0))
    assert result.hits == ()
    assert result.hint == ""


def test_pages_show_each_relevant_row_once_and_their_cursor_is_of_this_cut(open_random: Open) -> None:
    service = open_random(copies=6)
    query: dict[str, Any] = {"items": "u0", "relevant": True, "top": 3}
    others: list[dict[str, Any]] = [{"relevant": 0.5}, {"relevant": None}]
    first = service.search(Query(**query))
    second = service.search(Query(**query, after=first.next))
    third = service.search(Query(**query, after=second.next))
    assert [len(page.hits) for page in (first, second, third)] == [3, 3, 1]
    assert len({*uids(first), *uids(second), *uids(third)}) == 7
    assert third.next == ""
    for other in others:
        with pytest.raises(UsageError, match="belongs to another query"):
            service.search(Query(**(query | other), after=first.next))


def test_a_calibration_is_kept_until_a_tenth_of_the_rows_has_changed(open_random: Open, model: RandomModel) -> None:
    service = open_random(count=100)
    folder = service.index.folder
    query = Query(texts="row 7", relevant=True)
    service.search(query)
    assert len(model.texts) == len(unrelated_texts()) + 1

    def calibrates() -> bool:
        model.texts.clear()
        other = reopened(folder, model)
        other.search(query)
        return len(model.texts) > 1

    assert not calibrates()
    with IndexWriter(folder) as writer:
        writer.delete([f"u{number}" for number in range(50, 60)])
    assert not calibrates()
    with IndexWriter(folder) as writer:
        writer.delete(["u60"])
    assert calibrates()
    assert not calibrates()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"words": 3}', '{"words": {"median": 1}}'])
def test_a_damaged_calibration_is_made_again(open_random: Open, model: RandomModel, content: str) -> None:
    service = open_random()
    (service.index.folder / "relevance.json").write_text(content)
    assert uids(service.search(Query(texts="row 7", relevant=True))) == ["u7"]
    assert json.loads((service.index.folder / "relevance.json").read_text())["words"]["rows"] == 400


def test_a_calibration_of_another_model_is_not_used(open_random: Open, model: RandomModel) -> None:
    service = open_random()
    service.search(Query(texts="row 7", relevant=True))
    path = service.index.folder / "relevance.json"
    records = json.loads(path.read_text())
    records["words"] |= {"model_fingerprint": "other", "median": 5.0}
    path.write_text(json.dumps(records))
    assert uids(reopened(service.index.folder, model).search(Query(texts="row 7", relevant=True))) == ["u7"]


def test_a_folder_that_cannot_be_written_to_is_searched_all_the_same(open_random: Open) -> None:
    service = open_random()
    # a folder in its place fails for every user, root included
    (service.index.folder / "relevance.json").mkdir()
    assert uids(service.search(Query(texts="row 7", relevant=True))) == ["u7"]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (Query(texts="a", relevant=1.0), r"relevant = 1\.0: the probability must be above 0 and below 1"),
        (Query(texts="a", relevant=0.0), "above 0 and below 1"),
        (Query(texts="a", relevant=float("nan")), "above 0 and below 1"),
        (Query(vectors=((1.0,) * DIMENSION,), relevant=True), "does not say whether it is of a text or an image"),
        (Query(texts="a", items="u0", relevant=True), "not for a sum of both"),
        (Query(items="u0", minus="a", relevant=True), "not for a sum of both"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(open_random: Open, query: Query, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_random().search(query)


def test_an_index_of_too_few_rows_is_refused(open_random: Open) -> None:
    with pytest.raises(UsageError, match="has 19 rows; what is relevant can be calibrated from 20 on"):
        open_random(count=19).search(Query(texts="row 7", relevant=True))


def test_an_unknown_model_is_refused(open_random: Open) -> None:
    service = open_random(fingerprint=UNKNOWN)
    with pytest.raises(UsageError, match="was imported without its model"):
        service.search_many([Query(items="u0", relevant=True)])


def test_images_among_texts_are_refused_and_texts_are_not(open_random: Open) -> None:
    service = open_random(modality="text")
    assert uids(service.search(Query(texts="row 7", relevant=True))) == ["u7"]
    with pytest.raises(UsageError, match=r"Line 1: The rows of this index are texts"):
        service.search_many([Query(images=(b"",), relevant=True)], names=["Line 1"])


def test_a_line_of_queries_takes_true_or_a_probability() -> None:
    lines = ['{"texts": "a", "relevant": true}', '{"texts": "a", "relevant": 0.5}', '{"texts": "a"}']
    queries = read_queries(lines, Query(relevant=True)).values()
    assert [query.relevant for query in queries] == [MIN_PROBABILITY, 0.5, MIN_PROBABILITY]
    with pytest.raises(UsageError, match="relevant must be true, false or a number"):
        read_queries(['{"texts": "a", "relevant": "yes"}'], Query())


@given(median=st.floats(-1, 1), below=st.floats(0, 1), first=st.floats(-1, 1), second=st.floats(-1, 1))
def test_the_probability_increases_with_the_cosine(median: float, below: float, first: float, second: float) -> None:
    null_scores = NullScores(median=median, lower_quartile=median - below)
    low, high = sorted((first, second))
    assert 0 <= null_scores.probability(low) <= null_scores.probability(high) <= 1
    assert null_scores.probability(median) == pytest.approx(0.5)
    assert null_scores.probability(null_scores.min_cosine(0.9)) == pytest.approx(0.9)


def test_the_packaged_texts_are_several_hundred_different_ones() -> None:
    texts = unrelated_texts()
    assert len(set(texts)) == len(texts) >= 250
    assert all(text == text.strip() and text for text in texts)
