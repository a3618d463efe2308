"""The real app on the embedded base, in this process, and a real Chromium: what the app's tests share."""

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
from lora_samples import ALL_PARTS, write_lora

from app.__main__ import launch
from app.options import Options
from bilora_diffusion.bases import PARTS, Base
from bilora_diffusion.embedded import CONCEPT_FOLDER
from bilora_diffusion.lora_files.diffusers_format import DIFFUSERS_FILE

if TYPE_CHECKING:
    from playwright.sync_api import Page

SCREENSHOTS = Path(__file__).parents[1] / "outputs" / "screenshots"
"""Ignored by git, kept by CI, for people to look at."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
NEEDED = "BILORA_TESTS_NEED_BROWSER"
PLAIN, BOTH = f"outputs/plain/{DIFFUSERS_FILE}", f"outputs/both/{DIFFUSERS_FILE}"
LAPTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}


@dataclass
class Server:
    url: str
    outputs: Path


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def write_outputs(folder: Path) -> Path:
    """A folder as two finished runs leave it, plain LoRA and Bi-LoRA."""
    pipeline = Base("embedded").load(*PARTS)
    write_lora(folder / "plain", pipeline, seed=1)
    write_lora(folder / "both", pipeline, method="bilora", parts=ALL_PARTS, seed=2)
    for run in ("plain", "both"):
        (folder / run / "config.yaml").write_text(f"instance_data_dir: {CONCEPT_FOLDER}\n")
    return folder


@contextmanager
def serve(outputs: Path, **options: Any) -> Iterator[Server]:
    """The app, as `python -m app` starts it."""
    port = free_port()
    with mock.patch.dict(os.environ):  # one app a process has Gradio's folder to itself; here are several
        blocks = launch(Options(lora_dirs=(outputs,), runs_dir=outputs, port=port, **options))
        try:
            yield Server(f"http://127.0.0.1:{port}", outputs)
        finally:
            blocks.close(verbose=False)


def browser_path() -> str:
    """The system's Chromium; without one the test is skipped, in CI it fails."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        reason = f"no Chromium on this machine ({', '.join(BROWSERS)}): `apt-get install chromium`"
        (pytest.fail if os.environ.get(NEEDED) else pytest.skip)(reason)
    return found


@contextmanager
def chromium() -> Iterator[Callable[..., "Page"]]:
    """Gives a function that opens a page in a new profile; what the page asks of other machines is refused."""
    from playwright.sync_api import sync_playwright

    path = browser_path()
    with sync_playwright() as playwright:
        # Chromium's own sandbox cannot start as root in a container.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])

        def open_page(url: str, size: dict[str, int] = LAPTOP, **options: Any) -> "Page":
            context = browser.new_context(viewport=size, **options)
            page = context.new_page()
            page.set_default_timeout(60_000)
            page.outside, page.errors = [], []
            page.on("pageerror", lambda error: page.errors.append(str(error)))
            page.on(
                "request",
                lambda request: (
                    None if request.url.startswith((url, "data:", "blob:")) else page.outside.append(request.url)
                ),
            )
            page.goto(url)
            page.wait_for_selector("#prompt textarea")
            return page

        try:
            yield open_page
        finally:
            browser.close()


def screenshot(page: "Page", name: str) -> Path:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    path = SCREENSHOTS / f"{name}.png"
    page.screenshot(path=path, full_page=True)
    return path
