#!/usr/bin/env python
"""Write docs/images/evaluation.png: the top of the page of two models of drawn scenes, in the system's Chromium.

vlm eval RUN RUN/checkpoints/step-N --suite drawn-scenes --out OUT
scripts/report_screenshot.py OUT/report.html
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

OUT = Path(__file__).parents[1] / "docs" / "images" / "evaluation.png"


def take_screenshot(report: Path) -> bytes:
    """The page down to the first curves."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 800})
        page.goto(report.absolute().as_uri())
        end = page.locator(".chart").first.bounding_box()
        assert end is not None
        height = end["y"] + end["height"] + 46
        image = page.screenshot(full_page=True, clip={"x": 0, "y": 0, "width": 1200, "height": height})
        browser.close()
        return image


if __name__ == "__main__":
    OUT.write_bytes(take_screenshot(Path(sys.argv[1])))
