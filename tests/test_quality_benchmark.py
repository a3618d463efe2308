"""The quality benchmark's choice and table, from made-up runs, and one real run of two steps."""

import json
from pathlib import Path

import pytest

from benchmarks.quality import laboratory, measures, rises, stacking
from benchmarks.quality.plan import Configuration, candidates
from benchmarks.quality.report import PICTURE_MEASURES, at_best, chosen, report
from bilora_diffusion.config import METHOD_NAMES


@pytest.fixture(scope="module")
def laboratory_() -> laboratory.Laboratory:
    return laboratory.Laboratory()


def write(folder: Path, configuration: Configuration, seed: int, losses: dict[int, float], pictures: float = 0.0):
    run = {
        "method": configuration.method,
        "learning_rate": configuration.learning_rate,
        "settings": configuration.settings,
        "key": configuration.key,
        "seed": seed,
        "evaluations": {
            step: {"validation": loss, "test": loss + 0.01, "training": 0.1, "flat": 0.05}
            for step, loss in losses.items()
        },
        "loss_gaps": [0.002] if configuration.method != "lora" else [],
        "training_losses": [0.1] * 10,
        "pictures": dict.fromkeys(PICTURE_MEASURES, pictures),
        "sharpness": {"sizes": [0.01, 0.02], "rises": [0.001, 0.002], "loss": 0.1},
        "rounded_to_8_bits": max(losses.values()) + 0.01,
    }
    folder.mkdir(exist_ok=True)
    (folder / f"{configuration.slug}-seed{seed}.json").write_text(json.dumps(run))


def test_every_method_is_a_candidate():
    assert {one.method for one in candidates()} == set(METHOD_NAMES) - {"rwp-full"}
    slugs = [one.slug for one in candidates()]
    assert len(set(slugs)) == len(slugs)


def test_the_choice_is_by_the_validation_names_at_the_best_step(tmp_path: Path):
    slow, fast = (Configuration("lora", rate) for rate in (1e-4, 1e-3))
    write(tmp_path, slow, 0, {100: 0.30, 200: 0.25})
    write(tmp_path, fast, 0, {100: 0.20, 200: 0.40})
    assert chosen(tmp_path) == {"lora": fast}


def test_differences_are_paired(tmp_path: Path):
    """LoRA differs between the seeds by far more than the other method from it, and the interval is narrow."""
    lora, flat = Configuration("lora", 1e-3), Configuration("flat-lora", 1e-3, {"sigma": 0.3})
    for seed, level in ((0, 0.2), (1, 0.1), (2, 0.2), (3, 0.3)):
        write(tmp_path, lora, seed, {100: level}, 0.5)
        write(tmp_path, flat, seed, {100: level - 0.002}, 0.6)
    fresh = Configuration("bilora-fresh", 1e-3, {"ascent_share": 0.5})
    for seed in (0, 1):
        write(tmp_path, fresh, seed, {100: 0.1})
    samples = {"lora": [[0, place, 2.0, 2.0] for place in (0, 3, 6)], "flat-lora": [[0, 1, 3.0, 3.0]]}
    samples["bilora-fresh"] = [[0, 4, 4.0, 4.0]]
    speed = {"sample": ["round", "place", "seconds", "cpu_seconds"], "device": "x86_64 CPU, 1 thread"}
    speed |= {"configuration": {"device": "cpu"}, "contenders": {k: {"samples": v} for k, v in samples.items()}}
    (tmp_path / "speed").mkdir()
    (tmp_path / "speed" / "speed.json").write_text(json.dumps(speed))
    lines = report(tmp_path, speed=tmp_path / "speed" / "speed.json").splitlines()
    (row,) = (line for line in lines if line.startswith("| flat-lora") and "x 1.50" in line)
    assert "-20 +- 0" in row
    assert sum(line.startswith("| bilora-fresh") and "x 1.50" in line for line in lines) == 1  # half of what 2 add
    (own,) = (line for line in lines if line.startswith("| lora") and "x 1.00" in line)
    assert "0.2100" in own
    drawn = [line for line in lines if "+0.100 +- 0.000" in line]
    assert len(drawn) == 1 and drawn[0].startswith("| flat-lora")


def test_under_equal_time_a_slower_method_has_fewer_steps():
    losses = {100: 0.4, 200: 0.2, 300: 0.3}
    run = {"evaluations": {str(step): {"validation": loss, "test": 10 * loss} for step, loss in losses.items()}}
    assert at_best(run, "test") == pytest.approx(2)
    assert at_best(run, "test", within=150) == pytest.approx(3)  # half-way between steps 100 and 200
    assert at_best(run, "test", within=250) == pytest.approx(2)
    assert at_best(run, "test", within=50) == pytest.approx(4)


def test_the_gradient_rises_most(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, laboratory_: laboratory.Laboratory):
    monkeypatch.setattr(rises, "SEEN_AT", (2,))
    for one in (Configuration("lora", 1e-3), Configuration("bilora-fresh", 1e-3, {"rho": 0.2})):
        found = rises.rises(laboratory_, one, 0)
        (tmp_path / f"{one.slug}.json").write_text(json.dumps(found))
        seen = found["seen"][2]
        assert ("own" in seen) == (one.method != "lora")
        assert seen["gradient"][0] > seen["gradient_rank_4"][0] > seen["gradient_rank_1"][0] > abs(seen["random"][0])
        assert all(seen["gradient"][0] > seen[name][0] for name in rises.CHEAPER)
        assert seen["half_rows"][0] > abs(seen["random"][0])
        assert seen["own_share"] > 0 if "own" in seen else seen["own_share"] == 0
    assert seen["gradient"][0] > seen["own"][0] > seen["random"][0]
    write(tmp_path / "runs", Configuration("lora", 1e-3), 0, {100: 0.2})
    lines = report(tmp_path / "runs", tmp_path).splitlines()
    assert (
        sum(line.startswith(("| this batch's gradient |", "| bilora-fresh, lr 0.001, rho 0.2 |")) for line in lines)
        == 2
    )


def test_a_run_is_the_trainers(monkeypatch: pytest.MonkeyPatch, laboratory_: laboratory.Laboratory):
    monkeypatch.setattr(laboratory, "STEPS", 2)
    monkeypatch.setattr(laboratory, "EVALUATED_AT", (1, 2))
    monkeypatch.setattr(measures, "PICTURES", 2)
    monkeypatch.setattr(measures, "HALF", 2)
    monkeypatch.setattr(measures, "FEW_STEPS", 2)
    few = {name: batches[:1] for name, batches in laboratory_.evaluations.items()}
    monkeypatch.setattr(laboratory_, "evaluations", few)
    one = laboratory_.train(Configuration("lora", 1e-3), 1, finished=True)
    other = laboratory_.train(Configuration("flat-lora", 1e-3, {"sigma": 0.3, "sigma_schedule": "constant"}), 1)
    assert one["training_losses"][0] != other["training_losses"][0]
    assert set(one["evaluations"][1]) == {"validation", "test", "training", "flat"}
    assert set(other["evaluations"][1]) == {"validation"}
    assert one["evaluations"][1] != one["evaluations"][2]
    assert -2 <= one["pictures"]["similarity_to_true"] <= 2 and 0 <= one["pictures"]["retrieved_top_10"] <= 1
    assert 0 < one["sharpness"]["rises"][0] < one["sharpness"]["rises"][1]
    assert one["rounded_to_8_bits"] == pytest.approx(one["evaluations"][2]["test"], rel=0.1)
    assert one["rounded_to_8_bits"] != one["evaluations"][2]["test"]
    again = laboratory_.train(Configuration("lora", 1e-3), 1)
    assert again["training_losses"] == one["training_losses"] and again["evaluations"][2] == one["evaluations"][2]


def test_what_stacking_would_save(
    laboratory_: laboratory.Laboratory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(stacking, "ADAPTERS", (1, 3))
    monkeypatch.setattr(stacking, "ROUNDS", 1)
    found = stacking.stacking(laboratory_)
    one, three = found["seconds"].values()
    assert 0 < one < three
    assert found["share_of_separate"] == {1: 1.0, 3: pytest.approx(three / (3 * one))}
    (tmp_path / "stacking.json").write_text(json.dumps(found))
    text = report(tmp_path / "none", stacking=tmp_path / "stacking.json")
    assert f"batches of 4 rows: 3 adapters {three / (3 * one):.0%};" in text
