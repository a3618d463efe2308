"""The end of `make demo`: loads the LoRA file as a user would and draws base | LoRA side by side.

python -m bilora_diffusion.demo outputs/quickstart
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from diffusers import StableDiffusionXLPipeline
from PIL import Image, ImageDraw, ImageFont

from bilora_diffusion.atomic import atomic_write
from bilora_diffusion.bases import Base
from bilora_diffusion.bases.quiet import quiet_libraries
from bilora_diffusion.errors import UserError
from bilora_diffusion.run_folder import CONFIG_FILE, DIFFUSERS_FILE, KOHYA_FILE
from bilora_diffusion.sampling import sample_pictures, use_sampling_scheduler

__all__ = ["grid", "main"]

GRID_FILE = "base_and_lora.png"
LABEL_PX = 22
LEAST_SIDE_PX = 192  # the tiny base draws 64 px; smaller cells than this cannot be looked at


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the paths of the LoRA files and of the grid."""
    parser = argparse.ArgumentParser(description="Draws base | LoRA for a finished run.")
    parser.add_argument("folder", type=Path, help="the run's --output_dir")
    parser.add_argument("--prompt", help="default: the run's instance prompt")
    parser.add_argument("--count", type=int, default=4, help="pictures a column")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps")
    arguments = parser.parse_args(argv)
    try:
        path = draw(arguments.folder, arguments.prompt, arguments.count, arguments.steps)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name in (DIFFUSERS_FILE, KOHYA_FILE):
        if (arguments.folder / name).exists():
            print(arguments.folder / name)
    print(path)
    return 0


@torch.no_grad()
def draw(folder: Path, prompt: str | None, count: int, steps: int) -> Path:
    """Writes the grid of a finished run and returns its path.

    Raises:
        UserError: the folder holds no finished run.
    """
    if not (folder / CONFIG_FILE).exists() or not (folder / DIFFUSERS_FILE).exists():
        raise UserError(f"{folder} holds no finished run: it needs {CONFIG_FILE} and {DIFFUSERS_FILE}")
    config = yaml.safe_load((folder / CONFIG_FILE).read_text())
    base = Base(
        config["pretrained_model_name_or_path"],
        revision=config["revision"],
        variant=config["variant"],
        cache_dir=config["cache_dir"],
        vae=config["pretrained_vae_model_name_or_path"],
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    pipeline = base.load("unet", "vae", "text_encoder", "text_encoder_2", dtype=dtype).to(device)
    use_sampling_scheduler(pipeline)
    prompt = prompt or config["instance_prompt"] or ""
    columns = [("base", _sample(pipeline, prompt, count, steps, config))]
    with quiet_libraries():
        pipeline.load_lora_weights(str(folder / DIFFUSERS_FILE))
    columns.append((f"LoRA ({config['method']})", _sample(pipeline, prompt, count, steps, config)))
    path = folder / GRID_FILE
    with atomic_write(path) as temporary:
        grid(columns).save(temporary, format="PNG")
    return path


def _sample(
    pipeline: StableDiffusionXLPipeline, prompt: str, count: int, steps: int, config: dict
) -> list[Image.Image]:
    vae = pipeline.vae
    return sample_pictures(
        pipeline,
        prompt,
        numbers=range(count),
        seed=config["seed"],
        resolution=config["resolution"],
        load_vae=lambda: vae,
        steps=steps,
    )


def grid(columns: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """Labelled columns of equally large pictures, a row for each seed."""
    side = max(LEAST_SIDE_PX, columns[0][1][0].width)
    rows = max(len(pictures) for _, pictures in columns)
    sheet = Image.new("RGB", (side * len(columns), LABEL_PX + side * rows), "white")
    pen = ImageDraw.Draw(sheet)
    for column, (label, pictures) in enumerate(columns):
        pen.text((column * side + 6, 3), label, fill="black", font=ImageFont.load_default(14))
        for row, picture in enumerate(pictures):
            sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), (column * side, LABEL_PX + row * side))
    return sheet


if __name__ == "__main__":
    sys.exit(main())
