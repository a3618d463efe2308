"""python -m benchmarks.scale

Trains on folders of 5, 50, 500 and 5,000 pictures for a few steps each, with latents in memory, on disk, found there
again, and not kept at all, every run the trainer in a process of its own. Writes how long the first step takes to come,
the peak of memory and the time of a step to benchmarks/results/scale_DEVICE.json, and scale.md from all such files.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.recording import RESULTS, circumstances, rounded
from benchmarks.scale.pictures import write_pictures
from benchmarks.scale.report import table

__all__ = ["KINDS", "main"]

KINDS: dict[str, dict[str, str]] = {
    "in memory": {"center_crop": "true"},
    "on disk": {"center_crop": "true", "cache_dir_latents": "LATENTS"},
    "found on disk": {"center_crop": "true", "cache_dir_latents": "LATENTS"},
    "not kept": {"center_crop": "true", "cache_latents": "false"},
}
"""Where the latents are, and the flags for that; the third finds what the second made."""
ROOT = Path(__file__).parents[2]


def main(argv: list[str] | None = None) -> None:
    arguments = _parse(argv)
    if arguments.pictures:
        print(_measure(arguments))
    measured = [json.loads(path.read_text()) for path in sorted(arguments.folder.glob("scale_*.json"))]
    path = arguments.folder / "scale.md"
    path.write_text(table(measured))
    print(path)


def _measure(arguments: argparse.Namespace) -> Path:
    import torch

    began, load = time.perf_counter(), psutil.getloadavg()[0]
    flags = {
        "pretrained_model_name_or_path": arguments.base,
        "instance_prompt": "a sks picture",
        "resolution": arguments.resolution,
        "max_train_steps": arguments.steps,
        "loss_gap_steps": 0,
        "report_to": "none",
        "seed": 0,
    }
    samples = []
    with tempfile.TemporaryDirectory() as folder:
        for count in arguments.pictures:
            pictures = Path(folder, f"pictures-{count}")
            write_pictures(pictures, count, arguments.side)
            for kind, more in KINDS.items():
                given = {
                    name: f"{folder}/latents-{count}" if word == "LATENTS" else word for name, word in more.items()
                }
                seen = _run({**flags, **given, "instance_data_dir": pictures}, Path(folder, "run"), arguments.threads)
                samples.append({"kind": kind, "pictures": count, **seen})
                print(f"{time.perf_counter() - began:4.0f} s  {count} pictures, latents {kind}", flush=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    content = {
        "configuration": {
            **flags,
            "side": arguments.side,
            "threads": arguments.threads,
            "load_before": load,
            "flags": KINDS,
        },
        **circumstances(arguments.threads),
        "samples": samples,
    }
    arguments.folder.mkdir(parents=True, exist_ok=True)
    path = arguments.folder / f"scale_{device}.json"
    path.write_text(json.dumps(rounded(content)) + "\n")
    return path


def _run(flags: dict[str, Any], output: Path, threads: int) -> dict[str, Any]:
    """One run of the trainer: what `watched` saw of it, and the time of each step."""
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    words += ["--output_dir", str(output), "--overwrite_output_dir"]
    result = output.with_name("watched.json")
    code, errors = _start([str(result), *words], threads)
    if code:
        raise RuntimeError(f"the trainer ended with {code}: {errors[-2000:]}")
    steps = [json.loads(line)["seconds"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {**json.loads(result.read_text()), "steps": steps}


def _start(words: Sequence[str], threads: int) -> tuple[int, str]:
    """The exit code of the watched trainer, and what it wrote to stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scale.watched", *words],
        env=os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stderr


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pictures",
        nargs="*",
        type=int,
        default=[5, 50, 500, 5000],
        metavar="N",
        help="in each folder; none: only the table, from what is there",
    )
    parser.add_argument("--base", default="tiny-random", help="as --pretrained_model_name_or_path")
    parser.add_argument("--side", type=int, default=512, help="of the pictures in px")
    parser.add_argument("--resolution", type=int, default=128, help="that they are trained at")
    parser.add_argument("--steps", type=int, default=12, help="of each run")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the results are written")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
