"""Images in a terminal: the protocols of kitty and iTerm2, or half blocks in colours."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
import shutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, TextIO

from kandinsky22.errors import printable

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_COLUMNS, MAX_ROWS = 48, 24  # size of a preview in characters, which are about twice as high as wide
KITTY, ITERM, TRUE_COLOUR, PALETTE = "kitty", "iterm", "true colour", "palette"
KITTY_CHUNK = 4096  # characters of base64 per escape sequence (kitty graphics protocol)
KITTY_ID = 22
ESCAPE = "\x1b"


def image_protocol(environment: Mapping[str, str]) -> str | None:
    """Return how a terminal shows images: `KITTY`, `ITERM`, `TRUE_COLOUR`, `PALETTE`, or None if it cannot.

    Args:
        environment: Environment variables of the process.
    """
    terminal, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    if terminal == "dumb":
        return None
    # Multiplexers pass on text, but not the sequences of image protocols.
    if not ("TMUX" in environment or terminal.startswith(("screen", "tmux"))):
        if "KITTY_WINDOW_ID" in environment or terminal in ("xterm-kitty", "xterm-ghostty") or program == "ghostty":
            return KITTY
        if program in ("iTerm.app", "WezTerm") or environment.get("LC_TERMINAL") == "iTerm2":
            return ITERM
    if environment.get("COLORTERM", "").lower() in ("truecolor", "24bit"):
        return TRUE_COLOUR
    return PALETTE if "color" in terminal or terminal.startswith(("xterm", "screen", "tmux", "linux")) else None


@dataclasses.dataclass(frozen=True)
class _Cells:
    """Size of an image in characters."""

    columns: int
    rows: int

    @classmethod
    def of(cls, image: Image) -> _Cells:
        window = shutil.get_terminal_size()
        columns, rows = min(MAX_COLUMNS, window.columns - 1), min(MAX_ROWS, window.lines - 2)
        scale = min(columns / image.width, 2 * rows / image.height)
        return cls(max(1, round(image.width * scale)), max(1, math.ceil(image.height * scale / 2)))


class TerminalPreview:
    """An image at the end of a terminal's output that is replaced by newer ones, with a line of text below it.

    Args:
        stream: The terminal.
        protocol: How it shows images, from `image_protocol`.
    """

    def __init__(self, stream: TextIO, protocol: str) -> None:
        self._stream, self._protocol = stream, protocol
        self._rows = 0  # of the image that is shown

    def show(self, image: Image, text: str) -> None:
        """Show an image in the place of the last one.

        Args:
            image: The image.
            text: Line below it.
        """
        cells = _Cells.of(image)
        height = max(cells.rows, self._rows)
        # The first image makes room for itself, which may scroll the terminal. Others go back to the first line.
        start = "\n" * (height + 1) + f"{ESCAPE}[{height + 1}A" if height > self._rows else f"{ESCAPE}[{height + 1}A"
        if self._rows and height > self._rows:
            start = f"{ESCAPE}[{self._rows + 1}A" + start
        self._rows = height
        line = printable(text)[: shutil.get_terminal_size().columns - 1]
        self._stream.write(f"\r{start}{self._encoded(image, cells, height)}\r{line}{ESCAPE}[K\n")
        self._stream.flush()

    def finish(self) -> None:
        """Leave the last image where it is; the next one is shown below it."""
        self._rows = 0

    def _encoded(self, image: Image, cells: _Cells, height: int) -> str:
        """Return the sequence that shows an image and moves the cursor down by `height` lines."""
        if self._protocol in (TRUE_COLOUR, PALETTE):
            lines = _half_blocks(image, cells, palette=self._protocol == PALETTE)
            lines += [""] * (height - len(lines))
            return "".join(f"\r{line}{ESCAPE}[K\n" for line in lines)
        content = _png(image)
        shown = _kitty(content, cells) if self._protocol == KITTY else _iterm(content, cells)
        return f"{ESCAPE}7{shown}{ESCAPE}8{ESCAPE}[{height}B"


def _png(image: Image) -> str:
    content = io.BytesIO()
    image.convert("RGB").save(content, "PNG", compress_level=1)
    return base64.b64encode(content.getvalue()).decode()


def _kitty(content: str, cells: _Cells) -> str:
    """Return the sequences of https://sw.kovidgoyal.net/kitty/graphics-protocol/: an image with a fixed id."""
    chunks = [content[start : start + KITTY_CHUNK] for start in range(0, len(content), KITTY_CHUNK)]
    keys = f"a=T,f=100,i={KITTY_ID},p=1,q=2,C=1,c={cells.columns},r={cells.rows}"
    parts = [
        f"{ESCAPE}_G{f'{keys},' if index == 0 else ''}m={int(index < len(chunks) - 1)};{chunk}{ESCAPE}\\"
        for index, chunk in enumerate(chunks)
    ]
    return "".join(parts)


def _iterm(content: str, cells: _Cells) -> str:
    """Return the sequence of https://iterm2.com/documentation-images.html."""
    keys = f"inline=1;width={cells.columns};height={cells.rows};preserveAspectRatio=1"
    return f"{ESCAPE}]1337;File={keys}:{content}\a"


def _half_blocks(image: Image, cells: _Cells, *, palette: bool) -> list[str]:
    """Return lines of half blocks: each character shows two pixels, one above the other."""
    import PIL.Image

    size = (cells.columns, 2 * cells.rows)
    pixels = image.convert("RGB").resize(size, PIL.Image.Resampling.BOX if image.width > size[0] else None)
    lines = []
    for row in range(cells.rows):
        upper = [_colour(pixels.getpixel((column, 2 * row)), palette) for column in range(cells.columns)]
        lower = [_colour(pixels.getpixel((column, 2 * row + 1)), palette) for column in range(cells.columns)]
        blocks = [f"{ESCAPE}[38;{top};48;{bottom}m▀" for top, bottom in zip(upper, lower, strict=True)]
        lines.append("".join(blocks) + f"{ESCAPE}[0m")
    return lines


def _colour(pixel: object, palette: bool) -> str:
    """Return the parameters of a colour: 24 bits, or the nearest one of the 6 x 6 x 6 colours from 16 to 231."""
    red, green, blue = pixel if isinstance(pixel, tuple) else (0, 0, 0)
    if not palette:
        return f"2;{red};{green};{blue}"
    levels = [round(value / 51) for value in (red, green, blue)]
    return f"5;{16 + 36 * levels[0] + 6 * levels[1] + levels[2]}"
