"""What the README and the presets say is true: their commands run, their files exist."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from PIL import Image

from bilora_diffusion import demo
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


def test_the_python_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert main([*words_after_script(TRAININGS[0]), *small(tmp_path / "run")]) == 0
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
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
    assert main(["--config", "configs/quickstart.yaml", *small(tmp_path)]) == 0
    assert demo.main([str(tmp_path), "--count", "2", "--steps", "2"]) == 0
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [path.name for path in paths] == [demo.DIFFUSERS_FILE, demo.KOHYA_FILE, demo.GRID_FILE]
    assert all(path.exists() for path in paths)
    side = demo.LEAST_SIDE_PX
    assert Image.open(paths[-1]).size == (2 * side, 2 * side + demo.LABEL_PX)
    assert demo.main([str(tmp_path / "nothing")]) == 2


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


def test_makefile_has_the_targets_that_are_named() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake ([a-z-]+)", README + (ROOT / "CONTRIBUTING.md").read_text())) - {"as"}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
