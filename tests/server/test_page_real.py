"""The page on real indexes: photos with captions, products with columns, and drawings named in 12 languages."""

import csv
import io
import json
import math
from pathlib import Path

import pytest

from tests.server.browser import CHROMIUM, search, uids, until, watched_pages
from tests.server.conftest import ClassifyingModel
from tests.server.real_indexes import LANGUAGES, ROWS, build_real_index, emoji, fashion, flickr8k
from vlm.data.curation.filter import parse_filter
from vlm.data.curation.pipeline import FILTERS, curate
from vlm.data.curation.score_columns import ScoreColumns
from vlm.server.serving import open_service, serve_in_background
from vlm.service.query import Query

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

SAMPLES = {"flickr8k": flickr8k, "fashion": fashion, "emoji": emoji}


@pytest.fixture(scope="module")
def real_service(real_data, tmp_path_factory):
    """All three, each under its name."""
    folders = {}
    for name, samples in SAMPLES.items():
        folder = tmp_path_factory.mktemp(name)
        folders[name] = build_real_index(folder, samples(real_data), ClassifyingModel())
    model = ClassifyingModel()
    return open_service(folders, load=lambda _: model)


@pytest.fixture(scope="module")
def real_address(real_service):
    with serve_in_background(real_service) as address:
        yield address


@pytest.fixture
def open_real(browser, real_address):
    with watched_pages(browser, real_address) as make:
        yield make


def expected_uids(service, name, **options):
    return [hit.entry.uid for hit in service.indexes[name].service.search(Query(**options)).hits]


def stored_image(service, name, uid):
    return service.indexes[name].image(uid)


def dropped(page, data):
    """Drop an image file onto the page."""
    page.evaluate(
        """(bytes) => {
          const transfer = new DataTransfer();
          transfer.items.add(new File([new Uint8Array(bytes)], "dropped.png", {type: "image/png"}));
          document.dispatchEvent(new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true}));
        }""",
        list(data),
    )


@pytest.mark.parametrize("name", SAMPLES)
def test_searching_scrolling_and_mixing(open_real, real_service, name):
    page = open_real(f"?index={name}&q=white")
    assert uids(page) == expected_uids(real_service, name, texts=("white",), top=40)
    # only what is near the window is loaded, and more comes while one scrolls
    until(page, "[...document.querySelectorAll('.tile img')].slice(0, 4).every(i => i.complete && i.naturalWidth)")
    assert page.eval_on_selector_all(".tile img", "images => images.every(image => image.loading === 'lazy')")
    for shown in range(80, ROWS + 1, 40):
        page.evaluate("scrollTo(0, document.body.scrollHeight)")
        until(page, f"document.querySelectorAll('#results .tile').length >= {shown}")
    everything = expected_uids(real_service, name, texts=("white",), top=ROWS)
    assert uids(page) == everything
    assert page.inner_text("#status") == f"{ROWS} results shown."
    # one that is least like the query, so that the two do not cancel out
    page.locator("#results .tile > button").last.click()
    page.click("#unlike")
    page.wait_for_url("**&-like=*")
    weighed = expected_uids(real_service, name, texts=("white",), items=(everything[-1],), weights=(1, -1), top=40)
    until(page, f"document.querySelector('.tile')?.dataset.uid === {json.dumps(weighed[0])}")
    assert uids(page) == weighed
    page.go_back()
    search(page, "− blue")
    page.wait_for_url("**-q=blue")
    until(page, "document.querySelectorAll('.tile').length === 40")
    assert uids(page) == expected_uids(real_service, name, texts=("white",), minus=("blue",), top=40)
    # an image finds itself first
    page.goto(f"{page.url.split('?')[0]}?index={name}")
    page.wait_for_selector("#results .empty")
    dropped(page, stored_image(real_service, name, everything[3]))
    page.wait_for_selector(".tile")
    assert page.locator(".tile .facts").first.inner_text().startswith("1.000")
    page.locator("#options summary").click()
    page.check("#fold")
    page.wait_for_url("**fold*")
    until(page, "/alike/.test(document.querySelector('.tile')?.innerText)")
    folded = expected_uids(
        real_service, name, images=(stored_image(real_service, name, everything[3]),), duplicates=0.95, top=40
    )
    assert uids(page) == folded


# a time, which a busy machine does not keep
@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLES)
def test_first_results_are_there_in_less_than_300_milliseconds(open_real, name):
    page = open_real(f"?index={name}")
    page.wait_for_selector("#results .empty")
    milliseconds = [math.inf]
    # until one is fast enough: what else the machine does is not the page's
    for word in 4 * ("red", "green", "blue", "black", "yellow", "cyan"):
        if min(milliseconds) < 300:
            break
        page.evaluate(
            """() => {
              window.firstTile = new Promise((resolve) => {
                const started = performance.now();
                const results = document.querySelector('#results');
                const observer = new MutationObserver(() => {
                  if (!results.querySelector('.tile')) return;
                  observer.disconnect();
                  requestAnimationFrame(() => resolve(performance.now() - started));
                });
                observer.observe(results, {childList: true});
              });
            }"""
        )
        page.evaluate("document.querySelector('.term button')?.click()")
        search(page, word)
        milliseconds.append(page.evaluate("window.firstTile"))
    assert min(milliseconds) < 300


def test_columns_filter_sort_and_count(open_real, real_service):
    page = open_real("?index=fashion&q=black")
    uids(page)
    page.locator("#options summary").click()
    counts = real_service.indexes["fashion"].facets(["gender"], top=12)["gender"]
    shown = page.locator("fieldset", has_text="gender").locator("label").all_inner_texts()
    assert [text.split() for text in shown] == [[count.value, str(count.rows)] for count in counts]
    for number in range(2):
        page.locator("fieldset", has_text="gender").locator("label").nth(number).locator("input").check()
    page.wait_for_url(f"**{counts[1].value}**")
    where = f"gender in ('{counts[0].value}', '{counts[1].value}')"
    wanted = expected_uids(real_service, "fashion", texts=("black",), where=where, top=40)
    until(page, f"document.querySelectorAll('.tile').length === {len(wanted)}")
    assert uids(page) == wanted
    # sorted is what relevance let through
    page.select_option("#sort", "year~down")
    page.wait_for_url("**sort=year**")
    until(page, "document.querySelectorAll('.tile').length > 0")
    entries = real_service.indexes["fashion"].entries(uids(page))
    years = [entry.metadata["year"] for entry in entries]
    assert years == sorted(years, reverse=True)
    assert set(uids(page)) == set(wanted)
    page.locator("fieldset", has_text="year").locator("label").first.locator("input").check()
    page.wait_for_url("**in.year**")
    assert page.inner_text("#active") == "3"
    page.reload()
    uids(page)
    assert page.inner_text("#active") == "3"


def test_names_of_every_language_are_searched_and_shown(open_real, real_service):
    index = real_service.indexes["emoji"]
    [entry] = index.entries([expected_uids(real_service, "emoji", texts=("yellow",), top=1)[0]])
    page = open_real("?index=emoji")
    page.wait_for_selector("#results .empty")
    page.locator("#options summary").click()
    search(page, "yellow")
    for language in LANGUAGES:
        [word] = entry.captions[language]
        page.fill("#words", word)
        page.press("#words", "Tab")
        wanted = expected_uids(real_service, "emoji", texts=("yellow",), words=word, top=40)
        assert wanted[0] == entry.uid
        shown = "JSON.stringify([...document.querySelectorAll('#results .tile')].map(tile => tile.dataset.uid))"
        until(page, f"new URLSearchParams(location.search).get('words') === {json.dumps(word)}")
        until(page, f"{shown} === JSON.stringify({json.dumps(wanted)})")
        page.locator("#results .tile > button").first.click()
        facts = page.inner_text("#detail-facts")
        assert f"caption ({language})\n{word}" in facts
        assert "vendor" in facts
        page.keyboard.press("Escape")


def test_selected_results_keep_what_they_say_in_every_script_and_select_for_training(open_real, real_service, tmp_path):
    page = open_real("?index=emoji&q=yellow")
    chosen = uids(page)[:3]
    for number in range(3):
        page.locator(".tile .check-mark input").nth(number).check()
    saved = {}
    for kind in ("selection", "csv", "json", "training"):
        with page.expect_download() as download:
            page.click(f"[data-save={kind}]")
        saved[kind] = Path(download.value.path()).read_text(encoding="utf-8")
    assert saved["selection"].split() == chosen
    keys = tmp_path / "keys.txt"
    keys.write_text(saved["training"], encoding="utf-8")
    [shard] = real_service.indexes["emoji"].service.index.details.shards
    result = curate([shard], [parse_filter(f"listed:keys={keys}", FILTERS)], columns=ScoreColumns(()))
    assert result.selection.kept == 3
    rows = json.loads(saved["json"])
    assert [row["uid"] for row in rows] == chosen
    assert set(rows[0]["captions"]) >= set(LANGUAGES)
    table = list(csv.DictReader(io.StringIO(saved["csv"])))
    assert [row["uid"] for row in table] == chosen
    assert all(row["vendor"] in ("noto", "blobmoji", "emojitwo") for row in table)


def test_real_images_are_classified(open_real, real_service):
    page = open_real("?index=fashion")
    page.wait_for_selector("#results .empty")
    page.click("#tab-classify")
    assert page.url.endswith("view=classify")
    page.fill("#classes", "black\nwhite\nred")
    files = []
    for uid in expected_uids(real_service, "fashion", texts=("black",), top=2):
        data = stored_image(real_service, "fashion", uid)
        files.append({"name": f"{uid}.jpg", "mimeType": "image/jpeg", "buffer": data})
    page.set_input_files("#classify-file", files)
    page.click("#classify button[type=submit]")
    page.wait_for_selector("#classified li >> nth=1")
    assert page.inner_text("#classified li >> nth=0 >> td >> nth=0") == "black"


@pytest.mark.parametrize("name", SAMPLES)
def test_the_map_of_each_and_from_one_to_the_other(open_real, name):
    page = open_real(f"?index={name}&view=map&q=white")
    until(page, f"/^{ROWS} images .* 40 of 40/.test(document.querySelector('#map-status').textContent)")
    # the photos have captions alone, without a column to colour by
    if column := {"fashion": "articleType", "emoji": "vendor"}.get(name):
        page.select_option("#map-colour", column)
        until(page, "document.querySelectorAll('#map-legend li').length > 1")
    other = "emoji" if name == "fashion" else "fashion"
    page.select_option("#index", other)
    until(page, "document.querySelectorAll('#map-legend li').length === 0")
    until(page, f"/^{ROWS} images .* 40 of 40/.test(document.querySelector('#map-status').textContent)")
    names = page.eval_on_selector_all("#map-colour option", "options => options.map(option => option.value)")
    assert ("vendor" in names) == (other == "emoji")


def test_only_relevant_results_are_left_where_that_is_asked_for(open_real, real_service):
    page = open_real("?index=fashion&q=black&relevant")
    page.wait_for_selector("#results .tile, #results .empty", timeout=60_000)
    assert uids(page) == expected_uids(real_service, "fashion", texts=("black",), relevant=True, top=40)
    # of images by their colours alone none is likely; what the page makes of one that is
    page.route("**/search", lambda route: route.fulfill(json=with_probability(route.fetch().json())))
    page.goto(f"{page.url.split('?')[0]}?q=red")
    page.wait_for_selector(".tile")
    assert "87%" in page.locator(".tile .facts").first.inner_text()
    page.locator("#results .tile > button").first.click()
    assert "relevant with probability 0.87" in page.inner_text("#detail-score")


def with_probability(answer):
    for hit in answer["hits"]:
        hit["probability"] = 0.87
    return answer
