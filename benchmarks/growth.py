"""Growth of time and memory with image size, batch size and number of steps, compared with what arithmetic says.

    python -m benchmarks.growth --dtype bfloat16 --docs

Published configs, random weights, a process for each series. The values of a series alternate; the shortest call
counts, because other work on the machine only adds time. Working memory is the peak during a call minus what the
process had before it.

Arithmetic: the seconds are `fixed + rate x operations` with the operations of the networks' layers, which are counted
for each size; convolutions and linear layers grow with the pixels, attention with the square of the tokens. Steps and
batches are linear, working memory is linear in pixels and batch and independent of steps. Two values of each series
give `fixed` and `rate`; all others are predictions. Deviations above 10 % are marked.

Linux measures the memory; elsewhere only times are reported.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import compare_weights, growth_curves, machine
from benchmarks.compare_report import table
from benchmarks.growth_worker import Task

ROOT = Path(__file__).parent.parent
RESULT = Path(__file__).parent / "results" / "growth.json"
DOCS = ROOT / "docs"
PAGE = "growth.md"
BEGIN, END = "<!-- growth -->", "<!-- end -->"
TOLERANCE = 0.1
NAMES = {
    "unet": "guided UNet step",
    "movq": "MoVQ decode",
    "decoder": "decoder without MoVQ",
    "prior": "prior",
}
SERIES = (
    ("unet", "size"),
    ("movq", "size"),
    ("unet", "batch"),
    ("movq", "batch"),
    ("prior", "batch"),
    ("decoder", "steps"),
    ("prior", "steps"),
)
PRIOR_STEPS, DECODER_STEPS = 25, 8


@dataclasses.dataclass(frozen=True)
class Line:
    """Seconds or memory as `fixed + rate x work`.

    Attributes:
        fixed: Part that does not grow.
        rate: Growth per unit of work.
    """

    fixed: float
    rate: float

    @classmethod
    def through(cls, first: tuple[float, float], second: tuple[float, float]) -> Line:
        """Return the line through two points.

        Args:
            first: Work and value.
            second: Work and value; the work differs.
        """
        rate = (second[1] - first[1]) / (second[0] - first[0])
        return cls(first[1] - rate * first[0], rate)

    def at(self, work: float) -> float:
        """Return the value for some work.

        Args:
            work: The work.
        """
        return self.fixed + self.rate * work


@dataclasses.dataclass(frozen=True)
class Point:
    """A measured value of a series with its prediction.

    Attributes:
        value: Size, batch or number of steps.
        work: Operations, or the value itself where they are proportional to it.
        seconds: Shortest call.
        predicted_seconds: What arithmetic says.
        gib: Working memory; None if it was not measured.
        predicted_gib: What arithmetic says.
        fitted: Whether the prediction was fitted on this point.
    """

    value: int
    work: float
    seconds: float
    predicted_seconds: float
    gib: float | None
    predicted_gib: float | None
    fitted: bool

    @property
    def time_deviation(self) -> float:
        """Relative deviation of the seconds from the prediction."""
        return self.seconds / self.predicted_seconds - 1

    @property
    def memory_deviation(self) -> float | None:
        """Relative deviation of the memory from the prediction."""
        return self.gib / self.predicted_gib - 1 if self.gib and self.predicted_gib else None


def fit_values(values: Sequence[int]) -> tuple[int, int]:
    """Return the two values that a line is fitted on: the smallest, and one in the middle.

    A neighbour of the smallest would carry its noise far beyond the measured range.

    Args:
        values: Ascending values, at least two.
    """
    return values[0], values[len(values) // 2]


def points(axis: str, records: Sequence[Mapping[str, Any]]) -> list[Point]:
    """Return the points of a series with their predictions; none if fewer than two values were measured.

    Args:
        axis: "size", "batch" or "steps".
        records: Measurements of the worker.
    """
    timed = [record for record in records if "seconds" in record]
    values = sorted({record["value"] for record in timed})
    if len(values) < 2:
        return []
    of = {value: [record for record in timed if record["value"] == value] for value in values}
    seconds = {value: min(record["seconds"] for record in of[value]) for value in values}
    work = {value: float(of[value][0]["work"]) for value in values}
    gib = {
        value: max((record["working_gib"] for record in of[value] if "working_gib" in record), default=None)
        for value in values
    }
    first, second = fit_values(values)
    time_line = Line.through((work[first], seconds[first]), (work[second], seconds[second]))
    memory_line = _memory_line(axis, gib, first, second)
    return [
        Point(
            value,
            work[value],
            seconds[value],
            time_line.at(work[value]),
            gib[value],
            None if memory_line is None else memory_line.at(_memory_units(axis, value)),
            value in (first, second),
        )
        for value in values
    ]


def _memory_units(axis: str, value: int) -> float:
    """Return what working memory is linear in."""
    return float(value * value if axis == "size" else value)


def _memory_line(axis: str, gib: Mapping[int, float | None], first: int, second: int) -> Line | None:
    low, high = gib[first], gib[second]
    if low is None or high is None:
        return None
    if axis == "steps":
        return Line(low, 0.0)
    return Line.through((_memory_units(axis, first), low), (_memory_units(axis, second), high))


# Running


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all series for which there is time.

    Args:
        options: Command line options.

    Returns:
        All results for JSON.
    """
    start, about = time.perf_counter(), machine.describe()
    series, left_out = [], []
    for stage, axis in SERIES:
        name = f"{NAMES[stage]}, {axis}"
        if options.only and f"{stage}-{axis}" not in options.only:
            continue
        left = 60 * options.minutes - (time.perf_counter() - start)
        if left <= 0:
            left_out.append(f"{name} (no time was left)")
            continue
        print(f"{name} ({time.perf_counter() - start:.0f} s)", file=sys.stderr, flush=True)
        records, error = run_series(task_of(options, stage, axis, left))
        series.append({"stage": stage, "axis": axis, "records": records})
        left_out += [f"{name} {record['value']} ({record['left_out']})" for record in records if "left_out" in record]
        if error is not None:
            left_out.append(f"{name}: the process ended early ({error})")
    kept = ("dtype", "threads", "config", "passes")
    return {
        "options": {name: getattr(options, name) for name in kept} | {"base_size": min(options.sizes)},
        "machine": about,
        "elapsed": time.perf_counter() - start,
        "series": series,
        "left_out": left_out,
    }


def task_of(options: argparse.Namespace, stage: str, axis: str, seconds: float) -> Task:
    """Return the task of a series.

    Args:
        options: Command line options.
        stage: Stage of the worker.
        axis: "size", "batch" or "steps".
        seconds: Time limit.
    """
    steps = options.prior_steps if stage == "prior" else options.steps
    values = {"size": options.sizes, "batch": options.batches, "steps": steps}[axis]
    return Task(
        stage=stage,
        axis=axis,
        values=tuple(sorted(values)),
        size=min(options.sizes),
        steps=PRIOR_STEPS if stage == "prior" else DECODER_STEPS,
        config=options.config,
        dtype=options.dtype,
        threads=options.threads,
        passes=options.passes,
        call_seconds=options.call_seconds,
        gib=options.gib,
        seconds=seconds,
    )


def run_series(task: Task) -> tuple[list[dict[str, Any]], str | None]:
    """Measure a series in a separate process.

    Args:
        task: The task.

    Returns:
        The measurements until its end, and the error that ended it early or None.
    """
    command = [sys.executable, "-m", "benchmarks.growth_worker", json.dumps(dataclasses.asdict(task))]
    records = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                records.append(json.loads(line))
                print(f"  {line.strip()}", file=sys.stderr, flush=True)
        except BaseException:
            process.kill()
            raise
    return records, None if process.returncode == 0 else f"exit code {process.returncode}"


# Report


def markdown(report: Mapping[str, Any]) -> str:
    """Return the tables of all series.

    Args:
        report: Result of `run`.
    """
    options, about = report["options"], report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    load = "" if about["load"] is None else f", load average at the start {about['load']:.1f}"
    parts = [
        f"{about['processor']}, {options['threads']} of {about['cores']} cores, {about['memory_gib']} GiB{load}; "
        f"{versions}. {options['config'].capitalize()} config, {options['dtype']}, {options['passes']} calls each; "
        f"{report['elapsed'] / 60:.0f} minutes. Where it does not grow, the size is {options['base_size']}."
    ]
    flagged: list[str] = []
    for series in report["series"]:
        measured = points(series["axis"], series["records"])
        if measured:
            title = f"{NAMES[series['stage']]} by {series['axis']}"
            parts += [f"### {title[0].upper()}{title[1:]}", _series_table(series, measured)]
            flagged += _flagged(title, measured)
    if flagged:
        parts += [f"### Deviations above {100 * TOLERANCE:.0f} %", "\n".join(f"- {line}" for line in flagged)]
    elif any(points(series["axis"], series["records"]) for series in report["series"]):
        parts.append(f"No deviation is above {100 * TOLERANCE:.0f} %.")
    if report["left_out"]:
        parts.append("Left out: " + "; ".join(report["left_out"]) + ".")
    return "\n\n".join(parts) + "\n"


def _series_table(series: Mapping[str, Any], measured: Sequence[Point]) -> str:
    counted = series["stage"] in ("unet", "movq") and series["axis"] != "steps"
    rows = []
    for point in measured:
        rows.append(
            [
                f"{point.value}",
                f"{point.work / 1e12:.3g}" if counted else "",
                f"{point.seconds:.3g}",
                f"{point.predicted_seconds:.3g}",
                _deviation(point.time_deviation, point.fitted),
                "" if point.gib is None else f"{point.gib:.2f}",
                "" if point.predicted_gib is None else f"{point.predicted_gib:.2f}",
                _deviation(point.memory_deviation, point.fitted and not _is_prediction(series, point, measured)),
            ]
        )
    head = [series["axis"], "TFLOP", "seconds", "by arithmetic", "deviation", "working memory, GiB", "by arithmetic"]
    return table([*head, "deviation"], rows)


def _is_prediction(series: Mapping[str, Any], point: Point, measured: Sequence[Point]) -> bool:
    """Return whether the memory of a fitted point is a prediction still: with steps, only the first point is fitted."""
    return series["axis"] == "steps" and point is not measured[0]


def _deviation(deviation: float | None, fitted: bool) -> str:
    if deviation is None:
        return ""
    if fitted:
        return "fitted"
    text = f"{100 * deviation:+.0f} %"
    return f"**{text}**" if abs(deviation) > TOLERANCE else text


def _flagged(title: str, measured: Sequence[Point]) -> list[str]:
    lines = []
    for point in measured:
        for kind, deviation in (("time", point.time_deviation), ("memory", point.memory_deviation)):
            if deviation is not None and abs(deviation) > TOLERANCE:
                lines.append(f"{title}, {point.value}: {kind} {100 * deviation:+.0f} %")
    return lines


def write_page(page: Path, report: Mapping[str, Any]) -> None:
    """Replace the tables of a page, between its two markers, and draw the curves next to it.

    Args:
        page: Path of the page.
        report: Result of `run`.

    Raises:
        ValueError: The page has no markers.
    """
    text = page.read_text(encoding="utf-8")
    pattern = re.compile(rf"{BEGIN}\n.*?{END}", re.DOTALL)
    if pattern.search(text) is None:
        raise ValueError(f"{page} has no markers {BEGIN} and {END}")
    curves = growth_curves.draw(drawn_series(report), page.with_suffix(".svg"))
    parts = [f"![Time and working memory]({curves.name})", markdown(report).replace("\n### ", "\n## ")]
    page.write_text(pattern.sub(lambda _: f"{BEGIN}\n\n" + "\n\n".join(parts) + f"\n{END}", text), encoding="utf-8")


def drawn_series(report: Mapping[str, Any]) -> list[tuple[str, str, list[Point]]]:
    """Return name, axis and points of each series that has points.

    Args:
        report: Result of `run`.
    """
    found = [
        (NAMES[series["stage"]], series["axis"], points(series["axis"], series["records"]))
        for series in report["series"]
    ]
    return [entry for entry in found if entry[2]]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line options.

    Args:
        arguments: Command line arguments; None takes those of the process.
    """
    memory = machine.describe()["memory_gib"] or 16.0
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.growth", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [f"{stage}-{axis}" for stage, axis in SERIES]
    parser.add_argument("--config", choices=compare_weights.CONFIGS, default="published", help="config (published)")
    parser.add_argument("--dtype", default="bfloat16", help="dtype of torch (bfloat16)")
    parser.add_argument("--threads", type=int, default=machine.cores(), help="threads of torch (all cores)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 768, 1024, 1536, 2048], help="sides in pixels")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="images per call")
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 4, 8, 16], help="steps of the decoder")
    parser.add_argument("--prior-steps", type=int, nargs="+", default=[5, 10, 25, 50], help="steps of the prior")
    parser.add_argument("--only", nargs="+", choices=names, metavar="SERIES", help=f"these series: {', '.join(names)}")
    parser.add_argument("--passes", type=int, default=2, help="calls per value (2)")
    parser.add_argument("--call-seconds", type=float, default=240.0, help="longest call (240)")
    parser.add_argument("--gib", type=float, default=0.7 * memory, help="memory limit (0.7 of the machine's)")
    parser.add_argument("--minutes", type=float, default=30.0, help="time limit (30)")
    parser.add_argument("--out", type=Path, help="file for the results (JSON)")
    parser.add_argument(
        "--docs", type=Path, nargs="?", const=DOCS / PAGE, help="page to write tables and curves into (docs)"
    )
    parser.add_argument("--report", type=Path, nargs="?", const=RESULT, help="print the tables of an earlier run only")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark, or print the tables of an earlier run.

    Args:
        arguments: Command line arguments; None takes those of the process.

    Returns:
        Exit code: 1 if a process ended early, 0 otherwise.
    """
    options = parse(arguments)
    report = json.loads(options.report.read_text(encoding="utf-8")) if options.report is not None else run(options)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(markdown(report))
    if options.docs is not None:
        write_page(options.docs, report)
    return int(any("ended early" in reason for reason in report["left_out"]))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the measured process as well
    sys.exit(main())
