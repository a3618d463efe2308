"""python -m benchmarks.quality choose | measure | rises | stacking | report | paper | dreambench

    choose    trains every candidate of `plan` on seed 0: learning rate and strength are chosen by the loss on the
              validation names at each run's best step
    measure   trains the chosen ones on five other seeds, measures on the test names, draws pictures
    transfer  trains the chosen ones on other tasks: other styles, a batch of one, and with --subjects_dir DreamBooth's
              subjects; nothing is chosen there
    rises     how far each perturbation raises the loss of the batch at hand, all at equal norm
    stacking  what the base's passes would cost a row if several adapters were trained stacked over it
    report    benchmarks/results/quality.md from what is there

    paper       the paper's experiment on real SDXL: trains, draws the paper's prompts, scores them by CLIP
    dreambench  DreamBooth's subjects on real SDXL: trains each, draws DreamBooth's prompts, scores by DINO and CLIP

The last two have flags of their own (`paper --help`) and write into outputs/; docs/benchmarks.md tells of them. Of the
others every run is written when it is done, so that a stopped command goes on with the next one. One process uses one
core: start two with --part 1/2 and --part 2/2 to use two.
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

__all__ = ["main"]

RESULTS = Path(__file__).parent.parent / "results" / "quality"
RISES = RESULTS.parent / "rises"
TRANSFER = RESULTS.parent / "transfer"
STACKING = RESULTS.parent / "stacking.json"
SPEED = RESULTS.parent / "speed_medium_cpu.json"
CHOOSING_SEED = 0
SEEDS = (1, 2, 3, 4, 5)
ASCENTS = ("lora", "bilora", "bilora-echo", "bilora-fresh", "lora-sam", "looksam", "s2-sam", "eflat-lora")
"""Those whose perturbation is a change of the factors, and LoRA for the directions that any method could have."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a stage. Returns 0; from `stages.main` also other codes."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words and words[0] in stages.STAGES:
        return stages.main(words)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "stage", choices=("choose", "measure", "transfer", "rises", "stacking", "report", *stages.STAGES)
    )
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--rates", type=float, nargs="+", help="of `choose`: only these learning rates")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=SEEDS, help="of `measure` and `transfer`, but for subjects"
    )
    parser.add_argument("--subjects_dir", type=Path, help="of `transfer`: folders of photos, as DreamBooth's")
    parser.add_argument("--classes", nargs="+", default=[], help="of `transfer`: class words, as of `dreambench`")
    parser.add_argument("--tasks", nargs="+", default=[], help="of `transfer`: only these")
    parser.add_argument("--part", default="1/1", help="which share of the runs, such as 1/2")
    arguments = parser.parse_args(words)
    RESULTS.mkdir(parents=True, exist_ok=True)
    if arguments.stage == "report":
        from benchmarks.quality.report import report

        path = RESULTS.parent / "quality.md"
        path.write_text(report(RESULTS, RISES, STACKING, SPEED, TRANSFER))
        print(path)
        return 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from benchmarks.quality.laboratory import Laboratory
    from benchmarks.quality.plan import candidates
    from benchmarks.quality.report import chosen
    from benchmarks.quality.rises import rises

    if arguments.stage == "stacking":
        from benchmarks.quality.stacking import stacking

        STACKING.write_text(json.dumps(rounded(stacking(Laboratory()))) + "\n")
        print(STACKING)
        return 0
    number, of = map(int, arguments.part.split("/"))
    if arguments.stage == "transfer":
        from benchmarks.quality.transfer import METHODS, transfer

        best = chosen(RESULTS)
        wanted = {"methods": arguments.methods or [one for one in METHODS if one in best]}
        wanted |= {"seeds": arguments.seeds, "tasks": arguments.tasks, "part": (number, of)}
        wanted |= {"subjects_dir": arguments.subjects_dir, "classes": arguments.classes}
        return exit_code(lambda: transfer(TRANSFER, best, **wanted))
    folder = RISES if arguments.stage == "rises" else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.stage == "choose":
        runs = [(one, CHOOSING_SEED, False) for one in candidates(arguments.methods)]
        runs = [run for run in runs if not arguments.rates or run[0].learning_rate in arguments.rates]
    else:
        best = chosen(RESULTS)
        methods = arguments.methods or (ASCENTS if arguments.stage == "rises" else sorted(best))
        runs = [(best[method], seed, True) for seed in arguments.seeds for method in methods if method in best]
    laboratory = None
    for configuration, seed, finished in runs[number - 1 :: of]:
        path = folder / f"{configuration.slug}-seed{seed}.json"
        if path.exists():
            continue
        laboratory = laboratory or Laboratory()
        if arguments.stage == "rises":
            path.write_text(json.dumps(rounded(rises(laboratory, configuration, seed))) + "\n")
            print(path, flush=True)
            continue
        found = laboratory.train(configuration, seed, all_losses=finished, finished=finished)
        path.write_text(json.dumps(rounded(found)) + "\n")
        last = found["evaluations"][max(found["evaluations"])]
        print(f"seed {seed}: {configuration}: " + ", ".join(f"{k} {v:.4f}" for k, v in last.items()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
