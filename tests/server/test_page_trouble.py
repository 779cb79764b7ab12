"""The search page where something goes wrong: what it says, and that it goes on when the trouble is over."""

import pytest

from tests.server.browser import CHROMIUM, until, watched_pages
from tests.server.real_indexes import build_real_index
from tests.server.test_page_scrolling import drawings, num_tiles
from vlm.server.serving import open_service, serve_in_background

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

FOCUSED_UID = "document.activeElement.closest('.tile')?.dataset.uid"
# as if a minute took a fifth of a second
HURRY = """() => {
    const timeout = AbortSignal.timeout.bind(AbortSignal);
    AbortSignal.timeout = (milliseconds) => timeout(milliseconds / 300);
}"""


@pytest.fixture
def two_indexes(index, model, tmp_path_factory):
    """The striped pictures, and drawings without columns."""
    long = build_real_index(tmp_path_factory.mktemp("long"), drawings(), model)
    with serve_in_background(open_service({"index": index, "long": long}, load=lambda _: model)) as address:
        yield address


@pytest.fixture
def open_two(browser, two_indexes):
    with watched_pages(browser, two_indexes) as make:
        yield make


def refuse(route):
    route.fulfill(status=503, json={"error": "The service is busy."})


def error_says(text):
    return f"document.querySelector('#error:not([hidden])')?.innerText.includes({text!r})"


def test_by_the_keyboard_one_asks_again_and_goes_on_with_the_new_results(open_two):
    page = open_two("?q=red&index=long", viewport={"width": 1280, "height": 300})
    until(page, num_tiles(40))
    page.route("**/search", refuse)
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    again = page.get_by_text("Try again")
    again.press("Enter")
    until(page, "document.activeElement.innerText === 'Try again'")
    page.unroute("**/search")
    again.press("Enter")
    until(page, num_tiles(80))
    assert page.evaluate(FOCUSED_UID) == page.locator(".tile").nth(40).get_attribute("data-uid")


def test_sorted_results_keep_their_focus_when_more_come(open_two):
    page = open_two("?q=red&index=long&sort=key~down", viewport={"width": 1280, "height": 700})
    until(page, num_tiles(40))
    page.locator(".tile > button").nth(39).focus()
    focused = page.evaluate(FOCUSED_UID)
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    until(page, num_tiles(120))
    assert page.evaluate(FOCUSED_UID) == focused


def test_a_server_that_never_answers_is_given_up(open_two):
    page = open_two("?q=red&index=long", viewport={"width": 1280, "height": 300})
    until(page, num_tiles(40))
    page.evaluate(HURRY)
    page.route("**/search", lambda route: None)
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    until(page, "/not answered for 120 seconds/.test(document.querySelector('#more').innerText)")
    page.unroute("**/search")
    page.get_by_text("Try again").click()
    until(page, num_tiles(80))


def test_a_server_that_is_gone_is_said_to_be(open_two):
    page = open_two("?q=red&index=long")
    until(page, num_tiles(40))
    page.route("**/search", lambda route: route.abort())
    page.click("#form button.primary")
    until(page, error_says("The server cannot be reached."))


def test_a_start_that_failed_is_made_up_for_by_the_next_search(open_two):
    page = open_two()
    page.route("**/indexes", refuse)
    page.reload()
    until(page, error_says("busy"))
    page.fill("#query", "red")
    page.press("#query", "Enter")
    until(page, "document.querySelector('#query').value === 'red'")
    page.unroute("**/indexes")
    page.press("#query", "Enter")
    until(page, num_tiles(11))
    assert page.locator("#error").is_hidden()


def test_what_is_asked_before_the_indexes_are_known_waits_for_them(open_two, paint):
    page, held = open_two(), []
    page.route("**/indexes", lambda route: held.append(route))
    page.goto(f"{page.url}?q=red&index=long")
    page.click("#tab-classify")
    page.evaluate("document.querySelector('#classes').value = 'red\\nblue'")
    page.set_input_files("#classify-file", {"name": "a.png", "mimeType": "image/png", "buffer": paint("blue")})
    page.evaluate("document.querySelector('#classify').requestSubmit()")
    held[0].continue_()
    page.wait_for_selector("#classified li")
    assert page.locator("#classify-error").is_hidden()
    assert "q=red" in page.url
    assert "view=classify" in page.url


def test_going_back_to_another_index_brings_its_columns(open_two):
    page = open_two("?q=red")
    until(page, num_tiles(11))
    columns = page.text_content("#filters")
    page.select_option("#index", "long")
    until(page, num_tiles(40))
    assert page.text_content("#filters") != columns
    page.go_back()
    until(page, num_tiles(11))
    assert (page.text_content("#filters"), page.input_value("#index")) == (columns, "index")


def test_a_map_that_cannot_be_loaded_says_so_and_comes_later(open_two):
    page = open_two("?q=red&index=long")
    page.route("**/map.js", lambda route: route.abort())
    page.click("#tab-map")
    until(page, "/cannot be loaded/.test(document.querySelector('#map-error:not([hidden])')?.innerText)")
    page.unroute("**/map.js")
    page.click("#tab-search")
    page.click("#tab-map")
    until(page, "/120 images/.test(document.querySelector('#map-status').innerText)")
    assert page.locator("#map-error").is_hidden()


def test_a_filter_written_by_hand_needs_no_quotes(open_page):
    page = open_page("?q=red&in.key=a")
    until(page, error_says("a") + " || document.querySelector('#results .empty')")
    assert page.inner_text("#error") == ""


def test_a_wrong_token_is_said_to_be_and_none_may_be_given(browser, index, model):
    service = open_service({"index": index}, read_tokens=frozenset({"r"}), load=lambda _: model)
    with serve_in_background(service) as address, watched_pages(browser, address) as make:
        page = make("?q=red")
        page.wait_for_selector("#token-dialog[open]")
        assert page.locator("#token-refused").is_hidden()
        page.fill("#token", "wrong")
        page.press("#token", "Enter")
        page.wait_for_selector("#token-refused:not([hidden])")
        page.keyboard.press("Escape")
        until(page, error_says("asks for a token"))
        assert page.locator("#token-dialog").is_hidden()
        page.click("#form button.primary")
        page.fill("#token", "r")
        page.press("#token", "Enter")
        until(page, num_tiles(11))
