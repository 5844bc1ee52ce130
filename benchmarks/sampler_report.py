"""Tables of the samplers' trade-off, written into the documentation between markers, and what curves are drawn from."""

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
)
from kandinsky22.sampling.presets import PRESETS, Sampler

Find = Callable[[str, Cell], dict[str, Any] | None]
Rows = dict[str, list[tuple[int, dict[str, Any]]]]
PAGE = "samplers-tradeoff.md"
NONE_YET = "Not measured with these weights yet."


def share(record: Mapping[str, Any]) -> Share:
    """How many pictures of a cell are right."""
    return Share(record["right"].count("1"), len(record["right"]))


def difference(record: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, float, float]:
    """By how much a cell's success differs from that of another one on the same prompts, and the 95 % interval for
    paired proportions after Bonett & Price 2012 (https://doi.org/10.3102/1076998611411919)."""
    pairs = list(zip(record["right"], other["right"], strict=True))
    gained, lost, total = pairs.count(("1", "0")), pairs.count(("0", "1")), len(pairs)
    more, less = (gained + 1) / (total + 2), (lost + 1) / (total + 2)
    spread = 1.96 * math.sqrt((more + less - (more - less) ** 2) / (total + 2))
    return (gained - lost) / total, more - less - spread, more - less + spread


# What was found, by name of the sampler


def decoder_rows(find: Find) -> Rows:
    """Success over the decoder's evaluations."""
    return _rows(find, "success", DECODER_STEPS, lambda sampler: Cell(sampler), "evaluations")


def prior_rows(find: Find) -> Rows:
    """Success over the prior's evaluations, with the decoder that is used for this."""
    return _rows(find, "success", PRIOR_STEPS, lambda sampler: Cell(MIDDLE, sampler), "prior_evaluations")


def distance_rows(find: Find) -> Rows:
    """Distances to the solution over the decoder's evaluations."""
    return _rows(find, "distance", DISTANCE_STEPS, lambda sampler: Cell(sampler), "evaluations")


def _rows(
    find: Find, kind: str, steps: Mapping[str, Sequence[int]], cell: Callable[[Sampler], Cell], axis: str
) -> Rows:
    rows: Rows = {}
    for name, numbers in steps.items():
        found = [find(kind, cell(KINDS[name].steps(number))) for number in numbers]
        if known := sorted((record[axis], record) for record in found if record is not None):
            rows[name] = known
    return rows


# Tables


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return NONE_YET
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _matrix(rows: Rows, show: Callable[[Mapping[str, Any]], str], first: str) -> str:
    """One line a sampler, one column a number of evaluations."""
    columns = sorted({number for points in rows.values() for number, _ in points})
    lines = []
    for name, points in rows.items():
        known = {number: show(record) for number, record in points}
        lines.append([name, *(known.get(number, "") for number in columns)])
    return _table([first, *map(str, columns)], lines)


def _percent(record: Mapping[str, Any]) -> str:
    return f"{100 * share(record).value:.1f} %"


def _called(sampler: Sampler) -> str:
    return f"{name_of(sampler)}, {sampler.steps} steps"


def preset_table(find: Find) -> str:
    """The presets beside the specification's defaults: success and time."""
    base = find("success", Cell.of(SPECIFICATION))
    rows = []
    for name, preset in {"specification": SPECIFICATION, **PRESETS}.items():
        cell = Cell.of(preset)
        record, timed = find("success", cell), find("time", cell)
        if record is None or base is None:
            continue
        low, high = share(record).interval
        gap, worst, best = (100 * value for value in difference(record, base))
        rows.append(
            [
                f"`{name}`" if name in PRESETS else "the specification's defaults",
                _called(preset.decoder),
                _guided(preset.guidance_interval),
                _called(preset.prior),
                _guided(preset.prior_guidance_interval),
                f"{_percent(record)} ({100 * low:.1f} to {100 * high:.1f})",
                "" if preset is SPECIFICATION else f"{gap:+.1f} ({worst:+.1f} to {best:+.1f})",
                "" if timed is None else f"{timed['median']:.2f} s",
                "" if timed is None else f"{timed['faster']:.1f}",
            ]
        )
    head = ["", "decoder", "guided", "prior", "guided", "right", "points more", "a picture", "times as fast"]
    return _table(head, rows)


def _guided(interval: tuple[float, float] | None) -> str:
    return "all steps" if interval is None else f"{interval[0]:g} to {interval[1]:g}"


def others_table(finds: Mapping[int, Find]) -> str:
    """The presets' success on several sets of prompts, by their seeds, and on all of them together."""
    named = {"the specification's defaults": SPECIFICATION, **{f"`{name}`": preset for name, preset in PRESETS.items()}}
    base: list[dict[str, Any]] = []
    rows = []
    for name, preset in named.items():
        found = [find("success", Cell.of(preset)) for find in finds.values()]
        records = [record for record in found if record is not None]
        if len(records) < len(found):
            continue
        records.append({"right": "".join(record["right"] for record in records)})
        if preset is SPECIFICATION:
            base = records
        if base:
            gap, worst, best = (100 * value for value in difference(records[-1], base[-1]))
            shown = [_beside(*pair) for pair in zip(records, base, strict=True)]
            rows.append([name, *shown, "" if records is base else f"{gap:+.2f} ({worst:+.1f} to {best:+.1f})"])
    heads = [f"prompts of seed {seed}" for seed in finds]
    return _table(["", *heads, f"all {len(finds)} sets", "points more on all"], rows)


def _beside(record: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """A share, and by how many points it differs from the one it is compared with."""
    return _percent(record) + ("" if record is base else f" ({100 * difference(record, base)[0]:+.2f})")


def guidance_table(find: Find) -> str:
    """Success and time of one sampler under other guidance."""
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
    return _table([f"{_called(MIDDLE)}, guidance", "right", "points more", "a picture"], rows)


def tables(find: Find, others: Mapping[int, Find]) -> dict[str, str]:
    """All tables in Markdown, by the name of their place on the page; `others` find what other prompts' seeds gave."""
    return {
        "presets": preset_table(find),
        "others": others_table({0: find, **others}),
        "decoder": _matrix(decoder_rows(find), _percent, "decoder evaluations"),
        "distance": _matrix(distance_rows(find), lambda record: f"{record['distance']:.3g}", "decoder evaluations"),
        "prior": _matrix(prior_rows(find), _percent, "prior evaluations"),
        "guidance": guidance_table(find),
    }


def fill(page: str, name: str, text: str) -> str:
    """The page with `text` between the markers of that name; ValueError where there are none."""
    opening, closing = f"<!-- {name}: written by benchmarks/samplers.py -->", f"<!-- end of {name} -->"
    pattern = re.compile(f"{re.escape(opening)}.*?{re.escape(closing)}", re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"the page has no place for {name}: {opening} ... {closing}")
    return pattern.sub(lambda _: f"{opening}\n{text}\n{closing}", page)


def write_report(find: Find, others: Mapping[int, Find], docs: Path) -> None:
    """Write tables into the page in `docs`, and curves beside it."""
    from benchmarks.sampler_curves import draw_curves

    path = docs / PAGE
    page = path.read_text(encoding="utf-8")
    for name, text in tables(find, others).items():
        page = fill(page, name, text)
    path.write_text(page, encoding="utf-8")
    for drawn in draw_curves(find, docs):
        print(drawn)
    print(path)
