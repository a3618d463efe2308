"""One base, loaded once, and the LoRA files that were asked for, kept as adapters beside it."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor, nn

from bilora_diffusion.bases import PARTS, Base
from bilora_diffusion.errors import UserError
from bilora_diffusion.generation.forming import forming_picture, predicted_latents
from bilora_diffusion.generation.loras import activate, load_adapter, remove_adapter
from bilora_diffusion.generation.settings import DEFAULT_SCHEDULER, SCHEDULERS, PictureSettings, usual_guidance
from bilora_diffusion.generation.turns import Cancelled
from bilora_diffusion.sampling import sample_pictures, use_sampling_scheduler

__all__ = ["Drawn", "Engine", "Report"]

MOST_ADAPTERS = 8
PREVIEW_SHARE = 0.2
"""Of the time at most: on a large base the previews wait for their turn, on a small one each step has one."""

LoraFile = tuple[Path, str, float]
"""Where it is, what messages call it, and its weight."""


@dataclass(frozen=True)
class Report:
    """Where a request is, after a step.

    Attributes:
        picture: number of the picture that is drawn, from 0.
        step, steps: done and to do for it.
        preview: what the picture would be if the noise still in it went at once, small; None where it was not made.
    """

    picture: int
    step: int
    steps: int
    preview: Image.Image | None = None


@dataclass(frozen=True)
class Drawn:
    """Attributes:
    settings: that draw this very picture again: one picture, its own seed, its size.
    """

    picture: Image.Image
    settings: PictureSettings


class Engine:
    """Draws with one base. Not for two threads at a time: `turns.Turns` says whose turn it is.

    Arguments:
        base: loaded at the first picture, or by `load`.
        device, dtype: unset: a GPU in bfloat16 if there is one, else the CPU in float32.
    """

    def __init__(self, base: Base, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        self.base = base
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = dtype or (torch.float32 if self.device.type == "cpu" else torch.bfloat16)
        self._pipeline: StableDiffusionXLPipeline | None = None
        self._adapters: dict[tuple[Path, int, int], str] = {}  # the longest unused first
        self._loaded = 0
        self._loading = threading.Lock()

    def load(self) -> StableDiffusionXLPipeline:
        """The pipeline, read at the first call.

        Raises:
            UserError: the base cannot be found or read, or the GPU's memory is too small for it.
        """
        with self._loading:
            if self._pipeline is None:
                with _telling_of_memory():
                    self._pipeline = self.base.load(*PARTS, dtype=self.dtype).to(self.device)
                    self._schedule = self._pipeline.scheduler.config
                    self._scheduler = self._pipeline.scheduler
            return self._pipeline

    @property
    def native_resolution(self) -> int:
        """The side in pixels that the base was made for."""
        return self.base.native_resolution()

    @torch.no_grad()
    def draw(
        self,
        settings: PictureSettings,
        loras: Sequence[LoraFile] = (),
        *,
        report: Callable[[Report], None] = lambda report: None,
        previews: bool = False,
        cancelled: threading.Event | None = None,
    ) -> list[Drawn]:
        """The pictures of one request. The same settings give the same bits on a CPU, whatever was drawn before.

        Arguments:
            settings: its `loras` and `base` are not looked at here.
            loras: the files that are on.
            report: called after each step.
            previews: whether reports have them.
            cancelled: looked at before each block of the UNet and the VAE, so also within a step.

        Raises:
            UserError: a LoRA does not fit, or the GPU's memory is too small.
            Cancelled: when `cancelled` is set.
        """
        cancelled = cancelled or threading.Event()
        pipeline = self.load()
        side = self.native_resolution
        guidance = usual_guidance(self.base.name) if settings.guidance_scale is None else settings.guidance_scale
        settings = replace(
            settings, width=settings.width or side, height=settings.height or side, guidance_scale=guidance
        )
        self.use(loras)
        self._use_scheduler(settings.scheduler)
        drawn = []
        models = (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
        with _telling_of_memory(), _interruptible(models, cancelled):
            for number in range(settings.pictures):
                one = replace(settings, seed=(settings.seed + number) % 2**32, pictures=1)
                drawn.append(Drawn(self._draw_one(one, number, report, previews), one))
        return drawn

    def left_out(self, prompt: str) -> str:
        """The end of a prompt that the base does not read, "" if it reads it all."""
        ends = []
        for tokenizer in (self.load().tokenizer, self.load().tokenizer_2):
            tokens = tokenizer(prompt, truncation=False, verbose=False).input_ids
            first = min(tokenizer.model_max_length, len(tokens)) - 1
            pieces = tokenizer.convert_ids_to_tokens(tokens)
            while len(tokens) > tokenizer.model_max_length and first > 1 and not pieces[first - 1].endswith("</w>"):
                first -= 1  # to the beginning of the word
            ends.append(tokenizer.decode(tokens[first:-1], skip_special_tokens=True).strip())
        return max(ends, key=len)

    def check(self, path: Path, name: str) -> None:
        """Whether a file fits the base; it is ready to be used afterwards.

        Raises:
            UserError: which of its layers do not, or what else is wrong with it.
        """
        self.load()
        self._adapter(path, name)

    def _draw_one(
        self, settings: PictureSettings, number: int, report: Callable[[Report], None], previews: bool
    ) -> Image.Image:
        pipeline = self.load()
        clock = _PreviewClock()

        def after_step(step: int, latents: Tensor) -> None:
            preview = None
            if previews and step < settings.steps and clock.is_due():
                with clock:
                    preview = forming_picture(pipeline, forming() if forming() is not None else latents)
            report(Report(number, step, settings.steps, preview))

        with predicted_latents(pipeline.scheduler) as forming:
            return sample_pictures(
                pipeline,
                settings.prompt,
                numbers=(0,),
                seed=settings.seed,
                resolution=(settings.width, settings.height),
                load_vae=lambda: pipeline.vae,
                steps=settings.steps,
                guidance_scale=settings.guidance_scale,
                negative_prompt=settings.negative_prompt or None,
                after_step=after_step,
            )[0]

    def use(self, loras: Sequence[LoraFile]) -> None:
        """Switches to these files, loading those that are new or changed and dropping the longest unused.

        Raises:
            UserError: a file does not fit the base.
        """
        pipeline = self.load()
        models = {part: getattr(pipeline, part) for part in PARTS if part != "vae"}
        weights: dict[str, float] = {}
        try:
            for path, name, weight in loras:
                if weight:
                    adapter = self._adapter(path, name)
                    weights[adapter] = weights.get(adapter, 0.0) + weight
        finally:
            activate(models, weights)  # also when a file was refused: the loader leaves its own order behind
        for key in [key for key, adapter in self._adapters.items() if adapter not in weights]:
            if len(self._adapters) <= MOST_ADAPTERS:
                break
            remove_adapter(models, self._adapters.pop(key))

    def _adapter(self, path: Path, name: str) -> str:
        status = path.stat()
        key = (path, status.st_mtime_ns, status.st_size)
        adapter = self._adapters.pop(key, None)
        if adapter is None:
            self._loaded += 1
            adapter = f"file_{self._loaded}"
            load_adapter(self.load(), path, adapter, name)
            for part in ("unet", "text_encoder", "text_encoder_2"):
                getattr(self.load(), part).to(self.device)
        self._adapters[key] = adapter
        return adapter

    def _use_scheduler(self, name: str) -> None:
        """A scheduler made anew from the base's noise schedule: it keeps nothing of the last picture."""
        pipeline = self.load()
        pipeline.scheduler = self._scheduler.from_config(self._schedule)
        if name == DEFAULT_SCHEDULER:
            use_sampling_scheduler(pipeline)
            return
        if type(self._scheduler).__name__.startswith("EDM"):
            raise UserError(
                f"this base has a noise schedule of its own (EDM): leave the scheduler at {DEFAULT_SCHEDULER}"
            )
        cls, changes = SCHEDULERS[name]
        pipeline.scheduler = getattr(diffusers, cls).from_config(self._schedule, **changes)


@contextmanager
def _interruptible(models: Sequence[nn.Module], cancelled: threading.Event) -> Iterator[None]:
    """Inside, every block of the models asks before it runs whether to go on: a step of SDXL can take a minute."""

    def ask(*_: Any) -> None:
        if cancelled.is_set():
            raise Cancelled

    blocks = {
        block for model in models for one in model.modules() if isinstance(one, nn.ModuleList) for block in one if block
    }
    handles = [block.register_forward_pre_hook(ask) for block in blocks]
    try:
        ask()
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _telling_of_memory() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        raise UserError(
            "the GPU's memory is too small for this: try a smaller size, or end what else uses it"
        ) from error


class _PreviewClock:
    """Lets previews take `PREVIEW_SHARE` of the time at most."""

    def __init__(self) -> None:
        self._ended = time.perf_counter()
        self._took = 0.0

    def is_due(self) -> bool:
        return time.perf_counter() - self._ended >= self._took / PREVIEW_SHARE

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._ended = time.perf_counter()
        self._took = self._ended - self._began
