#!/usr/bin/env python
"""Write docs/images/serve.png and map.png: the search page over an index that has a map, in the system's Chromium.

scripts/page_screenshot.py quickstart-out/index
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from vlm.server.serving import open_service, serve_in_background

OUT = Path(__file__).parents[1] / "docs" / "images"
QUERY = "q=a+red+circle&-q=something+large"


def take_screenshots(index: Path) -> None:
    """The page with the hits of a query, and the map with these marked, when all images in view are there."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with serve_in_background(open_service({"shapes": index})) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 800})
        page.goto(f"{address}/?{QUERY}")
        page.wait_for_selector(".tile", timeout=120_000)
        # again, without the time in which the model is loaded
        page.reload()
        page.wait_for_selector(".tile")
        page.wait_for_load_state("networkidle")
        (OUT / "serve.png").write_bytes(page.screenshot())
        page.click("#tab-map")
        page.select_option("#map-colour", "scene.shape")
        page.locator("#map-legend li").first.wait_for()
        page.wait_for_load_state("networkidle")
        (OUT / "map.png").write_bytes(page.screenshot())
        browser.close()


if __name__ == "__main__":
    take_screenshots(Path(sys.argv[1]))
