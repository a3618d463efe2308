"""Drawing with LoRA files: the bits of a picture depend on what was asked for, never on what was drawn before."""

import json
import os
import re
import struct
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from lora_samples import ALL_PARTS, PROMPT, write_lora
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

from bilora_diffusion.bases import PARTS, Base
from bilora_diffusion.checkpoint import AUXILIARY_FILE
from bilora_diffusion.errors import UserError
from bilora_diffusion.generation import engine as engine_module
from bilora_diffusion.generation import files as files_module
from bilora_diffusion.generation.engine import Engine, Report
from bilora_diffusion.generation.files import LoraFiles
from bilora_diffusion.generation.loras import activate
from bilora_diffusion.generation.png import KEY, read_settings, save_picture
from bilora_diffusion.generation.settings import SCHEDULERS, LoraUse, PictureSettings
from bilora_diffusion.generation.turns import Cancelled, Turns
from bilora_diffusion.lora_files.diffusers_format import DIFFUSERS_FILE
from bilora_diffusion.lora_files.kohya import KOHYA_FILE
from bilora_diffusion.sampling import sample_pictures, use_sampling_scheduler

SETTINGS = PictureSettings(prompt=PROMPT, steps=3, seed=5)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(Base("embedded"))


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, tiny: StableDiffusionXLPipeline) -> Path:
    folder = tmp_path_factory.mktemp("outputs")
    pipeline = Base("embedded").load(*PARTS)
    write_lora(folder / "plain", pipeline, seed=1)
    write_lora(folder / "both", pipeline, method="bilora", parts=ALL_PARTS, rank=3, seed=2)
    other = Base("tiny-random").load(*PARTS)
    write_lora(folder / "other", other, base="tiny-random", parts=ALL_PARTS)
    return folder


def draw(engine: Engine, *loras: tuple[Path, float], settings: PictureSettings = SETTINGS, **more) -> bytes:
    drawn = engine.draw(settings, [(path, path.parent.name, weight) for path, weight in loras], **more)
    return b"".join(one.picture.tobytes() for one in drawn)


def apart(one: bytes, other: bytes) -> int:
    return int(np.abs(np.frombuffer(one, np.uint8).astype(int) - np.frombuffer(other, np.uint8)).max())


# --- The engine ---


def test_switching_loras_leaves_no_trace(engine: Engine, outputs: Path) -> None:
    plain, both = outputs / "plain" / DIFFUSERS_FILE, outputs / "both" / DIFFUSERS_FILE
    base, with_plain, with_both = draw(engine), draw(engine, (plain, 1)), draw(engine, (both, 1))
    assert apart(base, with_plain) > 10 and apart(base, with_both) > 10 and with_plain != with_both
    assert draw(engine) == base
    assert draw(engine, (plain, 1)) == with_plain
    draw(engine, (plain, 0.7), (both, -0.3))
    assert draw(engine, (both, 1)) == with_both
    assert draw(engine, (both, 0)) == base
    # The one without text encoder layers must not inherit the other's.
    assert draw(engine, (plain, 1)) == with_plain


def by_the_pipeline(path: Path) -> bytes:
    """What `draw` draws with a LoRA, by the pipeline's own loader."""
    pipeline = Base("embedded").load(*PARTS)
    pipeline.load_lora_weights(str(path))
    use_sampling_scheduler(pipeline)
    vae = pipeline.vae
    (picture,) = sample_pictures(
        pipeline, PROMPT, numbers=(0,), seed=5, resolution=64, steps=3, guidance_scale=2.0, load_vae=lambda: vae
    )
    return picture.tobytes()


def test_a_fresh_engine_and_the_pipelines_own_loader_draw_the_same(engine: Engine, outputs: Path) -> None:
    path = outputs / "both" / DIFFUSERS_FILE
    draw(engine, (outputs / "plain" / DIFFUSERS_FILE, 1))
    drawn = draw(engine, (path, 1))
    assert draw(Engine(Base("embedded")), (path, 1)) == drawn
    assert by_the_pipeline(path) == drawn


@pytest.mark.parametrize("run", ["plain", "both"])
def test_both_formats_draw_the_same(run: str, engine: Engine, outputs: Path) -> None:
    one, other = (draw(engine, (outputs / run / name, 1)) for name in (DIFFUSERS_FILE, KOHYA_FILE))
    assert one == other


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"targets": ("conv1", "to_q", "proj_in")}], ids=["dora", "conv"]
)
def test_other_kinds_of_layers(options: dict, engine: Engine, tmp_path: Path) -> None:
    base = draw(engine)
    path = write_lora(tmp_path / "run", Base("embedded").load(*PARTS), **options)
    drawn = draw(engine, (path, 1))
    # A convolution's sums may round by where its weights lie in memory.
    assert apart(by_the_pipeline(path), drawn) <= 1
    assert apart(drawn, base) > 10
    assert draw(engine) == base and draw(engine, (path, 1)) == drawn
    if (path.parent / KOHYA_FILE).exists():
        assert apart(draw(engine, (path.parent / KOHYA_FILE, 1)), drawn) <= 1


def test_the_spelling_of_older_files(engine: Engine, tmp_path: Path) -> None:
    """That of diffusers' first LoRA files; no alpha, so it is the rank."""
    path = write_lora(tmp_path / "run", Base("embedded").load(*PARTS), rank=2, alpha=2)
    old = {}
    for key, tensor in load_file(path).items():
        module, kind = re.fullmatch(r"(unet\..+)\.lora_([AB])\.weight", key).groups()
        block, _, name = module.removesuffix(".0").rpartition(".")
        old[f"{block}.processor.{name}_lora.{'down' if kind == 'A' else 'up'}.weight"] = tensor
    save_file(old, tmp_path / "old.safetensors")
    assert draw(engine, (tmp_path / "old.safetensors", 1)) == draw(engine, (path, 1))
    # Without the part's name the loader would pass over all of them.
    save_file({key.removeprefix("unet."): tensor for key, tensor in old.items()}, tmp_path / "partless.safetensors")
    assert "holds no layer" in refused(engine, tmp_path / "partless.safetensors")


def test_layers_that_the_loader_passes_over_are_told(
    engine: Engine, outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers has lost layers of files that mix spellings; a picture by a part of a file would be a lie."""
    base, pipeline = draw(engine), engine.load()
    whole = pipeline.load_lora_weights

    def lossy(path: str, **options: object) -> None:
        tensors = load_file(path)
        lost = next(iter(tensors)).rsplit(".", 2)[0]
        whole({key: one for key, one in tensors.items() if not key.startswith(f"{lost}.")}, **options)

    monkeypatch.setattr(pipeline, "load_lora_weights", lossy)
    text = refused(engine, copied(outputs / "plain" / DIFFUSERS_FILE, "lossy"))
    assert "holds 56 layers, of which the loader took 55" in text
    monkeypatch.undo()
    assert draw(engine) == base


def copied(path: Path, stem: str) -> Path:
    copy = path.with_name(f"{stem}.safetensors")
    copy.write_bytes(path.read_bytes())
    return copy


def test_weights_add_up(engine: Engine, outputs: Path, tmp_path: Path) -> None:
    plain = outputs / "plain" / DIFFUSERS_FILE
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(plain.read_bytes())
    whole = draw(engine, (plain, 1))
    assert apart(draw(engine, (plain, 0.25), (copy, 0.75)), whole) <= 2  # sums round in another order
    assert draw(engine, (plain, 0.25), (plain, 0.75)) == whole
    assert apart(draw(engine, (plain, 0.5)), whole) > 5


def test_the_weight_of_a_lora_scales_its_update(outputs: Path) -> None:
    pipeline = Base("embedded").load(*PARTS)
    pipeline.load_lora_weights(str(outputs / "plain" / DIFFUSERS_FILE), adapter_name="one")
    layer = pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    for weight in (1.0, 0.5, -2.0):
        activate({"unet": pipeline.unet}, {"one": weight})
        assert layer.scaling["one"] == weight * 4 / 2  # alpha / rank


def test_a_changed_file_is_read_again(engine: Engine, outputs: Path, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    path.write_bytes((outputs / "plain" / DIFFUSERS_FILE).read_bytes())
    first = draw(engine, (path, 1))
    path.write_bytes((outputs / "both" / DIFFUSERS_FILE).read_bytes())
    assert draw(engine, (path, 1)) == draw(engine, (outputs / "both" / DIFFUSERS_FILE, 1)) != first


def test_old_adapters_make_room(outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "MOST_ADAPTERS", 2)
    engine = Engine(Base("embedded"))
    base = draw(engine)
    content = (outputs / "plain" / DIFFUSERS_FILE).read_bytes()
    pictures = []
    for number in range(4):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(content)
        pictures.append(draw(engine, (path, 1)))
    assert len(set(pictures)) == 1
    layer = engine.load().unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    assert len(layer.lora_A) == 2 and len(engine.load().unet.peft_config) == 2
    assert draw(engine) == base


def test_each_picture_has_its_own_seed(engine: Engine) -> None:
    three = engine.draw(PictureSettings(prompt=PROMPT, steps=2, seed=7, pictures=3))
    assert [one.settings.seed for one in three] == [7, 8, 9]
    (again,) = engine.draw(three[2].settings)
    assert again.picture.tobytes() == three[2].picture.tobytes() != three[1].picture.tobytes()
    (last,) = engine.draw(PictureSettings(prompt=PROMPT, steps=1, seed=2**32 - 1))
    assert last.settings.seed == 2**32 - 1


def test_size_prompt_and_guidance_count(engine: Engine) -> None:
    (wide,) = engine.draw(PictureSettings(prompt=PROMPT, steps=1, width=96, height=64))
    assert wide.picture.size == (96, 64)
    base = draw(engine)
    for change in ({"prompt": "an icon of a sun"}, {"negative_prompt": "a sun"}, {"guidance_scale": 1.0}, {"seed": 6}):
        assert draw(engine, settings=PictureSettings(**({"prompt": PROMPT, "steps": 3, "seed": 5} | change))) != base


def test_every_scheduler_draws_the_icon(engine: Engine) -> None:
    """All of them solve one equation: in enough steps they come to much the same picture."""
    pictures = {}
    for name in SCHEDULERS:
        settings = PictureSettings(prompt=PROMPT, steps=12, seed=1, scheduler=name)
        pictures[name] = np.frombuffer(draw(engine, settings=settings), np.uint8).astype(float)
        assert draw(engine, settings=settings) == pictures[name].astype(np.uint8).tobytes(), name
    for name, picture in pictures.items():
        alike = np.corrcoef(picture, pictures["DPM++ 2M"])[0, 1]
        assert alike > 0.7, (name, alike)
    assert len({picture.tobytes() for picture in pictures.values()}) == len(pictures)


def test_a_scheduler_leaves_no_trace(engine: Engine) -> None:
    before = draw(engine)
    for name in SCHEDULERS:
        draw(engine, settings=PictureSettings(prompt=PROMPT, steps=2, scheduler=name))
        assert draw(engine) == before, name


def test_reports_and_previews_change_nothing(engine: Engine) -> None:
    reports: list[Report] = []
    settings = PictureSettings(prompt=PROMPT, steps=6, seed=5, pictures=2)
    assert draw(engine, settings=settings, report=reports.append, previews=True) == draw(engine, settings=settings)
    assert [(one.picture, one.step) for one in reports] == [(n, step) for n in range(2) for step in range(1, 7)]
    previews = [one.preview for one in reports if one.preview]
    assert previews and all(preview.size == (64, 64) for preview in previews)
    assert "step" not in vars(engine.load().scheduler)


def test_a_late_preview_looks_like_the_picture(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "PREVIEW_SHARE", float("inf"))
    reports: list[Report] = []
    (drawn,) = engine.draw(PictureSettings(prompt=PROMPT, steps=12, seed=1), report=reports.append, previews=True)
    pixels = [np.asarray(one.preview, float).ravel() for one in reports[:-1]]
    final = np.asarray(drawn.picture, float).ravel()
    alike = [np.corrcoef(one, final)[0, 1] for one in pixels]
    assert alike[-1] > 0.9 and alike[-1] > alike[0]


def test_cancel_works_within_a_step(engine: Engine) -> None:
    base, cancelled, blocks = draw(engine), threading.Event(), 0

    def cancel(*_: object) -> None:
        nonlocal blocks
        blocks += 1
        cancelled.set()

    handle = engine.load().unet.down_blocks[0].register_forward_hook(cancel)
    reports: list[Report] = []
    try:
        with pytest.raises(Cancelled):
            draw(engine, cancelled=cancelled, report=reports.append)
    finally:
        handle.remove()
    assert blocks == 1 and not reports
    assert draw(engine) == base
    assert not any(module._forward_pre_hooks for module in engine.load().unet.modules())


# --- Files that do not fit ---


def refused(engine: Engine, path: Path) -> str:
    with pytest.raises(UserError) as refusal:
        draw(engine, (path, 1))
    text = str(refusal.value)
    assert "\n" not in text and len(text) < 600
    return text


@pytest.mark.parametrize("name", [DIFFUSERS_FILE, KOHYA_FILE])
def test_a_lora_for_another_base_is_told_by_its_layers(name: str, engine: Engine, outputs: Path) -> None:
    base = draw(engine)
    text = refused(engine, outputs / "other" / name)
    assert "for another base" in text and "unet." in text and "more" in text
    assert draw(engine) == base


def test_wrong_shapes_are_told(engine: Engine, outputs: Path, tmp_path: Path) -> None:
    base = draw(engine)
    tensors = load_file(outputs / "plain" / DIFFUSERS_FILE)
    key = next(key for key in tensors if key.endswith("attn2.to_k.lora_A.weight"))
    tensors[key] = torch.zeros(2, 2048)
    save_file(tensors, tmp_path / "wide.safetensors")
    text = refused(engine, tmp_path / "wide.safetensors")
    module = key.removesuffix(".lora_A.weight")
    assert f"1 of its {len(tensors) // 2} layers do not fit" in text and f"{module} is" in text and "x 2048" in text
    del tensors[key]
    save_file(tensors, tmp_path / "half.safetensors")
    assert f"{module} lacks its A" in refused(engine, tmp_path / "half.safetensors")
    assert draw(engine) == base


def test_unknown_names_are_told(engine: Engine, tmp_path: Path) -> None:
    for number, keys in enumerate(
        (("lora_unet_nowhere_to_q.lora_down.weight", "lora_unet_nowhere_to_q.lora_up.weight"),
         ("unet.nowhere.to_q.lora_A.weight", "unet.nowhere.to_q.lora_B.weight"))
    ):  # fmt: skip
        path = tmp_path / f"{number}.safetensors"
        save_file({keys[0]: torch.zeros(2, 64), keys[1]: torch.zeros(64, 2)}, path)
        assert "LoRA" in refused(engine, path) or "base" in refused(engine, path)


# --- Which files may be opened ---


def test_names_lead_nowhere_else(outputs: Path, tmp_path: Path) -> None:
    folder, outside = tmp_path / "loras", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    content = (outputs / "plain" / DIFFUSERS_FILE).read_bytes()
    for path in (folder / "in.safetensors", outside / "secret.safetensors"):
        path.write_bytes(content)
    (folder / "file_link.safetensors").symlink_to(outside / "secret.safetensors")
    (folder / "folder_link").symlink_to(outside)
    (folder / "inner_link.safetensors").symlink_to(folder / "in.safetensors")
    (folder / "loop.safetensors").symlink_to(folder / "loop.safetensors")
    (folder / "pickle.safetensors").symlink_to(folder / "weights.bin")
    (folder / "weights.bin").write_bytes(content)
    files = LoraFiles({"loras": folder})
    assert files.path("loras/in.safetensors") == (folder / "in.safetensors").resolve()
    assert files.path("loras/inner_link.safetensors") == (folder / "in.safetensors").resolve()
    assert set(files.names()) == {"loras/in.safetensors", "loras/inner_link.safetensors"}
    for name in (
        "loras/../outside/secret.safetensors",
        "loras/file_link.safetensors",
        "loras/folder_link/secret.safetensors",
        "loras/loop.safetensors",
        "loras/pickle.safetensors",
        "loras/weights.bin",
        str(outside / "secret.safetensors"),
        "/etc/passwd",
        "outside/secret.safetensors",
        "..\\outside\\secret.safetensors",
        "loras/in.safetensors\0.png",
        "loras/in.ckpt",
        "loras/" + "a" * 5000 + ".safetensors",
        "loras//etc/passwd.safetensors",
        "loras",
        "",
        7,
        None,
        ["loras/in.safetensors"],
    ):
        with pytest.raises(UserError) as refusal:
            files.path(name)
        assert "\n" not in str(refusal.value)
    told = []
    for stem in ("secret", "absent"):  # what is there, outside, is not told
        with pytest.raises(UserError) as refusal:
            files.path(f"loras/../outside/{stem}.safetensors")
        told.append(str(refusal.value).replace(stem, ""))
    assert told[0] == told[1]


def test_what_is_no_lora_is_not_listed_and_is_told(outputs: Path, tmp_path: Path) -> None:
    (tmp_path / "random.safetensors").write_bytes(os.urandom(10 * 2**20))
    save_file({"model.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    save_file({"unet.a.hada_w1_a": torch.zeros(3)}, tmp_path / "loha.safetensors")
    (tmp_path / "empty.safetensors").touch()
    whole = (outputs / "plain" / DIFFUSERS_FILE).read_bytes()
    (tmp_path / "short.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "header.safetensors").write_bytes(struct.pack("<Q", 2**40) + b"{" + bytes(100))
    (tmp_path / "json.safetensors").write_bytes(struct.pack("<Q", 20) + b"{" + b"[" * 19 + bytes(100))
    (tmp_path / AUXILIARY_FILE).write_bytes(whole)
    (tmp_path / "good.safetensors").write_bytes(whole)
    files = LoraFiles({"here": tmp_path})
    assert files.names() == ["here/good.safetensors"]
    words = {
        "random": "no safetensors file",
        "model": "no LoRA: none of its 1 tensors",
        "loha": "it is a LoHa",
        "empty": "no safetensors file",
        "short": "damaged",
        "header": "no safetensors file",
        "json": "damaged",
    }
    for stem, word in words.items():
        with pytest.raises(UserError, match=word):
            files.describe(f"here/{stem}.safetensors")


def test_large_files_are_refused(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "MOST_FILE_BYTES", 1000)
    files = LoraFiles({"outputs": outputs})
    assert files.names() == []
    with pytest.raises(UserError, match="larger than"):
        files.path(f"outputs/plain/{DIFFUSERS_FILE}")


def test_uploads_keep_harmless_names(outputs: Path, tmp_path: Path) -> None:
    files = LoraFiles({"uploaded": tmp_path / "uploads"})
    source = outputs / "plain" / DIFFUSERS_FILE
    name = files.add("uploaded", source, "../../<b>my lora</b>.safetensors")
    assert name.startswith("uploaded/b_my_lora_b-") or name.startswith("uploaded/b-")
    assert files.names() == [name] and files.path(name).parent == (tmp_path / "uploads").resolve()
    assert files.add("uploaded", source, "../../<b>my lora</b>.safetensors") == name
    with pytest.raises(UserError, match="pickles"):
        files.add("uploaded", source, "lora.ckpt")


def test_a_file_says_what_it_is(outputs: Path) -> None:
    files = LoraFiles({"outputs": outputs})
    ours = files.describe(f"outputs/both/{DIFFUSERS_FILE}")
    assert ours.title == "Bi-LoRA" and ours.layout == "diffusers" and ours.ranks == (3,)
    assert ours.facts["rho"] == "1.5" and ours.facts["alpha"] == "4.0" and ours.facts["steps"] == "250"
    assert ours.facts["instance_prompt"] == PROMPT and "torch" in ours.facts["versions"]
    kohya = files.describe(f"outputs/both/{KOHYA_FILE}")
    assert kohya.layout == "Kohya" and kohya.layers == ours.layers and set(kohya.layers) == set(ALL_PARTS)
    assert json.loads(json.dumps(kohya.to_json()))["facts"]["method"] == "bilora"


def test_a_strangers_file_says_what_it_can(outputs: Path, tmp_path: Path) -> None:
    tensors = load_file(outputs / "plain" / KOHYA_FILE)
    metadata = {
        "ss_network_dim": "32",
        "ss_network_alpha": "16",
        "ss_sd_model_name": "sdxl.safetensors",
        "modelspec.trigger_phrase": "line one\nline two " + "x" * 1000,
        "lora_adapter_metadata": "[[[",
        "bilora_versions": "not json",
    }
    save_file(tensors, tmp_path / "theirs.safetensors", metadata)
    description = LoraFiles({"here": tmp_path}).describe("here/theirs.safetensors")
    assert description.method is None and description.title == "LoRA"
    assert description.facts["rank"] == "32" and description.facts["base"] == "sdxl.safetensors"
    prompt = description.facts["instance_prompt"]
    assert prompt.startswith("line one line two") and len(prompt) <= 300


# --- Settings and PNGs ---


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": 10**30}, "steps is"),
        ({"steps": "many"}, "steps is 'many'"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"steps": True}, "steps is True"),
        ({"steps": None}, "steps is null"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_scale": 1e9}, "guidance_scale is"),
        ({"prompt": "half \ud800"}, "prompt holds half of a character"),
        ({"negative_prompt": "\udfff"}, "negative_prompt holds half of a character"),
        ({"width": 65}, "multiple of 8"),
        ({"height": 100_000}, "height is 100000"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is"),
        ({"pictures": 1000}, "pictures is 1000"),
        ({"scheduler": "__import__"}, "scheduler is"),
        ({"prompt": 5}, "prompt is 5"),
        ({"prompt": "x" * 5000}, "prompt has 5000 characters"),
        ({"loras": "all"}, "loras is 'all'"),
        ({"loras": [{"weight": 1}]}, "names no file"),
        ({"loras": [{"file": "a.safetensors", "weight": 100}]}, "weight is 100"),
        ({"loras": [{"file": "a.safetensors", "strength": 1}]}, "unknown name 'strength'"),
        ({"loras": ["a"] * 50}, "at most 6"),
        ({"stepz": 3}, "did you mean steps?"),
        ("text", "no mapping"),
        (None, "no mapping"),
    ],
)
def test_settings_that_cannot_be(values: object, word: str) -> None:
    with pytest.raises(UserError) as refusal:
        PictureSettings.from_json(values)
    assert word in str(refusal.value) and "\n" not in str(refusal.value)


def test_settings_survive_json() -> None:
    settings = PictureSettings(prompt='a "lion" & <b>', steps=7, width=96, loras=(LoraUse(file="a.b", weight=0.5),))
    assert PictureSettings.from_json(json.loads(json.dumps(settings.to_json()))) == settings
    assert PictureSettings.from_json({"steps": 20.0, "loras": ["x"]}).steps == 20


def test_a_picture_holds_its_settings(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    values = PictureSettings(prompt="ein Löwe 獅子 <script>", seed=3).to_json()
    save_picture(path, Image.new("RGB", (8, 8), "red"), values)
    assert PictureSettings.from_json(read_settings(path)) == PictureSettings.from_json(values)
    with Image.open(path) as picture:
        assert picture.getpixel((0, 0)) == (255, 0, 0)


def test_pictures_without_settings_are_told(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    picture = Image.new("RGB", (8, 8))
    picture.save(path)
    with pytest.raises(UserError, match="holds no settings"):
        read_settings(path)
    for text in ("{", "[]", "[" * 100_000):
        entries = PngImagePlugin.PngInfo()
        entries.add_itxt(KEY, text)
        picture.save(path, pnginfo=entries)
        with pytest.raises(UserError, match="damaged"):
            read_settings(path)
    path.write_bytes(os.urandom(1000))
    with pytest.raises(UserError, match="not a PNG"):
        read_settings(path)
    picture.save(path, format="JPEG")
    with pytest.raises(UserError, match="not a PNG"):
        read_settings(path)


# --- Turns ---


def test_first_come_first_served_and_told_so() -> None:
    turns, told, order = Turns(), {"b": [], "c": []}, []
    hold = threading.Event()

    def take(name: str) -> None:
        with turns.turn(threading.Event(), told[name].append):
            order.append(name)

    with turns.turn(threading.Event()):
        threads = []
        for name in "bc":
            threads.append(threading.Thread(target=take, args=(name,)))
            threads[-1].start()
            until = time.monotonic() + 10
            while not told[name] and time.monotonic() < until:
                time.sleep(0.01)
        assert order == []
    hold.set()
    for thread in threads:
        thread.join(10)
    assert order == ["b", "c"] and told["b"] == [1] and told["c"][0] == 2


def test_who_does_not_want_to_wait_leaves_the_line() -> None:
    turns, cancelled = Turns(most_waiting=1), threading.Event()
    with turns.turn(threading.Event()):
        threading.Timer(0.1, cancelled.set).start()
        with pytest.raises(Cancelled), turns.turn(cancelled):
            pass
        waiting = threading.Thread(target=lambda: turns.turn(threading.Event()).__enter__(), daemon=True)
        waiting.start()
        time.sleep(0.1)
        with pytest.raises(UserError, match="waiting already"), turns.turn(threading.Event()):
            pass
    waiting.join(10)
    assert not waiting.is_alive()


def test_folders_have_names_of_their_own(tmp_path: Path) -> None:
    first, second = tmp_path / "a" / "loras", tmp_path / "b" / "loras"
    reserved = tmp_path / "uploads"
    files = LoraFiles.below([first, second, first / "inner", tmp_path / "uploaded"], {"uploaded": reserved})
    assert files.folders == {
        "loras": first, "loras-2": second, "uploaded-2": tmp_path / "uploaded", "uploaded": reserved
    }  # fmt: skip
    assert files.name_of(second / "run" / "x.safetensors") == "loras-2/run/x.safetensors"
    assert files.name_of(tmp_path / "else.safetensors") is None


def test_what_is_left_out_begins_with_a_whole_word(engine: Engine) -> None:
    assert engine.left_out(PROMPT) == ""
    words = [f"{first}lion{last}" for first in "bdfgkm" for last in "bdfgkm"]  # CLIP reads each digit as a word
    end = engine.left_out(" ".join(words)).replace(" ", "")
    assert end and any(end == "".join(words[first:]) for first in range(1, len(words)))
