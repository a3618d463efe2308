"""A form for a training run, made from the trainer's own flags: names, help, defaults and checks are theirs."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from bilora_diffusion.config import FLAGS, GROUPS
from bilora_diffusion.flags import Flag

__all__ = ["FORM_FLAGS", "NO_PRESET", "TrainingForm", "presets", "words_from"]

CONFIGS = Path("configs")
NO_PRESET = "no preset"
UNSET = "(as it is)"
OPEN_GROUPS = ("Method", "Data")
LEFT_OUT = (
    "output_dir",  # made from the run's name
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "logging_dir",
    "push_to_hub",  # a token does not belong into a page
    "hub_model_id",
    "hub_token",
    "local_rank",
)
FORM_FLAGS: dict[str, Flag] = {name: flag for name, flag in FLAGS.items() if name not in LEFT_OUT}


def presets() -> list[str]:
    """The YAML files in `configs/`, where the app was started."""
    return [NO_PRESET, *(path.as_posix() for path in sorted(CONFIGS.glob("*.yaml")))]


class TrainingForm:
    """A component for each flag, by groups; left empty a flag keeps the preset's value, or its default.

    Attributes:
        fields: the components by the flags' names.
    """

    def __init__(self) -> None:
        self.fields: dict[str, Any] = {}
        for group in GROUPS:
            flags = [flag for flag in FORM_FLAGS.values() if flag.group == group]
            if flags:
                with gr.Accordion(group, open=False), gr.Row():
                    for flag in flags:
                        self.fields[flag.name] = _component(flag)

    @property
    def components(self) -> list[Any]:
        return list(self.fields.values())


def _component(flag: Flag) -> Any:
    options = {"label": flag.name, "info": _info(flag), "min_width": 240, "elem_id": f"flag-{flag.name}"}
    if flag.choices or flag.kind is bool:
        words = flag.choices or ("true", "false")
        return gr.Dropdown([UNSET, *words], value=UNSET, **options)
    return gr.Textbox("", placeholder=_default(flag), max_lines=1, **options)


def _info(flag: Flag) -> str:
    limits = f" {flag.within}." if flag.within else ""
    return f"{flag.help}.{limits} Default: {_default(flag)}"


def _default(flag: Flag) -> str:
    if flag.default is dataclasses.MISSING:
        return "required"
    if flag.kind is bool and flag.default is not None:
        return "true" if flag.default else "false"
    return "unset" if flag.default is None else str(flag.default)


def words_from(preset: str, values: Sequence[str]) -> list[str]:
    """The trainer's command line of a filled form; what was left empty is not on it."""
    given: Mapping[str, str] = dict(zip(FORM_FLAGS, values, strict=True))
    words = [] if preset == NO_PRESET else ["--config", preset]
    return words + [f"--{name}={value}" for name, value in given.items() if value not in (None, "", UNSET)]
