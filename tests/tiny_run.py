"""A run on tiny-random, built by `assemble` as the trainer builds it, for tests that take a few steps in process."""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor

from bilora_diffusion.adapters import AUXILIARY, PRIMARY, START, LowRank, adapted_layers, low_rank_layers, parameters_of
from bilora_diffusion.assembly import TEXT_ENCODERS, Machine, Parts, assemble, read_pictures
from bilora_diffusion.bases import PARTS, Base
from bilora_diffusion.bases.tiny import build_tiny_random
from bilora_diffusion.batches import Batch
from bilora_diffusion.config import TrainingConfig
from bilora_diffusion.data.dreambooth import flatten
from bilora_diffusion.randomness import generator
from bilora_diffusion.training import Step

# alpha != rank and the auxiliary's rank another: most slips in s, alpha and r go unseen while they are equal.
DEFAULTS: dict[str, Any] = {
    "pretrained_model_name_or_path": "tiny-random",
    "instance_prompt": "a sks picture",
    "resolution": 64,
    "center_crop": True,
    "lora_layers": "to_k,to_out.0",  # half of the projections, for speed; None = all four
    "rank": 4,
    "lora_alpha": 8.0,
    "auxiliary_rank": 3,
    "learning_rate": 1e-3,
    "text_encoder_lr": 1e-3,
    "lr_warmup_steps": 0,
    "train_batch_size": 2,
    "max_train_steps": 10,
    "seed": 0,
}
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def write_pictures(folder: Path, sizes: Iterable[tuple[int, int]], caption: str | None, seed: int) -> None:
    """Smooth random pictures of the given (width, height), with a caption file each unless `caption` is None."""
    for number, size in enumerate(sizes):
        coarse = torch.randint(256, (5, 5, 3), generator=generator(seed, "picture", number), dtype=torch.uint8)
        Image.fromarray(coarse.numpy()).resize(size, Image.Resampling.BICUBIC).save(folder / f"{number}.png")
        if caption is not None:
            (folder / f"{number}.txt").write_text(f"{caption} {number}")


def write_both(folder: Path) -> tuple[Path, Path]:
    """The instance pictures of the tests, one of them wide and one high, with captions, and the class pictures."""
    instances, classes = folder / "pictures", folder / "class_pictures"
    for one in (instances, classes):
        one.mkdir()
    write_pictures(instances, [(64, 64), (96, 64), (64, 80), (72, 72)], "a sks picture of kind", seed=0)
    write_pictures(classes, [(64, 64), (64, 72), (64, 64)], None, seed=1)
    return instances, classes


@dataclass
class TinyRun:
    """What `assemble` made of a configuration."""

    config: TrainingConfig
    parts: Parts

    def batches(self, step: int) -> list[Batch]:
        """The micro-batches of one optimiser step, of the draws that a run from 0 sees in it."""
        size, micro = self.config.train_batch_size, self.config.gradient_accumulation_steps
        first = step * size * micro
        return [self.batch(range(first + number * size, first + (number + 1) * size)) for number in range(micro)]

    def batch(self, draws: Iterable[int]) -> Batch:
        return self.parts.make_batch(flatten([self.parts.dataset[draw] for draw in draws]))

    def micro_batches(self, step: int = 0) -> list:
        return self.parts.trainer.micro_batches(self.batches(step))

    def step(self, number: int) -> Step:
        return self.parts.trainer.training_step(self.micro_batches(number), number)

    def train(self, steps: int, start: int = 0) -> list[float]:
        """The losses of some steps."""
        return [self.step(number).loss for number in range(start, start + steps)]

    def parameters(self, adapter: str) -> dict[str, torch.nn.Parameter]:
        return {
            f"{part}.{name}": parameter
            for part, model in self.parts.models.items()
            for name, parameter in parameters_of(model, adapter).items()
        }

    def tensors(self, adapter: str = PRIMARY) -> dict[str, Tensor]:
        """A copy of one adapter's weights."""
        return {name: parameter.detach().clone() for name, parameter in self.parameters(adapter).items()}

    def base_tensors(self) -> dict[str, Tensor]:
        """A copy of everything that must not change: the models' own parameters and buffers."""
        return {
            f"{part}.{name}": tensor.detach().clone()
            for part, model in self.parts.models.items()
            for name, tensor in model.state_dict().items()
            if not {PRIMARY, START, AUXILIARY} & set(name.split("."))
        }

    @property
    def auxiliary(self) -> list[LowRank]:
        return low_rank_layers(self.parts.models, AUXILIARY)

    def move_auxiliary(self, size: float = 0.05) -> None:
        """Gives the auxiliary's B, zero at the start, some values, so that it perturbs."""
        draw = torch.Generator().manual_seed(3)
        for layer in self.auxiliary:
            layer.B.data = size * torch.randn(layer.B.shape, generator=draw)


class Builder:
    """Builds runs; called with flags that differ from `DEFAULTS`.

    Attributes:
        shares: give all runs the same VAE, and the same text encoders if neither trained nor converted. Quicker, but
            what a run frees cannot be seen then.
    """

    shares = False

    def __init__(self, pictures: Path, class_pictures: Path | None = None) -> None:
        self.folders = {"instance_data_dir": str(pictures), "class_data_dir": str(class_pictures)}
        self.tiny = build_tiny_random()

    def __call__(
        self,
        method: str = "bilora",
        precision: str = "no",
        seed: int = 0,
        device: torch.device = torch.device("cpu"),  # noqa: B008
        **flags: Any,
    ) -> TinyRun:
        changes = {**DEFAULTS, **flags, "method": method, "mixed_precision": precision}
        if changes.get("with_prior_preservation"):
            changes = {"class_prompt": "a picture", "num_class_images": 3, **changes}
            changes["class_data_dir"] = self.folders["class_data_dir"]
        config = TrainingConfig(**{"instance_data_dir": self.folders["instance_data_dir"], **changes})
        machine = Machine(device, DTYPES[precision], 0, 1, lambda: None)
        pictures, _ = read_pictures(config)
        shared = frozenset({"vae"}) if self.shares and device.type == "cpu" else frozenset()
        if shared and precision == "no" and not config.train_text_encoder:
            shared |= {*TEXT_ENCODERS}
        with mock.patch.object(Base, "load", lambda _, *parts, dtype=torch.float32: self._copy(parts, dtype, shared)):
            parts = assemble(config, machine, pictures, seed=seed, steps_of=lambda _: config.max_train_steps)
        return TinyRun(config, parts)

    def _copy(
        self, parts: Sequence[str], dtype: torch.dtype, shared: frozenset[str] = frozenset()
    ) -> StableDiffusionXLPipeline:
        """What `Base("tiny-random").load` gives. A copy of what is not `shared` takes a fifth of building it anew."""
        pipeline = copy.copy(self.tiny)
        loaded = {part: getattr(self.tiny, part) for part in parts}
        loaded |= {part: copy.deepcopy(model) for part, model in loaded.items() if part not in shared}
        pipeline.register_modules(**{part: loaded.get(part) for part in PARTS})
        for part in set(parts) - {"vae"} - shared:
            getattr(pipeline, part).to(dtype)
        return pipeline


def all_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """The same names and the same bits."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def difference(one: dict[str, Tensor], other: dict[str, Tensor], start: dict[str, Tensor] | None = None) -> float:
    """||one - other|| / ||one||, or relative to what training changed, ||one - start||; in float64."""
    assert one.keys() == other.keys()

    def norm(tensors: Sequence[Tensor]) -> float:
        return torch.cat([tensor.flatten().double() for tensor in tensors]).norm().item()

    apart = norm([one[name] - other[name] for name in one])
    size = norm([one[name] - start[name] for name in one] if start else list(one.values()))
    return apart / size


def deltas(run: TinyRun, adapter: str) -> dict[str, Tensor]:
    """s B A of every layer, dense."""
    return {
        f"{part}.{name}": layer.get_delta_weight(adapter).detach()
        for part, model in run.parts.models.items()
        for name, layer in adapted_layers(model)
        if adapter in layer.lora_A
    }
