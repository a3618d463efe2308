"""Embedded captions on disk: found again by all they follow from, whole or not there, the same as fresh ones."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import all_equal, write_both
from whole_run import lora, quicken, train

from bilora_diffusion import assembly, prompts
from bilora_diffusion.data.embedding_files import EmbeddingFiles
from bilora_diffusion.errors import UserError
from bilora_diffusion.prompts import EmbeddedPrompts

CAPTIONS = ["a red car", "a blue car"]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    (tmp_path / "material").mkdir()
    return write_both(tmp_path / "material")[0]


@pytest.fixture
def made(tiny, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which captions were embedded so far."""
    embedded: list[str] = []
    embed = prompts._embed
    monkeypatch.setattr(prompts, "_embed", lambda prompt, *rest: (embedded.append(prompt), embed(prompt, *rest))[1])
    return embedded


def given(tiny, folder: Path | None, captions: list[str] = CAPTIONS, encoders: Any = None) -> EmbeddedPrompts:
    tokenizers = tiny.tokenizer, tiny.tokenizer_2
    encoders = encoders or (tiny.text_encoder, tiny.text_encoder_2)
    kept = None if folder is None else EmbeddingFiles(folder, tokenizers, encoders)
    return EmbeddedPrompts(captions, tokenizers, encoders, kept=kept)


def embeds(one: EmbeddedPrompts) -> torch.Tensor:
    return one.conditioning(CAPTIONS, torch.zeros(2, 6)).prompt_embeds


def test_the_next_run_finds_them_bit_for_bit(tiny, tmp_path: Path, made: list[str]) -> None:
    fresh = given(tiny, None)
    first = given(tiny, tmp_path)
    assert made == CAPTIONS * 2
    again = given(tiny, tmp_path, [*CAPTIONS, "a dog"])
    assert made == [*CAPTIONS * 2, "a dog"]
    assert (first.embeddings.made, again.embeddings.found, again.embeddings.made) == (2, 2, 1)
    assert torch.equal(embeds(fresh), embeds(first)) and torch.equal(embeds(fresh), embeds(again))
    pooled = [one.conditioning(CAPTIONS, torch.zeros(2, 6)).pooled_prompt_embeds for one in (fresh, again)]
    assert torch.equal(*pooled)


def test_other_weights_precision_or_tokens_find_nothing(tiny, tmp_path: Path, made: list[str]) -> None:
    given(tiny, tmp_path)
    first, second = copy.deepcopy((tiny.text_encoder, tiny.text_encoder_2))
    with torch.no_grad():
        next(second.parameters()).view(-1)[0] += 1e-6
    given(tiny, tmp_path, encoders=(first, second))
    given(tiny, tmp_path, encoders=(copy.deepcopy(tiny.text_encoder).bfloat16(), tiny.text_encoder_2))
    assert len(made) == 6
    given(tiny, tmp_path, [CAPTIONS[0].upper()])  # the same tokens: SDXL's tokenizers do not know capitals
    assert len(made) == 6


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_a_damaged_file_is_told_of_and_made_anew(
    damage: bytes | None, tiny, tmp_path: Path, made: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    whole = embeds(given(tiny, tmp_path))
    (path, *_) = sorted(tmp_path.rglob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content) if damage is None else damage)
    assert torch.equal(embeds(given(tiny, tmp_path)), whole)
    assert len(made) == 3 and "is damaged" in caplog.text and path.name in caplog.text
    assert path.stat().st_size == len(content)


def test_what_vanishes_while_it_is_used_is_told(tiny, tmp_path: Path) -> None:
    one = given(tiny, tmp_path)
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()
    with pytest.raises(UserError, match=r"--resume_from_checkpoint latest.*--cache_dir_latents"):
        embeds(one)


def test_a_folder_that_cannot_be_made(tiny, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--cache_dir_latents .*file/cache cannot be made"):
        given(tiny, tmp_path / "file" / "cache")


def test_a_run_with_another_seed_embeds_nothing(
    pictures: Path,
    tmp_path: Path,
    made: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    quicken(monkeypatch)
    caplog.set_level("INFO", logger=assembly.logger.name)
    flags = {"center_crop": True, "lora_layers": "to_q", "max_train_steps": 1}
    plain = train(pictures, tmp_path / "plain", **flags)
    flags["cache_dir_latents"] = tmp_path / "cache"
    assert all_equal(plain, train(pictures, tmp_path / "first", **flags))
    count = len(made)
    assert all_equal(plain, train(pictures, tmp_path / "second", **flags))
    train(pictures, tmp_path / "third", **{**flags, "seed": 7})
    assert len(made) == count > 0
    assert "captions: 0 found" in caplog.text and f"captions: {count // 2} found" in caplog.text
    assert not all_equal(plain, lora(tmp_path / "third"))
