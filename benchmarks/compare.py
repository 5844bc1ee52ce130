"""Ours against the reference, stage by stage: results, seconds, memory, arithmetic. Published configs, random weights.

    python -m benchmarks.compare --folder bench

writes weights into the folder once (9.5 GB; 6.5 GB more with full CLIP towers), then runs both libraries on the same
files, each in a process of its own, taking turns: A B A B. Medians count. What comes out is a table on the screen and,
in `--out`, compare.md, compare.json and compare.svg. Exit code 1 if float32 results differ by more than 1e-3.
docs/benchmarks.md tells what is measured and how to read it.
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
SWITCHED = ("prior", "step", "decode")  # stages that are ours alone and can be called again and again
Record = dict[str, Any]


class Clock:
    """Shares the minutes that there are: each of `parts` gets its first round as long as any time is left, and further
    ones while it is in its share."""

    def __init__(self, minutes: float | None, parts: int) -> None:
        self._begun, self._seconds, self._parts, self._part = time.perf_counter(), minutes and 60 * minutes, parts, 0

    def next_part(self) -> bool:
        """Go on with the next part; whether there is time for it."""
        self._part += 1
        return self._seconds is None or self.elapsed < self._seconds

    def another(self, round_seconds: float) -> bool:
        """Whether this part has time for one more round, as long as the last one."""
        if self._seconds is None:
            return True
        return self.elapsed + round_seconds < self._seconds * self._part / self._parts

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._begun


class Comparison:
    """A run: what was asked for, what was found. `records` has one entry a stage, type and library."""

    def __init__(self, options: argparse.Namespace, results: Path) -> None:
        self.options, self._results = options, results
        parts = len(options.dtype) * len(options.only) * (2 if options.switches else 1)
        self.clock = Clock(options.minutes, parts)
        self.records: list[Record] = []
        self.peaks: list[Record] = []
        self.switches: list[Record] = []
        self.left_out: list[str] = []

    def setting(self, library: str, stage: str, dtype: str) -> Setting:
        """What a worker is told."""
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
        """Everything that was asked for, or what there is time for."""
        for dtype in self.options.dtype:
            self.measure_peaks(dtype)
            for name in self.options.only:
                if not self.clock.next_part():
                    self.left_out.append(f"{name}, {dtype}: the time was up")
                    continue
                print(f"{name}, {dtype} ({self.clock.elapsed:.0f} s)", file=sys.stderr, flush=True)
                self.measure(name, dtype)
                if self.options.switches:
                    self.clock.next_part()
                    if name in SWITCHED:
                        self.measure_switches(name, dtype)
            self.measure_peaks(dtype)  # again, for what else runs on the machine comes and goes

    def measure_peaks(self, dtype: str) -> None:
        """What the machine can do at most."""
        with Worker(self.setting(OURS, "", dtype)) as worker:
            found = worker.ask("peaks", small=self.options.config == "tiny")
        self.peaks.append({"dtype": dtype, **found})

    def measure(self, name: str, dtype: str) -> None:
        """One stage."""
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
        """Both workers stay, and take turns."""
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
        """A fresh worker for each call, no other beside it."""
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
        """Bring the weights into the system's cache, so that no library pays for being the first."""
        parts = ("prior-full" if self.options.towers == "full" else "prior", "decoder")
        for file in (file for part in parts for file in (self.options.folder / part).rglob("*.safetensors")):
            with file.open("rb", buffering=0) as opened:
                while opened.read(2**24):
                    pass

    def _rounds(self, stage: type[Stage]) -> Iterator[int]:
        wanted = self.options.rounds or stage.rounds
        for number in range(wanted):
            begun = self.clock.elapsed
            yield number
            if number + 1 < wanted and not self.clock.another(self.clock.elapsed - begun):
                return

    def _path(self, record: Record, more: str = "") -> Path:
        return self._results / f"{record['stage']}-{record['dtype']}-{record['library']}{more}.pt"

    def _call(self, worker: Worker, record: Record, number: int) -> None:
        told = worker.ask("save", path=str(self._path(record))) if number == 0 else worker.ask("call", number=number)
        record["seconds"].append(told["seconds"])
        if "cpu" in told:
            record["cpu"].append(told["cpu"] * told["seconds"] / told["wall"])

    def _memory(self, worker: Worker, record: Record) -> None:
        """The largest of all rounds, for each part of a call."""
        parts = worker.ask("memory")["peaks"]
        record["peaks"] = [max(pair) for pair in zip(parts, record.get("peaks", parts), strict=True)]
        record["own"] = max(worker.own, record.get("own", 0.0))

    # Afterwards

    def measure_switches(self, name: str, dtype: str) -> None:
        """One of our optimisations off at a time, each followed by a call that does not count."""
        record = {"stage": name, "dtype": dtype, "library": OURS}
        names: list[str | None] = [None, *available(name)]
        seconds: dict[str | None, list[float]] = {switch: [] for switch in names}
        with Worker(self.setting(OURS, name, dtype)) as worker:
            for number in self._rounds(STAGES[name]):
                for place, switch in enumerate(names):
                    worker.ask("switch", off=switch)
                    worker.ask("call", number=number)  # packs anew, and keeps for all what is kept of inputs
                    path = self._path(record, f"-{place}")
                    told = worker.ask("save", path=str(path)) if number == 0 else worker.ask("call", number=number)
                    seconds[switch].append(told["seconds"])
        base = self._path(record, "-0")
        for place, switch in enumerate(names[1:], start=1):
            self.switches.append(
                {
                    "stage": name,
                    "dtype": dtype,
                    "off": switch,
                    "on_seconds": seconds[None],
                    "off_seconds": seconds[switch],
                    "difference": difference(base, self._path(record, f"-{place}")),
                }
            )

    def differences(self) -> list[Record]:
        """How far results are from the reference's: of the same type, and where that can be said in float32."""
        found = []
        for record in self.records:
            theirs = self._path({**record, "library": THEIRS})
            ours = self._path({**record, "library": OURS})
            if record["library"] != OURS or not (ours.exists() and theirs.exists()):
                continue
            entry = {"stage": record["stage"], "dtype": record["dtype"], "difference": difference(theirs, ours)}
            exact = self._path({**record, "library": THEIRS, "dtype": "fp32"})
            if record["dtype"] != "fp32" and exact.exists() and not STAGES[record["stage"]].noisy:
                entry |= {"our_error": difference(exact, ours), "their_error": difference(exact, theirs)}
            found.append(entry)
        return found

    def report(self, about: Record) -> Record:
        """Everything that was found, as it is kept in JSON."""
        asked = {name: str(value) if isinstance(value, Path) else value for name, value in vars(self.options).items()}
        found = {"records": self.records, "differences": self.differences(), "peaks": self.peaks}
        return {"asked": asked, "machine": about, "elapsed": self.clock.elapsed, "left_out": self.left_out} | {
            **found,
            "switches": self.switches,
        }


def difference(reference: Path, other: Path) -> float:
    """Largest difference of two saved tensors, as a part of the largest number in the first."""
    import torch

    exact, made = (torch.load(path, weights_only=True) for path in (reference, other))
    return float((made - exact).abs().max() / exact.abs().max())


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("bench"), help="weights are here, or written there (bench)")
    parser.add_argument("--out", type=Path, help="folder for compare.md, compare.json and compare.svg")
    parser.add_argument("--config", choices=compare_weights.CONFIGS, default="published", help="(published)")
    parser.add_argument("--towers", choices=("thin", "full"), default="thin", help="CLIP towers of one layer, or all")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(DEFAULT), help="stages, in this order")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32"], help="(fp32)")
    parser.add_argument("--rounds", type=int, help="calls of each stage (load 2, prior 2, picture 1, others 3)")
    parser.add_argument("--minutes", type=float, help="leave out what would take longer, further rounds first")
    parser.add_argument("--size", type=int, help="side of the picture in pixels (512; tiny: 64)")
    parser.add_argument("--prior-steps", type=int, default=25, help="(25)")
    parser.add_argument("--steps", type=int, default=4, help="of the decoder, in `picture` (4)")
    parser.add_argument("--threads", type=int, default=machine.cores(), help="of each worker (all cores)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--quality", default="balanced", help="preset of the stage `fast` (balanced)")
    parser.add_argument("--caching", type=int, help="feature caching of the stage `fast`: every so many steps")
    parser.add_argument("--quantize", help="ours with weights of this kind, such as int8")
    parser.add_argument("--compile", choices=("ours", "both"), help="compile networks, by torch.compile")
    parser.add_argument("--switches", action="store_true", help="also time ours with one optimisation off at a time")
    parser.add_argument("--make", action="store_true", help="write the weights that are not there yet, and end")
    options = parser.parse_args(arguments)
    options.size = options.size or compare_weights.SIZES[options.config]
    for name in ("rounds", "prior_steps", "steps", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: a whole number from 1 is needed")
    if options.prior_steps < 3:
        parser.error("--prior-steps: at least 3 are needed, to count what a step computes")
    if options.size % 64:
        parser.error(f"--size {options.size}: a multiple of 64 is needed")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; exit code 1 when results differ."""
    options = parse(arguments)
    parts = ("prior", "decoder") if options.towers == "thin" else ("prior", "prior-full", "decoder")
    compare_weights.ensure(options.folder, options.config, parts)
    if options.make:
        return 0
    about = machine.describe()
    with tempfile.TemporaryDirectory() as results:
        comparison = Comparison(options, Path(results))
        comparison.run()
        found = comparison.report(about)
    print(compare_report.markdown(found))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "compare.md").write_text(compare_report.page(found), encoding="utf-8")
        (options.out / "compare.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (options.out / "compare.svg").write_text(compare_report.drawing(found), encoding="utf-8")
    return 1 if compare_report.wrong(found) else 0


if __name__ == "__main__":
    sys.exit(main())
