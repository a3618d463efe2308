"""A small SDXL-architecture base that knows the flat icons by name: what a LoRA of the 3D ones starts from.

SDXL's blocks, conditioning, schedule and text path at widths of 48 and 96; the latents are linear (`PatchPCA`), the
tokens are SDXL's own, renumbered to those that occur. UNet and both text encoders are trained from nothing.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from benchmarks.icons import FOLDER, SIZE_PX, Icons
from bilora_diffusion.bases.clip_tokenizer import clip_tokenizer, sdxl_merges
from bilora_diffusion.batches import Batch, TrainingMicroBatch
from bilora_diffusion.diffusion import Objective
from bilora_diffusion.embedded.patches import PatchPCA
from bilora_diffusion.randomness import generator, stream_seed
from bilora_diffusion.sdxl import Conditioning, embed_prompts, time_ids

__all__ = ["STEPS", "Vocabulary", "draws", "flat_prompt", "load_base", "objective", "solid_prompt", "train"]

PATCH_PX = 4
LATENT_CHANNELS = 12
SEED = 0
STEPS = 7000
BATCH = 32
LEARNING_RATE = 1.2e-3
DECAY_FROM = 0.6  # share of the steps after which the learning rate falls to zero
EMA_DECAY = 0.998
CAPTION_DROPOUT = 0.1
SNR_GAMMA = 5.0
TOKENS = 16  # the longest caption has 14; SDXL's 77 would only cost time
TEXT_WIDTHS = (64, 96)
TIME_WIDTH = 8
SAVE_EVERY = 500
PROBE_EVERY = 500


def flat_prompt(name: str) -> str:
    """The caption of a flat icon."""
    return f"{name}, flat icon"


def solid_prompt(name: str) -> str:
    """The caption of a 3D icon; the base has seen every word of it but the style's."""
    return f"{name}, 3d icon"


def objective() -> Objective:
    """SDXL's noise schedule, noise prediction, min-SNR weights: of the base's training and of every loss reported."""
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000
    )
    return Objective(scheduler, snr_gamma=SNR_GAMMA)


class Vocabulary:
    """SDXL's tokens, renumbered in their order to those that occur in the captions; "" is the dropped caption."""

    def __init__(self, icons: Icons) -> None:
        self.tokenizer = clip_tokenizer(sdxl_merges(), model_max_length=TOKENS)
        prompts = ["", *(prompt(name) for name in icons.names for prompt in (flat_prompt, solid_prompt))]
        self.known = self._ids(prompts).unique()

    def __len__(self) -> int:
        return len(self.known)

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Token ids for both text encoders, (B, 2, 16)."""
        return torch.searchsorted(self.known, self._ids(prompts))[:, None].expand(-1, 2, -1).contiguous()

    def _ids(self, prompts: Sequence[str]) -> Tensor:
        encoded = self.tokenizer(
            list(prompts), padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
        )
        return encoded.input_ids


def draws(seed: int, purpose: str, rows: Tensor, latents: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Noise and timesteps for rows, which depend on the seed, the purpose and the number alone.

    Timesteps are stratified over the batch: each row's is uniform, and together they cover the schedule.
    """
    random = generator(seed, purpose, number)
    noise = torch.randn(latents[rows].shape, generator=random)
    strata = (torch.randperm(len(rows), generator=random) + torch.rand(len(rows), generator=random)) / len(rows)
    return noise, (strata * 1000).long().clamp_max(999)


@dataclass
class _State:
    """Everything a resumed training needs beside the code."""

    models: dict[str, nn.Module]
    averages: dict[str, dict[str, Tensor]]
    optimizer: torch.optim.Optimizer
    step: int
    probes: list[tuple[int, float]]
    seconds: float


def train(icons: Icons, steps: int = STEPS, path: Path = FOLDER / "base.pt") -> None:
    """Trains the base, or goes on where an earlier call was stopped; prints the probe loss as it goes."""
    latents = PatchPCA(icons.flat, PATCH_PX, LATENT_CHANNELS).encode(icons.flat)
    vocabulary = Vocabulary(icons)
    captions, empty = vocabulary([flat_prompt(name) for name in icons.names]), vocabulary([""])[0]
    state = _begin(vocabulary)
    if path.exists():
        _restore(state, path)
    probe = _probe(latents, captions)
    parameters = [p for model in state.models.values() for p in model.parameters()]
    averaged = [average for part in state.averages.values() for average in part.values()]
    followed = [value for model in state.models.values() for value in model.state_dict().values()]
    began = time.perf_counter() - state.seconds
    while state.step < steps:
        _set_learning_rate(state.optimizer, state.step / steps)
        _micro_batch(state.models, _batch(latents, captions, empty, state.step)).loss().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.step += 1
        decay = min(EMA_DECAY, (1 + state.step) / (10 + state.step))
        torch._foreach_lerp_(averaged, followed, 1 - decay)
        if state.step % PROBE_EVERY == 0 or state.step == steps:
            state.seconds = time.perf_counter() - began
            state.probes.append((state.step, _probe_loss(state, probe)))
            print(f"step {state.step}: probe loss {state.probes[-1][1]:.4f}, {state.seconds:.0f} s", flush=True)
        if state.step % SAVE_EVERY == 0 or state.step == steps:
            _save(state, steps, path)


def load_base(icons: Icons, path: Path = FOLDER / "base.pt") -> tuple[dict[str, nn.Module], dict[str, object]]:
    """The averaged models, frozen and in evaluation mode, and how the base was made."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run `python -m benchmarks.ascent base` first")
    models = _models(len(Vocabulary(icons)))
    saved = torch.load(path)
    for name, model in models.items():
        model.load_state_dict(saved["averages"][name])
        model.requires_grad_(False).eval()
    return models, {
        "steps": saved["step"],
        "planned_steps": saved["steps"],
        "pictures": saved["step"] * BATCH,
        "probe_losses": saved["probes"],
        "seconds": round(saved["seconds"]),
        "unet_parameters": sum(p.numel() for p in models["unet"].parameters()),
    }


@torch.no_grad()
def conditioning(models: Mapping[str, nn.Module], vocabulary: Vocabulary, prompts: Sequence[str]) -> Conditioning:
    """The frozen text encoders' embeddings of prompts, with the icons' micro-conditioning."""
    hidden, pooled = embed_prompts((models["text_encoder"], models["text_encoder_2"]), vocabulary(prompts))
    return Conditioning(_sizes(len(prompts)), hidden, pooled)


def _models(tokens: int) -> dict[str, nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(SEED, "base", "weights"))
        models = {
            "unet": _unet(),
            "text_encoder": CLIPTextModel(_text_config(tokens, TEXT_WIDTHS[0], "quick_gelu")),
            "text_encoder_2": CLIPTextModelWithProjection(_text_config(tokens, TEXT_WIDTHS[1], "gelu")),
        }
        for name in ("text_encoder", "text_encoder_2"):
            model = getattr(models[name], "text_model", models[name])
            # CLIP's 0.02 leaves all captions alike for a long while.
            nn.init.normal_(model.embeddings.token_embedding.weight, std=0.5)
    return models


def _unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(48, 96),
        layers_per_block=1,
        transformer_layers_per_block=(1, 1),
        attention_head_dim=(2, 4),  # the number of heads, in spite of the name
        cross_attention_dim=sum(TEXT_WIDTHS),
        use_linear_projection=True,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_WIDTH,
        projection_class_embeddings_input_dim=TEXT_WIDTHS[1] + 6 * TIME_WIDTH,
    )


def _text_config(tokens: int, width: int, activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=tokens,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        hidden_act=activation,
        bos_token_id=0,
        eos_token_id=2,  # pools at the largest id, which the end token has
        pad_token_id=1,
    )


def _begin(vocabulary: Vocabulary) -> _State:
    models = _models(len(vocabulary))
    averages = {
        name: {key: value.clone() for key, value in model.state_dict().items()} for name, model in models.items()
    }
    parameters = [p for model in models.values() for p in model.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)
    return _State(models, averages, optimizer, 0, [], 0.0)


def _restore(state: _State, path: Path) -> None:
    saved = torch.load(path)
    for name, model in state.models.items():
        model.load_state_dict(saved["models"][name])
        for key, average in state.averages[name].items():
            average.copy_(saved["averages"][name][key])
    state.optimizer.load_state_dict(saved["optimizer"])
    state.step, state.probes, state.seconds = saved["step"], saved["probes"], saved["seconds"]


def _save(state: _State, steps: int, path: Path) -> None:
    content = {
        "models": {name: model.state_dict() for name, model in state.models.items()},
        "averages": state.averages,
        "optimizer": state.optimizer.state_dict(),
        "step": state.step,
        "steps": steps,
        "probes": state.probes,
        "seconds": state.seconds,
    }
    partial = path.with_suffix(".partial")
    torch.save(content, partial)
    partial.replace(path)


def _set_learning_rate(optimizer: torch.optim.Optimizer, done: float) -> None:
    rate = LEARNING_RATE * min(1.0, (1 - done) / (1 - DECAY_FROM))
    for group in optimizer.param_groups:
        group["lr"] = rate


def _batch(latents: Tensor, captions: Tensor, empty: Tensor, step: int) -> Batch:
    random = generator(SEED, "base", "rows", step)
    rows = torch.randint(len(latents), (BATCH,), generator=random)
    dropped = torch.rand(BATCH, generator=random) < CAPTION_DROPOUT
    ids = torch.where(dropped[:, None, None], empty, captions[rows])
    noise, timesteps = draws(SEED, "base", rows, latents, step)
    return Batch(
        latents[rows],
        noise,
        timesteps,
        Conditioning(_sizes(BATCH), token_ids=ids),
        torch.ones(BATCH),
        torch.ones(BATCH),
    )


def _probe(latents: Tensor, captions: Tensor) -> Batch:
    """256 fixed draws of the training icons."""
    rows = torch.arange(256) % len(latents)
    noise, timesteps = draws(SEED, "base probe", rows, latents, 0)
    return Batch(
        latents[rows],
        noise,
        timesteps,
        Conditioning(_sizes(256), token_ids=captions[rows]),
        torch.ones(256),
        torch.ones(256),
    )


@torch.no_grad()
def _probe_loss(state: _State, probe: Batch) -> float:
    """Of the averaged models."""
    followed = {name: {k: v.clone() for k, v in model.state_dict().items()} for name, model in state.models.items()}
    for name, model in state.models.items():
        model.load_state_dict(state.averages[name])
    loss = _micro_batch(state.models, probe).loss().item()
    for name, model in state.models.items():
        model.load_state_dict(followed[name])
    return loss


def _micro_batch(models: Mapping[str, nn.Module], batch: Batch) -> TrainingMicroBatch:
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    return TrainingMicroBatch(batch, models, objective(), torch.float32, 1.0, disabled)


def _sizes(rows: int) -> Tensor:
    return time_ids((SIZE_PX, SIZE_PX), (0, 0), (SIZE_PX, SIZE_PX)).repeat(rows, 1)
