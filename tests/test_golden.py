"""Losses of short runs, kept in `tests/golden`: whatever changes them is meant to, or is a mistake.

python tests/test_golden.py          writes the files anew; say in the commit why the numbers changed
"""

import json
import tempfile
from pathlib import Path

import pytest
import tiny_run
import torch

from bilora_diffusion.fused import unfuse

FOLDER = Path(__file__).parent / "golden"
TOLERANCE = 1e-4
"""Relative. Float32 sums come out otherwise by 1e-6 on another processor or with other libraries; what a change of the
method, the draws or the objective does to these losses is 1e-3 and more."""

STEPS = 6
COMMON = {"train_text_encoder": True, "gradient_accumulation_steps": 2, "learning_rate": 3e-3, "lora_layers": None}
RUNS = {
    "lora": {"method": "lora"},
    "bilora_adamw": {"rho": 4.0, "auxiliary_learning_rate": 0.01},
    "bilora_sgd": {"rho": 1.0, "ascent": "sgd", "auxiliary_learning_rate": 2.0},
    "bilora_normalized": {"rho": 1.5, "ascent": "normalized", "ascent_fraction": 0.4},
    "bilora_prior": {
        "rho_relative": 0.05,
        "auxiliary_learning_rate": 0.005,
        "with_prior_preservation": True,
        "snr_gamma": 5.0,
        "noise_offset": 0.1,
        "random_flip": True,
    },
}


def record(build: tiny_run.Builder, name: str, *, fused: bool = True) -> dict[str, list[float]]:
    """The losses of a run, and its c / rho, to six digits."""
    run = build(**{**COMMON, **RUNS[name]})
    for model in run.parts.models.values():
        if not fused:
            unfuse(model)
    losses, shares = [], []
    for number in range(STEPS):
        losses.append(float(f"{run.step(number).loss:.6g}"))
        shares += [float(f"{float(share):.6g}") for key, share in run.parts.method.measures().items() if "rho" in key]
    return {"losses": losses, "c_over_rho": shares}


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "peft's forward"])
@pytest.mark.parametrize("name", RUNS)
def test_losses_are_the_golden_ones(build, name, fused):
    golden = json.loads((FOLDER / f"{name}.json").read_text())
    seen = record(build, name, fused=fused)
    assert seen["losses"] == pytest.approx(golden["losses"], rel=TOLERANCE)
    assert seen["c_over_rho"] == pytest.approx(golden["c_over_rho"], rel=1e-3)


def test_the_golden_runs_differ_by_more_than_the_tolerance():
    """They start alike, with a perturbation of zero, and are told apart by the numbers within a few steps."""
    runs = [json.loads((FOLDER / f"{name}.json").read_text())["losses"] for name in RUNS if name != "bilora_prior"]
    assert len({losses[0] for losses in runs}) == 1
    for number, one in enumerate(runs):
        for other in runs[:number]:
            assert max(abs(a / b - 1) for a, b in zip(one, other, strict=True)) > 10 * TOLERANCE


def write() -> None:
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        build = tiny_run.Builder(*tiny_run.write_both(Path(folder)))
        for name in RUNS:
            (FOLDER / f"{name}.json").write_text(json.dumps(record(build, name), indent=1) + "\n")
            print(f"{FOLDER.name}/{name}.json")


if __name__ == "__main__":
    write()
