"""One library at one stage in a process of its own, which does what it is told over pipes, a line of JSON at a time.

    {"do": "count"}                 {"operations": ..., "seconds": ...}   one call, counted: warms up as well
    {"do": "call", "number": 1}     {"seconds": ..., "cpu": ...}          one call
    {"do": "save", "path": ...}     {"seconds": ..., "cpu": ...}          call 0, its result written to a file
    {"do": "switch", "off": name}   {}                                    see benchmarks/compare_switches.py
    {"do": "peaks"}                 {"convolution": ..., "product": ...}  what the machine can do at most
    {"do": "memory"}                {"peaks": [...]}                      GiB, of the parts of a call if it has any

The first line it writes itself, {"import": ..., "load": ..., "cpu": ...} in seconds. `Worker` is the other end.
"""

from __future__ import annotations

import dataclasses
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks import compare_switches, machine
from benchmarks.compare_stages import STAGES, Setting, Stage

LOOK = 0.05  # seconds between two looks at a worker's memory
CLIP = ("CLIPTextModelWithProjection", "CLIPVisionModelWithProjection", "CLIPTokenizer", "CLIPImageProcessor")


class Served:
    """What a worker does."""

    def __init__(self, setting: Setting) -> None:
        import torch

        torch.set_num_threads(setting.threads)
        self.torch, self.setting = torch, setting
        self.stage: Stage | None = None

    def start(self) -> dict[str, float]:
        """Import the library and load the stage."""
        import importlib

        if self.setting.stage not in STAGES:
            return {}
        begun = time.perf_counter()
        library = importlib.import_module(self.setting.library)
        for name in ("KandinskyV22PriorPipeline", "KandinskyV22Pipeline"):  # both libraries import these when asked
            getattr(library, name)
        transformers = importlib.import_module("transformers")
        for name in CLIP:  # ours imports them to load, the reference before
            getattr(transformers, name)
        imported, cpu = time.perf_counter(), time.process_time()
        self.stage = STAGES[self.setting.stage](self.setting)
        self._wait()
        seconds = {"import": imported - begun, "load": time.perf_counter() - imported}
        return {**seconds, "cpu": time.process_time() - cpu}

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        """Do one thing."""
        do: Callable[..., dict[str, Any]] = getattr(self, f"do_{command.pop('do')}")
        return do(**command)

    def do_peaks(self, small: bool) -> dict[str, float]:
        """What the machine can do at most."""
        return machine.peaks(self.setting.dtype, self.setting.device, small=small)

    def do_count(self) -> dict[str, Any]:
        """What a call computes; compiled code cannot be looked into."""
        assert self.stage is not None
        begun = time.perf_counter()
        operations = None
        if self.setting.compiled:
            self.stage.call(-1)
        else:
            operations = self.stage.operations(machine.count_operations)
        return {"operations": operations, "seconds": time.perf_counter() - begun}

    def do_call(self, number: int) -> dict[str, float]:
        """One call."""
        return self._timed(number)[1]

    def do_save(self, path: str) -> dict[str, float]:
        """Call 0, its result to a file."""
        result, seconds = self._timed(0)
        tensors = result if isinstance(result, list) else [result]
        self.torch.save(self.torch.cat([tensor.detach().float().cpu().flatten() for tensor in tensors]), path)
        return seconds

    def do_switch(self, off: str | None) -> dict[str, Any]:
        """Everything on but this."""
        compare_switches.leave_off(off)
        return {}

    def do_memory(self) -> dict[str, Any]:
        """The most memory that was taken."""
        if self.setting.device != "cpu":
            return {"peaks": [self.torch.cuda.max_memory_allocated() / machine.GIB]}
        earlier = self.stage.peaks if self.stage is not None else []
        return {"peaks": [*earlier, machine.peak_memory()]}

    def _wait(self) -> None:
        if self.setting.device != "cpu":
            self.torch.cuda.synchronize()

    def _timed(self, number: int) -> tuple[Any, dict[str, float]]:
        """A call, its seconds without pauses, and those of all cores together."""
        assert self.stage is not None
        self.stage.pause = 0.0
        if self.setting.device != "cpu":
            return self._timed_by_events(number)
        begun, cpu = time.perf_counter(), time.process_time()
        result = self.stage.call(number)
        took = time.perf_counter() - begun
        return result, {
            "seconds": took - self.stage.pause,
            "cpu": time.process_time() - cpu,
            "wall": took,
        }

    def _timed_by_events(self, number: int) -> tuple[Any, dict[str, float]]:
        """The same by the accelerator's own clock. Untested: there was no accelerator when this was written."""
        assert self.stage is not None
        begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._wait()
        begin.record()
        result = self.stage.call(number)
        end.record()
        self._wait()
        return result, {"seconds": begin.elapsed_time(end) / 1000 - self.stage.pause}


def serve() -> None:
    """Answer until the other end closes."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever libraries print is no answer
    served = Served(Setting(**json.loads(sys.argv[1])))

    def reply(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    reply(served.start())
    for line in sys.stdin:
        reply(served.answer(json.loads(line)))


class Worker:
    """The other end: starts a worker, asks it, and watches how much memory it takes.

    `own` is the most that no file on disk stands for, in GiB, looked at every LOOK seconds while it works. Raises
    RuntimeError with what the worker wrote to standard error if it ends before it was told to.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting, self.own = setting, 0.0
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (closed at exit)
        environment = {**os.environ, "OMP_NUM_THREADS": str(setting.threads), "TOKENIZERS_PARALLELISM": "false"}
        environment |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.compare_worker", json.dumps(dataclasses.asdict(setting))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
            cwd=Path(__file__).parent.parent,
        )
        self.started = self._read()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Tell it to do something, and wait for the answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # reading tells why
        return self._read()

    def _read(self) -> dict[str, Any]:
        pipe, status = self._process.stdout, Path(f"/proc/{self._process.pid}/status")
        assert pipe is not None
        while not select.select([pipe], [], [], LOOK)[0]:
            self.own = max(self.own, machine.status("RssAnon", status) or 0.0)
        self.own = max(self.own, machine.status("RssAnon", status) or 0.0)
        line = pipe.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            about = f"{self.setting.library}, {self.setting.stage}, {self.setting.dtype}"
            code, said = self._process.returncode, self._log.read()[-4000:]
            raise RuntimeError(f"the worker ({about}) ended with {code}:\n{said}")
        return dict(json.loads(line))

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._process.kill()  # it may be in the middle of something long
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._log.close()


if __name__ == "__main__":
    serve()
