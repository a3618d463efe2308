"""python -m benchmarks.quality choose | measure | confirm | transfer | rises | stacking | report | paper | dreambench

    choose    trains every candidate of `plan` on seed 0: learning rate and strength are chosen by the loss on the
              validation names at each run's best step
    measure   trains the chosen ones on five other seeds, measures on the test names, draws pictures
    confirm   the same for the methods that README recommends, as the trainer has them by default, on five new seeds
    transfer  trains the controls and what differed from LoRA on other tasks: other styles, a batch of one, more steps,
              and with --subjects_dir DreamBooth's subjects; nothing is chosen there
    rises     how far each perturbation raises the loss of the batch at hand, all at equal norm
    stacking  what a step of several runs costs if they are trained stacked over one base (--stack)
    report    benchmarks/results/quality.md from what is there

    paper       the paper's experiment on real SDXL: trains, draws the paper's prompts, scores them by CLIP
    dreambench  DreamBooth's subjects on real SDXL: trains each, draws DreamBooth's prompts, scores by DINO and CLIP

The last two have flags of their own (`paper --help`) and write into outputs/; docs/benchmarks.md tells of them. Of the
others every run is written when it is done, so that a stopped command goes on with the next one. One process uses one
core: start two with --part 1/2 and --part 2/2 to use two. --stack 8 trains eight in common batches; what that saves on
a --device `stacking` measures. `choose --alone` and `measure --alone` are the table of the methods, without controls,
combinations and what else was tried: three to four hours on two cores.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality import stages
from benchmarks.recording import rounded
from bilora_diffusion.commands import exit_code
from bilora_diffusion.errors import UserError

__all__ = ["main"]

RESULTS = Path(__file__).parent.parent / "results" / "quality"
CONFIRMATION = RESULTS.parent / "confirmation"
RISES = RESULTS.parent / "rises"
TRANSFER = RESULTS.parent / "transfer"
STACKING = RESULTS.parent / "stacking.json"
SPEED = RESULTS.parent / "speed_medium_cpu.json"
SEEDS = (1, 2, 3, 4, 5)
NEW_SEEDS = (6, 7, 8, 9, 10)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a stage. Returns 0; from `stages.main` also other codes."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words and words[0] in stages.STAGES:
        return stages.main(words)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "stage", choices=("choose", "measure", "confirm", "transfer", "rises", "stacking", "report", *stages.STAGES)
    )
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--rates", type=float, nargs="+", help="of `choose`: only these learning rates")
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="of `measure`, `confirm`, `rises` and `transfer`, but for subjects"
    )
    parser.add_argument("--subjects_dir", type=Path, help="of `transfer`: folders of photos, as DreamBooth's")
    parser.add_argument("--classes", nargs="+", default=[], help="of `transfer`: class words, as of `dreambench`")
    parser.add_argument("--tasks", nargs="+", default=[], help="of `transfer`: only these")
    parser.add_argument("--alone", action="store_true", help="of `choose` and `measure`: only each method by itself")
    parser.add_argument("--part", default="1/1", help="which share of the runs, such as 1/2")
    parser.add_argument(
        "--stack", type=int, help="of what trains whole runs: so many at once, over one base (default: 1)"
    )
    parser.add_argument("--device", default="cpu", help="that trains and draws (default: cpu)")
    arguments = parser.parse_args(words)
    RESULTS.mkdir(parents=True, exist_ok=True)
    if arguments.stage == "report":
        return exit_code(_report)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return exit_code(lambda: _run(arguments))


def _report() -> None:
    from benchmarks.quality.report import report

    path = RESULTS.parent / "quality.md"
    path.write_text(report(RESULTS, RISES, STACKING, SPEED, TRANSFER, CONFIRMATION, path.parent))
    print(path)


def _run(arguments: argparse.Namespace) -> None:
    """The stages that train. Imports take seconds: not before the words are known to be right."""
    from benchmarks.quality.files import Run, train_missing
    from benchmarks.quality.laboratory import Laboratory
    from benchmarks.quality.plan import CONFIRMED, LOOKED_AT, TRANSFERRED, candidates
    from benchmarks.quality.results import CHOOSING_SEED, is_alone, measured_ones
    from benchmarks.quality.words import check_device, check_names, part_of

    def laboratory() -> Laboratory:
        return Laboratory(device=arguments.device)

    number, of = part_of(arguments.part)
    check_device(arguments.device)
    if arguments.stack is not None and arguments.stage in ("rises", "stacking"):
        raise UserError(f"--stack: {arguments.stage} has none; leave it out")
    stack = 1 if arguments.stack is None else arguments.stack
    seeds = arguments.seeds or {"confirm": NEW_SEEDS, "transfer": SEEDS[:3]}.get(arguments.stage, SEEDS)
    if arguments.alone and arguments.stage not in ("choose", "measure"):
        raise UserError(f"--alone: {arguments.stage} has none; leave it out")
    measured = measured_ones(RESULTS, alone=arguments.alone)
    planned = {"choose": candidates(), "confirm": CONFIRMED, "rises": LOOKED_AT, "transfer": TRANSFERRED}
    names = list(dict.fromkeys(one.method for one in planned.get(arguments.stage, ()))) or list(measured)
    if not names and arguments.stage != "stacking":
        raise UserError(f"nothing was chosen yet that {arguments.stage} could train: run choose first")
    check_names("--methods", arguments.methods or (), names, f"{arguments.stage} trains no")
    if arguments.rates and arguments.stage != "choose":
        raise UserError(f"--rates: {arguments.stage} has none, the rates are chosen; leave it out")
    rates = sorted({one.learning_rate for one in candidates(arguments.methods)})
    check_names("--rates", map("{:g}".format, arguments.rates or ()), list(map("{:g}".format, rates)), "choose has no")
    if arguments.stage == "stacking":
        from benchmarks.quality.stacking import stacking

        STACKING.write_text(json.dumps(rounded(stacking(laboratory()))) + "\n")
        print(STACKING)
    elif arguments.stage == "transfer":
        from benchmarks.quality.transfer import transfer

        named = [one for one in TRANSFERRED if not arguments.methods or one.method in arguments.methods]
        wanted = {"seeds": seeds, "tasks": arguments.tasks, "part": (number, of)}
        wanted |= {"subjects_dir": arguments.subjects_dir, "classes": arguments.classes}
        transfer(TRANSFER, named, **wanted, stack=stack, device=arguments.device)
    elif arguments.stage == "rises":
        from benchmarks.quality.rises import rises

        named = [one for one in LOOKED_AT if not arguments.methods or one.method in arguments.methods]
        runs = [Run(RISES, one, seed) for seed in seeds for one in named]
        missing = [run for run in runs[number - 1 :: of] if not run.path.exists()]
        one_for_all = laboratory() if missing else None
        for run in missing:
            run.write(rises(one_for_all, run.configuration, run.seed))
            print(run.path, flush=True)
    else:
        folder, measuring = RESULTS, arguments.stage != "choose"
        if arguments.stage == "confirm":
            folder = CONFIRMATION
            named = [one for one in CONFIRMED if not arguments.methods or one.method in arguments.methods]
        elif measuring:
            named = [one for method in arguments.methods or sorted(measured) for one in measured.get(method, [])]
        else:
            seeds = (CHOOSING_SEED,)
            named = [one for one in candidates(arguments.methods) if one.learning_rate in (arguments.rates or rates)]
            named = [one for one in named if not arguments.alone or is_alone(one)]
        runs = [Run(folder, one, seed) for seed in seeds for one in named]
        train_missing(laboratory, runs[number - 1 :: of], stack=stack, all_losses=measuring, finished=measuring)


if __name__ == "__main__":
    sys.exit(main())
