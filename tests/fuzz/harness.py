"""Runs generated cases and reports escapes: exceptions outside the family, hangs, and results that are not finite.

A case is a JSON object, so that an escape can be stored in ``known_cases.jsonl`` and replayed. Targets generate cases
from a random number generator and run them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import signal
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from kandinsky22 import KandinskyError

TIME_LIMIT = 30  # seconds per case
LONGEST_MESSAGE = 4000  # characters

Case = dict[str, Any]


class Escape(AssertionError):
    """A case ended in a way that no user may see."""


class HangError(BaseException):
    """A case exceeded its time limit. It derives from BaseException so that library code does not catch it."""


class Target(Protocol):
    """One kind of cases."""

    name: str

    def generate(self, rng: random.Random) -> Case:
        """Return a case, a JSON object without the target's name."""

    def run(self, case: Case) -> None:
        """Run a case. Errors of the family are expected; everything else escapes."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """An escape and its case.

    Attributes:
        target: Name of the target.
        case: The case.
        problem: Description, with the traceback of an exception.
    """

    target: str
    case: Case
    problem: str

    def line(self) -> str:
        """Return the case as a line for ``known_cases.jsonl``."""
        return json.dumps({"target": self.target, **self.case}, sort_keys=True)


def case_of(target: Target, seed: int, index: int) -> Case:
    """Return case number `index` of a seed."""
    case = target.generate(random.Random(f"{seed}:{target.name}:{index}"))
    return dict(json.loads(json.dumps(case)))


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise HangError in the main thread after this many seconds."""

    def expire(*_: object) -> None:
        raise HangError(f"no end after {seconds} s")

    previous = signal.signal(signal.SIGALRM, expire)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def check(target: Target, case: Case) -> Finding | None:
    """Run a case and return what escaped, or None."""
    try:
        with time_limit(TIME_LIMIT), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.run(case)
    except KandinskyError as error:
        message = str(error)
        if not message or len(message) > LONGEST_MESSAGE:
            return Finding(target.name, case, f"a message of {len(message)} characters: {message[:200]!r}")
        return None
    except Escape as error:
        return Finding(target.name, case, str(error))
    except (Exception, HangError, SystemExit) as error:
        lines = traceback.format_exception(error)
        return Finding(target.name, case, "".join(lines[-12:]))
    return None


def known_cases() -> list[Case]:
    """Return the stored cases, each with the name of its target."""
    lines = (Path(__file__).parent / "known_cases.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]
