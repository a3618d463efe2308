"""Training runs seen from outside, and the form that starts one."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from app.curves import COLOURS, CURVE_TITLES, LEFT, RIGHT, WIDTH, curves, plot
from app.form import FORM_FLAGS, LEFT_OUT, NO_PRESET, UNSET, words_from
from bilora_diffusion import checkpoint, run_folder, runs
from bilora_diffusion.command_line import parse
from bilora_diffusion.config import FLAGS
from bilora_diffusion.errors import UserError
from bilora_diffusion.runs import LOG_FILE, START_FILE, Run, find_run, list_runs, resume_run, start_run, stop_run

ROOT = Path(__file__).parents[1]


def write_run(folder: Path, state: str = "finished", step: int = 3, steps: int = 3, pid: int = 1, **config) -> Run:
    folder.mkdir(parents=True)
    lines = [{"step": n + 1, "loss": 1 / (n + 1), "lr": 1e-3, "c_over_rho": n / 10} for n in range(step)]
    if lines:
        lines[-1]["loss_gap"] = 0.01
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "state.json").write_text(json.dumps({"state": state, "step": step, "steps": steps, "pid": pid}))
    (folder / "config.yaml").write_text(json.dumps({"method": "bilora"} | config))
    return Run(folder.name, folder)


@pytest.fixture
def trainer() -> Iterator[subprocess.Popen]:
    """A process that looks like a trainer."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "bilora_diffusion.cli"])
    yield process
    process.kill()
    process.wait()


def test_names_are_those_that_the_trainer_writes() -> None:
    assert (runs.CONFIG_FILE, runs.METRICS_FILE, runs.STATE_FILE, runs.LORA_FILE) == (
        run_folder.CONFIG_FILE,
        run_folder.METRICS_FILE,
        run_folder.STATE_FILE,
        run_folder.DIFFUSERS_FILE,
    )
    assert checkpoint.DIFFUSERS_FILE == runs.LORA_FILE and run_folder.PREVIEWS == "previews"


def test_the_list(tmp_path: Path) -> None:
    write_run(tmp_path / "old")
    write_run(tmp_path / "group" / "new")
    (tmp_path / "no_run").mkdir()
    (tmp_path / "no_run" / "config.yaml").write_text("a: 1")
    os.utime(tmp_path / "old" / "state.json", (1, 1))
    for name in ("metrics.jsonl", "config.yaml"):
        os.utime(tmp_path / "old" / name, (1, 1))
    assert [run.name for run in list_runs(tmp_path)] == ["group/new", "old"]
    assert find_run(tmp_path, "group/new").config()["method"] == "bilora"
    assert list_runs(tmp_path / "absent") == []
    for name in ("../old", "absent", "/etc", "group"):
        with pytest.raises(UserError, match="there is no run"):
            find_run(tmp_path, name)


def test_states(tmp_path: Path, trainer: subprocess.Popen) -> None:
    assert write_run(tmp_path / "a", "finished").state()["state"] == "finished"
    assert write_run(tmp_path / "b", "running", pid=2**30).state()["state"] == "stopped"
    assert write_run(tmp_path / "c", "running", pid=os.getpid()).state()["state"] == "stopped"  # no trainer
    alive = write_run(tmp_path / "d", "running", 1, 3, pid=trainer.pid)
    assert alive.state() | {"updated": 0} == {"state": "running", "step": 1, "steps": 3, "updated": 0}
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / START_FILE).write_text("method: lora")
    assert Run("e", tmp_path / "e").state()["state"] == "failed"
    (tmp_path / "e" / "start.pid").write_text(str(trainer.pid))
    assert Run("e", tmp_path / "e").state()["state"] == "starting"
    resumed = write_run(tmp_path / "f", "interrupted")
    assert resumed.state()["state"] == "interrupted"
    (tmp_path / "f" / "start.pid").write_text(str(trainer.pid))
    os.utime(tmp_path / "f" / "state.json", (time.time() - 1, time.time() - 1))
    assert resumed.state()["state"] == "starting"
    (tmp_path / "d" / "state.json").write_text("{cut sho")
    assert alive.state()["state"] == "failed"


def test_a_process_that_took_the_number_over_is_left_alone(tmp_path: Path, trainer: subprocess.Popen) -> None:
    run = write_run(tmp_path / "a", "running", pid=trainer.pid)
    for name in ("state.json", "metrics.jsonl", "config.yaml"):
        os.utime(tmp_path / "a" / name, (1, 1))  # last written long before that process began
    assert run.process() is None
    with pytest.raises(UserError, match="is not running"):
        stop_run(run)
    assert trainer.poll() is None


def test_stop(tmp_path: Path, trainer: subprocess.Popen) -> None:
    stop_run(write_run(tmp_path / "a", "running", pid=trainer.pid))
    assert trainer.wait(10) == -15


def test_what_cannot_be_resumed(tmp_path: Path, trainer: subprocess.Popen) -> None:
    with pytest.raises(UserError, match=r"is finished: for more steps .* --max_train_steps"):
        resume_run(write_run(tmp_path / "a", "finished"))
    with pytest.raises(UserError, match=r"is at work"):
        resume_run(write_run(tmp_path / "b", "running", pid=trainer.pid))
    bare = write_run(tmp_path / "c", "interrupted")
    with pytest.raises(
        UserError, match="--pretrained_model_name_or_path is missing"
    ):  # its configuration is no whole one
        resume_run(bare)
    (bare.path / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"has no config\.yaml"):
        resume_run(bare)
    assert bare.command() == "" and not (bare.path / LOG_FILE).exists()


def test_the_command_that_goes_on(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a b", "interrupted", pretrained_model_name_or_path="embedded", instance_data_dir="x")
    launcher, verb, script, *words = shlex.split(run.command())
    assert (launcher, verb) == ("accelerate", "launch") and (ROOT / script).is_file()
    config = parse(words)
    assert (config.output_dir, config.method, config.resume_from_checkpoint) == (str(run.path), "bilora", "latest")
    (run.path / START_FILE).write_text((run.path / "config.yaml").read_text().replace("bilora", "lora"))
    assert parse(shlex.split(run.command())[3:]).method == "lora"


def test_curves_leave_out_what_is_broken(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    with (tmp_path / "a" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": null}\n[1]\nnull\n{"step": "x"}\n{"loss": 1}\n{"step": 5, "lo')
    assert [point["step"] for point in run.curves()] == [1, 2, 3, 4]
    found = curves([run, write_run(tmp_path / "b", step=2)])
    assert set(found) == set(CURVE_TITLES)
    assert {name: len(curve) for name, curve in found["loss"].items()} == {"a": 3, "b": 2}
    assert found["loss_gap"] == {"a": [(3, 0.01)], "b": [(2, 0.01)]}
    assert all(by_run == {} for by_run in curves([]).values())


def test_long_curves_are_smoothed_and_thinned(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", step=3000)
    curve = curves([run])["loss"]["a"]
    assert 300 <= len(curve) <= 400 and [step for step, _ in curve] == sorted({step for step, _ in curve})
    step, value = curve[100]
    assert value == pytest.approx(sum(1 / n for n in range(int(step) - 149, int(step) + 1)) / 150)


def test_a_plot_shows_each_run_in_its_colour() -> None:
    svg = plot("<b>", {"one": [(1, 0.0), (101, 1.0)], "<two>": [(1, 1.0)]}, ["none", "one", "<two>"])
    assert "<b>" not in svg and "<two>" not in svg and "&lt;two&gt;" in svg
    (line,) = re.findall(rf'points="([^"]+ [^"]+)" stroke="{COLOURS[1]}"', svg)
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in line.split())
    assert (x0, x1) == (LEFT, WIDTH - RIGHT) and y0 > y1
    assert svg.count("<circle") == 1 and COLOURS[2] in svg and COLOURS[0] not in svg
    assert "no data" in plot("Loss", {}, [])
    for low, high in ((0, 1), (0.5, 0.5001), (-3, 7), (1, 100_000), (5, 5)):
        texts = re.findall(
            r'text-anchor="(?:end|middle)">([-\d.e+]+)<', plot("", {"a": [(low, low), (high, high)]}, ["a"])
        )
        assert 4 <= len(texts) <= 14


def test_what_a_run_made(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    for name in ("checkpoint-5", "checkpoint-20", "checkpoint-x"):
        (tmp_path / "a" / name).mkdir()
        (tmp_path / "a" / name / runs.LORA_FILE).touch()
    (tmp_path / "a" / runs.LORA_FILE).touch()
    assert [path.parent.name for path in run.lora_files()][:3] == ["a", "checkpoint-20", "checkpoint-5"]
    previews = tmp_path / "a" / "previews"
    previews.mkdir()
    for name in ("final_0", "step_000010_0", "step_000005_0", "mine"):
        Image.new("RGB", (4, 4)).save(previews / f"{name}.png")
    (previews / "step_000099_0.png").symlink_to("/etc/hostname")
    assert [path.stem for path in run.previews()] == ["step_000005_0", "step_000010_0", "final_0"]


def test_the_log_shows_bars_as_they_end(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    assert run.log() == ""
    (tmp_path / "a" / LOG_FILE).write_bytes(b"start\nbar 1\rbar 2\rbar 3\nend \xff\n")
    assert run.log().splitlines()[:3] == ["start", "bar 3", "end \N{REPLACEMENT CHARACTER}"]
    (tmp_path / "a" / LOG_FILE).write_bytes(b"x" * 10**6)
    assert len(run.log()) == runs.MOST_LOG_BYTES


@pytest.mark.parametrize("name", ["", "..", ".hidden", "-rf", "a/b", "../a", "a b", "ä", "x" * 101, "a\n"])
def test_names_that_are_no_folders(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be a run's"):
        start_run(tmp_path, name, ["--config", str(ROOT / "configs" / "quickstart.yaml")])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--rank=0", "--instance_data_dir=x"], "--rank is 0"),
        (["--learning_rate=fast", "--instance_data_dir=x"], "--learning_rate is 'fast'"),
        (["--method=magic", "--instance_data_dir=x"], "--method is 'magic'"),
        ([], "--pretrained_model_name_or_path is missing"),
        (["--config", "nowhere.yaml"], "cannot be read"),
    ],
)
def test_the_trainers_own_words_refuse(words: list[str], text: str, tmp_path: Path) -> None:
    if "--rank=0" not in words and words and "--config" not in words:
        words = [*words, "--pretrained_model_name_or_path=embedded"]
    with pytest.raises(UserError) as refusal:
        start_run(tmp_path, "new", words)
    assert text in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    with pytest.raises(UserError, match="already"):
        start_run(tmp_path, "new", ["--config", str(ROOT / "configs" / "quickstart.yaml")])


# --- The form ---


def test_the_form_has_every_flag_but_those_left_out() -> None:
    assert set(FORM_FLAGS) == set(FLAGS) - set(LEFT_OUT) and set(LEFT_OUT) <= set(FLAGS)


def test_a_filled_form_is_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    empty = [UNSET if flag.choices or flag.kind is bool else "" for flag in FORM_FLAGS.values()]
    assert words_from(NO_PRESET, empty) == []
    preset = "configs/quickstart.yaml"
    assert parse(words_from(preset, empty)) == parse(["--config", preset])
    filled = {"rank": "8", "method": "lora", "use_dora": "true", "instance_prompt": "--a 'b' \"c\"", "rho": ""}
    values = [filled.get(name, value) for name, value in zip(FORM_FLAGS, empty, strict=True)]
    config = parse(words_from(preset, values))
    assert (config.rank, config.method, config.use_dora) == (8, "lora", True)
    assert (
        config.instance_prompt == "--a 'b' \"c\""
        and config.max_train_steps == parse(["--config", preset]).max_train_steps
    )


def test_a_run_that_fails_at_once_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way: a process of its own, its log, its end; it needs no torch to be refused."""
    monkeypatch.chdir(tmp_path)
    run = start_run(tmp_path, "new", ["--pretrained_model_name_or_path=embedded", "--instance_data_dir=absent"])
    (tmp_path / "new" / START_FILE).read_text()
    assert [one.name for one in list_runs(tmp_path)] == ["new"]
    until = time.monotonic() + 120
    while run.process() is not None and time.monotonic() < until:
        time.sleep(0.1)
    assert run.state()["state"] == "failed"
    assert "--instance_data_dir absent is not there" in run.log()
