"""Tables of the results of benchmarks/commands.py."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.compare_report import table
from benchmarks.timed_command import STAGES

Report = Mapping[str, Any]  # result of `Bench.report`
BEGIN, END = "<!-- commands -->", "<!-- end -->"
KINDS = {"whole": "warm", "stages": "warm", "dropped": "dropped"}  # state of the system's cache by kind of a pass


def runs(report: Report, case: str, *kinds: str) -> list[dict[str, Any]]:
    """Return the records of a case.

    Args:
        report: Result of `Bench.report`.
        case: Name of the case.
        *kinds: Kinds of passes.
    """
    return [record for record in report["records"] if record["case"] == case and record["kind"] in kinds]


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Return the median of values, and their range if there are several.

    Args:
        values: At least one value.
        digits: Digits after the point.
    """
    text = f"{statistics.median(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def cases(report: Report) -> list[str]:
    """Return the names of the measured cases, in the order of their first run.

    Args:
        report: Result of `Bench.report`.
    """
    return list(dict.fromkeys(record["case"] for record in report["records"] if record["kind"] in KINDS))


def markdown(report: Report) -> str:
    """Return all tables.

    Args:
        report: Result of `Bench.report`.
    """
    parts = [_head(report), "### Whole commands", _totals(report)]
    if stages := _stages(report):
        parts += ["### Wall time by stage, seconds", stages]
    if memory := _memory(report):
        parts += ["### Peak anonymous memory by stage, GB", memory]
    prepared = [record for record in report["records"] if record["kind"] == "prepare"]
    parts += [
        f"- `models prepare` for *{record['case']}*: {record['seconds']:.1f} s, peak {record['peak']:.2f} GB."
        for record in prepared
    ]
    if report["left_out"]:
        parts.append("Left out: " + "; ".join(f"{name} ({why})" for name, why in report["left_out"].items()) + ".")
    return "\n\n".join(parts) + "\n"


def _head(report: Report) -> str:
    options, about = report["options"], report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    load = "" if about["load"] is None else f", load average at the start {about['load']:.1f}"
    return (
        f"{about['processor']}, {about['cores']} cores, {about['memory_gib']} GiB{load}; {versions}. "
        f"{options['config'].capitalize()} config, random weights in float32, {options['towers']} CLIP towers, "
        f"{options['size']} x {options['size']}; {report['elapsed'] / 60:.0f} minutes."
    )


def _totals(report: Report) -> str:
    cores, rows = report["machine"]["cores"], []
    for case in cases(report):
        for state, kinds in (("warm", ("whole", "stages")), ("dropped", ("dropped",))):
            # Times of stages are measured in a process with wrappers: they count here only if there are no others.
            records = runs(report, case, kinds[0]) or runs(report, case, *kinds[1:])
            if not records:
                continue
            anonymous = [record["anonymous"] for record in records if record["anonymous"] is not None]
            rows.append(
                [
                    case,
                    state if records[0].get("checkpoint_gb") else "",
                    spread([record["seconds"] for record in records]),
                    f"{max(record['peak'] for record in records):.2f}",
                    f"{max(anonymous):.2f}" if anonymous else "",
                    spread([record["read"] for record in records], 2),
                    _cached(records),
                    f"{100 * min(record['cpu'] / record['seconds'] for record in records) / cores:.0f} %",
                    str(len(records)),
                ]
            )
    head = ["", "files", "seconds", "peak resident, GB", "peak anonymous, GB", "read from the disk, GB"]
    return table([*head, "in the cache before", "cores used", "runs"], rows)


def _cached(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the smallest and largest share of the checkpoint that was in the cache before the runs."""
    shares = [
        100 * min(1.0, record["cached_gb"] / record["checkpoint_gb"])
        for record in records
        if record.get("cached_gb") is not None and record["checkpoint_gb"]
    ]
    if not shares:
        return ""
    low, high = f"{min(shares):.0f}", f"{max(shares):.0f}"
    return f"{low} %" if low == high else f"{low} to {high} %"


def _stages(report: Report) -> str:
    rows = []
    for case in cases(report):
        for kind in ("stages", "dropped"):
            records = [record for record in runs(report, case, kind) if "stages" in record]
            if not records:
                continue
            medians = {
                stage: statistics.median(record["stages"].get(stage, 0.0) for record in records) for stage in STAGES
            }
            counts = records[0]["counts"]
            steps = ", ".join(str(counts.get(name, "")) for name in ("prior steps", "decoder steps"))
            total = statistics.median(record["seconds"] for record in records)
            name = f"{case}, {KINDS[kind]}" if records[0].get("checkpoint_gb") else case
            rows.append([name, *(f"{medians[stage]:.2f}" for stage in STAGES), f"{total:.1f}", steps])
    return table(["", *STAGES, "sum", "steps"], rows) if rows else ""


def _memory(report: Report) -> str:
    rows = []
    for case in cases(report):
        peaks = [record["stage_anonymous"] for record in runs(report, case, "stages") if record.get("stage_anonymous")]
        if peaks:
            values = {stage: [peak[stage] for peak in peaks if stage in peak] for stage in STAGES}
            rows.append([case, *(f"{max(found):.2f}" if found else "" for found in values.values())])
    return table(["", *STAGES], rows) if rows else ""


def write_page(path: Path, report: Report) -> None:
    """Replace the tables of a page, between its two markers.

    Args:
        path: Path of the page.
        report: Result of `Bench.report`.

    Raises:
        ValueError: The page has no markers.
    """
    page = path.read_text(encoding="utf-8")
    pattern = re.compile(rf"{BEGIN}\n.*?{END}", re.DOTALL)
    if pattern.search(page) is None:
        raise ValueError(f"{path} has no markers {BEGIN} and {END}")
    text = markdown(report).replace("\n### ", "\n## ")
    path.write_text(pattern.sub(lambda _: f"{BEGIN}\n\n{text}\n{END}", page, count=1), encoding="utf-8")
