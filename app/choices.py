"""LoRA files as choices of a dropdown, and the pair of dropdown and weight that stands for one LoRA."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import gradio as gr

from app.services import UPLOADS, Services
from bilora_diffusion.errors import UserError
from bilora_diffusion.generation.settings import LoraUse
from bilora_diffusion.lora_files.description import LoraDescription

__all__ = ["NO_LORA", "LoraSlot", "chosen_loras", "lora_choices", "lora_slot", "newest_of_method"]

NO_LORA = ("no LoRA", "")


@dataclass(frozen=True)
class LoraSlot:
    file: gr.Dropdown
    weight: gr.Number


def lora_slot(
    services: Services, label: str, value: str = "", first: Sequence[tuple[str, str]] = (NO_LORA,)
) -> LoraSlot:
    """A dropdown of files and a weight, side by side. The names are long: the weight takes no more than it needs.

    Arguments:
        first: choices before the files.
    """
    with gr.Row(equal_height=True):
        file = gr.Dropdown(
            [*first, *lora_choices(services, with_none=False)], value=value, label=label, min_width=160, scale=5
        )
        weight = gr.Number(1, step=0.05, label="Weight", min_width=90, scale=1)
    return LoraSlot(file, weight)


def lora_choices(services: Services, with_none: bool = True) -> list[tuple[str, str]]:
    """(what is shown, name) of every file, the newest first."""
    files = [(_title(services.files.describe(name)), name) for name in services.files.names()]
    return [NO_LORA, *files] if with_none else files


def chosen_loras(values: Sequence[Any]) -> tuple[LoraUse, ...]:
    """From the values file, weight, file, weight ...; slots without a file are left out.

    Raises:
        UserError: a weight out of range.
    """
    pairs = list(zip(values[::2], values[1::2], strict=True))
    if any(file and weight is None for file, weight in pairs):
        raise UserError("a weight is empty: write a number")
    return tuple(LoraUse(file=file, weight=weight) for file, weight in pairs if file)


def newest_of_method(services: Services, method: str) -> str | None:
    """The newest file, in diffusers' layout, that says it was trained so, and not on another base than the first."""
    names = services.files.names()
    for name in names:
        description = services.files.describe(name)
        fits = description.facts.get("base") in (None, services.bases[0]) and not name.startswith(f"{UPLOADS}/")
        if fits and description.method == method and description.layout == "diffusers":
            path = PurePosixPath(name)
            finished = (path.parent.parent / path.name).as_posix()
            return finished if path.parent.name.startswith("checkpoint-") and finished in names else name
    return None


def _title(description: LoraDescription) -> str:
    """ "Bi-LoRA: quickstart/checkpoint-50", with "(Kohya)" where the same run has another file."""
    path = PurePosixPath(description.name)
    ours = path.stem.startswith("pytorch_lora_weights")
    place = "/".join(path.parent.parts[1:]) or path.parent.name if ours else "/".join(path.with_suffix("").parts[1:])
    return f"{description.title}: {place}" + (" (Kohya)" if description.layout == "Kohya" and ours else "")
