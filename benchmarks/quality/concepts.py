"""What is trained on and what is then asked for: the paper's icons, and DreamBooth's subjects. Imports no torch.

References:
    Liu et al., Bi-LoRA: Efficient Sharpness-Aware Minimization for Fine-Tuning Large-Scale Models, 2025,
    arXiv:2508.19564, section 4.4 (names and prompt).
    Ruiz et al., DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation, 2023,
    arXiv:2208.12242 (prompts; github.com/google/dreambooth, dataset/prompts_and_classes.txt, CC BY 4.0).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bilora_diffusion.errors import UserError
from bilora_diffusion.flags import nearest, show

__all__ = ["PAPER_NAMES", "PAPER_PROMPT", "Concept", "Prompt", "dreambooth_concepts", "paper_concept"]

PAPER_PROMPT = "a ToK icon of a {}, in the style of ToK"
PAPER_NAMES = ("Fluffy Rabbit", "Curly Cloud", "Roaring Lion", "Dripping Water Drop", "Hopping Frog", "Smiling Sun")

CLASSES_FILE = "prompts_and_classes.txt"
"""DreamBooth's own, beside its subjects: lines of `subject,class` among others."""
LIVE_CLASSES = ("cat", "dog")
"""Of DreamBooth's 15 classes."""

SHARED = (
    "a {} in the jungle",
    "a {} in the snow",
    "a {} on the beach",
    "a {} on a cobblestone street",
    "a {} on top of pink fabric",
    "a {} on top of a wooden floor",
    "a {} with a city in the background",
    "a {} with a mountain in the background",
    "a {} with a blue house in the background",
    "a {} on top of a purple rug in a forest",
    "a red {}",
    "a purple {}",
    "a shiny {}",
    "a wet {}",
    "a cube shaped {}",
)
OBJECT_PROMPTS = (
    *SHARED,
    "a {} with a wheat field in the background",
    "a {} with a tree and autumn leaves in the background",
    "a {} with the Eiffel Tower in the background",
    "a {} floating on top of water",
    "a {} floating in an ocean of milk",
    "a {} on top of green grass with sunflowers around it",
    "a {} on top of a mirror",
    "a {} on top of the sidewalk in a crowded street",
    "a {} on top of a dirt road",
    "a {} on top of a white rug",
)
LIVE_PROMPTS = (
    *SHARED,
    "a {} wearing a red hat",
    "a {} wearing a santa hat",
    "a {} wearing a rainbow scarf",
    "a {} wearing a black top hat and a monocle",
    "a {} in a chef outfit",
    "a {} in a firefighter outfit",
    "a {} in a police outfit",
    "a {} wearing pink glasses",
    "a {} wearing a yellow shirt",
    "a {} in a purple wizard outfit",
)


@dataclass(frozen=True)
class Prompt:
    """Attributes:
    drawn: what is asked for.
    judged: what the pictures are held against.
    """

    drawn: str
    judged: str


@dataclass(frozen=True)
class Concept:
    """One thing to be learnt.

    Attributes:
        name: of its folder among the results.
        words: of the trainer's command line, that it needs beside those of all.
    """

    name: str
    words: tuple[str, ...]
    prompts: tuple[Prompt, ...]


def paper_concept(prompt: str = PAPER_PROMPT, names: Sequence[str] = PAPER_NAMES) -> Concept:
    """The paper's: names that are not among the training pictures, in the style that was trained.

    Raises:
        UserError: the prompt has no place, or more than one, for the name.
    """
    if prompt.count("{}") != 1:
        raise UserError(f"--prompt is {show(prompt)}: put {{}} once where the name belongs")
    asked = [prompt.replace("{}", name) for name in names]
    return Concept("icons", (), tuple(Prompt(text, text) for text in asked))


def dreambooth_concepts(
    folder: Path, subjects: Sequence[str], classes: Sequence[str], token: str, prompts: int | None = None
) -> list[Concept]:
    """The subjects of a folder in DreamBooth's layout: a folder of pictures each.

    CLIP never saw the rare token, so pictures are held against the prompt without it.

    Arguments:
        folder: holds the subjects' folders.
        subjects: their names; empty: all of them.
        classes: each a file with lines `name,class`, or `name=class`; behind the class may stand `,live` or `,object`,
            which says whose prompts are drawn. `CLASSES_FILE` in the folder is read first.
        token: the rare word that stands for the subject.
        prompts: how many of the 25; None: all.

    Raises:
        UserError: a folder or a subject is not there, or a class is not known.
    """
    known = _folders(folder)
    for name in subjects:
        if name not in known:
            guess = nearest(name, known)
            hint = f"did you mean {guess}?" if guess else f"there are {', '.join(known)}"
            raise UserError(f"--subjects: {folder} has no folder {show(name)}: {hint}")
    found = _classes(folder, classes, known)
    chosen = [name for name in known if name in subjects] if subjects else known
    for name in chosen:
        if name not in found:
            raise UserError(f"no class is known for {name}: give --classes {name}=WORD, or a file of lines {name},WORD")
    return [_subject(folder / name, *found[name], token, prompts) for name in chosen]


def _subject(folder: Path, word: str, live: bool, token: str, count: int | None) -> Concept:
    templates = (LIVE_PROMPTS if live else OBJECT_PROMPTS)[:count]
    prompts = tuple(Prompt(one.format(f"{token} {word}"), one.format(word)) for one in templates)
    words = ("--instance_data_dir", str(folder), "--instance_prompt", f"a {token} {word}")
    return Concept(folder.name, words, prompts)


def _folders(folder: Path) -> list[str]:
    try:
        found = sorted(one.name for one in folder.iterdir() if one.is_dir() and not one.name.startswith("."))
    except OSError as error:
        raise UserError(f"--subjects_dir {folder} cannot be read: {error.strerror}") from error
    if not found:
        raise UserError(f"--subjects_dir {folder} has no folders: it must hold a folder of pictures for each subject")
    return found


def _classes(folder: Path, given: Sequence[str], subjects: Sequence[str]) -> dict[str, tuple[str, bool]]:
    """Class word and whether it lives, by subject; a later word wins."""
    lines = _lines(folder / CLASSES_FILE) if (folder / CLASSES_FILE).is_file() else []
    for word in given:
        if "=" in word and not Path(word).is_file():
            name, _, rest = word.partition("=")
            if name not in subjects:
                guess = nearest(name, subjects)
                raise UserError(f"--classes {word}: no subject {name}" + (f": did you mean {guess}?" if guess else ""))
            lines.append(f"{name},{rest}")
        else:
            lines += _lines(Path(word))
    found = {}
    for line in lines:
        match = re.fullmatch(r"([^,]+),\s*([^,]+?)\s*(?:,\s*(live|object))?", line.strip())
        if match and match[1].strip() in subjects:
            word, kind = match[2], match[3]
            found[match[1].strip()] = (word, word in LIVE_CLASSES if kind is None else kind == "live")
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"--classes {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--classes {path} is not a text file in UTF-8") from error
