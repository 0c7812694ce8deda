"""Pictures of reports for the documentation: `python docs/screenshots.py
sweep=results/demo paper=benchmarks/paper`.

Of each folder the first screen, as first-screen-NAME.png; of a sweep also report-light,
-dark and -phone.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from notall.report.page import write_report

FIGURES = Path(__file__).parent / "figures"
FIRST = (1100, 700, "light", 1.0)  # pixels across and down, colours, pixels a point
WHOLE = {
    "light": (1240, 1560, "light", 1.0),
    "dark": (1240, 1560, "dark", 1.0),
    "phone": (390, 1200, "light", 1.5),
}


def take(
    browser: Browser,
    report: Path,
    name: str,
    width: int,
    height: int,
    colours: str,
    scale: float,
) -> None:
    """Write a picture of the top of a page to figures/NAME.png."""
    size = {"width": width, "height": height}
    page = browser.new_page(
        viewport=size, color_scheme=colours, device_scale_factor=scale
    )
    page.goto(report.resolve().as_uri())
    page.wait_for_selector("body[data-drawn]")
    page.screenshot(path=FIGURES / f"{name}.png")
    page.close()


if __name__ == "__main__":
    folders = dict(word.split("=", 1) for word in sys.argv[1:])
    with tempfile.TemporaryDirectory() as beside, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        for kind, folder in folders.items():
            report = write_report(folder, Path(beside) / f"{kind}.html")
            take(browser, report, f"first-screen-{kind}", *FIRST)
            if kind == "sweep":
                for name, view in WHOLE.items():
                    take(browser, report, f"report-{name}", *view)
        browser.close()
