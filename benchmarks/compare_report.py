"""Tables and a drawing of what benchmarks/compare.py found."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

from benchmarks.compare_stages import OURS, THEIRS

Found = Mapping[str, Any]
TOLERANCE = 1e-3  # of float32 results at the published size, relative to the largest number
FULL_STEPS = 100  # of the decoder, as the specification has it
# What is aimed at: times as fast as the reference
WANTED = {
    ("load", "fp32"): 3.0,
    ("prior", "fp32"): 10.0,
    ("prior", "bf16"): 8.0,
    ("step", "fp32"): 1.3,
    ("step", "bf16"): 1.25,
    ("decode", "fp32"): 1.6,
    ("decode", "bf16"): 1.8,
    ("picture", "fp32"): 1.35,
    ("fast", "bf16"): 15.0,
}
NAMES = {
    "load": "load both pipelines",
    "text": "text encoding",
    "prior": "prior",
    "step": "guided UNet step",
    "decode": "MoVQ decode",
    "picture": "text to image",
    "low-memory": "text to image, low memory",
    "fast": "text to image, fast",
}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def find(found: Found, stage: str, dtype: str, library: str) -> dict[str, Any] | None:
    """The record of one stage, type and library."""
    wanted = {"stage": stage, "dtype": dtype, "library": library}
    return next((r for r in found["records"] if {name: r[name] for name in wanted} == wanted), None)


def pairs(found: Found, dtype: str) -> Iterator[tuple[str, dict[str, Any] | None, dict[str, Any]]]:
    """Stages of one type, each with the reference's record, if it takes part, and ours."""
    for record in found["records"]:
        if record["dtype"] == dtype and record["library"] == OURS and record["seconds"]:
            yield record["stage"], find(found, record["stage"], dtype, THEIRS), record


def times_as_fast(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> float:
    """The median of the ratios of each round."""
    return statistics.median(a / b for a, b in zip(theirs["seconds"], ours["seconds"], strict=True))


def whole(found: Found, dtype: str, library: str) -> float | None:
    """Seconds of text to image with all steps of the specification, put together from the stages' medians."""
    records = [find(found, stage, dtype, library) for stage in ("prior", "step", "decode")]
    if any(record is None or not record["seconds"] for record in records):
        return None
    prior, step, decode = (statistics.median(record["seconds"]) for record in records if record is not None)
    return prior + FULL_STEPS * step + decode


def wrong(found: Found) -> list[str]:
    """Stages whose float32 results differ."""
    return [
        entry["stage"]
        for entry in found["differences"]
        if entry["dtype"] == "fp32" and not entry["difference"] <= TOLERANCE
    ]


def markdown(found: Found) -> str:
    """The whole report."""
    parts = [_head(found)]
    for dtype in found["asked"]["dtype"]:
        if list(pairs(found, dtype)):
            parts += [f"## {dtype}", _times(found, dtype), _memory(found, dtype), _arithmetic(found, dtype)]
    if found["switches"]:
        parts += ["## One optimisation off at a time", _switches(found)]
    if found["left_out"]:
        parts.append("Left out: " + "; ".join(found["left_out"]) + ".")
    return "\n\n".join(part for part in parts if part) + "\n"


def page(found: Found) -> str:
    """The report as a page, beside the drawing."""
    picture = "![Seconds of each stage](compare.svg)"
    return f"# Ours against the reference: measured\n\n{picture}\n\n{markdown(found)}"


def _head(found: Found) -> str:
    asked, about = found["asked"], found["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    load = "" if about["load"] is None else f", load average at the start {about['load']:.1f}"
    place = about["processor"] if asked["device"] == "cpu" else asked["device"]
    modes = [f"{asked['prior_steps']} steps of the prior"]
    modes += [f"--{name} {asked[name]}" for name in ("compile", "quantize", "caching") if asked[name] is not None]
    return (
        f"{place}, {asked['threads']} of {about['cores']} cores, {about['memory_gib']} GiB{load}; {versions}. "
        f"Config {asked['config']}, {asked['towers']} CLIP towers, {asked['size']} x {asked['size']}, "
        f"{', '.join(modes)}; {found['elapsed'] / 60:.0f} minutes."
    )


def _seconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _middle(record: Mapping[str, Any] | None) -> str:
    return "" if record is None else _seconds(statistics.median(record["seconds"]))


def _busy(record: Mapping[str, Any] | None, threads: int) -> str:
    """The part of the cores' time that the worker had, in its worst round."""
    if record is None or not record["cpu"]:
        return ""
    return f"{100 * min(c / s for c, s in zip(record['cpu'], record['seconds'], strict=True)) / threads:.0f} %"


def _title(stage: str, asked: Mapping[str, Any]) -> str:
    more = {"picture": f", {asked['steps']} steps", "low-memory": f", {asked['steps']} steps"}
    more["fast"] = f" (`{asked['quality']}`)"
    return NAMES[stage] + more.get(stage, "")


def _times(found: Found, dtype: str) -> str:
    asked, rows = found["asked"], []
    different = {e["stage"]: e for e in found["differences"] if e["dtype"] == dtype}
    for stage, theirs, ours in pairs(found, dtype):
        about = different.get(stage, {})
        ratio = "" if theirs is None else f"{times_as_fast(theirs, ours):.2f}"
        wanted = WANTED.get((stage, dtype))
        if stage == "fast" and (reference := whole(found, "fp32", THEIRS)) is not None:
            ratio = f"{reference / statistics.median(ours['seconds']):.1f} (reference: fp32, {FULL_STEPS} steps)"
        if stage == "load" and theirs is not None:
            both = [{"seconds": record["import"]} for record in (theirs, ours)]
            rows.append(["import", *map(_middle, both), f"{times_as_fast(*both):.2f}", *[""] * 5])
        rows.append(
            [
                _title(stage, asked),
                _middle(theirs),
                _middle(ours),
                ratio,
                "" if wanted is None else f"{wanted:g}",
                f"{about['difference']:.1e}" if about else "",
                f"{about['their_error']:.1e}, {about['our_error']:.1e}" if "our_error" in about else "",
                str(len(ours["seconds"])),
                ", ".join(filter(None, (_busy(theirs, asked["threads"]), _busy(ours, asked["threads"])))),
            ]
        )
    computed = [whole(found, dtype, library) for library in (THEIRS, OURS)]
    if computed[0] is not None and computed[1] is not None:
        name = f"text to image, {FULL_STEPS} steps, put together from the above"
        rows.append([name, *map(_seconds, computed), f"{computed[0] / computed[1]:.2f}", "", "", "", "", ""])
    head = ["", "reference, s", "kandinsky22, s", "times as fast", "aim", "difference", "errors to fp32: theirs, ours"]
    return table([*head, "rounds", "cores had"], rows)


def _memory(found: Found, dtype: str) -> str:
    def peaks(record: Mapping[str, Any] | None) -> str:
        return "" if record is None else " + ".join(f"{peak:.2f}" for peak in record["peaks"])

    def own(record: Mapping[str, Any] | None) -> str:
        return "" if record is None else f"{record['own']:.2f}"

    rows = [
        [_title(stage, found["asked"]), peaks(theirs), peaks(ours), own(theirs), own(ours)]
        for stage, theirs, ours in pairs(found, dtype)
    ]
    notes = []
    for stage, theirs, ours in pairs(found, dtype):
        if stage == "picture" and theirs is not None:
            part = max(ours["peaks"]) / sum(theirs["peaks"])
            notes.append(f"Ours takes {part:.2f} of what the reference's two pipelines take together (aim: 0.33).")
        elif stage == "low-memory":
            notes.append(f"Low memory: {max(ours['peaks']) * 2**30 / 1e9:.1f} GB (aim: 2.5).")
    head = ["peak memory, GiB", "reference", "kandinsky22", "of it own: reference", "kandinsky22"]
    return "\n\n".join([table(head, rows), *filter(None, [" ".join(notes)])])


def _arithmetic(found: Found, dtype: str) -> str:
    peak = {
        kind: max(entry[kind] for entry in found["peaks"] if entry["dtype"] == dtype)
        for kind in ("convolution", "product")
    }
    rows, notes = [], []
    for stage, *records in pairs(found, dtype):
        for record in records:
            if record is None or not record.get("operations"):
                continue
            count, middle = record["operations"], statistics.median(record["seconds"])
            floor = sum(count[kind] / peak[kind] for kind in peak)
            rows.append(
                [
                    f"{NAMES[stage]}, {record['library']}",
                    f"{count['convolution'] / 1e12:.3g}",
                    f"{count['product'] / 1e12:.3g}",
                    _seconds(floor),
                    _seconds(middle),
                    f"{100 * floor / middle:.0f} %",
                ]
            )
        if stage in ("step", "decode") and records[0] is not None and records[0].get("operations"):
            least = sum(records[0]["operations"].values()) / peak["convolution"]
            ratio = statistics.median(records[1]["seconds"]) / least
            name = f"{NAMES[stage]}: the reference's arithmetic at the convolution peak"
            notes.append(f"{name} takes {_seconds(least)} s, of which ours takes {ratio:.2f} times")
    if not rows:
        return ""
    head = [
        "arithmetic executed",
        "convolutions, TFLOP",
        "products, TFLOP",
        "at both peaks, s",
        "took, s",
        "share",
    ]
    speeds = " and ".join(f"{peak[kind] / 1e9:.0f} GFLOP/s of {kind}s" for kind in peak)
    return "\n\n".join([table(head, rows), "; ".join([f"Peaks: {speeds}", *notes]) + "."])


def _switches(found: Found) -> str:
    rows = []
    for entry in found["switches"]:
        slower = statistics.median(off / on for on, off in zip(entry["on_seconds"], entry["off_seconds"], strict=True))
        rows.append(
            [
                f"{entry['off']}, {NAMES[entry['stage']]}, {entry['dtype']}",
                _seconds(statistics.median(entry["on_seconds"])),
                _seconds(statistics.median(entry["off_seconds"])),
                f"{slower:.2f}",
                f"{entry['difference']:.1e}",
            ]
        )
    return table(["off", "all on, s", "off, s", "times as long", "difference"], rows)


# A drawing


WIDTH, LEFT, ROW = 760, 290, 46
COLOURS = {THEIRS: "#9aa5b1", OURS: "#2f6fdf"}


def drawing(found: Found) -> str:
    """Bars in SVG: seconds of each stage, the longer one of two being as long as the others' longer ones."""
    shapes: list[str] = []

    def text(x: float, y: float, words: str, **options: str) -> None:
        more = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in options.items())
        shapes.append(f'<text x="{x:.0f}" y="{y:.0f}"{more}>{escape(words)}</text>')

    top = 30.0
    for place, library in enumerate((THEIRS, OURS)):
        shapes.append(f'<rect x="{LEFT + 150 * place}" y="8" width="12" height="12" fill="{COLOURS[library]}"/>')
        text(LEFT + 150 * place + 18, 18, library)
    for dtype in found["asked"]["dtype"]:
        for stage, *records in pairs(found, dtype):
            top = _bars(shapes, text, top, f"{_title(stage, found['asked'])}, {dtype}", records)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{top:.0f}" viewBox="0 0 {WIDTH} {top:.0f}" '
        'font-family="sans-serif" font-size="13">\n'
        f'<rect width="{WIDTH}" height="{top:.0f}" fill="white"/>\n' + "\n".join(shapes) + "\n</svg>\n"
    )


def _bars(
    shapes: list[str], text: Callable[..., None], top: float, name: str, records: Sequence[Mapping[str, Any] | None]
) -> float:
    """One stage's bars; where the next one's begin."""
    middles = [(record["library"], statistics.median(record["seconds"])) for record in records if record is not None]
    longest = max(seconds for _, seconds in middles)
    text(LEFT - 10, top + ROW / 2, name, text_anchor="end")
    for place, (library, seconds) in enumerate(middles):
        y, width = top + 6 + 18 * place, (WIDTH - LEFT - 80) * seconds / longest
        shapes.append(f'<rect x="{LEFT}" y="{y:.0f}" width="{width:.1f}" height="15" fill="{COLOURS[library]}"/>')
        text(LEFT + width + 6, y + 12, f"{_seconds(seconds)} s")
    return top + ROW
