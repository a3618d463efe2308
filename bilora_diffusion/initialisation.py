"""Starts that are not zero (--init_lora_weights): a part of the weights, or directions of their gradient.

    pissa            s B A = U S V', the r largest singular components of W0;  A = (S/s)^1/2 V',  B = U (S/s)^1/2
    pissa_niter_N    the same by a randomised SVD with N power iterations
    olora            W0 = Q R;  B = the first r columns of Q, A = the first r rows of R
    lora_ga          G = U S V', the gradient of the loss;  A = c V'_1..r,  B = c U_r+1..2r,  c = out^1/4 / 16^1/2

So that the model begins as the base, the published methods take the product out of the base's weight. Here a frozen
adapter `START` of the same factors and the scale -s does so:

    W = W0 - s B0 A0 + s B A  (+ the auxiliary's s B2 A2)

The base keeps its bits in any precision, quantised or not, and what a file must hold, s (B A - B0 A0) on that very
base, is exact; W0 - s B0 A0 rounded to bfloat16 would be off by a noticeable part of what a LoRA learns.

All is computed in float32 on the CPU: the start is the same whatever the device, and needs no memory of it.

References:
    PiSSA (Meng et al., 2024), arXiv 2404.02948; OLoRA (2024), arXiv 2406.01775; LoRA-GA (Wang et al., 2024),
    arXiv 2407.05000, Algorithm 1 (peft 0.21 departs from it: it multiplies B by S and does not scale A).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from bilora_diffusion.adapters import PRIMARY, START, adapted_layers, add_adapter, parameters_of
from bilora_diffusion.batches import TrainingMicroBatch
from bilora_diffusion.errors import UserError
from bilora_diffusion.processes import broadcast
from bilora_diffusion.randomness import stream_seed

__all__ = ["attach_start", "fill_start", "weight_gradients"]

GAMMA = 16.0
"""Of LoRA-GA's stable scale; peft's default too."""
GA_OVERSAMPLING, GA_ITERATIONS = 4, 4  # of its randomised SVD, as in its code
LOSS_SCALES = (2.0**16, 2.0**10, 2.0**4, 1.0)  # of fp16; a singular vector has no scale

Gradients = Mapping[tuple[str, str], Tensor]


def attach_start(models: Mapping[str, nn.Module], seed: int) -> None:
    """Adds the frozen adapter beside every primary, with the scale -s. Both hold no start yet."""
    for part, model in models.items():
        config = model.peft_config[PRIMARY]
        add_adapter(
            part,
            model,
            START,
            rank=config.r,
            scale=-config.lora_alpha / config.r,
            init="gaussian",
            seed=seed,
            targets=sorted(config.target_modules),
        )


@torch.no_grad()
def fill_start(models: Mapping[str, nn.Module], start: str, seed: int, gradients: Gradients | None = None) -> None:
    """Gives the primary and `START` the same factors; the model computes what the base does.

    Arguments:
        start: `pissa`, `pissa_niter_N`, `olora` or `lora_ga`.
        seed: of the randomised SVDs.
        gradients: for `lora_ga`, from `weight_gradients`.

    Raises:
        UserError: the rank is larger than a layer allows.
    """
    for part, model in models.items():
        for name, layer in adapted_layers(model):
            matrix = _weight(layer) if gradients is None else gradients[part, name]
            rank, scale = layer.r[PRIMARY], layer.scaling[PRIMARY]
            most = min(matrix.shape) // (2 if start == "lora_ga" else 1)
            if rank > most:
                raise UserError(
                    f"--init_lora_weights {start}: {part}.{name} is {matrix.shape[0]} x {matrix.shape[1]}, which "
                    f"allows a rank of {most} at most: give --rank {most}, or leave the layer out of --lora_layers"
                )
            with torch.random.fork_rng(devices=[]):  # svd_lowrank takes no generator
                torch.manual_seed(stream_seed(seed, "start", part, name))
                A, B = _factors(start, matrix, rank, scale)
            for adapter in (PRIMARY, START):
                for factor, value in ((layer.lora_A[adapter].weight, A), (layer.lora_B[adapter].weight, B)):
                    factor.copy_(value.reshape(factor.shape))
        # The linear algebra of another processor may round in another way.
        broadcast([p for adapter in (PRIMARY, START) for p in parameters_of(model, adapter).values()])


def _factors(start: str, matrix: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """(r, inputs) and (out, r) from a weight or, for lora_ga, a gradient of (out, inputs)."""
    if start == "olora":
        Q, R = torch.linalg.qr(matrix)
        return R[:rank], Q[:, :rank]
    if start == "lora_ga":
        U, _, V = torch.svd_lowrank(matrix, q=min(GA_OVERSAMPLING * rank, *matrix.shape), niter=GA_ITERATIONS)
        size = len(matrix) ** 0.25 / GAMMA**0.5
        return size * V[:, :rank].mT, size * U[:, rank : 2 * rank]
    if start == "pissa":
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        V = Vh.mT
    else:
        U, S, V = torch.svd_lowrank(matrix, q=rank, niter=int(start.removeprefix("pissa_niter_")))
    root = (S[:rank] / scale).sqrt()
    return root[:, None] * V[:, :rank].mT, U[:, :rank] * root


def _weight(layer: BaseTunerLayer) -> Tensor:
    """W0 as (out, inputs), float32 on the CPU."""
    return dequantize_module_weight(layer.get_base_layer()).detach().flatten(1).cpu().float()


def weight_gradients(models: Mapping[str, nn.Module], micro_batches: Sequence[TrainingMicroBatch]) -> Gradients:
    """dL/dW0 of every adapted layer, the sum over micro-batches, as (out, inputs) in float32 on the CPU.

    Each layer's gradient leaves the device as soon as it is there. In fp16 it comes times a loss scale.

    Raises:
        UserError: the base is quantised, or the loss or a gradient is not finite.
    """
    layers = {(part, name): layer for part, model in models.items() for name, layer in adapted_layers(model)}
    weights = {key: layer.get_base_layer().weight for key, layer in layers.items()}
    if not all(weight.is_floating_point() for weight in weights.values()):
        raise UserError(
            "--init_lora_weights lora_ga needs gradients of the base, and a quantised one has none: use pissa"
        )
    scales = LOSS_SCALES if any(batch.compute_dtype == torch.float16 for batch in micro_batches) else (1.0,)
    for scale in scales:
        gradients = _gradients(weights, micro_batches, scale)
        _forget_gradients(models.values())
        if all(gradient.isfinite().all() for gradient in gradients.values()):
            return gradients
    raise UserError("--init_lora_weights lora_ga: the gradient at the base is not finite: try --mixed_precision bf16")


def _gradients(
    weights: Mapping[tuple[str, str], nn.Parameter], micro_batches: Iterable[TrainingMicroBatch], scale: float
) -> Gradients:
    # A layer that the loss does not see has none: the last of text encoder 1, of which SDXL reads the last but one.
    gradients = {key: torch.zeros(weight.flatten(1).shape) for key, weight in weights.items()}

    def collecting(key: tuple[str, str]) -> Callable[[Tensor], None]:
        def collect(weight: Tensor) -> None:
            gradients[key] += weight.grad.flatten(1).cpu().float()
            weight.grad = None

        return collect

    handles = []
    try:
        for key, weight in weights.items():
            weight.requires_grad_(True)
            handles.append(weight.register_post_accumulate_grad_hook(collecting(key)))
        for micro_batch in micro_batches:
            (micro_batch.loss() * scale).backward()
    finally:
        for handle in handles:
            handle.remove()
        for weight in weights.values():
            weight.requires_grad_(False)
    return gradients


def _forget_gradients(models: Iterable[nn.Module]) -> None:
    """The adapters had some too."""
    for model in models:
        for parameter in model.parameters():
            parameter.grad = None
