"""Which names are for what: four disjoint lists of the 3D icons, and the names the base is checked on.

Drawn by a seed before anything is trained. No list knows of the styles: in flat style the base knows every name.
"""

from collections.abc import Sequence

import torch

from bilora_diffusion.randomness import generator

__all__ = ["LIKE_THE_PAPER", "draw_lists"]

LIKE_THE_PAPER = ("rabbit", "cloud", "lion", "droplet", "frog", "sun")
"""The nearest to the six of the paper's Figure: rabbit, cloud, lion, water drop, frog, sun. They begin `test`."""
SEED = 0
CONCEPT = 23  # as many pictures as the paper's 3D-icons data set has
SCORER = 180
VALIDATION = 83
CHECK = 128


def draw_lists(names: Sequence[str]) -> dict[str, list[str]]:
    """The lists by their names.

    - concept: 23 names whose 3D icons a LoRA is trained on.
    - scorer: names whose 3D icons the scorer and the VAE are trained on.
    - validation: names to choose a configuration by.
    - test: the rest, to report the chosen configuration on; the first six are `LIKE_THE_PAPER`.
    - check: names on whose flat icons the base is checked. Of all names: it overlaps with the others.
    """
    drawable = [name for name in names if name not in LIKE_THE_PAPER]
    order = torch.randperm(len(drawable), generator=generator(SEED, "embedded", "lists")).tolist()
    drawn = [drawable[place] for place in order]
    checked = torch.randperm(len(names), generator=generator(SEED, "embedded", "check")).tolist()
    ends = (CONCEPT, CONCEPT + SCORER, CONCEPT + SCORER + VALIDATION)
    return {
        "concept": drawn[: ends[0]],
        "scorer": drawn[ends[0] : ends[1]],
        "validation": drawn[ends[1] : ends[2]],
        "test": [*LIKE_THE_PAPER, *drawn[ends[2] :]],
        "check": [names[place] for place in checked[:CHECK]],
    }
