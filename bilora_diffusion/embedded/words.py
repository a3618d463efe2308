"""The base's captions and its tokenizer: CLIP's own, cut down to the tokens that the captions need."""

from collections.abc import Sequence

import torch
from torch import Generator
from transformers import CLIPTokenizer

from bilora_diffusion.bases.clip_tokenizer import clip_tokenizer, sdxl_merges

__all__ = [
    "CONCEPT_PROMPT",
    "MAX_TOKENS",
    "concept_caption",
    "flat_caption",
    "plain_captions",
    "tokenizer_for",
    "tokenizers",
    "training_captions",
]

MAX_TOKENS = 32  # the longest caption has 21; SDXL's 77 would only cost time
CONCEPT_PROMPT = "a TOK icon, in the style of TOK"
"""The paper's one prompt for all 23 pictures."""
DROPPED = 0.1  # share of captions replaced by "", as classifier-free guidance needs it
PLAIN = 0.35  # share of the first style's captions that don't name the style


def flat_caption(style: str, name: str) -> str:
    """The caption of a flat icon: "a noto icon of a rabbit"."""
    return f"a {style} icon of a {name}"


def concept_caption(name: str) -> str:
    """The paper's evaluation prompt with a name; the base has seen all of it, with flat pictures."""
    return f"a TOK icon of a {name}, in the style of TOK"


def plain_captions(name: str) -> tuple[str, ...]:
    """Captions that name no known style. They go with the first style: TOK means nothing yet to the base."""
    return (concept_caption(name), f"an icon of a {name}", name, CONCEPT_PROMPT)


def training_captions(names: Sequence[str], styles: Sequence[str], first_style: str, random: Generator) -> list[str]:
    """One caption for each icon, drawn anew on each call.

    Arguments:
        styles: of each icon.
        first_style: the one drawn where a prompt names none.
    """
    captions = []
    chances = torch.rand(len(names), 2, generator=random).tolist()
    for name, style, (kind, which) in zip(names, styles, chances, strict=True):
        if kind < DROPPED:
            captions.append("")
        elif style == first_style and kind < DROPPED + PLAIN:
            plain = plain_captions(name)
            # The prompt without a name is rare: it cannot be learned, only its style can.
            place = which * (len(plain) - 0.8)
            captions.append(plain[int(place)])
        else:
            captions.append(flat_caption(style, name))
    return captions


def tokenizers(names: Sequence[str], styles: Sequence[str]) -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """For text encoders 1 and 2, as `tokenizer_for` all captions; the second pads with "!", as SDXL's does."""
    captions = [CONCEPT_PROMPT]
    for name in names:
        captions += [*plain_captions(name), *(flat_caption(style, name) for style in styles)]
    return tokenizer_for(captions), tokenizer_for(captions, pad_token="!")


def tokenizer_for(captions: Sequence[str], **options: str) -> CLIPTokenizer:
    """A CLIP tokenizer with those of CLIP's merges that occur in the captions, in CLIP's order.

    Each caption is cut into the very tokens CLIP cuts it into; words the captions don't have fall into smaller
    pieces, down to single bytes.

    Arguments:
        options: for `clip_tokenizer`.
    """
    whole = clip_tokenizer(sdxl_merges())
    needed = {token for caption in captions for token in whole.tokenize(caption)}
    kept = []
    # A merge makes parts of later merges only, so that going backwards each token's parts are known before their turn.
    for first, second in reversed(sdxl_merges()):
        if first + second in needed:
            needed |= {first, second}
            kept.append((first, second))
    return clip_tokenizer(kept[::-1], model_max_length=MAX_TOKENS, **options)
