"""Curves of the samplers benchmark. They need matplotlib, which is part of the extra `bench`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.sampler_cells import KINDS, SPECIFICATION, Cell, grid
from benchmarks.sampler_report import Find, Rows, decoder_rows, distance_rows, prior_rows, share
from kandinsky22.sampling.presets import PRESETS

# Palette of Okabe and Ito (2008), which is suitable for colour-blind readers; markers are redundant to colours.
BLACK, BLUE, SKY, GREEN = "#000000", "#0072B2", "#56B4E9", "#009E73"
ORANGE, RED, PINK = "#E69F00", "#D55E00", "#CC79A7"
STYLES: dict[str, tuple[str, str]] = {
    "DDPM (specification)": (BLACK, "o"),
    "UnCLIP (specification)": (BLACK, "o"),
    "DPM++ 2M": (BLUE, "s"),
    "UniPC": (RED, "^"),
    "DDIM": (GREEN, "D"),
    "DPM++ 2M SDE": (SKY, "P"),
    "Euler ancestral": (ORANGE, "X"),
    "Heun": (PINK, "v"),
    "KDPM2": (PINK, "<"),
    "DEIS": (SKY, ">"),
    "LMS": (ORANGE, "p"),
    "PNDM": (BLACK, "*"),
    "Euler": (GREEN, "h"),
    "DPM++ 2S": (BLUE, "x"),
}
SETTINGS = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.hashsalt": "kandinsky22",  # the same curves give the same file
    "figure.constrained_layout.use": True,
}


def draw_curves(find: Find, folder: Path, suffix: str = "svg") -> list[Path]:
    """Draw all curves that have points.

    Args:
        find: Function that returns a measurement.
        folder: Folder for the files.
        suffix: File format.

    Returns:
        Paths of the files.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    drawings: dict[str, Callable[[Any, Find], bool]] = {
        "success": _draw_success,
        "distance": _draw_distance,
        "time": _draw_time,
    }
    paths = []
    for name, draw in drawings.items():
        with plt.rc_context(SETTINGS):
            figure = plt.figure(figsize=(9.2, 4.6), facecolor="white")
            if draw(figure, find):
                paths.append(folder / f"samplers-{name}.{suffix}")
                figure.savefig(paths[-1], dpi=110, metadata={"Date": None} if suffix == "svg" else None)
            plt.close(figure)
    return paths


def _lines(axes: Any, rows: Rows, value: Callable[[Mapping[str, Any]], float]) -> None:
    """Draw one curve per sampler, except samplers with a single point, which are in the table."""
    for name, points in rows.items():
        if len(points) > 1:
            color, marker = STYLES[name]
            dashed = "--" if KINDS[name].draws_noise else "-"
            xs, ys = [number for number, _ in points], [value(record) for _, record in points]
            axes.plot(xs, ys, dashed, color=color, marker=marker, markersize=6, linewidth=1.6, label=name)


def _steps_axis(axes: Any, rows: Rows, label: str) -> None:
    numbers = [float(number) for points in rows.values() if len(points) > 1 for number, _ in points]
    _log_axis(axes, numbers, (2, 3, 4, 6, 8, 12, 25, 50, 100), "")
    axes.set_xlabel(label)


def _log_axis(axes: Any, numbers: Sequence[float], ticks: Sequence[float], unit: str) -> None:
    """Make the axis logarithmic, with ticks near the range of `numbers`."""
    shown = [tick for tick in ticks if numbers and min(numbers) * 0.8 <= tick <= max(numbers) * 1.2]
    axes.set_xscale("log")
    axes.set_xticks(shown, [f"{tick:g}{unit}" for tick in shown])
    axes.set_xticks([], minor=True)


def _percent(record: Mapping[str, Any]) -> float:
    return 100 * share(record).value


def _success_axis(axes: Any, find: Find) -> None:
    """Scale the axis to resolve high percentages, and show the specification's defaults as a band of one point."""
    axes.set_yscale("function", functions=(lambda y: -((101 - y) ** 0.5), lambda z: 101 - z**2))
    ticks = [0, 25, 50, 70, 80, 90, 95, 98, 100]
    axes.set_yticks(ticks, [f"{tick} %" for tick in ticks])
    axes.set_ylabel("fraction of right images")
    base = find("success", Cell.of(SPECIFICATION))
    if base is not None:
        axes.axhspan(_percent(base) - 1, min(100, _percent(base) + 1), color="#000000", alpha=0.08, linewidth=0)
    values = [line.get_ydata().min() for line in axes.get_lines()]
    axes.set_ylim(max(0, min(values, default=0) - 5), 100)


def _draw_success(figure: Any, find: Find) -> bool:
    decoder, prior = decoder_rows(find), prior_rows(find)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2), sharey=True)
    for axes, rows, stage in ((left, decoder, "decoder"), (right, prior, "prior")):
        _lines(axes, rows, _percent)
        _success_axis(axes, find)
        _steps_axis(axes, rows, f"network evaluations of the {stage}")
        if axes.get_lines():
            axes.legend(loc="lower right")
    left.set_title("decoder (prior: 25 steps)", fontsize=10)
    right.set_title("prior (decoder: DPM++ 2M, 12 steps)", fontsize=10)
    right.set_ylabel("")
    return bool(decoder or prior)


def _draw_distance(figure: Any, find: Find) -> bool:
    rows = distance_rows(find)
    axes = figure.subplots()
    _lines(axes, rows, lambda record: record["distance"])
    _steps_axis(axes, rows, "network evaluations of the decoder")
    axes.set_yscale("log")
    axes.set_ylabel("relative distance to the solution")
    if not axes.get_lines():
        return False
    low, high = axes.get_ylim()
    for order, start in ((1, high * 0.75), (2, high * 0.3)):
        axes.plot([8, 50], [start, start * (8 / 50) ** order], ":", color="#888888", linewidth=1.2)
        middle = (20, start * (8 / 20) ** order)
        axes.annotate(f"order {order}", middle, (4, 4), textcoords="offset points", color="#666666")
    axes.set_ylim(low, high)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return True


def _draw_time(figure: Any, find: Find) -> bool:
    axes = figure.subplots()
    spots: dict[str, tuple[float, float]] = {}
    for name, preset in {"specification": SPECIFICATION, **PRESETS}.items():
        record, timed = find("success", Cell.of(preset)), find("time", Cell.of(preset))
        if record is not None and timed is not None:
            spots[name] = timed["median"], _percent(record)
    pairs = [(find("success", cell), find("time", cell)) for cells in grid().values() for cell in cells]
    points = [
        (timed["median"], _percent(record)) for record, timed in pairs if record is not None and timed is not None
    ]
    if not points:
        return False
    axes.plot(*zip(*points, strict=True), "o", color="#AAAAAA", markersize=5, label="all cells")
    for (name, (x, y)), color in zip(spots.items(), (BLACK, ORANGE, BLUE, GREEN), strict=False):
        axes.plot([x], [y], "*", color=color, markersize=16, markeredgecolor="white")
        axes.annotate(name, (x, y), (0, 11), textcoords="offset points", ha="center", weight="bold")
    _success_axis(axes, find)
    _log_axis(axes, [x for x, _ in points], (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10), " s")
    axes.set_xlabel("time from a prompt to an image")
    axes.legend(loc="lower right")
    return True
