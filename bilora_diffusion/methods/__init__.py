"""The training methods, one file each, behind `methods.interface.Method`."""

from bilora_diffusion.methods.ascent import Ascent
from bilora_diffusion.methods.bilora import BiLoRA
from bilora_diffusion.methods.building import build, build_ascent
from bilora_diffusion.methods.interface import Method, MicroBatch
from bilora_diffusion.methods.lora import LoRA
from bilora_diffusion.methods.radius import SINGULAR_SHARE, Radius, radius

__all__ = [
    "SINGULAR_SHARE",
    "Ascent",
    "BiLoRA",
    "LoRA",
    "Method",
    "MicroBatch",
    "Radius",
    "build",
    "build_ascent",
    "radius",
]
