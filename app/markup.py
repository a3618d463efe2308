"""HTML for what Gradio has no component for. Everything that comes from outside is escaped here."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from textwrap import shorten
from typing import Any

from PIL import Image

from app.running import Status
from bilora_diffusion.lora_files.description import METHOD_TITLES

__all__ = ["comparison_table", "error", "facts_card", "facts_table", "left_out", "note", "progress", "table"]

CELL_PX = (320, 1024)
MOST_TABLE_PIXELS = 24e6
"""Pictures of a table are as large as they may be enlarged to: a side in `CELL_PX`, so many pixels in all."""
PREVIEW_PX = 256
MOST_LEFT_OUT = 200
FIRST_FACTS = ("method", "rank", "alpha")
"""What comes before the method's own settings, of which each method has others."""
FACT_TITLES = {
    "method": "Method",
    "rank": "Rank",
    "alpha": "Alpha",
    "base": "Base",
    "steps": "Steps",
    "instance_prompt": "Training prompt",
    "captions": "Training captions",
    "resolution": "Resolution",
    "prediction_type": "Prediction",
    "seed": "Seed",
    "trained_at": "Trained",
    "versions": "With",
    "title": "Title",
    "author": "Author",
    "licence": "Licence",
}


def note(text: str) -> str:
    """A line of ordinary news."""
    return f'<div class="status" role="status">{escape(text)}</div>'


def error(text: str) -> str:
    """A line that says what is wrong."""
    return f'<div class="status error" role="alert">{escape(text)}</div>'


def progress(status: Status) -> str:
    """The line, a bar, and the picture that is forming."""
    percent = round(100 * min(1.0, max(0.0, status.share)))
    picture = ""
    if status.preview is not None:
        picture = f'<img class="forming" alt="the picture forming" src="{_data_uri(status.preview, PREVIEW_PX)}">'
    return (
        f'<div class="status" role="status">{escape(status.text)}</div>'
        f'<div class="bar" role="progressbar" aria-valuenow="{percent}" aria-valuemin="0" aria-valuemax="100">'
        f'<div style="width:{percent}%"></div></div>{picture}'
    )


def facts_card(loras: Sequence[Mapping[str, Any]]) -> str:
    """What LoRA files say of themselves; `loras` as the services give them."""
    if not loras:
        return '<p class="quiet">The base alone, without a LoRA.</p>'
    return "".join(_facts_of(lora) for lora in loras)


def _facts_of(lora: Mapping[str, Any]) -> str:
    facts = dict(lora["facts"])
    facts["method"] = METHOD_TITLES.get(facts.get("method", ""), facts.get("method", "not said"))
    facts.setdefault("rank", ", ".join(map(str, lora["ranks"])))
    rows = [("File", lora["file"])]
    if "weight" in lora:
        rows.append(("Weight", f"{lora['weight']:g}"))
    settings = {name: name.replace("_", " ") for name in facts if name not in FACT_TITLES}
    titles = {name: FACT_TITLES[name] for name in FIRST_FACTS} | settings | FACT_TITLES
    rows += [(title, _short(facts[name])) for name, title in titles.items() if name in facts]
    layers = ", ".join(f"{part} {count}" for part, count in lora["layers"].items())
    rows.append(("Layers", f"{layers} ({lora['layout']} file, {lora['size_bytes'] / 2**20:.1f} MiB)"))
    cells = "".join(f"<dt>{escape(title)}</dt><dd>{escape(str(value))}</dd>" for title, value in rows)
    return f'<dl class="facts">{cells}</dl>'


def _short(value: str) -> str:
    """A fraction in four digits."""
    try:
        return f"{float(value):.4g}" if "." in value else value
    except ValueError:
        return value


def table(rows: Sequence[Mapping[str, str]], empty: str) -> str:
    """Rows of equal names as a table; `empty` where there is none."""
    if not rows:
        return f'<p class="quiet">{escape(empty)}</p>'
    head = "".join(f"<th scope=col>{escape(name)}</th>" for name in rows[0])
    body = "".join(f"<tr>{''.join(f'<td>{escape(value)}</td>' for value in row.values())}</tr>" for row in rows)
    return f'<div class="plain"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def comparison_table(
    titles: Sequence[str], rows: Sequence[str], cells: Sequence[Sequence[Path]], columns: Sequence[Mapping[str, Any]]
) -> str:
    """The pictures under their titles, and under them each column's numbers."""
    head = "".join(f"<th scope=col>{escape(title)}</th>" for title in titles)
    body = []
    fair = math.isqrt(int(MOST_TABLE_PIXELS / max(1, len(titles) * len(rows))))
    side = max(CELL_PX[0], min(CELL_PX[1], fair))
    for label, row in zip(rows, cells, strict=True):
        if label:
            body.append(f'<tr><th class="row-label" colspan="{len(titles)}" scope=row>{escape(label)}</th></tr>')
        pictures = "".join(_cell(path, f"{title}: {label}", side) for path, title in zip(row, titles, strict=True))
        body.append(f"<tr>{pictures}</tr>")
    numbers = "".join(f"<td>{_numbers(column['measures'])}</td>" for column in columns)
    return (
        '<div class="comparison"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}"
        f'<tr class="below">{numbers}</tr></tbody></table>{_meanings(columns, len(rows))}</div>'
    )


def facts_table(titles: Sequence[str], columns: Sequence[Mapping[str, Any]]) -> str:
    """What the files of each column say of themselves, as wide as the pictures' columns."""
    head = "".join(f"<th scope=col>{escape(title)}</th>" for title in titles)
    facts = "".join(f"<td>{facts_card(column['loras'])}</td>" for column in columns)
    return f'<div class="comparison"><table><thead><tr>{head}</tr></thead><tbody><tr>{facts}</tr></tbody></table></div>'


def left_out(ends: Sequence[str]) -> str:
    """A sentence on prompts that are longer than the base reads, "" if there are none; plain text."""
    cut = [end for end in ends if end]
    if not cut:
        return ""
    where = "The prompt is" if len(ends) == 1 else f"{len(cut)} prompts are" if len(cut) > 1 else "A prompt is"
    end = shorten(cut[0], MOST_LEFT_OUT, placeholder=" ...")
    return f"{where} longer than the base reads; left out is: {end}"


def _cell(path: Path, alt: str, side: int) -> str:
    with Image.open(path) as picture:
        return f'<td><img src="{_data_uri(picture, side)}" alt="{escape(alt)}" tabindex=0></td>'


def _numbers(measures: Sequence[Mapping[str, Any]]) -> str:
    rows = "".join(
        f'<dt title="{escape(one["meaning"])}">{escape(one["name"])}</dt>'
        f"<dd>{'-' if one['value'] is None else format(one['value'], '.3f')}</dd>"
        for one in measures
    )
    return f'<dl class="numbers">{rows}</dl>'


def _meanings(columns: Sequence[Mapping[str, Any]], rows: int) -> str:
    """A sentence for each number, once: a measured one's if any column has it."""
    meanings: dict[str, str] = {}
    for column in columns:
        for one in column["measures"]:
            if one["name"] not in meanings or one["value"] is not None:
                meanings[one["name"]] = one["meaning"]
    mean = "<li>Each is the mean over the column's pictures.</li>" if rows > 1 and meanings else ""
    lines = "".join(f"<li><b>{escape(name)}</b>: {escape(meaning)}.</li>" for name, meaning in meanings.items())
    return f'<ul class="meanings">{lines}{mean}</ul>'


def _data_uri(picture: Image.Image, side: int) -> str:
    """A small copy inside the page, with nothing to fetch."""
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    buffer = io.BytesIO()
    picture.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(buffer, format="JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
