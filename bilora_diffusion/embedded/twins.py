"""3D icons that nearly repeat one that something was trained on: they must not count as unseen."""

from bilora_diffusion.embedded.check import features
from bilora_diffusion.embedded.icons import SOLID_STYLE, Icons

__all__ = ["without_twins"]

TWINS = 1.6
"""Similarity, at most 2, above which two icons are twins: mostly faces that differ in eyes or mouth."""


def without_twins(lists: dict[str, list[str]], icons: Icons) -> dict[str, list[str]]:
    """Moves from validation and test what is a twin of an icon of the concept or the scorer's list to `left_out`.

    Arguments:
        lists: as `draw_lists` gives them.
    """
    pixels = icons.pixels[SOLID_STYLE]
    trained_on = features(pixels[icons.rows(lists["concept"] + lists["scorer"])])
    kept = dict(lists)
    kept["left_out"] = []
    for use in ("validation", "test"):
        nearest = (features(pixels[icons.rows(lists[use])]) @ trained_on.T).amax(1)
        twins = {name for name, value in zip(lists[use], nearest.tolist(), strict=True) if value > TWINS}
        kept[use] = [name for name in lists[use] if name not in twins]
        kept["left_out"] += [name for name in lists[use] if name in twins]
    return kept
