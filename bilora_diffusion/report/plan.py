"""Which runs of the trainer a report is made of. Imports neither torch nor diffusers."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bilora_diffusion.command_line import parse
from bilora_diffusion.config import TrainingConfig
from bilora_diffusion.errors import UserError
from bilora_diffusion.flags import nearest, show
from bilora_diffusion.lora_files.description import METHOD_TITLES
from bilora_diffusion.method_names import METHOD_NAMES
from bilora_diffusion.paired import MOST_PAIRS

__all__ = ["Training", "check_methods", "check_seeds", "plan", "title", "without_token"]


POINTS = 5
"""Of a curve over the steps, where the flags ask for none."""


@dataclass(frozen=True)
class Training:
    """One run of the trainer.

    Attributes:
        folder: its `--output_dir`.
        words: of the trainer's command line.
        config: what they mean.
    """

    method: str
    seed: int
    folder: Path
    words: tuple[str, ...]
    config: TrainingConfig

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def command(self) -> str:
        """What a user would type."""
        return shlex.join(["python", "-m", "bilora_diffusion.cli", *self.words])


def title(method: str) -> str:
    """A method's name as people write it."""
    return METHOD_TITLES.get(method, method)


def check_methods(methods: Sequence[str]) -> list[str]:
    """The methods, plain LoRA first: it is what the others are held against; without it the first one is.

    Raises:
        UserError: an unknown one, or one twice.
    """
    for method in methods:
        if method not in METHOD_NAMES:
            guess = nearest(method, METHOD_NAMES)
            hint = f"did you mean {guess}?" if guess else f"there are {', '.join(METHOD_NAMES)}"
            raise UserError(f"--methods: unknown method {show(method)}: {hint}")
        if methods.count(method) > 1:
            raise UserError(f"--methods names {method} twice: name each method once")
    return sorted(methods, key=lambda method: method != "lora")


def check_seeds(first: int | None, count: int) -> list[int]:
    """The runs' seeds, one apart, from `--seed` on (unset: 0).

    Raises:
        UserError: too few, too many, or a seed beyond what the trainer takes.
    """
    if not 1 <= count <= MOST_PAIRS:
        raise UserError(f"--seeds is {count}: give 1 to {MOST_PAIRS}, the number of runs of each method")
    first = first or 0
    if first + count > 2**32:
        raise UserError(f"--seed {first} leaves no room for {count} seeds: give a smaller one")
    return list(range(first, first + count))


def plan(
    words: Sequence[str], methods: Sequence[str], seeds: Sequence[int], output: Path, pictures: Path | None
) -> list[Training]:
    """The runs, all methods of the first seed before those of the next.

    Arguments:
        words: of the trainer's command line, as the user gave them.
        output: the report's folder; each run has its own in there.
        pictures: the folder to train on; None: the words'.

    Raises:
        UserError: a flag is wrong, in the trainer's own words.
    """
    words = without_token(words)
    config = parse([*words, "--output_dir", str(output)])
    fixed: list[str] = ["--skip_final_inference"]  # the report draws its own
    if pictures is not None:
        words = _without(words, "--instance_data_dir")
        fixed += ["--instance_data_dir", str(pictures)]
        if config.caption_column is not None:
            fixed += ["--caption_column", "text"]
    if config.overwrite_output_dir:
        fixed.append("--no-overwrite_output_dir")
    if config.push_to_hub:
        fixed.append("--no-push_to_hub")
    steps = config.max_train_steps
    if steps is not None and steps <= config.checkpointing_steps and config.checkpoints_total_limit is None:
        fixed += ["--checkpointing_steps", str(max(1, steps // POINTS))]  # else there is one, at the end
    trainings = []
    for seed in seeds:
        for method in methods:
            folder = output / f"{method}-seed{seed}"
            own = ("--method", method, "--seed", str(seed), "--output_dir", str(folder))
            all_words = (*words, *fixed, *own)
            trainings.append(Training(method, seed, folder, all_words, parse(all_words)))
    return trainings


def without_token(words: Sequence[str]) -> list[str]:
    """Nothing is uploaded, and the commands stand in the report."""
    return _without(words, "--hub_token")


def _without(words: Sequence[str], flag: str) -> list[str]:
    kept: list[str] = []
    follows = False
    for word in words:
        if not follows and not word.startswith(f"{flag}="):
            kept.append(word)
        follows = word == flag
        if follows:
            kept.pop()
    return kept
