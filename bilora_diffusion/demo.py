"""The end of `make demo`: loads LoRA files as a user would and draws base | LoRA | Bi-LoRA side by side.

python -m bilora_diffusion.demo outputs/quickstart_lora outputs/quickstart
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from tqdm.auto import tqdm

from bilora_diffusion.atomic import atomic_write
from bilora_diffusion.bases import PARTS, Base
from bilora_diffusion.bases.quiet import quiet_libraries
from bilora_diffusion.embedded import EMBEDDED, ICONS_FOLDER
from bilora_diffusion.embedded.icons import SOLID_STYLE, slug
from bilora_diffusion.embedded.lists import LIKE_THE_PAPER
from bilora_diffusion.embedded.words import concept_caption
from bilora_diffusion.errors import UserError
from bilora_diffusion.generation.settings import usual_guidance
from bilora_diffusion.grid import Column, grid
from bilora_diffusion.lora_files.description import METHOD_TITLES
from bilora_diffusion.run_folder import CONFIG_FILE, DIFFUSERS_FILE, KOHYA_FILE
from bilora_diffusion.sampling import sample_pictures, use_sampling_scheduler

__all__ = ["main"]

GRID_FILE = "comparison.png"
TRAINED_ON = ("rat", "grinning cat")
"""Shown above the unseen icons: a LoRA that draws these and not those has learned its pictures, not their style."""
SHARED = ("pretrained_model_name_or_path", "revision", "variant", "pretrained_vae_model_name_or_path", "resolution")


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the paths of the LoRA files and of the grid."""
    parser = argparse.ArgumentParser(description="Draws base | LoRA for finished runs; one noise a row.")
    parser.add_argument("folders", type=Path, nargs="+", help="the runs' --output_dir; the last is given the grid")
    parser.add_argument(
        "--prompt",
        nargs="+",
        help="a row each; default: on the embedded base icons that the LoRA has not seen, else the run's prompt",
    )
    parser.add_argument("--count", type=int, default=1, help="pictures a prompt")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps")
    parser.add_argument("--guidance_scale", type=float, help="1 is none; default: 5, and 2 on the embedded base")
    arguments = parser.parse_args(argv)
    try:
        for flag in ("count", "steps"):
            if getattr(arguments, flag) < 1:
                raise UserError(f"--{flag} is {getattr(arguments, flag)}: give 1 or more")
        path = draw(arguments.folders, arguments.prompt, arguments.count, arguments.steps, arguments.guidance_scale)
    except UserError as error:
        error.tell()
        return 2
    for folder in arguments.folders:
        for name in (DIFFUSERS_FILE, KOHYA_FILE):
            if (folder / name).exists():
                print(folder / name)
    print(path)
    return 0


@torch.no_grad()
def draw(
    folders: Sequence[Path], prompts: Sequence[str] | None, count: int, steps: int, guidance_scale: float | None
) -> Path:
    """Writes the grid of finished runs and returns its path.

    Raises:
        UserError: a folder holds no finished run, or the runs have different bases or resolutions.
    """
    configs = [_read_config(folder) for folder in folders]
    config = configs[0]
    for name in SHARED:
        if any(other[name] != config[name] for other in configs):
            raise UserError(f"the runs differ in --{name}: give runs of one base and one resolution")
    base = Base.from_flags(config)
    guidance_scale = usual_guidance(base.name) if guidance_scale is None else guidance_scale
    names = (*TRAINED_ON, *LIKE_THE_PAPER) if base.name == EMBEDDED and prompts is None else ()
    prompts = [concept_caption(name) for name in names] or prompts or [config["instance_prompt"] or ""]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    pipeline = base.load(*PARTS, dtype=dtype).to(device)
    use_sampling_scheduler(pipeline)
    bar = tqdm(total=(1 + len(folders)) * len(prompts), desc="drawing", unit="prompt")
    columns = [Column("base", _sample(pipeline, prompts, count, steps, guidance_scale, config, bar))]
    for folder, run in zip(folders, configs, strict=True):
        with quiet_libraries():
            pipeline.load_lora_weights(str(folder / DIFFUSERS_FILE))
        label = METHOD_TITLES.get(run["method"], run["method"])
        if sum(other["method"] == run["method"] for other in configs) > 1:
            label = f"{label} ({folder.name})"
        columns.append(Column(label, _sample(pipeline, prompts, count, steps, guidance_scale, config, bar)))
        pipeline.unload_lora_weights()
    bar.close()
    if names:
        columns.append(Column("true 3D icon", [_solid_icon(name) for name in names for _ in range(count)]))
    titles = [f"{name} (trained)" if name in TRAINED_ON else name for name in names for _ in range(count)]
    path = folders[-1] / GRID_FILE
    with atomic_write(path) as temporary:
        grid(columns, titles).save(temporary, format="PNG")
    return path


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG_FILE).exists() or not (folder / DIFFUSERS_FILE).exists():
        raise UserError(f"{folder} holds no finished run: it needs {CONFIG_FILE} and {DIFFUSERS_FILE}")
    return yaml.safe_load((folder / CONFIG_FILE).read_text())


def _sample(
    pipeline: StableDiffusionXLPipeline,
    prompts: Sequence[str],
    count: int,
    steps: int,
    guidance_scale: float,
    config: dict[str, Any],
    bar: tqdm,
) -> list[Image.Image]:
    vae = pipeline.vae
    pictures = []
    for row, prompt in enumerate(prompts):
        pictures += sample_pictures(
            pipeline,
            prompt,
            numbers=range(row * count, (row + 1) * count),
            seed=config["seed"],
            resolution=config["resolution"],
            load_vae=lambda: vae,
            steps=steps,
            guidance_scale=guidance_scale,
        )
        bar.update(1)
    return pictures


def _solid_icon(name: str) -> Image.Image:
    with Image.open(ICONS_FOLDER / SOLID_STYLE / f"{slug(name)}.png") as picture:
        return picture.convert("RGB")


if __name__ == "__main__":
    sys.exit(main())
