"""The README.md beside a LoRA: what it is, how to use it, how it was trained.

The head is what the model hub reads (the fields and tags of diffusers' own DreamBooth cards); the text is for
people. It is written with or without a push to the hub, needs no network, and holds nothing that `LoraFacts`
does not.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCardData

from bilora_diffusion.atomic import write_text_atomically
from bilora_diffusion.lora_files.diffusers_format import DIFFUSERS_FILE
from bilora_diffusion.lora_files.facts import LoraFacts, utc_date
from bilora_diffusion.lora_files.kohya import KOHYA_FILE

__all__ = ["CARD_FILE", "CardImage", "model_card", "write_model_card"]

CARD_FILE = "README.md"
TAGS = (
    "text-to-image",
    "diffusers-training",
    "diffusers",
    "lora",
    "template:sd-lora",
    "stable-diffusion-xl",
    "stable-diffusion-xl-diffusers",
)

# A LoRA is made from its base and comes under the base's licence. It is named where it is known; a wrong one
# would be worse than none.
LICENSES = {"stabilityai/stable-diffusion-xl-base-1.0": "openrail++"}

METHODS = {
    "bilora": (
        "Bi-LoRA ([arXiv 2508.19564](https://arxiv.org/abs/2508.19564)): beside the adapter in the file, a "
        "second one perturbed the weights during training towards higher loss, so that the first should be "
        "good in a neighbourhood and not at a point. The second is not in the file"
    ),
    "bilora-fresh": (
        "Bi-LoRA with a fresh perturbation: as Bi-LoRA, but the second adapter was filled anew from each batch, in a "
        "cheap pass of its own. It is not in the file"
    ),
    "bilora-echo": (
        "Bi-LoRA with an echo: each draw of pictures served two steps, the second under the first one's gradient, held "
        "in a second adapter. It is not in the file"
    ),
    "dual-lora": (
        "Dual-LoRA, an ablation of Bi-LoRA ([arXiv 2508.19564](https://arxiv.org/abs/2508.19564)): the second adapter "
        "descended too. It is not in the file"
    ),
    "eflat-lora": (
        "EFlat-LoRA ([arXiv 2508.00522](https://arxiv.org/abs/2508.00522)): trained under a running average of SAM "
        "steps in the space of the weights"
    ),
    "flat-lora": (
        "Flat-LoRA ([arXiv 2409.14396](https://arxiv.org/abs/2409.14396)): trained under random noise on the weights"
    ),
    "looksam": "LookSAM ([arXiv 2203.02714](https://arxiv.org/abs/2203.02714)) on the factors of a LoRA",
    "lora": "plain LoRA",
    "lora-sam": "SAM ([arXiv 2010.01412](https://arxiv.org/abs/2010.01412)) on the factors of a LoRA",
    "nbar": "LoRA-nBAR ([arXiv 2410.14802](https://arxiv.org/abs/2410.14802))",
    "obar": "LoRA-oBAR ([arXiv 2410.14802](https://arxiv.org/abs/2410.14802))",
    "rwp-full": "trained under random noise on the weights, the same amount from first to last step",
    "rwp-lora": "trained under random noise on the factors of the LoRA",
    "s2-sam": "S2-SAM on the factors of a LoRA: SAM along the gradient of the step before",
}
SETTINGS = {
    "rho": "rho (size of the perturbation)",
    "rho_schedule": "course of rho",
    "auxiliary_rank": "rank of the second adapter",
    "ascent_share": "share of the rows in the ascent pass",
    "ascent_every": "steps from one ascent pass to the next",
    "ascent_basis": "directions of the ascent",
    "sigma": "sigma (noise as a share of the norm)",
    "sigma_schedule": "course of the noise",
    "looksam_every": "steps from one second pass to the next",
    "looksam_alpha": "weight of the direction used again",
    "eflat_beta": "weight of the newest perturbation",
    "bar_strength": "strength of the balancing, in learning rates",
    "bar_schedule": "course of the balancing",
}
INITIAL = {
    "gaussian": "gaussian A, B = 0",
    "kaiming": "uniform A (Kaiming), B = 0",
    "pissa": "PiSSA ([arXiv 2404.02948](https://arxiv.org/abs/2404.02948))",
    "olora": "OLoRA ([arXiv 2406.01775](https://arxiv.org/abs/2406.01775))",
    "lora_ga": "LoRA-GA ([arXiv 2407.05000](https://arxiv.org/abs/2407.05000))",
}
PART_NAMES = {"unet": "the UNet", "text_encoder": "text encoder 1", "text_encoder_2": "text encoder 2"}


@dataclass(frozen=True)
class CardImage:
    """A picture for the card's gallery.

    Arguments:
        file: its path relative to the card's folder, with forward slashes.
        prompt: what it was drawn from.
    """

    file: str
    prompt: str


def write_model_card(
    folder: str | os.PathLike[str],
    facts: LoraFacts,
    images: Sequence[CardImage] = (),
    *,
    hub_id: str | None = None,
    kohya_file: bool = True,
) -> Path:
    """Writes `README.md` into the folder of the LoRA, in place of an older one, and returns its path.

    Arguments:
        folder: the output folder.
        facts: what is said.
        images: pictures in that folder.
        hub_id: where the LoRA was or will be pushed, for the example; None = a folder name stands there.
        kohya_file: whether the Kohya file is there too.

    Raises:
        UserError: the file cannot be written.
    """
    path = Path(folder) / CARD_FILE
    write_text_atomically(path, model_card(facts, images, hub_id=hub_id, kohya_file=kohya_file))
    return path


def model_card(
    facts: LoraFacts, images: Sequence[CardImage] = (), *, hub_id: str | None = None, kohya_file: bool = True
) -> str:
    """The card's text; see `write_model_card`."""
    sections = [
        f"---\n{_head(facts, images)}\n---",
        f"# {facts.name}",
        *(["<Gallery />"] if images else []),
        _summary(facts),
        "## Use",
        _usage(facts, hub_id, kohya_file),
        "## Training",
        _training(facts),
        "## Limits",
        _limits(facts),
    ]
    return "\n\n".join(sections) + "\n"


def _head(facts: LoraFacts, images: Sequence[CardImage]) -> str:
    data = ModelCardData(
        base_model=facts.base_hub_id,
        library_name="diffusers",
        license=LICENSES.get(facts.base_hub_id or ""),
        instance_prompt=facts.instance_prompt,
        tags=[*TAGS, facts.method, *(["dora"] if facts.use_dora else [])],
        widget=[{"text": image.prompt or " ", "output": {"url": image.file}} for image in images] or None,
    )
    return data.to_yaml().strip()


def _base(facts: LoraFacts) -> str:
    if facts.base_hub_id:
        return f"[{facts.base_hub_id}](https://huggingface.co/{facts.base_hub_id})"
    return f"`{facts.base}`"


def _summary(facts: LoraFacts) -> str:
    kind = "DoRA" if facts.use_dora else "LoRA"
    parts = _listed([PART_NAMES[part] for part in facts.trained_parts])
    text = f"A {kind} for {_base(facts)} (Stable Diffusion XL), on {parts}."
    if facts.instance_prompt:
        text += f" Call it up with the prompt\n\n```\n{facts.instance_prompt}\n```"
    elif facts.captions:
        text += f" It was trained on captions such as\n\n```\n{facts.captions[0]}\n```"
    return text


def _usage(facts: LoraFacts, hub_id: str | None, kohya_file: bool) -> str:
    base = facts.base_hub_id or "path/to/the/base"
    prompt = facts.instance_prompt or next(iter(facts.captions), "a photo")
    source = hub_id or "path/to/this/folder"
    text = f"""With diffusers:

```python
import torch
from diffusers import StableDiffusionXLPipeline

pipeline = StableDiffusionXLPipeline.from_pretrained({base!r}, torch_dtype=torch.float16).to("cuda")
pipeline.load_lora_weights({source!r}, weight_name={DIFFUSERS_FILE!r})
image = pipeline({prompt!r}).images[0]
```"""
    if not kohya_file:
        return f"{text}\n\nThere is no file for ComfyUI or A1111 here."
    return f"""{text}

With ComfyUI: put `{KOHYA_FILE}` into `ComfyUI/models/loras` and choose it in a *Load LoRA* node.

With A1111 or Forge: put `{KOHYA_FILE}` into `models/Lora` and add `<lora:{Path(KOHYA_FILE).stem}:1>` to
the prompt.

Give the file a name of your own there; what is inside is the same model as `{DIFFUSERS_FILE}`."""


def _training(facts: LoraFacts) -> str:
    prior = f" and {facts.num_class_images} class pictures" if facts.num_class_images else ""
    shapes = ", aspect-ratio buckets" if facts.aspect_ratio_buckets else ""
    rows = {
        "rank / alpha": f"{facts.rank} / {facts.alpha:g}",
        "initial values": _initial(facts.init_lora_weights),
        **{SETTINGS[name]: _setting(facts, name) for name in SETTINGS if name in facts.settings},
        "adapted modules of the UNet": ", ".join(f"`{name}`" for name in facts.lora_layers or ()) or None,
        "pictures": None if facts.num_images is None else f"{facts.num_images}{prior}",
        "held to the base's own prediction": None if facts.prior_prompt is None else f"`{facts.prior_prompt}`",
        "resolution": f"{facts.resolution} px{shapes}" if facts.resolution else None,
        "optimiser steps": facts.steps,
        "pictures a step": _rows_a_step(facts),
        "learning rate": _learning_rate(facts),
        "optimiser, schedule": ", ".join(filter(None, (facts.optimizer, facts.lr_scheduler))) or None,
        "mixed precision": facts.mixed_precision,
        "min-SNR gamma": facts.min_snr_gamma,
        "noise offset": facts.noise_offset or None,
        "caption dropout": facts.caption_dropout or None,
        "captions' tags": f"shuffled, the first {facts.keep_tokens or 0} kept" if facts.shuffle_caption else None,
        "loss": "masked" if facts.masked_loss else None,
        "prediction type": facts.prediction_type,
        "seed": facts.seed,
        "finished": None if facts.finished_at is None else utc_date(facts.finished_at),
        "versions": ", ".join(f"{name} {version}" for name, version in facts.versions.items()) or None,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value is not None)
    method = METHODS.get(facts.method, facts.method)
    return f"Method: {method}.\n\n| | |\n|---|---|\n{table}"


def _initial(start: str | None) -> str | None:
    if start is None or start in ("gaussian", "kaiming"):
        return start and INITIAL[start]
    kind, _, iterations = start.partition("_niter_")
    text = INITIAL[kind] + (f", {iterations} power iterations" if iterations else "")
    return f"{text}; the file holds the change since, of twice the rank that was trained"


def _setting(facts: LoraFacts, name: str) -> str:
    value = facts.settings[name]
    text = f"{value:g}" if isinstance(value, float) else str(value)
    if name == "rho" and facts.rho_relative is not None:
        text += f" = {facts.rho_relative:g} of the adapted weights' norm"
    return text


def _rows_a_step(facts: LoraFacts) -> str | None:
    if facts.batch_size is None:
        return None
    rows = facts.batch_size * facts.accumulation * facts.num_processes
    return f"{rows} ({facts.batch_size} x {facts.accumulation} accumulated x {facts.num_processes} processes)"


def _learning_rate(facts: LoraFacts) -> str | None:
    if facts.learning_rate is None:
        return None
    encoders = facts.text_encoder_lr
    return f"{facts.learning_rate:g}" + (f", text encoders {encoders:g}" if encoders is not None else "")


def _limits(facts: LoraFacts) -> str:
    license_note = "" if facts.base_hub_id in LICENSES else " Its licence follows that of the base; check it there."
    return (
        "This card holds no measurement of its quality. It learnt from few pictures and can "
        f"repeat them, and it has the limits and biases of its base.{license_note}"
    )


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1]))) if names else "no part"
