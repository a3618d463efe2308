"""A whole run: from a configuration to a LoRA file that was loaded again and found equal."""

import errno
import logging
import multiprocessing
import os
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, broadcast_object_list
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from bilora_diffusion.adapters import AUXILIARY, auxiliary_off
from bilora_diffusion.assembly import Machine, Parts, assemble, read_pictures, steps_in_epoch
from bilora_diffusion.checkpoint import (
    Checkpoint,
    find_checkpoint,
    load_checkpoint,
    named_factors,
    named_parameters,
    restore_adapters,
    save_checkpoint,
)
from bilora_diffusion.compilation import CompilerError, check_compiler, reason, uncompiled
from bilora_diffusion.config import TrainingConfig, to_yaml
from bilora_diffusion.data.dreambooth import DrawBatches, Row, flatten
from bilora_diffusion.errors import UserError
from bilora_diffusion.finishing import finish, save_loras, upload
from bilora_diffusion.flags import show
from bilora_diffusion.interruption import Interruption, ignore_interrupts
from bilora_diffusion.loss_gap import LossGap, measure_loss_gap
from bilora_diffusion.memory.advice import check_memory
from bilora_diffusion.method_names import BALL_METHODS
from bilora_diffusion.previews import Previews
from bilora_diffusion.processes import Mark, average
from bilora_diffusion.progress import Progress
from bilora_diffusion.run_folder import TRACKED_AS, RunFolder
from bilora_diffusion.tracking import check_trackers, start_trackers
from bilora_diffusion.training import BegunStep

__all__ = ["DTYPES", "Outcome", "resolved_precision", "train"]

logger = logging.getLogger("bilora_diffusion")

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
READING_SECONDS = 600  # a disk of another machine may sleep; a batch is read in less


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Arguments:
        summary: what `summary.json` holds.
    """

    folder: Path
    interrupted: bool
    summary: dict[str, Any]


def train(config: TrainingConfig) -> Outcome:
    """Trains, exports, verifies.

    Raises:
        UserError: anything in the flags, files or machine that does not fit; nothing of an earlier run is lost then.
    """
    try:
        return _train(config)
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the GPU's memory is too small for this run: try --gradient_checkpointing, --mixed_precision bf16, a "
            "smaller --train_batch_size (with more --gradient_accumulation_steps) or a smaller --resolution"
        ) from error
    except CompilerError as error:
        raise UserError(
            f"--compile: torch.compile failed ({reason(error)}): leave --compile out; --resume_from_checkpoint latest "
            "goes on without it where there is a checkpoint"
        ) from error
    except OSError as error:  # from a library that writes: a tracker, a cache
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"the disk is full ({error.filename or config.output_dir}): free some space or choose another "
            "--output_dir; checkpoints made before are whole"
        ) from error


def _train(config: TrainingConfig) -> Outcome:
    precision = resolved_precision(config)
    accelerator = _accelerator(config)
    machine = Machine(
        accelerator.device,
        DTYPES[precision],
        accelerator.process_index,
        accelerator.num_processes,
        accelerator.wait_for_everyone,
    )
    _set_up_logging(machine)
    if machine.is_main:
        for warning in config.warnings() + _launcher_warnings():
            logger.warning(warning)
        if config.offload_base and not machine.has_own_memory:
            logger.warning("--offload_base has no effect here: the computation uses the computer's memory anyway")
    folder = RunFolder(config.output_dir, config.logging_dir, writes=machine.is_main)
    checkpoint = _checkpoint_to_resume(config, folder)
    machine.wait()  # all have looked before the first writes
    pictures, warnings = read_pictures(config)
    if machine.is_main:
        for warning in warnings:
            logger.warning(warning)
    seed = _seed(config, checkpoint)
    if config.compile:
        check_compiler(machine.device)
        logger.info("--compile: the first steps take much longer than those that follow")
    estimated_bytes = check_memory(config, machine.device, machine.dtype) if machine.is_main else None
    steps_per_epoch = 0

    def steps_of(length: int) -> int:
        nonlocal steps_per_epoch
        steps_per_epoch = steps_in_epoch(
            length, config.train_batch_size, machine.processes, config.gradient_accumulation_steps
        )
        return config.max_train_steps or config.num_train_epochs * steps_per_epoch

    parts = assemble(config, machine, pictures, seed=seed, steps_of=steps_of, resumed=checkpoint is not None)
    parts.estimated_peak_bytes = estimated_bytes
    steps = steps_of(len(parts.dataset))
    resolved = _resolved(config, parts, seed=seed, steps=steps, precision=precision)
    progress = Progress(seed)
    if checkpoint is not None:
        path, content = checkpoint
        progress = _restore(path, content, parts, seed)
        logger.info(f"resuming at step {progress.step} from {path}")
    folder.begin(to_yaml(resolved), fresh=checkpoint is None or not _is_inside(checkpoint[0], folder))
    folder.forget_after(progress.step)
    started = time.time()
    try:
        start_trackers(accelerator, TRACKED_AS, resolved)
        run = Run(resolved, machine, accelerator, parts, folder, progress, steps, steps_per_epoch)
        interrupted = run.fit()
        folder.state("finishing", progress.step, steps, now=True)
        with uncompiled():
            summary = finish(resolved, machine, accelerator, parts, folder, progress, started, interrupted)
        folder.state("interrupted" if interrupted else "finished", progress.step, steps, now=True)
    except BaseException as error:
        if not machine.is_main and isinstance(error, UserError):
            logger.error(f"process {machine.rank}: {error}")  # the main one may know nothing of it
        _leave(accelerator, folder, progress.step, steps, error)
        raise
    accelerator.end_training()
    if config.push_to_hub and not interrupted and machine.is_main:
        upload(config, folder)
    return Outcome(folder.path, interrupted, summary)


def _leave(accelerator: Accelerator, folder: RunFolder, step: int, steps: int, error: BaseException) -> None:
    """Notes that a run ended early, as far as that can still be noted; the error at hand is what counts."""
    at_once = isinstance(error, KeyboardInterrupt)
    with suppress(UserError):
        folder.state("interrupted" if at_once else "failed", step, steps, now=True)
    if not at_once:  # closing an online tracker can take long
        for tracker in accelerator.trackers:
            with suppress(Exception):
                tracker.finish()


@dataclass(frozen=True)
class _Begun:
    """A step that was asked for, and what its line in the log needs.

    Arguments:
        rate: the UNet's learning rate in it.
        since: when it could begin.
    """

    step: BegunStep
    rate: float
    since: Mark


class Run:
    """The loop around the step: what is logged, shown and saved, and when.

    A step's loss is read when the next step has been asked for, so that the device always has something to do. Only
    where something is made of the weights, which must be that step's, is it waited for at once.
    """

    def __init__(
        self,
        config: TrainingConfig,
        machine: Machine,
        accelerator: Accelerator,
        parts: Parts,
        folder: RunFolder,
        progress: Progress,
        steps: int,
        steps_per_epoch: int,
    ) -> None:
        self.config = config
        self.machine = machine
        self.accelerator = accelerator
        self.parts = parts
        self.folder = folder
        self.progress = progress
        self.steps = steps
        self.previews = Previews(config, machine, accelerator, parts, folder, steps, steps_per_epoch)
        self.gap_interval = _gap_interval(config, steps)
        self.rows_a_step = config.train_batch_size * config.gradient_accumulation_steps * machine.processes
        self.steps_before, self.draws_before = progress.step, progress.draws  # of this run, in an earlier process

    def fit(self) -> bool:
        """Trains up to the last step. Returns whether it was interrupted before."""
        config, progress = self.config, self.progress
        bar = tqdm(initial=progress.step, total=self.steps, desc=config.method, disable=not self.machine.is_main)
        batches = self._batches()
        before: _Begun | None = None
        with Interruption(announces=self.machine.is_main) as interruption, bar:
            for number in range(progress.step, self.steps):
                wish = interruption.requested
                # Alone there is nobody to agree with on where to stop.
                if wish and self.machine.processes == 1 and number > self.steps_before:
                    if before is not None:
                        self._settle(before, bar)
                    if progress.step % config.checkpointing_steps:
                        self._save_checkpoint()
                    return True
                try:
                    begun = self._begin(number, batches, None if before is None else before.step.done, wish)
                except Exception:
                    if before is not None:
                        with suppress(Exception):
                            self._settle(before, bar)
                    raise
                stop = before is not None and self._settle(before, bar)
                before = begun
                if stop or (wish and self.machine.processes == 1) or self._is_looked_at(number + 1):
                    stop |= self._settle(begun, bar)
                    before = None
                    self.previews.after_step(progress.step)
                    if stop or progress.step % config.checkpointing_steps == 0:
                        self._save_checkpoint()
                if stop:
                    return progress.step < self.steps
        return False

    def _begin(self, number: int, batches: Iterator[list[Row]], since: Mark | None, wish: bool) -> _Begun:
        """Asks for step number `number` (from 0), and draws what it learns from.

        Arguments:
            since: when the step before is done; None: now.
            wish: to stop after it.
        """
        trainer = self.parts.trainer
        since = since or Mark(self.machine.device)
        drawn = [self.parts.make_batch(next(batches)) for _ in range(self.config.gradient_accumulation_steps)]
        micro_batches = trainer.micro_batches(drawn)
        if self._gap_is_due(number):  # and nothing is at work: see `_is_looked_at`
            self._measure_gap(micro_batches)
            since = Mark(self.machine.device)
        rate = trainer.schedulers[0].get_last_lr()[0]
        return _Begun(trainer.begin_step(micro_batches, number, wish), rate, since)

    def _is_looked_at(self, step: int) -> bool:
        """Whether something is made of the weights after optimiser step number `step` (from 1)."""
        saves = step % self.config.checkpointing_steps == 0
        return saves or step == self.steps or self.previews.is_due(step) or self._gap_is_due(step)

    def _settle(self, begun: _Begun, bar: tqdm) -> bool:
        """Waits for a step and notes what came of it. Returns whether the run is to stop."""
        step = begun.step.result()
        self.progress.add_step(step, self.rows_a_step, begun.step.done.seconds_since(begun.since))
        self._log(bar, begun.rate)
        self._stop_if_hopeless()
        return step.stop

    def _batches(self) -> Iterator[list[Row]]:
        """This process's micro-batches from the next draw on, without end."""
        draws = DrawBatches(
            start=self.progress.draws,
            rank=self.machine.rank,
            world_size=self.machine.processes,
            batch_size=self.config.train_batch_size,
            rows_in=self.parts.dataset.rows_in,
        )
        workers = self.config.dataloader_num_workers
        loader = DataLoader(
            self.parts.dataset,
            batch_sampler=draws,
            collate_fn=flatten,
            num_workers=workers,
            worker_init_fn=ignore_interrupts,
            # A process forked beside running threads can stop for ever at a lock that one of them held.
            timeout=READING_SECONDS if workers else 0,
        )
        try:
            yield from loader
        except UserError as error:
            # torch wraps what a worker raised into that worker's traceback.
            raise UserError(str(error).rsplit("UserError: ", 1)[-1].strip()) from None
        except RuntimeError as error:
            if "DataLoader timed out" not in str(error):
                raise
            # One that stopped at its start has this run's handler of SIGTERM: only SIGKILL ends it.
            for child in multiprocessing.active_children():
                with suppress(RuntimeError):  # torch's handler of SIGCHLD tells of it
                    child.kill()
                    child.join()
            raise UserError(
                f"--dataloader_num_workers {workers}: nothing was read in {READING_SECONDS} s. Set it to 0; "
                "--resume_from_checkpoint latest goes on where there is a checkpoint"
            ) from None

    def _gap_is_due(self, done: int) -> bool:
        """Whether it is measured when so many steps are done, before the next."""
        number, repeats = done + 1, self.config.shown_in_a_row
        # Of the steps on the same rows the last: bilora-echo perturbs the later ones.
        is_last = (self.draws_before // self.rows_a_step + number - self.steps_before) % repeats == 0
        due = self.gap_interval and number >= self.gap_interval and number % self.gap_interval < repeats
        return bool(due and is_last and self.parts.method.perturbs)

    def _measure_gap(self, micro_batches) -> None:
        """On the rows of the step that comes next, with the perturbation it will be taken under."""
        # One micro-batch: in float32, without TF32, a pass takes several times what one of the training takes.
        gap = measure_loss_gap(self.parts.models.values(), self.parts.method, micro_batches[:1])
        means = average([torch.tensor(loss, device=self.machine.device) for loss in (gap.perturbed, gap.clean)])
        self.progress.add_gap(LossGap(*(mean.item() for mean in means)))

    def _log(self, bar: tqdm, rate: float) -> None:
        progress = self.progress
        shown: dict[str, float | None] = {"loss": progress.losses[-1], "lr": rate, **progress.last_measures}
        if progress.gap_steps and progress.gap_steps[-1] == progress.step:
            shown["loss_gap"] = progress.last_gap
        shown["seconds"] = progress.seconds[-1]
        self.folder.metrics(progress.step, shown)
        self.accelerator.log({name: value for name, value in shown.items() if value is not None}, step=progress.step)
        self.folder.state("running", progress.step, self.steps)
        loss, share = progress.losses[-1], progress.last_measures.get("c_over_rho")
        texts = {"loss": "not finite" if loss is None else f"{loss:.4f}", "lr": f"{rate:.1e}"}
        if share is not None:
            texts["c/rho"] = f"{share:.2f}"
            texts["clipped"] = f"{progress.last_measures['clipped_share']:.0%}"
        if progress.last_gap is not None:
            texts["gap"] = f"{progress.last_gap:+.1e}"
        texts["s/step"] = f"{progress.seconds[-1]:.2f}"
        bar.set_postfix(texts, refresh=False)  # the time left is in the bar's own text
        bar.update(1)

    def _stop_if_hopeless(self) -> None:
        if self.progress.skipped_in_a_row >= self.config.max_bad_steps:
            raise UserError(
                f"the loss or its gradient was not finite {self.progress.skipped_in_a_row} steps in a row (up to step "
                f"{self.progress.step}); try a lower --learning_rate, a lower --rho, or --mixed_precision bf16 in "
                "place of fp16. Checkpoints made before are whole"
            )

    def _save_checkpoint(self) -> None:
        parts, config = self.parts, self.config
        if self.machine.is_main:
            checkpoint = Checkpoint(
                _identity(config),
                _kept(config),
                self.progress.to_json(),
                parts.trainer.state_dict(),
                named_parameters(parts.models, AUXILIARY),
                named_factors(parts.models),
            )
            with auxiliary_off(parts.models.values()):
                save_checkpoint(
                    self.folder.path,
                    checkpoint,
                    lambda folder: save_loras(folder, config, parts, self.progress, checkpoint=True),
                    config.checkpoints_total_limit,
                )
        self.machine.wait()


def _identity(config: TrainingConfig) -> dict[str, Any]:
    """The flags that a checkpoint's tensors depend on."""
    identity: dict[str, Any] = {
        "method": config.method,
        "rank": config.rank,
        "lora_alpha": config.lora_alpha or float(config.rank),
        "lora_layers": config.lora_layers,
        "train_text_encoder": config.train_text_encoder,
        "init_lora_weights": config.init_lora_weights,
        "use_dora": config.use_dora,
        "optimizer": config.optimizer,
        "use_8bit_adam": config.use_8bit_adam,
        "paged_adam": config.paged_adam or None,  # as checkpoints made before there was such a flag say it
        "loraplus_lr_ratio": config.loraplus_lr_ratio,
        "ema_decay": config.ema_decay,
        "steps_per_draw": config.shown_in_a_row if config.shown_in_a_row > 1 else None,
    }
    if config.method in BALL_METHODS:
        identity["auxiliary_rank"] = config.auxiliary_rank or config.rank
    if config.method == "bilora":
        identity["ascent"] = config.ascent
    if config.method == "bilora-fresh":
        identity["ascent_basis"] = config.ascent_basis
    return identity


KEPT = (
    "learning_rate",
    "text_encoder_lr",
    "auxiliary_learning_rate",
    "auxiliary_weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "adam_weight_decay",
    "adam_weight_decay_text_encoder",
)
"""Flags that are part of the optimisers' state: the checkpoint's values go on."""


def _kept(config: TrainingConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in KEPT}


def _restore(path: Path, content: Checkpoint, parts: Parts, seed: int) -> Progress:
    """Puts a run back to where the checkpoint was made."""
    restore_adapters(path, content, parts.models)
    try:
        parts.trainer.load_state_dict(content.state)
        progress = replace(Progress.from_json(dict(content.progress)), seed=seed)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} does not fit this run ({reason}); start a new one in another --output_dir") from error
    return replace(progress, draws=parts.dataset.resumed_at(progress.draws, progress.rows_a_step))


def _is_inside(checkpoint: Path, folder: RunFolder) -> bool:
    """Whether a checkpoint is of the run in this folder."""
    return checkpoint.resolve().parent == folder.path.resolve()


def _warn_of_kept(config: TrainingConfig, saved: Mapping[str, Any]) -> None:
    for name, value in _kept(config).items():
        if name in saved and saved[name] != value:
            logger.warning(f"--{name} {show(value)} has no effect: the resumed run goes on with {show(saved[name])}")


def _checkpoint_to_resume(config: TrainingConfig, folder: RunFolder) -> tuple[Path, Checkpoint] | None:
    """The checkpoint to go on from, read and found to fit; None for a fresh run.

    Raises:
        UserError: no such checkpoint, it is damaged or of another kind of run, or the folder holds another run.
    """
    wanted = config.resume_from_checkpoint
    path = None if wanted is None else find_checkpoint(folder.path, wanted)
    checkpoint = None if path is None else (path, load_checkpoint(path, _identity(config)))
    if checkpoint is not None:
        _warn_of_kept(config, checkpoint[1].kept)
    if not config.overwrite_output_dir and (path is None or not _is_inside(path, folder)):
        folder.refuse_another_run(restart=wanted is not None and path is None)
    if wanted is not None and path is None:
        logger.info(f"--resume_from_checkpoint latest: no checkpoint in {folder.path} yet, starting a new run")
    return checkpoint


def _seed(config: TrainingConfig, checkpoint: tuple[Path, Checkpoint] | None) -> int:
    """--seed, else the resumed run's, else a new one; the same on every process."""
    saved = checkpoint[1].progress["seed"] if checkpoint else None
    if config.seed is not None:
        if saved is not None and saved != config.seed:
            logger.warning(f"--seed {config.seed}: the run that is resumed had {saved}; its next draws will be others")
        return config.seed
    if saved is not None:
        return saved
    return broadcast_object_list([random.SystemRandom().randrange(2**31)])[0]


def _gap_interval(config: TrainingConfig, steps: int) -> int:
    """Every how many steps the loss gap is measured; 0 = never."""
    if config.loss_gap_steps is not None:
        return config.loss_gap_steps
    return max(1, min(200, steps // 10))


def _resolved(config: TrainingConfig, parts: Parts, *, seed: int, steps: int, precision: str) -> TrainingConfig:
    """The configuration with everything that was left open filled in, so that it gives the same run again, whole."""
    changes: dict[str, Any] = {
        "seed": seed,
        "max_train_steps": steps,
        "resolution": parts.resolution,
        "lora_alpha": float(config.lora_alpha or config.rank),
        "mixed_precision": precision,
        "resume_from_checkpoint": None,
    }
    changes |= parts.method.settings
    if "rho" in changes:
        changes["rho_relative"] = None  # said by rho, or, in a shared configuration, another method's
    return replace(config, **changes)


def resolved_precision(config: TrainingConfig) -> str:
    """--mixed_precision, else what accelerate was configured or launched with."""
    precision = config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in DTYPES:
        raise UserError(f"accelerate is set to mixed precision {precision}: give --mixed_precision no, fp16 or bf16")
    if precision == "bf16" and torch.backends.mps.is_available():
        raise UserError("--mixed_precision bf16 does not work on Apple's GPUs: use fp16 or no")
    return precision


def _accelerator(config: TrainingConfig) -> Accelerator:
    for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise UserError(
                f"accelerate is set up for {name}: the adapters are too small to be worth it and this trainer averages "
                "their gradients itself; run `accelerate config` and choose multi-GPU or a single process"
            )
    if config.allow_tf32 and torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True
    log_with = check_trackers(config.report_to)
    project = ProjectConfiguration(
        project_dir=config.output_dir, logging_dir=str(Path(config.output_dir, config.logging_dir))
    )
    # Autocast and fp16's loss scale are the trainer's own: both adapters must share one scale.
    return Accelerator(mixed_precision="no", log_with=log_with, project_config=project)


def _launcher_warnings() -> list[str]:
    """What accelerate was told that nothing here listens to."""
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend == "no":
        return []
    return [f"accelerate's --dynamo_backend {backend} has no effect: the trainer's own flag is --compile"]


def _set_up_logging(machine: Machine) -> None:
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logger.setLevel(logging.INFO if machine.is_main else logging.ERROR)
