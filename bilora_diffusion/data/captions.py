"""A caption as one draw shows it: as it is, with its tags in another order, or empty.

Reference:
    `process_caption` in library/train_util.py of kohya-ss/sd-scripts (48d368fa): tags are what stands between commas,
    the first `keep_tokens` of them stay, dropout comes first. Empty tags, as a comma at the end makes one, are left
    out here; there they are shuffled too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bilora_diffusion.data.pictures import Picture
from bilora_diffusion.errors import UserError
from bilora_diffusion.randomness import generator

__all__ = ["CaptionRule", "check_shuffling"]


@dataclass(frozen=True)
class CaptionRule:
    """What is done to the captions of instance rows.

    Arguments:
        dropout: probability in [0, 1] that a row's prompt is "".
        shuffle: whether a caption's tags stand in an order of their own in every row.
        keep_tokens: so many tags at the head stay where they are.
    """

    dropout: float = 0.0
    shuffle: bool = False
    keep_tokens: int = 0

    def __call__(self, caption: str, seed: int, draw: int) -> str:
        """The prompt of a row; depends on the caption, the run's seed and the number of the draw alone."""
        if torch.rand((), generator=generator(seed, "caption dropout", draw)).item() < self.dropout:
            return ""
        if not self.changes_order_of(caption):
            return caption
        tags = _tags(caption)
        fixed, free = tags[: self.keep_tokens], tags[self.keep_tokens :]
        order = torch.randperm(len(free), generator=generator(seed, "caption order", draw)).tolist()
        return ", ".join([*fixed, *(free[place] for place in order)])

    def changes_order_of(self, caption: str) -> bool:
        """Whether there are two tags or more that may change places."""
        return self.shuffle and len(_tags(caption)) - self.keep_tokens >= 2


def _tags(caption: str) -> list[str]:
    return [tag.strip() for tag in caption.split(",") if tag.strip()]


def check_shuffling(rule: CaptionRule, pictures: Sequence[Picture]) -> None:
    """Raises: UserError: captions are to be shuffled of which none has two tags to shuffle."""
    if rule.shuffle and not any(rule.changes_order_of(picture.caption) for picture in pictures):
        kept = f" after the first {rule.keep_tokens} that --keep_tokens holds" if rule.keep_tokens else ""
        raise UserError(
            f"--shuffle_caption: no caption has two tags with a comma between them{kept}, such as that of "
            f"{pictures[0].name}, {pictures[0].caption[:60]!r}: write captions of tags, or leave it out"
        )
