"""The card beside a LoRA: a head the hub reads, and text that is true and gives nothing away."""

import re
from dataclasses import replace

import pytest
import yaml

from bilora_diffusion.errors import UserError
from bilora_diffusion.lora_files.facts import LoraFacts
from bilora_diffusion.lora_files.model_card import CardImage, model_card, write_model_card

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
FACTS = LoraFacts(
    name="dog",
    base=SDXL,
    base_hub_id=SDXL,
    method="bilora",
    rank=4,
    alpha=8,
    settings={"rho": 0.05, "auxiliary_rank": 16},
    steps=500,
    learning_rate=1e-4,
    text_encoder_lr=5e-6,
    batch_size=1,
    accumulation=4,
    num_images=5,
    resolution=1024,
    trained_parts=("unet", "text_encoder", "text_encoder_2"),
    instance_prompt='a "sks" dog: it\'s {here}',
    finished_at=1_760_000_060.5,
    versions={"torch": "2.15.0"},
)


def head(card: str) -> dict:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("\n---\n")[0])


def test_the_head_is_that_of_diffusers_cards(tmp_path):
    path = write_model_card(tmp_path, FACTS, [CardImage("previews/a.png", "a sks dog: on a beach")])
    assert path == tmp_path / "README.md"
    assert head(path.read_text(encoding="utf-8")) == {
        "base_model": SDXL,
        "library_name": "diffusers",
        "license": "openrail++",
        "instance_prompt": FACTS.instance_prompt,
        "tags": [
            *("text-to-image", "diffusers-training", "diffusers", "lora", "template:sd-lora"),
            *("stable-diffusion-xl", "stable-diffusion-xl-diffusers", "bilora"),
        ],
        "widget": [{"text": "a sks dog: on a beach", "output": {"url": "previews/a.png"}}],
    }


def test_a_local_base_gives_no_hub_id_and_no_licence():
    card = model_card(replace(FACTS, base="my-sdxl", base_hub_id=None))
    assert not {"base_model", "license"} & set(head(card))
    assert "`my-sdxl`" in card
    assert "licence follows that of the base" in card


def test_the_text_says_what_was_trained_and_how():
    card = model_card(FACTS)
    for words in (
        "on the UNet, text encoder 1 and text encoder 2.",
        "Method: Bi-LoRA",
        "| rank / alpha | 4 / 8 |",
        "| rho (size of the perturbation) | 0.05 |",
        "| rank of the second adapter | 16 |",
        "| optimiser steps | 500 |",
        "| learning rate | 0.0001, text encoders 5e-06 |",
        "| pictures | 5 |",
        "2025-10-09T08:54:20Z",
    ):
        assert words in card
    assert "None" not in card
    assert "<Gallery />" not in card


def test_a_plain_lora_speaks_of_no_perturbation():
    facts = replace(FACTS, method="lora", settings={}, rho_relative=None, trained_parts=("unet",))
    card = model_card(facts)
    assert "Method: plain LoRA." in card
    assert "on the UNet." in card
    assert not re.search("bilora|perturb|second adapter", card, re.IGNORECASE)


def test_the_python_example_is_python():
    (example,) = re.findall(r"```python\n(.*?)```", model_card(FACTS, hub_id="someone/dog"), re.DOTALL)
    compile(example, "README.md", "exec")
    assert "load_lora_weights('someone/dog', weight_name='pytorch_lora_weights.safetensors')" in example
    assert repr(FACTS.instance_prompt) in example


def test_without_a_kohya_file_none_is_promised():
    assert "pytorch_lora_weights_kohya" in model_card(FACTS)
    card = model_card(FACTS, kohya_file=False)
    assert "pytorch_lora_weights_kohya" not in card
    assert "no file for ComfyUI or A1111" in card


def test_nothing_of_this_machine_is_in_it(tmp_path):
    write_model_card(tmp_path / ".", FACTS, [CardImage("a.png", "")])
    assert str(tmp_path) not in (tmp_path / "README.md").read_text()


def test_a_card_replaces_an_older_one_or_says_why_not(tmp_path):
    (tmp_path / "README.md").write_text("old")
    write_model_card(tmp_path, FACTS)
    assert (tmp_path / "README.md").read_text() != "old"
    with pytest.raises(UserError, match=r"README\.md was not written"):
        write_model_card(tmp_path / "nowhere", FACTS)
