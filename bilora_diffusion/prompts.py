"""Prompts as the UNet needs them: embedded if the text encoders are frozen, as tokens if they are trained."""

from collections.abc import MutableMapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from bilora_diffusion.bars import progress_bar
from bilora_diffusion.sdxl import Conditioning, embed_prompts, tokenize

__all__ = ["EmbeddedPrompts", "Prompts", "TokenizedPrompts"]


class Prompts(Protocol):
    """Gives the conditioning of rows from their prompts."""

    def conditioning(self, prompts: Sequence[str], sizes: Tensor) -> Conditioning:
        """Arguments: prompts: B of them; sizes: (B, 6), the rows' `sdxl.time_ids`."""


class EmbeddedPrompts:
    """Embeddings computed once for all prompts that are known beforehand.

    Arguments:
        all_known: no other prompt will come: the text encoders are not held and can be freed. Otherwise they embed
            the others, such as captions with shuffled tags, whenever one comes.
        kept: what to put the embeddings in, and where some may be already: with SDXL's encoders 0.6 MB a prompt in
            float32. None: into memory.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        tokenizers: Sequence,
        text_encoders: Sequence[nn.Module],
        all_known: bool = True,
        kept: MutableMapping[str, tuple[Tensor, ...]] | None = None,
    ) -> None:
        self.embeddings: MutableMapping[str, tuple[Tensor, ...]] = {} if kept is None else kept
        with progress_bar("embedding captions", len(prompts), "caption") as bar:
            for prompt in prompts:
                if prompt not in self.embeddings:
                    self.embeddings[prompt] = _embed(prompt, tokenizers, text_encoders)
                bar.update()
        self._unknown = None if all_known else (tokenizers, text_encoders)

    def conditioning(self, prompts: Sequence[str], sizes: Tensor) -> Conditioning:
        hidden, pooled = zip(*map(self._embedding, prompts), strict=True)
        return Conditioning(sizes, torch.stack(hidden), torch.stack(pooled))

    def _embedding(self, prompt: str) -> tuple[Tensor, ...]:
        if self._unknown is None or prompt in self.embeddings:
            return self.embeddings[prompt]
        return _embed(prompt, *self._unknown)


@torch.no_grad()
def _embed(prompt: str, tokenizers: Sequence, text_encoders: Sequence[nn.Module]) -> tuple[Tensor, Tensor]:
    # One at a time: a batch of another size could round differently, and a prompt must not depend on its neighbours.
    ids = tokenize(tokenizers, [prompt]).to(text_encoders[0].device)
    hidden, pooled = embed_prompts(text_encoders, ids)
    return hidden[0].cpu(), pooled[0].cpu()


class TokenizedPrompts:
    """Token ids; the text encoders run in every step, where their adapters are trained."""

    def __init__(self, prompts: Sequence[str], tokenizers: Sequence) -> None:
        self.tokenizers = tokenizers
        self.ids: dict[str, Tensor] = {}
        with progress_bar("tokenizing captions", len(prompts), "caption") as bar:
            for prompt in prompts:
                self.ids[prompt] = tokenize(tokenizers, [prompt])[0]
                bar.update()

    def conditioning(self, prompts: Sequence[str], sizes: Tensor) -> Conditioning:
        return Conditioning(sizes, token_ids=torch.stack([self._ids(prompt) for prompt in prompts]))

    def _ids(self, prompt: str) -> Tensor:
        return self.ids[prompt] if prompt in self.ids else tokenize(self.tokenizers, [prompt])[0]
