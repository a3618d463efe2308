"""`embedded`: a small SDXL that draws icons from their names, trained here and shipped with the package.

It knows 506 icons in two flat styles. 23 three-dimensional icons are the concept for a LoRA to learn; the other 3D
icons, never trained on, tell whether it learned the style or the pictures. It is for trying the trainer, for comparing
methods and for tests, all without a download; it is no image generator.

What lies in this folder beside the code is what `python -m bilora_diffusion.embedded build` writes:

- `base/`: the base in the diffusers layout; `StableDiffusionXLPipeline.from_pretrained(BASE_FOLDER)` loads it.
- `concept/`: the 23 3D icons with their captions, a folder for `--instance_data_dir`.
- `icons/`: all icons at 64 px, and `names.json` with the lists of names.
- `scorer/`: a small CLIP of the same icons.
"""

from pathlib import Path

__all__ = ["BASE_FOLDER", "CONCEPT_FOLDER", "EMBEDDED", "ICONS_FOLDER", "SCORER_FOLDER"]

EMBEDDED = "embedded"
"""The name under which this base is asked for, wherever a base can be named."""

BASE_FOLDER = Path(__file__).parent / "base"
CONCEPT_FOLDER = Path(__file__).parent / "concept"
ICONS_FOLDER = Path(__file__).parent / "icons"
SCORER_FOLDER = Path(__file__).parent / "scorer"
