import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm.errors import UsageError, VlmError
from vlm.index.embeddings_folder import normalize_rows
from vlm.service.search import Query, SearchResult, SearchService, combine_terms


@pytest.fixture
def service(index: Path, make_model: Callable[..., Any]) -> SearchService:
    return SearchService.open(index, load=lambda _: make_model())


def first_caption(result: SearchResult) -> str:
    return result.hits[0].entry.captions[""][0]


def test_a_text_finds_the_image_it_describes(service: SearchService) -> None:
    result = service.search(Query(texts=("green and magenta",), top=3))
    assert first_caption(result) == "green and magenta"
    assert result.hits[0].score == pytest.approx(1, abs=1e-3)
    assert len(result.hits) == 3


@pytest.mark.parametrize("as_bytes", [True, False])
def test_a_image_finds_its_like(
    tmp_path: Path, service: SearchService, paint: Callable[..., bytes], as_bytes: bool
) -> None:
    (tmp_path / "q.png").write_bytes(paint("cyan", "red"))
    image = paint("cyan", "red") if as_bytes else tmp_path / "q.png"
    assert first_caption(service.search(Query(images=(image,)))) == "cyan and red"


def test_terms_are_added_and_minus_terms_taken_away(service: SearchService, paint: Callable[..., bytes]) -> None:
    mixed = service.search(Query(texts=("magenta",), images=(paint("blue", "green"),), minus=("blue",), top=11))
    model = service.model
    texts = model.embed_texts(["magenta", "blue", "blue and green"]).numpy()
    expected = normalize_rows((texts[0] + texts[2] - texts[1])[None])
    assert [hit.score for hit in mixed.hits] == pytest.approx(
        [hit.score for hit in service.index.search(expected, 11)[0]], abs=1e-5
    )


def test_weights_belong_to_the_terms_in_their_order(service: SearchService) -> None:
    little_red = Query(texts=("red", "blue"), minus=("green",), weights=(0.01, 1.0, 0.01))
    little_blue = Query(texts=("red", "blue"), minus=("green",), weights=(1.0, 0.01, 0.01))
    assert "blue" in first_caption(service.search(little_red))
    assert "red" in first_caption(service.search(little_blue))


def test_a_weight_below_0_takes_its_term_away(service: SearchService, paint: Callable[..., bytes]) -> None:
    away = Query(texts=("red", "blue"), images=(paint("blue"),), weights=(1.0, 1.0, -0.5))
    minus = Query(texts=("red", "blue"), minus=("blue",), weights=(1.0, 1.0, 0.5))
    results = service.search_many([away, minus])
    assert [hit.score for hit in results[0].hits] == pytest.approx([hit.score for hit in results[1].hits], abs=1e-6)
    assert away.describe() == "red + blue − an image"


@pytest.mark.parametrize("shape", [(8,), (1, 8)])
def test_a_vector_asks_without_a_model(service: SearchService, tmp_path: Path, shape: tuple[int, ...]) -> None:
    vector = 7 * service.model.embed_texts(["cyan and red"]).numpy()[0]
    np.save(tmp_path / "q.npy", vector.astype(np.float64).reshape(shape))
    service = SearchService.open(service.index.folder, load=lambda _: pytest.fail("the model was loaded"))
    by_file = service.search(Query(vectors=(tmp_path / "q.npy",)))
    by_numbers = service.search(Query(vectors=(tuple(vector.tolist()),)))
    assert first_caption(by_file) == "cyan and red"
    assert by_file.hits[0].score == pytest.approx(1, abs=1e-3)
    assert [hit.entry.uid for hit in by_numbers.hits] == [hit.entry.uid for hit in by_file.hits]
    assert by_numbers.to_json()["question"]["vectors"] == ["(8 numbers)"]


def test_vectors_are_added_between_items_and_minus_terms(service: SearchService) -> None:
    green, blue = (tuple(row) for row in service.model.embed_texts(["green", "blue"]).tolist())
    uid = service.search(Query(texts=("green",), top=1)).hits[0].entry.uid
    query = Query(texts=("red",), items=(uid,), vectors=(green, blue), minus=("red",), weights=(4, 1, 1, 9, 4))
    asked = service.search(query)
    plain = service.search(Query(texts=("green", "blue"), items=(uid,), weights=(1, 9, 1)))
    assert [hit.score for hit in asked.hits] == pytest.approx([hit.score for hit in plain.hits], abs=1e-6)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.ones((2, 8), np.float32), "holds 2 vectors; a query takes one, --queries takes them all"),
        (np.array(["red"]), "holds no vectors"),
        (np.ones((1, 1, 8), np.float32), "holds no vectors"),
        (np.array([{}], object), "cannot be read as .npy"),
    ],
)
def test_a_file_that_is_no_vector_is_named(
    service: SearchService, tmp_path: Path, rows: np.ndarray, message: str
) -> None:
    np.save(tmp_path / "q.npy", rows)
    with pytest.raises(UsageError, match=rf"q\.npy {message}"):
        service.search(Query(vectors=(tmp_path / "q.npy",)))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [1e-320, 1e-200, 1e200, 1e308])
def test_only_the_direction_of_a_vector_counts_however_long_it_is(
    service: SearchService, tmp_path: Path, size: float
) -> None:
    vector = np.sign(service.model.embed_texts(["cyan and red"]).numpy()[0]).astype(np.float64) * size
    np.save(tmp_path / "q.npy", vector)
    asked = Query(vectors=(tmp_path / "q.npy", tuple(vector.tolist())))
    assert first_caption(service.search(asked)) == "cyan and red"


@given(weights=st.lists(st.floats(0.01, 100), min_size=3, max_size=3), factor=st.floats(0.01, 100))
def test_a_mixture_has_unit_length_and_only_the_ratio_of_weights_counts(weights: list[float], factor: float) -> None:
    terms = normalize_rows(np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32))
    mixed = combine_terms(terms, np.asarray(weights, np.float32))
    assert float(np.linalg.norm(mixed)) == pytest.approx(1, abs=1e-5)
    assert np.allclose(mixed, combine_terms(terms, np.asarray(weights, np.float32) * np.float32(factor)), atol=1e-5)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (Query(), "needs a text, image, item or vector"),
        (Query(minus=("red",)), "minus alone is not enough"),
        (Query(texts=(" ",)), "is empty"),
        (Query(texts=("red",), weights=(1.0, 1.0)), "1 terms need as many weights"),
        (Query(texts=("red",), weights=(0.0,)), "weights that are not 0"),
        (Query(texts=("red",), weights=(float("nan"),)), "weights that are not 0"),
        (Query(texts=("red",), weights=(-1.0,)), "above 0, and so must one of the others"),
        (Query(texts=("red",), minus=("blue",), weights=(1.0, -1.0)), "those of minus terms must be above 0"),
        (Query(vectors=((1.0, 0.0),)), "The vector has 2 numbers; the rows of this index have 8"),
        (Query(vectors=((0.0,) * 8,)), "The vector has length 0.0"),
        (Query(vectors=((float("inf"),) * 8,)), "must be finite"),
        (Query(vectors=(Path("/nowhere.npy"),)), r"/nowhere\.npy cannot be read as \.npy"),
        (Query(texts=("red",), minus=("red",)), "cancel out"),
        (Query(texts=("red",), top=0), "top = 0"),
        (Query(images=(Path("/nowhere.png"),)), r"/nowhere\.png cannot be read: No such file"),
        (Query(images=(Path("a\0.png"),)), "cannot be read: that is not a valid file name"),
        (Query(images=(Path("\ud83d.png"),)), "cannot be read: that is not a valid file name"),
        (Query(texts=("caf\udce9",)), r"'caf\\udce9' is not Unicode text: its character 4"),
        (Query(texts=("red",), minus=("\ud83d cat",)), "is not Unicode text: its character 1"),
        (Query(texts=("red", "blue"), weights=(1.0, 1e-320)), "each must be from 1e-06 to 1e\\+06"),
        (Query(texts=("red", "blue"), weights=(1.0, 1e308)), "each must be from 1e-06 to 1e\\+06"),
    ],
)
def test_a_question_that_means_nothing_is_refused(service: SearchService, query: Query, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        service.search(query)


def test_a_image_that_cannot_be_read_is_named(service: SearchService, tmp_path: Path) -> None:
    (tmp_path / "q.png").write_bytes(b"no image")
    with pytest.raises(VlmError, match=r"q\.png cannot be used as a query: unreadable image"):
        service.search(Query(images=(tmp_path / "q.png",)))


def test_the_model_named_by_the_index_is_loaded_once_with_the_first_question(
    index: Path, make_model: Callable[..., Any]
) -> None:
    loaded: list[str] = []

    def load(spec: str) -> Any:
        loaded.append(spec)
        return make_model()

    service = SearchService.open(index, load=load)
    assert loaded == []
    for _ in range(2):
        service.search(Query(texts=("red",)))
    assert loaded == ["colours"]


def test_a_question_through_another_model_is_refused(index: Path, make_model: Callable[..., Any]) -> None:
    service = SearchService.open(index, model_spec="runs/b", load=lambda _: make_model(fingerprint="shapes"))
    with pytest.raises(UsageError, match="runs/b is another model"):
        service.search(Query(texts=("red",)))


def test_an_answer_can_be_written_as_json(service: SearchService, paint: Callable[..., bytes]) -> None:
    result = service.search(Query(texts=("red",), images=(paint("red"),), minus=("blue",), top=2))
    values = json.loads(json.dumps(result.to_json()))
    assert values["question"]["weights"] == [1, 1, -1]
    assert [hit["rank"] for hit in values["hits"]] == [1, 2]
    assert values["hits"][0]["key"] == result.hits[0].entry.key
    assert values["embed_milliseconds"] >= 0
    assert values["search_milliseconds"] >= 0


def test_loading_the_model_is_logged_apart_from_embedding(
    index: Path, make_model: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    def load(spec: str) -> Any:
        time.sleep(0.3)
        return make_model()

    caplog.set_level(logging.INFO, logger="vlm")
    service = SearchService.open(index, load=load)
    result = service.search(Query(texts=("red",)))
    assert result.embed_milliseconds < 300
    assert [message for message in caplog.messages if "colours was loaded in 0.3 s" in message]
