#!/usr/bin/env python
"""Write docs/images/serve.png: the search page over an index, in the system's Chromium.

scripts/page_screenshot.py quickstart-out/index
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from vlm.server.serving import open_service, serve_in_background

OUT = Path(__file__).parents[1] / "docs" / "images" / "serve.png"
QUERY = "?q=a+red+circle&-q=something+large"


def screenshot(index: Path) -> bytes:
    """The page with the hits of a query, when all images in view are there."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with serve_in_background(open_service({"shapes": index})) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 800})
        page.goto(f"{address}/{QUERY}")
        page.wait_for_selector(".tile", timeout=120_000)
        # again, without the time in which the model is loaded
        page.reload()
        page.wait_for_selector(".tile")
        page.wait_for_load_state("networkidle")
        image = page.screenshot()
        browser.close()
        return image


if __name__ == "__main__":
    OUT.write_bytes(screenshot(Path(sys.argv[1])))
