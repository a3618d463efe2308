"""How the app starts: quickly, on this machine only, and with a line for each mistake."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from app_server import free_port

from app.__main__ import main
from app.options import AUTH_VARIABLE, parse
from app.services import Services
from bilora_diffusion.errors import UserError

ROOT = Path(__file__).parents[1]
STARTED = """
import resource, sys, urllib.request
from app.__main__ import launch
from app.options import Options
from app.services import Services
Services.warm_up = lambda self: None
blocks = launch(Options(port=int(sys.argv[1])))
page = urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/").read()
used = resource.getrusage(resource.RUSAGE_SELF)
heavy = [name for name in ("torch", "diffusers", "transformers", "peft") if name in sys.modules]
print("|".join([str(b"Bi-LoRA Diffusion" in page), ",".join(heavy), str(used.ru_utime + used.ru_stime)]))
blocks.close(verbose=False)
"""


def test_it_opens_before_any_model_is_imported(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", STARTED, str(free_port())]
    ended = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    shown, heavy, seconds = ended.stdout.splitlines()[-1].split("|")
    assert shown == "True" and heavy == "", ended.stderr
    # Time of the processor, not of the clock: other tests and machines may share it. Torch alone would take 10.
    assert float(seconds) < 8


@pytest.mark.parametrize("words", [["--share"], ["--host", "0.0.0.0"], ["--host", "192.168.0.7"], ["--host", "::"]])
def test_a_public_address_asks_for_a_password(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(AUTH_VARIABLE, raising=False)
    with pytest.raises(UserError, match="opens the app to others"):
        parse(words)
    options = parse([*words, "--auth", "me:secret"])
    assert options.auth == ("me", "secret") and not options.training and "secret" not in repr(options)
    assert parse([*words, "--auth", "me:secret", "--allow_training"]).training
    monkeypatch.setenv(AUTH_VARIABLE, "you:pass:word")
    assert parse(words).auth == ("you", "pass:word")


@pytest.mark.parametrize("words", [[], ["--host", "127.0.0.1"], ["--host", "localhost"], ["--host", "::1"]])
def test_this_machine_needs_none(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(AUTH_VARIABLE, raising=False)
    options = parse(words)
    assert options.auth is None and options.training and options.bases == ("embedded",)
    assert parse([]).host == "127.0.0.1"
    bases = ("tiny-random", "owner/model", "embedded")
    assert parse([word for base in bases for word in ("--base", base)]).bases == bases


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--auth", "nocolon"], "USER:PASSWORD"),
        (["--auth", ":x"], "USER:PASSWORD"),
        (["--port", "0"], "--port is 0"),
        (["--port", "99999"], "--port is 99999"),
        (["--lora_dir", "/nowhere/at/all"], "is no folder"),
        (["--base", "/nowhere/at/all"], "--base: there is no file or folder /nowhere/at/all"),
        (["--base", "sdxl.safetensors"], "there is no file or folder sdxl.safetensors"),
        (["--base", "https://a.b/c"], "is an address"),
        (["--base", "embeded"], "did you mean embedded?"),
    ],
)
def test_mistakes_get_one_line(words: list[str], text: str, capsys: pytest.CaptureFixture) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1


def test_folders_get_names_of_their_own(tmp_path: Path) -> None:
    one, other = tmp_path / "a" / "loras", tmp_path / "b" / "loras"
    for folder in (one, other, one / "inner"):
        folder.mkdir(parents=True)
    words = ["--lora_dir", str(one), "--lora_dir", str(other), "--runs_dir", str(one / "inner")]
    folders = Services(parse(words), tmp_path / "work").files.folders
    assert folders["loras"] == one.resolve() and folders["loras-2"] == other.resolve()
    assert set(folders) == {"loras", "loras-2", "uploaded"}


def test_bases_are_shown_without_their_place(tmp_path: Path) -> None:
    base = tmp_path / "my_base"
    base.mkdir()
    services = Services(parse(["--base", str(base), "--base", "embedded", "--base", "owner/model"]), tmp_path / "work")
    assert services.bases == ["my_base", "embedded", "owner/model"]
