"""Comparison with the reference by stages: results, seconds, memory, arithmetic. Published configs, random weights.

    python -m benchmarks.compare --folder bench

writes weights into the folder once (9.5 GB; 6.5 GB more with full CLIP towers). Both libraries then run on the same
files, each in a separate process; their calls alternate, A B A B, and medians count. The result is a table on the
screen, and in `--out` compare.md, compare.json and compare.svg. The exit code is 1 if float32 results differ by more
than 1e-3. docs/benchmarks.md describes what is measured and how to read it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import compare_report, compare_weights, machine
from benchmarks.compare_stages import OURS, STAGES, THEIRS, Setting, Stage
from benchmarks.compare_switches import available
from benchmarks.compare_worker import Worker

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
DEFAULT = ("load", "text", "prior", "step", "decode", "picture")
SWITCHED = ("prior", "step", "decode")  # stages that `--switches` repeats with one optimisation off
Record = dict[str, Any]


class Clock:
    """Time limit of a run that consists of parts.

    Each part gets its first round while any time is left, and further rounds while it is within its share.

    Args:
        minutes: Time limit; None for none.
        parts: Number of parts.
    """

    def __init__(self, minutes: float | None, parts: int) -> None:
        self._start, self._seconds, self._parts, self._part = time.perf_counter(), minutes and 60 * minutes, parts, 0

    def next_part(self) -> bool:
        """Begin the next part.

        Returns:
            Whether there is time for it.
        """
        self._part += 1
        return self._seconds is None or self.elapsed < self._seconds

    def another(self, round_seconds: float) -> bool:
        """Return whether the current part has time for another round.

        Args:
            round_seconds: Expected seconds of the round.
        """
        if self._seconds is None:
            return True
        return self.elapsed + round_seconds < self._seconds * self._part / self._parts

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start


class Comparison:
    """A run with its results.

    Args:
        options: Command line options.
        results: Folder for the results of calls.

    Attributes:
        records: Measurements, one entry per stage, dtype and library.
        peaks: Peak arithmetic of the machine per dtype.
        switches: Measurements with one optimisation off.
        left_out: Stages for which there was no time.
    """

    def __init__(self, options: argparse.Namespace, results: Path) -> None:
        self.options, self._results = options, results
        parts = len(options.dtype) * len(options.only) * (2 if options.switches else 1)
        self.clock = Clock(options.minutes, parts)
        self.records: list[Record] = []
        self.peaks: list[Record] = []
        self.switches: list[Record] = []
        self.left_out: list[str] = []

    def setting(self, library: str, stage: str, dtype: str) -> Setting:
        """Return the settings of a worker.

        Args:
            library: OURS or THEIRS.
            stage: Name of the stage.
            dtype: Key of DTYPES.
        """
        of_stage: dict[str, Any] = {"low_memory": stage == "low-memory"}
        if library == OURS:
            of_stage["quantize"] = self.options.quantize
        if stage == "fast":
            of_stage |= {"quality": self.options.quality, "caching": self.options.caching}
        of_stage["compiled"] = self.options.compile in ("both", "ours" if library == OURS else "both")
        options = {name: getattr(self.options, name) for name in ("device", "threads", "size", "prior_steps", "steps")}
        full = self.options.towers == "full"
        folder = str(self.options.folder.resolve())
        return Setting(library, stage, folder, DTYPES[dtype], full_towers=full, **options, **of_stage)

    def run(self) -> None:
        """Measure all requested stages for which there is time."""
        for dtype in self.options.dtype:
            self.measure_peaks(dtype)
            for name in self.options.only:
                if not self.clock.next_part():
                    self.left_out.append(f"{name}, {dtype}: no time was left")
                    continue
                print(f"{name}, {dtype} ({self.clock.elapsed:.0f} s)", file=sys.stderr, flush=True)
                self.measure(name, dtype)
                if self.options.switches:
                    self.clock.next_part()
                    if name in SWITCHED:
                        self.measure_switches(name, dtype)
            self.measure_peaks(dtype)  # again, since other work on the machine comes and goes

    def measure_peaks(self, dtype: str) -> None:
        """Measure the peak arithmetic of the machine.

        Args:
            dtype: Key of DTYPES.
        """
        with Worker(self.setting(OURS, "", dtype)) as worker:
            peaks = worker.ask("peaks", small=self.options.config == "tiny")
        self.peaks.append({"dtype": dtype, **peaks})

    def measure(self, name: str, dtype: str) -> None:
        """Measure one stage with all libraries.

        Args:
            name: Name of the stage.
            dtype: Key of DTYPES.
        """
        stage = STAGES[name]
        records = {
            library: {"stage": name, "dtype": dtype, "library": library}
            | {kind: [] for kind in ("seconds", "cpu", "load", "import")}
            for library in stage.libraries
        }
        if name == "load":
            self._read_files()
        (self._alone if stage.alone else self._together)(stage, records)
        self.records += records.values()

    def _together(self, stage: type[Stage], records: dict[str, Record]) -> None:
        """Alternate between workers that exist at the same time."""
        with contextlib.ExitStack() as stack:
            workers = {}
            for library, record in records.items():
                worker = stack.enter_context(Worker(self.setting(library, record["stage"], record["dtype"])))
                counted = worker.ask("count")
                record |= {"operations": counted["operations"], "warm_up": counted["seconds"]}
                self._started(worker, record)
                workers[library] = worker
            for number in self._rounds(stage):
                for library, worker in workers.items():
                    self._call(worker, records[library], number)
            for library, worker in workers.items():
                self._memory(worker, records[library])

    def _alone(self, stage: type[Stage], records: dict[str, Record]) -> None:
        """Start a new worker for each call, without another one at the same time."""
        for number in self._rounds(stage):
            for library, record in records.items():
                with Worker(self.setting(library, record["stage"], record["dtype"])) as worker:
                    self._started(worker, record)
                    if record["stage"] == "load":
                        record["seconds"].append(worker.started["load"])
                        record["cpu"].append(worker.started["cpu"])
                    else:
                        self._call(worker, record, number)
                    self._memory(worker, record)

    def _started(self, worker: Worker, record: Record) -> None:
        for kind in ("import", "load"):
            record[kind].append(worker.started[kind])

    def _read_files(self) -> None:
        """Read the weights into the system's cache, since the first library would otherwise pay for it."""
        parts = ("prior-full" if self.options.towers == "full" else "prior", "decoder")
        for file in (file for part in parts for file in (self.options.folder / part).rglob("*.safetensors")):
            with file.open("rb", buffering=0) as opened:
                while opened.read(2**24):
                    pass

    def _rounds(self, stage: type[Stage]) -> Iterator[int]:
        rounds = self.options.rounds or stage.rounds
        for number in range(rounds):
            start = self.clock.elapsed
            yield number
            if number + 1 < rounds and not self.clock.another(self.clock.elapsed - start):
                return

    def _path(self, record: Record, suffix: str = "") -> Path:
        return self._results / f"{record['stage']}-{record['dtype']}-{record['library']}{suffix}.pt"

    def _call(self, worker: Worker, record: Record, number: int) -> None:
        times = self._save_or_call(worker, number, self._path(record))
        record["seconds"].append(times["seconds"])
        if "cpu" in times:
            record["cpu"].append(times["cpu"] * times["seconds"] / times["wall"])

    def _save_or_call(self, worker: Worker, number: int, path: Path) -> dict[str, Any]:
        """Make a call, and save the result of call 0."""
        return worker.ask("save", path=str(path)) if number == 0 else worker.ask("call", number=number)

    def _memory(self, worker: Worker, record: Record) -> None:
        """Record the largest memory of all rounds, for each part of a call."""
        parts = worker.ask("memory")["peaks"]
        record["peaks"] = [max(pair) for pair in zip(parts, record.get("peaks", parts), strict=True)]
        record["own_memory"] = max(worker.own_memory, record.get("own_memory", 0.0))

    # Results

    def measure_switches(self, name: str, dtype: str) -> None:
        """Measure a stage with one optimisation off at a time, each after a warm-up call.

        Args:
            name: Name of the stage.
            dtype: Key of DTYPES.
        """
        record = {"stage": name, "dtype": dtype, "library": OURS}
        names: list[str | None] = [None, *available(name)]
        seconds: dict[str | None, list[float]] = {switch: [] for switch in names}
        with Worker(self.setting(OURS, name, dtype)) as worker:
            for number in self._rounds(STAGES[name]):
                for index, switch in enumerate(names):
                    worker.ask("switch", off=switch)
                    worker.ask("call", number=number)  # packs weights again, and fills the caches of these inputs
                    times = self._save_or_call(worker, number, self._path(record, f"-{index}"))
                    seconds[switch].append(times["seconds"])
        base = self._path(record, "-0")
        for index, switch in enumerate(names[1:], start=1):
            self.switches.append(
                {
                    "stage": name,
                    "dtype": dtype,
                    "off": switch,
                    "on_seconds": seconds[None],
                    "off_seconds": seconds[switch],
                    "difference": difference(base, self._path(record, f"-{index}")),
                }
            )

    def differences(self) -> list[Record]:
        """Return differences from the reference's results in the same dtype, and in float32 where that is possible."""
        differences = []
        for record in self.records:
            theirs = self._path({**record, "library": THEIRS})
            ours = self._path({**record, "library": OURS})
            if record["library"] != OURS or not (ours.exists() and theirs.exists()):
                continue
            entry = {"stage": record["stage"], "dtype": record["dtype"], "difference": difference(theirs, ours)}
            exact = self._path({**record, "library": THEIRS, "dtype": "fp32"})
            if record["dtype"] != "fp32" and exact.exists() and not STAGES[record["stage"]].noisy:
                entry |= {"our_error": difference(exact, ours), "their_error": difference(exact, theirs)}
            differences.append(entry)
        return differences

    def report(self, about: Record) -> Record:
        """Return all results for JSON.

        Args:
            about: Description of the machine.
        """
        options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(self.options).items()}
        return {
            "options": options,
            "machine": about,
            "elapsed": self.clock.elapsed,
            "left_out": self.left_out,
            "records": self.records,
            "differences": self.differences(),
            "peaks": self.peaks,
            "switches": self.switches,
        }


def difference(reference: Path, other: Path) -> float:
    """Return the largest difference of two saved tensors, relative to the largest value of the first.

    Args:
        reference: Path of the first.
        other: Path of the second.
    """
    import torch

    exact, result = (torch.load(path, weights_only=True) for path in (reference, other))
    return float((result - exact).abs().max() / exact.abs().max())


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line options.

    Args:
        arguments: Command line arguments; None takes those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("bench"), help="folder of the weights, written if missing (bench)"
    )
    parser.add_argument("--out", type=Path, help="folder for compare.md, compare.json and compare.svg")
    parser.add_argument("--config", choices=compare_weights.CONFIGS, default="published", help="config (published)")
    parser.add_argument(
        "--towers", choices=("thin", "full"), default="thin", help="CLIP towers of one layer or all (thin)"
    )
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(DEFAULT), help="stages, in this order")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32"], help="dtypes (fp32)")
    parser.add_argument("--rounds", type=int, help="calls per stage (load 2, prior 2, picture 1, others 3)")
    parser.add_argument("--minutes", type=float, help="time limit: leaves out rounds, then stages")
    parser.add_argument("--size", type=int, help="side of the image in pixels (512; tiny: 64)")
    parser.add_argument("--prior-steps", type=int, default=25, help="steps of the prior (25)")
    parser.add_argument("--steps", type=int, default=4, help="steps of the decoder in `picture` (4)")
    parser.add_argument("--threads", type=int, default=machine.cores(), help="threads per worker (all cores)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--quality", default="balanced", help="preset of the stage `fast` (balanced)")
    parser.add_argument("--caching", type=int, help="interval of feature caching of the stage `fast`, in steps")
    parser.add_argument("--quantize", help="kind of quantized weights of ours, such as int8")
    parser.add_argument("--compile", choices=("ours", "both"), help="compile networks with torch.compile")
    parser.add_argument("--switches", action="store_true", help="also measure ours with one optimisation off at a time")
    parser.add_argument("--make", action="store_true", help="only write missing weights")
    options = parser.parse_args(arguments)
    options.size = options.size or compare_weights.SIZES[options.config]
    for name in ("rounds", "prior_steps", "steps", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            value = getattr(options, name)
            parser.error(f"--{name.replace('_', '-')} {value} is invalid: expected an integer from 1")
    if options.prior_steps < 3:
        parser.error(
            f"--prior-steps {options.prior_steps} is invalid: expected at least 3, to count operations per step"
        )
    if options.size % 64:
        parser.error(f"--size {options.size} is invalid: expected a multiple of 64")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison.

    Args:
        arguments: Command line arguments; None takes those of the process.

    Returns:
        Exit code: 1 if float32 results differ, 0 otherwise.
    """
    options = parse(arguments)
    parts = ("prior", "decoder") if options.towers == "thin" else ("prior", "prior-full", "decoder")
    compare_weights.ensure(options.folder, options.config, parts)
    if options.make:
        return 0
    about = machine.describe()
    with tempfile.TemporaryDirectory() as results:
        comparison = Comparison(options, Path(results))
        comparison.run()
        report = comparison.report(about)
    print(compare_report.markdown(report))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "compare.md").write_text(compare_report.page(report), encoding="utf-8")
        (options.out / "compare.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (options.out / "compare.svg").write_text(compare_report.drawing(report), encoding="utf-8")
    return 1 if compare_report.wrong_stages(report) else 0


if __name__ == "__main__":
    sys.exit(main())
