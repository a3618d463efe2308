"""Small scorers of the real classes with random weights, in transformers' layout, for tests of what they score."""

from pathlib import Path

import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from bilora_diffusion.bases.clip_tokenizer import clip_tokenizer

SIDE = 32
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL |= {"initializer_range": 0.5, "initializer_factor": 20.0}  # at the usual ones all pictures look alike to them
VISION = SMALL | {"image_size": SIDE, "patch_size": 16}
TOKENS, BEGIN, END = 514, 512, 513  # of `clip_tokenizer`: a token a byte, and the two


def write_clip(folder: Path) -> Path:
    torch.manual_seed(1)
    text = SMALL | {"vocab_size": TOKENS, "bos_token_id": BEGIN, "eos_token_id": END, "max_position_embeddings": 77}
    CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8)).save_pretrained(folder)
    pixels = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    CLIPProcessor(pixels, clip_tokenizer()).save_pretrained(folder)
    return folder


def write_dino(folder: Path) -> Path:
    """Without a pooler, as the published ones."""
    torch.manual_seed(2)
    ViTModel(ViTConfig(**VISION), add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


def write_blip(folder: Path) -> Path:
    torch.manual_seed(3)
    text = SMALL | {
        "vocab_size": TOKENS,
        "encoder_hidden_size": SMALL["hidden_size"],
        "bos_token_id": BEGIN,
        "eos_token_id": END,
        "sep_token_id": END,
        "pad_token_id": 0,
        "max_position_embeddings": 64,
    }
    BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=VISION)).save_pretrained(folder)
    BlipProcessor(_blip_pixels(), clip_tokenizer()).save_pretrained(folder)
    return folder


def write_blip_2(folder: Path) -> Path:
    torch.manual_seed(4)
    processor = Blip2Processor(_blip_pixels(), clip_tokenizer())  # adds a token for the picture
    text = {
        "model_type": "opt",
        "vocab_size": TOKENS + 1,
        "init_std": 0.5,
        "hidden_size": 16,
        "word_embed_proj_dim": 16,
        "ffn_dim": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": BEGIN,
        "eos_token_id": END,
        "pad_token_id": END,
    }
    query = SMALL | {"vocab_size": 8, "encoder_hidden_size": 16}
    config = Blip2Config(
        text_config=text, vision_config=VISION, qformer_config=query, num_query_tokens=2, image_token_index=TOKENS
    )
    Blip2ForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _blip_pixels() -> BlipImageProcessor:
    return BlipImageProcessor(size={"height": SIDE, "width": SIDE})
