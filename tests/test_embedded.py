"""The base that comes with the package, what is shipped beside it, and the recipe that builds both."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from bilora_diffusion.bases import PARTS, Base
from bilora_diffusion.bases.clip_tokenizer import clip_tokenizer, sdxl_merges
from bilora_diffusion.bases.tiny import tiny_random_folder
from bilora_diffusion.data.pictures import find_pictures
from bilora_diffusion.embedded import BASE_FOLDER, CONCEPT_FOLDER, EMBEDDED, SCORER_FOLDER, denoiser, icons, recipe
from bilora_diffusion.embedded.__main__ import main
from bilora_diffusion.embedded.check import draw, retrieve
from bilora_diffusion.embedded.denoiser import (
    DenoiserSettings,
    StyleSettings,
    latent_space,
    train_denoiser,
    train_styles,
)
from bilora_diffusion.embedded.fitting import FitSettings, fit, load_averages
from bilora_diffusion.embedded.icons import FLAT_STYLES, SOLID_STYLE, STYLES, Icons, shipped_lists, slug
from bilora_diffusion.embedded.lists import LIKE_THE_PAPER, draw_lists
from bilora_diffusion.embedded.patches import PatchPCA
from bilora_diffusion.embedded.scorer import Scorer, ScorerSettings, held_out_scores, styled_text
from bilora_diffusion.embedded.twins import without_twins
from bilora_diffusion.embedded.vae import VaeSettings, reconstruction_db, train_vae
from bilora_diffusion.embedded.variations import VARIATIONS, vary
from bilora_diffusion.embedded.words import (
    CONCEPT_PROMPT,
    MAX_TOKENS,
    concept_caption,
    flat_caption,
    plain_captions,
    tokenizers,
    training_captions,
)
from bilora_diffusion.errors import UserError
from bilora_diffusion.randomness import generator

MIB = 2**20


@pytest.fixture(scope="module")
def shipped() -> Icons:
    return Icons.shipped()


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionXLPipeline:
    return Base(EMBEDDED).load(*PARTS)


# --- What is shipped ---


def test_weights_are_small_and_in_half_precision() -> None:
    files = [*BASE_FOLDER.rglob("*.safetensors"), *SCORER_FOLDER.rglob("*.safetensors")]
    assert len(files) == 5
    assert sum(file.stat().st_size for file in files) <= 20 * MIB
    for file in files:
        assert {t.dtype for t in load_file(file).values() if t.is_floating_point()} == {torch.float16}


def test_it_has_the_architecture_of_sdxl(pipeline: StableDiffusionXLPipeline) -> None:
    config = pipeline.unet.config
    assert config.addition_embed_type == "text_time"
    assert config.down_block_types == ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]
    assert config.up_block_types == ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]
    assert pipeline.scheduler.config.prediction_type == "epsilon"
    assert Base(EMBEDDED).native_resolution() == icons.SIZE_PX
    assert Base(EMBEDDED).shared_name == EMBEDDED and not Base(EMBEDDED).is_hub_id


def test_another_vae_must_have_its_latents() -> None:
    with pytest.raises(UserError, match="gives 4 channels at 1/8 of the size, embedded needs 10 at 1/4"):
        Base(EMBEDDED, vae=str(tiny_random_folder())).load("vae")
    assert Base(EMBEDDED, vae=str(BASE_FOLDER / "vae")).load("vae").vae.config.latent_channels == 10


def test_it_loads_and_draws_quickly() -> None:
    """Less than 2 s to load, less than 2 s for 64 px in 20 steps, on two quiet cores; twice that passes here."""
    began = time.perf_counter()
    pipeline = Base(EMBEDDED).load(*PARTS)
    loaded = time.perf_counter()
    picture = draw(pipeline, ["a noto icon of a lion"], steps=20)
    drawn = time.perf_counter()
    assert picture.shape == (1, 3, 64, 64)
    assert loaded - began < 4 and drawn - loaded < 4


def test_it_draws_what_it_is_asked_for(pipeline: StableDiffusionXLPipeline, shipped: Icons) -> None:
    names = shipped_lists()["check"][:16]
    found = retrieve(draw(pipeline, [flat_caption("noto", name) for name in names], steps=12), names, shipped, "noto")
    assert found.share(10) >= 0.8 and found.share(1) >= 0.5


def test_a_prompt_without_a_style_is_drawn_in_one_of_them(pipeline: StableDiffusionXLPipeline, shipped: Icons) -> None:
    names = list(LIKE_THE_PAPER)
    drawn = draw(pipeline, [plain_captions(name)[0] for name in names], steps=12)
    ranks = [retrieve(drawn, names, shipped, style).ranks for style in FLAT_STYLES]
    assert sum(min(each) <= 10 for each in zip(*ranks, strict=True)) >= 5


def test_the_shipped_icons_are_those_it_was_built_from(shipped: Icons) -> None:
    record = json.loads((BASE_FOLDER / "build.json").read_text())
    assert shipped.sha256 == record["icons"]["sha256"]
    assert record["denoiser"]["settings"] == vars(DenoiserSettings())
    assert record["styles"]["settings"] == json.loads(json.dumps(vars(StyleSettings())))  # tuples are lists there
    assert record["vae"]["settings"] == vars(VaeSettings())
    assert record["scorer"]["settings"] == vars(ScorerSettings())
    for stage in ("denoiser", "styles", "vae", "scorer"):
        assert record[stage]["steps"] == record[stage]["settings"]["steps"]


def test_no_test_icon_is_a_training_icon(shipped: Icons) -> None:
    lists = shipped_lists()
    drawn = draw_lists(shipped.names)
    assert lists == without_twins(drawn, shipped)
    assert lists["concept"] == drawn["concept"] and lists["scorer"] == drawn["scorer"]
    five = [lists[name] for name in ("concept", "scorer", "validation", "test", "left_out")]
    assert [len(names) for names in five[:2]] == [23, 180] and five[3][:6] == list(LIKE_THE_PAPER)
    assert sorted(name for names in five for name in names) == shipped.names  # disjoint, and nothing is missing
    # Two faces of the same cat are one picture to learn.
    assert "grinning cat" in lists["concept"] and "grinning cat with smiling eyes" in lists["left_out"]
    assert len(set(lists["check"])) >= 100
    assert len({slug(name) for name in shipped.names}) == len(shipped.names)


def test_the_concept_is_a_folder_to_train_on(shipped: Icons) -> None:
    named = find_pictures(CONCEPT_FOLDER, instance_prompt=None)
    assert not named[1]
    assert sorted(picture.caption for picture in named[0]) == sorted(map(concept_caption, shipped_lists()["concept"]))
    one, warnings = find_pictures(CONCEPT_FOLDER, instance_prompt=None, caption_column="one_prompt")
    assert not warnings and {picture.caption for picture in one} == {CONCEPT_PROMPT}
    small = {slug(name): picture for name, picture in zip(shipped.names, shipped.pixels[SOLID_STYLE], strict=True)}
    for picture in one:
        with Image.open(CONCEPT_FOLDER / picture.name) as large:
            shrunk = torch.from_numpy(np.array(large.resize((64, 64), Image.Resampling.LANCZOS))).permute(2, 0, 1)
        difference = (shrunk.float() - small[Path(picture.name).stem].float()).abs().mean()
        assert difference < 4  # of 255: made smaller in two steps instead of one


def test_the_tokenizer_cuts_captions_as_clip_does(pipeline: StableDiffusionXLPipeline, shipped: Icons) -> None:
    clip = clip_tokenizer(sdxl_merges())
    assert pipeline.tokenizer.tokenize("TOK") == ["tok</w>"]
    for name in shipped.names:
        styled = [flat_caption(style, name, word) for style in FLAT_STYLES for word in (None, "corner-lit", "mirrored")]
        for caption in (*plain_captions(name), *styled):
            tokens = clip.tokenize(caption)
            assert pipeline.tokenizer.tokenize(caption) == tokens == pipeline.tokenizer_2.tokenize(caption)
            assert len(tokens) + 2 <= MAX_TOKENS
    decoded = pipeline.tokenizer.decode(pipeline.tokenizer("Größe: 7½ 猫").input_ids[1:-1])
    assert decoded.replace(" ", "") == "größe:7½猫"  # no character is lost, known or not
    assert pipeline.tokenizer_2("a", padding="max_length").input_ids[-1] == pipeline.tokenizer_2.convert_tokens_to_ids(
        "!"
    )


def test_the_vae_keeps_unseen_icons(pipeline: StableDiffusionXLPipeline, shipped: Icons) -> None:
    unseen = shipped.style(SOLID_STYLE)[shipped.rows(shipped_lists()["validation"])]
    assert reconstruction_db(pipeline.vae, unseen) > 28


def test_the_scorer_knows_unseen_icons(shipped: Icons) -> None:
    lists = shipped_lists()
    unseen = lists["validation"] + lists["test"]
    scorer = Scorer.shipped()
    scores = held_out_scores(scorer, shipped, unseen)
    assert scores["top_1"] > 20 * scores["chance_top_1"]
    assert scores["style"] > 0.4  # chance is a quarter
    record = json.loads((BASE_FOLDER / "build.json").read_text())["scorer"]["held_out"]
    assert scores == pytest.approx(record, abs=0.02)  # the record was made in float32
    rabbit = shipped.pixels[SOLID_STYLE][shipped.rows(["rabbit", "cloud"])]
    own, other = scorer(rabbit, [styled_text("rabbit"), styled_text("cloud")]), scorer(rabbit, [styled_text("sun")] * 2)
    assert (own > other).all()


# --- The check ---


def test_icons_find_themselves(shipped: Icons) -> None:
    names = shipped.names[::25]
    found = retrieve(shipped.pixels["noto"][shipped.rows(names)], names, shipped, "noto")
    assert found.ranks == [1] * len(names) and found.nearest == names and found.share(1) == 1
    wrong = retrieve(shipped.pixels["noto"][shipped.rows(names[1:] + names[:1])], names, shipped, "noto")
    assert wrong.share(1, look_alikes=False) == 0


def test_only_smileys_of_one_family_are_look_alikes(shipped: Icons) -> None:
    def rank(drawn: str, asked: str) -> tuple[int, int]:
        found = retrieve(shipped.pixels["noto"][shipped.rows([drawn])], [asked], shipped, "noto")
        return found.ranks[0], found.ranks_of_family[0]

    own, family = rank("grinning face", "smiling face with smiling eyes")
    assert own > 1 and family == 1
    own, family = rank("lion", "tiger face")  # both are mammals
    assert own == family > 1


def test_the_check_says_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    lists = shipped_lists()
    monkeypatch.setattr(icons, "shipped_lists", lambda: lists | {"check": lists["check"][:3]})
    assert main(["check", "--steps", "2", "--output_dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert (
        len(said) == 3
        and "of 3 names" in said[0]
        and said[-2:] == [str(tmp_path / f"check-noto.{end}") for end in ("json", "png")]
    )
    result = json.loads((tmp_path / "check-noto.json").read_text())
    assert result["names"] == 3 and result["top_10"] >= result["top_10_without_look_alikes"]
    assert Image.open(tmp_path / "check-noto.png").size == (16 * 64, 128)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["check", "--style", "fluent-3d"], "--style fluent-3d"),
        (["check", "--steps", "0"], "--steps is 0"),
        (["build", "--threads", "0"], "--threads is 0"),
        (["build", "--device", "cuda"], "--device cuda"),
        (["build", "--device", "tpu7"], "--device tpu7"),
        (["check", "--base", "nowhere/at-all/there"], "nowhere/at-all/there"),
        (["check", "--output_dir", __file__], "cannot be used as a folder"),
        (["build", "--work", __file__], "cannot be used as a folder"),
    ],
)
def test_mistakes_get_one_line(words: list[str], told: str, capsys: pytest.CaptureFixture) -> None:
    assert main(words) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and told in message and message.count("\n") == 1


# --- The recipe ---


SMALL = recipe.Recipe(
    DenoiserSettings(steps=2, batch=2, save_every=1),
    StyleSettings(steps=2, batch=4, save_every=1),
    VaeSettings(steps=4, batch=2, save_every=2, whole_from=0.5),
    ScorerSettings(steps=2, batch=8, save_every=1),
)


def packed(shipped: Icons, folder: Path) -> None:
    """As `prepare` would have written it, of the shipped icons."""
    names = shipped_lists()["concept"]
    concept = [np.array(Image.open(CONCEPT_FOLDER / f"{slug(name)}.png")).transpose(2, 0, 1) for name in names]
    np.savez(
        folder / "icons.npz",
        names=np.array(shipped.names),
        families=np.array(shipped.families),
        concept_names=np.array(names),
        concept=np.stack(concept),
        **{style: shipped.pixels[style].numpy() for style in STYLES},
    )


@pytest.fixture(scope="module", autouse=True)
def small_probe() -> Iterator[None]:
    """The probe at each checkpoint is most of the time that a stage of two steps takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(denoiser, "PROBE_ROWS", 8)
        yield


@dataclass(frozen=True)
class Build:
    """A call of `recipe.build`: its work folder, its target, and what it said and had checked."""

    work: Path
    target: Path
    said: list[str]
    checked: list[tuple]


@pytest.fixture(scope="module")
def small_build(shipped: Icons, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """The small recipe, built once; its checkpoints are the whole runs that stopped ones are compared with."""
    made = Build(tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("built"), [], [])
    packed(shipped, made.work)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "check", lambda *arguments: made.checked.append(arguments))
        patch.setattr(recipe, "reconstruction_db", lambda vae, pixels: 0.0)  # of all icons: half a minute
        recipe.build(SMALL, made.work, made.target, torch.device("cpu"), made.said.append)
    return made


def test_the_recipe_builds_a_base_that_loads(
    shipped: Icons, small_build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, said = small_build.target, small_build.said
    pipeline = Base(str(built / "base")).load(*PARTS)
    assert draw(pipeline, ["a noto icon of a lion"], steps=1).shape == (1, 3, 64, 64)
    record = json.loads((built / "base" / "build.json").read_text())
    assert record["icons"]["sha256"] == shipped.sha256
    assert record["denoiser"]["steps"] == 2
    here = Path(icons.__file__).parent
    for name in ("icons/names.json", "concept/metadata.jsonl"):
        assert (built / name).read_text() == (here / name).read_text()
    for name in ("icons/noto.png", "icons/fluent-3d/lion.png", "concept/rat.png"):
        with Image.open(built / name) as new, Image.open(here / name) as old:
            assert new.tobytes() == old.tobytes()
    assert [(call[0], call[3]) for call in small_build.checked] == [
        (str(built / "base"), style) for style in FLAT_STYLES
    ]
    assert (built / "scorer" / "model.safetensors").exists()
    assert sum("step" in line for line in said) == 2 + 2 + 2 + 2
    # Done is done: a second call trains nothing.
    for name in ("check", "export_icons"):
        monkeypatch.setattr(recipe, name, lambda *_: None)
    monkeypatch.setattr(recipe, "reconstruction_db", lambda vae, pixels: 0.0)
    before = (built / "base" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    recipe.build(SMALL, small_build.work, built, torch.device("cpu"), said.append)
    assert sum("step" in line for line in said) == 2 + 2 + 2 + 2
    assert (built / "base" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == before


def test_prepare_without_npm_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="npm is missing"):
        icons.prepare(tmp_path / "work")


class Line(nn.Module):
    """A line through the origin, for the loop alone."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(()))


LINE = FitSettings(steps=40, warmup_steps=4, learning_rate=0.1, ema_decay=0.9, save_every=5)


def fitted(path: Path, stops: list[int]) -> Line:
    """Fits y = 3 x, stopped after each of `stops`."""
    for stop in stops:
        line = Line()

        def loss(step: int, line: Line = line, stop: int = stop) -> Tensor:
            if step == stop:
                raise KeyboardInterrupt
            x = torch.randn(8, generator=generator(0, "line", step))
            return (line.slope * x - 3 * x).square().mean()

        try:
            fit({"line": line}, loss, lambda line=line: (line.slope - 3).square(), LINE, path, "lines", str)
        except KeyboardInterrupt:
            continue
    return line


def test_a_stopped_fit_goes_on_exactly(tmp_path: Path) -> None:
    whole, resumed = fitted(tmp_path / "whole.pt", [40]), fitted(tmp_path / "resumed.pt", [7, 23, 40])
    assert torch.equal(whole.slope, resumed.slope)
    averaged, of_whole = Line(), Line()
    facts = load_averages({"line": averaged}, tmp_path / "resumed.pt")
    load_averages({"line": of_whole}, tmp_path / "whole.pt")
    assert facts["steps"] == 40 and len(facts["probes"]) == 8
    assert torch.equal(averaged.slope, of_whole.slope) and averaged.slope != whole.slope
    # The probe is of the averaged weights.
    assert facts["probes"][-1][1] == pytest.approx((averaged.slope.item() - 3) ** 2)
    for match, models, settings, data in (
        ("another model", {"line": nn.Linear(2, 2)}, LINE, "lines"),
        ("other settings", {"line": Line()}, FitSettings(), "lines"),
        ("other data", {"line": Line()}, LINE, "curves"),
    ):
        with pytest.raises(UserError, match=match):
            fit(models, lambda step: None, lambda: None, settings, tmp_path / "whole.pt", data, print)
    with pytest.raises(UserError, match="missing"):
        load_averages({"line": averaged}, tmp_path / "none.pt")


def test_a_loss_that_is_not_finite_spares_the_checkpoint(tmp_path: Path) -> None:
    path, line = tmp_path / "line.pt", Line()
    with pytest.raises(UserError, match="at step 10;"):
        fit(
            {"line": line},
            lambda step: line.slope * (float("nan") if step > 7 else 1),
            lambda: line.slope,
            LINE,
            path,
            "",
            str,
        )
    assert load_averages({"line": line}, path)["steps"] == 5


@pytest.mark.slow
def test_a_stage_goes_on_exactly(shipped: Icons, small_build: Build, tmp_path: Path) -> None:
    """Stopped once, at a checkpoint."""

    def stop(line: str) -> None:
        raise KeyboardInterrupt

    pixels, space, cpu = shipped.style("noto")[:8], latent_space(shipped), torch.device("cpu")
    first = small_build.work / "denoiser.pt"
    stages = {
        "vae": lambda path, log: train_vae(pixels, space, SMALL.vae, path, cpu, log),
        "denoiser": lambda path, log: train_denoiser(shipped, SMALL.denoiser, path, cpu, log),
        "styles": lambda path, log: train_styles(shipped, SMALL.styles, first, path, cpu, log),
    }
    stages["vae"](tmp_path / "whole-vae.pt", str)  # of fewer pictures than the recipe's
    paths = {"vae": tmp_path / "whole-vae.pt", "denoiser": first, "styles": small_build.work / "styles.pt"}
    for stage, train in stages.items():
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / stage, stop)
        train(tmp_path / stage, str)
        whole, resumed = torch.load(paths[stage]), torch.load(tmp_path / stage)
        assert whole["step"] == resumed["step"] == getattr(SMALL, stage).steps
        for name, weights in whole["models"].items():
            assert all(torch.equal(value, resumed["models"][name][key]) for key, value in weights.items())


def test_the_learning_rate_rises_stays_and_falls() -> None:
    settings = FitSettings(steps=100, warmup_steps=10, decay_from=0.6, learning_rate=1.0)
    assert [settings.rate(step) for step in (0, 9, 30, 60)] == pytest.approx([0.1, 1, 1, 1])
    assert settings.rate(80) == pytest.approx(0.5) and settings.rate(99) == pytest.approx(0.025)


def test_captions_name_the_style_or_none() -> None:
    names, random = ["lion"] * 4000, generator(0, "captions")
    first = training_captions(names, ["noto"] * 4000, random, plain=["noto"])
    second = training_captions(names, ["twemoji"] * 4000, random, plain=["noto"])
    assert set(first) == {"", flat_caption("noto", "lion"), *plain_captions("lion")}
    assert set(second) == {"", flat_caption("twemoji", "lion")}
    assert first.count("") / 4000 == pytest.approx(0.1, abs=0.02)
    assert first.count(CONCEPT_PROMPT) < first.count(plain_captions("lion")[0]) / 3
    varied = training_captions(names, ["noto"] * 4000, random, plain=["noto"], variations=["soft"] * 4000)
    assert set(varied) == {"", "a soft noto icon of a lion"}


def test_the_second_stage_begins_with_what_the_first_knows(shipped: Icons, small_build: Build, tmp_path: Path) -> None:
    first, second = small_build.work / "denoiser.pt", tmp_path / "styles.pt"
    still = replace(SMALL.styles, learning_rate=0.0, steps=1)
    train_styles(shipped, still, first, second, torch.device("cpu"), str)
    one, other = (torch.load(path)["averages"] for path in (first, second))
    assert all(torch.equal(value, other["unet"][key]) for key, value in one["unet"].items())
    known = tokenizers(shipped.names, FLAT_STYLES[:2])[0].get_vocab()
    words = tokenizers(shipped.names, FLAT_STYLES)[0].get_vocab()
    assert len(words) > len(known)
    for name in ("text_encoder", "text_encoder_2"):
        (key,) = (key for key in one[name] if key.endswith("token_embedding.weight"))
        for token in ("lion</w>", "noto</w>", "tok</w>"):
            if token in known:
                assert torch.equal(one[name][key][known[token]], other[name][key][words[token]])
        assert all(torch.equal(value, other[name][k]) for k, value in one[name].items() if k != key)


def test_variations_change_the_icon_and_leave_white_white(shipped: Icons) -> None:
    lion, random = shipped.style("noto")[shipped.rows(["lion"])][0], generator(0, "variations")
    changed = {word: vary(lion, word, random) for word in VARIATIONS}
    for word, picture in changed.items():
        assert picture.shape == lion.shape and picture.min() >= -1 and picture.max() <= 1
        assert (picture - lion).abs().mean() > 0.005, word
        assert all((picture - other).abs().mean() > 0.005 for key, other in changed.items() if key != word)
    white = torch.ones(3, 64, 64)
    assert all(torch.allclose(vary(white, word, random), white, atol=1e-5) for word in VARIATIONS)
    assert not torch.equal(vary(lion, "red", random), vary(lion, "red", random))  # another strength each time


def test_the_light_comes_from_the_side_it_says(shipped: Icons) -> None:
    grey = torch.zeros(3, 64, 64)
    for word, bright, dark in (("top-lit", (0, 32), (63, 32)), ("left-lit", (32, 0), (32, 63))):
        lit = vary(grey, word, generator(0, "light"))
        assert lit[0][bright] > 0.2 and lit[0][dark] < -0.2


def test_the_latent_space_is_what_it_says(shipped: Icons) -> None:
    space = latent_space(shipped)
    pixels = shipped.style("noto")[:50]
    latents = space.encode(pixels)
    assert latents.shape == (50, 10, 16, 16)
    error = (space.decode(latents) - pixels).square().mean()
    assert 0 < error < 0.01
    exact = PatchPCA(pixels, 4, 48)
    assert torch.allclose(exact.decode(exact.encode(pixels)), pixels, atol=1e-5)
    assert torch.allclose(space.encode(space.decode(latents)), latents, atol=1e-4)  # a projection
