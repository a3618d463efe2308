"""A LoRA file as a named adapter beside others, none merged into the base: switching one off leaves the base's bits.

Files are read by the pipeline's own loader, which knows the spellings of diffusers, peft and Kohya. It passes over keys
that it does not know and raises pages on shapes that do not fit, so what it will make of the file is held against the
base first.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from bilora_diffusion.adapters import adapted_layers
from bilora_diffusion.bases.quiet import quiet_libraries
from bilora_diffusion.errors import UserError
from bilora_diffusion.flags import show

__all__ = ["activate", "load_adapter", "remove_adapter"]

PARTS = ("unet", "text_encoder", "text_encoder_2")
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
MOST_NAMED = 3


def load_adapter(pipeline: StableDiffusionXLPipeline, path: Path, adapter: str, name: str) -> None:
    """Loads a file as one more adapter. What is active afterwards is undefined: `activate` follows.

    Arguments:
        adapter: the name it gets in the pipeline.
        name: what the messages call the file.

    Raises:
        UserError: the file does not fit this base; the pipeline is as it was.
    """
    models = {part: getattr(pipeline, part) for part in PARTS}
    options = {"use_safetensors": True, "local_files_only": True}  # without the first, diffusers would take a pickle
    try:
        with quiet_libraries():
            tensors, _ = pipeline.lora_state_dict(str(path), unet_config=pipeline.unet.config, **options)
            layers = dict(_layers_in(tensors, models))
    except Exception as error:  # the converters raise many kinds on names they do not know
        raise UserError(f"{show(name)} is not a LoRA for SDXL: {_reason(error)}") from None
    _check_fit(layers, models, name)
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise UserError(f"{show(name)} holds values that are no numbers: its training went wrong, or it is damaged")
    try:
        with quiet_libraries():
            pipeline.load_lora_weights(str(path), adapter_name=adapter, **options)
    except Exception as error:
        remove_adapter(models, adapter)
        raise UserError(f"{show(name)} could not be loaded: {_reason(error)}") from None
    loaded = sum(adapter in layer.lora_A for model in models.values() for _, layer in adapted_layers(model))
    if loaded != len(layers):
        remove_adapter(models, adapter)
        raise UserError(f"{show(name)} holds {len(layers)} layers, of which the loader took {loaded}: it is not used")


def remove_adapter(models: Mapping[str, nn.Module], adapter: str) -> None:
    """Takes an adapter out of every layer; the layers' own weights are not touched."""
    for model in models.values():
        for _, layer in adapted_layers(model):
            if adapter in getattr(layer, "lora_A", {}):
                layer.delete_adapter(adapter)
        getattr(model, "peft_config", {}).pop(adapter, None)


def activate(models: Mapping[str, nn.Module], weights: Mapping[str, float]) -> None:
    """Makes exactly these adapters count, each at its weight; none: the base alone, bit for bit.

    Layer by layer, because diffusers' `set_adapters` leaves a text encoder as it was when no adapter named has layers
    in it, so that the last LoRA's would go on.
    """
    for model in models.values():
        for _, layer in adapted_layers(model):
            here = [adapter for adapter in weights if adapter in layer.lora_A]
            layer.enable_adapters(bool(here))
            if here:
                layer.set_adapter(here, inference_mode=True)
                for adapter in here:
                    layer.set_scale(adapter, weights[adapter])


def _layers_in(tensors: Mapping[str, Tensor], models: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], Any]]:
    """(part, module) -> its shapes {A, B}, as the loader will understand a file's names."""
    found: dict[tuple[str, str], dict[str, tuple[int, ...]]] = {}
    for part in PARTS:
        own = {key.removeprefix(f"{part}."): one for key, one in tensors.items() if key.startswith(f"{part}.")}
        if part == "unet":
            own = convert_unet_state_dict_to_peft(own)
        elif own:
            own = convert_state_dict_to_peft(convert_state_dict_to_diffusers(own))
            if not hasattr(models[part], "text_model"):  # transformers 5 took this level out of CLIPTextModel
                own = {key.removeprefix("text_model."): one for key, one in own.items()}
        for key, tensor in own.items():
            for ending in (DOWN, UP):
                if key.endswith(ending):
                    found.setdefault((part, key.removesuffix(ending)), {})[ending] = tuple(tensor.shape)
    return iter(found.items())


def _check_fit(layers: Mapping[tuple[str, str], Mapping[str, tuple]], models: Mapping[str, Any], name: str) -> None:
    """`UserError` that names the layers that the base lacks, or those of another shape."""
    if not layers:
        raise UserError(f"{show(name)} holds no layer under a name that SDXL's UNet or text encoders have")
    modules = {part: dict(model.named_modules()) for part, model in models.items()}
    unknown = [f"{part}.{module}" for part, module in layers if module not in modules[part]]
    if unknown:
        raise UserError(
            f"{show(name)} is for another base: {len(unknown)} of its {len(layers)} layers are not in this one "
            f"({_some(unknown)})"
        )
    misfits = []
    for (part, module), shapes in layers.items():
        wanted = _base_weight(modules[part][module])
        down, up = shapes.get(DOWN), shapes.get(UP)
        if down is None or up is None:
            misfits.append(f"{part}.{module} lacks its {'A' if down is None else 'B'}")
        elif wanted is None or down[1] != wanted[1] or up[0] != wanted[0] or down[0] != up[1]:
            there = f"{wanted[0]} x {wanted[1]}" if wanted else "no weight"
            misfits.append(f"{part}.{module} is {up[0]} x {down[1]}, in the base {there}")
    if misfits:
        raise UserError(
            f"{show(name)} is for another base: {len(misfits)} of its {len(layers)} layers do not fit "
            f"({_some(misfits)})"
        )


def _base_weight(module: nn.Module) -> tuple[int, ...] | None:
    layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    weight = getattr(layer, "weight", None)
    return tuple(weight.shape) if weight is not None and weight.ndim >= 2 else None


def _some(texts: Sequence[str]) -> str:
    rest = len(texts) - MOST_NAMED
    return ", ".join(texts[:MOST_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
