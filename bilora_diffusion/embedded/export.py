"""Writes what the package ships: the base in the diffusers layout, the concept's folder, the small icons, the lists."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor, nn

from bilora_diffusion.atomic import atomic_write, write_text_atomically
from bilora_diffusion.bases.quiet import quiet_libraries
from bilora_diffusion.embedded.architecture import SCHEDULE
from bilora_diffusion.embedded.icons import FLAT_STYLES, SOLID_STYLE, Icons, sheet, slug
from bilora_diffusion.embedded.scorer import Scorer
from bilora_diffusion.embedded.words import CONCEPT_PROMPT, concept_caption, tokenizers

__all__ = ["export_base", "export_concept", "export_icons", "export_scorer"]


def export_base(models: Mapping[str, nn.Module], vae: AutoencoderKL, names: list[str], folder: Path) -> None:
    """A folder that `StableDiffusionXLPipeline.from_pretrained` loads, weights in float16.

    Arguments:
        models: `unet`, `text_encoder`, `text_encoder_2`.
        names: of all icons; the tokenizers are made for them.
    """
    tokenizer, tokenizer_2 = tokenizers(names, FLAT_STYLES)
    pipeline = StableDiffusionXLPipeline(
        **models,
        vae=vae,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        scheduler=EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="leading", steps_offset=1),  # SDXL's
        force_zeros_for_empty_prompt=False,  # the empty caption was trained, zeros were not
        add_watermarker=False,
    )
    shutil.rmtree(folder, ignore_errors=True)
    with quiet_libraries():
        for part in (*models.values(), vae):
            part.to(torch.float16)
        pipeline.save_pretrained(folder)


def export_concept(pictures: Mapping[str, Image.Image], folder: Path) -> None:
    """The concept's icons as PNGs with `metadata.jsonl`: `text` names each icon, `one_prompt` is the same for all.

    Arguments:
        pictures: by name, RGB.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    lines = []
    for name, picture in sorted(pictures.items()):
        file_name = f"{slug(name)}.png"
        picture.save(folder / file_name, optimize=True)
        lines.append({"file_name": file_name, "text": concept_caption(name), "one_prompt": CONCEPT_PROMPT})
    write_text_atomically(folder / "metadata.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def export_icons(icons: Icons, lists: Mapping[str, list[str]], folder: Path) -> None:
    """All icons at 64 px, a flat style on one sheet, the 3D ones in a file each; `names.json` with the lists."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / SOLID_STYLE).mkdir(parents=True)
    for style in FLAT_STYLES:
        with atomic_write(folder / f"{style}.png") as temporary:
            sheet(icons.pixels[style]).save(temporary, format="PNG", optimize=True)
    for name, picture in zip(icons.names, _pictures_of(icons.pixels[SOLID_STYLE]), strict=True):
        picture.save(folder / SOLID_STYLE / f"{slug(name)}.png", optimize=True)
    content = {
        "lists": lists,
        "families": dict(zip(icons.names, icons.families, strict=True)),
        "sha256": icons.sha256,
    }
    write_text_atomically(folder / "names.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _pictures_of(pixels: Tensor) -> list[Image.Image]:
    """(N, 3, H, W), uint8 -> N pictures."""
    return [Image.fromarray(picture) for picture in pixels.permute(0, 2, 3, 1).contiguous().numpy()]


def export_scorer(scorer: Scorer, folder: Path) -> None:
    """A folder that `CLIPModel.from_pretrained` loads, weights in float16."""
    shutil.rmtree(folder, ignore_errors=True)
    with quiet_libraries():
        scorer.model.to(torch.float16).save_pretrained(folder)
        scorer.tokenizer.save_pretrained(folder)
