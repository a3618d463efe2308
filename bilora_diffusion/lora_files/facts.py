"""What a LoRA file and its model card say of themselves, in a form that may be shown to anyone.

`LoraFacts` knows nothing of the configuration: whoever fills it in decides what is shared. It must hold no
path of this machine, no token and no user name; `bases.Base.shared_name` is there for the one value that
often is a path.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import bilora_diffusion

__all__ = ["LoraFacts", "bilora_metadata", "tag_frequency", "utc_date"]

MOST_TAGS = 500  # a header is read whole by every user interface that lists the file
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class LoraFacts:
    """The facts of one trained LoRA. A value that is None does not apply or is not known, and is left out.

    Arguments:
        name: what the LoRA is called, for example the output folder's last part.
        base: the base's name as it may be shared, see `bases.Base.shared_name`.
        base_hub_id: the base's id on the model hub, None for a local or made-up base.
        method: `bilora`, `lora`, ...
        rank: r of the LoRA in the file.
        alpha: its weight is multiplied by alpha / rank.
        init_lora_weights: how the primary began. Where that was not zero, the file holds its change since, and rank
            and alpha are twice those it was trained with.
        settings: the method's own knobs by the names of their flags, such as `rho` and `auxiliary_rank`.
        rho_relative: rho as a share of the adapted weights' norm, where it is the radius of a ball in their space.
        steps: optimiser steps made.
        epochs: passes over the pictures, rounded up.
        learning_rate: of the UNet's primary adapter.
        text_encoder_lr: of the text encoders' primary adapters, None if they were not trained.
        optimizer, lr_scheduler: names as on the command line.
        resolution: side of the training pictures in pixels.
        seed: of the run.
        num_images: training pictures, repeats not counted.
        num_class_images: class pictures of prior preservation.
        prior_prompt: the prompt that was held to the base's own prediction, None if none was.
        batch_size: pictures a process and micro-batch.
        accumulation: micro-batches an optimiser step.
        num_processes: processes that shared a step.
        mixed_precision: `no`, `fp16` or `bf16`.
        min_snr_gamma, noise_offset, caption_dropout: of the loss and the captions, None or 0 = off.
        shuffle_caption, keep_tokens: whether the captions' tags were shuffled, and how many of them stayed in front.
        aspect_ratio_buckets: whether pictures were trained at shapes near their own.
        masked_loss: whether pictures had masks.
        lora_layers: names of the adapted modules of the UNet, if not the attention projections.
        trained_parts: `unet`, `text_encoder`, `text_encoder_2`, as far as they have adapters.
        use_dora: whether the primary is a weight-decomposed adapter.
        instance_prompt: the prompt that calls up what was learnt.
        captions: the captions trained on, one a picture.
        started_at, finished_at: seconds since 1970.
        prediction_type: of the base, `epsilon` or `v_prediction`.
        versions: name -> version of the libraries used.
    """

    name: str
    base: str
    method: str
    rank: int
    alpha: float
    base_hub_id: str | None = None
    init_lora_weights: str | None = None
    settings: Mapping[str, float | int | str] = field(default_factory=dict)
    rho_relative: float | None = None
    steps: int | None = None
    epochs: int | None = None
    learning_rate: float | None = None
    text_encoder_lr: float | None = None
    optimizer: str | None = None
    lr_scheduler: str | None = None
    resolution: int | None = None
    seed: int | None = None
    num_images: int | None = None
    num_class_images: int | None = None
    prior_prompt: str | None = None
    batch_size: int | None = None
    accumulation: int = 1
    num_processes: int = 1
    mixed_precision: str | None = None
    min_snr_gamma: float | None = None
    noise_offset: float | None = None
    caption_dropout: float | None = None
    shuffle_caption: bool | None = None
    keep_tokens: int | None = None
    aspect_ratio_buckets: bool = False
    masked_loss: bool = False
    lora_layers: Sequence[str] | None = None
    trained_parts: Sequence[str] = ("unet",)
    use_dora: bool = False
    instance_prompt: str | None = None
    captions: Sequence[str] = ()
    started_at: float | None = None
    finished_at: float | None = None
    prediction_type: str = "epsilon"
    versions: Mapping[str, str] = field(default_factory=dict)


def bilora_metadata(facts: LoraFacts) -> dict[str, str]:
    """Our own entries for a file's metadata, every value a string: `bilora_method`, `bilora_rho`, ...

    Readers of LoRA files look up the names they know and pass over these.
    """
    shown = {
        "version": bilora_diffusion.__version__,
        "method": facts.method,
        "rank": facts.rank,
        "alpha": facts.alpha,
        "init_lora_weights": facts.init_lora_weights,
        **facts.settings,
        "rho_relative": facts.rho_relative,
        "steps": facts.steps,
        "base": facts.base,
        "instance_prompt": facts.instance_prompt,
        "captions": None if facts.instance_prompt or not facts.captions else _captions(facts.captions),
        "trained_parts": json.dumps(list(facts.trained_parts)),
        "resolution": facts.resolution,
        "seed": facts.seed,
        "prediction_type": facts.prediction_type,
        "trained_at": None if facts.finished_at is None else utc_date(facts.finished_at),
        "versions": json.dumps(dict(facts.versions), sort_keys=True),
    }
    return {f"bilora_{name}": str(value) for name, value in shown.items() if value is not None}


def _captions(captions: Sequence[str]) -> str:
    return f"{len(set(captions))} different ones, such as: {captions[0]}"


def tag_frequency(captions: Sequence[str]) -> dict[str, int]:
    """How often each comma-separated part of the captions occurs, the most frequent `MOST_TAGS` first."""
    tags = (tag.strip() for caption in captions for tag in caption.split(","))
    return dict(Counter(tag for tag in tags if tag).most_common(MOST_TAGS))


def utc_date(seconds: float) -> str:
    """Seconds since 1970 as `2026-11-22T01:02:03Z`; the local time would tell where the machine stands."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
