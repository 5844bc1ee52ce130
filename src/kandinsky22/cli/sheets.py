"""Grids of images with labels."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

TEXT_COLOUR, DETAIL_COLOUR, BACKGROUND, FRAME_COLOUR = "#1a1a1a", "#6b6b6b", "#ffffff", "#d9d9d9"
# In pixels: space between cells, space at the borders, longest side of an image, narrowest sheet.
GAP, MARGIN, MAX_IMAGE_SIDE, MIN_SHEET_WIDTH = 10, 24, 384, 420
# System fonts that cover more alphabets than Pillow's default font.
FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial.ttf", "Helvetica.ttc")


@dataclasses.dataclass(frozen=True)
class RowLabel:
    """Label of a row.

    Attributes:
        name: First line.
        detail: Second line in small type; "" for none.
    """

    name: str
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Sheet:
    """Content of a labelled grid of images.

    Attributes:
        title: Text at the top; line breaks are preserved; "" for none.
        subtitle: Text below the title in small type; "" for none.
        columns: Labels of the columns.
        rows: Labels of the rows.
        images: Images of one size, row by row.
        captions: Text below each image, row by row.
    """

    title: str
    subtitle: str
    columns: Sequence[str]
    rows: Sequence[RowLabel]
    images: Sequence[Image.Image]
    captions: Sequence[str]


def render_sheet(sheet: Sheet) -> Image.Image:
    """Return the sheet as an RGB image. Images longer than `MAX_IMAGE_SIDE` pixels are scaled down.

    Args:
        sheet: The content.
    """
    from PIL import Image, ImageDraw

    cell_width, cell_height = _displayed_size(sheet.images[0].size)
    text_size = max(12, min(20, cell_width // 10))
    font, small, large = _font(text_size), _font(text_size - 2), _font(text_size + 4)
    label_right = MARGIN + max(
        *(_text_width(font, label.name) for label in sheet.rows),
        *(_text_width(small, label.detail) for label in sheet.rows),
    )
    captions_width = max(_text_width(small, caption) for caption in sheet.captions)
    column_pitch = max(cell_width, captions_width, *(_text_width(font, name) for name in sheet.columns)) + GAP
    sheet_width = max(label_right + GAP + column_pitch * len(sheet.columns) + MARGIN - GAP, MIN_SHEET_WIDTH)
    title = _wrap(sheet.title, large, sheet_width - 2 * MARGIN)
    subtitle = _wrap(sheet.subtitle, small, sheet_width - 2 * MARGIN)
    subtitle_top = MARGIN + _text_height(large, title) + GAP // 2
    columns_top = subtitle_top + _text_height(small, subtitle) + GAP
    cells_top = columns_top + _text_height(font, ["X"]) + GAP // 2
    row_pitch = cell_height + _text_height(small, ["X"]) + GAP
    sheet_height = cells_top + row_pitch * len(sheet.rows) + MARGIN - GAP
    canvas = Image.new("RGB", (sheet_width, sheet_height), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    _draw_lines(draw, (MARGIN, MARGIN), title, large, TEXT_COLOUR)
    _draw_lines(draw, (MARGIN, subtitle_top), subtitle, small, DETAIL_COLOUR)
    for column, name in enumerate(sheet.columns):
        centre = label_right + GAP + column * column_pitch + cell_width // 2
        draw.text((centre, columns_top), name, TEXT_COLOUR, font, anchor="ma")
    for row, label in enumerate(sheet.rows):
        middle, offset = cells_top + row * row_pitch + cell_height // 2, text_size * 3 // 5
        draw.text((label_right, middle - (offset if label.detail else 0)), label.name, TEXT_COLOUR, font, anchor="rm")
        draw.text((label_right, middle + offset), label.detail, DETAIL_COLOUR, small, anchor="rm")
    for index, (image, caption) in enumerate(zip(sheet.images, sheet.captions, strict=True)):
        row, column = divmod(index, len(sheet.columns))
        left, top = label_right + GAP + column * column_pitch, cells_top + row * row_pitch
        shown = image if image.size == (cell_width, cell_height) else image.resize((cell_width, cell_height))
        canvas.paste(shown, (left, top))
        draw.rectangle((left - 1, top - 1, left + cell_width, top + cell_height), outline=FRAME_COLOUR)
        draw.text((left + cell_width // 2, top + cell_height + 3), caption, DETAIL_COLOUR, small, anchor="ma")
    return canvas


def _displayed_size(size: tuple[int, int]) -> tuple[int, int]:
    factor = min(1.0, MAX_IMAGE_SIDE / max(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def _font(size: int) -> Any:
    from PIL import ImageFont

    for name in FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def _text_width(font: Any, text: str) -> int:
    return int(font.getlength(text)) + 1


def _text_height(font: Any, lines: Sequence[str]) -> int:
    return int(font.size * 1.3) * len(lines)


def _wrap(text: str, font: Any, width: int) -> list[str]:
    """Break a text into lines of at most `width` pixels, estimated from the font's average character width."""
    characters = max(8, int(width / max(1.0, font.getlength("abcdefghij ") / 11)))
    return [line for paragraph in text.splitlines() for line in textwrap.wrap(paragraph, characters) or [""]]


def _draw_lines(draw: Any, position: tuple[int, int], lines: Sequence[str], font: Any, colour: str) -> None:
    left, top = position
    for number, line in enumerate(lines):
        draw.text((left, top + _text_height(font, lines[:number])), line, colour, font)
