"""LoRA files for the embedded base, made in a moment: random, but strong enough to change a picture."""

from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline

from bilora_diffusion.adapters import PRIMARY, add_adapter, parameters_of
from bilora_diffusion.lora_files.diffusers_format import DIFFUSERS_FILE, save_diffusers
from bilora_diffusion.lora_files.facts import LoraFacts, bilora_metadata
from bilora_diffusion.lora_files.kohya import KOHYA_FILE, save_kohya
from bilora_diffusion.lora_files.verification import strip_adapters

PROMPT = "a fluent icon of a lion, in the style of TOK"
UNET_ONLY = ("unet",)
ALL_PARTS = ("unet", "text_encoder", "text_encoder_2")


def write_lora(
    folder: Path,
    pipeline: StableDiffusionXLPipeline,
    *,
    method: str = "lora",
    parts: tuple[str, ...] = UNET_ONLY,
    rank: int = 2,
    alpha: float = 4.0,
    seed: int = 0,
    base: str = "embedded",
    instance_prompt: str = PROMPT,
    targets: tuple[str, ...] | None = None,
    use_dora: bool = False,
) -> Path:
    """Writes a run's two files, diffusers' and Kohya's, and leaves the pipeline bare; returns the first."""
    folder.mkdir(parents=True, exist_ok=True)
    models = {part: getattr(pipeline, part) for part in parts}
    draw = torch.Generator().manual_seed(seed)
    for part, model in models.items():
        add_adapter(
            part,
            model,
            PRIMARY,
            rank=rank,
            scale=alpha / rank,
            init="gaussian",
            seed=seed,
            targets=targets,
            use_dora=use_dora,
        )
        for name, parameter in parameters_of(model, PRIMARY).items():
            if "lora_B" in name:
                parameter.data = 0.02 * torch.randn(parameter.shape, generator=draw)
    facts = LoraFacts(
        name=folder.name,
        base=base,
        method=method,
        rank=rank,
        alpha=alpha,
        settings={"rho": 1.5, "auxiliary_rank": 4} if method == "bilora" else {},
        steps=250,
        instance_prompt=instance_prompt,
        trained_parts=parts,
        resolution=64,
        seed=seed,
        finished_at=1_790_000_000.0,
        versions={"torch": torch.__version__},
    )
    save_diffusers(folder / DIFFUSERS_FILE, models, metadata=bilora_metadata(facts))
    if not use_dora:  # no Kohya file can hold it
        save_kohya(folder / KOHYA_FILE, models, facts=facts)
    for model in models.values():
        strip_adapters(model)
    return folder / DIFFUSERS_FILE
