"""The embedded base from nothing: fetch, prepare, train, export, look. Each stage goes on where it was stopped."""

import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch

from bilora_diffusion.atomic import atomic_write, write_text_atomically
from bilora_diffusion.bases import PARTS, Base
from bilora_diffusion.embedded.architecture import build_denoiser, build_vae
from bilora_diffusion.embedded.check import contact_sheet, draw, features, retrieve
from bilora_diffusion.embedded.denoiser import (
    DenoiserSettings,
    StyleSettings,
    latent_space,
    train_denoiser,
    train_styles,
)
from bilora_diffusion.embedded.export import export_base, export_concept, export_icons, export_scorer
from bilora_diffusion.embedded.fitting import how_trained, load_averages
from bilora_diffusion.embedded.icons import FIRST_STYLES, FLAT_STYLES, SOLID_STYLE, Icons, concept_pictures, prepare
from bilora_diffusion.embedded.lists import draw_lists
from bilora_diffusion.embedded.scorer import (
    Scorer,
    ScorerSettings,
    build_scorer,
    held_out_scores,
    scorer_tokenizer,
    train_scorer,
)
from bilora_diffusion.embedded.twins import without_twins
from bilora_diffusion.embedded.vae import VaeSettings, reconstruction_db, train_vae
from bilora_diffusion.embedded.words import flat_caption, tokenizers
from bilora_diffusion.errors import UserError

__all__ = ["Recipe", "build", "check"]

LOG_FILE = "build.json"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what is built."""

    denoiser: DenoiserSettings = field(default_factory=DenoiserSettings)
    styles: StyleSettings = field(default_factory=StyleSettings)
    vae: VaeSettings = field(default_factory=VaeSettings)
    scorer: ScorerSettings = field(default_factory=ScorerSettings)


def build(recipe: Recipe, work: Path, target: Path, device: torch.device, log: Callable[[str], None] = print) -> None:
    """Builds the base, the concept, the small icons and the scorer, and checks what was built.

    Arguments:
        work: for the packages and the checkpoints; a stage that is done there is not done again. The sample sheets
            and the check's figures are written there.
        target: is given the folders `base`, `concept`, `icons`, `scorer`; what stood there is replaced.

    Raises:
        UserError: npm or scikit-image is missing, a folder cannot be used, or `work` holds other settings' checkpoints.
    """
    packed = prepare(work)
    icons, concept = Icons.load(packed), concept_pictures(packed)
    lists = without_twins(draw_lists(icons.names), icons)
    if set(concept) != set(lists["concept"]):
        raise UserError(f"{packed} is of other lists of names; remove it to prepare the icons anew")
    log(f"{len(icons.names)} icons in {len(icons.pixels)} styles, sha256 {icons.sha256[:12]}")
    space = latent_space(icons)
    solid = icons.style(SOLID_STYLE)
    seen = torch.cat([*(icons.style(style) for style in FIRST_STYLES), solid[icons.rows(lists["scorer"])]])
    train_vae(seen, space, recipe.vae, work / "vae.pt", device, log)
    train_denoiser(icons, recipe.denoiser, work / "denoiser.pt", device, log)
    train_styles(icons, recipe.styles, work / "denoiser.pt", work / "styles.pt", device, log)
    train_scorer(icons, lists["scorer"], recipe.scorer, work / "scorer.pt", device, log)

    vae, models = build_vae(0), build_denoiser(len(tokenizers(icons.names, FLAT_STYLES)[0]), 0)
    tokenizer = scorer_tokenizer(icons.names)
    scorer = Scorer(build_scorer(len(tokenizer), 0), tokenizer)
    made = {
        "vae": load_averages({"vae": vae}, work / "vae.pt"),
        "denoiser": how_trained(work / "denoiser.pt"),
        "styles": load_averages(models, work / "styles.pt"),
        "scorer": load_averages({"scorer": scorer.model}, work / "scorer.pt"),
    }
    unseen = lists["validation"] + lists["test"]
    made["vae"]["reconstruction_db"] = {
        style: reconstruction_db(vae, icons.style(style)[icons.rows(unseen)]) for style in icons.pixels
    }
    made["scorer"]["held_out"] = held_out_scores(scorer, icons, unseen)
    export_icons(icons, lists, target / "icons")
    export_concept(concept, target / "concept")
    export_base(models, vae, icons.names, target / "base")
    export_scorer(scorer, target / "scorer")
    record = {
        "icons": {"names": len(icons.names), "sha256": icons.sha256},
        **made,
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "numpy", "pillow")},
        "python": platform.python_version(),
        "device": str(device),
    }
    write_text_atomically(target / "base" / LOG_FILE, json.dumps(record, indent=1) + "\n")
    for style in FLAT_STYLES:
        check(str(target / "base"), icons, lists["check"], style, 0, 20, work, log)


def check(
    base: str,
    icons: Icons,
    names: list[str],
    style: str,
    seed: int,
    steps: int,
    folder: Path,
    log: Callable[[str], None] = print,
) -> dict:
    """Draws icons by name and looks each picture up among all icons of the style.

    Arguments:
        base: `embedded`, or the folder of one that `build` made.
        names: what to draw, one picture each; picture i starts from the noise of (seed, i).
        style: one of the flat ones.
        steps: denoising steps.
        folder: is given `check-<style>.json` and the contact sheet `check-<style>.png`: drawn above true.

    Returns:
        What the file holds.

    Raises:
        UserError: scikit-image is missing, the base cannot be loaded, or the folder not written.
    """
    true = icons.pixels[style][icons.rows(names)]
    features(true[:1])  # needs a library that may be missing: told now, not after a minute of drawing
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be used as a folder: {error.strerror}") from error
    prompts = [flat_caption(style, name) for name in names]
    began = time.perf_counter()
    pipeline = Base(base).load(*PARTS)
    loaded = time.perf_counter()
    draw(pipeline, prompts[:1], seed=seed, steps=steps)
    once = time.perf_counter()
    drawn = draw(pipeline, prompts, seed=seed, steps=steps)
    found = retrieve(drawn, names, icons, style)
    result = {
        "base": Base(base).shared_name,
        "style": style,
        "seed": seed,
        "steps": steps,
        "names": len(names),
        "top_1": found.share(1),
        "top_10": found.share(10),
        "top_1_without_look_alikes": found.share(1, look_alikes=False),
        "top_10_without_look_alikes": found.share(10, look_alikes=False),
        "chance_top_10": round(10 / len(icons.names), 4),
        "load_seconds": round(loaded - began, 2),
        "picture_seconds": round(once - loaded, 2),
        "threads": torch.get_num_threads(),
        "ranks": dict(zip(found.names, found.ranks, strict=True)),
        "taken_for": {
            name: nearest for name, nearest in zip(found.names, found.nearest, strict=True) if nearest != name
        },
    }
    write_text_atomically(folder / f"check-{style}.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    with atomic_write(folder / f"check-{style}.png") as temporary:
        contact_sheet(drawn, true).save(temporary, format="PNG", optimize=True)
    strict = f"{found.share(1, look_alikes=False):.0%} and {found.share(10, look_alikes=False):.0%}"
    log(
        f"{style}: of {len(names)} names the right icon is nearest in {found.share(1):.0%}, among the nearest 10 in "
        f"{found.share(10):.0%} (look-alikes counted as wrong: {strict}); loaded in {result['load_seconds']} s, "
        f"one picture in {result['picture_seconds']} s"
    )
    return result
