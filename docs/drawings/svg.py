"""A small SVG writer for the documentation's drawings: boxes, groups, arrows and text, with a check for overlaps.

Colours are CSS variables. The page's style sheet sets them for light and dark mode; a file that is opened by itself
follows the system's mode.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from xml.sax.saxutils import escape

STYLE = """\
svg.drawing{font-family:system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
--ink:#1f2430;--soft:#566072;--line:#7a8494;--box:#e8edf7;--edge:#9fb0cf;--group:#f6f8fc;--accent:#3f51b5}
@media (prefers-color-scheme:dark){svg.drawing{
--ink:#e7eaf1;--soft:#aab3c5;--line:#8791a5;--box:#2f3850;--edge:#53618a;--group:#252b3b;--accent:#9fa8f5}}
svg.drawing text{fill:var(--ink);font-size:15px}
svg.drawing .name{font-weight:600;font-size:16px}
svg.drawing .code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-weight:600;font-size:15px}
svg.drawing .note{fill:var(--soft);font-size:14px}
svg.drawing .label{fill:var(--accent);font-weight:600;font-size:15px}
svg.drawing .box{fill:var(--box);stroke:var(--edge)}
svg.drawing .data{fill:none;stroke:var(--accent);stroke-width:1.5}
svg.drawing .optional{fill:none;stroke:var(--line);stroke-dasharray:5 4}
svg.drawing .group{fill:var(--group);stroke:var(--edge)}
svg.drawing .arrow{fill:none;stroke:var(--line);stroke-width:1.8}
svg.drawing .head{fill:var(--line)}"""

# Width of a character relative to 1 px of font size: an upper estimate for common fonts.
CHARACTER_WIDTH = {"name": 0.58 * 16, "code": 0.61 * 15, "note": 0.55 * 14, "label": 0.58 * 15}
LINE_HEIGHT = 20
PADDING = 6  # smallest distance in pixels between a text and the edge of its box


@dataclasses.dataclass(frozen=True)
class Rectangle:
    """An axis-aligned rectangle in pixels.

    Attributes:
        x: Left edge.
        y: Upper edge.
        width: Extent to the right.
        height: Extent downwards.
    """

    x: float
    y: float
    width: float
    height: float

    def overlaps(self, other: Rectangle) -> bool:
        """Return whether the two rectangles have a common interior point.

        Args:
            other: Another rectangle.
        """
        return (
            self.x < other.x + other.width
            and other.x < self.x + self.width
            and self.y < other.y + other.height
            and other.y < self.y + self.height
        )

    def contains(self, other: Rectangle) -> bool:
        """Return whether `other` lies inside this rectangle.

        Args:
            other: Another rectangle.
        """
        return (
            self.x <= other.x
            and self.y <= other.y
            and other.x + other.width <= self.x + self.width
            and other.y + other.height <= self.y + self.height
        )


class Drawing:
    """A drawing of fixed size, to which shapes are added from back to front.

    Args:
        name: Name of the file without its suffix; prefix of ids.
        title: Short title, read by screen readers.
        description: One or two sentences with the content of the drawing, read by screen readers.
        width: Width in pixels.
        height: Height in pixels.
    """

    def __init__(self, name: str, title: str, description: str, width: int, height: int) -> None:
        self.name = name
        self.title = title
        self.description = description
        self.frame = Rectangle(0, 0, width, height)
        self._shapes: list[str] = []
        self._texts: list[tuple[str, Rectangle]] = []
        self._boxes: list[tuple[str, Rectangle]] = []
        self._segments: list[Rectangle] = []
        self._outside: list[str] = []

    def group(self, x: float, y: float, width: float, height: float, label: str) -> None:
        """Add a frame around what follows, with a label in its upper left corner.

        Args:
            x: Left edge in pixels.
            y: Upper edge in pixels.
            width: Width in pixels.
            height: Height in pixels.
            label: Text of the label.
        """
        self._rectangle("group", x, y, width, height, 10)
        self.text(x + 14, y + 24, label, "label", "start")

    def box(self, x: float, y: float, width: float, lines: Sequence[tuple[str, str]], kind: str = "box") -> None:
        """Add a box that is as high as its lines need.

        Args:
            x: Left edge in pixels.
            y: Upper edge in pixels.
            width: Width in pixels.
            lines: (class, text) of each line; classes are name, code, note and label.
            kind: Class of the box: box, data or optional.
        """
        rectangle = Rectangle(x, y, width, self.box_height(len(lines)))
        radius = 18 if kind == "data" else 7
        self._rectangle(kind, x, y, width, rectangle.height, radius)
        self._boxes.append((lines[0][1], rectangle))
        for index, (style, text) in enumerate(lines):
            bounds = self.text(x + width / 2, y + 25 + LINE_HEIGHT * index, text, style, "middle")
            inner = Rectangle(x + PADDING, y, width - 2 * PADDING, rectangle.height)
            if not inner.contains(bounds):
                self._outside.append(text)

    @staticmethod
    def box_height(lines: int) -> float:
        """Return the height in pixels of a box.

        Args:
            lines: Number of its lines.
        """
        return 18 + LINE_HEIGHT * lines

    def arrow(self, *points: tuple[float, float]) -> None:
        """Add a line with horizontal and vertical segments and a head at its end.

        Args:
            *points: (x, y) of the start, the corners and the end, in pixels.
        """
        path = " ".join(f"{'L' if index else 'M'}{x:g} {y:g}" for index, (x, y) in enumerate(points))
        self._shapes.append(f'<path class="arrow" d="{path}" marker-end="url(#{self.name}-head)"/>')
        for (x1, y1), (x2, y2) in itertools.pairwise(points):
            self._segments.append(Rectangle(min(x1, x2) - 1, min(y1, y2) - 1, abs(x2 - x1) + 2, abs(y2 - y1) + 2))

    def text(self, x: float, y: float, text: str, style: str = "note", anchor: str = "start") -> Rectangle:
        """Add a line of text, and return an upper estimate of its bounds.

        Args:
            x: Anchor in pixels.
            y: Baseline in pixels.
            text: The text.
            style: Class: name, code, note or label.
            anchor: Part of the text that lies at `x`: start, middle or end.
        """
        width = CHARACTER_WIDTH[style] * len(text)
        left = x - {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor] * width
        bounds = Rectangle(left, y - 13, width, 17)
        place = "" if anchor == "start" else f' text-anchor="{anchor}"'
        self._shapes.append(f'<text class="{style}" x="{x:g}" y="{y:g}"{place}>{escape(text)}</text>')
        self._texts.append((text, bounds))
        return bounds

    def _rectangle(self, kind: str, x: float, y: float, width: float, height: float, radius: float) -> None:
        size = f'width="{width:g}" height="{height:g}"'
        self._shapes.append(f'<rect class="{kind}" x="{x:g}" y="{y:g}" {size} rx="{radius:g}"/>')

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each text or box that another text, box or line overlaps, or that leaves its frame."""
        for text in self._outside:
            yield f"{text!r} is wider than its box"
        for index, (text, bounds) in enumerate(self._texts):
            if not self.frame.contains(bounds):
                yield f"{text!r} leaves the drawing"
            for other, its_bounds in self._texts[index + 1 :]:
                if bounds.overlaps(its_bounds):
                    yield f"{text!r} overlaps {other!r}"
            if any(bounds.overlaps(segment) for segment in self._segments):
                yield f"a line crosses {text!r}"
        for index, (text, bounds) in enumerate(self._boxes):
            for other, its_bounds in self._boxes[index + 1 :]:
                if bounds.overlaps(its_bounds):
                    yield f"the box {text!r} overlaps the box {other!r}"
            inner = Rectangle(bounds.x + 2, bounds.y + 2, bounds.width - 4, bounds.height - 4)
            if any(inner.overlaps(segment) for segment in self._segments):
                yield f"a line crosses the box {text!r}"

    def svg(self) -> str:
        """Return the text of the SVG file."""
        width, height, name = f"{self.frame.width:g}", f"{self.frame.height:g}", self.name
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" class="drawing" viewBox="0 0 {width} {height}" '
                f'width="{width}" height="{height}" role="img" aria-labelledby="{name}-title {name}-description">',
                f'<title id="{name}-title">{escape(self.title)}</title>',
                f'<desc id="{name}-description">{escape(self.description)}</desc>',
                f"<style>{STYLE}</style>",
                f'<defs><marker id="{name}-head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
                'markerHeight="7" orient="auto"><path class="head" d="M0 0L10 5L0 10z"/></marker></defs>',
                *self._shapes,
                "</svg>\n",
            ]
        )
