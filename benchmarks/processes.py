"""python -m benchmarks.processes

Trains with one process and with several, each with the same batch, in turn, and says how many pictures a second they
train on together. Writes every step's time to benchmarks/results/processes_DEVICE.json, and processes.md from all such
files.

Each run is the trainer, started by accelerate's launcher: a GPU a process, or on a machine without one as many threads
of the CPU.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.recording import RESULTS, circumstances, rounded
from bilora_diffusion.errors import UserError

__all__ = ["main", "rate", "table"]

ROOT = Path(__file__).parents[1]
WARM_UP = 3
"""Steps that are left out of every run."""


def main(argv: list[str] | None = None) -> None:
    arguments = _parse(argv)
    try:
        if arguments.processes:
            _check(arguments)
            print(_measure(arguments))
    except UserError as error:
        error.tell()
        sys.exit(2)
    path = arguments.folder / "processes.md"
    path.write_text(table([json.loads(one.read_text()) for one in sorted(arguments.folder.glob("processes_*.json"))]))
    print(path)


def _check(arguments: argparse.Namespace) -> None:
    """Raises: UserError: what cannot be measured here, or would tell nothing."""
    import torch

    if arguments.processes < 2:
        raise UserError(f"--processes {arguments.processes}: give 2 or more, they are held against one")
    if arguments.steps <= WARM_UP:
        raise UserError(f"--steps {arguments.steps}: give more than the {WARM_UP} that are left out")
    found = torch.cuda.device_count() if torch.cuda.is_available() else _cores() // arguments.threads
    if found < arguments.processes:
        what = "GPUs are" if torch.cuda.is_available() else f"times {arguments.threads} CPU threads are"
        raise UserError(
            f"--processes {arguments.processes}: only {found} {what} there, and processes that share one measure "
            "nothing; give fewer"
        )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _measure(arguments: argparse.Namespace) -> Path:
    import torch

    on_gpu = torch.cuda.is_available()
    load = None if on_gpu else psutil.getloadavg()[0]
    flags = {
        "pretrained_model_name_or_path": arguments.base,
        "instance_data_dir": arguments.pictures,
        "instance_prompt": "a photo of sks dog",
        "train_batch_size": arguments.batch,
        "max_train_steps": arguments.steps,
        "mixed_precision": "bf16" if on_gpu else "no",
        "center_crop": "true",
        "loss_gap_steps": 0,
        "report_to": "none",
        "seed": 0,
    }
    if arguments.resolution:
        flags["resolution"] = arguments.resolution
    samples = []
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(arguments.repeats):
            for method in arguments.methods:
                for processes in (1, arguments.processes)[:: 1 if repeat % 2 == 0 else -1]:
                    seconds = _run({**flags, "method": method}, processes, Path(folder, "run"), arguments.threads)
                    samples.append({"method": method, "processes": processes, "repeat": repeat, "seconds": seconds})
                    print(
                        f"{method}, {processes}: {rate(samples[-1], arguments.batch):.3g} pictures a second", flush=True
                    )
    content = {
        "configuration": {
            **flags,
            "instance_data_dir": Path(arguments.pictures).name,
            "threads": arguments.threads,
            "cores": _cores(),
            "load_before": load,
        },
        **circumstances(arguments.threads),
        "devices": torch.cuda.device_count(),
        "samples": samples,
    }
    arguments.folder.mkdir(parents=True, exist_ok=True)
    path = arguments.folder / f"processes_{'cuda' if on_gpu else 'cpu'}.json"
    path.write_text(json.dumps(rounded(content)) + "\n")
    return path


def _run(flags: Mapping[str, Any], processes: int, output: Path, threads: int) -> list[float]:
    """Seconds of each step of one run of the trainer, as it noted them."""
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    code, errors = _launch([*words, "--output_dir", str(output), "--overwrite_output_dir"], processes, threads)
    if code:
        told = [line for line in errors.splitlines() if line.startswith("error: ")]
        raise UserError(told[0].removeprefix("error: ") if told else f"a run failed: {errors[-2000:]}")
    started = json.loads((output / "summary.json").read_text())["processes"]
    if started != processes:
        raise UserError(f"the launcher started {started} processes in place of {processes}")
    return [json.loads(line)["seconds"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def _launch(words: Sequence[str], processes: int, threads: int) -> tuple[int, str]:
    """The trainer's exit code and what it wrote to stderr."""
    import torch

    launch = ["-m", "accelerate.commands.accelerate_cli", "launch", "--num_machines", "1", "--main_process_port", "0"]
    launch += ["--num_processes", str(processes), "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--multi_gpu"] if processes > 1 else []  # also on a CPU: `--cpu` would start one
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    if not torch.cuda.is_available():
        environment["ACCELERATE_USE_CPU"] = "true"
    done = subprocess.run(
        [sys.executable, *launch, str(ROOT / "train_dreambooth_bilora.py"), *words],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stderr


def rate(sample: Mapping[str, Any], batch: int) -> float:
    """Pictures a second of all processes together, from the median of the steps after the first."""
    return batch * sample["processes"] / statistics.median(sample["seconds"][WARM_UP:])


def table(contents: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, a section for each measurement."""
    lines = [
        "# Several processes",
        "",
        "Written by `python -m benchmarks.processes`; the JSON beside it has every step.",
    ]
    for content in contents:
        lines += ["", *_section(content)]
    return "\n".join(lines) + "\n"


def _section(content: Mapping[str, Any]) -> list[str]:
    setting, samples = content["configuration"], content["samples"]
    batch, several = setting["train_batch_size"], max(sample["processes"] for sample in samples)
    lines = [
        f"## {setting['pretrained_model_name_or_path']}, {content['device']} a process",
        "",
        f"Batch {batch} a process, precision {setting['mixed_precision']}. Pictures a second: of all processes "
        f"together, the median of the steps but the first {WARM_UP}, then of the runs, their range in brackets. Ratio: "
        f"of runs that followed each other. Ideal is {several} times as many.",
        "",
        f"| | 1 process | {several} processes | ratio | share of ideal | runs |",
        "|---|---|---|---|---|---|",
    ]
    for method in dict.fromkeys(sample["method"] for sample in samples):
        own = [sample for sample in samples if sample["method"] == method]
        one, more = ({s["repeat"]: rate(s, batch) for s in own if s["processes"] == count} for count in (1, several))
        ratios = [more[repeat] / one[repeat] for repeat in one]
        ratio = statistics.median(ratios)
        cells = [method, _spread(one.values()), _spread(more.values()), _spread(ratios), f"{ratio / several:.0%}"]
        lines.append("| " + " | ".join([*cells, str(len(own))]) + " |")
    if setting["load_before"] is not None:
        lines += [
            "",
            f"No GPU was at hand: {setting['cores']} cores of one machine, which the processes share with its memory's "
            f"bandwidth and with whatever else ran (a load of {setting['load_before']:.1f} before the first run). This "
            "says that several processes work, not what several GPUs give.",
        ]
    return lines


def _spread(values: Any) -> str:
    values = sorted(values)
    return f"{statistics.median(values):.3g} ({values[0]:.3g} to {values[-1]:.3g})"


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="0: only the table, from what is there")
    parser.add_argument("--methods", nargs="+", default=["lora", "bilora"], metavar="METHOD")
    parser.add_argument("--repeats", type=int, default=4, help="runs of each method with each number of processes")
    parser.add_argument("--steps", type=int, default=40, help=f"of a run; the first {WARM_UP} are left out")
    parser.add_argument("--batch", type=int, default=2, help="of a process")
    parser.add_argument("--base", default="embedded", help="as --pretrained_model_name_or_path")
    parser.add_argument("--resolution", type=int, help="unset: the base's own")
    parser.add_argument("--pictures", default="bilora_diffusion/embedded/concept", help="a folder")
    parser.add_argument("--threads", type=int, default=1, help="of a process, on a CPU")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the results are written")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
