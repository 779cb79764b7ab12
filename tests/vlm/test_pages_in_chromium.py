"""Every page that vlm writes, in the system's Chromium: nothing runs off a narrow screen, and axe has no findings."""

import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.evaluation.measured_pets import models_of, pets_at
from tests.service.circle_fixture import SPACE, CircleModel, origin, points
from vlm.cli.main import main
from vlm.evaluation.comparison import compare
from vlm.evaluation.evaluation_page import write_evaluation_page
from vlm.index.build import build_index
from vlm.index.embeddings_folder import EmbeddingsWriter
from vlm.pages import Provenance
from vlm.service.query import Query
from vlm.service.results_page import write_results_page
from vlm.service.search import SearchService

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PAGES = ["inspection", "curation", "evaluation", "comparison", "search"]
PROVENANCE = Provenance(command=f"vlm eval {'a-very-long-path-' * 12}", date="2026-01-02 03:04 UTC")

UNREACHABLE = """() => [...document.querySelectorAll('main *')].filter(node =>
  node.scrollWidth > node.clientWidth + 1 && getComputedStyle(node).overflowX === 'auto' && node.tabIndex < 0
  && !node.matches('.caption')).map(node => node.outerHTML.slice(0, 200))"""
LOOKS = """() => ['body', 'h1', 'main h2:not(.warnings h2)', '.card:not(.bad)', 'footer'].map(selector => {
  const style = getComputedStyle(document.querySelector(selector));
  return [style.color, style.backgroundColor, style.fontSize, style.fontFamily, style.borderRadius];
}).join()"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page_of(written_pages, scene_shards):
    """A function from the name of a page to its file, which is written when it is first asked for."""
    folder = written_pages
    shards = str(scene_shards / "val")

    def inspection(page):
        # one of two shards is damaged, and its name is long
        copies = folder / "shards"
        copies.mkdir()
        (shard,) = (scene_shards / "val").glob("*.tar")
        shutil.copy(shard, copies / "0.tar")
        (copies / f"{'long' * 20}.tar").write_bytes(shard.read_bytes()[:9000])
        assert main(["inspect", str(copies), "--html", str(page), "--sample", "12"]) == 0

    def curation(page):
        filters = ["--filter", "words:min=3,max=40,languages=en", "--filter", "sample:share=0.5"]
        assert main(["curate", shards, str(folder / "a.selection"), *filters, "--dry-run", "--html", str(page)]) == 0

    def measured(page, number):
        pets = folder / f"pets-{number}"
        pets.mkdir()
        opened = pets_at(pets)
        comparison = compare(models_of(opened)[:number], rng=np.random.default_rng(0))
        write_evaluation_page(comparison, page, sets={"pets": opened}, provenance=PROVENANCE)

    def search(page):
        vectors = EmbeddingsWriter(folder / "vectors", space=SPACE, identity={})
        captions = {"en": ("a text", "another one"), "de": ("ein Text",)}
        entries = [replace(origin(f"u{number}", n=number), captions=captions) for number in range(6)]
        vectors.add("/nowhere/0.tar", points([10.0 * number for number in range(6)]), entries)
        vectors.finish(inputs={}, details={"shards": ["/nowhere/0.tar"]})
        build_index(folder / "vectors", folder / "index", kind="flat")
        model: Any = CircleModel()
        service = SearchService.open(folder / "index", load=lambda _: model)
        queries = [Query(texts=("0", "20"), minus="90"), Query(vectors=((0.5, 0.5),))]
        write_results_page(
            page, [service.search(query) for query in queries], title="x" * 90, info=service.index.info()
        )

    writers = {
        "inspection": inspection,
        "curation": curation,
        "evaluation": lambda page: measured(page, 1),
        "comparison": lambda page: measured(page, 2),
        "search": search,
    }

    def write(name):
        page = folder / f"{name}.html"
        if not page.exists():
            writers[name](page)
        return page

    return write


@pytest.fixture(scope="module")
def written_pages(tmp_path_factory):
    return tmp_path_factory.mktemp("pages")


def opened(browser, file, *, width, scheme="light"):
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    problems = []
    # what the page's own policy refuses is an error on the console
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: problems.append(request.url) if request.url.startswith("http") else None)
    page.goto(file.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    assert problems == []
    return page


def test_no_page_scrolls_sideways_and_all_share_one_design(browser, page_of):
    looks = set()
    for name in PAGES:
        page = opened(browser, page_of(name), width=390)
        assert page.evaluate("document.documentElement.scrollWidth") == 390, name
        # what is wider than its box scrolls inside of it, and can be reached by key
        assert page.evaluate(UNREACHABLE) == [], name
        looks.add(page.evaluate(LOOKS))
        page.close()
    assert len(looks) == 1


@pytest.mark.parametrize(
    ("name", "width", "scheme"),
    [
        ("inspection", 390, "light"),
        ("curation", 1280, "dark"),
        ("evaluation", 390, "dark"),
        ("comparison", 1280, "light"),
        ("search", 390, "dark"),
    ],
)
def test_axe_has_no_findings_on_a_page(browser, page_of, name, width, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = opened(browser, page_of(name), width=width, scheme=scheme)
    violations = axe.run(page).response["violations"]
    assert [(violation["id"], [node["html"] for node in violation["nodes"]]) for violation in violations] == []
    page.close()
