"""Whole commands as a user runs them: time from the start of the process to its end, by stage, and memory.

    python -m benchmarks.commands --folder bench

Each run is a fresh process. The cases of CASES alternate, in passes of three kinds:

- "whole": the console command itself, nothing in it is changed; these times and memories count first;
- "stages": the same command line through benchmarks/timed_command.py, which writes the wall time of stages;
- "dropped": like "stages", after the checkpoint's files were dropped from the system's cache.

Before other passes the files are read into the cache. The results are written into `--out` (JSON), and with `--docs`
as tables into docs/commands.md. Linux and macOS only.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import commands_report, compare_weights, machine, page_cache
from benchmarks.measured_process import GB, FailedError, Measured, measure
from benchmarks.stopwatch import peak_per_stage, seconds_per_stage

OURS, THEIRS = "kandinsky22", "diffusers"
PUBLISHED, EMBEDDED = "published", "embedded"
PROMPT, SEED = "a red circle to the left of a blue square on a yellow background", 7
RESULT = Path(__file__).parent / "results" / "commands.json"
PAGE = Path(__file__).parent.parent / "docs" / "commands.md"
TIMEOUT = 1800  # seconds for one run


@dataclasses.dataclass(frozen=True)
class Case:
    """A command that is measured.

    Attributes:
        name: Name in the tables.
        arguments: Options of `kandinsky22 generate`; of diffusers, those of benchmarks/reference_command.py.
        quality: Preset of the steps.
        library: OURS or THEIRS.
        model: PUBLISHED weights of `--folder`, or the EMBEDDED model.
        prepare: Options of `kandinsky22 models prepare`, which writes the checkpoint of this case once; None for none.
        option: Option that `kandinsky22 generate --help` must have, or the case is left out.
        package: Package that must be installed, or the case is left out.
    """

    name: str
    arguments: tuple[str, ...] = ()
    quality: str | None = "balanced"
    library: str = OURS
    model: str = PUBLISHED
    prepare: tuple[str, ...] | None = None
    option: str | None = None
    package: str | None = None


BF16, FP32, ENGINE = ("--dtype", "bfloat16"), ("--dtype", "float32"), ("--engine", "openvino")
CASES = (
    Case("diffusers bf16", BF16, library=THEIRS, package="diffusers"),
    Case("balanced bf16", BF16),
    Case("balanced bf16, prepared", BF16, prepare=("--dtype", "bf16")),
    Case("balanced bf16, OpenVINO", (*BF16, *ENGINE), option="--engine", package="openvino"),
    Case("draft bf16", BF16, quality="draft"),
    Case("balanced bf16, int8-dynamic", (*BF16, "--quantize", "int8-dynamic")),
    Case("balanced int8, prepared", prepare=("--dtype", "int8")),  # in the type of the checkpoint
    Case("diffusers float32", FP32, library=THEIRS, package="diffusers"),
    Case("balanced float32", FP32),
    Case("balanced float32, prepared", FP32, prepare=("--dtype", "float32")),
    Case("balanced float32, OpenVINO", (*FP32, *ENGINE), option="--engine", package="openvino"),
    Case("embedded model", model=EMBEDDED, quality=None),
)


@dataclasses.dataclass(frozen=True)
class Folders:
    """Where the commands read and write.

    Attributes:
        prior: Folder of the published prior.
        decoder: Folder of the published decoder.
        work: Folder for results and prepared checkpoints.
    """

    prior: Path
    decoder: Path
    work: Path

    def prepared(self, case: Case) -> Path:
        """Return the folder of a case's prepared checkpoint.

        Args:
            case: The case.
        """
        return self.work / ("prepared" + "".join(case.prepare or ())).replace("-", "_")

    def files(self, case: Case) -> list[Path]:
        """Return the weight files of a case's checkpoint; none for the embedded model, which is part of the package.

        Args:
            case: The case.
        """
        if case.model == EMBEDDED:
            return []
        roots = [self.prior, self.decoder] if case.prepare is None else [self.prepared(case)]
        return [file for root in roots for file in sorted(root.rglob("*")) if file.is_file()]


def command_of(case: Case, folders: Folders, size: int, *, stages: Path | None) -> list[str]:
    """Return the command line of a case.

    Args:
        case: The case.
        folders: Where it reads and writes.
        size: Side of the image in pixels.
        stages: File for the times of stages; None runs the console command itself.
    """
    output = str(folders.work / "picture.png")
    models = ["--model", str(folders.decoder), "--prior", str(folders.prior)]
    if case.library == THEIRS:
        timing = [] if stages is None else ["--started", "{started}", "--stages", str(stages)]
        script = [sys.executable, "-m", "benchmarks.reference_command", PROMPT]
        steps = reference_steps(case.quality or "balanced")
        common = ["--seed", str(SEED), "--size", str(size), "-o", output]
        return [*script, *models, *case.arguments, *steps, *common, *timing]
    arguments = ["generate", PROMPT, *case.arguments]
    if case.quality is not None:
        arguments += ["--quality", case.quality]
    if case.prepare is not None:
        arguments += ["--model", str(folders.prepared(case))]
    elif case.model == PUBLISHED:
        arguments += models
    if case.model == PUBLISHED:
        arguments += ["--size", f"{size}x{size}"]
    arguments += ["--device", "cpu", "--seed", str(SEED), "--force", "-o", output]
    if stages is None:
        return [str(console_command()), *arguments]
    return [sys.executable, "-m", "benchmarks.timed_command", "{started}", str(stages), *arguments]


def console_command() -> Path:
    """Return the installed command `kandinsky22` of this environment."""
    return Path(sys.executable).with_name("kandinsky22")


def reference_steps(quality: str) -> list[str]:
    """Return the options of benchmarks/reference_command.py for the steps of a preset.

    Guidance cannot end early in the reference, whose decoder therefore runs on two rows in all steps.

    Args:
        quality: Name of a preset of kandinsky22.
    """
    from kandinsky22.sampling.presets import PRESETS

    preset = PRESETS[quality]
    settings = json.dumps(dict(preset.decoder.settings))
    counts = ["--prior-steps", str(preset.prior.steps), "--steps", str(preset.decoder.steps)]
    return [*counts, "--scheduler", preset.decoder.scheduler, "--scheduler-settings", settings]


def passes(whole: int, stages: int, dropped: int) -> list[str]:
    """Return the kinds of all passes over the cases, so that a time limit leaves some of each kind.

    Args:
        whole: Number of passes with the unchanged command.
        stages: Number of passes with times of stages.
        dropped: The same, with dropped files.
    """
    counts = {"whole": whole, "stages": stages, "dropped": dropped}
    order = []
    for number in range(max(counts.values(), default=0)):
        order += [kind for kind, count in counts.items() if number < count]
    return order


def reason_to_skip(case: Case, generate_help: str, models_help: str) -> str | None:
    """Return why a case cannot run here, or None.

    Args:
        case: The case.
        generate_help: Output of `kandinsky22 generate --help`.
        models_help: Output of `kandinsky22 models --help`.
    """
    if case.option is not None and case.option not in generate_help.split():
        return f"kandinsky22 generate has no option {case.option}"
    if case.prepare is not None and "prepare" not in models_help.split():
        return "kandinsky22 models has no action prepare"
    if case.package is not None and importlib.util.find_spec(case.package) is None:
        return f"the package {case.package} is not installed"
    return None


class Bench:
    """A run with its results.

    Args:
        options: Command line options.
        folders: Where commands read and write.

    Attributes:
        records: Measurements, one per run of a command.
        left_out: Cases that did not run, with reasons.
    """

    def __init__(self, options: argparse.Namespace, folders: Folders) -> None:
        self.options, self.folders = options, folders
        self.records: list[dict[str, Any]] = []
        self.left_out: dict[str, str] = {}
        self._start = time.perf_counter()

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    def run(self) -> None:
        """Measure all cases in all passes for which there is time."""
        cases = self._available()
        for case in [case for case in cases if case.prepare is not None]:
            if not self._prepare(case):
                cases.remove(case)
        for kind in passes(self.options.rounds, self.options.stage_rounds, self.options.dropped_rounds):
            for case in list(cases):
                if kind == "dropped" and (case.model == EMBEDDED or not page_cache.can_drop()):
                    continue
                if not self._has_time(case):
                    self.left_out.setdefault(f"{case.name}, pass {kind}", "no time was left")
                    continue
                try:
                    self._measure(case, kind)
                except FailedError as error:
                    self.left_out[case.name] = str(error)
                    print(f"{case.name}: {error}", file=sys.stderr, flush=True)
                    cases.remove(case)

    def _available(self) -> list[Case]:
        selected = [case for case in CASES if not self.options.only or case.name in self.options.only]
        helps = [
            subprocess.run([console_command(), *words, "--help"], capture_output=True, text=True).stdout
            for words in (["generate"], ["models"])
        ]
        cases = []
        for case in selected:
            reason = reason_to_skip(case, *(text.replace(",", " ") for text in helps))
            if reason is None:
                cases.append(case)
            else:
                self.left_out[case.name] = reason
                print(f"{case.name}: left out, {reason}", file=sys.stderr, flush=True)
        return cases

    def _has_time(self, case: Case) -> bool:
        """Return whether a run of a case that takes as long as its longest one so far ends within the limit."""
        if self.options.minutes is None:
            return True
        longest = max((record["seconds"] for record in self.records if record["case"] == case.name), default=0.0)
        return self.elapsed + longest < 60 * self.options.minutes

    def _prepare(self, case: Case) -> bool:
        """Write the prepared checkpoint of a case unless it exists."""
        folder = self.folders.prepared(case)
        if folder.exists():
            return True
        models = [self.folders.decoder, "--prior", self.folders.prior]
        words = [console_command(), "models", "prepare", *models, *(case.prepare or ()), "-o", folder]
        try:
            measured = measure([str(word) for word in words], timeout=TIMEOUT)
        except FailedError as error:
            self.left_out[case.name] = f"models prepare: {error}"
            print(f"{case.name}: models prepare: {error}", file=sys.stderr, flush=True)
            return False
        self._add(case, "prepare", measured, {})
        return True

    def _measure(self, case: Case, kind: str) -> None:
        files = self.folders.files(case)
        if kind == "dropped":
            page_cache.drop(files)
        elif files:
            page_cache.read(files)
        size = sum(file.stat().st_size for file in files)
        cached = page_cache.cached_bytes(files)
        about = {"checkpoint_gb": size / GB, "cached_gb": None if cached is None else cached / GB}
        about["load_average"] = machine.describe()["load"]
        stages = None if kind == "whole" else self.folders.work / "stages.json"
        command = command_of(case, self.folders, self.options.size, stages=stages)
        picture = self.folders.work / "picture.png"
        picture.unlink(missing_ok=True)
        measured = measure(command, timeout=TIMEOUT)
        if not picture.exists():
            raise FailedError("no image was written")
        if stages is not None:
            about |= stage_figures(json.loads(stages.read_text()), measured)
        self._add(case, kind, measured, about)

    def _add(self, case: Case, kind: str, measured: Measured, about: dict[str, Any]) -> None:
        figures = {name: getattr(measured, name) for name in ("seconds", "cpu", "peak", "anonymous", "read")}
        self.records.append({"case": case.name, "kind": kind, **figures, **about})
        anonymous = "" if measured.anonymous is None else f" ({measured.anonymous:.2f} anonymous)"
        print(
            f"{self.elapsed:6.0f} s  {case.name}, {kind}: {measured.seconds:.1f} s, peak {measured.peak:.2f} GB"
            f"{anonymous}, {measured.read:.2f} GB from the disk",
            file=sys.stderr,
            flush=True,
        )

    def report(self, about: dict[str, Any]) -> dict[str, Any]:
        """Return all results for JSON.

        Args:
            about: Description of the machine.
        """
        names = ("size", "config", "towers", "rounds", "stage_rounds", "dropped_rounds")
        return {
            "options": {name: getattr(self.options, name) for name in names},
            "machine": about,
            "elapsed": self.elapsed,
            "left_out": self.left_out,
            "records": self.records,
        }


def stage_figures(timed: dict[str, Any], measured: Measured) -> dict[str, Any]:
    """Return seconds and memory of the stages of a run.

    Args:
        timed: Content of the file that `Stopwatch.write` wrote.
        measured: Measurements of the process.
    """
    events = [(float(moment), str(name)) for moment, name in timed["events"]]
    return {
        "stages": seconds_per_stage(events, measured.started + measured.seconds),
        "stage_anonymous": peak_per_stage(events, measured.samples),
        "counts": timed["counts"],
    }


@contextlib.contextmanager
def weights(options: argparse.Namespace) -> Iterator[Folders]:
    """Return a context manager of the folders: those of `--folder`, or temporary ones with random weights.

    Args:
        options: Command line options.
    """
    with tempfile.TemporaryDirectory(prefix="commands-") as temporary:
        work = Path(temporary)
        folder = work if options.folder is None else options.folder.resolve()
        prior = "prior-full" if options.towers == "full" else "prior"
        if any(case.model == PUBLISHED for case in CASES if not options.only or case.name in options.only):
            parts = ("prior", "prior-full", "decoder") if options.towers == "full" else ("prior", "decoder")
            compare_weights.ensure(folder, options.config, parts)
        yield Folders(folder / prior, folder / "decoder", work)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line options.

    Args:
        arguments: Command line arguments; None takes those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.commands", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [case.name for case in CASES]
    parser.add_argument(
        "--folder", type=Path, help="folder of the weights, written if missing (default: a temporary one)"
    )
    parser.add_argument("--config", choices=compare_weights.CONFIGS, default="published", help="config (published)")
    parser.add_argument(
        "--towers", choices=("full", "thin"), default="full", help="CLIP towers with all layers, or with one (full)"
    )
    parser.add_argument("--size", type=int, help="side of the image in pixels (512; tiny: 64)")
    parser.add_argument("--only", nargs="+", choices=names, metavar="CASE", help=f"these cases: {'; '.join(names)}")
    parser.add_argument("--rounds", type=int, default=3, help="passes with the unchanged command (3)")
    parser.add_argument("--stage-rounds", type=int, default=1, help="passes with times of stages (1)")
    parser.add_argument("--dropped-rounds", type=int, default=1, help="passes with dropped files (1)")
    parser.add_argument("--minutes", type=float, help="time limit; runs that would exceed it are left out")
    parser.add_argument("--out", type=Path, help="file for the results (JSON)")
    parser.add_argument("--docs", type=Path, nargs="?", const=PAGE, help="page to write the tables into (docs)")
    parser.add_argument("--report", type=Path, nargs="?", const=RESULT, help="print the tables of an earlier run only")
    options = parser.parse_args(arguments)
    if options.size is None:
        options.size = compare_weights.SIZES[options.config]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark, or print the tables of an earlier run.

    Args:
        arguments: Command line arguments; None takes those of the process.

    Returns:
        Exit code: 1 if a command failed, 0 otherwise.
    """
    options = parse(arguments)
    if options.report is not None:
        report = json.loads(options.report.read_text(encoding="utf-8"))
    else:
        if not console_command().exists():
            raise SystemExit(f"{console_command()} is missing: install the package into this environment")
        about = machine.describe()  # before the runs, which raise the load average
        with weights(options) as folders:
            bench = Bench(options, folders)
            bench.run()
        report = bench.report(about)
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(commands_report.markdown(report))
    if options.docs is not None:
        commands_report.write_page(options.docs, report)
    return int(any("exit code" in reason for reason in report["left_out"].values()))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the measured process as well
    sys.exit(main())
