"""Tables of the samplers benchmark, which are written into the documentation between markers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.embedded_prompts import Share
from benchmarks.sampler_cells import (
    DECODER_STEPS,
    DISTANCE_STEPS,
    KINDS,
    MIDDLE,
    PRIOR_STEPS,
    SPECIFICATION,
    Cell,
    grid,
    name_of,
    presets,
)
from kandinsky22.sampling.presets import Preset, Sampler

Find = Callable[[str, Cell], dict[str, Any] | None]
Rows = dict[str, list[tuple[int, dict[str, Any]]]]
PAGE = "samplers-tradeoff.md"
NOT_MEASURED = "Not measured with these weights yet."


def share(record: Mapping[str, Any]) -> Share:
    """Return the share of right images of a cell.

    Args:
        record: Measurement of success.
    """
    return Share(record["right"].count("1"), len(record["right"]))


def difference(record: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, float, float]:
    """Return the difference of two cells' success on the same prompts, with its 95 % confidence interval.

    The interval is that of paired proportions by Bonett and Price (2012, https://doi.org/10.3102/1076998611411919).

    Args:
        record: Measurement of success.
        other: Measurement that it is compared with.

    Returns:
        The difference, the lower and the upper limit.
    """
    pairs = list(zip(record["right"], other["right"], strict=True))
    gained, lost, total = pairs.count(("1", "0")), pairs.count(("0", "1")), len(pairs)
    more, less = (gained + 1) / (total + 2), (lost + 1) / (total + 2)
    spread = 1.96 * math.sqrt((more + less - (more - less) ** 2) / (total + 2))
    return (gained - lost) / total, more - less - spread, more - less + spread


# Measurements by name of the sampler


def decoder_rows(find: Find) -> Rows:
    """Return success by evaluations of the decoder.

    Args:
        find: Function that returns a measurement.
    """
    return _rows(find, "success", DECODER_STEPS, lambda sampler: Cell(sampler), "evaluations")


def prior_rows(find: Find) -> Rows:
    """Return success by evaluations of the prior, with the sampler MIDDLE in the decoder.

    Args:
        find: Function that returns a measurement.
    """
    return _rows(find, "success", PRIOR_STEPS, lambda sampler: Cell(MIDDLE, sampler), "prior_evaluations")


def distance_rows(find: Find) -> Rows:
    """Return distances to the solution by evaluations of the decoder.

    Args:
        find: Function that returns a measurement.
    """
    return _rows(find, "distance", DISTANCE_STEPS, lambda sampler: Cell(sampler), "evaluations")


def _rows(
    find: Find, kind: str, steps: Mapping[str, Sequence[int]], cell: Callable[[Sampler], Cell], axis: str
) -> Rows:
    rows: Rows = {}
    for name, numbers in steps.items():
        records = [find(kind, cell(KINDS[name].steps(number))) for number in numbers]
        if points := sorted((record[axis], record) for record in records if record is not None):
            rows[name] = points
    return rows


# Tables


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return NOT_MEASURED
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _matrix(rows: Rows, show: Callable[[Mapping[str, Any]], str], first: str) -> str:
    """Return a table with one row per sampler and one column per number of evaluations."""
    columns = sorted({number for points in rows.values() for number, _ in points})
    lines = []
    for name, points in rows.items():
        cells = {number: show(record) for number, record in points}
        lines.append([name, *(cells.get(number, "") for number in columns)])
    return _table([first, *map(str, columns)], lines)


def _percent(record: Mapping[str, Any]) -> str:
    return f"{100 * share(record).value:.1f} %"


def _title(sampler: Sampler) -> str:
    return f"{name_of(sampler)}, {sampler.steps} step{'' if sampler.steps == 1 else 's'}"


SPECIFICATION_NAME = "the specification's defaults"


def _named_presets() -> dict[str, Preset]:
    return {f"`{name}`": preset for name, preset in presets().items()}


def preset_table(find: Find) -> str:
    """Return success and time of the presets and of the specification's defaults.

    Args:
        find: Function that returns a measurement.
    """
    base = find("success", Cell.of(SPECIFICATION))
    rows = []
    for name, preset in {SPECIFICATION_NAME: SPECIFICATION, **_named_presets()}.items():
        cell = Cell.of(preset)
        record, timed = find("success", cell), find("time", cell)
        if record is None or base is None:
            continue
        low, high = share(record).interval
        gap, worst, best = (100 * value for value in difference(record, base))
        rows.append(
            [
                name,
                _title(preset.decoder),
                "no step" if preset.guidance_scale == 1 else _guided_steps(preset.guidance_interval),
                _title(preset.prior),
                _guided_steps(preset.prior_guidance_interval),
                f"{_percent(record)} ({100 * low:.1f} to {100 * high:.1f})",
                "" if preset is SPECIFICATION else f"{gap:+.1f} ({worst:+.1f} to {best:+.1f})",
                "" if timed is None else f"{timed['median']:.2f} s",
                "" if timed is None else f"{timed['faster']:.1f}",
                "" if timed is None or "unet_median" not in timed else f"{timed['unet_median']:.3f} s",
            ]
        )
    head = [
        "",
        "decoder",
        "guided",
        "prior",
        "guided",
        "right",
        "difference, points",
        "time per image",
        "times as fast",
        "UNet's part",
    ]
    return _table(head, rows)


def _guided_steps(interval: tuple[float, float] | None) -> str:
    return "all steps" if interval is None else f"{interval[0]:g} to {interval[1]:g}"


def others_table(finds: Mapping[int, Find]) -> str:
    """Return the presets' success on several sets of prompts and on all of them together.

    Args:
        finds: Functions that return measurements, by seed of the prompts.
    """
    base: list[dict[str, Any]] = []
    rows = []
    for name, preset in {SPECIFICATION_NAME: SPECIFICATION, **_named_presets()}.items():
        records = [record for find in finds.values() if (record := find("success", Cell.of(preset))) is not None]
        if len(records) < len(finds):
            continue
        records.append({"right": "".join(record["right"] for record in records)})
        if preset is SPECIFICATION:
            base = records
        if base:
            gap, worst, best = (100 * value for value in difference(records[-1], base[-1]))
            cells = [_percent_and_difference(*pair) for pair in zip(records, base, strict=True)]
            rows.append([name, *cells, "" if records is base else f"{gap:+.2f} ({worst:+.1f} to {best:+.1f})"])
    heads = [f"prompts of seed {seed}" for seed in finds]
    return _table(["", *heads, f"all {len(finds)} sets", "difference on all, points"], rows)


def _percent_and_difference(record: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """Return a share and its difference from that of `base` in points."""
    return _percent(record) + ("" if record is base else f" ({100 * difference(record, base)[0]:+.2f})")


def guidance_table(find: Find) -> str:
    """Return success and time of the sampler MIDDLE with other guidance.

    Args:
        find: Function that returns a measurement.
    """
    base = find("success", Cell(MIDDLE))
    rows = []
    for cell in [Cell(MIDDLE), *grid()["guidance"]]:
        record, timed = find("success", cell), find("time", cell)
        if record is None or base is None:
            continue
        scale = "the model's own scale" if cell.guidance is None else f"scale {cell.guidance:g}"
        options = [f"`{name}={value}`" for name, value in cell.options.items()]
        gap, worst, best = (100 * value for value in difference(record, base))
        rows.append(
            [
                ", ".join([scale, *options]),
                _percent(record),
                "" if record is base else f"{gap:+.1f} ({worst:+.1f} to {best:+.1f})",
                "" if timed is None else f"{timed['median']:.2f} s",
            ]
        )
    return _table([f"{_title(MIDDLE)}, guidance", "right", "difference, points", "time per image"], rows)


def tables(find: Find, others: Mapping[int, Find]) -> dict[str, str]:
    """Return all tables in Markdown, by the name of their markers.

    Args:
        find: Function that returns a measurement of the first set of prompts.
        others: Functions for other sets of prompts, by their seeds.
    """
    return {
        "presets": preset_table(find),
        "others": others_table({0: find, **others}),
        "decoder": _matrix(decoder_rows(find), _percent, "decoder evaluations"),
        "distance": _matrix(distance_rows(find), lambda record: f"{record['distance']:.3g}", "decoder evaluations"),
        "prior": _matrix(prior_rows(find), _percent, "prior evaluations"),
        "guidance": guidance_table(find),
    }


def fill(page: str, name: str, text: str) -> str:
    """Return a page with other text between the markers of a name.

    Args:
        page: Text of the page.
        name: Name of the markers.
        text: Text between them.

    Raises:
        ValueError: The page does not have these markers.
    """
    opening, closing = f"<!-- {name}: written by benchmarks/samplers.py -->", f"<!-- end of {name} -->"
    pattern = re.compile(f"{re.escape(opening)}.*?{re.escape(closing)}", re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"the page has no markers for {name}: {opening} ... {closing}")
    return pattern.sub(lambda _: f"{opening}\n{text}\n{closing}", page)


def write_report(find: Find, others: Mapping[int, Find], docs: Path) -> None:
    """Write the tables into the page, and the curves next to it.

    Args:
        find: Function that returns a measurement of the first set of prompts.
        others: Functions for other sets of prompts, by their seeds.
        docs: Folder of the page.
    """
    from benchmarks.sampler_curves import draw_curves

    path = docs / PAGE
    page = path.read_text(encoding="utf-8")
    for name, text in tables(find, others).items():
        page = fill(page, name, text)
    path.write_text(page, encoding="utf-8")
    for curve in draw_curves(find, docs):
        print(curve)
    print(path)
