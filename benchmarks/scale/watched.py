"""python -m benchmarks.scale.watched RESULT.json <flags of the trainer>

The trainer, with a clock on the parts of its start; run in a process of its own, whose peak of memory is its alone.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch

from bilora_diffusion import assembly, run
from bilora_diffusion.cli import main as train
from bilora_diffusion.finishing import peak_memory_bytes
from bilora_diffusion.progress import Progress

__all__ = ["PARTS", "watched"]

PARTS = {
    "reading pictures": (run, "read_pictures"),
    "embedding captions": (assembly, "EmbeddedPrompts"),
    "caching latents": (assembly, "CachedLatents"),
}
"""What of the start can grow with the pictures, and what does it; the rest is the libraries, the base, a step."""


@contextmanager
def watched() -> Iterator[dict[str, Any]]:
    """Inside, a run fills the dictionary: seconds by the clock and of the CPU, bytes at the first step's end."""
    seen: dict[str, Any] = {"parts": {part: {"seconds": 0.0, "cpu_seconds": 0.0} for part in PARTS}}
    began = psutil.Process().create_time()
    add_step = Progress.add_step

    def first_step(progress: Progress, *arguments: Any) -> None:
        if "seconds" not in seen:
            seen["seconds"], seen["cpu_seconds"] = time.time() - began, time.process_time()
            seen["peak_memory_bytes"] = peak_memory_bytes(torch.device("cpu"))
        add_step(progress, *arguments)

    with ExitStack() as stack:
        for part, (module, name) in PARTS.items():
            timed = _timed(getattr(module, name), seen["parts"][part])
            stack.enter_context(mock.patch.object(module, name, timed))
        stack.enter_context(mock.patch.object(Progress, "add_step", first_step))
        yield seen


def _timed(work: Callable[..., Any], spent: dict[str, float]) -> Callable[..., Any]:
    @wraps(work, updated=())
    def timed(*arguments: Any, **named: Any) -> Any:
        began, cpu = time.perf_counter(), time.process_time()
        done = work(*arguments, **named)
        spent["seconds"] += time.perf_counter() - began
        spent["cpu_seconds"] += time.process_time() - cpu
        return done

    return timed


def main(argv: list[str]) -> int:
    with watched() as seen:
        code = train(argv[1:])
    Path(argv[0]).write_text(json.dumps(seen))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
