"""Numbers beside pictures: do they show what was asked for, and how near are they to the training pictures?

All are cosine similarities in a CLIP's space, so they compare columns of one table; they are no grades, and numbers of
two different CLIPs have nothing to do with each other.

Reference: Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021,
arXiv:2103.00020.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPModel, CLIPProcessor

from bilora_diffusion.bases.quiet import quiet_libraries
from bilora_diffusion.data.pictures import find_pictures
from bilora_diffusion.embedded import EMBEDDED, ICONS_FOLDER
from bilora_diffusion.embedded.icons import SIZE_PX
from bilora_diffusion.embedded.scorer import Scorer, styled_text
from bilora_diffusion.errors import UserError
from bilora_diffusion.run_folder import CONFIG_FILE

__all__ = ["Judge", "Measure", "judge_for", "measure", "training_pictures"]

MOST_TRAINING_PICTURES = 200


@dataclass(frozen=True)
class Measure:
    """Attributes:
    value: None where it cannot be had; `meaning` then says why.
    meaning: one sentence.
    """

    name: str
    value: float | None
    meaning: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Judge(Protocol):
    """A CLIP. `name` says which."""

    name: str

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(N, D), rows of length 1."""
        ...

    def image_text(self, images: Tensor, prompts: Sequence[str]) -> tuple[float | None, str]:
        """The mean similarity of picture i and prompt i, or None and the reason."""
        ...


class EmbeddedJudge:
    """The small CLIP of the embedded base. It knows names of icons, so the name is looked for in the prompt."""

    name = "the embedded base's small CLIP of icons"

    @cached_property
    def _scorer(self) -> Scorer:
        return Scorer.shipped()

    @cached_property
    def _names(self) -> list[str]:
        """The longest first: "rabbit face" goes before "rabbit"."""
        known = json.loads((ICONS_FOLDER / "names.json").read_text(encoding="utf-8"))["families"]
        return sorted(known, key=len, reverse=True)

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        small = [picture.convert("RGB").resize((SIZE_PX, SIZE_PX), Image.Resampling.LANCZOS) for picture in pictures]
        return self._scorer.images(torch.from_numpy(np.stack([np.asarray(one) for one in small])).permute(0, 3, 1, 2))

    def image_text(self, images: Tensor, prompts: Sequence[str]) -> tuple[float | None, str]:
        names = [self._name_in(prompt) for prompt in prompts]
        if None in names:
            return None, "not measured: a prompt holds no name of an icon, and this CLIP knows nothing else"
        scores = (images * self._scorer.texts([styled_text(name) for name in names])).sum(1)
        return scores.mean().item(), ""

    def _name_in(self, prompt: str) -> str | None:
        words = prompt.lower()
        return next((name for name in self._names if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", words)), None)


class ClipJudge:
    """Any CLIP in transformers' layout, in float32.

    Arguments:
        folder: a folder or a hub id.
        device: where it computes; what it returns is on the CPU.
        name: in messages; unset: the hub id, or the folder's own name.

    Raises:
        UserError: it cannot be found or read.
    """

    def __init__(self, folder: str, device: torch.device | None = None, name: str | None = None) -> None:
        self.name = name or (Path(folder).name if Path(folder).exists() else folder)
        self._device = device or torch.device("cpu")
        try:
            with quiet_libraries():
                model, info = CLIPModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
                self._processor = CLIPProcessor.from_pretrained(folder)
            if missing := sorted(info["missing_keys"]):  # left random, with no more than a warning
                raise ValueError(f"it lacks {len(missing)} weights such as {missing[0]}")
        except Exception as error:  # transformers raises many kinds on what is no CLIP
            raise UserError(f"--clip {self.name}: not a CLIP that can be read ({str(error).splitlines()[0]})") from None
        self._model = model.eval().to(self._device)

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        pixels = self._processor.image_processor(list(pictures), return_tensors="pt").pixel_values.to(self._device)
        return normalize(self._model.visual_projection(self._model.vision_model(pixels).pooler_output), dim=1).cpu()

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """(N, D), rows of length 1; what is longer than the CLIP reads is cut."""
        ids = self._processor.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt")
        pooled = self._model.text_model(**ids.to(self._device)).pooler_output
        return normalize(self._model.text_projection(pooled), dim=1).cpu()

    def image_text(self, images: Tensor, prompts: Sequence[str]) -> tuple[float | None, str]:
        return (images * self.texts(prompts)).sum(1).mean().item(), ""


def judge_for(base: str, clip: str | None = None) -> Judge | None:
    """The CLIP that can judge pictures of a base; None if there is none.

    Arguments:
        base: the base's name.
        clip: a CLIP of the user's, goes first.

    Raises:
        UserError: `clip` cannot be read.
    """
    if clip is not None:
        return ClipJudge(clip)
    return EmbeddedJudge() if base == EMBEDDED else None


def measure(
    judge: Judge | None, pictures: Sequence[Image.Image], prompts: Sequence[str], training: Tensor | None
) -> list[Measure]:
    """The three numbers of one column.

    Arguments:
        pictures: at least one.
        prompts: one a picture.
        training: the training pictures as `judge.images` gives them; None if they are not at hand.
    """
    names = ("picture and prompt", "likeness to the training pictures", "likeness to the nearest training picture")
    if judge is None:
        reason = "not measured: no CLIP for this base is at hand; give one with --clip"
        return [Measure(name, None, reason) for name in names]
    images = judge.images(pictures)
    score, reason = judge.image_text(images, prompts)
    meaning = f"how much the pictures show what was asked for, by {judge.name}: higher is more (at most 1)"
    measures = [Measure(names[0], score, reason or meaning)]
    if training is None:
        reason = "not measured: the training pictures are not at hand (the LoRA lies in no run's folder)"
        return measures + [Measure(name, None, reason) for name in names[1:]]
    similarities = images @ training.T
    return [
        *measures,
        Measure(
            names[1],
            similarities.mean().item(),
            f"mean similarity to all {len(training)} training pictures: higher is more of what was taught",
        ),
        Measure(
            names[2],
            similarities.max(dim=1).values.mean().item(),
            "similarity to the most similar training picture: near 1 the LoRA copies instead of drawing",
        ),
    ]


def training_pictures(lora: Path) -> list[Image.Image]:
    """The pictures that the run of a LoRA file was trained on, if the file lies in the run's folder.

    A run says where its pictures are in `config.yaml`, beside its results or above a checkpoint. Empty if it does not,
    or if they are gone: a comparison is not refused for that.
    """
    for folder in (lora.parent, lora.parent.parent):
        path = folder / CONFIG_FILE
        if path.is_file():
            try:
                source = yaml.safe_load(path.read_text(encoding="utf-8"))["instance_data_dir"]
                found, _ = find_pictures(source, instance_prompt="-")
                return [picture.load() for picture in found[:MOST_TRAINING_PICTURES]]
            except (UserError, OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
                return []
    return []
