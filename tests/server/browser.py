"""The page in the system's Chromium: what tests of it ask."""

import contextlib
import shutil

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextlib.contextmanager
def watched_pages(browser, address):
    """Gives what opens the page with a query; errors in it and requests to other hosts fail the test."""
    contexts, problems = [], []

    def make(query="", **options):
        context = browser.new_context(accept_downloads=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: problems.append(request.url) if is_foreign(request.url) else None)
        page.goto(f"{address}/{query}")
        return page

    def is_foreign(url):
        return not url.startswith((address, "data:", "blob:"))

    yield make
    for context in contexts:
        context.close()
    assert problems == []


def uids(page):
    """The uids of the results, in their order."""
    page.wait_for_selector("#results .tile, #results .empty, #error:not([hidden])")
    return page.eval_on_selector_all("#results .tile", "tiles => tiles.map(tile => tile.dataset.uid)")


def until(page, condition):
    """Wait for a condition in JavaScript; Playwright's own way polls by eval, which the page's policy forbids."""
    for _ in range(400):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(25)
    raise AssertionError(f"never: {condition}")


def search(page, text):
    """Add a term to the query."""
    page.fill("#query", text)
    page.press("#query", "Enter")
