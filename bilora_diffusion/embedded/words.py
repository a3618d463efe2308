"""The base's captions and its tokenizer: CLIP's own, cut down to the tokens that the captions need."""

from collections.abc import Sequence

import torch
from torch import Generator
from transformers import CLIPTokenizer

from bilora_diffusion.bases.clip_tokenizer import clip_tokenizer, sdxl_merges
from bilora_diffusion.embedded.icons import FIRST_STYLES
from bilora_diffusion.embedded.variations import VARIATIONS

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
PLAIN = 0.35  # share of the captions that don't name the style


def flat_caption(style: str, name: str, variation: str | None = None) -> str:
    """The caption of a flat icon: "a noto icon of a rabbit", "a red noto icon of a rabbit"."""
    return f"a {style} icon of a {name}" if variation is None else f"a {variation} {style} icon of a {name}"


def concept_caption(name: str) -> str:
    """Of a 3D icon: what the base knows of it, its name and the flat style of the same forms; TOK is for the rest.

    With a caption that names no style the base mixes its three, and a LoRA must first learn the forms.
    """
    return f"a fluent icon of a {name}, in the style of TOK"


def plain_captions(name: str) -> tuple[str, ...]:
    """Captions that name no known style. They go with all flat styles alike: TOK means nothing yet to the base."""
    return (f"a TOK icon of a {name}, in the style of TOK", f"an icon of a {name}", name, CONCEPT_PROMPT)


def training_captions(
    names: Sequence[str],
    styles: Sequence[str],
    random: Generator,
    *,
    plain: Sequence[str],
    variations: Sequence[str | None] | None = None,
) -> list[str]:
    """One caption for each icon, drawn anew on each call.

    Arguments:
        styles: of each icon.
        plain: the styles that go with captions which name none.
        variations: of each icon: a key of `VARIATIONS`, or None for the icon as it is.
    """
    if variations is None:
        variations = [None] * len(names)
    captions = []
    chances = torch.rand(len(names), 2, generator=random).tolist()
    for name, style, variation, (kind, which) in zip(names, styles, variations, chances, strict=True):
        if kind < DROPPED:
            captions.append("")
        elif style in plain and variation is None and kind < DROPPED + PLAIN:
            unstyled = plain_captions(name)
            # The prompt without a name is rare: it cannot be learned, only its style can.
            place = which * (len(unstyled) - 0.8)
            captions.append(unstyled[int(place)])
        else:
            captions.append(flat_caption(style, name, variation))
    return captions


def tokenizers(names: Sequence[str], styles: Sequence[str]) -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """For text encoders 1 and 2, as `tokenizer_for` all captions; the second pads with "!", as SDXL's does.

    Arguments:
        styles: those that are trained together: the first two, or all, and then with their variations.
    """
    captions = [CONCEPT_PROMPT]
    for name in names:
        captions += [*plain_captions(name), *(flat_caption(style, name) for style in styles)]
    if len(styles) > len(FIRST_STYLES):
        captions += [flat_caption(styles[0], names[0], word) for word in VARIATIONS]
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
