"""The quality benchmark's choice and table, from made-up runs, and one real run of two steps."""

import io
import json
import tarfile
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from benchmarks.quality import __main__ as command
from benchmarks.quality import curves, files, laboratory, measured, measures, plan, rises, stacking, tasks
from benchmarks.quality.budget import budget_section
from benchmarks.quality.costs import step_bytes, time_cost
from benchmarks.quality.elsewhere import ELSEWHERE
from benchmarks.quality.finished import PICTURE_MEASURES
from benchmarks.quality.flatness import POWER_STEPS
from benchmarks.quality.measured import measured_rows
from benchmarks.quality.plan import CONFIRMED, Configuration, candidates
from benchmarks.quality.report import report
from benchmarks.quality.results import at_best, chosen, runs
from bilora_diffusion.adapters import PRIMARY, parameters_of
from bilora_diffusion.config import TrainingConfig
from bilora_diffusion.embedded import icons
from bilora_diffusion.errors import UserError
from bilora_diffusion.memory.counting import BLOCK_BYTES
from bilora_diffusion.method_names import METHOD_NAMES


@pytest.fixture(scope="module")
def laboratory_() -> laboratory.Laboratory:
    return laboratory.Laboratory()


def few_of(evaluations: dict) -> dict:
    """The first eight rows of each."""
    return {name: [laboratory.rows_of(batches[0], slice(8))] for name, batches in evaluations.items()}


FLATNESS = {"random": 0.001, "worst_case": 0.02, "eigenvalue": 0.3, "gradient": {"top": 0.01}}


def write(
    folder: Path, configuration: Configuration, seed: int, losses: dict[int, float], drawn: float = 0.0, **more: Any
) -> None:
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
        "seconds": 1.0,
        "pictures": dict.fromkeys(PICTURE_MEASURES, drawn) | {"names": 60},
        "sharpness": {"loss": 0.1} | dict.fromkeys(("lora", "full"), FLATNESS),
        "rounded_to_8_bits": max(losses.values()) + 0.01,
    } | more
    folder.mkdir(parents=True, exist_ok=True)
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


def test_regularisers_are_no_baseline(tmp_path: Path):
    """LoRA with dropout is chosen for itself, and compared with plain LoRA, were it better on the validation names."""
    plain, light, heavy = (
        Configuration("lora", 1e-3, dict(own)) for own in ({}, {"lora_dropout": 0.1}, {"lora_dropout": 0.7})
    )
    for configuration, loss in ((plain, 0.3), (light, 0.2), (heavy, 0.25)):
        write(tmp_path, configuration, 0, {100: loss})
    assert chosen(tmp_path) == {"lora": plain, "lora, dropout": light}
    for configuration, loss in ((plain, 0.3), (light, 0.2)):
        for seed in (1, 2):
            write(tmp_path, configuration, seed, {100: loss})
    first, second = measured_rows([run for run in runs(tmp_path) if run["seed"]], chosen(tmp_path))
    assert first.is_lora and first.configuration == plain
    assert second.configuration == light and second.runs[0][1]["key"] == plain.key


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
    assert len(drawn) == 2 and all(line.startswith("| flat-lora") for line in drawn)  # of the best step and of the last


def test_pictures_and_flatness_are_of_rows_measured_alike(tmp_path: Path):
    """An older run drew fewer names and was measured along one step alone: its row is named, not compared."""
    lora, flat, old = (Configuration(method, 1e-3) for method in ("lora", "flat-lora", "nbar"))
    flatter = {space: FLATNESS | {"eigenvalue": 0.25, "gradient": {"top": 0.008}} for space in ("lora", "full")}
    fewer = dict.fromkeys(PICTURE_MEASURES, 0.7)
    for seed in (1, 2, 3):
        write(tmp_path, lora, seed, {100: 0.2}, 0.5)
        write(tmp_path, flat, seed, {100: 0.2}, 0.625, sharpness={"loss": 0.1} | flatter)
        write(tmp_path, old, seed, {100: 0.2}, pictures=fewer, sharpness={"rises": [0.1], "loss": 0.1})
    lines = report(tmp_path).splitlines()
    pictures, flatness = (
        lines[lines.index(title) :] for title in ("### Pictures, last step", "### Sharpness, last step")
    )
    assert pictures[2].startswith("60 unseen names, drawn after the last step")
    told = "Trained before this was measured so: nbar, lr 0.001 (no choice: seed 0 was not run)."
    for table, cell in ((pictures, "+0.125 +- 0.000"), (flatness, "-17 +- 0 %")):
        rows = [line for line in table[: table.index(told)] if line.startswith(("| flat-lora", "| nbar"))]
        assert [row.count(cell) for row in rows] == [len(PICTURE_MEASURES) - 1 if table is pictures else 2]
    assert sum("| -20 +- 0 % |" in line for line in flatness[: flatness.index(told)]) == 1  # of the gradient's top 4


def test_the_best_step_has_tables_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of each run at its own; a run that is not at its best in the end and was measured there alone is told."""
    monkeypatch.setattr(measured, "step_bytes", lambda configuration: 10**6)
    lora, flat, old = (Configuration(method, 1e-3) for method in ("lora", "flat-lora", "nbar"))
    better = {"pictures": dict.fromkeys(PICTURE_MEASURES, 0.75) | {"names": 60}, "rounded_to_8_bits": 0.2}
    better |= {"step": 100, "sharpness": {"loss": 0.1} | dict.fromkeys(("lora", "full"), FLATNESS)}
    for seed in (1, 2, 3):
        write(tmp_path, lora, seed, {100: 0.2, 200: 0.3}, 0.5, at_best=better)
        write(tmp_path, flat, seed, {100: 0.3, 200: 0.2}, 0.625, rounded_to_8_bits=0.2 + 3e-4)
        write(tmp_path, old, seed, {100: 0.2, 200: 0.3}, 0.5)
    lines = report(tmp_path).splitlines()
    for title, cell in (("### Pictures, best step", "-0.125 +- 0.000"), ("### Pictures, last step", "+0.125 +- 0.000")):
        table = lines[lines.index(title) :]
        assert sum(line.startswith("| flat-lora") and cell in line for line in table[: table.index("", 5)]) == 1
    told = "Trained before this was measured so: nbar, lr 0.001 (no choice: seed 0 was not run)."
    assert lines.count(told) == 2  # pictures and sharpness
    columns = next(line for line in lines if "8 bits, best" in line).split(" | ")
    cells = next(line for line in lines if line.startswith("| flat-lora") and line.count("|") > len(columns)).split(
        " | "
    )
    assert cells[columns.index("8 bits, best")] == "+3 +- 0" and cells[columns.index("8 bits, last")] != "+3 +- 0"


def test_computed_times_are_those_of_the_passes():
    """On top of what was measured with one whole pass more: the share of it, and the noise in each of both."""
    ratios = {"lora": 1.0, "flat-lora": 1.2, "bilora": 1.1, "bilora-fresh": 2.0, "bilora-fresh, tracked": 1.8}

    def cost(method: str, **settings: Any) -> float:
        return time_cost(Configuration(method, 1e-3, settings), ratios)

    noise = {"sigma": 0.5, "sigma_schedule": "constant"}
    assert cost("bilora", **noise) == pytest.approx(1.3)
    assert cost("bilora-fresh") == cost("bilora-fresh", ascent_share=0.5) == pytest.approx(1.5)
    assert cost("bilora-fresh", ascent_share=0.5, **noise) == pytest.approx(1.8)
    assert cost("bilora-fresh", ascent_share=1.0, ascent_basis="tracked") == pytest.approx(1.8)
    assert cost("lora", lora_dropout=0.1) is None  # not measured
    ratios["lora, dropout"] = 1.03
    assert cost("lora", lora_dropout=0.1) == pytest.approx(1.03) and cost("bilora", lora_dropout=0.1) is None
    ratios["bilora, dropout"] = ratios["bilora"] + 0.1
    assert cost("bilora", lora_dropout=0.1) == pytest.approx(ratios["bilora, dropout"])
    assert cost("bilora-fresh", lora_dropout=0.1) == pytest.approx(1.5 + 0.1 * 1.5)
    assert cost("bilora-fresh", ascent_share=1.0, ascent_every=4) == pytest.approx(1.25)
    assert cost("lora", ema_decay=0.98) is None


def test_the_defaults_have_a_section_to_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measured, "step_bytes", lambda configuration: 10**6)  # has a test of its own
    write(tmp_path / "runs", Configuration("lora", 1e-3), 0, {100: 0.2})
    for seed, level in ((6, 0.1), (7, 0.3)):
        for configuration in CONFIRMED:
            lower = 0.004 * (configuration.method == "nbar")
            write(tmp_path / "confirmed", configuration, seed, {100: level - lower}, drawn=1.5)
    text = report(tmp_path / "runs", confirmation=tmp_path / "confirmed")
    assert "new seeds" in text and "Seeds 6, 7." in text
    assert "| `--method nbar` | -1.9 +- 0.0 % | -1.9 +- 0.0 % | +0.0 +- 0.0 % |" in text
    assert "| `--method lora --learning_rate 0.00025` | +0.0 +- 0.0 % |" in text
    for row in (line for line in text.splitlines() if line.startswith("| nbar") and "-40 +- 0" in line):
        assert "not the choice" not in row
        break
    else:
        raise AssertionError(text)


def test_methods_are_held_against_the_controls_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measured, "step_bytes", lambda configuration: 10**6)
    write(tmp_path / "runs", Configuration("lora", 5e-4), 0, {100: 0.2})
    half, dropout = Configuration("lora", 2.5e-4), Configuration("lora", 5e-4, {"lora_dropout": 0.7})
    levels = {CONFIRMED[0].key: 0.2, half.key: 0.196, dropout.key: 0.193}
    for seed in (6, 7):
        for one in CONFIRMED:
            write(tmp_path / "confirmed", one, seed, {100: levels.get(one.key, 0.19)}, drawn=1.5)
    write(tmp_path / "confirmed", Configuration("nbar", 1e-3), 6, {100: 0.1})  # not all of the control's seeds
    for configuration, level in ((half, 0.196), (Configuration("bilora", 2.5e-4), 0.197), (dropout, 0.193)):
        for seed in (1, 2):
            write(tmp_path / "runs", configuration, seed, {100: level}, drawn=1.5)
    text = report(tmp_path / "runs", confirmation=tmp_path / "confirmed").split("## Beside the controls")[1]
    text = text.split("\n## ")[0]
    against_half, against_dropout, at_half = (part.splitlines() for part in text.split("\n### ")[1:4])
    no = " | ".join(["+0.0 +- 0.0 %"] * 4) + " |"
    assert f"| nbar, lr 0.0005 | -2.9 +- 0.0 % | -2.9 +- 0.0 % | {no}" in against_half
    assert f"| lora, lr 0.0005 | +1.9 +- 0.0 % | +1.9 +- 0.0 % | {no}" in against_half
    assert f"| nbar, lr 0.0005 | -1.5 +- 0.0 % | -1.5 +- 0.0 % | {no}" in against_dropout
    assert not any(line.startswith("| nbar, lr 0.001 ") for line in against_half)
    rows = [line for line in at_half if line.startswith("| ")]
    assert len(rows) == 3 and rows[2] == f"| bilora, lr 0.00025 | +0.5 +- 0.0 % | +0.5 +- 0.0 % | {no}"


def test_memory_is_counted_at_each_rows_own_settings(tmp_path: Path, laboratory_: laboratory.Laboratory):
    lora, obar = Configuration("lora", 1e-3), Configuration("obar", 1e-3, {"bar_strength": 2.0})
    bilora = Configuration("bilora", 1e-3, {"rho": 2.0})
    noisy = Configuration("bilora", 1e-3, bilora.settings | {"sigma": 0.5, "sigma_schedule": "constant"})
    plain, second, third = (step_bytes(one) for one in (lora, bilora, noisy))
    unet = laboratory_.assembled(lora, 0).models["unet"]
    primary = 4 * sum(parameter.numel() for parameter in parameters_of(unet, PRIMARY).values())
    frozen = sum(parameter.nbytes for parameter in unet.parameters() if not parameter.requires_grad)
    assert plain > frozen + 4 * primary  # values, gradients and two moments; and the activations
    assert 4 * primary < second - plain < 8 * primary  # the same again
    assert third > second
    assert 0 <= step_bytes(obar) - plain <= 4 * BLOCK_BYTES  # single numbers
    for one in (lora, obar, bilora):
        for seed in (0, 1):
            write(tmp_path, one, seed, {100: 0.2})
    rows = [line.split(" | ") for line in report(tmp_path).splitlines() if "lr 0.001" in line]
    memory = {row[0]: row[-1] for row in rows if len(row) == 15}
    assert memory == {
        f"| {lora}": f"{plain / 1e6:.1f} |",
        f"| {bilora}": f"+{(second - plain) / 1e6:.1f} |",
        f"| {obar}": "+0.0 |",
    }


def test_curves_are_of_what_was_measured_on_other_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Four panels in a row; drawn by the report where it stands, and nothing while there is nothing to compare."""
    monkeypatch.setattr(measured, "step_bytes", lambda configuration: 10**6)  # has a test of its own

    def size() -> tuple[int, int]:
        text = report(tmp_path / "runs", pictures=tmp_path)
        assert text.count("![losses over steps](quality_curves.png)") == 1
        return Image.open(tmp_path / "quality_curves.png").size

    write(tmp_path / "runs", Configuration("lora", 1e-3), 0, {100: 0.2, 200: 0.3})
    assert "![" not in report(tmp_path / "runs", pictures=tmp_path) and not list(tmp_path.glob("*.png"))
    sizes = []
    for rows, method in enumerate(("lora", "nbar", "obar", "s2-sam", "bilora"), start=1):
        for seed in (0, 1, 2):
            write(tmp_path / "runs", Configuration(method, 1e-3), seed, {100: 0.2 + seed * rows / 50, 200: 0.3})
        sizes.append(size())
    assert sizes[0] == sizes[3] and sizes[4][1] == 2 * sizes[3][1]
    with Image.open(tmp_path / "quality_curves.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 100


def test_new_seeds_and_longer_runs_have_curves_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measured, "step_bytes", lambda configuration: 10**6)
    lora, nbar = CONFIRMED[0], Configuration("nbar", 5e-4)
    write(tmp_path / "runs", lora, 0, {100: 0.2})
    for folder in ("confirmed", "transfer/3d-800-steps", "transfer/3d-batch-1"):
        for seed in (6, 7):
            for one in (lora, nbar):
                write(tmp_path / folder, one, seed, {100: 0.3, 200: 0.2}, drawn=1.5)
    text = report(
        tmp_path / "runs", transfer=tmp_path / "transfer", confirmation=tmp_path / "confirmed", pictures=tmp_path
    )
    names = {"quality_curves_new_seeds.png", "quality_curves_800_steps.png"}
    assert {path.name for path in tmp_path.glob("*.png")} == names
    assert all(text.count(f"({name})") == 1 for name in names)


def test_points_of_the_curves_are_paired_differences(tmp_path: Path):
    lora, nbar = Configuration("lora", 1e-3), Configuration("nbar", 1e-3)
    for seed, level in ((0, 0.2), (1, 0.2), (2, 0.4)):
        write(tmp_path, lora, seed, {50: level, 100: level / 2})
        write(tmp_path, nbar, seed, {50: level - 0.002 * seed, 100: level / 2 + 0.003})
    rows = measured_rows([run for run in runs(tmp_path) if run["seed"] != 0], chosen(tmp_path))
    plain, other = ([point[:2] for point in curves.points(row, "test")] for row in rows)
    assert plain == [(50, pytest.approx(0.31)), (100, pytest.approx(0.16))]
    assert other == [(50, pytest.approx(-30)), (100, pytest.approx(30))]
    halves = [[half for _, _, half in curves.points(row, "test")] for row in rows]
    t = 12.706  # of Student's at 95 %, one degree of freedom; the standard error of two is half their distance
    assert halves[0] == pytest.approx([t * 0.1, t * 0.05], rel=1e-4)
    assert halves[1] == [pytest.approx(t * 10, rel=1e-4), pytest.approx(0, abs=1e-6)]
    write(tmp_path, nbar, 3, {50: 0.1})
    write(tmp_path, Configuration("obar", 1e-3), 1, {50: 0.1})
    (*_, one_seed) = measured_rows([run for run in runs(tmp_path) if run["seed"] != 0], chosen(tmp_path))
    assert [half for *_, half in curves.points(one_seed, "test")] == [0.0]


def test_runs_of_other_devices_are_no_pairs(tmp_path: Path):
    lora, nbar, obar = (Configuration(method, 1e-3) for method in ("lora", "nbar", "obar"))
    for seed in (0, 1, 2, 3):
        write(tmp_path / "runs", lora, seed, {100: 0.2})  # an old file: of the CPU
        write(tmp_path / "runs", nbar, seed, {100: 0.2 - 0.1 * (seed == 3)}, device="cuda:0" if seed == 3 else "cpu")
        write(tmp_path / "runs", obar, seed, {100: 0.1}, device="cuda", seconds=None)
        write(tmp_path / "transfer" / "openmoji", lora, seed, {100: 0.2}, device="cuda")
        write(tmp_path / "transfer" / "openmoji", nbar, seed, {100: 0.1}, device="cpu")
    (tmp_path / "stacking.json").write_text(
        json.dumps({"device": "cpu", "batch": 4, "share_of_separate": {"1": 1.0, "8": 0.8}})
    )
    text = report(tmp_path / "runs", transfer=tmp_path / "transfer", stacking=tmp_path / "stacking.json")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| nbar")]
    assert rows and all(row[0] == "| nbar, lr 0.001 (2 of 3 runs)" for row in rows)
    assert "+0 +- 0" in rows[0]
    assert not any(line.startswith("| obar") for line in text.splitlines())
    assert text.count("Not compared") == 2
    assert "same seed or subject and device: obar, lr 0.001." in text
    assert "same seed or subject and device: nbar, lr 0.001." in text
    assert "trained: 11 one by one on cpu, 5 one by one on cuda, 4 stacked on cuda." in text


def test_a_report_of_what_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    """Nothing; runs without LoRA's; kinds without the choosing seed; other runs of LoRA's than the chosen."""
    folders = {name: tmp_path / name.lower() for name in ("RESULTS", "CONFIRMATION", "RISES", "TRANSFER")}
    for name, folder in folders.items():
        monkeypatch.setattr(command, name, folder)
    monkeypatch.setattr(command, "STACKING", tmp_path / "stacking.json")

    def made() -> str:
        assert command.main(["report"]) == 0, capsys.readouterr().err
        return (tmp_path / "quality.md").read_text()

    assert "0 candidates" in made()
    nbar, obar = Configuration("nbar", 1e-3), Configuration("obar", 1e-3)
    for folder in (folders["RESULTS"], folders["CONFIRMATION"], folders["TRANSFER"] / "openmoji"):
        for seed in (1, 2):
            write(folder, nbar, seed, {100: 0.2})
    assert made().count("has no run of the same seed or subject and device: nbar, lr 0.001.") == 3
    assert not list(tmp_path.glob("*.png"))
    lora, other = Configuration("lora", 1e-3), Configuration("lora", 5e-4)
    write(folders["RESULTS"], lora, 0, {100: 0.1})
    for folder in (folders["RESULTS"], folders["TRANSFER"] / "openmoji"):
        for seed in (1, 2):
            write(folder, lora, seed, {100: 0.2})
            write(folder, other, seed, {100: 0.2})
        write(folder, obar, 2, {100: 0.1})
    lines = made().splitlines()
    assert sum(line.startswith("| lora, lr 0.001 | 0.2") for line in lines) == 2
    assert sum(line.startswith("| lora, lr 0.0005 (not the choice) |") for line in lines) == 10
    assert sum(line.startswith("| nbar, lr 0.001 (no choice: seed 0 was not run) |") for line in lines) == 10
    assert (
        sum(line.startswith("| obar, lr 0.001 (no choice: seed 0 was not run) (1 of 2 runs) |") for line in lines) == 10
    )


def test_what_was_not_timed_is_taken_for_the_median():
    timed, not_timed = {"wall_seconds": 3600.0}, {}
    stages = {"choose": [not_timed], "measure": [timed, timed, not_timed], "confirm": []}
    lines = budget_section(stages, {"measure": [timed, not_timed]})
    assert lines[-3:] == [
        "| `choose` | 1 | 0 |  |  |",
        "| `measure` | 3 | 2 | 60.0 | 3.0 |",
        "| `measure --alone` | 2 | 1 | 60.0 | 2.0 |",
    ]
    assert "all stages take 1.5 hours; 1.0 of them are each method by itself" in "".join(lines)
    assert "all stages take 1.5 hours." in "".join(budget_section(stages, {"choose": [not_timed]}))
    assert budget_section({"choose": [not_timed]}, {}) == []


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
        assert found["config"]["learning_rate"] == 1e-3 and found["versions"]["torch"]
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
    (own,) = (line for line in lines if line.startswith("| bilora-fresh, lr 0.001, rho 0.2 | +"))
    assert own.split(" | ")[-2] == f"{seen['own'][1] / seen['gradient'][1]:.3f}"


def test_a_run_is_the_trainers(monkeypatch: pytest.MonkeyPatch, laboratory_: laboratory.Laboratory):
    monkeypatch.setattr(laboratory_, "task", replace(laboratory_.task, evaluated_at=(1, 2)))
    monkeypatch.setattr(measures, "PICTURES", 2)
    monkeypatch.setattr(measures, "FEWER", 2)
    monkeypatch.setattr(measures, "FEW_STEPS", 2)
    monkeypatch.setattr(laboratory_, "evaluations", few_of(laboratory_.evaluations))
    one = laboratory_.train(Configuration("lora", 1e-3), 1, all_losses=True, finished=True)
    other = laboratory_.train(Configuration("flat-lora", 1e-3, {"sigma": 0.3, "sigma_schedule": "constant"}), 1)
    assert one["training_losses"][0] != other["training_losses"][0]
    assert set(one["evaluations"][1]) == {"validation", "test", "training", "flat"}
    assert set(other["evaluations"][1]) == {"validation"}
    assert one["evaluations"][1] != one["evaluations"][2]
    assert -2 <= one["pictures"]["similarity_to_true"] <= 2 and 0 <= one["pictures"]["retrieved_top_10"] <= 1
    assert one["pictures"]["names"] == 2 and 1 <= one["pictures"]["retrieval_rank"] <= len(laboratory_.icons.names)
    flatness = one["sharpness"]
    for space in ("lora", "full"):
        assert flatness[space]["worst_case"] > abs(flatness[space]["random"]) > 0
        assert len(flatness[space]["history"]) == POWER_STEPS
    assert 0 < flatness["full"]["gradient"]["share"] < flatness["lora"]["gradient"]["share"] == pytest.approx(1)
    assert one["rounded_to_8_bits"] == pytest.approx(one["evaluations"][2]["test"], rel=0.1)
    assert one["rounded_to_8_bits"] != one["evaluations"][2]["test"]
    assert other["config"]["sigma"] == 0.3 and other["config"]["lora_alpha"] == 8 and other["versions"]["torch"]
    assert str(Path.cwd()) not in json.dumps([one, other]) and other["wall_seconds"] > other["seconds"]
    again = laboratory_.train(Configuration("lora", 1e-3), 1)
    assert again["training_losses"] == one["training_losses"] and again["evaluations"][2] == one["evaluations"][2]


def test_the_best_step_is_measured_as_if_it_were_the_last(
    monkeypatch: pytest.MonkeyPatch, laboratory_: laboratory.Laboratory
):
    for name in ("PICTURES", "FEWER", "FEW_STEPS"):
        monkeypatch.setattr(measures, name, 2)
    monkeypatch.setattr(laboratory_, "evaluations", few_of(laboratory_.evaluations))
    steep = Configuration("lora", 0.3, {"ema_decay": 0.5})
    found = {}
    for steps in (1, 2):
        monkeypatch.setattr(laboratory_, "task", replace(laboratory_.task, evaluated_at=tuple(range(1, steps + 1))))
        found[steps] = laboratory_.train(steep, 1, finished=True)
    losses = [found[2]["evaluations"][step]["validation"] for step in (1, 2)]
    assert losses[0] < losses[1]  # or nothing is tested here
    assert "at_best" not in found[1]
    best = found[2]["at_best"]
    assert best.pop("step") == 1
    assert best == {name: found[1][name] for name in best} and best["pictures"] != found[2]["pictures"]


def test_published_runs_say_what_was_run():
    """Flags by which the trainer repeats them, and what they were run with."""
    folders = [command.RESULTS, command.CONFIRMATION, *(path for path in command.TRANSFER.iterdir() if path.is_dir())]
    published = [run for folder in folders for run in runs(folder)]
    assert len(published) > 500
    defaults = {one.name: one.default for one in fields(TrainingConfig)}
    for run in published:
        flags = defaults | run["config"]  # those that are the trainer's own are not in it
        told = {name: run[name] for name in ("method", "learning_rate", "seed")} | run["settings"]
        assert {name: flags[name] for name in told} == told
        assert flags["max_train_steps"] == len(run["training_losses"])
        assert run["versions"]["torch"] and run["versions"]["peft"]


def test_subjects_hold_two_photos_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tasks, "WORK", tmp_path / "work")
    photographs(tmp_path / "photos", {"bird": 4, "mug": 5})
    bird, mug = tasks.subjects(tmp_path / "photos", ["bird=bird", "mug=mug"])
    assert [path.name for path in sorted(bird.folder.iterdir())] == ["0.png", "1.png"]
    assert [path.name for path in sorted(mug.folder.iterdir())] == ["0.png", "1.png", "2.png"]
    assert bird.settings == {"instance_prompt": "a TOK bird"} and set(bird.held["test"].captions) == {"a TOK bird"}
    seen = torch.cat([bird.held[name].pixels.mean(dim=(1, 2, 3)) for name in ("training", "validation", "test")])
    assert torch.allclose(seen, torch.tensor([0, 40, 80, 120]) / 127.5 - 1, atol=0.01)  # each photo's grey
    assert bird.held["training"].draws * 2 == mug.held["test"].draws == 64
    again = tasks.subjects(tmp_path / "photos", ["bird=bird", "mug=mug"])[0]
    assert again.folder == bird.folder and len(list(again.folder.iterdir())) == 2
    (tmp_path / "photos" / "bird" / "0.png").unlink()
    other = tasks.subjects(tmp_path / "photos", ["bird=bird", "mug=mug"])[0]
    assert [path.name for path in other.folder.iterdir()] == ["1.png"]  # 2.png is held out now
    (tmp_path / "photos" / "bird" / "1.png").unlink()
    with pytest.raises(UserError, match="bird has 2 pictures"):
        tasks.subjects(tmp_path / "photos", ["bird=bird", "mug=mug"])


def test_drawings_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever their order in the packages; of two icons one is red, the other blue."""
    members = {
        "data-by-emoji.json": {"\U0001f430": {"name": "Rabbit face"}, "\u2601\ufe0f": {"name": "cloud"}},
        "emoji.json": [
            {"category": "Animals & Nature", "subcategory": "", "unified": "2601-FE0F", "image": "2601-fe0f.png"},
            {"category": "Animals & Nature", "subcategory": "", "unified": "1F430", "image": "1f430.png"},
        ],
        "chars.json": {"1f430": "rabbit", "2601": "cloud"},
        "icons.json": {
            "width": 8,
            "height": 8,
            "icons": {
                "cloud": {"body": '<rect width="8" height="8" fill="#00f"/>'},
                "rabbit": {"body": '<rect width="8" height="8" fill="#f00"/>'},
            },
        },
    }
    pack(tmp_path / "all.tgz", members)
    monkeypatch.setattr(icons, "_fetch_package", lambda *_: tmp_path / "all.tgz")
    drawn = icons.drawings_of(("some", "1"), ["cloud", "rabbit face"], tmp_path)
    assert drawn.shape == (2, 3, 64, 64)
    assert drawn.float().mean(dim=(2, 3)).tolist() == [[0, 0, 255], [255, 0, 0]]
    members["icons.json"]["icons"].pop("cloud")
    pack(tmp_path / "all.tgz", members)
    with pytest.raises(UserError, match="some 1 has no cloud"):
        icons.drawings_of(("some", "1"), ["cloud"], tmp_path)


def test_every_other_task_has_a_title():
    longer = tasks.more_steps()
    assert {longer.name, tasks.batch_of_one().name, *tasks.STYLES} == set(ELSEWHERE)
    assert longer.steps == 2 * tasks.solid_icons().steps and longer.evaluated_at == tuple(sorted(longer.evaluated_at))


def test_what_was_chosen_is_trained_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """From the command to the report; a second call trains nothing."""
    chosen_ones, elsewhere = tmp_path / "quality", tmp_path / "transfer"
    named = (Configuration("lora", 1e-3), Configuration("lora", 5e-4), Configuration("nbar", 1e-3))
    for configuration in (named[0], named[2]):
        write(chosen_ones, configuration, 0, {100: 0.2})
    monkeypatch.setattr(plan, "TRANSFERRED", named)
    monkeypatch.setattr(command, "TRANSFER", elsewhere)
    monkeypatch.setattr(tasks, "WORK", tmp_path / "work")
    monkeypatch.setattr(tasks, "DRAWS_OF_PHOTO", 2)
    monkeypatch.setattr(tasks, "SUBJECT_EVALUATED_AT", (1, 2))
    monkeypatch.setattr(tasks, "_flat", lambda: tasks.Held(torch.zeros(1, 3, 64, 64), ["a noto icon of a cloud"]))
    photographs(tmp_path / "photos", {"bird": 3, "mug": 3})
    words = ["transfer", "--subjects_dir", str(tmp_path / "photos"), "--classes", "bird=bird", "mug=mug"]
    assert command.main([*words, "--tasks", "bird", "mug"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6
    assert command.main([*words, "--tasks", "bird", "mug"]) == 0
    assert not capsys.readouterr().out
    text = report(chosen_ones, transfer=elsewhere)
    assert "Subjects: bird, mug." in text
    found = [json.loads(path.read_text()) for path in sorted(elsewhere.glob("*/*.json"))]
    tests = {(run["task"], run["method"]): run["evaluations"]["2"]["test"] for run in found}
    mean = 1e4 * sum(tests[one, "nbar"] - tests[one, "lora"] for one in ("bird", "mug")) / 2
    (row,) = (line for line in text.splitlines() if line.startswith("| nbar, lr") and " +- " in line)
    assert row.split(" | ")[3].startswith(f"{mean:+.0f} +- ")
    assert command.main([*words, "--methods", "looksam"]) == 2
    assert "transfer trains no 'looksam': there are lora; nbar" in capsys.readouterr().err
    assert command.main([*words, "--tasks", "brid"]) == 2
    assert "did you mean bird?" in capsys.readouterr().err


def pack(path: Path, members: dict) -> None:
    """As npm packs JSON files."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            entry, text = tarfile.TarInfo(f"package/{name}"), json.dumps(content).encode()
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text))


def photographs(folder: Path, counts: dict[str, int]) -> None:
    """Each of one grey, 40 more than the one before."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (80, 100), (40 * number,) * 3).save(folder / name / f"{number}.png")


def test_what_stacking_saves(
    laboratory_: laboratory.Laboratory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By a clock that counts passes of the base: a step of three runs takes as many as a step of one."""
    passes, forward = [], UNet2DConditionModel.forward

    def counted(*given: Any, **named: Any) -> Any:
        passes.append(1)
        return forward(*given, **named)

    monkeypatch.setattr(stacking, "RUNS", (1, 3))
    monkeypatch.setattr(stacking, "ROUNDS", 1)
    monkeypatch.setattr(stacking, "STEPS", 2)
    monkeypatch.setattr(stacking, "_now", lambda _: float(len(passes)))
    monkeypatch.setattr(UNet2DConditionModel, "forward", counted)
    found = stacking.stacking(laboratory_)
    assert found["seconds"] == {1: 1.0, 3: 1.0}
    assert found["share_of_separate"] == {1: 1.0, 3: pytest.approx(1 / 3)}
    (tmp_path / "stacking.json").write_text(json.dumps(found))
    text = report(tmp_path / "none", stacking=tmp_path / "stacking.json")
    assert "one after another: 3 runs 33%." in text


def test_a_stack_of_runs_is_written_and_equals_runs_alone(
    laboratory_: laboratory.Laboratory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(laboratory_, "task", replace(laboratory_.task, evaluated_at=(1, 2)))
    monkeypatch.setattr(laboratory_, "evaluations", few_of(laboratory_.evaluations))
    lora, fresh = Configuration("lora", 1e-3), Configuration("bilora-fresh", 1e-3, {"rho": 1.0, "ascent_share": 0.5})
    runs = [files.Run(tmp_path / "stacked", one, seed) for one, seed in ((lora, 1), (fresh, 1), (lora, 2))]
    files.train_missing(lambda: laboratory_, runs, stack=2, all_losses=False)
    for run in runs:
        found, alone = json.loads(run.path.read_text()), laboratory_.train(run.configuration, run.seed)
        assert found["training_losses"] == pytest.approx(alone["training_losses"], rel=1e-4)
        assert found["evaluations"]["2"]["test"] == pytest.approx(alone["evaluations"][2]["test"], rel=1e-4)
    assert [json.loads(run.path.read_text())["seconds"] is None for run in runs] == [True, True, False]
    files.train_missing(lambda: pytest.fail("nothing is missing"), runs, stack=2, all_losses=False)
    with pytest.raises(UserError, match="--stack is 0"):
        files.train_missing(lambda: laboratory_, runs, stack=0, all_losses=False)


@pytest.mark.parametrize("stack", [1, 3])
def test_what_is_done_is_written_though_another_run_fails(
    laboratory_: laboratory.Laboratory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stack: int
) -> None:
    monkeypatch.setattr(laboratory_, "task", replace(laboratory_.task, evaluated_at=(1, 2)))
    monkeypatch.setattr(laboratory_, "evaluations", few_of(laboratory_.evaluations))
    trained = laboratory_._trained

    def failing(parts: Any, configuration: Configuration, seed: int, *rest: Any) -> dict:
        if seed == 2:
            raise ValueError("no space left on device")
        return trained(parts, configuration, seed, *rest)

    monkeypatch.setattr(laboratory_, "_trained", failing)
    runs = [files.Run(tmp_path, Configuration("lora", 1e-3), seed) for seed in (1, 2, 3)]
    with pytest.raises(ValueError, match="no space"):
        files.train_missing(lambda: laboratory_, runs, stack=stack, all_losses=False)
    assert [run.path.exists() for run in runs] == [True, False, stack == 3]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("choose --device cuda:99", "--device 'cuda:99' cannot be used: "),
        ("choose --device foo", "--device 'foo' cannot be used: "),
        ("choose --device meta", "--device 'meta' cannot be used: "),
        ("choose --part 1", "--part is '1': give i/n"),
        ("measure --part 3/2", "--part is '3/2': give i/n"),
        ("rises --part 0/2", "--part is '0/2': give i/n"),
        ("choose --methods lroa", "choose trains no 'lroa': did you mean lora?"),
        ("confirm --methods looksam", "confirm trains no 'looksam': there are lora; bilora; "),
        ("measure --methods lora nbra", "measure trains no 'nbra': did you mean nbar?"),
        ("transfer --methods obar", "transfer trains no 'obar': did you mean nbar?"),
        ("transfer --tasks openmojis", "there is no 'openmojis': did you mean openmoji?"),
        ("rises --methods LoRAs", "rises trains no 'LoRAs': did you mean lora?"),
        ("measure --stack 0", "--stack is 0: give 1 or more"),
        ("rises --stack 2", "--stack: rises has none"),
        ("stacking --stack 8", "--stack: stacking has none"),
        ("choose --rates 0.0005 0.0006", "--rates: choose has no '0.0006'"),
        ("measure --rates 0.0005", "--rates: measure has none"),
        ("confirm --alone", "--alone: confirm has none"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys, words: str, said: str
) -> None:
    for one in (Configuration("lora", 1e-3), Configuration("nbar", 1e-3)):
        write(tmp_path / "quality", one, 0, {100: 0.2})
    for name in ("RESULTS", "CONFIRMATION", "RISES", "TRANSFER", "STACKING"):
        monkeypatch.setattr(command, name, tmp_path / name.lower().replace("results", "quality"))
    monkeypatch.setattr(laboratory, "Laboratory", lambda *_, **__: pytest.fail("nothing is to be trained"))
    assert command.main(words.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_alone_is_each_method_by_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    noise = {"sigma": 0.5, "sigma_schedule": "constant"}
    lora, dropout = Configuration("lora", 5e-4), Configuration("lora", 5e-4, {"lora_dropout": 0.7})
    flat, bilora = Configuration("flat-lora", 5e-4, noise), Configuration("bilora", 5e-4, {"rho": 2.0} | noise)
    for one in (lora, flat, bilora, dropout):
        write(tmp_path, one, 0, {100: 0.2})
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    trained: list[files.Run] = []
    monkeypatch.setattr(files, "train_missing", lambda _, runs, **__: trained.extend(runs))
    assert command.main(["measure", "--alone"]) == 0
    assert {(run.configuration.key, run.seed) for run in trained} == {
        (one.key, seed) for one in (lora, flat) for seed in command.SEEDS
    }
    trained.clear()
    assert command.main(["choose", "--alone"]) == 0
    tried = [run.configuration for run in trained]
    assert {one.method for one in tried} == set(METHOD_NAMES) - {"rwp-full"}  # flat-lora's with a constant schedule
    assert flat in tried and bilora not in tried and dropout not in tried
    assert Configuration("lora-sam", 5e-4, {"rho": 0.01}) not in tried  # further out than the grid
    trained.clear()
    assert command.main(["choose"]) == 0
    assert {one.key for one in tried} < {run.configuration.key for run in trained}
    assert {bilora.key, dropout.key} <= {run.configuration.key for run in trained}


def test_nothing_chosen_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(command, "RESULTS", tmp_path / "quality")
    assert command.main(["measure"]) == 2
    assert "run choose first" in capsys.readouterr().err
