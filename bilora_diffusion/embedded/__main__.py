"""python -m bilora_diffusion.embedded build | check"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bilora_diffusion.embedded import EMBEDDED
from bilora_diffusion.errors import UserError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 2 for a mistake of the user's, told in one line; 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m bilora_diffusion.embedded", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    building = commands.add_parser(
        "build", help="build the base from nothing; hours on a CPU; goes on where it stopped"
    )
    building.add_argument("--work", type=Path, default=Path("outputs/embedded"), help="for packages and checkpoints")
    building.add_argument(
        "--target", type=Path, default=Path("outputs/embedded/built"), help="where the folders to ship are written"
    )
    building.add_argument("--device", default="cpu", help="cpu, cuda, mps")
    building.add_argument("--threads", type=int, help="of torch, on a CPU")
    checking = commands.add_parser("check", help="draw the check list and look each picture up among all icons")
    checking.add_argument("--base", default=EMBEDDED, help="embedded, or the folder of one that `build` made")
    checking.add_argument("--style", default="noto", help="noto, twemoji or fluent")
    checking.add_argument("--seed", type=int, default=0)
    checking.add_argument("--steps", type=int, default=20, help="denoising steps")
    checking.add_argument("--output_dir", type=Path, default=Path("outputs/embedded"), help="for figures and sheet")
    arguments = parser.parse_args(argv)
    try:
        return _build(arguments) if arguments.command == "build" else _check(arguments)
    except UserError as error:
        error.tell()
        return 2
    except KeyboardInterrupt:
        if arguments.command == "build":
            print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130


def _build(arguments: argparse.Namespace) -> int:
    import torch

    from bilora_diffusion.embedded.recipe import Recipe, build

    if arguments.threads is not None:
        if arguments.threads < 1:
            raise UserError(f"--threads is {arguments.threads}: give 1 or more")
        torch.set_num_threads(arguments.threads)
    try:
        device = torch.device(arguments.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"--device {arguments.device} cannot be used here: {reason}") from error
    build(Recipe(), arguments.work, arguments.target, device, _say)
    print(arguments.target)
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from bilora_diffusion.embedded.icons import FLAT_STYLES, Icons, shipped_lists
    from bilora_diffusion.embedded.recipe import check

    if arguments.style not in FLAT_STYLES:
        raise UserError(f"--style {arguments.style}: the base knows {' and '.join(FLAT_STYLES)}")
    if arguments.steps < 1:
        raise UserError(f"--steps is {arguments.steps}: give 1 or more")
    names = shipped_lists()["check"]
    check(
        arguments.base,
        Icons.shipped(),
        names,
        arguments.style,
        arguments.seed,
        arguments.steps,
        arguments.output_dir,
        _say,
    )
    for ending in ("json", "png"):
        print(arguments.output_dir / f"check-{arguments.style}.{ending}")
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
