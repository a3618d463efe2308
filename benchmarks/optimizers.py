"""python -m benchmarks.optimizers

Measures what an update of SDXL's LoRA costs once its gradients are there (norm, clip, AdamW, gradients cleared), with
torch's optimiser in its forms and over one flat buffer, in turn. Writes every sample to
benchmarks/results/optimizers_DEVICE.json, and optimizers.md from all such files.

The tensors have the shapes of the trainer's default adapters on SDXL's UNet, once (LoRA) and twice (Bi-LoRA), and
random values. Takes a minute or two on one thread of a CPU.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.recording import RESULTS, circumstances, rounded
from bilora_diffusion.adapters import PRIMARY, UNET, add_adapter, parameters_of
from bilora_diffusion.bases import Base
from bilora_diffusion.bases.single_file import SDXL_CONFIG
from bilora_diffusion.memory.parts import build_part
from bilora_diffusion.memory.simulation import META

__all__ = ["FORMS", "Update", "lora_shapes", "main", "table"]

CLIP, RATE = 1.0, 1e-4
WARM_UP = 2
USED = "fused"
"""What the trainer has."""


def main(argv: list[str] | None = None) -> None:
    arguments = _parse(argv)
    if arguments.rounds:
        print(_measure(arguments))
    path = arguments.folder / "optimizers.md"
    measured = [json.loads(one.read_text()) for one in sorted(arguments.folder.glob("optimizers_*.json"))]
    path.write_text(table(measured, _step_seconds(arguments.folder)))
    print(path)


class Update:
    """Adapters with an optimiser for each, all that an update changes.

    Arguments:
        adapters: the factors' values, copied.
        options: of `torch.optim.AdamW`.

    Attributes:
        parameters: of each adapter.
    """

    def __init__(self, adapters: Sequence[Sequence[Tensor]], **options: Any) -> None:
        self.parameters = [[nn.Parameter(value.clone()) for value in adapter] for adapter in adapters]
        self.optimizers = [
            torch.optim.AdamW(parameters, lr=RATE, maximize=number == 1, **options)  # the second ascends
            for number, parameters in enumerate(self.parameters)
        ]

    def receive(self, gradients: Sequence[Sequence[Tensor]]) -> None:
        """What a backward pass leaves behind; it makes new tensors where there are none."""
        for parameters, values in zip(self.parameters, gradients, strict=True):
            for parameter, value in zip(parameters, values, strict=True):
                parameter.grad = value

    def __call__(self) -> None:
        """As `Trainer.begin_step` does it: the norm of all, the clip of the first adapter's."""
        grads = [parameter.grad for parameters in self.parameters for parameter in parameters]
        norms = torch.stack(torch._foreach_norm(grads))
        torch.linalg.vector_norm(norms)  # tells whether one is not finite
        of_first = torch.linalg.vector_norm(norms[: len(self.parameters[0])])
        torch.nn.utils.clip_grads_with_norm_(self.parameters[0], CLIP, of_first)
        for optimizer in self.optimizers:
            optimizer.step()
        for parameters in self.parameters:
            for parameter in parameters:
                parameter.grad = None


class FlatUpdate(Update):
    """Each adapter's factors, and their gradients, are views of one tensor, which one fused step changes.

    The gradients stay and are added to: the backward pass adds each into its place, where it would hand it over.
    """

    def __init__(self, adapters: Sequence[Sequence[Tensor]]) -> None:
        self.flat = [nn.Parameter(torch.cat([value.flatten() for value in adapter])) for adapter in adapters]
        self.parameters, self.views = [], []
        for whole, adapter in zip(self.flat, adapters, strict=True):
            whole.grad = torch.zeros_like(whole)
            self.parameters.append([nn.Parameter(view) for view in _views(whole.detach(), adapter)])
            self.views.append(_views(whole.grad, adapter))
        self.optimizers = [
            torch.optim.AdamW([whole], lr=RATE, maximize=number == 1, fused=True)
            for number, whole in enumerate(self.flat)
        ]

    def receive(self, gradients: Sequence[Sequence[Tensor]]) -> None:
        for views, values in zip(self.views, gradients, strict=True):
            for view, value in zip(views, values, strict=True):
                view.add_(value)

    def __call__(self) -> None:
        norms = torch.stack([torch.linalg.vector_norm(whole.grad) for whole in self.flat])
        torch.linalg.vector_norm(norms)
        torch.nn.utils.clip_grads_with_norm_(self.flat[:1], CLIP, norms[0])
        for optimizer in self.optimizers:
            optimizer.step()
        for whole in self.flat:
            whole.grad.zero_()


FORMS: dict[str, Callable[[Sequence[Sequence[Tensor]]], Update]] = {
    "default": lambda adapters: Update(adapters),
    "foreach": lambda adapters: Update(adapters, foreach=True),
    "fused": lambda adapters: Update(adapters, fused=True),
    "flat buffer": FlatUpdate,
}


def _views(whole: Tensor, like: Iterable[Tensor]) -> list[Tensor]:
    pieces = whole.split([value.numel() for value in like])
    return [piece.view_as(value) for piece, value in zip(pieces, like, strict=True)]


def lora_shapes(config: Mapping[str, Any], rank: int) -> list[torch.Size]:
    """Of the factors of the trainer's default adapter, (rank, in) and (out, rank) in turn.

    Arguments:
        config: a UNet's config.json.
    """
    unet = build_part(UNET, dict(config), torch.float32)
    with META:
        add_adapter(UNET, unet, PRIMARY, rank=rank, scale=1.0, init="gaussian", seed=0)
    return [parameter.shape for parameter in parameters_of(unet, PRIMARY).values()]


def _measure(arguments: argparse.Namespace) -> Path:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(arguments.threads)
    shapes = lora_shapes(_unet_config(arguments.base), arguments.rank)
    draw = torch.Generator().manual_seed(0)
    samples = []
    for count in (1, 2):
        values, gradients = (
            [[torch.randn(shape, generator=draw).to(device) / 100 for shape in shapes] for _ in range(count)]
            for _ in range(2)
        )
        updates = {name: form(values) for name, form in FORMS.items()}
        order = random.Random(0)
        for number in range(-WARM_UP, arguments.rounds):
            names = list(updates)
            order.shuffle(names)
            for name in names:
                taken = _sample(updates[name], gradients, device)
                if number >= 0:
                    samples.append([count, name, number, *taken])
        print(f"{count} adapter{'s' if count > 1 else ''}: done", flush=True)
    content = {
        "configuration": {
            "base": arguments.base,
            "rank": arguments.rank,
            "tensors": len(shapes),
            "entries": sum(shape.numel() for shape in shapes),
            "device": device.type,
            "threads": torch.get_num_threads(),
            "rounds": arguments.rounds,
        },
        **circumstances(torch.get_num_threads()),
        "sample": ["adapters", "form", "round", "update_seconds", "update_host_seconds", "arrival_seconds"],
        "samples": samples,
    }
    arguments.folder.mkdir(parents=True, exist_ok=True)
    path = arguments.folder / f"optimizers_{device.type}.json"
    path.write_text(json.dumps(rounded(content)) + "\n")
    return path


def _unet_config(base: str) -> Mapping[str, Any]:
    if base == "sdxl":
        return json.loads((SDXL_CONFIG / "unet" / "config.json").read_text())
    return Base(base).configurations("unet")["unet"]


def _sample(update: Update, gradients: list[list[Tensor]], device: torch.device) -> tuple[float, float, float]:
    """Seconds of an update, of the host alone until it has asked for all of it, and of the gradients' arrival.

    On a CPU those of the process, where the first two are one.
    """
    fresh = [[value.clone() for value in adapter] for adapter in gradients]  # a clip changes them
    on_gpu = device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time

    def timed(work: Callable[[], object]) -> tuple[float, float]:
        if on_gpu:
            torch.cuda.synchronize()
        began = clock()
        work()
        asked = clock() - began
        if on_gpu:
            torch.cuda.synchronize()
        return clock() - began, asked

    arrival, _ = timed(lambda: update.receive(fresh))
    return *timed(update), arrival


def _step_seconds(folder: Path) -> dict[str, tuple[str, float]]:
    """By device: the name of the speed benchmark's file of SDXL at full size, and the median of `lora`'s step in it."""
    found = {}
    for path in sorted(folder.glob("speed_sdxl_*.json")):
        content = json.loads(path.read_text())
        device = content["configuration"]["device"]
        at = content["sample"].index("seconds" if device == "cuda" else "cpu_seconds")
        lora = content["contenders"]["lora"]["samples"]
        found.setdefault(device, (path.name, statistics.median(sample[at] for sample in lora)))
    return found


def table(contents: Sequence[Mapping[str, Any]], step_seconds: Mapping[str, tuple[str, float]]) -> str:
    """Markdown, a section for each measurement.

    Arguments:
        step_seconds: by device, a file and the seconds of a whole step in it.
    """
    lines = [
        "# What an update costs",
        "",
        "Written by `python -m benchmarks.optimizers`; the JSON beside it has every sample.",
    ]
    for content in contents:
        lines += ["", *_section(content, step_seconds.get(content["configuration"]["device"]))]
    return "\n".join(lines) + "\n"


def _section(content: Mapping[str, Any], step: tuple[str, float] | None) -> list[str]:
    setting = content["configuration"]
    on_gpu = setting["device"] == "cuda"
    lines = [
        f"## {setting['base']}, {content['device']}",
        "",
        f"The {setting['tensors']:,} tensors ({setting['entries'] / 1e6:.3g} million entries) of a LoRA of rank "
        f"{setting['rank']}; with two adapters as many again, which ascend. An update: norm of all gradients, clip of "
        "the first adapter's, AdamW, gradients cleared. Milliseconds, "
        f"{'by the clock, the device waited for' if on_gpu else 'CPU time of the process'}: median of "
        f"{setting['rounds']} rounds in a new order, quartiles in brackets. Ratio to `{USED}`, which the trainer uses: "
        "median over the rounds. Arrival: the backward pass hands each gradient over, and with a flat buffer adds it "
        "into its place.",
    ]
    if step is not None:
        lines[-1] += (
            f" Share of a step: of {step[1]:.3g} s, `lora`'s in {step[0]}; update and arrival, less the forms' least "
            "arrival."
        )
    if not on_gpu:
        lines += ["", "No GPU was at hand: what the host takes there to ask for an update is pending."]
    cells = ["", "an update", f"ratio to `{USED}`", "arrival"]
    cells += ["asked for by the host"] if on_gpu else []
    cells += ["share of a step"] if step is not None else []
    for count in dict.fromkeys(sample[0] for sample in content["samples"]):
        own = [sample for sample in content["samples"] if sample[0] == count]
        lines += ["", f"{count} adapter{'s' if count > 1 else ''}:", ""]
        lines += ["| " + " | ".join(cells) + " |", "|" + "---|" * len(cells)]
        by_form = {name: [sample[2:] for sample in own if sample[1] == name] for name in FORMS}
        reference = {number: seconds for number, seconds, *_ in by_form[USED]}
        least = min(statistics.median(sample[3] for sample in samples) for samples in by_form.values())
        for name, samples in by_form.items():
            updates, hosts, arrivals = ([sample[at] for sample in samples] for at in (1, 2, 3))
            row = [name, _spread(updates)]
            row.append(f"{statistics.median(seconds / reference[number] for number, seconds, *_ in samples):.2f}")
            row.append(_spread(arrivals))
            row += [_spread(hosts)] if on_gpu else []
            if step is not None:
                whole = statistics.median(updates) + statistics.median(arrivals) - least
                row.append(f"{whole / step[1]:.2%}")
            lines.append("| " + " | ".join(row) + " |")
    return lines


def _spread(seconds: Sequence[float]) -> str:
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return f"{1e3 * middle:.3g} ({1e3 * low:.3g} to {1e3 * high:.3g})"


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="0: only the table, from what is there")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--base", default="sdxl", help="whose UNet's layers: sdxl, embedded or tiny-random")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the results are written")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
