"""What a file holds of a layer: the primary, or, where that began as a part of the weights, its change since.

    s B A - s B0 A0 = s [B, -B0] [A; A0]

is a LoRA of twice the rank on the base as it is, the usual conversion. Written out like that, its two halves nearly
cancel, and a reader that rounds them to half precision loses the change in the rounding of the start. So it is split
anew, by its singular values: the same product, with factors as small as the change itself.
"""

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from bilora_diffusion.adapters import PRIMARY, START

__all__ = ["file_factors", "file_rank"]


def file_rank(layer: BaseTunerLayer) -> int:
    """r of the primary in the file: twice the trained where the file holds a change."""
    return layer.r[PRIMARY] * (2 if START in layer.lora_A else 1)


@torch.no_grad()
def file_factors(layer: BaseTunerLayer, adapter: str = PRIMARY) -> tuple[Tensor, Tensor]:
    """A of shape (r, in) or (r, in, k, k) and B of (out, r) or (out, r, 1, 1), copies on the CPU.

    r is `file_rank`, and the scale the adapter's own. The same values give the same bits.

    Arguments:
        adapter: the primary, or the one of a loaded file.
    """
    A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    if START not in layer.lora_A:
        return A.detach().to("cpu", copy=True), B.detach().to("cpu", copy=True)
    A0, B0 = layer.lora_A[START].weight, layer.lora_B[START].weight
    down, up = _split(torch.cat([_wide(A), _wide(A0)]), torch.cat([_wide(B), -_wide(B0)], dim=1))
    return down.reshape(-1, *A.shape[1:]), up.reshape(len(B), -1, *B.shape[2:])


def _wide(factor: Tensor) -> Tensor:
    return factor.flatten(1).cpu().double()


def _split(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """(r, in) and (out, r) -> the same shapes with the same product, float32: square roots of its singular values."""
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    down, up = torch.zeros_like(A), torch.zeros_like(B)  # a layer may be narrower than r
    down[: len(S)], up[:, : len(S)] = S.sqrt()[:, None] * (Vh @ Q_A.mT), (Q_B @ U) * S.sqrt()
    return down.float(), up.float()
