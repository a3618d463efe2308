"""Comparisons: every cell is what Generate draws, and the settings mean the same on the command line and in the app."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from lora_samples import ALL_PARTS, PROMPT, write_lora
from PIL import Image
from transformers import CLIPImageProcessor, CLIPProcessor

from bilora_diffusion import compare as command
from bilora_diffusion.bases import PARTS, Base
from bilora_diffusion.compare import compare
from bilora_diffusion.embedded import CONCEPT_FOLDER, EMBEDDED
from bilora_diffusion.embedded.scorer import Scorer
from bilora_diffusion.errors import UserError
from bilora_diffusion.generation.comparison import ComparedColumn, ComparisonSettings, Sweep, column_titles
from bilora_diffusion.generation.engine import Engine
from bilora_diffusion.generation.files import LoraFiles
from bilora_diffusion.generation.png import read_settings
from bilora_diffusion.generation.settings import LoraUse, PictureSettings
from bilora_diffusion.generation.turns import Cancelled
from bilora_diffusion.grid import LABEL_PX, LEAST_SIDE_PX, Column, grid
from bilora_diffusion.lora_files.diffusers_format import DIFFUSERS_FILE
from bilora_diffusion.measures import ClipJudge, judge_for, measure, training_pictures

PLAIN, BOTH = f"outputs/plain/{DIFFUSERS_FILE}", f"outputs/both/{DIFFUSERS_FILE}"
VALUES = {
    "columns": [{}, {"loras": [{"file": PLAIN}]}, {"label": "ours", "loras": [{"file": BOTH, "weight": 0.5}]}],
    "prompts": [PROMPT, "an icon of a sun"],
    "seeds": [1, 2],
    "steps": 2,
}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(Base("embedded"))


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare") / "outputs"
    pipeline = Base("embedded").load(*PARTS)
    write_lora(folder / "plain", pipeline, seed=1)
    write_lora(folder / "both", pipeline, method="bilora", parts=ALL_PARTS, seed=2)
    (folder / "both" / "config.yaml").write_text(f"instance_data_dir: {CONCEPT_FOLDER}\n")
    return folder


@pytest.fixture(scope="module")
def files(outputs: Path) -> LoraFiles:
    return LoraFiles({"outputs": outputs})


def settings(**changes: object) -> ComparisonSettings:
    return ComparisonSettings.from_json(VALUES | changes)


def test_every_cell_is_what_generate_draws(engine: Engine, files: LoraFiles) -> None:
    seen = []
    result = compare(engine, settings(), files, finished=lambda row, column, drawn: seen.append((row, column)))
    assert result.titles == ["base", "LoRA", "ours"]
    assert seen == [(row, column) for row in range(4) for column in range(3)]
    assert [row.split(", seed ")[1] for row in result.rows] == ["1", "2", "1", "2"]
    for row, (prompt, seed) in enumerate([(p, s) for p in VALUES["prompts"] for s in VALUES["seeds"]]):
        one = PictureSettings(prompt=prompt, seed=seed, steps=2)
        for column, loras in enumerate(([], [(files.path(PLAIN), "", 1.0)], [(files.path(BOTH), "", 0.5)])):
            (drawn,) = engine.draw(one, loras)
            assert result.cells[row][column].picture.tobytes() == drawn.picture.tobytes()


def test_a_sweep_changes_one_thing(engine: Engine, files: LoraFiles) -> None:
    swept = settings(
        sweep={"variable": "weight", "values": [0, 0.5, 1]},
        prompts=[PROMPT],
        seeds=[1],
        columns=[{}, {"loras": [BOTH]}],
    )
    result = compare(engine, swept, files)
    assert list(result.rows) == ["weight 0", "weight 0.5", "weight 1"]
    base, lora = ([row[number].picture.tobytes() for row in result.cells] for number in range(2))
    assert len(set(base)) == 1 and len(set(lora)) == 3 and lora[0] == base[0]
    assert result.cells[0][0] is result.cells[2][0]  # drawn once


@pytest.mark.parametrize(
    ("variable", "values"), [("steps", [1, 3]), ("guidance_scale", [1, 7.5]), ("prompt", ["a sun", "a lion"])]
)
def test_sweeps_of_settings(variable: str, values: list, engine: Engine, files: LoraFiles) -> None:
    swept = settings(sweep={"variable": variable, "values": values}, prompts=[PROMPT], seeds=[1])
    rows = swept.rows()
    assert [getattr(swept.cell(row, swept.columns[0]), variable) for row in rows] == values
    assert len({row.label for row in rows}) == 2
    result = compare(engine, swept, files)
    assert len({row[0].picture.tobytes() for row in result.cells}) == 2


def test_the_table_holds_its_settings(engine: Engine, files: LoraFiles, tmp_path: Path) -> None:
    result = compare(engine, settings(prompts=[PROMPT]), files)
    result.save_grid(tmp_path / "grid.png")
    again = ComparisonSettings.from_json(read_settings(tmp_path / "grid.png")["comparison"])
    assert again == result.settings and again.shared.width == 64
    with Image.open(tmp_path / "grid.png") as sheet:
        side = LEAST_SIDE_PX
        margin = sheet.width - 3 * side
        assert margin > 0 and sheet.height == LABEL_PX + 2 * side
        cell = sheet.crop((margin + side, LABEL_PX, margin + 2 * side, LABEL_PX + side))
        drawn = result.cells[0][1].picture.resize((side, side), Image.Resampling.BICUBIC)
        assert cell.tobytes() == drawn.tobytes()


def test_long_labels_are_broken_and_cut() -> None:
    pictures = [Image.new("RGB", (96, 64), "red")] * 2
    sheet = grid([Column("a very long title " * 9, pictures)] * 2, ["word " * 80, "x" * 500])
    side, high = LEAST_SIDE_PX, round(LEAST_SIDE_PX * 64 / 96)
    assert sheet.size == (sheet.width, LABEL_PX + 2 * high) and 2 * side < sheet.width < 2 * side + 230
    assert sheet.getpixel((sheet.width - 1, sheet.height - 1)) == (255, 0, 0)


def test_titles_tell_files_apart(files: LoraFiles) -> None:
    plain, both = LoraUse(file=PLAIN), LoraUse(file=BOTH)

    def titles(*columns: tuple[LoraUse, ...]) -> list[str]:
        return column_titles([ComparedColumn(loras=loras) for loras in columns], files)

    assert titles((), (plain,), (both,)) == ["base", "LoRA", "Bi-LoRA"]
    assert titles((plain,), (LoraUse(file=PLAIN, weight=0.5),)) == ["LoRA", "LoRA x 0.5"]
    assert titles((plain,), (plain, both)) == ["LoRA", "LoRA + Bi-LoRA"]
    assert titles((plain,), (LoraUse(file=f"outputs/plain/{command.DIFFUSERS_FILE}"),)) == ["LoRA (plain)"] * 2


def test_cancel(engine: Engine, files: LoraFiles) -> None:
    cancelled = threading.Event()
    seen = []

    def finished(row: int, column: int, _drawn: object) -> None:
        seen.append((row, column))
        cancelled.set()

    with pytest.raises(Cancelled):
        compare(engine, settings(), files, finished=finished, cancelled=cancelled)
    assert seen == [(0, 0)]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"columns": [{}]}, "2 to 4"),
        ({"columns": [{}] * 5}, "2 to 4"),
        ({"columns": "base"}, "columns is 'base'"),
        ({"columns": [{"colour": 1}, {}]}, "unknown name 'colour'"),
        ({"columns": [{"label": 5}, {}]}, "label is 5"),
        ({"prompts": []}, "0 prompts"),
        ({"prompts": [5]}, "a prompt is 5"),
        ({"prompts": ["x"] * 12, "seeds": list(range(12))}, "432 pictures"),
        ({"seeds": [1.5]}, "a seed is 1.5"),
        ({"seeds": 3}, "seeds is 3"),
        ({"steps": 10**9}, "steps is"),
        ({"sweep": {"variable": "colour", "values": [1]}}, "sweep is 'colour'"),
        ({"sweep": {"values": [1]}}, "names no variable"),
        ({"sweep": {"variable": "weight", "values": []}}, "values are []"),
        ({"sweep": {"variable": "weight", "values": 3}}, "values are 3"),
        ({"sweep": {"variable": "weight", "values": ["a"]}}, "weight is 'a'"),
        ({"sweep": {"variable": "steps", "values": [0]}}, "steps is 0"),
        ({"shared": {}}, "unknown name 'shared'"),
        ({"prompt": PROMPT}, "did you mean prompts?"),
    ],
)
def test_comparisons_that_cannot_be(changes: dict, word: str) -> None:
    with pytest.raises(UserError) as refusal:
        settings(**changes)
    assert word in str(refusal.value) and "\n" not in str(refusal.value)


def test_settings_survive_json() -> None:
    one = settings(sweep={"variable": "weight", "values": [0.5, 1]}, negative_prompt="a sun", base="embedded")
    assert ComparisonSettings.from_json(json.loads(json.dumps(one.to_json()))) == one
    assert isinstance(one.sweep, Sweep) and one.sweep.values == (0.5, 1.0)
    with pytest.raises(UserError, match="no columns"):
        ComparisonSettings.from_json({"prompts": ["a"]})


# --- Numbers ---


def test_numbers_mean_what_they_say() -> None:
    judge = judge_for(EMBEDDED)
    pictures = training_pictures_of_the_concept()
    name = CONCEPT_FOLDER.joinpath("avocado.png")
    with Image.open(name) as file:
        avocado = file.convert("RGB")
    training = judge.images(pictures)
    score, likeness, nearest = measure(judge, [avocado], ["a fluent icon of a avocado"], training)
    assert nearest.value == pytest.approx(1, abs=1e-4)  # it is one of them
    assert likeness.value == pytest.approx((judge.images([avocado]) @ training.T).mean().item())
    wrong, *_ = measure(judge, [avocado], ["a fluent icon of a turkey"], training)
    assert score.value > wrong.value
    assert score.value == pytest.approx(Scorer.shipped()(_pixels(avocado), ["an icon of a avocado"]).item(), abs=1e-5)
    none, *_ = measure(judge, [avocado], ["something else entirely"], training)
    assert none.value is None and "no name of an icon" in none.meaning
    without = measure(judge, [avocado], ["a avocado"], None)
    assert [one.value is None for one in without] == [False, True, True]
    assert all(one.value is None and "--clip" in one.meaning for one in measure(None, [avocado], [""], None))


def training_pictures_of_the_concept() -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in sorted(CONCEPT_FOLDER.glob("*.png"))]


def _pixels(picture: Image.Image) -> torch.Tensor:
    small = picture.resize((64, 64), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(small)).permute(2, 0, 1)[None]


def test_training_pictures_are_found_beside_the_lora(outputs: Path, tmp_path: Path) -> None:
    assert len(training_pictures(outputs / "both" / DIFFUSERS_FILE)) == 23
    assert len(training_pictures(outputs / "both" / "checkpoint-50" / DIFFUSERS_FILE)) == 23
    assert training_pictures(outputs / "plain" / DIFFUSERS_FILE) == []
    for text in ("instance_data_dir: /nowhere", "[", "instance_data_dir: null", "- 1"):
        (tmp_path / "config.yaml").write_text(text)
        assert training_pictures(tmp_path / DIFFUSERS_FILE) == []


def test_the_base_is_measured_against_the_same_pictures(engine: Engine, files: LoraFiles) -> None:
    two = settings(prompts=[PROMPT], seeds=[1], columns=[{}, {"loras": [BOTH]}, {"loras": [PLAIN]}])
    base, lora, plain = compare(engine, two, files, judge=judge_for(EMBEDDED)).measures
    assert None not in [one.value for one in (*base, *lora)] and base[1].value != lora[1].value
    assert plain[0].value is not None and plain[1].value is None  # its own pictures are not known


def test_any_clip_can_judge(tmp_path: Path) -> None:
    shipped = Scorer.shipped()
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    processor = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, **half)
    shipped.model.save_pretrained(tmp_path)
    CLIPProcessor(processor, shipped.tokenizer).save_pretrained(tmp_path)
    judge = judge_for("some/base", str(tmp_path))
    assert isinstance(judge, ClipJudge)
    pictures = training_pictures_of_the_concept()[:3]
    texts = ["an icon of a avocado", "an icon of a black bird", "an icon of a cheese wedge"]
    value, _ = judge.image_text(judge.images(pictures), texts)
    expected = torch.cat([shipped(_pixels(one), [text]) for one, text in zip(pictures, texts, strict=True)])
    assert value == pytest.approx(expected.mean().item(), abs=0.02)
    with pytest.raises(UserError, match="--clip"):
        judge_for("some/base", str(tmp_path / "nowhere"))


# --- The command ---


def run(*words: str) -> int:
    return command.main([str(word) for word in words])


def test_the_command_and_its_settings(
    outputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(outputs.parent)
    first, second = tmp_path / "first", tmp_path / "second"
    words = ["outputs/plain", BOTH, "--prompt", PROMPT, "--steps", "2", "--sweep", "weight", "0.5", "1"]
    assert run(*words, "--output_dir", first) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[:2] == [str(first / "comparison.png"), str(first / "comparison.json")]
    assert "Bi-LoRA: likeness to the nearest training picture 0." in printed
    assert run("--settings", first / "comparison.json", "--output_dir", second) == 0
    assert (first / "comparison.png").read_bytes() == (second / "comparison.png").read_bytes()
    with Image.open(first / "comparison.png") as sheet:
        assert sheet.height == LABEL_PX + 2 * LEAST_SIDE_PX


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "name one or more LoRAs"),
        (["outputs/plain"], "--prompt"),
        (["outputs/nothing", "--prompt", "a"], "is no LoRA file"),
        (["outputs/plain", "--prompt", "a", "--steps", "many"], "steps is 'many'"),
        (["outputs/plain", "--prompt", "a", "--sweep", "colour", "1"], "sweep is 'colour'"),
        (["outputs/plain", "--prompt", "a", "--lora_dir", "outputs/both"], "not below --lora_dir"),
        (["--settings", "nowhere.json"], "cannot be read"),
        (["--settings", "outputs/both/config.yaml"], "not valid JSON"),
        (["outputs/plain", "--prompt", "a", "--base", "nowhere/at all"], "nowhere/at all"),
    ],
)
def test_mistakes_on_the_command_line(
    words: list[str], text: str, outputs: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(outputs.parent)
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1 and error.startswith("error: ")
