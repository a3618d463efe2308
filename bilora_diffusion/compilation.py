"""--compile: the transformer blocks by torch.compile, in the passes of the training steps.

By region: SDXL's 70 blocks are one class in two widths, so that each program is made once and shared by all blocks it
fits. Their attributes are guarded, not burnt in: a program is made anew where one of them is another (what has a
gradient, which adapters are on, autocast), once for each combination, and kept.

Previews, the loss gap and the files' verification compute the blocks as they are written: they are seldom run, and the
programs for them (other shapes, no gradient, the auxiliary off) would take longer to make than they save.

`nn.Module.compile` changes neither the modules' classes nor their names.
"""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._dynamo.config
import torch._inductor.config
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from bilora_diffusion.errors import UserError

__all__ = ["CompilerError", "check_compiler", "compile_blocks", "reason", "uncompiled"]

CompilerError = TorchDynamoException
BACKEND = "inductor"
NEEDED = {
    "cpu": "install a C++ compiler (Linux: g++; macOS: xcode-select --install; Windows: Visual Studio's build tools)",
    "cuda": "install Triton (on Linux torch brings it; on Windows: pip install triton-windows) and a C compiler",
}
TEXT_BLOCKS = ("CLIPEncoderLayer",)
PROGRAMS = 64
"""The most that are kept. torch's 8 would do for lora: a block's width and whether its input has a gradient make three;
bilora-fresh's passes and the rows of a prior multiply them. Past it, torch would quietly go on uncompiled."""


def check_compiler(device: torch.device) -> None:
    """Compiles something small, without the cache, so that what is missing shows before anything is loaded.

    Raises:
        UserError: there is no working compiler.
    """
    with torch._inductor.config.patch(force_disable_caches=True):
        try:
            torch.compile(lambda x: x * 2 + 1, backend=BACKEND)(torch.ones(8, device=device))
        except Exception as error:  # whatever a library, a compiler or a linker may find
            mend = NEEDED.get(device.type, "this device may not be supported")
            raise UserError(
                f"--compile: torch.compile does not work here ({reason(error)}): {mend}, or leave --compile out"
            ) from error


def reason(error: Exception) -> str:
    """The first line of what the compiler says, which is long."""
    return next((line.strip()[:200] for line in str(error).splitlines() if line.strip()), type(error).__name__)


def compile_blocks(models: Iterable[nn.Module], *, shapes_vary: bool) -> None:
    """Lets the repeated blocks of all models be compiled when they are first run.

    Arguments:
        models: the trained parts, all adapters attached.
        shapes_vary: the latents have several shapes (aspect-ratio buckets): programs for any shape, somewhat slower.
    """
    torch._dynamo.config.recompile_limit = max(PROGRAMS, torch._dynamo.config.recompile_limit)
    # torch's own random numbers, so that dropout drops what it drops without --compile.
    options = {"fallback_random": True} if BACKEND == "inductor" else None
    for model in models:
        for block in _blocks(model):
            block.compile(backend=BACKEND, dynamic=shapes_vary, options=options)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Inside, compiled blocks compute as they are written, and no program is made; in all threads.

    torch's stance is one for all of them, and whoever leaves it restores what he found: of two threads that overlap the
    second would restore the first one's. So the first that enters changes it, and the last that leaves restores it.
    """
    with _inside.lock:
        if _inside.count == 0:
            _inside.stance = torch.compiler.set_stance("force_eager")
        _inside.count += 1
    try:
        yield
    finally:
        with _inside.lock:
            _inside.count -= 1
            if _inside.count == 0:
                _inside.stance.__exit__(None, None, None)


class _Inside:
    """Who is inside of `uncompiled`."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.count = 0
        self.stance: Any = None


_inside = _Inside()


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """What diffusers compiles by region, in a text encoder its layers."""
    names = getattr(model, "_repeated_blocks", None) or TEXT_BLOCKS
    return (module for module in model.modules() if type(module).__name__ in names)
