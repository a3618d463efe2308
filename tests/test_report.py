"""The report: what its words may claim, that nothing is trained twice, and a whole one on a handful of steps."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from whole_run import Forked, forking, interrupted_after, metrics, quickened

from bilora_diffusion.bases import Base
from bilora_diffusion.cli import main as train
from bilora_diffusion.curves import mean_of
from bilora_diffusion.data.pictures import find_pictures
from bilora_diffusion.diffusion import build_objective
from bilora_diffusion.embedded import CONCEPT_FOLDER
from bilora_diffusion.errors import UserError
from bilora_diffusion.generation.engine import Engine
from bilora_diffusion.measures import judge_for
from bilora_diffusion.paired import T_95, half_width, paired_difference
from bilora_diffusion.report.__main__ import _parse as parse_report
from bilora_diffusion.report.__main__ import main
from bilora_diffusion.report.drawing import most_alike
from bilora_diffusion.report.making import Options, make_report
from bilora_diffusion.report.measuring import SIZES, Meter
from bilora_diffusion.report.plan import check_methods, check_seeds, plan
from bilora_diffusion.report.plots import COLOURS, INK, Line, Plot, svg
from bilora_diffusion.report.quantities import QUANTITIES, amount, compared, mean
from bilora_diffusion.report.running import Process, run_all
from bilora_diffusion.report.splitting import split, write_folder
from bilora_diffusion.report.verdict import caveat, gap_note, overfitting, sentence, verdict
from bilora_diffusion.run_folder import DIFFUSERS_FILE
from bilora_diffusion.runs import LOG_FILE, START_FILE, launch
from bilora_diffusion.sharpness.setting import load_scene

BY_KEY = {quantity.key: quantity for quantity in QUANTITIES}
HOSTILE = """<script>alert(1)</script>"'><img src=x onerror=alert(2)> {{ 7 * 7 }} of a lion"""


# --- Paired numbers and what is said of them ---


def test_intervals_are_students() -> None:
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(4.303 / math.sqrt(3))
    # The probability that Student's t with 3 degrees of freedom lies inside, by its closed distribution function.
    t = T_95[4 - 2]
    inside = (2 / math.pi) * (math.atan(t / math.sqrt(3)) + (t / math.sqrt(3)) / (1 + t * t / 3))
    assert inside == pytest.approx(0.95, abs=1e-4)


def test_differences_are_paired() -> None:
    """The seeds differ by far more than the methods, and the interval is narrow."""
    theirs = [0.1, 0.2, 0.4]
    one = paired_difference([value - 0.01 for value in theirs], theirs)
    assert one.mean == pytest.approx(-0.01) and one.half < 1e-9 and one.is_shown
    ratio = paired_difference([0.11, 0.22, 0.44], theirs, relative=True)
    assert ratio.mean == pytest.approx(0.1) and ratio.interval == pytest.approx((0.1, 0.1))
    wild = paired_difference([0.3, 0.01, 0.4], theirs, relative=True)
    assert not wild.is_shown and wild.interval[0] > -1
    assert paired_difference([1.0], [2.0]).interval is None and not paired_difference([1.0], [2.0]).is_shown
    assert paired_difference([math.nan], [1.0]) is None and paired_difference([1.0], [0.0], relative=True) is None
    assert paired_difference([0.2], [0.2]).is_zero


def said(ours: Sequence[float], theirs: Sequence[float], key: str = "held_out") -> tuple[str, str]:
    quantity = BY_KEY[key]
    difference = paired_difference(ours, theirs, relative=quantity.relative)
    one = sentence(quantity, "bilora", "lora", difference, len(ours), 4)
    return one.outcome, one.text


def test_a_difference_that_is_not_shown() -> None:
    outcome, text = said([0.0990, 0.2010, 0.2970], [0.1, 0.2, 0.3])
    assert outcome == "not shown"
    assert text.startswith(
        "On 3 paired seeds Bi-LoRA's loss on the 4 held-out pictures was 0.5 % lower than LoRA's (95 %"
    )
    assert text.endswith("% higher): no difference was shown.") and "lower to" in text
    wide = [0.15, 0.9], [0.1, 0.2]  # a forgotten base, say: t of two seeds is 12.7
    assert said(*wide)[0] == "not shown" and said(*wide)[1].endswith(
        "every seed went the same way, but so few cannot rule out chance."
    )
    assert said([0.11, 0.19], [0.1, 0.2])[1].endswith("no difference was shown.")


@pytest.mark.parametrize(("factor", "word"), [(0.97, "lower"), (1.03, "higher")])
def test_a_difference_that_is_shown(factor: float, word: str) -> None:
    theirs = [0.1, 0.2, 0.3]
    outcome, text = said([factor * value * (1 + 0.0001 * n) for n, value in enumerate(theirs)], theirs)
    assert outcome == word and f"was 3.0 % {word} than LoRA's" in text and text.count(word) == 3
    assert text.endswith("more than the chance of the seeds explains.")


def test_one_seed_shows_nothing() -> None:
    outcome, text = said([0.05], [0.1])
    assert outcome == "one seed" and "50 % lower" in text and text.endswith("one seed shows nothing.")
    assert "interval" not in text


def test_the_same_and_the_broken() -> None:
    assert said([0.1, 0.2], [0.1, 0.2]) == (
        "equal",
        "On 2 paired seeds Bi-LoRA's loss on the 4 held-out pictures was exactly LoRA's.",
    )
    outcome, text = said([math.nan, 0.2], [0.1, 0.2])
    assert outcome == "not measured" and "no finite number" in text


def test_amounts_have_the_digits_that_count() -> None:
    loss, gap, drift = (BY_KEY[key] for key in ("held_out", "gap", "drift"))
    assert amount(loss, -0.0003) == "0.03 % lower" and amount(loss, 0.1234) == "12 % higher"
    assert amount(gap, 0.00042) == "0.042 points higher" and amount(drift, -0.015) == "1.5 points lower"


def test_means_differ_by_what_the_difference_says() -> None:
    """Arithmetic ones would call a method slower that the ratio calls faster."""
    theirs, ours = [1.0, 1.0, 1.0], [0.5, 0.5, 2.4]
    ratio = mean(BY_KEY["seconds"], ours) / mean(BY_KEY["seconds"], theirs)
    assert ratio == pytest.approx(1 + paired_difference(ours, theirs, relative=True).mean) and ratio < 1
    assert mean(BY_KEY["drift"], [-0.1, 0.3]) == pytest.approx(0.1) and math.isnan(mean(BY_KEY["seconds"], [math.nan]))


def run_values(held_out: float, seconds: float = 1.0) -> dict[str, float | None]:
    return {"held_out": held_out, "training": 0.1, "seconds": seconds, "memory": None, "prompt": None}


def test_the_verdict_compares_with_the_first_method() -> None:
    runs = {
        "lora": [run_values(0.1), run_values(0.2)],
        "bilora": [run_values(0.1, 1.5), run_values(0.2, 1.5)],
        "flat-lora": [run_values(0.2), run_values(0.4)],
    }
    found = compared({"held_out": 0.3}, runs)
    assert [one.quantity.key for one in found] == ["held_out", "training", "seconds"]
    assert found[0].base == 0.3 and found[1].base is None
    said = verdict(found, list(runs), held_out=2, notes=[("bilora", "in 1 of 2 runs the auxiliary was inert")])
    assert [one.outcome for one in said] == [
        *("equal", "equal", "higher"),
        *("higher", "equal", "equal"),
        "not measured",
    ]
    assert [one.leads for one in said] == [True, False, False, True, False, False, False]
    assert "training pictures was exactly" in said[1].text
    assert "50 % higher" in said[2].text and "Flat-LoRA's loss" in said[3].text and "inert" in said[-1].text
    none = verdict(compared({}, {"lora": runs["lora"]}), ["lora"], held_out=0, notes=[])
    assert "was not measured" in none[0].text and "nothing was compared" in none[1].text
    assert "one in twenty" in caveat(8, 3, 4) and "one in twenty" not in caveat(8, 1, 0)
    assert "cannot be told apart" in caveat(8, 1, 0)


def test_overfitting_is_told_and_where_to_stop() -> None:
    one = overfitting("lora", [[(50.0, 0.08), (100.0, 0.10), (150.0, 0.11)], [(50.0, 0.10), (150.0, 0.11)]])
    assert one.outcome == "too long" and "lowest at step 50, and 22 % higher at step 150" in one.text
    assert "checkpoint-50 " in one.text
    assert overfitting("lora", [[(50.0, 0.11), (150.0, 0.10)]]) is None
    assert (
        overfitting("lora", [[(50.0, 0.100), (150.0, 0.1001)]]) is None and overfitting("lora", [[(9.0, 1.0)]]) is None
    )


def test_a_negative_loss_gap_is_told() -> None:
    assert gap_note("bilora", [0.01, 0.03], [0.2, 0.6]) == (
        "Bi-LoRA's loss gap was +0.02 (+5.0% of the loss without the perturbation), the mean of its runs."
    )
    negative = gap_note("bilora", [-0.01, 0.03], [0.2, 0.6])
    assert "In 1 of 2 it was negative: the loss was lower with the perturbation" in negative


# --- What is held out ---


def concept(count: int = 23) -> list:
    return find_pictures(str(CONCEPT_FOLDER), instance_prompt=None)[0][:count]


@pytest.mark.parametrize(("count", "wanted", "held"), [(23, None, 4), (8, None, 2), (7, None, 0), (7, 3, 3), (9, 0, 0)])
def test_how_many_are_held_out(count: int, wanted: int | None, held: int) -> None:
    pictures = concept(count)
    trained, held_out = split(pictures, wanted, 0)
    assert len(held_out) == held and sorted([*trained, *held_out], key=lambda one: one.name) == pictures
    assert split(pictures, wanted, 0)[1] == held_out
    if held > 2:
        assert split(pictures, wanted, 1)[1] != held_out


def test_the_trainer_sees_the_others_only(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "out" / "training"
    (source / "below").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.jpg", "below/c.png")):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(source / name)
    (source / "a.txt").write_text('a "quoted" word')
    (source / "metadata.jsonl").write_text('{"file_name": "below/c.png", "text": "the third"}\n')
    pictures, _ = find_pictures(source, instance_prompt="a sks")
    write_folder(pictures, target)
    again, warnings = find_pictures(target, instance_prompt=None)
    assert [(one.name, one.caption) for one in again] == [(one.name, one.caption) for one in pictures]
    assert not warnings and again[2].load().tobytes() == pictures[2].load().tobytes()
    write_folder(pictures, target)
    Image.new("RGB", (32, 32), "red").save(source / "a.png")
    with pytest.raises(UserError, match="name another --output_dir"):
        write_folder(pictures, target)


# --- Runs ---


@pytest.fixture(scope="module", autouse=True)
def quick_runs() -> Iterator[None]:
    """The written files are loaded again in tests of their own."""
    with quickened():
        yield


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight icons, one under a hostile name and caption."""
    folder = tmp_path_factory.mktemp("report") / "icons"
    folder.mkdir()
    lines = []
    for number, one in enumerate(concept(8)):
        name = "<b onclick=x>&.png" if number == 0 else one.name
        shutil.copy(CONCEPT_FOLDER / one.name, folder / name)
        lines.append(json.dumps({"file_name": name, "text": HOSTILE if number == 0 else one.caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def words(pictures: Path, **flags: object) -> tuple[str, ...]:
    given = {
        "pretrained_model_name_or_path": "embedded",
        "instance_data_dir": pictures,
        "max_train_steps": 2,
        "checkpointing_steps": 1,
        "learning_rate": 1e-3,
        "train_batch_size": 2,
        "rank": 2,
        "seed": 5,
        "report_to": "none",
    }
    return tuple(str(word) for name, value in (given | flags).items() for word in (f"--{name}", value))


class Fork(Forked):
    """A run of the trainer in a fork: starting Python and torch anew takes ten times as long as the run."""

    def __init__(self, folder: Path, words: Sequence[str], stop_after: int | None = None) -> None:
        self.code: int | None = None

        def work() -> int:
            if stop_after is None:
                return train(words)
            with interrupted_after(stop_after):
                return train(words)

        super().__init__(work, folder / LOG_FILE)

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def start_as_a_user(folder: Path, words: Sequence[str]) -> Process:
    """By the report's own command. On Linux the first run only: forking the others, where that is safe, saves time."""
    as_a_user = sys.platform != "linux" or folder.name == "lora-seed5"
    return launch(folder, words) if as_a_user else Fork(folder, words)


def never(folder: Path, words: Sequence[str]) -> Fork:
    raise AssertionError(f"{folder} is trained again")


def test_the_runs_differ_in_method_and_seed_alone(pictures: Path, tmp_path: Path) -> None:
    given = (*words(pictures), "--overwrite_output_dir", "--hub_token", "secret", "--hub_token=secret", "--push_to_hub")
    trainings = plan(given, ["lora", "bilora"], [5, 6], tmp_path, tmp_path / "training")
    assert [one.name for one in trainings] == ["lora-seed5", "bilora-seed5", "lora-seed6", "bilora-seed6"]
    for one in trainings:
        assert (one.config.method, one.config.seed) == (one.method, one.seed)
        assert one.config.output_dir == str(one.folder) and one.config.instance_data_dir == str(tmp_path / "training")
        assert not one.config.overwrite_output_dir and not one.config.push_to_hub
        assert "secret" not in one.command and one.command.startswith("python -m bilora_diffusion.cli --pretrained")
        assert one.config.max_train_steps == 2
        assert one.command.count("--instance_data_dir") == 1


@forking
def test_a_stopped_report_goes_on(pictures: Path, tmp_path: Path) -> None:
    """What was done is kept, what was stopped goes on from its checkpoint, and the result is the unbroken one."""
    (unbroken,) = plan(words(pictures), ["bilora"], [5], tmp_path / "unbroken", None)
    assert run_all([unbroken], Fork) == 1 and run_all([unbroken], never) == 0
    trainings = plan(words(pictures), ["bilora"], [5], tmp_path / "stopped", None)
    with pytest.raises(KeyboardInterrupt):
        run_all(trainings, lambda folder, words: Fork(folder, words, stop_after=1))
    resumed = []

    def start(folder: Path, words: Sequence[str]) -> Fork:
        resumed.append(words[-2:])
        return Fork(folder, words)

    assert run_all(trainings, start) == 1 and resumed == [["--resume_from_checkpoint", "latest"]]
    one, other = (load_file(training.folder / DIFFUSERS_FILE) for training in (unbroken, *trainings))
    assert all(torch.equal(one[name], other[name]) for name in one)
    changed = plan(words(pictures, rank=3), ["bilora"], [5], tmp_path / "stopped", None)
    with pytest.raises(UserError, match="holds a run with other settings: name another --output_dir"):
        run_all(changed, never)


@pytest.mark.parametrize(
    ("flags", "every"),
    [
        ({"checkpointing_steps": 500}, 100),
        ({"max_train_steps": 3, "checkpointing_steps": 500}, 1),
        ({"checkpointing_steps": 200}, 200),
        ({"checkpointing_steps": 500, "checkpoints_total_limit": 1}, 500),
    ],
)
def test_where_no_checkpoint_is_asked_for_there_are_some_for_the_curves(
    pictures: Path, tmp_path: Path, flags: dict[str, int], every: int
) -> None:
    (training,) = plan(words(pictures, **{"max_train_steps": 500, **flags}), ["lora"], [5], tmp_path, None)
    assert training.config.checkpointing_steps == every


@forking
def test_ctrl_c_ends_the_run_at_hand_with_everything_saved(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (training,) = plan(words(pictures, max_train_steps=500, checkpointing_steps=400), ["lora"], [5], tmp_path, None)

    def interrupt(bar: object, run: object) -> None:
        if (run.state()["step"] or 0) >= 1:
            raise KeyboardInterrupt

    monkeypatch.setattr("bilora_diffusion.report.running._show", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_all([training], Fork)
    state = json.loads((training.folder / "state.json").read_text())
    assert state["state"] == "interrupted" and (training.folder / f"checkpoint-{state['step']}").is_dir()


@forking
def test_a_failed_run_is_told_in_one_line(pictures: Path, tmp_path: Path) -> None:
    (training,) = plan(words(pictures, init_lora_from="nowhere.safetensors"), ["lora"], [5], tmp_path, None)
    with pytest.raises(UserError) as refusal:
        run_all([training], Fork)
    text = str(refusal.value)
    assert "the run lora-seed5 failed: " in text and "nowhere.safetensors" in text and "\n" not in text
    assert text.endswith(f"(its log: {training.folder / LOG_FILE})")
    (training,) = plan(words(pictures), ["lora"], [7], tmp_path, None)
    training.folder.mkdir()
    with pytest.raises(UserError, match="holds something else"):
        run_all([training], never)
    (training.folder / START_FILE).write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match=f"{START_FILE} cannot be read: it is not text"):
        run_all([training], never)


# --- A whole report ---


@pytest.fixture(scope="module")
def report(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods, two seeds, two steps."""
    output = tmp_path_factory.mktemp("report") / "out"
    options = Options(
        words=words(pictures, rho=1.0),
        methods=("lora", "bilora"),
        seeds=2,
        output=output,
        prompts=(HOSTILE, "a fluent icon of a sun"),
        other_prompts=("a noto icon of a frog",),
        pictures=1,
        draws=4,
        steps=1,
        command=f"python -m bilora_diffusion.report --prompts '{HOSTILE}'",
    )
    assert make_report(options, start_as_a_user) == output / "report.html"
    return output


@pytest.fixture
def told(report: Path) -> dict:
    return json.loads((report / "report.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


def test_the_numbers_are_those_of_the_runs(report: Path, told: dict, pictures: Path) -> None:
    assert told["methods"] == ["lora", "bilora"] and told["seeds"] == [5, 6]
    assert len(told["pictures"]["held_out"]) == 2 and len(told["pictures"]["training"]) == 6
    trained = (report / "pictures" / "training" / "metadata.jsonl").read_text().splitlines()
    assert [json.loads(line)["file_name"] for line in trained] == told["pictures"]["training"]
    # The same draws: before the auxiliary has moved, the losses are equal to the bit.
    for seed in (5, 6):
        first = [metrics(report / f"{method}-seed{seed}")[0]["loss"] for method in told["methods"]]
        assert first[0] == first[1]
    by_key = {one["quantity"]: one for one in told["compared"]}
    assert set(by_key) == set(BY_KEY)
    run = told["runs"]["bilora-seed6"]
    assert by_key["held_out"]["values"]["bilora"][1] == run["losses"]["held_out"]
    assert by_key["seconds"]["values"]["bilora"][1] == run["summary"]["seconds_per_step"]
    assert by_key["drift"]["values"]["lora"][0] == pytest.approx(
        told["runs"]["lora-seed5"]["losses"]["other"] / told["base_measured"]["losses"]["other"] - 1
    )
    ours, theirs = (by_key["gap"]["values"][method] for method in ("bilora", "lora"))
    expected = statistics.fmean(a - b for a, b in zip(ours, theirs, strict=True))
    assert by_key["gap"]["differences"]["bilora"]["mean"] == pytest.approx(expected)
    assert [one["step"] for one in run["checkpoints"]] == [1] and (report / "bilora-seed6" / "checkpoint-2").is_dir()
    assert run["checkpoints"][0]["held_out"] not in (run["losses"]["held_out"], told["base_measured"]["losses"])
    assert run["losses"] != told["base_measured"]["losses"] and len(run["sharpness"]["losses"]) == len(SIZES)
    assert told["verdict"][0]["text"].startswith("On 2 paired seeds Bi-LoRA's loss on the 2 held-out pictures was")


def test_a_loss_is_what_the_sharpness_command_measures(report: Path, told: dict) -> None:
    """The same draws and the same loss by the other way of loading a LoRA."""
    scene = load_scene(
        report / "bilora-seed5" / DIFFUSERS_FILE,
        Base("embedded"),
        report / "pictures" / "training",
        instance_prompt=None,
        resolution=None,
        draws=4,
        batch_size=2,
        seed=5,
        device=torch.device("cpu"),
    )
    run = told["runs"]["bilora-seed5"]
    landscape = scene.lora()
    assert landscape.loss() == pytest.approx(run["losses"]["training"], rel=1e-5)
    found = run["sharpness"]["gradient_norm"]
    assert torch.stack([g.square().sum() for g in landscape.gradient()]).sum().sqrt().item() == pytest.approx(
        found, 1e-4
    )


def test_half_precision_measures_the_same(report: Path, told: dict) -> None:
    """As on a GPU: the base in bfloat16, the losses in float32 all the same, the gradient under autocast."""
    engine = Engine(Base("embedded"), torch.device("cpu"), torch.bfloat16)
    trained, _ = find_pictures(report / "pictures" / "training", instance_prompt=None)
    objective = build_objective(engine.load().scheduler)
    meter = Meter(engine, objective, {"training": trained}, resolution=64, draws=4, batch_size=2, seed=5)
    path = report / "bilora-seed5" / DIFFUSERS_FILE
    loras = [(path, "", 1.0)]
    run = told["runs"]["bilora-seed5"]
    assert meter.losses(loras)["training"] == pytest.approx(run["losses"]["training"], rel=5e-3)
    assert meter.losses(())["training"] == pytest.approx(told["base_measured"]["losses"]["training"], rel=5e-3)
    found = meter.sharpness(loras, "training")
    assert found["losses"] == pytest.approx(run["sharpness"]["losses"], rel=0.05)
    assert engine.load().unet.conv_in.weight.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in engine.load().unet.parameters())


class Elements(HTMLParser):
    """Every element of a page with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_is_whole_and_takes_prompts_as_text(report: Path) -> None:
    text = (report / "report.html").read_text()
    page = Elements(text)
    assert not {tag for tag, _ in page.found} & {"script", "iframe", "link", "object", "form", "b"}
    assert not [name for _, attributes in page.found for name in attributes if name.startswith("on")]
    pictures = [attributes for tag, attributes in page.found if tag == "img"]
    assert all(one["src"].startswith("data:image/") and one["alt"] for one in pictures)
    assert len(pictures) == 2 * 3 + 3 + 2 * 2  # two prompts and one other by base and methods; a pair for each method
    addresses = [value for tag, one in page.found for name, value in one.items() if name.endswith("href")]
    assert all(value.startswith("#") for value in addresses)  # a plot's own shapes
    assert any(HOSTILE in one for one in page.texts) and any("<b onclick=x>&.png" in one for one in page.texts)
    assert any(HOSTILE in (attributes.get("alt") or "") for attributes in pictures)
    assert INK not in text and text.count("<svg") == 5 and COLOURS[0] in text
    assert "python -m bilora_diffusion.cli --pretrained" in "".join(page.texts)
    assert any("Bi-LoRA's loss gap was" in one for one in page.texts)
    for name in ("loss", "checkpoints", "sharpness", "pictures", "other_prompts"):
        with Image.open(report / f"{name}.png") as picture:
            assert picture.width > 400
    assert (report / "pictures" / "lora-seed6" / "0.png").exists()


CUT_OFF = "[...document.querySelectorAll('.wide')].filter((one) => one.scrollWidth > one.clientWidth).length"
TWO_MORE_METHODS = """for (const row of document.querySelectorAll('tr')) {
    const last = row.lastElementChild; row.append(last.cloneNode(true), last.cloneNode(true)) }"""


def test_the_page_in_a_browser(report: Path) -> None:
    from app_server import LAPTOP, PHONE, SCREENSHOTS, browser_path
    from playwright.sync_api import sync_playwright

    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    path, backgrounds = browser_path(), set()
    command = json.loads((report / "report.json").read_text())["runs"]["lora-seed5"]["command"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        for name, size, scheme in (("laptop", LAPTOP, "light"), ("phone", PHONE, "dark")):
            page = browser.new_context(viewport=size, color_scheme=scheme, offline=True).new_page()
            told, asked = [], []
            page.on("console", lambda message, told=told: told.append(message.text))
            page.on("dialog", lambda dialog, told=told: told.append(dialog.message))
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.goto((report / "report.html").as_uri())
            assert not told and not [url for url in asked[1:] if not url.startswith("data:")]
            assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
            assert page.locator("pre").first.inner_text().startswith(command)  # as it is copied
            assert page.evaluate(CUT_OFF) == 0
            backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
            page.screenshot(path=SCREENSHOTS / f"report-{name}.png", full_page=True)
            page.evaluate(TWO_MORE_METHODS)
            assert page.evaluate(CUT_OFF) == 0
        browser.close()
    assert len(backgrounds) == 2


def test_the_pair_that_is_most_alike() -> None:
    pictures = [one.load() for one in concept(4)]
    judge = judge_for("embedded")
    found = most_alike(judge, [pictures[0].rotate(90), pictures[2]], judge.images(pictures))
    assert (found.row, found.training) == (1, 2) and found.similarity == pytest.approx(1, abs=1e-4)


def test_plots_have_a_line_a_seed_and_their_mean() -> None:
    curves = [[(1.0, 1.0), (2.0, 3.0)], [(1.0, 3.0), (2.0, 5.0), (3.0, 9.0)]]
    assert mean_of(curves) == [(1.0, 2.0), (2.0, 4.0)]
    text = svg(Plot("name", "title", "x", "y", [Line("LoRA", 0, curves), Line("Bi-LoRA", 1, curves[:1])]))
    assert text.startswith("<svg") and "currentColor" in text and "<metadata>" not in text
    assert len(re.findall(rf"stroke: {COLOURS[0]}", text)) >= 3  # two seeds, the mean; marks and the legend's own
    few, many = (
        svg(Plot("name", "title", "x", "y", [Line(str(number), number, curves) for number in range(count)]))
        for count in (3, 4)
    )
    heights = [float(re.search(r'height="([\d.]+)pt"', one)[1]) for one in (few, many)]
    assert heights[1] > heights[0]  # the names are below


def test_the_documented_commands_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[1]
    monkeypatch.chdir(root)
    texts = [(root / name).read_text() for name in ("README.md", "docs/report.md", "Makefile")]
    lines = re.findall(r"python -m bilora_diffusion\.report (--.*)", "\n".join(texts).replace("\\\n", " "))
    assert len(lines) == 3
    for line in lines:
        arguments, rest = parse_report(shlex.split(line.replace("$(ARGS)", "")))
        runs = plan(rest, check_methods(arguments.methods), check_seeds(None, arguments.seeds), Path("out"), None)
        assert len(runs) == 6 and {run.method for run in runs} == {"lora", "bilora"}


# --- Mistakes ---


@pytest.fixture
def refused(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., str]]:
    monkeypatch.setattr("bilora_diffusion.report.making.run_all", lambda *_: pytest.fail("a training was begun"))

    def run(*more: str, **flags: object) -> str:
        assert main([*words(pictures, **flags), "--output_dir", str(tmp_path / "out"), *more]) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ") and message.count("\n") == 1, message
        return message

    yield run


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--methods", "lora", "bi-lora"], "--methods: unknown method 'bi-lora': did you mean bilora?"),
        (["--methods", "lora", "lora"], "--methods names lora twice"),
        (["--seeds", "0"], "--seeds is 0: give 1 to 20"),
        (["--seeds", "many"], "--seeds: invalid int value"),
        (["--hold_out", "8"], "--hold_out is 8, of 8 pictures: at least one must be left"),
        (["--hold_out", "-1"], "--hold_out is -1"),
        (["--draws", "0"], "--draws is 0: give 1 or more"),
        (["--pictures", "0"], "--pictures is 0: give 1 or more"),
        (["--steps", "200"], "steps is 200"),
        (["--prompts", "x" * 5000], "prompt has 5000 characters"),
        (["--clip", "nowhere"], "--clip nowhere: not a CLIP"),
        (["--ranks", "3"], "unknown flag --ranks: did you mean --rank?"),
        (["--", "--ranks", "3"], "unknown flag --ranks: did you mean --rank?"),
        (["--instance_data_dir", "nowhere"], "--instance_data_dir nowhere is not there"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: cannot be read"),
    ],
)
def test_mistakes_get_one_line(more: list[str], told: str, refused: Callable[..., str]) -> None:
    assert told in refused(*more)


def test_matplotlib_is_asked_for_at_once(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "need matplotlib: pip install 'bilora-diffusion[plots]'" in refused()
