"""What to compare: columns of LoRAs, rows of prompts, seeds and values. Imports no torch, no diffusers."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from bilora_diffusion.errors import UserError
from bilora_diffusion.flags import Flag, checked, flag, flag_of, show
from bilora_diffusion.generation.files import LoraFiles
from bilora_diffusion.generation.png import read_settings
from bilora_diffusion.generation.settings import (
    FIELDS,
    MOST_LORAS,
    LoraUse,
    PictureSettings,
    loras_from_json,
    read_fields,
)

__all__ = ["MOST_COLUMNS", "SWEPT", "ComparedColumn", "ComparisonSettings", "Row", "Sweep", "column_titles"]

SWEPT = ("weight", "steps", "guidance_scale", "prompt")
MOST_COLUMNS = 4
MOST_VALUES = 12
MOST_CELLS = 96
SHARED = ("negative_prompt", "steps", "guidance_scale", "width", "height", "scheduler", "base")
"""Fields of `PictureSettings` that a comparison has once, for all its pictures."""


@dataclass(frozen=True, kw_only=True)
class ComparedColumn:
    """A column: the base with these LoRAs, or without any.

    Attributes:
        label: stands above; empty: made from the files.
    """

    label: str = ""
    loras: tuple[LoraUse, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.label, str) or len(self.label) > 200:
            raise UserError(f"a column's label is {show(self.label)}: it must be a text of at most 200 characters")
        if len(self.loras) > MOST_LORAS:
            raise UserError(f"a column has {len(self.loras)} LoRAs: at most {MOST_LORAS}")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """One variable through several values, a row each.

    Attributes:
        variable: one of `SWEPT`; `weight` is that of every LoRA of a column.
        values: from top to bottom, each checked as that variable is.
    """

    variable: str = flag(dataclasses.MISSING, "what changes from row to row", group="Sweep", choices=SWEPT)
    values: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "variable", checked(flag_of(_field(Sweep, "variable")), self.variable, "sweep"))
        if not isinstance(self.values, list | tuple) or not 1 <= len(self.values) <= MOST_VALUES:
            raise UserError(f"the sweep's values are {show(self.values)}: give a list of 1 to {MOST_VALUES}")
        kind = FIELDS[self.variable]
        values = [_whole(kind, value) for value in self.values]
        label = f"the sweep's {self.variable}"
        object.__setattr__(self, "values", tuple(checked(kind, value, label) for value in values))


@dataclass(frozen=True)
class Row:
    """Attributes:
    label: what the row has that others have not.
    changes: the fields of `PictureSettings` that it sets.
    weight: of every LoRA, if that is swept.
    """

    label: str
    changes: Mapping[str, Any]
    weight: float | None = None


@dataclass(frozen=True, kw_only=True)
class ComparisonSettings:
    """2 to 4 columns of pictures with the same prompts and seeds. Making one checks it.

    Rows are prompts x seeds, and with a sweep x its values.
    """

    columns: tuple[ComparedColumn, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    sweep: Sweep | None = None
    shared: PictureSettings = dataclasses.field(default_factory=PictureSettings)

    def __post_init__(self) -> None:
        if not 2 <= len(self.columns) <= MOST_COLUMNS:
            raise UserError(f"{len(self.columns)} columns: a comparison has 2 to {MOST_COLUMNS}")
        for name in ("prompts", "seeds"):
            if not 1 <= len(getattr(self, name)) <= MOST_VALUES:
                raise UserError(f"{len(getattr(self, name))} {name}: give 1 to {MOST_VALUES}")
        cells = len(self.rows()) * len(self.columns)
        if cells > MOST_CELLS:
            raise UserError(
                f"this would be {cells} pictures: at most {MOST_CELLS}; take fewer prompts, seeds or values"
            )

    def rows(self) -> list[Row]:
        """From top to bottom. Each prompt and seed is checked."""
        rows = []
        sweep = self.sweep
        for prompt in ("",) if sweep and sweep.variable == "prompt" else self.prompts:
            for seed in self.seeds:
                for value in sweep.values if sweep else (None,):
                    parts = [prompt] if prompt and (len(self.prompts) > 1 or not sweep) else []
                    parts += [f"seed {seed}"] if len(self.seeds) > 1 else []
                    changes: dict[str, Any] = {"prompt": prompt, "seed": seed}
                    if sweep:
                        parts.append(value if sweep.variable == "prompt" else f"{_title(sweep.variable)} {value:g}")
                        if sweep.variable != "weight":
                            changes[sweep.variable] = value
                    replace(self.shared, **changes)
                    weight = value if sweep and sweep.variable == "weight" else None
                    rows.append(Row(", ".join(parts), changes, weight))
        return rows

    def cell(self, row: Row, column: ComparedColumn) -> PictureSettings:
        """What is drawn where a row and a column meet."""
        loras = column.loras
        if row.weight is not None:
            loras = tuple(replace(lora, weight=row.weight) for lora in loras)
        return replace(self.shared, **row.changes, loras=loras)

    @classmethod
    def from_json(cls, values: Any) -> "ComparisonSettings":
        """From JSON values, as `to_json` gives them; what is left out has its default.

        Raises:
            UserError: in one line, with the name of the value.
        """
        values = _mapping(values)
        shared = {name: values.pop(name) for name in SHARED if name in values}
        fields = read_fields(cls, values, "the comparison", hidden=("shared",), more=SHARED)
        for name in ("columns", "prompts"):
            if name not in fields:
                raise UserError(f"the comparison has no {name}")
        for name in ("columns", "prompts", "seeds"):
            if name in fields and not isinstance(fields[name], list | tuple):
                raise UserError(f"{name} is {show(fields[name])}: it must be a list")
        seed = FIELDS["seed"]
        return cls(
            columns=tuple(_column_from_json(one) for one in fields["columns"]),
            prompts=tuple(checked(FIELDS["prompt"], one, "a prompt") for one in fields["prompts"]),
            seeds=tuple(checked(seed, _whole(seed, one), "a seed") for one in fields.get("seeds", (0,))),
            sweep=_sweep_from_json(fields.get("sweep")),
            shared=PictureSettings(**shared),
        )

    def to_json(self) -> dict[str, Any]:
        """As `from_json` takes them."""
        return {
            "columns": [
                {"label": one.label, "loras": [dataclasses.asdict(lora) for lora in one.loras]} for one in self.columns
            ],
            "prompts": list(self.prompts),
            "seeds": list(self.seeds),
            "sweep": {"variable": self.sweep.variable, "values": list(self.sweep.values)} if self.sweep else None,
            **{name: getattr(self.shared, name) for name in SHARED},
        }


def _field(cls: type, name: str) -> dataclasses.Field:
    return next(field for field in dataclasses.fields(cls) if field.name == name)


def _title(variable: str) -> str:
    return variable.removesuffix("_scale")


def _whole(kind: Flag, value: Any) -> Any:
    """20.0 as 20 where a whole number is wanted: JavaScript knows no other numbers."""
    return int(value) if kind.kind is int and isinstance(value, float) and value.is_integer() else value


def _mapping(values: Any) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise UserError(f"the comparison is {show(values)}: it must be a mapping of names to values")
    return dict(values)


def _column_from_json(values: Any) -> ComparedColumn:
    fields = read_fields(ComparedColumn, values, "a column")
    return ComparedColumn(label=fields.get("label", ""), loras=loras_from_json(fields.get("loras", [])))


def _sweep_from_json(values: Any) -> Sweep | None:
    if values is None:
        return None
    fields = read_fields(Sweep, values, "the sweep")
    if "variable" not in fields:
        raise UserError(f"the sweep names no variable: one of {', '.join(SWEPT)}")
    return Sweep(**fields)


def read_comparison(path: Path) -> ComparisonSettings:
    """From a comparison's JSON, or from the PNG of its table.

    Raises:
        UserError: another file, or one that was changed wrongly.
    """
    try:
        if path.suffix.lower() == ".png":
            values = read_settings(path).get("comparison")
            if values is None:
                raise UserError(f"{path.name} is one picture, no table: drop it on the app's Generate tab")
        else:
            values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path.name} is not valid JSON: {error}") from None
    return ComparisonSettings.from_json(values)


def column_titles(columns: Sequence[ComparedColumn], files: LoraFiles) -> list[str]:
    """What stands above each column: its label, or the method that its files name; the folder where two are alike.

    Raises:
        UserError: a file may not be opened, is damaged, or is no LoRA.
    """
    plain = [column.label or _methods(column, files) for column in columns]
    return [
        f"{title} ({', '.join(_folder(lora.file) for lora in column.loras)})"
        if plain.count(title) > 1 and column.loras and not column.label
        else title
        for title, column in zip(plain, columns, strict=True)
    ]


def _methods(column: ComparedColumn, files: LoraFiles) -> str:
    titles = [
        files.describe(lora.file).title + (f" x {lora.weight:g}" if lora.weight != 1 else "") for lora in column.loras
    ]
    return " + ".join(titles) or "base"


def _folder(file: str) -> str:
    """`quickstart` of "outputs/quickstart/pytorch_lora_weights.safetensors": the file's own name is always the same."""
    path = PurePosixPath(file)
    return path.parent.name if path.stem.startswith("pytorch_lora_weights") else path.stem
