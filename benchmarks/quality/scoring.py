"""The scores of drawn pictures: those of the paper, and those of DreamBooth.

References:
    Liu et al., Bi-LoRA, 2025, arXiv:2508.19564, table 3 (CLIP image-text and text-text).
    Ruiz et al., DreamBooth, 2023, arXiv:2208.12242, section 4.2 (DINO, CLIP-I, CLIP-T).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from benchmarks.quality.drawing import DrawnRun, Place
from benchmarks.quality.scorers import Captioner, Dino, Model, open_clip
from bilora_diffusion.assembly import free_memory
from bilora_diffusion.atomic import write_text_atomically
from bilora_diffusion.errors import UserError
from bilora_diffusion.strict_json import strict_json

__all__ = ["Scores", "agreement", "among_themselves", "likeness", "score_dreambench", "score_paper"]

AT_ONCE = 8
"""Pictures that a scorer sees at a time."""


@dataclass(frozen=True)
class Scores:
    """Attributes:
    runs: by the run's name and the score's key, a value for each picture in the order of `DrawnRun.places`.
    real: by the concept's name and the score's key, what the real pictures have among themselves.
    captions: by the run's name, what the captioner says of each picture.
    """

    runs: Mapping[str, Mapping[str, list[float]]]
    real: Mapping[str, Mapping[str, float]]
    captions: Mapping[str, list[str]]


# --- The formulas. Rows of all tensors have length 1. ---


def agreement(ours: Tensor, theirs: Tensor) -> Tensor:
    """(N, D), (N, D) -> (N,): the cosine of row i and row i."""
    return (ours * theirs).sum(1)


def likeness(drawn: Tensor, real: Tensor) -> Tensor:
    """(N, D), (M, D) -> (N,): each drawn picture's mean cosine with the real ones.

    The mean of these is the mean over all pairs of a drawn and a real picture: DreamBooth's DINO and CLIP-I.
    """
    return (drawn @ real.T).mean(1)


def among_themselves(real: Tensor) -> float | None:
    """(M, D): the mean cosine of two different real pictures; None for one alone. DreamBooth's "real images"."""
    count = len(real)
    return ((real @ real.T).sum() - count).item() / (count * (count - 1)) if count > 1 else None


# --- All runs ---


def score_paper(runs: Sequence[DrawnRun], models: Mapping[str, Model], device: torch.device) -> Scores:
    """`image_text`: picture and prompt; `text_text`: the captioner's words for the picture, and the prompt."""
    captioner = models["--captioner"]
    due = [place for run in runs for place in run.places() if _caption(place, captioner) is None]
    if due:
        _describe(due, captioner, device)
        free_memory()
    told = {run.name: [_caption(place, captioner) or "" for place in run.places()] for run in runs}
    clip = open_clip(models["--clip"], device)
    scores = {}
    for run in tqdm(runs, desc="CLIP", unit="run"):
        prompts = _in_batches(clip.texts, [place.prompt.judged for place in run.places()])
        scores[run.name] = {
            "image_text": agreement(_embedded(clip.images, run), prompts).tolist(),
            "text_text": agreement(_in_batches(clip.texts, told[run.name]), prompts).tolist(),
        }
    return Scores(scores, {}, told)


def score_dreambench(runs: Sequence[DrawnRun], models: Mapping[str, Model], device: torch.device) -> Scores:
    """`dino` and `clip_i`: drawn and real pictures; `clip_t`: picture and prompt."""
    scores: dict[str, dict[str, list[float]]] = {run.name: {} for run in runs}
    real: dict[str, dict[str, float]] = {run.concept.name: {} for run in runs}
    dino = Dino(models["--dino"], device)
    _score_likeness("dino", dino.images, runs, scores, real)
    del dino
    free_memory()
    clip = open_clip(models["--clip"], device)
    drawn = _score_likeness("clip_i", clip.images, runs, scores, real)
    for run in runs:
        prompts = _in_batches(clip.texts, [place.prompt.judged for place in run.places()])
        scores[run.name]["clip_t"] = agreement(drawn[run.name], prompts).tolist()
    return Scores(scores, real, {})


def _score_likeness(
    key: str,
    images: Callable[[Sequence[Image.Image]], Tensor],
    runs: Sequence[DrawnRun],
    scores: Mapping[str, dict[str, list[float]]],
    real: Mapping[str, dict[str, float]],
) -> dict[str, Tensor]:
    """Puts the score under `key`; returns what the drawn pictures are embedded as, by the run's name."""
    targets: dict[str, Tensor] = {}
    embedded = {}
    for run in tqdm(runs, desc=key, unit="run"):
        concept = run.concept.name
        if concept not in targets:
            targets[concept] = _in_batches(lambda some: images([one.load() for one in some]), run.real)
            if (value := among_themselves(targets[concept])) is not None:
                real[concept][key] = value
        embedded[run.name] = _embedded(images, run)
        scores[run.name][key] = likeness(embedded[run.name], targets[concept]).tolist()
    return embedded


def _embedded(images: Callable[[Sequence[Image.Image]], Tensor], run: DrawnRun) -> Tensor:
    return _in_batches(lambda some: images([_load(path) for path in some]), [place.path for place in run.places()])


def _in_batches(compute: Callable[[Sequence], Tensor], items: Sequence) -> Tensor:
    return torch.cat([compute(items[start : start + AT_ONCE]) for start in range(0, len(items), AT_ONCE)])


def _load(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}): delete it, and it is drawn again") from error


# --- Captions, kept beside the pictures: they take longer than all other scores ---


def _caption(place: Place, model: Model) -> str | None:
    """What this captioner has said of the picture; None if it was another, or none."""
    try:
        known = json.loads(place.caption_path.read_text(encoding="utf-8"))
        return str(known["caption"]) if known["captioner"] == model.to_json() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _describe(places: Sequence[Place], model: Model, device: torch.device) -> None:
    captioner = Captioner(model, device)
    with tqdm(total=len(places), desc="describing", unit="picture") as bar:
        for start in range(0, len(places), AT_ONCE):
            some = places[start : start + AT_ONCE]
            told = captioner.captions([_load(place.path) for place in some])
            for place, caption in zip(some, told, strict=True):
                content = {"captioner": model.to_json(), "caption": caption}
                write_text_atomically(place.caption_path, strict_json(content) + "\n")
            bar.update(len(some))
