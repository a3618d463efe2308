"""What is measured: the project's own trainer with each method, and the recipe of diffusers' script."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from PIL import Image
from torch import Tensor, nn

from benchmarks.speed.bases import SharedBase, sharing_copy
from bilora_diffusion.assembly import Machine, assemble, read_pictures
from bilora_diffusion.config import TrainingConfig
from bilora_diffusion.data.dreambooth import flatten
from bilora_diffusion.errors import UserError
from bilora_diffusion.fused import unfuse
from bilora_diffusion.method_names import METHOD_NAMES
from bilora_diffusion.randomness import generator
from bilora_diffusion.training import BegunStep

__all__ = ["BASELINE", "FULL_SIZE", "Contender", "Setting", "Specification", "specifications", "write_pictures"]

BASELINE = "lora"
RANK, RATE = 4, 1e-4
PICTURES = 4
HUNDRED_YEARS = 100_000  # steps: no schedule ends while it is measured


@dataclass(frozen=True)
class Setting:
    """What is the same for all contenders.

    Arguments:
        resolution: side of the pictures in pixels.
        dtype: of the base and of the forward pass.
        pictures: a folder.
        latents: a folder where all contenders find the encoded pictures; None: each encodes its own and keeps them in
            memory.
    """

    base: SharedBase
    device: torch.device
    dtype: torch.dtype
    resolution: int
    batch: int
    checkpointing: bool
    pictures: Path
    latents: Path | None = None


class Contender(Protocol):
    """A trainer that takes steps.

    Attributes:
        unet: whose share of the step is measured.
        cycle: steps after which its work repeats; a sample is the mean of so many.
    """

    unet: nn.Module
    cycle: int

    def step(self, number: int) -> float:
        """One optimiser step with all that a run does for it but logging; returns the newest loss that it knows."""

    def beside_unet(self) -> Iterator[Tensor]:
        """What of the shared base stays on the device beside the UNet."""


@dataclass(frozen=True)
class Specification:
    """How a contender is built.

    Arguments:
        flags: of the trainer, beside what all have.
        build: from the setting.
    """

    name: str
    flags: dict[str, Any]
    build: Callable[[Setting], Contender] = field(repr=False)


FULL_SIZE = (
    *(BASELINE, "bilora", "bilora-fresh", "bilora-echo", "flat-lora", "lora-sam", "nbar"),
    *("lora, peft's forward", "bilora, peft's forward", "lora, channels last", "stock", "stock, latents kept"),
)
"""Those that are measured on SDXL if nothing else is asked for: each costs minutes on a CPU, and on a GPU seconds
until its layers have their adapters."""


def specifications(names: Sequence[str] | None = None, *, compiled: bool = False) -> Iterator[Specification]:
    """All of them, or those of some names and the baseline; each method also compiled, if asked for."""
    everything = [_own(BASELINE)]
    everything += [_own(method) for method in METHOD_NAMES if method != BASELINE]
    everything += [_own("bilora-fresh", "tracked", ascent_basis="tracked")]
    everything += [_own(method, "dropout", lora_dropout=0.5) for method in (BASELINE, "bilora")]
    everything += [_own(method, "peft's forward", fused=False) for method in (BASELINE, "bilora")]
    everything += [_own(BASELINE, "dropout, peft's forward", fused=False, lora_dropout=0.5)]
    everything += [_own(BASELINE, "channels last", channels_last=True)]
    everything += [
        Specification("stock", {"vae": "every step"}, lambda setting: Stock(setting, encodes=True)),
        Specification("stock, latents kept", {"vae": "never"}, lambda setting: Stock(setting, encodes=False)),
    ]
    unknown = set(names or ()) - {one.name for one in everything}
    if unknown:
        known = ", ".join(f"'{one.name}'" for one in everything)
        raise UserError(f"--only {', '.join(sorted(unknown))}: there is {known}")
    chosen = [one for one in everything if not names or one.name in names or one.name == BASELINE]
    yield from chosen
    if compiled:
        yield from (_own(one.name, "compiled", compile=True) for one in chosen if one.name in METHOD_NAMES)


def _own(method: str, form: str = "", *, fused: bool = True, **own: Any) -> Specification:
    """Arguments: form: what sets it apart from the method as it is by default, for its name."""
    flags = {"method": method} | own
    if method == "bilora-fresh":
        flags = {"ascent_share": 1.0, "ascent_basis": "gradient"} | flags  # a whole second pass
    name = f"{method}, {form}" if form else method
    return Specification(name, flags | {"fused": fused}, lambda setting: Own(setting, flags, fused))


class Own:
    """This project's trainer, latents and prompt embeddings kept, as with --center_crop."""

    def __init__(self, setting: Setting, flags: dict[str, Any], fused: bool) -> None:
        config = TrainingConfig(
            pretrained_model_name_or_path="tiny-random",  # what is loaded is the setting's
            instance_data_dir=str(setting.pictures),
            instance_prompt="a photo of sks dog",
            resolution=setting.resolution,
            center_crop=True,
            rank=RANK,
            learning_rate=RATE,
            train_batch_size=setting.batch,
            gradient_checkpointing=setting.checkpointing,
            max_train_steps=HUNDRED_YEARS,
            seed=0,
            cache_dir_latents=None if setting.latents is None else str(setting.latents),
            **flags,
        )
        machine = Machine(setting.device, setting.dtype, 0, 1, lambda: None)
        pictures, _ = read_pictures(config)
        with setting.base.in_place_of_files():
            self.parts = assemble(config, machine, pictures, seed=0, steps_of=lambda _: HUNDRED_YEARS)
        self.unet = self.parts.models["unet"]
        if not fused:
            unfuse(self.unet)
        self.batch = setting.batch
        self._before: BegunStep | None = None
        self.cycle = config.looksam_every if config.method == "looksam" else config.shown_in_a_row

    def step(self, number: int) -> float:
        rows = flatten([self.parts.dataset[number * self.batch + place] for place in range(self.batch)])
        trainer = self.parts.trainer
        begun = trainer.begin_step(trainer.micro_batches([self.parts.make_batch(rows)]), number)
        read, self._before = self._before or begun, begun  # one step late, as a run does
        step = read.result()
        if not step.applied:
            raise RuntimeError("the loss or its gradient is not finite: a skipped step costs less than a true one")
        return step.loss

    def beside_unet(self) -> Iterator[Tensor]:
        return iter(())


class Stock:
    """The step of diffusers' train_dreambooth_lora_sdxl.py (August 2026), UNet only, without its data loading.

    Transcribed; tests/test_parity.py holds that these are the weights our `lora` comes to from the same draws.

    Arguments:
        encodes: the VAE runs in every step, as it does there; else it gets latents.
    """

    cycle = 1

    def __init__(self, setting: Setting, *, encodes: bool) -> None:
        pipeline = setting.base.pipeline
        self.device, self.dtype, self.resolution = setting.device, setting.dtype, setting.resolution
        self.unet = sharing_copy(pipeline.unet).train()
        self.vae = pipeline.vae if encodes else None
        self.scaling = pipeline.vae.config.scaling_factor
        if setting.checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.unet.add_adapter(
            LoraConfig(
                r=RANK,
                lora_alpha=RANK,
                lora_dropout=0.0,
                init_lora_weights="gaussian",
                target_modules=["to_k", "to_q", "to_v", "to_out.0"],
            )
        )
        if self.dtype == torch.float16:  # the script leaves bfloat16 adapters as they are
            cast_training_params(self.unet, dtype=torch.float32)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.parameters = [parameter for parameter in self.unet.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=RATE, weight_decay=1e-4, eps=1e-8)
        self.schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
        random, batch = generator(0, "stock"), setting.batch
        self.pixels = torch.rand(batch, 3, self.resolution, self.resolution, generator=random) * 2 - 1
        self.latents = torch.randn(batch, 4, self.resolution // 8, self.resolution // 8, generator=random)
        self.latents = self.latents.to(self.device)
        config = self.unet.config
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        self.prompt = torch.randn(1, 77, config.cross_attention_dim, generator=random).to(self.device, self.dtype)
        self.pooled = torch.randn(1, pooled, generator=random).to(self.device, self.dtype)

    def step(self, number: int) -> float:
        latents = (self._encoded() if self.vae is not None else self.latents).to(self.dtype)
        batch = len(latents)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, self.schedule.config.num_train_timesteps, (batch,), device=self.device).long()
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        side = (self.resolution, self.resolution)
        sizes = torch.cat([torch.tensor([[*side, 0, 0, *side]]).to(self.device, self.dtype) for _ in range(batch)])
        known = {"time_ids": sizes, "text_embeds": self.pooled.repeat(batch, 1)}
        with self._autocast():
            predicted = self.unet(
                noisy, timesteps, self.prompt.repeat(batch, 1, 1), added_cond_kwargs=known, return_dict=False
            )[0]
        loss = nn.functional.mse_loss(predicted.float(), noise.float(), reduction="mean")
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return loss.detach().item()  # for its progress bar

    def beside_unet(self) -> Iterator[Tensor]:
        return iter(()) if self.vae is None else self.vae.parameters()

    def _encoded(self) -> torch.Tensor:
        return self.vae.encode(self.pixels.to(self.device)).latent_dist.sample() * self.scaling

    def _autocast(self) -> AbstractContextManager[None]:
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)


def write_pictures(folder: Path, resolution: int) -> None:
    """Some smooth random pictures."""
    for number in range(PICTURES):
        coarse = torch.randint(256, (8, 8, 3), generator=generator(0, "picture", number), dtype=torch.uint8)
        Image.fromarray(coarse.numpy()).resize((resolution, resolution)).save(folder / f"{number}.png")
