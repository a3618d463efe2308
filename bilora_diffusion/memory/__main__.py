"""python -m bilora_diffusion.memory --config FILE.yaml [any flag of the trainer] [--cards 24 16 12 8]

Estimates the memory of a GPU that a training run would take, by what holds it, and says whether it fits cards of the
given sizes. Needs neither a GPU nor the base's weights; SDXL's own shapes stand for a base that is not at hand. The
pictures are not looked at and need not exist. Estimated: no GPU has been measured yet.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bilora_diffusion.command_line import parse
from bilora_diffusion.commands import Parser, exit_code
from bilora_diffusion.config import TrainingConfig

if TYPE_CHECKING:
    import torch

    from bilora_diffusion.memory.estimate import Estimate

__all__ = ["main"]

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
CARDS_GB = (24.0, 16.0, 12.0, 8.0)
USABLE_SHARE = 0.98
"""Of a card's size as sold that programs see, as on the usual 8 to 24 GB cards."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 2 for a mistake of the user's, told in one line; 130 after Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)

    def work() -> None:
        arguments, flags = _parser().parse_known_args(words)
        config = parse(flags, assumed={"pretrained_model_name_or_path": SDXL, "instance_data_dir": "pictures"})
        _print(config, arguments.cards)

    return exit_code(work)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m bilora_diffusion.memory",
        usage="%(prog)s [--cards GB ...] [--config FILE.yaml] [any flag of the trainer]",
        description=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--cards", type=float, nargs="+", default=CARDS_GB, metavar="GB", help="sizes of cards")
    return parser


def _print(config: TrainingConfig, cards: Sequence[float]) -> None:
    from bilora_diffusion.memory.estimate import ALLOCATOR_SHARE, CONTEXT_BYTES, GB, estimate
    from bilora_diffusion.run import DTYPES, resolved_precision

    dtype = DTYPES[resolved_precision(config)]
    found = estimate(config, dtype)
    if found.not_read is not None:
        print(f"These are the shapes of SDXL, not of the base ({found.not_read})\n")
    print("Estimated, no GPU measured yet; GB are 2^30 bytes.\n")
    for phase in found.phases:
        print(f"{phase.name:32}{phase.allocated / GB:8.2f} GB{'   (left out if it does not fit)' * phase.may_fail}")
        for what, size in phase.holds.items():
            print(f"    {what:28}{size / GB:8.2f}")
    print(
        f"\n{found.largest.name} + {ALLOCATOR_SHARE:.0%} for workspaces and gaps + {CONTEXT_BYTES / GB:g} GB for CUDA "
        f"(both assumed): {found.card / GB:.1f} GB\n"
    )
    for size in cards:
        print(f"{size:4g} GB card: {_verdict(config, dtype, found, round(size * USABLE_SHARE * GB))}")


def _verdict(config: TrainingConfig, dtype: "torch.dtype", found: "Estimate", usable: int) -> str:
    from bilora_diffusion.memory.advice import in_gb, remedies
    from bilora_diffusion.memory.estimate import CONTEXT_BYTES

    if found.card <= usable:
        return f"fits, {in_gb(usable - found.card)} GB to spare"
    ways = list(remedies(config, dtype, found, usable - CONTEXT_BYTES))
    fits = bool(ways) and ways[-1][1].card <= usable
    if not ways:
        return "too small"
    flags = " ".join({flag.split()[0]: flag for flag, _ in ways}.values())  # the last of two that say one thing
    return f"too small; with {flags}: {in_gb(ways[-1][1].card)} GB, {'fits' if fits else 'still too small'}"


if __name__ == "__main__":
    sys.exit(main())
