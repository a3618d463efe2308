"""Plain LoRA, the baseline: one forward, one backward, the optimiser's step.

    B1 -= eta G A1'    A1 -= eta B1' G        (through AdamW or Prodigy)

One pass a step; no extra memory.

Reference:
    LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2021), arXiv 2106.09685.
"""

from bilora_diffusion.methods.interface import Method

__all__ = ["LoRA"]


class LoRA(Method):
    """The primary alone."""
