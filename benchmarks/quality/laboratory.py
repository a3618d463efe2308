"""Trains configurations with the trainer itself, alone or stacked, and measures what came out."""

import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.flatness import sharpness
from benchmarks.quality.measures import flat_icons, pictures, rounding
from benchmarks.quality.plan import Configuration
from benchmarks.quality.stacked import Member, stacked
from benchmarks.quality.tasks import Held, Task, solid_icons
from bilora_diffusion.adapters import auxiliary_off
from bilora_diffusion.assembly import Machine, assemble, read_pictures
from bilora_diffusion.bases import PARTS, Base
from bilora_diffusion.batches import Batch, TrainingMicroBatch
from bilora_diffusion.config import TrainingConfig
from bilora_diffusion.data.dreambooth import flatten
from bilora_diffusion.embedded import EMBEDDED
from bilora_diffusion.embedded.icons import Icons, shipped_lists
from bilora_diffusion.finishing import package_versions
from bilora_diffusion.prompts import EmbeddedPrompts
from bilora_diffusion.randomness import generator
from bilora_diffusion.sdxl import encode_images, latents_from, time_ids
from bilora_diffusion.training import Trainer

__all__ = ["BATCH", "Laboratory", "training_config"]

STREAMS = {"validation": 0, "test": 1, "training": 2, "flat": 3}
RANK, ALPHA, BATCH = 4, 8.0, 4
SHARPNESS_DRAWS = 46  # of the training pictures'
OF_THIS_MACHINE = ("instance_data_dir", "output_dir")


def training_config(configuration: Configuration, task: Task, **flags: Any) -> TrainingConfig:
    """What the trainer is told."""
    settings = {
        "pretrained_model_name_or_path": EMBEDDED,
        "instance_data_dir": str(task.folder),
        "method": configuration.method,
        "learning_rate": configuration.learning_rate,
        "rank": RANK,
        "lora_alpha": ALPHA,
        "train_batch_size": BATCH,
        "center_crop": True,
    }
    return TrainingConfig(**settings | flags | dict(task.settings) | configuration.settings)


def rows_of(batch: Batch, rows: slice) -> Batch:
    """Some of its rows; without masks and the base's predictions."""
    names = ("latents", "noise", "timesteps", "conditioning", "weights", "instances")
    return replace(batch, **{name: getattr(batch, name)[rows] for name in names})


class Laboratory:
    """The base, the icons and everything that is the same for all configurations.

    Arguments:
        device: that trains and draws; runs of another device are no pairs of these.
    """

    def __init__(self, task: Task | None = None, device: str = "cpu") -> None:
        self.task = task or solid_icons()
        self.icons, self.lists = Icons.shipped(), shipped_lists()
        self.base = Base(EMBEDDED)
        self.device = torch.device(device)
        self.pipeline = self.base.load(*PARTS).to(self.device)
        self._one_at_a_time = threading.Lock()
        self.evaluations = {name: self._draws(held, STREAMS[name]) for name, held in self.task.held.items()}
        self._drawn_by_base: dict[int, Tensor] = {}

    def _draws(self, held: Held, stream: int) -> list[Batch]:
        """Each picture with its draws, timesteps spread evenly, in batches of 64."""
        pixels = held.pixels.repeat(held.draws, 1, 1, 1)
        captions = list(held.captions) * held.draws
        random = generator(0, "quality", stream)
        moments = encode_images(self.pipeline.vae, pixels)
        latents = latents_from(moments, self.pipeline.vae.config, torch.randn(moments.mean.shape, generator=random))
        noise = torch.randn(latents.shape, generator=random)
        count = len(captions)
        order = torch.randperm(count, generator=random)
        timesteps = ((order + torch.rand(count, generator=random)) / count * 1000).long().clamp_max(999)
        prompts = EmbeddedPrompts(
            sorted(set(captions)),
            (self.pipeline.tokenizer, self.pipeline.tokenizer_2),
            (self.pipeline.text_encoder, self.pipeline.text_encoder_2),
        )
        sizes = time_ids((64, 64), (0, 0), (64, 64)).expand(count, -1)
        given = prompts.conditioning(captions, sizes)
        ones = torch.ones(count, device=self.device)
        latents, noise, timesteps = (tensor.to(self.device) for tensor in (latents, noise, timesteps))
        whole = Batch(latents, noise, timesteps, given.to(self.device), ones, ones)
        return [rows_of(whole, slice(first, first + 64)) for first in range(0, count, 64)]

    def assembled(self, configuration: Configuration, seed: int):
        """The trainer of one run, as the command builds it."""
        config = training_config(configuration, self.task, seed=seed, max_train_steps=self.task.steps)
        machine = Machine(self.device, torch.float32, 0, 1, lambda: None)
        found, _ = read_pictures(config)
        return assemble(config, machine, found, seed=seed, steps_of=lambda _: self.task.steps)

    def circumstances(self, configuration: Configuration, seed: int) -> dict[str, Any]:
        """What a result is read with: every flag that is not the trainer's default, device and versions."""
        config = training_config(configuration, self.task, seed=seed, max_train_steps=self.task.steps)
        flags = {one.name: getattr(config, one.name) for one in fields(config) if one.name not in OF_THIS_MACHINE}
        default = {one.name: one.default for one in fields(config)}
        return {
            "config": {name: value for name, value in flags.items() if value != default[name]},
            "device": str(self.device),
            "versions": package_versions(),
        }

    def drawn(self, parts, step: int) -> list[TrainingMicroBatch]:
        """What a training sees at a step."""
        batch = self.task.settings.get("train_batch_size", BATCH)
        rows = flatten([parts.dataset[draw] for draw in range(step * batch, (step + 1) * batch)])
        return parts.trainer.micro_batches([parts.make_batch(rows)])

    def train(
        self, configuration: Configuration, seed: int, *, all_losses: bool = False, finished: bool = False
    ) -> dict[str, Any]:
        """One run. Losses on the validation pictures where the task says, all losses at the end.

        Arguments:
            all_losses: at each.
            finished: with what is `measured` of the end, and "at_best" of the step of lowest validation loss; of a
                task without icons nothing is.
        """
        return self.train_all([(configuration, seed)], all_losses=all_losses, finished=finished)[0]

    def train_all(
        self,
        runs: Sequence[tuple[Configuration, int]],
        *,
        all_losses: bool = False,
        finished: bool = False,
        done: Callable[[int, dict[str, Any]], None] = lambda number, found: None,
    ) -> list[dict[str, Any]]:
        """Several, stacked over one base; each as if alone, to the rounding of larger batches.

        Arguments:
            done: told each one's number and what came of it as soon as it ends, in its thread, whatever the others do.
        """
        assembled = [self.assembled(configuration, seed) for configuration, seed in runs]

        def run(number: int, member: Member | None = None) -> dict[str, Any]:
            parts, (configuration, seed) = assembled[number], runs[number]
            began = time.perf_counter()
            kept = _Best() if finished and self.task.icons is not None else None
            result = self._trained(parts, configuration, seed, all_losses, member, kept)
            if kept is not None:
                with self._one_at_a_time:  # they share the pipeline that draws
                    result |= self._finished(parts, seed, kept)
            if member is None:
                result["wall_seconds"] = time.perf_counter() - began
            done(number, result)
            return result

        if len(runs) == 1:
            return [run(0)]
        return stacked(self.pipeline.unet, [parts.models["unet"] for parts in assembled], run)

    def _trained(
        self,
        parts,
        configuration: Configuration,
        seed: int,
        all_losses: bool,
        member: Member | None,
        kept: "_Best | None",
    ) -> dict[str, Any]:
        losses, gaps, evaluations, seconds = [], [], {}, 0.0
        for step in range(self.task.steps):
            micro_batches = self.drawn(parts, step)
            if member is not None:
                micro_batches = member.bind(micro_batches)
            if parts.method.perturbs and (step + 1) % 50 == 0:
                gaps.append(self._gap(parts, micro_batches))
            began = time.perf_counter()
            losses.append(parts.trainer.training_step(micro_batches, step).loss)
            seconds += time.perf_counter() - began
            if step + 1 in self.task.evaluated_at:
                whole = all_losses or step + 1 == self.task.steps
                evaluations[step + 1] = self.evaluate(parts, self.evaluations if whole else ("validation",))
                if kept is not None:
                    kept.look(parts.trainer, step + 1, evaluations[step + 1]["validation"])
        if member is not None:
            member.leave()
        return {
            "method": configuration.method,
            "learning_rate": configuration.learning_rate,
            "settings": configuration.settings,
            "resolved": dict(parts.method.settings),
            "key": configuration.key,
            "seed": seed,
            "evaluations": evaluations,
            "loss_gaps": gaps,
            "training_losses": losses,
            "seconds": seconds if member is None else None,  # its own cannot be told from the others'
            **self.circumstances(configuration, seed),
            "singular_share": parts.radius.singular_share if parts.radius else None,
        }

    def _finished(self, parts, seed: int, kept: "_Best") -> dict[str, Any]:
        """Of what would be exported after the last step and, "at_best", after the best if it is another."""
        with parts.trainer.as_exported():
            found = self.measured(parts, seed)
            if kept.step == self.task.steps:
                return found
            with torch.no_grad():  # nothing is done with the last step's from here on
                for own, then in zip(parts.trainer.primary, kept.primary, strict=True):
                    own.copy_(then)
            return found | {"at_best": {"step": kept.step} | self.measured(parts, seed)}

    def measured(self, parts, seed: int) -> dict[str, Any]:
        """Pictures, flatness and robustness of the models as they are."""
        unet = parts.models["unet"].eval()
        of_training = rows_of(self.evaluations["training"][0], slice(SHARPNESS_DRAWS))
        flat = self._flat_of_base(seed)
        return {
            "pictures": pictures(self.pipeline, unet, self.icons, self.task.icons, self.lists, seed, flat),
            "sharpness": sharpness(parts.models, self._bound(parts, [of_training]), RANK),
            "rounded_to_8_bits": rounding(parts.models, lambda: self._loss(parts, "test")),
        }

    def _flat_of_base(self, seed: int) -> Tensor:
        """Drawn once for all runs of a seed."""
        if seed not in self._drawn_by_base:
            self._drawn_by_base[seed] = flat_icons(self.pipeline, self.lists, seed)
        return self._drawn_by_base[seed]

    @torch.no_grad()
    def _gap(self, parts, micro_batches) -> float:
        with parts.method.perturbed(micro_batches):
            perturbed = micro_batches[0].loss()
        with auxiliary_off(parts.models.values()):
            return (perturbed - micro_batches[0].loss()).item()

    def evaluate(self, parts, kinds: Iterable[str]) -> dict[str, float]:
        """The loss of what would be exported, on the fixed draws."""
        unet = parts.models["unet"].eval()
        with parts.trainer.as_exported():
            losses = {name: self._loss(parts, name) for name in kinds}
        unet.train()
        return losses

    @torch.no_grad()
    def _loss(self, parts, name: str) -> float:
        """The mean over the draws of one evaluation."""
        bound = self._bound(parts, self.evaluations[name])
        return (sum(one.loss() * len(one) for one in bound) / sum(map(len, bound))).item()

    def _bound(self, parts, batches: Sequence[Batch]) -> list[TrainingMicroBatch]:
        scaler = torch.amp.GradScaler(self.device.type, enabled=False)
        objective = parts.trainer.objective
        share = 1 / len(batches)
        return [TrainingMicroBatch(batch, parts.models, objective, torch.float32, share, scaler) for batch in batches]


class _Best:
    """The primary adapter as it would have been exported at the step of lowest validation loss so far."""

    def __init__(self) -> None:
        self.step = 0
        self.loss = math.inf
        self.primary: list[Tensor] = []

    def look(self, trainer: Trainer, step: int, loss: float) -> None:
        """Keeps a copy if the loss is lower than before."""
        if loss < self.loss:
            with trainer.as_exported():
                self.step, self.loss = step, loss
                self.primary = [parameter.detach().clone() for parameter in trainer.primary]
