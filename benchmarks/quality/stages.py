"""The command line of the stages that train, draw and score whole runs: `paper` and `dreambench`."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality.concepts import PAPER_NAMES, PAPER_PROMPT, dreambooth_concepts, paper_concept
from bilora_diffusion.commands import GOES_ON, Parser, exit_code
from bilora_diffusion.errors import UserError

__all__ = ["CONFIGS", "STAGES", "main", "parser_of", "read_options"]

STAGES = ("paper", "dreambench")
CONFIGS = {"paper": "configs/paper_3d_icons.yaml", "dreambench": "configs/dreambooth.yaml"}
OUTPUT = {stage: f"outputs/{stage}" for stage in STAGES}
LEAST = {"pictures": 1, "prompts": 1}


def main(words: Sequence[str]) -> int:
    """Runs a stage, the first word, and prints the table's path.

    Returns:
        0; 2 for a mistake of the user's, told in one line; 130 after Ctrl-C.
    """

    def work() -> None:
        options = read_options(list(words))
        from benchmarks.quality.comparing import compare_methods
        from benchmarks.quality.setting import Options

        print(compare_methods(Options(**options)))

    return exit_code(work, GOES_ON)


def read_options(words: list[str]) -> dict:
    """What `setting.Options` takes. Unknown words are the trainer's."""
    from bilora_diffusion.report.plan import check_methods, without_token

    stage = words[0]
    arguments, rest = parser_of(stage).parse_known_args(words[1:])
    for name, least in LEAST.items():
        value = getattr(arguments, name, None)
        if value is not None and value < least:
            raise UserError(f"--{name} is {value}: give {least} or more")
    for seed in arguments.seeds:
        if arguments.seeds.count(seed) > 1:
            raise UserError(f"--seeds names {seed} twice: name each seed once")
    for name, ours in (("--method", "--methods"), ("--seed", "--seeds")):
        if any(word == name or word.startswith(f"{name}=") for word in rest):
            raise UserError(f"{name}: give {ours} here, of all runs")
    if not any(word == "--config" or word.startswith("--config=") for word in rest):
        rest = ["--config", CONFIGS[stage], *rest]
    if stage == "paper":
        concepts = [paper_concept(arguments.prompt, arguments.names)]
        models = {"--clip": arguments.clip, "--captioner": arguments.captioner}
    else:
        concepts = dreambooth_concepts(
            arguments.subjects_dir, arguments.subjects, arguments.classes, arguments.token, arguments.prompts
        )
        models = {"--clip": arguments.clip, "--dino": arguments.dino}
    return {
        "stage": stage,
        "words": tuple(rest),
        "concepts": tuple(concepts),
        "methods": tuple(check_methods(arguments.methods)),
        "seeds": tuple(arguments.seeds),
        "output": arguments.output_dir,
        "pictures": arguments.pictures,
        "steps": arguments.steps,
        "guidance_scale": arguments.guidance_scale,
        "models": models,
        "command": shlex.join(["python", "-m", "benchmarks.quality", *without_token(words)]),
    }


def parser_of(stage: str) -> argparse.ArgumentParser:
    """A stage's own flags."""
    parser = Parser(
        prog=f"python -m benchmarks.quality {stage}",
        epilog=f"All other flags are the trainer's (docs/flags.md), over --config {CONFIGS[stage]}. A scorer is a "
        "folder, a hub id, or id@revision. docs/benchmarks.md has the rest.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--methods", nargs="+", default=["lora", "bilora"], metavar="METHOD", help="[lora bilora]")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED", help="of the trainings [0 1 2]")
    add("--output_dir", type=Path, default=Path(OUTPUT[stage]), help=f"[{OUTPUT[stage]}]")
    add("--steps", type=int, default=25, help="denoising steps of a picture [25]")
    add("--guidance_scale", type=float, help="of a picture; 1 is none [5; 2 on the embedded base]")
    if stage == "paper":
        add("--pictures", type=int, default=200, help="of each name, with seeds 0, 1, ... [200]")
        add("--prompt", default=PAPER_PROMPT, help="with {} for the name [the paper's]")
        add("--names", nargs="+", default=PAPER_NAMES, help="not among the training pictures [the paper's six]")
        add("--clip", default="openai/clip-vit-large-patch14", help="[%(default)s]")
        add("--captioner", default="Salesforce/blip2-opt-2.7b", help="a BLIP or BLIP-2 [%(default)s]")
        return parser
    add("--subjects_dir", type=Path, required=True, help="a folder of pictures for each subject, as in DreamBooth's")
    add("--subjects", nargs="+", default=[], metavar="NAME", help="only these folders")
    add(
        "--classes",
        nargs="+",
        default=[],
        metavar="NAME=WORD",
        help="class words: NAME=WORD, or a file of lines NAME,WORD; with ,live or ,object behind it, else cats and "
        "dogs live [prompts_and_classes.txt in --subjects_dir]",
    )
    add("--token", default="sks", help="the rare word that stands for the subject [sks]")
    add("--pictures", type=int, default=4, help="of each prompt, with seeds 0, 1, ... [4]")
    add("--prompts", type=int, help="only the first so many of the 25")
    add("--clip", default="openai/clip-vit-base-patch32", help="[%(default)s]")
    add("--dino", default="facebook/dino-vits16", help="[%(default)s]")
    return parser
