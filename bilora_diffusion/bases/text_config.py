"""The configuration of a small CLIP text encoder that behaves as SDXL's do."""

from transformers import CLIPTextConfig

__all__ = ["small_text_config"]


def small_text_config(tokens: int, width: int, activation: str, max_tokens: int = 77) -> CLIPTextConfig:
    """Three layers of four heads.

    Arguments:
        tokens: size of the vocabulary; the end token has the largest id.
        width: of the hidden states and of the projection.
        activation: SDXL's text encoder 1 has "quick_gelu", its second "gelu".
    """
    # SDXL reads the last hidden state but one, so the last layer of text encoder 1 never gets a gradient:
    # three layers leave two that do. The ids of begin, end and padding are SDXL's own odd ones;
    # eos_token_id = 2 makes transformers pool at the largest id, which is the end token's here too.
    return CLIPTextConfig(
        vocab_size=tokens,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=max_tokens,
        hidden_act=activation,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )
