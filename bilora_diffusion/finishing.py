"""After the last step: the LoRA files, the proof that they are the trained model, pictures, card, summary."""

import logging
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image

import bilora_diffusion
from bilora_diffusion.adapters import AUXILIARY, parameters_of
from bilora_diffusion.assembly import Machine, Parts, used_prompt
from bilora_diffusion.bases.quiet import quiet_libraries
from bilora_diffusion.config import TrainingConfig
from bilora_diffusion.errors import UserError
from bilora_diffusion.lora_files.diffusers_format import save_diffusers
from bilora_diffusion.lora_files.facts import LoraFacts, bilora_metadata
from bilora_diffusion.lora_files.kohya import save_kohya, why_not_kohya
from bilora_diffusion.lora_files.model_card import CardImage, write_model_card
from bilora_diffusion.lora_files.outputs import record_outputs
from bilora_diffusion.lora_files.upload import push
from bilora_diffusion.lora_files.verification import VerificationError, record_trained, strip_adapters, verify_file
from bilora_diffusion.previews import draw_or_warn, pipeline_around, save_pictures
from bilora_diffusion.processes import process_count
from bilora_diffusion.progress import Progress
from bilora_diffusion.run_folder import DIFFUSERS_FILE, KOHYA_FILE, PREVIEWS, RunFolder
from bilora_diffusion.tracking import log_pictures

__all__ = ["finish", "package_versions", "peak_memory_bytes", "save_loras", "upload"]

logger = logging.getLogger("bilora_diffusion")

FINAL_PICTURES = "final"
ADVICE = (
    "tip: what the methods are worth was measured on a small base (docs/methods.md): hold pictures out and stop in "
    "time; where you cannot, half the --learning_rate or --lora_dropout 0.7, with --method lora, overfitted less and "
    "forgot less; --method flat-lora at half the rate forgot least; --method bilora-fresh had a loss lower still, by "
    "up to a percent, for 1.6 times the time, with more forgotten and pictures less like the true ones"
)
"""What `benchmarks/results/quality.md` says."""

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors")


def finish(
    config: TrainingConfig,
    machine: Machine,
    accelerator: Accelerator,
    parts: Parts,
    folder: RunFolder,
    progress: Progress,
    started: float,
    interrupted: bool,
) -> dict[str, Any]:
    """Exports, verifies, draws, writes card and summary, and says where everything is. One process does it.

    Returns:
        what `summary.json` holds.

    Raises:
        UserError: a file that was written does not load as what was trained.
    """
    summary = _summary(config, machine, parts, progress, interrupted)
    if machine.is_main:
        with parts.trainer.as_exported():
            files = save_loras(folder.path, config, parts, progress, started=started)
        summary["verification"] = _verify(files, parts)
        summary["verified"] = True  # or it would have raised
        folder.summary(summary)
        pictures = [] if interrupted else _final_pictures(config, machine, parts, files[0])
        if pictures:
            log_pictures(accelerator, "test", pictures, _final_prompt(config), progress.step)
        names = save_pictures(folder, FINAL_PICTURES, pictures) if pictures else []
        facts = lora_facts(config, parts, progress, started)
        images = [CardImage(name, _final_prompt(config)) for name in names]
        hub_id = config.hub_model_id if config.push_to_hub else None
        write_model_card(folder.path, facts, images, hub_id=hub_id, kohya_file=len(files) > 1)
        _say(folder, files, names, progress, summary)
    machine.wait()
    return summary


def upload(config: TrainingConfig, folder: RunFolder) -> None:
    """Sends the finished run to the hub: the LoRA files, the card and the pictures that it shows.

    Raises:
        UserError: the upload failed.
    """
    pictures = [f"{PREVIEWS}/{path.name}" for path in (folder.path / PREVIEWS).glob(f"{FINAL_PICTURES}_*.png")]
    files = [name for name in (DIFFUSERS_FILE, KOHYA_FILE) if (folder.path / name).exists()]
    repository = push(config, folder.path, [*files, *sorted(pictures)])
    logger.info(f"uploaded to {repository}")


def save_loras(
    folder: Path,
    config: TrainingConfig,
    parts: Parts,
    progress: Progress,
    *,
    started: float | None = None,
    checkpoint: bool = False,
) -> list[Path]:
    """Writes the primary as LoRA files; returns their paths, the diffusers one first.

    Arguments:
        checkpoint: one file in float32, which a resumed run can go on from exactly.
    """
    facts = lora_facts(config, parts, progress, started)
    dtype = None if checkpoint or config.upcast_before_saving else parts.trainer.compute_dtype
    files = [folder / DIFFUSERS_FILE]
    save_diffusers(files[0], parts.models, dtype=dtype, metadata=bilora_metadata(facts))
    if checkpoint or not config.output_kohya_format:
        return files
    reason = why_not_kohya(parts.models)
    if reason is not None:
        logger.info(f"no Kohya file: {reason}")
        return files
    files.append(folder / KOHYA_FILE)
    save_kohya(files[1], parts.models, facts=facts, dtype=dtype)
    return files


def lora_facts(config: TrainingConfig, parts: Parts, progress: Progress, started: float | None = None) -> LoraFacts:
    """What the files and the card say of the run: nothing of this machine."""
    base = parts.base
    dataset = parts.dataset
    ball = parts.radius
    return LoraFacts(
        name=Path(config.output_dir).resolve().name,
        base=base.shared_name,
        base_hub_id=base.name if base.is_hub_id else None,
        method=config.method,
        rank=config.file_rank,
        alpha=(config.lora_alpha or config.rank) * config.file_rank / config.rank,
        init_lora_weights=config.init_lora_weights,
        settings=parts.method.settings,
        rho_relative=ball.relative if ball else None,
        steps=progress.step,
        epochs=-(-progress.draws // len(dataset)),
        learning_rate=config.learning_rate,
        text_encoder_lr=config.text_encoder_lr if config.train_text_encoder else None,
        optimizer=config.optimizer,
        lr_scheduler=config.lr_scheduler,
        resolution=parts.resolution,
        seed=progress.seed,
        num_images=len(dataset.instances),
        num_class_images=len(dataset.class_pictures) or None,
        prior_prompt=config.class_prompt if config.prior_from_base else None,
        batch_size=config.train_batch_size,
        accumulation=config.gradient_accumulation_steps,
        num_processes=process_count(),
        mixed_precision=config.mixed_precision,
        min_snr_gamma=config.snr_gamma,
        noise_offset=config.noise_offset,
        caption_dropout=config.caption_dropout,
        shuffle_caption=config.shuffle_caption,
        keep_tokens=config.keep_tokens,
        aspect_ratio_buckets=config.use_aspect_ratio_buckets,
        masked_loss=any(picture.mask is not None for picture in dataset.instances),
        lora_layers=config.unet_targets,
        trained_parts=tuple(parts.models),
        use_dora=config.use_dora,
        instance_prompt=used_prompt(config, dataset.instances),
        captions=[picture.caption for picture in dataset.instances],
        started_at=started,
        finished_at=time.time(),
        prediction_type=parts.trainer.objective.prediction_type,
        versions=package_versions(),
    )


def _verify(files: list[Path], parts: Parts) -> list[dict[str, Any]]:
    """Loads every file through the pipeline's own loader into the very base; the adapters are gone after this."""
    with parts.trainer.as_exported():
        trained = record_trained(parts.models)
    for model in parts.models.values():
        strip_adapters(model)
    pipeline = pipeline_around(parts)
    bare = record_outputs(parts.models)
    verified = []
    for file in files:
        try:
            result = verify_file(file, pipeline, trained, base_outputs=bare)
        except VerificationError as error:
            raise UserError(f"{error}. The checkpoints hold the trained weights; please report this") from error
        verified.append(
            {
                "file": file.name,
                "layers": result.layers,
                "differences": dict(result.differences),
                "effects": dict(result.effects),
                "tolerances": dict(result.tolerances),
            }
        )
    return verified


def _final_prompt(config: TrainingConfig) -> str | None:
    return config.final_validation_prompt or config.validation_prompt


def _final_pictures(config: TrainingConfig, machine: Machine, parts: Parts, file: Path) -> list[Image.Image]:
    """Pictures from the base with the file loaded as a user would load it; none if they do not fit the memory."""
    prompt = _final_prompt(config)
    if prompt is None or config.skip_final_inference:
        return []
    pipeline = pipeline_around(parts)
    with quiet_libraries():
        pipeline.load_lora_weights(str(file))
    pictures = draw_or_warn(
        pipeline,
        parts.sampling_prompts.get(prompt, prompt),
        numbers=range(config.num_validation_images),
        seed=parts.trainer.seed,
        resolution=parts.resolution,
        load_vae=lambda: parts.base.load("vae").vae.to(machine.device),
    )
    for model in parts.models.values():
        strip_adapters(model)
    return pictures


def _summary(
    config: TrainingConfig, machine: Machine, parts: Parts, progress: Progress, interrupted: bool
) -> dict[str, Any]:
    on_gpu = machine.device.type == "cuda"
    measures = progress.last_measures
    ball = parts.radius
    losses = [loss for loss in progress.losses if loss is not None]
    return {
        "method": config.method,
        "steps": progress.step,
        "interrupted": interrupted,
        "seed": progress.seed,
        "final_loss": losses[-1] if losses else None,
        "losses": progress.losses,
        "clean_losses": progress.clean_losses or None,
        "perturbed_losses": progress.perturbed_losses or None,
        "loss_gap": progress.loss_gap,
        "loss_gap_steps": progress.gap_steps or None,
        "settings": parts.method.settings,
        "rho": parts.method.settings.get("rho"),
        "rho_relative": ball.relative if ball else None,
        "rho_singular_share": ball.singular_share if ball else None,
        "c_over_rho": measures.get("c_over_rho"),
        "clipped_share": measures.get("clipped_share"),
        "inert": progress.is_inert(),
        "too_strong": progress.is_too_strong(),
        "leaning": progress.leans_on_auxiliary(),
        "skipped_steps": progress.skipped,
        "seconds_per_step": progress.seconds_per_step,
        "peak_memory_bytes": peak_memory_bytes(machine.device),
        "estimated_peak_memory_bytes": parts.estimated_peak_bytes,
        "processes": process_count(),
        "parameters": {
            "primary": sum(parameter.numel() for parameter in parts.trainer.primary),
            "auxiliary": sum(
                parameter.numel()
                for model in parts.models.values()
                for parameter in parameters_of(model, AUXILIARY).values()
            ),
        },
        "device": torch.cuda.get_device_name(machine.device) if on_gpu else platform.machine(),
        "versions": package_versions(),
        "verified": False,
    }


def peak_memory_bytes(device: torch.device) -> int:
    """The most that was allocated on the GPU of the run, without one the most memory the process had."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil  # accelerate brings it

        return psutil.Process().memory_info().peak_wset
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def package_versions() -> dict[str, str]:
    versions = {"bilora_diffusion": bilora_diffusion.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _say(
    folder: RunFolder,
    files: list[Path],
    pictures: list[str],
    progress: Progress,
    summary: dict[str, Any],
) -> None:
    interrupted = summary["interrupted"]
    state = f"interrupted after step {progress.step}" if interrupted else f"done: {progress.step} steps"
    last = summary["final_loss"]
    logger.info(f"{state}, last loss {'none that is finite' if last is None else format(last, '.4g')}")
    for file, checked in zip(files, summary["verification"], strict=True):
        worst = max(checked["differences"].values())
        logger.info(f"{file}  ({checked['layers']} layers; loaded again, differs by {worst:.1e})")
    for name in pictures:
        logger.info(f"{folder.path / name}")
    if progress.skipped:
        most = 2 * progress.skipped > progress.step
        mend = "; most were, so the LoRA is hardly good for anything: try a lower --learning_rate" if most else ""
        logger.info(f"{progress.skipped} steps were skipped: their loss or gradient was not finite{mend}")
    for note in ("inert", "too_strong", "leaning"):
        if summary[note]:
            logger.info(f"note: {summary[note]}")
    logger.info("continue with --resume_from_checkpoint latest" if interrupted else ADVICE)
