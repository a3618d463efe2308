"""Captions as draws show them: dropped, shuffled, embedded when they come; whole runs with them."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny_run import Builder, all_equal, write_pictures
from whole_run import in_one_and_in_two, lora, quicken, refusal, train, words

from bilora_diffusion.config import TrainingConfig
from bilora_diffusion.data.captions import CaptionRule, check_shuffling
from bilora_diffusion.data.dreambooth import DreamBoothDataset
from bilora_diffusion.data.pictures import Picture
from bilora_diffusion.errors import UserError
from bilora_diffusion.prompts import EmbeddedPrompts, TokenizedPrompts

TAGS = "1girl, solo, red hair, smile"


def of_captions(*captions: str) -> list[Picture]:
    return [
        Picture(f"{number}.png", Path(f"{number}.png"), caption, (16, 16)) for number, caption in enumerate(captions)
    ]


# --- The rule ---


def test_tags_change_places_and_the_first_ones_stay() -> None:
    rule = CaptionRule(shuffle=True, keep_tokens=1)
    seen = Counter(rule(TAGS, 0, draw) for draw in range(600))
    assert len(seen) == 6  # 3!
    assert all(
        prompt.startswith("1girl, ") and sorted(prompt.split(", ")) == sorted(TAGS.split(", ")) for prompt in seen
    )
    assert min(seen.values()) > 60  # each order about 100 times
    assert len({CaptionRule(shuffle=True)(TAGS, 0, draw) for draw in range(600)}) == 24
    assert CaptionRule(shuffle=True, keep_tokens=3)(TAGS, 0, 5) == TAGS
    assert CaptionRule(shuffle=True, keep_tokens=9)(TAGS, 0, 5) == TAGS


def test_an_order_depends_on_the_seed_and_the_draw_alone() -> None:
    rule = CaptionRule(shuffle=True)
    orders = [rule(TAGS, 0, draw) for draw in range(20)]
    assert orders == [rule(TAGS, 0, draw) for draw in reversed(range(20))][::-1]
    assert orders != [rule(TAGS, 1, draw) for draw in range(20)]


@pytest.mark.parametrize(
    ("caption", "tags"),
    [(" a ,b,c", {"a", "b", "c"}), ("a,, b,", {"a", "b"}), ("a\n, b c", {"a", "b c"})],
)
def test_tags_are_trimmed_and_empty_ones_left_out(caption: str, tags: set[str]) -> None:
    for draw in range(10):
        assert set(CaptionRule(shuffle=True)(caption, 0, draw).split(", ")) == tags


@pytest.mark.parametrize("caption", ["a photo of sks dog", "one ,", "", " , "])
def test_what_has_no_tags_is_left_as_it_is(caption: str) -> None:
    assert {CaptionRule(shuffle=True)(caption, 0, draw) for draw in range(20)} == {caption}


def test_dropout_comes_first_and_is_the_same_with_and_without_shuffling() -> None:
    plain, shuffled = CaptionRule(0.3), CaptionRule(0.3, shuffle=True)
    for draw in range(100):
        assert (plain(TAGS, 0, draw) == "") == (shuffled(TAGS, 0, draw) == "")
    assert 15 < sum(shuffled(TAGS, 0, draw) == "" for draw in range(100)) < 45


def test_the_data_set_shuffles_instance_captions_only() -> None:
    dataset = DreamBoothDataset(
        of_captions(TAGS, "a dog"),
        class_pictures=of_captions("x, y, z"),
        resolution=16,
        seed=0,
        captions=CaptionRule(0.1, shuffle=True),
    )
    rows = [dataset.describe(draw) for draw in range(200)]
    assert {prior.prompt for _, prior in rows} == {"x, y, z"}
    prompts = {instance.prompt for instance, _ in rows}
    assert {"", "a dog"} < prompts and len(prompts) > 20
    assert dataset.prompts() == ["a dog", "x, y, z", ""]  # all that are known beforehand


def test_nothing_to_shuffle_is_refused() -> None:
    check_shuffling(CaptionRule(), of_captions("a dog"))
    check_shuffling(CaptionRule(shuffle=True), of_captions("a dog", "a, b"))
    with pytest.raises(
        UserError, match=r"--shuffle_caption: no caption has two tags .* 0\.png, 'a dog': write"
    ) as caught:
        check_shuffling(CaptionRule(shuffle=True), of_captions("a dog", "a cat"))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="after the first 2 that --keep_tokens holds"):
        check_shuffling(CaptionRule(shuffle=True, keep_tokens=2), of_captions("a, b, c"))


# --- Prompts that were not known beforehand ---


def test_a_prompt_that_comes_late_is_embedded_as_one_that_was_known(tiny) -> None:
    tokenizers = (tiny.tokenizer, tiny.tokenizer_2)
    encoders = [tiny.text_encoder, tiny.text_encoder_2]
    sizes = torch.zeros(2, 6)
    known = EmbeddedPrompts(["a, b", "b, a"], tokenizers, encoders).conditioning(["b, a", "a, b"], sizes)
    late = EmbeddedPrompts(["a, b"], tokenizers, encoders, all_known=False).conditioning(["b, a", "a, b"], sizes)
    for name in ("prompt_embeds", "pooled_prompt_embeds"):
        assert torch.equal(getattr(known, name), getattr(late, name))
        assert not getattr(late, name).requires_grad
    with pytest.raises(KeyError):
        EmbeddedPrompts(["a, b"], tokenizers, encoders).conditioning(["b, a"], sizes[:1])
    ids = TokenizedPrompts([], tokenizers).conditioning(["b, a", "a, b"], sizes).token_ids
    assert torch.equal(
        ids, TokenizedPrompts(["a, b", "b, a"], tokenizers).conditioning(["b, a", "a, b"], sizes).token_ids
    )


# --- Whole runs ---


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tagged")
    write_pictures(folder, [(64, 64), (96, 64), (64, 80)], "a sks picture, of, one, kind", seed=0)
    return folder


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quicken(monkeypatch)


def test_the_rows_of_a_run_carry_the_shuffled_captions(pictures: Path, build: Builder) -> None:
    run = build("lora", instance_data_dir=str(pictures), shuffle_caption=True, keep_tokens=1)
    (batch,) = run.batches(0)
    rows = [run.parts.dataset.describe(draw)[0].prompt for draw in range(2)]
    plain = build("lora", instance_data_dir=str(pictures)).batches(0)[0]
    assert rows[0] != rows[1]
    assert not torch.equal(batch.conditioning.prompt_embeds, plain.conditioning.prompt_embeds)
    assert torch.equal(batch.latents, plain.latents) and torch.equal(batch.noise, plain.noise)


@pytest.mark.parametrize("text_encoders", [False, True], ids=["frozen", "trained"])
def test_a_run_with_shuffled_captions_resumes_where_it_was(text_encoders: bool, pictures: Path, tmp_path: Path) -> None:
    flags = {
        "shuffle_caption": True,
        "keep_tokens": 1,
        "caption_dropout": 0.2,
        "train_text_encoder": text_encoders,
        "lora_layers": "to_k",
        "loss_gap_steps": 2,
    }
    whole, _ = in_one_and_in_two(pictures, tmp_path, **flags)
    plain = train(pictures, tmp_path / "plain", **flags | {"shuffle_caption": False, "keep_tokens": 0})
    assert not all_equal(plain, lora(whole))
    assert "captions' tags | shuffled, the first 1 kept" in (whole / "README.md").read_text()


def test_a_run_with_nothing_to_shuffle_is_refused(pictures: Path, tmp_path: Path, capsys) -> None:
    line = refusal(words(pictures, tmp_path / "run", shuffle_caption=True, keep_tokens=3), capsys)
    assert "--shuffle_caption: no caption has two tags" in line


def test_keep_tokens_alone_is_warned_of() -> None:
    config = TrainingConfig(pretrained_model_name_or_path="x", instance_data_dir="y", keep_tokens=2)
    assert config.warnings() == ["--keep_tokens 2 has no effect without --shuffle_caption"]
