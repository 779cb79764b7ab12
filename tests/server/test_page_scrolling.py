"""More results come by themselves where the end of those shown is near, whatever brought it there."""

import io

import numpy as np
import pytest
from PIL import Image

from tests.server.browser import CHROMIUM, search, until, watched_pages
from tests.server.conftest import ClassifyingModel
from tests.server.real_indexes import build_real_index
from vlm.server.serving import open_service, serve_in_background

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

ROWS = 120
# as by a key that is pressed at this very moment: more results are there, and not yet drawn
SCROLL_AS_THEY_COME = """() => new MutationObserver(() => scrollTo(0, document.body.scrollHeight))
    .observe(document.querySelector('#results'), {childList: true})"""


def num_tiles(number):
    return f"document.querySelectorAll('#results .tile').length === {number}"


def drawings():
    generator = np.random.default_rng(0)
    for number in range(ROWS):
        file = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), np.uint8)).save(file, "PNG")
        yield f"{number:03d}", file.getvalue(), {"captions": [f"drawing {number}"]}


@pytest.fixture(scope="module")
def long_address(tmp_path_factory):
    model = ClassifyingModel()
    index = build_real_index(tmp_path_factory.mktemp("long"), drawings(), model)
    with serve_in_background(open_service({"long": index}, load=lambda _: model)) as address:
        yield address


@pytest.fixture
def open_long(browser, long_address):
    with watched_pages(browser, long_address) as make:
        yield make


def test_a_window_that_holds_the_first_results_is_filled(open_long):
    page = open_long("?q=red", viewport={"width": 1280, "height": 6000})
    until(page, num_tiles(ROWS))
    assert page.inner_text("#status") == f"{ROWS} results shown."


def test_the_end_may_be_scrolled_to_before_the_next_results_are_drawn(open_long):
    page = open_long("?q=red", viewport={"width": 1280, "height": 300})
    until(page, num_tiles(40))
    page.evaluate(SCROLL_AS_THEY_COME)
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    until(page, num_tiles(ROWS))


def test_results_stay_when_more_cannot_be_had_and_a_button_asks_again(open_long):
    page = open_long("?q=red", viewport={"width": 1280, "height": 300})
    until(page, num_tiles(40))
    requests = []

    def refuse(route):
        requests.append(route.request.url)
        route.fulfill(status=503, json={"error": "The service is busy."})

    page.route("**/search", refuse)
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    until(page, "/busy/.test(document.querySelector('#more').innerText)")
    page.wait_for_timeout(300)
    assert len(requests) == 1
    assert page.evaluate(num_tiles(40))
    page.unroute("**/search")
    page.get_by_text("Try again").click()
    until(page, num_tiles(80))
    assert page.inner_text("#more") == ""


def test_a_new_query_shows_its_first_results(open_long):
    page = open_long("?q=red")
    until(page, num_tiles(40))
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    until(page, num_tiles(80))
    search(page, "− blue")
    page.wait_for_url("**-q=blue")
    until(page, num_tiles(40))
    assert page.evaluate("document.querySelector('.tile').getBoundingClientRect().top >= 0")
