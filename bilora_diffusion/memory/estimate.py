"""How much memory of a GPU a run takes, phase by phase, before anything of it is loaded.

    picture encoding    what stays  +  the VAE and its activations
    training step       frozen base  +  what stays beside it  +  adapters, moments  +  activations and gradients
    previews            the same without activations  +  the VAE and its activations while it decodes

The step is the trainer's own, run on `meta`: see `step` and `simulation`. **Estimated: no GPU has been measured yet.**
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bilora_diffusion.adapters import UNET
from bilora_diffusion.base_precision import precisions
from bilora_diffusion.bases import PARTS, Base
from bilora_diffusion.bases.folder import BaseFolder
from bilora_diffusion.bases.single_file import SDXL_CONFIG
from bilora_diffusion.config import TrainingConfig
from bilora_diffusion.data.buckets import make_buckets
from bilora_diffusion.data.folders import SUFFIXES
from bilora_diffusion.errors import UserError
from bilora_diffusion.memory.parts import TEXT_ENCODERS, build_part, frozen_bytes, store
from bilora_diffusion.memory.simulation import META, MemoryCounter, cuda_arithmetic
from bilora_diffusion.memory.step import simulate_step

__all__ = ["ALLOCATOR_SHARE", "CONTEXT_BYTES", "GB", "Estimate", "Phase", "estimate"]

GB = 2**30
CONTEXT_BYTES = GB // 2
"""An assumption: what CUDA's context and the libraries' kernels take of a card before the first tensor."""
ALLOCATOR_SHARE = 0.05
"""An assumption: kernels' workspaces and gaps between the allocator's blocks, as a share of what is allocated."""


@dataclass(frozen=True)
class Phase:
    """Bytes by what holds them, at the moment of the phase when they are most.

    Arguments:
        may_fail: the run goes on without it where memory does not suffice.
    """

    name: str
    holds: Mapping[str, int]
    may_fail: bool = False

    @property
    def allocated(self) -> int:
        return sum(self.holds.values())


@dataclass(frozen=True)
class Estimate:
    """The phases of a run.

    Arguments:
        not_read: why the base's configuration could not be read, so that SDXL's was taken; None where it was read.
    """

    phases: tuple[Phase, ...]
    not_read: str | None

    @property
    def largest(self) -> Phase:
        """The phase that decides whether the run fits."""
        return max((phase for phase in self.phases if not phase.may_fail), key=lambda phase: phase.allocated)

    @property
    def allocated(self) -> int:
        """What `torch.cuda.max_memory_allocated` is expected to say after the run, bytes."""
        return max(phase.allocated for phase in self.phases)

    @property
    def needed(self) -> int:
        """What has to be free on the card once the CUDA context is there, bytes."""
        return round(self.largest.allocated * (1 + ALLOCATOR_SHARE))

    @property
    def card(self) -> int:
        """What the card has to have, the context included, bytes."""
        return self.needed + CONTEXT_BYTES


def estimate(config: TrainingConfig, dtype: torch.dtype) -> Estimate:
    """Estimates a run. Reads no weights, draws no random numbers, touches no GPU.

    Arguments:
        dtype: of the frozen base and of the forward pass, as `Machine.dtype`.
    """
    configurations, not_read = _configurations(Base.from_flags(vars(config)))
    run = _Run(config, dtype, configurations)
    return Estimate(tuple(run.phases()), not_read)


def _configurations(base: Base) -> tuple[dict[str, dict[str, Any]], str | None]:
    try:
        return base.configurations(*PARTS), None
    except UserError as error:  # a run ends with it; here SDXL's own stands for the base, and the reason is told
        reason = str(error)
        sdxl = BaseFolder(SDXL_CONFIG, "SDXL")
        return {part: sdxl.read_json(f"{part}/config.json") for part in PARTS}, reason


class _Run:
    """What is on the GPU when; the order is that of `assembly.assemble`."""

    def __init__(self, config: TrainingConfig, dtype: torch.dtype, configurations: dict[str, dict[str, Any]]) -> None:
        self.config = config
        self.dtype = dtype
        read_as, stored_as = precisions(config.base_precision, dtype)
        self.trained = (UNET, *(TEXT_ENCODERS if config.train_text_encoder else ()))
        dtypes = {"vae": torch.float32} | dict.fromkeys(self.trained, read_as)
        self.parts = {
            part: build_part(part, content, dtypes.get(part, dtype)) for part, content in configurations.items()
        }
        self.whole = {part: frozen_bytes(model) for part, model in self.parts.items()}
        for part in self.trained:
            store(part, self.parts[part], stored_as, offload=config.offload_base)
        self.frozen = {part: frozen_bytes(model) for part, model in self.parts.items()}
        self.factor = 2 ** (len(self.parts["vae"].config.block_out_channels) - 1)
        self.size = self._size(configurations[UNET]["sample_size"] * self.factor)

    def phases(self) -> list[Phase]:
        config, frozen = self.config, self.frozen
        encoders = {"text encoders": sum(frozen[part] for part in TEXT_ENCODERS)}
        stays = encoders if config.train_text_encoder or config.shuffle_caption else {}
        vae = {"VAE": frozen["vae"]}
        encoding = {"activations": self._without_gradients("vae", self._encode)}
        found = [*self._class_pictures(encoders | vae), Phase("picture encoding", stays | vae | encoding)]
        trained = {part: self.parts[part] for part in self.trained}
        step = simulate_step(config, trained, (self.size[0] // self.factor, self.size[1] // self.factor), self.dtype)
        if self._crops_anew:
            stays = stays | vae
        resident = {"frozen UNet": frozen[UNET]} | stays | {"adapters and optimiser": step.state}
        found.append(Phase("training step", resident | {"activations and gradients": step.work}))
        if self._crops_anew:
            found.append(Phase("picture encoding in the step", resident | encoding))
        if config.validation_prompt is not None or config.final_validation_prompt is not None:
            # A VAE is loaded for it, also where one is there.
            decoding = {"VAE for pictures": frozen["vae"]} | {
                "activations": self._without_gradients("vae", self._decode)
            }
            found.append(Phase("previews", resident | decoding, may_fail=True))
        return found

    def _class_pictures(self, others: dict[str, int]) -> list[Phase]:
        """Pictures of the class are drawn first, with the whole base, where the folder holds too few."""
        config = self.config
        if not config.with_prior_preservation or config.prior_from_base:
            return []
        folder = Path(config.class_data_dir)
        present = [path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES]
        if len(present) >= config.num_class_images:
            return []
        # The UNet's activations without gradients are less than the VAE's, which decodes in float32 at full size.
        wanted = {"fp32": 4, "fp16": 2, "bf16": 2}.get(config.prior_generation_precision, 2)
        sizes = {
            "frozen UNet": self.whole[UNET] * wanted / self.parts[UNET].dtype.itemsize,
            "text encoders": sum(self.whole[part] * wanted / self.parts[part].dtype.itemsize for part in TEXT_ENCODERS),
        }
        decoding = {"VAE": others["VAE"], "activations": self._without_gradients("vae", self._decode)}
        return [Phase("class pictures", {name: round(size) for name, size in sizes.items()} | decoding)]

    @property
    def _crops_anew(self) -> bool:
        """Whether every step encodes its pictures, as `DreamBoothDataset.cacheable` and --cache_latents say."""
        anywhere = not self.config.center_crop and self.config.crops_per_image is None
        return anywhere or self.config.cache_latents is False

    def _size(self, native: int) -> tuple[int, int]:
        """Height and width in px: of --resolution, or of the bucket with most pixels."""
        side = self.config.resolution or native
        if not self.config.use_aspect_ratio_buckets:
            return side, side
        height, width = max(self.config.buckets or make_buckets(side), key=lambda size: size[0] * size[1])
        return height, width

    def _without_gradients(self, part: str, work: Callable[[nn.Module], object]) -> int:
        """Most bytes that a part's activations take when it runs without a graph."""
        model = self.parts[part]
        with MemoryCounter((*model.parameters(), *model.buffers())) as counter, torch.no_grad():
            with cuda_arithmetic(torch.float32), META:
                work(model)
            return counter.peak

    def _encode(self, vae: nn.Module) -> object:
        return vae.encode(torch.empty(1, vae.config.in_channels, *self.size)).latent_dist.std

    def _decode(self, vae: nn.Module) -> object:
        height, width = (side // self.factor for side in self.size)
        return vae.decode(torch.empty(1, vae.config.latent_channels, height, width)).sample
