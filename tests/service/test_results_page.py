import base64
import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import vlm
from tests.index.embed_fixture import embed_shards
from vlm.index.build import build_index
from vlm.service.results_page import results_page, write_results_page
from vlm.service.search import Query, SearchService

EVIL = '<script>alert("1")</script> & "red"'


@pytest.fixture
def service(index: Path, make_model: Callable[..., Any]) -> SearchService:
    return SearchService.open(index, load=lambda _: make_model())


def page(service: SearchService, *queries: Query) -> str:
    return results_page([service.search(q) for q in queries], title="Answers", info=service.index.info())


def shown_images(html: str) -> list[Image.Image]:
    found = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', html)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


class Nesting(HTMLParser):
    """Fails where a tag is closed that was not opened last."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Remember what is open."""
        self.tags.add(tag)
        if tag not in {"meta", "img"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Only the last may be closed."""
        assert self.open.pop() == tag


def test_each_hit_shows_its_image_caption_key_and_score(service: SearchService) -> None:
    html = page(service, Query(texts=("green and magenta",), top=4))
    images = shown_images(html)
    assert len(images) == 4
    left, right = images[0].getpixel((2, 8)), images[0].getpixel((14, 8))
    assert isinstance(left, tuple)
    assert isinstance(right, tuple)
    assert max(left[0], left[2]) < 60 < 200 < left[1]
    assert right[1] < 60 < 200 < min(right[0], right[2])
    first = html.split('<li class="card tile hit">')[1]
    for text in ("green and magenta</p>", ">stripes of magenta", "1.000</span>", ">22</p>", '<rect width="100.0"'):
        assert text in first


def test_every_question_has_its_section_and_its_own_image(service: SearchService, paint: Callable[..., bytes]) -> None:
    queries = [Query(texts=("red",), top=2), Query(images=(paint("blue"),), minus=("white",), top=2)]
    html = page(service, *queries)
    assert html.count("<section") == 2
    assert 'href="#q2"' in html
    assert len(shown_images(html)) == 5


def test_nothing_in_a_sample_or_a_question_becomes_markup(
    tmp_path: Path, write_shard: Callable[..., str], paint: Callable[..., bytes], make_model: Callable[..., Any]
) -> None:
    shard = write_shard(tmp_path / "a&b.tar", [('k"<i>', paint("red"), [EVIL, EVIL])])
    embed_shards(make_model(), [shard], tmp_path / "e", model_spec="<b>colours</b>")
    build_index(tmp_path / "e", tmp_path / "i")
    service = SearchService.open(tmp_path / "i", load=lambda _: make_model())
    html = results_page([service.search(Query(texts=(EVIL,)))], title=EVIL, info=service.index.info())
    assert "&lt;script&gt;alert" in html
    checked = Nesting()
    checked.feed(html)
    assert checked.open == []
    assert not checked.tags & {"script", "i", "b"}


def test_the_page_asks_nothing_of_other_hosts(service: SearchService) -> None:
    html = page(service, Query(texts=("red",)))
    assert "http" not in html.replace("http-equiv", "")
    assert "<link" not in html
    assert "url(" not in html


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "00000.tar no longer exists"),
        (lambda path: path.write_bytes(b"short"), "00000.tar is shorter than it was"),
        (lambda path: path.write_bytes(b"\0" * 100_000), "image cannot be shown"),
    ],
)
def test_a_image_that_cannot_be_read_any_more_gets_a_tile_that_says_so(
    service: SearchService, shards: list[str], damage: Callable[[Path], object], message: str
) -> None:
    damage(Path(shards[0]))
    html = page(service, Query(texts=("red",), top=11))
    assert html.count('<p class="missing">') == 4
    assert message in html
    assert len(shown_images(html)) == 7


def test_the_page_is_written_whole(tmp_path: Path, service: SearchService) -> None:
    path = tmp_path / "new" / "gallery.html"
    write_results_page(path, [service.search(Query(texts=("red",)))], title="A", info=service.index.info())
    assert path.read_text().endswith("</html>\n")
    assert list(path.parent.iterdir()) == [path]


def test_a_program_writes_the_page_of_what_it_found(tmp_path: Path, service: SearchService) -> None:
    result = service.search(Query(texts=("red",)))
    vlm.write_results_page(str(tmp_path / "one.html"), result)
    html = (tmp_path / "one.html").read_text()
    assert "<title>Search results</title>" in html
    assert html.count("<img") == len(result.hits)
    # no index was named, so none is told
    assert "embeddings ·" not in html
    assert "Index <code>" not in html


def test_what_narrows_the_answers_and_how_many_are_alike_is_said(service: SearchService) -> None:
    uid = service.search(Query(texts=("red",))).hits[0].entry.uid
    query = Query(
        texts=("red",), items=(uid,), where="width < 99", words="red", duplicates=0.01, diversity=0.25, at_least=-0.5
    )
    html = page(service, query)
    for said in ("where width &lt; 99", "words red", "collapsed from cosine 0.01", "diversity 0.25", "cosine ≥ -0.5"):
        assert said in html
    assert f'<span class="text">{uid}</span>' in html
    assert re.search(r"[1-9] more like it", html)
    assert "where" not in page(service, Query(texts=("red",))).split("</style>")[1]
