"""Takes the README's picture of the Compare tab: `make app-picture`, after `make demo` has trained the two LoRAs."""

import shutil
import sys
import tempfile
from pathlib import Path

from app_server import chromium, serve
from PIL import Image

from bilora_diffusion.embedded.lists import LIKE_THE_PAPER
from bilora_diffusion.embedded.words import concept_caption

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "images" / "app-compare.png"
PROMPTS = [concept_caption(name) for name in (LIKE_THE_PAPER[0], LIKE_THE_PAPER[2])]
RUNS = ("quickstart_lora", "quickstart")


def main() -> int:
    for run in RUNS:
        if not (ROOT / "outputs" / run).is_dir():
            print(f"error: outputs/{run} is missing: run `make demo` first", file=sys.stderr)
            return 2
    with tempfile.TemporaryDirectory() as folder:
        outputs = Path(folder) / "outputs"  # these two alone: the tab begins with the newest there are
        for run in RUNS:
            shutil.copytree(ROOT / "outputs" / run, outputs / run, ignore=shutil.ignore_patterns("checkpoint-*"))
        take(outputs)
    print(PICTURE)
    return 0


def take(outputs: Path) -> None:
    with serve(outputs) as server, chromium() as open_page:
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


if __name__ == "__main__":
    sys.exit(main())
