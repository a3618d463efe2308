"""Trackers (tensorboard, wandb, trackio, ...) through accelerate, pictures included."""

import errno
import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from PIL import Image

from bilora_diffusion.config import TrainingConfig, as_dict
from bilora_diffusion.errors import UserError

__all__ = ["check_trackers", "log_pictures", "start_trackers"]

PRIVATE = (
    "hub_token",
    "hub_model_id",
    "instance_data_dir",
    "class_data_dir",
    "output_dir",
    "cache_dir",
    "logging_dir",
    "resume_from_checkpoint",
    "init_lora_from",
    "dataset_name",
    "pretrained_model_name_or_path",
    "pretrained_vae_model_name_or_path",
)
"""Flags whose values may be a path of this machine, a user's name or a secret."""

PACKAGES = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "trackio": "trackio",
    "comet_ml": "comet_ml",
    "aim": "aim",
    "mlflow": "mlflow",
    "clearml": "clearml",
    "dvclive": "dvclive",
    "swanlab": "swanlab",
}


def check_trackers(report_to: str) -> str | None:
    """What accelerate's `log_with` should be for `--report_to`; None for `none`.

    Raises:
        UserError: an unknown tracker, or one that is not installed.
    """
    if report_to in ("none", ""):
        return None
    if report_to == "all":
        return "all"
    if report_to not in PACKAGES:
        raise UserError(f"--report_to {report_to}: known are {', '.join(PACKAGES)}, all and none")
    if importlib.util.find_spec(PACKAGES[report_to]) is None:
        package = PACKAGES[report_to]
        raise UserError(f"--report_to {report_to} needs the package {package}: pip install {package}, or take none")
    return report_to


def start_trackers(accelerator: Accelerator, project: str, config: TrainingConfig) -> None:
    """Opens the trackers and tells them the configuration, without what must not be shared: trackers often are.

    Raises:
        UserError: one does not start: no account, no network, a folder that cannot be written.
    """
    if not accelerator.log_with:
        return
    values = {name: value for name, value in as_dict(config).items() if name not in PRIVATE and value is not None}
    try:
        accelerator.init_trackers(project, config=values)
    except Exception as error:  # each library has its own kinds
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # the disk's fault, not the tracker's
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"--report_to {config.report_to}: the tracker does not start ({reason}): set it up, or take tensorboard "
            "or none"
        ) from error


def log_pictures(accelerator: Accelerator, name: str, pictures: Sequence[Image.Image], prompt: str, step: int) -> None:
    """Shows pictures in every tracker that can."""
    for tracker in accelerator.trackers:
        _log_to(tracker, name, pictures, prompt, step)


def _log_to(tracker: GeneralTracker, name: str, pictures: Sequence[Image.Image], prompt: str, step: int) -> None:
    if tracker.name == "tensorboard":
        stacked = np.stack([np.asarray(picture) for picture in pictures])
        tracker.writer.add_images(name, stacked, step, dataformats="NHWC")
    elif tracker.name in ("wandb", "trackio"):
        module: Any = importlib.import_module(tracker.name)
        values: Mapping[str, Any] = {
            f"{name}/{number}": module.Image(picture, caption=prompt) for number, picture in enumerate(pictures)
        }
        tracker.log(values, step=step)
    elif tracker.name == "comet_ml":
        for number, picture in enumerate(pictures):
            tracker.writer.log_image(picture, name=f"{name}/{number}", step=step)
