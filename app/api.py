"""What the buttons do, for programs: `gradio_client` calls these by names that do not change."""

import threading
from typing import Any

import gradio as gr

from app.running import Status
from app.services import Services
from bilora_diffusion.errors import UserError
from bilora_diffusion.generation.comparison import ComparisonSettings
from bilora_diffusion.generation.settings import DEFAULT_SCHEDULER, PictureSettings

__all__ = ["add_api"]


def add_api(services: Services) -> None:
    """Adds `/generate`, `/compare` and `/loras` to the Blocks at hand."""

    def generate(
        prompt: str,
        negative_prompt: str = "",
        loras: list[dict] | None = None,
        steps: int = 20,
        guidance_scale: float | None = None,
        width: int | None = None,
        height: int | None = None,
        scheduler: str = DEFAULT_SCHEDULER,
        seed: int = 0,
        pictures: int = 1,
        base: str | None = None,
    ) -> tuple[list[dict], list[dict]]:
        """Draws pictures. `loras` is a list of {"file": a name of /loras, "weight": 1.0}. Returns the PNG files and the
        settings of each."""
        values = {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "loras": loras or [],
            "steps": steps,
            "guidance_scale": guidance_scale,
            "width": width,
            "height": height,
            "scheduler": scheduler,
            "seed": seed,
            "pictures": pictures,
            "base": base,
        }
        settings = _checked(lambda: PictureSettings.from_json(values))
        drawn = _checked(lambda: services.generate(settings, _silent, threading.Event()))
        return [_file(one.path) for one in drawn], [one.settings for one in drawn]

    def compare(settings: dict) -> tuple[dict, dict]:
        """Draws a comparison from the settings that the Compare tab downloads. Returns the labelled table as a PNG, and
        {"settings", "columns": what each column's files say of themselves and its numbers, "rows"}."""
        checked = _checked(lambda: ComparisonSettings.from_json(settings))
        result = _checked(lambda: services.compare(checked, _silent, threading.Event()))
        told = {"settings": result.settings, "columns": list(result.columns), "rows": list(result.rows)}
        return _file(result.grid), told

    def loras() -> list[dict]:
        """The LoRA files that can be used, the newest first, and what each says of itself."""
        return _checked(services.loras)

    for function in (generate, compare, loras):
        gr.api(function, api_name=function.__name__, concurrency_limit=None)


def _silent(_status: Status) -> None:
    """A program waits for the result alone."""


def _checked(call: Any) -> Any:
    try:
        return call()
    except UserError as error:
        raise gr.Error(str(error), print_exception=False) from None


def _file(path: Any) -> dict[str, Any]:
    """As gradio_client recognises a file to download."""
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}}
