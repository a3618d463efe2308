"""What a flag is: its type, range and words, and how a value is checked. Knows nothing of this project's flags."""

import dataclasses
import difflib
import math
import os
import re
import reprlib
import types
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from bilora_diffusion.errors import UserError

__all__ = [
    "AT_LEAST_ONE",
    "BELOW_ONE",
    "FRACTION",
    "NOT_NEGATIVE",
    "POSITIVE",
    "Flag",
    "Origin",
    "Range",
    "checked",
    "flag",
    "flag_of",
    "nearest",
    "show",
]

Origin = Literal["stock", "diffusers", "kohya", "bilora"]


@dataclass(frozen=True)
class Range:
    """An interval of finite numbers, its ends counted unless `open_*`; as text, what messages say."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    multiple_of: int = 1

    def __contains__(self, number: float) -> bool:
        above = number > self.low if self.open_low else number >= self.low
        below = number < self.high if self.open_high else number <= self.high
        whole = self.multiple_of == 1 or number % self.multiple_of == 0
        return above and below and whole and abs(number) < math.inf

    def __str__(self) -> str:
        if math.isinf(self.high):
            text = f"{'>' if self.open_low else '>='} {self.low:g}"
        else:
            ends = f"{'(' if self.open_low else '['}", f"{')' if self.open_high else ']'}"
            text = f"in {ends[0]}{self.low:.12g}, {self.high:.12g}{ends[1]}"
        return text if self.multiple_of == 1 else f"{text} and a multiple of {self.multiple_of}"


POSITIVE = Range(0, open_low=True)
NOT_NEGATIVE = Range(0)
AT_LEAST_ONE = Range(1)
FRACTION = Range(0, 1)
BELOW_ONE = Range(0, 1, open_high=True)


def flag(
    default: Any,
    help: str,
    *,
    group: str,
    within: Range | None = None,
    choices: tuple[str, ...] = (),
    origin: Origin = "stock",
    departure: str = "",
    may_be_empty: bool = False,
) -> Any:
    """A dataclass field that is also a flag.

    Arguments:
        default: the value when neither command line nor file says one; `dataclasses.MISSING`: required.
        help: one line: the meaning, the unit, and what "unset" does.
        group: the heading in `--help`, one of `GROUPS`.
        within: the numbers allowed.
        choices: the words allowed, where the annotation is not a `Literal` that says them.
        origin: who named it: the stock SDXL DreamBooth LoRA script, newer diffusers scripts, kohya's
            sd-scripts, or this project.
        departure: for a stock flag, in what it differs from the stock script.
        may_be_empty: whether an empty text means something (it does for a prompt).
    """
    metadata = {
        "help": help,
        "group": group,
        "within": within,
        "choices": choices,
        "origin": origin,
        "departure": departure,
        "may_be_empty": may_be_empty,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Flag:
    """One field of `TrainingConfig`, as the command line, the files and the docs need it."""

    name: str
    kind: type  # bool, int, float or str
    optional: bool  # whether it may be None
    default: Any  # dataclasses.MISSING: required
    help: str
    group: str
    within: Range | None
    choices: tuple[str, ...]
    origin: Origin
    departure: str
    may_be_empty: bool

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def allowed(self) -> str:
        """What a value must be, as a message ends: "an integer >= 1"."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        noun = {bool: "true or false", int: "an integer", float: "a number", str: "text"}[self.kind]
        return f"{noun} {self.within}" if self.within else noun


def flag_of(field: dataclasses.Field) -> Flag:
    """Reads `X`, `X | None`, `Literal[...]` or `Literal[...] | None` off the annotation."""
    kind: Any = field.type
    optional = get_origin(kind) in (Union, types.UnionType) and type(None) in get_args(kind)
    if optional:
        (kind,) = (one for one in get_args(kind) if one is not type(None))
    metadata = dict(field.metadata)
    if get_origin(kind) is Literal:
        kind, metadata["choices"] = str, get_args(kind)
    return Flag(name=field.name, kind=kind, optional=optional, default=field.default, **metadata)


def checked(flag: Flag, value: Any, label: str | None = None) -> Any:
    """The value in the field's type, or a `UserError` of one line.

    An integer is taken for a float, and so is the text of a number, as YAML reads `1e-3` as text. Words are
    matched whatever their case. A path object becomes text. Nothing else is converted: `3.0` is no integer, 1
    is no bool.

    Arguments:
        label: how the message names the value; unset: the flag.
    """
    label = label or f"--{flag.name}"
    if value is None and flag.optional:
        return None
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if value is False and "no" in flag.choices:
        value = "no"  # `mixed_precision: no` is a bool in YAML
    if flag.kind is float:
        value = _as_float(value)
    is_kind = isinstance(value, flag.kind) and (flag.kind is bool or not isinstance(value, bool))
    if is_kind and flag.choices:
        return _choice(flag, value, label)
    if not is_kind or (flag.within is not None and value not in flag.within):
        quotes = flag.kind is str and value is not None and not flag.choices
        hint = "; put it in quotes" if quotes else "; leave it out for the default" if value is None else ""
        raise UserError(f"{label} is {show(value)}: it must be {flag.allowed}{hint}")
    if value == "" and flag.kind is str and not flag.may_be_empty:
        raise UserError(f"{label} is empty: give it a value or leave it out")
    return value


def _as_float(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return value
    try:
        return float(value)
    except (ValueError, OverflowError):
        return value


def _choice(flag: Flag, value: str, label: str) -> str:
    for choice in flag.choices:
        if choice.lower() == value.lower():
            return choice
    guess = nearest(value, flag.choices)
    hint = f"; did you mean {guess}?" if guess else ""
    raise UserError(f"{label} is {show(value)}: it must be {flag.allowed}{hint}")


def nearest(word: str, names: Any) -> str | None:
    """The name most like `word`, dashes and case aside, or None if none is near."""
    plain = {re.sub(r"[-_ ]+", "_", name.lower()): name for name in names}
    matches = difflib.get_close_matches(re.sub(r"[-_ ]+", "_", word.lower()), plain, n=1, cutoff=0.6)
    return plain[matches[0]] if matches else None


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def show(value: Any) -> str:
    """The value for a message: on one line, and not long."""
    return " ".join(_SHORT.repr(value).split()) if value is not None else "null"
