"""The quality benchmark's stages for real SDXL, end to end on small bases with small scorers of the real classes."""

import json
import math
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import scorers
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_run import write_pictures
from torch.nn.functional import normalize
from transformers import CLIPModel, CLIPProcessor, ViTImageProcessor, ViTModel
from whole_run import interrupted_after, quickened

from benchmarks.quality.__main__ import main
from benchmarks.quality.comparing import compare_methods
from benchmarks.quality.concepts import LIVE_PROMPTS, OBJECT_PROMPTS, PAPER_NAMES, dreambooth_concepts, paper_concept
from benchmarks.quality.scorers import Captioner, Dino, find_model, open_clip
from benchmarks.quality.scoring import agreement, among_themselves, likeness
from benchmarks.quality.setting import Options
from benchmarks.quality.stages import CONFIGS, STAGES, parser_of, read_options
from benchmarks.quality.tables import Score, cells, table
from bilora_diffusion.cli import main as train
from bilora_diffusion.config import FLAGS
from bilora_diffusion.embedded import CONCEPT_FOLDER
from bilora_diffusion.errors import UserError
from bilora_diffusion.paired import T_95, half_width

WRITERS = (scorers.write_clip, scorers.write_dino, scorers.write_blip, scorers.write_blip_2)
QUICK = ["--max_train_steps", "2", "--loss_gap_steps", "0", "--report_to", "none", "--checkpointing_steps", "1"]
QUICK += ["--mixed_precision", "no", "--gradient_accumulation_steps", "1", "--rank", "2", "--steps", "2"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def quick_runs() -> Iterator[None]:
    """The written files are loaded again in tests of their own."""
    with quickened():
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("scorers")
    with torch.random.fork_rng(devices=[]):
        return {write.__name__.removeprefix("write_"): write(folder / write.__name__) for write in WRITERS}


class Finished:
    """A run of the trainer in this process; what `run_all` sees of it."""

    def __init__(self, folder: Path, words: Sequence[str]) -> None:
        self.code = train(words)

    def poll(self) -> int:
        return self.code

    wait = poll


def never(folder: Path, words: Sequence[str]) -> Finished:
    raise AssertionError(f"{folder} is trained again")


def carry_out(words: Sequence[str], start: Callable = Finished) -> tuple[dict, str]:
    """What is in the two files."""
    path = compare_methods(Options(**read_options([str(word) for word in words])), start)
    told = json.loads((path.parent / "results.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    return told, path.read_text()


# --- The formulas, against plain numpy ---


def rows(count: int, seed: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).normal(size=(count, 5))
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def test_scores_are_the_mean_cosines_of_the_definitions() -> None:
    drawn, real, texts = rows(4, 0), rows(3, 1), rows(4, 2)
    pairs = [one @ other for one in drawn for other in real]
    found = likeness(torch.from_numpy(drawn), torch.from_numpy(real))
    assert found.mean().item() == pytest.approx(np.mean(pairs)) and found.shape == (4,)
    assert found[1].item() == pytest.approx(np.mean([drawn[1] @ other for other in real]))
    matched = [one @ other for one, other in zip(drawn, texts, strict=True)]
    assert agreement(torch.from_numpy(drawn), torch.from_numpy(texts)).tolist() == pytest.approx(matched)
    different = [real[i] @ real[j] for i in range(3) for j in range(3) if i != j]
    assert among_themselves(torch.from_numpy(real)) == pytest.approx(np.mean(different))
    assert among_themselves(torch.from_numpy(real[:1])) is None


def test_intervals_are_over_subjects_and_paired() -> None:
    """The runs of a subject count as one, and what the subject does to both methods cancels."""
    lora = {"a": [0.1, 0.3], "b": [0.6], "c": [0.9, 0.9]}
    ours = {"a": [0.2, 0.3], "b": [0.66], "c": [1.0, 0.9]}
    found = cells({"lora": lora, "bilora": ours})
    means = np.array([0.2, 0.6, 0.9])
    apart = np.array([0.05, 0.06, 0.05])
    assert found["lora"].mean == pytest.approx(means.mean()) and found["lora"].difference is None
    assert found["lora"].error == pytest.approx(means.std(ddof=1) / math.sqrt(3))
    half = 4.303 * apart.std(ddof=1) / math.sqrt(3)
    assert found["bilora"].difference.mean == pytest.approx(apart.mean())
    assert found["bilora"].difference.interval == pytest.approx((apart.mean() - half, apart.mean() + half))
    (head, _, real, own, other) = table([Score("x", "X", "", 1, 3)], {"x": found}, {"x": 0.7774})
    assert head == "| method | X | X: difference to LoRA |" and real == "| real pictures | 0.777 |  |"
    assert own == "| LoRA | 0.567 (s.e. 0.203) |  |"
    assert other == "| Bi-LoRA | 0.620 (s.e. 0.203) | +0.053 (+0.039 to +0.068) |"
    alone = cells({"lora": {"a": [0.1]}, "bilora": {"a": [0.3]}})
    assert table([Score("x", "X", "", 100, 1)], {"x": alone}, {})[-1] == "| Bi-LoRA | 30.0 | +20.0 |"


def test_thirty_subjects_have_an_interval() -> None:
    stats = pytest.importorskip("scipy.stats")
    assert pytest.approx([stats.t.ppf(0.975, df + 1) for df in range(len(T_95))], abs=6e-4) == T_95
    values = list(np.random.default_rng(0).normal(size=40))
    exact = stats.t.ppf(0.975, 39) * np.std(values, ddof=1) / math.sqrt(40)
    assert exact < half_width(values) < 1.02 * exact


# --- What is trained and drawn ---


def subject_folder(folder: Path, names: Sequence[str]) -> Path:
    for seed, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        write_pictures(folder / name, [(64, 64), (72, 64)], None, seed)
    return folder


def test_subjects_are_read_as_dreambooths(tmp_path: Path) -> None:
    subject_folder(tmp_path, ["dog6", "duck_toy", "vase"])
    lines = "Classes\n\nsubject_name,class\ndog6,dog\nduck_toy,toy\nvase,vase\nwolf_plushie,stuffed animal\n\nPrompts\n"
    (tmp_path / "prompts_and_classes.txt").write_text(lines + "'a {0} {1} on the beach'.format(unique_token, class)\n")
    dog, duck, vase = dreambooth_concepts(tmp_path, [], ["vase=tall vase, live"], "sks")
    assert dog.words == ("--instance_data_dir", str(tmp_path / "dog6"), "--instance_prompt", "a sks dog")
    assert len(dog.prompts) == len(duck.prompts) == len(set(dog.prompts)) == len(set(duck.prompts)) == 25
    drawn = {concept.name: {one.drawn for one in concept.prompts} for concept in (dog, duck, vase)}
    assert (
        "a sks dog wearing a santa hat" in drawn["dog6"] and "a sks toy floating on top of water" in drawn["duck_toy"]
    )
    assert "a sks tall vase in a chef outfit" in drawn["vase"]
    assert len({*LIVE_PROMPTS} & {*OBJECT_PROMPTS}) == 15
    assert {one.judged for one in dog.prompts} == {one.replace("sks ", "") for one in drawn["dog6"]}
    (only,) = dreambooth_concepts(tmp_path, ["vase"], [], "zwx", 2)
    assert [one.drawn for one in only.prompts] == ["a zwx vase in the jungle", "a zwx vase in the snow"]


def test_the_papers_prompts() -> None:
    prompts = [one.drawn for one in paper_concept().prompts]
    assert len(prompts) == len(PAPER_NAMES) == 6
    assert prompts[0] == "a ToK icon of a Fluffy Rabbit, in the style of ToK"


# --- Whole stages ---


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> list:
    """The command: the paper's recipe, but for the base, the pictures and what makes it quick."""
    words = ["paper", "--pretrained_model_name_or_path", "embedded", "--instance_data_dir", CONCEPT_FOLDER]
    words += ["--output_dir", tmp_path_factory.mktemp("paper") / "out", "--seeds", "3", "5", "--resolution", "64"]
    # Far from the recipe's, so that two steps set the methods apart.
    words += ["--learning_rate", "0.01", "--auxiliary_learning_rate", "0.05", "--ascent", "adamw", "--rho", "20"]
    words += ["--prompt", "a fluent icon of a {}, in the style of TOK", "--names", "lion", "sun", "--pictures", "2"]
    return [*words, "--clip", models["clip"], "--captioner", models["blip_2"], *QUICK]


@pytest.fixture(scope="module")
def told(paper: list) -> tuple[dict, str]:
    return carry_out(paper)


def test_the_papers_stage(paper: list, told: tuple[dict, str], models: dict[str, Path]) -> None:
    values, page = told
    output = Path(paper[paper.index("--output_dir") + 1])
    assert list(values["runs"]) == [f"icons/{method}-seed{seed}" for seed in (3, 5) for method in ("lora", "bilora")]
    run = values["runs"]["icons/bilora-seed5"]
    assert (run["config"]["lora_alpha"], run["config"]["rho"], run["config"]["seed"]) == (8, 20, 5)
    assert len(run["trained_on"]) == 23 and run["config"]["dataset_name"] is None
    # The scores once more, by CLIP's own forward pass.
    pictures = sorted((output / "icons" / "bilora-seed5" / "benchmark").glob("*.png"))
    assert [one.name for one in pictures] == ["00-000.png", "00-001.png", "01-000.png", "01-001.png"]
    prompts = [f"a fluent icon of a {name}, in the style of TOK" for name in ("lion", "lion", "sun", "sun")]
    image, prompt = clip_embeddings(models["clip"], pictures, prompts)
    _, caption = clip_embeddings(models["clip"], pictures, run["captions"])
    assert run["scores"]["image_text"] == pytest.approx((image * prompt).sum(1).tolist(), abs=1e-5)
    assert run["scores"]["text_text"] == pytest.approx((caption * prompt).sum(1).tolist(), abs=1e-5)
    captions = [text for one in values["runs"].values() for text in one["captions"]]
    assert len({tuple(one["scores"]["image_text"]) for one in values["runs"].values()}) == 4
    assert len(set(captions)) > 1 and np.std(run["scores"]["image_text"]) > 1e-4
    # The table's numbers.
    by_run = {name: np.mean(one["scores"]["image_text"]) for name, one in values["runs"].items()}
    own = [by_run[f"icons/bilora-seed{seed}"] for seed in (3, 5)]
    apart = [by_run[f"icons/bilora-seed{seed}"] - by_run[f"icons/lora-seed{seed}"] for seed in (3, 5)]
    compared = values["compared"]["image_text"]["bilora"]
    assert compared["mean"] == pytest.approx(np.mean(own)) and compared["clusters"] == pytest.approx(own)
    assert compared["difference"]["mean"] == pytest.approx(np.mean(apart))
    assert f"| Bi-LoRA | {100 * np.mean(own):.2f} (s.e. " in page and "write_clip (a folder)" in page
    assert values["models"]["--captioner"]["model_type"] == "blip-2" and values["device"] == "cpu"
    assert (
        values["command"].startswith("python -m benchmarks.quality paper --pretrained") and values["versions"]["torch"]
    )


def clip_embeddings(folder: Path, pictures: Sequence[Path], texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    loaded = [Image.open(path).convert("RGB") for path in pictures]
    inputs = processor(text=list(texts), images=loaded, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        found = model(**inputs)
    return found.image_embeds.numpy(), found.text_embeds.numpy()


def test_what_is_there_is_not_made_again(paper: list, told: tuple[dict, str]) -> None:
    """No training; of the pictures the one that is gone and the one that is damaged, which come out as they were."""
    folder = Path(paper[paper.index("--output_dir") + 1]) / "icons" / "lora-seed3" / "benchmark"
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("*.png")}
    captions = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    (folder / "00-001.png").unlink()
    (folder / "01-000.png").write_bytes(b"no picture")
    again = carry_out(paper, never)
    assert again[0] == told[0] and again[1] == told[1]
    after = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("*.png")}
    assert {name for name in after if after[name][1] != before[name][1]} == {"00-001.png", "01-000.png"}
    assert all(after[name][0] == before[name][0] for name in before)
    later = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    assert {name for name in later if later[name] != captions[name]} == {"00-001.json", "01-000.json"}
    changed = [word if word != "2" or paper[number - 1] != "--steps" else "1" for number, word in enumerate(paper)]
    other, _ = carry_out(changed, never)
    assert other["picture_settings"]["steps"] == 1
    assert other["runs"]["icons/lora-seed3"]["scores"] != told[0]["runs"]["icons/lora-seed3"]["scores"]
    (folder / "00-000.png").write_bytes((folder / "00-000.png").read_bytes()[:-300])
    with pytest.raises(UserError, match=r"00-000\.png cannot be read .*: delete it, and it is drawn again"):
        carry_out(changed, never)
    (folder / "00-000.png").unlink()


def test_another_captioner_does_not_take_the_old_captions(paper: list, told: tuple, models: dict[str, Path]) -> None:
    words = [models["blip"] if word == models["blip_2"] else word for word in paper]
    values, _ = carry_out(words, never)
    assert values["models"]["--captioner"]["model_type"] == "blip"
    captions = values["runs"]["icons/lora-seed3"]["captions"]
    pictures = sorted((Path(paper[paper.index("--output_dir") + 1]) / "icons/lora-seed3/benchmark").glob("*.png"))
    captioner = Captioner(find_model("--captioner", str(models["blip"])), CPU)
    assert captioner.captions([Image.open(path).convert("RGB") for path in pictures]) == captions


def test_dreambench(tmp_path: Path, models: dict[str, Path]) -> None:
    subjects = subject_folder(tmp_path / "subjects", ["dog", "teapot"])
    words = ["dreambench", "--subjects_dir", subjects, "--classes", "dog=dog", "teapot=teapot", "--prompts", "2"]
    words += ["--pictures", "1", "--seeds", "1", "--pretrained_model_name_or_path", "embedded", "--resolution", "64"]
    words += ["--clip", models["clip"], "--dino", models["dino"], "--output_dir", tmp_path / "out", *QUICK]
    with interrupted_after(1), pytest.raises(KeyboardInterrupt):
        carry_out(words)
    values, page = carry_out(words)  # goes on from there
    assert list(values["runs"]) == [
        f"{name}/{method}-seed1" for name in ("dog", "teapot") for method in ("lora", "bilora")
    ]
    run = values["runs"]["teapot/bilora-seed1"]
    assert run["config"]["instance_prompt"] == "a sks teapot" and run["config"]["train_text_encoder"]
    pictures = sorted((tmp_path / "out/teapot/bilora-seed1/benchmark").glob("*.png"))
    real = sorted((subjects / "teapot").glob("*.png"))
    ours, theirs = (dino_embeddings(models["dino"], some) for some in (pictures, real))
    assert np.mean(run["scores"]["dino"]) == pytest.approx(np.mean([a @ b for a in ours for b in theirs]), abs=1e-5)
    prompts = ["a teapot in the jungle", "a teapot in the snow"]
    images, texts = clip_embeddings(models["clip"], pictures, prompts)
    known, _ = clip_embeddings(models["clip"], real, prompts)
    assert run["scores"]["clip_t"] == pytest.approx([a @ b for a, b in zip(images, texts, strict=True)], abs=1e-5)
    assert np.mean(run["scores"]["clip_i"]) == pytest.approx(np.mean(images @ known.T), abs=1e-5)
    assert values["concepts"]["teapot"]["real"]["dino"] == pytest.approx(theirs[0] @ theirs[1], abs=1e-5)
    assert values["clusters"] == "subject" and len(values["compared"]["dino"]["lora"]["clusters"]) == 2
    assert re.search(r"\| real pictures \| -?\d\.\d{3} \|  \| -?\d\.\d{3} \|  \|  \|  \|", page), page
    assert carry_out(words, never)[0] == values


def dino_embeddings(folder: Path, pictures: Sequence[Path]) -> np.ndarray:
    model = ViTModel.from_pretrained(folder, add_pooling_layer=False).eval()
    pixels = ViTImageProcessor.from_pretrained(folder)([Image.open(path).convert("RGB") for path in pictures])
    with torch.no_grad():
        found = model(torch.stack([torch.as_tensor(one) for one in pixels.pixel_values])).last_hidden_state[:, 0]
    return normalize(found, dim=1).numpy()


# --- Mistakes ---


@pytest.fixture
def refused(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    monkeypatch.setattr("benchmarks.quality.comparing.run_all", lambda *_: pytest.fail("a training was begun"))

    def run(*words: object) -> str:
        assert main([str(word) for word in words]) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ") and message.count("\n") == 1, message
        return message

    return run


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--clip", "openai/clip-vit-base-patch32"], "--clip: openai/clip-vit-base-patch32 is no file or folder here"),
        (["--clip", "openai/clip-vit-base-patch32@abc"], "the hub cannot be asked for it (HF_HUB_OFFLINE is set)"),
        (["--clip", "no where"], "--clip: there is no file or folder no where"),
        (["--captioner", "{clip}"], "is a clip model: it must be a captioner (model_type blip or blip-2)"),
        (["--clip", "{dino}"], "is a vit model: it must be a CLIP"),
        (["--clip", "{empty}"], "is no model in transformers' layout"),
        (["--clip", "{bare}"], "has no weights (model*.safetensors or pytorch_model*.bin)"),
        (["--clip", "{cut}"], "model.safetensors is damaged or cut short"),
        (["--prompt", "a lion"], "--prompt is 'a lion': put {} once where the name belongs"),
        (["--pictures", "0"], "--pictures is 0: give 1 or more"),
        (["--seeds", "1", "1"], "--seeds names 1 twice"),
        (["--seeds", "many"], "--seeds: invalid int value"),
        (["--seeds", "-1"], "--seed is -1"),
        (["--seed", "4"], "--seed: give --seeds here"),
        (["--methods", "lora", "bi-lora"], "unknown method 'bi-lora': did you mean bilora?"),
        (["--steps", "200"], "steps is 200"),
        (["--ranks", "3"], "unknown flag --ranks: did you mean --rank?"),
        (["--instance_data_dir", "nowhere"], "--instance_data_dir nowhere is not there"),
    ],
)
def test_mistakes_get_one_line(
    more: list[str], told: str, refused: Callable[..., str], models: dict[str, Path], tmp_path: Path
) -> None:
    for name in ("empty", "bare", "cut"):
        (tmp_path / name).mkdir()
    for name in ("bare", "cut"):
        (tmp_path / name / "config.json").write_bytes((models["clip"] / "config.json").read_bytes())
    (tmp_path / "cut" / "model.safetensors").write_bytes((models["clip"] / "model.safetensors").read_bytes()[:-9])
    folders = models | {name: tmp_path / name for name in ("empty", "bare", "cut")}
    more = [str(folders.get(word[1:-1], word)) if word.startswith("{") else word for word in more]
    words = ["paper", "--pretrained_model_name_or_path", "embedded", "--instance_data_dir", CONCEPT_FOLDER]
    words += ["--clip", models["clip"], "--captioner", models["blip"], "--output_dir", tmp_path / "out"]
    assert told in refused(*words, *more)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--subjects_dir", "nowhere"], "--subjects_dir nowhere cannot be read: No such file"),
        (["--subjects_dir", "{subjects}/dog"], "has no folders"),
        (["--subjects", "dgo"], "has no folder 'dgo': did you mean dog?"),
        ([], "no class is known for dog: give --classes dog=WORD"),
        (["--classes", "dgo=dog"], "--classes dgo=dog: no subject dgo: did you mean dog?"),
        (["--classes", "classes.csv"], "--classes classes.csv cannot be read"),
        (["--classes", "dog=dog", "--dino", "facebook/dino-vits16"], "--dino: facebook/dino-vits16 is no file"),
        (["--classes", "dog=dog", "--prompts", "0"], "--prompts is 0"),
    ],
)
def test_mistakes_about_subjects(
    more: list[str], told: str, refused: Callable[..., str], models: dict[str, Path], tmp_path: Path
) -> None:
    subjects = subject_folder(tmp_path / "subjects", ["dog"])
    words = ["dreambench", "--subjects_dir", subjects, "--clip", models["clip"], "--dino", models["dino"]]
    words += ["--pretrained_model_name_or_path", "tiny-random", "--output_dir", tmp_path / "out"]
    assert told in refused(*words, *[word.replace("{subjects}", str(subjects)) for word in more])


def test_a_subjects_folder_is_asked_for(refused: Callable[..., str]) -> None:
    assert "--subjects_dir" in refused("dreambench")


def test_a_hub_id_and_its_revision(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    """From the hub's cache, as everything is once it was fetched: its layout, in which a branch names a commit."""
    commit = 40 * "a"
    cached = tmp_path / "models--some--clip"
    shutil.copytree(models["clip"], cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for text in ("some/clip", f"some/clip@{commit}", "some/clip@main"):
        model = find_model("--clip", text)
        assert (model.name, model.revision) == ("some/clip", commit)
        assert open_clip(model, CPU).name == "some/clip"
    with pytest.raises(UserError, match=r"^--clip: some/clip is no file or folder here, and the hub cannot be asked"):
        find_model("--clip", "some/clip@other")
    (cached / "snapshots" / commit / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"^--clip some/clip has no weights"):
        find_model("--clip", "some/clip")


def test_weights_in_torchs_own_format(models: dict[str, Path], tmp_path: Path) -> None:
    """As older models on the hub have them."""
    folder = shutil.copytree(models["dino"], tmp_path / "dino")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    picture = [Image.new("RGB", (40, 40), "red")]
    ours, theirs = (Dino(find_model("--dino", str(one)), CPU).images(picture) for one in (folder, models["dino"]))
    assert torch.equal(ours, theirs)


def test_weights_that_lack_some_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    for name, what, loaded in (("dino", "layernorm.weight", Dino), ("clip", "visual_projection.weight", open_clip)):
        folder = shutil.copytree(models[name], tmp_path / name)
        weights = load_file(folder / "model.safetensors")
        del weights[what]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=f"^--{name} .*lacks 1 weights such as {what}"):
            loaded(find_model(f"--{name}", str(folder)), CPU)


def test_the_documented_commands_are_understood() -> None:
    root = Path(__file__).parents[1]
    text = (root / "docs" / "benchmarks.md").read_text().replace("\\\n", " ")
    lines = re.findall(r"^python -m benchmarks\.quality (.*)$", text, re.MULTILINE)
    stages = [shlex.split(line) for line in lines]
    assert sorted(stage for stage, *_ in stages) == ["dreambench", "dreambench", "paper", "paper"]
    for stage, *words in stages:
        arguments, rest = parser_of(stage).parse_known_args(words)
        assert not rest and arguments.methods[0] == "lora"
        assert (root / CONFIGS[stage]).is_file()


@pytest.mark.parametrize("stage", STAGES)
def test_no_flag_hides_one_of_the_trainers(stage: str) -> None:
    own = {action.dest for action in parser_of(stage)._actions}
    assert own & set(FLAGS) == {"output_dir"}
