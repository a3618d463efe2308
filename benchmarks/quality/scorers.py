"""The models that judge: found before anything is trained, loaded one at a time when everything is drawn.

References:
    CLIP: Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021,
    arXiv:2103.00020.
    DINO: Caron et al., Emerging Properties in Self-Supervised Vision Transformers, 2021, arXiv:2104.14294.
    BLIP-2: Li et al., BLIP-2: Bootstrapping Language-Image Pre-training with Frozen Image Encoders and Large Language
    Models, 2023, arXiv:2301.12597.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from bilora_diffusion.bases.fetching import fetch
from bilora_diffusion.bases.quiet import quiet_libraries
from bilora_diffusion.bases.weights import open_safetensors
from bilora_diffusion.errors import UserError
from bilora_diffusion.measures import ClipJudge
from bilora_diffusion.model_names import existing_path

__all__ = ["Captioner", "Dino", "Model", "find_model", "open_clip"]

KINDS = {
    "--clip": ("a CLIP", ("clip",)),
    "--dino": ("a DINO", ("vit", "dinov2")),
    "--captioner": ("a captioner", ("blip", "blip-2")),
}
"""What a flag names, and the `model_type` of the configurations that are this."""
SMALL_FILES = ["*.json", "*.txt"]
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
"""The first that a model has is taken."""
MOST_CAPTION_TOKENS = 30


@dataclass(frozen=True)
class Model:
    """A scorer's files on this disk.

    Attributes:
        name: hub id, or the last component of a folder's path.
        revision: the hub's commit; None for a folder.
    """

    flag: str
    name: str
    revision: str | None
    folder: Path
    model_type: str

    def to_json(self) -> dict[str, str | None]:
        return {"name": self.name, "revision": self.revision, "model_type": self.model_type}

    def unreadable(self, error: Exception) -> UserError:
        reason = " ".join(str(error).split())[:200]
        return UserError(f"{self.flag} {self.name} cannot be read ({reason}): copy or download it again")


def find_model(flag: str, text: str) -> Model:
    """The model that a flag names, fetched from the hub where it is not on this disk.

    Arguments:
        flag: among `KINDS`.
        text: a folder, a hub id, or `id@revision`.

    Raises:
        UserError: it is not there and cannot be fetched, is another kind of model, or has no weights.
    """
    name, revision = (text, "") if Path(text).expanduser().exists() else text.partition("@")[::2]
    folder = existing_path(name, flag)
    on_hub = folder is None
    if folder is None:
        # The small files first: another kind of model is refused before gigabytes of it arrive.
        folder = fetch(name, SMALL_FILES, flag, revision or None, None, revision_flag=flag)
    model_type = _model_type(flag, name, folder)
    if on_hub:
        for pattern in WEIGHTS:
            folder = fetch(name, [*SMALL_FILES, pattern], flag, revision or None, None, revision_flag=flag)
            if any(folder.glob(pattern)):
                break
    weights = [path for pattern in WEIGHTS for path in sorted(folder.glob(pattern))]
    if not weights:
        raise UserError(f"{flag} {name} has no weights ({' or '.join(WEIGHTS)}): copy or download it again")
    for path in weights:
        if path.suffix == ".safetensors":
            with open_safetensors(path, f"{flag} {name}"):
                pass  # a file that is cut short would else be found out when everything is drawn
    return Model(flag, name if on_hub else folder.resolve().name, folder.name if on_hub else None, folder, model_type)


def _model_type(flag: str, name: str, folder: Path) -> str:
    what, types = KINDS[flag]
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        raise UserError(f"{flag} {name} is no model in transformers' layout: it has no config.json to read") from None
    if found not in types:
        raise UserError(f"{flag} {name} is a {found} model: it must be {what} (model_type {' or '.join(types)})")
    return found


def open_clip(model: Model, device: torch.device) -> ClipJudge:
    """In float32."""
    return ClipJudge(str(model.folder), device, model.name)


class Dino:
    """Features of pictures by a self-supervised ViT, in float32: the last layer's class token."""

    def __init__(self, model: Model, device: torch.device) -> None:
        self.device = device
        more = {"add_pooling_layer": False} if model.model_type == "vit" else {}
        self._model = _load(AutoModel, model, torch.float32, **more).to(device)
        self._processor = _read(AutoImageProcessor, model)

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(N, D), rows of length 1, on the CPU."""
        pixels = self._processor(list(pictures), return_tensors="pt").pixel_values.to(self.device)
        return normalize(self._model(pixels).last_hidden_state[:, 0], dim=1).cpu()


class Captioner:
    """Describes pictures, always in the same words: the likeliest next one each time.

    Half precision on a GPU: BLIP-2's smallest has 3.7 billion parameters.
    """

    def __init__(self, model: Model, device: torch.device) -> None:
        self.model, self.device = model, device
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self._model = _load(AutoModelForImageTextToText, model, self.dtype).to(device)
        self._processor = _read(AutoProcessor, model)

    @torch.no_grad()
    def captions(self, pictures: Sequence[Image.Image]) -> list[str]:
        pixels = self._processor.image_processor(list(pictures), return_tensors="pt").pixel_values
        words = self._model.generate(
            pixel_values=pixels.to(self.device, self.dtype),
            do_sample=False,
            num_beams=1,
            max_new_tokens=MOST_CAPTION_TOKENS,
        )
        texts = self._processor.tokenizer.batch_decode(words, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]


def _load(loader: Any, model: Model, dtype: torch.dtype, **more: Any) -> PreTrainedModel:
    try:
        with quiet_libraries():
            loaded, info = loader.from_pretrained(model.folder, dtype=dtype, output_loading_info=True, **more)
    except Exception as error:  # transformers and safetensors raise many kinds on damaged files
        raise model.unreadable(error) from None
    if missing := sorted(info["missing_keys"]):  # left random, with no more than a warning
        raise model.unreadable(ValueError(f"it lacks {len(missing)} weights such as {missing[0]}"))
    return loaded.eval()


def _read(loader: Any, model: Model) -> Any:
    try:
        with quiet_libraries():
            return loader.from_pretrained(model.folder)
    except Exception as error:
        raise model.unreadable(error) from None
