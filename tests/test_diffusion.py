"""The denoising objective: what is predicted, how rows are weighted, and that draws depend on their stream alone."""

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, EDMEulerScheduler, EulerDiscreteScheduler
from torch import Tensor

from bilora_diffusion.diffusion import Objective, build_objective, draw_noise, draw_timestep
from bilora_diffusion.errors import UserError
from bilora_diffusion.randomness import generator

SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
TIMESTEPS = torch.tensor([0, 20, 500, 801, 999])


def rows(count: int = len(TIMESTEPS), seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, noise and a model's output."""
    draw = torch.Generator().manual_seed(seed)
    latents, noise, output = (torch.randn(count, 4, 8, 8, generator=draw) for _ in range(3))
    return latents, noise, output


def ddpm(prediction: str = "epsilon", gamma: float | None = None, **schedule) -> Objective:
    return build_objective(EulerDiscreteScheduler(**SDXL, prediction_type=prediction, **schedule), snr_gamma=gamma)


def signal_to_noise(objective: Objective) -> Tensor:
    """alpha^2 / sigma^2 of `TIMESTEPS` in float64, from the betas."""
    alphas = objective.scheduler.alphas_cumprod.double()[TIMESTEPS]
    return alphas / (1 - alphas)


# --- DDPM ---


def test_the_noising_is_the_forward_process():
    objective = ddpm()
    latents, noise, _ = rows()
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0)[TIMESTEPS].view(-1, 1, 1, 1)
    expected = alphas.sqrt() * latents + (1 - alphas).sqrt() * noise
    noisy = objective.noisy_latents(latents, noise, TIMESTEPS)
    assert torch.allclose(noisy.double(), expected, atol=1e-5)
    assert objective.model_input(noisy, TIMESTEPS) is noisy


def test_each_prediction_type_has_its_target():
    latents, noise, output = rows()
    schedule = DDPMScheduler(**SDXL)
    targets = {
        "epsilon": noise,
        "v_prediction": schedule.get_velocity(latents, noise, TIMESTEPS),
        "sample": latents,
    }
    for prediction, target in targets.items():
        losses = ddpm(prediction).losses(output, latents, noise, torch.zeros_like(noise), TIMESTEPS)
        expected = torch.stack([((o - t) ** 2).mean() for o, t in zip(output, target, strict=True)])
        assert losses.shape == (5,)
        assert losses.dtype == torch.float32
        assert torch.allclose(losses, expected, rtol=1e-6)
        perfect = ddpm(prediction).losses(target, latents, noise, torch.zeros_like(noise), TIMESTEPS)
        assert torch.equal(perfect, torch.zeros(5))


def test_losses_are_float32_whatever_the_model_computes_in():
    latents, noise, output = rows()
    half = ddpm().losses(output.bfloat16(), latents, noise, noise, TIMESTEPS)
    full = ddpm().losses(output.bfloat16().float(), latents, noise, noise, TIMESTEPS)
    assert half.dtype == torch.float32
    assert torch.equal(half, full)


def test_an_unknown_prediction_type_is_refused():
    for prediction, edm in (("noise", False), ("sample", True)):
        with pytest.raises(UserError, match=prediction):
            build_objective(EulerDiscreteScheduler(**SDXL, prediction_type=prediction), edm=edm)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights(prediction):
    """In terms of the loss on x0 all three are min(snr, gamma) (Hang et al., 2023, Section 3.4)."""
    gamma = 5.0
    plain, weighted = ddpm(prediction), ddpm(prediction, gamma)
    latents, noise, output = rows()
    snr = signal_to_noise(plain)
    clipped = snr.clamp(max=gamma)
    expected = {"epsilon": clipped / snr, "v_prediction": clipped / (snr + 1), "sample": clipped}[prediction]
    arguments = (output, latents, noise, noise, TIMESTEPS)
    weights = weighted.losses(*arguments) / plain.losses(*arguments)
    assert (snr > gamma).any() and (snr < gamma).any()
    assert torch.allclose(weights.double(), expected, rtol=1e-3)


def test_min_snr_weights_weigh_the_error_of_the_clean_latents():
    """One error, told in three ways: a model off by the same x0 has the same loss whatever it predicts."""
    latents, noise, error = rows()
    schedule = DDPMScheduler(**SDXL)
    alpha = schedule.alphas_cumprod[TIMESTEPS].view(-1, 1, 1, 1)
    guess = latents + 0.1 * error  # of x0, the noisy latents being what they are
    noisy = schedule.add_noise(latents, noise, TIMESTEPS)
    guessed_noise = (noisy - alpha.sqrt() * guess) / (1 - alpha).sqrt()
    velocity = alpha.sqrt() * guessed_noise - (1 - alpha).sqrt() * guess
    outputs = {"sample": guess, "epsilon": guessed_noise, "v_prediction": velocity}
    losses = {
        prediction: ddpm(prediction, 5.0).losses(output, latents, noise, noisy, TIMESTEPS)
        for prediction, output in outputs.items()
    }
    assert torch.allclose(losses["epsilon"], losses["sample"], rtol=1e-2)
    # For v the paper's weight is min(snr, gamma) / (snr + 1) on the velocity.
    assert torch.allclose(losses["v_prediction"], losses["sample"], rtol=1e-2)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weights_of_a_schedule_that_ends_in_pure_noise(prediction):
    objective = ddpm(prediction, 5.0, rescale_betas_zero_snr=True)
    latents, noise, output = rows()
    assert objective.scheduler.alphas_cumprod[-1] < 1e-6
    arguments = (output, latents, noise, noise, TIMESTEPS)
    weights = objective.losses(*arguments) / ddpm(prediction, None, rescale_betas_zero_snr=True).losses(*arguments)
    assert weights.isfinite().all()
    assert weights[-1] == pytest.approx({"epsilon": 1.0, "v_prediction": 0.0}[prediction], abs=1e-6)


def test_any_sampling_scheduler_of_a_base_is_read():
    base = DPMSolverMultistepScheduler(**SDXL, prediction_type="v_prediction")
    objective = build_objective(base)
    assert isinstance(objective.scheduler, DDPMScheduler)
    assert objective.prediction_type == "v_prediction"
    assert torch.allclose(objective.scheduler.alphas_cumprod, base.alphas_cumprod)


# --- EDM ---


def sigma_of(scheduler: EulerDiscreteScheduler, timesteps: Tensor) -> Tensor:
    """The noise level that a schedule has for its timesteps, by walking through it."""
    schedule = scheduler.timesteps.tolist()
    return torch.tensor([scheduler.sigmas[schedule.index(t)] for t in timesteps.tolist()]).view(-1, 1, 1, 1)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_edm_training_on_the_bases_own_schedule(prediction):
    """The stock script's arithmetic with --do_edm_style_training: input, denoised latents and sigma^-2 weights."""
    base = EulerDiscreteScheduler(**SDXL, prediction_type=prediction, timestep_spacing="leading", steps_offset=1)
    objective = build_objective(base, edm=True)
    latents, noise, output = rows(3)
    indices = torch.tensor([3, 400, 999])
    timesteps = objective.scheduler.timesteps[indices]
    sigma = objective.scheduler.sigmas[indices].view(-1, 1, 1, 1)
    assert torch.equal(sigma, sigma_of(objective.scheduler, timesteps))
    alphas = DDPMScheduler(**SDXL).alphas_cumprod.flip(0)[indices].view(-1, 1, 1, 1)
    assert torch.allclose(sigma, ((1 - alphas) / alphas).sqrt(), rtol=1e-3)

    noisy = objective.noisy_latents(latents, noise, timesteps)
    assert torch.allclose(noisy, latents + sigma * noise, rtol=1e-5)
    assert torch.allclose(objective.model_input(noisy, timesteps), noisy / (sigma**2 + 1) ** 0.5, rtol=1e-5)
    if prediction == "epsilon":
        denoised = output * (-sigma) + noisy
    else:
        denoised = output * (-sigma / (sigma**2 + 1) ** 0.5) + (noisy / (sigma**2 + 1))
    expected = (sigma**-2.0 * (denoised - latents) ** 2).reshape(3, -1).mean(1)
    assert torch.allclose(objective.losses(output, latents, noise, noisy, timesteps), expected, rtol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_edm_training_of_an_edm_base(prediction):
    """Karras et al. (2022), Table 1: c_skip, c_out, c_in with sigma_data = 0.5, and no weight beside."""
    base = EDMEulerScheduler(prediction_type=prediction)
    objective = build_objective(base)  # such a base knows nothing else: no flag is needed
    assert objective.edm
    latents, noise, output = rows(3)
    indices = torch.tensor([3, 400, 998])
    timesteps = objective.scheduler.timesteps[indices]
    sigma, data = objective.scheduler.sigmas[indices].view(-1, 1, 1, 1), 0.5
    noisy = objective.noisy_latents(latents, noise, timesteps)
    assert torch.allclose(noisy, latents + sigma * noise, rtol=1e-5)
    total = sigma**2 + data**2
    assert torch.allclose(objective.model_input(noisy, timesteps), noisy / total.sqrt(), rtol=1e-5)
    sign = 1 if prediction == "epsilon" else -1
    denoised = data**2 / total * noisy + sign * sigma * data / total.sqrt() * output
    expected = ((denoised - latents) ** 2).flatten(1).mean(1)
    assert torch.allclose(objective.losses(output, latents, noise, noisy, timesteps), expected, rtol=1e-4)
    with pytest.raises(UserError, match="snr_gamma"):
        build_objective(base, snr_gamma=5.0)


# --- draws ---


def test_timesteps_are_drawn_from_the_whole_schedule():
    for objective in (ddpm(), build_objective(EulerDiscreteScheduler(**SDXL), edm=True)):
        drawn = torch.stack([draw_timestep(objective, generator(0, "timestep", n)) for n in range(3000)])
        assert drawn.shape == (3000,)
        assert set(drawn.tolist()) <= set(objective.scheduler.timesteps.tolist())
        assert drawn.min() < 5 and drawn.max() > 994
        assert drawn.float().mean().item() == pytest.approx(499.5, abs=25)  # 5 standard errors
    assert draw_timestep(ddpm(), generator(0)).dtype == torch.int64


def test_both_objectives_draw_the_same_place_of_the_schedule():
    edm = build_objective(EulerDiscreteScheduler(**SDXL), edm=True)
    for n in range(5):
        index = draw_timestep(ddpm(), generator(0, n))
        assert edm.scheduler.timesteps[index] == draw_timestep(edm, generator(0, n))


def test_offset_noise_adds_one_constant_a_channel():
    plain = draw_noise((4, 16, 16), generator(0, "noise", 3))
    offset = draw_noise((4, 16, 16), generator(0, "noise", 3), offset=0.1)
    constant = (offset - plain).flatten(1)
    assert torch.allclose(constant, constant[:, :1].expand_as(constant), atol=1e-6)
    assert constant[:, 0].unique().numel() == 4
    twice = draw_noise((4, 16, 16), generator(0, "noise", 3), offset=0.2) - plain
    assert torch.allclose(twice.flatten(1), 2 * constant, atol=1e-6)
    many = torch.stack([draw_noise((4, 1, 1), generator(0, n), offset=3.0) for n in range(2000)])
    assert many.std().item() == pytest.approx(10**0.5, rel=0.05)  # 1 + 3^2


def test_noise_is_standard_normal_and_each_stream_its_own():
    noise = draw_noise((4, 64, 64), generator(0, "noise", 0))
    assert noise.dtype == torch.float32
    assert noise.mean().item() == pytest.approx(0, abs=0.03)
    assert noise.std().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(noise, draw_noise((4, 64, 64), generator(0, "noise", 0)))
    for stream in ((1, "noise", 0), (0, "noise", 1), (0, "timestep", 0)):
        assert not torch.equal(noise, draw_noise((4, 64, 64), generator(*stream)))


def test_the_draws_of_a_run_do_not_depend_on_its_options(build):
    """The same rows see the same noise and timesteps at another batch size, place in the batch, loss and method."""
    reference = build("lora", train_batch_size=2).batches(1)[0]  # draws 2 and 3
    options = [
        {"noise_offset": 0.1, "snr_gamma": 5.0},
        {"with_prior_preservation": True, "caption_dropout": 0.9, "random_flip": True},
        {"do_edm_style_training": True, "train_text_encoder": True, "lora_dropout": 0.3},
    ]
    for flags in options:
        run = build("lora", **flags)
        batch = run.batches(1)[0]
        instances = batch.instances.bool()
        assert instances.sum() == 2
        noise, timesteps = batch.noise[instances], batch.timesteps[instances]
        if "noise_offset" in flags:
            offset = (noise - reference.noise).flatten(2)
            assert torch.allclose(offset, offset[..., :1].expand_as(offset), atol=1e-6)
            assert (offset != 0).all()
        else:
            assert torch.equal(noise, reference.noise)
        if "do_edm_style_training" in flags:
            timesteps = 999 - timesteps  # the schedule runs backwards
        assert torch.equal(timesteps.to(reference.timesteps.dtype), reference.timesteps)
        if "with_prior_preservation" in flags:
            assert not torch.equal(batch.noise[1], batch.noise[0])  # the class row draws for itself
            assert batch.timesteps[1] != batch.timesteps[0]
    later = build("lora", train_batch_size=1).batch([3])
    assert torch.equal(later.noise[0], reference.noise[1])
    assert torch.equal(later.timesteps[0], reference.timesteps[1])
    assert torch.equal(later.latents[0], reference.latents[1])
