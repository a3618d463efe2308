"""A form for a training run, made from the trainer's own flags: names, help, defaults and checks are theirs."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import yaml

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
    """A component for each flag, by groups; left empty a flag keeps the preset's value, or its default, which it shows.

    Arguments:
        preset: the first one.

    Attributes:
        fields: the components by the flags' names.
    """

    def __init__(self, preset: str) -> None:
        self.fields: dict[str, Any] = {}
        values = _values_of(preset)
        for group in GROUPS:
            flags = [flag for flag in FORM_FLAGS.values() if flag.group == group]
            if flags:
                with gr.Accordion(group, open=False), gr.Row():
                    for flag in flags:
                        self.fields[flag.name] = _component(flag, values)

    @property
    def components(self) -> list[Any]:
        return list(self.fields.values())

    def shown(self, preset: str) -> list[dict[str, Any]]:
        """What each component shows of another preset."""
        values = _values_of(preset)
        return [gr.update(**_unset(FORM_FLAGS[name], values)) for name in self.fields]


def _component(flag: Flag, values: Mapping[str, Any]) -> Any:
    options = {"label": flag.name, "info": _info(flag), "min_width": 240, "elem_id": f"flag-{flag.name}"}
    if _is_choice(flag):
        return gr.Dropdown(value=UNSET, **_unset(flag, values), **options)
    return gr.Textbox("", max_lines=1, **_unset(flag, values), **options)


def _is_choice(flag: Flag) -> bool:
    return bool(flag.choices) or flag.kind is bool


def _unset(flag: Flag, values: Mapping[str, Any]) -> dict[str, Any]:
    """How a component says what holds if it is left alone."""
    value = _shown(values[flag.name]) if flag.name in values else _default(flag)
    if not _is_choice(flag):
        return {"placeholder": value}
    return {"choices": [(f"(as it is: {value})", UNSET), *(flag.choices or ("true", "false"))]}


def _values_of(preset: str) -> Mapping[str, Any]:
    """What a preset sets; nothing for one that is not among `presets`, or is broken, which the start will tell."""
    if preset == NO_PRESET or preset not in presets():
        return {}
    try:
        values = yaml.safe_load(Path(preset).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return "unset" if value is None else str(value)


def _info(flag: Flag) -> str:
    limits = f" {flag.within}." if flag.within else ""
    return f"{flag.help}.{limits} Default: {_default(flag)}"


def _default(flag: Flag) -> str:
    return "required" if flag.default is dataclasses.MISSING else _shown(flag.default)


def words_from(preset: str, values: Sequence[str]) -> list[str]:
    """The trainer's command line of a filled form; what was left empty is not on it."""
    given: Mapping[str, str] = dict(zip(FORM_FLAGS, values, strict=True))
    words = [] if preset == NO_PRESET else ["--config", preset]
    return words + [f"--{name}={value}" for name, value in given.items() if value not in (None, "", UNSET)]
