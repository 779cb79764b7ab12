"""Re-ranking by a captioner whose likelihoods are known: how much of a picture has the colours a text names."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from tests.service.paging_helper import pages, uids
from vlm.cli.search import show_result
from vlm.data.transforms import EvalTransform
from vlm.errors import UsageError
from vlm.index.writer import IndexWriter
from vlm.service.results_page import results_page
from vlm.service.search import Query, SearchResult, SearchService
from vlm.tensor_types import Float32, Tensor, UInt8


@dataclass
class Reader:
    """Finds a text likely if the first of its colours, as numbers of the palette, is the picture's last column."""

    colours: Any
    fingerprint: str = "reader"
    view: EvalTransform = field(default_factory=lambda: EvalTransform(size=8))
    can_caption: bool = True
    images: int = 0

    def text_log_likelihoods(self, images: UInt8[Tensor, "B 3 H W"], texts: Sequence[str]) -> Float32[Tensor, "B T"]:
        self.images += len(images)
        right = images.clone()
        right[..., : right.shape[-1] // 2] = right[..., right.shape[-1] // 2 :]
        return self.colours.embed_images(right) @ self.colours.embed_texts(texts).T - 1


@pytest.fixture
def reader(make_model: Callable[..., Any]) -> Reader:
    return Reader(make_model())


@pytest.fixture
def service(index: Path, make_model: Callable[..., Any], reader: Reader) -> SearchService:
    models: dict[str, Any] = {"colours": make_model(), "reader": reader}
    return SearchService.open(index, rerank_spec="reader", load=lambda spec: models[spec])


def captions(result: SearchResult) -> list[str]:
    return [hit.entry.captions[""][0] for hit in result.hits]


def test_the_likeliest_of_the_nearest_come_first_and_the_others_stay(service: SearchService) -> None:
    query = Query(texts=("green",), top=11)
    by_cosine = service.search(query)
    result = service.search(replace(query, rerank_top=3))
    assert by_cosine.hits[0].likelihood is None
    assert "likelihood" not in by_cosine.hits[0].to_json()
    # green is half of several pictures, and the right half of some
    assert [caption.endswith("green") for caption in captions(result)[:3]] == sorted(
        (caption.endswith("green") for caption in captions(result)[:3]), reverse=True
    )
    assert captions(result)[0].endswith("green")
    assert sorted(uids(result)[:3]) == sorted(uids(by_cosine)[:3])
    assert uids(result)[3:] == uids(by_cosine)[3:]
    likelihoods = [hit.likelihood for hit in result.hits]
    assert likelihoods[3:] == [None] * 8
    assert likelihoods[:3] == sorted((value for value in likelihoods if value is not None), reverse=True)
    assert result.to_json()["hits"][0]["likelihood"] == likelihoods[0] == pytest.approx(0, abs=1e-6)
    assert result.rerank_milliseconds is not None


def test_texts_count_by_their_weights_and_minus_texts_against(service: SearchService) -> None:
    items = tuple(uids(service.search(Query(texts=("red",), top=1))))
    weights = (1.0, 3.0, 9.0, 2.0)
    query = Query(texts=("green", "blue"), items=items, minus=("red",), weights=weights, top=11, rerank_top=11)
    for hit in service.search(query).hits:
        last = hit.entry.captions[""][0].split()[-1]
        expected = {"green": (0 - 3 + 2) / 6, "blue": (-1 + 0 + 2) / 6, "red": (-1 - 3 - 0) / 6}.get(last, -2 / 6)
        assert hit.likelihood == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("options", [{}, {"words": "stripes"}, {"duplicates": 0.9999}, {"where": "width > 1"}])
@pytest.mark.parametrize("count", [1, 4, 11, 50])
def test_pages_put_together_are_the_one_long_answer(
    service: SearchService, options: dict[str, Any], count: int
) -> None:
    query = Query(texts=("green and blue",), rerank_top=count, **options)
    whole = service.search(replace(query, top=99))
    assert whole.next == ""
    assert len(whole.hits) > 5
    for top in (1, 3, 4, 10):
        assert pages(service, replace(query, top=top)) == uids(whole)


def test_pages_behind_the_reranked_ask_the_captioner_no_more(service: SearchService, reader: Reader) -> None:
    query = Query(texts=("green",), top=4, rerank_top=4)
    after = service.search(query).next
    assert reader.images == 4
    second = service.search(replace(query, after=after))
    assert reader.images == 4
    assert [hit.likelihood for hit in second.hits] == [None] * 4


def test_a_cursor_belongs_to_its_captioner_its_count_and_its_generation(
    service: SearchService, reader: Reader, index: Path
) -> None:
    query = Query(texts=("green",), top=2, rerank_top=4)
    after = service.search(query).next
    reader.fingerprint = "another"
    for other in (query, replace(query, rerank_top=5), replace(query, rerank_top=0)):
        with pytest.raises(UsageError, match="belongs to another query"):
            service.search(replace(other, after=after))
    reader.fingerprint = "reader"
    with IndexWriter(index) as writer:
        writer.delete([service.search(query).hits[0].entry.uid])
    with pytest.raises(UsageError, match="version 1 to 2 since the last page"):
        service.search(replace(query, after=after))


def test_a_image_that_cannot_be_read_keeps_its_place(service: SearchService, tmp_path: Path) -> None:
    query = Query(texts=("green",), top=11)
    by_cosine = service.search(query)
    gone = tmp_path / "shards" / "00001.tar"
    lost = [place for place, hit in enumerate(by_cosine.hits) if hit.entry.shard == str(gone)]
    gone.unlink()
    result = service.search(replace(query, rerank_top=11))
    assert 0 < len(lost) < 11
    assert [uids(result)[place] for place in lost] == [uids(by_cosine)[place] for place in lost]
    assert set(result.unread) == {uids(by_cosine)[place] for place in lost}
    assert set(result.unread.values()) == {"The shard 00001.tar no longer exists"}
    assert result.to_json()["unread"] == result.unread
    read = [hit.likelihood for place, hit in enumerate(result.hits) if place not in lost]
    assert read == sorted((value for value in read if value is not None), reverse=True)
    assert all(result.hits[place].likelihood is None for place in lost)
    for shard in (tmp_path / "shards").glob("*.tar"):
        shard.unlink()
    assert uids(service.search(replace(query, rerank_top=11))) == uids(by_cosine)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (Query(items=("0/0",), rerank_top=5), "this query has no text"),
        (Query(texts=("red",), rerank_top=-1), "rerank_top = -1 is out of range"),
        (Query(texts=("red",), rerank_top=1001), "0 to 1,000"),
        (Query(texts=("red",), rerank_top=5, diversity=0.1), "use one of them"),
    ],
)
def test_a_question_that_cannot_be_reranked_is_refused(service: SearchService, query: Query, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        service.search(query)


def test_a_model_that_cannot_rerank_is_refused(service: SearchService, reader: Reader) -> None:
    query = Query(texts=("red",), rerank_top=5)
    reader.can_caption = False
    with pytest.raises(UsageError, match="reader has no caption decoder to rerank with"):
        service.search(query)
    reader.can_caption, service.rerank_spec = True, "colours"
    with pytest.raises(UsageError, match="colours has no caption decoder"):
        service.search(query)
    service.rerank_spec = ""
    with pytest.raises(UsageError, match="no model for it was named"):
        service.search(query)


def test_the_model_of_the_index_is_loaded_once_for_both(index: Path, make_model: Callable[..., Any]) -> None:
    loaded: list[str] = []

    def load(spec: str) -> Any:
        loaded.append(spec)
        model = make_model()
        both = Reader(model)
        for name in ("embed_texts", "embed_images", "embedding_size"):
            setattr(both, name, getattr(model, name))
        both.fingerprint = model.fingerprint
        return both

    service = SearchService.open(index, rerank_spec="colours", load=load)
    assert captions(service.search(Query(texts=("green",), rerank_top=5)))[0].endswith("green")
    assert loaded == ["colours"]


def test_likelihoods_and_unread_images_are_shown(
    service: SearchService,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "shards" / "00001.tar").unlink()
    result = service.search(Query(texts=("green",), top=11, rerank_top=11))
    show_result(result)
    printed = capsys.readouterr()
    assert "likelihood" in printed.out
    assert f"{result.hits[0].likelihood:.4f}" in printed.out
    assert "reranked in" in caplog.text
    assert f"cannot be read: {len(result.unread)}; the first, 1" in caplog.text
    page = results_page([result], title="Green", info=service.index.info())
    assert page.count("nats per token") == 11 - len(result.unread)
    assert "reranked by likelihood: top 11" in page
    assert f"not reranked, image unreadable: {len(result.unread)}" in page
