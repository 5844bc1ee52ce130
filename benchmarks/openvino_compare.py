"""Comparison with OpenVINO: a guided step of the UNet, a step of the prior, a decoding by MoVQ, per precision.

    python -m benchmarks.openvino_compare --folder bench

writes random weights of the published configs into the folder if it has none. Both libraries run on the same files,
each in a separate process. Their rounds alternate, ours and OpenVINO's, and which of them begins changes from round to
round; the ratio is the median of those of the rounds. OpenVINO's graphs are exported once, into `--graphs`.
int8 is `quantize("int8-static")` against graphs that NNCF has quantized, each around layers of `--int8-type`. Neither
quantizes MoVQ, so decoding has no int8.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks import compare_weights, machine

OURS, OPENVINO = "ours", "openvino"
STAGES = ("step", "prior", "decode")
PRECISIONS = ("float32", "bfloat16", "int8")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What one worker process runs.

    Attributes:
        library: OURS or OPENVINO.
        stage: One of STAGES.
        precision: One of PRECISIONS.
        folder: Folder of the weights.
        graphs: Folder of OpenVINO's graphs.
        size: Side of the image in pixels.
        threads: Number of threads.
        int8_type: Floating-point type of layers that are not quantized.
    """

    library: str
    stage: str
    precision: str
    folder: str
    graphs: str
    size: int
    threads: int
    int8_type: str


# In the worker


def load(setting: Setting) -> Any:
    """Return a pipeline with the network of a stage alone, ready to run.

    Args:
        setting: What to run.
    """
    import torch

    from kandinsky22 import KandinskyV22Pipeline, KandinskyV22PriorPipeline

    is_int8 = setting.precision == "int8"
    dtype = getattr(torch, setting.int8_type if is_int8 else setting.precision)
    if setting.stage == "prior":
        left_out: dict[str, Any] = {"image_encoder": None, "text_encoder": None}
        pipe: Any = KandinskyV22PriorPipeline.from_pretrained(
            Path(setting.folder) / "prior", torch_dtype=dtype, **left_out
        )
    else:
        left_out = {"movq" if setting.stage == "step" else "unet": None}
        pipe = KandinskyV22Pipeline.from_pretrained(Path(setting.folder) / "decoder", torch_dtype=dtype, **left_out)
    if setting.library == OPENVINO:
        pipe.to_openvino(precision=setting.precision, cache_dir=setting.graphs)
    elif is_int8:
        pipe.quantize("int8-static")
    return pipe


def bind(setting: Setting, pipe: Any) -> tuple[Callable[[], Any], int]:
    """Return the call of a stage on fixed inputs, and the number of steps that it makes.

    Args:
        setting: What to run.
        pipe: The pipeline.
    """
    from benchmarks.network_steps import PRIOR_STEPS, bind_network

    return bind_network(pipe, setting.stage, setting.size), PRIOR_STEPS if setting.stage == "prior" else 1


def serve(setting: Setting) -> None:
    """Answer each line of standard input with the seconds of one call, the line "result" with the result's file.

    Args:
        setting: What to run.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries that print must not disturb the answers
    import torch

    torch.set_num_threads(setting.threads)
    start = time.perf_counter()
    with torch.no_grad():
        call, steps = bind(setting, load(setting))
        ready = time.perf_counter() - start
        result = call()
        first = time.perf_counter() - start - ready
        print(json.dumps({"ready": ready, "first": first}), file=answers, flush=True)
        for line in sys.stdin:
            if path := line.strip():
                torch.save(result.float(), path)
                print(json.dumps({"peak_gib": machine.peak_memory()}), file=answers, flush=True)
                continue
            start = time.perf_counter()
            result = call()
            print(json.dumps({"seconds": (time.perf_counter() - start) / steps}), file=answers, flush=True)


# In the parent process


class Worker:
    """A worker process.

    Args:
        setting: What it runs.

    Attributes:
        started: Seconds until the network was ready, and of the first call.
    """

    def __init__(self, setting: Setting) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(setting.threads), "HF_HUB_OFFLINE": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (closed at exit)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.openvino_compare", "--worker", json.dumps(dataclasses.asdict(setting))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
            cwd=Path(__file__).parent.parent,
        )
        self.started = self._answer()

    def seconds(self) -> float:
        """Return the seconds of one more call, per step."""
        return float(self._ask("")["seconds"])

    def result(self, path: Path) -> float:
        """Write the result of the last call, and return the process's peak memory in GiB.

        Args:
            path: File to write.
        """
        return float(self._ask(str(path))["peak_gib"])

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._log.seek(0)
            raise RuntimeError(f"a worker ended with exit code {code}:\n{self._log.read()[-4000:]}")
        return dict(json.loads(line))

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if error is not None:
            self._process.kill()
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._log.close()


def compare(options: argparse.Namespace, stage: str, precision: str) -> dict[str, Any]:
    """Return the measurements of one stage in one precision.

    Args:
        options: Command line options.
        stage: One of STAGES.
        precision: One of PRECISIONS.
    """
    import torch

    graphs = str((options.graphs or options.folder / "openvino").resolve())
    ours, theirs = (
        Setting(
            library,
            stage,
            precision,
            str(options.folder.resolve()),
            graphs,
            options.size,
            options.threads,
            options.int8_type,
        )
        for library in (OURS, OPENVINO)
    )
    seconds: dict[str, list[float]] = {OURS: [], OPENVINO: []}
    with tempfile.TemporaryDirectory() as name, Worker(ours) as our_worker, Worker(theirs) as their_worker:
        workers = {OURS: our_worker, OPENVINO: their_worker}
        for number in range(options.rounds):
            for library in (OURS, OPENVINO) if number % 2 == 0 else (OPENVINO, OURS):
                seconds[library].append(workers[library].seconds())
        files = {library: Path(name) / library for library in workers}
        peaks = {library: worker.result(files[library]) for library, worker in workers.items()}
        results = [torch.load(path) for path in files.values()]
        started = {library: worker.started for library, worker in workers.items()}
    ratios = [a / b for a, b in zip(seconds[OURS], seconds[OPENVINO], strict=True)]
    difference = float((results[0] - results[1]).abs().max() / results[0].std())
    return {
        "stage": stage,
        "precision": precision,
        "seconds": seconds,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "started": started,
        "peak_gib": peaks,
        "difference": difference,
    }


def row(record: dict[str, Any]) -> str:
    """Return a line of the table.

    Args:
        record: Result of `compare`.
    """
    ours, theirs = (statistics.median(record["seconds"][library]) for library in (OURS, OPENVINO))
    first = [sum(record["started"][library].values()) for library in (OURS, OPENVINO)]
    peaks = [record["peak_gib"][library] for library in (OURS, OPENVINO)]
    spread = f"{min(record['ratios']):.2f} to {max(record['ratios']):.2f}"
    return (
        f"| {record['stage']} | {record['precision']} | {ours:.3f} | {theirs:.3f} | {record['ratio']:.2f} | {spread} "
        f"| {first[0]:.1f}, {first[1]:.1f} | {peaks[0]:.1f}, {peaks[1]:.1f} | {record['difference']:.1e} |"
    )


HEADER = (
    "| Stage | Precision | Ours, s | OpenVINO, s | Ratio | Range of rounds | Loaded and first call, s "
    "| Peak memory, GiB | Largest difference / deviation |\n|---|---|--:|--:|--:|--:|--:|--:|--:|"
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare with OpenVINO.", allow_abbrev=False)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=Path("bench"), help="folder of the weights")
    parser.add_argument("--graphs", type=Path, help="folder of OpenVINO's graphs (default: openvino in --folder)")
    parser.add_argument("--config", choices=compare_weights.CONFIGS, default="published")
    parser.add_argument("--size", type=int, help="side of the image in pixels (default: 512, or 64 for tiny)")
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--int8-type", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--out", type=Path, help="file for the measurements as JSON")
    options = parser.parse_args()
    if options.worker is not None:
        serve(Setting(**json.loads(options.worker)))
        return
    options.size = options.size or compare_weights.SIZES[options.config]
    parts = [
        part for part in ("prior", "decoder") if (part == "prior") in {stage == "prior" for stage in options.stage}
    ]
    compare_weights.ensure(options.folder, options.config, tuple(parts))
    print(HEADER, flush=True)
    records = []
    for stage in options.stage:
        for precision in options.precision:
            if stage == "decode" and precision == "int8":
                continue
            records.append(compare(options, stage, precision))
            print(row(records[-1]), flush=True)
    if options.out is not None:
        about = {**machine.describe(), "threads": options.threads, "size": options.size, "config": options.config}
        options.out.write_text(json.dumps({"machine": about, "records": records}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
