"""Takes the README's picture of a report: `make report-picture`, after `make report` has made one on the 3D icons."""

import sys
from pathlib import Path

from app_server import browser_path
from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "outputs" / "report" / "report.html"
PICTURE = ROOT / "docs" / "images" / "report.png"
SIZE = {"width": 1000, "height": 1180}


def main() -> int:
    if not PAGE.exists():
        print(f"error: {PAGE.relative_to(ROOT)} is missing: run `make report` first", file=sys.stderr)
        return 2
    with sync_playwright() as playwright:
        # Chromium's own sandbox cannot start as root in a container.
        browser = playwright.chromium.launch(
            executable_path=browser_path(), args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        page = browser.new_context(viewport=SIZE, color_scheme="light", offline=True).new_page()
        page.goto(PAGE.as_uri())
        page.screenshot(path=PICTURE)
        browser.close()
    with Image.open(PICTURE) as picture:
        picture.convert("RGB").quantize(200).save(PICTURE, optimize=True)
    print(PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
