"""What a LoRA file says of itself, ours or anyone's, from its header alone. Imports neither torch nor diffusers.

The header is written by strangers: nothing in it is trusted to be of the right form, and all of it is text to be
shown, never to be run.
"""

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from bilora_diffusion.errors import UserError
from bilora_diffusion.flags import show

__all__ = ["METHOD_TITLES", "LoraDescription", "describe"]

METHOD_TITLES = {
    "lora": "LoRA",
    "bilora": "Bi-LoRA",
    "bilora-fresh": "Bi-LoRA fresh",
    "bilora-echo": "Bi-LoRA echo",
    "dual-lora": "Dual-LoRA",
    "flat-lora": "Flat-LoRA",
    "eflat-lora": "EFlat-LoRA",
    "lora-sam": "LoRA-SAM",
    "looksam": "LookSAM",
    "s2-sam": "S2-SAM",
    "obar": "LoRA-oBAR",
    "nbar": "LoRA-nBAR",
}
"""As they stand above pictures; other methods under their own names."""
MOST_HEADER_BYTES = 32 * 2**20
MOST_TEXT = 300  # of one entry of the metadata, as shown

DOWN = re.compile(r"(\.lora_A(\.[^.]+)?|\.lora_down|[._]lora\.down|\.lora_linear_layer\.down)\.weight$")
OTHER_KINDS = {
    r"\.hada_w1": "LoHa",
    r"\.lokr_w": "LoKr",
    r"\.oft_": "OFT",
    r"\.boft_": "BOFT",
    r"\.ia3_": "IA3",
}
PART_PREFIXES = {
    "text_encoder_2": ("text_encoder_2.", "lora_te2_"),
    "text_encoder": ("text_encoder.", "lora_te1_", "lora_te_"),
    "unet": ("unet.", "lora_unet_"),
}


@dataclass(frozen=True)
class LoraDescription:
    """Attributes:
    name: of the file, as it was asked for.
    layout: `diffusers` or `Kohya`.
    layers: adapted layers by part: {"unet": 140, "text_encoder": 12}.
    ranks: the ranks that occur, sorted.
    size_bytes: of the file.
    facts: what the file's metadata say, by name: method, rank, alpha, rho, base, steps, instance_prompt,
        trained_at, versions, ...; texts as they stand there, only those that do.
    """

    name: str
    layout: str
    layers: Mapping[str, int]
    ranks: tuple[int, ...]
    size_bytes: int
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def method(self) -> str | None:
        """`lora`, `bilora`, or None for a file that does not say it."""
        return self.facts.get("method")

    @property
    def title(self) -> str:
        """What stands above its pictures: its method if the file says it, otherwise LoRA."""
        return METHOD_TITLES.get(self.method or "lora", self.method or "LoRA")

    def to_json(self) -> dict[str, Any]:
        """JSON values, for programs."""
        return {
            "file": self.name,
            "layout": self.layout,
            "layers": dict(self.layers),
            "ranks": list(self.ranks),
            "size_bytes": self.size_bytes,
            "facts": dict(self.facts),
        }


def describe(path: Path, name: str) -> LoraDescription:
    """Reads the header of a LoRA file.

    Arguments:
        name: what the messages call it.

    Raises:
        UserError: damaged, no safetensors file, or no LoRA.
    """
    _check_header(path, name)
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            keys = list(file.keys())
            down = [key for key in keys if DOWN.search(key)]
            ranks = {file.get_slice(key).get_shape()[0] for key in down if file.get_slice(key).get_shape()}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{show(name)} is damaged or no safetensors file ({_one_line(str(error))})") from None
    if not down:
        raise UserError(f"{show(name)} is no LoRA: {_what_else(keys)}")
    kohya = any(key.startswith(("lora_unet_", "lora_te")) for key in keys)
    return LoraDescription(
        name=name,
        layout="Kohya" if kohya else "diffusers",
        layers=_layers(down),
        ranks=tuple(sorted(ranks)),
        size_bytes=path.stat().st_size,
        facts=_facts(metadata),
    )


def _check_header(path: Path, name: str) -> None:
    """The header's length stands in the first eight bytes: looked at before anything is read into memory."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            first = file.read(1)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(f"{show(name)} cannot be read: {error.strerror or error}") from None
    if first != b"{" or length > size - 8:
        raise UserError(f"{show(name)} is no safetensors file, or one cut short")
    if length > MOST_HEADER_BYTES:
        raise UserError(f"{show(name)} has a header of {length // 2**20} MiB: no LoRA file needs that")


def _what_else(keys: list[str]) -> str:
    for pattern, kind in OTHER_KINDS.items():
        if any(re.search(pattern, key) for key in keys):
            return f"it is a {kind}, and only LoRA is read here"
    if not keys:
        return "it holds no tensors"
    return f"none of its {len(keys)} tensors is one of a LoRA's (the first is {show(keys[0])})"


def _layers(down: list[str]) -> dict[str, int]:
    counts = dict.fromkeys(reversed(PART_PREFIXES), 0)
    for key in down:
        part = next((part for part, starts in PART_PREFIXES.items() if key.startswith(starts)), "unet")
        counts[part] += 1
    return {part: count for part, count in counts.items() if count}


# Our own entry first, then what other trainers write: sd-scripts' ss_*, the model sites' modelspec.*.
SOURCES: dict[str, tuple[str, ...]] = {
    "method": ("bilora_method",),
    "rank": ("bilora_rank", "ss_network_dim"),
    "alpha": ("bilora_alpha", "ss_network_alpha"),
    "base": ("bilora_base", "ss_sd_model_name", "ss_base_model_version", "modelspec.architecture"),
    "steps": ("bilora_steps", "ss_steps", "ss_max_train_steps"),
    "instance_prompt": ("bilora_instance_prompt", "modelspec.trigger_phrase"),
    "captions": ("bilora_captions",),
    "resolution": ("bilora_resolution", "ss_resolution", "modelspec.resolution"),
    "prediction_type": ("bilora_prediction_type", "modelspec.prediction_type"),
    "seed": ("bilora_seed", "ss_seed"),
    "trained_at": ("bilora_trained_at", "modelspec.date"),
    "title": ("ss_output_name", "modelspec.title"),
    "author": ("modelspec.author",),
    "licence": ("modelspec.license",),
}


OUR_PREFIX = "bilora_"
NOT_SHOWN = ("version", "versions", "trained_parts")  # told otherwise, or of no use to a person


def _facts(metadata: Mapping[str, str]) -> dict[str, str]:
    facts = {}
    for name, entries in SOURCES.items():
        value = next((metadata[entry] for entry in entries if metadata.get(entry) not in (None, "", "None")), None)
        if value is not None:
            facts[name] = _one_line(str(value))
    for entry in sorted(metadata):  # a method's own settings: rho, auxiliary_rank, ...
        name = entry.removeprefix(OUR_PREFIX)
        if name != entry and name not in (*SOURCES, *NOT_SHOWN):
            facts[name] = _one_line(metadata[entry])
    adapter = _json_object(metadata.get("lora_adapter_metadata"))
    for name, entry in (("rank", "r"), ("alpha", "lora_alpha")):
        values = {
            value for key, value in adapter.items() if key.endswith(f".{entry}") and isinstance(value, int | float)
        }
        if name not in facts and len(values) == 1:
            facts[name] = str(values.pop())
    versions = _json_object(metadata.get("bilora_versions"))
    if versions:
        facts["versions"] = _one_line(", ".join(f"{name} {version}" for name, version in sorted(versions.items())))
    elif metadata.get("modelspec.implementation_version"):
        facts["versions"] = _one_line(metadata["modelspec.implementation_version"])
    return facts


def _json_object(text: str | None) -> dict[str, Any]:
    with suppress(ValueError, RecursionError):
        value = json.loads(text or "")
        if isinstance(value, dict):
            return value
    return {}


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MOST_TEXT else line[: MOST_TEXT - 1] + "…"
