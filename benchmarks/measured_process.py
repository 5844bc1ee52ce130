"""Run a command in a fresh process, and measure its time, its memory and what it reads from the disk.

Nothing is installed in the process: the figures come from its parent and from the system.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks import machine

INTERVAL = 0.02  # seconds between two samples of the memory
GB = 1e9


@dataclasses.dataclass(frozen=True)
class Measured:
    """Measurements of a finished process.

    Attributes:
        seconds: From the start of the process to its end.
        cpu: Seconds of all its threads on cores.
        peak: Largest resident memory in GB, including pages of mapped files.
        anonymous: Largest sample of resident memory that is not backed by files, in GB; None where it is unknown.
        read: GB that were read from the disk, page faults included. Reads that the system's cache served do not count.
        samples: Time (of `time.time`) and anonymous memory in GB of each sample.
        started: Start of the process, as of `time.time`.
        output: What the process wrote to standard output.
    """

    seconds: float
    cpu: float
    peak: float
    anonymous: float | None
    read: float
    samples: tuple[tuple[float, float], ...]
    started: float
    output: str


class FailedError(RuntimeError):
    """A process has ended with an error or was stopped."""


def measure(command: Sequence[str], *, timeout: float) -> Measured:
    """Run a command, and measure it.

    Args:
        command: The command and its arguments. Each argument "{started}" is replaced by the time of the start.
        timeout: Seconds after which the process is stopped.

    Returns:
        Its measurements.

    Raises:
        FailedError: The exit code is not 0, or the time limit has passed.
    """
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        start, started = time.perf_counter(), time.time()
        words = [str(started) if word == "{started}" else word for word in command]
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=errors)
        samples: list[tuple[float, float]] = []
        with _killed_on_error(process), _end_of(process.pid) as wait:
            while True:
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                if pid:
                    break
                if time.perf_counter() - start > timeout:
                    os.kill(process.pid, signal.SIGKILL)
                anonymous = machine.status("RssAnon", Path(f"/proc/{process.pid}/status"))
                if anonymous is not None:
                    samples.append((time.time(), anonymous * machine.GIB / GB))
                wait()
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        for file in (output, errors):
            file.seek(0)
        if process.returncode:
            lines = errors.read().strip().splitlines() or ["nothing was written to standard error"]
            limit = " (time limit)" if seconds > timeout else ""
            raise FailedError(f"exit code {process.returncode}{limit}: {lines[-1]}")
        return Measured(
            seconds=seconds,
            cpu=usage.ru_utime + usage.ru_stime,
            peak=usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / GB,
            anonymous=max((value for _, value in samples), default=None),
            read=usage.ru_inblock * 512 / GB,
            samples=tuple(samples),
            started=started,
            output=output.read(),
        )


@contextlib.contextmanager
def _killed_on_error(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Return a context manager that does not leave the process behind if the benchmark is interrupted."""
    try:
        yield
    except BaseException:
        process.kill()
        process.wait()
        raise


@contextlib.contextmanager
def _end_of(pid: int) -> Iterator[Callable[[], object]]:
    """Return a context manager of a function that waits until a process ends, but not longer than the interval."""
    if not hasattr(os, "pidfd_open"):
        yield lambda: time.sleep(INTERVAL)
        return
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:  # an older kernel
        yield lambda: time.sleep(INTERVAL)
        return
    try:
        yield lambda: select.select([descriptor], [], [], INTERVAL)
    finally:
        os.close(descriptor)
