"""python -m benchmarks.speed --model tiny | medium | sdxl

Measures what a training step costs with every method and with the recipe of diffusers' script, all in one process and
in turn, so that a busy machine hits all alike. Writes benchmarks/results/speed_MODEL_DEVICE.json and .png, with what is
not usual in the name, and speed.md from all such files.

tiny and medium (SDXL's blocks, 3 and 59 million parameters) run anywhere and give ratios. sdxl is SDXL's own UNet at
1024 px with random weights; it needs a CUDA GPU. With --resolution it runs on a CPU, too: 256 takes 13 GB of memory and
about an hour, 1024 with --precision bf16 as much, for a few rows (--only). Of sdxl the rows are measured that tell
most; --all measures all.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.recording import RESULTS, circumstances, rounded
from bilora_diffusion.errors import UserError

__all__ = ["main"]

MINUTES = {"tiny": 1.5, "medium": 3.5, "sdxl": 40.0}
"""Of the rounds; with what comes before them tiny and medium stay under five minutes."""
MINUTES_OF_SDXL_ON_A_GPU = 1.7
"""With what comes before the rounds; one that has begun is finished."""
FEWEST_ROUNDS = 3


def main(argv: list[str] | None = None) -> None:
    arguments = _parse(argv)
    if arguments.model is None:
        print(*report(arguments.folder), sep="\n")
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    from benchmarks.speed.bases import RESOLUTIONS, SharedBase
    from benchmarks.speed.contenders import FULL_SIZE, RANK, Setting, specifications, write_pictures
    from benchmarks.speed.measuring import as_json, in_rounds, matmul_flops_per_second, prepare

    try:
        if arguments.model == "sdxl" and not (arguments.resolution or torch.cuda.is_available()):
            raise UserError(
                "--model sdxl at 1024 px needs a CUDA GPU, and none is visible: on a CPU --model medium measures the "
                "ratios in five minutes, --model sdxl --resolution 256 in about an hour"
            )
        names = FULL_SIZE if arguments.model == "sdxl" and not arguments.all else None
        wanted = list(specifications(arguments.only or names, compiled=arguments.compile))
    except UserError as error:
        error.tell()
        sys.exit(2)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    minutes = MINUTES[arguments.model] if arguments.minutes is None else arguments.minutes
    in_all = arguments.model == "sdxl" and device.type == "cuda" and arguments.minutes is None
    if in_all:
        minutes = MINUTES_OF_SDXL_ON_A_GPU
    if device.type == "cpu":
        torch.set_num_threads(arguments.threads)
    usual = "bf16" if device.type == "cuda" else "no"
    precision = arguments.precision or usual
    dtype = {"no": torch.float32, "bf16": torch.bfloat16}[precision]
    began = time.perf_counter()

    def say(what: str) -> None:
        if not arguments.quiet:
            print(f"{time.perf_counter() - began:4.0f} s  {what}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        resolution = arguments.resolution or RESOLUTIONS[arguments.model]
        pictures = Path(folder, "pictures")
        pictures.mkdir()
        write_pictures(pictures, resolution)
        latents = Path(folder, "latents") if arguments.model == "sdxl" else None  # a CPU takes minutes to encode them
        base = SharedBase.build(arguments.model, device, dtype)
        setting = Setting(base, device, dtype, resolution, arguments.batch, arguments.checkpointing, pictures, latents)
        runners, facts = prepare(wanted, setting, say)
        matmul = matmul_flops_per_second(device, dtype)
        started = began if in_all else time.perf_counter()

        def enough(rounds: int) -> bool:
            return rounds >= FEWEST_ROUNDS and time.perf_counter() - started > 60 * minutes

        in_rounds(runners, enough, say)
    content = {
        "configuration": {
            "model": arguments.model,
            "unet_parameters": sum(p.numel() for p in base.pipeline.unet.parameters()),
            "resolution": resolution,
            "batch": arguments.batch,
            "precision": precision,
            "rank": RANK,
            "checkpointing": arguments.checkpointing,
            "device": device.type,
            "threads": torch.get_num_threads(),
            "minutes": minutes,
            "flags": {one.name: one.flags for one in wanted},
        },
        **circumstances(torch.get_num_threads()),
        "matmul": matmul,
        "sample": ["round", "place", "seconds", "cpu_seconds"],
        "contenders": as_json(runners, facts),
    }
    arguments.folder.mkdir(parents=True, exist_ok=True)
    special = {
        f"{resolution}px": resolution != RESOLUTIONS[arguments.model],
        f"batch{arguments.batch}": arguments.batch != 1,
        precision: precision != usual,
        "checkpointing": arguments.checkpointing,
        "compiled": arguments.compile,
    }
    name = "_".join(["speed", arguments.model, device.type, *(word for word, is_so in special.items() if is_so)])
    path = arguments.folder / f"{name}.json"
    path.write_text(json.dumps(rounded(content)) + "\n")
    print(path, *report(arguments.folder), sep="\n")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", choices=tuple(MINUTES), help="left out: only the table and the pictures, from what is there"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these rows of the table, and lora")
    parser.add_argument("--all", action="store_true", help="with sdxl, too; unset: the rows that tell most")
    parser.add_argument("--minutes", type=float, help="of the rounds; at least three are made")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--resolution", type=int, help="side of the pictures in pixels, a multiple of 32")
    parser.add_argument("--precision", choices=("no", "bf16"), help="unset: bf16 on a GPU, no on a CPU")
    parser.add_argument("--checkpointing", action="store_true", help="with gradient checkpointing")
    parser.add_argument("--compile", action="store_true", help="each method also with the trainer's --compile")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the results are written")
    parser.add_argument("--quiet", action="store_true")
    return parser.parse_args(argv)


def report(folder: Path) -> list[Path]:
    """speed.md from all measurements in a folder, and a picture of each."""
    from benchmarks.speed.report import draw, table

    measured = {path: json.loads(path.read_text()) for path in sorted(folder.glob("speed_*.json"))}
    pictures = [path.with_suffix(".png") for path in measured]
    for content, picture in zip(measured.values(), pictures, strict=True):
        draw(content, picture)
    path = folder / "speed.md"
    path.write_text(table(list(measured.values())))
    return [path, *pictures]


if __name__ == "__main__":
    main()
