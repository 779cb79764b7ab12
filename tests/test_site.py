"""The documentation site: it builds without a warning, its links lead somewhere, no other host is asked."""

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

from tests.server.browser import CHROMIUM, watched_pages

ROOT = Path(__file__).resolve().parents[1]
WIDTHS = (1280, 390)
# of a wide table, of a page of code, of nested lists and admonitions
LOOKED_AT = ("index.html", "coming-from/open-clip.html", "cli.html", "tutorials/first-search.html", "findings.html")


class Page(HTMLParser):
    """What a page links to, what it loads, and the anchors it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep its addresses and its id."""
        values = {name: value or "" for name, value in attrs}
        if "id" in values:
            self.anchors.add(values["id"])
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag == "link" and values.get("rel") != "canonical" and "href" in values:
            self.loaded.append(values["href"])
        elif "src" in values:
            self.loaded.append(values["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, as `mkdocs build --strict` makes it: a warning fails."""
    pytest.importorskip("material", reason="pip install 'vlm-pipeline[docs]'")
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def parsed(site: Path) -> dict[Path, Page]:
    """Every page by its file; the page for addresses that do not exist stands for no place of its own."""
    files = [file for file in site.rglob("*.html") if file.name != "404.html"]
    return {file: Page(file.read_text(encoding="utf-8")) for file in files}


def test_every_page_of_the_folder_is_reached_by_the_navigation(site, parsed):
    files = (ROOT / "docs").rglob("*.md")
    pages = {file.relative_to(ROOT / "docs").with_suffix(".html").as_posix() for file in files}
    reached = {urldefrag(link).url for link in parsed[site / "index.html"].links} | {"index.html"}
    assert pages - reached == set(), "name them in nav of mkdocs.yml"


def test_links_lead_to_files_and_anchors(parsed):
    for file, page in parsed.items():
        for link in page.links:
            address, anchor = urldefrag(link)
            if "://" in address or address.startswith(("mailto:", "data:")):
                continue
            target = (file.parent / unquote(address)).resolve() if address else file
            target = target / "index.html" if target.is_dir() else target
            assert target.exists(), f"{file.name}: {link}"
            if anchor and target in parsed:
                assert unquote(anchor) in parsed[target].anchors, f"{file.name}: {link}"


def test_nothing_is_loaded_from_another_host(site, parsed):
    for file, page in parsed.items():
        for address in page.loaded:
            assert not address.startswith(("http:", "https:", "//")), f"{file.name}: {address}"
            assert (file.parent / urldefrag(address.partition("?")[0]).url).exists(), f"{file.name}: {address}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import\s*)[\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet.name


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """The system's Chromium."""
    sync_api = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM or not shutil.which(CHROMIUM):
        pytest.skip("Chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves files, without a line for each."""

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """The site behind a server of this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("width", WIDTHS)
def test_pages_fit_their_windows_and_ask_no_other_host(address, browser, width):
    with watched_pages(browser, address) as open_page:
        page = open_page("index.html", viewport={"width": width, "height": 800})
        for name in LOOKED_AT:
            page.goto(f"{address}/{name}")
            assert page.locator("h1").first.is_visible(), name
            # tables and code scroll in themselves
            assert page.evaluate("document.documentElement.scrollWidth") <= width, name


def test_words_of_a_page_are_found(address, browser):
    with watched_pages(browser, address) as open_page:
        # by the address: typed text is lost until the theme listens, and its panel opens only on a focus it sees
        page = open_page("index.html?q=rejected+pairs", viewport={"width": 1280, "height": 800})
        page.locator("a[href*='data.html']", has_text="Rejected pairs").first.wait_for(timeout=120_000)
