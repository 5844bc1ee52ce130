"""Worker process: one library at one stage, which executes commands from a pipe, one line of JSON per command.

    {"do": "count"}                 {"operations": ..., "seconds": ...}   one call with counted operations, as a warm-up
    {"do": "call", "number": 1}     {"seconds": ..., "cpu": ...}          one call
    {"do": "save", "path": ...}     {"seconds": ..., "cpu": ...}          call 0, whose result is written to a file
    {"do": "switch", "off": name}   {}                                    see benchmarks/compare_switches.py
    {"do": "peaks"}                 {"convolution": ..., "product": ...}  peak arithmetic of the machine
    {"do": "memory"}                {"peaks": [...]}                      GiB, per part of a call if it has parts

The worker begins with the line {"import": ..., "load": ..., "cpu": ...} in seconds. `Worker` is the client.
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

POLL_SECONDS = 0.05  # interval at which a worker's memory is sampled
CLIP = ("CLIPTextModelWithProjection", "CLIPVisionModelWithProjection", "CLIPTokenizer", "CLIPImageProcessor")


class Server:
    """State of a worker process. Commands call the method `do_{name}`.

    Args:
        setting: Its settings.
    """

    def __init__(self, setting: Setting) -> None:
        import torch

        torch.set_num_threads(setting.threads)
        self.torch, self.setting = torch, setting
        self.stage: Stage | None = None
        self.disabled: str | None = None

    def start(self) -> dict[str, float]:
        """Import the library and load the stage.

        Returns:
            Seconds of "import" and "load", and CPU seconds of loading.
        """
        import importlib

        if self.setting.stage not in STAGES:
            return {}
        start = time.perf_counter()
        library = importlib.import_module(self.setting.library)
        for name in ("KandinskyV22PriorPipeline", "KandinskyV22Pipeline"):  # both libraries import these lazily
            getattr(library, name)
        transformers = importlib.import_module("transformers")
        for name in CLIP:  # ours imports them when it loads, the reference earlier
            getattr(transformers, name)
        imported, cpu = time.perf_counter(), time.process_time()
        self.stage = STAGES[self.setting.stage](self.setting)
        self._wait()
        seconds = {"import": imported - start, "load": time.perf_counter() - imported}
        return {**seconds, "cpu": time.process_time() - cpu}

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        """Return the result of a command.

        Args:
            command: Its name as "do", and its arguments.
        """
        do: Callable[..., dict[str, Any]] = getattr(self, f"do_{command.pop('do')}")
        return do(**command)

    def do_peaks(self, small: bool) -> dict[str, float]:
        """Return the peak arithmetic of the machine.

        Args:
            small: Whether to measure small cases.
        """
        return machine.peaks(self.setting.dtype, self.setting.device, small=small)

    def do_count(self) -> dict[str, Any]:
        """Return the number of operations of a call, which cannot be counted in compiled code."""
        assert self.stage is not None
        start = time.perf_counter()
        operations = None
        if self.setting.compiled:
            self.stage.call(-1)
        else:
            operations = self.stage.operations(machine.count_operations)
        return {"operations": operations, "seconds": time.perf_counter() - start}

    def do_call(self, number: int) -> dict[str, float]:
        """Return the seconds of a call.

        Args:
            number: Number of the call.
        """
        return self._timed(number)[1]

    def do_save(self, path: str) -> dict[str, float]:
        """Write the result of call 0 to a file.

        Args:
            path: Path of the file.

        Returns:
            Seconds of the call.
        """
        result, seconds = self._timed(0)
        tensors = result if isinstance(result, list) else [result]
        self.torch.save(self.torch.cat([tensor.detach().float().cpu().flatten() for tensor in tensors]), path)
        return seconds

    def do_switch(self, off: str | None) -> dict[str, Any]:
        """Switch off one optimisation in the following calls.

        Args:
            off: Its name; None leaves all of them on.

        Returns:
            An empty mapping.
        """
        self.disabled = off
        return {}

    def do_memory(self) -> dict[str, Any]:
        """Return the peak memory in GiB."""
        if self.setting.device != "cpu":
            return {"peaks": [self.torch.cuda.max_memory_allocated() / machine.GIB]}
        earlier = self.stage.peaks if self.stage is not None else []
        return {"peaks": [*earlier, machine.peak_memory()]}

    def _wait(self) -> None:
        if self.setting.device != "cpu":
            self.torch.cuda.synchronize()

    def _timed(self, number: int) -> tuple[Any, dict[str, float]]:
        """Return the result of a call, its seconds without pauses, and those of all cores together."""
        assert self.stage is not None
        self.stage.pause = 0.0
        with compare_switches.without(self.disabled):
            if self.setting.device != "cpu":
                return self._timed_by_events(number)
            start, cpu = time.perf_counter(), time.process_time()
            result = self.stage.call(number)
            elapsed = time.perf_counter() - start
        return result, {
            "seconds": elapsed - self.stage.pause,
            "cpu": time.process_time() - cpu,
            "wall": elapsed,
        }

    def _timed_by_events(self, number: int) -> tuple[Any, dict[str, float]]:
        """Return the same by the accelerator's clock. This method has not been tested on an accelerator."""
        assert self.stage is not None
        begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._wait()
        begin.record()
        result = self.stage.call(number)
        end.record()
        self._wait()
        return result, {"seconds": begin.elapsed_time(end) / 1000 - self.stage.pause}


def serve() -> None:
    """Execute commands until the pipe is closed."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries that print must not disturb the answers
    server = Server(Setting(**json.loads(sys.argv[1])))

    def reply(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    reply(server.start())
    for line in sys.stdin:
        reply(server.answer(json.loads(line)))


class Worker:
    """Client of a worker process: starts it, sends commands, and samples its memory.

    Args:
        setting: Settings of the worker.

    Attributes:
        started: Seconds of importing and loading.
        own_memory: Largest memory in GiB that is not backed by files, sampled every POLL_SECONDS during commands.

    Raises:
        RuntimeError: The worker has ended unexpectedly; the message contains its standard error.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting, self.own_memory = setting, 0.0
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
        """Send a command and wait for its result.

        Args:
            do: Name of the command.
            **arguments: Its arguments.

        Returns:
            The result.

        Raises:
            RuntimeError: The worker has ended unexpectedly.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # reading raises the worker's error
        return self._read()

    def _read(self) -> dict[str, Any]:
        pipe, status = self._process.stdout, Path(f"/proc/{self._process.pid}/status")
        assert pipe is not None
        while not select.select([pipe], [], [], POLL_SECONDS)[0]:
            self.own_memory = max(self.own_memory, machine.status("RssAnon", status) or 0.0)
        self.own_memory = max(self.own_memory, machine.status("RssAnon", status) or 0.0)
        line = pipe.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            name = f"{self.setting.library}, {self.setting.stage}, {self.setting.dtype}"
            code, log = self._process.returncode, self._log.read()[-4000:]
            raise RuntimeError(f"the worker ({name}) ended with exit code {code}:\n{log}")
        return dict(json.loads(line))

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._process.kill()  # a command may still be running
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._log.close()


if __name__ == "__main__":
    serve()
