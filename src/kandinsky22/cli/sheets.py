"""Pictures in rows and columns with labels around them."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

INK, GREY, PAPER, FRAME = "#1a1a1a", "#6b6b6b", "#ffffff", "#d9d9d9"
GAP, MARGIN, LARGEST = 10, 24, 384
# Fonts with more alphabets than the one that Pillow brings, where systems have them.
FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial.ttf", "Helvetica.ttc")


@dataclasses.dataclass(frozen=True)
class Sheet:
    """Pictures row by row, each with a note below it; `rows` have a name and something smaller below the name."""

    title: str
    about: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, str]]
    images: Sequence[Image.Image]
    notes: Sequence[str]


def labelled_sheet(sheet: Sheet) -> Image.Image:
    """The sheet as a picture. Its pictures are shown as they are, or scaled down to 384 pixels at most."""
    from PIL import Image, ImageDraw

    wide, high = _shown(sheet.images[0].size)
    text = max(12, min(20, wide // 10))
    plain, small, big = _font(text), _font(text - 2), _font(text + 4)
    left = MARGIN + max(
        *(_width(plain, name) for name, _ in sheet.rows), *(_width(small, more) for _, more in sheet.rows)
    )
    notes = max(_width(small, note) for note in sheet.notes)
    pitch = max(wide, notes, *(_width(plain, name) for name in sheet.columns)) + GAP
    width = max(left + GAP + pitch * len(sheet.columns) + MARGIN - GAP, 420)
    title = _wrapped(sheet.title, big, width - 2 * MARGIN)
    about = _wrapped(sheet.about, small, width - 2 * MARGIN)
    top = MARGIN + _height(big, title) + GAP // 2 + _height(small, about) + GAP
    first = top + _height(plain, ["X"]) + GAP // 2
    step = high + _height(small, ["X"]) + GAP
    picture = Image.new("RGB", (width, first + step * len(sheet.rows) + MARGIN - GAP), PAPER)
    pen = ImageDraw.Draw(picture)
    _lines(pen, (MARGIN, MARGIN), title, big, INK)
    _lines(pen, (MARGIN, MARGIN + _height(big, title) + GAP // 2), about, small, GREY)
    for column, name in enumerate(sheet.columns):
        pen.text((left + GAP + column * pitch + wide // 2, top), name, INK, plain, anchor="ma")
    for row, (name, more) in enumerate(sheet.rows):
        middle = first + row * step + high // 2
        pen.text((left, middle - (text * 3 // 5 if more else 0)), name, INK, plain, anchor="rm")
        pen.text((left, middle + text * 3 // 5), more, GREY, small, anchor="rm")
    for index, (image, note) in enumerate(zip(sheet.images, sheet.notes, strict=True)):
        row, column = divmod(index, len(sheet.columns))
        place = left + GAP + column * pitch, first + row * step
        picture.paste(image if image.size == (wide, high) else image.resize((wide, high)), place)
        pen.rectangle((place[0] - 1, place[1] - 1, place[0] + wide, place[1] + high), outline=FRAME)
        pen.text((place[0] + wide // 2, place[1] + high + 3), note, GREY, small, anchor="ma")
    return picture


def _shown(size: tuple[int, int]) -> tuple[int, int]:
    factor = min(1.0, LARGEST / max(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def _font(size: int) -> Any:
    from PIL import ImageFont

    for name in FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def _width(font: Any, text: str) -> int:
    return int(font.getlength(text)) + 1


def _height(font: Any, lines: Sequence[str]) -> int:
    return int(font.size * 1.3) * len(lines)


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    """The text in lines that fit, as far as its words allow."""
    letters = max(8, int(width / max(1.0, font.getlength("abcdefghij ") / 11)))
    return [line for part in text.splitlines() or [""] for line in textwrap.wrap(part, letters) or [""]]


def _lines(pen: Any, place: tuple[int, int], lines: Sequence[str], font: Any, color: str) -> None:
    for number, line in enumerate(lines):
        pen.text((place[0], place[1] + _height(font, lines[:number])), line, color, font)
