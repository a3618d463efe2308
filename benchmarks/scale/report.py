"""The table, from what was measured."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

__all__ = ["parts_seconds", "peak_memory", "slope", "table"]

WARM_UP = 2
"""Steps that are left out of the median."""


def slope(samples: Sequence[Mapping[str, Any]], number: Callable[[Mapping[str, Any]], float]) -> float:
    """What a picture adds to a number of the samples: the line of least squares through their counts."""
    return float(np.polyfit([one["pictures"] for one in samples], [number(one) for one in samples], 1)[0])


def parts_seconds(sample: Mapping[str, Any]) -> float:
    """CPU seconds of the parts of the start that can grow with the pictures."""
    return sum(part["cpu_seconds"] for part in sample["parts"].values())


def peak_memory(sample: Mapping[str, Any]) -> float:
    return sample["peak_memory_bytes"]


def table(contents: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, a section for each measurement."""
    lines = [
        "# From five pictures to thousands",
        "",
        "Written by `python -m benchmarks.scale`; the JSON beside it has every sample.",
    ]
    for content in contents:
        lines += ["", *_section(content)]
    return "\n".join(lines) + "\n"


def _section(content: Mapping[str, Any]) -> list[str]:
    setting, samples = content["configuration"], content["samples"]
    parts = list(samples[0]["parts"])
    lines = [
        f"## {setting['pretrained_model_name_or_path']} at {setting['resolution']} px, {content['device']}",
        "",
        f"JPEGs of {setting['side']} px, each with a caption of its own. Until the first step: seconds by the clock "
        "from the start of Python to that step's end, CPU seconds of the process in brackets; then CPU seconds of the "
        "parts. Memory: the peak of the process up to there, and what it is above the smallest folder's. A step: "
        f"median by the clock, the first {WARM_UP} left out. Other work on the machine (its load before the first run: "
        f"{setting['load_before']:.1f}) lengthens what the clock says, and hardly the CPU seconds.",
        "",
        f"| latents | pictures | until the first step | {' | '.join(parts)} | the rest | memory | above | a step |",
        "|---" * (7 + len(parts)) + "|",
    ]
    for kind in setting["flags"]:
        own = [sample for sample in samples if sample["kind"] == kind]
        smallest = min(own, key=lambda sample: sample["pictures"])
        for sample in own:
            spent = [sample["parts"][part]["cpu_seconds"] for part in parts]
            cells = [
                kind,
                f"{sample['pictures']:,}",
                f"{sample['seconds']:.1f} s ({sample['cpu_seconds']:.1f})",
                *(f"{seconds:.2f}" for seconds in spent),
                f"{sample['cpu_seconds'] - parts_seconds(sample):.1f}",
                f"{peak_memory(sample) / 1e6:,.0f} MB",
                f"{(peak_memory(sample) - peak_memory(smallest)) / 1e6:+,.0f} MB",
                f"{statistics.median(sample['steps'][WARM_UP:]) * 1000:.0f} ms",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return lines if len({sample["pictures"] for sample in samples}) == 1 else lines + _growth(setting["flags"], samples)


def _growth(kinds: Iterable[str], samples: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "",
        "What a picture adds: CPU time of the three parts and memory, by least squares; and that time from each folder "
        "to the next, which would grow if more pictures made each one slower.",
        "",
        "| latents | CPU time | memory | CPU time from folder to folder |",
        "|---|---|---|---|",
    ]
    for kind in kinds:
        own = sorted((sample for sample in samples if sample["kind"] == kind), key=lambda sample: sample["pictures"])
        between = ", ".join(f"{slope(pair, parts_seconds) * 1000:.1f} ms" for pair in pairwise(own))
        time, memory = slope(own, parts_seconds), slope(own, peak_memory)
        lines.append(f"| {kind} | {time * 1000:.1f} ms | {memory / 1e3:.1f} kB | {between} |")
    return lines
