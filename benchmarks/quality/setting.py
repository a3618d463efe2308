"""What the stages `paper` and `dreambench` measure, and what the command was told."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.quality.concepts import Concept
from benchmarks.quality.drawing import DrawnRun
from benchmarks.quality.scorers import Model
from benchmarks.quality.scoring import Scores, score_dreambench, score_paper
from benchmarks.quality.tables import Score

__all__ = ["STAGES", "Options", "Stage"]


@dataclass(frozen=True)
class Stage:
    """Attributes:
    cluster: what runs are averaged over before errors are computed: "seed" or "subject".
    """

    heading: str
    scores: tuple[Score, ...]
    cluster: str
    score: Callable[[Sequence[DrawnRun], Mapping[str, Model], torch.device], Scores]


STAGES = {
    "paper": Stage(
        "The paper's SDXL experiment",
        (
            Score("image_text", "CLIP image-text x 100", "cosine of picture and prompt", 100, 2),
            Score("text_text", "CLIP text-text x 100", "cosine of the captioner's words and the prompt", 100, 2),
        ),
        "seed",
        score_paper,
    ),
    "dreambench": Stage(
        "DreamBooth's subjects",
        (
            Score("dino", "DINO", "mean cosine of drawn and real pictures, in DINO's space", 1, 3),
            Score("clip_i", "CLIP-I", "the same in CLIP's space", 1, 3),
            Score("clip_t", "CLIP-T", "cosine of picture and prompt, the rare token left out", 1, 3),
        ),
        "subject",
        score_dreambench,
    ),
}


@dataclass(frozen=True)
class Options:
    """What the command was told.

    Arguments:
        stage: a key of `STAGES`.
        words: of the trainer's command line, for all runs.
        pictures: of each prompt.
        models: what the scorers' flags name.
        command: that makes these results, as it is printed in them.
    """

    stage: str
    words: tuple[str, ...]
    concepts: tuple[Concept, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    output: Path
    pictures: int
    steps: int
    guidance_scale: float | None
    models: Mapping[str, str]
    command: str = ""
