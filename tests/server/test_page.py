"""The page in the system's Chromium: each function of it, on a real server, without any other host."""

import json
from pathlib import Path

import pytest

from tests.server.browser import CHROMIUM, search, uids, until
from vlm.server.serving import open_service, serve_in_background

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


def test_a_search_shows_the_hits_and_the_address_holds_it(open_page, expected, address):
    page = open_page()
    page.wait_for_selector("#results .empty")
    assert "Describe what you look for" in page.inner_text("#results")
    search(page, "red")
    assert uids(page) == expected(top=40, texts=("red",))
    assert page.url == f"{address}/?q=red"
    assert "results" in page.inner_text("#status")
    page.reload()
    assert uids(page) == expected(top=40, texts=("red",))
    search(page, "− blue")
    page.wait_for_url("**/?q=red&-q=blue")
    assert uids(page) == expected(top=40, texts=("red",), minus=("blue",))
    page.go_back()
    page.wait_for_url("**/?q=red")
    until(page, "document.querySelectorAll('.term').length === 1")
    page.get_by_label("Remove red").click()
    page.wait_for_selector("#results .empty")


def test_images_load(open_page):
    page = open_page("?q=red")
    until(page, "[...document.querySelectorAll('.tile img')].slice(0, 3).every(i => i.complete && i.naturalWidth)")


def test_a_lost_image_says_so(open_page, shards):
    # before any is shown: the service remembers thumbnails
    for shard in shards:
        Path(shard).unlink()
    open_page("?q=blue").wait_for_selector(".tile .gone")


def test_a_picture_is_searched_by_picking_dropping_and_pasting(open_page, expected, paint):
    wanted = expected(top=40, images=(paint("green", "cyan"),))
    file = {"name": "a.png", "mimeType": "image/png", "buffer": paint("green", "cyan")}
    page = open_page()
    page.set_input_files("#file", file)
    page.wait_for_selector(".tile")
    assert uids(page) == wanted
    for event, holder in (("drop", "dataTransfer"), ("paste", "clipboardData")):
        other = open_page()
        other.evaluate(
            """([event, holder, bytes]) => {
              const transfer = new DataTransfer();
              transfer.items.add(new File([new Uint8Array(bytes)], "a.png", {type: "image/png"}));
              const kind = event === "drop" ? DragEvent : ClipboardEvent;
              document.dispatchEvent(new kind(event, {[holder]: transfer, bubbles: true, cancelable: true}));
            }""",
            [event, holder, list(file["buffer"])],
        )
        other.wait_for_selector(".tile")
        assert uids(other) == wanted


def test_more_and_less_like_a_hit(open_page, expected):
    page = open_page("?q=red")
    first, second = uids(page)[:2]
    page.locator(".tile > button").first.click()
    assert page.locator("#detail-facts").inner_text().startswith("uid")
    page.click("#like")
    page.wait_for_url("**like=*")
    assert uids(page) == expected(top=40, texts=("red",), items=(first,))
    page.locator(".tile > button").nth(1).click()
    page.click("#unlike")
    page.wait_for_url("**-like=*")
    until(page, "document.querySelectorAll('.term').length === 3")
    assert page.locator("#error").is_hidden()
    assert second in page.url or first in page.url


def test_filters_come_from_the_columns_with_counts(open_page, expected):
    page = open_page("?q=red")
    page.locator("#options summary").click()
    box = page.locator("fieldset", has_text="key").locator("label", has_text="00").first
    assert box.inner_text().split() == ["00", "1"]
    box.locator("input").check()
    page.wait_for_url("**in.key*")
    assert uids(page) == expected(top=40, texts=("red",), where="key in ('00')")
    assert page.inner_text("#active") == "1"


def test_words_minimum_score_and_folding(open_page, expected):
    page = open_page("?q=red&words=blue&least=0.1&fold")
    assert uids(page) == expected(top=40, texts=("red",), words="blue", at_least=0.1, duplicates=0.95)
    page = open_page("?q=red&least=0.99999")
    page.wait_for_selector("#results .empty")
    assert "Nothing matches" in page.inner_text("#results")


def test_results_are_sorted_by_a_column(open_page, expected):
    page = open_page("?q=red&sort=key~up")
    assert uids(page) == sorted(expected(top=40, texts=("red",)))


def test_a_mistake_is_shown_in_words(open_page):
    page = open_page("?-q=red")
    page.wait_for_selector("#results .empty")
    assert "minus alone is not enough" in page.inner_text("#status")
    wrong = open_page("?q=red&like=nobody")
    wrong.wait_for_selector("#error:not([hidden])")
    assert "has no item 'nobody'" in wrong.inner_text("#error")


def test_selected_results_are_saved(open_page):
    page = open_page("?q=red")
    wanted = uids(page)[:2]
    for number in range(2):
        page.locator(".tile .check-mark input").nth(number).check()
    assert page.inner_text("#selected") == "2 selected; save as"
    saved = {}
    for kind in ("selection", "csv", "json"):
        with page.expect_download() as download:
            page.click(f"[data-save={kind}]")
        saved[kind] = Path(download.value.path()).read_text(encoding="utf-8")
    assert saved["selection"].split() == wanted
    assert [hit["uid"] for hit in json.loads(saved["json"])] == wanted
    assert saved["csv"].splitlines()[0].startswith('"uid","score","caption","width"')
    page.click("#clear")
    assert page.locator("#selection").is_hidden()


def test_images_are_classified(open_page, paint):
    page = open_page()
    page.click("#tab-classify")
    page.fill("#classes", "red\nblue\ngreen")
    page.set_input_files("#classify-file", {"name": "a.png", "mimeType": "image/png", "buffer": paint("blue")})
    page.click("#classify button[type=submit]")
    page.wait_for_selector("#classified li")
    assert page.inner_text("#classified td >> nth=0") == "blue"
    page.fill("#classes", "red")
    page.click("#classify button[type=submit]")
    page.wait_for_selector("#classify-error:not([hidden])")
    assert "two classes or more" in page.inner_text("#classify-error")


def test_the_keyboard_is_enough(open_page):
    page = open_page("?q=red")
    uids(page)
    page.locator(".tile > button").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert page.locator("#detail").get_attribute("open") is not None
    page.keyboard.press("Escape")
    assert page.locator("#detail").get_attribute("open") is None
    page.locator(".tile > button").nth(1).focus()
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "query"
    assert page.input_value("#query") == ""


def test_a_token_is_asked_for_and_images_come_with_it(browser, index, model, open_page):
    service = open_service({"index": index}, read_tokens=frozenset({"r"}), load=lambda _: model)
    with serve_in_background(service) as address:
        page = browser.new_page()
        page.goto(f"{address}/?q=red")
        page.wait_for_selector("#token-dialog[open]")
        page.fill("#token", "r")
        page.click("#token-dialog button")
        page.wait_for_selector(".tile")
        until(page, "[...document.querySelectorAll('.tile img')].slice(0, 3).every(i => i.naturalWidth)")
        page.close()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light")])
def test_nothing_runs_off_the_edge(open_page, width, scheme, tmp_path):
    page = open_page("?q=red&-q=blue", viewport={"width": width, "height": 800}, color_scheme=scheme)
    uids(page)
    page.locator("#options summary").click()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.screenshot(path=str(tmp_path / "page.png"))


def test_names_roles_and_contrast(open_page):
    """What axe would report first: controls without a name, pictures without a text, text that is hard to read."""
    page = open_page("?q=red")
    uids(page)
    page.locator("#options summary").click()
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('button, input, select, textarea, a')].filter(node =>
             node.offsetParent && !(node.ariaLabel || node.innerText?.trim() || node.labels?.length || node.title)
           ).map(node => node.outerHTML)"""
    )
    assert unnamed == []
    assert page.evaluate("[...document.images].filter(image => !image.hasAttribute('alt')).length") == 0
    assert page.evaluate("document.documentElement.lang") == "en"
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(node => node.id)")
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_has_no_findings(open_page, scheme, paint):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    # its script is put into the page, which the page's policy forbids
    page = open_page("?q=red&-q=blue", color_scheme=scheme, bypass_csp=True)
    uids(page)
    page.locator("#options summary").click()
    page.locator(".tile .check-mark input").first.check()
    shown = [axe.run(page).response]
    page.locator(".tile > button").first.click()
    shown.append(axe.run(page).response)
    page.keyboard.press("Escape")
    page.click("#tab-classify")
    page.fill("#classes", "red\nblue")
    page.set_input_files("#classify-file", {"name": "a.png", "mimeType": "image/png", "buffer": paint("blue")})
    page.click("#classify button[type=submit]")
    page.wait_for_selector("#classified li")
    shown.append(axe.run(page).response)
    for response in shown:
        assert len(response["passes"]) > 15
        assert [(finding["id"], finding["nodes"][0]["html"]) for finding in response["violations"]] == []
