"""The table and the plot, from what was measured."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.speed.contenders import BASELINE

__all__ = ["Ratio", "draw", "ratio_to_baseline", "table"]

ROUND, PLACE, SECONDS, CPU_SECONDS = range(4)
"""What a sample in the file consists of."""
RESAMPLES = 4000
Ratio = tuple[float, float, float]
"""Median, and the ends of its 95 % interval."""


def clock(content: Mapping[str, Any]) -> int:
    """Which time is compared: on a GPU the clock's, on a CPU the process's, which others here disturb less."""
    return SECONDS if content["configuration"]["device"] == "cuda" else CPU_SECONDS


def ratio_to_baseline(content: Mapping[str, Any], name: str) -> Ratio:
    """Time of a step as a share of the baseline's, each sample over the mean of the baseline's before and after it.

    The interval is that of the median over bootstrap resamples of these pairs.
    """
    at = clock(content)
    baseline = {sample[PLACE]: sample[at] for sample in content["contenders"][BASELINE]["samples"]}
    places = np.array(sorted(baseline))
    ratios = []
    for sample in content["contenders"][name]["samples"]:
        after = int(np.searchsorted(places, sample[PLACE]))
        around = places[max(0, after - 1) : after + 1]
        ratios.append(sample[at] / statistics.fmean(baseline[place] for place in around))
    picked = np.random.default_rng(0).choice(ratios, (RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(picked, axis=1), (2.5, 97.5))
    return statistics.median(ratios), float(low), float(high)


def table(contents: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, a section for each measurement."""
    lines = ["# What a step costs", "", "Written by `python -m benchmarks.speed`; the JSON beside it has every sample."]
    for content in contents:
        lines += ["", *_section(content)]
    return "\n".join(lines) + "\n"


def _section(content: Mapping[str, Any]) -> list[str]:
    setting, matmul = content["configuration"], content["matmul"]
    at, on_gpu = clock(content), setting["device"] == "cuda"
    rounds = len({sample[ROUND] for sample in content["contenders"][BASELINE]["samples"]})
    compiles = any(name.endswith(", compiled") for name in content["contenders"])
    unit = "by the clock" if on_gpu else "CPU seconds of the process"
    lines = [
        f"## {setting['model']}, {content['device']}{', with and without --compile' if compiles else ''}",
        "",
        f"{setting['resolution']} px, batch {setting['batch']}, precision {setting['precision']}, rank "
        f"{setting['rank']}{', gradient checkpointing' if setting['checkpointing'] else ''}; {rounds} rounds of one "
        f"step each in a new order, `{BASELINE}` again after every third. Seconds: median, {unit}. Ratio: median over "
        "the pairs of neighbours with its 95 % interval (bootstrap). Outside the UNet: share of a step that is not its "
        "forward or backward pass. Matrix products: the step's products and convolutions a second, as a share of the "
        f"{matmul['flops_per_second'] / 1e12:.3g} TFLOP/s that one of {matmul['size']:,} rows and columns reaches. "
        "Operations: those of torch that compute something, no views; on a GPU each is at least one kernel to launch. "
        "Counted memory: the most that tensors held at once in a step beside the frozen UNet: adapters, what optimiser "
        "and method keep, activations, gradients, and the VAE where it runs.",
    ]
    if not on_gpu:
        pending = "No GPU was at hand: read the ratios, not the seconds; what only a GPU can tell is pending."
        stock = "The stock recipe's optimiser has eight operations a tensor here, on a GPU a few for all of them."
        lines += ["", f"{pending} {stock}"]
    lines += [
        "",
        f"| | s a step | ratio to `{BASELINE}` | outside the UNet | matrix products | operations a step "
        "| counted memory | peak memory | kernels a step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in content["contenders"].items():
        seconds = statistics.median(sample[at] for sample in found["samples"])
        speed = found["flops"] / seconds / matmul["flops_per_second"]
        memory, kernels = found["peak_memory_bytes"], found["kernels"]
        counted = found.get("counted_bytes")  # not in files of before it was counted
        cells = [
            name,
            f"{seconds:.3g}",
            "1" if name == BASELINE else "{:.3f} ({:.3f} to {:.3f})".format(*ratio_to_baseline(content, name)),
            f"{found['outside_unet']:.1%}",
            f"{speed:.0%}",
            f"{found['operations']:,.0f}",
            "-" if counted is None else f"{counted / 2**20:,.1f} MiB",
            "pending" if memory is None else f"{memory / 2**30:.2f} GiB",
            "pending" if kernels is None else f"{kernels:,.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def draw(content: Mapping[str, Any], path: Path) -> None:
    """The ratios with their intervals, the fastest on top."""
    from matplotlib.figure import Figure

    ratios = {name: ratio_to_baseline(content, name) for name in content["contenders"] if name != BASELINE}
    names = sorted(ratios, key=lambda name: ratios[name][0], reverse=True)
    middles, lows, highs = np.array([ratios[name] for name in names]).T
    figure = Figure(figsize=(7, 0.32 * len(names) + 1.3), layout="constrained")
    axis = figure.subplots()
    axis.axvline(1, color="0.6", linewidth=1)
    axis.errorbar(middles, range(len(names)), xerr=(middles - lows, highs - middles), fmt="o", markersize=4, capsize=3)
    for place, middle in enumerate(middles):
        axis.annotate(f"{middle:.2f}", (middle, place), xytext=(0, 5), textcoords="offset points", ha="center", size=7)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(-0.6, len(names) - 0.3)
    setting = content["configuration"]
    title = f"{setting['model']} at {setting['resolution']} px, precision {setting['precision']}, {setting['device']}"
    axis.set(xlabel=f"time of a step / {BASELINE}'s, median and 95 % interval", title=title)
    figure.savefig(path, dpi=150)
