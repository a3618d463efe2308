"""--channels_last: another layout in memory, the same numbers but for the order of sums."""

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from tiny_run import all_equal, difference
from torch import nn

from benchmarks.speed.bases import sharing_copy
from bilora_diffusion.channels_last import lay_channels_last


def is_laid_out(tensor: torch.Tensor) -> bool:
    """Also with a kernel of one place, where `is_contiguous` says so of both layouts."""
    channels, height, width = tensor.shape[1:]
    return tensor.stride() == (channels * height * width, 1, channels * width, channels)


def test_only_convolutions_are_laid_out_and_a_base_that_others_share_stays(tiny: StableDiffusionXLPipeline):
    before = {name: (one.stride(), one.data_ptr()) for name, one in tiny.unet.named_parameters()}
    own = sharing_copy(tiny.unet)
    lay_channels_last(own)
    assert all_equal(dict(own.named_parameters()), dict(tiny.unet.named_parameters()))
    assert before == {name: (one.stride(), one.data_ptr()) for name, one in tiny.unet.named_parameters()}
    convolutions = {f"{name}.weight" for name, module in own.named_modules() if isinstance(module, nn.Conv2d)}
    for name, one in own.named_parameters():
        assert not one.requires_grad
        if name in convolutions:
            assert is_laid_out(one)
        else:
            assert (one.stride(), one.data_ptr()) == before[name]


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("lora", {}),
        ("bilora", {"gradient_checkpointing": True}),
        ("bilora", {"base_precision": "bf16", "offload_base": True}),
        ("flat-lora", {"lora_layers": "conv1,conv_shortcut,to_k"}),
        ("bilora-echo", {"lora_layers": "conv2,to_v", "use_aspect_ratio_buckets": True, "train_batch_size": 1}),
    ],
    ids=str,
)
def test_a_run_has_the_losses_of_one_without(build, method: str, flags: dict[str, Any]):
    flags = {"learning_rate": 1e-2, **flags}
    plain, laid = (build(method, channels_last=on, **flags) for on in (False, True))
    start, base = plain.tensors(), laid.base_tensors()
    assert laid.train(4) == pytest.approx(plain.train(4), rel=1e-4)
    assert difference(plain.tensors(), laid.tensors(), start) < 1e-2
    assert all_equal(base, laid.base_tensors())


def test_the_convolutions_compute_so(build):
    """A layout of the weights alone would be a waste: their outputs must have it too."""
    seen: dict[bool, list[bool]] = {}
    for on in (False, True):
        run = build("lora", channels_last=on)
        unet, seen[on] = run.parts.models["unet"], []
        for layer in unet.modules():
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_hook(lambda _, __, y, own=seen[on]: own.append(is_laid_out(y)))
        run.train(1)
    assert all(seen[True]) and not any(seen[False]) and len(seen[True]) == len(seen[False]) > 10
