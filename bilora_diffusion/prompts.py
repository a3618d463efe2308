"""Prompts as the UNet needs them: embedded once if the text encoders are frozen, as tokens if they are trained."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from bilora_diffusion.sdxl import Conditioning, embed_prompts, tokenize

__all__ = ["EmbeddedPrompts", "Prompts", "TokenizedPrompts"]


class Prompts(Protocol):
    """Gives the conditioning of rows from their prompts."""

    def conditioning(self, prompts: Sequence[str], sizes: Tensor) -> Conditioning:
        """Arguments: prompts: B of them; sizes: (B, 6), the rows' `sdxl.time_ids`."""


class EmbeddedPrompts:
    """Embeddings computed once for all prompts of a run; the text encoders can be freed after that."""

    @torch.no_grad()
    def __init__(self, prompts: Sequence[str], tokenizers: Sequence, text_encoders: Sequence[nn.Module]) -> None:
        self.embeddings: Mapping[str, tuple[Tensor, Tensor]] = {}
        for prompt in prompts:
            # One at a time: a batch of another size could round differently, and a cache must not depend on its order.
            ids = tokenize(tokenizers, [prompt]).to(text_encoders[0].device)
            hidden, pooled = embed_prompts(text_encoders, ids)
            self.embeddings[prompt] = hidden[0].cpu(), pooled[0].cpu()

    def conditioning(self, prompts: Sequence[str], sizes: Tensor) -> Conditioning:
        hidden, pooled = zip(*(self.embeddings[prompt] for prompt in prompts), strict=True)
        return Conditioning(sizes, torch.stack(hidden), torch.stack(pooled))


class TokenizedPrompts:
    """Token ids; the text encoders run in every step, where their adapters are trained."""

    def __init__(self, prompts: Sequence[str], tokenizers: Sequence) -> None:
        self.ids = {prompt: tokenize(tokenizers, [prompt])[0] for prompt in prompts}

    def conditioning(self, prompts: Sequence[str], sizes: Tensor) -> Conditioning:
        return Conditioning(sizes, token_ids=torch.stack([self.ids[prompt] for prompt in prompts]))
