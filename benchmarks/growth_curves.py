"""Curves of benchmarks/growth.py. They need matplotlib, which is part of the extra `bench`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.sampler_curves import BLUE, GREEN, ORANGE, RED, SETTINGS

STYLES = {
    "guided UNet step": (BLUE, "o"),
    "MoVQ decode": (ORANGE, "s"),
    "decoder without MoVQ": (GREEN, "D"),
    "prior": (RED, "^"),
}
LABELS = {"size": "side of the image, pixels", "batch": "images per call", "steps": "steps"}


def draw(series: Sequence[tuple[str, str, Sequence[Any]]], path: Path) -> Path:
    """Draw time and working memory over size, batch and steps. Dashed lines are what arithmetic says.

    Args:
        series: Name, axis and points of each series.
        path: File to write.

    Returns:
        The path.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    axes_names = [axis for axis in LABELS if any(entry[1] == axis for entry in series)]
    with plt.rc_context(SETTINGS):
        figure = plt.figure(figsize=(3.1 * max(2, len(axes_names)), 5.6), facecolor="white")
        grid = figure.subplots(2, len(axes_names), sharex="col", squeeze=False)
        for column, axis in enumerate(axes_names):
            chosen = [(name, points) for name, of, points in series if of == axis]
            _curves(grid[0][column], chosen, lambda point: (point.seconds, point.predicted_seconds))
            _curves(grid[1][column], chosen, lambda point: (point.gib, point.predicted_gib))
            _scale_x(grid[1][column], [point.value for _, points in chosen for point in points], LABELS[axis])
            grid[0][column].legend(loc="best", fontsize=8)
        grid[0][0].set_ylabel("seconds")
        grid[1][0].set_ylabel("working memory, GiB")
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
    return path


def _curves(
    axes: Any,
    series: Sequence[tuple[str, Sequence[Any]]],
    values: Callable[[Any], tuple[float | None, float | None]],
) -> None:
    for name, points in series:
        color, marker = STYLES[name]
        for index, (style, options) in enumerate(
            ((marker, {"label": name, "markersize": 6}), ("--", {"linewidth": 1.2, "alpha": 0.8}))
        ):
            shown = [(point.value, values(point)[index]) for point in points]
            shown = [(x, y) for x, y in shown if y is not None and y > 0]
            if shown:
                axes.plot(*zip(*shown, strict=True), style, color=color, **options)
    if axes.get_lines():
        _scale_y(axes)


def _scale_y(axes: Any) -> None:
    """Make the axis logarithmic, over a decade at least: what is constant shall look constant."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    values = [float(value) for line in axes.get_lines() for value in line.get_ydata()]
    low, high = min(values), max(values)
    widening = max(1.3, (10 * low / high) ** 0.5)
    axes.set_yscale("log")
    axes.set_ylim(low / widening, high * widening)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_locator(NullLocator())


def _scale_x(axes: Any, values: Sequence[int], label: str) -> None:
    ticks = sorted(set(values))
    axes.set_xscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel(label)
