"""A small CLIP of the icons: image-text similarity without a download, named for what it is.

It is trained on all flat icons and on the 3D icons of the scorer's list; of the 3D icons of the other lists it has seen
the flat twins only. It compares pictures of this project's icons with their names; it knows nothing else.

Reference: Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021,
arXiv:2103.00020.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor
from torch.nn.functional import affine_grid, cross_entropy, grid_sample, normalize
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from bilora_diffusion.bases.quiet import quiet_libraries
from bilora_diffusion.embedded import SCORER_FOLDER
from bilora_diffusion.embedded.fitting import FitSettings, fit
from bilora_diffusion.embedded.icons import FLAT_STYLES, SIZE_PX, SOLID_STYLE, STYLES, Icons, from_bytes
from bilora_diffusion.embedded.words import MAX_TOKENS, tokenizer_for
from bilora_diffusion.errors import UserError
from bilora_diffusion.randomness import generator, stream_seed

__all__ = [
    "Scorer",
    "ScorerSettings",
    "build_scorer",
    "held_out_scores",
    "scorer_tokenizer",
    "styled_text",
    "train_scorer",
]

STYLE_WORDS = dict(zip(STYLES, ("noto", "twemoji", "fluent", "3d"), strict=True))


@dataclass(frozen=True)
class ScorerSettings(FitSettings):
    steps: int = 1800
    batch: int = 128
    learning_rate: float = 1e-3
    decay_from: float = 0.3
    save_every: int = 250


class Scorer:
    """Cosine similarity of pictures and texts in the small CLIP's space.

    Arguments:
        model: in evaluation mode.
    """

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer

    @classmethod
    def shipped(cls) -> "Scorer":
        """The one that comes with the package.

        Raises:
            UserError: the package holds none.
        """
        if not (SCORER_FOLDER / "config.json").exists():
            raise UserError(f"{SCORER_FOLDER} holds no scorer: run `python -m bilora_diffusion.embedded build`")
        with quiet_libraries():
            model = CLIPModel.from_pretrained(SCORER_FOLDER, dtype=torch.float32, local_files_only=True)
            tokenizer = CLIPTokenizer.from_pretrained(SCORER_FOLDER, local_files_only=True)
        return cls(model.eval(), tokenizer)

    @torch.no_grad()
    def images(self, pixels: Tensor) -> Tensor:
        """(N, 3, 64, 64), uint8 -> (N, D), of length 1."""
        return _embed_images(self.model, from_bytes(pixels))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """N texts, of the forms `styled_text` gives -> (N, D), of length 1."""
        return _embed_texts(self.model, _ids(self.tokenizer, texts))

    def __call__(self, pixels: Tensor, texts: Sequence[str]) -> Tensor:
        """The cosine similarity of picture i and text i, (N,), in [-1, 1]."""
        return (self.images(pixels) * self.texts(texts)).sum(1)


def styled_text(name: str, style: str | None = None) -> str:
    """What the scorer calls an icon: "a 3d icon of a rabbit", without a style "an icon of a rabbit"."""
    return f"an icon of a {name}" if style is None else f"a {STYLE_WORDS[style]} icon of a {name}"


def scorer_tokenizer(names: Sequence[str]) -> CLIPTokenizer:
    """CLIP's tokenizer, cut down to the scorer's texts."""
    return tokenizer_for([styled_text(name, style) for name in names for style in (None, *STYLES)])


def build_scorer(tokens: int, seed: int) -> CLIPModel:
    """A CLIP of less than a million parameters, random weights by `seed`."""
    text = {
        "vocab_size": tokens,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokens - 2,
        "eos_token_id": tokens - 1,
        "pad_token_id": tokens - 1,
        "attention_dropout": 0.0,
    }
    vision = {
        "image_size": SIZE_PX,
        "patch_size": 8,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))
        torch.nn.init.normal_(model.text_model.embeddings.token_embedding.weight, std=0.3)
    return model


def train_scorer(
    icons: Icons,
    solid_names: list[str],
    settings: ScorerSettings,
    path: Path,
    device: torch.device,
    log: Callable[[str], None],
) -> None:
    """Trains, or goes on where an earlier call was stopped.

    Arguments:
        solid_names: whose 3D icons may be seen.
        path: the checkpoint.
    """
    tokenizer = scorer_tokenizer(icons.names)
    model = build_scorer(len(tokenizer), stream_seed(settings.seed, "embedded", "scorer")).to(device).train()
    pairs = [(row, style) for style in FLAT_STYLES for row in range(len(icons.names))]
    pairs += [(row, SOLID_STYLE) for row in icons.rows(solid_names).tolist()]
    pixels = torch.stack([from_bytes(icons.pixels[style][row]) for row, style in pairs])
    styled = _ids(tokenizer, [styled_text(icons.names[row], style) for row, style in pairs])
    plain = _ids(tokenizer, [styled_text(icons.names[row]) for row, _ in pairs])
    named = torch.tensor([row for row, _ in pairs])

    def loss_of(chosen: Tensor, random: Generator) -> Tensor:
        images = _embed_images(model, _varied(pixels[chosen], random).to(device))
        scale = model.logit_scale.exp().clamp_max(100)
        total = torch.zeros((), device=device)
        for ids, alike in ((styled, chosen), (plain, named[chosen])):
            logits = scale * images @ _embed_texts(model, ids[chosen].to(device)).T
            # Without its style one text belongs to all pictures of that name.
            same = (alike[:, None] == alike[None]).float().to(device)
            target = same / same.sum(1, keepdim=True)
            total = total + cross_entropy(logits, target) + cross_entropy(logits.T, target)
        return total / 4

    def loss(step: int) -> Tensor:
        random = generator(settings.seed, "embedded", "scorer", step)
        return loss_of(torch.randperm(len(pairs), generator=random)[: settings.batch], random)

    probed = torch.randperm(len(pairs), generator=generator(settings.seed, "embedded", "scorer probe"))[:256]
    fit(
        {"scorer": model},
        loss,
        lambda: loss_of(probed, generator(settings.seed, "embedded", "scorer probe")),
        settings,
        path,
        hashlib.sha256(pixels.numpy().tobytes()).hexdigest(),
        log,
    )


def held_out_scores(scorer: Scorer, icons: Icons, names: list[str]) -> dict[str, float]:
    """How well the scorer knows 3D icons it has not seen: the text among all of theirs that is nearest to each picture.

    Arguments:
        names: none of them trained on in 3D.

    Returns:
        `names`: their number; `top_1`, `top_5`: the share of pictures whose own name is the nearest, among the five
        nearest; `chance_top_1`; `style`: the share of pictures nearest to the 3D text among those of the three styles.
    """
    images = scorer.images(icons.pixels[SOLID_STYLE][icons.rows(names)])
    order = (images @ scorer.texts([styled_text(name) for name in names]).T).argsort(dim=1, descending=True)
    rank = (order == torch.arange(len(names))[:, None]).int().argmax(1)
    by_style = torch.stack(
        [(images * scorer.texts([styled_text(name, style) for name in names])).sum(1) for style in STYLES], dim=1
    )
    return {
        "names": len(names),
        "top_1": (rank < 1).float().mean().item(),
        "top_5": (rank < 5).float().mean().item(),
        "chance_top_1": 1 / len(names),
        "style": (by_style.argmax(1) == STYLES.index(SOLID_STYLE)).float().mean().item(),
    }


def _ids(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    encoded = tokenizer(list(texts), padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    return encoded.input_ids


def _embed_images(model: CLIPModel, pixels: Tensor) -> Tensor:
    pooled = model.vision_model(pixel_values=pixels).pooler_output
    return normalize(model.visual_projection(pooled), dim=1)


def _embed_texts(model: CLIPModel, ids: Tensor) -> Tensor:
    pooled = model.text_model(input_ids=ids).pooler_output
    return normalize(model.text_projection(pooled), dim=1)


def _varied(pixels: Tensor, random: Generator) -> Tensor:
    """Turned, moved, scaled, mirrored, brighter or darker, more or less colourful: what does not change the name."""
    count = len(pixels)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=random)

    angle, scale = uniform(-0.35, 0.35), uniform(0.85, 1.35)
    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    shift = uniform(-0.15, 0.15, 2)
    top = torch.stack([cosine * mirror, -sine, shift[:, 0]], dim=1)
    bottom = torch.stack([sine * mirror, cosine, shift[:, 1]], dim=1)
    grid = affine_grid(torch.stack([top, bottom], dim=1), list(pixels.shape), align_corners=False)
    moved = grid_sample(pixels - 1, grid, align_corners=False) + 1  # outside is white
    grey = moved.mean(1, keepdim=True)
    coloured = grey + (moved - grey) * uniform(0.6, 1.4, 1, 1, 1)
    tinted = (coloured - 1) * uniform(0.7, 1.3, 3, 1, 1) + 1  # white stays white
    return (tinted + 0.05 * torch.randn(pixels.shape, generator=random)).clamp(-1, 1)
