"""From the command line and a YAML file to a `TrainingConfig`; `--help`; the table in `docs/flags.md`.

`python -m bilora_diffusion.command_line > docs/flags.md` writes that table. All is made from `config.FLAGS`.
Neither torch nor diffusers is imported here: `--help` and a refusal must answer at once.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from bilora_diffusion import __version__
from bilora_diffusion.config import FLAGS, GROUPS, RIVALS, TrainingConfig
from bilora_diffusion.errors import UserError
from bilora_diffusion.flags import Flag, checked, nearest, show

__all__ = ["flags_markdown", "parse", "read_config_file"]

PROGRAM = "train_dreambooth_bilora.py"
DESCRIPTION = """\
Trains a LoRA for SDXL on a few pictures, with Bi-LoRA or plain LoRA. A flag of type BOOL can be said --x,
--no-x, --x True or --x False; "none" unsets a number or a BOOL that may be unset. --config FILE.yaml holds
flags under their names; the command line wins over it."""

METAVARS = {int: "INT", float: "FLOAT", str: "TEXT"}
BOOLS = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}


def parse(argv: Sequence[str] | None = None, assumed: Mapping[str, Any] | None = None) -> TrainingConfig:
    """The configuration of a run.

    Arguments:
        argv: the words after the program's name; unset: `sys.argv[1:]`.
        assumed: values of flags that neither the words nor the file name.

    Raises:
        UserError: for anything wrong, in one line that names the flag, or the file, its line and the key.
        SystemExit: with code 0, after `--help` or `--version`.
    """
    given = _read_words(sys.argv[1:] if argv is None else list(argv))
    files = given.pop("config", [])
    if len(files) > 1:
        raise UserError(f"--config is given {len(files)} times: put the keys in one file")
    values = read_config_file(files[0]) if files else {}
    for pair in RIVALS:
        for name, rival in (pair, pair[::-1]):
            if given.get(name) is not None and given[name] is not False:  # --no-center_crop takes nothing's place
                values.pop(rival, None)
    values |= given
    for name, value in (assumed or {}).items():
        rivals = [one for pair in RIVALS for one in pair if name in pair]
        if all(values.get(one) is None for one in (name, *rivals)):
            values[name] = value
    for flag in FLAGS.values():
        if flag.required and flag.name not in values:
            raise UserError(f"--{flag.name} is missing: {flag.help}")
    return TrainingConfig(**values)


# --- The command line ---


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        message = " ".join(message.removeprefix("argument ").split())
        message = message.replace("expected one argument", "needs a value; --flag=VALUE if it begins with -")
        raise UserError(message.replace("ignored explicit argument", "takes no value, but got"))


def _read_words(argv: list[str]) -> dict[str, Any]:
    """What the command line itself says, in the fields' types; `config` holds the list of files."""
    texts, rest = _parser().parse_known_args(argv)
    if rest:
        raise UserError(_unknown(rest))
    return {
        name: checked(FLAGS[name], _from_text(FLAGS[name], text)) if name in FLAGS else text
        for name, text in vars(texts).items()
    }


def _parser() -> _Parser:
    """Reads texts only, and nothing that was not given: types and defaults are `TrainingConfig`'s."""
    parser = _Parser(
        prog=PROGRAM,
        description=DESCRIPTION,
        usage="%(prog)s [--config FILE.yaml] --pretrained_model_name_or_path BASE --instance_data_dir DIR",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--config", metavar="FILE.yaml", action="append", help="file of flags and their values")
    for group in GROUPS:
        section = parser.add_argument_group(group)
        for flag in FLAGS.values():
            if flag.group == group:
                _add(section, flag)
    return parser


def _add(section: Any, flag: Flag) -> None:
    default = "required" if flag.required else f"default: {_shown_default(flag)}"
    limits = f"{flag.within}; " if flag.within else ""
    help_text = f"{flag.help} [{limits}{default}]".replace("%", "%%")
    if flag.kind is bool:
        section.add_argument(f"--{flag.name}", nargs="?", const="true", metavar="BOOL", help=help_text)
        negation = {"action": "store_const", "const": "false", "help": argparse.SUPPRESS}
        section.add_argument(f"--no-{flag.name}", dest=flag.name, **negation)
    else:
        metavar = f"{{{','.join(flag.choices)}}}" if flag.choices else METAVARS[flag.kind]
        section.add_argument(f"--{flag.name}", metavar=metavar, help=help_text)


def _shown_default(flag: Flag) -> str:
    if flag.default is None:
        return "unset"
    if flag.kind is bool:
        return "on" if flag.default else "off"
    return str(flag.default)


def _from_text(flag: Flag, text: str) -> Any:
    """A word in the field's type, or as it was when it does not fit: `checked` then refuses it."""
    word = text.strip().lower()
    if flag.optional and word == "none" and (flag.kind is not str or flag.choices):
        return None
    if flag.kind is bool:
        return BOOLS.get(word, text)
    if flag.kind is int:
        try:
            return int(text)
        except ValueError:
            return text
    return text


def _unknown(rest: list[str]) -> str:
    flags = [word for word in rest if word.startswith("-")]
    if not flags:
        return f"unexpected {show(rest[0])}: a value belongs behind its flag, quoted if it holds spaces"
    word = flags[0].partition("=")[0]
    negations = (f"no-{flag.name}" for flag in FLAGS.values() if flag.kind is bool)
    guess = nearest(word.lstrip("-"), [*FLAGS, "config", "help", "version", *negations])
    hint = f"did you mean --{guess}?" if guess else "--help lists them"
    return f"unknown flag {show(word)[1:-1]}: {hint}"


# --- The YAML file ---


def read_config_file(path: str) -> dict[str, Any]:
    """The flags a YAML file sets, each checked by itself; an empty file sets none.

    Raises:
        UserError: naming the file, and the line and the key if there is one.
    """
    values: dict[str, Any] = {}
    for line, key, value in _entries(path):
        where = f"{path}, line {line}"
        if key not in FLAGS:
            guess = nearest(key, FLAGS)
            hint = f"did you mean {guess}?" if guess else "keys are flag names without dashes, --help lists them"
            raise UserError(f"{where}: unknown key {show(key)}: {hint}")
        if key in values:
            raise UserError(f"{where}: {key} is set a second time: keep one of the two")
        values[key] = checked(FLAGS[key], value, f"{where}: {key}")
    return values


def _entries(path: str) -> Iterator[tuple[int, str, Any]]:
    """(line, key, value) of the file's mapping, doubled keys too: `yaml.safe_load` would drop the first."""
    try:
        loader = yaml.SafeLoader(Path(path).read_bytes().decode("utf-8-sig"))
        root = loader.get_single_node()
        if root is None or root.tag == "tag:yaml.org,2002:null":
            return
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"--config {path}: it must hold lines of the form flag: value")
        for key, value in root.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else str(loader.construct_object(key, deep=True))
            yield key.start_mark.line + 1, name, loader.construct_object(value, deep=True)
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--config {path}: not a text file in UTF-8") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line_text = f", line {mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"--config {path}{line_text}: not valid YAML: {problem}") from error


# --- docs/flags.md ---

ORIGINS = {"stock": "stock", "diffusers": "newer diffusers", "kohya": "sd-scripts", "bilora": "ours"}
INTRODUCTION = f"""\
# Flags of {PROGRAM}

Written by `python -m bilora_diffusion.command_line > docs/flags.md`; a test keeps it so.

- A switch can be said `--x`, `--no-x`, `--x True`, `--x False` or `--x=false`.
- `--config FILE.yaml` holds flags under their names (`learning_rate: 1e-4`); `null` is unset. The command
  line wins over the file; `--rho` there displaces the file's `rho_relative`, `--instance_data_dir` its
  `dataset_name`, `--crops_per_image` its `center_crop`, and the other way round. Paths are relative to the
  working directory in both.
- `none` on the command line unsets a number or switch that may be unset: `--max_train_steps none`.
- Flags are written out in full; a wrong name is answered with the nearest right one.
- "From": stock is diffusers' `train_dreambooth_lora_sdxl.py`; newer diffusers: a name its newer scripts use;
  sd-scripts: one of kohya-ss/sd-scripts; `*`: departs from the stock script as listed below.

## Departures from the stock script

Every stock flag is here under its name, with its default and its meaning, except:
"""
BEHAVIOUR = """\
- Numbers out of range and flags that contradict each other are refused before anything is loaded.
- Parameters that get no gradient are tolerated with several processes (text encoder 1's last layer gets none): the
  gradients are averaged once a step by the trainer itself, without a wrapper around the models.
- Micro-batches are always full (but for aspect-ratio buckets): the next epoch's order begins where the last one ended.
  Crops and flips are drawn anew each time a picture is seen, noise and timesteps differ between processes, and min-SNR
  weights hold for the prior too.
- `--revision` and `--variant` are the base's, not those of `--pretrained_vae_model_name_or_path`.
"""


def flags_markdown() -> str:
    """The text of `docs/flags.md`."""
    flags = FLAGS.values()
    departures = [f"- `--{flag.name}`: {flag.departure}.\n" for flag in flags if flag.departure]
    tables = [_table(group, [flag for flag in flags if flag.group == group]) for group in GROUPS]
    return INTRODUCTION + "\n" + "".join(departures) + BEHAVIOUR + "".join(tables)


def _table(group: str, flags: list[Flag]) -> str:
    rows = [f"\n## {group}\n\n| flag | default | value | meaning | from |\n|---|---|---|---|---|\n"]
    for flag in flags:
        default = "**required**" if flag.required else f"`{_shown_default(flag)}`"
        value = flag.allowed if flag.kind is not bool else "switch"
        mark = "*" if flag.departure else ""
        cells = (f"`--{flag.name}`", default, value, flag.help, ORIGINS[flag.origin] + mark)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    return "".join(rows)


if __name__ == "__main__":
    print(flags_markdown(), end="")
