"""Tables and a bar chart of the results of benchmarks/compare.py."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

from benchmarks.compare_stages import OURS, THEIRS

Report = Mapping[str, Any]  # result of `Comparison.report`
TOLERANCE = 1e-3  # largest difference of float32 results at the published size, relative to the largest value
FULL_STEPS = 100  # steps of the decoder in the specification
# Ratio of the reference's seconds to ours that is aimed at, by stage and dtype.
TARGETS = {
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
    """Return a Markdown table with right-aligned columns except the first.

    Args:
        head: Headings.
        rows: Cells of each row.
    """
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def find(report: Report, stage: str, dtype: str, library: str) -> dict[str, Any] | None:
    """Return the measurements of one stage, dtype and library, or None.

    Args:
        report: Result of `Comparison.report`.
        stage: Name of the stage.
        dtype: Name of the dtype.
        library: OURS or THEIRS.
    """
    key = {"stage": stage, "dtype": dtype, "library": library}
    return next((r for r in report["records"] if {name: r[name] for name in key} == key), None)


def pairs(report: Report, dtype: str) -> Iterator[tuple[str, dict[str, Any] | None, dict[str, Any]]]:
    """Yield the stages of one dtype with the measurements of the reference (None without them) and of ours.

    Args:
        report: Result of `Comparison.report`.
        dtype: Name of the dtype.
    """
    for record in report["records"]:
        if record["dtype"] == dtype and record["library"] == OURS and record["seconds"]:
            yield record["stage"], find(report, record["stage"], dtype, THEIRS), record


def times_as_fast(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> float:
    """Return the median of the rounds' ratios of seconds.

    Args:
        theirs: Measurements of the reference.
        ours: Measurements of kandinsky22.
    """
    return statistics.median(a / b for a, b in zip(theirs["seconds"], ours["seconds"], strict=True))


def total_seconds(report: Report, dtype: str, library: str) -> float | None:
    """Return the seconds of text to image with all steps of the specification, the sum of the stages' medians.

    Args:
        report: Result of `Comparison.report`.
        dtype: Name of the dtype.
        library: OURS or THEIRS.

    Returns:
        Seconds, or None if a stage was not measured.
    """
    records = [find(report, stage, dtype, library) for stage in ("prior", "step", "decode")]
    if any(record is None or not record["seconds"] for record in records):
        return None
    prior, step, decode = (statistics.median(record["seconds"]) for record in records if record is not None)
    return prior + FULL_STEPS * step + decode


def wrong_stages(report: Report) -> list[str]:
    """Return the names of the stages whose float32 results differ.

    Args:
        report: Result of `Comparison.report`.
    """
    return [
        entry["stage"]
        for entry in report["differences"]
        if entry["dtype"] == "fp32" and not entry["difference"] <= TOLERANCE
    ]


def markdown(report: Report) -> str:
    """Return the report in Markdown.

    Args:
        report: Result of `Comparison.report`.
    """
    parts = [_head(report)]
    for dtype in report["options"]["dtype"]:
        if list(pairs(report, dtype)):
            parts += [f"## {dtype}", _times(report, dtype), _memory(report, dtype), _arithmetic(report, dtype)]
    if report["switches"]:
        parts += ["## One optimisation off at a time", _switches(report)]
    if report["left_out"]:
        parts.append("Left out: " + "; ".join(report["left_out"]) + ".")
    return "\n\n".join(part for part in parts if part) + "\n"


def page(report: Report) -> str:
    """Return the report as a Markdown page that shows the bar chart.

    Args:
        report: Result of `Comparison.report`.
    """
    return f"# Comparison with the reference\n\n![Seconds per stage](compare.svg)\n\n{markdown(report)}"


def _head(report: Report) -> str:
    options, about = report["options"], report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    load = "" if about["load"] is None else f", load average at the start {about['load']:.1f}"
    device = about["processor"] if options["device"] == "cpu" else options["device"]
    modes = [f"{options['prior_steps']} prior steps"]
    modes += [f"--{name} {options[name]}" for name in ("compile", "quantize", "caching") if options[name] is not None]
    return (
        f"{device}, {options['threads']} of {about['cores']} cores, {about['memory_gib']} GiB{load}; {versions}. "
        f"{options['config'].capitalize()} config, {options['towers']} CLIP towers, "
        f"{options['size']} x {options['size']}, {', '.join(modes)}; {report['elapsed'] / 60:.0f} minutes."
    )


def _seconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _median(record: Mapping[str, Any] | None) -> str:
    return "" if record is None else _seconds(statistics.median(record["seconds"]))


def _busy(record: Mapping[str, Any] | None, threads: int) -> str:
    """Return the share of the cores' time that the worker received in its worst round."""
    if record is None or not record["cpu"]:
        return ""
    return f"{100 * min(c / s for c, s in zip(record['cpu'], record['seconds'], strict=True)) / threads:.0f} %"


def _title(stage: str, options: Mapping[str, Any]) -> str:
    steps = f", {options['steps']} steps"
    suffixes = {"picture": steps, "low-memory": steps, "fast": f" (`{options['quality']}`)"}
    return NAMES[stage] + suffixes.get(stage, "")


def _times(report: Report, dtype: str) -> str:
    options, rows = report["options"], []
    differences = {entry["stage"]: entry for entry in report["differences"] if entry["dtype"] == dtype}
    for stage, theirs, ours in pairs(report, dtype):
        difference = differences.get(stage, {})
        ratio = "" if theirs is None else f"{times_as_fast(theirs, ours):.2f}"
        target = TARGETS.get((stage, dtype))
        if stage == "fast" and (reference := total_seconds(report, "fp32", THEIRS)) is not None:
            ratio = f"{reference / statistics.median(ours['seconds']):.1f} (reference: fp32, {FULL_STEPS} steps)"
        if stage == "load" and theirs is not None:
            both = [{"seconds": record["import"]} for record in (theirs, ours)]
            rows.append(["import", *map(_median, both), f"{times_as_fast(*both):.2f}", *[""] * 5])
        rows.append(
            [
                _title(stage, options),
                _median(theirs),
                _median(ours),
                ratio,
                "" if target is None else f"{target:g}",
                f"{difference['difference']:.1e}" if difference else "",
                f"{difference['their_error']:.1e}, {difference['our_error']:.1e}" if "our_error" in difference else "",
                str(len(ours["seconds"])),
                ", ".join(filter(None, (_busy(theirs, options["threads"]), _busy(ours, options["threads"])))),
            ]
        )
    theirs_total, ours_total = (total_seconds(report, dtype, library) for library in (THEIRS, OURS))
    if theirs_total is not None and ours_total is not None:
        name = f"text to image, {FULL_STEPS} steps, sum of the above"
        ratio = f"{theirs_total / ours_total:.2f}"
        rows.append([name, _seconds(theirs_total), _seconds(ours_total), ratio, "", "", "", "", ""])
    head = [
        "",
        "reference, s",
        "kandinsky22, s",
        "times as fast",
        "target",
        "difference",
        "errors to fp32: theirs, ours",
    ]
    return table([*head, "rounds", "CPU utilisation"], rows)


def _memory(report: Report, dtype: str) -> str:
    def peaks(record: Mapping[str, Any] | None) -> str:
        return "" if record is None else " + ".join(f"{peak:.2f}" for peak in record["peaks"])

    def own_memory(record: Mapping[str, Any] | None) -> str:
        return "" if record is None else f"{record['own_memory']:.2f}"

    rows = [
        [_title(stage, report["options"]), peaks(theirs), peaks(ours), own_memory(theirs), own_memory(ours)]
        for stage, theirs, ours in pairs(report, dtype)
    ]
    notes = []
    for stage, theirs, ours in pairs(report, dtype):
        if stage == "picture" and theirs is not None:
            share = max(ours["peaks"]) / sum(theirs["peaks"])
            notes.append(f"Our peak is {share:.2f} of the sum of the reference's two pipelines (target: 0.33).")
        elif stage == "low-memory":
            notes.append(f"The low-memory peak is {max(ours['peaks']) * 2**30 / 1e9:.1f} GB (target: 2.5).")
    head = ["peak memory, GiB", "reference", "kandinsky22", "own memory: reference", "kandinsky22"]
    return "\n\n".join([table(head, rows), *filter(None, [" ".join(notes)])])


def _arithmetic(report: Report, dtype: str) -> str:
    peak = {
        kind: max(entry[kind] for entry in report["peaks"] if entry["dtype"] == dtype)
        for kind in ("convolution", "product")
    }
    rows, notes = [], []
    for stage, *records in pairs(report, dtype):
        for record in records:
            if record is None or not record.get("operations"):
                continue
            count, elapsed = record["operations"], statistics.median(record["seconds"])
            least = sum(count[kind] / peak[kind] for kind in peak)
            rows.append(
                [
                    f"{NAMES[stage]}, {record['library']}",
                    f"{count['convolution'] / 1e12:.3g}",
                    f"{count['product'] / 1e12:.3g}",
                    _seconds(least),
                    _seconds(elapsed),
                    f"{100 * least / elapsed:.0f} %",
                ]
            )
        theirs, ours = records
        if stage in ("step", "decode") and theirs is not None and theirs.get("operations") and ours is not None:
            least = sum(theirs["operations"].values()) / peak["convolution"]
            ratio = statistics.median(ours["seconds"]) / least
            notes.append(f"- {NAMES[stage]}: {_seconds(least)} s; ours takes {ratio:.2f} times that")
    if not rows:
        return ""
    head = [
        "operations executed",
        "convolutions, TFLOP",
        "matrix products, TFLOP",
        "time at both peaks, s",
        "elapsed, s",
        "share",
    ]
    speeds = " and ".join(f"{peak[kind] / 1e9:.0f} GFLOP/s for {kind}s" for kind in peak)
    parts = [table(head, rows), f"The peaks are {speeds}."]
    if notes:
        parts[-1] += " At the convolution peak, the reference's arithmetic takes:"
        parts.append(";\n".join(notes) + ".")
    return "\n\n".join(parts)


def _switches(report: Report) -> str:
    rows = []
    for entry in report["switches"]:
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


# Bar chart


WIDTH, LEFT, ROW = 760, 290, 46
COLOURS = {THEIRS: "#9aa5b1", OURS: "#2f6fdf"}


def drawing(report: Report) -> str:
    """Return an SVG bar chart of the seconds per stage; the longest bar of each stage has the full width.

    Args:
        report: Result of `Comparison.report`.
    """
    shapes: list[str] = []

    def text(x: float, y: float, words: str, **options: str) -> None:
        attributes = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in options.items())
        shapes.append(f'<text x="{x:.0f}" y="{y:.0f}"{attributes}>{escape(words)}</text>')

    top = 30.0
    for index, library in enumerate((THEIRS, OURS)):
        shapes.append(f'<rect x="{LEFT + 150 * index}" y="8" width="12" height="12" fill="{COLOURS[library]}"/>')
        text(LEFT + 150 * index + 18, 18, library)
    for dtype in report["options"]["dtype"]:
        for stage, *records in pairs(report, dtype):
            top = _bars(shapes, text, top, f"{_title(stage, report['options'])}, {dtype}", records)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{top:.0f}" viewBox="0 0 {WIDTH} {top:.0f}" '
        'font-family="sans-serif" font-size="13">\n'
        f'<rect width="{WIDTH}" height="{top:.0f}" fill="white"/>\n' + "\n".join(shapes) + "\n</svg>\n"
    )


def _bars(
    shapes: list[str], text: Callable[..., None], top: float, name: str, records: Sequence[Mapping[str, Any] | None]
) -> float:
    """Append the bars of one stage, and return the top of the next one."""
    medians = [(record["library"], statistics.median(record["seconds"])) for record in records if record is not None]
    longest = max(seconds for _, seconds in medians)
    text(LEFT - 10, top + ROW / 2, name, text_anchor="end")
    for index, (library, seconds) in enumerate(medians):
        y, width = top + 6 + 18 * index, (WIDTH - LEFT - 80) * seconds / longest
        shapes.append(f'<rect x="{LEFT}" y="{y:.0f}" width="{width:.1f}" height="15" fill="{COLOURS[library]}"/>')
        text(LEFT + width + 6, y + 12, f"{_seconds(seconds)} s")
    return top + ROW
