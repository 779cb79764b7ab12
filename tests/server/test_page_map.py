"""The map tab in Chromium: what it draws, and that mouse, finger and keyboard reach every function of it."""

import pytest

from tests.server.browser import CHROMIUM, search, uids, until
from vlm.api.index import open_index
from vlm.index.writer import IndexWriter
from vlm.server.schemas import MapRequest
from vlm.server.serving import open_service

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture
def service(index, model):
    with open_index(index, model=model) as opened:
        opened.make_map()
    return open_service({"index": index}, load=lambda _: model)


@pytest.fixture
def points(service):
    """By uid its place on the canvas, in shares of the canvas' width and height, when the whole map is shown."""
    answer = service.maps["index"].answer(MapRequest())
    left, bottom, right, top = answer["bounds"]

    def on(box):
        scale = min(box["width"] / max(right - left, 0.1), box["height"] / max(top - bottom, 0.1)) / 1.1
        places = {}
        for uid, x, y in zip(*(answer["points"][name] for name in ("uids", "x", "y")), strict=True):
            across = (x - (left + right) / 2) * scale + box["width"] / 2
            places[uid] = (box["x"] + across, box["y"] + ((bottom + top) / 2 - y) * scale + box["height"] / 2)
        return places

    return on


def open_map(open_page, query="?view=map", **options):
    page = open_page(query, **options)
    until(page, "/image/.test(document.querySelector('#map-status').textContent)")
    return page


def canvas_of(page):
    """The box of the canvas, in the middle of what is seen."""
    page.locator("#map-canvas").scroll_into_view_if_needed()
    return page.locator("#map-canvas").bounding_box()


def alone(places):
    """The uid whose place is farthest from all others."""

    def room(uid):
        x, y = places[uid]
        return min((x - a) ** 2 + (y - b) ** 2 for other, (a, b) in places.items() if other != uid)

    return max(places, key=room)


def num_colours(page):
    """How many colours the canvas shows, as far as they cover 20 pixels."""
    return page.evaluate(
        """() => {
          const canvas = document.querySelector('#map-canvas');
          const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
          const counts = new Map();
          for (let at = 0; at < data.length; at += 4) {
            if (data[at + 3] < 200) continue;
            const colour = data.slice(at, at + 3).join();
            counts.set(colour, (counts.get(colour) ?? 0) + 1);
          }
          return [...counts.values()].filter((count) => count > 20).length;
        }"""
    )


def test_the_tab_is_part_of_the_address_and_the_map_says_what_it_shows(open_page, address):
    page = open_page()
    page.click("#tab-map")
    until(page, "/^11 images/.test(document.querySelector('#map-status').textContent)")
    assert page.url == f"{address}/?view=map"
    assert page.get_attribute("#tab-map", "aria-selected") == "true"
    page.go_back()
    until(page, "document.querySelector('#view-map').hidden")
    page.go_forward()
    until(page, "!document.querySelector('#view-map').hidden")
    assert num_colours(page) >= 1


def test_results_of_a_search_are_marked_and_a_filter_leaves_its_rows(open_page):
    page = open_map(open_page)
    plain = num_colours(page)
    search(page, "red")
    until(page, "/11 of 11 results are marked/.test(document.querySelector('#map-status').textContent)")
    assert num_colours(page) > plain
    page.locator("#options summary").click()
    page.locator("fieldset", has_text="key").locator("label", has_text="00").first.locator("input").check()
    until(page, "/^1 images .* 1 of 1 results/.test(document.querySelector('#map-status').textContent)")


def test_a_column_colours_the_points_with_shapes_and_a_legend(open_page):
    page = open_map(open_page)
    assert num_colours(page) == 1
    page.select_option("#map-colour", "key")
    until(page, "document.querySelectorAll('#map-legend li').length === 9")
    assert page.locator("#map-legend button").first.inner_text().split() == ["00", "1"]
    assert page.locator("#map-legend button").last.inner_text() == "other or none"
    shapes = page.eval_on_selector_all("#map-legend path", "paths => paths.map(path => path.getAttribute('d'))")
    assert len(set(shapes)) == 9
    assert num_colours(page) > 5
    page.locator("#map-legend button").first.click()
    assert page.get_attribute("#map-legend button >> nth=0", "aria-pressed") == "true"
    assert num_colours(page) == 1


def test_the_mouse_shows_opens_moves_and_zooms(open_page, points):
    page = open_map(open_page)
    box = canvas_of(page)
    places = points(box)
    uid = alone(places)
    page.mouse.move(*places[uid])
    until(page, f"document.querySelector('#map-card').dataset.uid === '{uid}'")
    until(page, "/ and /.test(document.querySelector('#map-card').innerText)")
    until(page, "document.querySelector('#map-card-image').naturalWidth > 0")
    page.mouse.click(*places[uid])
    page.wait_for_selector("#detail[open]")
    assert uid in page.inner_text("#detail-facts")
    assert page.inner_text("#detail-score") == ""
    page.keyboard.press("Escape")
    # after a drag the point is elsewhere
    page.mouse.move(box["x"] + 9, box["y"] + 9)
    page.mouse.down()
    page.mouse.move(box["x"] + 70, box["y"] + 40, steps=4)
    page.mouse.up()
    assert page.locator("#detail").get_attribute("open") is None
    x, y = places[uid]
    page.mouse.move(x + 61, y + 31)
    until(page, f"document.querySelector('#map-card').dataset.uid === '{uid}'")
    assert page.locator("#map-card").is_visible()
    # what is under the pointer stays there
    page.mouse.wheel(0, -300)
    page.mouse.move(x + 62, y + 31)
    assert page.locator("#map-card").is_visible()
    page.click("#map-home")
    page.mouse.move(*places[uid])
    until(page, f"document.querySelector('#map-card').dataset.uid === '{uid}'")
    page.mouse.move(box["x"] - 5, box["y"] - 5)
    until(page, "document.querySelector('#map-card').hidden")


def test_a_lasso_is_searched_like_and_selected(open_page, points):
    page = open_map(open_page)
    box = canvas_of(page)
    page.click("#map-lasso")
    page.mouse.move(box["x"] + 2, box["y"] + 2)
    page.mouse.down()
    for right, down in ((0.99, 0.01), (0.99, 0.99), (0.01, 0.99)):
        page.mouse.move(box["x"] + right * box["width"], box["y"] + down * box["height"], steps=3)
    page.mouse.up()
    assert page.inner_text("#map-count") == "11 images in the lasso"
    page.click("#map-select")
    until(page, "document.querySelector('#selected').textContent === '11 selected; save as'")
    with page.expect_download() as download:
        page.click("[data-save=csv]")
    with open(download.value.path(), encoding="utf-8") as file:
        assert len(file.read().splitlines()) == 12
    page.click("#map-like")
    assert len(uids(page)) == 11
    assert page.url.count("like=") == 8
    assert page.get_attribute("#tab-search", "aria-selected") == "true"
    assert page.locator(".check-mark input:checked").count() == 11
    page.click("#tab-map")
    page.click("#map-clear")
    assert page.locator("#map-chosen").is_hidden()


def test_the_keyboard_is_enough(open_page):
    page = open_map(open_page)
    page.locator("#map-canvas").focus()
    page.keyboard.press("ArrowRight")
    until(page, "/^Nearest to the middle: .* and /.test(document.querySelector('#map-status').textContent)")
    first = page.get_attribute("#map-card", "data-uid")
    for _ in range(12):
        page.keyboard.press("ArrowLeft")
    assert page.get_attribute("#map-card", "data-uid") != first
    page.keyboard.press("+")
    page.keyboard.press("Enter")
    page.wait_for_selector("#detail[open]")
    page.click("#like")
    page.wait_for_url("**like=*")
    assert len(uids(page)) == 11
    page.locator("#tab-search").focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-map"
    page.locator("#map-canvas").focus()
    page.keyboard.press("0")
    page.keyboard.press("Escape")
    assert page.locator("#map-card").is_hidden()


def test_a_finger_taps_and_two_zoom(open_page, points):
    page = open_map(open_page, viewport={"width": 390, "height": 800}, has_touch=True)
    box = canvas_of(page)
    places = points(box)
    uid = alone(places)
    page.touchscreen.tap(*places[uid])
    until(page, f"document.querySelector('#map-card').dataset.uid === '{uid}'")
    assert page.locator("#detail").get_attribute("open") is None
    page.locator("#map-card").tap()
    page.wait_for_selector("#detail[open]")
    page.keyboard.press("Escape")
    session = page.context.new_cdp_session(page)
    middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)

    def touch(kind, *spread):
        fingers = [{"x": middle[0] + step, "y": middle[1], "id": number} for number, step in enumerate(spread)]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": fingers})

    touch("touchStart", -20, 20)
    for spread in (40, 80, 120):
        touch("touchMove", -spread, spread)
    touch("touchEnd")
    # six times as near, most images are out of sight
    page.locator("#map-list summary").click()
    until(page, "/ of [0-9] images in view/.test(document.querySelector('#map-listed').textContent)")


def test_a_list_says_what_the_canvas_shows(open_page):
    page = open_map(open_page)
    page.locator("#map-list summary").click()
    until(page, "document.querySelectorAll('#map-items button').length === 11")
    assert page.inner_text("#map-listed") == "11 of 11 images in view"
    button = page.locator("#map-items button").first
    assert " and " in button.inner_text()
    button.click()
    page.wait_for_selector("#detail[open]")


def test_an_index_without_a_map_says_how_to_make_one(index, model, open_page):
    with IndexWriter(index) as writer:
        writer.rollback()
    page = open_page("?view=map")
    until(page, "!document.querySelector('#map-none').hidden")
    assert "vlm index map INDEX" in page.inner_text("#map-none")
    assert page.locator("#map-canvas").is_hidden()
    # made meanwhile, it is there without a reload
    with open_index(index, model=model) as opened:
        opened.make_map()
    page.click("#tab-search")
    page.click("#tab-map")
    until(page, "/^11 images/.test(document.querySelector('#map-status').textContent)")


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light")])
def test_axe_has_no_findings_and_nothing_runs_off_the_edge(open_page, width, scheme, tmp_path):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = open_map(
        open_page,
        "?view=map&q=red",
        color_scheme=scheme,
        viewport={"width": width, "height": 800},
        # its script is put into the page, which the page's policy forbids
        bypass_csp=True,
    )
    page.select_option("#map-colour", "key")
    until(page, "document.querySelectorAll('#map-legend li').length === 9")
    page.locator("#map-list summary").click()
    until(page, "document.querySelectorAll('#map-items button').length === 11")
    response = axe.run(page).response
    assert len(response["passes"]) > 15
    assert [(finding["id"], finding["nodes"][0]["html"]) for finding in response["violations"]] == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.screenshot(path=str(tmp_path / "map.png"))


def test_what_is_typed_and_its_buttons_are_on_one_line_of_a_phone(open_page):
    page = open_page("?q=red&-q=blue", viewport={"width": 360, "height": 800})
    # its terms move what is below them
    assert len(uids(page)) == 11
    boxes = [page.locator(name).bounding_box() for name in ("#query", "label[for=file]", "#form .primary")]
    middles = [box["y"] + box["height"] / 2 for box in boxes]
    assert max(middles) - min(middles) < 3
    assert boxes[-1]["x"] + boxes[-1]["width"] <= 360


def test_the_page_is_small(address):
    import httpx

    files = ("/", "/page.js", "/map.js", "/page.css")
    assert sum(len(httpx.get(address + path).content) for path in files) < 150_000
