"""Pictures in labelled columns and rows, as one picture."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

__all__ = ["LABEL_PX", "LEAST_SIDE_PX", "Column", "grid"]

LABEL_PX = 22
LEAST_SIDE_PX = 160  # the embedded base draws 64 px; smaller cells than this cannot be looked at
MOST_SIDE_PX = 1024
MOST_MARGIN_PX = 200
LINE_PX = 18


@dataclass(frozen=True)
class Column:
    """Arguments:
    label: stands above.
    pictures: from top to bottom.
    """

    label: str
    pictures: Sequence[Image.Image]


def grid(columns: Sequence[Column], rows: Sequence[str] = ()) -> Image.Image:
    """Labelled columns of equally large pictures.

    Arguments:
        rows: what stands to the left of each row, broken into lines where it is long; empty for nothing.
    """
    first = columns[0].pictures[0]
    side = min(MOST_SIDE_PX, max(LEAST_SIDE_PX, first.width))
    high = round(side * first.height / first.width)
    font = ImageFont.load_default(14)
    lines = [list(_lines(row, font)) for row in rows]
    widest = max((round(font.getlength(line)) for row in lines for line in row), default=-12)
    margin = 12 + widest
    height = max(len(column.pictures) for column in columns)
    sheet = Image.new("RGB", (margin + side * len(columns), LABEL_PX + high * height), "white")
    pen = ImageDraw.Draw(sheet)
    for number, row in enumerate(lines):
        row = row[: max(1, high // LINE_PX)]
        top = LABEL_PX + high * number + high // 2 - LINE_PX * len(row) // 2
        for place, line in enumerate(row):
            pen.text((6, top + LINE_PX * place), line, fill="black", font=font)
    for number, column in enumerate(columns):
        left = margin + number * side
        pen.text((left + 6, 3), _cut(column.label, font, side - 8), fill="black", font=font)
        for row, picture in enumerate(column.pictures):
            fitted = picture.resize((side, high), Image.Resampling.BICUBIC)
            sheet.paste(fitted, (left, LABEL_PX + row * high))
    return sheet


def _lines(text: str, font: ImageFont.FreeTypeFont) -> Iterator[str]:
    """The text in lines of at most `MOST_MARGIN_PX`, broken between words."""
    line = ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and font.getlength(longer) > MOST_MARGIN_PX:
            yield line
            line = word
        else:
            line = longer
        line = _cut(line, font, MOST_MARGIN_PX)
    yield line


def _cut(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"
