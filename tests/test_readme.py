"""What the README and the presets say is true: their commands run, their files exist."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image

from bilora_diffusion import demo, grid
from bilora_diffusion.bases.tiny import tiny_random_folder
from bilora_diffusion.cli import main
from bilora_diffusion.command_line import parse

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SCRIPT = "train_dreambooth_bilora.py"


def commands(text: str) -> list[str]:
    """The lines of all bash blocks, continued lines joined, comments off."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].split(" # ")[0].strip() for line in lines if line.strip()]


TRAININGS = [line for line in commands(README) if SCRIPT in line]


def words_after_script(command: str) -> list[str]:
    words = shlex.split(command)
    return words[words.index(SCRIPT) + 1 :]


def small(folder: Path) -> list[str]:
    """Flags that make any of the README's runs a matter of seconds; the command line's last word wins."""
    return [
        *("--pretrained_model_name_or_path", "tiny-random"),
        *("--instance_data_dir", str(ROOT / "examples" / "cat")),
        *("--instance_prompt", "a photo of sks cat"),
        *("--output_dir", str(folder)),
        *("--max_train_steps", "1"),
        *("--mixed_precision", "no"),
        *("--num_validation_images", "1"),
        *("--report_to", "none"),
        "--overwrite_output_dir",
    ]


def test_the_readme_has_commands() -> None:
    assert len(TRAININGS) >= 4
    assert README.index("make demo") < README.index("make test") < README.index("Train SDXL")
    assert README.index("Train SDXL") < README.index("Follow one image")


@pytest.mark.parametrize("command", TRAININGS)
def test_training_commands_run(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert main([*words_after_script(command), *small(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").exists()


@pytest.mark.parametrize("command", commands((ROOT / "docs" / "data.md").read_text()))
def test_the_commands_of_the_data_page_are_understood(command: str) -> None:
    assert parse(words_after_script(command)).warnings() == []


EMBEDDED_SNIPPET, SDXL_SNIPPET = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_embedded_base_can_be_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command and the snippet of its section, with fewer steps."""
    monkeypatch.chdir(ROOT)
    words = words_after_script(TRAININGS[0])
    assert main([*words, "--output_dir", str(tmp_path), "--max_train_steps", "1", "--report_to", "none"]) == 0
    assert "outputs/icons" in words and "outputs/icons" in EMBEDDED_SNIPPET and "=20" in EMBEDDED_SNIPPET
    snippet = EMBEDDED_SNIPPET.replace("outputs/icons", str(tmp_path)).replace("=20", "=1")
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})
    assert Image.open(tmp_path / "lion.png").size == (64, 64)


def test_the_python_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (training,) = [line for line in TRAININGS if "--output_dir outputs/dog" in line]
    assert main([*words_after_script(training), *small(tmp_path / "run")]) == 0
    snippet = SDXL_SNIPPET
    for here, there in {
        "stabilityai/stable-diffusion-xl-base-1.0": str(tiny_random_folder()),
        '"cuda"': '"cpu"',
        "torch.bfloat16": "torch.float32",
        "outputs/dog": str(tmp_path / "run"),
        '"dog.png"': repr(str(tmp_path / "dog.png")),
        'snow")': 'snow", num_inference_steps=1)',
    }.items():
        assert here in snippet
        snippet = snippet.replace(here, there)
    exec(snippet, {})
    assert Image.open(tmp_path / "dog.png").size == (64, 64)


def test_the_demonstration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(ROOT)
    plain, both = tmp_path / "plain", tmp_path / "both"
    # In its first step Bi-LoRA is LoRA: the perturbation is still 0.
    short = ["--config", "configs/quickstart.yaml", "--max_train_steps", "3", "--report_to", "none"]
    assert main([*short, "--method", "lora", "--output_dir", str(plain)]) == 0
    assert main([*short, "--output_dir", str(both)]) == 0
    capsys.readouterr()
    assert demo.main([str(plain), str(both), "--steps", "1"]) == 0
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    files = [demo.DIFFUSERS_FILE, demo.KOHYA_FILE]
    assert [path.name for path in paths] == [*files, *files, demo.GRID_FILE] and paths[-1].parent == both
    assert all(path.exists() for path in paths)
    side, sheet = grid.LEAST_SIDE_PX, Image.open(paths[-1])
    assert sheet.height == grid.LABEL_PX + 8 * side
    margin = sheet.width - 4 * side
    assert 0 < margin < side
    # The last column is the true icons; the others differ from it and from each other.
    cells = [sheet.crop((margin + n * side, grid.LABEL_PX, margin + (n + 1) * side, sheet.height)) for n in range(4)]
    with Image.open(demo.ICONS_FOLDER / "fluent-3d" / "rat.png") as rat:
        true = rat.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    assert cells[3].crop((0, 0, side, side)).tobytes() == true.tobytes()
    assert len({cell.tobytes() for cell in cells}) == 4


@pytest.mark.slow
def test_the_demonstration_on_another_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["--config", "configs/quickstart.yaml", *small(tmp_path)]) == 0
    capsys.readouterr()
    assert demo.main([str(tmp_path), "--count", "2", "--steps", "1"]) == 0
    side = grid.LEAST_SIDE_PX
    assert Image.open(tmp_path / demo.GRID_FILE).size == (2 * side, 2 * side + grid.LABEL_PX)
    assert demo.main([str(tmp_path), "--steps", "1", "--prompt", "a cat", "a dog", "a cow"]) == 0
    assert Image.open(tmp_path / demo.GRID_FILE).size == (2 * side, 3 * side + grid.LABEL_PX)
    capsys.readouterr()
    for words, told in (([tmp_path / "nothing"], "no finished run"), ([tmp_path, "--steps", "0"], "--steps is 0")):
        assert demo.main([*map(str, words)]) == 2
        message = capsys.readouterr().err
        assert told in message and message.count("\n") == 1
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(tmp_path / demo.DIFFUSERS_FILE, other)
    config = yaml.safe_load((tmp_path / demo.CONFIG_FILE).read_text())
    (other / demo.CONFIG_FILE).write_text(yaml.safe_dump(config | {"pretrained_model_name_or_path": "embedded"}))
    assert demo.main([str(tmp_path), str(other), "--steps", "1"]) == 2
    assert "differ in --pretrained_model_name_or_path" in capsys.readouterr().err


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_presets_parse_and_say_how_to_run_them(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    header = path.read_text().splitlines()[0].removeprefix("# ")
    assert header.startswith(f"accelerate launch {SCRIPT} --config configs/{path.name}")
    config = parse(words_after_script(header))
    for name, value in yaml.safe_load(path.read_text()).items():
        assert getattr(config, name) == value


def test_links_lead_somewhere() -> None:
    for name in ("README.md", "CONTRIBUTING.md", *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))):
        text = (ROOT / name).read_text()
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert ((ROOT / name).parent / target).exists(), f"{name} links to {target}"


def test_its_numbers_are_the_results() -> None:
    """The table of differences to LoRA is that of the benchmark's report, row by row, with words about each row."""
    found = (ROOT / "benchmarks" / "results" / "quality.md").read_text()
    short = re.search(r"### In short\n(.*?)\n### ", found, re.DOTALL)[1]
    said, measured = (
        {
            re.sub(r"(`[^`]*`)[^|]*", r"\1 ", line, count=1)  # with no words about it
            for line in text.splitlines()
            if line.startswith("| `--method ")
        }
        for text in (README, short)
    )
    assert said == measured and len(said) > 5


def test_makefile_has_the_targets_that_are_named() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake ([a-z-]+)", README + (ROOT / "CONTRIBUTING.md").read_text())) - {"as"}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
