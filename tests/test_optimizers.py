"""The primary's optimiser and the learning rates of all parts, as the stock script sets them."""

import sys

import pytest
import torch
from quantisers import add_quantisers
from tiny_run import all_equal
from torch import nn

from bilora_diffusion.adapters import AUXILIARY, PRIMARY
from bilora_diffusion.config import TrainingConfig
from bilora_diffusion.errors import UserError
from bilora_diffusion.optimizers import auxiliary_learning_rates, build_optimizer, learning_rates

PARTS = ("unet", "text_encoder", "text_encoder_2")


def config(**flags) -> TrainingConfig:
    return TrainingConfig(
        **{
            "pretrained_model_name_or_path": "tiny-random",
            "instance_data_dir": "pictures",
            "instance_prompt": "a sks picture",
            "learning_rate": 2e-4,
            "text_encoder_lr": 5e-6,
            **flags,
        }
    )


def parameters() -> dict[str, dict[str, nn.Parameter]]:
    names = ("to_k.lora_A.weight", "to_k.lora_B.weight")
    return {part: {name: nn.Parameter(torch.ones(2, 3)) for name in names} for part in PARTS}


def test_unet_and_text_encoders_have_rates_of_their_own():
    assert learning_rates(config(), PARTS, 8) == {"unet": 2e-4, "text_encoder": 5e-6, "text_encoder_2": 5e-6}
    assert learning_rates(config(), ["unet"], 8) == {"unet": 2e-4}


def test_scaling_the_rate_concerns_the_unet_alone():
    """accumulation x batch x processes, as in the stock script, which leaves --text_encoder_lr as it is."""
    rates = learning_rates(config(scale_lr=True), PARTS, 8)
    assert rates == {"unet": pytest.approx(16e-4), "text_encoder": 5e-6, "text_encoder_2": 5e-6}


def test_a_run_scales_by_the_rows_of_an_optimiser_step(build):
    run = build(scale_lr=True, learning_rate=1e-4, train_batch_size=2, gradient_accumulation_steps=3)
    assert [group["lr"] for group in run.parts.trainer.optimizer.param_groups] == [pytest.approx(6e-4)]
    assert [group["lr"] for group in run.parts.method.schedulable[0].param_groups] == [pytest.approx(6e-4)]


def test_prodigy_has_one_rate():
    rates = learning_rates(config(optimizer="prodigy", learning_rate=1.0, ascent="normalized"), PARTS, 8)
    assert rates == dict.fromkeys(PARTS, 1.0)


def test_the_auxiliary_has_the_rates_of_its_parts_unless_told():
    rates = learning_rates(config(), PARTS, 1)
    assert auxiliary_learning_rates(config(), rates) == rates
    assert auxiliary_learning_rates(config(auxiliary_learning_rate=3e-3), rates) == dict.fromkeys(PARTS, 3e-3)
    assert auxiliary_learning_rates(config(auxiliary_learning_rate=0.0), rates) == dict.fromkeys(PARTS, 0.0)


def test_adamw_has_a_group_a_part():
    flags = {
        "adam_weight_decay": 0.1,
        "adam_weight_decay_text_encoder": 0.2,
        "adam_beta1": 0.8,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-6,
    }
    given = parameters()
    optimizer = build_optimizer(config(**flags), given, {"unet": 1e-4, "text_encoder": 2e-5, "text_encoder_2": 3e-5})
    assert type(optimizer) is torch.optim.AdamW
    groups = optimizer.param_groups
    assert [group["lr"] for group in groups] == [1e-4, 2e-5, 3e-5]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.2, 0.2]
    assert all(group["betas"] == (0.8, 0.95) and group["eps"] == 1e-6 for group in groups)
    assert not any(group["maximize"] for group in groups)
    for group, part in zip(groups, PARTS, strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in given[part].values()]


def test_loraplus_gives_every_b_a_rate_of_its_own(build):
    given = parameters()
    optimizer = build_optimizer(config(loraplus_lr_ratio=16), given, dict.fromkeys(PARTS, 1e-4))
    groups = [(group["lr"], [id(p) for p in group["params"]]) for group in optimizer.param_groups]
    A, B = ([id(given[part][f"to_k.lora_{factor}.weight"]) for part in PARTS] for factor in "AB")
    assert groups[::2] == [(1e-4, [one]) for one in A]
    assert groups[1::2] == [(pytest.approx(16e-4), [one]) for one in B]
    run = build("lora", loraplus_lr_ratio=4.0, learning_rate=1e-3, use_dora=True, lr_scheduler="linear")
    before = run.tensors()
    run.train(1)
    moved = {factor: 0.0 for factor in ("lora_A", "lora_B", "magnitude")}
    for name, tensor in run.tensors().items():
        kind = next(kind for kind in moved if kind in name)
        moved[kind] = max(moved[kind], (tensor - before[name]).abs().max().item())
    # AdamW's first step moves every entry by its rate; only B has a gradient there, and the magnitude.
    assert moved["lora_B"] == pytest.approx(4e-3, rel=1e-2) and moved["magnitude"] == pytest.approx(1e-3, rel=0.02)
    assert [group["lr"] for group in run.parts.trainer.optimizer.param_groups] == pytest.approx([0.9e-3, 3.6e-3])


def test_loraplus_is_refused_with_prodigy():
    with pytest.raises(UserError, match="--loraplus_lr_ratio"):
        config(optimizer="prodigy", learning_rate=1.0, method="lora", loraplus_lr_ratio=2.0)


def test_the_average_is_what_is_exported_and_nothing_else(build):
    """Against the recursion written out; the run itself is that without an average, bit for bit."""
    plain, run = build(), build(ema_decay=0.6)
    assert plain.parts.trainer.average is None
    expected = run.tensors()
    for number in range(4):
        plain.step(number)
        run.step(number)
        decay = min(0.6, (1 + number) / (10 + number)) if number else 0.0
        live = run.tensors()
        expected = {name: decay * old + (1 - decay) * live[name] for name, old in expected.items()}
    assert all(torch.equal(live[name], tensor) for name, tensor in plain.tensors().items())
    with run.parts.trainer.as_exported():
        shown = run.tensors()
    assert all(torch.allclose(shown[name], tensor, rtol=1e-4, atol=1e-7) for name, tensor in expected.items())
    assert any(not torch.equal(shown[name], tensor) for name, tensor in live.items())
    assert all(torch.equal(live[name], tensor) for name, tensor in run.tensors().items())


def test_the_fused_step_is_adamws():
    """Against the plain implementation, with a parameter that gets no gradient: it gets no weight decay either."""
    ours, theirs = parameters(), parameters()
    rates = {"unet": 1e-2, "text_encoder": 1e-3, "text_encoder_2": 1e-3}
    optimizer = build_optimizer(config(), ours, rates)
    plain = torch.optim.AdamW(
        [
            {"params": list(theirs[part].values()), "lr": rates[part], "weight_decay": decay}
            for part, decay in zip(PARTS, (1e-4, 1e-3, 1e-3), strict=True)
        ],
        fused=False,
        foreach=False,
    )
    draw = torch.Generator().manual_seed(0)
    for _ in range(3):
        for part in PARTS:
            gradient = torch.randn(2, 3, generator=draw)
            for one in (ours, theirs):
                one[part]["to_k.lora_A.weight"].grad = gradient.clone()
        optimizer.step()
        plain.step()
    for part in PARTS:
        trained, still = ours[part].values()
        assert torch.allclose(trained, theirs[part]["to_k.lora_A.weight"], rtol=1e-6)
        assert torch.equal(still, torch.ones(2, 3))


def test_prodigy_trains_beside_an_auxiliary(build):
    run = build(
        optimizer="prodigy", learning_rate=1.0, auxiliary_learning_rate=0.02, rho=2.0, prodigy_safeguard_warmup=True
    )
    optimizer = run.parts.trainer.optimizer
    assert type(optimizer).__name__ == "Prodigy"
    (group,) = optimizer.param_groups
    assert group["lr"] == 1.0 and group["decouple"] and group["safeguard_warmup"]
    start = run.tensors()
    run.train(3)
    assert any(not torch.equal(start[name], tensor) for name, tensor in run.tensors().items())
    assert run.parts.method.measures()["c_over_rho"] > 0.1


OTHERS = {
    "8-bit": ({"use_8bit_adam": True}, "AdamW8bit"),
    "paged": ({"paged_adam": True}, "PagedAdamW"),
    "both": ({"use_8bit_adam": True, "paged_adam": True}, "PagedAdamW8bit"),
    "adafactor": ({"optimizer": "adafactor"}, "Adafactor"),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_other_optimisers_train_and_go_on_from_their_state(build, tmp_path, name):
    flags, kind = OTHERS[name]
    if name != "adafactor":
        add_quantisers()
    # bitsandbytes keeps small tensors in 32 bits.
    flags = {"rank": 64, "lora_layers": "to_k", "adam_weight_decay": 0.02, "train_text_encoder": True, **flags}
    run, other = (build("bilora", **flags) for _ in range(2))
    optimizer = run.parts.trainer.optimizer
    assert type(optimizer).__name__ == kind
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.02, 1e-3, 1e-3]
    start = run.tensors()
    run.train(2)
    moved = max((tensor - start[key]).square().mean().sqrt().item() for key, tensor in run.tensors().items())
    assert 0.9e-3 < moved < 2.2e-3  # two steps of about the rate
    if "use_8bit_adam" in flags:
        assert any(state["state1"].dtype is torch.uint8 for state in optimizer.state.values())
    torch.save(run.parts.trainer.state_dict(), tmp_path / "state.pt")
    for adapter in (PRIMARY, AUXILIARY):
        for key, parameter in other.parameters(adapter).items():
            parameter.data.copy_(run.parameters(adapter)[key].data)
    other.parts.trainer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert run.train(2, start=2) == other.train(2, start=2)
    assert all_equal(run.tensors(), other.tensors())


@pytest.mark.parametrize(
    ("flags", "package"),
    [
        ({"optimizer": "prodigy", "learning_rate": 1.0, "ascent": "normalized"}, "prodigyopt"),
        ({"use_8bit_adam": True}, "bitsandbytes"),
        ({"paged_adam": True}, "bitsandbytes"),
    ],
)
def test_a_missing_package_is_named(monkeypatch, flags, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.optim", None)
    with pytest.raises(UserError, match=f"pip install {package}"):
        build_optimizer(config(**flags), parameters(), dict.fromkeys(PARTS, 1e-4))
