"""What docs/app.md and the README say of the app is true."""

import re
import shlex
from pathlib import Path

import pytest
from app_server import serve, write_outputs
from PIL import Image

from app.options import Options, parse
from app.options import _parser as parser
from bilora_diffusion import compare

ROOT = Path(__file__).parents[1]
DOCS = (ROOT / "docs" / "app.md").read_text()
README = (ROOT / "README.md").read_text()
PICTURE = ROOT / "docs" / "images" / "app-compare.png"


def commands(text: str, module: str) -> list[list[str]]:
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).splitlines()
    return [shlex.split(line)[3:] for line in lines if line.startswith(f"python -m {module} ")]


def test_the_example_runs(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    assert "steps=20" in example and '"seeds": [0, 1]' in example
    with serve(write_outputs(tmp_path / "outputs")) as server:
        example = example.replace("http://127.0.0.1:7860", server.url).replace("steps=20", "steps=2")
        names: dict = {}
        exec(example.replace('"seeds": [0, 1]', '"seeds": [0, 1], "steps": 2'), names)
    assert len(names["files"]) == 2 and len(names["told"]["rows"]) == 4
    with Image.open(names["files"][0]) as picture:
        assert picture.size == (64, 64)


@pytest.mark.parametrize("text", [DOCS, README], ids=["docs", "readme"])
def test_the_command_runs(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = commands(text, "bilora_diffusion.compare")
    assert found
    outputs = write_outputs(tmp_path / "outputs")
    (outputs / "plain").rename(outputs / "quickstart_lora")
    (outputs / "both").rename(outputs / "quickstart")
    monkeypatch.chdir(tmp_path)
    for words in found:
        assert compare.main([*words, "--steps", "1"] if "--settings" not in words else words) == 0


def test_every_flag_is_told() -> None:
    flags = {option for action in parser()._actions for option in action.option_strings if option != "-h"}
    told = set(re.findall(r"`(--\w+)`", DOCS.split("The page opens")[0]))
    assert told == flags - {"--help"}


def test_the_readmes_command_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loras").mkdir()
    (words,) = commands(README, "app")
    options = parse(words)
    assert isinstance(options, Options) and options.lora_dirs == (Path("loras"),)


def test_the_readme_shows_the_app() -> None:
    assert "docs/images/app-compare.png" in README and PICTURE.stat().st_size < 300_000
    with Image.open(PICTURE) as picture:
        assert picture.width >= 1000
