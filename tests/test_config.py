"""The configuration: stock flags kept, ranges and contradictions refused in one line, the file read back."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from bilora_diffusion.command_line import parse, read_config_file
from bilora_diffusion.config import FLAGS, GROUPS, TrainingConfig, as_dict, to_yaml
from bilora_diffusion.errors import UserError
from bilora_diffusion.flags import nearest
from bilora_diffusion.method_names import METHOD_NAMES

# The 72 flags of diffusers' train_dreambooth_lora_sdxl.py with the defaults of its argument parser.
STOCK = {
    "pretrained_model_name_or_path": dataclasses.MISSING,
    "pretrained_vae_model_name_or_path": None,
    "revision": None,
    "variant": None,
    "dataset_name": None,
    "dataset_config_name": None,
    "instance_data_dir": None,
    "cache_dir": None,
    "image_column": "image",
    "caption_column": None,
    "repeats": 1,
    "class_data_dir": None,
    "instance_prompt": dataclasses.MISSING,
    "class_prompt": None,
    "validation_prompt": None,
    "num_validation_images": 4,
    "validation_epochs": 50,
    "do_edm_style_training": False,
    "with_prior_preservation": False,
    "prior_loss_weight": 1.0,
    "num_class_images": 100,
    "output_dir": "lora-dreambooth-model",
    "output_kohya_format": False,
    "seed": None,
    "resolution": 1024,
    "center_crop": False,
    "random_flip": False,
    "train_text_encoder": False,
    "train_batch_size": 4,
    "sample_batch_size": 4,
    "num_train_epochs": 1,
    "max_train_steps": None,
    "checkpointing_steps": 500,
    "checkpoints_total_limit": None,
    "resume_from_checkpoint": None,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "learning_rate": 1e-4,
    "text_encoder_lr": 5e-6,
    "scale_lr": False,
    "lr_scheduler": "constant",
    "snr_gamma": None,
    "lr_warmup_steps": 500,
    "lr_num_cycles": 1,
    "lr_power": 1.0,
    "dataloader_num_workers": 0,
    "optimizer": "AdamW",
    "use_8bit_adam": False,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "prodigy_beta3": None,
    "prodigy_decouple": True,
    "adam_weight_decay": 1e-4,
    "adam_weight_decay_text_encoder": 1e-3,
    "adam_epsilon": 1e-8,
    "prodigy_use_bias_correction": True,
    "prodigy_safeguard_warmup": True,
    "max_grad_norm": 1.0,
    "push_to_hub": False,
    "hub_token": None,
    "hub_model_id": None,
    "logging_dir": "logs",
    "allow_tf32": False,
    "report_to": "tensorboard",
    "mixed_precision": None,
    "prior_generation_precision": None,
    "local_rank": -1,
    "enable_xformers_memory_efficient_attention": False,
    "rank": 4,
    "lora_dropout": 0.0,
    "use_dora": False,
    "image_interpolation_mode": "lanczos",
}
OTHER_DEFAULTS = {"output_kohya_format": True, "resolution": None, "instance_prompt": None}

BASE = {"pretrained_model_name_or_path": "tiny-random", "instance_data_dir": "photos"}
PRODIGY = {"optimizer": "prodigy", "learning_rate": 1.0, "auxiliary_learning_rate": 1e-3}
PRIOR = {"with_prior_preservation": True, "class_data_dir": "dogs", "class_prompt": "a dog"}
FROM_BASE = {"with_prior_preservation": True, "prior_source": "base_prediction", "class_prompt": "a dog"}
BUCKETS = {"use_aspect_ratio_buckets": True}

CONFIGS: list[dict[str, Any]] = [
    {},
    {"rho": 0.05, "lora_alpha": 16, "seed": 0, "mixed_precision": "no", "cache_latents": False},
    {
        "instance_prompt": "a photo of sks dog: 'the' \"one\"\n# no comment",
        "validation_prompt": "été 🐕 " * 40,
    },
    {"instance_prompt": "", "class_prompt": "no", "revision": "1e5", "variant": "null", "cache_dir": "~"},
    {"learning_rate": 1e-5, "adam_epsilon": 1e-30, "text_encoder_lr": 0.1 + 0.2, "noise_offset": 3},
    {"method": "lora", "report_to": "none", "output_kohya_format": False, "max_train_steps": 10**12},
    PRODIGY | PRIOR | {"train_text_encoder": True, "lora_layers": "to_q, to_v"},
]

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"instance_data_dir": None}, "--instance_data_dir FOLDER or --dataset_name"),
    ({"dataset_name": "owner/dogs"}, "--dataset_name and --instance_data_dir are both set"),
    ({"with_prior_preservation": True, "class_prompt": "a dog"}, "needs --class_data_dir"),
    ({"with_prior_preservation": True, "class_data_dir": "dogs"}, "needs --class_prompt"),
    ({"with_prior_preservation": True, "prior_source": "base_prediction"}, "needs --class_prompt"),
    (FROM_BASE | {"class_prompt": "", "caption_dropout": 0.1}, "--caption_dropout teaches it"),
    ({"prior_source": "base"}, "--prior_source is 'base': it must be one of class_images, base_prediction"),
    ({"mask_dir": "masks", "alpha_mask": True}, "--mask_dir and --alpha_mask are both set"),
    ({"mask_dir": "./photos"}, "--mask_dir is the folder of --instance_data_dir"),
    (
        {"mask_dir": "m", "dataset_name": "owner/dogs", "instance_data_dir": None},
        "with --dataset_name use --alpha_mask",
    ),
    ({"cache_dir_latents": "kept", "cache_latents": False}, "--cache_dir_latents keeps latents and --cache_latents is"),
    (
        {"center_crop": True, "crops_per_image": 1},
        "--center_crop and --crops_per_image are both set: the middle is one",
    ),
    ({"aspect_ratio_buckets": "64,64"}, "--aspect_ratio_buckets needs --use_aspect_ratio_buckets"),
    (BUCKETS | {"aspect_ratio_buckets": "64x64"}, "--aspect_ratio_buckets is '64x64': it must be pairs height,width"),
    (BUCKETS | {"aspect_ratio_buckets": "64,64;60,64"}, "each number >= 16 and a multiple of 8"),
    (BUCKETS | {"aspect_ratio_buckets": ";"}, "--aspect_ratio_buckets is ';'"),
    (BUCKETS | {"aspect_ratio_buckets": "64,64,64"}, "--aspect_ratio_buckets is '64,64,64'"),
    (PRIOR | BUCKETS, "--use_aspect_ratio_buckets does not go with class pictures"),
    (PRIOR | {"class_data_dir": "./photos/"}, "--class_data_dir is the folder of --instance_data_dir"),
    ({"output_dir": "photos"}, "--output_dir is the folder of --instance_data_dir"),
    ({"rho": 0.1, "rho_relative": 0.1}, "--rho and --rho_relative"),
    ({"lora_layers": "to_q,,to_v"}, "--lora_layers is 'to_q,,to_v'"),
    ({"init_lora_weights": "pisa"}, "--init_lora_weights is 'pisa': it must be one of gaussian, kaiming, pissa"),
    ({"init_lora_weights": "pissa_niter_"}, "--init_lora_weights is 'pissa_niter_'"),
    ({"init_lora_weights": "pissa_niter_4", "use_dora": True}, "--use_dora and --init_lora_weights pissa_niter_4"),
    ({"init_lora_weights": "lora_ga", "init_lora_from": "x"}, "--init_lora_from and --init_lora_weights lora_ga"),
    (PRODIGY | {"use_8bit_adam": True}, "--use_8bit_adam works only with --optimizer AdamW, not with prodigy"),
    ({"optimizer": "adafactor", "paged_adam": True}, "--paged_adam works only with --optimizer AdamW"),
    ({"init_lora_weights": "lora_ga", "base_precision": "nf4"}, "gradients of the base, and with --base_precision nf4"),
    ({"compile": True, "base_precision": "nf4"}, "--compile with --base_precision nf4 would keep the restored weights"),
    ({"compile": True, "offload_base": True}, "--compile with --offload_base would keep the restored weights"),
    ({"init_lora_weights": "lora_ga", "offload_base": True}, "gradients of the base, and with --offload_base"),
    ({"optimizer": "prodigy", "learning_rate": 1.0}, "needs --auxiliary_learning_rate"),
    ({"optimizer": "prodigy", "ascent": "sgd"}, "needs --auxiliary_learning_rate"),
    ({"do_edm_style_training": True, "snr_gamma": 5}, "--snr_gamma cannot be used with --do_edm"),
    ({"report_to": "wandb", "hub_token": "t"}, "--report_to wandb and --hub_token"),
    (
        {"optimizer": "AdamX"},
        "--optimizer is 'AdamX': it must be one of AdamW, prodigy, adafactor; did you mean AdamW?",
    ),
    ({"lr_scheduler": "cosin"}, "did you mean cosine?"),
    ({"lr_scheduler": "piecewise_constant"}, "--lr_scheduler is 'piecewise_constant'"),
    (
        {"method": "bi-lora"},
        f"--method is 'bi-lora': it must be one of {', '.join(METHOD_NAMES)}; did you mean bilora?",
    ),
    ({"mixed_precision": "bfloat16"}, "did you mean bf16?"),
    ({"report_to": "tensorbord"}, "did you mean tensorboard?"),
    ({"rank": 0}, "--rank is 0: it must be an integer in [1, 1024]"),
    ({"rank": -4}, "--rank is -4: it must be an integer in [1, 1024]"),
    ({"rank": 4.0}, "--rank is 4.0: it must be an integer in [1, 1024]"),
    ({"rank": True}, "--rank is True: it must be an integer in [1, 1024]"),
    ({"rank": "4"}, "--rank is '4': it must be an integer in [1, 1024]"),
    ({"rank": None}, "--rank is null: it must be an integer in [1, 1024]; leave it out for the default"),
    ({"lora_alpha": 0}, "--lora_alpha is 0.0: it must be a number > 0"),
    ({"auxiliary_rank": 0}, "--auxiliary_rank is 0: it must be an integer in [1, 1024]"),
    ({"rho": -0.05}, "--rho is -0.05: it must be a number >= 0"),
    ({"rho": math.nan}, "--rho is nan: it must be a number >= 0"),
    ({"rho_relative": math.inf}, "--rho_relative is inf: it must be a number >= 0"),
    ({"rho": "abc"}, "--rho is 'abc': it must be a number >= 0"),
    ({"rho": False}, "--rho is False: it must be a number >= 0"),
    ({"ascent_fraction": 0}, "--ascent_fraction is 0.0: it must be a number in (0, 1]"),
    ({"resolution": 1020}, "--resolution is 1020: it must be an integer >= 16 and a multiple of 8"),
    ({"resolution": 8}, "--resolution is 8: it must be an integer >= 16 and a multiple of 8"),
    ({"lora_dropout": 1.0}, "--lora_dropout is 1.0: it must be a number in [0, 1)"),
    ({"caption_dropout": 1.1}, "--caption_dropout is 1.1: it must be a number in [0, 1]"),
    ({"snr_gamma": 0}, "--snr_gamma is 0.0: it must be a number > 0"),
    ({"seed": -1}, "--seed is -1: it must be an integer in [0, 4294967295]"),
    ({"learning_rate": -1e-4}, "--learning_rate is -0.0001: it must be a number >= 0"),
    ({"learning_rate": 10**400}, "--learning_rate is 1"),
    ({"seed": 10**400}, "--seed is 1"),
    ({"center_crop": "yes"}, "--center_crop is 'yes': it must be true or false"),
    ({"center_crop": 1}, "--center_crop is 1: it must be true or false"),
    ({"center_crop": None}, "--center_crop is null"),
    ({"revision": 10}, "--revision is 10: it must be text; put it in quotes"),
    ({"output_dir": ""}, "--output_dir is empty"),
    ({"pretrained_model_name_or_path": None}, "--pretrained_model_name_or_path is null"),
]
AT_LEAST_ONE = [
    "repeats",
    "crops_per_image",
    "train_batch_size",
    "sample_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_train_steps",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "validation_epochs",
    "validation_steps",
    "num_class_images",
    "max_bad_steps",
]
NOT_NEGATIVE = [
    "text_encoder_lr",
    "auxiliary_learning_rate",
    "auxiliary_weight_decay",
    "noise_offset",
    "prior_loss_weight",
    "loss_gap_steps",
    "lr_warmup_steps",
    "adam_weight_decay",
    "adam_weight_decay_text_encoder",
    "dataloader_num_workers",
    "keep_tokens",
]

WARNED: list[tuple[dict[str, Any], str]] = [
    ({"class_data_dir": "dogs"}, "--class_data_dir has no effect"),
    ({"class_prompt": "a dog"}, "--class_prompt has no effect"),
    ({"prior_source": "base_prediction"}, "--prior_source base_prediction has no effect without"),
    (FROM_BASE | {"class_data_dir": "dogs"}, "--class_data_dir has no effect with --prior_source"),
    (PRODIGY | {"learning_rate": 1e-4}, "--learning_rate 0.0001 is low for Prodigy"),
    (PRODIGY | {"train_text_encoder": True}, "--text_encoder_lr 5e-06 has no effect with Prodigy"),
    ({"rho": 0}, "plain LoRA"),
    ({"rho_relative": 0.0}, "plain LoRA"),
    ({"ascent": "normalized", "auxiliary_learning_rate": 1e-3}, "--auxiliary_learning_rate has no effect"),
    ({"lr_scheduler": "linear", "max_train_steps": 400}, "--lr_warmup_steps 500 is not below"),
    ({"validation_steps": 10}, "--validation_steps has no effect"),
    ({"dataset_config_name": "x"}, "--dataset_config_name has no effect"),
    (
        {"overwrite_output_dir": True, "resume_from_checkpoint": "latest"},
        "--overwrite_output_dir with --resume",
    ),
]


def make(**values: Any) -> TrainingConfig:
    return TrainingConfig(**(BASE | values))


def test_every_stock_flag_is_here_with_its_default() -> None:
    assert len(STOCK) == 72
    assert {name for name, flag in FLAGS.items() if flag.origin == "stock"} == set(STOCK)
    defaults = {name: FLAGS[name].default for name in STOCK}
    assert defaults == STOCK | OTHER_DEFAULTS
    assert all(type(defaults[name]) is type((STOCK | OTHER_DEFAULTS)[name]) for name in STOCK)
    assert all(FLAGS[name].departure for name in OTHER_DEFAULTS)


@pytest.mark.parametrize("flag", FLAGS.values(), ids=lambda flag: flag.name)
def test_a_flag_says_what_it_is(flag: Any) -> None:
    assert flag.kind in (bool, int, float, str)
    assert flag.group in GROUPS
    assert 10 < len(flag.help) < 200
    assert "\n" not in flag.help + flag.departure
    assert (flag.within is not None) == (flag.kind in (int, float))


def test_defaults_are_valid_and_silent() -> None:
    config = make()
    assert config.warnings() == []
    assert type(config.learning_rate) is float
    assert config.instance_prompt is None


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_refused_in_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        make(**values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("name", AT_LEAST_ONE)
def test_counts_are_at_least_one(name: str) -> None:
    with pytest.raises(UserError, match=f"^--{name} is 0: it must be an integer >= 1$"):
        make(**{name: 0})
    assert getattr(make(**{name: 1}), name) == 1


@pytest.mark.parametrize("name", NOT_NEGATIVE)
def test_not_negative(name: str) -> None:
    with pytest.raises(UserError, match=f"^--{name} is -1(.0)?: it must be an? (number|integer) >= 0$"):
        make(**{name: -1})
    assert getattr(make(**{name: 0}), name) == 0


@pytest.mark.parametrize("name", [name for name, flag in FLAGS.items() if flag.kind is float])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_are_finite(name: str, number: float) -> None:
    with pytest.raises(UserError, match=f"^--{name} is {number}"):
        make(**{name: number})


@pytest.mark.parametrize(("values", "message"), WARNED, ids=lambda value: str(value)[:60])
def test_warnings(values: dict[str, Any], message: str) -> None:
    (warning,) = make(**values).warnings()
    assert message in warning
    assert "\n" not in warning


def test_prodigy_may_ascend_without_a_rate_when_it_needs_none() -> None:
    make(optimizer="prodigy", learning_rate=1.0, ascent="normalized")
    make(optimizer="prodigy", learning_rate=1.0, method="lora")


def test_values_are_taken_in_the_fields_type(tmp_path: Path) -> None:
    config = make(optimizer="ADAMW", mixed_precision="BF16", rho=1, output_dir=tmp_path)
    assert (config.optimizer, config.mixed_precision, config.output_dir) == ("AdamW", "bf16", str(tmp_path))
    assert type(config.rho) is float


def test_replace_checks_again() -> None:
    assert dataclasses.replace(make(), seed=3).seed == 3
    with pytest.raises(UserError, match="--seed"):
        dataclasses.replace(make(), seed=-3)


def test_nearest() -> None:
    assert nearest("Learning-Rate", FLAGS) == "learning_rate"
    assert nearest("qqqq", FLAGS) is None


def test_the_token_is_saved_nowhere() -> None:
    config = make(hub_token="secret-token")
    assert "hub_token" not in as_dict(config)
    assert "secret-token" not in to_yaml(config)
    assert set(as_dict(config)) == set(FLAGS) - {"hub_token"}


@pytest.mark.parametrize("values", CONFIGS, ids=lambda value: ",".join(value) or "defaults")
def test_the_saved_file_gives_the_same_configuration(values: dict[str, Any], tmp_path: Path) -> None:
    config = make(**values)
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    assert parse(["--config", str(file)]) == config
    assert read_config_file(str(file)) == as_dict(config)
    assert yaml.safe_load(file.read_text(encoding="utf-8")) == as_dict(config)
