"""Where the parts of a base come from: the hub, a folder, a single checkpoint file, or a name built in.

Nothing else in the package opens a base. Its parts have diffusers' names: unet, vae, text_encoder,
text_encoder_2.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline

from bilora_diffusion.bases.fetching import fetch
from bilora_diffusion.bases.folder import CONFIG_FILES, PARTS, BaseFolder, read_part, weight_patterns
from bilora_diffusion.bases.quiet import quiet_libraries
from bilora_diffusion.bases.single_file import SingleFile, vae_from_file
from bilora_diffusion.bases.tiny import TINY_RANDOM, build_tiny_random, tiny_random_configurations
from bilora_diffusion.embedded import BASE_FOLDER, EMBEDDED
from bilora_diffusion.errors import UserError
from bilora_diffusion.model_names import existing_path, may_be_hub_id

__all__ = ["BUILT_IN", "PARTS", "Base"]

BASE_FLAG = "--pretrained_model_name_or_path"
VAE_FLAG = "--pretrained_vae_model_name_or_path"

BUILT_IN = (EMBEDDED, TINY_RANDOM)
"""Names of bases that come with the package: the trained one, and random weights for tests."""


@dataclass(frozen=True)
class Base:
    """A base by name; nothing is read before `load` or `native_resolution`.

    Attributes:
        name: a name in `BUILT_IN`, a folder in the diffusers layout, a `.safetensors` file, or a hub id. What
            exists on this disk goes before the hub.
        revision: branch, tag or commit of a hub id; of the base only, not of `vae`.
        variant: "fp16" for weights stored under names such as `model.fp16.safetensors`; not of `vae`.
        cache_dir: where the hub's files are kept; None is the hub library's own place.
        vae: a VAE to use instead of the base's: a hub id, a folder or a `.safetensors` file.
    """

    name: str
    revision: str | None = None
    variant: str | None = None
    cache_dir: str | None = None
    vae: str | None = None

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any]) -> "Base":
        """The base that the trainer's flags name, such as `vars(config)` or a run folder's config.yaml."""
        return cls(
            flags["pretrained_model_name_or_path"],
            revision=flags["revision"],
            variant=flags["variant"],
            cache_dir=flags["cache_dir"],
            vae=flags["pretrained_vae_model_name_or_path"],
        )

    def load(
        self, *parts: str, dtype: torch.dtype = torch.float32, config_folder: Path | None = None
    ) -> StableDiffusionXLPipeline:
        """A pipeline with exactly `parts`, on the CPU, in evaluation mode; the others are None and not read.

        The tokenizers and the scheduler are always there.

        Arguments:
            parts: among `PARTS`.
            dtype: of each part but the VAE, which is float32 always: SDXL's overflows in float16.
            config_folder: for a single file that is not of SDXL's size, the folder of its configuration.

        Raises:
            UserError: the base cannot be found or read, is damaged, or is not SDXL.
        """
        if unknown := set(parts) - set(PARTS):
            raise ValueError(f"a base has the parts {', '.join(PARTS)}; got {', '.join(sorted(unknown))}")
        own_parts = tuple(part for part in parts if not (part == "vae" and self.vae))
        with quiet_libraries():
            if self.name == TINY_RANDOM:
                pipeline = _cut_to(own_parts, build_tiny_random(), dtype)
            else:
                pipeline = _assemble(self._open(own_parts, config_folder), own_parts, dtype)
            if self.vae and "vae" in parts:
                pipeline.register_modules(vae=self._other_vae(self.vae))
                self._check_fit(pipeline.vae, config_folder)
                pipeline.vae_scale_factor = _vae_factor(pipeline.vae.config)
        return pipeline

    def native_resolution(self, config_folder: Path | None = None) -> int:
        """The side in pixels of the pictures this base was made for (SDXL: 1024); reads no weights.

        It is the UNet's sample size, in latents, times the factor of the base's own VAE.

        Raises:
            UserError: as `load`.
        """
        found = self.configurations("unet", "vae", config_folder=config_folder)
        return int(found["unet"]["sample_size"]) * _vae_factor(found["vae"])

    def configurations(self, *parts: str, config_folder: Path | None = None) -> dict[str, dict[str, Any]]:
        """How `parts` are built, as the config.json of each says; reads no weights.

        Raises:
            UserError: as `load`.
        """
        with quiet_libraries():
            if self.name == TINY_RANDOM:
                return {part: dict(tiny_random_configurations()[part]) for part in parts}
            source = self._open((), config_folder)
            return {part: source.read_json(f"{part}/config.json") for part in parts}

    @property
    def is_hub_id(self) -> bool:
        """Whether the name is for the hub: not built in, not on this disk, and of a hub id's form."""
        on_disk = Path(self.name).expanduser().exists()
        return self.name not in BUILT_IN and not on_disk and may_be_hub_id(self.name)

    @property
    def shared_name(self) -> str:
        """The name as it may be written in a file to be shared: of a local path only the last component."""
        if self.name in BUILT_IN or self.is_hub_id:
            return self.name
        path = Path(self.name).expanduser()
        return path.name or path.resolve().name

    def _open(self, parts: tuple[str, ...], config_folder: Path | None) -> BaseFolder | SingleFile:
        """The base, checked to be SDXL; of a hub model the weights of `parts` have been fetched."""
        if self.name == EMBEDDED:
            return BaseFolder(BASE_FOLDER, f"{BASE_FLAG}: {EMBEDDED}")
        path = existing_path(self.name, BASE_FLAG)
        where = f"{BASE_FLAG}: {self.shared_name}"
        if path is None:
            # The small files first: a model that is not SDXL is refused before gigabytes of it arrive.
            folder = fetch(self.name, CONFIG_FILES, BASE_FLAG, self.revision, self.cache_dir)
            base = BaseFolder(folder, where, self.variant)
            weights = [f"{part}/{file}" for part in parts for file in weight_patterns(part, self.variant)]
            if weights:
                fetch(self.name, weights, BASE_FLAG, self.revision, self.cache_dir)
            return base
        if path.is_dir():
            return BaseFolder(path, where, self.variant)
        return SingleFile(path, where) if config_folder is None else SingleFile(path, where, config_folder)

    def _check_fit(self, vae: AutoencoderKL, config_folder: Path | None) -> None:
        """`UserError` unless the base's own VAE has latents of the same shape."""
        if self.name == TINY_RANDOM:
            own = build_tiny_random().vae.config
        else:
            own = self._open((), config_folder).read_json("vae/config.json")
        needed = (own["latent_channels"], _vae_factor(own))
        if (given := (vae.config.latent_channels, _vae_factor(vae.config))) != needed:
            raise UserError(
                f"{VAE_FLAG}: {Base(self.vae).shared_name} gives {given[0]} channels at 1/{given[1]} of the size, "
                f"{self.shared_name} needs {needed[0]} at 1/{needed[1]}; leave the flag out."
            )

    def _other_vae(self, name: str) -> AutoencoderKL:
        path = existing_path(name, VAE_FLAG)
        where = f"{VAE_FLAG}: {Base(name).shared_name}"
        if path is not None and path.is_file():
            return vae_from_file(path, where, torch.float32)
        if path is None:
            files = ["config.json", *weight_patterns("vae", None)]
            path = fetch(name, [*files, *(f"vae/{file}" for file in files)], VAE_FLAG, None, self.cache_dir)
        # A VAE alone, as they are shared, or a whole model's.
        subfolder = "" if (path / "config.json").is_file() else "vae"
        if not (path / subfolder / "config.json").is_file():
            raise UserError(f"{where} is not a VAE: it has no config.json.")
        return read_part(path, "vae", torch.float32, where, subfolder=subfolder)


def _assemble(source: BaseFolder | SingleFile, parts: tuple[str, ...], dtype: torch.dtype) -> StableDiffusionXLPipeline:
    tokenizer, tokenizer_2 = source.tokenizers()
    scheduler = source.scheduler_config()
    scheduler_class = getattr(diffusers, scheduler["_class_name"], None)
    if scheduler_class is None:
        raise UserError(f"{source.where}: diffusers has no scheduler {scheduler['_class_name']}.")
    models: dict[str, Any] = dict.fromkeys(PARTS)
    models.update({part: source.part(part, _dtype_of(part, dtype)) for part in parts})
    return StableDiffusionXLPipeline(
        **models,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        scheduler=scheduler_class.from_config(scheduler),
        force_zeros_for_empty_prompt=source.index.get("force_zeros_for_empty_prompt", True),
        add_watermarker=False,  # else previews carry one wherever that optional package is installed
    )


def _cut_to(
    parts: tuple[str, ...], pipeline: StableDiffusionXLPipeline, dtype: torch.dtype
) -> StableDiffusionXLPipeline:
    pipeline.register_modules(**{part: None for part in PARTS if part not in parts})
    for part in parts:
        getattr(pipeline, part).to(_dtype_of(part, dtype))
    return pipeline


def _dtype_of(part: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if part == "vae" else dtype


def _vae_factor(config: Any) -> int:
    return 2 ** (len(config["block_out_channels"]) - 1)
