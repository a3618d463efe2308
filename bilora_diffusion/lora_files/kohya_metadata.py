"""The metadata of a Kohya file: what user interfaces sort, label and look files up by.

Three families. `ss_*` is sd-scripts' account of the training; A1111 hides a file whose
`ss_base_model_version` does not start with `sdxl_` while an SDXL model is loaded. `sshs_*` are hashes of the
tensors, by which the model sites recognise a file. `modelspec.*` follows Stability's ModelSpec 1.0.1, which
Forge reads. Ours (`bilora_*`) come on top. All values are strings: safetensors knows no others.

Read in kohya-ss/sd-scripts 48d368fa (library/train_util.py, library/sai_model_spec.py) and
Stability-AI/ModelSpec fe8dc608.
"""

import hashlib
import json
from collections.abc import Mapping

import safetensors.torch
from torch import Tensor

import bilora_diffusion
from bilora_diffusion.lora_files.facts import LoraFacts, bilora_metadata, tag_frequency, utc_date

__all__ = ["header_size", "kohya_file_bytes", "legacy_hash", "model_hash"]

SDXL_ARCHITECTURE = "stable-diffusion-xl-v1-base/lora"
SGM_IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"  # says that the names are sgm's


def kohya_file_bytes(tensors: Mapping[str, Tensor], facts: LoraFacts) -> bytes:
    """A whole Kohya file, tensors and metadata, ready to be written."""
    training = _training_metadata(tensors, facts)
    # sd-scripts hashes the file with the ss_ entries alone, so that later edits leave the hashes valid.
    plain_file = safetensors.torch.save(dict(tensors), training)
    digest = model_hash(plain_file)
    metadata = {
        **training,
        "sshs_model_hash": digest,
        "sshs_legacy_hash": legacy_hash(plain_file),
        **_model_spec(facts, digest),
        **bilora_metadata(facts),
    }
    return safetensors.torch.save(dict(tensors), metadata)


def header_size(file: bytes) -> int:
    """Bytes before the first tensor of a safetensors file: 8 of length, and the JSON header."""
    return 8 + int.from_bytes(file[:8], "little")


def model_hash(file: bytes) -> str:
    """SHA-256 of everything behind the header: the same for every metadata."""
    return hashlib.sha256(file[header_size(file) :]).hexdigest()


def legacy_hash(file: bytes) -> str:
    """The old eight-digit hash of 64 KiB from 1 MiB on; that of nothing (`e3b0c442`) for a smaller file."""
    return hashlib.sha256(file[0x100000:0x110000]).hexdigest()[:8]


def _training_metadata(tensors: Mapping[str, Tensor], facts: LoraFacts) -> dict[str, str]:
    rows = (facts.batch_size or 1) * facts.num_processes * facts.accumulation
    size = facts.resolution
    values = {
        # the minimum set
        "ss_v2": False,
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_module": "networks.lora",
        "ss_network_dim": facts.rank,
        "ss_network_alpha": float(facts.alpha),
        "ss_network_args": _network_args(tensors, facts),
        # what user interfaces show
        "ss_output_name": facts.name,
        "ss_sd_model_name": facts.base,
        "ss_training_comment": _comment(facts),
        "ss_training_started_at": facts.started_at,
        "ss_training_finished_at": facts.finished_at,
        "ss_tag_frequency": _tags(facts),
        "ss_dataset_dirs": _dataset(facts),
        "ss_resolution": f"({size}, {size})" if size else None,
        # how it was trained
        "ss_learning_rate": facts.learning_rate,
        "ss_unet_lr": facts.learning_rate,
        "ss_text_encoder_lr": facts.text_encoder_lr,
        "ss_optimizer": facts.optimizer,
        "ss_lr_scheduler": facts.lr_scheduler,
        "ss_steps": facts.steps,
        "ss_max_train_steps": facts.steps,
        "ss_epoch": facts.epochs,
        "ss_num_epochs": facts.epochs,
        "ss_num_train_images": facts.num_images,
        "ss_num_reg_images": facts.num_class_images,
        "ss_batch_size_per_device": facts.batch_size,
        "ss_total_batch_size": rows if facts.batch_size else None,
        "ss_gradient_accumulation_steps": facts.accumulation,
        "ss_mixed_precision": facts.mixed_precision,
        "ss_seed": facts.seed,
        "ss_enable_bucket": facts.aspect_ratio_buckets,
        "ss_caption_dropout_rate": facts.caption_dropout,
        "ss_shuffle_caption": facts.shuffle_caption,
        "ss_keep_tokens": facts.keep_tokens,
    }
    values = {name: value for name, value in values.items() if value is not None}
    # sd-scripts writes these two also when they are off
    values |= {"ss_min_snr_gamma": facts.min_snr_gamma, "ss_noise_offset": facts.noise_offset}
    return {name: str(value) for name, value in values.items()}


def _network_args(tensors: Mapping[str, Tensor], facts: LoraFacts) -> str | None:
    """sd-scripts gives 3 x 3 convolutions a rank of their own, told apart here."""
    if any(tensor.ndim == 4 and tensor.shape[-1] > 1 for tensor in tensors.values()):
        return json.dumps({"conv_dim": str(facts.rank), "conv_alpha": str(float(facts.alpha))})
    return None


def _tags(facts: LoraFacts) -> str | None:
    return json.dumps({facts.name: tag_frequency(facts.captions)}) if facts.captions else None


def _dataset(facts: LoraFacts) -> str | None:
    if facts.num_images is None:
        return None
    return json.dumps({facts.name: {"n_repeats": 1, "img_count": facts.num_images}})


def _comment(facts: LoraFacts) -> str:
    shown = {**facts.settings, "rho_relative": facts.rho_relative}
    values = " ".join(f"{name}={value}" for name, value in shown.items() if value is not None)
    return f"Bi-LoRA Diffusion, method={facts.method} {values}".rstrip()


def _model_spec(facts: LoraFacts, digest: str) -> dict[str, str]:
    values = {
        "sai_model_spec": "1.0.1",
        "architecture": SDXL_ARCHITECTURE,
        "implementation": SGM_IMPLEMENTATION,
        "implementation_version": f"bilora-diffusion/{bilora_diffusion.__version__}",
        "title": facts.name,
        "resolution": f"{facts.resolution}x{facts.resolution}" if facts.resolution else "1024x1024",
        "prediction_type": "v" if facts.prediction_type == "v_prediction" else "epsilon",
        "hash_sha256": f"0x{digest}",
        "trigger_phrase": facts.instance_prompt,
        "date": None if facts.finished_at is None else utc_date(facts.finished_at).removesuffix("Z"),
    }
    return {f"modelspec.{name}": value for name, value in values.items() if value is not None}
