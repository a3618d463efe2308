"""LoRA training for SDXL with a sharpness-aware auxiliary adapter (Bi-LoRA)."""

__version__ = "0.1.0"
