"""What to draw, as a person, a file or a program says it; every value is checked. Imports no torch, no diffusers."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from bilora_diffusion.embedded import EMBEDDED
from bilora_diffusion.errors import UserError
from bilora_diffusion.flags import Flag, Range, checked, flag, flag_of, nearest, show

__all__ = [
    "DEFAULT_SCHEDULER",
    "FIELDS",
    "MOST_LORAS",
    "MOST_PICTURES",
    "MOST_PROMPT_CHARACTERS",
    "SCHEDULERS",
    "LoraUse",
    "PictureSettings",
    "loras_from_json",
    "read_fields",
    "usual_guidance",
]

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "DDIM": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
}
"""Name -> diffusers' class and what is changed in the base's own noise schedule."""
DEFAULT_SCHEDULER = "DPM++ 2M"
"""The one of the trainer's previews."""

MOST_PICTURES = 16
MOST_LORAS = 6
MOST_PROMPT_CHARACTERS = 4000

Fields = TypeVar("Fields")


@dataclass(frozen=True, kw_only=True)
class LoraUse:
    """One LoRA file at a strength. Making one checks it; `UserError` says which value is wrong."""

    file: str = flag(dataclasses.MISSING, "the file, by the name that the list of LoRAs gives", group="LoRA")
    weight: float = flag(1.0, "strength; 1 is as trained, 0 is off", group="LoRA", within=Range(-4, 4))

    def __post_init__(self) -> None:
        _check_fields(self, "loras: ")


@dataclass(frozen=True, kw_only=True)
class PictureSettings:
    """Pictures of one prompt. Making one checks it; `UserError` says which value is wrong.

    Picture number i starts from the noise of seed + i, so that each can be drawn again alone.
    """

    prompt: str = flag("", "what to draw", group="Picture", may_be_empty=True)
    negative_prompt: str = flag("", "what to keep away from", group="Picture", may_be_empty=True)
    steps: int = flag(20, "denoising steps", group="Picture", within=Range(1, 150))
    guidance_scale: float | None = flag(
        None,
        "how much the prompt counts; 1 is no guidance; unset: 5, and 2 on the embedded base",
        group="Picture",
        within=Range(0, 30),
    )
    width: int | None = flag(
        None, "in pixels; unset: what the base was made for", group="Picture", within=Range(64, 2048, multiple_of=8)
    )
    height: int | None = flag(
        None, "in pixels; unset: what the base was made for", group="Picture", within=Range(64, 2048, multiple_of=8)
    )
    scheduler: str = flag(DEFAULT_SCHEDULER, "how the noise is taken out", group="Picture", choices=tuple(SCHEDULERS))
    seed: int = flag(0, "of the noise the first picture starts from", group="Picture", within=Range(0, 2**32 - 1))
    pictures: int = flag(1, "how many, with seeds one apart", group="Picture", within=Range(1, MOST_PICTURES))
    base: str | None = flag(None, "the base; unset: the first one the program was given", group="Picture")
    loras: tuple[LoraUse, ...] = ()

    def __post_init__(self) -> None:
        _check_fields(self)
        for name in ("prompt", "negative_prompt"):
            if not _is_text(getattr(self, name)):
                raise UserError(f"{name} holds half of a character, which is no text")
            if len(getattr(self, name)) > MOST_PROMPT_CHARACTERS:
                raise UserError(f"{name} has {len(getattr(self, name))} characters: at most {MOST_PROMPT_CHARACTERS}")
        if len(self.loras) > MOST_LORAS:
            raise UserError(f"{len(self.loras)} LoRAs are asked for at once: at most {MOST_LORAS}")

    @classmethod
    def from_json(cls, values: Any) -> "PictureSettings":
        """From JSON values. Unknown names, wrong types and numbers out of range are refused.

        Raises:
            UserError: in one line, with the name of the value.
        """
        values = read_fields(cls, values, "the settings")
        if "loras" in values:
            values["loras"] = loras_from_json(values["loras"])
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """As `from_json` takes them."""
        return dataclasses.asdict(self) | {"loras": [dataclasses.asdict(lora) for lora in self.loras]}


def usual_guidance(base: str | None) -> float:
    """What an unset `guidance_scale` means: the pipeline's own 5, and 2 on the embedded base, whose 3D shading more
    guidance flattens."""
    return 2.0 if base == EMBEDDED else 5.0


FIELDS: dict[str, Flag] = {
    field.name: flag_of(field)
    for cls in (PictureSettings, LoraUse)
    for field in dataclasses.fields(cls)
    if field.metadata
}
"""The meaning, default and range of each value by its name, for forms and documentation."""


def _is_text(text: str) -> bool:
    """Whether it can be written at all: JSON can hold one half of a pair of surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def loras_from_json(values: Any) -> tuple[LoraUse, ...]:
    """A list of {"file": ..., "weight": ...}; a bare text is a file at weight 1."""
    if not isinstance(values, list | tuple):
        raise UserError(f'loras is {show(values)}: it must be a list such as [{{"file": "...", "weight": 1}}]')
    uses = []
    for value in values:
        value = {"file": value} if isinstance(value, str) else value
        fields = read_fields(LoraUse, value, "an entry of loras")
        if "file" not in fields:
            raise UserError(f"an entry of loras, {show(value)}, names no file")
        uses.append(LoraUse(**fields))
    return tuple(uses)


def read_fields(
    cls: type, values: Any, where: str, *, hidden: Sequence[str] = (), more: Sequence[str] = ()
) -> dict[str, Any]:
    """JSON values for a dataclass: a mapping without unknown names.

    Arguments:
        where: how messages call it.
        hidden: fields that cannot be given.
        more: names that are known but no fields; they are not among those returned.

    Raises:
        UserError: in one line.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: {show(values)} is no mapping of names to values")
    own = [field.name for field in dataclasses.fields(cls) if field.name not in hidden]
    for name in values:
        if name not in (*own, *more):
            guess = nearest(str(name), (*own, *more))
            hint = f"did you mean {guess}?" if guess else f"there are {', '.join((*own, *more))}"
            raise UserError(f"{where}: unknown name {show(name)}: {hint}")
    return {name: value for name, value in values.items() if name in own}


def _check_fields(settings: Any, prefix: str = "") -> None:
    """Checks a frozen dataclass made of flags and puts each value into its field's type."""
    for field in dataclasses.fields(settings):
        if field.metadata:
            value = getattr(settings, field.name)
            if field.name != "file" and isinstance(value, float) and value.is_integer() and flag_of(field).kind is int:
                value = int(value)  # JavaScript and sliders know floats only: 20 may come as 20.0
            object.__setattr__(settings, field.name, checked(flag_of(field), value, prefix + field.name))
