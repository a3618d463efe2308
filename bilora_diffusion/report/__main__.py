"""python -m bilora_diffusion.report --config configs/quickstart.yaml --methods lora bilora --seeds 3

Trains the chosen methods on the same draws, each run the trainer's own command in a process of its own, and writes one
HTML page about them: pictures, curves, overfitting, copying, sharpness, cost, and what the paired numbers say. What is
finished is not repeated: stop it with Ctrl-C and give the same command to go on.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from bilora_diffusion.commands import GOES_ON, Parser, exit_code
from bilora_diffusion.errors import UserError

__all__ = ["main"]

LEAST = {"pictures": 1, "draws": 1, "steps": 1, "hold_out": 0}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the path of the page. Returns 0; 2 for a mistake of the user's, told in one line; 130 after Ctrl-C."""
    words = sys.argv[1:] if argv is None else list(argv)

    def work() -> None:
        arguments, trainer_words = _parse(words)
        from bilora_diffusion.report.plan import check_methods, check_seeds, without_token

        methods = check_methods(arguments.methods)
        check_seeds(None, arguments.seeds)
        from bilora_diffusion.sharpness.plots import need_matplotlib

        need_matplotlib("a report's curves need")
        from bilora_diffusion.report.making import Options, make_report

        options = Options(
            words=tuple(trainer_words),
            methods=tuple(methods),
            seeds=arguments.seeds,
            output=arguments.output_dir,
            prompts=tuple(arguments.prompts),
            other_prompts=tuple(arguments.other_prompts),
            pictures=arguments.pictures,
            hold_out=arguments.hold_out,
            draws=arguments.draws,
            steps=arguments.steps,
            guidance_scale=arguments.guidance_scale,
            clip=arguments.clip,
            command=shlex.join(["python", "-m", "bilora_diffusion.report", *without_token(words)]),
        )
        print(make_report(options))

    return exit_code(work, GOES_ON)


def _parse(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The report's own arguments, and the trainer's words: those behind `--`, and all that are not known here."""
    words = list(words)
    end = words.index("--") if "--" in words else len(words)
    arguments, rest = _parser().parse_known_args(words[:end])
    for name, least in LEAST.items():
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UserError(f"--{name} is {value}: give {least} or more")
    return arguments, [*rest, *words[end + 1 :]]


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m bilora_diffusion.report",
        description=__doc__.split("\n\n", 1)[1],
        epilog="All other flags are the trainer's, for all runs alike: --config, --max_train_steps, ... "
        "(docs/flags.md). They may also stand behind --.",
        allow_abbrev=False,
    )
    parser.add_argument("--methods", nargs="+", default=["lora", "bilora"], metavar="METHOD", help="[lora bilora]")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method, from --seed on [3]")
    parser.add_argument(
        "--prompts",
        nargs="+",
        default=[],
        help="drawn by all; unset: --validation_prompt, else --instance_prompt, else the captions of held-out pictures",
    )
    parser.add_argument("--other_prompts", nargs="+", default=[], help="without the concept, to see what was forgotten")
    parser.add_argument("--pictures", type=int, help="a prompt, with seeds 0, 1, ... [as many as give four]")
    parser.add_argument(
        "--hold_out", type=int, help="pictures not trained on [a fifth, at least 2; none of fewer than 8]"
    )
    parser.add_argument("--draws", type=int, default=64, help="of picture, timestep and noise, for each loss [64]")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps of a picture [20]")
    parser.add_argument("--guidance_scale", type=float, help="of a picture; 1 is none [5; 2 on the embedded base]")
    parser.add_argument("--clip", help="a CLIP (folder or hub id) to measure copying with, on bases but embedded")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/report"), help="[outputs/report]")
    return parser


if __name__ == "__main__":
    sys.exit(main())
