"""Takes the README's picture of the Compare tab: `make app-picture`, after `make demo` has trained the two LoRAs."""

import sys
from pathlib import Path

from app_server import chromium, serve
from PIL import Image

from bilora_diffusion.embedded.lists import LIKE_THE_PAPER
from bilora_diffusion.embedded.words import concept_caption

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "images" / "app-compare.png"
PROMPTS = [concept_caption(name) for name in (LIKE_THE_PAPER[0], LIKE_THE_PAPER[5])]


def main() -> int:
    if not (ROOT / "outputs" / "quickstart_lora").is_dir():
        print("error: outputs/quickstart_lora is missing: run `make demo` first", file=sys.stderr)
        return 2
    with serve(ROOT / "outputs") as server, chromium() as open_page:
        page = open_page(server.url, {"width": 1280, "height": 1020})
        page.set_default_timeout(120_000)
        page.get_by_role("tab", name="Compare").click()
        page.fill("#compare-prompts textarea", "\n".join(PROMPTS))
        page.click("#compare-button")
        page.wait_for_selector("#compare-status:has-text('Done')")
        page.wait_for_timeout(1000)
        page.evaluate("window.scrollTo(0, 0)")
        page.screenshot(path=PICTURE)
    with Image.open(PICTURE) as picture:
        picture.convert("RGB").quantize(200).save(PICTURE, optimize=True)
    print(PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
