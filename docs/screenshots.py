"""Pictures of a report for the documentation: `python docs/screenshots.py results/demo/report.html`."""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

FIGURES = Path(__file__).parent / "figures"
VIEWS = {"light": (1240, 1560, "light"), "dark": (1240, 1560, "dark"), "phone": (390, 1560, "light")}

if __name__ == "__main__":
    report = Path(sys.argv[1]).resolve().as_uri()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, (width, height, colours) in VIEWS.items():
            size = {"width": width, "height": height}
            page = browser.new_page(viewport=size, color_scheme=colours, device_scale_factor=1 + (name == "phone"))
            page.goto(report)
            page.wait_for_selector("body[data-drawn]")
            page.screenshot(path=FIGURES / f"report-{name}.png")
        browser.close()
