"""A few hundred generated cases of each target, and all stored ones. ``make fuzz N=20000`` runs more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.fuzz.harness import case_of, check, known_cases
from tests.fuzz.targets import NAMES, SHARES, targets_of
from tests.fuzz.world import World

SEED, CASES = 1, 800


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_HOME", "KANDINSKY22_CACHE"):
            patch.setenv(name, "")  # restored afterwards
        yield World(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("name", NAMES)
def test_generated_cases_do_not_escape(name: str, world: World) -> None:
    target = targets_of(world)[name]
    findings = [check(target, case_of(target, SEED, index)) for index in range(round(CASES * SHARES[name]))]
    assert not [f"{finding.line()}\n{finding.problem}" for finding in findings if finding]


def test_stored_cases_do_not_escape(world: World) -> None:
    targets = targets_of(world)
    findings = [check(targets[case.pop("target")], case) for case in known_cases()]
    assert not [f"{finding.line()}\n{finding.problem}" for finding in findings if finding]


def test_escapes_are_reported(world: World, tmp_path: Path) -> None:
    class Broken:
        name = "broken"

        def generate(self, rng: object) -> dict[str, object]:
            return {}

        def run(self, case: dict[str, object]) -> None:
            raise RuntimeError("raw")

    finding = check(Broken(), {"a": 1})  # type: ignore[arg-type]
    assert finding is not None
    assert "RuntimeError: raw" in finding.problem
    assert finding.line() == '{"a": 1, "target": "broken"}'
